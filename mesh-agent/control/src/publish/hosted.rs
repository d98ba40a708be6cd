//! Owns which identities live on which node, by the snapshot that is published.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use mesh_core::{identity::Identity, snapshot::Snapshot};
use tokio::sync::watch;

type ByNode = HashMap<Arc<str>, HashSet<Identity>>;

/// Answers whether a node may act for an identity. The answer follows the newest snapshot.
pub struct Hosted {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    indexed: Mutex<Option<(Arc<Snapshot>, Arc<ByNode>)>>,
}

impl Hosted {
    /// Follows these snapshots.
    pub fn new(snapshots: watch::Receiver<Arc<Snapshot>>) -> Self {
        Self { snapshots, indexed: Mutex::default() }
    }

    /// Whether a meshed pod that runs on `node`, or is about to, has this identity.
    pub fn is_hosted(&self, node: &str, identity: &Identity) -> bool {
        self.index().get(node).is_some_and(|identities| identities.contains(identity))
    }

    /// Whether the mesh is known by this name.
    pub fn is_ours(&self, trust_domain: &str) -> bool {
        self.snapshots.borrow().mesh().is_own_trust_domain(trust_domain)
    }

    fn index(&self) -> Arc<ByNode> {
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let mut indexed = self.indexed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, index)) = &*indexed
            && Arc::ptr_eq(of, &snapshot)
        {
            return Arc::clone(index);
        }
        let mut by_node = ByNode::new();
        for workload in snapshot.workloads().filter(|w| w.meshed && !w.terminated && !w.node.is_empty()) {
            by_node.entry(Arc::clone(&workload.node)).or_default().insert(workload.identity());
        }
        let index = Arc::new(by_node);
        *indexed = Some((snapshot, Arc::clone(&index)));
        index
    }
}

impl fmt::Debug for Hosted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hosted").finish_non_exhaustive()
    }
}
