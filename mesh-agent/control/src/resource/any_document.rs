//! Whatever a document holds, reading it ends with a resource or with an error that says why, and never with a panic.

use proptest::{prelude::*, sample::select};
use serde_json::{Map, Value, json};

use super::Kind;
use crate::source::document::{Known, Parsed, Rules, parse};

/// Full documents, one per kind that is read field by field.
pub(crate) fn good() -> Vec<Value> {
    let meta = json!({"name": "a", "namespace": "shop"});
    let destination = json!({"host": "web", "subset": "v1", "port": {"number": 80}});
    let relayed = json!([{"destination": destination, "weight": 1}]);
    let to = json!([{"destination": destination, "weight": 1,
        "headers": {"request": {"set": {"a": "b"}, "add": {"host": "c"}, "remove": ["d"]}}}]);
    let of = |kind: &str, spec: Value| json!({"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": meta, "spec": spec});
    let mesh = json!({"outboundTrafficPolicy": {"mode": "ALLOW_ANY"}, "localityLbSetting": {"enabled": true},
        "defaultHttpRetryPolicy": {"attempts": 2}, "pathNormalization": {"normalization": "BASE"}});
    vec![
        of(
            "VirtualService",
            json!({
                "hosts": ["web", "*.example.com"], "gateways": ["mesh"], "exportTo": ["."],
                "http": [
                    {"name": "r", "match": [{"uri": {"prefix": "/a"}, "headers": {"x": {"regex": "a+"}}, "queryParams": {"q": {}},
                        "withoutHeaders": {"z": {"exact": "1"}}, "port": 80, "sourceLabels": {"app": "a"}, "ignoreUriCase": true}],
                     "route": to, "timeout": "1s", "retries": {"attempts": 2, "retryOn": "5xx,503", "perTryTimeout": "1s"},
                     "rewrite": {"uriRegexRewrite": {"match": "(a)", "rewrite": "\\1"}, "authority": "a.b:80"},
                     "fault": {"delay": {"fixedDelay": "1s", "percentage": {"value": 1.5}}, "abort": {"grpcStatus": "INTERNAL", "percent": 1}},
                     "mirrors": [{"destination": {"host": "m"}, "percentage": {"value": 2}}],
                     "corsPolicy": {"allowOrigins": [{"exact": "*"}], "maxAge": "1m", "allowMethods": ["GET"]}},
                    {"redirect": {"uri": "/b", "redirectCode": 308, "port": 8080}},
                    {"directResponse": {"status": 200, "body": {"bytes": "aGk="}}},
                    {"delegate": {"name": "d", "namespace": "other"}}
                ],
                "tls": [{"match": [{"sniHosts": ["a.example.com"], "destinationSubnets": ["::ffff:10.0.0.0/104"]}], "route": relayed}],
                "tcp": [{"match": [{"port": 1}], "route": relayed}],
            }),
        ),
        of(
            "DestinationRule",
            json!({
                "host": "web", "workloadSelector": {"matchLabels": {"a": "b"}},
                "subsets": [{"name": "v1", "labels": {"version": "v1"}, "trafficPolicy": {"tls": {"mode": "SIMPLE"}}}],
                "trafficPolicy": {
                    "loadBalancer": {"consistentHash": {"httpCookie": {"name": "c", "ttl": "1s", "attributes": [{"name": "a", "value": "b"}]},
                        "maglev": {"tableSize": 251}}, "localityLbSetting": {"distribute": [{"from": "a/*", "to": {"a/b/c": 60, "b": 40}}]}},
                    "connectionPool": {"tcp": {"maxConnections": 1, "tcpKeepalive": {"time": "1m"}}, "http": {"maxRetries": 3}},
                    "outlierDetection": {"consecutive5xxErrors": 1, "outlierDetectionHttpErrorCodes": [500]},
                    "tunnel": {"targetHost": "a.b", "targetPort": 1}, "retryBudget": {"percent": 20},
                    "portLevelSettings": [{"port": {"number": 80}, "loadBalancer": {"warmup": {"duration": "1m", "aggression": 1.5}}}],
                },
            }),
        ),
        of(
            "Sidecar",
            json!({
                "workloadSelector": {"labels": {"a": "b"}}, "outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"},
                "egress": [{"port": {"number": 1, "protocol": "HTTP", "name": "a"}, "hosts": ["~a/b.c"]}, {"hosts": ["./*"]}],
            }),
        ),
        of(
            "ServiceEntry",
            json!({
                "hosts": ["api.example.com"], "addresses": ["240.0.0.1"], "location": "MESH_EXTERNAL", "resolution": "STATIC",
                "ports": [{"number": 443, "name": "tls", "protocol": "TLS", "targetPort": 8443}],
                "endpoints": [{"address": "10.0.0.1", "ports": {"tls": 1}, "labels": {"a": "b"}, "weight": 2, "locality": "a/b"}],
            }),
        ),
        of(
            "WorkloadEntry",
            json!({"address": "10.0.0.1", "ports": {"http": 1}, "labels": {"a": "b"}, "weight": 1}),
        ),
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": meta, "spec": {
            "selector": {"matchLabels": {"a": "b"}}, "action": "DENY", "rules": [{"from": [{"source": {"principals": ["*"],
            "ipBlocks": ["10.0.0.0/8"]}}], "to": [{"operation": {"ports": ["80"]}}], "when": [{"key": "source.ip", "values": ["::1"]}]}]}}),
        json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": meta, "spec": {
            "parentRefs": [{"group": "", "kind": "Service", "name": "web", "port": 80}],
            "rules": [{"matches": [{"path": {"type": "PathPrefix", "value": "/a"}, "headers": [{"name": "a", "value": "b"}]}],
            "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "a", "value": "b"}]}}],
            "backendRefs": [{"name": "web", "port": 80, "weight": 1}], "timeouts": {"request": "1s"}}]}}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": "istio-system"},
            "data": {"mesh": mesh.to_string()}}),
    ]
}

