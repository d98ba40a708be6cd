//! Owns the answer to "is this agent ready?", and why not.

use std::sync::Mutex;

use crate::view::Phase;

/// Shared by the control loop, which writes it, and the servers, which read it.
///
/// Invariant: once ready, it stays ready until draining; a pod that comes later and fails is reported by the
/// gauge and by `meshctl status`, not by taking the node out of service.
#[derive(Debug)]
pub(super) struct Readiness {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    waiting_for: Vec<String>,
}

impl Readiness {
    pub(super) fn new() -> Self {
        let waiting_for = vec!["the kernel programs and the first snapshot".to_owned()];
        Self { state: Mutex::new(State { phase: Phase::Starting, waiting_for }) }
    }

    /// Says what is still missing; nothing missing means ready. Returns whether it has just become ready.
    pub(super) fn report(&self, waiting_for: Vec<String>) -> bool {
        let mut state = self.lock();
        if state.phase != Phase::Starting {
            return false;
        }
        state.waiting_for = waiting_for;
        if state.waiting_for.is_empty() {
            state.phase = Phase::Ready;
        }
        state.phase == Phase::Ready
    }

    /// Not ready from now on.
    pub(super) fn drain(&self) {
        let mut state = self.lock();
        state.phase = Phase::Draining;
        state.waiting_for.clear();
    }

    /// What it is doing, and what it waits for.
    pub(super) fn now(&self) -> (Phase, Vec<String>) {
        let state = self.lock();
        (state.phase, state.waiting_for.clone())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Plain data, replaced as a whole: a panic elsewhere leaves nothing half-written.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
