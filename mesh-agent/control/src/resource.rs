//! Resources as the mesh uses them: checked, and reduced to what is needed.
//!
//! Invariants:
//! - Made from Kubernetes' own types by one checked conversion per kind, whatever the source is; nothing downstream
//!   parses or checks again.
//! - A few hundred bytes each: the agent holds every resource of the mesh.

mod authorization_policy;
mod endpoint_slice;
mod mesh_config;
mod metadata;
mod peer_authentication;
mod pod;
mod service;

use std::{collections::BTreeMap, fmt, sync::Arc};

use mesh_core::snapshot::Name;

pub(crate) use self::{
    authorization_policy::{read as authorization_policy, wire as authorization_wire},
    endpoint_slice::read as endpoint_slice,
    mesh_config::{CONFIG_MAP, read as mesh_config},
    metadata::{Scope, namespace, service_account},
    peer_authentication::{read as peer_authentication, wire},
    pod::read as pod,
    service::read as service,
};
pub use self::{
    authorization_policy::{Applied, AuthorizationPolicy},
    endpoint_slice::{EndpointSlice, SliceEndpoint, SlicePort},
    mesh_config::MeshConfig,
    peer_authentication::PeerAuthentication,
    pod::{ContainerPort, Pod},
    service::{Service, TargetPort},
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
        }
    }

    /// API group, empty for the core group.
    pub const fn group(self) -> &'static str {
        match self {
            Self::Namespace | Self::ServiceAccount | Self::Pod | Self::Service | Self::ConfigMap => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::PeerAuthentication | Self::AuthorizationPolicy => "security.istio.io",
        }
    }

    /// `apiVersion`s that are understood, the preferred one first.
    pub const fn api_versions(self) -> &'static [&'static str] {
        match self {
            Self::Namespace | Self::ServiceAccount | Self::Pod | Self::Service | Self::ConfigMap => &["v1"],
            Self::EndpointSlice => &["discovery.k8s.io/v1"],
            Self::PeerAuthentication | Self::AuthorizationPolicy => &["security.istio.io/v1", "security.istio.io/v1beta1"],
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
