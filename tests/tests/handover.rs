//! The next agent of a node takes it over from the one before it: new connections of every kind notice nothing.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::Permissions;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mesh_tests::agent::AgentError;
use mesh_tests::manifests::MtlsMode;
use mesh_tests::nameserver::NameServer;
use mesh_tests::protocol::{DnsBy, Exchange, Load};
use mesh_tests::tool::{RunningLoad, Server};
use mesh_tests::web::messages::Mix;
use mesh_tests::web::{WebLoad, WebScene};
use mesh_tests::{
    Agent, Failure, Pod, Shop, TestResult, ToolError, eventually, limit, programs, require_agent, test_name,
};

const SOON: Duration = Duration::from_secs(20);
const TAKE_OVER: &[&str] = &["--take-over"];

/// A strict shop with servers of HTTP and of lines on both nodes, and clients of all of them on node a.
struct Scene {
    web: WebScene,
    near: SocketAddr,
    far: SocketAddr,
    resolver: NameServer,
    /// What serves, held.
    _servers: Vec<Server>,
}

impl Scene {
    fn set(test: &str) -> Result<Self, Failure> {
        let web = WebScene::set(test)?;
        let shop = &web.shop;
        let (near, far) = (shop.pod("a", "near")?, shop.pod("b", "far")?);
        let (to_near, to_far) = (shop.service("near", 7000)?.v4, shop.service("far", 7000)?.v4);
        let servers = vec![shop.serve(&near)?, shop.serve(&far)?];
        let outside = shop.world().outsider("resolver")?;
        let resolver = NameServer::start(&outside, &[("example.test.", vec!["203.0.113.7".parse()?])])?;
        web.agents[0].wait_enrolled([&near])?;
        web.agents[1].wait_enrolled([&far])?;
        shop.mode(MtlsMode::Strict)?;
        for to in [to_near, to_far] {
            eventually(SOON, || web.client.tool()?.who(to), |seen| seen.is_ok())??;
        }
        Ok(Self { web, near: to_near, far: to_far, resolver, _servers: servers })
    }

    fn start_loads(&self) -> Result<Loads, Failure> {
        let client = &self.web.client;
        let mix = |port, short, http2| {
            let host = "web".to_owned();
            Mix { http: self.web.at(port), host, keep_alive: 2, short, http2, tcp: None, pause_ms: 20 }
        };
        Ok(Loads {
            lines: [("direct", lines(client, self.near)?), ("hbone", lines(client, self.far)?)],
            http: [WebLoad::start(client, &mix(80, 3, 1))?, WebLoad::start(client, &mix(82, 0, 1))?],
        })
    }

    /// Names of the mesh and of others, by every transport, until told to stop. What failed.
    fn ask_names(&self, stop: &AtomicBool) -> Result<(u64, Vec<String>), ToolError> {
        let (mut asked, mut failed) = (0, Vec::new());
        let tool = self.web.client.tool()?;
        while !stop.load(Ordering::Relaxed) {
            for by in [DnsBy::ConnectedUdp, DnsBy::UnconnectedUdp, DnsBy::Tcp] {
                for (name, address) in [
                    ("web.shop.svc.cluster.local.", self.web.vip.v4.ip()),
                    ("example.test.", IpAddr::from([203, 0, 113, 7])),
                ] {
                    asked += 1;
                    match tool.dns(self.resolver.address(), name, "A", by) {
                        Ok(answer) if answer.addresses == [address] => {}
                        other => failed.push(format!("{name} by {by:?}: {other:?}")),
                    }
                }
            }
        }
        Ok((asked, failed))
    }
}

/// Connects, asks and closes, all the time.
fn lines(client: &Pod, to: SocketAddr) -> Result<RunningLoad, ToolError> {
    let timeout_ms = u64::try_from(limit(Duration::from_secs(5)).as_millis()).unwrap_or(u64::MAX);
    let (targets, exchange) = (vec![to], Exchange::ConnectAndAsk);
    client.tool()?.start_load(Load {
        targets,
        per_second: 100,
        workers: 2,
        duration_ms: 0,
        exchange,
        timeout_ms,
    })
}

