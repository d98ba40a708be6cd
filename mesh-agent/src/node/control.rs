//! Owns the control thread of a running agent: watching, reconciling, sweeping, signals, and the order of its end.
//!
//! Invariants:
//! - Nothing here blocks: kernel work runs on the blocking pool, one pass at a time.
//! - An agent that was told by a signal to hand over, or that serves a cluster, stays until it is told to stop: whoever runs it would
//!   start it again otherwise, against its successor.
//! - The end comes in this order: no new connections, established ones get their grace, the heartbeat goes last.
//!   Pins and links stay. With a successor that has the listening sockets, new connections and heartbeat are its from one moment to the
//!   next.
//! - An agent whose successor ends before it serves takes the node back.

mod succession;

use std::{future::Future, path::PathBuf, pin::Pin, sync::Arc, time::Duration};

use anyhow::Context as _;
use mesh_proxy::Queued;
use mesh_redirect::{Events, Logger, monotonic_ns};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::Mutex,
    task::spawn_blocking,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};

use self::succession::{Aftermath, Outlook, certificates, hand_over, say_served};
use super::{
    Servers, events, forget,
    handover::{Door, Successor, TakenOver},
    lock::{HAND_OVER, NodeLock},
    reconcile::{Outcome, Reconciler, Wanted},
    revoke,
    shared::Shared,
};
use crate::report::report;

/// How often expired tickets and void verdicts are cleared away.
const SWEEP_EACH: Duration = Duration::from_secs(5);
/// Pause after a pass that could not read the kernel.
const PASS_PAUSE: Duration = Duration::from_secs(1);
/// How long handshakes take that began before the kernel was told; they stay on this machine.
const HANDSHAKES: Duration = Duration::from_millis(50);
/// How soon a draining agent notices that its successor took the lock.
const SUCCESSOR_EACH: Duration = Duration::from_millis(100);
/// A successor that told this agent to hand over has taken the lock within this time; it tries every 50 ms.
const SUCCESSOR_WITHIN: Duration = Duration::from_secs(10);

/// How often the programs' log is read.
const KERNEL_LOG_EACH: Duration = Duration::from_millis(100);
/// A pass is given this long to end before the proxy stops.
const PASS_MAX: Duration = Duration::from_secs(10);

/// The servers for operators; never ends by itself.
pub(super) type Serving = Pin<Box<dyn Future<Output = ()>>>;

/// Everything the control thread needs.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) shared: Arc<Shared>,
    pub(super) reconciler: Reconciler,
    pub(super) servers: Servers,
    pub(super) logger: Option<Logger>,
    pub(super) lock: NodeLock,
    /// The folder of the lock.
    pub(super) state_dir: PathBuf,
    /// From the agent before this one.
    pub(super) taken_over: Option<TakenOver>,
    /// Grace for established connections at the end.
    pub(super) drain: Duration,
    /// Whoever runs this process would start it again if it ended unasked.
    pub(super) stays: bool,
}

/// Why an agent no longer serves its node.
enum End {
    /// It was told to stop, or a part of it has ended.
    Stopped(anyhow::Result<()>),
    /// It was told by a signal that another one takes over.
    Relieved,
    /// Another one asks for the node.
    Asked(Successor),
}

