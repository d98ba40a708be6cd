//! Owns the answer to "is this agent ready?", and why not.

use std::{collections::BTreeMap, sync::Mutex};

use crate::view::Phase;

/// Shared by the control loop, which writes it, and the servers, which read it.
///
/// Invariant: once ready, it stays ready until draining; a pod that comes later and fails is reported by the
/// gauge and by `meshctl status`, not by taking the node out of service. Only what keeps new pods out of the mesh takes a
/// ready node out again: see [`Readiness::hold`].
#[derive(Debug)]
pub(super) struct Readiness {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    waiting_for: Vec<String>,
    /// By what is missing.
    holds: BTreeMap<&'static str, String>,
}

impl Readiness {
    pub(super) fn new() -> Self {
        let waiting_for = vec!["the kernel programs and the first snapshot".to_owned()];
        Self { state: Mutex::new(State { phase: Phase::Starting, waiting_for, holds: BTreeMap::new() }) }
    }

    /// Says what is still missing; nothing missing means ready. Returns whether it has just become ready.
    pub(super) fn report(&self, waiting_for: Vec<String>) -> bool {
        let mut state = self.lock();
        if state.phase != Phase::Starting {
            return false;
        }
        state.waiting_for = waiting_for;
        state.settle()
    }

    /// What besides passes of the reconciler must be in place; `None` when it is. Returns whether it has just become ready.
    pub(super) fn hold(&self, what: &'static str, missing: Option<String>) -> bool {
        let mut state = self.lock();
        if state.phase == Phase::Draining {
            return false;
        }
        match missing {
            Some(why) => state.holds.insert(what, why),
            None => state.holds.remove(what),
        };
        match state.phase {
            Phase::Starting => state.settle(),
            Phase::Ready if !state.holds.is_empty() => {
                state.phase = Phase::Starting;
                state.waiting_for.clear();
                false
            }
            Phase::Ready | Phase::Draining => false,
        }
    }

    /// Not ready from now on.
    pub(super) fn drain(&self) {
        let mut state = self.lock();
        state.phase = Phase::Draining;
        state.waiting_for.clear();
        state.holds.clear();
    }

    /// What it is doing, and what it waits for.
    pub(super) fn now(&self) -> (Phase, Vec<String>) {
        let state = self.lock();
        let holds = state.holds.iter().map(|(what, why)| format!("{what}: {why}"));
        (state.phase, state.waiting_for.iter().cloned().chain(holds).collect())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Plain data, replaced as a whole: a panic elsewhere leaves nothing half-written.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl State {
    fn settle(&mut self) -> bool {
        if self.waiting_for.is_empty() && self.holds.is_empty() {
            self.phase = Phase::Ready;
        }
        self.phase == Phase::Ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_keeps_pods_out_of_the_mesh_holds_readiness_back_and_takes_it_away() {
        let readiness = Readiness::new();
        assert!(!readiness.hold("CNI plugin", Some("no network".into())));
        assert!(!readiness.report(Vec::new()));
        assert_eq!(readiness.now(), (Phase::Starting, vec!["CNI plugin: no network".into()]));
        assert!(readiness.hold("CNI plugin", None));
        assert!(!readiness.hold("CNI plugin", None), "announced once");
        assert!(!readiness.hold("CNI plugin", Some("it cannot be written".into())));
        assert_eq!(readiness.now().0, Phase::Starting);
        assert!(readiness.hold("CNI plugin", None));
        readiness.drain();
        assert!(!readiness.hold("CNI plugin", Some("gone".into())));
        assert_eq!(readiness.now(), (Phase::Draining, Vec::new()));
    }

    #[test]
    fn ready_is_announced_once_and_lasts_until_draining() {
        let readiness = Readiness::new();
        assert_eq!(readiness.now().0, Phase::Starting);
        assert!(!readiness.report(vec!["2 pods".into()]));
        assert_eq!(readiness.now(), (Phase::Starting, vec!["2 pods".into()]));
        assert!(readiness.report(Vec::new()));
        assert!(!readiness.report(Vec::new()), "announced once");
        assert!(!readiness.report(vec!["a late pod".into()]));
        assert_eq!(readiness.now().0, Phase::Ready);
        readiness.drain();
        assert_eq!(readiness.now().0, Phase::Draining);
        assert!(!readiness.report(Vec::new()));
    }
}
