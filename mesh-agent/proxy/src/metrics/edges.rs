//! Istio's standard TCP metrics, one set of series per edge (who talks to whom, as one side reports it).
//!
//! Invariants:
//! - At most [`EDGES_MAX`] edges have series of their own; further ones share one edge of unknown workloads.
//! - Edges of workloads that are gone are removed by [`Edges::retain`].
//! - As in Istio, `received` bytes went from the client to the server and `sent` bytes back, whoever reports.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::{Name, Service, Snapshot, Workload},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, LabelSetEncoder},
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Security {
    /// Nothing on a wire; the kernel says which pod it is.
    Kernel,
    /// Nothing.
    Plaintext,
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
        self.closed_by[reason as usize].get_or_init(|| {
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

/// Istio's labels of a TCP connection; shared, because each series of an edge holds a copy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Labels(Arc<EdgeLabels>);

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EndLabels {
    #[prometheus(flatten)]
    edge: Labels,
    response_flags: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EdgeLabels {
    reporter: &'static str,
    #[prometheus(flatten)]
    source: SourceLabels,
    destination_service: String,
    destination_service_namespace: Arc<str>,
    destination_service_name: Arc<str>,
    #[prometheus(flatten)]
    destination: DestinationLabels,
    request_protocol: &'static str,
    connection_security_policy: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    source_workload: String,
    source_canonical_service: Arc<str>,
    source_canonical_revision: Arc<str>,
    source_workload_namespace: Arc<str>,
    source_principal: String,
    source_app: Arc<str>,
    source_version: Arc<str>,
    source_cluster: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DestinationLabels {
    destination_workload: String,
    destination_canonical_service: Arc<str>,
    destination_canonical_revision: Arc<str>,
    destination_workload_namespace: Arc<str>,
    destination_principal: String,
    destination_app: Arc<str>,
    destination_version: Arc<str>,
    destination_cluster: &'static str,
}

const UNKNOWN: &str = "unknown";
/// Istio's name of the only cluster.
const CLUSTER: &str = "Kubernetes";

impl EdgeLabels {
    fn of(key: EdgeKey, parties: Parties<'_>) -> Self {
        let domain = parties.cluster_domain;
        let source = Party::of(parties.source, key.security, domain);
        let destination = Party::of(parties.destination, key.security, domain);
        let service: Option<&Name> = parties.service.map(|service| &service.name);
        let unknown = || Arc::from(UNKNOWN);
        Self {
            reporter: match key.reporter {
                Reporter::Destination => "destination",
                Reporter::Source => "source",
            },
            source: SourceLabels {
                source_workload: source.workload,
                source_canonical_service: source.canonical_service,
                source_canonical_revision: source.canonical_revision,
                source_workload_namespace: source.namespace,
                source_principal: source.principal,
                source_app: source.app,
                source_version: source.version,
                source_cluster: source.cluster,
            },
            destination_service: service.map_or_else(
                || UNKNOWN.to_owned(),
                |name| format!("{}.{}.svc.{domain}", name.name, name.namespace),
            ),
            destination_service_namespace: service.map_or_else(unknown, |name| Arc::clone(&name.namespace)),
            destination_service_name: service.map_or_else(unknown, |name| Arc::clone(&name.name)),
            destination: DestinationLabels {
                destination_workload: destination.workload,
                destination_canonical_service: destination.canonical_service,
                destination_canonical_revision: destination.canonical_revision,
                destination_workload_namespace: destination.namespace,
                destination_principal: destination.principal,
                destination_app: destination.app,
                destination_version: destination.version,
                destination_cluster: destination.cluster,
            },
            request_protocol: "tcp",
            connection_security_policy: match key.security {
                Security::Kernel => "kernel",
                Security::Plaintext => "none",
            },
        }
    }
}

/// One end of an edge in Istio's words.
struct Party {
    workload: String,
    namespace: Arc<str>,
    canonical_service: Arc<str>,
    canonical_revision: Arc<str>,
    principal: String,
    app: Arc<str>,
    version: Arc<str>,
    cluster: &'static str,
}

impl Party {
    fn of(workload: Option<&Workload>, security: Security, trust_domain: &str) -> Self {
        let Some(workload) = workload else {
            let unknown: Arc<str> = Arc::from(UNKNOWN);
            return Self {
                workload: UNKNOWN.to_owned(),
                namespace: Arc::clone(&unknown),
                canonical_service: Arc::clone(&unknown),
                canonical_revision: Arc::clone(&unknown),
                principal: UNKNOWN.to_owned(),
                app: Arc::clone(&unknown),
                version: unknown,
                cluster: UNKNOWN,
            };
        };
        let label = |keys: &[&str]| keys.iter().find_map(|key| workload.labels.get(*key)).cloned();
        let owner = owner_name(workload);
        let unknown = || Arc::from(UNKNOWN);
        Self {
            canonical_service: label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
                .unwrap_or_else(|| owner.into()),
            canonical_revision: label(&[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ])
            .unwrap_or_else(|| Arc::from("latest")),
            workload: owner.to_owned(),
            namespace: Arc::clone(&workload.name.namespace),
            principal: match security {
                Security::Kernel => format!(
                    "spiffe://{trust_domain}/ns/{}/sa/{}",
                    workload.name.namespace, workload.service_account
                ),
                Security::Plaintext => UNKNOWN.to_owned(),
            },
            app: label(&["app.kubernetes.io/name", "app"]).unwrap_or_else(unknown),
            version: label(&["app.kubernetes.io/version", "version"]).unwrap_or_else(unknown),
            cluster: CLUSTER,
        }
    }
}

/// The Deployment behind a pod, as Istio names workloads: `web` for `web-5d4f8c7b9-x2x7k`.
fn owner_name(workload: &Workload) -> &str {
    let name: &str = &workload.name.name;
    let Some(hash) = workload.labels.get("pod-template-hash") else { return name };
    name.rsplit_once('-')
        .and_then(|(set, _)| set.strip_suffix(&**hash))
        .and_then(|owner| owner.strip_suffix('-'))
        .filter(|owner| !owner.is_empty())
        .unwrap_or(name)
}

#[cfg(test)]
mod tests {
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
    fn a_workload_is_named_after_its_deployment() {
        for (pod, hash, owner) in [
            ("web-5d4f8c7b9-x2x7k", Some("5d4f8c7b9"), "web"),
            ("my-web-5d4f8c7b9-x2x7k", Some("5d4f8c7b9"), "my-web"),
            ("web-0", None, "web-0"),
            ("web", Some("5d4f8c7b9"), "web"),
            ("5d4f8c7b9-x", Some("5d4f8c7b9"), "5d4f8c7b9-x"),
        ] {
            let labels: Vec<_> = hash.map(|hash| ("pod-template-hash", hash)).into_iter().collect();
            assert_eq!(owner_name(&workload(pod, &labels)), owner);
        }
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
        edges.retain(&Snapshot::new(1, all.to_vec(), Vec::new(), "cluster.local"));
        assert!(text(&registry).contains("source_workload=\"client\""));
        edges.retain(&Snapshot::new(2, vec![Arc::new(client)], Vec::new(), "cluster.local"));
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
