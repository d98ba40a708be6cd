//! Owns `bench hook`: what the connect hook costs with ten thousand services loaded, and that an established
//! connection runs no program at all.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mesh_benches::load::task::{Answer, Task, Timing};
use mesh_tests::manifests::{NamespaceManifest, ServiceManifest};
use mesh_tests::{Link, Pod, World, eventually};
use serde_json::Value;

use crate::agents::{MeshNode, pins_of};
use crate::figures::{Figures, Metric};
use crate::paths::NAMESPACE;
use crate::programs::{self, EmptyConnect, Runs};
use crate::rows::{self, Column, Row};
use crate::session::{PORT, Session};

/// Services of the file source; each has a TCP and a UDP port.
const SERVICES: u16 = 10_000;

/// The first of their addresses: past what other benches and the name server use.
const FIRST_SERVICE: u16 = 1000;

/// Reading ten thousand manifests and filling the tables.
const LOAD_LIMIT: Duration = Duration::from_secs(120);

const NODE: &str = "hook";
const BARE_NODE: &str = "bare";

/// Bytes pushed over an established connection while no program may run, there and back.
const PUSHED_BYTES: u64 = 256 << 20;

/// Options of `bench hook`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Write the rows here, as a JSON array.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often to measure everything, in turn.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// UDP connects of one measurement.
    #[arg(long, value_name = "N", default_value_t = 200_000)]
    connects: u64,
}

/// Run it; fails when something could not be measured, not when a target is missed.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(options.rounds > 0, "--rounds must be at least 1");
    let scene = Scene::build()?;
    let mut agent = MeshNode::new(&[]);
    agent.restart(scene.world.node(NODE)?)?;
    eventually(LOAD_LIMIT, || scene.services(&agent), |count| *count >= usize::from(SERVICES))
        .context("the services were not loaded")?;
    let mut figures = Figures::default();
    let mut sessions = Sessions::start(&scene)?;
    for round in 0..options.rounds {
        eprintln!("round {} of {}", round + 1, options.rounds);
        udp(&mut sessions, options.connects, &mut figures)?;
        tcp(&mut sessions, &scene, &mut figures)?;
        packets(&mut sessions, &scene, &mut figures)?;
    }
    let rows = rows::rows(&figures, &[Column { path: "hook", baseline: None, peer: None }]);
    rows::print(&rows);
    println!(
        "\n{} rounds with {SERVICES} services of two ports loaded; value is the median, range is min-max.\n\
         connect_ns, *_per_connection: the kernel's statistics of real TCP connections, less what an empty program shows in \
         the same connects; to one service, or to all in turn (cold caches).\n\
         udp_*: wall clock of connect(2) on one UDP socket, statistics off; *_added is less the connect without any program.",
        options.rounds,
    );
    if let Some(path) = &options.json {
        rows::write_json(&rows, path)?;
    }
    report(&rows);
    Ok(())
}

/// Pods and services of the run.
#[derive(Debug)]
struct Scene {
    client: Pod,
    server: Pod,
    /// On the node, in no mesh: pays for a miss.
    unmeshed: Pod,
    /// Two pods of a node without an agent: pay nothing.
    bare: Pod,
    bare_server: Pod,
    vips: Vec<SocketAddr>,
    world: World,
}

