//! ReferenceGrant: which references into a namespace are allowed.

use std::sync::Arc;

use mesh_core::snapshot::Name;

use super::{
    BackendRef,
    references::{at_most, object_name},
    wire,
};
use crate::{
    problem::Problems,
    resource::metadata::{self, Scope, is_label},
};

/// Most items of `from` and of `to`.
const ITEMS_MAX: usize = 16;

/// A permission to refer to objects of its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReferenceGrant {
    /// Name; the namespace is the one that may be referred to.
    pub name: Name,
    /// Who may.
    pub from: Vec<GrantFrom>,
    /// To what.
    pub to: Vec<GrantTo>,
}

/// Objects of one kind and namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantFrom {
    /// API group.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Namespace.
    pub namespace: Arc<str>,
}

/// Objects of one kind, or one of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantTo {
    /// API group; empty for Kubernetes' own.
    pub group: Arc<str>,
    /// Kind.
    pub kind: Arc<str>,
    /// Name; `None` for all.
    pub name: Option<Arc<str>>,
}

impl ReferenceGrant {
    /// Whether it lets a route of kind `kind` in `namespace` refer to `backend`.
    pub fn allows(&self, kind: &str, namespace: &str, backend: &BackendRef) -> bool {
        let (to_group, to_kind) = backend.group_kind();
        self.name.namespace == backend.name.namespace
            && self.from.iter().any(|from| {
                &*from.group == super::GROUP && &*from.kind == kind && &*from.namespace == namespace
            })
            && self.to.iter().any(|to| {
                &*to.group == to_group
                    && &*to.kind == to_kind
                    && to.name.as_ref().is_none_or(|name| *name == backend.name.name)
            })
    }
}

/// Reads a grant.
pub(crate) fn read(object: &wire::ReferenceGrant, problems: &mut Problems) -> ReferenceGrant {
    let name = metadata::name(&object.metadata, Scope::Namespaced, problems);
    let spec = object.spec.clone().unwrap_or_default();
    let (from, to) = (spec.from.unwrap_or_default(), spec.to.unwrap_or_default());
    for (field, count) in [("spec.from", from.len()), ("spec.to", to.len())] {
        at_most(count, ITEMS_MAX, field, problems);
        if count == 0 {
            problems.error(field, "is empty, wanted at least one item");
        }
    }
    let mut read = ReferenceGrant { name, from: Vec::new(), to: Vec::new() };
    for (at, from) in from.iter().enumerate() {
        let field = format!("spec.from[{at}]");
        let group = given(from.group.as_deref(), &format!("{field}.group"), problems);
        let kind = kind(from.kind.as_deref(), &format!("{field}.kind"), problems);
        let namespace = from.namespace.as_deref().unwrap_or_default();
        if !is_label(namespace) {
            let wanted = "wanted lower-case letters, digits and '-', at most 63";
            problems.error(format!("{field}.namespace"), format!("is {namespace:?}, {wanted}"));
            continue;
        }
        let (Some(group), Some(kind)) = (group, kind) else { continue };
        read.from.push(GrantFrom { group, kind, namespace: namespace.into() });
    }
    for (at, to) in to.iter().enumerate() {
        let field = format!("spec.to[{at}]");
        let group = given(to.group.as_deref(), &format!("{field}.group"), problems);
        let kind = kind(to.kind.as_deref(), &format!("{field}.kind"), problems);
        let name = match to.name.as_deref() {
            None | Some("") => Some(None),
            name => object_name(name, &format!("{field}.name"), problems).map(|name| Some(name.into())),
        };
        let (Some(group), Some(kind), Some(name)) = (group, kind, name) else { continue };
        // Kubernetes' own group is empty; `core` is a name people give it.
        let group = if &*group == "core" { "".into() } else { group };
        read.to.push(GrantTo { group, kind, name });
    }
    read
}

/// A group: must be written, and may be empty.
fn given(text: Option<&str>, field: &str, problems: &mut Problems) -> Option<Arc<str>> {
    if text.is_none() {
        problems.error(field, "is missing; Kubernetes' own group is written \"\"");
    }
    text.map(Into::into)
}

fn kind(text: Option<&str>, field: &str, problems: &mut Problems) -> Option<Arc<str>> {
    let text = text.filter(|text| !text.is_empty());
    if text.is_none() {
        problems.error(field, "is missing");
    }
    text.map(Into::into)
}
