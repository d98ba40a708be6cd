//! Owns the composition of a node agent: its parts, the order they start in, and the threads they run on.
//!
//! Threads: one for control (this one), `--workers` for traffic (`mesh-proxy`), one for the configuration
//! (`mesh-control`), and a few short-lived ones for kernel work.
//!
//! Invariants:
//! - Nothing is changed in the kernel before the node's lock is held and the configuration was read once.
//! - A failed start leaves what an earlier agent pinned as it was.

mod admin;
mod beat;
mod bridge;
mod cni;
mod control;
mod direct;
mod edges;
mod events;
mod explain;
mod failures;
#[cfg(test)]
mod fixtures;
mod forget;
mod handover;
mod hearing;
pub(crate) mod http;
mod identities;
mod kubernetes;
mod local;
mod lock;
pub(crate) mod logging;
mod membership;
mod metrics;
mod names;
mod namespaces;
mod ops;
mod plugin;
mod pods;
mod profile;
mod proxy_config;
mod purge;
mod readiness;
mod reconcile;
mod resolve;
mod revoke;
mod shared;
mod socket;
mod source;
mod started;
mod status;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use mesh_control::compile::MeshSettings;
use mesh_proxy::{Dependencies, Proxy, Settings};
use mesh_redirect::{Heartbeat, InheritedSockets, Node, NodeOptions, RunningPods, Stats, host};
use nix::sys::signal::{SigSet, Signal};
use prometheus_client::registry::Registry;

pub use self::started::started;
use self::{
    admin::Admin,
    beat::Beat,
    bridge::Bridge,
    control::{Control, Serving},
    direct::Direct,
    handover::TakenOver,
    identities::{Identities, Wish},
    local::{LocalKnowledge, Locator},
    lock::{LockError, NodeLock, Predecessor},
    membership::Membership,
    metrics::AgentMetrics,
    ops::Ops,
    reconcile::Reconciler,
    resolve::Resolver,
    shared::{Parts, Shared},
    source::Source,
};
use crate::{
    cli::{CleanupArgs, NodeArgs, NodeIdentity},
    cni::{install::Installer, known},
    report::report,
};

/// How long a new agent waits for one that is on its way out.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(5);
/// How long an agent that takes a node over waits for the controller before it goes by what was saved.
const CONTROLLER_WITHIN: Duration = Duration::from_secs(10);
/// How often it looks.
const CONTROLLER_EACH: Duration = Duration::from_millis(20);
/// Threads for kernel work and answers at most; each is gone after ten idle seconds.
const BLOCKING_THREADS_MAX: usize = 8;
/// Kernel work under way at the end is given this long.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(2);

/// Folder of the state folder on which the cgroup2 tree is mounted for an agent that sees none.
const CGROUP2: &str = "cgroup2";

