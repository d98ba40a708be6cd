//! Istio's standard HTTP metrics by edge, and what was refused of clients' HTTP.
//!
//! Invariants:
//! - A series is named by workloads, service, status and flags, never by anything a client makes up.
//! - At most [`SERIES_MAX`] series; requests of further ones are counted in none.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use mesh_core::{id::WorkloadId, snapshot::Snapshot};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        histogram::Histogram,
    },
    registry::Registry,
};

use super::{
    Label,
    edges::{EdgeKey, Parties},
    labels::{EdgeLabels, Labels},
};

/// As many as edges, which mostly have one status each.
pub(crate) const SERIES_MAX: usize = 16_384;

/// Envoy's buckets for durations, in milliseconds.
const DURATIONS_MS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1_000.0,
    2_500.0,
    5_000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];
/// Powers of ten for sizes, in bytes.
const SIZES: [f64; 8] = [0.5, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7];

/// Why something that a client sent was refused as no proper HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Refusal {
    /// A carriage return that ends no line.
    BareCr,
    /// A line feed without a carriage return.
    BareLf,
    /// For what nothing describes that the client sees, under REGISTRY_ONLY.
    BlackHole,
    /// A chunk whose size is none, or is absurd, or is not that of its data.
    ChunkSize,
    /// A header line that continues the one before it.
    Folding,
    /// More bytes than a window or frame allows, in HTTP/2.
    H2FlowControl,
    /// Resets, control frames or CONTINUATIONs beyond what is useful, in HTTP/2.
    H2Flood,
    /// Frames that break HTTP/2.
    H2Protocol,
    /// A header that is none.
    Header,
    /// A head that took too long.
    HeadTimeout,
    /// A head with too many bytes or lines.
    HeadTooLarge,
    /// No host, or several.
    Host,
    /// A `content-length` that is none, or several.
    Length,
    /// Both `content-length` and `transfer-encoding`.
    LengthAndEncoding,
    /// Something else that the HTTP library does not read.
    Malformed,
    /// A method with lower-case letters.
    Method,
    /// A path that servers read differently.
    Path,
    /// Requests that are reset as soon as they were sent, in HTTP/2.
    RapidReset,
    /// A first line that is none.
    RequestLine,
    /// Responses that the client does not take.
    Stalled,
    /// Trailers that are none, are too many, or change framing.
    Trailers,
    /// A `transfer-encoding` other than `chunked`.
    TransferEncoding,
}

impl Refusal {
    /// Every reason.
    const ALL: [Self; 22] = [
        Self::BareCr,
        Self::BareLf,
        Self::BlackHole,
        Self::ChunkSize,
        Self::Folding,
        Self::H2FlowControl,
        Self::H2Flood,
        Self::H2Protocol,
        Self::Header,
        Self::HeadTimeout,
        Self::HeadTooLarge,
        Self::Host,
        Self::Length,
        Self::LengthAndEncoding,
        Self::Malformed,
        Self::Method,
        Self::Path,
        Self::RapidReset,
        Self::RequestLine,
        Self::Stalled,
        Self::Trailers,
        Self::TransferEncoding,
    ];

    /// Metric label and log value.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::BareCr => "bare_cr",
            Self::BareLf => "bare_lf",
            Self::BlackHole => "black_hole",
            Self::ChunkSize => "chunk_size",
            Self::Folding => "folding",
            Self::H2FlowControl => "h2_flow_control",
            Self::H2Flood => "h2_flood",
            Self::H2Protocol => "h2_protocol",
            Self::Header => "header",
            Self::HeadTimeout => "head_timeout",
            Self::HeadTooLarge => "head_too_large",
            Self::Host => "host",
            Self::Length => "length",
            Self::LengthAndEncoding => "length_and_encoding",
            Self::Malformed => "malformed",
            Self::Method => "method",
            Self::Path => "path",
            Self::RapidReset => "rapid_reset",
            Self::RequestLine => "request_line",
            Self::Stalled => "stalled",
            Self::Trailers => "trailers",
            Self::TransferEncoding => "transfer_encoding",
        }
    }

    /// Status that says so.
    pub(crate) const fn status(self) -> u16 {
        match self {
            Self::BlackHole => 502,
            Self::HeadTimeout => 408,
            Self::HeadTooLarge => 431,
            Self::TransferEncoding => 501,
            _ => 400,
        }
    }
}

/// Which series a request is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RequestKey {
    pub(crate) edge: EdgeKey,
    pub(crate) grpc: bool,
    pub(crate) status: u16,
    /// Of gRPC, as far as it was said.
    pub(crate) grpc_status: Option<u8>,
    /// Letters of the flags.
    pub(crate) flags: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    #[prometheus(flatten)]
    edge: Labels,
    response_code: u16,
    grpc_response_status: String,
    response_flags: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusalLabels {
    reason: Label,
}

/// The counters of one series.
#[derive(Clone, Debug)]
pub(crate) struct Requests {
    count: Counter,
    duration: Histogram,
    request_bytes: Histogram,
    response_bytes: Histogram,
    labels: RequestLabels,
}

impl Requests {
    /// Counts one that is over.
    pub(crate) fn add(&self, duration: Duration, request_bytes: u64, response_bytes: u64) {
        self.count.inc();
        self.duration.observe(duration.as_secs_f64() * 1000.0);
        self.request_bytes.observe(request_bytes as f64);
        self.response_bytes.observe(response_bytes as f64);
    }
}

