//! Resources as the mesh uses them: checked, and reduced to what is needed.
//!
//! Invariants:
//! - Made from Kubernetes' own types by one checked conversion per kind, whatever the source is; nothing downstream
//!   parses or checks again.
//! - A few hundred bytes each: the agent holds every resource of the mesh.

#[cfg(test)]
mod any_document;
mod authorization_policy;
pub mod destination_rule;
mod endpoint_slice;
mod fields;
mod gateway_api;
mod host;
mod injected;
mod mesh_config;
pub(crate) mod metadata;
mod node;
mod parts;
mod peer_authentication;
pub(crate) mod pod;
mod secret;
mod service;
mod service_entry;
pub mod sidecar;
pub mod virtual_service;
mod workload_entry;

use std::{collections::BTreeMap, fmt, sync::Arc};

use mesh_core::snapshot::Name;

#[cfg(test)]
pub(crate) use self::any_document::good as good_documents;
#[cfg(test)]
pub(crate) use self::fields::asked;
pub use self::{
    authorization_policy::{Applied, AuthorizationPolicy},
    destination_rule::DestinationRule,
    endpoint_slice::{EndpointSlice, SliceEndpoint, SlicePort},
    gateway_api::{
        BackendKind, BackendRef, GrantFrom, GrantTo, GrpcMatch, GrpcRoute, GrpcRouteRule, HttpRoute,
        HttpRouteRule, ParentKind, ParentRef, ReferenceGrant, RouteBackend, RouteMirror, RouteRetry,
        StreamRoute, StreamRouteRule, UnsupportedFilter, is_for_others,
    },
    host::{RuleHost, by_specificity, is_within, overlap},
    injected::{Injected, injector},
    mesh_config::{MeshConfig, RoutingDefaults},
    node::Node,
    parts::ExportTo,
    peer_authentication::PeerAuthentication,
    pod::{ContainerPort, Pod},
    secret::Secret,
    service::{Service, TargetPort},
    service_entry::{PortProtocol, Resolution, ServiceEntry, ServiceEntryPort},
    sidecar::Sidecar,
    virtual_service::{Destination, HttpAction, MESH_GATEWAY, VirtualService},
    workload_entry::{EndpointAddress, WorkloadEndpoint, WorkloadEntry},
};
pub(crate) use self::{
    authorization_policy::{read as authorization_policy, wire as authorization_wire},
    destination_rule::read as destination_rule_of,
    endpoint_slice::read as endpoint_slice,
    fields::is_nothing,
    gateway_api::{
        FILTER_TYPES, GROUP as GATEWAY_GROUP, Owner, Ownership, Unattached, attached, grpc_route, http_route,
        is_mesh_parent, reference_grant, tcp_route, tls_route, wire as gateway_wire,
    },
    mesh_config::{CONFIG_MAP, read as mesh_config},
    metadata::{Scope, namespace, service_account},
    node::{place as place_of, read as node},
    peer_authentication::{read as peer_authentication, wire},
    pod::read as pod,
    secret::read as secret,
    service::read as service,
    service_entry::read as service_entry,
    sidecar::read as sidecar_of,
    virtual_service::read as virtual_service_of,
    workload_entry::read as workload_entry,
};

