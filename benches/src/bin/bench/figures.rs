//! Owns what is measured, in which unit, and what the project promises about it.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use mesh_benches::load::task::{Answer, Task, Timing};

use crate::cost::Spent;
use crate::paths::Path;

const GIB: f64 = (1_u64 << 30) as f64;
const KIB: f64 = 1024.0;
const MIB: f64 = KIB * KIB;

/// A column of the table. The first seven names are fixed by `design.md` §12.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    RttP50,
    RttP99,
    Throughput64k,
    Throughput64kC4,
    Throughput1k,
    ConnectRequestRate,
    HttpP50C1,
    HttpP99C1,
    HttpRpsC32,
    HttpP99Load,
    CpuPer10kHttp,
    AllocationsPerRequest,
    CpuPerGib,
    CpuPerGib1k,
    CpuPer10kRequests,
    CpuPer10kExchanges,
    Rss,
    RssIdle,
    RssHundredPods,
    RssPerPod,
    RssPerTunnelled,
    Connect,
    ConnectAllServices,
    TcpEvents,
    Arrival,
    PeerName,
    AllHooksPerConnection,
    AllHooksAllServices,
    UdpBare,
    UdpEmptyAdded,
    UdpMissAdded,
    UdpServiceAdded,
    UdpServicesAdded,
    RunsWhileStreaming,
}

/// Which way is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Higher,
    Lower,
}

impl Metric {
    /// Name in rows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::RttP50 => "rtt_p50",
            Self::RttP99 => "rtt_p99",
            Self::Throughput64k => "throughput_64k",
            Self::Throughput64kC4 => "throughput_64k_c4",
            Self::Throughput1k => "throughput_1k",
            Self::ConnectRequestRate => "connect_request_rate",
            Self::HttpP50C1 => "http_p50_c1",
            Self::HttpP99C1 => "http_p99_c1",
            Self::HttpRpsC32 => "http_rps_c32",
            Self::HttpP99Load => "http_p99_load70",
            Self::CpuPer10kHttp => "cpu_s_per_10k_http",
            Self::AllocationsPerRequest => "allocations_per_request",
            Self::CpuPerGib => "cpu_s_per_gib",
            Self::CpuPerGib1k => "cpu_s_per_gib_1k",
            Self::CpuPer10kRequests => "cpu_s_per_10k_requests",
            Self::CpuPer10kExchanges => "cpu_s_per_10k_exchanges",
            Self::Rss => "rss",
            Self::RssIdle => "rss_idle",
            Self::RssHundredPods => "rss_100_pods",
            Self::RssPerPod => "rss_per_pod",
            Self::RssPerTunnelled => "rss_per_idle_tunnelled_connection",
            Self::Connect => "connect_ns",
            Self::ConnectAllServices => "connect_all_services_ns",
            Self::TcpEvents => "tcp_events_ns_per_connection",
            Self::Arrival => "arrival_ns_per_connection",
            Self::PeerName => "getpeername_ns_per_connection",
            Self::AllHooksPerConnection => "all_hooks_ns_per_connection",
            Self::AllHooksAllServices => "all_hooks_all_services_ns_per_connection",
            Self::UdpBare => "udp_connect_bare_ns",
            Self::UdpEmptyAdded => "udp_empty_program_added_ns",
            Self::UdpMissAdded => "udp_unmeshed_pod_added_ns",
            Self::UdpServiceAdded => "udp_one_service_added_ns",
            Self::UdpServicesAdded => "udp_all_services_added_ns",
            Self::RunsWhileStreaming => "program_runs_while_streaming",
        }
    }

    /// Unit in rows.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Self::RttP50 | Self::RttP99 | Self::HttpP50C1 | Self::HttpP99C1 | Self::HttpP99Load => "us",
            Self::Throughput64k | Self::Throughput64kC4 | Self::Throughput1k => "Gbit/s",
            Self::ConnectRequestRate | Self::HttpRpsC32 => "1/s",
            Self::CpuPerGib
            | Self::CpuPerGib1k
            | Self::CpuPer10kRequests
            | Self::CpuPer10kExchanges
            | Self::CpuPer10kHttp => "s",
            Self::Rss | Self::RssIdle | Self::RssHundredPods => "MiB",
            Self::RssPerPod | Self::RssPerTunnelled => "KiB",
            Self::AllocationsPerRequest => "1",
            Self::RunsWhileStreaming => "runs",
            _ => "ns",
        }
    }

    /// Which way is better.
    pub(crate) fn better(self) -> Better {
        match self {
            Self::Throughput64k
            | Self::Throughput64kC4
            | Self::Throughput1k
            | Self::ConnectRequestRate
            | Self::HttpRpsC32 => Better::Higher,
            _ => Better::Lower,
        }
    }
}

