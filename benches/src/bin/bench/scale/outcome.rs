//! Owns what is said of a run: rows of `design.md` §12, and a few lines that say how they came about.

use std::time::Duration;

use super::Options;
use super::changes::{Churn, quantile_ms};
use super::controller::Memory;
use crate::rows::Row;

/// Where the rows stand.
const PATH: &str = "control";
/// What the same figures with half of the services are called.
const HALF: &str = "control-half";

const ACK_P99_MS: f64 = 300.0;
const RSS_MIB: f64 = 300.0;
const COLD_START_S: f64 = 10.0;
/// Bytes of a change with all services, by those with half of them: more is growth.
const GROWTH: f64 = 1.05;

/// What was measured.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) agents: usize,
    pub(super) half: Churn,
    pub(super) whole: Churn,
    /// From the controller's start to the last agent's first whole state.
    pub(super) cold_start: Duration,
    /// From the controller's start until agents could come.
    pub(super) ready: Duration,
    /// Sent until then.
    pub(super) bytes: u64,
    /// CPU time of the controller until then.
    pub(super) cpu: Duration,
    /// Of the controller, after the changes.
    pub(super) memory: Memory,
}

impl Outcome {
    /// One row a figure.
    pub(super) fn rows(&self) -> Vec<Row> {
        let (half, whole) = (&self.half, &self.whole);
        let agents = self.agents as f64;
        let per_change = |churn: &Churn, total: f64| total / churn.arrivals.len().max(1) as f64;
        let cpu_ms = |churn: &Churn| per_change(churn, churn.controller_cpu.as_secs_f64() * 1e3);
        let row = |metric: &str, unit: &str, value: f64| figure(metric, unit, value);
        vec![
            row("ack_p50_ms", "ms", quantile_ms(&whole.arrivals, 0.5))
                .beside(quantile_ms(&half.arrivals, 0.5)),
            row("ack_p99_ms", "ms", quantile_ms(&whole.arrivals, 0.99))
                .beside(quantile_ms(&half.arrivals, 0.99))
                .at_most(ACK_P99_MS),
            row("api_write_p50_ms", "ms", quantile_ms(&whole.writes, 0.5)),
            row("api_write_p99_ms", "ms", quantile_ms(&whole.writes, 0.99)),
            row("after_write_p50_ms", "ms", quantile_ms(&whole.rest, 0.5))
                .beside(quantile_ms(&half.rest, 0.5)),
            row("after_write_p99_ms", "ms", quantile_ms(&whole.rest, 0.99))
                .beside(quantile_ms(&half.rest, 0.99)),
            row("bytes_per_change", "bytes", whole.bytes_per_change())
                .beside(half.bytes_per_change())
                .no_more_than(GROWTH),
            row("bytes_per_change_and_agent", "bytes", whole.bytes_per_change() / agents)
                .beside(half.bytes_per_change() / agents),
            row("responses_per_change_and_agent", "1", per_change(whole, whole.responses as f64) / agents)
                .beside(per_change(half, half.responses as f64) / agents),
            row("controller_cpu_ms_per_change", "ms", cpu_ms(whole)).beside(cpu_ms(half)),
            row("controller_cpus", "1", whole.controller_cpu.as_secs_f64() / whole.time.as_secs_f64())
                .beside(half.controller_cpu.as_secs_f64() / half.time.as_secs_f64()),
            row("controller_rss_mb", "MiB", self.memory.peak).at_most(RSS_MIB),
            row("controller_rss_after_mb", "MiB", self.memory.now),
            row("cold_start_s", "s", self.cold_start.as_secs_f64()).at_most(COLD_START_S),
            row("cold_start_ready_s", "s", self.ready.as_secs_f64()),
            row("cold_start_cpu_s", "s", self.cpu.as_secs_f64()),
            row("cold_start_bytes_per_agent", "bytes", self.bytes as f64 / agents),
        ]
        .into_iter()
        .map(Figure::row)
        .collect()
    }

