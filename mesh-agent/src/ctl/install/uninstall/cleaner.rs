//! Owns the DaemonSet that ends what agents left on their nodes: CNI entries, programs, pins, saved state.
//!
//! Invariants:
//! - It is there, and waits, before the agents go; it is freed when they are gone, and deleted last of all. So whoever finds it goes on
//!   from it, wherever the one before was killed; and where it is not, nodes are clean or were never asked to be.
//! - Made of the agents' DaemonSet: the same image, folders and rights, without their identity.
//! - What it does on a node may be done twice.

use std::{collections::BTreeMap, time::Instant};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container, ContainerStatus, Pod},
};
use kube::api::{Patch, PatchParams};
use serde_json::json;

use super::{PAUSE, pods_gone};
use crate::ctl::{
    cluster::{Cluster, ClusterError, Doing, why_not_ready},
    install::{
        InstallError, ObjectKind, apply,
        objects::{self, AGENT, MANAGER, named},
        ready::{self, Progress},
        values::{Values, Wishes},
    },
};

/// Its name, and that of its pods.
pub(in crate::ctl::install) const CLEANUP: &str = "nodemesh-cleanup";
/// A label that no node has: with it in its node selector the DaemonSet runs nowhere.
const WAITS: (&str, &str) = ("nodemesh.dev/cleanup", "waits-for-agents-to-go");
/// Volumes that go with the agents' identity.
const IDENTITY: [&str; 2] = ["roots", "token"];

/// Has the DaemonSet there, waiting, while there are agents, or with `image`. Whether nodes are going to be cleaned: without agents
/// and `image` only if an earlier try has begun.
pub(super) async fn have(cluster: &Cluster, image: Option<&str>, end: Instant) -> Result<bool, InstallError> {
    let api = cluster.own::<DaemonSet>();
    let agents = api.get_opt(AGENT).await.doing(|| format!("get DaemonSet {AGENT}"))?;
    let there = api.get_opt(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?;
    let wanted = match (&agents, image) {
        (Some(agents), _) => made_of(agents),
        (None, Some(image)) => {
            let wishes = Wishes { set: vec![format!("image={image}")], ..Wishes::default() };
            made_of(&objects::agents(&Values::read(&wishes)?, &cluster.mesh))
        }
        (None, None) => None,
    };
    let Some(wanted) = wanted else { return Ok(there.is_some()) };
    if let Some(there) = &there {
        // One that ran before these agents did has cleaned nothing of theirs.
        if image_of(there) == image_of(&wanted) && (agents.is_none() || waits(there)) {
            return Ok(true);
        }
        apply::delete(cluster, ObjectKind::of::<DaemonSet>(), Some(&cluster.mesh), CLEANUP).await?;
        pods_gone(cluster, CLEANUP, end).await?;
    }
    api.patch(CLEANUP, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&wanted))
        .await
        .doing(|| format!("apply DaemonSet {CLEANUP}"))?;
    Ok(true)
}

