//! What a client's connections and requests are routed by: one model for Istio's and the Gateway API's resources.
//!
//! `mesh-control` compiles both APIs to it, so that their differences (prefix semantics, precedence, merging, visibility) are
//! settled before a request arrives; `mesh-proxy` asks it for each request.
//!
//! Invariants:
//! - Rules stand in the order in which they are tried; the first that matches wins. Nothing is sorted on the request path.
//! - Every pattern is compiled when a table is made; matching a request neither allocates nor fails.
//! - A destination that does not exist is in the table as such, with the status it is answered with.
//!
//! Not here: where the resources come from and how they are judged (`mesh-control`), policies of the server's side
//! ([`crate::policy`]).

pub mod cluster;
pub mod cors;
pub mod defaults;
pub mod evaluate;
pub mod fault;
pub mod host;
pub mod http;
pub(crate) mod lookup;
pub mod matching;
pub mod normalize;
pub mod protocol;
pub mod request;
pub mod retry;
pub mod rewrite;
pub mod scope;
pub mod sight;
pub mod stream;
pub mod variables;

use std::{collections::BTreeMap, fmt, sync::Arc};

use crate::{
    route::{
        cluster::{Cluster, ClusterKey},
        http::HttpTable,
        scope::{Scoped, SidecarScope},
        stream::StreamTable,
    },
    snapshot::Name,
};

/// The resource and rule that something was compiled from, for `meshctl explain`, access logs and route names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Origin {
    /// Kind, e.g. `VirtualService`.
    pub kind: Arc<str>,
    /// Namespace and name.
    pub name: Name,
    /// Where in the resource, as a field path, e.g. `spec.http[2].match[0]`.
    pub field: Arc<str>,
    /// File and document or line, as far as the source has them, e.g. `routes.yaml:31`.
    pub place: Option<Arc<str>>,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.kind, self.name, self.field)?;
        match &self.place {
            Some(place) => write!(f, " ({place})"),
            None => Ok(()),
        }
    }
}

/// A host name (lower case, no trailing dot, possibly `*` or `*.example.com`) and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct HostPort {
    /// Host name or wildcard.
    pub host: Arc<str>,
    /// Port that the client dials.
    pub port: u16,
}

/// All routes of a mesh; part of every snapshot.
///
/// Without an entry for a service port it is routed by what the service itself says: no rule, default policy, and the kernel may
/// send connections Direct. With one, its connections pass the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Routes {
    /// HTTP tables by host and port, as different clients see them. Names of Kubernetes services stand here by their full name only; what
    /// alias a client used is resolved by the caller.
    #[serde(with = "as_pairs")]
    pub http: BTreeMap<HostPort, Scoped<HttpTable>>,
    /// TLS (by SNI) and TCP tables of ports that are not terminated.
    #[serde(with = "as_pairs")]
    pub streams: BTreeMap<HostPort, Scoped<StreamTable>>,
    /// What is said about destinations; one that is not here has the default policy and all endpoints of its service.
    #[serde(with = "as_pairs")]
    pub clusters: BTreeMap<ClusterKey, Scoped<Cluster>>,
    /// `Sidecar` resources that limit what workloads see, by name; a workload refers to its own.
    #[serde(with = "as_pairs")]
    pub sidecars: BTreeMap<Name, Arc<SidecarScope>>,
}

impl Routes {
    /// Whether there is nothing to route by.
    pub fn is_empty(&self) -> bool {
        self.http.is_empty()
            && self.streams.is_empty()
            && self.clusters.is_empty()
            && self.sidecars.is_empty()
    }
}

/// Maps whose keys are structs, as lists of pairs: JSON has no such keys.
mod as_pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map)
    }

    pub(super) fn deserialize<'de, K, V, D>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Ok(Vec::<(K, V)>::deserialize(deserializer)?.into_iter().collect())
    }
}
