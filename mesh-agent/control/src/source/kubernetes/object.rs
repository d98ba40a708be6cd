//! From an object as the API server has it to a checked resource. Pure.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use kube::api::{ApiResource, GroupVersionKind};
use mesh_core::snapshot::Name;
use serde_json::Value;

use super::verdict::Verdict;
use crate::{
    index::API_SERVER,
    problem::{Problem, SourceError},
    resource::{Key, Kind, Owner, Ownership, Resource},
    source::document::{self, Rules, UNKNOWN_FIELD, UnknownFields},
};

/// An annotation that repeats the whole object.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// What the mesh reads of an object.
#[derive(Debug)]
pub struct Object {
    /// Which one.
    pub(crate) key: Key,
    /// `metadata.generation`; 0 for kinds without.
    pub(crate) generation: i64,
    /// The resource, if it can be used.
    pub(crate) resource: Option<Arc<Resource>>,
    /// Whose it is. What is not the mesh's has no good state that could stay in force.
    pub(crate) owner: Owner,
    /// What is wrong with it.
    pub(crate) problems: Vec<SourceError>,
    /// For kinds whose users are told what became of their resources.
    pub(crate) told: Option<Told>,
}

/// What is needed to tell users about an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// `apiVersion` it was read in.
    pub api_version: Arc<str>,
    /// `metadata.uid`.
    pub uid: Arc<str>,
    /// `metadata.resourceVersion`.
    pub resource_version: Arc<str>,
    /// `metadata.generation`.
    pub generation: i64,
    /// `status` as it is now.
    pub status: Arc<Value>,
    /// `spec.parentRefs` of a route, as written.
    pub parents: Arc<Value>,
    /// What is wrong with the object by itself.
    pub problems: Arc<[Problem]>,
}

/// All objects whose users are told what became of them, after a batch of changes.
#[derive(Clone, Debug, Default)]
pub struct Judged {
    /// By kind, namespace and name: the object, and what became of it.
    pub objects: BTreeMap<Key, (Told, Verdict)>,
}

/// Kinds whose status is ours to write.
pub(crate) fn is_judged(kind: Kind) -> bool {
    kind.group().ends_with(".istio.io")
        || (kind.group() == crate::resource::GATEWAY_GROUP && kind != Kind::ReferenceGrant)
}

/// Kinds of which the metadata say all that the mesh reads. Of nodes that is on purpose: a kubelet that is silent for a while must not
/// take its pods out of the mesh, and one that says that it lives is no news.
pub(super) fn is_metadata_enough(kind: Kind) -> bool {
    matches!(kind, Kind::Namespace | Kind::Node | Kind::ServiceAccount)
}

/// How objects of a kind are asked for in one of its versions.
pub(crate) fn api_resource(kind: Kind, api_version: &str) -> ApiResource {
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind.as_str()))
}

/// The key of an object.
pub(super) fn key_of(kind: Kind, metadata: &Value) -> Key {
    let text = |field: &str| metadata.get(field).and_then(Value::as_str).unwrap_or_default();
    let namespace = if is_cluster_wide(kind) { "" } else { text("namespace") };
    Key { kind, name: Name::new(namespace, text("name")) }
}

/// Kinds that live in no namespace.
fn is_cluster_wide(kind: Kind) -> bool {
    matches!(kind, Kind::Namespace | Kind::Node)
}

/// Reads an object. `None` for one that is not the mesh's business.
pub(crate) fn read(kind: Kind, api_version: &str, mut object: Value, rules: &Rules) -> Option<Object> {
    if let Some(fields) = object.as_object_mut() {
        // Items of a list leave both out.
        fields.insert("apiVersion".to_owned(), api_version.into());
        fields.insert("kind".to_owned(), kind.as_str().into());
    }
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
        }
    }
    let metadata = object.get("metadata")?;
    let key = key_of(kind, metadata);
    let generation = metadata.get("generation").and_then(Value::as_i64).unwrap_or(0);
    let text = |field: &str| metadata.get(field).and_then(Value::as_str).unwrap_or_default().into();
    let told = is_judged(kind).then(|| Told {
        api_version: api_version.into(),
        uid: text("uid"),
        resource_version: text("resourceVersion"),
        generation,
        status: Arc::new(object.get("status").cloned().unwrap_or_default()),
        parents: Arc::new(object.pointer("/spec/parentRefs").cloned().unwrap_or_default()),
        problems: Arc::default(),
    });
    // What the API server let through of its own kinds is a field of theirs, only newer than what we know.
    let unknown = if is_judged(kind) { UnknownFields::Warn } else { UnknownFields::Ignore };
    let ownership = Ownership::of(&object);
    let parsed = document::read_object(Path::new(API_SERVER), object, rules, unknown);
    if !parsed.ignored.is_empty() {
        return None;
    }
    let mut problems = parsed.problems;
    ownership.leave_to_others(&mut problems);
    // The same of what one of them holds as text.
    problems.retain(|problem| is_judged(kind) || problem.message != UNKNOWN_FIELD);
    for problem in &mut problems {
        problem.document = None;
    }
    let told = told.map(|told| Told { problems: problems.iter().map(problem_of).collect(), ..told });
    let resource = parsed.resources.into_iter().next().map(|(_, resource)| resource);
    Some(Object { key, generation, resource, owner: ownership.owner(), problems, told })
}

fn problem_of(error: &SourceError) -> Problem {
    Problem { level: error.level, field: error.field.clone(), message: error.message.clone() }
}
