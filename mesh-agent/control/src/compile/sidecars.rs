//! Which Sidecar limits what a workload sees (S64), and what it lets it see.

use std::sync::Arc;

use mesh_core::{
    route::{
        cluster::ConnectionPool,
        scope::{EgressHost, EgressListener, EgressProxy, InboundPools, SidecarScope},
    },
    snapshot::Name,
};

use super::routes::pool;
use crate::{
    index::Index,
    resource::{Labels, Sidecar, destination_rule as spec},
};

/// The Sidecars of one namespace's workloads.
pub(super) struct NamespaceSidecars<'a> {
    /// With selectors, the oldest first.
    selected: Vec<&'a Sidecar>,
    /// For the others: the namespace's, else the root's.
    rest: Option<&'a Sidecar>,
}

impl<'a> NamespaceSidecars<'a> {
    pub(super) fn of(index: &'a Index, namespace: &str, root: &str) -> Self {
        let by_age = |namespace: &str| {
            let mut all: Vec<&Sidecar> = index.sidecars(namespace).collect();
            all.sort_by_key(|sidecar| (sidecar.created, &sidecar.name.name));
            all
        };
        let own = by_age(namespace);
        let unselective = |all: &[&'a Sidecar]| all.iter().copied().find(|s| s.selector.is_empty());
        let rest = unselective(&own).or_else(|| unselective(&by_age(root)));
        Self { selected: own.into_iter().filter(|sidecar| !sidecar.selector.is_empty()).collect(), rest }
    }

    /// The one that a workload with these labels has.
    pub(super) fn of_workload(&self, labels: &Labels) -> Option<Name> {
        let selects =
            |sidecar: &&&Sidecar| sidecar.selector.iter().all(|(key, value)| labels.get(key) == Some(value));
        let own = self.selected.iter().find(selects).copied();
        own.or(self.rest).map(|sidecar| sidecar.name.clone())
    }
}

/// What a Sidecar lets its workloads see, and the limits of what they take; `mesh` is what limits fall back to. `egress_proxy` is what
/// its own leads to.
pub(super) fn scope(
    sidecar: &Sidecar,
    mesh: &ConnectionPool,
    egress_proxy: Option<EgressProxy>,
) -> Arc<SidecarScope> {
    let made = |own: &spec::ConnectionPool| pool(own.clone(), mesh);
    let everything = || {
        let all = EgressHost { excluded: false, namespace: None, host: "*".into() };
        vec![EgressListener { port: None, hosts: vec![all] }]
    };
    Arc::new(SidecarScope {
        egress: sidecar.egress.clone().unwrap_or_else(everything),
        outbound: sidecar.outbound,
        egress_proxy,
        inbound: InboundPools {
            all: sidecar.inbound_pool.as_ref().map(made),
            ports: sidecar.inbound_ports.iter().map(|(port, own)| (*port, made(own))).collect(),
        },
    })
}
