//! The two-process form: a controller on the wire, and agents that have manifests and certificates from nobody else.

use std::net::SocketAddr;
use std::time::Duration;

use mesh_tests::manifests::MtlsMode;
use mesh_tests::protocol::{Exchange, Load};
use mesh_tests::tool::RunningLoad;
use mesh_tests::{
    Agent, Controller, ControllerSeat, Failure, Pod, Server, Shop, TestResult, ToolError, eventually, limit,
    require_agent, shop, test_name,
};

const SOON: Duration = Duration::from_secs(10);

/// In the name of the policy by which foreign clients are told of STRICT.
const STRICT: &[u8] = b"nodemesh_modes_strict";

/// Two nodes with a client and a server each, a controller, and their agents.
struct Scene {
    shop: Shop,
    seat: ControllerSeat,
    controller: Controller,
    agents: Vec<Agent>,
    client: Pod,
    near: Pod,
    far: Pod,
    outsider: mesh_tests::Place,
    _servers: Vec<Server>,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let client = shop.pod("a", "client")?;
        let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
        let outsider = shop.world().outsider("outsider")?;
        let _servers = vec![shop.serve(&near)?, shop.serve(&far)?];
        let seat = ControllerSeat::new(shop.world())?;
        let controller = seat.start(&[])?;
        let agents = shop.start_agents_of(&seat)?;
        Ok(Self { shop, seat, controller, agents, client, near, far, outsider, _servers })
    }

    fn load(&self, targets: Vec<SocketAddr>) -> Result<RunningLoad, ToolError> {
        let timeout_ms = u64::try_from(limit(Duration::from_secs(5)).as_millis()).unwrap_or(u64::MAX);
        let exchange = Exchange::ConnectAndAsk;
        let load = Load { targets, per_second: 50, workers: 2, duration_ms: 0, exchange, timeout_ms };
        self.client.tool()?.start_load(load)
    }

    /// Wait until an agent's link is as wanted.
    fn wait_link(&self, agent: usize, connected: bool) -> TestResult {
        let link =
            || self.agents[agent].admin("/status").map(|status| status["controller"]["connected"].clone());
        eventually(SOON, link, |found| found.as_ref().is_ok_and(|found| *found == connected))??;
        Ok(())
    }

    /// Wait until the outsider, who has no identity, is served or refused at `to`.
    fn wait_outsider(&self, to: SocketAddr, served: bool) -> TestResult {
        let tool = self.outsider.tool()?;
        eventually(SOON, || tool.who(to).is_ok(), |found| *found == served)?;
        Ok(())
    }

    /// How a new connection of the client to `to` is secured, by its own agent.
    fn security(&self, to: &Pod) -> Result<Vec<String>, Failure> {
        let connection = self.client.tool()?.connect(to.at4(8080))?;
        connection.who()?;
        let rows = || shop::security(&self.agents[0], self.client.at4(0).ip(), to);
        Ok(eventually(SOON, rows, |rows| rows.as_ref().is_ok_and(|rows| rows.len() == 1))??)
    }
}

/// Let a load do some more good attempts.
fn go_on(load: &RunningLoad) -> TestResult {
    let before = load.report()?.ok;
    eventually(SOON, || load.report().map_or(0, |report| report.ok), |ok| *ok >= before + 50)?;
    Ok(())
}

#[test]
fn nodes_of_a_controller_are_one_mesh() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    assert_eq!(scene.security(&scene.far)?, ["mutual_tls"]);
    assert_eq!(scene.security(&scene.near)?, ["kernel"]);
    let vip = scene.shop.service("far", 80)?;
    let by_service = || scene.client.tool()?.who(vip.v4).map(|seen| seen.server);
    eventually(SOON, by_service, |server| server.as_ref().is_ok_and(|server| server == "far"))??;

    let (near, far) = (scene.near.at4(8080), scene.far.at4(8080));
    scene.wait_outsider(far, true)?;
    scene.shop.mode(MtlsMode::Strict)?;
    for to in [near, far] {
        scene.wait_outsider(to, false)?;
        assert!(scene.client.tool()?.who(to).is_ok(), "{to}");
    }

    let late = scene.shop.pod("b", "late")?;
    let _server = scene.shop.serve(&late)?;
    scene.agents[1].wait_enrolled([&late])?;
    // The client's node hears of it by itself, and has no tunnel to whom it does not know.
    eventually(SOON, || scene.client.tool()?.who(late.at4(8080)), Result::is_ok)??;
    assert_eq!(scene.security(&late)?, ["mutual_tls"], "a pod that came later has a certificate too");
    Ok(())
}

