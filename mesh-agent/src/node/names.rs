//! Owns turning the ids of kernel tables back into names.

use std::collections::HashMap;

use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::Snapshot,
};

/// Names of one snapshot. Cheap per question, O(services) to make.
#[derive(Debug)]
pub(super) struct Names<'a> {
    snapshot: &'a Snapshot,
    services: HashMap<ServiceId, String>,
}

impl<'a> Names<'a> {
    pub(super) fn new(snapshot: &'a Snapshot) -> Self {
        let services = snapshot.services().map(|service| (service.id, service.name.to_string())).collect();
        Self { snapshot, services }
    }

    /// For questions about workloads only: nothing to make.
    pub(super) fn of_workloads(snapshot: &'a Snapshot) -> Self {
        Self { snapshot, services: HashMap::new() }
    }

    /// `namespace/name` of a pod; its id when it is no longer known; `None` for id 0.
    pub(super) fn workload(&self, id: u64) -> Option<String> {
        let id = (id != 0).then_some(WorkloadId(id))?;
        Some(self.snapshot.workload(id).map_or_else(|| format!("{id:?}"), |w| w.name.to_string()))
    }

    /// `namespace/name` of a service; its id when it is no longer known; `None` for id 0.
    pub(super) fn service(&self, id: u64) -> Option<String> {
        let id = (id != 0).then_some(ServiceId(id))?;
        Some(self.services.get(&id).cloned().unwrap_or_else(|| format!("{id:?}")))
    }
}