/// Labels of a resource.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// The kinds the mesh reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    /// v1 Namespace.
    Namespace,
    /// v1 ServiceAccount.
    ServiceAccount,
    /// v1 Pod.
    Pod,
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// security.istio.io/v1 PeerAuthentication.
    PeerAuthentication,
    /// security.istio.io/v1 AuthorizationPolicy.
    AuthorizationPolicy,
    /// v1 ConfigMap; only the mesh's own, `istio` in the root namespace.
    ConfigMap,
    /// networking.istio.io/v1 VirtualService.
    VirtualService,
    /// networking.istio.io/v1 DestinationRule.
    DestinationRule,
    /// networking.istio.io/v1 Sidecar.
    Sidecar,
    /// networking.istio.io/v1 ServiceEntry.
    ServiceEntry,
    /// networking.istio.io/v1 WorkloadEntry.
    WorkloadEntry,
    /// gateway.networking.k8s.io/v1 HTTPRoute.
    #[serde(rename = "HTTPRoute")]
    HttpRoute,
    /// gateway.networking.k8s.io/v1 GRPCRoute.
    #[serde(rename = "GRPCRoute")]
    GrpcRoute,
    /// gateway.networking.k8s.io/v1 TLSRoute.
    #[serde(rename = "TLSRoute")]
    TlsRoute,
    /// gateway.networking.k8s.io/v1alpha2 TCPRoute.
    #[serde(rename = "TCPRoute")]
    TcpRoute,
    /// gateway.networking.k8s.io/v1beta1 ReferenceGrant.
    ReferenceGrant,
    /// v1 Node.
    Node,
    /// v1 Secret; of a cluster only those that DestinationRules name.
    Secret,
}

impl Kind {
    /// All kinds.
    pub const ALL: &'static [Self] = &[
        Self::Namespace,
        Self::ServiceAccount,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
        Self::ConfigMap,
        Self::VirtualService,
        Self::DestinationRule,
        Self::Sidecar,
        Self::ServiceEntry,
        Self::WorkloadEntry,
        Self::HttpRoute,
        Self::GrpcRoute,
        Self::TlsRoute,
        Self::TcpRoute,
        Self::ReferenceGrant,
        Self::Node,
        Self::Secret,
    ];

    /// `kind` in a manifest.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::ServiceAccount => "ServiceAccount",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::ConfigMap => "ConfigMap",
            Self::VirtualService => "VirtualService",
            Self::DestinationRule => "DestinationRule",
            Self::Sidecar => "Sidecar",
            Self::ServiceEntry => "ServiceEntry",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::HttpRoute => "HTTPRoute",
            Self::GrpcRoute => "GRPCRoute",
            Self::TlsRoute => "TLSRoute",
            Self::TcpRoute => "TCPRoute",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::Node => "Node",
            Self::Secret => "Secret",
        }
    }

    /// API group, empty for the core group.
    pub const fn group(self) -> &'static str {
        match self {
            Self::Namespace
            | Self::ServiceAccount
            | Self::Pod
            | Self::Service
            | Self::ConfigMap
            | Self::Node
            | Self::Secret => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::PeerAuthentication | Self::AuthorizationPolicy => "security.istio.io",
            Self::VirtualService
            | Self::DestinationRule
            | Self::Sidecar
            | Self::ServiceEntry
            | Self::WorkloadEntry => "networking.istio.io",
            Self::HttpRoute | Self::GrpcRoute | Self::TlsRoute | Self::TcpRoute | Self::ReferenceGrant => {
                GATEWAY_GROUP
            }
        }
    }

    /// `apiVersion`s that are understood, the preferred one first.
    pub const fn api_versions(self) -> &'static [&'static str] {
        match self {
            Self::Namespace
            | Self::ServiceAccount
            | Self::Pod
            | Self::Service
            | Self::ConfigMap
            | Self::Node
            | Self::Secret => &["v1"],
            Self::EndpointSlice => &["discovery.k8s.io/v1"],
            Self::PeerAuthentication | Self::AuthorizationPolicy => {
                &["security.istio.io/v1", "security.istio.io/v1beta1"]
            }
            Self::VirtualService
            | Self::DestinationRule
            | Self::Sidecar
            | Self::ServiceEntry
            | Self::WorkloadEntry => {
                &["networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3"]
            }
            Self::HttpRoute | Self::GrpcRoute | Self::TlsRoute | Self::TcpRoute | Self::ReferenceGrant => &[
                "gateway.networking.k8s.io/v1",
                "gateway.networking.k8s.io/v1beta1",
                "gateway.networking.k8s.io/v1alpha3",
                "gateway.networking.k8s.io/v1alpha2",
            ],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What makes a resource unique. The namespace of a cluster-wide kind is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// Kind.
    pub kind: Kind,
    /// Namespace and name.
    pub name: Name,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.name.namespace {
            "" => write!(f, "{} {}", self.kind, self.name.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name.name),
        }
    }
}