/// Lets it run, now that no agents do, and waits until every node is clean.
pub(super) async fn clean_nodes(cluster: &Cluster, end: Instant) -> Result<(), ClusterError> {
    let api = cluster.own::<DaemonSet>();
    let set = api.get(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?;
    if waits(&set) {
        let free = json!({"spec": {"template": {"spec": {"nodeSelector": {WAITS.0: null}}}}});
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        api.patch(CLEANUP, &params, &Patch::Merge(&free))
            .await
            .doing(|| format!("free DaemonSet {CLEANUP}"))?;
    }
    nodes_clean(cluster, end).await
}

/// Deletes it. Whether there was one.
pub(in crate::ctl::install) async fn delete(cluster: &Cluster, end: Instant) -> Result<bool, ClusterError> {
    let api = cluster.own::<DaemonSet>();
    let there = api.get_opt(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?.is_some();
    if there {
        apply::delete(cluster, ObjectKind::of::<DaemonSet>(), Some(&cluster.mesh), CLEANUP).await?;
    }
    pods_gone(cluster, CLEANUP, end).await?;
    Ok(there)
}

async fn nodes_clean(cluster: &Cluster, end: Instant) -> Result<(), ClusterError> {
    let sets = cluster.own::<DaemonSet>();
    let mut said = usize::MAX;
    loop {
        let set = sets.get(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?;
        let Progress { wanted, seen, .. } = ready::of_daemon_set(&set);
        let wanted = usize::try_from(wanted).unwrap_or_default();
        let found = cluster.pods(&named(CLEANUP)).await?;
        let clean = found.iter().filter(|pod| is_clean(pod)).count();
        if clean != said {
            eprintln!("clean: {clean}/{wanted} nodes");
            said = clean;
        }
        if seen && clean >= wanted {
            return Ok(());
        }
        if Instant::now() >= end {
            let left: Vec<String> = found
                .iter()
                .filter(|pod| !is_clean(pod))
                .map(|pod| {
                    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
                    format!("\n  node {node}: {}", why_not_ready(pod))
                })
                .collect();
            return Err(ClusterError::Said(format!(
                "{clean} of {wanted} nodes are clean; run it again, or leave them with --skip-nodes{}",
                left.concat()
            )));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether a clean-up pod has done its work: all of it is in init containers.
fn is_clean(pod: &Pod) -> bool {
    let Some(statuses) = pod.status.as_ref().and_then(|status| status.init_container_statuses.as_deref())
    else {
        return false;
    };
    let wanted = pod.spec.as_ref().and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default().len();
    let done = |status: &ContainerStatus| {
        let state = status.state.as_ref().and_then(|state| state.terminated.as_ref());
        state.is_some_and(|state| state.exit_code == 0)
    };
    statuses.len() == wanted && statuses.iter().all(done)
}

/// The DaemonSet, as it is while agents are there.
fn made_of(agents: &DaemonSet) -> Option<DaemonSet> {
    let mut spec = agents.spec.clone()?;
    let pod = spec.template.spec.as_mut()?;
    let agent = pod.containers.first()?.clone();
    let args = agent.args.clone().unwrap_or_default();
    let given = |names: &[&str]| -> Vec<String> {
        let of = |arg: &&String| names.iter().any(|name| arg.starts_with(&format!("--{name}=")));
        args.iter().filter(of).cloned().collect()
    };
    // Account, trust and tokens may be gone already, and nobody asks the API server.
    pod.service_account_name = None;
    pod.automount_service_account_token = Some(false);
    if let Some(volumes) = &mut pod.volumes {
        volumes.retain(|volume| !IDENTITY.contains(&volume.name.as_str()));
    }
    pod.node_selector.get_or_insert_default().insert(WAITS.0.to_owned(), WAITS.1.to_owned());
    let mut base =
        Container { ports: None, startup_probe: None, readiness_probe: None, liveness_probe: None, ..agent };
    if let Some(mounts) = &mut base.volume_mounts {
        mounts.retain(|mount| !IDENTITY.contains(&mount.name.as_str()));
    }
    let step = |name: &str, command: &[&str], args: Vec<String>| Container {
        name: name.to_owned(),
        args: Some(command.iter().map(ToString::to_string).chain(args).collect()),
        ..base.clone()
    };
    let cni = step(
        "cni",
        &["cni", "uninstall"],
        given(&["cni-socket", "cni-bin-dir", "cni-conf-dir", "state-dir"]),
    );
    let kernel = step("kernel", &["cleanup", "--purge"], given(&["node", "cgroup-root", "state-dir"]));
    // A DaemonSet wants a container that stays. It holds nothing of the node.
    pod.containers = vec![Container { volume_mounts: None, ..step("done", &["pause"], Vec::new()) }];
    // The one that an agent's lock stops is first: a pod that is here too early, or still, does nothing beside a living agent.
    pod.init_containers = Some(vec![kernel, cni]);
    pod.termination_grace_period_seconds = Some(0);
    let name = [("app.kubernetes.io/name".to_owned(), CLEANUP.to_owned())];
    spec.selector.match_labels = Some(name.clone().into());
    let meta = spec.template.metadata.get_or_insert_default();
    meta.labels = Some(labels(meta.labels.take(), &name));
    let mut set = DaemonSet { spec: Some(spec), ..Default::default() };
    set.metadata.name = Some(CLEANUP.to_owned());
    set.metadata.namespace = agents.metadata.namespace.clone();
    set.metadata.labels = Some(labels(agents.metadata.labels.clone(), &name));
    Some(set)
}

/// Whether it is not to run yet.
fn waits(set: &DaemonSet) -> bool {
    let pod = set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let selector = pod.and_then(|pod| pod.node_selector.as_ref());
    selector.is_some_and(|labels| labels.contains_key(WAITS.0))
}

/// The image of its pods.
fn image_of(set: &DaemonSet) -> Option<&str> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.first()?.image.as_deref()
}

fn labels(of: Option<BTreeMap<String, String>>, over: &[(String, String)]) -> BTreeMap<String, String> {
    of.unwrap_or_default().into_iter().chain(over.iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_cleaned_with_the_agents_own_image_and_folders_and_without_its_identity() {
        let values = Values::read(&Wishes {
            set: vec!["image=mesh:x".into(), "agent.cgroupRoot=/sys/fs/cgroup/$(NODE_NAME)".into()],
            ..Wishes::default()
        })
        .unwrap();
        let set = made_of(&objects::agents(&values, "nodemesh-system")).unwrap();
        assert!(waits(&set), "until the agents are gone");
        let spec = set.spec.unwrap();
        let pod = spec.template.spec.unwrap();
        let steps = pod.init_containers.unwrap();
        let args: Vec<Vec<String>> = steps.iter().map(|step| step.args.clone().unwrap()).collect();
        assert_eq!(
            args[1],
            [
                "cni",
                "uninstall",
                "--state-dir=/var/lib/nodemesh",
                "--cni-socket=/run/nodemesh/cni.sock",
                "--cni-bin-dir=/opt/cni/bin",
                "--cni-conf-dir=/etc/cni/net.d"
            ]
        );
        assert_eq!(
            args[0],
            [
                "cleanup",
                "--purge",
                "--node=$(NODE_NAME)",
                "--cgroup-root=/sys/fs/cgroup/$(NODE_NAME)",
                "--state-dir=/var/lib/nodemesh"
            ]
        );
        assert!(steps.iter().all(|step| step.image.as_deref() == Some("mesh:x")));
        let stays = &pod.containers[0];
        assert_eq!((stays.args.as_deref(), &stays.volume_mounts), (Some(&["pause".to_owned()][..]), &None));
        let volumes: Vec<String> = pod.volumes.unwrap().into_iter().map(|volume| volume.name).collect();
        assert!(!volumes.iter().any(|name| name == "roots" || name == "token"), "{volumes:?}");
        assert_eq!((pod.service_account_name, pod.automount_service_account_token), (None, Some(false)));
        let labels = spec.template.metadata.unwrap().labels.unwrap();
        assert_eq!(labels["app.kubernetes.io/name"], CLEANUP, "not counted as an agent");
        assert_eq!(spec.selector.match_labels.unwrap()["app.kubernetes.io/name"], CLEANUP);
    }
}
