//! Counters of the data path by close reason, and the registration of everything this crate exports.
//!
//! Invariant: label values come from closed enums, so each counter here exists from the start and costs one atomic
//! addition to bump. Per-edge series are in [`edges`].

mod direct;
pub(crate) mod edges;
pub(crate) mod flows;
pub(crate) mod http;
mod labels;
mod tunnels;

use std::{
    fmt,
    sync::atomic::{AtomicI64, AtomicU64},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

pub use self::{direct::DirectTraffic, edges::Security, flows::TunnelledTraffic};
use self::{edges::Edges, flows::Flows, http::Http, tunnels::Tunnels};
use crate::{
    close::{CloseReason, Direction},
    destination::by_name::Unresolved,
};

/// Everything the data path counts; registered once, shared by every worker.
#[derive(Debug)]
pub struct Metrics {
    closed: [Vec<Counter>; 2],
    open: [Gauge<i64, AtomicI64>; 2],
    dns: Vec<Counter>,
    called: (Counter, Vec<(Unresolved, Counter)>),
    /// `accept` calls that failed for want of descriptors or memory.
    pub(crate) accept_errors: Counter,
    /// Connects tried again on another endpoint.
    pub(crate) connect_retries: Counter,
    /// Accepted connections handed to a less busy worker.
    pub(crate) handovers: Counter,
    /// Tasks that panicked.
    pub(crate) panics: Counter,
    /// Bytes held for receivers that do not take them, over all workers.
    pub(crate) held_bytes: Gauge<i64, AtomicI64>,
    /// Traffic by edge.
    pub(crate) edges: Edges,
    /// What goes through tunnels, by port.
    pub(crate) flows: Flows,
    /// Requests of HTTP.
    pub(crate) http: Http,
    /// Tunnels between nodes.
    pub(crate) tunnels: Tunnels,
}

/// How a DNS query was dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DnsOutcome {
    /// From the snapshot.
    Answered,
    /// A reply that matches no query, or is garbage.
    BadReply,
    /// By the pod's own resolver.
    Forwarded,
    /// Not a query we can read.
    Malformed,
    /// No such name, said by us.
    NameError,
    /// A name of ours without such records.
    NoData,
    /// Too many queries in flight: dropped.
    Overloaded,
    /// The resolver did not answer in time.
    TimedOut,
    /// The resolver could not be reached, or is not known.
    Unreachable,
}

impl DnsOutcome {
    const ALL: [Self; 9] = [
        Self::Answered,
        Self::BadReply,
        Self::Forwarded,
        Self::Malformed,
        Self::NameError,
        Self::NoData,
        Self::Overloaded,
        Self::TimedOut,
        Self::Unreachable,
    ];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::BadReply => "bad_reply",
            Self::Forwarded => "forwarded",
            Self::Malformed => "malformed",
            Self::NameError => "name_error",
            Self::NoData => "no_data",
            Self::Overloaded => "overloaded",
            Self::TimedOut => "timed_out",
            Self::Unreachable => "unreachable",
        }
    }
}

