//! What both tests look at and wait for: pods of the shop, the mesh's own pods, and who is served.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::cluster::{Cluster, ClusterPod};
use mesh_tests::web::HTTP_PORT;
use mesh_tests::web::messages::Told;
use mesh_tests::{TestResult, eventually};
use serde_json::Value;

/// How long anything may take on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// As many controllers as by default.
pub(crate) const TWO: &str = "controller.replicas=2";

/// Waits until a pod of the shop is ready.
pub(crate) fn runs(cluster: &Cluster, pod: &str) -> TestResult {
    let pod = format!("pod/{pod}");
    cluster.kubectl().run(&["wait", &pod, "-n", "shop", "--for=condition=Ready", "--timeout=120s"])?;
    Ok(())
}

/// Waits until a server answers a pod.
pub(crate) fn is_served(client: &ClusterPod, to: SocketAddr) -> TestResult {
    let served = |told: &anyhow::Result<Told>| told.as_ref().is_ok_and(|told| told.status == 200);
    eventually(LIMIT, || client.get(to, "web", "/"), served)??;
    Ok(())
}

/// The first address of a pod.
pub(crate) fn ip_of(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<IpAddr> {
    let pod = cluster.kubectl().json(&["get", "pod", "-n", namespace, pod])?;
    Ok(pod["status"]["podIP"].as_str().context("no address")?.parse()?)
}

/// One of the servers on a node that are to stay.
pub(crate) fn web_on(cluster: &Cluster, node: &str) -> anyhow::Result<SocketAddr> {
    let pods = cluster.kubectl().json(&["get", "pods", "-n", "shop", "-l", "app=web"])?;
    let mut pods = pods["items"].as_array().into_iter().flatten();
    let stays = |pod: &&Value| pod["metadata"]["deletionTimestamp"].is_null();
    let pod = pods.find(|pod| pod["spec"]["nodeName"] == node && stays(pod));
    let pod = pod.with_context(|| format!("none on {node}"))?;
    let ip = pod["status"]["podIP"].as_str().context("no address")?;
    Ok(SocketAddr::new(ip.parse()?, HTTP_PORT))
}

/// How often containers of agents were started again, of those that are to stay.
pub(crate) fn restarts(cluster: &Cluster) -> anyhow::Result<u64> {
    let count = |pod: &Value| pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64);
    Ok(parts(cluster, "agent")?.iter().filter_map(count).sum())
}

/// Whether every agent that is to stay is ready, by its own container's state.
pub(crate) fn all_ready(cluster: &Cluster) -> anyhow::Result<bool> {
    let ready = |pod: &Value| pod.pointer("/status/containerStatuses/0/ready").and_then(Value::as_bool);
    Ok(parts(cluster, "agent")?.iter().all(|pod| ready(pod) == Some(true)))
}

/// The agents or the controllers that are to stay.
pub(crate) fn parts(cluster: &Cluster, part: &str) -> anyhow::Result<Vec<Value>> {
    let selector = format!("app.kubernetes.io/name=nodemesh-{part}");
    let pods = cluster.kubectl().json(&["get", "pods", "-n", "nodemesh-system", "-l", &selector])?;
    let mut pods = pods["items"].as_array().cloned().unwrap_or_default();
    pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    Ok(pods)
}

/// SIGKILL to the program of such a pod.
pub(crate) fn kill(cluster: &Cluster, pod: &Value) -> TestResult {
    let node = pod["spec"]["nodeName"].as_str().context("no node")?;
    let uid = pod["metadata"]["uid"].as_str().context("no uid")?;
    Ok(cluster.node(node)?.kill_in_pod(uid, "mesh-agent")?)
}
