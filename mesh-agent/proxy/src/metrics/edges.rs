//! Istio's standard TCP metrics, one set of series per edge (who talks to whom, as one side reports it).
//!
//! Invariants:
//! - At most [`EDGES_MAX`] edges have series of their own; further ones share one edge of unknown workloads.
//! - Edges of workloads that are gone are removed by [`Edges::retain`].
//! - As in Istio, `received` bytes went from the client to the server and `sent` bytes back, whoever reports.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::{Service, Snapshot, Workload},
};
use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use super::labels::{EdgeLabels, EndLabels, Labels};
use crate::close::CloseReason;

/// Edges with series of their own: 500 pods a node × 30 peers each.
pub(crate) const EDGES_MAX: usize = 16_384;

/// Which side of a connection reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Reporter {
    /// The server's side.
    Destination,
    /// The client's side.
    Source,
}

/// What protects the bytes, and what proves the peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// TLS with certificates of both sides.
    MutualTls,
    /// Nothing on a wire; the kernel says which pod it is.
    Kernel,
    /// Nothing.
    #[default]
    #[serde(rename = "none")]
    Plaintext,
}

impl Security {
    /// Stable text for metric labels and views.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Kernel => "kernel",
            Self::Plaintext => "none",
        }
    }
}

/// Identity of an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EdgeKey {
    pub(crate) reporter: Reporter,
    pub(crate) source: Option<WorkloadId>,
    pub(crate) destination: Option<WorkloadId>,
    pub(crate) service: Option<ServiceId>,
    pub(crate) security: Security,
}

/// The parties of an edge, for its labels.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Parties<'a> {
    pub(crate) source: Option<&'a Workload>,
    pub(crate) destination: Option<&'a Workload>,
    pub(crate) service: Option<&'a Service>,
    pub(crate) cluster_domain: &'a str,
}

/// Traffic from one workload to another, as one side reports it.
#[derive(Debug)]
pub(crate) struct Edge {
    pub(crate) opened: Counter,
    pub(crate) sent_bytes: Counter,
    pub(crate) received_bytes: Counter,
    labels: Labels,
    closed: Family<EndLabels, Counter>,
    closed_by: [OnceLock<Counter>; CloseReason::ALL.len()],
}

impl Edge {
    /// Connections of this edge that ended so.
    pub(crate) fn closed(&self, reason: CloseReason) -> &Counter {
        self.closed_by[reason.index()].get_or_init(|| {
            let labels = EndLabels { edge: self.labels.clone(), response_flags: reason.response_flags() };
            self.closed.get_or_create(&labels).clone()
        })
    }
}

/// All edges of the node.
#[derive(Debug, Default)]
pub(crate) struct Edges {
    opened: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    received: Family<Labels, Counter>,
    closed: Family<EndLabels, Counter>,
    known: Mutex<HashMap<EdgeKey, Arc<Edge>>>,
}

