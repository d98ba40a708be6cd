//! The agents: a DaemonSet with what each needs of its host, and why.

use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, DaemonSetSpec, DaemonSetUpdateStrategy, RollingUpdateDaemonSet},
        core::v1::{
            Affinity, AppArmorProfile, Capabilities, ConfigMapVolumeSource, Container, ExecAction,
            HTTPGetAction, HostPathVolumeSource, NodeAffinity, NodeSelector, NodeSelectorRequirement,
            NodeSelectorTerm, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ProjectedVolumeSource,
            SeccompProfile, SecurityContext, ServiceAccountTokenProjection, Volume, VolumeMount,
            VolumeProjection,
        },
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use kube::core::Selector;

use super::{
    AGENT, AGENT_METRICS_PORT, CONTROLLER, ROOTS, ROOTS_KEY, RUN_DIR, STATE_DIR, Values, XDS_PORT, field,
    meta, pod_labels, selector, unless_empty, unless_none, variable,
};

/// What an agent may do on its host, and what for. It runs as root, without all other capabilities.
const CAPABILITIES: &[&str] = &[
    // Load programs and make maps.
    "BPF",
    // Attach to cgroups and network namespaces, destroy sockets that a policy no longer allows.
    "NET_ADMIN",
    // Tracing of the programs' own cost.
    "PERFMON",
    // Enter the network namespaces of pods, mount bpffs where the host has none.
    "SYS_ADMIN",
    // Enter the host's mount namespace for that.
    "SYS_CHROOT",
    // Read which namespaces the processes of pods are in.
    "SYS_PTRACE",
    // Read what processes of other users show in /proc.
    "DAC_READ_SEARCH",
];

/// Folders of the host: name, path, whether it is made when missing, whether mounts made there later are seen.
const FOLDERS: &[(&str, &str, bool, bool)] = &[
    ("cgroup", "/sys/fs/cgroup", false, true),
    ("bpf", "/sys/fs/bpf", false, true),
    ("netns", "/var/run/netns", true, true),
    ("run", RUN_DIR, true, false),
    // Outlives a reboot: pods that start before the agent, and an agent that starts before the controller, go by what is there.
    ("state", STATE_DIR, true, false),
];

const TOKENS: &str = "/var/run/secrets/tokens";
const ROOTS_DIR: &str = "/var/run/secrets/nodemesh";
/// Whom the agents' tokens are for: the API server itself refuses them.
const AUDIENCE: &str = "nodemesh.dev";
/// Life of a token; kubelet renews it at four fifths.
const TOKEN_LIFE_S: i64 = 3600;

pub(super) fn daemon_set(values: &Values, namespace: &str) -> DaemonSet {
    let of = &values.agent;
    let pod = PodSpec {
        service_account_name: Some(AGENT.to_owned()),
        host_network: Some(true),
        host_pid: Some(true),
        dns_policy: Some("ClusterFirstWithHostNet".to_owned()),
        priority_class_name: (!of.priority_class_name.is_empty()).then(|| of.priority_class_name.clone()),
        node_selector: unless_empty(&of.node_selector),
        affinity: (!of.node_expressions.is_empty()).then(|| only_on(&of.node_expressions)),
        tolerations: unless_none(&of.tolerations),
        image_pull_secrets: unless_none(&values.image_pull_secrets),
        termination_grace_period_seconds: Some(of.termination_grace_period_seconds),
        security_context: Some(PodSecurityContext {
            // Profiles forbid mounting and looking at processes of other profiles, which is the agent's work.
            app_armor_profile: Some(AppArmorProfile { type_: "Unconfined".to_owned(), ..Default::default() }),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        containers: vec![container(values, namespace)],
        volumes: Some(volumes(values)),
        ..Default::default()
    };
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(pod_labels(AGENT)),
            annotations: unless_empty(&of.pod_annotations),
            ..Default::default()
        }),
        spec: Some(pod),
    };
    let spec = DaemonSetSpec {
        selector: selector(AGENT),
        update_strategy: Some(DaemonSetUpdateStrategy {
            type_: Some("RollingUpdate".to_owned()),
            rolling_update: Some(RollingUpdateDaemonSet {
                // The next agent of a node takes over from the one before it, and only then that one ends.
                max_surge: Some(IntOrString::Int(of.max_surge)),
                max_unavailable: Some(IntOrString::Int(0)),
            }),
        }),
        template,
        ..Default::default()
    };
    DaemonSet { metadata: meta(AGENT, AGENT, Some(namespace)), spec: Some(spec), ..Default::default() }
}

