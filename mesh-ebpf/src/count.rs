//! Counters and histograms.

use mesh_common::stats::{COUNTERS_LEN, HIST_LEN, Hist, Hook, Outcome, Reason, counter_index, hist_index};

use crate::maps::{COUNTERS, HISTS};

/// Bumps hook × outcome × reason on this CPU.
#[inline(always)]
pub fn count(hook: Hook, outcome: Outcome, reason: Reason) {
    let index = counter_index(hook, outcome, reason) & (COUNTERS_LEN - 1);
    if let Some(slot) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: per CPU, and sock_ops, sk_lookup and socket hooks do not preempt each other mid-add; at
        // worst one bump is lost.
        unsafe { *slot += 1 };
    }
}

const _: () = assert!(COUNTERS_LEN.is_power_of_two() && HIST_LEN.is_power_of_two());

/// Adds a value to a log2 histogram on this CPU.
#[inline(always)]
pub fn observe(hist: Hist, value: u64) {
    let index = hist_index(hist, value) & (HIST_LEN - 1);
    if let Some(slot) = HISTS.get_ptr_mut(index) {
        // SAFETY: as above.
        unsafe { *slot += 1 };
    }
}
