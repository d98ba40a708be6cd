//! Endpoints that fail are left out for a while (E5, S44).
//!
//! Invariants:
//! - At most the given share is out at a time, but always one may be (unless the share is 0).
//! - An endpoint is out longer each time, and forgets its times while it is well.
//! - State is kept only of endpoints that have failed.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use crate::route::cluster::OutlierDetection;

/// Longest time that an endpoint is out, unless the first time is longer already.
pub const EJECTION_MAX: Duration = Duration::from_secs(300);

/// An endpoint that has not failed for so long is forgotten: it may be gone.
const MEMORY: Duration = EJECTION_MAX;

/// What was seen of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Observed {
    /// It answered with this status.
    Status(u16),
    /// It was connected to (TCP), or a stream ended well.
    Success,
    /// It could not be connected to, ended the connection, or did not answer in time.
    LocalFailure,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    errors: u32,
    gateway_errors: u32,
    local_failures: u32,
    /// Times that it was out and has not outlived.
    ejections: u32,
    /// On the caller's clock.
    out_until: Option<Duration>,
    /// When it last failed, on the caller's clock.
    failed: Duration,
}

/// What is remembered of an endpoint, for those who ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Consecutive failures, by the count that is nearest to its limit.
    pub failures: u32,
    /// Times that it was out and has not outlived.
    pub ejections: u32,
    /// It is out until then, on the caller's clock.
    pub out_until: Option<Duration>,
}

/// Which endpoints of one destination are out.
#[derive(Clone, Debug, Default)]
pub struct OutlierDetector {
    states: HashMap<SocketAddr, State>,
    out: usize,
    swept: Option<Duration>,
}

impl OutlierDetector {
    /// Takes in what was seen of an endpoint; whether that puts it out now. `total` is the number of endpoints.
    pub fn observe(
        &mut self,
        rules: &OutlierDetection,
        now: Duration,
        endpoint: SocketAddr,
        observed: Observed,
        total: usize,
    ) -> bool {
        let is_error = |status: u16| {
            if rules.error_statuses.is_empty() {
                (500..600).contains(&status)
            } else {
                rules.error_statuses.iter().any(|(first, last)| (*first..=*last).contains(&status))
            }
        };
        let (is_failure, is_gateway) = match observed {
            Observed::Status(status) => (is_error(status), (502..=504).contains(&status)),
            Observed::Success => (false, false),
            Observed::LocalFailure => (true, true),
        };
        let state = if is_failure || is_gateway {
            let state = self.states.entry(endpoint).or_default();
            state.failed = now;
            state
        } else {
            // Nothing to forget of one that never failed.
            let Some(state) = self.states.get_mut(&endpoint) else { return false };
            state
        };
        let count = |counter: &mut u32, is_failure: bool| {
            *counter = if is_failure { counter.saturating_add(1) } else { 0 };
        };
        if rules.split_local && observed == Observed::LocalFailure {
            count(&mut state.local_failures, true);
        } else {
            // Whatever answers has been reached.
            state.local_failures = 0;
            count(&mut state.errors, is_failure);
            count(&mut state.gateway_errors, is_gateway);
        }
        let reached =
            |limit: Option<u32>, counter: u32| limit.is_some_and(|limit| limit > 0 && counter >= limit);
        let is_outlier = reached(rules.consecutive_5xx, state.errors)
            || reached(rules.consecutive_gateway, state.gateway_errors)
            || (rules.split_local && reached(rules.consecutive_local, state.local_failures));
        if !is_outlier || state.out_until.is_some() {
            return false;
        }
        let share_after = (self.out as u64 + 1) * 100;
        let allowed = u64::from(rules.max_ejection_percent) * total as u64;
        if rules.max_ejection_percent == 0 || (self.out > 0 && share_after > allowed) {
            return false;
        }
        let ejections = state.ejections.saturating_add(1);
        let longest = EJECTION_MAX.max(rules.base_ejection);
        let out_for = rules.base_ejection.saturating_mul(ejections).min(longest);
        let out_until = Some(now.saturating_add(out_for));
        *state = State { ejections, out_until, failed: now, ..State::default() };
        self.out += 1;
        true
    }

    /// Brings back those whose time is over, once per interval; says which. To be called at least as often as the interval.
    pub fn sweep(&mut self, rules: &OutlierDetection, now: Duration) -> Vec<SocketAddr> {
        if self.swept.is_some_and(|swept| now < swept.saturating_add(rules.interval)) {
            return Vec::new();
        }
        self.swept = Some(now);
        let mut back = Vec::new();
        for (endpoint, state) in &mut self.states {
            match state.out_until {
                Some(until) if until <= now => {
                    state.out_until = None;
                    back.push(*endpoint);
                }
                Some(_) => {}
                None => state.ejections = state.ejections.saturating_sub(1),
            }
        }
        self.out -= back.len();
        self.states.retain(|_, state| {
            let fails = state.errors > 0 || state.gateway_errors > 0 || state.local_failures > 0;
            let is_recent = now < state.failed.saturating_add(MEMORY);
            state.out_until.is_some() || state.ejections > 0 || (fails && is_recent)
        });
        back
    }

    /// Whether an endpoint is out.
    pub fn is_out(&self, endpoint: SocketAddr) -> bool {
        self.states.get(&endpoint).is_some_and(|state| state.out_until.is_some())
    }

    /// What is remembered of endpoints, in no order; of others nothing is: they have not failed of late.
    pub fn records(&self) -> impl Iterator<Item = (SocketAddr, Record)> {
        self.states.iter().map(|(endpoint, state)| {
            let record = Record {
                failures: state.errors.max(state.gateway_errors).max(state.local_failures),
                ejections: state.ejections,
                out_until: state.out_until,
            };
            (*endpoint, record)
        })
    }

    /// The endpoints that are out, in no order.
    pub fn out(&self) -> impl Iterator<Item = SocketAddr> {
        self.states.iter().filter(|(_, state)| state.out_until.is_some()).map(|(endpoint, _)| *endpoint)
    }

    /// Forgets endpoints that are gone.
    pub fn keep_only(&mut self, is_endpoint: impl Fn(SocketAddr) -> bool) {
        self.states.retain(|endpoint, _| is_endpoint(*endpoint));
        self.out = self.states.values().filter(|state| state.out_until.is_some()).count();
    }
}

#[cfg(test)]
mod tests;
