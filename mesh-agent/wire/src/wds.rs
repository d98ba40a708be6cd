//! Snapshots as xDS resources: Istio's WDS types for any client, with facts of our own inside for our agents.
//!
//! [`encoder::Encoder`] turns snapshots into resources, only those that changed; [`assembler::Assembler`] makes the parts of
//! a snapshot of resources again, ours or istiod's. Between our own ends nothing is lost.
//!
//! Invariants:
//! - Decoding is total: whatever arrives, it ends in a value or a [`DecodeError`] that names resource and field.
//! - What a client cannot be told exactly it is told more strictly, never more openly.

pub mod assembler;
pub mod encoder;

mod credential;
mod endpoints;
mod foreign;
mod policy;
mod route;
mod service;
mod value;
mod workload;

use std::fmt;

use crate::CLUSTER;

pub use self::value::Problem;

/// Largest encoded resource that is decoded, in bytes: below what Kubernetes stores of one object.
pub const RESOURCE_BYTES_MAX: usize = 1 << 20;
/// The same for a route, whose JSON is several times its resource.
pub const ROUTE_BYTES_MAX: usize = 8 << 20;
/// Most entries of one list within a resource.
pub const LIST_LEN_MAX: usize = 1 << 16;
/// Longest single text within a resource, in bytes.
pub const TEXT_BYTES_MAX: usize = 64 << 10;

/// The kinds of resources a snapshot becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// `istio.security.Authorization`.
    Authorization,
    /// `istio.workload.Address`: a workload or a service.
    Address,
    /// `nodemesh.v1.Mesh`; one resource, [`MESH_NAME`].
    Mesh,
    /// `nodemesh.v1.Route`: one entry of what connections and requests are routed by.
    Route,
    /// `nodemesh.v1.Credential`, for one node alone.
    Credential,
    /// `nodemesh.v1.NodePod`, for the pod's own node alone.
    NodePod,
}

/// Name of the only resource of [`Kind::Mesh`].
pub const MESH_NAME: &str = "mesh";

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Authorization, Self::Address, Self::Mesh, Self::Route, Self::Credential, Self::NodePod];

    /// The kind as xDS names it.
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Mesh => "type.googleapis.com/nodemesh.v1.Mesh",
            Self::Route => "type.googleapis.com/nodemesh.v1.Route",
            Self::Credential => "type.googleapis.com/nodemesh.v1.Credential",
            Self::NodePod => "type.googleapis.com/nodemesh.v1.NodePod",
        }
    }

    /// The kind of a type URL.
    pub fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Authorization => "Authorization",
            Self::Address => "Address",
            Self::Mesh => "Mesh",
            Self::Route => "Route",
            Self::Credential => "Credential",
            Self::NodePod => "NodePod",
        })
    }
}

/// A resource that cannot be used. The one before it stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {name:?}, {field}: {problem}")]
pub struct DecodeError {
    /// Kind of the resource.
    pub kind: Kind,
    /// Name of the resource, cut when it is very long.
    pub name: String,
    /// The field, e.g. `facts.addresses[0]`; `message` for the whole.
    pub field: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// Name of the extension that carries our facts.
const EXTENSION: &str = "nodemesh.dev/facts";

#[cfg(test)]
mod tests;
