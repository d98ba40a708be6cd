//! Traffic policies: pools, outlier detection, TLS and the like.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_core::route::{
    cluster::{
        ClientTls, ClientTlsMode, ConnectTunnel, Http2Keepalive, OutlierDetection, ProxyProtocol, RetryBudget,
    },
    matching::StringMatch,
};

use super::{ConnectionPool, Settings, TrafficPolicy, balancing};
use crate::{
    problem::Problems,
    resource::{fields::Object, host, parts},
};

/// Shortest duration that Istio takes.
const LEAST: Duration = Duration::from_millis(1);

/// How long the answer to a PING may take where nothing is said: as most clients of gRPC have it.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Reads `trafficPolicy`.
pub(super) fn read(object: &mut Object<'_>, problems: &mut Problems) -> Option<TrafficPolicy> {
    const FIELDS: [&str; 8] = [
        "loadBalancer",
        "connectionPool",
        "outlierDetection",
        "tls",
        "tunnel",
        "proxyProtocol",
        "retryBudget",
        "portLevelSettings",
    ];
    let mut object = object.object("trafficPolicy", problems)?;
    let mut settings = blocks(&mut object, problems);
    settings.tunnel = tunnel(&mut object, problems);
    settings.proxy_protocol = proxy_protocol(&mut object, problems);
    settings.retry_budget = retry_budget(&mut object, problems);
    if settings.proxy_protocol.is_some() && settings.tunnel.is_some() {
        problems.error(object.at("proxyProtocol"), "is there beside tunnel, wanted at most one of them");
    }
    let mut ports = BTreeMap::new();
    for mut entry in object.objects("portLevelSettings", problems) {
        let port = match entry.object("port", problems) {
            Some(mut port) => {
                let number = port.port("number", problems);
                if !port.has("number") {
                    problems.error(port.at("number"), "is missing, wanted a number from 1 to 65535");
                }
                port.finish(problems);
                number
            }
            None => {
                if !entry.has("port") {
                    problems.error(entry.at("port"), "is missing, wanted the number of a port");
                }
                None
            }
        };
        let settings = blocks(&mut entry, problems);
        let fields = ["loadBalancer", "connectionPool", "outlierDetection", "tls"];
        if !fields.into_iter().any(|field| entry.has(field)) {
            let wanted = format!("wanted at least one of {}", fields.join(", "));
            problems.error(entry.path.as_str(), format!("says nothing, {wanted}"));
        }
        if let Some(port) = port
            && ports.insert(port, settings).is_some()
        {
            problems.error(entry.at("port"), format!("is {port}, which is there already"));
        }
        entry.finish(problems);
    }
    if !FIELDS.into_iter().any(|field| object.has(field)) {
        problems.warning(object.path.as_str(), "says nothing; it has no effect");
    }
    object.finish(problems);
    Some(TrafficPolicy { settings, ports })
}

/// Reads the blocks that stand in a policy and for a port alike.
fn blocks(object: &mut Object<'_>, problems: &mut Problems) -> Settings {
    Settings {
        balancing: balancing::read(object, problems),
        pool: connection_pool(object, "connectionPool", problems),
        outlier: outlier_detection(object, "outlierDetection", problems),
        tls: tls(object, problems),
        tunnel: None,
        proxy_protocol: None,
        retry_budget: None,
    }
}

