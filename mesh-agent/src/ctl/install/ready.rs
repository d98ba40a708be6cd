//! Owns waiting for the mesh to be ready, and saying what it waits for.

use std::time::{Duration, Instant};

use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment},
    core::v1::{ContainerStatus, Pod},
};
use kube::ResourceExt;

use super::objects::{AGENT, CONTROLLER, of_mesh};
use crate::ctl::cluster::{Cluster, ClusterError, Doing, is_ready, why_not_ready};

/// Pause between looks.
const PAUSE: Duration = Duration::from_millis(300);
/// Pods are asked for this often while they are waited for.
const PODS_EACH: Duration = Duration::from_secs(3);
/// What the kubelet says of a container whose image the node does not have.
const NO_IMAGE: [&str; 4] = ["ErrImageNeverPull", "ErrImagePull", "ImagePullBackOff", "InvalidImageName"];
/// So many pods that are not ready are named.
const NAMED_MAX: usize = 5;

/// How far a set of pods is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Pods that are wanted.
    pub(crate) wanted: i32,
    /// Pods that run the newest form of the object.
    pub(crate) updated: i32,
    /// Pods that run an older one.
    pub(crate) old: i32,
    /// Pods that are available, of whatever form.
    pub(crate) available: i32,
    /// Whether these numbers are about the newest form.
    pub(crate) seen: bool,
}

impl Progress {
    /// Whether all that is wanted is there, in the newest form.
    pub(crate) const fn done(self) -> bool {
        self.seen && self.updated >= self.wanted && self.old == 0 && self.available >= self.wanted
    }
}

pub(crate) fn of_deployment(deployment: &Deployment) -> Progress {
    let status = deployment.status.clone().unwrap_or_default();
    let updated = status.updated_replicas.unwrap_or_default();
    Progress {
        wanted: deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1),
        updated,
        old: status.replicas.unwrap_or_default() - updated,
        available: status.available_replicas.unwrap_or_default(),
        seen: status.observed_generation >= deployment.metadata.generation,
    }
}

pub(crate) fn of_daemon_set(set: &DaemonSet) -> Progress {
    let status = set.status.clone().unwrap_or_default();
    Progress {
        wanted: status.desired_number_scheduled,
        updated: status.updated_number_scheduled.unwrap_or_default(),
        // Its numbers are of nodes.
        old: 0,
        available: status.number_available.unwrap_or_default(),
        seen: set.status.is_some() && status.observed_generation >= set.metadata.generation,
    }
}

/// Waits until controller and agents are ready, and says on standard error how far they are.
pub(crate) async fn wait(cluster: &Cluster, within: Duration) -> Result<(), ClusterError> {
    let end = Instant::now() + within;
    let mut said = String::new();
    let (mut looked, mut no_image) = (Instant::now(), None);
    loop {
        let (controller, agents) = look(cluster).await?;
        let part = |name: &str, progress: Progress| {
            format!("{name} {}/{}", progress.available.min(progress.updated), progress.wanted)
        };
        let line = format!("{}, {}", part("controller", controller), part("agents", agents));
        if line != said {
            eprintln!("ready: {line}");
            said = line;
        }
        if controller.done() && agents.done() {
            return Ok(());
        }
        if Instant::now() >= end {
            let waiting = unready(cluster).await?;
            return Err(ClusterError::Said(format!("not ready after {within:?} ({said}){waiting}")));
        }
        // That does not get better by waiting.
        if no_image.is_none() && looked.elapsed() >= PODS_EACH {
            looked = Instant::now();
            no_image = without_image(&cluster.pods(&of_mesh()).await?);
            if let Some(why) = &no_image {
                eprintln!("{why}");
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// How far controller and agents are.
pub(crate) async fn look(cluster: &Cluster) -> Result<(Progress, Progress), ClusterError> {
    let deployment = cluster.own::<Deployment>().get(CONTROLLER).await;
    let deployment = deployment.doing(|| format!("get Deployment {CONTROLLER}"))?;
    let set = cluster.own::<DaemonSet>().get(AGENT).await.doing(|| format!("get DaemonSet {AGENT}"))?;
    Ok((of_deployment(&deployment), of_daemon_set(&set)))
}

/// Which pods are not ready, and why.
async fn unready(cluster: &Cluster) -> Result<String, ClusterError> {
    let pods = cluster.pods(&of_mesh()).await?;
    let waiting: Vec<String> = pods
        .iter()
        .filter(|pod| !is_ready(pod))
        .map(|pod| {
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or("no node");
            format!("\n  {} on {node}: {}", pod.name_any(), why_not_ready(pod))
        })
        .collect();
    let more = waiting.len().saturating_sub(NAMED_MAX);
    let mut text: String = waiting.into_iter().take(NAMED_MAX).collect();
    if more > 0 {
        text.push_str(&format!("\n  and {more} more"));
    }
    if let Some(why) = without_image(&pods) {
        text.push_str(&format!("\n{why}"));
    }
    Ok(text)
}

/// The first pod whose node cannot get an image, and what to do about it. A cluster without the mesh's image is what an installation
/// fails by first.
fn without_image(pods: &[Pod]) -> Option<String> {
    let of = |container: &ContainerStatus| {
        let reason = container.state.as_ref()?.waiting.as_ref()?.reason.clone()?;
        NO_IMAGE.contains(&reason.as_str()).then(|| (container.image.clone(), reason))
    };
    pods.iter().find_map(|pod| {
        let status = pod.status.as_ref()?;
        let (init, main) = (&status.init_container_statuses, &status.container_statuses);
        let (image, reason) = init.iter().flatten().chain(main.iter().flatten()).find_map(of)?;
        let node = pod.spec.as_ref()?.node_name.as_deref().unwrap_or("no node");
        Some(format!(
            "pod {} cannot have its image {image} on {node} ({reason}): push it to a registry that every node reaches and say so by \
             --set image=REGISTRY/NAME:TAG, or load it on every node; docs/install.md says where it comes from",
            pod.name_any()
        ))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_whose_image_cannot_be_had_is_named_with_what_to_do() {
        let pod = |name: &str, state: serde_json::Value| -> Pod {
            let status = json!({"name": "agent", "image": "nodemesh:0.1.0", "imageID": "", "ready": false, "restartCount": 0, "state": state});
            serde_json::from_value(
                json!({"metadata": {"name": name}, "spec": {"nodeName": "n1", "containers": []},
                "status": {"containerStatuses": [status]}}),
            )
            .unwrap()
        };
        let waiting = |reason: &str| json!({"waiting": {"reason": reason, "message": "no such host"}});
        let others =
            [pod("a", json!({"running": {}})), pod("b", waiting("CrashLoopBackOff")), Pod::default()];
        assert_eq!(without_image(&others), None);
        for reason in NO_IMAGE {
            let said = without_image(&[&others[..], &[pod("c", waiting(reason))]].concat()).unwrap();
            for part in ["pod c ", "nodemesh:0.1.0 on n1", reason, "--set image=", "docs/install.md"] {
                assert!(said.contains(part), "{part}: {said}");
            }
        }
    }

    #[test]
    fn old_numbers_are_not_taken_for_new_ones() {
        let all = Progress { wanted: 2, updated: 2, old: 0, available: 2, seen: true };
        assert!(all.done());
        for not in [
            Progress { seen: false, ..all },
            Progress { updated: 1, ..all },
            // Which of the three is not available?
            Progress { old: 1, ..all },
            Progress { available: 1, ..all },
        ] {
            assert!(!not.done(), "{not:?}");
        }
        assert!(!of_daemon_set(&DaemonSet::default()).done(), "a set nobody has looked at yet");
    }
}