/// What issues 3, 4 and 5 ask of a figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Target {
    /// At least this share of the baseline's goodness: `value / baseline` where more is better, else its inverse.
    Share(f64),
    /// At most so much above the baseline, in the metric's unit.
    Above(f64),
    /// At most this, in the metric's unit.
    AtMost(f64),
}

/// The promise for a path's metric, if there is one.
pub(crate) fn target(path: &str, metric: Metric) -> Option<Target> {
    match (path, metric) {
        ("agent", Metric::RssIdle) => Some(Target::AtMost(25.0)),
        ("agent", Metric::RssHundredPods) => Some(Target::AtMost(25.0 + 100.0 * 64.0 / KIB)),
        ("agent", Metric::RssPerPod) => Some(Target::AtMost(64.0)),
        ("agent", Metric::RssPerTunnelled) => Some(Target::AtMost(40.0)),
        ("hook", Metric::Connect | Metric::UdpServiceAdded) => Some(Target::AtMost(300.0)),
        ("hook", Metric::RunsWhileStreaming) => Some(Target::AtMost(0.0)),
        (_, Metric::Rss) => None,
        ("direct", _) => Some(Target::Share(0.95)),
        ("proxy-local", Metric::RttP50) => Some(Target::Above(30.0)),
        ("proxy-local", Metric::Throughput64k) => Some(Target::Share(0.55)),
        ("proxy-remote", Metric::RttP50) => Some(Target::Above(50.0)),
        ("proxy-remote", Metric::Throughput64k) => Some(Target::Share(0.5)),
        ("http-local", Metric::HttpP50C1) => Some(Target::Above(60.0)),
        ("http-remote", Metric::HttpP50C1) => Some(Target::Above(110.0)),
        ("mtls-remote", Metric::Throughput64k) => Some(Target::Share(0.4)),
        ("mtls-remote", Metric::Throughput64kC4) => Some(Target::Share(0.25)),
        ("mtls-remote", Metric::Throughput1k) => Some(Target::Share(1.5)),
        ("mtls-remote", Metric::ConnectRequestRate) => Some(Target::Share(0.33)),
        _ => None,
    }
}

/// The promise for a path beside an Envoy pair of the same run (issues 4 and 5).
pub(crate) fn peer_target(path: &str, metric: Metric) -> Option<Target> {
    match metric {
        Metric::HttpRpsC32 => Some(Target::Share(if path == "http-local" { 3.0 } else { 2.0 })),
        Metric::HttpP99Load => Some(Target::Share(1.0)),
        Metric::RttP50 => Some(Target::Share(1.0)),
        Metric::Throughput64k => Some(Target::Share(1.4)),
        Metric::Throughput64kC4 | Metric::Throughput1k => Some(Target::Share(1.3)),
        Metric::ConnectRequestRate => Some(Target::Share(3.0)),
        Metric::CpuPerGib => Some(Target::Share(1.0 / 0.7)),
        _ => None,
    }
}

impl Target {
    /// Whether `value` keeps the promise. A comparison without a baseline cannot be kept.
    pub(crate) fn is_met(self, metric: Metric, value: f64, baseline: Option<f64>) -> bool {
        match (self, baseline) {
            (Self::AtMost(limit), _) => value <= limit,
            (Self::Above(margin), Some(baseline)) => value <= baseline + margin,
            (Self::Share(share), Some(baseline)) => match metric.better() {
                Better::Higher => value >= baseline * share,
                Better::Lower => value * share <= baseline,
            },
            (_, None) => false,
        }
    }

