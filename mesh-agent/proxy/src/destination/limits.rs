//! Limits of a destination, counted over all workers.
//!
//! A client pod has its own limits at each destination, as it would have with a proxy of its own: one pod cannot use up what
//! another may have.
//!
//! Invariants:
//! - What is counted is taken off when its guard is dropped, whatever happens in between.
//! - A limit is never exceeded: taking is one atomic step.

use std::{
    collections::HashMap,
    hash::Hash,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use mesh_core::route::{
    cluster::{ClusterKey, RetryBudget},
    retry::Window,
};
use tokio::{sync::Notify, time::Instant};

use super::{Destination, choice::Outliers};

/// A destination as it is counted and pooled for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ClusterId {
    /// A service port or subset.
    Cluster(ClusterKey),
    /// An address that was dialled.
    Address(SocketAddr),
    /// The pod's own address and port, by its own side.
    Own(SocketAddr),
}

impl ClusterId {
    /// That of a destination.
    pub(super) fn of(destination: &Destination) -> Self {
        match destination {
            Destination::Cluster { key, .. } => Self::Cluster(key.clone()),
            Destination::Address(addr) => Self::Address(*addr),
            Destination::Own { addr, .. } => Self::Own(*addr),
        }
    }
}

/// A destination of one local pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    /// Local pod id.
    pub(crate) pod: u32,
    /// The destination.
    pub(crate) cluster: ClusterId,
}

/// What is in use at the destinations of a node's pods, or at what else is counted by a key of its own.
#[derive(Debug)]
pub(crate) struct Limits<K = Scope>(Mutex<HashMap<K, Arc<Usage>>>);

impl<K> Default for Limits<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> Limits<K> {
    /// The usage of a destination; kept for as long as somebody holds it.
    pub(crate) fn usage(&self, scope: &K) -> Arc<Usage> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(scope.clone()).or_default())
    }

    /// Calls `each` with every destination in use.
    pub(super) fn each(&self, mut each: impl FnMut(&K, &Usage)) {
        // The lock is not held while `each` takes locks of its own.
        let all: Vec<(K, Arc<Usage>)> = {
            let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter().map(|(scope, usage)| (scope.clone(), Arc::clone(usage))).collect()
        };
        all.iter().for_each(|(scope, usage)| each(scope, usage));
    }

    /// Forgets what nobody holds.
    pub(crate) fn forget_unused(&self) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, usage| Arc::strong_count(usage) > 1);
    }
}

/// What is in use at one destination of one pod.
#[derive(Debug)]
pub(crate) struct Usage {
    /// Its clock begins here.
    epoch: Instant,
    /// Which endpoints failed.
    outliers: Mutex<Outliers>,
    connections: AtomicU32,
    pending: AtomicU32,
    requests: AtomicU32,
    retries: AtomicU32,
    /// What began of late, for retry budgets with an interval.
    recent: Mutex<Recent>,
    /// Requests that wait because every connection is in use.
    pub(crate) waiting: AtomicU32,
    /// Told when a connection ends or becomes free, or has nothing left on it.
    pub(crate) freed: Notify,
}

impl Default for Usage {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            outliers: Mutex::default(),
            connections: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            retries: AtomicU32::new(0),
            recent: Mutex::default(),
            waiting: AtomicU32::new(0),
            freed: Notify::new(),
        }
    }
}

/// Requests and retries that began of late.
#[derive(Debug, Default)]
struct Recent {
    requests: Window,
    retries: Window,
}

/// What is counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Connection,
    Pending,
    Request,
    Retry,
}

/// One of what is counted.
#[derive(Debug)]
pub(crate) struct Taken {
    usage: Arc<Usage>,
    kind: Kind,
}

impl Taken {
    /// Whether somebody waits for one.
    pub(crate) fn is_wanted(&self) -> bool {
        self.usage.waiting.load(Ordering::Acquire) > 0
    }

    /// Tells those who wait for one to ask again.
    pub(crate) fn tell_waiting(&self) {
        if self.is_wanted() {
            self.usage.freed.notify_waiters();
        }
    }
}

impl Usage {
    /// Time on a clock that all workers share.
    pub(crate) fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    /// How many of what is counted are in use.
    pub(crate) fn count(&self, kind: Kind) -> u32 {
        self.counter(kind).load(Ordering::Acquire)
    }

    /// Which endpoints are out.
    pub(super) fn outliers(&self) -> MutexGuard<'_, Outliers> {
        self.outliers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counter(&self, kind: Kind) -> &AtomicU32 {
        match kind {
            Kind::Connection => &self.connections,
            Kind::Pending => &self.pending,
            Kind::Request => &self.requests,
            Kind::Retry => &self.retries,
        }
    }

