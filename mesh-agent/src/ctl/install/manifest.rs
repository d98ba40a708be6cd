//! Owns objects on their way to a cluster: what an API server gets, and the path it is sent to.

use std::fmt;

use k8s_openapi::{
    ClusterResourceScope, Metadata, NamespaceResourceScope, Resource,
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde::Serialize;
use serde_json::Value;

/// A kind of object, as paths of the API name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ObjectKind {
    /// API group, empty for the core group.
    pub(crate) group: &'static str,
    /// Version of the group.
    pub(crate) version: &'static str,
    /// `kind` in manifests.
    pub(crate) kind: &'static str,
    /// Name in paths.
    pub(crate) plural: &'static str,
    /// Whether its objects live in namespaces.
    pub(crate) namespaced: bool,
}

impl ObjectKind {
    /// The kind of objects of one type.
    pub(crate) const fn of<T: Resource<Scope: Scope>>() -> Self {
        Self {
            group: T::GROUP,
            version: T::VERSION,
            kind: T::KIND,
            plural: T::URL_PATH_SEGMENT,
            namespaced: <T::Scope as Scope>::NAMESPACED,
        }
    }
}

/// Where objects of a type live.
pub(crate) trait Scope {
    /// Whether they live in namespaces.
    const NAMESPACED: bool;
}

impl Scope for ClusterResourceScope {
    const NAMESPACED: bool = false;
}

impl Scope for NamespaceResourceScope {
    const NAMESPACED: bool = true;
}

/// One object.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Manifest {
    /// Its kind.
    pub(crate) kind: ObjectKind,
    /// Its namespace, if its kind has them.
    pub(crate) namespace: Option<String>,
    /// Its name.
    pub(crate) name: String,
    /// The whole of it, with `apiVersion` and `kind`.
    pub(crate) object: Value,
}

impl Manifest {
    /// Takes an object.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub(crate) fn of<T>(object: &T) -> Result<Self, serde_json::Error>
    where
        T: Resource<Scope: Scope> + Metadata<Ty = ObjectMeta> + Serialize,
    {
        let meta = object.metadata();
        Ok(Self {
            kind: ObjectKind::of::<T>(),
            namespace: meta.namespace.clone(),
            name: meta.name.clone().unwrap_or_default(),
            object: serde_json::to_value(object)?,
        })
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.namespace {
            Some(namespace) => write!(f, "{} {namespace}/{}", self.kind.kind, self.name),
            None => write!(f, "{} {}", self.kind.kind, self.name),
        }
    }
}
