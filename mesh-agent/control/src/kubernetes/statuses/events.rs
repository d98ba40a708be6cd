//! Owns the Events: each complaint about a resource is told once.
//!
//! Invariants:
//! - A complaint is told when it is new, or when it is still true of a resource that was changed; never because somebody looked again.
//! - What a resource's status says already was told by whoever wrote it: a controller that starts, or begins to lead, repeats nothing.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Client,
    runtime::events::{Event, EventType, Recorder, Reporter},
};
use tokio::time::sleep;

use super::{MESSAGE_BYTES_MAX, PAUSE, message};
use crate::{
    problem::{Level, joined, said},
    resource::{Key, ParentKind},
    source::kubernetes::{Told, Verdict},
};

/// Reason: it cannot be used as it is.
pub(super) const INVALID: &str = "Invalid";
/// Reason: something of it has no effect.
pub(super) const NO_EFFECT: &str = "NoEffect";
/// Reason: what a rule refers to is not there.
pub(super) const NOT_FOUND: &str = "ReferencedResourceNotFound";
/// Reason: a rule of a route is left out.
const PARTIALLY_INVALID: &str = "PartiallyInvalid";

/// Something that is wrong with a resource, as an Event has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Complaint {
    reason: &'static str,
    /// What was being done when it was found.
    action: &'static str,
    note: String,
}

/// Everything that is wrong with a resource. Pure.
pub(super) fn complaints(verdict: &Verdict) -> BTreeSet<Complaint> {
    let mut all = BTreeSet::new();
    let mut add = |reason: &'static str, action: &'static str, note: String| {
        if !note.is_empty() {
            all.insert(Complaint { reason, action, note });
        }
    };
    add(INVALID, "Validate", message(verdict, Level::Error));
    add(NO_EFFECT, "Validate", message(verdict, Level::Warning));
    let missing: Vec<String> =
        verdict.missing.iter().map(|problem| said(&problem.field, &problem.message)).collect();
    add(NOT_FOUND, "ResolveReferences", joined(&missing, MESSAGE_BYTES_MAX));
    let bounded = |text: &str| joined(&[text.to_owned()], MESSAGE_BYTES_MAX);
    // Of parents only those that routes of the mesh have, as in the status.
    let is_ours = |kind: &ParentKind| matches!(kind, ParentKind::Service | ParentKind::ServiceEntry);
    for at in verdict.parents.iter().filter(|at| is_ours(&at.parent.kind)) {
        if let Some((reason, why)) = &at.not_accepted {
            add(reason, "Attach", bounded(why));
        }
        if let Some((reason, why)) = &at.unresolved {
            add(reason, "ResolveReferences", bounded(why));
        }
        if let Some(what) = &at.partial {
            add(PARTIALLY_INVALID, "Validate", bounded(what));
        }
    }
    all
}

/// What was told of one resource.
#[derive(Debug)]
struct Heard {
    generation: i64,
    complaints: BTreeSet<Complaint>,
}

/// Tells complaints, and remembers which it told.
pub(super) struct Announcer {
    client: Client,
    /// By uid; also those that have nothing wrong, so that what comes to be wrong is known to be new.
    heard: HashMap<Arc<str>, Heard>,
}

impl Announcer {
    pub(super) fn new(client: Client) -> Self {
        Self { client, heard: HashMap::new() }
    }

    /// How many resources are remembered.
    pub(super) fn len(&self) -> usize {
        self.heard.len()
    }

    /// Forgets resources that are gone.
    pub(super) fn keep_only(&mut self, alive: &HashSet<&str>) {
        self.heard.retain(|uid, _| alive.contains(&**uid));
    }

    /// Tells what is new. `is_in_status` says that the resource's status needs no word more. Returns whether that is done.
    pub(super) async fn tell(
        &mut self,
        key: &Key,
        told: &Told,
        verdict: &Verdict,
        is_in_status: bool,
    ) -> bool {
        let now = complaints(verdict);
        let new = untold(self.heard.get(&told.uid), told.generation, &now, is_in_status);
        let mut heard = Heard { generation: told.generation, complaints: now };
        let mut done = true;
        for complaint in new {
            if let Err(error) = self.publish(key, told, &complaint).await {
                tracing::warn!(%key, %error, "make an event");
                heard.complaints.remove(&complaint);
                done = false;
            }
            sleep(PAUSE).await;
        }
        self.heard.insert(Arc::clone(&told.uid), heard);
        done
    }

