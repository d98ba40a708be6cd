//! Owns the status of Istio's kinds.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{
    condition,
    events::{INVALID, NO_EFFECT, NOT_FOUND},
    message,
};
use crate::{
    problem::{Level, said},
    source::kubernetes::{Told, Verdict},
};

/// Condition that says whether the resource is in force as it is.
const RECONCILED: &str = "Reconciled";
/// Messages that are written.
const MESSAGES_MAX: usize = 16;

/// Our fields of the status; conditions of other types stay.
pub(super) fn status(told: &Told, verdict: &Verdict, now: Timestamp) -> Map<String, Value> {
    let before =
        told.status.get("conditions").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut conditions: Vec<Value> =
        before.iter().filter(|c| c.get("type") != Some(&RECONCILED.into())).cloned().collect();
    let refused = verdict.is_refused();
    let (reason, text) = match (refused, verdict.in_force) {
        (false, _) => ("Accepted", "the resource is in force".to_owned()),
        (true, true) => (
            "Invalid",
            format!("the last state that could be used is in force; {}", message(verdict, Level::Error)),
        ),
        (true, false) => ("Invalid", message(verdict, Level::Error)),
    };
    conditions.push(condition(before, RECONCILED, !refused, reason, &text, told.generation, now));
    let problems = verdict.problems.iter().map(|problem| match problem.level {
        Level::Error => (("ERROR", INVALID, "NM0001"), problem),
        Level::Warning => (("WARNING", NO_EFFECT, "NM0002"), problem),
    });
    let missing = verdict.missing.iter().map(|problem| (("WARNING", NOT_FOUND, "NM0003"), problem));
    let messages = problems.chain(missing).take(MESSAGES_MAX).map(|((level, name, code), problem)| {
        json!({"type": {"name": name, "code": code}, "level": level, "message": said(&problem.field, &problem.message)})
    });
    let mut status = Map::from_iter([
        ("conditions".to_owned(), conditions.into()),
        ("validationMessages".to_owned(), messages.collect()),
        ("observedGeneration".to_owned(), told.generation.into()),
    ]);
    if !verdict.addresses.is_empty() {
        let addresses =
            verdict.addresses.iter().map(|(host, addr)| json!({"value": addr.to_string(), "host": &**host}));
        status.insert("addresses".to_owned(), addresses.collect());
    }
    status
}