/// One checked resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    /// A namespace.
    Namespace(Namespace),
    /// A service account.
    ServiceAccount(ServiceAccount),
    /// A pod.
    Pod(Box<Pod>),
    /// A service.
    Service(Box<Service>),
    /// A slice of a service's endpoints.
    EndpointSlice(EndpointSlice),
    /// A mutual TLS policy.
    PeerAuthentication(PeerAuthentication),
    /// A policy of who may talk to whom.
    AuthorizationPolicy(AuthorizationPolicy),
    /// Settings of the mesh.
    MeshConfig(MeshConfig),
    /// Routes of some hosts.
    VirtualService(Box<VirtualService>),
    /// What is said about a destination.
    DestinationRule(Box<DestinationRule>),
    /// What workloads see of the mesh.
    Sidecar(Box<Sidecar>),
    /// A service that Kubernetes does not know.
    ServiceEntry(Box<ServiceEntry>),
    /// A workload that is no pod.
    WorkloadEntry(Box<WorkloadEntry>),
    /// HTTP routes.
    HttpRoute(Box<HttpRoute>),
    /// gRPC routes.
    GrpcRoute(Box<GrpcRoute>),
    /// TLS routes.
    TlsRoute(Box<StreamRoute>),
    /// TCP routes.
    TcpRoute(Box<StreamRoute>),
    /// Permissions to refer to objects of a namespace.
    ReferenceGrant(ReferenceGrant),
    /// A node.
    Node(Node),
    /// A Secret.
    Secret(Box<Secret>),
}

impl Resource {
    /// Its key.
    pub fn key(&self) -> Key {
        let (kind, name) = match self {
            Self::Namespace(namespace) => (Kind::Namespace, Name::new("", Arc::clone(&namespace.name))),
            Self::ServiceAccount(account) => (Kind::ServiceAccount, account.name.clone()),
            Self::Pod(pod) => (Kind::Pod, pod.workload.name.clone()),
            Self::Service(service) => (Kind::Service, service.service.name.clone()),
            Self::EndpointSlice(slice) => (Kind::EndpointSlice, slice.name.clone()),
            Self::PeerAuthentication(policy) => (Kind::PeerAuthentication, policy.name.clone()),
            Self::AuthorizationPolicy(policy) => (Kind::AuthorizationPolicy, policy.name.clone()),
            Self::MeshConfig(config) => (Kind::ConfigMap, config.name.clone()),
            Self::VirtualService(service) => (Kind::VirtualService, service.name.clone()),
            Self::DestinationRule(rule) => (Kind::DestinationRule, rule.name.clone()),
            Self::Sidecar(sidecar) => (Kind::Sidecar, sidecar.name.clone()),
            Self::ServiceEntry(entry) => (Kind::ServiceEntry, entry.name.clone()),
            Self::WorkloadEntry(entry) => (Kind::WorkloadEntry, entry.name.clone()),
            Self::HttpRoute(route) => (Kind::HttpRoute, route.name.clone()),
            Self::GrpcRoute(route) => (Kind::GrpcRoute, route.name.clone()),
            Self::TlsRoute(route) => (Kind::TlsRoute, route.name.clone()),
            Self::TcpRoute(route) => (Kind::TcpRoute, route.name.clone()),
            Self::ReferenceGrant(grant) => (Kind::ReferenceGrant, grant.name.clone()),
            Self::Secret(secret) => (Kind::Secret, secret.name.clone()),
            Self::Node(node) => (Kind::Node, Name::new("", Arc::clone(&node.name))),
        };
        Key { kind, name }
    }
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Name.
    pub name: Arc<str>,
    /// Whether its pods are in the mesh, if it says so.
    pub opt_in: Option<bool>,
}

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Name.
    pub name: Name,
}