impl Scene {
    fn build() -> anyhow::Result<Self> {
        let world = World::named("bench-hook").nodes(&[NODE, BARE_NODE]).linked_by(Link::Bridged).start()?;
        let node = world.node(NODE)?;
        let pod = |name: &str| node.pod(&format!("{NAMESPACE}/{name}"));
        let (client, server, unmeshed) = (pod("client")?, pod("server")?, pod("unmeshed")?);
        let bare_node = world.node(BARE_NODE)?;
        let (bare, bare_server) = (bare_node.pod("bare")?, bare_node.pod("bare-server")?);
        let numbers = FIRST_SERVICE..FIRST_SERVICE + SERVICES;
        let vip = |number: u16| IpAddr::V4(World::service_ips(number).0);
        let services: Vec<Value> = numbers
            .clone()
            .map(|number| {
                ServiceManifest::new(NAMESPACE, &format!("s{number}"))
                    .cluster_ip(vip(number))
                    .port("tcp", PORT, PORT)
                    .udp_port("udp", PORT, PORT)
                    .selector("app", server.name())
                    .into()
            })
            .collect();
        world.manifests().apply(NamespaceManifest::meshed(NAMESPACE))?;
        world.manifests().apply(client.manifest())?;
        world.manifests().apply(server.manifest())?;
        world.manifests().apply_all("services.yaml", &services)?;
        let vips = numbers.map(|number| SocketAddr::new(vip(number), PORT)).collect();
        Ok(Self { client, server, unmeshed, bare, bare_server, vips, world })
    }

    /// Frontends' services in the agent's snapshot, once its tables hold them too; else 0.
    fn services(&self, agent: &MeshNode) -> usize {
        let status = agent.agent().ok().and_then(|agent| agent.meshctl(&["status"]).ok()).unwrap_or_default();
        let maps = status["maps"].as_array().map_or(&[][..], Vec::as_slice);
        let written =
            maps.iter().find(|map| map["name"] == "SERVICES").and_then(|map| map["entries"].as_u64());
        written.and_then(|entries| usize::try_from(entries / 2).ok()).unwrap_or(0)
    }

    fn pins(&self) -> anyhow::Result<PathBuf> {
        pins_of(self.world.node(NODE)?.full_name())
    }
}

/// The load processes of the run: they stay, so that only one thing differs between measurements.
#[derive(Debug)]
struct Sessions {
    /// To one service.
    one: Session,
    /// To all services in turn.
    all: Session,
    unmeshed: Session,
    bare: Session,
    bare_cgroup: PathBuf,
}

impl Sessions {
    fn start(scene: &Scene) -> anyhow::Result<Self> {
        let one = scene.vips.get(..1).context("no service")?;
        let direct = [scene.server.at4(PORT)];
        let mut sessions = Self {
            one: Session::start(&scene.client, &scene.server, one, true)?,
            all: Session::client_only(&scene.client, &scene.vips, true)?,
            unmeshed: Session::client_only(&scene.unmeshed, &direct, true)?,
            bare: Session::client_only(&scene.bare, &[scene.bare_server.at4(PORT)], true)?,
            bare_cgroup: scene.bare.cgroup().path().to_path_buf(),
        };
        // Fills the verdict cache.
        sessions.one.perform(&requests(100))?;
        Ok(sessions)
    }
}

fn requests(window_ms: u32) -> Task {
    Task::Requests { connections: 2, timing: Timing { warm_up_ms: 0, window_ms } }
}

/// Wall clock of UDP connects without, with an empty and with our program.
fn udp(sessions: &mut Sessions, count: u64, figures: &mut Figures) -> anyhow::Result<()> {
    let bare = connect_ns(&mut sessions.bare, count)?;
    let empty = {
        let _program = EmptyConnect::attach(&sessions.bare_cgroup)?;
        connect_ns(&mut sessions.bare, count)?
    };
    let miss = connect_ns(&mut sessions.unmeshed, count)?;
    let one = connect_ns(&mut sessions.one, count)?;
    let all = connect_ns(&mut sessions.all, count)?;
    for (metric, value) in [
        (Metric::UdpBare, bare),
        (Metric::UdpEmptyAdded, empty - bare),
        (Metric::UdpMissAdded, miss - bare),
        (Metric::UdpServiceAdded, one - bare),
        (Metric::UdpServicesAdded, all - bare),
    ] {
        figures.push("hook", metric, value);
    }
    Ok(())
}

fn connect_ns(session: &mut Session, count: u64) -> anyhow::Result<f64> {
    match session.perform(&Task::UdpConnects { count })? {
        Answer::UdpConnects { ns_per_connect } => Ok(ns_per_connect),
        other => bail!("not an answer to UDP connects: {other:?}"),
    }
}

