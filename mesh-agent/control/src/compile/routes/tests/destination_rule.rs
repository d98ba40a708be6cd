//! DestinationRules (semantics.md §2.5).

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{
    route::{
        Routes,
        cluster::{Algorithm, ClientTlsMode, Cluster, ClusterKey, Locality},
    },
    snapshot::Name,
};

use super::{ISTIO, aged, compile, over_the_link, routes, service};

fn dr(name: &str, second: u8, spec: &str) -> String {
    aged(ISTIO, "DestinationRule", name, Some(second), spec)
}

fn get(
    routes: &Routes,
    subset: Option<&str>,
    port: u16,
    client: &str,
    labels: &[(&str, &str)],
) -> Option<Arc<Cluster>> {
    let key = ClusterKey { service: Name::new("shop", "web"), port, subset: subset.map(Into::into) };
    let labels: BTreeMap<Arc<str>, Arc<str>> =
        labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    routes.clusters.get(&key)?.get(client, &labels).cloned()
}

fn cluster(routes: &Routes, subset: Option<&str>, port: u16, client: &str) -> Option<Arc<Cluster>> {
    get(routes, subset, port, client, &[])
}

fn max(routes: &Routes, client: &str) -> Option<u32> {
    cluster(routes, None, 80, client)?.policy.pool.max_connections
}

fn with(rules: &[String]) -> Arc<Routes> {
    routes(&[&[service("shop/web", &["http:80", "http-b:81"])], rules].concat())
}

const WEB: &str = "web.shop.svc.cluster.local";

fn limit(max: u32, more: &str) -> String {
    format!("host: {WEB}, trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: {max}}}}}}}{more}")
}

#[test]
fn s37_the_clients_own_rule_comes_first_then_the_services_then_the_roots() {
    let all = with(&[
        dr("client/r", 1, &limit(1, "")),
        dr("shop/r", 2, &limit(2, "")),
        dr("istio-system/r", 3, &limit(3, "")),
    ]);
    assert_eq!(
        ["client", "shop", "x", "istio-system"].map(|c| max(&all, c)),
        [Some(1), Some(2), Some(2), Some(2)]
    );
    let hidden = with(&[
        dr("client/r", 1, &limit(1, ", exportTo: [other]")),
        dr("shop/r", 2, &limit(2, ", exportTo: [., lent]")),
        dr("istio-system/r", 3, &limit(3, "")),
    ]);
    assert_eq!(
        ["client", "shop", "lent", "x"].map(|c| max(&hidden, c)),
        [Some(3), Some(2), Some(2), Some(3)]
    );
    let elsewhere = with(&[dr("else/r", 1, &limit(1, ""))]);
    assert_eq!(["else", "shop", "x"].map(|c| max(&elsewhere, c)), [Some(1), None, None]);
}

#[test]
fn s43_the_idle_time_of_http_is_for_requests_and_that_of_tcp_for_both() {
    for (said, wanted) in [
        ("http: {idleTimeout: 5s}", (3600, Some(5))),
        ("tcp: {idleTimeout: 7s}", (7, None)),
        ("tcp: {idleTimeout: 7s}, http: {idleTimeout: 5s}", (7, Some(5))),
        ("http: {idleTimeout: 0s}", (3600, Some(0))),
    ] {
        let all =
            with(&[dr("shop/r", 1, &format!("host: {WEB}, trafficPolicy: {{connectionPool: {{{said}}}}}"))]);
        let pool = cluster(&all, None, 80, "x").unwrap().policy.pool.clone();
        let found = (pool.idle_timeout.as_secs(), pool.http_idle_timeout.map(|time| time.as_secs()));
        assert_eq!(found, wanted, "{said}");
    }
}

#[test]
fn a_rules_upgrade_to_http2_is_for_ports_that_do_not_say_they_are_http_too() {
    for (said, wanted) in
        [("UPGRADE", (true, true)), ("DO_NOT_UPGRADE", (false, false)), ("DEFAULT", (false, false))]
    {
        let spec = format!("trafficPolicy: {{connectionPool: {{http: {{h2UpgradePolicy: {said}}}}}}}");
        let all = with(&[dr("shop/r", 1, &format!("host: {WEB}, {spec}"))]);
        let pool = &cluster(&all, None, 80, "x").unwrap().policy.pool;
        assert_eq!((pool.h2_upgrade, pool.h2_upgrade_sniffed), wanted, "{said}");
    }
}

#[test]
fn s37_an_exact_host_beats_wildcards_and_longer_ones_shorter_ones() {
    let on = |host: &str, max: u32| limit(max, "").replace(WEB, &format!("'{host}'"));
    let all = with(&[
        dr("shop/a", 1, &on("*.cluster.local", 1)),
        dr("shop/b", 2, &on("*.shop.svc.cluster.local", 2)),
        dr("shop/c", 3, &on("web", 3)),
    ]);
    assert_eq!(max(&all, "x"), Some(3));
    let wild = with(&[
        dr("shop/a", 1, &on("*.cluster.local", 1)),
        dr("shop/b", 2, &on("*.shop.svc.cluster.local", 2)),
    ]);
    assert_eq!(max(&wild, "x"), Some(2));
}

