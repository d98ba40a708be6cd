//! Owns every object that an installation consists of, as pure functions of its values.
//!
//! Invariants:
//! - The chart in `deploy/helm/nodemesh` renders the same objects from the same values, but for the namespace, which Helm makes by
//!   itself; a test holds both together.
//! - Every object carries [`INSTALLED`], so that upgrade and uninstall find what earlier versions made and nothing else.

mod access;
mod admission;
mod agent;
mod controller;

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, EnvVar, EnvVarSource, Namespace, ObjectFieldSelector},
    },
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta},
};

pub(crate) use mesh_control::kubernetes::names::{FIELD_MANAGER as MANAGER, ROOTS, ROOTS_KEY};

use super::{manifest::Manifest, values::Values};

/// Name of the controller's objects; agents ask for this account.
pub(crate) const CONTROLLER: &str = mesh_control::link::CONTROLLER_ACCOUNT;
/// Name of the agents' objects; the controller lets no other account be a node.
pub(crate) const AGENT: &str = mesh_control::kubernetes::tokens::AGENT_ACCOUNT;
/// Name of the mesh's configuration, of the webhook and of other objects there is one of.
pub(crate) const MESH: &str = mesh_control::kubernetes::names::MESH_CONFIG;
/// Label of what an installation made, beside what the mesh itself makes later.
pub(crate) const INSTALLED: &str = "nodemesh.dev/installed";
/// Label of all that belongs to the mesh.
pub(crate) const PART_OF: (&str, &str) = ("app.kubernetes.io/part-of", "nodemesh");

/// Kinds of the mesh's own groups that it reads, by group.
const READ_KINDS: [(&str, &[&str]); 3] = [
    (
        "networking.istio.io",
        &["destinationrules", "serviceentries", "sidecars", "virtualservices", "workloadentries"],
    ),
    ("security.istio.io", &["authorizationpolicies", "peerauthentications"]),
    ("gateway.networking.k8s.io", &["grpcroutes", "httproutes", "referencegrants", "tcproutes", "tlsroutes"]),
];

/// Where agents have their sockets.
const RUN_DIR: &str = "/run/nodemesh";
/// Where agents and controllers keep what must outlive them.
const STATE_DIR: &str = "/var/lib/nodemesh";

/// Ports of the controller.
const XDS_PORT: i32 = 15012;
const CONTROLLER_METRICS_PORT: i32 = 15014;
const WEBHOOK_PORT: i32 = 15017;
/// Port of the agents' metrics and probes, on their nodes.
const AGENT_METRICS_PORT: i32 = 15020;

/// All objects but the definitions of kinds, in the order in which they are to be made.
///
/// # Errors
/// An object cannot be written as JSON.
pub(crate) fn all(values: &Values, namespace: &str) -> Result<Vec<Manifest>, ObjectError> {
    let mut all = vec![Manifest::of(&self::namespace(namespace))?];
    all.extend(access::all(namespace, values.controller.read_secrets)?);
    all.push(Manifest::of(&mesh_config(values, namespace)?)?);
    all.extend(controller::all(values, namespace)?);
    all.push(Manifest::of(&agent::daemon_set(values, namespace))?);
    if values.webhook.enabled {
        all.push(Manifest::of(&admission::webhook(values, namespace))?);
    }
    Ok(all)
}

pub(super) use agent::nodes_of;

/// The agents alone.
pub(crate) fn agents(values: &Values, namespace: &str) -> DaemonSet {
    agent::daemon_set(values, namespace)
}

/// The definitions of kinds, to be made where there are none.
///
/// # Errors
/// As [`all`].
pub(crate) fn definitions() -> Result<Vec<Manifest>, ObjectError> {
    let labelled = |mut definition: k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition| {
        definition.metadata.labels = Some(labels(MESH));
        Ok(Manifest::of(&definition)?)
    };
    mesh_control::crd::all().into_iter().map(labelled).collect()
}

/// Why there are no objects.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ObjectError {
    #[error("write an object as JSON")]
    Json(#[from] serde_json::Error),
    #[error("write meshConfig as YAML")]
    Yaml {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Labels of objects of one name.
pub(crate) fn labels(name: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", name),
        PART_OF,
        ("app.kubernetes.io/managed-by", MANAGER),
        ("app.kubernetes.io/version", env!("CARGO_PKG_VERSION")),
        (INSTALLED, "true"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn meta(name: &str, of: &str, namespace: Option<&str>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        namespace: namespace.map(Into::into),
        labels: Some(labels(of)),
        ..Default::default()
    }
}

/// Label selector of all that belongs to the mesh.
pub(crate) fn of_mesh() -> String {
    format!("{}={}", PART_OF.0, PART_OF.1)
}

/// Label selector of objects of one name, e.g. of the agents' pods.
pub(crate) fn named(name: &str) -> String {
    format!("app.kubernetes.io/name={name}")
}

/// Selects the pods of the controller or of the agents.
fn selector(name: &str) -> LabelSelector {
    let labels = [("app.kubernetes.io/name".to_owned(), name.to_owned())];
    LabelSelector { match_labels: Some(labels.into()), ..Default::default() }
}

/// Labels of pods. The mesh's own pods are never in the mesh.
fn pod_labels(name: &str) -> BTreeMap<String, String> {
    let mut labels = labels(name);
    labels.remove(INSTALLED);
    labels.insert("nodemesh.dev/mesh".to_owned(), "disabled".to_owned());
    labels
}

fn namespace(name: &str) -> Namespace {
    let mut meta = meta(name, MESH, None);
    // Agents need paths of the host and capabilities; nothing else runs here.
    let more = [("nodemesh.dev/mesh", "disabled"), ("pod-security.kubernetes.io/enforce", "privileged")];
    if let Some(labels) = &mut meta.labels {
        labels.extend(more.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }
    Namespace { metadata: meta, ..Default::default() }
}

fn mesh_config(values: &Values, namespace: &str) -> Result<ConfigMap, ObjectError> {
    let text = serde_saphyr::to_string(&values.mesh_config)
        .map_err(|source| ObjectError::Yaml { source: Box::new(source) })?;
    Ok(ConfigMap {
        metadata: meta(MESH, MESH, Some(namespace)),
        data: Some([("mesh".to_owned(), text)].into()),
        ..Default::default()
    })
}

/// A variable with a value.
fn variable(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), ..Default::default() }
}

/// A variable with a field of the pod.
fn field(name: &str, path: &str) -> EnvVar {
    let field = ObjectFieldSelector { field_path: path.to_owned(), ..Default::default() };
    let source = EnvVarSource { field_ref: Some(field), ..Default::default() };
    EnvVar { name: name.to_owned(), value_from: Some(source), ..Default::default() }
}

/// A map, or nothing when it is empty.
fn unless_empty<K, V>(map: &BTreeMap<K, V>) -> Option<BTreeMap<K, V>>
where
    K: Clone + Ord,
    V: Clone,
{
    (!map.is_empty()).then(|| map.clone())
}

/// A list, or nothing when it is empty.
fn unless_none<T: Clone>(list: &[T]) -> Option<Vec<T>> {
    (!list.is_empty()).then(|| list.to_vec())
}

#[cfg(test)]
mod tests;
