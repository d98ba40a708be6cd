//! Selectors that select nothing. In a namespace without any workload nothing is said: its pods are somewhere else.

use mesh_core::snapshot::Name;

use super::{
    Report,
    world::{selects, text_of},
};
use crate::resource::{Labels, WorkloadEntry};

/// A selector of a policy: in the root namespace it selects in all of them.
pub(super) fn policy(name: &Name, selector: &Labels, field: &str, report: &mut Report<'_, '_>) {
    let world = report.world();
    if selector.is_empty() {
        return;
    }
    let in_root = *name.namespace == *world.root_namespace;
    let workloads: Vec<&Labels> =
        if in_root { world.all_workloads().collect() } else { world.workloads(&name.namespace).to_vec() };
    if !workloads.is_empty() && !workloads.iter().any(|labels| selects(selector, labels)) {
        let whose = if in_root { "the mesh".to_owned() } else { format!("namespace {}", name.namespace) };
        report.warning(field, format!("is {}, which no workload of {whose} has", text_of(selector)));
    }
}

/// A WorkloadEntry that no service selects.
pub(super) fn workload_entry(entry: &WorkloadEntry, report: &mut Report<'_, '_>) {
    let world = report.world();
    let namespace = &entry.name.namespace;
    let labels = &entry.endpoint.labels;
    let by_entries = world
        .entries
        .values()
        .filter(|other| other.name.namespace == *namespace)
        .filter_map(|other| other.selector.as_ref())
        .any(|selector| selects(selector, labels));
    let by_services = world
        .services
        .values()
        .filter(|service| service.service.name.namespace == *namespace)
        .any(|service| !service.selector.is_empty() && selects(&service.selector, labels));
    if !by_entries && !by_services {
        let message = format!(
            "are selected by no ServiceEntry or Service of namespace {namespace}: nothing reaches it"
        );
        report.warning("spec.labels", message);
    }
}
