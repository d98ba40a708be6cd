//! Rules, destinations and policies in the words of the resources they come from.

use std::time::Duration;

use mesh_core::route::{
    Origin,
    cluster::{
        Algorithm, Balancing, ClientTls, ClientTlsMode, ClusterKey, ConnectionPool, HashKey, HashTable,
        Locality, OutlierDetection,
    },
    http::{
        Abort, Action, Backend, Fault, HeaderOps, HttpRule, Millionths, Mirror, PathRewrite, Redirect,
        RedirectPort, RetryOn,
    },
    matching::{HttpMatch, PathMatch, StringMatch},
    protocol::AppProtocol,
    stream::StreamMatch,
};
use mesh_core::snapshot::{Name, Snapshot};

use crate::view::OriginView;

/// Where something is from, in its shape.
pub(in super::super) fn origin(origin: &Origin) -> OriginView {
    OriginView {
        kind: origin.kind.to_string(),
        name: origin.name.to_string(),
        field: origin.field.to_string(),
        place: origin.place.as_deref().map(str::to_owned),
    }
}

/// Milliseconds; what is longer than all time is all time.
pub(in super::super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A duration as Istio writes them: `1.5s`.
pub(in super::super) fn duration(time: Duration) -> String {
    match time.subsec_nanos() {
        0 => format!("{}s", time.as_secs()),
        _ if time < Duration::from_secs(1) && time.subsec_nanos().is_multiple_of(1_000_000) => {
            format!("{}ms", time.as_millis())
        }
        _ => format!("{}s", time.as_secs_f64()),
    }
}

/// A share as per cent.
pub(in super::super) fn percent(share: Millionths) -> String {
    format!("{}%", f64::from(share.0) / 10_000.0)
}

/// What is spoken.
pub(in super::super) fn protocol(protocol: AppProtocol) -> &'static str {
    match protocol {
        AppProtocol::Http => "http",
        AppProtocol::Http2 => "http2",
        AppProtocol::Grpc => "grpc",
        AppProtocol::GrpcWeb => "grpc-web",
        AppProtocol::Tls => "tls",
        AppProtocol::Tcp => "tcp",
        AppProtocol::Udp => "udp",
        AppProtocol::Sniffed => "auto",
    }
}

/// A destination as Envoy calls it: `outbound|9080|v1|reviews.shop.svc.cluster.local`.
pub(in super::super) fn cluster(snapshot: &Snapshot, key: &ClusterKey) -> String {
    let host = match snapshot.service(&key.service) {
        Some(service) => snapshot.host_of(service).into_owned(),
        None => {
            let Name { namespace, name } = &key.service;
            format!("{name}.{namespace}.svc.{}", snapshot.cluster_domain())
        }
    };
    format!("outbound|{}|{}|{host}", key.port, key.subset.as_deref().unwrap_or_default())
}

/// A backend: the destination, and the status when it is none.
pub(in super::super) fn backend(snapshot: &Snapshot, backend: &Backend) -> (String, Option<u16>) {
    match backend {
        Backend::Cluster(key) => (cluster(snapshot, key), None),
        Backend::Broken { status, reason } => (reason.to_string(), Some(*status)),
    }
}

/// What is done with a request, apart from forwarding.
pub(in super::super) fn action(action: &Action) -> String {
    match action {
        Action::Forward(backends) => format!("forward to {} destinations", backends.len()),
        Action::Redirect(redirect) => self::redirect(redirect),
        Action::Respond { status, reason, .. } => format!("respond {status} ({reason})"),
        Action::Passthrough => "pass through to where it was dialled".to_owned(),
    }
}

fn redirect(redirect: &Redirect) -> String {
    let mut text = format!("redirect {}", redirect.status);
    let port = match redirect.port {
        RedirectPort::OfHost => None,
        RedirectPort::OfScheme => Some("of the scheme".to_owned()),
        RedirectPort::OfRequest => Some("of the request".to_owned()),
        RedirectPort::Number(port) => Some(port.to_string()),
    };
    let parts = [
        ("scheme", redirect.scheme.as_deref().map(str::to_owned)),
        ("authority", redirect.authority.as_deref().map(str::to_owned)),
        ("port", port),
        ("path", redirect.path.as_ref().map(path_rewrite)),
    ];
    for (name, value) in parts {
        if let Some(value) = value {
            text.push_str(&format!(" {name}={value}"));
        }
    }
    text
}

fn path_rewrite(path: &PathRewrite) -> String {
    match path {
        PathRewrite::MatchedPrefix(new) => format!("prefix→{new}"),
        PathRewrite::Full(new) => new.to_string(),
        PathRewrite::Regex { pattern, substitution } => {
            format!("/{}/→{substitution}", pattern.regex().as_str())
        }
    }
}

