//! Tables of what users write, right and wrong, by rows of the semantics (S37 …, C2 …).

use mesh_core::route::{
    cluster::{ClientTlsMode, HashKey, HashTable, Http2Keepalive, Locality},
    http::Millionths,
    matching::StringMatch,
};

use super::*;
use crate::{
    problem::Level,
    resource::Resource,
    source::document::{Known, Rules, parse},
};

/// The resource, if it is used, and what was said: `E` or `W`, field, message.
fn read(spec: &str) -> (Option<DestinationRule>, Vec<String>) {
    let text = format!(
        "{{apiVersion: networking.istio.io/v1beta1, kind: DestinationRule, metadata: {{name: d, namespace: shop}}, spec: {spec}}}"
    );
    let parsed = parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
    let said = parsed.problems.iter().map(|p| {
        let level = if p.level == Level::Error { "E" } else { "W" };
        format!("{level} {}: {}", p.field, p.message)
    });
    let read = parsed.resources.first().map(|(_, resource)| match &**resource {
        Resource::DestinationRule(rule) => (**rule).clone(),
        other => panic!("{other:?}"),
    });
    (read, said.collect())
}

/// A rule about which nothing was said.
fn good(spec: &str) -> DestinationRule {
    let (read, said) = read(spec);
    assert_eq!(said, [""; 0], "{spec}");
    read.unwrap()
}

/// The policy of a rule about which nothing was said.
fn policy(policy: &str) -> Settings {
    good(&format!("{{host: w, trafficPolicy: {policy}}}")).policy.unwrap().settings
}

/// Checks the level and field of each problem of a spec, and words that its message holds.
fn says(spec: &str, wanted: &[(&str, &str)]) {
    let (used, said) = read(spec);
    assert_eq!(said.len(), wanted.len(), "{spec}: {said:#?}");
    for (said, (start, words)) in said.iter().zip(wanted) {
        assert!(
            said.starts_with(&format!("{start}: ")) && said.contains(words),
            "{spec}: {said}, wanted {start}, {words}"
        );
    }
    let errors = wanted.iter().any(|(start, _)| start.starts_with('E'));
    assert_eq!(used.is_none(), errors, "{spec}: only errors keep it from being used");
}

/// As [`says`] for a policy; fields are given from there on.
fn policy_says(policy: &str, start: &str, words: &str) {
    let (level, field) = start.split_once(' ').unwrap();
    let start = format!("{level} spec.trafficPolicy.{field}");
    says(&format!("{{host: w, trafficPolicy: {policy}}}"), &[(&start, words)]);
}

#[test]
fn s38_host_subsets_and_visibility_are_read() {
    let rule = good(
        "{host: reviews, exportTo: ['.'], workloadSelector: {matchLabels: {app: a}}, \
         subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}, trafficPolicy: {loadBalancer: {simple: RANDOM}}}]}",
    );
    assert_eq!(&*rule.host.full("cluster.local"), "reviews.shop.svc.cluster.local");
    assert!(rule.export_to.is_some_and(|to| to.own));
    assert_eq!(rule.selector.get("app").map(|value| &**value), Some("a"));
    assert!(rule.policy.is_none() && rule.subsets[0].policy.is_none());
    assert_eq!(&*rule.subsets[1].name, "v2");
    assert!(rule.subsets[1].policy.is_some());
    says("{}", &[("E spec.host", "is missing")]);
    says("{host: ''}", &[("E spec.host", "is missing")]);
    says("{host: a_b}", &[("E spec.host", "a host name")]);
    assert!(good("{host: '*.local'}").host.is_wildcard());
    for (subsets, start, words) in [
        ("[{labels: {a: b}}]", "E spec.subsets[0].name", "is missing"),
        ("[{name: 'a b'}]", "E spec.subsets[0].name", "letters"),
        ("[{name: a}, {name: a}]", "E spec.subsets[1].name", "there already"),
        ("[{name: a, labels: {'*': b}}]", "E spec.subsets[0].labels.*", "a label"),
        ("[{name: a, trafficPolicy: {}}]", "W spec.subsets[0].trafficPolicy", "says nothing"),
    ] {
        says(&format!("{{host: w, subsets: {subsets}}}"), &[(start, words)]);
    }
}

