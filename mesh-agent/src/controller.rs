//! Owns the composition of a controller: a directory of manifests, the certificate authority, the server that agents come
//! to, and what operators ask.
//!
//! Invariants:
//! - It is ready when agents can come and get a whole state; losing it changes nothing for running traffic.
//! - Secrets are written for their owner alone.

mod kubernetes;
mod ops;

use std::{future::Future, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use anyhow::Context as _;
use mesh_control::{
    compile::MeshSettings,
    link::{
        files::{RunFolder, join_secret, pem},
        token::JoinSecret,
    },
    publish::{
        auth::NodeProof,
        metrics::PublishMetrics,
        server::{Controller, ServerParts},
    },
    source::{file::FileSource, pulse::Pulse},
};
use mesh_identity::{Ca, NodeIdentity, TrustMaterial, ca::CaOptions, clock::SystemClock};
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use self::ops::Ops;
use crate::{
    cli::{ControllerArgs, ControllerCommand, TrustArgs},
    node::{http, logging},
    report::report,
};

/// Threads of the server at most: what it does for each agent is little.
const WORKERS_MAX: usize = 4;
/// Work under way at the end is given this long.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(2);

/// Runs a controller until it is told to stop, or does what else `controller` is asked to.
///
/// # Errors
/// It could not start, or a part of it ended by itself.
pub fn run(args: &ControllerArgs) -> anyhow::Result<()> {
    match &args.command {
        Some(ControllerCommand::Token { node, state_dir }) => print_token(node, state_dir),
        Some(ControllerCommand::Root { trust }) => print_roots(trust),
        None if args.kubernetes => kubernetes::serve(args),
        None => serve(args),
    }
}

fn print_token(node: &str, state_dir: &Path) -> anyhow::Result<()> {
    NodeIdentity::new("cluster.local", node).with_context(|| format!("{node:?} is no name of a node"))?;
    println!("{}", secret_of(state_dir)?.token(node));
    Ok(())
}

fn print_roots(trust: &TrustArgs) -> anyhow::Result<()> {
    let ca = authority(trust)?;
    let material = ca.trust().borrow().clone();
    print!("{}", material.roots.iter().map(|root| pem(root)).collect::<String>());
    Ok(())
}

fn secret_of(state_dir: &Path) -> anyhow::Result<JoinSecret> {
    join_secret(&state_dir.join("controller")).context("open the join secret; see --state-dir")
}

fn authority(trust: &TrustArgs) -> anyhow::Result<Ca> {
    let options = CaOptions::new(&trust.ca_dir, trust.trust_domain.as_str());
    Ca::open(CaOptions { algorithm: trust.key_algorithm, ..options }).with_context(|| {
        format!("open the certificate authority in {}; see --ca-dir", trust.ca_dir.display())
    })
}

fn serve(args: &ControllerArgs) -> anyhow::Result<()> {
    logging::install(&args.log, args.log_format)?;
    let config = args.config.as_ref().context("--config is not given")?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), config = %config.display(), "starting");
    let mesh = MeshSettings {
        cluster_domain: args.cluster_domain.clone(),
        root_namespace: args.trust.root_namespace().to_owned(),
        trust_domain: args.trust.trust_domain.clone(),
        read_secrets: true,
        agent_nodes: args.agent_nodes.clone(),
    };
    let pulse = Pulse::default();
    let (snapshots, sources) = FileSource::start_with_pulse(config, mesh, pulse.clone())?;
    let ca = Arc::new(authority(&args.trust)?);
    // The mesh configuration may name another trust domain than the flag.
    ca.set_trust_domain(Arc::clone(&snapshots.borrow().mesh().trust_domain));
    let secret = secret_of(&args.state_dir)?;
    let mut registry = Registry::default();
    let metrics = PublishMetrics::register(&mut registry);
    let runtime = event_loop()?;
    let ended = runtime.block_on(async {
        let listener = listen(args.listen, "agents", "--listen").await?;
        let ops_listener = listen(args.metrics, "metrics", "--metrics").await?;
        let parts = ServerParts {
            listener,
            ca: Arc::clone(&ca),
            proof: NodeProof::JoinSecret(Box::new(secret)),
            namespace: args.trust.root_namespace().to_owned(),
            cluster_domain: args.cluster_domain.clone(),
            own_ttl: args.own_certificate_ttl,
            session_age: None,
            snapshots,
            sources,
            clock: Arc::new(SystemClock),
            metrics,
        };
        let controller = Controller::new(parts).context("start the server")?;
        let run_folder = RunFolder::new(&args.run_dir, controller.addr().port());
        if let NodeProof::JoinSecret(secret) = controller.proof() {
            run_folder
                .write(secret, controller.identity())
                .context("leave what agents of this host need; see --run-dir")?;
        }
        run_folder.write_roots(&ca.trust().borrow().roots).context("leave the roots for agents of this host")?;
        let ops = Arc::new(Ops::new(registry, pulse));
        ops.serve(controller.publication(), ca.trust());
        let told = stop_signal()?;
        let stop = async {
            told.await;
            ops.drain();
            tracing::info!("stopping");
        };
        tracing::info!(listen = %controller.addr(), identity = %controller.identity(), metrics = %args.metrics, "ready");
        say_ready();
        // Two parts that never end by themselves; they are dropped with the server.
        let background = async {
            tokio::join!(
                Arc::clone(&ca).run(),
                http::serve(ops_listener, Arc::clone(&ops)),
                keep_roots(&run_folder, ca.trust())
            );
        };
        Box::pin(until_stopped(controller.run(stop), background)).await
    });
    runtime.shutdown_timeout(SHUTDOWN_WAIT);
    if ended.is_ok() {
        tracing::info!("stopped");
    }
    ended
}

fn event_loop() -> anyhow::Result<tokio::runtime::Runtime> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cpus.min(WORKERS_MAX))
        .enable_all()
        .build()
        .context("start the event loop")
}

/// Waits until the process is told to stop.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        signal(SignalKind::interrupt()).context("listen for SIGINT")?,
    );
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Listens at an address that a flag names.
async fn listen(addr: SocketAddr, who: &str, flag: &str) -> anyhow::Result<TcpListener> {
    let hint = || format!("listen for {who} at {addr}; name another address with {flag}");
    TcpListener::bind(addr).await.with_context(hint)
}

async fn until_stopped(
    server: impl Future<Output = Result<(), mesh_control::publish::server::ServeError>>,
    background: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    tokio::select! {
        ended = server => ended.context("the server failed"),
        () = background => Ok(()),
    }
}

/// Leaves each new set of roots for agents of this host, for ever.
async fn keep_roots(folder: &RunFolder, mut trust: watch::Receiver<Arc<TrustMaterial>>) {
    while trust.changed().await.is_ok() {
        let material = Arc::clone(&trust.borrow_and_update());
        // A few kilobytes, once in months.
        if let Err(error) = folder.write_roots(&material.roots) {
            tracing::error!(error = %report(&error), "leave the new roots for agents of this host");
        }
    }
    std::future::pending().await
}

/// The line that scripts wait for. A closed standard output is nobody's error.
fn say_ready() {
    use std::io::Write as _;
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = writeln!(stdout, "ready").and_then(|()| stdout.flush()) {
        tracing::debug!(%error, "say ready on standard output");
    }
}