impl Control {
    /// Runs until a signal or a failure.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let Self {
            shared,
            reconciler,
            servers,
            mut logger,
            mut lock,
            state_dir,
            mut taken_over,
            drain,
            stays,
        } = self;
        let reconciler = Arc::new(Mutex::new(reconciler));
        let mut stop = Stop {
            terminate: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
        };
        let mut relieve = signal(SignalKind::from_raw(HAND_OVER as i32)).context("listen for SIGUSR1")?;
        let mut serve = servers.open().await?;
        let (ended, serve) = loop {
            let events = Events::open(shared.kernel.maps())?;
            let door = Door::open(&state_dir, &shared.node).await;
            let end = {
                let background = async {
                    tokio::join!(
                        events::follow(events, &shared),
                        follow_kernel_log(logger.as_mut()),
                        revoke::follow(&shared),
                        forget::follow(&shared),
                        sweep(&shared)
                    );
                };
                let asked = async {
                    match &door {
                        Some(door) => door.successor(&shared.hand_overs).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    outcome = reconcile(&shared, &reconciler, taken_over.as_mut()) => End::Stopped(outcome),
                    () = background => End::Stopped(Ok(())),
                    () = &mut serve => End::Stopped(Ok(())),
                    () = stop.told() => End::Stopped(Ok(())),
                    _ = relieve.recv() => End::Relieved,
                    successor = asked => End::Asked(successor),
                }
            };
            drop(door);
            let successor = match end {
                End::Stopped(outcome) => break (Some(outcome), serve),
                End::Relieved => {
                    tracing::info!("handing over to another agent of this node");
                    break (None, serve);
                }
                End::Asked(successor) => successor,
            };
            tracing::info!("another agent of this node takes over");
            let began = Instant::now();
            let Ok(idle) = timeout(PASS_MAX, Arc::clone(&reconciler).lock_owned()).await else {
                // It hears that by its end of the stream, and makes sockets of its own.
                tracing::warn!("not handed over: a pass over the node takes too long");
                continue;
            };
            drop(serve);
            match hand_over(&shared, &mut lock, successor, &mut stop).await {
                Outlook::Replaced { successor, told } => {
                    shared.hand_overs.count_given();
                    tracing::info!(took = ?began.elapsed(), "another agent has taken over");
                    let follow = Aftermath { shared: &shared, lock, drain, stays, told };
                    return follow.leave(successor, &mut stop).await;
                }
                Outlook::Taken => break (None, Box::pin(std::future::pending()) as Serving),
                Outlook::Ours => {}
            }
            shared.hand_overs.count_taken_back();
            tracing::warn!("the agent that was to take over did not: taking the node back");
            let mut own = idle;
            let resumed = spawn_blocking(move || own.resume());
            resumed.await.context("resume; this is a defect of the agent")?.context("take the node back")?;
            serve = servers.open().await?;
        };
        shared.readiness.drain();
        let relieved = ended.is_none();
        let finish = async {
            // A pass under way must not add a pod to a proxy that is stopping.
            drop(timeout(PASS_MAX, reconciler.lock()).await);
            finish(&shared, lock, drain, serve, relieved).await
        };
        tokio::pin!(finish);
        let (mut done, mut told) = (false, !relieved);
        while !(done && told) {
            tokio::select! {
                replaced = &mut finish, if !done => {
                    // Started again, it serves the node again.
                    anyhow::ensure!(replaced || !relieved, "the agent that was to take over did not");
                    done = true;
                }
                () = stop.told() => {
                    if told {
                        tracing::info!("told again to stop; not waiting");
                        break;
                    }
                    told = true;
                }
            }
        }
        ended.unwrap_or(Ok(()))
    }
}

/// Signals that tell the agent to stop.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    async fn told(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Keeps the node as the snapshot wants it. Ends only if a pass panicked or the source ended.
async fn reconcile(
    shared: &Shared,
    reconciler: &Arc<Mutex<Reconciler>>,
    mut taken_over: Option<&mut TakenOver>,
) -> anyhow::Result<()> {
    if taken_over.is_some() {
        certificates(shared).await;
    }
    let (mut snapshots, mut sources) = (shared.snapshots.clone(), shared.sources.clone());
    let mut retired = false;
    let mut last = shared.snapshot();
    loop {
        let complete = sources.borrow_and_update().errors.is_empty();
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        shared.note_departed(&last, &snapshot);
        last = Arc::clone(&snapshot);
        let wanted = Wanted { snapshot, complete };
        let mut reconciler = Arc::clone(reconciler).lock_owned().await;
        let pass = spawn_blocking(move || reconciler.pass(&wanted, std::time::Instant::now()));
        let outcome = pass.await.context("the reconciler failed; this is a defect of the agent")?;
        let retry_at = match outcome {
            Ok(outcome) => {
                let retry_at = outcome.retry_at.map(Instant::from_std);
                publish(shared, outcome);
                shared.revocations.note_applied();
                shared.forgetting.note_applied();
                if !retired {
                    retired = true;
                    shared.kernel.retire_old_versions();
                    shared.bridge.withhold_verdicts(false);
                }
                if let Some(taken_over) = taken_over.take() {
                    say_served(shared, taken_over);
                }
                retry_at
            }
            Err(error) => {
                tracing::error!(error = %report(&error), "read the kernel's tables; trying again");
                Some(Instant::now() + PASS_PAUSE)
            }
        };
        let retry = async {
            match retry_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = snapshots.changed() => changed.context("the configuration source has ended")?,
            changed = sources.changed() => changed.context("the configuration source has ended")?,
            () = retry => {}
        }
    }
}

