//! A node whose agent is away: who waits for it, what Kubernetes says of that, and that waiting ends.

use std::net::SocketAddr;

use mesh_tests::cluster::{Cluster, KubectlError, shop};
use mesh_tests::{TestResult, eventually};

use crate::scene::{LIMIT, is_served, runs};

/// Every node but a.
const NOT_A: &str = r#"{"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
    {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": ["a"]}]}]}}"#;

/// The agents of node a, those that are about to end too.
const AGENTS_OF_A: [&str; 6] = [
    "-n",
    "nodemesh-system",
    "-l",
    "app.kubernetes.io/name=nodemesh-agent",
    "--field-selector",
    "spec.nodeName=a",
];

/// A pod of the mesh does not start without an agent, and an event of it says why; one outside of the mesh starts. Both run in the end.
pub(crate) fn a_pod_waits_for_the_agent_of_its_node(cluster: &Cluster, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    agents_run_on(cluster, NOT_A)?;
    let leave = || -> Result<String, KubectlError> {
        // What it still carries is of no interest here.
        kubectl.run(&[&["delete", "pods", "--grace-period=1"][..], &AGENTS_OF_A].concat())?;
        kubectl.run(&[&["get", "pods", "-o", "name"][..], &AGENTS_OF_A].concat())
    };
    eventually(LIMIT, leave, |left| left.as_ref().is_ok_and(|left| left.trim().is_empty()))??;

    kubectl.apply(&[shop::newcomer("early"), shop::server("free", "default", "a")].concat())?;
    let failed = "--field-selector=reason=FailedCreatePodSandBox,involvedObject.name=early";
    let events = ["get", "events", "-n", "shop", failed, "-o", "jsonpath={.items[*].message}"];
    let any = |told: &Result<String, KubectlError>| told.as_ref().is_ok_and(|told| !told.is_empty());
    let told = eventually(LIMIT, || kubectl.run(&events), any)??;
    let ours = "nodemesh: pod shop/early is to be meshed, and the node's mesh agent does not answer at";
    assert!(told.contains(ours), "{told}");
    kubectl.run(&["wait", "pod/free", "-n", "default", "--for=condition=Ready", "--timeout=120s"])?;
    let phase = ["get", "pod", "-n", "shop", "early", "-o", "jsonpath={.status.phase}"];
    assert_eq!(kubectl.run(&phase)?, "Pending");

    agents_run_on(cluster, "null")?;
    runs(cluster, "early")?;
    is_served(&cluster.pod("shop", "early"), web)
}

/// Has the DaemonSet of agents another node affinity, JSON; `null` is none.
fn agents_run_on(cluster: &Cluster, affinity: &str) -> Result<(), KubectlError> {
    let patch =
        format!(r#"{{"spec": {{"template": {{"spec": {{"affinity": {{"nodeAffinity": {affinity}}}}}}}}}}}"#);
    let agents = ["patch", "daemonset", "-n", "nodemesh-system", "nodemesh-agent", "-p", &patch];
    cluster.kubectl().run(&agents).map(drop)
}
