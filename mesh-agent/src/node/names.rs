//! Owns turning the ids of kernel tables back into names.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::{Name, Snapshot},
};

/// Departed pods whose names are kept, because the kernel's counters outlive them: a node's churn of hours.
const DEPARTED_MAX: usize = 4096;

/// Names of pods that left, by id. The oldest make room for new ones.
#[derive(Clone, Debug, Default)]
pub(super) struct Departed {
    names: HashMap<WorkloadId, Name>,
    order: VecDeque<WorkloadId>,
}

impl Departed {
    /// Notes the workloads of `before` that `now` no longer has.
    pub(super) fn note(&mut self, before: &Snapshot, now: &Snapshot) {
        for workload in before.workloads().filter(|w| now.workload(w.id).is_none()) {
            if self.names.insert(workload.id, workload.name.clone()).is_none() {
                self.order.push_back(workload.id);
            }
            if self.order.len() > DEPARTED_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.names.remove(&oldest);
            }
        }
    }
}

/// Names of one snapshot, and of what left before it. Cheap per question, O(services) to make.
#[derive(Debug)]
pub(super) struct Names<'a> {
    snapshot: &'a Snapshot,
    departed: Arc<Departed>,
    services: HashMap<ServiceId, String>,
}

impl<'a> Names<'a> {
    pub(super) fn new(snapshot: &'a Snapshot, departed: &Arc<Departed>) -> Self {
        let services = snapshot.services().map(|service| (service.id, service.name.to_string())).collect();
        Self { snapshot, departed: Arc::clone(departed), services }
    }

    /// For questions about workloads only: nothing to make.
    pub(super) fn of_workloads(snapshot: &'a Snapshot, departed: &Arc<Departed>) -> Self {
        Self { snapshot, departed: Arc::clone(departed), services: HashMap::new() }
    }

    /// `namespace/name` of a pod; its id when it is no longer known; `None` for id 0.
    pub(super) fn workload(&self, id: u64) -> Option<String> {
        let id = (id != 0).then_some(WorkloadId(id))?;
        let name = self.snapshot.workload(id).map(|workload| &workload.name);
        let name = name.or_else(|| self.departed.names.get(&id));
        Some(name.map_or_else(|| format!("{id:?}"), ToString::to_string))
    }

    /// SPIFFE identity of a pod that is known.
    pub(super) fn identity(&self, id: u64) -> Option<String> {
        Some(self.snapshot.workload(WorkloadId(id))?.identity().to_string())
    }

    /// `namespace/name` of a service; its id when it is no longer known; `None` for id 0.
    pub(super) fn service(&self, id: u64) -> Option<String> {
        let id = (id != 0).then_some(ServiceId(id))?;
        Some(self.services.get(&id).cloned().unwrap_or_else(|| format!("{id:?}")))
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{Parts, Workload};

    use super::*;

    fn snapshot(pods: &[&str]) -> Snapshot {
        let pods = pods.iter().map(|pod| Arc::new(Workload::named(Name::new("shop", *pod))));
        Snapshot::new(1, Parts { workloads: pods.collect(), ..Parts::default() })
    }

    #[test]
    fn a_pod_keeps_its_name_after_it_left() {
        let (before, now) = (snapshot(&["cart", "web"]), snapshot(&["web"]));
        let cart = Workload::named(Name::new("shop", "cart")).id.0;
        let mut departed = Departed::default();
        departed.note(&before, &now);
        let names = Names::new(&now, &Arc::new(departed));
        assert_eq!(names.workload(cart).as_deref(), Some("shop/cart"));
        assert_eq!(names.workload(0xabc).as_deref(), Some("w0000000000000abc"));
        assert_eq!(names.workload(0), None);
    }

    #[test]
    fn the_memory_of_departed_pods_is_bounded() {
        let mut departed = Departed::default();
        let names: Vec<String> = (0..DEPARTED_MAX + 10).map(|n| format!("pod-{n}")).collect();
        let before = snapshot(&names.iter().map(String::as_str).collect::<Vec<_>>());
        departed.note(&before, &snapshot(&[]));
        assert_eq!((departed.names.len(), departed.order.len()), (DEPARTED_MAX, DEPARTED_MAX));
    }
}