fn publish(shared: &Shared, outcome: Outcome) {
    let before = shared.outcome();
    if before.refused != outcome.refused {
        match outcome.refused.is_empty() {
            true => tracing::info!("all table entries found room in the kernel"),
            false => tracing::error!(refused = ?outcome.refused, "map full: table entries were left out"),
        }
    }
    if before.errors != outcome.errors {
        for error in &outcome.errors {
            tracing::error!(%error, "write the kernel's tables; trying again");
        }
    }
    let waiting_for = outcome.errors.clone();
    shared.set_outcome(outcome);
    if shared.readiness.report(waiting_for) {
        say_ready(&shared.node);
    }
}

/// The line that scripts wait for. A closed standard output is nobody's error.
pub(super) fn say_ready(node: &str) {
    tracing::info!(%node, "ready");
    use std::io::Write as _;
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = writeln!(stdout, "ready").and_then(|()| stdout.flush()) {
        tracing::debug!(%error, "say ready on standard output");
    }
}

/// Clears expired entries away, for ever.
async fn sweep(shared: &Arc<Shared>) {
    let mut tick = interval(SWEEP_EACH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.tick().await;
    loop {
        tick.tick().await;
        let shared = Arc::clone(shared);
        let swept = spawn_blocking(move || {
            // Between scrapes too, so that an edge the kernel evicts is not lost.
            shared.fold_direct()?;
            shared.kernel.sweep(monotonic_ns())
        });
        match swept.await {
            Ok(Ok(swept)) => tracing::trace!(?swept, "swept"),
            Ok(Err(error)) => tracing::warn!(error = %report(&error), "sweep the kernel's tables"),
            Err(error) => tracing::error!(%error, "sweep the kernel's tables"),
        }
    }
}

/// Hands the programs' log records on, for ever. They only log when told to (`--kernel-log`).
async fn follow_kernel_log(logger: Option<&mut Logger>) {
    let Some(logger) = logger else { return std::future::pending().await };
    let mut tick = interval(KERNEL_LOG_EACH);
    loop {
        tick.tick().await;
        logger.flush();
    }
}

/// The end of a node agent that nobody has the listening sockets of. Direct connections and arrivals need no agent; connects that do fall back by the
/// listener rule as soon as the listeners are closed.
/// Whether a successor has taken over.
async fn finish(
    shared: &Shared,
    mut lock: NodeLock,
    grace: Duration,
    serve: Serving,
    relieved: bool,
) -> bool {
    tracing::info!(?grace, "stopping: no new connections");
    // First the kernel hands us no more, then those end whose handshake is under way: one that comes between the last accept
    // and the close of its listener would be reset.
    if let Err(error) = shared.beat.stop() {
        tracing::warn!(error = %report(&error), "stop the heartbeat");
    }
    sleep(HANDSHAKES).await;
    let drain = shared.proxy.drain(grace, Queued::Accepted);
    tokio::pin!(drain);
    let drained = if relieved {
        // A node without connections is drained at once, and the lock must not be taken back from under the successor.
        let replaced = timeout(SUCCESSOR_WITHIN, serve_until_replaced(&mut lock, serve));
        tokio::join!(drain, replaced).0
    } else {
        tokio::select! {
            drained = &mut drain => drained,
            () = serve_until_replaced(&mut lock, serve) => {
                tracing::info!("another agent has taken over");
                drain.await
            }
        }
    };
    // A successor stamps the heartbeat by now; then it is not ours to stop.
    let replaced = match lock.try_again() {
        Ok(true) => {
            if let Err(error) = shared.beat.stop() {
                tracing::warn!(error = %report(&error), "stop the heartbeat");
            }
            false
        }
        Ok(false) => true,
        Err(error) => {
            tracing::warn!(error = %report(&error), "look for a successor");
            false
        }
    };
    tracing::info!(aborted = drained.aborted, replaced, "stopped");
    replaced
}

/// Lets go of the lock and answers operators until somebody else has it.
async fn serve_until_replaced(lock: &mut NodeLock, mut serve: Serving) {
    lock.release();
    loop {
        tokio::select! {
            () = &mut serve => std::future::pending().await,
            () = sleep(SUCCESSOR_EACH) => {}
        }
        match lock.try_again() {
            Ok(true) => lock.release(),
            Ok(false) | Err(_) => return,
        }
    }
}
