//! Routes of the Gateway API: what HTTPRoute, GRPCRoute, TLSRoute and TCPRoute share, and ReferenceGrant.
//!
//! Invariants:
//! - What the API server would refuse (the CRDs' schemas and rules) is an error here too: files meet no API server.
//! - What the mesh does not have is in the result as such, and is answered with 500 as the API wants; it never becomes less
//!   than what was written.
//!
//! Not here: whether what a reference names exists, and whether it may be referred to (the compiler, and `meshctl analyze`).

mod attachment;
mod filters;
mod grpc_route;
mod http_route;
mod matches;
mod ownership;
mod reference_grant;
mod references;
mod stream_route;
pub(crate) mod wire;

use std::{fmt, sync::Arc};

use mesh_core::{
    route::http::{HeaderOps, Millionths},
    snapshot::Name,
};

pub(crate) use self::{
    attachment::{Unattached, attached},
    filters::TYPES as FILTER_TYPES,
    grpc_route::read as grpc_route,
    http_route::read as http_route,
    ownership::{Owner, Ownership, is_mesh_parent},
    reference_grant::read as reference_grant,
    stream_route::{read_tcp as tcp_route, read_tls as tls_route},
};
pub use self::{
    grpc_route::{GrpcMatch, GrpcRoute, GrpcRouteRule},
    http_route::{HttpRoute, HttpRouteRule, RouteRetry},
    ownership::is_for_others,
    reference_grant::{GrantFrom, GrantTo, ReferenceGrant},
    stream_route::{StreamRoute, StreamRouteRule},
};

/// API group of these kinds.
pub(crate) const GROUP: &str = "gateway.networking.k8s.io";
/// API group of Istio's kinds that references may name.
const ISTIO_GROUP: &str = "networking.istio.io";

/// What a route is attached to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParentRef {
    /// Kind of the parent.
    pub kind: ParentKind,
    /// The parent; its namespace is the route's own unless another is named.
    pub name: Name,
    /// Only this port of it.
    pub port: Option<u16>,
    /// Only this listener (of a Gateway) or port name (of a Service).
    pub section: Option<Arc<str>>,
}

/// Kinds of parents.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ParentKind {
    /// A Kubernetes Service: a mesh route.
    Service,
    /// An Istio ServiceEntry: a mesh route.
    ServiceEntry,
    /// A Gateway.
    Gateway,
    /// Something else, as `group/Kind`; the route does nothing there.
    Other(Arc<str>),
}

/// What requests are sent to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendRef {
    /// Kind of the backend.
    pub kind: BackendKind,
    /// The backend; its namespace is the route's own unless another is named. Of [`BackendKind::Hostname`] the name is the host.
    pub name: Name,
    /// Port of the Service; always there for [`BackendKind::Service`].
    pub port: Option<u16>,
}

impl BackendRef {
    /// API group and kind, as a ReferenceGrant names them.
    pub fn group_kind(&self) -> (&str, &str) {
        match &self.kind {
            BackendKind::Service => ("", "Service"),
            BackendKind::ServiceEntry => (ISTIO_GROUP, "ServiceEntry"),
            BackendKind::Hostname => (ISTIO_GROUP, "Hostname"),
            BackendKind::Other(text) => text.split_once('/').unwrap_or(("", text)),
        }
    }
}

/// Kinds of backends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BackendKind {
    /// A Kubernetes Service.
    Service,
    /// An Istio ServiceEntry, by its name.
    ServiceEntry,
    /// A host name that the mesh knows, e.g. of a ServiceEntry (`networking.istio.io/Hostname`).
    Hostname,
    /// Something else, as `group/Kind`: reason `InvalidKind`, its share is answered with 500.
    Other(Arc<str>),
}

/// One of the backends of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteBackend {
    /// Share among its siblings; 0 gets nothing. 1 unless given, at most 1 000 000.
    pub weight: u32,
    /// Where to.
    pub backend: BackendRef,
    /// Changes to the request's headers.
    pub request_headers: HeaderOps,
    /// Changes to the response's headers.
    pub response_headers: HeaderOps,
    /// A filter that the mesh does not have at this place: the share is answered with 500.
    pub unsupported: Option<UnsupportedFilter>,
}

/// A filter that the mesh does not have where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnsupportedFilter {
    /// Its type, e.g. `ExternalAuth`; of several filters the first one's.
    pub kind: Arc<str>,
    /// What an `ExtensionRef` beside it, or the filter itself, refers to, as `group/Kind`: reason `InvalidKind`.
    pub extension: Option<Arc<str>>,
}

impl fmt::Display for UnsupportedFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind)
    }
}

/// Where copies of requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteMirror {
    /// Where to.
    pub backend: BackendRef,
    /// Of how many requests.
    pub share: Millionths,
}

#[cfg(test)]
mod tests;
