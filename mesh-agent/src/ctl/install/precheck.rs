//! Owns `meshctl precheck`: whether the mesh can work in a cluster, or on this host, before anything is installed.

use std::{fs, path::Path};

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec},
        core::v1::{ConfigMap, Node},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{Api, ResourceExt, api::PostParams};

use mesh_redirect::{KERNEL_MIN, cgroup2_mount, kernel_version};

use super::{
    InstallError, ObjectKind,
    finding::{self, Finding},
    made_kinds, verify,
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
}

pub(super) fn precheck(args: &PrecheckArgs, of: &ClusterArgs, out: Output) -> Result<bool, InstallError> {
    let findings = if args.host {
        host(Path::new("/"))
    } else {
        cluster::run(of, async |cluster| in_cluster(&cluster).await)?
    };
    Ok(finding::show(&findings, out)?)
}

async fn in_cluster(cluster: &Cluster) -> Result<Vec<Finding>, ClusterError> {
    let mut findings = vec![server(cluster).await?];
    findings.extend(kernels(cluster).await?);
    findings.extend(definitions(&cluster.definitions().await?));
    findings.extend(other_meshes(cluster).await?);
    findings.extend(rights(cluster).await?);
    Ok(findings)
}

async fn server(cluster: &Cluster) -> Result<Finding, ClusterError> {
    let version =
        cluster.client.apiserver_version().await.doing(|| "ask the API server for its version".to_owned())?;
    let minor: u32 =
        version.minor.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap_or(0);
    let found = version.git_version;
    Ok(if version.major == "1" && minor < SERVER_MINOR_MIN {
        let message = format!("{found}, wanted 1.{SERVER_MINOR_MIN} or newer");
        Finding::error("Kubernetes", message, "upgrade the cluster")
    } else {
        Finding::good("Kubernetes", found)
    })
}

async fn kernels(cluster: &Cluster) -> Result<Vec<Finding>, ClusterError> {
    let api: Api<Node> = Api::all(cluster.client.clone());
    let nodes = list(&api, "").await.doing(|| "list nodes".to_owned())?;
    let check = |node: &Node| {
        let subject = format!("node {}", node.name_any());
        let Some(info) = node.status.as_ref().and_then(|status| status.node_info.as_ref()) else {
            return Finding::warning(subject, "says nothing of itself yet", "wait until its kubelet is up");
        };
        if info.operating_system != "linux" {
            let message = format!("runs {}: its pods cannot be in the mesh", info.operating_system);
            return Finding::warning(subject, message, "");
        }
        kernel(subject, &info.kernel_version)
    };
    Ok(nodes.iter().map(check).collect())
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
    let mut findings = Vec::new();
    for set in &sets {
        let (name, place) =
            (set.name_any(), format!("{}/{}", set.namespace().unwrap_or_default(), set.name_any()));
        let mesh = match name.as_str() {
            "istio-cni-node" | "ztunnel" => "Istio",
            "linkerd-cni" => "Linkerd",
            "kuma-cni-node" => "Kuma",
            _ => continue,
        };
        findings.push(Finding::warning(
            mesh,
            format!("DaemonSet {place} redirects pods too"),
            "a pod can be in one mesh only: take namespaces out of one before they go into the other",
        ));
    }
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "kube-system");
    let cilium =
        maps.get_opt("cilium-config").await.doing(|| "get ConfigMap kube-system/cilium-config".to_owned())?;
    let settings = cilium.and_then(|map| map.data).unwrap_or_default();
    let is = |key: &str| settings.get(key).is_some_and(|value| value == "true");
    if is("bpf-lb-sock") && !is("bpf-lb-sock-hostns-only") {
        findings.push(Finding::error(
            "Cilium",
            "its socket load balancer replaces addresses of services before the mesh sees them",
            "set socketLB.hostNamespaceOnly=true in Cilium's values",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::good("other meshes", "none found"));
    }
    Ok(findings)
}

/// Whether this user may do what an installation does.
async fn rights(cluster: &Cluster) -> Result<Vec<Finding>, ClusterError> {
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
    Ok(vec![match missing.is_empty() {
        true => Finding::good("rights", "you may install the mesh"),
        false => Finding::error(
            "rights",
            format!("you may not {}", missing.join(", ")),
            "install as a cluster administrator",
        ),
    }])
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
    let mounts = read("proc/mounts");
    findings.push(match cgroup2_mount(&mounts) {
        Some(path) => Finding::good("cgroup v2", format!("at {}", path.display())),
        None => Finding::error(
            "cgroup v2",
            "is not mounted",
            "mount -t cgroup2 none /sys/fs/cgroup/unified, or boot with systemd.unified_cgroup_hierarchy=1",
        ),
    });
    let bpffs = mounts.lines().any(|line| line.split(' ').nth(2) == Some("bpf"));
    findings.push(Finding::good(
        "bpffs",
        if bpffs { "is mounted" } else { "is not mounted; the agent mounts it" },
    ));
    findings
}

#[cfg(test)]
mod tests {
    use super::{finding::Grade, *};

    #[test]
    fn kernels_are_compared_by_numbers() {
        for (release, grade) in [
            ("6.1.0-18-cloud-amd64", Grade::Good),
            ("6.18.2", Grade::Good),
            ("10.0-rc1", Grade::Good),
            ("5.15.0-1034-aws", Grade::Error),
            ("6.0.12", Grade::Error),
            ("unknown", Grade::Warning),
        ] {
            assert_eq!(kernel("n".to_owned(), release).grade, grade, "{release}");
        }
    }

    #[test]
    fn a_host_without_anything_is_told_what_is_missing() {
        let findings = host(Path::new("/nonexistent"));
        let wrong: Vec<&str> = findings
            .iter()
            .filter(|finding| finding.grade == Grade::Error)
            .map(|finding| finding.subject.as_str())
            .collect();
        assert_eq!(wrong, ["BTF", "cgroup v2"]);
    }
}
