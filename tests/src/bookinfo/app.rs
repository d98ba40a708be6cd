//! The application in its world: pods, manifests, agents and processes.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{LISTENING, PORT, TrafficReport};
use crate::manifests::{NamespaceManifest, ServiceAccountManifest, ServiceManifest};
use crate::nameserver::NameServer;
use crate::{Agent, Controller, ControllerSeat, Place, Pod, World, artefacts, eventually, programs};
use anyhow::{Context as _, bail};

/// The namespace of the application.
pub const NAMESPACE: &str = "bookinfo";

/// The name of the server outside the mesh.
pub const OUTSIDE_HOST: &str = "httpbin.example.org";

/// How long the services may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(20);

/// `(node, pod, app, version, what to run)`.
type PodRow = (&'static str, &'static str, &'static str, &'static str, Run);

/// A dozen pods on two nodes.
const PODS: [PodRow; 12] = [
    ("a", "productpage-v1-a", "productpage", "v1", Run::Serve("productpage")),
    ("b", "productpage-v1-b", "productpage", "v1", Run::Serve("productpage")),
    ("a", "details-v1-a", "details", "v1", Run::Serve("details")),
    ("b", "details-v1-b", "details", "v1", Run::Serve("details")),
    ("a", "reviews-v1-a", "reviews", "v1", Run::Serve("reviews-v1")),
    ("b", "reviews-v1-b", "reviews", "v1", Run::Serve("reviews-v1")),
    ("a", "reviews-v2-a", "reviews", "v2", Run::Serve("reviews-v2")),
    ("b", "reviews-v3-b", "reviews", "v3", Run::Serve("reviews-v3")),
    ("a", "ratings-v1-a", "ratings", "v1", Run::Serve("ratings")),
    ("b", "ratings-v1-b", "ratings", "v1", Run::Serve("ratings")),
    ("a", "visitors-a", "visitors", "v1", Run::Visit),
    ("b", "visitors-b", "visitors", "v1", Run::Visit),
];

/// The same for tasks that are not about books.
const MORE_PODS: [PodRow; 2] = [
    ("a", "httpbin-v1-a", "httpbin", "v1", Run::Serve("httpbin-v1")),
    ("b", "httpbin-v2-b", "httpbin", "v2", Run::Serve("httpbin-v2")),
];

/// The services with their ports, in the order of their addresses.
const SERVICES: [(&str, u16); 5] =
    [("productpage", PORT), ("details", PORT), ("reviews", PORT), ("ratings", PORT), ("httpbin", 8000)];

/// What of the application is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AppOptions {
    /// Visits per second over all visitors; 0: nobody visits.
    pub visits: u32,
    /// With httpbin in two versions, and a third outside the mesh.
    pub httpbin: bool,
}

/// What a pod runs.
#[derive(Debug, Clone, Copy)]
enum Run {
    Serve(&'static str),
    Visit,
}

/// A process of a pod.
#[derive(Debug)]
struct Process {
    pod: String,
    child: Mutex<Child>,
    listening: Arc<AtomicBool>,
}

/// The running application.
#[derive(Debug)]
pub struct App<'w> {
    world: &'w World,
    pods: Vec<Pod>,
    /// Ends with the application.
    _controller: Controller,
    agents: Vec<(String, Agent)>,
    services: Vec<Process>,
    visitors: Vec<Process>,
    reports: Vec<Arc<Mutex<TrafficReport>>>,
    /// Where the server outside is, with who knows its name.
    outside: Option<(SocketAddr, NameServer)>,
}

