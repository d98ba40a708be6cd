//! Owns `meshctl precheck`: whether the mesh can work in a cluster, or on this host, before anything is installed.
//!
//! Nodes say of themselves which kernel they run. What it was built with only a program on them sees, so that is asked for (`--nodes`).

mod cilium;
mod nodes;

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use k8s_openapi::{
    api::{
        admissionregistration::v1::MutatingWebhookConfiguration,
        apps::v1::DaemonSet,
        authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
        core::v1::{ConfigMap, Node},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
    apimachinery::pkg::version::Info,
};
use kube::{Api, ResourceExt, api::PostParams};

use mesh_redirect::{KERNEL_MIN, cgroup2_mount, kernel_version};

use super::{
    InstallError, ObjectKind,
    finding::{self, Finding},
    made_kinds,
    objects::AGENT,
    values::{Values, Wishes},
    verify,
};
use crate::ctl::{
    Output,
    cluster::{self, Cluster, ClusterArgs, ClusterError, Doing, list},
};

/// Oldest API server, as a minor version of 1.
const SERVER_MINOR_MIN: u32 = 30;

/// Options of `precheck`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct PrecheckArgs {
    /// Check this host instead of a cluster: kernel, BTF, cgroup v2, bpffs.
    #[arg(long)]
    pub host: bool,
    /// Also look at every node from inside, by a pod without any rights in the namespace of --namespace that ends at once: BTF, cgroup
    /// v2, bpffs.
    #[arg(long, conflicts_with = "host")]
    pub nodes: bool,
    /// The mesh's image, of which those pods are. [default: that of `meshctl install`]
    #[arg(long, value_name = "IMAGE", requires = "nodes")]
    pub image: Option<String>,
    /// Seconds to wait for those pods.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub timeout: u32,
}

pub(super) fn precheck(args: &PrecheckArgs, of: &ClusterArgs, out: Output) -> Result<bool, InstallError> {
    let findings = if args.host {
        host(Path::new("/"))
    } else {
        cluster::run(of, async |cluster| in_cluster(&cluster, args).await)?
    };
    Ok(finding::show(&findings, out)?)
}

async fn in_cluster(cluster: &Cluster, args: &PrecheckArgs) -> Result<Vec<Finding>, InstallError> {
    let mut findings = vec![server(cluster).await?];
    findings.extend(kernels(cluster).await?);
    if args.nodes {
        let image = match &args.image {
            Some(image) => image.clone(),
            None => Values::read(&Wishes::default())?.image,
        };
        findings.extend(nodes::look(cluster, &image, Duration::from_secs(args.timeout.into())).await?);
    } else {
        findings.push(Finding::warning(
            "BTF, cgroup v2",
            "were not looked at: nodes do not tell",
            "--nodes looks, by a pod on each; `meshctl precheck --host` does on one",
        ));
    }
    findings.extend(definitions(&cluster.definitions().await?));
    findings.extend(other_meshes(cluster).await?);
    findings.push(rights(cluster).await?);
    Ok(findings)
}

async fn server(cluster: &Cluster) -> Result<Finding, ClusterError> {
    let version =
        cluster.client.apiserver_version().await.doing(|| "ask the API server for its version".to_owned())?;
    Ok(of_server(&version))
}

fn of_server(version: &Info) -> Finding {
    // Providers write `31+`.
    let minor: u32 =
        version.minor.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    let found = &version.git_version;
    if version.major == "1" && minor < SERVER_MINOR_MIN {
        let message = format!("{found}, wanted 1.{SERVER_MINOR_MIN} or newer");
        Finding::error("Kubernetes", message, "upgrade the cluster")
    } else {
        Finding::good("Kubernetes", found)
    }
}

async fn kernels(cluster: &Cluster) -> Result<Vec<Finding>, ClusterError> {
    let api: Api<Node> = Api::all(cluster.client.clone());
    let nodes = list(&api, "").await.doing(|| "list nodes".to_owned())?;
    Ok(nodes.iter().map(of_node).collect())
}

