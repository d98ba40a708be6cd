//! Owns closing established Direct connections that the newest policy denies. (The data path closes the proxied ones
//! itself.)
//!
//! A change is looked at several times: handshakes that were admitted under the policy before may complete just after
//! the first look, and until the kernel's generations have moved the connect hook still admits under it.
//!
//! Invariants:
//! - Nothing is read from the kernel unless something changed that a judgement depends on: policy, modes, identities, or
//!   which pods are enrolled.
//! - A connection that cannot be closed is reported at each look, never silently kept.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_core::{
    policy::{self, Attempt, DenyReason, Judgement, Peer, Verdict},
    snapshot::{Snapshot, Workload},
};
use mesh_redirect::DirectFlow;
use tokio::{
    sync::Notify,
    task::spawn_blocking,
    time::{Instant, sleep_until},
};

use super::shared::Shared;
use crate::report::report;

/// When to look after a change: at once, when a handshake's round trips are over, and after one lost SYN-ACK (1 s)
/// or two (3 s).
const LOOKS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_millis(1500),
    Duration::from_millis(3500),
];
/// Connections that are logged one by one at each look; the rest is counted in one line.
const LINES_MAX: usize = 20;

/// What was closed since the start, and the sign that the kernel's tables follow the newest snapshot.
#[derive(Debug, Default)]
pub(super) struct Revocations {
    closed: Mutex<BTreeMap<&'static str, u64>>,
    applied: Notify,
}

impl Revocations {
    /// To be called after each pass of the reconciler: generations have moved, pods may have come.
    pub(super) fn note_applied(&self) {
        self.applied.notify_one();
    }

    /// Direct connections closed since the start, by the reason of the refusal.
    pub(super) fn closed(&self) -> BTreeMap<&'static str, u64> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn count(&self, reason: DenyReason) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner).entry(reason.as_str()).or_default() += 1;
    }
}

/// Follows the snapshots. Runs until it is dropped; cancel safe.
pub(super) async fn follow(shared: &Arc<Shared>) {
    let mut snapshots = shared.snapshots.clone();
    let (mut published, mut applied) = (None, None);
    let mut looks = Looks::default();
    loop {
        tokio::select! {
            changed = snapshots.changed() => {
                if changed.is_err() {
                    return std::future::pending().await;
                }
                let now = fingerprint(shared);
                if published.replace(now) != Some(now) {
                    looks.begin(Instant::now());
                }
            }
            () = shared.revocations.applied.notified() => {
                let now = fingerprint(shared);
                if applied.replace(now) != Some(now) {
                    looks.begin(Instant::now());
                }
            }
            () = looks.due() => {
                let shared = Arc::clone(shared);
                if let Err(error) = spawn_blocking(move || look(&shared)).await {
                    tracing::error!(%error, "close connections that policy denies");
                }
            }
        }
    }
}

/// The looks still to be taken.
#[derive(Debug, Default)]
struct Looks {
    since: Option<Instant>,
    taken: usize,
}

impl Looks {
    fn begin(&mut self, now: Instant) {
        *self = Self { since: Some(now), taken: 0 };
    }

