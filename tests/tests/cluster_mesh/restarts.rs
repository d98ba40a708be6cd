//! Parts of the control plane that end while pods are served: all of it for an upgrade, the API server, the leader, every controller.

use std::net::SocketAddr;

use anyhow::Context as _;
use mesh_tests::cluster::{Cluster, Mesh, shop};
use mesh_tests::web::WebLoad;
use mesh_tests::web::messages::Told;
use mesh_tests::{TestResult, eventually};
use serde_json::Value;

use crate::applied::is_judged;
use crate::scene::{LIMIT, TWO, is_served, kill, parts, restarts, runs, web_on};

/// The tests' image under another name, to be upgraded to.
const NEXT: &str = "localhost/nodemesh:next";

/// Replaces all agents; none of the new ones had to be started twice, on nodes with connections and without.
pub(crate) fn agents_are_rolled(cluster: &Cluster) -> TestResult {
    cluster.kubectl().run(&["rollout", "restart", "-n", "nodemesh-system", "daemonset/nodemesh-agent"])?;
    cluster.rolled_out("nodemesh-system", "daemonset/nodemesh-agent")?;
    assert_eq!(restarts(cluster)?, 0);
    Ok(())
}

/// An upgrade replaces controllers and agents; each agent takes the listening sockets of the one before it, and nobody notices.
pub(crate) fn everything_is_upgraded(cluster: &Cluster, mesh: &Mesh<'_>, load: &WebLoad) -> TestResult {
    for node in cluster.nodes() {
        node.run(&["ctr", "--namespace=k8s.io", "images", "tag", "localhost/nodemesh:dev", NEXT])?;
    }
    let before = load.report();
    mesh.upgrade_with(&[TWO, &format!("image={NEXT}")])?;
    for (kind, part, count) in [("daemonset", "agent", 2), ("deployment", "controller", 2)] {
        cluster.rolled_out("nodemesh-system", &format!("{kind}/nodemesh-{part}"))?;
        let images: Vec<Value> =
            parts(cluster, part)?.iter().map(|pod| pod["spec"]["containers"][0]["image"].clone()).collect();
        assert_eq!(images, vec![NEXT; count], "{part}");
    }
    assert_eq!(restarts(cluster)?, 0);
    let after = load.go_on(200, LIMIT)?;
    println!("upgraded: {} good", after.ok() - before.ok());
    assert_eq!(after.failed, before.failed, "failed since the mesh was upgraded");
    Ok(())
}

/// Nobody notices, and what is made afterwards counts.
pub(crate) fn the_api_server_dies_and_comes_back(
    cluster: &Cluster,
    load: &WebLoad,
    web: SocketAddr,
) -> TestResult {
    let kubectl = cluster.kubectl();
    let before = load.report();
    cluster.stop_api_server();
    load.go_on(200, LIMIT)?;
    cluster.start_api_server()?;

    kubectl.apply(&shop::newcomer("late"))?;
    runs(cluster, "late")?;
    let late = cluster.pod("shop", "late");
    is_served(&late, web)?;
    kubectl.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: not-late, namespace: shop}, spec: {action: DENY, \
         rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/late]}}]}]}}",
    )?;
    let refused = |told: &anyhow::Result<Told>| told.as_ref().is_ok_and(|told| told.status != 200);
    eventually(LIMIT, || late.get(web, "web", "/"), refused)??;
    let after = load.go_on(100, LIMIT)?;
    assert_eq!(after.failed, before.failed, "failed since the API server was killed");
    Ok(())
}

/// Another one takes its place, and nobody notices.
pub(crate) fn the_leader_dies(cluster: &Cluster, load: &WebLoad) -> TestResult {
    let leader = || -> anyhow::Result<(String, Value)> {
        let lease = ["get", "lease", "-n", "nodemesh-system", "nodemesh-controller", "-o"];
        let holder = cluster.kubectl().run(&[&lease[..], &["jsonpath={.spec.holderIdentity}"]].concat())?;
        let mut pods = parts(cluster, "controller")?.into_iter();
        // Each start of a controller is somebody else, so that none takes up what the one before it left.
        let is_it = |pod: &Value| {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            holder.strip_prefix(name).is_some_and(|rest| rest.starts_with('_'))
        };
        let pod = pods.find(is_it).with_context(|| format!("{holder:?} is no pod"))?;
        Ok((holder, pod))
    };
    let before = load.report();
    let (first, pod) = eventually(LIMIT, leader, Result::is_ok)??;
    kill(cluster, &pod)?;
    let another = |now: &anyhow::Result<(String, Value)>| now.as_ref().is_ok_and(|(now, _)| *now != first);
    let (second, _) = eventually(LIMIT, leader, another)??;
    println!("{first} led, now {second} does");
    cluster.kubectl().apply(
        "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v1, namespace: shop}, spec: {hosts: [web-v1], \
         http: [{route: [{destination: {host: web-v1}}]}]}}",
    )?;
    is_judged(cluster.kubectl(), "v1")?;
    let after = load.go_on(100, LIMIT)?;
    assert_eq!(after.failed, before.failed, "failed since the leader was killed");
    Ok(())
}

/// Without a controller, pods start and are served as far as identities allow that their node knows; what cannot work says why.
pub(crate) fn nobody_leads(cluster: &Cluster, mesh: &Mesh<'_>, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let scale = |replicas: &str| {
        kubectl.run(&["scale", "-n", "nodemesh-system", "deployment/nodemesh-controller", replicas])
    };
    scale("--replicas=0")?;
    let controllers = [
        "get",
        "pods",
        "-n",
        "nodemesh-system",
        "-l",
        "app.kubernetes.io/name=nodemesh-controller",
        "-o",
        "name",
    ];
    eventually(
        LIMIT,
        || kubectl.run(&controllers),
        |left| left.as_ref().is_ok_and(|left| left.trim().is_empty()),
    )??;
    kubectl.run(&["delete", "pod", "-n", "shop", "client", "--wait"])?;
    kubectl.apply(&[shop::client("shop"), shop::newcomer("stranger")].concat())?;
    for pod in ["client", "stranger"] {
        runs(cluster, pod)?;
    }
    is_served(&cluster.pod("shop", "client"), web)?;

    // To servers of its own node a pod is who the node says it is; to others it would have to prove it.
    let stranger = cluster.pod("shop", "stranger");
    let far = web_on(cluster, "b")?;
    is_served(&stranger, web_on(cluster, "a")?)?;
    let told = stranger.get(far, "web", "/")?;
    assert_ne!(told.status, 200, "{told:?}");
    let why = || -> anyhow::Result<String> {
        let answer = mesh.ask(&["certificates", "--node", "a"])?;
        let rows = answer["certificates"].as_array().context("no certificates")?;
        let is_its = |row: &&Value| row["identity"].as_str().is_some_and(|id| id.ends_with("/sa/stranger"));
        let row = rows.iter().find(is_its).with_context(|| format!("not in {answer}"))?;
        Ok(row["last_error"].as_str().unwrap_or_default().to_owned())
    };
    let is_said = |why: &str| why.contains("the CA is not available");
    eventually(LIMIT, why, |why| why.as_ref().is_ok_and(|why| is_said(why)))??;
    let status = mesh.ask(&["status", "--node", "a"])?;
    assert!(status["identity"]["reason"].as_str().is_some_and(is_said), "{status:#}");
    assert_eq!(status["controller"]["connected"], false, "{status:#}");

    scale("--replicas=1")?;
    is_served(&stranger, far)
}