impl<'w> App<'w> {
    /// Bring everything up, in an order in which no request can fail: pods, mesh, services, visitors.
    ///
    /// # Errors
    /// When a part of it cannot be made or is not ready in time.
    pub fn start(world: &'w World, options: AppOptions) -> anyhow::Result<Self> {
        let more = if options.httpbin { MORE_PODS.as_slice() } else { &[] };
        let rows: Vec<PodRow> = PODS.iter().chain(more).copied().collect();
        let pods = make_pods(world, &rows)?;
        apply_manifests(world, &pods, &rows)?;
        let seat = ControllerSeat::new(world).context("cannot make the controller's host")?;
        let controller = seat.start(&[]).context("the controller")?;
        let outside = if options.httpbin { Some(make_outside(world)?) } else { None };
        let agents = start_agents(world, &seat, outside.as_ref().map(|(_, names)| names.address()))?;
        let mut app = Self {
            world,
            pods: pods.clone(),
            _controller: controller,
            agents,
            services: Vec::new(),
            visitors: Vec::new(),
            reports: Vec::new(),
            outside: None,
        };
        if let Some((server, names)) = outside {
            let at = server.at4(80);
            app.services.push(start_service_at(&server, "httpbin-v1", Some(at))?);
            app.outside = Some((at, names));
        }
        for (pod, run) in pods.iter().zip(rows.iter().map(|row| row.4)) {
            if let Run::Serve(kind) = run {
                app.services.push(start_service(pod, kind)?);
            }
        }
        let silent = || -> Vec<&str> {
            let silent = app.services.iter().filter(|service| !service.listening.load(Ordering::Acquire));
            silent.map(|service| service.pod.as_str()).collect()
        };
        eventually(LISTEN_LIMIT, silent, Vec::is_empty).context("services that do not listen")?;
        if options.visits == 0 {
            return Ok(app);
        }
        let visitors: Vec<&Pod> = pods
            .iter()
            .zip(&rows)
            .filter(|(_, row)| matches!(row.4, Run::Visit))
            .map(|(pod, _)| pod)
            .collect();
        let each = (options.visits / u32::try_from(visitors.len())?.max(1)).max(1);
        for pod in visitors {
            let (process, report) = start_visitors(pod, each)?;
            app.visitors.push(process);
            app.reports.push(report);
        }
        Ok(app)
    }

    /// The world it runs in.
    #[must_use]
    pub fn world(&self) -> &'w World {
        self.world
    }

    /// A pod by its name.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn pod(&self, name: &str) -> anyhow::Result<&Pod> {
        let found = self.pods.iter().find(|pod| pod.name() == name);
        found.with_context(|| format!("the application has no pod {name}"))
    }

    /// Where a service is dialled.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn service(&self, name: &str) -> anyhow::Result<SocketAddr> {
        let found = (1..).zip(SERVICES).find(|(_, (service, _))| *service == name);
        let (number, (_, port)) = found.with_context(|| format!("the application has no service {name}"))?;
        Ok((World::service_ips(number).0, port).into())
    }

    /// Where the server outside the mesh is dialled.
    ///
    /// # Errors
    /// When there is none.
    pub fn outside(&self) -> anyhow::Result<SocketAddr> {
        let (at, _) = self.outside.as_ref().context("the application has no server outside")?;
        Ok(*at)
    }

    /// The agents with their nodes' names.
    #[must_use]
    pub fn agents(&self) -> &[(String, Agent)] {
        &self.agents
    }

    /// What all visitors have seen together; latencies are those of the slower group.
    #[must_use]
    pub fn traffic(&self) -> TrafficReport {
        let mut total = TrafficReport::default();
        for report in &self.reports {
            total.add(&lock(report));
        }
        total
    }

    /// Fail when an agent or a process of the application has ended.
    ///
    /// # Errors
    /// What has ended.
    pub fn check_processes(&self) -> anyhow::Result<()> {
        for (node, agent) in &self.agents {
            if !agent.is_running() {
                self.save_logs();
                bail!("the agent of node {node} has ended; its log:\n{}", agent.log_text());
            }
        }
        for process in self.services.iter().chain(&self.visitors) {
            if let Some(status) = lock(&process.child).try_wait().context("cannot wait for a process")? {
                self.save_logs();
                bail!("{} has ended: {status}", process.pod);
            }
        }
        Ok(())
    }

    /// Stop the visitors: what they had under way when they stop is not judged.
    ///
    /// # Errors
    /// When one cannot be stopped.
    pub fn end_visits(&self, settle: Duration) -> anyhow::Result<()> {
        for visitors in &self.visitors {
            lock(&visitors.child).kill().with_context(|| format!("cannot stop {}", visitors.pod))?;
        }
        // The last connections close; then the agents' edges hold all of them.
        let open = || self.agents.iter().map(|(_, agent)| open_connections(agent)).sum::<u64>();
        if let Err(error) = eventually(settle, open, |open| *open == 0) {
            drop(writeln!(io::stderr(), "connections are still open: {error}"));
        }
        Ok(())
    }

    /// Keep the logs, which would vanish with the world.
    pub fn save_logs(&self) {
        let target = artefacts::directory().join("demo-logs");
        match artefacts::copy_tree(&self.world.logs(), &target) {
            Ok(()) => drop(writeln!(io::stderr(), "logs: {}", target.display())),
            Err(error) => drop(writeln!(io::stderr(), "cannot save logs in {}: {error}", target.display())),
        }
    }
}

fn open_connections(agent: &Agent) -> u64 {
    let connections = agent.meshctl(&["connections"]).unwrap_or_default();
    connections["connections"].as_array().map_or(0, |rows| rows.len() as u64)
}

