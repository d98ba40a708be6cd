//! Owns waiting for the mesh to be ready, and saying what it waits for.

use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use kube::ResourceExt;

use super::objects::{AGENT, CONTROLLER, of_mesh};
use crate::ctl::cluster::{Cluster, ClusterError, Doing, is_ready, why_not_ready};

/// Pause between looks.
const PAUSE: Duration = Duration::from_millis(300);
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
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

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