    /// Takes one more, if the limit allows it.
    pub(crate) fn take(self: &Arc<Self>, kind: Kind, max: Option<u32>) -> Option<Taken> {
        let counter = self.counter(kind);
        let max = max.unwrap_or(u32::MAX);
        let more = |now: u32| (now < max).then(|| now + 1);
        counter.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some(Taken { usage: Arc::clone(self), kind })
    }

    /// Waits for a connection, if as few as `max` do: whoever has one that it does not need gives it up.
    pub(crate) fn wait(self: &Arc<Self>, max: Option<u32>) -> Option<Turn> {
        let pending = self.take(Kind::Pending, max)?;
        self.waiting.fetch_add(1, Ordering::AcqRel);
        Some(Turn(pending))
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers that a request begins, if the budget asks for it.
    pub(crate) fn note_request(&self, budget: Option<&RetryBudget>) {
        if let Some(budget) = budget.filter(|budget| !budget.interval.is_zero()) {
            self.recent().requests.add(self.now(), budget.interval);
        }
    }

    /// Takes a retry, if limit and budget allow it.
    pub(crate) fn take_retry(
        self: &Arc<Self>,
        max: Option<u32>,
        budget: Option<&RetryBudget>,
    ) -> Option<Taken> {
        let Some(budget) = budget else { return self.take(Kind::Retry, max) };
        let active = self.count(Kind::Request).saturating_add(self.count(Kind::Pending));
        if budget.interval.is_zero() {
            return self.take(Kind::Retry, Some(budget.retries_max(active)));
        }
        // Whoever holds this counts alone: of two that ask at once the second sees the first.
        let mut recent = self.recent();
        let (now, interval) = (self.now(), budget.interval);
        let active_retries = self.count(Kind::Retry);
        let retries = recent.retries.count(now, interval).max(active_retries);
        let requests = recent.requests.count(now, interval).max(active);
        if !budget.allows(active_retries, retries, requests) {
            return None;
        }
        recent.retries.add(now, interval);
        self.take(Kind::Retry, None)
    }
}

/// Somebody who waits for a connection.
#[derive(Debug)]
pub(crate) struct Turn(Taken);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.usage.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.usage.counter(self.kind).fetch_sub(1, Ordering::AcqRel);
        if matches!(self.kind, Kind::Connection) {
            self.usage.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::route::http::Millionths;

    use super::*;

    #[test]
    fn a_limit_is_never_exceeded_and_what_is_dropped_is_free_again() {
        let usage = Arc::new(Usage::default());
        let first = usage.take(Kind::Connection, Some(2)).unwrap();
        let _second = usage.take(Kind::Connection, Some(2)).unwrap();
        assert!(usage.take(Kind::Connection, Some(2)).is_none());
        assert!(usage.take(Kind::Request, Some(1)).is_some(), "each is counted for itself");
        drop(first);
        assert!(usage.take(Kind::Connection, Some(2)).is_some());
    }

    #[test]
    fn a_budget_is_a_share_of_what_is_active_and_never_below_its_minimum() {
        let usage = Arc::new(Usage::default());
        let budget = RetryBudget { share: Millionths(200_000), min_concurrency: 1, interval: Duration::ZERO };
        let _requests: Vec<Taken> = (0..10).filter_map(|_| usage.take(Kind::Request, None)).collect();
        let retries: Vec<Taken> = (0..9).map_while(|_| usage.take_retry(Some(9), Some(&budget))).collect();
        assert_eq!(retries.len(), 2);
        let quiet = Arc::new(Usage::default());
        assert!(quiet.take_retry(None, Some(&budget)).is_some());
    }

    #[test]
    fn with_an_interval_what_is_over_counts_too_of_requests_and_of_retries() {
        let usage = Arc::new(Usage::default());
        // Longer than the test may take.
        let interval = Duration::from_secs(3600);
        let budget = RetryBudget { share: Millionths(200_000), min_concurrency: 0, interval };
        assert!(usage.take_retry(None, Some(&budget)).is_none());
        for _ in 0..10 {
            usage.note_request(Some(&budget));
            drop(usage.take(Kind::Request, None));
        }
        let allowed = (0..9).filter_map(|_| usage.take_retry(None, Some(&budget)).map(drop)).count();
        assert_eq!(allowed, 2, "a fifth of ten, although none is active");
        let one = RetryBudget { min_concurrency: 1, ..budget };
        let taken = usage.take_retry(None, Some(&one));
        assert!(taken.is_some(), "the minimum is of those that are active");
        assert!(usage.take_retry(None, Some(&one)).is_none());
    }
}