    async fn publish(&self, key: &Key, told: &Told, complaint: &Complaint) -> Result<(), kube::Error> {
        let object = ObjectReference {
            api_version: Some(told.api_version.to_string()),
            kind: Some(key.kind.as_str().to_owned()),
            namespace: Some(key.name.namespace.to_string()),
            name: Some(key.name.name.to_string()),
            uid: Some(told.uid.to_string()),
            resource_version: Some(told.resource_version.to_string()),
            ..ObjectReference::default()
        };
        let event = Event {
            type_: EventType::Warning,
            reason: complaint.reason.to_owned(),
            note: Some(complaint.note.clone()),
            action: complaint.action.to_owned(),
            secondary: None,
        };
        let reporter = Reporter { controller: "nodemesh.dev/controller".to_owned(), instance: None };
        // One for each Event: a recorder takes a second one with the same reason for the first again, and leaves the new note out.
        Recorder::new(self.client.clone(), reporter).publish(&event, &object).await
    }
}

/// The complaints that are to be told. Pure.
fn untold(
    heard: Option<&Heard>,
    generation: i64,
    now: &BTreeSet<Complaint>,
    is_in_status: bool,
) -> Vec<Complaint> {
    match heard {
        Some(heard) if heard.generation == generation => now.difference(&heard.complaints).cloned().collect(),
        // A status is about the generation that it was written for.
        _ if is_in_status => Vec::new(),
        _ => now.iter().cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{problem::Problem, resource::ParentRef, source::kubernetes::ParentVerdict};
    use mesh_core::snapshot::Name;

    fn problem(level: Level, message: &str) -> Problem {
        Problem { level, field: "spec.x".into(), message: message.into() }
    }

    fn parent(kind: ParentKind, unresolved: Option<&str>) -> ParentVerdict {
        ParentVerdict {
            parent: ParentRef { kind, name: Name::new("shop", "web"), port: None, section: None },
            not_accepted: None,
            unresolved: unresolved.map(|why| ("BackendNotFound", why.to_owned())),
            partial: None,
        }
    }

    fn words(verdict: &Verdict) -> Vec<String> {
        complaints(verdict).iter().map(|c| format!("{}: {}", c.reason, c.note)).collect()
    }

    fn of(notes: &[&str]) -> BTreeSet<Complaint> {
        let one = |note: &&str| Complaint { reason: INVALID, action: "Validate", note: (*note).to_owned() };
        notes.iter().map(one).collect()
    }

    #[test]
    fn every_kind_of_complaint_has_its_reason_and_what_is_in_force_has_none() {
        assert_eq!(words(&Verdict { in_force: true, ..Verdict::default() }), Vec::<String>::new());
        let verdict = Verdict {
            problems: vec![problem(Level::Error, "bad"), problem(Level::Warning, "idle")],
            missing: vec![problem(Level::Warning, "nowhere")],
            // Two parents say the same of a backend, and a Gateway is somebody else's to judge.
            parents: vec![
                parent(ParentKind::Service, Some("gone")),
                parent(ParentKind::ServiceEntry, Some("gone")),
                parent(ParentKind::Gateway, Some("of a gateway")),
            ],
            ..Verdict::default()
        };
        assert_eq!(
            words(&verdict),
            [
                "BackendNotFound: gone",
                "Invalid: spec.x: bad",
                "NoEffect: spec.x: idle",
                "ReferencedResourceNotFound: spec.x: nowhere"
            ]
        );
    }

    #[test]
    fn a_complaint_is_told_when_it_is_new_and_for_a_changed_resource_and_not_when_the_status_has_it() {
        let untold = |heard: Option<(i64, &[&str])>, now: &[&str], is_in_status| {
            let heard = heard.map(|(generation, notes)| Heard { generation, complaints: of(notes) });
            let new = untold(heard.as_ref(), 3, &of(now), is_in_status);
            new.into_iter().map(|complaint| complaint.note).collect::<Vec<_>>()
        };
        assert_eq!(untold(None, &["a", "b"], false), ["a", "b"]);
        assert_eq!(untold(Some((3, &["a"])), &["a", "b"], false), ["b"]);
        assert_eq!(untold(Some((3, &["a", "b"])), &["a"], false), Vec::<String>::new());
        assert_eq!(untold(Some((2, &["a"])), &["a"], false), ["a"], "changed, and still wrong");
        assert_eq!(untold(None, &["a"], true), Vec::<String>::new(), "told by the leader before");
        assert_eq!(untold(Some((3, &[])), &["a"], true), ["a"], "what failed is tried again");
    }

    #[test]
    fn a_note_is_as_long_as_an_event_may_have_it() {
        let long = parent(ParentKind::Service, Some(&"é".repeat(5000)));
        let all = complaints(&Verdict { parents: vec![long], ..Verdict::default() });
        assert!(all.iter().all(|complaint| complaint.note.len() <= 1024) && all.len() == 1);
    }
}