/// Reads `connectionPool` or a field of the same form.
pub(in crate::resource) fn connection_pool(
    object: &mut Object<'_>,
    name: &'static str,
    problems: &mut Problems,
) -> Option<ConnectionPool> {
    let mut object = object.object(name, problems)?;
    let mut pool = ConnectionPool::default();
    if object.get("tcp").is_none() && object.get("http").is_none() {
        problems.error(object.path.as_str(), "says nothing, wanted tcp or http or both");
    }
    if let Some(mut tcp) = object.object("tcp", problems) {
        pool.max_connections = limit(&mut tcp, "maxConnections", problems);
        pool.connect_timeout = tcp.duration_of("connectTimeout", LEAST, problems);
        pool.tcp_idle_timeout = tcp.duration("idleTimeout", problems);
        pool.max_connection_duration = tcp.duration_of("maxConnectionDuration", LEAST, problems);
        pool.keepalive = keepalive(&mut tcp, "tcpKeepalive", problems);
        tcp.finish(problems);
    }
    if let Some(mut http) = object.object("http", problems) {
        pool.max_pending = limit(&mut http, "http1MaxPendingRequests", problems);
        pool.max_requests = limit(&mut http, "http2MaxRequests", problems);
        pool.max_requests_per_connection = limit(&mut http, "maxRequestsPerConnection", problems);
        pool.max_retries = limit(&mut http, "maxRetries", problems);
        pool.max_concurrent_streams = limit(&mut http, "maxConcurrentStreams", problems);
        pool.http_idle_timeout = http.duration("idleTimeout", problems);
        let upgrade = [("DEFAULT", None), ("DO_NOT_UPGRADE", Some(false)), ("UPGRADE", Some(true))];
        pool.h2_upgrade = http.word("h2UpgradePolicy", &upgrade, problems).flatten();
        pool.use_client_protocol = http.bool("useClientProtocol", problems).unwrap_or_default();
        if pool.use_client_protocol && pool.h2_upgrade == Some(true) {
            let message = "is UPGRADE beside useClientProtocol, wanted at most one of them";
            problems.error(http.at("h2UpgradePolicy"), message);
        }
        pool.http2_keepalive = http2_keepalive(&mut http, problems);
        http.finish(problems);
    }
    object.finish(problems);
    Some(pool)
}

/// Reads `http2KeepAlive`. Without an interval no PING is sent.
fn http2_keepalive(http: &mut Object<'_>, problems: &mut Problems) -> Option<Http2Keepalive> {
    let mut object = http.object("http2KeepAlive", problems)?;
    let interval = object.duration_of("interval", LEAST, problems);
    let timeout = object.duration_of("timeout", LEAST, problems).unwrap_or(PING_TIMEOUT);
    if !object.has("interval") {
        let message = "has no interval, so that nothing is asked; it has no effect";
        problems.warning(object.path.as_str(), message);
    }
    object.finish(problems);
    Some(Http2Keepalive { interval: interval?, timeout })
}

/// A limit; 0 is the default, and Istio's fields are of 31 bits.
fn limit(object: &mut Object<'_>, name: &'static str, problems: &mut Problems) -> Option<u32> {
    let read = object.number(name, 0..=i64::from(i32::MAX), problems)?;
    u32::try_from(read).ok().filter(|limit| *limit != 0)
}

/// Reads `tcpKeepalive`.
pub(in crate::resource) fn keepalive(
    object: &mut Object<'_>,
    name: &'static str,
    problems: &mut Problems,
) -> Option<(Option<u32>, Option<Duration>, Option<Duration>)> {
    let mut object = object.object(name, problems)?;
    let probes = object.count("probes", problems).filter(|probes| *probes != 0);
    let second = Duration::from_secs(1);
    let time = object.duration_of("time", second, problems);
    let interval = object.duration_of("interval", second, problems);
    object.finish(problems);
    Some((probes, time, interval))
}

