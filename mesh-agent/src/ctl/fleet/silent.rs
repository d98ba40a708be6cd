//! Owns what can be said of pods whose node cannot be asked: it has no agent, or its agent or its kubelet does not answer.
//!
//! Whether a pod is enrolled is its node's agent's doing alone, and known to it alone. So on a node without a working one nobody is
//! newly enrolled, and nobody is taken out either: a kubelet that does not report for a while ends no pod, and must not end its
//! mutual TLS. What a user has to know is that such a node is there, and which pods wait for it.
//!
//! Invariant: nothing is guessed. A pod that has not been started is not in the mesh; of one that has, only its agent knows.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::{
    Api,
    api::{ListParams, ObjectMeta},
};
use mesh_control::source::kubernetes::node_pods::{Wish, wish};
use serde::Serialize;

use crate::ctl::cluster::{AgentPod, Cluster, ClusterError, Doing, list, list_with};

/// A node that could not be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SilentNode {
    pub(super) node: String,
    /// Whether it has an agent at all.
    pub(super) has_agent: bool,
    /// Its pods that ask for the mesh, by namespace and name.
    pub(super) pods: Vec<WaitingPod>,
}

/// A pod of such a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct WaitingPod {
    pub(super) namespace: String,
    pub(super) name: String,
    /// `skipped`: it is not in the mesh. `unknown`: it stays what it was.
    pub(super) state: &'static str,
    pub(super) reason: String,
}

/// Finds the nodes that could not be asked, those without pods that ask for the mesh left out if they have no agent. `answered` are the
/// nodes whose agent answered.
pub(super) async fn nodes(
    cluster: &Cluster,
    agents: &[AgentPod],
    answered: &BTreeSet<&str>,
) -> Result<Vec<SilentNode>, ClusterError> {
    let all: Vec<Node> =
        list(&Api::all(cluster.client.clone()), "").await.doing(|| "list nodes".to_owned())?;
    let name = |node: &Node| node.metadata.name.clone().unwrap_or_default();
    let silent: Vec<&Node> = all.iter().filter(|node| !answered.contains(&*name(node))).collect();
    if silent.is_empty() {
        return Ok(Vec::new());
    }
    let namespaces: Vec<Namespace> =
        list(&Api::all(cluster.client.clone()), "").await.doing(|| "list namespaces".to_owned())?;
    let namespaces: BTreeMap<String, ObjectMeta> = namespaces
        .into_iter()
        .map(|namespace| (namespace.metadata.name.clone().unwrap_or_default(), namespace.metadata))
        .collect();
    let mut found = Vec::new();
    for node in silent {
        let name = name(node);
        let of_node = ListParams::default().fields(&format!("spec.nodeName={name}"));
        let pods: Vec<Pod> = list_with(&Api::all(cluster.client.clone()), of_node)
            .await
            .doing(|| format!("list pods of node {name}"))?;
        let agent = agents.iter().find(|agent| agent.node == name);
        let pods = waiting(&pods, &namespaces, node, agent);
        if agent.is_some() || !pods.is_empty() {
            found.push(SilentNode { node: name, has_agent: agent.is_some(), pods });
        }
    }
    Ok(found)
}

/// The pods of a silent node that ask for the mesh. Pure.
fn waiting(
    pods: &[Pod],
    namespaces: &BTreeMap<String, ObjectMeta>,
    node: &Node,
    agent: Option<&AgentPod>,
) -> Vec<WaitingPod> {
    let why = why(node, agent);
    let nothing = ObjectMeta::default();
    let of = |pod: &Pod| {
        let namespace = pod.metadata.namespace.clone().unwrap_or_default();
        let (state, reason) = match wish(pod, namespaces.get(&namespace).unwrap_or(&nothing)) {
            Wish::None => return None,
            Wish::Refused(why) => ("skipped", why.to_string()),
            Wish::Mesh if agent.is_none() || !has_address(pod) => ("skipped", why.clone()),
            Wish::Mesh => ("unknown", format!("{why}; if it was in the mesh it still is")),
        };
        Some(WaitingPod { namespace, name: pod.metadata.name.clone().unwrap_or_default(), state, reason })
    };
    let mut waiting: Vec<WaitingPod> = pods.iter().filter_map(of).collect();
    waiting.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    waiting
}

/// Whether a pod's network was made, and so its agent asked about it.
fn has_address(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|status| status.pod_ip.as_deref()).is_some_and(|addr| !addr.is_empty())
}

