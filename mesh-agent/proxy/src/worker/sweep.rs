//! Ending connections that have waited too long. One look at all of them each second costs less than a timer for each.

use std::time::Duration;

use super::TICK_MS;
use crate::{
    close::CloseReason,
    connections::{Connections, Live},
    settings::Settings,
};

/// Stops what is idle, and resets that wait for a receiver that does not read.
pub(super) fn end_overdue(connections: &Connections, settings: &Settings, tick: u32) {
    let idle_max = ticks(settings.idle_timeout);
    let linger_max = ticks(settings.reset_linger);
    connections.each(|live| {
        if let Some(reason) = overdue(live, tick, idle_max, linger_max) {
            live.meter.stop(reason);
        }
    });
}

/// Why the sweep ends a connection, if it does.
fn overdue(live: &Live, tick: u32, idle_max: u32, linger_max: u32) -> Option<CloseReason> {
    if let Some((since, reason)) = live.meter.lingering()
        && tick.wrapping_sub(since) >= linger_max
    {
        return Some(reason);
    }
    live.overdue(tick, idle_max)
}

/// Ticks that are over when a time is: rounded up, and one more because the current tick has begun already.
pub(crate) fn ticks(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis().div_ceil(u128::from(TICK_MS))).unwrap_or(u32::MAX - 1) + 1
}
