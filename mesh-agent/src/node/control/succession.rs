//! Owns the two ends of a hand-over: giving the node away, and having taken it.
//!
//! Invariants:
//! - From the moment the lock is let go of, the agent that gives writes nothing to the kernel's tables; it accepts until the other one
//!   says that it does.
//! - The agent that takes says so when every pod is served that can be.

use std::time::Duration;

use mesh_proxy::Queued;
use tokio::time::{Instant, sleep, timeout};

use super::{SUCCESSOR_EACH, Stop};
use crate::{
    node::{
        handover::{LastWord, Successor, TakenOver},
        lock::NodeLock,
        shared::Shared,
    },
    report::report,
};

/// A process that has ended lets go of its lock within this time.
const LOCK_FREE_WITHIN: Duration = Duration::from_secs(5);
/// A node that nobody serves is waited for this long: whoever runs the successor starts it again.
const SUCCESSOR_BACK_WITHIN: Duration = Duration::from_secs(10);
/// How often it is looked for then.
const ORPHAN_EACH: Duration = Duration::from_millis(500);
/// Certificates of this node's pods are waited for this long while the agent before this one still serves.
const CERTIFICATES_WITHIN: Duration = Duration::from_secs(5);
/// How often they are looked for.
const CERTIFICATES_EACH: Duration = Duration::from_millis(20);

/// What came of giving the node away.
pub(super) enum Outlook {
    /// The other agent serves it; whether this one was told to stop meanwhile.
    Replaced { successor: Successor, told: bool },
    /// It did not come to that: the lock is held here again.
    Ours,
    /// It did not come to that, and somebody else has the lock.
    Taken,
}

/// Gives the node away, and accepts for as long as the other agent does not. Nothing is written to the kernel's tables meanwhile.
pub(super) async fn hand_over(
    shared: &Shared,
    lock: &mut NodeLock,
    successor: Successor,
    stop: &mut Stop,
) -> Outlook {
    shared.bridge.withhold_verdicts(true);
    lock.release();
    let given = async {
        let sockets = shared.proxy.duplicate_listeners().await?;
        tracing::info!(sockets = sockets.len(), "passing the listening sockets on");
        successor.give(sockets).await
    };
    let word = match given.await {
        Ok(mut successor) => tokio::select! {
            word = successor.last_word() => (word == LastWord::Served).then_some((successor, false)),
            // The other one has the sockets, and nobody to give them back to.
            () = stop.told() => Some((successor, true)),
        },
        Err(error) => {
            tracing::warn!(%error, "pass the listening sockets on");
            None
        }
    };
    if let Some((successor, told)) = word {
        return Outlook::Replaced { successor, told };
    }
    let give_up = Instant::now() + LOCK_FREE_WITHIN;
    loop {
        match lock.try_again() {
            Ok(true) => return Outlook::Ours,
            Ok(false) if Instant::now() < give_up => sleep(SUCCESSOR_EACH).await,
            Ok(false) => return Outlook::Taken,
            Err(error) => {
                tracing::warn!(error = %report(&error), "take the node's lock back");
                return Outlook::Taken;
            }
        }
    }
}

/// What is left of an agent that another one has taken the node over from: its connections.
pub(super) struct Aftermath<'a> {
    pub(super) shared: &'a Shared,
    pub(super) lock: NodeLock,
    pub(super) drain: Duration,
    pub(super) stays: bool,
    /// It was told to stop.
    pub(super) told: bool,
}

impl Aftermath<'_> {
    /// Leaves new connections to the successor, lets the established ones end, and watches that the node is served for as long as this
    /// process is there.
    pub(super) async fn leave(self, successor: Successor, stop: &mut Stop) -> anyhow::Result<()> {
        let Self { shared, mut lock, drain, stays, mut told } = self;
        shared.readiness.drain();
        shared.beat.leave();
        let ending = shared.proxy.drain(drain, Queued::LeftToSuccessor);
        let orphaned = orphaned(successor, &mut lock);
        tokio::pin!(ending, orphaned);
        let mut done = false;
        while !(done && (told || !stays)) {
            tokio::select! {
                drained = &mut ending, if !done => {
                    tracing::info!(aborted = drained.aborted, "the connections of this agent have ended");
                    done = true;
                }
                () = &mut orphaned, if !told => {
                    // Started again, it serves the node again.
                    anyhow::bail!("the agent that took over has ended, and nobody serves the node");
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
        Ok(())
    }
}

/// Returns once the successor has ended and nobody has served the node for a while.
async fn orphaned(mut successor: Successor, lock: &mut NodeLock) {
    while successor.last_word().await != LastWord::Gone {}
    let mut since = None;
    loop {
        match lock.try_again() {
            Ok(true) => {
                lock.release();
                if since.get_or_insert_with(Instant::now).elapsed() >= SUCCESSOR_BACK_WITHIN {
                    return;
                }
            }
            Ok(false) | Err(_) => since = None,
        }
        sleep(ORPHAN_EACH).await;
    }
}

/// Waits for the certificates of this node's pods, but not long: the agent before this one accepts as long as this one does not, and
/// what it accepts need not wait.
pub(super) async fn certificates(shared: &Shared) {
    let had = async {
        while shared.identities.rows().iter().any(|row| row.state == "pending") {
            sleep(CERTIFICATES_EACH).await;
        }
    };
    if timeout(CERTIFICATES_WITHIN, had).await.is_err() {
        tracing::warn!("taking the node over without all certificates of its pods");
    }
}

/// Tells the agent before this one that it is not needed any more.
pub(super) fn say_served(shared: &Shared, taken_over: &mut TakenOver) {
    let left = shared.kernel.close_inherited();
    if left > 0 {
        tracing::info!(left, "listening sockets of pods that are gone or could not be enrolled");
    }
    if let Err(error) = taken_over.served() {
        tracing::info!(%error, "the agent before this one has ended");
    }
    shared.hand_overs.count_taken(true);
    tracing::info!("the node is taken over");
}
