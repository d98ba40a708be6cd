//! Owns `status.parents` of the Gateway API's routes (S116).

use k8s_openapi::jiff::Timestamp;
use mesh_core::snapshot::Name;
use serde_json::{Value, json};

use super::{CONTROLLER_NAME, condition, message};
use crate::{
    problem::Level,
    resource::{ParentKind, is_mesh_parent},
    source::kubernetes::{ParentVerdict, Told, Verdict},
};

/// `status.parents`: ours anew, and what other controllers said of theirs.
pub(super) fn parents(told: &Told, verdict: &Verdict, now: Timestamp) -> Value {
    let before = told.status.get("parents").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let is_ours = |parent: &&Value| parent.get("controllerName") == Some(&CONTROLLER_NAME.into());
    let mut parents: Vec<Value> = before.iter().filter(|parent| !is_ours(parent)).cloned().collect();
    for reference in told.parents.as_array().into_iter().flatten().filter(|reference| is_mesh_parent(reference)) {
        let said = before.iter().filter(is_ours).find(|parent| parent.get("parentRef") == Some(reference));
        let said = said.and_then(|parent| parent.get("conditions")?.as_array()).map(Vec::as_slice);
        let conditions = conditions(told, verdict, reference, said.unwrap_or_default(), now);
        parents.push(json!({
            "parentRef": reference,
            "controllerName": CONTROLLER_NAME,
            "conditions": conditions,
        }));
    }
    parents.into()
}

fn conditions(
    told: &Told,
    verdict: &Verdict,
    reference: &Value,
    before: &[Value],
    now: Timestamp,
) -> Vec<Value> {
    let make = |kind: &str, holds: bool, reason: &str, message: &str| {
        condition(before, kind, holds, reason, message, told.generation, now)
    };
    if verdict.is_refused() && !verdict.in_force {
        let why = message(verdict, Level::Error);
        return vec![
            make("Accepted", false, "UnsupportedValue", &why),
            make("ResolvedRefs", true, "ResolvedRefs", "not looked at: the route cannot be used"),
        ];
    }
    let at = verdict.parents.iter().find(|at| is_named(at, reference));
    let mut conditions = vec![match at.and_then(|at| at.not_accepted.as_ref()) {
        Some((reason, why)) => make("Accepted", false, reason, why),
        None => make("Accepted", true, "Accepted", "the route is in force here"),
    }];
    conditions.push(match at.and_then(|at| at.unresolved.as_ref()) {
        Some((reason, why)) => make("ResolvedRefs", false, reason, why),
        None => make("ResolvedRefs", true, "ResolvedRefs", "every reference leads somewhere"),
    });
    if verdict.is_refused() {
        // The beginnings are the API's own words for the two ways to go on.
        let why = format!(
            "Fall Back: the last state that could be used is in force; {}",
            message(verdict, Level::Error)
        );
        conditions.push(make("PartiallyInvalid", true, "UnsupportedValue", &why));
    } else if let Some(what) = at.and_then(|at| at.partial.as_ref()) {
        conditions.push(make("PartiallyInvalid", true, "UnsupportedValue", &format!("Dropped Rule: {what}")));
    }
    conditions
}

/// Whether a verdict is about a reference as it is written.
fn is_named(at: &ParentVerdict, reference: &Value) -> bool {
    let text = |field: &str| reference.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
    let kind = match at.parent.kind {
        ParentKind::Service => "Service",
        ParentKind::ServiceEntry => "ServiceEntry",
        ParentKind::Gateway | ParentKind::Other(_) => return false,
    };
    let Name { name, namespace } = &at.parent.name;
    text("kind") == Some(kind)
        && text("name") == Some(&**name)
        && text("namespace").is_none_or(|written| *written == **namespace)
        && text("sectionName") == at.parent.section.as_deref()
        && reference.get("port").and_then(Value::as_u64) == at.parent.port.map(u64::from)
}
