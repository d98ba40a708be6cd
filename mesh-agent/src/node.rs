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
mod readiness;
mod reconcile;
mod resolve;
mod revoke;
mod shared;
mod socket;
mod source;
mod status;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use mesh_control::compile::MeshSettings;
use mesh_proxy::{Dependencies, Proxy, Settings};
use mesh_redirect::{Events, Heartbeat, Node, NodeOptions, RunningPods, Stats};
use prometheus_client::registry::Registry;

use self::{
    admin::Admin,
    beat::Beat,
    bridge::Bridge,
    control::{Control, Serving},
    direct::Direct,
    identities::{Identities, Wish},
    local::{LocalKnowledge, Locator},
    lock::{NodeLock, Predecessor},
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
};

/// How long a new agent waits for one that is on its way out.
const PREDECESSOR_WAIT: Duration = Duration::from_secs(5);
/// Threads for kernel work and answers at most; each is gone after ten idle seconds.
const BLOCKING_THREADS_MAX: usize = 8;
/// Kernel work under way at the end is given this long.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(2);

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
    let node = node_name(&args.identity)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), %node, source = %args.source, "starting");
    let mesh = MeshSettings {
        cluster_domain: args.cluster_domain.clone(),
        root_namespace: args.trust.root_namespace().to_owned(),
        trust_domain: args.trust.trust_domain.clone(),
    };
    // In a cluster a roll-out starts the next agent before it ends this one: no node is without longer than it takes to take over.
    let relieved = args.kubernetes.then(|| source::start(args, &node, mesh.clone())).transpose()?;
    let predecessor = if relieved.is_some() { Predecessor::Relieve } else { Predecessor::Wait };
    let lock = NodeLock::acquire(&args.identity.state_dir, &node, PREDECESSOR_WAIT, predecessor)?;
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
    let events = Events::open(kernel.maps())?;
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
    registry.register_collector(Box::new(AgentMetrics::new(&shared)));
    let control =
        Control { shared: Arc::clone(&shared), reconciler, events, logger, lock, drain: args.drain };
    runtime.spawn(certificates.run());
    runtime.spawn(resolver.run());
    runtime.spawn(locator.run());
    let ended = runtime.block_on(async {
        let serving = serving(&shared, registry, args, &local, running).await?;
        control.run(serving).await
    });
    runtime.shutdown_timeout(SHUTDOWN_WAIT);
    if let Some(installer) = Installer::of_agent(&args.pods, &args.identity.state_dir) {
        plugin::leave(&installer, &args.identity.state_dir);
    }
    ended
}

/// Opens the servers for operators and for the container runtime.
async fn serving(
    shared: &Arc<Shared>,
    registry: Registry,
    args: &NodeArgs,
    local: &Arc<LocalKnowledge>,
    running: Option<RunningPods>,
) -> anyhow::Result<Serving> {
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
    let (Some(socket), Some(running)) = (&args.pods.cni_socket, running) else {
        return Ok(Box::pin(std::future::pending()));
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
            cni::serve(listener, Arc::clone(&shared), Arc::clone(&local)),
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

/// Detaches and unpins everything of a node.
///
/// # Errors
/// An agent of the node is running, or the lock cannot be had.
pub fn cleanup(args: &CleanupArgs) -> anyhow::Result<()> {
    let node = node_name(&args.identity)?;
    let _lock = NodeLock::acquire(&args.identity.state_dir, &node, Duration::ZERO, Predecessor::Wait)?;
    let found = mesh_redirect::cleanup(&args.identity.bpffs, &node);
    println!("{}", if found { "cleaned up" } else { "nothing to clean up" });
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