#[test]
fn s39_a_rule_for_some_workloads_is_not_exported() {
    let rule =
        |to: &str| format!("{{host: w, exportTo: {to}, workloadSelector: {{matchLabels: {{app: a}}}}}}");
    for own in ["['.']", "[shop]", "[]"] {
        good(&rule(own));
    }
    for beyond in ["['*']", "['~']", "[else]", "['.', else]"] {
        says(&rule(beyond), &[("E spec.exportTo", "is for others than namespace shop, wanted \".\"")]);
    }
    good("{host: w, exportTo: ['.', else]}");
}

#[test]
fn s40_port_level_settings_stand_beside_those_of_the_whole() {
    let rule = good(
        "{host: w, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}, portLevelSettings: [{port: {number: 80}, \
         connectionPool: {tcp: {maxConnections: 1}}}, {port: {number: 81}, tls: {mode: DISABLE}}]}}",
    );
    let policy = rule.policy.unwrap();
    assert_eq!(policy.ports[&80].pool.as_ref().unwrap().max_connections, Some(1));
    assert!(
        policy.ports[&80].balancing.is_none(),
        "what is not given for a port is not taken from the whole"
    );
    assert!(policy.ports[&81].pool.is_none() && policy.ports[&81].tls.is_some());
    for (ports, start, words) in [
        ("[{tls: {mode: DISABLE}}]", "E portLevelSettings[0].port", "is missing"),
        (
            "[{port: {number: 80}}]",
            "E portLevelSettings[0]",
            "says nothing, wanted at least one of loadBalancer",
        ),
        ("[{port: {}, tls: {mode: DISABLE}}]", "E portLevelSettings[0].port.number", "is missing"),
        (
            "[{port: {number: 0}, tls: {mode: DISABLE}}]",
            "E portLevelSettings[0].port.number",
            "from 1 to 65535",
        ),
        (
            "[{port: {number: 80}, tls: {mode: DISABLE}}, {port: {number: 80}, tls: {mode: DISABLE}}]",
            "E portLevelSettings[1].port",
            "there already",
        ),
        (
            "[{port: {number: 80}, tls: {mode: DISABLE}, tunnel: {targetHost: a, targetPort: 1}}]",
            "W portLevelSettings[0].tunnel",
            "not a field",
        ),
    ] {
        policy_says(&format!("{{tls: {{mode: DISABLE}}, portLevelSettings: {ports}}}"), start, words);
    }
}

#[test]
fn c2_the_default_algorithm_is_least_request() {
    let algorithm = |text: &str| policy(&format!("{{loadBalancer: {text}}}")).balancing.unwrap().algorithm;
    for (text, wanted) in [
        ("{}", Algorithm::LeastRequest),
        ("{simple: UNSPECIFIED}", Algorithm::LeastRequest),
        ("{simple: LEAST_REQUEST}", Algorithm::LeastRequest),
        ("{simple: ROUND_ROBIN}", Algorithm::RoundRobin),
        ("{simple: RANDOM}", Algorithm::Random),
        ("{simple: PASSTHROUGH}", Algorithm::Passthrough),
    ] {
        assert_eq!(algorithm(text), wanted, "{text}");
    }
    policy_says("{loadBalancer: {simple: LEAST_CONN}}", "W loadBalancer.simple", "LEAST_REQUEST");
    policy_says("{loadBalancer: {simple: FASTEST}}", "E loadBalancer.simple", "RANDOM or PASSTHROUGH");
    policy_says(
        "{loadBalancer: {simple: RANDOM, consistentHash: {useSourceIp: true}}}",
        "E loadBalancer.consistentHash",
        "beside simple",
    );
}

