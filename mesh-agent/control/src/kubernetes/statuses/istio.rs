//! Owns the status of Istio's kinds.

use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::{condition, message};
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
    let messages = verdict.problems.iter().take(MESSAGES_MAX).map(|problem| {
        let (level, name, code) = match problem.level {
            Level::Error => ("ERROR", "Invalid", "NM0001"),
            Level::Warning => ("WARNING", "NoEffect", "NM0002"),
        };
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