/// Runs a node agent until it is told to stop.
///
/// # Errors
/// It could not start, or a part of it ended by itself.
pub fn run(args: &NodeArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    logging::install(&args.log, args.log_format)?;
    raise_descriptor_limit();
    let prepared = if args.kubernetes { Some(kubernetes::prepare(args)?) } else { None };
    let args = prepared.as_ref().unwrap_or(args);
    host::cgroup2_file_system(&args.identity.state_dir.join(CGROUP2))?;
    let node = node_name(&args.identity)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), %node, source = %args.source, "starting");
    let mesh = MeshSettings {
        cluster_domain: args.cluster_domain.clone(),
        root_namespace: args.trust.root_namespace().to_owned(),
        trust_domain: args.trust.trust_domain.clone(),
        read_secrets: true,
        ..MeshSettings::default()
    };
    // In a cluster a roll-out starts the next agent before it ends this one: no node is without longer than it takes to take over.
    let takes_over = args.kubernetes || args.take_over;
    let relieved = takes_over.then(|| source::start(args, &node, mesh.clone())).transpose()?;
    let (lock, before) = seat(args, &node, takes_over, relieved.as_ref())?;
    let without_sockets = matches!(before, Before::Relieved);
    let mut taken_over = match before {
        Before::HandedOver(taken_over) => Some(taken_over),
        Before::Nobody | Before::Relieved => None,
    };
    let (local, running) = local_knowledge(args)?;
    let Source { snapshots, sources, link } = match relieved {
        Some(source) => source,
        None => source::start(args, &node, mesh)?,
    };
    let (locator, snapshots) = Locator::new(&node, snapshots, local.facts());
    let (resolver, snapshots, resolved) = Resolver::new(snapshots, args.dns_upstream.clone());
    let wish = Wish { algorithm: args.trust.key_algorithm, ttl: args.certificate_ttl };
    let (identities, certificates) = match &link {
        Some(link) => {
            let (issuer, url) = (Arc::clone(&link.issuer) as _, args.source.to_string());
            Identities::remote(&node, issuer, url, wish, &snapshots)
        }
        None => Identities::local(&node, &args.trust.ca_dir, wish, &snapshots)?,
    };
    let kernel = Arc::new(Node::open(node_options(&node, args))?);
    if let Some(taken_over) = &mut taken_over {
        let InheritedSockets { pods, sockets, refused } = kernel.inherit(taken_over.take_sockets());
        tracing::info!(pods, sockets, refused, "listening sockets of the agent before this one");
    }
    let beat = Arc::new(Beat::new(Heartbeat::new(kernel.maps())));
    let direct = args.direct && can_revoke_direct();
    let bridge = Arc::new(Bridge::new(kernel.maps(), args.dns_upstream.clone(), direct));
    let mut registry = Registry::default();
    let metrics = Arc::new(mesh_proxy::Metrics::register(&mut registry));
    let direct = Direct::new(&Stats::new(kernel.maps()).edges()?);
    let settings = proxy_settings(&node, args);
    let workers = settings.workers.get();
    let proxy = Arc::new(Proxy::start(
        settings,
        Dependencies {
            sockets: Arc::clone(&bridge) as _,
            kernel: Arc::clone(&bridge) as _,
            snapshots: snapshots.clone(),
            metrics: Arc::clone(&metrics),
            certificates: Arc::clone(identities.certificates()),
            alive: {
                let beat = Arc::clone(&beat);
                Box::new(move |oldest_ns| beat.alive(oldest_ns))
            },
        },
    )?);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build()
        .context("start the control thread's event loop")?;
    let membership = Membership::new(&kernel, &bridge, &proxy, runtime.handle());
    let reconciler = Reconciler::new(&node, &kernel, membership, &local)
        .context("read the tables an earlier agent left")?;
    let logger = args.kernel_log.then(|| kernel.take_logger()).flatten();
    let shared = Arc::new(Shared::new(Parts {
        node,
        workers,
        started,
        kernel,
        proxy,
        bridge,
        identities,
        snapshots,
        sources,
        link: link.map(|link| link.link),
        resolved,
        beat,
        metrics,
        direct,
    }));
    if without_sockets {
        shared.hand_overs.count_taken(false);
    }
    registry.register_collector(Box::new(AgentMetrics::new(&shared)));
    let control = Control {
        servers: Servers {
            shared: Arc::clone(&shared),
            registry: Arc::new(Mutex::new(registry)),
            args: args.clone(),
            local,
            running: Mutex::new(running),
        },
        shared,
        reconciler,
        logger,
        lock,
        state_dir: args.identity.state_dir.clone(),
        taken_over,
        drain: args.drain,
        stays: args.kubernetes,
    };
    runtime.spawn(certificates.run());
    runtime.spawn(resolver.run());
    runtime.spawn(locator.run());
    let ended = runtime.block_on(control.run());
    runtime.shutdown_timeout(SHUTDOWN_WAIT);
    if let Some(installer) = Installer::of_agent(&args.pods, &args.identity.state_dir) {
        plugin::leave(&installer, &args.identity.state_dir);
    }
    ended
}

/// The agent that served the node before this one.
enum Before {
    /// There was none.
    Nobody,
    /// It gives its listening sockets, and accepts until this one does.
    HandedOver(TakenOver),
    /// It was told to end.
    Relieved,
}

