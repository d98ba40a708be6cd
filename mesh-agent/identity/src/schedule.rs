//! Which certificate to fetch next, and when: pure, so that an hour of outage is a unit test.
//!
//! A connection that waits comes first, then what is near its end, then what nobody has asked for yet; within a class whoever has
//! waited longest. Failures back off exponentially; somebody waiting shortens the pause, but never below [`RETRY_FLOOR`].

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, SystemTime},
};

use mesh_core::identity::Identity;

/// Least time between two attempts for one identity, however many connections wait for it.
pub const RETRY_FLOOR: Duration = Duration::from_secs(1);
/// Longest time between two attempts.
pub const RETRY_CEILING: Duration = Duration::from_secs(60);

/// Classes of work, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A connection waits for it.
    OnDemand,
    /// There is one, and it is due for replacement.
    Expiring,
    /// Fetched ahead of the first connection.
    Prefetch,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Not before this time.
    Waiting(SystemTime),
    /// In the queue, with its turn.
    Ready(u64),
    /// Handed out by [`Schedule::pop`], not yet returned.
    Running,
}

#[derive(Clone, Debug)]
struct Item {
    place: Place,
    priority: Priority,
    /// No attempt before this, demand or not.
    floor: SystemTime,
    failures: u32,
}

/// The queue. Invariant: an identity is in exactly one place; `waiting` and `ready` mirror the items' places.
#[derive(Debug, Default)]
pub struct Schedule {
    items: HashMap<Identity, Item>,
    waiting: BTreeSet<(SystemTime, Identity)>,
    ready: BTreeSet<(Priority, u64, Identity)>,
    turn: u64,
}

impl Schedule {
    /// Adds an identity that has no certificate; nothing happens if it is known.
    pub fn add(&mut self, identity: &Identity, now: SystemTime) {
        if self.items.contains_key(identity) {
            return;
        }
        let item = Item { place: Place::Running, priority: Priority::Prefetch, floor: now, failures: 0 };
        self.items.insert(identity.clone(), item);
        self.enqueue(identity, Priority::Prefetch);
    }

    /// Forgets an identity.
    pub fn remove(&mut self, identity: &Identity) {
        self.take_out(identity);
        self.items.remove(identity);
    }

    /// Somebody waits for it (or it should be replaced ahead of time): brings it forward. Says whether that changed anything.
    pub fn hurry(&mut self, identity: &Identity, priority: Priority, now: SystemTime) -> bool {
        let Some(item) = self.items.get(identity) else { return false };
        match item.place {
            Place::Running => false,
            Place::Ready(_) if item.priority <= priority => false,
            Place::Ready(_) => {
                self.take_out(identity);
                self.enqueue(identity, priority);
                true
            }
            Place::Waiting(due) => {
                let earliest = item.floor.max(now).min(due);
                if earliest == due && item.priority <= priority {
                    return false;
                }
                let priority = item.priority.min(priority);
                self.take_out(identity);
                self.wait(identity, earliest, priority);
                true
            }
        }
    }

    /// The next identity to fetch now, if any. It stays handed out until [`Self::succeeded`] or [`Self::failed`].
    pub fn pop(&mut self, now: SystemTime) -> Option<Identity> {
        while let Some((due, identity)) = self.waiting.first()
            && *due <= now
        {
            let identity = identity.clone();
            let priority = self.items.get(&identity).map_or(Priority::Prefetch, |item| item.priority);
            self.take_out(&identity);
            self.enqueue(&identity, priority);
        }
        let (_, _, identity) = self.ready.pop_first()?;
        if let Some(item) = self.items.get_mut(&identity) {
            item.place = Place::Running;
        }
        Some(identity)
    }

    /// When [`Self::pop`] would give something: a time that has come, or is to come, or `None` for never.
    pub fn next_due(&self, now: SystemTime) -> Option<SystemTime> {
        if self.ready.is_empty() { self.waiting.first().map(|(due, _)| *due) } else { Some(now) }
    }

    /// It was fetched; the next time is `renew_at`.
    pub fn succeeded(&mut self, identity: &Identity, now: SystemTime, renew_at: SystemTime) {
        if let Some(item) = self.items.get_mut(identity) {
            item.failures = 0;
            item.floor = now + RETRY_FLOOR;
            // A life of seconds must not become a busy loop.
            let due = renew_at.max(item.floor);
            self.take_out(identity);
            self.wait(identity, due, Priority::Expiring);
        }
    }

    /// It failed; `spread` in `0.0..=1.0` places the next attempt in the upper half of the back-off. Returns when that is.
    pub fn failed(&mut self, identity: &Identity, now: SystemTime, spread: f64) -> Option<SystemTime> {
        let item = self.items.get_mut(identity)?;
        let pause = RETRY_FLOOR.saturating_mul(1 << item.failures.min(16)).min(RETRY_CEILING);
        item.failures = item.failures.saturating_add(1);
        item.floor = now + RETRY_FLOOR;
        let due = (now + pause.mul_f64(0.5 + 0.5 * spread.clamp(0.0, 1.0))).max(item.floor);
        let priority = match item.priority {
            // Whoever waited may have given up; a new one hurries again.
            Priority::OnDemand | Priority::Expiring => Priority::Expiring,
            Priority::Prefetch => Priority::Prefetch,
        };
        self.take_out(identity);
        self.wait(identity, due, priority);
        Some(due)
    }

    /// Failures in a row.
    pub fn failures(&self, identity: &Identity) -> u32 {
        self.items.get(identity).map_or(0, |item| item.failures)
    }

    fn take_out(&mut self, identity: &Identity) {
        let Some(item) = self.items.get_mut(identity) else { return };
        match item.place {
            Place::Waiting(due) => _ = self.waiting.remove(&(due, identity.clone())),
            Place::Ready(turn) => _ = self.ready.remove(&(item.priority, turn, identity.clone())),
            Place::Running => {}
        }
        item.place = Place::Running;
    }

    fn enqueue(&mut self, identity: &Identity, priority: Priority) {
        if let Some(item) = self.items.get_mut(identity) {
            self.turn += 1;
            item.place = Place::Ready(self.turn);
            item.priority = priority;
            self.ready.insert((priority, self.turn, identity.clone()));
        }
    }

    fn wait(&mut self, identity: &Identity, due: SystemTime, priority: Priority) {
        if let Some(item) = self.items.get_mut(identity) {
            item.place = Place::Waiting(due);
            item.priority = priority;
            self.waiting.insert((due, identity.clone()));
        }
    }
}

#[cfg(test)]
mod tests;