/// Why nobody of a node is enrolled now.
fn why(node: &Node, agent: Option<&AgentPod>) -> String {
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
    let unready = ready.filter(|condition| condition.status != "True").map(|condition| {
        let said = [condition.reason.as_deref(), condition.message.as_deref()];
        said.into_iter().flatten().filter(|text| !text.is_empty()).collect::<Vec<_>>().join(": ")
    });
    match (unready, agent) {
        (Some(said), _) if said.is_empty() => format!("its node {name} is not ready"),
        (Some(said), _) => format!("its node {name} is not ready: {said}"),
        (None, None) => format!("its node {name} has no agent; `meshctl verify` says what to do"),
        (None, Some(AgentPod { reason: Some(reason), .. })) => {
            format!("the agent of its node {name} is not ready: {reason}")
        }
        (None, Some(_)) => format!("the agent of its node {name} does not answer"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(ready: serde_json::Value) -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "status": {"conditions": [ready]}}))
            .unwrap()
    }

    fn ready(status: &str) -> Node {
        node(
            json!({"type": "Ready", "status": status, "reason": "NodeStatusUnknown", "message": "no word of it",
            "lastHeartbeatTime": "2026-11-22T00:00:00Z"}),
        )
    }

    fn agent(reason: Option<&str>) -> AgentPod {
        AgentPod {
            name: "agent-1".into(),
            node: "n1".into(),
            ready: reason.is_none(),
            image: String::new(),
            reason: reason.map(str::to_owned),
        }
    }

    fn pod(name: &str, spec: serde_json::Value, addr: &str) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec,
            "status": {"phase": "Running", "podIP": addr}}))
        .unwrap()
    }

    fn shop() -> BTreeMap<String, ObjectMeta> {
        let labels = [("istio.io/dataplane-mode".to_owned(), "ambient".to_owned())].into();
        let meta = ObjectMeta { labels: Some(labels), ..ObjectMeta::default() };
        BTreeMap::from([("shop".to_owned(), meta)])
    }

    fn states(pods: &[Pod], node: &Node, agent: Option<&AgentPod>) -> Vec<String> {
        let all = waiting(pods, &shop(), node, agent);
        all.iter().map(|pod| format!("{} {}: {}", pod.name, pod.state, pod.reason)).collect()
    }

    #[test]
    fn a_pod_that_was_started_stays_what_it_was_and_one_that_was_not_is_skipped() {
        let app = || json!({"containers": [{"name": "app"}]});
        let pods = [
            pod("running", app(), "10.1.0.1"),
            pod("waiting", app(), ""),
            pod("host", json!({"hostNetwork": true, "containers": [{"name": "app"}]}), "192.0.2.1"),
        ];
        let said = states(&pods, &ready("Unknown"), Some(&agent(None)));
        let not_ready = "its node n1 is not ready: NodeStatusUnknown: no word of it";
        assert_eq!(
            said,
            [
                "host skipped: it runs on the host network".to_owned(),
                format!("running unknown: {not_ready}; if it was in the mesh it still is"),
                format!("waiting skipped: {not_ready}"),
            ]
        );
        let said = states(&pods[..1], &ready("True"), None);
        assert_eq!(said, ["running skipped: its node n1 has no agent; `meshctl verify` says what to do"]);
    }

    #[test]
    fn pods_that_do_not_ask_for_the_mesh_or_have_ended_are_nobodys_news() {
        let mut other = pod("other", json!({"containers": []}), "");
        other.metadata.namespace = Some("elsewhere".into());
        let mut ended = pod("ended", json!({"containers": []}), "");
        if let Some(status) = &mut ended.status {
            status.phase = Some("Succeeded".into());
        }
        assert_eq!(states(&[other, ended], &ready("False"), None), Vec::<String>::new());
    }

    #[test]
    fn the_reason_is_the_nodes_before_it_is_the_agents() {
        let crashing = agent(Some("container agent waits: CrashLoopBackOff"));
        assert!(why(&ready("False"), Some(&crashing)).starts_with("its node n1 is not ready"));
        let of_agent = "the agent of its node n1 is not ready: container agent waits: CrashLoopBackOff";
        assert_eq!(why(&ready("True"), Some(&crashing)), of_agent);
        assert_eq!(why(&ready("True"), Some(&agent(None))), "the agent of its node n1 does not answer");
        let silent = node(json!({"type": "Ready", "status": "False"}));
        assert_eq!(why(&silent, None), "its node n1 is not ready");
    }
}