/// Reads `outlierDetection` or a field of the same form.
pub(in crate::resource) fn outlier_detection(
    object: &mut Object<'_>,
    name: &'static str,
    problems: &mut Problems,
) -> Option<OutlierDetection> {
    let mut object = object.object(name, problems)?;
    let newer = object.count("consecutive5xxErrors", problems);
    let older = object.number("consecutiveErrors", 0..=i64::from(i32::MAX), problems);
    if object.has("consecutiveErrors") {
        let at = object.at("consecutiveErrors");
        problems
            .warning(at, "is of earlier versions; consecutive5xxErrors or consecutiveGatewayErrors is meant");
    }
    // The older field counted failures of gateways.
    let older = older.and_then(|count| u32::try_from(count).ok());
    let gateway = object.count("consecutiveGatewayErrors", problems).or(older);
    let split = object.bool("splitExternalLocalOriginErrors", problems).unwrap_or_default();
    let local = object.count("consecutiveLocalOriginFailures", problems);
    if !split && object.has("consecutiveLocalOriginFailures") {
        let at = object.at("consecutiveLocalOriginFailures");
        problems.warning(at, "has no effect without splitExternalLocalOriginErrors");
    }
    let percent = |object: &mut Object<'_>, name: &'static str, problems: &mut Problems| {
        object.number(name, 0..=100, problems).and_then(|percent| u32::try_from(percent).ok())
    };
    let mut statuses = Vec::new();
    for node in object.list("outlierDetectionHttpErrorCodes", problems) {
        if let Some(code) = node.number(100..=599, problems).and_then(|code| u16::try_from(code).ok()) {
            statuses.push((code, code));
        }
    }
    let positive = |count: Option<u32>| count.filter(|count| *count != 0);
    let read = OutlierDetection {
        consecutive_5xx: positive(Some(newer.unwrap_or(5))),
        consecutive_gateway: positive(gateway),
        consecutive_local: if split { positive(Some(local.unwrap_or(5))) } else { None },
        split_local: split,
        interval: object.duration_of("interval", LEAST, problems).unwrap_or(Duration::from_secs(10)),
        base_ejection: object
            .duration_of("baseEjectionTime", LEAST, problems)
            .unwrap_or(Duration::from_secs(30)),
        max_ejection_percent: percent(&mut object, "maxEjectionPercent", problems).unwrap_or(10),
        min_health_percent: percent(&mut object, "minHealthPercent", problems).unwrap_or(0),
        error_statuses: statuses,
    };
    object.finish(problems);
    Some(read)
}

/// Reads `tls`.
fn tls(object: &mut Object<'_>, problems: &mut Problems) -> Option<ClientTls> {
    let mut object = object.object("tls", problems)?;
    let modes = [
        ("DISABLE", ClientTlsMode::Disable),
        ("SIMPLE", ClientTlsMode::Simple),
        ("MUTUAL", ClientTlsMode::Mutual),
        ("ISTIO_MUTUAL", ClientTlsMode::IstioMutual),
    ];
    let mode = object.word("mode", &modes, problems).unwrap_or(ClientTlsMode::Disable);
    let certificate = object.shared("clientCertificate", problems);
    let key = object.shared("privateKey", problems);
    let roots = object.shared("caCertificates", problems);
    let crl = object.shared("caCrl", problems);
    let credential = object.shared("credentialName", problems);
    let insecure = object.bool("insecureSkipVerify", problems).unwrap_or_default();
    let sni = object.shared("sni", problems);
    if let Some(sni) = &sni
        && let Err(wanted) = host::check_name(sni)
    {
        problems.error(object.at("sni"), format!("is {sni:?}, wanted {wanted}"));
    }
    let names = object.texts("subjectAltNames", problems);
    match mode {
        ClientTlsMode::Mutual if credential.is_none() => {
            for (field, found) in [("clientCertificate", &certificate), ("privateKey", &key)] {
                if found.is_none() {
                    let message = "is missing, wanted with mode MUTUAL unless there is a credentialName";
                    problems.error(object.at(field), message);
                }
            }
        }
        ClientTlsMode::Mutual => {}
        ClientTlsMode::IstioMutual => {
            for field in ["clientCertificate", "privateKey", "caCertificates", "credentialName"] {
                if object.has(field) {
                    let message = "is there beside mode ISTIO_MUTUAL, whose certificates are the mesh's own";
                    problems.error(object.at(field), message);
                }
            }
        }
        ClientTlsMode::Simple | ClientTlsMode::Disable => {
            for field in ["clientCertificate", "privateKey"] {
                if object.has(field) {
                    problems.warning(object.at(field), "has no effect, only with mode MUTUAL");
                }
            }
        }
    }
    if credential.is_some() && mode != ClientTlsMode::IstioMutual {
        for field in ["clientCertificate", "privateKey", "caCertificates", "caCrl"] {
            if object.has(field) {
                let message = "is there beside credentialName, wanted the one or the other";
                problems.error(object.at(field), message);
            }
        }
    }
    let verifies = matches!(mode, ClientTlsMode::Simple | ClientTlsMode::Mutual) && !insecure;
    if crl.is_some() && !verifies {
        let message = "has no effect, only with mode SIMPLE or MUTUAL and without insecureSkipVerify";
        problems.warning(object.at("caCrl"), message);
    }
    if insecure && (roots.is_some() || !names.is_empty()) {
        let message = "is there beside caCertificates or subjectAltNames, wanted at most one of them";
        problems.error(object.at("insecureSkipVerify"), message);
    }
    object.finish(problems);
    Some(ClientTls {
        mode,
        sni,
        subject_alt_names: names.into_iter().map(|(_, name)| StringMatch::Exact(name.into())).collect(),
        client_certificate: if mode == ClientTlsMode::Mutual { certificate.zip(key) } else { None },
        ca_certificates: roots,
        ca_crl: crl,
        credential_name: credential,
        insecure_skip_verify: insecure,
    })
}

