//! Owns what the control loop writes and the servers read.
//!
//! Locks: one, held only to swap or clone a pointer.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use mesh_control::status::SourceStatus;
use mesh_core::snapshot::Snapshot;
use mesh_proxy::Proxy;
use mesh_redirect::Node;
use tokio::sync::watch;

use super::{beat::Beat, bridge::Bridge, readiness::Readiness, reconcile::Outcome};

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
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) sources: watch::Receiver<Arc<SourceStatus>>,
    pub(super) readiness: Readiness,
    /// The sign of life, as the workers give it.
    pub(super) beat: Arc<Beat>,
    outcome: Mutex<Arc<Outcome>>,
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
    pub(super) snapshots: watch::Receiver<Arc<Snapshot>>,
    pub(super) sources: watch::Receiver<Arc<SourceStatus>>,
    pub(super) beat: Arc<Beat>,
}

impl Shared {
    pub(super) fn new(parts: Parts) -> Self {
        let Parts { node, workers, started, kernel, proxy, bridge, snapshots, sources, beat } = parts;
        Self {
            node,
            workers,
            started,
            kernel,
            proxy,
            bridge,
            snapshots,
            sources,
            readiness: Readiness::new(),
            beat,
            outcome: Mutex::default(),
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
        Arc::clone(&self.outcome.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_outcome(&self, outcome: Outcome) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(outcome);
    }
}
