//! Tells users what became of their resources: conditions in their status, and an Event for each thing that is wrong. For the leader alone.
//!
//! Invariants:
//! - A status is written only when it says something else than before; what others wrote into it stays.
//! - Writing is bounded in rate, and a status that the API server does not keep as it was written is not written again and again.

mod events;
mod gateway_api;
mod istio;

use std::{collections::HashMap, sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{
    Api, Client,
    api::{DynamicObject, Patch, PatchParams},
};
use serde_json::{Map, Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use self::events::Announcer;
use super::names::{FIELD_MANAGER, is_absent, is_conflict};
use crate::{
    problem::{Level, joined, said},
    resource::{GATEWAY_GROUP, Key},
    source::kubernetes::{Judged, Told, Verdict, api_resource},
};

/// Who we are in statuses of the Gateway API.
pub const CONTROLLER_NAME: &str = "nodemesh.dev/gateway-controller";
/// Pause between two writes: at most fifty a second.
const PAUSE: Duration = Duration::from_millis(20);
/// A write that failed is tried again after this.
const RETRY: Duration = Duration::from_secs(5);
/// The same status is written to the same object again only after this.
const AGAIN: Duration = Duration::from_secs(300);
/// Longest message, in bytes: Kubernetes allows 32 KiB in a condition and 1 KiB in an Event.
const MESSAGE_BYTES_MAX: usize = 1000;

/// What was written last.
#[derive(Debug)]
struct Written {
    status: Value,
    again_at: Instant,
}

/// Writes what is judged, for ever.
pub async fn write(client: Client, mut judged: watch::Receiver<Arc<Judged>>) {
    let mut writer = Writer { announcer: Announcer::new(client.clone()), client, written: HashMap::new() };
    loop {
        let now = Arc::clone(&judged.borrow_and_update());
        let failed = writer.pass(&now, &judged).await;
        let retry_at = Instant::now() + RETRY;
        tokio::select! {
            changed = judged.changed() => if changed.is_err() { return },
            () = sleep_until(retry_at), if failed => {}
        }
    }
}

struct Writer {
    client: Client,
    announcer: Announcer,
    /// By uid.
    written: HashMap<Arc<str>, Written>,
}

impl Writer {
    /// Writes what differs. Returns whether something is left to do; begins anew as soon as there is something newer.
    async fn pass(&mut self, judged: &Judged, newer: &watch::Receiver<Arc<Judged>>) -> bool {
        let mut failed = false;
        if self.written.len().max(self.announcer.len()) > 2 * judged.objects.len() + 100 {
            let alive: std::collections::HashSet<&str> =
                judged.objects.values().map(|(told, _)| &*told.uid).collect();
            self.written.retain(|uid, _| alive.contains(&**uid));
            self.announcer.keep_only(&alive);
        }
        for (key, (told, verdict)) in &judged.objects {
            if newer.has_changed().unwrap_or(false) {
                return failed;
            }
            let status = desired(key, told, verdict, Timestamp::now());
            failed |= !self.announcer.tell(key, told, verdict, status.is_none()).await;
            let Some(status) = status else { continue };
            let is_again = self.written.get(&told.uid).is_some_and(|written| {
                is_same(&written.status, &status) && Instant::now() < written.again_at
            });
            if is_again {
                continue;
            }
            match self.patch(key, told, &status).await {
                // A kind without the subresource, or an object that went meanwhile.
                Err(error) if !is_absent(&error) && !is_conflict(&error) => {
                    failed = true;
                    tracing::warn!(%key, %error, "write a status");
                }
                // Whatever changed it brings the newer one.
                Err(error) if is_conflict(&error) => {}
                Ok(()) | Err(_) => {
                    self.written
                        .insert(Arc::clone(&told.uid), Written { status, again_at: Instant::now() + AGAIN });
                }
            }
            sleep(PAUSE).await;
        }
        failed
    }

    async fn patch(&self, key: &Key, told: &Told, status: &Value) -> Result<(), kube::Error> {
        let resource = api_resource(key.kind, &told.api_version);
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &key.name.namespace, &resource);
        // With the version that was judged: a status about another generation is nobody's.
        let patch = json!({"metadata": {"resourceVersion": &*told.resource_version}, "status": status});
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        api.patch_status(&key.name.name, &params, &Patch::Merge(&patch)).await.map(|_| ())
    }
}

/// What the status should say; `None` if it says that already.
fn desired(key: &Key, told: &Told, verdict: &Verdict, now: Timestamp) -> Option<Value> {
    let mut status = Map::new();
    if key.kind.group() == GATEWAY_GROUP {
        let parents = gateway_api::parents(&key.name.namespace, told, verdict, now);
        status.insert("parents".to_owned(), parents);
    } else {
        status = istio::status(told, verdict, now);
    }
    let is_said = status.iter().all(|(field, value)| match told.status.get(field) {
        Some(said) => is_same(said, value),
        None => is_empty(value),
    });
    (!is_said).then_some(Value::Object(status))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Whether two statuses say the same, whenever they said it.
fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let keys = |of: &Map<String, Value>| of.keys().filter(|key| !is_time(key)).count();
            keys(one) == keys(other)
                && one
                    .iter()
                    .filter(|(key, _)| !is_time(key))
                    .all(|(key, value)| other.get(key).is_some_and(|there| is_same(value, there)))
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| is_same(one, other))
        }
        // Istio's observedGeneration is a number, or one in quotes.
        (Value::Number(number), Value::String(text)) | (Value::String(text), Value::Number(number)) => {
            number.to_string() == *text
        }
        _ => one == other,
    }
}

fn is_time(key: &str) -> bool {
    matches!(key, "lastTransitionTime" | "lastProbeTime")
}

/// A condition. The time is that of `before` if it said the same.
fn condition(
    before: &[Value],
    kind: &str,
    holds: bool,
    reason: &str,
    message: &str,
    generation: i64,
    now: Timestamp,
) -> Value {
    let holds = if holds { "True" } else { "False" };
    let same =
        before.iter().find(|c| c.get("type") == Some(&kind.into()) && c.get("status") == Some(&holds.into()));
    let since = same.and_then(|c| c.get("lastTransitionTime")).and_then(Value::as_str).map(str::to_owned);
    json!({
        "type": kind,
        "status": holds,
        "reason": reason,
        "message": message,
        "observedGeneration": generation,
        "lastTransitionTime": since.unwrap_or_else(|| seconds(now)),
    })
}

/// As Kubernetes writes times: whole seconds.
fn seconds(now: Timestamp) -> String {
    Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}

/// The problems of a level in one text, bounded.
fn message(verdict: &Verdict, level: Level) -> String {
    let of_level = verdict.problems.iter().filter(|problem| problem.level == level);
    let problems: Vec<String> = of_level.map(|problem| said(&problem.field, &problem.message)).collect();
    joined(&problems, MESSAGE_BYTES_MAX)
}

#[cfg(test)]
mod tests;
