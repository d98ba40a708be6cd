//! Counters of tunnels between nodes.

use std::sync::atomic::AtomicI64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::Label;
use crate::hbone::tunnel::{Role, TunnelEnd};

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: Label,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    role: Label,
    reason: Label,
}

/// Tunnels by role.
#[derive(Debug, Default)]
pub(crate) struct Tunnels {
    opened: Family<RoleLabels, Counter>,
    open: Family<RoleLabels, Gauge<i64, AtomicI64>>,
    ended: Family<EndLabels, Counter>,
}

impl Tunnels {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let tunnels = Self::default();
        for role in [Role::Client, Role::Server] {
            drop(tunnels.opened.get_or_create(&labels(role)));
            drop(tunnels.open.get_or_create(&labels(role)));
            for reason in TunnelEnd::labels() {
                let labels = EndLabels { role: Label(role.as_str()), reason: Label(reason) };
                drop(tunnels.ended.get_or_create(&labels));
            }
        }
        registry.register("mesh_proxy_tunnels_opened", "Tunnels opened", tunnels.opened.clone());
        registry.register("mesh_proxy_tunnels_open", "Tunnels now", tunnels.open.clone());
        registry.register("mesh_proxy_tunnels_ended", "Tunnels by how they ended", tunnels.ended.clone());
        tunnels
    }

    pub(crate) fn opened(&self, role: Role) {
        self.opened.get_or_create(&labels(role)).inc();
        self.open.get_or_create(&labels(role)).inc();
    }

    pub(crate) fn left(&self, role: Role) {
        self.open.get_or_create(&labels(role)).dec();
    }

    pub(crate) fn ended(&self, role: Role, end: &TunnelEnd) {
        let labels = EndLabels { role: Label(role.as_str()), reason: Label(end.as_str()) };
        self.ended.get_or_create(&labels).inc();
    }

    /// Tunnels now.
    #[cfg(test)]
    pub(crate) fn now(&self, role: Role) -> i64 {
        self.open.get_or_create(&labels(role)).get()
    }

    /// Tunnels so far.
    #[cfg(test)]
    pub(crate) fn so_far(&self, role: Role) -> u64 {
        self.opened.get_or_create(&labels(role)).get()
    }
}

fn labels(role: Role) -> RoleLabels {
    RoleLabels { role: Label(role.as_str()) }
}
