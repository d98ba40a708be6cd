//! Owns whose a route is, by its parents as they are written: a cluster may have routes that other controllers carry out.
//!
//! Invariants:
//! - What is for others to judge is neither refused nor complained about.
//! - A parent that was meant for the mesh and is not quite right is the mesh's: who wrote it wants to be told.

use serde_json::Value;

use super::{GROUP, ISTIO_GROUP};
use crate::{
    problem::{Level, SourceError},
    resource::Kind,
};

/// Whose an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The mesh's; a route's that has a parent of it, whatever others it has.
    Mesh,
    /// A route of other controllers alone.
    Others,
    /// A route that is attached to nothing.
    Nobody,
}

/// Whose an object is, and which of its fields are others' all the same.
#[derive(Debug)]
pub(crate) struct Ownership {
    owner: Owner,
    of_others: Vec<String>,
}

impl Ownership {
    /// Of an object as an API server holds it. One that is no route of the Gateway API is the mesh's.
    pub(crate) fn of(object: &Value) -> Self {
        let mut found = Self { owner: Owner::Mesh, of_others: Vec::new() };
        if !is_route(object) {
            return found;
        }
        let all_gateways = object.pointer("/spec/useDefaultGateways").and_then(Value::as_str) == Some("All");
        if all_gateways {
            found.of_others.push("spec.useDefaultGateways".to_owned());
        }
        let parents = match object.pointer("/spec/parentRefs") {
            None | Some(Value::Null) => &[],
            Some(Value::Array(parents)) => &parents[..],
            // What that is, the reader says.
            Some(_) => return found,
        };
        for (at, _) in parents.iter().enumerate().filter(|(_, parent)| is_of_others(parent)) {
            found.of_others.push(format!("spec.parentRefs[{at}]"));
        }
        found.owner = match found.of_others.len() {
            0 if parents.is_empty() => Owner::Nobody,
            others if others == parents.len() + usize::from(all_gateways) => Owner::Others,
            _ => Owner::Mesh,
        };
        found
    }

    /// Whose it is.
    pub(crate) fn owner(&self) -> Owner {
        self.owner
    }

    /// Takes out of what is wrong with the object what is for others to say. Nobody's route is in nobody's way: nothing about it is an
    /// error.
    pub(crate) fn leave_to_others(&self, problems: &mut Vec<SourceError>) {
        match self.owner {
            Owner::Others => problems.clear(),
            Owner::Nobody => problems.iter_mut().for_each(|problem| problem.level = Level::Warning),
            Owner::Mesh => problems
                .retain(|problem| problem.level == Level::Error || !self.of_others.contains(&problem.field)),
        }
    }
}

/// Whether an object is a route that other controllers alone carry out.
pub fn is_for_others(object: &Value) -> bool {
    Ownership::of(object).owner == Owner::Others
}

/// Whether a parent is one that routes of the mesh have.
pub(crate) fn is_mesh_parent(reference: &Value) -> bool {
    let text = |field: &str| reference.get(field).and_then(Value::as_str);
    matches!(
        (text("group"), text("kind")),
        (Some("" | "core"), Some("Service")) | (Some(ISTIO_GROUP), Some("ServiceEntry"))
    )
}

fn is_route(object: &Value) -> bool {
    let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or_default();
    let group = text("apiVersion").rsplit_once('/').map_or("", |(group, _)| group);
    let routes = [Kind::HttpRoute, Kind::GrpcRoute, Kind::TlsRoute, Kind::TcpRoute];
    group == GROUP && routes.iter().any(|kind| kind.as_str() == text("kind"))
}

/// Whether a parent is certainly not the mesh's, nor meant to be.
fn is_of_others(reference: &Value) -> bool {
    let text = |field: &str, default| match reference.get(field) {
        None | Some(Value::Null) => Some(default),
        Some(value) => value.as_str(),
    };
    let (Some(group), Some(kind)) = (text("group", GROUP), text("kind", "Gateway")) else { return false };
    match kind {
        "" | "ServiceEntry" => false,
        // A common slip: the default group is the Gateway API's own.
        "Service" => group.contains('.') && group != GROUP,
        _ => reference.is_object(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn route(spec: Value) -> Value {
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": "r"}, "spec": spec})
    }

    fn owner(parents: Value) -> Owner {
        Ownership::of(&route(json!({"parentRefs": parents}))).owner()
    }

    #[test]
    fn a_route_is_others_if_none_of_its_parents_is_or_was_meant_to_be_the_meshs() {
        let service = json!({"group": "", "kind": "Service", "name": "web"});
        let gateway = json!({"name": "edge"});
        for (parents, wanted) in [
            (json!([service]), Owner::Mesh),
            (json!([gateway, service]), Owner::Mesh),
            (json!([{"group": "networking.istio.io", "kind": "ServiceEntry", "name": "api"}]), Owner::Mesh),
            // Slips that the author is told of.
            (json!([{"kind": "Service", "name": "web"}]), Owner::Mesh),
            (json!([{"group": "v1", "kind": "Service", "name": "web"}]), Owner::Mesh),
            (json!([{"kind": "ServiceEntry", "name": "api"}]), Owner::Mesh),
            (json!([{"kind": "", "name": "web"}]), Owner::Mesh),
            (json!([{"kind": 7, "name": "web"}]), Owner::Mesh),
            (json!(["web"]), Owner::Mesh),
            (json!("web"), Owner::Mesh),
            (json!([gateway]), Owner::Others),
            (json!([{"group": null, "kind": null, "name": "edge"}]), Owner::Others),
            (json!([{"kind": "ListenerSet", "name": "edge"}, gateway]), Owner::Others),
            (json!([{"group": "serving.knative.dev", "kind": "Service", "name": "web"}]), Owner::Others),
            (json!([]), Owner::Nobody),
            (json!(null), Owner::Nobody),
        ] {
            assert_eq!(owner(parents.clone()), wanted, "{parents}");
        }
        let defaults = |parents: Value| {
            Ownership::of(&route(json!({"parentRefs": parents, "useDefaultGateways": "All"}))).owner()
        };
        assert_eq!((defaults(json!([])), defaults(json!([gateway]))), (Owner::Others, Owner::Others));
        assert_eq!(defaults(json!([service])), Owner::Mesh);
    }

    #[test]
    fn other_kinds_have_no_parents() {
        let mut object = route(json!({"parentRefs": [{"name": "edge"}]}));
        for (field, other) in [("kind", "ReferenceGrant"), ("apiVersion", "networking.istio.io/v1")] {
            let before = object[field].clone();
            object[field] = json!(other);
            assert_eq!(Ownership::of(&object).owner(), Owner::Mesh, "{other}");
            object[field] = before;
        }
        assert!(is_for_others(&object));
    }
}