    /// Waits for the next look; for ever if there is none. Counts it as taken.
    async fn due(&mut self) {
        match self.next() {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
        self.taken += 1;
    }

    fn next(&self) -> Option<Instant> {
        Some(self.since? + *LOOKS.get(self.taken)?)
    }
}

/// Everything on this node that a judgement of a Direct connection depends on.
fn fingerprint(shared: &Shared) -> u64 {
    let snapshot = shared.snapshot();
    let mut hasher = DefaultHasher::new();
    for workload in snapshot.workloads().filter(|workload| shared.bridge.serves(workload.id)) {
        workload.id.hash(&mut hasher);
        workload.policy_hash.hash(&mut hasher);
        workload.identity().to_string().hash(&mut hasher);
    }
    hasher.finish()
}

/// Closes what the newest snapshot denies. Blocking: see [`mesh_redirect::Node::direct_connections`].
fn look(shared: &Shared) {
    let snapshot = shared.snapshot();
    let (connections, errors) = shared.kernel.direct_connections(false);
    for error in &errors {
        tracing::error!(error = %report(error), "look for connections that policy denies");
    }
    let mut closed = 0;
    for connection in &connections {
        let flow = &connection.flow;
        let Some((destination, judgement, reason)) =
            denied(&snapshot, flow, |workload| shared.bridge.serves(workload.id))
        else {
            continue;
        };
        match shared.kernel.close_direct(connection) {
            Ok(true) => {
                shared.revocations.count(reason);
                closed += 1;
                if closed <= LINES_MAX {
                    let source = snapshot.workload(flow.source).map(|w| w.name.to_string());
                    let by = judgement.decided_by.map(|by| by.policy.to_string());
                    tracing::warn!(
                        target: "mesh_agent::denied",
                        src = %flow.client,
                        dst = %flow.server,
                        client = source,
                        server = %destination.name,
                        policy = by,
                        reason = reason.as_str(),
                        "established connection closed"
                    );
                }
            }
            Ok(false) => {}
            Err(error) => {
                tracing::error!(error = %report(&error), client = %flow.client, server = %flow.server, "a connection that policy denies lives on");
            }
        }
    }
    if closed > LINES_MAX {
        tracing::warn!(target: "mesh_agent::denied", more = closed - LINES_MAX, "more established connections closed");
    }
}

/// The destination and what refuses a connection to it, if anything does. `serves` tells the pods whose arrivals this
/// agent guards: a server elsewhere, or outside the mesh, has its own guard or none.
fn denied<'a>(
    snapshot: &'a Snapshot,
    flow: &DirectFlow,
    serves: impl Fn(&Workload) -> bool,
) -> Option<(&'a Workload, Judgement, DenyReason)> {
    let destination = snapshot.workload(flow.destination?)?;
    // A pod talks to itself over loopback, where nobody is in between.
    if !serves(destination) || flow.source == destination.id {
        return None;
    }
    let peer = Peer::Kernel(flow.source);
    let attempt = Attempt {
        peer: &peer,
        source: Some(flow.client.ip()),
        destination: flow.server.ip(),
        port: flow.server.port(),
    };
    let judgement = policy::admit(snapshot, &attempt, destination);
    match judgement.verdict {
        Verdict::Allow => None,
        Verdict::Deny(reason) => Some((destination, judgement, reason)),
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        policy::{Action, AuthorizationPolicy},
        snapshot::{Name, Parts},
    };

    use super::*;

    /// A client and a server that the given policies apply to.
    fn snapshot(policies: Vec<AuthorizationPolicy>) -> Snapshot {
        let client = Workload::named(Name::new("shop", "client"));
        let names = policies.iter().map(|policy| policy.name.clone()).collect();
        let server = Workload { policies: names, ..Workload::named(Name::new("shop", "server")) };
        let parts = Parts {
            workloads: vec![Arc::new(client), Arc::new(server)],
            policies: policies.into_iter().map(Arc::new).collect(),
            ..Parts::default()
        };
        Snapshot::new(1, parts)
    }

    fn flow() -> DirectFlow {
        DirectFlow {
            pod: 1,
            source: Workload::named(Name::new("shop", "client")).id,
            destination: Some(Workload::named(Name::new("shop", "server")).id),
            service: None,
            client: "10.1.0.2:41000".parse().unwrap(),
            server: "10.1.0.3:8080".parse().unwrap(),
            dialled: "10.96.0.1:80".parse().unwrap(),
            reason: None,
            ticket: true,
            policy_gen: 1,
            started_ns: 1,
            bytes: None,
        }
    }

    /// An ALLOW policy without rules lets nobody in.
    fn allow_nothing() -> AuthorizationPolicy {
        AuthorizationPolicy {
            action: Action::Allow,
            ..AuthorizationPolicy::named(Name::new("shop", "nobody"))
        }
    }

    #[test]
    fn a_connection_is_denied_exactly_when_the_policy_of_its_destination_says_so() {
        assert!(denied(&snapshot(Vec::new()), &flow(), |_| true).is_none());
        let with = snapshot(vec![allow_nothing()]);
        let (destination, judgement, reason) = denied(&with, &flow(), |_| true).unwrap();
        assert_eq!(
            (destination.name.to_string(), reason),
            ("shop/server".into(), DenyReason::NoPolicyAllows)
        );
        assert_eq!(judgement.decided_by.unwrap().policy, Name::new("shop", "nobody"));
    }

    #[test]
    fn servers_that_others_guard_and_the_pod_itself_are_left_alone() {
        let with = snapshot(vec![allow_nothing()]);
        assert!(denied(&with, &flow(), |_| false).is_none());
        let own = DirectFlow { source: flow().destination.unwrap(), ..flow() };
        assert!(denied(&with, &own, |_| true).is_none());
        let outside = DirectFlow { destination: None, ..flow() };
        assert!(denied(&with, &outside, |_| true).is_none());
    }

    #[test]
    fn a_change_is_looked_at_within_a_second_and_after_late_handshakes_and_then_no_more() {
        let mut looks = Looks::default();
        assert_eq!(looks.next(), None);
        let began = Instant::now();
        looks.begin(began);
        let mut at = Vec::new();
        while let Some(next) = looks.next() {
            at.push(next - began);
            looks.taken += 1;
        }
        assert_eq!(at, LOOKS);
        assert!(at[2] < Duration::from_secs(1) && at[4] > Duration::from_secs(3));
        looks.begin(began);
        assert_eq!(looks.next(), Some(began), "the next change is looked at like the first");
    }
}
