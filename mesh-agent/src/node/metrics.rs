//! Owns the agent's own metrics: what the kernel programs count, and the state of pods, sources and tables.
//!
//! Everything is read at the scrape, so an idle agent does nothing.

mod heap;
mod identities;

use std::{fmt, ops::RangeInclusive, sync::Arc};

use mesh_common::stats::Hist;
use mesh_core::resolve::{Failure, NameState};
use mesh_redirect::{Counter, Histogram, Stats, monotonic_ns};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use super::{edges, forget::Figures, names::Names, shared::Shared};
use crate::{
    report::report,
    view::{EdgeCountersView, PodState},
};

/// Largest number of edges exported; the kernel keeps the most recent 8192.
const EDGES_MAX: usize = 8192;

/// Picks one counter of an edge.
type Value = fn(&EdgeCountersView) -> u64;

/// Reads the kernel and the control loop at each scrape.
#[derive(Debug)]
pub(super) struct AgentMetrics {
    shared: Arc<Shared>,
    stats: Stats,
}

impl AgentMetrics {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        Self { stats: Stats::new(shared.kernel.maps()), shared: Arc::clone(shared) }
    }

    fn pods(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let outcome = self.shared.outcome();
        let in_state = |state| outcome.pods.iter().filter(|pod| pod.state() == state).count() as i64;
        let mut pods =
            family(encoder, "mesh_pods", "Local pods that ask for the mesh, by state", MetricType::Gauge)?;
        for state in PodState::ALL {
            sample(&mut pods, &[("state", state.as_str())], &ConstGauge::new(in_state(state)))?;
        }
        let unenrolled = in_state(PodState::Pending) + in_state(PodState::Failed);
        let help = "Local pods that should be in the mesh and are not";
        gauge(encoder, "mesh_pods_unenrolled", help, unenrolled)?;
        let help = "Table entries that find no room in the kernel, by map";
        let mut refused = family(encoder, "mesh_table_entries_refused", help, MetricType::Gauge)?;
        for (map, entries) in &outcome.refused {
            sample(&mut refused, &[("map", map)], &ConstGauge::new(*entries as i64))?;
        }
        Ok(())
    }

    fn control(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let source = self.shared.source();
        let help = "Problems of the configuration, by level";
        let mut problems = family(encoder, "mesh_source_problems", help, MetricType::Gauge)?;
        for (label, found) in [("error", &source.errors), ("warning", &source.warnings)] {
            sample(&mut problems, &[("level", label)], &ConstGauge::new(found.len() as i64))?;
        }
        let version = self.shared.snapshot().version() as i64;
        gauge(encoder, "mesh_snapshot_version", "Version of the configuration in force", version)?;
        if let Some(age_ns) = self.shared.beat.age_ns(monotonic_ns()) {
            let help = "Seconds since the slowest worker stamped the heartbeat";
            let age = ConstGauge::new(age_ns as f64 / 1e9);
            age.encode(family(encoder, "mesh_heartbeat_age_seconds", help, MetricType::Gauge)?)?;
        }
        let (unreadable, lost) = self.shared.bridge.failures();
        counter(encoder, "mesh_kernel_reads_failed", "Socket origins that could not be read", unreadable)?;
        counter(encoder, "mesh_verdicts_lost", "Verdicts that found no room in the kernel", lost)?;
        let help = "Established Direct connections closed because a new policy denies them, by reason";
        let mut closed = family(encoder, "mesh_direct_connections_revoked", help, MetricType::Counter)?;
        for (reason, count) in self.shared.revocations.closed() {
            sample(&mut closed, &[("reason", reason)], &ConstCounter::new(count))?;
        }
        let Figures { deleted, left_out, open, failed } = self.shared.forgetting.figures();
        let help = "Closed connections of before pods joined that the node forgot";
        counter(encoder, "mesh_tracked_connections_forgotten", help, deleted)?;
        let help = "Open connections of before pods joined, to be forgotten when they end";
        gauge(encoder, "mesh_tracked_connections_watched", help, open as i64)?;
        let help = "Open connections of before pods joined that are too many to be forgotten when they end";
        counter(encoder, "mesh_tracked_connections_left_out", help, left_out)?;
        let help = "Times that the node's table of tracked connections could not be read or changed";
        counter(encoder, "mesh_tracked_connections_failures", help, failed)?;
        let help = "Times that the node went from one agent to another, by what this agent had to do with it";
        let mut hand_overs = family(encoder, "mesh_handovers", help, MetricType::Counter)?;
        for (outcome, count) in self.shared.hand_overs.counts() {
            sample(&mut hand_overs, &[("outcome", outcome)], &ConstCounter::new(count))?;
        }
        let help = "Pods that started, by whether the controller had told this node of them";
        let mut hearings = family(encoder, "mesh_pod_starts", help, MetricType::Counter)?;
        for (heard, count) in self.shared.hearings.counts() {
            sample(&mut hearings, &[("heard", heard)], &ConstCounter::new(count))?;
        }
        Ok(())
    }

    /// Names whose addresses are endpoints, and what came of asking for them.
    fn names(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (names, left_out) = self.shared.resolved.names();
        let count = |is: fn(&NameState) -> bool| names.iter().filter(|name| is(name)).count() as i64;
        let help = "Names whose addresses are endpoints, by state";
        let mut states = family(encoder, "mesh_names", help, MetricType::Gauge)?;
        for (state, number) in [
            ("resolved", count(|name| name.failing.is_none() && !name.addrs.is_empty())),
            ("waiting", count(|name| name.failing.is_none() && name.addrs.is_empty())),
            ("stale", count(|name| name.failing.is_some() && !name.addrs.is_empty())),
            ("failed", count(|name| name.failing.is_some() && name.addrs.is_empty())),
            ("left_out", left_out as i64),
        ] {
            sample(&mut states, &[("state", state)], &ConstGauge::new(number))?;
        }
        let counts = self.shared.resolved.counts();
        let help = "Times that names of endpoints were asked for, by outcome";
        let mut lookups = family(encoder, "mesh_name_lookups", help, MetricType::Counter)?;
        sample(&mut lookups, &[("outcome", "answered")], &ConstCounter::new(counts.answers))?;
        for failure in Failure::ALL {
            let count = counts.failures.get(&failure).copied().unwrap_or(0);
            sample(&mut lookups, &[("outcome", failure.as_str())], &ConstCounter::new(count))?;
        }
        Ok(())
    }

    fn hooks(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counters = self.stats.counters().unwrap_or_else(|error| {
            tracing::warn!(error = %report(&error), "read the hooks' counters");
            Vec::new()
        });
        let help = "What the kernel programs did and why, by hook";
        let mut hooks = family(encoder, "mesh_hook_decisions", help, MetricType::Counter)?;
        for Counter { hook, outcome, reason, count } in counters {
            let labels =
                [("hook", hook.as_str()), ("outcome", outcome.as_str()), ("reason", reason.as_str())];
            sample(&mut hooks, &labels, &ConstCounter::new(count))?;
        }
        Ok(())
    }

    fn histograms(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let histograms = self.stats.histograms().unwrap_or_else(|error| {
            tracing::warn!(error = %report(&error), "read the hooks' histograms");
            Vec::new()
        });
        for histogram in histograms {
            let (name, help, seconds, bounds) = match histogram.hist {
                // 1 µs to 69 s: a SYN is given up after about 130 s, on an app's own limit after 10 to 60 s.
                Hist::ConnectNs => {
                    let help = "Time from connect to established, as the client sees it";
                    ("mesh_connect_seconds", help, 1e-9, 10..=36)
                }
                // 1 µs to 67 s.
                Hist::SrttUs => ("mesh_srtt_seconds", "Smoothed round trip time at close", 1e-6, 0..=26),
                // 16 µs to 20 h.
                Hist::DurationNs => ("mesh_connection_seconds", "Life of connections", 1e-9, 14..=46),
            };
            let help = format!("{help}; the sum is estimated from the buckets");
            let (sum, count, buckets) = in_seconds(&histogram, seconds, bounds);
            let mut metric = family(encoder, name, &help, MetricType::Histogram)?;
            metric.encode_histogram::<[(&str, &str); 0]>(sum, count, &buckets, None)?;
        }
        Ok(())
    }

    fn edges(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let kernel = self.stats.edges().unwrap_or_else(|error| {
            tracing::warn!(error = %report(&error), "read the edges");
            Vec::new()
        });
        let snapshot = self.shared.snapshot();
        let mut edges = edges::edges(
            &kernel,
            &self.shared.tunnelled(),
            &[],
            &Names::new(&snapshot, &self.shared.departed()),
        );
        edges.truncate(EDGES_MAX);
        let metrics: [(&str, &str, Value); 5] = [
            ("mesh_edge_connections_opened", "Connections established, by edge", |c| c.opened),
            ("mesh_edge_connections_closed", "Connections closed, by edge", |c| c.closed),
            ("mesh_edge_connects_failed", "Connects that failed, by edge", |c| c.failed),
            ("mesh_edge_sent_bytes", "Bytes from client to server of closed connections, by edge", |c| {
                c.bytes_tx
            }),
            ("mesh_edge_received_bytes", "Bytes from server to client of closed connections, by edge", |c| {
                c.bytes_rx
            }),
        ];
        for (name, help, value) in metrics {
            let mut metric = family(encoder, name, help, MetricType::Counter)?;
            for edge in &edges {
                let port = edge.key.port.to_string();
                let labels = [
                    ("source", edge.key.source.as_str()),
                    ("destination", &edge.key.destination),
                    ("service", &edge.key.service),
                    ("port", &port),
                    ("direction", &edge.key.direction),
                    ("path", edge.key.path.as_str()),
                ];
                sample(&mut metric, &labels, &ConstCounter::new(value(&edge.counters)))?;
            }
        }
        Ok(())
    }
}

