//! Agents that die, come back, and are asked to leave, while traffic runs.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::protocol::{Exchange, Load};
use mesh_tests::tool::RunningLoad;
use mesh_tests::{
    Agent, Pod, PodTool, Shop, TestResult, ToolError, eventually, require_agent, shop, test_name,
};

fn steady(tool: &PodTool, targets: Vec<SocketAddr>, exchange: Exchange) -> Result<RunningLoad, ToolError> {
    let timeout_ms = u64::try_from(mesh_tests::limit(Duration::from_secs(2)).as_millis()).unwrap_or(u64::MAX);
    tool.start_load(Load { targets, per_second: 200, workers: 4, duration_ms: 0, exchange, timeout_ms })
}

/// Let a load do some more good attempts.
fn go_on(load: &RunningLoad, more: u64) -> TestResult {
    let before = load.report()?.ok;
    eventually(
        Duration::from_secs(10),
        || load.report().map(|report| report.ok).unwrap_or(0),
        |ok| *ok >= before + more,
    )?;
    Ok(())
}

/// Connect until a connection of each family goes past the agent.
fn warm_up(agent: &Agent, client: &Pod, server: &Pod, targets: &[SocketAddr]) -> TestResult {
    for to in targets {
        let before = shop::opened(agent, client, server, "direct")?;
        eventually(
            Duration::from_secs(5),
            || {
                client.tool().and_then(|tool| tool.who(*to)).is_ok()
                    && shop::opened(agent, client, server, "direct").is_ok_and(|now| now > before)
            },
            |direct| *direct,
        )?;
    }
    Ok(())
}

#[test]
fn direct_connections_do_not_notice_that_the_agent_is_killed_and_started_again() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a"])?;
    let (client, web) = (shop.pod("a", "client")?, shop.pod("a", "web")?);
    let vip = shop.service("web", 80)?;
    let agents = shop.start_agents()?;
    let _server = shop.serve(&web)?;
    warm_up(&agents[0], &client, &web, &vip.all())?;
    let tool = client.tool()?;
    let kept = steady(&tool, vip.all().to_vec(), Exchange::KeepOpen)?;
    let new = steady(&tool, vip.all().to_vec(), Exchange::ConnectAndAsk)?;
    go_on(&new, 100)?;
    agents[0].kill9();
    go_on(&new, 200)?;
    go_on(&kept, 200)?;
    let again = shop.world().node("a")?.agent().start()?;
    go_on(&new, 200)?;
    go_on(&kept, 200)?;
    again.wait_enrolled([&client, &web])?;
    let status = again.meshctl(&["status"])?;
    let programs = status["kernel"]["programs"].as_array().map(Vec::as_slice).unwrap_or_default();
    assert!(programs.iter().any(|program| program["adopted"] == true), "no link was adopted: {status:#}");
    for report in [kept.stop()?, new.stop()?] {
        assert_eq!(report.failures(), 0, "{report:?}");
    }
    Ok(())
}

#[test]
fn new_connections_pass_while_a_permissive_meshs_agents_are_dead() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
    let targets = [shop.service("near", 80)?.all(), shop.service("far", 80)?.all()].concat();
    let agents = shop.start_agents()?;
    let _servers = [shop.serve(&near)?, shop.serve(&far)?];
    let load = steady(&client.tool()?, targets.clone(), Exchange::ConnectAndAsk)?;
    go_on(&load, 100)?;
    // Proxied attempts that are under way at the kill may fail; none after it.
    for agent in &agents {
        agent.kill9();
    }
    let during = load.stop()?;
    assert!(during.failures() <= 16, "{during:?}");
    let after = steady(&client.tool()?, targets, Exchange::ConnectAndAsk)?;
    go_on(&after, 300)?;
    let report = after.stop()?;
    assert_eq!(report.failures(), 0, "{report:?}");
    assert_eq!(report.answered_by.len(), 2, "{report:?}");
    Ok(())
}

#[test]
fn a_restarted_agent_proxies_again() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let far = shop.pod("b", "far")?;
    let vip = shop.service("far", 80)?;
    let agents = shop.start_agents()?;
    let _server = shop.serve(&far)?;
    client.tool()?.who(vip.v4)?;
    for round in 0..3 {
        for agent in shop.world().nodes().flat_map(mesh_tests::Node::agents) {
            agent.kill9();
        }
        let restarted = shop.start_agents()?;
        restarted[0].wait_enrolled([&client])?;
        restarted[1].wait_enrolled([&far])?;
        let before = shop::opened(&restarted[0], &client, &far, "proxy")?;
        for to in vip.all() {
            let seen = client.tool()?.who(to)?;
            assert_eq!(seen.server, "far", "round {round}");
        }
        let now = shop::opened(&restarted[0], &client, &far, "proxy")?;
        assert!(now >= before + 3, "round {round}: {before} then {now}");
    }
    drop(agents);
    Ok(())
}

#[test]
fn an_agent_asked_to_leave_lets_connections_end() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let far = shop.pod("b", "far")?;
    let vip = shop.service("far", 80)?;
    let agents = shop.start_agents()?;
    let _server = shop.serve(&far)?;
    let held = client.tool()?.connect(vip.v4)?;
    held.who()?;
    agents[0].begin_drain()?;
    // It goes on to carry what it carries, and new connections do not need it.
    for _ in 0..5 {
        held.who()?;
        assert_eq!(client.tool()?.who(vip.v6)?.server, "far");
    }
    assert!(agents[0].is_running(), "it left a connection behind");
    drop(held);
    eventually(Duration::from_secs(5), || agents[0].is_running(), |running| !running)?;
    Ok(())
}

#[test]
fn a_drain_ends_in_time_even_if_connections_do_not() -> TestResult {
    require_agent!();
    let shop = Shop::open(test_name!(), &["a", "b"])?;
    let client = shop.pod("a", "client")?;
    let far = shop.pod("b", "far")?;
    let vip = shop.service("far", 80)?;
    let agent = shop.world().node("a")?.agent().args(&["--drain", "500ms"]).start()?;
    let _other = shop.world().node("b")?.agent().start()?;
    let _server = shop.serve(&far)?;
    let held = client.tool()?.connect(vip.v4)?;
    held.who()?;
    let status = agent.terminate(Duration::from_secs(5))?;
    assert!(status.success(), "{status}");
    assert!(held.who().is_err(), "the held connection outlived the drain");
    assert_eq!(client.tool()?.who(vip.v4)?.server, "far");
    Ok(())
}
