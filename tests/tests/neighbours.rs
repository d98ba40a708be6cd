//! Others on the same kernel: foreign programs on our hooks, agents of other nodes, a second agent of this one.

use std::process::Command;
use std::time::Duration;

use mesh_tests::cgroup::Cgroup;
use mesh_tests::foreign::ForeignProgram;
use mesh_tests::tool::ServerOptions;
use mesh_tests::{Agent, Pod, Shop, TestResult, eventually, programs, require_agent, test_name};
use nix::errno::Errno;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(5);

/// Foreign programs that `meshctl status` shows, by name.
fn foreign(agent: &Agent) -> Vec<String> {
    let status = agent.meshctl(&["status"]).unwrap_or_default();
    let rows = status["kernel"]["foreign_programs"].as_array().cloned().unwrap_or_default();
    rows.iter().filter_map(|row| row["name"].as_str().map(ToOwned::to_owned)).collect()
}

/// The group above all groups of a node's processes that is still the test's own.
fn world_group(shop: &Shop) -> Result<Cgroup, anyhow::Error> {
    let node = shop.world().node("a")?.cgroup().path();
    let above = node.parent().ok_or_else(|| anyhow::anyhow!("{} has no parent", node.display()))?;
    Ok(Cgroup::at(above.to_path_buf()))
}

#[test]
fn foreign_programs_before_after_above_and_below_ours_keep_working_and_so_do_we() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let node = shop.world().node("a")?;
    let (client, far) = (shop.pod("a", "client")?, shop.pod("b", "far")?);
    let vip = shop.service("far", 80)?;
    let outsider = shop.world().outsider("outsider")?;
    let _outside = outsider.tool()?.serve(outsider.at4(9000), ServerOptions::named("outside"))?;
    let _server = shop.serve(&far)?;
    // Each moves a port of its own; together with ours they must all have their way.
    let before = ForeignProgram::moving_port("nmt_before", 7001, 9000)?.attach(node.cgroup())?;
    let above = ForeignProgram::moving_port("nmt_above", 7002, 9000)?.attach(&world_group(&shop)?)?;
    let agents = shop.start_agents()?;
    let after = ForeignProgram::moving_port("nmt_after", 7003, 9000)?.attach(node.cgroup())?;
    let below = ForeignProgram::moving_port("nmt_below", 7004, 80)?.attach(client.cgroup())?;
    let refusing = ForeignProgram::refusing_port("nmt_refuse", 7005)?.attach(node.cgroup())?;
    for to in vip.all().into_iter().flat_map(|to| [to; 2]) {
        let connection = client.tool()?.connect(to)?;
        assert_eq!(connection.who()?.server, "far", "{to}");
        assert_eq!(connection.names()?.peer, Some(to));
    }
    for port in [7001, 7002, 7003, 9000] {
        assert_eq!(client.tool()?.who(outsider.at4(port))?.server, "outside", "{port}");
    }
    // Programs below run first, so ours sees what they made of it: the service's own port.
    let moved = std::net::SocketAddr::new(vip.v4.ip(), 7004);
    assert_eq!(client.tool()?.who(moved)?.server, "far");
    let refused = client.tool()?.connect(outsider.at4(7005));
    assert_eq!(refused.err().and_then(|error| error.errno()), Some(Errno::EPERM));
    let shown = foreign(&agents[0]);
    for name in ["nmt_before", "nmt_after", "nmt_above", "nmt_refuse"] {
        assert!(shown.iter().any(|shown| shown == name), "{name} is not among {shown:?}");
    }
    drop((before, above, after, below, refusing));
    assert_eq!(client.tool()?.who(vip.v4)?.server, "far");
    eventually(SOON, || foreign(&agents[0]), Vec::is_empty)?;
    Ok(())
}