    /// The promise as a limit on the ratio or the value, for people.
    pub(crate) fn text(self, metric: Metric) -> String {
        match (self, metric.better()) {
            (Self::Share(share), Better::Higher) => format!(">= {share:.2}x"),
            (Self::Share(share), Better::Lower) => format!("<= {:.2}x", 1.0 / share),
            (Self::Above(margin), _) => format!("<= +{margin} {}", metric.unit()),
            (Self::AtMost(limit), _) => format!("<= {limit} {}", metric.unit()),
        }
    }
}

/// Values of one metric, one for each start.
#[derive(Clone, Debug, Default)]
pub(crate) struct Series {
    values: Vec<f64>,
}

impl Series {
    /// Add the value of one more start.
    pub(crate) fn push(&mut self, value: f64) {
        let at = self.values.partition_point(|other| *other < value);
        self.values.insert(at, value);
    }

    /// Number of starts.
    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// Median; of an even number the mean of the middle two.
    pub(crate) fn median(&self) -> Option<f64> {
        let n = self.values.len();
        let upper = self.values.get(n / 2)?;
        let lower = self.values.get((n - 1) / 2)?;
        Some(f64::midpoint(*lower, *upper))
    }

    /// Smallest and largest.
    pub(crate) fn range(&self) -> Option<(f64, f64)> {
        Some((*self.values.first()?, *self.values.last()?))
    }
}

/// Values by path and metric.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    series: BTreeMap<(&'static str, Metric), Series>,
    foreign: Series,
}

impl Figures {
    /// Add one start's value.
    pub(crate) fn push(&mut self, path: &'static str, metric: Metric, value: f64) {
        self.series.entry((path, metric)).or_default().push(value);
    }

    /// Note how busy others kept the machine while something was measured.
    pub(crate) fn note_foreign(&mut self, spent: &Spent) {
        self.foreign.push(spent.foreign_cpus());
    }

    /// The values of one path and metric.
    pub(crate) fn series(&self, path: &str, metric: Metric) -> Option<&Series> {
        self.series.iter().find(|((p, m), _)| *p == path && *m == metric).map(|(_, series)| series)
    }

    /// All metrics of a path, in column order.
    pub(crate) fn metrics(&self, path: &str) -> impl Iterator<Item = (Metric, &Series)> {
        self.series
            .iter()
            .filter(move |((p, _), _)| *p == path)
            .map(|((_, metric), series)| (*metric, series))
    }

    /// CPUs that others kept busy, over all measurements.
    pub(crate) fn foreign(&self) -> &Series {
        &self.foreign
    }
}

/// Connections of the HTTP load.
pub(crate) const HTTP_CONNECTIONS: usize = 32;

/// Share of the highest rate at which the tail is looked at.
const LOAD: f64 = 0.7;

/// What is measured at once.
#[derive(Clone, Debug)]
pub(crate) enum Measurement {
    /// A task as it stands.
    Task(Task),
    /// HTTP requests at 70 % of the rate that the slowest mesh of the comparison reached: the same rate for all its paths, so
    /// that their tails can be compared.
    HttpAtLoad(Timing),
}

impl Measurement {
    /// The task for a path, one of `paths`, after what was measured so far.
    pub(crate) fn task(&self, path: Path, paths: &[Path], figures: &Figures) -> anyhow::Result<Task> {
        let timing = match self {
            Self::Task(task) => return Ok(task.clone()),
            Self::HttpAtLoad(timing) => *timing,
        };
        let group = |path: Path| path.baseline().unwrap_or(path);
        let highest = paths
            .iter()
            .filter(|other| group(**other) == group(path) && other.baseline().is_some())
            .filter_map(|other| figures.series(other.name(), Metric::HttpRpsC32)?.median())
            .min_by(f64::total_cmp);
        let highest = highest.context("no mesh's rate was measured")?;
        let rate = Some(((highest * LOAD) as u32).max(1));
        Ok(Task::Http { connections: HTTP_CONNECTIONS, rate, timing })
    }
}

/// What `bench http` measures in each round, in order.
pub(crate) fn http_tasks(window: Duration, warm_up: Duration) -> Vec<Measurement> {
    let timing = timing(window, warm_up);
    vec![
        Measurement::Task(Task::Http { connections: 1, rate: None, timing }),
        Measurement::Task(Task::Http { connections: HTTP_CONNECTIONS, rate: None, timing }),
        Measurement::HttpAtLoad(timing),
    ]
}