/// Gets the right to serve the node: free, or from the agent that serves it. With that one's listening sockets, if it gives them.
fn seat(
    args: &NodeArgs,
    node: &str,
    takes_over: bool,
    source: Option<&Source>,
) -> Result<(NodeLock, Before), LockError> {
    let state_dir = &args.identity.state_dir;
    if !takes_over {
        let lock = NodeLock::acquire(state_dir, node, PREDECESSOR_WAIT, Predecessor::Wait)?;
        return Ok((lock, Before::Nobody));
    }
    match NodeLock::acquire(state_dir, node, Duration::ZERO, Predecessor::Wait) {
        Err(LockError::Held { .. }) => {}
        free => return Ok((free?, Before::Nobody)),
    }
    if let Some(link) = source.and_then(|source| source.link.as_ref()) {
        // The agent that serves the node knows more than what was saved.
        let give_up = Instant::now() + CONTROLLER_WITHIN;
        while link.link.borrow().generation.is_none() && Instant::now() < give_up {
            std::thread::sleep(CONTROLLER_EACH);
        }
    }
    match TakenOver::ask(state_dir, node) {
        Ok(taken_over) => {
            let lock = NodeLock::acquire(state_dir, node, PREDECESSOR_WAIT, Predecessor::Wait)?;
            Ok((lock, Before::HandedOver(taken_over)))
        }
        Err(error) => {
            tracing::warn!(error = %report(&error), "taking the node over without the listening sockets");
            let lock = NodeLock::acquire(state_dir, node, PREDECESSOR_WAIT, Predecessor::Relieve)?;
            Ok((lock, Before::Relieved))
        }
    }
}

/// The servers for operators and for the container runtime.
#[derive(Debug)]
struct Servers {
    shared: Arc<Shared>,
    registry: Arc<Mutex<Registry>>,
    args: NodeArgs,
    local: Arc<LocalKnowledge>,
    /// As it was found before the node was changed.
    running: Mutex<Option<RunningPods>>,
}

impl Servers {
    /// Opens them; again, when another agent had their addresses for a while.
    async fn open(&self) -> anyhow::Result<Serving> {
        let Self { shared, registry, args, local, running } = self;
        let running = running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (admin_listener, socket_file) = socket::bind(&args.admin_socket, PREDECESSOR_WAIT)
            .await
            .context("open the admin socket; --admin-socket names another place")?;
        let ops_listener = ops::listen(args.metrics, PREDECESSOR_WAIT).await?;
        tracing::info!(admin = %args.admin_socket.display(), metrics = %args.metrics, "answering operators");
        let admin = Arc::new(Admin::new(shared));
        let ops = Arc::new(Ops::new(shared, registry));
        let pods = local_pods(shared, args, local, running).await?;
        Ok(Box::pin(async move {
            let _socket_file = socket_file;
            tokio::join!(http::serve(admin_listener, admin), http::serve(ops_listener, ops), pods);
        }))
    }
}

/// What an earlier agent knew of the node's pods, and what their processes show. Where pods are found by their manifests
/// alone, nobody looks.
fn local_knowledge(args: &NodeArgs) -> anyhow::Result<(Arc<LocalKnowledge>, Option<RunningPods>)> {
    let local = Arc::new(LocalKnowledge::load(args.identity.state_dir.join(local::FILE)));
    if args.pods.cni_socket.is_none() {
        return Ok((local, None));
    }
    let mut running = RunningPods::new(args.identity.cgroup_root.as_deref())?;
    local.set_running(running.scan());
    Ok((local, Some(running)))
}

