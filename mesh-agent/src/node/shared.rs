//! Owns what the control loop writes and the servers read.
//!
//! Locks: held only to swap or clone a pointer, except where a field says otherwise.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use mesh_control::{status::SourceStatus, subscribe::status::LinkStatus};
use mesh_core::snapshot::Snapshot;
use mesh_proxy::{Metrics, Proxy, TunnelledTraffic};
use mesh_redirect::{MapError, Node, Stats};
use tokio::sync::watch;

use super::{
    beat::Beat, bridge::Bridge, direct::Direct, forget::Forgetting, handover::HandOvers, hearing::Hearings,
    identities::Identities, names::Departed, readiness::Readiness, reconcile::Outcome, resolve::Resolved,
    revoke::Revocations,
};

/// The running parts and the latest findings.
#[derive(Debug)]
pub(super) struct Shared {
    /// Name of the node.
    pub(super) node: String,
    /// Threads that carry traffic.
    pub(super) workers: usize,
    /// When the process began.
    pub(super) started: Instant,
    pub(super) kernel: Arc<Node>,
    pub(super) proxy: Arc<Proxy>,
    pub(super) bridge: Arc<Bridge>,
    pub(super) identities: Identities,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) sources: watch::Receiver<Arc<SourceStatus>>,
    /// With a controller.
    pub(super) link: Option<watch::Receiver<Arc<LinkStatus>>>,
    /// Names whose addresses are endpoints.
    pub(super) resolved: Arc<Resolved>,
    pub(super) readiness: Readiness,
    /// The sign of life, as the workers give it.
    pub(super) beat: Arc<Beat>,
    outcome: watch::Sender<Arc<Outcome>>,
    departed: Mutex<Arc<Departed>>,
    metrics: Arc<Metrics>,
    /// Locked while it is brought up to date, on the blocking pool.
    direct: Mutex<Direct>,
    /// Direct connections that policy ended.
    pub(super) revocations: Revocations,
    /// Connections of before pods joined.
    pub(super) forgetting: Forgetting,
    /// From agent to agent.
    pub(super) hand_overs: HandOvers,
    /// What the controller had told of pods that started.
    pub(super) hearings: Hearings,
}

/// What a [`Shared`] is made of.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) node: String,
    pub(super) workers: usize,
    pub(super) started: Instant,
    pub(super) kernel: Arc<Node>,
    pub(super) proxy: Arc<Proxy>,
    pub(super) bridge: Arc<Bridge>,
    pub(super) identities: Identities,
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) sources: watch::Receiver<Arc<SourceStatus>>,
    pub(super) link: Option<watch::Receiver<Arc<LinkStatus>>>,
    pub(super) resolved: Arc<Resolved>,
    pub(super) beat: Arc<Beat>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) direct: Direct,
}

impl Shared {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts {
            node,
            workers,
            started,
            kernel,
            proxy,
            bridge,
            identities,
            snapshots,
            sources,
            link,
            resolved,
            beat,
            metrics,
            direct,
        } = parts;
        Self {
            node,
            workers,
            started,
            kernel,
            proxy,
            bridge,
            identities,
            snapshots,
            sources,
            link,
            resolved,
            readiness: Readiness::new(),
            beat,
            outcome: watch::Sender::new(Arc::default()),
            departed: Mutex::default(),
            metrics,
            direct: Mutex::new(direct),
            revocations: Revocations::default(),
            forgetting: Forgetting::default(),
            hand_overs: HandOvers::default(),
            hearings: Hearings::default(),
        }
    }

    /// The world now.
    pub(super) fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshots.borrow())
    }

    /// The state of the configuration now.
    pub(super) fn source(&self) -> Arc<SourceStatus> {
        Arc::clone(&self.sources.borrow())
    }

    /// What the last pass of the reconciler found.
    pub(super) fn outcome(&self) -> Arc<Outcome> {
        Arc::clone(&self.outcome.borrow())
    }

    /// Each pass of the reconciler.
    pub(super) fn outcomes(&self) -> watch::Receiver<Arc<Outcome>> {
        self.outcome.subscribe()
    }

    pub(super) fn set_outcome(&self, outcome: Outcome) {
        self.outcome.send_replace(Arc::new(outcome));
    }

    /// Names of pods that left.
    pub(super) fn departed(&self) -> Arc<Departed> {
        Arc::clone(&self.departed.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Remembers the names of what the new snapshot no longer has.
    pub(super) fn note_departed(&self, before: &Snapshot, now: &Snapshot) {
        let mut departed = self.departed.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::make_mut(&mut departed).note(before, now);
    }

    /// What the data path sent through tunnels, which the kernel cannot count.
    pub(super) fn tunnelled(&self) -> Vec<TunnelledTraffic> {
        self.metrics.tunnelled()
    }

    /// Brings the metrics of Direct connections up to date. Blocking: reads the kernel's edges.
    pub(super) fn fold_direct(&self) -> Result<(), MapError> {
        let mut direct = self.direct.lock().unwrap_or_else(PoisonError::into_inner);
        let edges = Stats::new(self.kernel.maps()).edges()?;
        direct.fold(&edges, &self.snapshot(), |pod| self.bridge.serves(pod), &self.metrics);
        Ok(())
    }
}
