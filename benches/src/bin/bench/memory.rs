//! Owns the memory figures: an agent without pods, the same agent with a hundred, and idle tunnelled connections.

use std::time::Duration;

use anyhow::Context as _;
use mesh_benches::load::task::Task;
use mesh_tests::manifests::NamespaceManifest;
use mesh_tests::{Agent, Link, World, eventually};
use serde_json::Value;

use crate::agents::MeshNode;
use crate::figures::{Figures, Metric, kib, mib};
use crate::paths::{Lab, NAMESPACE, Path, Traffic};
use crate::session::Session;

/// `path` of the rows.
pub(crate) const PATH: &str = "agent";

/// How often it is measured.
pub(crate) const ROUNDS: usize = 3;

const NODE: &str = "crowd";
const PODS: usize = 100;

/// Connections before it is measured what more of them cost.
const FIRST: usize = 50;

/// Idle connections that are measured.
const HELD: usize = 1000;

/// Enrolling a hundred pods.
const ENROL_LIMIT: Duration = Duration::from_secs(60);

/// Allocators and page caches need a moment to show what is kept.
const SETTLE: Duration = Duration::from_secs(2);

/// Measure in fresh worlds.
pub(crate) fn measure(rounds: usize, figures: &mut Figures) -> anyhow::Result<()> {
    for round in 0..rounds {
        eprintln!("memory {} of {rounds}", round + 1);
        let world = World::with_nodes("bench-memory", &[NODE])?;
        let node = world.node(NODE)?;
        world.manifests().apply(NamespaceManifest::meshed(NAMESPACE))?;
        let mut agent = MeshNode::new(&[]);
        agent.restart(node)?;
        std::thread::sleep(SETTLE);
        let idle = agent.rss()?;
        let pods = node.pods_in_bulk(&format!("{NAMESPACE}/pod"), PODS)?;
        let manifests: Vec<Value> = pods.iter().map(|pod| pod.manifest().into()).collect();
        world.manifests().apply_all("pods.yaml", &manifests)?;
        eventually(ENROL_LIMIT, || enrolled(agent.agent()), |count| *count == PODS)
            .context("not all pods were enrolled")?;
        std::thread::sleep(SETTLE);
        let full = agent.rss()?;
        figures.push(PATH, Metric::RssIdle, mib(idle));
        figures.push(PATH, Metric::RssHundredPods, mib(full));
        figures.push(PATH, Metric::RssPerPod, kib(full.saturating_sub(idle) as f64 / PODS as f64));
    }
    Ok(())
}

/// Measure what an idle connection between two nodes costs the larger of the two agents that carry it.
pub(crate) fn measure_tunnelled(rounds: usize, figures: &mut Figures) -> anyhow::Result<()> {
    for round in 0..rounds {
        eprintln!("idle tunnelled connections {} of {rounds}", round + 1);
        let mut lab = Lab::build(Traffic::Tcp, &[Path::MtlsRemote], Link::Bridged, None)?;
        lab.restart_proxies()?;
        let route = lab.routes().first().context("there is no route")?;
        let mut session = Session::start(&route.client, &route.server, &[route.to], false)?;
        // What the first connections bring about (certificates, tunnels, buffers) is not a connection's cost.
        session.perform(&Task::Hold { connections: FIRST })?;
        std::thread::sleep(SETTLE);
        let agents = lab.agents_of(route);
        let before = agents.iter().map(|agent| agent.rss()).collect::<anyhow::Result<Vec<u64>>>()?;
        session.perform(&Task::Hold { connections: HELD })?;
        std::thread::sleep(SETTLE);
        let after = agents.iter().map(|agent| agent.rss()).collect::<anyhow::Result<Vec<u64>>>()?;
        let grown = after.iter().zip(&before).map(|(after, before)| after.saturating_sub(*before)).max();
        let per_connection = grown.context("there is no agent")? as f64 / HELD as f64;
        figures.push(PATH, Metric::RssPerTunnelled, kib(per_connection));
    }
    Ok(())
}

/// Pods that the agent says are enrolled; 0 while it cannot be asked.
fn enrolled(agent: anyhow::Result<&Agent>) -> usize {
    let status = agent.ok().and_then(|agent| agent.meshctl(&["status"]).ok()).unwrap_or_default();
    let pods = status["pods"].as_array().map_or(&[][..], Vec::as_slice);
    pods.iter().filter(|pod| pod["state"] == "enrolled").count()
}