#[test]
fn losing_the_controller_changes_nothing_and_its_return_goes_on() -> TestResult {
    require_agent!();
    let mut scene = Scene::set(test_name!())?;
    scene.shop.mode(MtlsMode::Strict)?;
    let (near, far) = (scene.near.at4(8080), scene.far.at4(8080));
    scene.wait_outsider(far, false)?;
    let load = scene.load(vec![near, far])?;
    go_on(&load)?;

    scene.controller.kill9();
    scene.wait_link(0, false)?;
    scene.wait_link(1, false)?;
    go_on(&load)?;
    scene.wait_outsider(far, false)?;
    let status = scene.agents[0].admin("/status")?;
    assert_eq!(status["agent"]["phase"], "ready");

    // What changes meanwhile is known when it is back.
    scene.shop.mode(MtlsMode::Permissive)?;
    go_on(&load)?;
    scene.controller = scene.seat.start(&[])?;
    scene.wait_link(0, true)?;
    scene.wait_link(1, true)?;
    scene.wait_outsider(far, true)?;
    go_on(&load)?;
    let report = load.stop()?;
    assert!(report.failed.is_empty(), "{report:?}");
    Ok(())
}

#[test]
fn an_agent_starts_from_its_last_state_while_the_controller_is_away() -> TestResult {
    require_agent!();
    let mut scene = Scene::set(test_name!())?;
    scene.shop.mode(MtlsMode::Strict)?;
    let near = scene.near.at4(8080);
    scene.wait_outsider(near, false)?;
    // The state reaches the disk a moment after the agent; only a strict one has such a policy for foreign clients.
    let node = scene.shop.world().node("a")?;
    let saved = scene.shop.world().directory().join("a/state").join(node.full_name()).join("snapshot");
    eventually(SOON, || std::fs::read(&saved).is_ok_and(|bytes| contains(&bytes, STRICT)), |there| *there)?;
    scene.controller.kill9();
    scene.agents[0].kill9();

    let agent = node.agent().controller(&scene.seat).start()?;
    agent.wait_enrolled(&node.pods())?;
    assert!(scene.client.tool()?.who(near).is_ok());
    scene.wait_outsider(near, false)?;
    let status = agent.admin("/status")?;
    assert_eq!(status["controller"]["connected"], false);
    assert!(status["controller"]["generation"].is_null(), "the state is the saved one");

    scene.controller = scene.seat.start(&[])?;
    let far = scene.far.at4(8080);
    let reached = || scene.client.tool()?.who(far).map(|seen| seen.server);
    eventually(SOON, reached, |server| server.as_ref().is_ok_and(|server| server == "far"))??;
    let link = || agent.admin("/status").map(|status| status["controller"]["generation"].is_number());
    eventually(SOON, link, |heard| matches!(heard, Ok(true)))??;
    Ok(())
}

#[test]
fn an_agent_without_a_state_is_not_ready_before_a_controller_answers() -> TestResult {
    require_agent!();
    let mut scene = Scene::set(test_name!())?;
    let node = scene.shop.world().node("a")?;
    scene.controller.kill9();
    scene.agents[0].kill9();
    let saved = scene.shop.world().directory().join("a/state").join(node.full_name()).join("snapshot");
    // It may have been killed before it saved anything.
    drop(std::fs::remove_file(saved));

    let agent = node.agent().controller(&scene.seat).launch()?;
    eventually(SOON, || agent.log_text().contains("waiting for the controller"), |waits| *waits)?;
    let answer = agent.http("/readyz");
    assert!(!matches!(answer, Ok((200, _))), "{answer:?}");
    assert!(agent.is_running(), "{}", agent.log_text());

    scene.controller = scene.seat.start(&[])?;
    agent.wait_ready()?;
    eventually(SOON, || agent.http("/readyz"), |answer| matches!(answer, Ok((200, _))))??;
    assert_eq!(agent.http("/healthz")?.0, 200);
    assert_eq!(scene.controller.get("/healthz")?.0, 200);
    agent.wait_enrolled(&node.pods())?;
    Ok(())
}

#[test]
fn a_controller_tells_who_its_agents_are_and_what_they_took() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let (status, body) = scene.controller.get("/sessions")?;
    let sessions: serde_json::Value = serde_json::from_str(&body)?;
    let nodes: Vec<_> = sessions.as_array().into_iter().flatten().map(|row| row["node"].clone()).collect();
    let wanted: Vec<&str> = scene.shop.world().nodes().map(mesh_tests::Node::full_name).collect();
    assert_eq!(status, 200);
    assert!(wanted.iter().all(|name| nodes.iter().any(|node| node == name)), "{body}");
    let (_, metrics) = scene.controller.get("/metrics")?;
    for wanted in ["mesh_xds_sessions{client=\"agent\"} 2", "mesh_ca_issued_total{subject=\"node\"} 2"] {
        assert!(metrics.contains(wanted), "{wanted} is not in\n{metrics}");
    }
    assert_eq!(scene.controller.get("/readyz")?.0, 200);
    assert!(scene.controller.terminate()?.success());
    assert!(scene.agents.iter().all(Agent::is_running));
    Ok(())
}

/// Whether `part` is within `whole`.
fn contains(whole: &[u8], part: &[u8]) -> bool {
    whole.windows(part.len()).any(|window| window == part)
}