/// Nodes whose labels all of these hold for.
fn only_on(expressions: &[LabelSelectorRequirement]) -> Affinity {
    let requirement = |of: &LabelSelectorRequirement| NodeSelectorRequirement {
        key: of.key.clone(),
        operator: of.operator.clone(),
        values: of.values.clone(),
    };
    let term = NodeSelectorTerm {
        match_expressions: Some(expressions.iter().map(requirement).collect()),
        match_fields: None,
    };
    let required = NodeSelector { node_selector_terms: vec![term] };
    let node = NodeAffinity {
        required_during_scheduling_ignored_during_execution: Some(required),
        ..Default::default()
    };
    Affinity { node_affinity: Some(node), ..Default::default() }
}

/// The nodes on which a DaemonSet that was made here has pods; `None`: somebody has put something else into it.
pub(in crate::ctl::install) fn nodes_of(set: &DaemonSet) -> Option<Selector> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    let affinity = pod.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|of| of.required_during_scheduling_ignored_during_execution.as_ref());
    let requirement = |of: NodeSelectorRequirement| LabelSelectorRequirement {
        key: of.key,
        operator: of.operator,
        values: of.values,
    };
    let expressions = match required.map(|of| &of.node_selector_terms[..]) {
        None => None,
        Some([NodeSelectorTerm { match_expressions, match_fields: None }]) => match_expressions.clone(),
        Some(_) => return None,
    };
    let selector = LabelSelector {
        match_labels: pod.node_selector.clone(),
        match_expressions: expressions.map(|all| all.into_iter().map(requirement).collect()),
    };
    Selector::try_from(selector).ok()
}

fn container(values: &Values, namespace: &str) -> Container {
    let of = &values.agent;
    let mut env = vec![
        field("NODE_NAME", "spec.nodeName"),
        variable("MESH_CLUSTER_DOMAIN", &values.cluster_domain),
        variable("MESH_CNI_UNENROLLED", &values.cni.unenrolled),
        variable("MESH_DRAIN", &of.drain),
        variable("MESH_LOG", &values.logging.level),
        variable("MESH_LOG_FORMAT", &values.logging.format),
    ];
    if !of.prober_cgroup.is_empty() {
        env.push(variable("MESH_PROBER_CGROUP", &of.prober_cgroup));
    }
    env.extend(of.env.iter().map(|(name, value)| variable(name, value)));
    let probe = |path: &str, period_s: i32, failures: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(AGENT_METRICS_PORT),
            ..Default::default()
        }),
        period_seconds: Some(period_s),
        timeout_seconds: Some(5),
        failure_threshold: Some(failures),
        ..Default::default()
    };
    Container {
        name: "agent".to_owned(),
        image: Some(values.image.clone()),
        image_pull_policy: Some(values.image_pull_policy.clone()),
        command: Some(vec!["/mesh-agent".to_owned()]),
        args: Some(args(values, namespace)),
        env: Some(env),
        // No ports: in the host's network they would keep a second agent, the next one, off the node.
        // A node that never was in the mesh waits for the controller before it answers.
        // It asks for this container's own agent; the address of the other two is the node's, which the agent before this one answers first.
        startup_probe: Some(Probe {
            exec: Some(ExecAction { command: Some(started(values)) }),
            http_get: None,
            ..probe("", 2, 150)
        }),
        readiness_probe: Some(probe("/readyz", 2, 3)),
        liveness_probe: Some(probe("/healthz", 10, 6)),
        resources: Some(of.resources.clone()),
        security_context: Some(SecurityContext {
            run_as_user: Some(0),
            read_only_root_filesystem: Some(true),
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities {
                add: Some(CAPABILITIES.iter().map(ToString::to_string).collect()),
                drop: Some(vec!["ALL".to_owned()]),
            }),
            ..Default::default()
        }),
        volume_mounts: Some(mounts(values)),
        ..Default::default()
    }
}