#[test]
fn c3_hashes_have_one_key_and_one_table() {
    let hash = |text: &str| match policy(&format!("{{loadBalancer: {{consistentHash: {text}}}}}"))
        .balancing
        .unwrap()
        .algorithm
    {
        Algorithm::ConsistentHash { key, table } => (key, table),
        other => panic!("{other:?}"),
    };
    assert_eq!(hash("{httpHeaderName: X-User}"), (HashKey::Header("x-user".into()), HashTable::Ring(1024)));
    assert_eq!(hash("{useSourceIp: true, maglev: {}}"), (HashKey::SourceIp, HashTable::Maglev(65_537)));
    assert_eq!(
        hash("{httpQueryParameterName: q, ringHash: {minimumRingSize: 7}}"),
        (HashKey::Query("q".into()), HashTable::Ring(7))
    );
    assert_eq!(hash("{useSourceIp: true, minimumRingSize: 9}").1, HashTable::Ring(9));
    assert_eq!(hash("{useSourceIp: true, maglev: {tableSize: 251}}").1, HashTable::Maglev(251));
    let cookie = hash("{httpCookie: {name: c, path: /, ttl: 0s, attributes: [{name: SameSite, value: Lax}, {name: Secure}]}}").0;
    assert_eq!(
        cookie,
        HashKey::Cookie {
            name: "c".into(),
            path: Some("/".into()),
            ttl: Some(Duration::ZERO),
            attributes: vec![("SameSite".into(), "Lax".into()), ("Secure".into(), "".into())],
        }
    );
    for (hash, field, words) in [
        ("{}", "", "what is hashed"),
        ("{useSourceIp: false}", "", "what is hashed"),
        ("{useSourceIp: true, httpHeaderName: a}", ".useSourceIp", "beside httpHeaderName"),
        ("{useSourceIp: true, ringHash: {}, maglev: {}}", ".maglev", "beside ringHash"),
        ("{useSourceIp: true, minimumRingSize: 5, maglev: {}}", ".minimumRingSize", "earlier versions"),
        ("{useSourceIp: true, minimumRingSize: 5, ringHash: {}}", ".minimumRingSize", "earlier versions"),
        ("{useSourceIp: true, maglev: {tableSize: 100}}", ".maglev.tableSize", "a prime"),
        ("{useSourceIp: true, maglev: {tableSize: 9999991}}", ".maglev.tableSize", "from 0 to 5000011"),
        (
            "{useSourceIp: true, ringHash: {minimumRingSize: 9000000}}",
            ".ringHash.minimumRingSize",
            "from 0 to 8388608",
        ),
        ("{httpCookie: {ttl: 1s}}", ".httpCookie.name", "is missing"),
        ("{httpCookie: {name: c, path: 'a;b'}}", ".httpCookie.path", "without ';'"),
        ("{httpCookie: {name: 'a=b'}}", ".httpCookie.name", "name of a cookie"),
        ("{httpCookie: {name: c, attributes: [{name: 'x;y'}]}}", ".httpCookie.attributes[0]", "';'"),
    ] {
        let start = format!("E loadBalancer.consistentHash{field}");
        policy_says(&format!("{{loadBalancer: {{consistentHash: {hash}}}}}"), &start, words);
    }
}

#[test]
fn c5_warm_up_is_for_least_request_and_round_robin() {
    let warmup = |text: &str| policy(&format!("{{loadBalancer: {text}}}")).balancing.unwrap().warmup.unwrap();
    let minute = Duration::from_secs(60);
    assert_eq!(
        warmup("{warmup: {duration: 60s}}"),
        Warmup { duration: minute, minimum_percent: 10.0, aggression: 1.0 }
    );
    assert_eq!(warmup("{simple: ROUND_ROBIN, warmupDurationSecs: 60s}").duration, minute);
    assert_eq!(
        warmup("{warmup: {duration: 1m, minimumPercent: 50, aggression: 1.5}}"),
        Warmup { duration: minute, minimum_percent: 50.0, aggression: 1.5 }
    );
    for (text, field, words) in [
        ("{simple: RANDOM, warmup: {duration: 1s}}", "warmup", "only with LEAST_REQUEST"),
        (
            "{consistentHash: {useSourceIp: true}, warmupDurationSecs: 1s}",
            "warmupDurationSecs",
            "only with LEAST_REQUEST",
        ),
        ("{warmup: {}}", "warmup.duration", "is missing"),
        ("{warmup: {duration: 1s, minimumPercent: 101}}", "warmup.minimumPercent", "from 0 to 100"),
        ("{warmup: {duration: 1s, aggression: 0.5}}", "warmup.aggression", "from 1"),
        ("{warmup: {duration: 1s}, warmupDurationSecs: 1s}", "warmupDurationSecs", "beside warmup"),
    ] {
        policy_says(&format!("{{loadBalancer: {text}}}"), &format!("E loadBalancer.{field}"), words);
    }
}

