//! Small tables that differ in everything the model of routes has.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use mesh_core::{
    route::{
        HostPort, Origin, Routes,
        cluster::{
            Algorithm, Balancing, ClientTls, ClientTlsMode, Cluster, ClusterKey, ConnectTunnel,
            ConnectionPool, Distribution, HashKey, HashTable, Http2Keepalive, Locality, OutlierDetection,
            ProxyProtocol, RetryBudget, TrafficPolicy, Warmup,
        },
        http::{
            Abort, Action, Backend, Cors, Fault, HeaderOps, HttpRule, HttpTable, Millionths, Mirror,
            PathRewrite, Redirect, RedirectPort, RetryOn, RetryPolicy, Rewrite, SearchRegex, WeightedBackend,
        },
        matching::{FullRegex, HeaderMatch, HttpMatch, PathMatch, QueryMatch, StringMatch},
        scope::{EgressHost, EgressListener, InNamespace, OutboundPolicy, Scoped, SidecarScope},
        stream::{StreamMatch, StreamRule, StreamTable},
        variables::HeaderText,
    },
    snapshot::Name,
};
use proptest::{collection::vec, option, prelude::*, sample::select};

fn word() -> impl Strategy<Value = Arc<str>> {
    select(vec!["a", "b", "web", "über \"x\"\n", ""]).prop_map(Into::into)
}

fn name() -> impl Strategy<Value = Name> {
    (select(vec!["a", "b"]), select(vec!["web", "cart"]))
        .prop_map(|(namespace, name)| Name::new(namespace, name))
}

fn at() -> impl Strategy<Value = HostPort> {
    let hosts = vec!["a", "*.example.com", "*", "web.shop.svc.cluster.local"];
    (select(hosts), select(vec![80, 443])).prop_map(|(host, port)| HostPort { host: host.into(), port })
}

fn origin() -> impl Strategy<Value = Arc<Origin>> {
    (word(), name(), word(), option::of(word()))
        .prop_map(|(kind, name, field, place)| Arc::new(Origin { kind, name, field, place }))
}

fn labels() -> impl Strategy<Value = BTreeMap<Arc<str>, Arc<str>>> {
    vec((word(), word()), 0..2).prop_map(|pairs| pairs.into_iter().collect())
}

fn regex() -> impl Strategy<Value = &'static str> {
    select(vec![".*", "(?i)a|b", r"/x/(\d+)"])
}

fn text() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        Just(StringMatch::Present),
        word().prop_map(StringMatch::Exact),
        word().prop_map(StringMatch::Prefix),
        regex().prop_map(|pattern| StringMatch::Regex(FullRegex::new(pattern).unwrap())),
    ]
}

fn path() -> impl Strategy<Value = PathMatch> {
    prop_oneof![
        (word(), any::<bool>()).prop_map(|(path, ignore_case)| PathMatch::Exact { path, ignore_case }),
        (word(), any::<bool>()).prop_map(|(prefix, ignore_case)| PathMatch::Prefix { prefix, ignore_case }),
        word().prop_map(PathMatch::Segments),
        regex().prop_map(|pattern| PathMatch::Regex(FullRegex::new(pattern).unwrap())),
    ]
}

fn http_match() -> impl Strategy<Value = HttpMatch> {
    let headers = vec(
        (word(), text(), any::<bool>()).prop_map(|(name, value, inverted)| HeaderMatch {
            name,
            value,
            inverted,
        }),
        0..2,
    );
    let query = vec((word(), text()).prop_map(|(name, value)| QueryMatch { name, value }), 0..2);
    (
        option::of(word()),
        option::of(path()),
        option::of(text()),
        option::of(text()),
        option::of(text()),
        headers,
        query,
        labels(),
        option::of(word()),
    )
        .prop_map(
            |(name, path, method, scheme, authority, headers, query, source_labels, source_namespace)| {
                HttpMatch {
                    name,
                    path,
                    method,
                    scheme,
                    authority,
                    headers,
                    query,
                    source_labels,
                    source_namespace,
                }
            },
        )
}

fn ops() -> impl Strategy<Value = HeaderOps> {
    let text = prop_oneof![
        word().prop_map(HeaderText::Plain),
        select(vec!["%PROTOCOL%", "a%%%REQ(:path?x):3%"]).prop_map(|text| HeaderText::parse(text).unwrap()),
    ];
    let pairs = move || vec((word(), text.clone()), 0..2);
    (pairs(), pairs(), vec(word(), 0..2), option::of(word()))
        .prop_map(|(set, add, remove, authority)| HeaderOps { set, add, remove, authority })
}