fn started(values: &Values) -> Vec<String> {
    let metrics = format!("--metrics={}:{AGENT_METRICS_PORT}", values.listen_address);
    let state_dir = format!("--state-dir={STATE_DIR}");
    vec!["/mesh-agent".to_owned(), "started".to_owned(), state_dir, metrics]
}

fn args(values: &Values, namespace: &str) -> Vec<String> {
    let of = &values.agent;
    let mut args = vec![
        "node".to_owned(),
        "--kubernetes".to_owned(),
        format!("--controller=https://{CONTROLLER}.{namespace}.svc:{XDS_PORT}"),
        "--node=$(NODE_NAME)".to_owned(),
        format!("--token-file={TOKENS}/nodemesh-token"),
        format!("--root-cert={ROOTS_DIR}/{ROOTS_KEY}"),
    ];
    if !of.cgroup_root.is_empty() {
        args.push(format!("--cgroup-root={}", of.cgroup_root));
    }
    args.extend([
        format!("--state-dir={STATE_DIR}"),
        format!("--admin-socket={RUN_DIR}/admin.sock"),
        format!("--metrics={}:{AGENT_METRICS_PORT}", values.listen_address),
        format!("--cni-socket={RUN_DIR}/cni.sock"),
        format!("--cni-bin-dir={}", values.cni.bin_dir),
        format!("--cni-conf-dir={}", values.cni.conf_dir),
    ]);
    args
}

fn mounts(values: &Values) -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        ..Default::default()
    };
    let read_only = |name: &str, path: &str| VolumeMount { read_only: Some(true), ..mount(name, path) };
    let mut mounts: Vec<VolumeMount> = FOLDERS
        .iter()
        .map(|(name, path, _, later)| VolumeMount {
            mount_propagation: later.then(|| "HostToContainer".to_owned()),
            ..mount(name, path)
        })
        .collect();
    mounts.extend([
        mount("cni-bin", &values.cni.bin_dir),
        mount("cni-conf", &values.cni.conf_dir),
        read_only("token", TOKENS),
        read_only("roots", ROOTS_DIR),
    ]);
    mounts
}

fn volumes(values: &Values) -> Vec<Volume> {
    let folder = |name: &str, path: &str, made: bool| Volume {
        name: name.to_owned(),
        host_path: Some(HostPathVolumeSource {
            path: path.to_owned(),
            type_: Some(if made { "DirectoryOrCreate" } else { "Directory" }.to_owned()),
        }),
        ..Default::default()
    };
    let mut volumes: Vec<Volume> =
        FOLDERS.iter().map(|(name, path, made, _)| folder(name, path, *made)).collect();
    let token = ServiceAccountTokenProjection {
        audience: Some(AUDIENCE.to_owned()),
        expiration_seconds: Some(TOKEN_LIFE_S),
        path: "nodemesh-token".to_owned(),
    };
    let source = VolumeProjection { service_account_token: Some(token), ..Default::default() };
    volumes.extend([
        folder("cni-bin", &values.cni.bin_dir, true),
        folder("cni-conf", &values.cni.conf_dir, true),
        Volume {
            name: "token".to_owned(),
            projected: Some(ProjectedVolumeSource { sources: Some(vec![source]), ..Default::default() }),
            ..Default::default()
        },
        Volume {
            name: "roots".to_owned(),
            // Not optional: an agent starts when the controller has published whom to trust.
            config_map: Some(ConfigMapVolumeSource { name: ROOTS.to_owned(), ..Default::default() }),
            ..Default::default()
        },
    ]);
    volumes
}