#[test]
fn c6_to_c8_localities_are_distributed_or_failed_over() {
    let locality = |text: &str| {
        let settings = policy(&format!("{{loadBalancer: {{localityLbSetting: {text}}}}}"));
        settings.balancing.unwrap().locality.unwrap().locality()
    };
    let plain = |regions: &[(&str, &str)], labels: &[(&str, Option<&str>)]| Locality::Failover {
        regions: regions.iter().map(|(from, to)| ((*from).into(), (*to).into())).collect(),
        labels: labels.iter().map(|(key, value)| ((*key).into(), value.map(Into::into))).collect(),
        forced: false,
    };
    assert_eq!(locality("{}"), plain(&[], &[]));
    assert_eq!(locality("{enabled: true}"), plain(&[], &[]));
    assert_eq!(locality("{enabled: false, failover: [{from: a, to: b}]}"), Locality::Anywhere);
    assert_eq!(locality("{failover: [{from: a, to: b}]}"), plain(&[("a", "b")], &[]));
    assert_eq!(
        locality("{failoverPriority: [topology.istio.io/network, 'version=v1']}"),
        plain(&[], &[("topology.istio.io/network", None), ("version", Some("v1"))])
    );
    let Locality::Distribute(shares) = locality("{distribute: [{from: a/b/*, to: {a/b/*: 80, a/c: 20}}]}")
    else {
        panic!()
    };
    assert_eq!((&*shares[0].from, shares[0].to.len()), ("a/b/*", 2));
    for (setting, field, words) in [
        ("{distribute: [{from: a, to: {b: 99}}]}", ".distribute[0].to", "weights of 99 in all"),
        ("{distribute: [{from: a, to: {b: 101}}]}", ".distribute[0].to.b", "from 1 to 100"),
        ("{distribute: [{from: a, to: {b: 50, b/*: 50}}]}", ".distribute[0].to.b/*", "overlaps"),
        (
            "{distribute: [{from: a, to: {b: 100}}, {from: a/b, to: {b: 100}}]}",
            ".distribute[1].from",
            "overlaps",
        ),
        ("{distribute: [{from: 'a*', to: {b: 100}}]}", ".distribute[0].from", "as the last part"),
        ("{distribute: [{from: '*/a', to: {b: 100}}]}", ".distribute[0].from", "as the last part"),
        ("{distribute: [{from: a/b/c/d, to: {b: 100}}]}", ".distribute[0].from", "SUBZONE"),
        ("{distribute: [{to: {b: 100}}]}", ".distribute[0].from", "is missing"),
        (
            "{distribute: [{from: a, to: {b: 100}}], failover: [{from: a, to: b}]}",
            ".distribute",
            "beside failover",
        ),
        ("{failover: [{from: a}]}", ".failover[0].to", "is missing"),
        ("{failover: [{from: a, to: a}]}", ".failover[0].to", "another"),
        ("{failover: [{from: a/b, to: c}]}", ".failover[0].from", "a region alone"),
        ("{failoverPriority: ['=v']}", ".failoverPriority[0]", "KEY"),
        ("{failoverPriority: [a, a]}", ".failoverPriority[1]", "there already"),
    ] {
        let (_, said) =
            read(&format!("{{host: w, trafficPolicy: {{loadBalancer: {{localityLbSetting: {setting}}}}}}}"));
        let start = format!("E spec.trafficPolicy.loadBalancer.localityLbSetting{field}: ");
        assert!(
            said.iter().any(|said| said.starts_with(&start) && said.contains(words)),
            "{setting}: {said:?}"
        );
    }
}