impl Edges {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let edges = Self::default();
        registry.register("istio_tcp_connections_opened", "TCP connections opened", edges.opened.clone());
        registry.register("istio_tcp_connections_closed", "TCP connections closed", edges.closed.clone());
        registry.register("istio_tcp_sent_bytes", "Bytes sent to clients", edges.sent.clone());
        registry.register("istio_tcp_received_bytes", "Bytes received from clients", edges.received.clone());
        edges
    }

    /// The edge with this identity, made from `parties` if it is new.
    pub(crate) fn edge(&self, key: EdgeKey, parties: Parties<'_>) -> Arc<Edge> {
        let mut known = self.known();
        if let Some(edge) = known.get(&key) {
            return Arc::clone(edge);
        }
        let (key, parties) = if known.len() < EDGES_MAX {
            (key, parties)
        } else {
            let unknown = EdgeKey { source: None, destination: None, service: None, ..key };
            (unknown, Parties { cluster_domain: parties.cluster_domain, ..Parties::default() })
        };
        let made = || Arc::new(self.make(Labels(Arc::new(EdgeLabels::of(key, parties)))));
        Arc::clone(known.entry(key).or_insert_with(made))
    }

    /// Removes the edges of workloads that the snapshot does not know any more.
    pub(crate) fn retain(&self, snapshot: &Snapshot) {
        let alive = |id: Option<WorkloadId>| id.is_none_or(|id| snapshot.workload(id).is_some());
        self.known().retain(|key, edge| {
            let keep = alive(key.source) && alive(key.destination);
            if !keep {
                self.opened.remove(&edge.labels);
                self.sent.remove(&edge.labels);
                self.received.remove(&edge.labels);
                for reason in CloseReason::ALL {
                    let response_flags = reason.response_flags();
                    self.closed.remove(&EndLabels { edge: edge.labels.clone(), response_flags });
                }
            }
            keep
        });
    }

    fn make(&self, labels: Labels) -> Edge {
        Edge {
            opened: self.opened.get_or_create_owned(&labels),
            sent_bytes: self.sent.get_or_create_owned(&labels),
            received_bytes: self.received.get_or_create_owned(&labels),
            labels,
            closed: self.closed.clone(),
            closed_by: [const { OnceLock::new() }; CloseReason::ALL.len()],
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<EdgeKey, Arc<Edge>>> {
        // The map is consistent between its calls, so a panic elsewhere does not spoil it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::{Name, Parts};

    use super::*;

    fn workload(name: &str, labels: &[(&str, &str)]) -> Workload {
        Workload {
            labels: labels.iter().map(|(k, v)| (Arc::from(*k), Arc::from(*v))).collect(),
            ..Workload::named(Name::new("shop", name))
        }
    }

    fn key(source: &Workload, destination: &Workload) -> EdgeKey {
        EdgeKey {
            reporter: Reporter::Source,
            source: Some(source.id),
            destination: Some(destination.id),
            service: None,
            security: Security::Kernel,
        }
    }

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn an_edge_has_istios_series_and_loses_them_with_its_workload() {
        let mut registry = Registry::default();
        let edges = Edges::register(&mut registry);
        let (client, server) =
            (workload("client", &[]), workload("web-1-x", &[("app", "web"), ("version", "v2")]));
        let parties = Parties {
            source: Some(&client),
            destination: Some(&server),
            service: None,
            cluster_domain: "cluster.local",
        };
        let edge = edges.edge(key(&client, &server), parties);
        edge.opened.inc();
        edge.closed(CloseReason::Finished).inc();
        edge.sent_bytes.inc_by(7);
        assert!(Arc::ptr_eq(&edge, &edges.edge(key(&client, &server), parties)));

        let seen = text(&registry);
        for part in [
            "istio_tcp_connections_opened_total{reporter=\"source\",source_workload=\"client\"",
            "istio_tcp_connections_closed_total{",
            "istio_tcp_received_bytes_total{",
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/",
            "destination_canonical_service=\"web\"",
            "destination_canonical_revision=\"v2\"",
            "destination_service=\"unknown\"",
            "connection_security_policy=\"kernel\",response_flags=\"-\"} 1",
            "connection_security_policy=\"kernel\"} 7",
        ] {
            assert!(seen.contains(part), "{part} is not in\n{seen}");
        }

        let all = [Arc::new(client.clone()), Arc::new(server)];
        edges.retain(&Snapshot::new(1, Parts { workloads: all.to_vec(), ..Parts::default() }));
        assert!(text(&registry).contains("source_workload=\"client\""));
        edges.retain(&Snapshot::new(2, Parts { workloads: vec![Arc::new(client)], ..Parts::default() }));
        assert!(!text(&registry).contains("source_workload"));
    }

    #[test]
    fn edges_beyond_the_limit_share_one() {
        let edges = Edges::default();
        let key = |n: usize| EdgeKey {
            reporter: Reporter::Source,
            source: Some(WorkloadId(n as u64)),
            destination: None,
            service: None,
            security: Security::Plaintext,
        };
        for n in 0..EDGES_MAX {
            edges.edge(key(n), Parties::default());
        }
        let beyond = edges.edge(key(EDGES_MAX), Parties::default());
        assert!(Arc::ptr_eq(&beyond, &edges.edge(key(EDGES_MAX + 1), Parties::default())));
        assert!(!Arc::ptr_eq(&beyond, &edges.edge(key(0), Parties::default())));
    }
}
