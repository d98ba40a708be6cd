//! Owns what `meshctl profile` reads: two readings of what the programs count and cost, and their difference.

use std::{collections::HashMap, io, time::Duration};

use mesh_common::stats::{Hist, Hook, Outcome, Reason};
use mesh_redirect::{Counter, Histogram, MapError, Node, ProgramRuns, RunStats, Stats};
use tokio::time::Instant;

use crate::view::{CounterView, HistogramView, ProfileView, ProgramCostView};

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProfileError {
    #[error("switch the kernel's BPF statistics on")]
    Statistics {
        #[source]
        source: io::Error,
    },
    #[error("read what the programs count")]
    Read {
        #[source]
        source: MapError,
    },
}

/// One reading.
#[derive(Debug)]
struct Reading {
    runs: Vec<ProgramRuns>,
    counters: Vec<Counter>,
    histograms: Vec<Histogram>,
}

/// Reads twice, `window` apart. Cancel safe: the statistics are switched off again on drop.
pub(super) async fn profile(node: &Node, window: Duration) -> Result<ProfileView, ProfileError> {
    let _on = RunStats::enable().map_err(|source| ProfileError::Statistics { source })?;
    let stats = Stats::new(node.maps());
    let begun = Instant::now();
    let before = read(node, &stats)?;
    tokio::time::sleep(window).await;
    let after = read(node, &stats)?;
    Ok(difference(&before, &after, begun.elapsed()))
}

fn read(node: &Node, stats: &Stats) -> Result<Reading, ProfileError> {
    let failed = |source| ProfileError::Read { source };
    Ok(Reading {
        runs: node.program_runs(),
        counters: stats.counters().map_err(failed)?,
        histograms: stats.histograms().map_err(failed)?,
    })
}

fn difference(before: &Reading, after: &Reading, window: Duration) -> ProfileView {
    let earlier: HashMap<&str, &ProgramRuns> = before.runs.iter().map(|p| (p.name.as_str(), p)).collect();
    let mut programs: Vec<ProgramCostView> = after
        .runs
        .iter()
        .map(|now| {
            let (calls, ns) = earlier.get(now.name.as_str()).map_or((0, 0), |p| (p.runs, p.run_time_ns));
            // An arrival instance may have left within the window, with its share of the sums.
            cost(now, now.runs.saturating_sub(calls), now.run_time_ns.saturating_sub(ns))
        })
        .collect();
    programs.sort_by(|a, b| b.ns.cmp(&a.ns).then_with(|| a.program.cmp(&b.program)));

    let earlier: HashMap<(Hook, Outcome, Reason), u64> =
        before.counters.iter().map(|c| ((c.hook, c.outcome, c.reason), c.count)).collect();
    let mut counters: Vec<CounterView> = after
        .counters
        .iter()
        .map(|now| {
            (now, now.count - earlier.get(&(now.hook, now.outcome, now.reason)).unwrap_or(&0).min(&now.count))
        })
        .filter(|(_, count)| *count > 0)
        .map(|(now, count)| CounterView {
            hook: now.hook.as_str().to_owned(),
            outcome: now.outcome.as_str().to_owned(),
            reason: now.reason.as_str().to_owned(),
            count,
        })
        .collect();
    counters.sort_by(|a, b| {
        let name = |c: &CounterView| (c.hook.clone(), c.outcome.clone(), c.reason.clone());
        b.count.cmp(&a.count).then_with(|| name(a).cmp(&name(b)))
    });

    let earlier: HashMap<Hist, &Histogram> = before.histograms.iter().map(|h| (h.hist, h)).collect();
    let window_counts = |now: &Histogram| -> Vec<u64> {
        let old = earlier.get(&now.hist).map_or(&[][..], |h| &h.buckets);
        let old = old.iter().copied().chain(std::iter::repeat(0));
        now.buckets.iter().zip(old).map(|(now, old)| now.saturating_sub(old)).collect()
    };
    ProfileView {
        window_s: window.as_secs_f64(),
        programs,
        counters,
        histograms: after
            .histograms
            .iter()
            .map(|h| HistogramView::from_log2(h.hist.as_str(), &window_counts(h)))
            .collect(),
        histograms_total: after
            .histograms
            .iter()
            .map(|h| HistogramView::from_log2(h.hist.as_str(), &h.buckets))
            .collect(),
    }
}

fn cost(program: &ProgramRuns, calls: u64, ns: u64) -> ProgramCostView {
    ProgramCostView {
        program: program.name.clone(),
        instances: program.instances,
        calls,
        ns,
        ns_per_call: (calls > 0).then(|| ns as f64 / calls as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(runs: u64, count: u64, bucket: u64) -> Reading {
        let mut buckets = vec![0; 64];
        buckets[15] = bucket;
        let program =
            |name: &str, runs| ProgramRuns { name: name.into(), instances: 1, runs, run_time_ns: runs * 200 };
        Reading {
            runs: vec![program("recvmsg4", 0), program("connect4", runs)],
            counters: vec![Counter {
                hook: Hook::Connect4,
                outcome: Outcome::Direct,
                reason: Reason::Ok,
                count,
            }],
            histograms: vec![Histogram { hist: Hist::ConnectNs, buckets }],
        }
    }

    #[test]
    fn a_profile_is_the_difference_of_two_readings() {
        let view = difference(&reading(10, 5, 2), &reading(110, 65, 42), Duration::from_secs(2));
        assert_eq!(view.programs[0].program, "connect4");
        assert_eq!((view.programs[0].calls, view.programs[0].ns_per_call), (100, Some(200.0)));
        assert_eq!(view.programs[1].ns_per_call, None);
        assert_eq!(view.counters[0].count, 60);
        assert_eq!((view.histograms[0].count, view.histograms_total[0].count), (40, 42));
    }

    #[test]
    fn what_did_not_move_is_left_out() {
        let view = difference(&reading(10, 5, 2), &reading(10, 5, 2), Duration::from_secs(1));
        assert!(view.counters.is_empty());
        assert_eq!(view.histograms[0].p50, None);
    }
}
