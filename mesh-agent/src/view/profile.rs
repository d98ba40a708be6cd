//! Owns the shape of `meshctl profile`, and how percentiles are read out of log2 buckets.

use serde::{Deserialize, Serialize};

/// What the hooks cost and did during a window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProfileView {
    /// Length of the window in seconds.
    pub window_s: f64,
    /// Cost of each program, most expensive first.
    pub programs: Vec<ProgramCostView>,
    /// Counters that moved, largest first.
    pub counters: Vec<CounterView>,
    /// Distributions over the window.
    pub histograms: Vec<HistogramView>,
    /// Distributions since the maps were made, for windows in which little happened.
    pub histograms_total: Vec<HistogramView>,
}

/// Cost of one program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProgramCostView {
    /// Name of the program.
    pub program: String,
    /// Instances summed: `arrival` has one per pod.
    pub instances: u32,
    /// Calls in the window.
    pub calls: u64,
    /// Nanoseconds spent in it in the window.
    pub ns: u64,
    /// Mean cost of a call; absent when there was none.
    pub ns_per_call: Option<f64>,
}

/// One counter of the hooks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CounterView {
    /// Hook.
    pub hook: String,
    /// What it did.
    pub outcome: String,
    /// Why.
    pub reason: String,
    /// How often in the window.
    pub count: u64,
}

/// One distribution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HistogramView {
    /// What is measured; ends in its unit.
    pub name: String,
    /// Values seen.
    pub count: u64,
    /// Median, interpolated within its bucket; absent when nothing was seen.
    pub p50: Option<f64>,
    /// 90th percentile.
    pub p90: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
    /// Buckets that hold something, in rising order.
    pub buckets: Vec<BucketView>,
}

/// Values in `[from, to)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketView {
    /// Smallest value of the bucket.
    pub from: u64,
    /// First value beyond the bucket.
    pub to: u64,
    /// Values in it.
    pub count: u64,
}

impl HistogramView {
    /// Makes the view of a log2 histogram: `counts[i]` values v had floor(log2(v)) = i (0 counts as bucket 0).
    pub fn from_log2(name: &str, counts: &[u64]) -> Self {
        let buckets: Vec<BucketView> = counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(|(i, count)| BucketView {
                from: if i == 0 { 0 } else { 1_u64 << i.min(63) },
                to: if i >= 63 { u64::MAX } else { 1_u64 << (i + 1) },
                count: *count,
            })
            .collect();
        let count = buckets.iter().map(|b| b.count).sum();
        Self {
            name: name.to_owned(),
            count,
            p50: quantile(&buckets, count, 0.50),
            p90: quantile(&buckets, count, 0.90),
            p99: quantile(&buckets, count, 0.99),
            buckets,
        }
    }
}

/// Linear within the bucket that holds the wanted rank: the error is below the bucket's width.
fn quantile(buckets: &[BucketView], count: u64, q: f64) -> Option<f64> {
    if count == 0 {
        return None;
    }
    let rank = q * count as f64;
    let mut below = 0.0;
    for bucket in buckets {
        let inside = bucket.count as f64;
        if below + inside >= rank {
            let share = (rank - below) / inside;
            return Some(bucket.from as f64 + share * (bucket.to - bucket.from) as f64);
        }
        below += inside;
    }
    buckets.last().map(|b| b.to as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_in_the_bucket_that_holds_their_rank() {
        let mut counts = vec![0; 64];
        counts[10] = 90; // 1024..2048
        counts[20] = 10; // 1 Mi..2 Mi
        let view = HistogramView::from_log2("connect_ns", &counts);
        assert_eq!(view.count, 100);
        assert!((1024.0..2048.0).contains(&view.p50.unwrap()), "{view:?}");
        assert!((1024.0..=2048.0).contains(&view.p90.unwrap()), "{view:?}");
        assert!((1_048_576.0..2_097_152.0).contains(&view.p99.unwrap()), "{view:?}");
    }

    #[test]
    fn an_empty_histogram_has_no_percentiles() {
        let view = HistogramView::from_log2("srtt_us", &[0; 64]);
        assert_eq!((view.p50, view.p99, view.count), (None, None, 0));
        assert!(view.buckets.is_empty());
    }

    #[test]
    fn the_first_bucket_starts_at_zero_and_the_last_ends_at_the_largest_number() {
        let mut counts = vec![0; 64];
        counts[0] = 1;
        counts[63] = 1;
        let view = HistogramView::from_log2("duration_ns", &counts);
        assert_eq!((view.buckets[0].from, view.buckets[0].to), (0, 2));
        assert_eq!((view.buckets[1].from, view.buckets[1].to), (1 << 63, u64::MAX));
    }
}