fn text(pattern: &StringMatch) -> String {
    match pattern {
        StringMatch::Present => " present".to_owned(),
        StringMatch::Exact(text) => format!("={text}"),
        StringMatch::Prefix(text) => format!("={text}*"),
        StringMatch::Regex(regex) => format!("~{}", regex.pattern()),
    }
}

/// One match: all of its conditions.
pub(in super::super) fn http_match(matched: &HttpMatch) -> String {
    let mut parts = Vec::new();
    if let Some(path) = &matched.path {
        let (path, ignores_case) = match path {
            PathMatch::Exact { path, ignore_case } => (format!("path={path}"), *ignore_case),
            PathMatch::Prefix { prefix, ignore_case } => (format!("path={prefix}*"), *ignore_case),
            PathMatch::Segments(prefix) if prefix.is_empty() => ("path=/*".to_owned(), false),
            PathMatch::Segments(prefix) => (format!("path={prefix}[/*]"), false),
            PathMatch::Regex(regex) => (format!("path~{}", regex.pattern()), false),
        };
        parts.push(if ignores_case { format!("{path} (any case)") } else { path });
    }
    for (name, pattern) in
        [("method", &matched.method), ("scheme", &matched.scheme), ("authority", &matched.authority)]
    {
        parts.extend(pattern.as_ref().map(|pattern| format!("{name}{}", text(pattern))));
    }
    for header in &matched.headers {
        let not = if header.inverted { "not " } else { "" };
        parts.push(format!("{not}header {}{}", header.name, text(&header.value)));
    }
    parts.extend(matched.query.iter().map(|query| format!("query {}{}", query.name, text(&query.value))));
    parts.extend(matched.source_namespace.as_ref().map(|namespace| format!("from namespace {namespace}")));
    parts.extend(matched.source_labels.iter().map(|(key, value)| format!("from {key}={value}")));
    if parts.is_empty() { "any".to_owned() } else { parts.join(" & ") }
}

/// One match of a TLS or TCP rule.
pub(in super::super) fn stream_match(matched: &StreamMatch) -> String {
    let mut parts = Vec::new();
    if !matched.sni.is_empty() {
        parts.push(format!("sni={}", matched.sni.join("|")));
    }
    if !matched.subnets.is_empty() {
        let subnets: Vec<String> = matched.subnets.iter().map(ToString::to_string).collect();
        parts.push(format!("to {}", subnets.join("|")));
    }
    parts.extend(matched.source_namespace.as_ref().map(|namespace| format!("from namespace {namespace}")));
    parts.extend(matched.source_labels.iter().map(|(key, value)| format!("from {key}={value}")));
    if parts.is_empty() { "any".to_owned() } else { parts.join(" & ") }
}

/// Conditions of a retry, as Envoy writes them where it has them.
pub(in super::super) fn retry_on(on: &RetryOn) -> Vec<String> {
    let named = [
        (on.connect_failure, "connect-failure"),
        (on.refused_stream, "refused-stream"),
        (on.reset, "reset"),
        (on.try_timeout, "try-timeout"),
        (on.reset_before_request, "reset-before-request"),
        (on.server_error, "5xx"),
        (on.gateway_error, "gateway-error"),
        (on.retriable_4xx, "retriable-4xx"),
        (on.headers_of_request, "retriable-headers"),
    ];
    let mut all: Vec<String> =
        named.into_iter().filter(|(is_set, _)| *is_set).map(|(_, name)| name.to_owned()).collect();
    all.extend(on.statuses.iter().map(ToString::to_string));
    all.extend(on.grpc.iter().map(|code| format!("grpc-status={code}")));
    all.extend(on.headers.iter().map(|header| format!("header {header}")));
    all
}

/// Injected faults.
pub(in super::super) fn fault(fault: &Fault) -> Vec<String> {
    let delay = fault.delay.map(|(share, time)| format!("delay {} of {}", duration(time), percent(share)));
    let abort = fault.abort.map(|(share, abort)| match abort {
        Abort::Http(status) => format!("abort with {status} of {}", percent(share)),
        Abort::Grpc(code) => format!("abort with grpc-status {code} of {}", percent(share)),
    });
    delay.into_iter().chain(abort).collect()
}

/// Where copies go.
pub(in super::super) fn mirror(snapshot: &Snapshot, mirror: &Mirror) -> String {
    let (to, broken) = backend(snapshot, &mirror.backend);
    let nowhere = if broken.is_some() { "nowhere: " } else { "" };
    format!("{} to {nowhere}{to}", percent(mirror.share))
}

/// Changes of a rule to requests and responses, without those of single destinations.
pub(in super::super) fn changes(rule: &HttpRule) -> Vec<String> {
    let mut all = Vec::new();
    all.extend(rule.rewrite.authority.as_ref().map(|authority| format!("rewrite authority={authority}")));
    all.extend(rule.rewrite.path.as_ref().map(|path| format!("rewrite path {}", path_rewrite(path))));
    all.extend(header_ops("request", &rule.request_headers));
    all.extend(header_ops("response", &rule.response_headers));
    all
}