/// Everything that finds local pods; never ends by itself.
async fn local_pods(
    shared: &Arc<Shared>,
    args: &NodeArgs,
    local: &Arc<LocalKnowledge>,
    running: Option<RunningPods>,
) -> anyhow::Result<Serving> {
    let Some(socket) = &args.pods.cni_socket else {
        return Ok(Box::pin(std::future::pending()));
    };
    let running = match running {
        Some(running) => running,
        None => RunningPods::new(args.identity.cgroup_root.as_deref())?,
    };
    let (listener, socket_file) = socket::bind(socket, PREDECESSOR_WAIT)
        .await
        .context("open the CNI socket; --cni-socket names another place")?;
    let known_file = args.identity.state_dir.join(known::FILE);
    let installer = Installer::of_agent(&args.pods, &args.identity.state_dir);
    if installer.is_some() {
        shared.readiness.hold(plugin::HOLD, Some("it is being put in place".to_owned()));
    }
    let (shared, local) = (Arc::clone(shared), Arc::clone(local));
    // Said once and for all, if at all.
    let find_kubelet = args.kubernetes && args.prober_cgroup.is_none();
    let watch_pods = args.kubernetes;
    let unenrolled = args.pods.cni_unenrolled;
    Ok(Box::pin(async move {
        let _socket_file = socket_file;
        tokio::join!(
            async {
                if watch_pods {
                    kubernetes::follow_pods(&shared.node, &local).await;
                }
            },
            async {
                if find_kubelet {
                    kubernetes::follow_kubelet(Arc::clone(&shared)).await;
                }
            },
            cni::serve(listener, Arc::clone(&shared), Arc::clone(&local), unenrolled),
            cni::leave_known(Arc::clone(&shared), Arc::clone(&local), known_file),
            local::follow_missing(Arc::clone(&shared), Arc::clone(&local)),
            local::follow_running(Arc::clone(&local), running),
            async {
                match installer {
                    Some(installer) => plugin::keep(installer, Arc::clone(&shared)).await,
                    None => std::future::pending().await,
                }
            },
        );
    }))
}

/// Detaches and unpins everything of a node; if asked to, empties the state folder.
///
/// # Errors
/// An agent of the node is running, the lock cannot be had, or the state folder is not to be emptied.
pub fn cleanup(args: &CleanupArgs) -> anyhow::Result<()> {
    let (node, state_dir) = (node_name(&args.identity)?, &args.identity.state_dir);
    let lock = NodeLock::acquire(state_dir, &node, Duration::ZERO, Predecessor::Wait)?;
    let found = mesh_redirect::cleanup(&args.identity.bpffs, &node);
    host::leave_cgroup2(&state_dir.join(CGROUP2))?;
    println!("{}", if found { "cleaned up" } else { "nothing to clean up" });
    if args.purge {
        for left in purge::purge(state_dir, &lock)? {
            println!("left alone: {}", left.display());
        }
    }
    Ok(())
}

/// Does nothing until told to end.
///
/// # Errors
/// Signals cannot be waited for.
pub fn pause() -> anyhow::Result<()> {
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGTERM);
    ends.add(Signal::SIGINT);
    ends.thread_block().context("hold signals back")?;
    ends.wait().context("wait for a signal")?;
    Ok(())
}

fn node_name(identity: &NodeIdentity) -> anyhow::Result<String> {
    if let Some(node) = &identity.node {
        anyhow::ensure!(!node.is_empty(), "--node is empty");
        return Ok(node.clone());
    }
    let host = nix::unistd::gethostname().context("read the host name; name the node with --node")?;
    host.into_string().map_err(|_| anyhow::anyhow!("the host name is not UTF-8; name the node with --node"))
}

/// Without a way to close Direct connections a policy could not reach established ones, so there must be none.
fn can_revoke_direct() -> bool {
    let can = mesh_redirect::can_close_connections();
    if let Err(error) = &can {
        tracing::error!(
            %error,
            "the kernel does not let the agent close connections (module tcp_diag, CONFIG_INET_DIAG_DESTROY); all traffic goes through the proxy"
        );
    }
    can.is_ok()
}

fn node_options(node: &str, args: &NodeArgs) -> NodeOptions {
    NodeOptions {
        cgroup_root: args.identity.cgroup_root.clone(),
        bpffs: args.identity.bpffs.clone(),
        prober_cgroup: args.prober_cgroup.clone(),
        // There it is looked for.
        keeps_prober: args.kubernetes,
        kernel_log: args.kernel_log,
        ..NodeOptions::new(node)
    }
}

fn proxy_settings(node: &str, args: &NodeArgs) -> Settings {
    let mut settings = Settings::new(node);
    if let Some(workers) = args.workers {
        settings.workers = workers;
    }
    settings.connect_timeout = args.connect_timeout;
    settings.attempt_timeout = settings.attempt_timeout.min(args.connect_timeout);
    settings.idle_timeout = args.idle_timeout;
    settings.splice = args.splice;
    settings.tls_files.clone_from(&args.tls_files);
    settings.dns.upstream.clone_from(&args.dns_upstream);
    settings
}

/// Each proxied connection needs two descriptors, each pod seven; the soft limit is often 1024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "raise the limit of open files to its maximum");
    }
}