fn backend() -> impl Strategy<Value = Backend> {
    let key = (name(), select(vec![80, 443]), option::of(word()));
    prop_oneof![
        key.prop_map(|(service, port, subset)| Backend::Cluster(ClusterKey { service, port, subset })),
        (select(vec![500, 503]), word()).prop_map(|(status, reason)| Backend::Broken { status, reason }),
    ]
}

fn backends() -> impl Strategy<Value = Vec<WeightedBackend>> {
    let one = (1..100_u32, backend(), ops(), ops()).prop_map(
        |(weight, backend, request_headers, response_headers)| WeightedBackend {
            weight,
            backend,
            request_headers,
            response_headers,
        },
    );
    vec(one, 1..3)
}

fn path_rewrite() -> impl Strategy<Value = PathRewrite> {
    prop_oneof![
        word().prop_map(PathRewrite::MatchedPrefix),
        word().prop_map(PathRewrite::Full),
        (regex(), word()).prop_map(|(pattern, substitution)| PathRewrite::Regex {
            pattern: SearchRegex::new(pattern).unwrap(),
            substitution,
        }),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let port = prop_oneof![
        Just(RedirectPort::OfScheme),
        Just(RedirectPort::OfHost),
        Just(RedirectPort::OfRequest),
        Just(RedirectPort::Number(81))
    ];
    let redirect = (option::of(word()), option::of(word()), port, option::of(path_rewrite()))
        .prop_map(|(scheme, authority, port, path)| Redirect { status: 308, scheme, authority, port, path });
    prop_oneof![
        3 => backends().prop_map(Action::Forward),
        1 => redirect.prop_map(Action::Redirect),
        1 => (vec(any::<u8>(), 0..4), word())
            .prop_map(|(body, reason)| Action::Respond { status: 404, body: body.into(), reason }),
        1 => Just(Action::Passthrough),
    ]
}

fn seconds() -> impl Strategy<Value = Duration> {
    (0..9_u64, 0..999_999_999_u32).prop_map(|(seconds, nanos)| Duration::new(seconds, nanos))
}

fn retries() -> impl Strategy<Value = RetryPolicy> {
    let on = (any::<bool>(), vec(400..599_u16, 0..2), vec(0..16_u8, 0..2), vec(word(), 0..2)).prop_map(
        |(flag, statuses, grpc, headers)| RetryOn {
            connect_failure: flag,
            reset: !flag,
            try_timeout: flag,
            statuses,
            grpc,
            headers,
            headers_of_request: flag,
            ..RetryOn::default()
        },
    );
    let backoffs = (seconds(), seconds());
    (1..5_u32, option::of(seconds()), on, backoffs, option::of(any::<bool>()), any::<bool>()).prop_map(
        |(attempts, per_try_timeout, on, backoffs, ignore_previous_hosts, remote_localities)| RetryPolicy {
            attempts,
            per_try_timeout,
            on,
            backoff: backoffs.0,
            backoff_min: backoffs.1,
            ignore_previous_hosts,
            remote_localities,
        },
    )
}

fn share() -> impl Strategy<Value = Millionths> {
    (0..=1_000_000_u32).prop_map(Millionths)
}

fn fault() -> impl Strategy<Value = Fault> {
    let abort = prop_oneof![(200..600_u16).prop_map(Abort::Http), (0..17_u8).prop_map(Abort::Grpc)];
    (option::of((share(), seconds())), option::of((share(), abort)))
        .prop_map(|(delay, abort)| Fault { delay, abort })
}

fn cors() -> impl Strategy<Value = Cors> {
    let words = || vec(word(), 0..2);
    (
        vec(text(), 0..2),
        words(),
        words(),
        words(),
        option::of(seconds()),
        option::of(any::<bool>()),
        any::<bool>(),
    )
        .prop_map(
            |(origins, methods, headers, expose, max_age, credentials, answer_unmatched_preflights)| Cors {
                origins,
                methods,
                headers,
                expose,
                max_age,
                credentials,
                answer_unmatched_preflights,
            },
        )
}

fn rule() -> impl Strategy<Value = HttpRule> {
    let rewrite = (option::of(word()), option::of(path_rewrite()))
        .prop_map(|(authority, path)| Rewrite { authority, path });
    let mirrors = vec((backend(), share()).prop_map(|(backend, share)| Mirror { backend, share }), 0..2);
    (
        (option::of(word()), origin(), vec(http_match(), 0..2), action(), option::of(seconds())),
        (option::of(retries()), option::of(fault()), mirrors, option::of(cors())),
        (ops(), ops(), rewrite),
    )
        .prop_map(
            |(
                (name, origin, matches, action, timeout),
                (retries, fault, mirrors, cors),
                (request_headers, response_headers, rewrite),
            )| HttpRule {
                name,
                origin,
                matches,
                action,
                timeout,
                retries,
                fault,
                mirrors,
                cors,
                request_headers,
                response_headers,
                rewrite,
            },
        )
}

fn http() -> impl Strategy<Value = HttpTable> {
    (option::of(word()), vec(rule(), 0..3), action()).prop_map(|(owner, rules, unmatched)| HttpTable {
        owner,
        rules,
        unmatched,
    })
}

fn streams() -> impl Strategy<Value = StreamTable> {
    let subnet = select(vec!["10.0.0.0/8", "fd00::/64"]).prop_map(|net| net.parse().unwrap());
    let one = (vec(word(), 0..2), vec(subnet, 0..2), labels(), option::of(word())).prop_map(
        |(sni, subnets, source_labels, source_namespace)| StreamMatch {
            sni,
            subnets,
            source_labels,
            source_namespace,
        },
    );
    let rule = (origin(), vec(one, 0..2), backends()).prop_map(|(origin, matches, backends)| StreamRule {
        origin,
        matches,
        backends,
    });
    let rules = vec(rule, 0..3).boxed();
    (rules.clone(), rules).prop_map(|(tls, tcp)| StreamTable { tls, tcp })
}

fn balancing() -> impl Strategy<Value = Balancing> {
    let cookie = (word(), option::of(word()), option::of(seconds()), vec((word(), word()), 0..2))
        .prop_map(|(name, path, ttl, attributes)| HashKey::Cookie { name, path, ttl, attributes });
    let key = prop_oneof![
        word().prop_map(HashKey::Header),
        cookie,
        Just(HashKey::SourceIp),
        word().prop_map(HashKey::Query),
    ];
    let table = select(vec![HashTable::Ring(1024), HashTable::Maglev(65_537)]);
    let algorithm = prop_oneof![
        select(vec![
            Algorithm::LeastRequest,
            Algorithm::RoundRobin,
            Algorithm::Random,
            Algorithm::Passthrough
        ]),
        (key, table).prop_map(|(key, table)| Algorithm::ConsistentHash { key, table }),
    ];
    let distribution =
        (word(), vec((word(), 0..100_u32), 0..2)).prop_map(|(from, to)| Distribution { from, to });
    let locality = prop_oneof![
        Just(Locality::Anywhere),
        vec(distribution, 0..2).prop_map(Locality::Distribute),
        (vec((word(), word()), 0..2), vec((word(), option::of(word())), 0..2), any::<bool>())
            .prop_map(|(regions, labels, forced)| Locality::Failover { regions, labels, forced }),
        (vec((word(), word()), 0..2), vec((word(), option::of(word())), 0..2), any::<u32>())
            .prop_map(|(regions, labels, min_size)| Locality::ZoneAware { regions, labels, min_size }),
    ];
    // Any number that was written in a manifest, to its last digit.
    let warmup = (seconds(), 0.0..100.0_f64, 0.0..4.0_f64)
        .prop_map(|(duration, minimum_percent, aggression)| Warmup { duration, minimum_percent, aggression });
    (algorithm, locality, option::of(warmup)).prop_map(|(algorithm, locality, warmup)| Balancing {
        algorithm,
        locality,
        warmup,
    })
}

fn tls() -> impl Strategy<Value = ClientTls> {
    let mode = select(vec![
        ClientTlsMode::Disable,
        ClientTlsMode::Simple,
        ClientTlsMode::Mutual,
        ClientTlsMode::IstioMutual,
    ]);
    (
        mode,
        option::of(word()),
        vec(text(), 0..2),
        option::of((word(), word())),
        option::of(word()),
        any::<bool>(),
    )
        .prop_map(|(mode, sni, subject_alt_names, client_certificate, text, insecure_skip_verify)| {
            ClientTls {
                mode,
                sni,
                subject_alt_names,
                client_certificate,
                ca_certificates: text.clone(),
                ca_crl: text.clone(),
                credential_name: text,
                insecure_skip_verify,
            }
        })
}

fn cluster() -> impl Strategy<Value = Cluster> {
    let pool =
        (option::of(any::<u32>()), seconds(), option::of((option::of(1..9_u32), option::of(seconds()))))
            .prop_map(|(max, connect_timeout, keepalive)| ConnectionPool {
                max_connections: max,
                max_pending: max,
                connect_timeout,
                http_idle_timeout: keepalive.and_then(|(_, idle)| idle),
                h2_upgrade_sniffed: max.is_some(),
                keepalive: keepalive.map(|(probes, idle)| (probes, idle, idle)),
                http2_keepalive: keepalive
                    .and_then(|(_, idle)| Some(Http2Keepalive { interval: idle?, timeout: connect_timeout })),
                ..ConnectionPool::default()
            });
    let outlier = (option::of(1..9_u32), seconds(), vec((400..500_u16, 500..600_u16), 0..2)).prop_map(
        |(consecutive, interval, error_statuses)| OutlierDetection {
            consecutive_5xx: consecutive,
            consecutive_gateway: None,
            consecutive_local: consecutive,
            split_local: true,
            interval,
            base_ejection: interval,
            max_ejection_percent: 10,
            min_health_percent: 0,
            error_statuses,
        },
    );
    let tunnel = (any::<bool>(), word(), any::<u16>()).prop_map(|(post, host, port)| ConnectTunnel {
        post,
        host,
        port,
    });
    let budget = (share(), any::<u32>(), seconds())
        .prop_map(|(share, min_concurrency, interval)| RetryBudget { share, min_concurrency, interval });
    let policy = (
        (balancing(), pool, option::of(outlier), option::of(tls())),
        (
            option::of(tunnel),
            option::of(select(vec![ProxyProtocol::V1, ProxyProtocol::V2])),
            option::of(budget),
        ),
    )
        .prop_map(|((balancing, pool, outlier, tls), (tunnel, proxy_protocol, retry_budget))| {
            TrafficPolicy { balancing, pool, outlier, tls, tunnel, proxy_protocol, retry_budget }
        });
    (option::of(origin()), labels(), policy).prop_map(|(origin, labels, policy)| Cluster {
        origin,
        labels,
        policy,
    })
}

fn sidecar() -> impl Strategy<Value = Arc<SidecarScope>> {
    let host = (any::<bool>(), option::of(word()), word())
        .prop_map(|(excluded, namespace, host)| EgressHost { excluded, namespace, host });
    let listener =
        (option::of(any::<u16>()), vec(host, 0..2)).prop_map(|(port, hosts)| EgressListener { port, hosts });
    let outbound = option::of(select(vec![OutboundPolicy::AllowAny, OutboundPolicy::RegistryOnly]));
    (vec(listener, 0..2), outbound).prop_map(|(egress, outbound)| {
        Arc::new(SidecarScope { egress, outbound, egress_proxy: None, inbound: Default::default() })
    })
}

/// The same values in several places, as compilation makes them.
fn scoped<T: fmt::Debug + 'static>(
    value: impl Strategy<Value = T> + 'static,
) -> impl Strategy<Value = Scoped<T>> {
    let place = || 0..9_usize;
    let own = (word(), vec((labels(), place()), 0..2), option::of(place()));
    (vec(value.prop_map(Arc::new), 1..3), option::of(place()), vec(own, 0..3)).prop_map(
        |(values, default, own)| {
            let value = |at: usize| Arc::clone(&values[at % values.len()]);
            let by_namespace = own.into_iter().map(|(namespace, selected, all)| {
                let selected = selected.into_iter().map(|(labels, at)| (labels, value(at))).collect();
                (namespace, InNamespace { selected, all: all.map(value) })
            });
            Scoped { default: default.map(value), by_namespace: by_namespace.collect() }
        },
    )
}

/// Entries of every table.
pub(super) fn routes() -> impl Strategy<Value = Routes> {
    let key = (name(), select(vec![80, 443]), option::of(select(vec!["v1", "v2"])));
    let key =
        key.prop_map(|(service, port, subset)| ClusterKey { service, port, subset: subset.map(Into::into) });
    (
        vec((at(), scoped(http())), 0..3),
        vec((at(), scoped(streams())), 0..3),
        vec((key, scoped(cluster())), 0..3),
        vec((name(), sidecar()), 0..3),
    )
        .prop_map(|(http, streams, clusters, sidecars)| Routes {
            http: http.into_iter().collect(),
            streams: streams.into_iter().collect(),
            clusters: clusters.into_iter().collect(),
            sidecars: sidecars.into_iter().collect(),
        })
}