#[test]
fn an_exclusive_program_above_is_named_with_what_to_do() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let _server = shop.serve(&web)?;
    let group = world_group(&shop)?;
    let owner = ForeignProgram::passing("nmt_owner")?.attach_exclusively(&group)?;
    let node = shop.world().node("a")?;
    let error = node.agent().start().err().map(|error| error.to_string()).unwrap_or_default();
    for part in ["nmt_owner", "exclusive", "--cgroup-root", &group.path().display().to_string()] {
        assert!(error.contains(part), "{part:?} is not in the message: {error}");
    }
    // Nothing is left half-attached: the node's pods are as they were.
    assert_eq!(client.tool()?.who(web.at4(8080))?.server, "web");
    drop(owner);
    let agent = node.agent().start()?;
    agent.wait_enrolled([&client])?;
    assert_eq!(client.tool()?.who(vip.v4)?.server, "web");
    Ok(())
}

#[test]
fn two_agents_on_one_kernel_leave_each_others_pods_alone() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let (a, b) = (shop.world().node("a")?, shop.world().node("b")?);
    let (client_a, web_a) = (shop.pod("a", "client-a")?, shop.backend("a", "web-a", "web")?);
    let (client_b, web_b) = (shop.pod("b", "client-b")?, shop.backend("b", "web-b", "web")?);
    let vip = shop.service("web", 80)?;
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&web_a)?, shop.serve(&web_b)?];
    let names = |agent: &Agent| -> Result<Vec<Value>, mesh_tests::agent::AgentError> {
        let status = agent.meshctl(&["status"])?;
        Ok(status["pods"].as_array().into_iter().flatten().map(|row| row["name"].clone()).collect())
    };
    assert_eq!(names(&agents[0])?, ["client-a", "web-a"]);
    assert_eq!(names(&agents[1])?, ["client-b", "web-b"]);
    assert_ne!(a.kernel().map_ids()?["PODS"], b.kernel().map_ids()?["PODS"]);
    // What one does is counted by one.
    let before = (a.kernel().counters()?, b.kernel().counters()?);
    client_a.tool()?.who(web_a.at4(8080))?;
    let counted = (a.kernel().counters()?.since(&before.0), b.kernel().counters()?.since(&before.1));
    assert!(
        counted.0.count("proxy", "no_verdict") > 0 && counted.1 == mesh_tests::Counters::default(),
        "{counted:?}"
    );

    // One node loses its agent and all it left in the kernel; the other does not notice.
    let links_of_b = b.kernel().link_ids()?;
    agents[0].kill9();
    let cleaned = Command::new(programs::agent()?)
        .args(["cleanup", "--node", a.full_name(), "--cgroup-root"])
        .arg(a.cgroup().path())
        .arg("--state-dir")
        .arg(shop.world().directory().join("a/state"))
        .output()?;
    assert!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
    assert!(a.kernel().folder().is_err(), "pins are left: {:?}", a.kernel().link_ids());
    assert_eq!(b.kernel().link_ids()?, links_of_b);
    for to in vip.all().into_iter().flat_map(|to| [to; 4]) {
        client_b.tool()?.who(to)?;
    }
    let out_of_the_mesh = |client: &Pod| -> TestResult {
        assert!(client.tool()?.connect(vip.v4).is_err(), "the cleaned node still balances");
        assert_eq!(client.tool()?.who(web_b.at4(8080))?.server, "web-b");
        Ok(())
    };
    out_of_the_mesh(&client_a)
}

#[test]
fn a_second_agent_of_the_same_node_is_turned_away() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let node = shop.world().node("a")?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let first = node.agent().start()?;
    let _server = shop.serve(&web)?;
    node.kernel().dial_directly(&client, vip.v4)?;
    let (maps, links) = (node.kernel().map_ids()?, node.kernel().link_ids()?);
    let error =
        node.agent().beside_another().start().err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains(&first.pid().to_string()), "the holder is not named: {error}");
    assert_eq!((node.kernel().map_ids()?, node.kernel().link_ids()?), (maps, links));
    assert_eq!(client.tool()?.who(vip.v4)?.server, "web");
    assert!(first.is_running());
    Ok(())
}
