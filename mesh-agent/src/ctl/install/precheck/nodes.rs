//! Owns looking at nodes from inside: what Kubernetes does not tell of them, a short-lived pod on each does.
//!
//! Invariants:
//! - The pods need nothing of their nodes, no privilege and no volume: what is asked for is in everybody's `/proc` and `/sys`.
//! - They are deleted whatever becomes of them; those of a look that was killed end by themselves, and the next one deletes them.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::core::v1::{
        Capabilities, Container, Node, Pod, PodSpec, SeccompProfile, SecurityContext, Toleration,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams, LogParams, PostParams},
};

use crate::ctl::{
    cluster::{Cluster, ClusterError, Doing, list, why_not_ready},
    install::{
        finding::{Finding, Grade},
        objects::named,
    },
};

/// Name of the pods.
const LOOK: &str = "nodemesh-precheck";
/// Pause between two looks at them.
const PAUSE: Duration = Duration::from_millis(300);

/// What pods with this image find on the Linux nodes.
pub(super) async fn look(
    cluster: &Cluster,
    image: &str,
    within: Duration,
) -> Result<Vec<Finding>, ClusterError> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.namespace);
    sweep(&pods).await?;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let nodes = list(&nodes, "kubernetes.io/os=linux").await.doing(|| "list nodes".to_owned())?;
    let looked = async {
        for node in &nodes {
            let pod = pod(&node.name_any(), image, within);
            pods.create(&PostParams::default(), &pod)
                .await
                .doing(|| format!("create a pod on node {} in {}", node.name_any(), cluster.namespace))?;
        }
        ended(&pods, nodes.len(), within).await
    };
    let looked = looked.await;
    sweep(&pods).await?;
    looked
}

/// Deletes the pods.
async fn sweep(pods: &Api<Pod>) -> Result<(), ClusterError> {
    let all = ListParams::default().labels(&named(LOOK));
    let now = DeleteParams::default().grace_period(0);
    pods.delete_collection(&now, &all).await.doing(|| format!("delete pods {LOOK}"))?;
    Ok(())
}

/// Waits until all pods have ended, or time is up, and takes what they said.
async fn ended(pods: &Api<Pod>, wanted: usize, within: Duration) -> Result<Vec<Finding>, ClusterError> {
    let end = Instant::now() + within;
    let all = loop {
        let mut all = list(pods, &named(LOOK)).await.doing(|| format!("list pods {LOOK}"))?;
        all.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        if (all.len() >= wanted && all.iter().all(has_ended)) || Instant::now() >= end {
            break all;
        }
        tokio::time::sleep(PAUSE).await;
    };
    let mut findings = Vec::new();
    for pod in &all {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        let log = match has_ended(pod) {
            true => pods.logs(&pod.name_any(), &LogParams::default()).await.ok(),
            false => None,
        };
        findings.extend(told(&node, log.as_deref(), || why_not_ready(pod)));
    }
    findings.sort_by(|one, other| one.subject.cmp(&other.subject));
    Ok(findings)
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// What a pod on a node printed, as rows of that node: one for all that is good, one for each that is not.
fn told(node: &str, log: Option<&str>, why: impl FnOnce() -> String) -> Vec<Finding> {
    let found: Option<Vec<Finding>> = log.and_then(|log| serde_json::from_str(log).ok());
    let Some(found) = found else {
        let advice = "see --image, or run `meshctl precheck --host` on the node";
        let message =
            format!("could not be looked at: {}", log.map_or_else(why, |log| log.trim().to_owned()));
        return vec![Finding::warning(format!("host {node}"), message, advice)];
    };
    let (good, bad): (Vec<_>, Vec<_>) = found.into_iter().partition(|finding| finding.grade == Grade::Good);
    let words: Vec<String> = good.iter().map(|one| format!("{} {}", one.subject, one.message)).collect();
    let mut findings = vec![Finding::good(format!("host {node}"), words.join("; "))];
    findings.extend(
        bad.into_iter()
            .map(|finding| Finding { subject: format!("host {node}: {}", finding.subject), ..finding }),
    );
    findings
}

fn pod(node: &str, image: &str, within: Duration) -> Pod {
    let labels = [("app.kubernetes.io/name", LOOK), ("nodemesh.dev/mesh", "disabled")];
    let security = SecurityContext {
        run_as_non_root: Some(true),
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        run_as_user: Some(65_532),
        capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), ..Default::default() }),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..Default::default() }),
        ..Default::default()
    };
    let container = Container {
        name: "look".to_owned(),
        image: Some(image.to_owned()),
        command: Some(vec!["/meshctl".to_owned()]),
        args: Some(["precheck", "--host", "-o", "json"].map(ToOwned::to_owned).into()),
        security_context: Some(security),
        ..Default::default()
    };
    let anywhere = Toleration { operator: Some("Exists".to_owned()), ..Default::default() };
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{LOOK}-")),
            labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            ..Default::default()
        },
        spec: Some(PodSpec {
            // Past the scheduler: a node that is full or cordoned is looked at too.
            node_name: Some(node.to_owned()),
            tolerations: Some(vec![anywhere]),
            restart_policy: Some("Never".to_owned()),
            automount_service_account_token: Some(false),
            active_deadline_seconds: i64::try_from(within.as_secs()).ok(),
            containers: vec![container],
            ..Default::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_a_row_for_what_is_good_and_one_for_each_thing_that_is_not() {
        let log = serde_json::to_string(&[
            Finding::good("kernel", "6.12.1"),
            Finding::good("bpffs", "is mounted"),
            Finding::error("BTF", "is missing", "use another kernel"),
        ]);
        let rows = told("n1", Some(&log.unwrap()), String::new);
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0], Finding::good("host n1", "kernel 6.12.1; bpffs is mounted"));
        assert_eq!(rows[1], Finding::error("host n1: BTF", "is missing", "use another kernel"));
    }

    #[test]
    fn a_node_on_which_no_pod_ran_is_not_called_good() {
        for (log, why) in [(None, "ImagePullBackOff"), (Some("exec /meshctl: no such file"), "")] {
            let rows = told("n1", log, || why.to_owned());
            assert_eq!((rows.len(), rows[0].grade), (1, Grade::Warning), "{rows:?}");
            assert!(rows[0].message.contains(log.unwrap_or(why)), "{rows:?}");
        }
    }
}