fn timing(window: Duration, warm_up: Duration) -> Timing {
    let ms = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
    Timing { warm_up_ms: ms(warm_up), window_ms: ms(window) }
}

/// What `bench net` measures in each round, in order.
pub(crate) fn net_tasks(window: Duration, warm_up: Duration) -> Vec<Measurement> {
    let timing = timing(window, warm_up);
    [
        Task::Rtt { timing },
        Task::Stream { write_bytes: 64 * 1024, connections: 1, timing },
        Task::Stream { write_bytes: 64 * 1024, connections: 4, timing },
        Task::Stream { write_bytes: 1024, connections: 1, timing },
        Task::Requests { connections: 4, timing },
    ]
    .map(Measurement::Task)
    .into()
}

/// What one task's answer and cost mean.
pub(crate) fn metrics_of(task: &Task, answer: &Answer, spent: &Spent) -> Vec<(Metric, f64)> {
    match (task, answer) {
        (_, Answer::Rtt { total, p50_ns, p99_ns }) => vec![
            (Metric::RttP50, *p50_ns as f64 / 1e3),
            (Metric::RttP99, *p99_ns as f64 / 1e3),
            (Metric::CpuPer10kExchanges, spent.groups_s * 1e4 / (*total).max(1) as f64),
        ],
        (Task::Stream { write_bytes, connections, .. }, Answer::Stream { total_bytes, bits_per_s }) => {
            let rate = bits_per_s / 1e9;
            let per_gib = spent.groups_s * GIB / (*total_bytes).max(1) as f64;
            match (write_bytes, connections) {
                (1024, _) => vec![(Metric::Throughput1k, rate), (Metric::CpuPerGib1k, per_gib)],
                (_, 1) => vec![(Metric::Throughput64k, rate), (Metric::CpuPerGib, per_gib)],
                _ => vec![(Metric::Throughput64kC4, rate)],
            }
        }
        (Task::Http { connections: 1, .. }, Answer::Requests { p50_ns, p99_ns, .. }) => {
            vec![(Metric::HttpP50C1, *p50_ns as f64 / 1e3), (Metric::HttpP99C1, *p99_ns as f64 / 1e3)]
        }
        (Task::Http { rate: Some(_), .. }, Answer::Requests { p99_ns, .. }) => {
            vec![(Metric::HttpP99Load, *p99_ns as f64 / 1e3)]
        }
        (Task::Http { .. }, Answer::Requests { total, per_s, .. }) => vec![
            (Metric::HttpRpsC32, *per_s),
            (Metric::CpuPer10kHttp, spent.groups_s * 1e4 / (*total).max(1) as f64),
        ],
        (_, Answer::Requests { total, per_s, .. }) => vec![
            (Metric::ConnectRequestRate, *per_s),
            (Metric::CpuPer10kRequests, spent.groups_s * 1e4 / (*total).max(1) as f64),
        ],
        _ => Vec::new(),
    }
}

/// Bytes as the unit of the memory metrics.
pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB
}

/// Bytes as KiB.
pub(crate) fn kib(bytes: f64) -> f64 {
    bytes / KIB
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_means_the_same_in_both_directions() {
        let share = Target::Share(0.95);
        assert!(share.is_met(Metric::Throughput64k, 9.5, Some(10.0)));
        assert!(!share.is_met(Metric::Throughput64k, 9.4, Some(10.0)));
        assert!(share.is_met(Metric::RttP50, 10.5, Some(10.0)));
        assert!(!share.is_met(Metric::RttP50, 10.6, Some(10.0)));
        assert!(!share.is_met(Metric::RttP50, 1.0, None));
    }

    #[test]
    fn a_margin_is_in_the_unit_of_the_metric() {
        let margin = Target::Above(30.0);
        assert!(margin.is_met(Metric::RttP50, 87.0, Some(57.0)));
        assert!(!margin.is_met(Metric::RttP50, 87.5, Some(57.0)));
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        let mut series = Series::default();
        for value in [9.0, 1.0, 2.0, 4.0] {
            series.push(value);
        }
        assert_eq!(series.median(), Some(3.0));
        assert_eq!(series.range(), Some((1.0, 9.0)));
        assert_eq!(Series::default().median(), None);
    }
}
