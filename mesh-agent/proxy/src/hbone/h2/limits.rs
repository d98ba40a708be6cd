//! What this side announces and what it bears: sizes, and allowances for frames that cost work and carry nothing.
//!
//! Invariant: every allowance is finite, and refills with time or with work the peer did for both sides.

use std::time::{Duration, Instant};

use super::frame::{DEFAULT_WINDOW, MAX_MAX_FRAME, MAX_WINDOW, MIN_MAX_FRAME};

/// Streams a connection may ever be allowed to have: keeps its table small.
const MAX_STREAMS: u32 = 4_096;

/// Limits of one connection. [`Limits::normal`] forces them into the ranges of HTTP/2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes a peer may send on a stream before we consume any; announced in SETTINGS.
    pub(crate) stream_window: u32,
    /// The same for the connection; announced by a WINDOW_UPDATE (a window below 65 535 cannot be announced).
    pub(crate) connection_window: u32,
    /// Streams at a time: announced by a server; kept by a client beside what its peer announces.
    pub(crate) max_streams: u32,
    /// Bytes of one frame, announced. DATA is delivered in pieces whatever its size.
    pub(crate) max_frame: u32,
    /// Bytes of a decoded header list as HTTP/2 counts them (32 more per field), announced.
    pub(crate) max_header_list: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: 4 << 20,
            max_streams: 256,
            max_frame: MIN_MAX_FRAME,
            max_header_list: 16 << 10,
        }
    }
}

impl Limits {
    /// The same limits within the ranges of the RFC and of this layer.
    pub(crate) fn normal(self) -> Self {
        Self {
            stream_window: self.stream_window.min(MAX_WINDOW),
            connection_window: self.connection_window.clamp(DEFAULT_WINDOW, MAX_WINDOW),
            max_streams: self.max_streams.min(MAX_STREAMS),
            max_frame: self.max_frame.clamp(MIN_MAX_FRAME, MAX_MAX_FRAME),
            max_header_list: self.max_header_list.clamp(1 << 10, 1 << 20),
        }
    }
}

/// A token bucket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allowance {
    left: u32,
    most: u32,
    per_second: u32,
    since: Instant,
}

impl Allowance {
    /// A full bucket of `most` tokens that gains `per_second`.
    pub(crate) const fn new(most: u32, per_second: u32, now: Instant) -> Self {
        Self { left: most, most, per_second, since: now }
    }

    /// Takes `tokens`; false if there are not enough. Looks at the time only when the bucket is empty.
    pub(crate) fn take(&mut self, tokens: u32, now: Instant) -> bool {
        if self.left < tokens {
            self.refill(now);
        }
        match self.left.checked_sub(tokens) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }

    /// Gives tokens for work done.
    pub(crate) fn give(&mut self, tokens: u32) {
        self.left = self.left.saturating_add(tokens).min(self.most);
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since);
        let gained = passed.as_millis().saturating_mul(u128::from(self.per_second)) / 1_000;
        if gained == 0 {
            return;
        }
        self.give(u32::try_from(gained).unwrap_or(u32::MAX));
        // What is worth less than a token stays for the next time.
        let spent = gained.saturating_mul(1_000) / u128::from(self.per_second.max(1));
        self.since += Duration::from_millis(u64::try_from(spent).unwrap_or(0)).min(passed);
    }
}

/// The allowances of one connection.
#[derive(Debug)]
pub(crate) struct Allowances {
    /// SETTINGS, each of which may walk all streams.
    pub(crate) settings: Allowance,
    /// PING, PRIORITY, unknown frames, DATA and header fragments without content.
    pub(crate) control: Allowance,
    /// WINDOW_UPDATE; sending DATA earns more.
    pub(crate) window_updates: Allowance,
    /// Frames on streams that are closed: a reset races with what is on its way.
    pub(crate) closed: Allowance,
    /// Streams reset before they were answered, by the peer or for the peer's fault. Apps that all give up on a slow
    /// server at once are no attack, so a full tunnel may do it twice; every answer earns another.
    pub(crate) resets: Allowance,
}

impl Allowances {
    pub(crate) const fn new(max_streams: u32, now: Instant) -> Self {
        Self {
            settings: Allowance::new(100, 5, now),
            control: Allowance::new(1_000, 200, now),
            window_updates: Allowance::new(10_000, 1_000, now),
            closed: Allowance::new(20_000, 5_000, now),
            resets: Allowance::new(200 + 2 * max_streams, 100, now),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Allowance, Limits};

    #[test]
    fn an_allowance_ends_and_comes_back_with_time() {
        let start = Instant::now();
        let mut allowance = Allowance::new(3, 10, start);
        assert!(allowance.take(3, start));
        assert!(!allowance.take(1, start + Duration::from_millis(99)));
        assert!(allowance.take(1, start + Duration::from_millis(100)));
        assert!(!allowance.take(1, start + Duration::from_millis(199)));
        assert!(allowance.take(3, start + Duration::from_secs(60)));
        assert!(!allowance.take(1, start + Duration::from_secs(60)));
    }

    #[test]
    fn an_allowance_earned_by_work_has_a_bound() {
        let start = Instant::now();
        let mut allowance = Allowance::new(3, 0, start);
        allowance.give(u32::MAX);
        assert!(allowance.take(3, start));
        assert!(!allowance.take(1, start + Duration::from_secs(1)));
    }

    #[test]
    fn limits_are_forced_into_the_ranges_of_the_rfc() {
        let limits = Limits {
            stream_window: u32::MAX,
            connection_window: 0,
            max_streams: u32::MAX,
            max_frame: 0,
            max_header_list: 0,
        }
        .normal();
        assert_eq!(limits.stream_window, 0x7fff_ffff);
        assert_eq!(limits.connection_window, 65_535);
        assert_eq!(limits.max_frame, 16_384);
        assert!(limits.max_streams > 0 && limits.max_header_list > 0);
    }
}
