//! Agents that are killed while pods are served: what goes past them goes on, what may go without them does, and the next ones serve the rest.
//!
//! The shop's client, on node a, connects to two pods. `near` is on its node and takes only the mesh: once the agent has admitted the client,
//! the kernel connects the two by itself, agent or no agent. `open`, on node b, takes everybody: while the client's agent is dead, new
//! connections go there without the mesh. The shop's service takes only the mesh too, and its requests go through agents: while one of them is
//! dead they fail, as they must, and not after it is back.
//!
//! Node b has a BPF file system because its agent mounted one, from its container: what is pinned there is there for the next agent as well.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_tests::cluster::{Cluster, ClusterNode, Mesh, shop};
use mesh_tests::protocol::{Exchange, Load, LoadReport};
use mesh_tests::tool::{RunningLoad, ServerOptions};
use mesh_tests::web::WebLoad;
use mesh_tests::{Failure, PodTool, TestResult, ToolError, eventually};
use serde_json::Value;

use crate::scene::{LIMIT, all_ready, ip_of, kill, parts, restarts};

/// Where the two pods serve lines of text: no port of a service, so nobody wants to read requests there.
const PORT: u16 = 7000;

/// Clients of a load.
const WORKERS: u32 = 4;

/// What a load may lose with an agent that carries it: attempts that were under way.
const UNDER_WAY: u64 = 16;

/// Good answers after an agent is back, by which the requests have ended that were under way before.
const SETTLED: u64 = 200;

/// Agents that are killed come back by themselves.
pub(crate) fn agents_are_killed(cluster: &Cluster, mesh: &Mesh<'_>, load: &WebLoad) -> TestResult {
    let (a, b) = (cluster.node("a")?, cluster.node("b")?);
    let servers = [shop::server("near", "shop", "a"), shop::server("open", "outside", "b")];
    cluster.kubectl().apply(&servers.concat())?;
    let (near_at, open_at) = (address(cluster, "shop", "near")?, address(cluster, "outside", "open")?);
    mesh.enrol("outside")?;
    mesh.all_enrolled("outside")?;
    let near = cluster.pod("shop", "near").tool(a)?;
    let _near = near.serve(SocketAddr::from(([0u16; 8], PORT)), ServerOptions::named("near"))?;
    let open = cluster.pod("outside", "open").tool(b)?;
    let _open = open.serve(SocketAddr::from(([0u16; 8], PORT)), ServerOptions::named("open"))?;
    let client = cluster.pod("shop", "client").tool(a)?;

    let kept = held_past_the_agent(mesh, &client, near_at)?;
    let new = steady(&client, near_at, Exchange::ConnectAndAsk)?;
    goes_on(&new, 20)?;
    for agent in parts(cluster, "agent")? {
        let node = agent["spec"]["nodeName"].as_str().context("no node")?;
        // No client of the mesh talks in the clear to a pod whose own agent is dead, so the other kill is left out.
        let is_clients = node == "a";
        let open = is_clients.then(|| steady(&client, open_at, Exchange::ConnectAndAsk)).transpose()?;
        if let Some(open) = &open {
            goes_on(open, 20)?;
        }
        let (before, pinned) = (load.report(), pins(cluster.node(node)?)?);
        let away = is_killed_and_comes_back(cluster, &agent, || {
            for load in [&kept, &new].into_iter().chain(&open) {
                goes_on(load, 20)?;
            }
            Ok(())
        })?;
        assert!(pinned.len() > 10, "{pinned:?}");
        assert_eq!(pins(cluster.node(node)?)?, pinned, "the next agent of {node} pinned things anew");
        assert_eq!(bpf_file_systems(cluster.node(node)?)?, 1, "{node}");
        load.go_on(SETTLED, LIMIT)?;
        let settled = load.report();
        let quiet = load.go_on(SETTLED, LIMIT)?;
        assert_eq!(quiet.failed, settled.failed, "failed since the agent of {node} is back");
        let (good, failed) = (settled.ok() - before.ok(), settled.failures() - before.failures());
        println!(
            "agent of {node}: back after {away:?}; {good} requests to the shop were good, {failed} failed"
        );
        if let Some(open) = open {
            goes_on(&open, 20)?;
            let report = open.stop()?;
            println!("to a pod that takes everybody: {} good, {:?} failed", report.ok, report.failed);
            assert!(report.failures() <= UNDER_WAY, "{report:?}");
        }
    }
    for load in [&kept, &new] {
        goes_on(load, 20)?;
    }
    let (kept, new) = (kept.stop()?, new.stop()?);
    println!("past the agents: {} answers on connections that were kept, {} on new ones", kept.ok, new.ok);
    assert_eq!((kept.failures(), kept.connects), (0, u64::from(WORKERS)), "a connection broke: {kept:?}");
    assert_eq!(new.failures(), 0, "{new:?}");
    Ok(())
}

