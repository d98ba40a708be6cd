//! Owns the sign of life of the thread that reads, compiles and publishes.
//!
//! Invariant: while it waits for something to do it gives a sign each [`EACH`]; while it works it gives none before the work is done. So a
//! silence is either work that takes as long, or a thread that is stuck; [`STALE`] is what tells them apart.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Time between two signs of a thread that has nothing to do.
pub(crate) const EACH: Duration = Duration::from_secs(5);

/// A thread that was silent for longer is stuck. The first state of a large cluster takes seconds of CPU time: with the tenth of a CPU that is
/// asked for by default this is still several times that. Nodes go on without a controller meanwhile.
pub const STALE: Duration = Duration::from_secs(300);

/// Last sign of life of a source's thread. Clones are of the same one.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<Mutex<Option<Instant>>>);

impl Pulse {
    /// It was alive at this time.
    pub fn beat(&self, at: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
    }

    /// How long it has been silent; `None` before its first sign, when nothing was given to it yet.
    pub fn silence(&self) -> Option<Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map(|last| last.elapsed())
    }
}
