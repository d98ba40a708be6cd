//! Owns the kernel's event ring: refusals are logged, everything else is there when `--log` has `mesh_agent::connection` at debug.
//!
//! Invariants:
//! - The ring is emptied each [`POLL_EACH`], so that it never holds more than that time's events.
//! - Refusals are logged at most [`LINES_MAX`] times a second; the rest is counted in one line.

use std::time::Duration;

use mesh_common::{event::Event, stats::Reason};
use mesh_redirect::{EventKind, Events, Stats, socket_addr};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{names::Names, shared::Shared};
use crate::report::report;

/// The programs do not wake the reader; the ring holds this time's events at 20 000 connections a second.
const POLL_EACH: Duration = Duration::from_millis(100);
/// A scan or a misconfigured client must not fill the disk.
const LINES_MAX: u32 = 20;
/// Events taken at once before others get a turn on the control thread.
const BATCH: usize = 2048;

/// Follows the ring. Runs until it is dropped; cancel safe.
pub(super) async fn follow(mut events: Events, shared: &Shared) {
    // Each record costs a connection time, so the programs write those of connections only for somebody who reads them.
    let wanted = tracing::enabled!(target: "mesh_agent::connection", tracing::Level::DEBUG);
    if let Err(error) = Stats::new(shared.kernel.maps()).report_connections(wanted) {
        tracing::warn!(error = %report(&error), "say whether connections are to be reported");
    }
    let mut tick = interval(POLL_EACH);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut budget = Budget::new(Instant::now());
    loop {
        tick.tick().await;
        let mut taken = 0;
        while let Some(event) = events.next_event() {
            log(&event, shared, &mut budget);
            taken += 1;
            if taken % BATCH == 0 {
                tokio::task::yield_now().await;
            }
        }
        if let Some(lost) = budget.renew(Instant::now()) {
            tracing::warn!(target: "mesh_agent::denied", lost, "more connections were refused");
        }
    }
}

fn log(event: &Event, shared: &Shared, budget: &mut Budget) {
    let Some(kind) = EventKind::of(event) else { return };
    let src = socket_addr(event.src, event.sport);
    let dst = socket_addr(event.dst, event.dport);
    let reason = Reason::from_index(event.reason).map_or("unknown", Reason::as_str);
    match kind {
        EventKind::Deny => {
            if budget.take() {
                let snapshot = shared.snapshot();
                let names = Names::of_workloads(&snapshot, &shared.departed());
                let (client, server) =
                    (names.workload(event.src_workload), names.workload(event.dst_workload));
                tracing::warn!(target: "mesh_agent::denied", %src, %dst, client, server, reason, "connection refused");
            }
        }
        EventKind::Open | EventKind::Close | EventKind::Fail => tracing::debug!(
            target: "mesh_agent::connection",
            kind = ?kind,
            cookie = event.sock_cookie,
            %src,
            %dst,
            dialled = %socket_addr(event.dialled, event.dialled_port),
            bytes_tx = event.bytes_tx,
            bytes_rx = event.bytes_rx,
            duration_us = event.duration_ns / 1000,
            srtt_us = event.srtt_us,
            retrans = event.retrans,
            reason,
        ),
    }
}

/// Lines left in this second.
#[derive(Debug)]
struct Budget {
    left: u32,
    lost: u64,
    since: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { left: LINES_MAX, lost: 0, since: now }
    }

    fn take(&mut self) -> bool {
        if self.left == 0 {
            self.lost += 1;
            return false;
        }
        self.left -= 1;
        true
    }

    /// Starts the next second when it is time; returns how many lines the last one lost.
    fn renew(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.since) < Duration::from_secs(1) {
            return None;
        }
        let lost = self.lost;
        *self = Self::new(now);
        (lost > 0).then_some(lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_budget_are_counted_and_reported_once() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let logged = (0..100).filter(|_| budget.take()).count();
        assert_eq!(logged, LINES_MAX as usize);
        assert_eq!(budget.renew(start + Duration::from_millis(500)), None);
        assert_eq!(budget.renew(start + Duration::from_secs(1)), Some(80));
        assert!(budget.take());
        assert_eq!(budget.renew(start + Duration::from_secs(2)), None);
    }
}