/// Values that are odd somewhere.
fn leaf() -> impl Strategy<Value = Value> {
    let texts = [
        "",
        "*",
        "*.",
        "**",
        "~",
        "~/*",
        "./*",
        "/",
        "//",
        "-",
        "a/b/c/d",
        "é",
        "\u{0}",
        "a:b:c",
        "[::1]:0",
        "::1",
        "256.0.0.1",
        "10.0.0.0/33",
        "::/0",
        "::ffff:0.0.0.0/95",
        "(",
        "(?i)a",
        "a{9999}",
        "\\",
        "\\9",
        "%",
        "%A%",
        "1e99",
        "99999999999999999999h",
        "0.0000000000000000001s",
        "9223372036s",
        "1h1h",
        ".s",
        "5xx,,503,0",
        "aGk",
        "spiffe://",
        "LEAST_REQUEST",
    ];
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        select(vec![0_i64, 1, -1, 65_535, 65_536, 4_294_967_296, i64::MAX, i64::MIN]).prop_map(Value::from),
        Just(json!(u64::MAX)),
        select(vec![0.5, -0.0, 1e300, 100.000_001]).prop_map(|number: f64| json!(number)),
        select(texts.to_vec()).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        Just(Value::from("x".repeat(5000))),
        Just(json!([])),
        Just(json!({})),
        Just(json!([null])),
        Just(json!({"": null})),
        Just(json!([[[{"a": [{}]}]]])),
    ]
}

/// Number of values in a tree.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(size).sum(),
        Value::Object(fields) => fields.values().map(size).sum(),
        _ => 0,
    }
}

/// Puts `new` in the place of the `at`-th value, counted through the tree.
fn put(value: &mut Value, at: &mut usize, new: &Value) {
    if *at == 0 {
        *value = new.clone();
    }
    *at = at.wrapping_sub(1);
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| put(item, at, new)),
        Value::Object(fields) => fields.values_mut().for_each(|field| put(field, at, new)),
        _ => {}
    }
}

fn read(document: &Value) -> Parsed {
    parse("a.json".as_ref(), &document.to_string(), &Rules::default(), &Known::new())
}

/// A document leaves something: a resource, an error, or a note that its kind is not read.
fn says_something(parsed: &Parsed) -> bool {
    !parsed.resources.is_empty() || parsed.has_errors() || !parsed.ignored.is_empty()
}

#[test]
fn the_documents_that_are_changed_are_good_before() {
    for document in good() {
        let parsed = read(&document);
        let errors: Vec<_> = parsed.problems.iter().map(ToString::to_string).collect();
        assert_eq!(parsed.resources.len(), 1, "{document}: {errors:#?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_values_in_any_places_of_a_good_document_are_read_or_refused(
        which in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), leaf()), 1..4),
    ) {
        let documents = good();
        let mut document = which.get(&documents).clone();
        for (place, new) in changes {
            let mut at = place.index(size(&document));
            put(&mut document, &mut at, &new);
        }
        let parsed = read(&document);
        prop_assert!(says_something(&parsed) || document.is_null(), "{document}");
    }

    #[test]
    fn any_settings_of_the_mesh_are_read_or_refused(
        change in (any::<prop::sample::Index>(), leaf()),
    ) {
        let mut mesh = json!({"trustDomain": "a", "outboundTrafficPolicy": {"mode": "ALLOW_ANY"}, "connectTimeout": "1s",
            "localityLbSetting": {"failover": [{"from": "a", "to": "b"}]}, "defaultServiceExportTo": ["*"],
            "defaultTrafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 1}}, "outlierDetection": {}}});
        let mut at = change.0.index(size(&mesh));
        put(&mut mesh, &mut at, &change.1);
        let document = json!({"apiVersion": "v1", "kind": "ConfigMap",
            "metadata": {"name": "istio", "namespace": "istio-system"}, "data": {"mesh": mesh.to_string()}});
        prop_assert!(says_something(&read(&document)));
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[-a-z0-9:{}\\[\\]'\"&*!|> \\n#%@,.\\\\\\t]{0,200}", kind in select(Kind::ALL.to_vec())) {
        parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
        let head = Map::from_iter([
            ("apiVersion".to_owned(), Value::from(kind.api_versions()[0])),
            ("kind".to_owned(), Value::from(kind.as_str())),
        ]);
        let text = format!("{}\n---\napiVersion: {}\nkind: {kind}\nspec: {text}", Value::from(head), kind.api_versions()[0]);
        parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
    }
}