/// Makes histograms of one kind.
#[derive(Clone, Copy, Debug)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

type Histograms = Family<RequestLabels, Histogram, Buckets>;

/// Everything counted of HTTP.
#[derive(Debug)]
pub(crate) struct Http {
    refused: Vec<Counter>,
    count: Family<RequestLabels, Counter>,
    duration: Histograms,
    request_bytes: Histograms,
    response_bytes: Histograms,
    known: Mutex<HashMap<RequestKey, Arc<Requests>>>,
}

impl Http {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let refused = Family::<RefusalLabels, Counter>::default();
        let http = Self {
            refused: Refusal::ALL
                .iter()
                .map(|reason| {
                    refused.get_or_create(&RefusalLabels { reason: Label(reason.as_str()) }).clone()
                })
                .collect(),
            count: Family::default(),
            duration: Family::new_with_constructor(Buckets(&DURATIONS_MS)),
            request_bytes: Family::new_with_constructor(Buckets(&SIZES)),
            response_bytes: Family::new_with_constructor(Buckets(&SIZES)),
            known: Mutex::default(),
        };
        registry.register(
            "mesh_http_refused",
            "Requests or connections of clients that were no proper HTTP",
            refused,
        );
        registry.register("istio_requests", "Requests", http.count.clone());
        registry.register(
            "istio_request_duration_milliseconds",
            "Duration of requests",
            http.duration.clone(),
        );
        registry.register("istio_request_bytes", "Sizes of request bodies", http.request_bytes.clone());
        registry.register("istio_response_bytes", "Sizes of response bodies", http.response_bytes.clone());
        http
    }

    /// What was refused for this reason.
    pub(crate) fn refused(&self, reason: Refusal) -> &Counter {
        &self.refused[reason as usize]
    }

    /// The counters of a series, made from `parties` and the flags' letters if it is new; `None` when there are too many.
    pub(crate) fn requests(
        &self,
        key: RequestKey,
        parties: Parties<'_>,
        flags: impl FnOnce() -> String,
    ) -> Option<Arc<Requests>> {
        let mut known = self.known();
        if let Some(requests) = known.get(&key) {
            return Some(Arc::clone(requests));
        }
        if known.len() >= SERIES_MAX {
            return None;
        }
        let edge = EdgeLabels::of(key.edge, parties).speaking(if key.grpc { "grpc" } else { "http" });
        let labels = RequestLabels {
            edge: Labels(Arc::new(edge)),
            response_code: key.status,
            grpc_response_status: key.grpc_status.map_or_else(String::new, |status| status.to_string()),
            response_flags: flags(),
        };
        let made = Arc::new(Requests {
            count: self.count.get_or_create(&labels).clone(),
            duration: self.duration.get_or_create(&labels).clone(),
            request_bytes: self.request_bytes.get_or_create(&labels).clone(),
            response_bytes: self.response_bytes.get_or_create(&labels).clone(),
            labels,
        });
        known.insert(key, Arc::clone(&made));
        Some(made)
    }

    /// Removes the series of workloads that the snapshot does not know any more.
    pub(crate) fn retain(&self, snapshot: &Snapshot) {
        let alive = |id: Option<WorkloadId>| id.is_none_or(|id| snapshot.workload(id).is_some());
        self.known().retain(|key, requests| {
            let keep = alive(key.edge.source) && alive(key.edge.destination);
            if !keep {
                self.count.remove(&requests.labels);
                self.duration.remove(&requests.labels);
                self.request_bytes.remove(&requests.labels);
                self.response_bytes.remove(&requests.labels);
            }
            keep
        });
    }

    fn known(&self) -> MutexGuard<'_, HashMap<RequestKey, Arc<Requests>>> {
        // The map is consistent between its calls, so a panic elsewhere does not spoil it.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::edges::{Reporter, Security};

    #[test]
    fn every_refusal_counts_under_its_own_label() {
        let mut registry = Registry::default();
        let http = Http::register(&mut registry);
        for (index, reason) in Refusal::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            http.refused(reason).inc_by(index as u64);
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for (index, reason) in Refusal::ALL.into_iter().enumerate() {
            let line = format!("mesh_http_refused_total{{reason=\"{}\"}} {index}", reason.as_str());
            assert!(text.contains(&line), "{line}");
        }
    }

    #[test]
    fn requests_are_counted_by_edge_status_and_flags_and_forgotten_with_their_workloads() {
        let mut registry = Registry::default();
        let http = Http::register(&mut registry);
        let edge = EdgeKey {
            reporter: Reporter::Source,
            source: Some(WorkloadId(1)),
            destination: None,
            service: None,
            security: Security::Kernel,
        };
        let key = RequestKey { edge, grpc: true, status: 200, grpc_status: Some(14), flags: 4 };
        for _ in 0..2 {
            let requests = http.requests(key, Parties::default(), || "UF".into()).unwrap();
            requests.add(Duration::from_millis(3), 10, 20);
        }
        let encoded = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            text
        };
        let text = encoded();
        let line = text.lines().find(|line| line.starts_with("istio_requests_total{")).unwrap();
        for part in [
            "request_protocol=\"grpc\"",
            "response_code=\"200\"",
            "grpc_response_status=\"14\"",
            "response_flags=\"UF\"",
            "connection_security_policy=\"kernel\"",
            "} 2",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
        assert!(text.contains("istio_request_duration_milliseconds_sum"));
        http.retain(&Snapshot::default());
        assert!(!encoded().contains("response_flags=\"UF\""));
    }
}
