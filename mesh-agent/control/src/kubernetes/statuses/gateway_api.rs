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

/// `status.parents`: ours anew, and what other controllers said of theirs. `namespace` is the route's own.
pub(super) fn parents(namespace: &str, told: &Told, verdict: &Verdict, now: Timestamp) -> Value {
    let before = told.status.get("parents").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let is_ours = |parent: &&Value| parent.get("controllerName") == Some(&CONTROLLER_NAME.into());
    let mut parents: Vec<Value> = before.iter().filter(|parent| !is_ours(parent)).cloned().collect();
    for reference in
        told.parents.as_array().into_iter().flatten().filter(|reference| is_mesh_parent(reference))
    {
        let said = before.iter().filter(is_ours).find(|parent| parent.get("parentRef") == Some(reference));
        let said = said.and_then(|parent| parent.get("conditions")?.as_array()).map(Vec::as_slice);
        let at = verdict.parents.iter().find(|at| is_named(at, reference, namespace));
        let conditions = conditions(told, verdict, at, said.unwrap_or_default(), now);
        parents.push(json!({
            "parentRef": reference,
            "controllerName": CONTROLLER_NAME,
            "conditions": conditions,
        }));
    }
    parents.into()
}

/// Conditions of one parent. `at` is what became of the route there.
fn conditions(
    told: &Told,
    verdict: &Verdict,
    at: Option<&ParentVerdict>,
    before: &[Value],
    now: Timestamp,
) -> Vec<Value> {
    let make = |kind: &str, holds: bool, reason: &str, message: &str, generation: i64| {
        condition(before, kind, holds, reason, message, generation, now)
    };
    let latest = told.generation;
    let is_refused = verdict.is_refused();
    // What it said before may have had another parent, or none that took it.
    let is_in_force = |at: &&ParentVerdict| !is_refused || (verdict.in_force && at.not_accepted.is_none());
    let Some(at) = at.filter(is_in_force) else {
        let why = match message(verdict, Level::Error) {
            why if why.is_empty() => "the reference cannot be used".to_owned(),
            why => why,
        };
        return vec![
            make("Accepted", false, "UnsupportedValue", &why, latest),
            make("ResolvedRefs", true, "ResolvedRefs", "not looked at: the route cannot be used", latest),
        ];
    };
    // Both are about what is in force.
    let good = if is_refused { verdict.good_generation.unwrap_or(latest) } else { latest };
    let mut conditions = vec![
        match &at.not_accepted {
            Some((reason, why)) => make("Accepted", false, reason, why, good),
            None => make("Accepted", true, "Accepted", &accepted(verdict), good),
        },
        match &at.unresolved {
            Some((reason, why)) => make("ResolvedRefs", false, reason, why, good),
            None => make("ResolvedRefs", true, "ResolvedRefs", "every reference leads somewhere", good),
        },
    ];
    if at.not_accepted.is_some() {
        return conditions;
    }
    // The beginnings are the API's own words for the two ways to go on.
    if is_refused {
        let why = format!(
            "Fall Back: the last state that could be used is in force; {}",
            message(verdict, Level::Error)
        );
        conditions.push(make("PartiallyInvalid", true, "UnsupportedValue", &why, latest));
    } else if let Some(what) = &at.partial {
        let why = format!("Dropped Rule: {what}");
        conditions.push(make("PartiallyInvalid", true, "UnsupportedValue", &why, latest));
    }
    conditions
}

/// That it is in force, and what of it has no effect all the same.
fn accepted(verdict: &Verdict) -> String {
    let is_new = !verdict.is_refused();
    match message(verdict, Level::Warning) {
        noted if is_new && !noted.is_empty() => format!("the route is in force here; {noted}"),
        _ => "the route is in force here".to_owned(),
    }
}

/// Whether a verdict is about a reference as it is written in a route of a namespace.
fn is_named(at: &ParentVerdict, reference: &Value, namespace: &str) -> bool {
    let text = |field: &str| reference.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
    let kind = match at.parent.kind {
        ParentKind::Service => "Service",
        ParentKind::ServiceEntry => "ServiceEntry",
        ParentKind::Gateway | ParentKind::Other(_) => return false,
    };
    let Name { name, namespace: of } = &at.parent.name;
    text("kind") == Some(kind)
        && text("name") == Some(&**name)
        && text("namespace").unwrap_or(namespace) == &**of
        && text("sectionName") == at.parent.section.as_deref()
        && reference.get("port").and_then(Value::as_u64) == at.parent.port.map(u64::from)
}