/// Reads `tunnel`.
fn tunnel(object: &mut Object<'_>, problems: &mut Problems) -> Option<ConnectTunnel> {
    let mut object = object.object("tunnel", problems)?;
    let post = object.word("protocol", &[("CONNECT", false), ("POST", true)], problems).unwrap_or_default();
    let host: Option<Arc<str>> = object.shared("targetHost", problems);
    match &host {
        None => problems.error(object.at("targetHost"), "is missing, wanted a host or an address"),
        Some(host) => {
            let is_address = host.parse::<std::net::IpAddr>().is_ok();
            if let Err(wanted) = host::check_name(host)
                && !is_address
            {
                problems.error(object.at("targetHost"), format!("is {host:?}, wanted {wanted}"));
            }
        }
    }
    let port = object.port("targetPort", problems);
    if !object.has("targetPort") {
        problems.error(object.at("targetPort"), "is missing, wanted a number from 1 to 65535");
    }
    object.finish(problems);
    Some(ConnectTunnel { post, host: host?, port: port? })
}

/// Reads `proxyProtocol`; version 1 unless it says otherwise (F7).
fn proxy_protocol(object: &mut Object<'_>, problems: &mut Problems) -> Option<ProxyProtocol> {
    let mut object = object.object("proxyProtocol", problems)?;
    let versions = [("V1", ProxyProtocol::V1), ("V2", ProxyProtocol::V2)];
    let version = object.word("version", &versions, problems).unwrap_or(ProxyProtocol::V1);
    object.finish(problems);
    Some(version)
}

/// Reads `retryBudget` (E2).
fn retry_budget(object: &mut Object<'_>, problems: &mut Problems) -> Option<RetryBudget> {
    let mut object = object.object("retryBudget", problems)?;
    let percent = match object.get("percent") {
        // Istio has a number here; as in other places a percentage is an object.
        Some(node) if node.value.is_object() => parts::percent(&mut object, "percent", problems),
        Some(node) => node.float(0.0..=100.0, problems).map(parts::share),
        None => None,
    };
    let min_concurrency = object.count("minRetryConcurrency", problems).unwrap_or(3);
    let interval = object.duration("budgetInterval", problems).unwrap_or_default();
    object.finish(problems);
    Some(RetryBudget { share: percent.unwrap_or_else(|| parts::share(20.0)), min_concurrency, interval })
}
