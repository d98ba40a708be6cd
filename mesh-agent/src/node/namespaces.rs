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

/// Open namespaces by pod.
#[derive(Debug, Default)]
pub(super) struct Namespaces(HashMap<WorkloadId, Arc<Netns>>);

impl Namespaces {
    /// The namespace at the path the pod's manifest names now.
    pub(super) fn open(&mut self, config: &PodConfig) -> Result<Arc<Netns>, NetnsError> {
        let path = Path::new(&*config.netns);
        if let Some(known) = self.0.get(&config.workload).filter(|known| known.path() == path) {
            match fs::metadata(path) {
                Ok(meta) if meta.ino() != known.inode() => {}
                Ok(_) | Err(_) => return Ok(Arc::clone(known)),
            }
        }
        let netns = Arc::new(Netns::open(path)?);
        self.0.insert(config.workload, Arc::clone(&netns));
        Ok(netns)
    }

    /// Closes those of pods that are no longer wanted.
    pub(super) fn keep_only(&mut self, wanted: impl Fn(WorkloadId) -> bool) {
        self.0.retain(|pod, _| wanted(*pod));
    }
}