fn make_pods(world: &World, rows: &[PodRow]) -> anyhow::Result<Vec<Pod>> {
    rows.iter()
        .map(|(node, name, ..)| {
            let pod = world.node(node).and_then(|node| node.pod(&format!("{NAMESPACE}/{name}")));
            pod.with_context(|| format!("cannot make pod {name}"))
        })
        .collect()
}

fn apply_manifests(world: &World, pods: &[Pod], rows: &[PodRow]) -> anyhow::Result<()> {
    let manifests = world.manifests();
    manifests.apply(NamespaceManifest::meshed(NAMESPACE))?;
    for (number, (service, port)) in (1..).zip(SERVICES) {
        if !rows.iter().any(|row| row.2 == service) {
            continue;
        }
        let (ip4, ip6) = World::service_ips(number);
        manifests.apply(
            ServiceManifest::new(NAMESPACE, service)
                .label("app", service)
                .cluster_ip(ip4)
                .cluster_ip(ip6)
                .port("http", port, PORT)
                .selector("app", service),
        )?;
    }
    for (pod, (_, _, app, version, _)) in pods.iter().zip(rows) {
        let account = format!("{NAMESPACE}-{app}");
        manifests.apply(ServiceAccountManifest::new(NAMESPACE, &account))?;
        let manifest = pod.manifest().label("app", app).label("version", version).service_account(&account);
        manifests.apply(manifest.port("http", PORT))?;
    }
    Ok(())
}

/// A place outside the mesh for a server, and a name server that knows it.
fn make_outside(world: &World) -> anyhow::Result<(Place, NameServer)> {
    let server = world.outsider("outside")?;
    let name = format!("{OUTSIDE_HOST}.");
    let records = [(name.as_str(), vec![server.ip4().into()])];
    let names = NameServer::start(&world.outsider("names")?, &records).context("the name server")?;
    Ok((server, names))
}

fn start_agents(
    world: &World,
    controller: &ControllerSeat,
    names: Option<SocketAddr>,
) -> anyhow::Result<Vec<(String, Agent)>> {
    let names = names.map(|names| format!("--dns-upstream={names}"));
    let args: Vec<&str> = names.iter().map(String::as_str).collect();
    world
        .nodes()
        .map(|node| {
            let what = || format!("the agent of node {}", node.name());
            let agent = node
                .agent()
                .controller(controller)
                .args(&args)
                .apart_from_the_terminal()
                .start()
                .with_context(what)?;
            agent.wait_enrolled(&node.pods()).with_context(what)?;
            Ok((node.name().to_owned(), agent))
        })
        .collect()
}

fn start_service(pod: &Pod, kind: &str) -> anyhow::Result<Process> {
    start_service_at(pod, kind, None)
}

fn start_service_at(pod: &Place, kind: &str, listen: Option<SocketAddr>) -> anyhow::Result<Process> {
    let listening = Arc::new(AtomicBool::new(false));
    let heard = Arc::clone(&listening);
    let listen = listen.map(|listen| format!("--listen={listen}"));
    let mut args = vec!["serve", kind, "--pod", pod.name()];
    args.extend(listen.as_deref());
    let child = start(pod, &args, move |line| heard.store(line == LISTENING, Ordering::Release))?;
    Ok(Process { pod: pod.name().to_owned(), child: Mutex::new(child), listening })
}

fn start_visitors(pod: &Pod, per_second: u32) -> anyhow::Result<(Process, Arc<Mutex<TrafficReport>>)> {
    let report = Arc::new(Mutex::new(TrafficReport::default()));
    let newest = Arc::clone(&report);
    let child =
        start(
            pod,
            &["visit", "--per-second", &per_second.to_string()],
            move |line| match serde_json::from_str(line) {
                Ok(report) => *lock(&newest) = report,
                Err(error) => eprintln!("unreadable report {line:?}: {error}"),
            },
        )?;
    let process = Process {
        pod: pod.name().to_owned(),
        child: Mutex::new(child),
        listening: Arc::new(AtomicBool::new(true)),
    };
    Ok((process, report))
}

fn start(pod: &Place, args: &[&str], heard: impl Fn(&str) + Send + 'static) -> anyhow::Result<Child> {
    let mut command = Command::new(programs::bookinfo()?);
    // A process group of its own: Ctrl-C is for the driver, which ends everything in order.
    command.args(args).process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(pod.log_file()?);
    let mut child = pod.spawn(command)?;
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            BufReader::new(stdout).lines().map_while(Result::ok).for_each(|line| heard(&line))
        });
    }
    Ok(child)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