#[test]
fn c9_zone_aware_settings_have_their_own_size_and_the_regions_of_the_others() {
    let locality = |text: &str| {
        let settings = policy(&format!("{{loadBalancer: {{zoneAwareLbSetting: {text}}}}}"));
        settings.balancing.unwrap().locality.unwrap().locality()
    };
    let aware = |min_size| Locality::ZoneAware { regions: Vec::new(), labels: Vec::new(), min_size };
    assert_eq!(locality("{}"), aware(6));
    assert_eq!(locality("{enabled: true, minClusterSize: 2}"), aware(2));
    assert_eq!(locality("{enabled: false, minClusterSize: 2}"), Locality::Anywhere);
    assert_eq!(
        locality("{failover: [{from: a, to: b}], failoverPriority: ['version=v1']}"),
        Locality::ZoneAware {
            regions: vec![("a".into(), "b".into())],
            labels: vec![("version".into(), Some("v1".into()))],
            min_size: 6
        }
    );
    for (text, field, words) in [
        ("{zoneAwareLbSetting: {minClusterSize: -1}}", "zoneAwareLbSetting.minClusterSize", "is -1"),
        ("{zoneAwareLbSetting: {failover: [{from: a}]}}", "zoneAwareLbSetting.failover[0].to", "is missing"),
        ("{zoneAwareLbSetting: {}, localityLbSetting: {}}", "zoneAwareLbSetting", "beside localityLbSetting"),
    ] {
        policy_says(&format!("{{loadBalancer: {text}}}"), &format!("E loadBalancer.{field}"), words);
    }
    policy_says(
        "{loadBalancer: {zoneAwareLbSetting: {distribute: [a]}}}",
        "W loadBalancer.zoneAwareLbSetting.distribute",
        "is not a field",
    );
}

#[test]
fn s43_pools_take_zero_for_the_default() {
    let pool = |text: &str| policy(&format!("{{connectionPool: {text}}}")).pool.unwrap();
    let all = pool(
        "{tcp: {maxConnections: 1, connectTimeout: 30ms, idleTimeout: 5m, maxConnectionDuration: 1h, tcpKeepalive: {probes: 9, time: 2h, interval: 75s}}, \
         http: {http1MaxPendingRequests: 2, http2MaxRequests: 3, maxRequestsPerConnection: 4, maxRetries: 5, idleTimeout: 6s, \
         h2UpgradePolicy: UPGRADE, maxConcurrentStreams: 7, http2KeepAlive: {interval: 8s, timeout: 9s}}}",
    );
    let s = Duration::from_secs;
    assert_eq!(
        all,
        ConnectionPool {
            max_connections: Some(1),
            connect_timeout: Some(Duration::from_millis(30)),
            keepalive: Some((Some(9), Some(s(7200)), Some(s(75)))),
            tcp_idle_timeout: Some(s(300)),
            http_idle_timeout: Some(s(6)),
            max_connection_duration: Some(s(3600)),
            max_pending: Some(2),
            max_requests: Some(3),
            max_requests_per_connection: Some(4),
            max_retries: Some(5),
            max_concurrent_streams: Some(7),
            http2_keepalive: Some(Http2Keepalive { interval: s(8), timeout: s(9) }),
            h2_upgrade: Some(true),
            use_client_protocol: false,
        }
    );
    let zero = pool(
        "{tcp: {maxConnections: 0}, http: {http1MaxPendingRequests: 0, maxRetries: 0, h2UpgradePolicy: DEFAULT}}",
    );
    assert_eq!(zero, ConnectionPool::default());
    let pings = pool("{http: {http2KeepAlive: {interval: 8s}}}").http2_keepalive.unwrap();
    assert_eq!(pings, Http2Keepalive { interval: s(8), timeout: s(20) });
    policy_says(
        "{connectionPool: {http: {http2KeepAlive: {timeout: 9s}}}}",
        "W connectionPool.http.http2KeepAlive",
        "no interval",
    );
    for (pool, field, words) in [
        ("{}", "", "says nothing"),
        ("{tcp: {maxConnections: -1}}", ".tcp.maxConnections", "is -1"),
        ("{tcp: {connectTimeout: 0s}}", ".tcp.connectTimeout", "at least 1ms"),
        ("{tcp: {tcpKeepalive: {time: 1ms}}}", ".tcp.tcpKeepalive.time", "at least 1s"),
        ("{http: {h2UpgradePolicy: ALWAYS}}", ".http.h2UpgradePolicy", "DO_NOT_UPGRADE or UPGRADE"),
        (
            "{http: {useClientProtocol: true, h2UpgradePolicy: UPGRADE}}",
            ".http.h2UpgradePolicy",
            "beside useClientProtocol",
        ),
        ("{http: {maxRetries: many}}", ".http.maxRetries", "wanted a whole number"),
    ] {
        policy_says(&format!("{{connectionPool: {pool}}}"), &format!("E connectionPool{field}"), words);
    }
}