/// The kernel's statistics of real TCP connections, Direct: to one service, then to all of them in turn.
fn tcp(sessions: &mut Sessions, scene: &Scene, figures: &mut Figures) -> anyhow::Result<()> {
    let one = connection_cost(&mut sessions.one, scene)?;
    let all = connection_cost(&mut sessions.all, scene)?;
    for (metric, value) in [
        (Metric::Connect, one.connect),
        (Metric::TcpEvents, one.of("tcp_events")),
        (Metric::Arrival, one.of("arrival")),
        (Metric::PeerName, one.of("getpeername4") + one.of("getpeername6")),
        (Metric::AllHooksPerConnection, one.per_connection.values().sum()),
        (Metric::ConnectAllServices, all.connect),
        (Metric::AllHooksAllServices, all.per_connection.values().sum()),
    ] {
        figures.push("hook", metric, value);
    }
    Ok(())
}

/// What connections cost in programs, less the price of the statistics.
#[derive(Debug)]
struct ConnectionCost {
    /// Nanoseconds of one run of connect4.
    connect: f64,
    /// Nanoseconds of all runs of each program for one connection, on both ends.
    per_connection: BTreeMap<String, f64>,
}

impl ConnectionCost {
    fn of(&self, program: &str) -> f64 {
        self.per_connection.get(program).copied().unwrap_or(0.0)
    }
}

fn connection_cost(session: &mut Session, scene: &Scene) -> anyhow::Result<ConnectionCost> {
    let pins = scene.pins()?;
    let _statistics = programs::statistics()?;
    let empty = EmptyConnect::attach(scene.client.cgroup().path())?;
    let (before, empty_before) = (programs::of_node(&pins)?, empty.runs()?);
    let Answer::Requests { total, failed: 0, .. } = session.perform(&requests(1500))? else {
        bail!("requests failed");
    };
    let nothing = mean(empty.runs()?.since(empty_before), "the empty program")?;
    let runs: BTreeMap<String, Runs> = programs::of_node(&pins)?
        .into_iter()
        .map(|(name, now)| {
            let since = now.since(before.get(&name).copied().unwrap_or_default());
            (name, since)
        })
        .collect();
    let connect = mean(runs.get("connect4").copied().unwrap_or_default(), "connect4")? - nothing;
    let net = |runs: Runs| runs.time.as_nanos() as f64 - nothing * runs.count as f64;
    let per_connection =
        runs.into_iter().map(|(name, runs)| (name, net(runs) / total.max(1) as f64)).collect();
    Ok(ConnectionCost { connect, per_connection })
}

fn mean(runs: Runs, what: &str) -> anyhow::Result<f64> {
    runs.mean_ns().with_context(|| format!("{what} did not run"))
}

/// Runs of any of our programs while bytes go over an established connection.
fn packets(sessions: &mut Sessions, scene: &Scene, figures: &mut Figures) -> anyhow::Result<()> {
    let pins = scene.pins()?;
    let _statistics = programs::statistics()?;
    sessions.one.perform(&Task::Open)?;
    let before = programs::of_node(&pins)?;
    for write_bytes in [64 * 1024, 1024] {
        sessions.one.perform(&Task::Push { bytes: PUSHED_BYTES, write_bytes })?;
    }
    let after = programs::of_node(&pins)?;
    sessions.one.perform(&Task::Close)?;
    ensure!(!after.is_empty(), "no program is pinned in {}", pins.display());
    let ran: u64 = after
        .iter()
        .map(|(name, runs)| runs.since(before.get(name).copied().unwrap_or_default()).count)
        .sum();
    figures.push("hook", Metric::RunsWhileStreaming, ran as f64);
    Ok(())
}

fn report(rows: &[Row]) {
    for row in rows.iter().filter(|row| row.met == Some(false)) {
        println!("missed: {} (wanted {})", row.metric, row.target.as_deref().unwrap_or("?"));
    }
}