/// What a node says of its kernel.
fn of_node(node: &Node) -> Finding {
    let subject = format!("node {}", node.name_any());
    let info = node.status.as_ref().and_then(|status| status.node_info.as_ref());
    // Until then the API server shows it with empty fields.
    let Some(info) = info.filter(|info| !info.kernel_version.is_empty()) else {
        return Finding::warning(subject, "says nothing of itself yet", "wait until its kubelet is up");
    };
    if info.operating_system != "linux" {
        let message = format!("runs {}: its pods cannot be in the mesh", info.operating_system);
        return Finding::warning(subject, message, "");
    }
    kernel(subject, &info.kernel_version)
}

/// Whether a kernel is new enough.
fn kernel(subject: String, release: &str) -> Finding {
    match kernel_version(release) {
        Some(version) if version >= KERNEL_MIN => Finding::good(subject, format!("kernel {release}")),
        Some(_) => Finding::error(
            subject,
            format!("kernel {release}, wanted {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1),
            "give the node a newer kernel, or leave it out by agent.nodeSelector",
        ),
        None => Finding::warning(subject, format!("kernel {release:?}, of no known form"), ""),
    }
}

/// Definitions that are there already have to serve what the mesh reads; those that are not are made.
fn definitions(there: &[CustomResourceDefinition]) -> Vec<Finding> {
    let wanted = mesh_control::crd::all();
    let absent = wanted
        .iter()
        .filter(|wanted| !there.iter().any(|found| found.name_any() == wanted.name_any()))
        .count();
    let mut findings = verify::definitions(there);
    // What is absent is no problem before an installation.
    findings.retain(|finding| finding.grade == finding::Grade::Error);
    let used = wanted.len() - absent;
    findings.push(Finding::good(
        "definitions",
        format!("{used} kinds are there and used as they are, {absent} will be made"),
    ));
    findings
}

/// Other meshes, and programs that answer the same hooks.
async fn other_meshes(cluster: &Cluster) -> Result<Vec<Finding>, ClusterError> {
    let sets: Api<DaemonSet> = Api::all(cluster.client.clone());
    let sets = list(&sets, "").await.doing(|| "list DaemonSets".to_owned())?;
    let mut findings: Vec<Finding> = sets.iter().filter_map(|set| redirector(set, &cluster.mesh)).collect();
    let webhooks: Api<MutatingWebhookConfiguration> = Api::all(cluster.client.clone());
    let webhooks = list(&webhooks, "").await.doing(|| "list MutatingWebhookConfigurations".to_owned())?;
    findings.extend(webhooks.iter().filter_map(|webhook| injector(&webhook.name_any())));
    for namespace in cilium_namespaces(&sets) {
        let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), &namespace);
        let found = maps.get_opt("cilium-config").await;
        let found = found.doing(|| format!("get ConfigMap {namespace}/cilium-config"))?;
        let settings = found.map(|map| map.data.unwrap_or_default());
        findings.extend(settings.iter().flat_map(cilium::judge));
    }
    if findings.is_empty() {
        findings.push(Finding::good("other meshes", "none found"));
    }
    Ok(findings)
}

/// Where Cilium's configuration may be: beside its agents, and where its installation puts it by default.
fn cilium_namespaces(sets: &[DaemonSet]) -> BTreeSet<String> {
    let agents = sets.iter().filter(|set| set.name_any() == "cilium");
    agents.filter_map(ResourceExt::namespace).chain(["kube-system".to_owned()]).collect()
}

/// A mesh that redirects pods on their nodes, by the name of its DaemonSet; `ours` is the namespace of this one.
fn redirector(set: &DaemonSet, ours: &str) -> Option<Finding> {
    let (name, namespace) = (set.name_any(), set.namespace().unwrap_or_default());
    let mesh = match name.as_str() {
        AGENT if namespace != ours => {
            return Some(Finding::error(
                "Nodemesh",
                format!("DaemonSet {namespace}/{name} is of another installation"),
                "a cluster has one: name its namespace with --mesh-namespace, or uninstall it first",
            ));
        }
        "istio-cni-node" | "ztunnel" => "Istio",
        "linkerd-cni" => "Linkerd",
        "kuma-cni-node" => "Kuma",
        "kmesh" => "Kmesh",
        "consul-cni" => "Consul",
        _ => return None,
    };
    Some(Finding::warning(
        mesh,
        format!("DaemonSet {namespace}/{name} redirects pods too"),
        "a pod can be in one mesh only: take namespaces out of one before they go into the other",
    ))
}