/// The port of a pod, once it runs.
fn address(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<SocketAddr> {
    let what = format!("pod/{pod}");
    let wait = ["wait", &what, "-n", namespace, "--for=condition=Ready", "--timeout=120s"];
    cluster.kubectl().run(&wait)?;
    Ok(SocketAddr::new(ip_of(cluster, namespace, pod)?, PORT))
}

/// Kills the program of an agent, does `meanwhile`, and waits until it is back; how long that took.
fn is_killed_and_comes_back(
    cluster: &Cluster,
    agent: &Value,
    meanwhile: impl FnOnce() -> anyhow::Result<()>,
) -> Result<Duration, Failure> {
    let before = restarts(cluster)?;
    let begun = Instant::now();
    kill(cluster, agent)?;
    meanwhile().context("while the agent is dead")?;
    // Not by the DaemonSet's word, which may be from before.
    let look = || anyhow::Ok((restarts(cluster)?, all_ready(cluster)?));
    eventually(LIMIT, look, |now| now.as_ref().is_ok_and(|(count, ready)| *count > before && *ready))??;
    Ok(begun.elapsed())
}

/// How many BPF file systems a node has mounted where everybody looks for one.
pub(crate) fn bpf_file_systems(node: &ClusterNode) -> anyhow::Result<usize> {
    let mounts = node.run(&["cat", "/proc/mounts"])?;
    let is_one = |line: &&str| {
        let mut fields = line.split(' ').skip(1);
        (fields.next(), fields.next()) == (Some("/sys/fs/bpf"), Some("bpf"))
    };
    Ok(mounts.lines().filter(is_one).count())
}

/// What a node's agent has pinned for all pods, each with its number in the file system, which is another if it was pinned again.
fn pins(node: &ClusterNode) -> anyhow::Result<Vec<String>> {
    // Pods that have ended, such as those of a job, take their own pins along at any time.
    let find =
        ["find", "/sys/fs/bpf/nodemesh", "-type", "f", "!", "-name", "arrival-*", "-printf", "%i %p\n"];
    let mut pins: Vec<String> = node.run(&find)?.lines().map(str::to_owned).collect();
    pins.sort();
    Ok(pins)
}

fn steady(client: &PodTool, to: SocketAddr, exchange: Exchange) -> Result<RunningLoad, ToolError> {
    client.start_load(Load {
        targets: vec![to],
        per_second: 50,
        workers: WORKERS,
        duration_ms: 0,
        exchange,
        timeout_ms: 20_000,
    })
}

/// Lets a load do some more good attempts.
fn goes_on(load: &RunningLoad, more: u64) -> anyhow::Result<()> {
    let before = load.report()?.ok;
    let enough = |now: &Result<LoadReport, ToolError>| now.as_ref().is_ok_and(|now| now.ok >= before + more);
    eventually(LIMIT, || load.report(), enough)??;
    Ok(())
}

/// A load on connections that go past the agent; through it goes what it has not judged yet.
fn held_past_the_agent(mesh: &Mesh<'_>, client: &PodTool, near: SocketAddr) -> anyhow::Result<RunningLoad> {
    let hold = || -> anyhow::Result<(RunningLoad, Vec<String>)> {
        let kept = steady(client, near, Exchange::KeepOpen)?;
        goes_on(&kept, 20)?;
        Ok((kept, paths(mesh, "shop/near")?))
    };
    let are_direct = |held: &anyhow::Result<(RunningLoad, Vec<String>)>| {
        let direct =
            |paths: &[String]| paths.len() >= WORKERS as usize && paths.iter().all(|path| path == "direct");
        held.as_ref().is_ok_and(|(_, paths)| direct(paths))
    };
    Ok(eventually(LIMIT, hold, are_direct)??.0)
}

/// How the live connections of the shop's client to a pod travel.
fn paths(mesh: &Mesh<'_>, to: &str) -> anyhow::Result<Vec<String>> {
    let answer = mesh.ask(&["connections", "--node", "a"])?;
    let rows = answer["connections"].as_array().with_context(|| format!("no connections in {answer}"))?;
    let own = rows.iter().filter(|row| {
        row["source"] == "shop/client" && row["destination"] == to && row["direction"] == "outbound"
    });
    Ok(own.filter_map(|row| Some(row["path"].as_str()?.to_owned())).collect())
}