impl Collector for AgentMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.pods(&mut encoder)?;
        self.control(&mut encoder)?;
        self.certificates(&mut encoder)?;
        self.authority(&mut encoder)?;
        self.names(&mut encoder)?;
        self.hooks(&mut encoder)?;
        self.histograms(&mut encoder)?;
        self.edges(&mut encoder)?;
        heap::encode(&mut encoder)
    }
}

fn family<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    name: &'a str,
    help: &'a str,
    kind: MetricType,
) -> Result<MetricEncoder<'a>, fmt::Error> {
    encoder.encode_descriptor(name, &format!("{help}."), None, kind)
}

fn sample<M: EncodeMetric>(
    family: &mut MetricEncoder<'_>,
    labels: &[(&str, &str)],
    value: &M,
) -> fmt::Result {
    value.encode(family.encode_family(&labels)?)
}

/// Sum, count, and counts by upper bound, as the encoder wants them.
type Encoded = (f64, u64, Vec<(f64, u64)>);

/// Converts log2 buckets whose unit is `seconds` long. `bounds` are the exponents of the finite upper bounds: always
/// the same ones, because a bucket that comes and goes breaks rates. The sum is estimated.
fn in_seconds(histogram: &Histogram, seconds: f64, bounds: RangeInclusive<i32>) -> Encoded {
    let mut buckets: Vec<(f64, u64)> = bounds.clone().map(|e| (2_f64.powi(e) * seconds, 0)).collect();
    // The encoder writes this bound as +Inf.
    buckets.push((f64::INFINITY, 0));
    let last = buckets.len() - 1;
    let mut sum = 0.0;
    for (exponent, count) in (1_i32..).zip(&histogram.buckets) {
        // The middle of a bucket that reaches from half its bound to its bound.
        sum += *count as f64 * 2_f64.powi(exponent) * 0.75 * seconds;
        let at = usize::try_from(exponent - bounds.start()).unwrap_or(0).min(last);
        if let Some(bucket) = buckets.get_mut(at) {
            bucket.1 += count;
        }
    }
    (sum, histogram.total(), buckets)
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: i64) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    gauge.encode(family(encoder, name, help, MetricType::Gauge)?)
}

fn counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let counter = ConstCounter::new(value);
    counter.encode(family(encoder, name, help, MetricType::Counter)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_keeps_its_counts_under_fixed_bounds() {
        let mut buckets = vec![0; 64];
        // Below the first bound, within, and beyond the last.
        (buckets[3], buckets[15], buckets[60]) = (5, 3, 1);
        let histogram = Histogram { hist: Hist::ConnectNs, buckets };
        let (sum, count, buckets) = in_seconds(&histogram, 1e-9, 10..=36);
        assert_eq!((count, buckets.len()), (9, 28));
        assert_eq!(buckets[0].1, 5);
        let within = buckets.iter().find(|(bound, _)| (bound * 1e9).round() == 65_536.0);
        assert_eq!(within.map(|(_, count)| *count), Some(3));
        assert_eq!(buckets[27], (f64::INFINITY, 1));
        assert!(sum > 2_f64.powi(60) * 1e-9, "{sum}");
    }
}