#[test]
fn s44_outlier_detection_has_istios_defaults_and_zero_turns_a_kind_off() {
    let outlier = |text: &str| policy(&format!("{{outlierDetection: {text}}}")).outlier.unwrap();
    assert_eq!(
        outlier("{}"),
        OutlierDetection {
            consecutive_5xx: Some(5),
            consecutive_gateway: None,
            consecutive_local: None,
            split_local: false,
            interval: Duration::from_secs(10),
            base_ejection: Duration::from_secs(30),
            max_ejection_percent: 10,
            min_health_percent: 0,
            error_statuses: Vec::new(),
        }
    );
    let all = outlier(
        "{consecutive5xxErrors: 0, consecutiveGatewayErrors: 3, splitExternalLocalOriginErrors: true, interval: 1s, \
         baseEjectionTime: 3m, maxEjectionPercent: 100, minHealthPercent: 50, outlierDetectionHttpErrorCodes: [429]}",
    );
    assert_eq!(
        (all.consecutive_5xx, all.consecutive_gateway, all.consecutive_local),
        (None, Some(3), Some(5))
    );
    assert_eq!((all.max_ejection_percent, all.min_health_percent), (100, 50));
    assert_eq!(all.error_statuses, [(429, 429)]);
    for (outlier, start, words) in [
        ("{maxEjectionPercent: 101}", "E outlierDetection.maxEjectionPercent", "from 0 to 100"),
        ("{minHealthPercent: -1}", "E outlierDetection.minHealthPercent", "from 0 to 100"),
        ("{interval: 0s}", "E outlierDetection.interval", "at least 1ms"),
        ("{baseEjectionTime: soon}", "E outlierDetection.baseEjectionTime", "wanted a duration"),
        ("{consecutive5xxErrors: -1}", "E outlierDetection.consecutive5xxErrors", "is -1"),
        ("{consecutiveErrors: 7}", "W outlierDetection.consecutiveErrors", "earlier versions"),
        (
            "{consecutiveLocalOriginFailures: 7}",
            "W outlierDetection.consecutiveLocalOriginFailures",
            "no effect",
        ),
    ] {
        policy_says(&format!("{{outlierDetection: {outlier}}}"), start, words);
    }
}