#[test]
fn s6_s38_several_rules_of_one_host_are_one_the_oldest_first() {
    let all = with(&[
        dr(
            "shop/young",
            2,
            &limit(2, ", subsets: [{name: v1, labels: {version: other}}, {name: v2, labels: {version: v2}}]"),
        ),
        dr("shop/old", 1, &format!("host: {WEB}, subsets: [{{name: v1, labels: {{version: v1}}}}]")),
        dr("shop/apart", 3, &limit(3, ", exportTo: [.], subsets: [{name: v3, labels: {version: v3}}]")),
    ]);
    assert_eq!(max(&all, "x"), Some(2), "from the first that has a policy");
    let version = |subset| cluster(&all, Some(subset), 80, "x").map(|c| c.labels["version"].to_string());
    assert_eq!(["v1", "v2", "v3"].map(version), [Some("v1".into()), Some("v2".into()), None]);
    let subset = cluster(&all, Some("v1"), 80, "x").unwrap();
    assert_eq!(&*subset.origin.as_ref().unwrap().name.name, "old");
    assert_eq!(subset.policy.pool.max_connections, Some(2), "subsets inherit");
}

#[test]
fn s39_a_rule_with_a_selector_is_for_those_workloads_of_its_namespace_alone() {
    let all = with(&[
        dr("shop/all", 1, &limit(1, ", subsets: [{name: v1, labels: {version: v1}}]")),
        dr("client/some", 2, &limit(2, ", workloadSelector: {matchLabels: {app: a}}")),
    ]);
    let seen = |client, labels| get(&all, None, 80, client, labels).unwrap().policy.pool.max_connections;
    assert_eq!(seen("client", &[("app", "a")]), Some(2));
    assert_eq!(seen("client", &[("app", "b")]), Some(1));
    assert_eq!(seen("shop", &[("app", "a")]), Some(1));
    assert!(get(&all, Some("v1"), 80, "client", &[("app", "a")]).is_some(), "the others' subsets stay");
}

#[test]
fn s40_ports_replace_as_a_whole_and_subsets_lie_over_field_by_field() {
    let all = with(&[dr(
        "shop/r",
        1,
        &format!(
            "host: {WEB}, trafficPolicy: {{loadBalancer: {{simple: RANDOM}}, outlierDetection: {{}}, tls: {{mode: DISABLE}},
               connectionPool: {{http: {{http1MaxPendingRequests: 7}}}},
               portLevelSettings: [{{port: {{number: 81}}, loadBalancer: {{simple: ROUND_ROBIN}}}}]}},
             subsets: [{{name: plain, labels: {{v: p}}}},
               {{name: own, labels: {{v: o}}, trafficPolicy: {{loadBalancer: {{simple: LEAST_REQUEST}}, portLevelSettings: [{{port: {{number: 81}}, tls: {{mode: SIMPLE}}}}]}}}}]"
        ),
    )]);
    let policy = |subset, port| cluster(&all, subset, port, "x").unwrap().policy.clone();
    let base = policy(None, 80);
    assert_eq!((&base.balancing.algorithm, base.pool.max_pending), (&Algorithm::Random, Some(7)));
    assert_eq!(base.tls.as_ref().map(|tls| tls.mode), Some(ClientTlsMode::Disable), "S46");
    assert!(base.outlier.is_some());
    assert!(matches!(base.balancing.locality, Locality::Failover { forced: false, .. }), "fact 5");
    let port = policy(None, 81);
    assert_eq!(
        (&port.balancing.algorithm, port.pool.max_pending, &port.tls),
        (&Algorithm::RoundRobin, None, &None)
    );
    assert_eq!(port.balancing.locality, Locality::Anywhere, "without outlier detection");
    assert_eq!(policy(Some("plain"), 80), base);
    let own = policy(Some("own"), 80);
    assert_eq!((&own.balancing.algorithm, own.pool.max_pending), (&Algorithm::LeastRequest, Some(7)));
    let both = policy(Some("own"), 81);
    assert_eq!(both.tls.map(|tls| tls.mode), Some(ClientTlsMode::Simple));
    assert_eq!(
        (both.balancing.algorithm, both.pool.max_pending),
        (Algorithm::LeastRequest, None),
        "even if empty (S40)"
    );
}

#[test]
fn s41_a_rule_of_subsets_alone_says_nothing_of_the_whole() {
    let documents = [
        service("shop/web", &["http:80"]),
        dr("shop/r", 1, &format!("host: {WEB}, subsets: [{{name: v1, labels: {{version: v1}}}}]")),
    ];
    let compiled = compile(&documents);
    let found = compiled.snapshot.routes();
    assert_eq!(cluster(found, None, 80, "x"), None);
    assert!(cluster(found, Some("v1"), 80, "x").is_some());
    assert_eq!(cluster(found, Some("v2"), 80, "x"), None, "S41");
    assert!(over_the_link(&compiled.snapshot).same_world(&compiled.snapshot));
}
