//! The mesh in a real cluster: running pods join it, what operators apply holds, agents come and go, and nothing is left of it.

mod applied;
mod away;
mod crowd;
mod killed;
mod restarts;
mod scene;

use mesh_tests::cluster::init::BpfFileSystem;
use mesh_tests::cluster::shop::{self, STRICT};
use mesh_tests::cluster::{Cluster, Mesh, NodeOptions};
use mesh_tests::{Link, TestResult, eventually, require_cluster, test_name};
use serde_json::Value;

use applied::what_is_applied_holds;
use away::a_pod_waits_for_the_agent_of_its_node;
use crowd::a_crowd_connects;
use killed::{agents_are_killed, bpf_file_systems};
use restarts::{
    agents_are_rolled, everything_is_upgraded, nobody_leads, the_api_server_dies_and_comes_back,
    the_leader_dies,
};
use scene::{LIMIT, TWO, is_served, web_on};

#[test]
fn running_pods_join_and_what_is_applied_holds_and_nothing_is_left() -> TestResult {
    require_cluster!();
    let bridged = NodeOptions { link: Link::Bridged, ..NodeOptions::default() };
    let cluster = Cluster::start_of(test_name!(), &[("a", NodeOptions::default()), ("b", bridged)])?;
    let kubectl = cluster.kubectl();
    shop::open(&cluster)?;
    let web = shop::address(&cluster, "web")?;
    let (client, outsider) = (cluster.pod("shop", "client"), cluster.pod("outside", "client"));
    let mesh = Mesh::install(&cluster)?;
    assert!(mesh.remains()?.len() > 20, "this would find nothing");
    let verified = mesh.meshctl(&["verify"])?;
    assert!(verified.contains("0 errors, 0 warnings"), "{verified}");

    // A running namespace joins, and no connection notices.
    let load = client.load(&shop::mix(web, "web"))?;
    load.go_on(100, LIMIT)?;
    assert_eq!(mesh.enrolled("shop")?, Vec::<String>::new());
    mesh.enrol("shop")?;
    println!("enrolled after {:?}", mesh.all_enrolled("shop")?);
    let seen = load.go_on(300, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");

    // Only the mesh gets in.
    let stranger = || outsider.get(web, "web", "/");
    assert_eq!(stranger()?.status, 200);
    kubectl.apply(STRICT)?;
    eventually(LIMIT, stranger, |told| told.as_ref().is_ok_and(|told| told.status == 0))??;
    let seen = load.go_on(300, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    let own = client.get(web, "web", "/")?;
    assert_eq!(own.status, 200, "{own:?}");

    // New pods become ready though only the mesh gets in: probes do; and the old ones go without a failed request.
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web-v1"])?;
    cluster.rolled_out("shop", "deployment/web-v1")?;
    let seen = load.go_on(300, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    mesh.all_enrolled("shop")?;

    pods_on_a_bridge_are_meshed(&cluster, &mesh)?;
    what_is_applied_holds(&cluster, &mesh, web)?;
    let seen = load.go_on(100, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    drop(load);
    tokens_open_nothing_else(&cluster)?;

    // All of it goes again.
    kubectl.run(&["delete", "peerauthentication", "-n", "shop", "--all"])?;
    kubectl.run(&["delete", "virtualservice", "-n", "shop", "--all"])?;
    let loaded = mesh.loaded()?;
    let there = loaded.now()?;
    let is_there = |name: &str| there.iter().filter(|line| line.ends_with(&format!(" {name}"))).count();
    assert!(is_there("connect4") == 2 && is_there("arrival") > 2, "of two nodes and their pods: {there:?}");
    uninstall_is_killed(&cluster, &mesh)?;
    assert!(mesh.remains()?.iter().any(|left| left.starts_with("node ")), "it was killed too late");
    mesh.meshctl(&["uninstall", "--purge"])?;
    assert_eq!(mesh.remains()?, Vec::<String>::new());
    // The kernel lets go of what nobody holds in its own time.
    eventually(LIMIT, || loaded.now(), |left| left.as_ref().is_ok_and(Vec::is_empty))??;
    let told = stranger()?;
    assert_eq!(told.status, 200, "{told:?}");
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web-v1"])?;
    Ok(cluster.rolled_out("shop", "deployment/web-v1")?)
}

/// On node b, whose pods are ports of a bridge by a chain of two plugins: those of the shop talk to each other, and nobody else to them.
fn pods_on_a_bridge_are_meshed(cluster: &Cluster, mesh: &Mesh<'_>) -> TestResult {
    let node = cluster.node("b")?;
    let chain: Value = serde_json::from_str(&node.run(&["cat", "/etc/cni/net.d/10-bridged.conflist"])?)?;
    let plugins: Vec<&Value> =
        chain["plugins"].as_array().into_iter().flatten().map(|plugin| &plugin["type"]).collect();
    assert_eq!(plugins, ["bridge", "portmap", "nodemesh-cni"]);
    let neighbours = ["shop", "outside"].map(|namespace| shop::server("neighbour", namespace, "b"));
    cluster.kubectl().apply(&neighbours.concat())?;
    for namespace in ["shop", "outside"] {
        let wait = ["wait", "pod/neighbour", "-n", namespace, "--for=condition=Ready", "--timeout=120s"];
        cluster.kubectl().run(&wait)?;
    }
    let ports = node.run(&["ip", "-oneline", "link", "show", "master", "cni0"])?;
    assert!(ports.lines().count() >= 2, "{ports}");
    let web = web_on(cluster, "b")?;
    is_served(&cluster.pod("shop", "neighbour"), web)?;
    assert!(mesh.enrolled("shop")?.iter().any(|pod| pod == "neighbour"));
    let told = cluster.pod("outside", "neighbour").get(web, "web", "/")?;
    assert_ne!(told.status, 200, "{told:?}");
    Ok(())
}

/// Begins to take the mesh out, and is killed when the DaemonSet of agents is gone: who comes next cannot ask it what the nodes need.
fn uninstall_is_killed(cluster: &Cluster, mesh: &Mesh<'_>) -> TestResult {
    let mut run = mesh.command(&["uninstall"])?.spawn()?;
    let agents =
        ["get", "daemonset", "-n", "nodemesh-system", "nodemesh-agent", "-o", "name", "--ignore-not-found"];
    let gone = eventually(
        LIMIT,
        || cluster.kubectl().run(&agents),
        |found| found.as_ref().is_ok_and(|found| found.trim().is_empty()),
    );
    run.kill()?;
    run.wait()?;
    gone??;
    Ok(())
}

/// What somebody can do who has stolen an agent's token.
fn tokens_open_nothing_else(cluster: &Cluster) -> TestResult {
    let may = |verb: &str, what: &str| {
        let account = "--as=system:serviceaccount:nodemesh-system:nodemesh-agent";
        let answer = cluster.kubectl().run(&["auth", "can-i", verb, what, "-A", account]);
        answer.is_ok_and(|answer| answer.trim() == "yes")
    };
    assert!(may("list", "pods"));
    for (verb, what) in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("get", "configmaps"),
        ("create", "pods"),
        ("patch", "pods"),
        ("patch", "nodes"),
        ("create", "serviceaccounts/token"),
        ("create", "tokenreviews"),
    ] {
        assert!(!may(verb, what), "an agent's token may {verb} {what}");
    }
    Ok(())
}

#[test]
fn pods_whose_first_act_is_to_connect_are_meshed_and_agents_come_and_go() -> TestResult {
    require_cluster!();
    let bare = NodeOptions { bpf: BpfFileSystem::Missing, ..NodeOptions::default() };
    let cluster = Cluster::start_of(test_name!(), &[("a", NodeOptions::default()), ("b", bare)])?;
    let kubectl = cluster.kubectl();
    assert_eq!(bpf_file_systems(cluster.node("b")?)?, 0);
    let mesh = Mesh::install_with(&cluster, &[TWO])?;
    agents_are_rolled(&cluster)?;
    kubectl.apply(shop::SPACES)?;
    mesh.enrol("shop")?;
    kubectl.apply(STRICT)?;
    shop::open(&cluster)?;
    mesh.all_enrolled("shop")?;
    let web = shop::address(&cluster, "web")?;
    let client = cluster.pod("shop", "client");
    is_served(&client, web)?;

    a_crowd_connects(&cluster, web)?;

    let load = client.load_by(cluster.node("a")?, &shop::mix(web, "web"))?;
    load.go_on(50, LIMIT)?;
    agents_are_killed(&cluster, &mesh, &load)?;
    everything_is_upgraded(&cluster, &mesh, &load)?;
    the_api_server_dies_and_comes_back(&cluster, &load, web)?;
    the_leader_dies(&cluster, &load)?;
    drop(load);
    nobody_leads(&cluster, &mesh, web)?;
    a_pod_waits_for_the_agent_of_its_node(&cluster, web)
}