/// A mesh that puts sidecars into pods, by the name of its webhook.
fn injector(name: &str) -> Option<Finding> {
    Some(Finding::warning(
        mesh_control::resource::injector(name)?,
        format!("MutatingWebhookConfiguration {name} puts sidecars into pods"),
        "pods with a sidecar are left out of the mesh: take the label for injection off their namespaces, and restart them",
    ))
}

/// Whether this user may do what an installation does.
async fn rights(cluster: &Cluster) -> Result<Finding, ClusterError> {
    let api: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let mut kinds = made_kinds();
    kinds.push(ObjectKind::of::<k8s_openapi::api::core::v1::Namespace>());
    kinds.push(ObjectKind::of::<CustomResourceDefinition>());
    let mut missing = Vec::new();
    for kind in kinds {
        for verb in ["create", "delete", "get", "list", "patch"] {
            let attributes = ResourceAttributes {
                group: Some(kind.group.to_owned()),
                resource: Some(kind.plural.to_owned()),
                verb: Some(verb.to_owned()),
                namespace: kind.namespaced.then(|| cluster.mesh.clone()),
                ..Default::default()
            };
            let spec =
                SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
            let review = SelfSubjectAccessReview { spec, ..Default::default() };
            let answer = api
                .create(&PostParams::default(), &review)
                .await
                .doing(|| "ask for your rights".to_owned())?;
            if !answer.status.is_some_and(|status| status.allowed) {
                missing.push(format!("{verb} {}", kind.plural));
            }
        }
    }
    Ok(of_rights(&missing))
}

fn of_rights(missing: &[String]) -> Finding {
    match missing.is_empty() {
        true => Finding::good("rights", "you may install the mesh"),
        false => Finding::error(
            "rights",
            format!("you may not {}", missing.join(", ")),
            "install as a cluster administrator",
        ),
    }
}

/// Checks a host; `root` is its root directory.
fn host(root: &Path) -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let mut findings = vec![kernel("kernel".to_owned(), read("proc/sys/kernel/osrelease").trim())];
    findings.push(match root.join("sys/kernel/btf/vmlinux").is_file() {
        true => Finding::good("BTF", "the kernel has it"),
        false => Finding::error(
            "BTF",
            "there is no /sys/kernel/btf/vmlinux",
            "use a kernel with CONFIG_DEBUG_INFO_BTF=y",
        ),
    });
    let (mounts, kinds) = (read("proc/mounts"), read("proc/filesystems"));
    let knows = |kind: &str| kinds.lines().any(|line| line.split_whitespace().last() == Some(kind));
    let to_be_mounted = "is not mounted; the agent mounts it";
    findings.push(match cgroup2_mount(&mounts) {
        Some(path) => Finding::good("cgroup v2", format!("at {}", path.display())),
        None if knows("cgroup2") => Finding::good("cgroup v2", to_be_mounted),
        None => Finding::error(
            "cgroup v2",
            "the kernel does not have it",
            "use a kernel with CONFIG_CGROUPS=y and CONFIG_CGROUP_BPF=y",
        ),
    });
    let is_mounted = mounts.lines().any(|line| line.split(' ').nth(2) == Some("bpf"));
    findings.push(match (is_mounted, knows("bpf")) {
        (true, _) => Finding::good("bpffs", "is mounted"),
        (false, true) => Finding::good("bpffs", to_be_mounted),
        (false, false) => {
            Finding::error("bpffs", "the kernel does not have it", "use a kernel with CONFIG_BPF_SYSCALL=y")
        }
    });
    findings
}

#[cfg(test)]
mod tests;