#[test]
fn s46_s47_tls_wants_what_its_mode_needs() {
    let tls = |text: &str| policy(&format!("{{tls: {text}}}")).tls.unwrap();
    assert_eq!(tls("{}").mode, ClientTlsMode::Disable, "a mode that is not given is the first");
    assert_eq!(tls("{mode: ISTIO_MUTUAL}").mode, ClientTlsMode::IstioMutual);
    let simple =
        tls("{mode: SIMPLE, sni: a.b, caCertificates: /ca.pem, subjectAltNames: [x.y, 'spiffe://a']}");
    assert_eq!(simple.sni.as_deref(), Some("a.b"));
    assert_eq!(simple.subject_alt_names[0], StringMatch::Exact("x.y".into()));
    let mutual = tls("{mode: MUTUAL, clientCertificate: /c, privateKey: /k}");
    assert_eq!(mutual.client_certificate, Some(("/c".into(), "/k".into())));
    assert!(tls("{mode: SIMPLE, insecureSkipVerify: true}").insecure_skip_verify);
    for (tls, start, words) in [
        ("{mode: TLS}", "E tls.mode", "MUTUAL or ISTIO_MUTUAL"),
        ("{mode: MUTUAL, privateKey: /k}", "E tls.clientCertificate", "is missing"),
        ("{mode: MUTUAL, clientCertificate: /c}", "E tls.privateKey", "is missing"),
        ("{mode: ISTIO_MUTUAL, caCertificates: /a}", "E tls.caCertificates", "the mesh's own"),
        (
            "{mode: MUTUAL, credentialName: s, caCertificates: /a}",
            "E tls.caCertificates",
            "beside credentialName",
        ),
        (
            "{mode: SIMPLE, insecureSkipVerify: true, caCertificates: /a}",
            "E tls.insecureSkipVerify",
            "beside caCertificates",
        ),
        (
            "{mode: SIMPLE, insecureSkipVerify: true, subjectAltNames: [a]}",
            "E tls.insecureSkipVerify",
            "beside caCertificates",
        ),
        ("{mode: SIMPLE, privateKey: /k}", "W tls.privateKey", "only with mode MUTUAL"),
        ("{mode: SIMPLE, sni: 'a b'}", "E tls.sni", "a host name"),
        ("{mode: SIMPLE, insecureSkipVerify: true, caCrl: /crl}", "W tls.caCrl", "no effect"),
        ("{mode: ISTIO_MUTUAL, caCrl: /crl}", "W tls.caCrl", "no effect"),
        ("{mode: SIMPLE, credentialName: s, caCrl: /crl}", "E tls.caCrl", "beside credentialName"),
    ] {
        policy_says(&format!("{{tls: {tls}}}"), start, words);
    }
}

#[test]
fn tunnels_proxy_protocol_and_retry_budgets_are_of_the_whole_policy() {
    let of = |share, min_concurrency, interval| RetryBudget {
        share: Millionths(share),
        min_concurrency,
        interval: Duration::from_secs(interval),
    };
    let all = policy("{tunnel: {targetHost: a.b, targetPort: 443}, retryBudget: {}}");
    assert_eq!(all.tunnel, Some(ConnectTunnel { post: false, host: "a.b".into(), port: 443 }));
    assert_eq!(all.retry_budget, Some(of(200_000, 3, 0)));
    assert!(
        policy("{tunnel: {protocol: POST, targetHost: 10.0.0.1, targetPort: 1}}")
            .tunnel
            .is_some_and(|t| t.post)
    );
    assert_eq!(policy("{proxyProtocol: {}}").proxy_protocol, Some(ProxyProtocol::V1));
    assert_eq!(policy("{proxyProtocol: {version: V2}}").proxy_protocol, Some(ProxyProtocol::V2));
    for budget in
        ["{percent: 12.5, minRetryConcurrency: 9}", "{percent: {value: 12.5}, minRetryConcurrency: 9}"]
    {
        let read = policy(&format!("{{retryBudget: {budget}}}")).retry_budget;
        assert_eq!(read, Some(of(125_000, 9, 0)), "{budget}");
    }
    assert_eq!(policy("{retryBudget: {budgetInterval: 5s}}").retry_budget, Some(of(200_000, 3, 5)));
    for (policy, start, words) in [
        ("{tunnel: {targetPort: 1}}", "E tunnel.targetHost", "is missing"),
        ("{tunnel: {targetHost: a}}", "E tunnel.targetPort", "is missing"),
        ("{tunnel: {targetHost: a, targetPort: 70000}}", "E tunnel.targetPort", "from 1 to 65535"),
        ("{tunnel: {protocol: GET, targetHost: a, targetPort: 1}}", "E tunnel.protocol", "CONNECT or POST"),
        ("{tunnel: {targetHost: a, targetPort: 1}, proxyProtocol: {}}", "E proxyProtocol", "beside tunnel"),
        ("{proxyProtocol: {version: V3}}", "E proxyProtocol.version", "V1 or V2"),
        ("{retryBudget: {percent: 101}}", "E retryBudget.percent", "from 0 to 100"),
        ("{retryBudget: {budgetInterval: often}}", "E retryBudget.budgetInterval", "a duration"),
    ] {
        policy_says(policy, start, words);
    }
}
