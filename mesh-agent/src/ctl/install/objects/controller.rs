//! The controller: a Deployment that needs nothing of its host, its Service, and its budget of disruptions.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            Affinity, Capabilities, Container, ContainerPort, EmptyDirVolumeSource, HTTPGetAction,
            PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
            SeccompProfile, SecurityContext, Service, ServicePort, ServiceSpec, Volume, VolumeMount,
            WeightedPodAffinityTerm,
        },
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

use super::{
    CONTROLLER, CONTROLLER_METRICS_PORT, Manifest, RUN_DIR, STATE_DIR, Values, WEBHOOK_PORT, XDS_PORT, field,
    meta, pod_labels, selector, unless_empty, unless_none, variable,
};

/// A user without rights, as in distroless images.
const NOBODY: i64 = 65_532;

pub(super) fn all(values: &Values, namespace: &str) -> Result<Vec<Manifest>, serde_json::Error> {
    Ok(vec![
        Manifest::of(&service(namespace))?,
        Manifest::of(&budget(namespace))?,
        Manifest::of(&deployment(values, namespace)?)?,
    ])
}

fn service(namespace: &str) -> Service {
    let port = |name: &str, port: i32, target: i32, protocol: &str| ServicePort {
        name: Some(name.to_owned()),
        port,
        target_port: Some(IntOrString::Int(target)),
        protocol: Some("TCP".to_owned()),
        app_protocol: Some(protocol.to_owned()),
        ..Default::default()
    };
    let spec = ServiceSpec {
        selector: selector(CONTROLLER).match_labels,
        ports: Some(vec![
            port("grpc-xds", XDS_PORT, XDS_PORT, "grpc"),
            port("webhook", 443, WEBHOOK_PORT, "https"),
            port("metrics", CONTROLLER_METRICS_PORT, CONTROLLER_METRICS_PORT, "http"),
        ]),
        ..Default::default()
    };
    Service {
        metadata: meta(CONTROLLER, CONTROLLER, Some(namespace)),
        spec: Some(spec),
        ..Default::default()
    }
}

/// One may be away at a time. With one replica that still lets a node be drained.
fn budget(namespace: &str) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: meta(CONTROLLER, CONTROLLER, Some(namespace)),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(selector(CONTROLLER)),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn deployment(values: &Values, namespace: &str) -> Result<Deployment, serde_json::Error> {
    let of = &values.controller;
    let strategy = RollingUpdateDeployment {
        max_surge: Some(IntOrString::Int(1)),
        max_unavailable: Some(IntOrString::Int(0)),
    };
    let volume = |name: &str| Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Default::default()
    };
    let pod = PodSpec {
        service_account_name: Some(CONTROLLER.to_owned()),
        priority_class_name: (!of.priority_class_name.is_empty()).then(|| of.priority_class_name.clone()),
        node_selector: unless_empty(&of.node_selector),
        tolerations: unless_none(&of.tolerations),
        image_pull_secrets: unless_none(&values.image_pull_secrets),
        affinity: Some(apart()),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(NOBODY),
            run_as_group: Some(NOBODY),
            fs_group: Some(NOBODY),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        containers: vec![container(values)?],
        volumes: Some(vec![volume("run"), volume("state")]),
        ..Default::default()
    };
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(pod_labels(CONTROLLER)),
            annotations: unless_empty(&of.pod_annotations),
            ..Default::default()
        }),
        spec: Some(pod),
    };
    let spec = DeploymentSpec {
        replicas: Some(of.replicas),
        selector: selector(CONTROLLER),
        strategy: Some(DeploymentStrategy {
            type_: Some("RollingUpdate".to_owned()),
            rolling_update: Some(strategy),
        }),
        template,
        ..Default::default()
    };
    Ok(Deployment {
        metadata: meta(CONTROLLER, CONTROLLER, Some(namespace)),
        spec: Some(spec),
        ..Default::default()
    })
}

/// Replicas on different nodes where there are several.
fn apart() -> Affinity {
    let term = PodAffinityTerm {
        label_selector: Some(selector(CONTROLLER)),
        topology_key: "kubernetes.io/hostname".to_owned(),
        ..Default::default()
    };
    let preferred = WeightedPodAffinityTerm { weight: 100, pod_affinity_term: term };
    let anti = PodAntiAffinity {
        preferred_during_scheduling_ignored_during_execution: Some(vec![preferred]),
        ..Default::default()
    };
    Affinity { pod_anti_affinity: Some(anti), ..Default::default() }
}

fn container(values: &Values) -> Result<Container, serde_json::Error> {
    let listen = &values.listen_address;
    let mut env = vec![
        field("POD_NAMESPACE", "metadata.namespace"),
        field("POD_NAME", "metadata.name"),
        variable("MESH_CLUSTER_DOMAIN", &values.cluster_domain),
        variable("MESH_ROOT_NAMESPACE", &values.root_namespace),
        variable("MESH_LOG", &values.logging.level),
        variable("MESH_LOG_FORMAT", &values.logging.format),
    ];
    let nodes = values.agent.nodes();
    if nodes != LabelSelector::default() {
        env.push(variable("MESH_AGENT_NODES", &serde_json::to_string(&nodes)?));
    }
    env.extend(values.controller.env.iter().map(|(name, value)| variable(name, value)));
    let port = |name: &str, port: i32| ContainerPort {
        name: Some(name.to_owned()),
        container_port: port,
        protocol: Some("TCP".to_owned()),
        ..Default::default()
    };
    let mount = |name: &str, path: &str| VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        ..Default::default()
    };
    let probe = |path: &str, period_s: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::Int(CONTROLLER_METRICS_PORT),
            ..Default::default()
        }),
        period_seconds: Some(period_s),
        timeout_seconds: Some(5),
        failure_threshold: Some(3),
        ..Default::default()
    };
    let mut args = vec![
        "controller".to_owned(),
        "--kubernetes".to_owned(),
        "--namespace=$(POD_NAMESPACE)".to_owned(),
        format!("--listen={listen}:{XDS_PORT}"),
        format!("--metrics={listen}:{CONTROLLER_METRICS_PORT}"),
        format!("--webhook-listen={listen}:{WEBHOOK_PORT}"),
    ];
    if values.controller.read_secrets {
        args.push("--read-secrets".to_owned());
    }
    Ok(Container {
        name: "controller".to_owned(),
        image: Some(values.image.clone()),
        image_pull_policy: Some(values.image_pull_policy.clone()),
        command: Some(vec!["/mesh-agent".to_owned()]),
        args: Some(args),
        env: Some(env),
        ports: Some(vec![
            port("grpc-xds", XDS_PORT),
            port("webhook", WEBHOOK_PORT),
            port("metrics", CONTROLLER_METRICS_PORT),
        ]),
        readiness_probe: Some(probe("/readyz", 2)),
        liveness_probe: Some(probe("/healthz", 10)),
        resources: Some(values.controller.resources.clone()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { add: None, drop: Some(vec!["ALL".to_owned()]) }),
            ..Default::default()
        }),
        volume_mounts: Some(vec![mount("run", RUN_DIR), mount("state", STATE_DIR)]),
        ..Default::default()
    })
}
