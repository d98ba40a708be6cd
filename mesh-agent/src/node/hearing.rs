//! Owns whether the start of a pod waits until the controller has told of it, and how often it did.
//!
//! A node is told only what its pods need. With the first pod of a namespace, or of a Sidecar, comes what only such pods see: before that a
//! first connect to one of those services would go there without the mesh. Nearly always the controller heard of the pod long before the
//! runtime made its network. When it has not, the pod waits for it, shortly, and never fails for it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// As long as that, at most. The controller publishes some 50 ms after the API server told it of a pod, and the runtime gives an ADD
/// minutes; a controller that takes longer is not worth a pod's start, which has everything else it needs.
pub(super) const HEARD_WITHIN: Duration = Duration::from_secs(1);

/// What the node knows of a pod that is about to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hearing {
    /// The controller had told of it.
    AtOnce,
    /// It did while the pod waited.
    Waited,
    /// It did not within [`HEARD_WITHIN`].
    NotInTime,
    /// There is no link over which it could.
    LinkDown,
}

impl Hearing {
    /// Whether the pod may go on, `elapsed` after it came; `None`: not yet.
    pub(super) fn of(
        is_heard: bool,
        is_connected: bool,
        has_waited: bool,
        elapsed: Duration,
    ) -> Option<Self> {
        match (is_heard, is_connected) {
            (true, _) if has_waited => Some(Self::Waited),
            (true, _) => Some(Self::AtOnce),
            (false, false) => Some(Self::LinkDown),
            (false, true) => (elapsed >= HEARD_WITHIN).then_some(Self::NotInTime),
        }
    }
}

/// How often each was.
#[derive(Debug, Default)]
pub(super) struct Hearings {
    at_once: AtomicU64,
    waited: AtomicU64,
    not_in_time: AtomicU64,
    link_down: AtomicU64,
}

impl Hearings {
    pub(super) fn count(&self, hearing: Hearing) {
        let counter = match hearing {
            Hearing::AtOnce => &self.at_once,
            Hearing::Waited => &self.waited,
            Hearing::NotInTime => &self.not_in_time,
            Hearing::LinkDown => &self.link_down,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// By outcome.
    pub(super) fn counts(&self) -> [(&'static str, u64); 4] {
        [
            ("at_once", &self.at_once),
            ("waited", &self.waited),
            ("not_in_time", &self.not_in_time),
            ("link_down", &self.link_down),
        ]
        .map(|(outcome, counter)| (outcome, counter.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_waits_for_a_controller_that_is_there_and_no_longer_than_it_may() {
        let (early, late) = (Duration::ZERO, HEARD_WITHIN);
        assert_eq!(Hearing::of(true, true, false, early), Some(Hearing::AtOnce));
        assert_eq!(Hearing::of(false, true, false, early), None);
        assert_eq!(Hearing::of(true, true, true, early), Some(Hearing::Waited));
        assert_eq!(Hearing::of(false, true, true, late), Some(Hearing::NotInTime));
        assert_eq!(Hearing::of(false, false, false, early), Some(Hearing::LinkDown));
        assert_eq!(Hearing::of(true, false, false, early), Some(Hearing::AtOnce), "known from the disk");
    }
}
