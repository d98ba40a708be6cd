//! The labels of an edge in Istio's words.
//!
//! Invariant: what is not known says `unknown`, never nothing.

use std::{fmt, sync::Arc};

use mesh_core::snapshot::{Name, Workload};
use prometheus_client::encoding::{EncodeLabelSet, LabelSetEncoder};

use super::edges::{EdgeKey, Parties, Reporter, Security};

/// Istio's labels of a TCP connection; shared, because each series of an edge holds a copy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Labels(pub(super) Arc<EdgeLabels>);

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.encode(encoder)
    }
}

/// The labels of connections that have ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct EndLabels {
    #[prometheus(flatten)]
    pub(super) edge: Labels,
    pub(super) response_flags: &'static str,
}

/// The labels of one edge.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct EdgeLabels {
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
    pub(super) fn of(key: EdgeKey, parties: Parties<'_>) -> Self {
        let domain = parties.cluster_domain;
        let source = Party::of(parties.source, key.security);
        let destination = Party::of(parties.destination, key.security);
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
            destination_service: parties
                .service
                .map_or_else(|| UNKNOWN.to_owned(), |service| service.host(domain).into_owned()),
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
            connection_security_policy: key.security.as_str(),
        }
    }

    /// The same edge for requests of this protocol.
    pub(super) fn speaking(self, request_protocol: &'static str) -> Self {
        Self { request_protocol, ..self }
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
    fn of(workload: Option<&Workload>, security: Security) -> Self {
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
                Security::MutualTls | Security::Kernel => workload.identity().to_string(),
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
}