    /// How the figures came about.
    pub(super) fn explained(&self, options: &Options) -> String {
        let Options { agents, services, pods, rate, .. } = options;
        let reached = |churn: &Churn| churn.arrivals.len() as f64 / churn.time.as_secs_f64();
        format!(
            "{agents} agents, {services} services, {pods} pods; {rate} changes a second asked for, {:.0} made ({} in all), \
             in {} states; baseline is the same with half of the services.\n\
             A change is a pod that becomes ready or unready (its status, then its slice), or is replaced ({} %). ack: from \
             sending the slice to the API server until the last agent has acknowledged the whole state with it; every agent gets \
             every change. api_write: until the API server has answered; after_write: from there on.\n\
             bytes: encoded responses, before HTTP/2 and TLS. controller_rss_mb is the most there was, cold start included. The agents \
             of this program used {:.2} CPUs meanwhile, on the same machine.",
            reached(&self.whole),
            self.whole.arrivals.len(),
            self.whole.generations,
            options.replaced,
            self.whole.own_cpu.as_secs_f64() / self.whole.time.as_secs_f64(),
        )
    }
}

struct Figure(Row);

fn figure(metric: &str, unit: &str, value: f64) -> Figure {
    Figure(Row {
        path: PATH.to_owned(),
        metric: metric.to_owned(),
        value,
        unit: unit.to_owned(),
        baseline: None,
        ratio: None,
        baseline_path: None,
        min: value,
        max: value,
        starts: 1,
        target: None,
        met: None,
        peer: None,
    })
}

impl Figure {
    /// The same figure with half of the services.
    fn beside(mut self, half: f64) -> Self {
        self.0.baseline = Some(half);
        self.0.ratio = (half != 0.0).then(|| self.0.value / half);
        self.0.baseline_path = Some(HALF.to_owned());
        self
    }

    fn at_most(mut self, limit: f64) -> Self {
        self.0.target = Some(format!("<= {limit} {}", self.0.unit));
        self.0.met = Some(self.0.value <= limit);
        self
    }

    /// It does not grow with the number of services.
    fn no_more_than(mut self, limit: f64) -> Self {
        self.0.target = Some(format!("<= {limit}x"));
        self.0.met = self.0.ratio.map(|ratio| ratio <= limit);
        self
    }

    fn row(self) -> Row {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn churn(bytes: u64) -> Churn {
        Churn {
            arrivals: (1..=100).map(Duration::from_millis).collect(),
            writes: vec![Duration::from_millis(2)],
            rest: vec![Duration::from_millis(8)],
            lost: 0,
            time: Duration::from_secs(10),
            bytes,
            responses: 400,
            generations: 50,
            controller_cpu: Duration::from_secs(1),
            own_cpu: Duration::from_secs(1),
        }
    }

    #[test]
    fn the_fixed_names_are_there_and_growth_with_services_is_a_missed_target() {
        let outcome = Outcome {
            agents: 2,
            half: churn(1_000),
            whole: churn(2_000),
            cold_start: Duration::from_secs(4),
            ready: Duration::from_secs(1),
            bytes: 10,
            cpu: Duration::from_secs(2),
            memory: Memory { now: 100.0, peak: 301.0 },
        };
        let rows = outcome.rows();
        let met = |metric: &str| rows.iter().find(|row| row.metric == metric).and_then(|row| row.met);
        for (metric, kept) in [
            ("ack_p99_ms", true),
            ("bytes_per_change", false),
            ("controller_rss_mb", false),
            ("cold_start_s", true),
        ] {
            assert_eq!(met(metric), Some(kept), "{metric}");
        }
        assert!(rows.iter().all(|row| row.path == "control"));
        assert!(rows.iter().any(|row| row.metric == "ack_p50_ms" && row.value == 50.0));
    }
}
