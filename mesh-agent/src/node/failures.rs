//! Owns what went wrong with each pod, and when it is tried again.
//!
//! Invariants:
//! - The pause doubles with each failure, within bounds; a changed configuration is tried at once.
//! - A pod that is no longer wanted is forgotten.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use mesh_core::{id::WorkloadId, plan::PodConfig};

/// First pause: a namespace that is being set up is there within this time.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// Longest pause: a port that an app gave back is noticed within this time.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// The last failure of one pod.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// The error with its causes.
    pub(super) reason: String,
    /// Failures since the last success.
    pub(super) attempts: u32,
    /// Not before this.
    pub(super) retry_at: Instant,
    config: PodConfig,
}

/// Failures by pod.
#[derive(Debug, Default)]
pub(super) struct Failures(BTreeMap<WorkloadId, Failure>);

impl Failures {
    /// Whether a pod, wanted like this, has to wait.
    pub(super) fn must_wait(&self, config: &PodConfig, now: Instant) -> bool {
        self.0
            .get(&config.workload)
            .is_some_and(|failure| failure.config == *config && now < failure.retry_at)
    }

    /// Notes a failure. Returns whether it is news: the first one, or another reason than last time.
    pub(super) fn note(&mut self, config: &PodConfig, reason: String, now: Instant) -> bool {
        let before = self.0.get(&config.workload).filter(|failure| failure.config == *config);
        let news = before.is_none_or(|failure| failure.reason != reason);
        let attempts = before.map_or(0, |failure| failure.attempts).saturating_add(1);
        let failure = Failure { reason, attempts, retry_at: now + pause(attempts), config: config.clone() };
        self.0.insert(config.workload, failure);
        news
    }

    /// Forgets a pod that is well.
    pub(super) fn clear(&mut self, pod: WorkloadId) {
        self.0.remove(&pod);
    }

    /// Forgets pods that are no longer wanted.
    pub(super) fn keep_only(&mut self, wanted: impl Fn(WorkloadId) -> bool) {
        self.0.retain(|pod, _| wanted(*pod));
    }

    /// The failure of a pod.
    pub(super) fn of(&self, pod: WorkloadId) -> Option<&Failure> {
        self.0.get(&pod)
    }

    /// When the next pod is to be tried again.
    pub(super) fn next_try(&self) -> Option<Instant> {
        self.0.values().map(|failure| failure.retry_at).min()
    }
}

fn pause(attempts: u32) -> Duration {
    let doubled = 1_u32.checked_shl(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
    PAUSE_MIN.saturating_mul(doubled).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::fixtures::pod_config;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let pauses: Vec<u128> = [1, 2, 3, 7, 40, u32::MAX].map(|n| pause(n).as_millis()).into();
        assert_eq!(pauses, [500, 1000, 2000, 30_000, 30_000, 30_000]);
    }

    #[test]
    fn a_failed_pod_waits_unless_its_configuration_changes() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let config = pod_config("shop", "cart");
        assert!(failures.note(&config, "port 15001 is taken".into(), now));
        assert!(failures.must_wait(&config, now));
        assert!(!failures.must_wait(&config, now + PAUSE_MIN));
        let changed = PodConfig { netns: "/run/netns/other".into(), ..config.clone() };
        assert!(!failures.must_wait(&changed, now));
        assert!(failures.note(&changed, "port 15001 is taken".into(), now));
        assert_eq!(failures.of(config.workload).unwrap().attempts, 1, "counted anew");
    }

    #[test]
    fn the_same_failure_again_is_no_news_but_another_reason_is() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let config = pod_config("shop", "cart");
        assert!(failures.note(&config, "a".into(), now));
        assert!(!failures.note(&config, "a".into(), now));
        assert!(failures.note(&config, "b".into(), now));
        assert_eq!(failures.of(config.workload).unwrap().attempts, 3);
        assert_eq!(failures.next_try(), Some(now + pause(3)));
        failures.clear(config.workload);
        assert_eq!(failures.next_try(), None);
    }
}