fn header_ops(of: &str, ops: &HeaderOps) -> Vec<String> {
    let set = ops.set.iter().map(|(name, value)| format!("{of} set {name}={value}"));
    let add = ops.add.iter().map(|(name, value)| format!("{of} add {name}={value}"));
    let remove = ops.remove.iter().map(|name| format!("{of} remove {name}"));
    let authority = ops.authority.iter().map(|authority| format!("{of} authority={authority}"));
    set.chain(add).chain(remove).chain(authority).collect()
}

/// How an endpoint is chosen.
pub(in super::super) fn balancing(balancing: &Balancing) -> String {
    let mut words = match &balancing.algorithm {
        Algorithm::LeastRequest => "LEAST_REQUEST".to_owned(),
        Algorithm::RoundRobin => "ROUND_ROBIN".to_owned(),
        Algorithm::Random => "RANDOM".to_owned(),
        Algorithm::Passthrough => "PASSTHROUGH".to_owned(),
        Algorithm::ConsistentHash { key, table } => {
            let key = match key {
                HashKey::Header(name) => format!("header {name}"),
                HashKey::Cookie { name, .. } => format!("cookie {name}"),
                HashKey::SourceIp => "source IP".to_owned(),
                HashKey::Query(name) => format!("query {name}"),
            };
            let table = match table {
                HashTable::Ring(_) => "RING_HASH",
                HashTable::Maglev(_) => "MAGLEV",
            };
            format!("{table} by {key}")
        }
    };
    match &balancing.locality {
        Locality::Anywhere => {}
        Locality::Distribute(_) => words.push_str(", distribute"),
        Locality::Failover { .. } => words.push_str(", failover"),
        Locality::ZoneAware { .. } => words.push_str(", zone aware"),
    }
    if balancing.warmup.is_some() {
        words.push_str(", warm-up");
    }
    words
}

/// Limits that are not the defaults, named as in a DestinationRule.
pub(in super::super) fn limits(pool: &ConnectionPool) -> Vec<String> {
    let default = ConnectionPool::default();
    let counts = [
        ("maxConnections", pool.max_connections),
        ("http1MaxPendingRequests", pool.max_pending),
        ("http2MaxRequests", pool.max_requests),
        ("maxRequestsPerConnection", pool.max_requests_per_connection),
        ("maxRetries", pool.max_retries),
        ("maxConcurrentStreams", pool.max_concurrent_streams),
    ];
    let mut all: Vec<String> =
        counts.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", value?))).collect();
    if pool.connect_timeout != default.connect_timeout {
        all.push(format!("connectTimeout={}", duration(pool.connect_timeout)));
    }
    if pool.idle_timeout != default.idle_timeout {
        all.push(format!("idleTimeout={}", duration(pool.idle_timeout)));
    }
    all.extend(pool.http_idle_timeout.map(|time| format!("http.idleTimeout={}", duration(time))));
    all.extend(pool.max_connection_duration.map(|time| format!("maxConnectionDuration={}", duration(time))));
    all.extend(
        pool.http2_keepalive
            .map(|alive| format!("http2KeepAlive={}/{}", duration(alive.interval), duration(alive.timeout))),
    );
    all.extend(pool.h2_upgrade.then(|| "h2UpgradePolicy=UPGRADE".to_owned()));
    all.extend(pool.use_client_protocol.then(|| "useClientProtocol=true".to_owned()));
    all
}

/// Outlier detection in a few words.
pub(in super::super) fn outlier(rules: &OutlierDetection) -> String {
    let mut parts = Vec::new();
    parts.extend(rules.consecutive_5xx.map(|count| format!("{count}× 5xx")));
    parts.extend(rules.consecutive_gateway.map(|count| format!("{count}× gateway error")));
    parts
        .extend(rules.consecutive_local.filter(|_| rules.split_local).map(|count| format!("{count}× local")));
    let what = if parts.is_empty() { "never".to_owned() } else { parts.join(" or ") };
    format!("{what} → out for {} × n, at most {}%", duration(rules.base_ejection), rules.max_ejection_percent)
}

/// TLS towards the endpoints.
pub(in super::super) fn tls(tls: Option<&ClientTls>) -> String {
    let Some(tls) = tls else { return "mesh".to_owned() };
    let mode = match tls.mode {
        ClientTlsMode::Disable => "DISABLE",
        ClientTlsMode::Simple => "SIMPLE",
        ClientTlsMode::Mutual => "MUTUAL",
        ClientTlsMode::IstioMutual => "ISTIO_MUTUAL",
    };
    tls.sni.as_ref().map_or_else(|| mode.to_owned(), |sni| format!("{mode} sni={sni}"))
}