/// Connections that are made all the time.
struct Loads {
    lines: [(&'static str, RunningLoad); 2],
    http: [WebLoad; 2],
}

impl Loads {
    fn ok(&self) -> Vec<u64> {
        let lines = self.lines.iter().map(|(_, load)| load.report().map_or(0, |report| report.ok));
        lines.chain(self.http.iter().map(|load| load.report().ok())).collect()
    }

    /// Lets each do some more good attempts.
    fn go_on(&self) -> TestResult {
        let before = self.ok();
        let more = |now: &Vec<u64>| now.iter().zip(&before).all(|(now, before)| *now >= before + 50);
        eventually(SOON, || self.ok(), more)?;
        Ok(())
    }

    /// Good attempts and failed ones of all.
    fn stop(self) -> Result<(u64, BTreeMap<String, u64>), Failure> {
        let (mut ok, mut failed) = (0, BTreeMap::new());
        for (kind, load) in self.lines {
            let report = load.stop()?;
            println!(
                "{kind}: {} good, longest {} us, gap {} ms",
                report.ok, report.max_us, report.longest_gap_ms
            );
            ok += report.ok;
            failed.extend(report.failed.into_iter().map(|(what, times)| (format!("{kind}: {what}"), times)));
        }
        for load in self.http {
            let report = load.stop();
            println!("http: {} good", report.ok());
            ok += report.ok();
            failed.extend(report.failed);
        }
        Ok((ok, failed))
    }
}

fn counted(agent: &Agent, outcome: &str) -> Result<f64, AgentError> {
    agent.metric(&["mesh_handovers_total", &format!("outcome=\"{outcome}\"")])
}

#[test]
fn agents_are_replaced_under_load_and_no_new_connection_fails() -> TestResult {
    require_agent!();
    let scene = Scene::set(test_name!())?;
    let loads = scene.start_loads()?;
    loads.go_on()?;
    let stop = AtomicBool::new(false);
    let names = std::thread::scope(|scope| -> Result<_, Failure> {
        let names = scope.spawn(|| scene.ask_names(&stop));
        let replaced = replace_all(&scene, &loads);
        stop.store(true, Ordering::Relaxed);
        let names = names.join().map_err(|_| anyhow::anyhow!("asking for names panicked"))??;
        replaced?;
        Ok(names)
    })?;
    let (ok, failed) = loads.stop()?;
    println!("{ok} good, failed: {failed:?}; {} names, failed: {:?}", names.0, names.1);
    assert!(failed.is_empty(), "{failed:?}");
    assert!(names.1.is_empty() && names.0 > 50, "{names:?}");
    Ok(())
}

/// Replaces agents in turn, while pods come and go.
fn replace_all(scene: &Scene, loads: &Loads) -> TestResult {
    let shop = &scene.web.shop;
    let mut serving: BTreeMap<&str, Agent> =
        ["a", "b"].into_iter().zip(scene.web.agents.iter().cloned()).collect();
    let (mut replaced, mut left): (Vec<Agent>, Option<(&str, Pod)>) = (Vec::new(), None);
    for (turn, node) in ["a", "b", "a"].into_iter().enumerate() {
        let next = shop.world().node(node)?.agent().args(TAKE_OVER).launch()?;
        // In the middle of it a pod comes, and one goes.
        let guest = shop.pod(node, &format!("guest-{turn}"))?;
        if let Some((home, pod)) = left.take() {
            shop.world().manifests().delete("Pod", pod.namespace(), pod.name())?;
            shop.world().node(home)?.remove_pod(&pod)?;
        }
        next.wait_ready()?;
        assert_eq!(counted(&next, "taken")?, 1.0, "{}", next.log_text());
        next.wait_enrolled([&guest])?;
        assert_eq!(guest.tool()?.who(scene.far)?.server, "far");
        loads.go_on()?;
        replaced.extend(serving.insert(node, next));
        left = Some((node, guest));
    }
    // They end by themselves when their connections have.
    eventually(SOON, || replaced.iter().any(Agent::is_running), |running| !running)?;
    Ok(())
}

/// A strict shop of one client on node a and a server of lines on each node.
struct Small {
    shop: Shop,
    client: Pod,
    near: SocketAddr,
    far: SocketAddr,
    agents: Vec<Agent>,
    _servers: Vec<Server>,
}

impl Small {
    fn set(test: &str) -> Result<Self, Failure> {
        let shop = Shop::open(test, &["a", "b"])?;
        let (client, near, far) = (shop.pod("a", "client")?, shop.pod("a", "near")?, shop.pod("b", "far")?);
        let (to_near, to_far) = (shop.service("near", 80)?.v4, shop.service("far", 80)?.v4);
        shop.mode(MtlsMode::Strict)?;
        let agents = shop.start_agents()?;
        let servers = vec![shop.serve(&near)?, shop.serve(&far)?];
        for to in [to_near, to_far] {
            eventually(SOON, || client.tool()?.who(to), |seen| seen.is_ok())??;
        }
        Ok(Self { shop, client, near: to_near, far: to_far, agents, _servers: servers })
    }

    fn replace(&self) -> Result<Agent, Failure> {
        Ok(self.shop.world().node("a")?.agent().args(TAKE_OVER).start()?)
    }
}

#[test]
fn an_agent_whose_successor_does_not_get_far_serves_on() -> TestResult {
    require_agent!();
    let small = Small::set(test_name!())?;
    let first = &small.agents[0];
    let loads = [lines(&small.client, small.near)?, lines(&small.client, small.far)?];
    // It has the sockets, has loaded its programs, and then cannot have its admin socket.
    let in_the_way = first.admin_socket().with_file_name("admin-2.sock");
    std::fs::write(&in_the_way, "no socket")?;
    let node = small.shop.world().node("a")?;
    let broken = node.agent().args(TAKE_OVER).beside_another().start();
    assert!(matches!(broken, Err(AgentError::Ended { .. })), "{broken:?}");
    eventually(SOON, || counted(first, "taken_back"), |times| times.as_ref().is_ok_and(|n| *n == 1.0))??;
    // It serves all of its node: pods that come, and pods that go.
    let guest = small.shop.pod("a", "guest")?;
    first.wait_enrolled([&guest])?;
    assert_eq!(guest.tool()?.who(small.far)?.server, "far");
    small.shop.world().manifests().delete("Pod", guest.namespace(), guest.name())?;
    node.remove_pod(&guest)?;
    let second = small.replace()?;
    assert_eq!(counted(&second, "taken")?, 1.0);
    for load in loads {
        let before = load.report()?.ok;
        eventually(SOON, || load.report().map_or(0, |now| now.ok), |ok| *ok >= before + 50)?;
        let report = load.stop()?;
        assert_eq!(report.failures(), 0, "{report:?}");
    }
    Ok(())
}

#[test]
fn an_agent_that_cannot_be_asked_is_told_to_end_as_before() -> TestResult {
    require_agent!();
    let small = Small::set(test_name!())?;
    let first = &small.agents[0];
    let state = first.admin_socket().with_file_name("state");
    let doors = std::fs::read_dir(&state)?.filter_map(Result::ok).map(|entry| entry.path());
    let doors: Vec<_> = doors.filter(|path| path.extension().is_some_and(|end| end == "handover")).collect();
    assert_eq!(doors.len(), 1, "{doors:?}");
    std::fs::remove_file(&doors[0])?;
    let second = small.replace()?;
    assert_eq!(counted(&second, "taken_without_sockets")?, 1.0);
    assert_eq!(small.client.tool()?.who(small.far)?.server, "far");
    // Whoever runs it would start it again, against its successor.
    assert!(first.is_running());
    first.terminate(SOON)?;
    // The next one finds the door again.
    let third = small.replace()?;
    assert_eq!(counted(&third, "taken")?, 1.0);
    eventually(SOON, || second.is_running(), |running| !running)?;
    Ok(())
}

/// What a container's start-up probe asks, in the container of this process.
fn has_started(pid: u32, state: &Path, node: &str) -> Result<Result<(), String>, Failure> {
    let asked = Command::new("nsenter")
        .args(["--target", &pid.to_string(), "--mount", "--net", "--"])
        .arg(programs::agent()?)
        .args(["started", "--node", node, "--state-dir"])
        .arg(state)
        .output()?;
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    Ok(asked.status.success().then_some(()).ok_or(said))
}

#[test]
fn a_successor_has_not_started_while_the_agent_before_it_answers_at_its_address() -> TestResult {
    require_agent!();
    let small = Small::set(test_name!())?;
    let first = &small.agents[0];
    let state = first.admin_socket().with_file_name("state");
    let doors = std::fs::read_dir(&state)?.filter_map(Result::ok).map(|entry| entry.path());
    let door = doors.into_iter().find(|path| path.extension().is_some_and(|end| end == "handover"));
    let door = door.ok_or_else(|| anyhow::anyhow!("there is no door"))?;
    let node = door.file_stem().and_then(OsStr::to_str).unwrap_or_default().to_owned();
    assert_eq!(has_started(first.pid(), &state, &node)?, Ok(()));

    // The next one is in a container of its own, and waits for an answer that does not come.
    std::fs::remove_file(&door)?;
    let silent = UnixListener::bind(&door)?;
    let container = state.with_file_name("container");
    let agent = programs::agent()?;
    std::fs::write(
        &container,
        format!("#!/bin/sh\nexec unshare --mount --propagation slave {} \"$@\"\n", agent.display()),
    )?;
    std::fs::set_permissions(&container, Permissions::from_mode(0o755))?;
    let next = small.shop.world().node("a")?.agent().args(TAKE_OVER).program(container).launch()?;
    let (asking, _) = silent.accept()?;
    let outcome = has_started(next.pid(), &state, &node)?;
    let said = outcome.expect_err("the agent before it was taken for it");
    assert!(said.contains("an agent of another container"), "{said}");
    assert_eq!(has_started(first.pid(), &state, &node)?, Ok(()), "it serves on");

    drop((asking, silent));
    next.wait_ready()?;
    assert_eq!(has_started(next.pid(), &state, &node)?, Ok(()));
    first.terminate(SOON)?;
    Ok(())
}

#[test]
fn an_agent_whose_successor_dies_later_ends_with_an_error_unless_somebody_serves_the_node() -> TestResult {
    require_agent!();
    let small = Small::set(test_name!())?;
    let node = small.shop.world().node("a")?;
    let first = node.agent().args(TAKE_OVER).args(&["--drain", "2m"]).start()?;
    // What it has accepted keeps it there.
    let kept = small.client.tool()?.connect(small.far)?;
    let second = small.replace()?;
    second.kill9();
    // Started again within ten seconds, it serves the node, and the old one's connections live on.
    let third = small.replace()?;
    std::thread::sleep(Duration::from_secs(12));
    assert!(first.is_running(), "{}", first.log_text());
    assert_eq!(kept.who()?.server, "far");
    third.kill9();
    let status = first.ended(SOON)?;
    assert!(!status.success(), "{status}");
    assert!(first.log_text().contains("nobody serves the node"), "{}", first.log_text());
    // Whoever runs it starts it again.
    let fourth = small.replace()?;
    assert_eq!(small.client.tool()?.who(small.far)?.server, "far");
    fourth.terminate(SOON)?;
    Ok(())
}
