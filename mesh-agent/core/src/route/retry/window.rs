//! How many of something began within the last while.

use std::time::Duration;

/// Parts that an interval is counted in: a count is late by one of them at most.
const SLOTS: u32 = 16;

/// See the module. It takes the same memory however many there are.
#[derive(Clone, Debug, Default)]
pub struct Window {
    interval: Duration,
    slots: [u32; SLOTS as usize],
    /// Number of the slot that is filled now, since the clock began.
    now: u64,
}

impl Window {
    /// One began, now on the caller's clock.
    pub fn add(&mut self, now: Duration, interval: Duration) {
        self.turn(now, interval);
        if let Some(slot) = self.slots.get_mut((self.now % u64::from(SLOTS)) as usize) {
            *slot = slot.saturating_add(1);
        }
    }

    /// How many began within the last `interval`.
    pub fn count(&mut self, now: Duration, interval: Duration) -> u32 {
        self.turn(now, interval);
        self.slots.iter().fold(0, |sum, slot| sum.saturating_add(*slot))
    }

    /// Forgets what is too old. With another interval all is: slots of another length say nothing.
    fn turn(&mut self, now: Duration, interval: Duration) {
        let length = (interval / SLOTS).max(Duration::from_nanos(1));
        let slot = u64::try_from(now.as_nanos() / length.as_nanos()).unwrap_or(u64::MAX);
        if self.interval != interval {
            *self = Self { interval, now: slot, ..Self::default() };
        }
        // A clock read by another worker may be a little behind.
        let passed = slot.saturating_sub(self.now).min(u64::from(SLOTS));
        for step in 1..=passed {
            let at = (self.now.wrapping_add(step) % u64::from(SLOTS)) as usize;
            self.slots.get_mut(at).into_iter().for_each(|slot| *slot = 0);
        }
        self.now = self.now.max(slot);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_began_longer_ago_is_forgotten() {
        let mut window = Window::default();
        window.add(Duration::ZERO, SECOND);
        window.add(Duration::from_millis(500), SECOND);
        assert_eq!(window.count(Duration::from_millis(900), SECOND), 2);
        assert_eq!(window.count(Duration::from_millis(1400), SECOND), 1);
        assert_eq!(window.count(Duration::from_secs(99), SECOND), 0);
        window.add(Duration::from_secs(99), SECOND);
        assert_eq!(window.count(Duration::from_secs(99), 2 * SECOND), 0, "another interval begins anew");
    }

    proptest! {
        #[test]
        fn it_counts_what_began_within_the_interval_but_for_one_part_of_it(
            steps in prop::collection::vec(0_u64..400, 0..60), interval in 1_u64..2_000,
        ) {
            let interval = Duration::from_millis(interval);
            let (mut window, mut now, mut began) = (Window::default(), Duration::ZERO, Vec::new());
            for step in steps {
                now += Duration::from_millis(step);
                window.add(now, interval);
                began.push(now);
                let within = |limit: Duration| {
                    began.iter().filter(|at| now.saturating_sub(**at) < limit).count() as u32
                };
                let counted = window.count(now, interval);
                prop_assert!(counted <= within(interval));
                prop_assert!(counted >= within(interval - interval / SLOTS - Duration::from_nanos(1)));
            }
        }
    }
}
