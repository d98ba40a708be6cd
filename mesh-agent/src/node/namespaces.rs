//! Owns the open network namespaces of wanted pods.
//!
//! Invariants:
//! - A namespace is opened once and kept while its pod is wanted, so its inode number cannot be reused meanwhile
//!   and an equal number means the same namespace.
//! - A namespace whose file disappears is kept: its processes may live on, and taking the pod out would let its
//!   traffic past the mesh. It goes with the manifest.

use std::{collections::HashMap, fs, os::unix::fs::MetadataExt as _, path::Path, sync::Arc};

use mesh_core::{id::WorkloadId, plan::PodConfig};
use mesh_redirect::{Netns, NetnsError};

use super::local::LocalKnowledge;

/// Open namespaces by pod.
#[derive(Debug)]
pub(super) struct Namespaces {
    by_pod: HashMap<WorkloadId, Arc<Netns>>,
    local: Arc<LocalKnowledge>,
}

impl Namespaces {
    /// None yet. Those that `local` has open already are taken from there: their files may be gone, or be other ones by now.
    pub(super) fn new(local: &Arc<LocalKnowledge>) -> Self {
        Self { by_pod: HashMap::new(), local: Arc::clone(local) }
    }

    /// The namespace at the path the pod's manifest names now.
    pub(super) fn open(&mut self, config: &PodConfig) -> Result<Arc<Netns>, NetnsError> {
        if let Some(netns) = self.local.opened(&config.netns) {
            self.by_pod.insert(config.workload, Arc::clone(&netns));
            return Ok(netns);
        }
        let path = Path::new(&*config.netns);
        if let Some(known) = self.by_pod.get(&config.workload).filter(|known| known.path() == path) {
            match fs::metadata(path) {
                Ok(meta) if meta.ino() != known.inode() => {}
                Ok(_) | Err(_) => return Ok(Arc::clone(known)),
            }
        }
        let netns = Arc::new(Netns::open(path)?);
        self.by_pod.insert(config.workload, Arc::clone(&netns));
        Ok(netns)
    }

    /// Closes those of pods that are no longer wanted.
    pub(super) fn keep_only(&mut self, wanted: impl Fn(WorkloadId) -> bool) {
        self.by_pod.retain(|pod, _| wanted(*pod));
    }
}