/// A label value from a closed set.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Label(pub(crate) &'static str);

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl EncodeLabelValue for Label {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        EncodeLabelValue::encode(&self.0, encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClosedLabels {
    direction: Label,
    reason: Label,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabels {
    direction: Label,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DnsLabels {
    outcome: Label,
}

impl Metrics {
    /// Makes the counters and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let closed = Family::<ClosedLabels, Counter<u64, AtomicU64>>::default();
        let closed_by = |direction: Direction| -> Vec<Counter> {
            let label = |reason: &CloseReason| ClosedLabels {
                direction: Label(direction.as_str()),
                reason: Label(reason.as_str()),
            };
            CloseReason::ALL.iter().map(|reason| closed.get_or_create(&label(reason)).clone()).collect()
        };
        let open = Family::<DirectionLabels, Gauge<i64, AtomicI64>>::default();
        let open_by = |direction: Direction| {
            open.get_or_create(&DirectionLabels { direction: Label(direction.as_str()) }).clone()
        };
        let dns = Family::<DnsLabels, Counter>::default();
        let dns_by =
            |outcome: &DnsOutcome| dns.get_or_create(&DnsLabels { outcome: Label(outcome.as_str()) }).clone();
        let called = Family::<DnsLabels, Counter>::default();
        let called_by = |outcome| called.get_or_create(&DnsLabels { outcome: Label(outcome) }).clone();
        let metrics = Self {
            called: (
                called_by("resolved"),
                Unresolved::all().map(|why| (why, called_by(why.as_str()))).collect(),
            ),
            closed: [closed_by(Direction::Inbound), closed_by(Direction::Outbound)],
            open: [open_by(Direction::Inbound), open_by(Direction::Outbound)],
            dns: DnsOutcome::ALL.iter().map(dns_by).collect(),
            accept_errors: Counter::default(),
            connect_retries: Counter::default(),
            handovers: Counter::default(),
            panics: Counter::default(),
            held_bytes: Gauge::default(),
            edges: Edges::register(registry),
            flows: Flows::default(),
            http: Http::register(registry),
            tunnels: Tunnels::register(registry),
        };
        registry.register("mesh_proxy_connections_closed", "Proxied connections by how they ended", closed);
        registry.register("mesh_proxy_connections_open", "Proxied connections now", open);
        registry.register("mesh_dns_queries", "DNS queries of pods by how they were dealt with", dns);
        registry.register(
            "mesh_called_names",
            "Uses of names that clients call servers by (DYNAMIC_DNS)",
            called,
        );
        registry.register(
            "mesh_proxy_accept_errors",
            "Accepts that failed for want of descriptors or memory",
            metrics.accept_errors.clone(),
        );
        registry.register(
            "mesh_proxy_connect_retries",
            "Upstream connects tried again on another endpoint",
            metrics.connect_retries.clone(),
        );
        registry.register(
            "mesh_proxy_handovers",
            "Connections handed to a less busy worker",
            metrics.handovers.clone(),
        );
        registry.register("mesh_proxy_panics", "Tasks that panicked", metrics.panics.clone());
        registry.register(
            "mesh_proxy_held_bytes",
            "Bytes held for receivers that do not take them",
            metrics.held_bytes.clone(),
        );
        metrics
    }

    /// Connections that ended so.
    pub(crate) fn closed(&self, direction: Direction, reason: CloseReason) -> &Counter {
        &self.closed[direction as usize][reason.index()]
    }

    /// Connections now.
    pub(crate) fn open(&self, direction: Direction) -> &Gauge<i64, AtomicI64> {
        &self.open[direction as usize]
    }

    /// Uses of names that clients call servers by, which had an address or failed so.
    pub(crate) fn called_name(&self, why: Option<Unresolved>) -> &Counter {
        let (resolved, failed) = &self.called;
        let failed = failed.iter().find(|(known, _)| Some(*known) == why);
        failed.map_or(resolved, |(_, counter)| counter)
    }

    /// Queries dealt with so.
    pub(crate) fn dns(&self, outcome: DnsOutcome) -> &Counter {
        &self.dns[outcome as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_and_outcome_counts_under_its_own_label() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        metrics.closed(Direction::Outbound, CloseReason::NoEndpoint).inc();
        metrics.dns(DnsOutcome::TimedOut).inc_by(2);
        metrics.open(Direction::Inbound).set(3);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"mesh_proxy_connections_closed_total{direction="outbound",reason="no_endpoint"} 1"#,
            r#"mesh_proxy_connections_closed_total{direction="inbound",reason="no_endpoint"} 0"#,
            r#"mesh_dns_queries_total{outcome="timed_out"} 2"#,
            r#"mesh_proxy_connections_open{direction="inbound"} 3"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
