//! Owns passing the workers' sign of life on to the kernel, and ending it.
//!
//! Invariant: after [`Beat::stop`] and [`Beat::leave`] nothing is written any more, whatever the workers say.

use std::sync::{Mutex, PoisonError};

use mesh_redirect::{Heartbeat, MapError, monotonic_ns};

use crate::report::report;

/// The agent's heartbeat. Its lock is taken ten times a second.
#[derive(Debug)]
pub(super) struct Beat {
    heartbeat: Heartbeat,
    /// When the workers were about to begin.
    began_ns: u64,
    state: Mutex<State>,
}

/// For how many nanoseconds no worker, or not all of them, have been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Silence {
    /// Since the last stamp.
    SinceStamp(u64),
    /// Since the agent began: there was none yet.
    SinceStart(u64),
}

#[derive(Debug, Default)]
struct State {
    last_ns: Option<u64>,
    stopped: bool,
    failing: bool,
}

impl Beat {
    pub(super) fn new(heartbeat: Heartbeat) -> Self {
        Self { heartbeat, began_ns: monotonic_ns(), state: Mutex::default() }
    }

    /// The oldest worker was seen alive at `oldest_ns` (CLOCK_MONOTONIC).
    pub(super) fn alive(&self, oldest_ns: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return;
        }
        state.last_ns = Some(oldest_ns);
        let written = self.heartbeat.stamp(oldest_ns);
        if let Err(error) = &written
            && !state.failing
        {
            tracing::error!(error = %report(error), "stamp the heartbeat: the hooks will take the agent for dead");
        }
        state.failing = written.is_err();
    }

    /// Tells the hooks that the agent is leaving.
    pub(super) fn stop(&self) -> Result<(), MapError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.stopped = true;
        self.heartbeat.stop()
    }

    /// Leaves it to another agent, which gives signs of life by now.
    pub(super) fn leave(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
    }

    /// Nanoseconds since the last stamp; `None` before the first one.
    pub(super) fn age_ns(&self, now_ns: u64) -> Option<u64> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.last_ns.map(|last_ns| now_ns.saturating_sub(last_ns))
    }

    /// How long the slowest worker has been silent.
    pub(super) fn silence(&self, now_ns: u64) -> Silence {
        let since_start = || Silence::SinceStart(now_ns.saturating_sub(self.began_ns));
        self.age_ns(now_ns).map_or_else(since_start, Silence::SinceStamp)
    }
}
