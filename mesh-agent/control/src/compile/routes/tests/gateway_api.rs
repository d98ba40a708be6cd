//! Routes of the Gateway API (semantics.md §2.15, S35).

use std::time::Duration;

use super::{
    GATEWAY, action, aged, compile, document, http, line, over_the_link, routes, service, shown, stream,
    targets, vs,
};

const WEB: &str = "web.shop.svc.cluster.local";

fn route(name: &str, second: u8, spec: &str) -> String {
    aged(
        GATEWAY,
        "HTTPRoute",
        name,
        Some(second),
        &format!("parentRefs: [{{group: '', kind: Service, name: web, namespace: shop}}], {spec}"),
    )
}

fn to(name: &str) -> String {
    format!("backendRefs: [{{name: {name}, namespace: shop, port: 80}}]")
}

fn base() -> Vec<String> {
    vec![service("shop/web", &["http:80", "http-b:81"]), service("shop/v2", &["http:80"])]
}

fn with(more: &[String]) -> Vec<String> {
    [base(), more.to_vec()].concat()
}

#[test]
fn s57_a_route_of_an_entry_is_for_those_who_mean_that_entry_and_not_another_with_its_host() {
    const HOST: &str = "api.x.com";
    let entry = |namespace: &str, export: &str| {
        let spec = format!(
            "hosts: [{HOST}], resolution: DNS, exportTo: [{export}], ports: [{{name: http, number: 80, protocol: HTTP}}]"
        );
        document("networking.istio.io/v1", "ServiceEntry", &format!("{namespace}/ext"), &spec)
    };
    let route = |namespace: &str| {
        let parent = "parentRefs: [{group: networking.istio.io, kind: ServiceEntry, name: ext}]";
        let spec = format!("{parent}, rules: [{{backendRefs: [{{name: own, port: 80}}]}}]");
        aged(GATEWAY, "HTTPRoute", &format!("{namespace}/r"), Some(1), &spec)
    };
    let own = || ["a", "b", "c"].map(|namespace| service(&format!("{namespace}/own"), &["http:80"])).to_vec();
    let of = |documents: &[String], namespace: &str| {
        let all = routes(&[own(), documents.to_vec()].concat());
        http(&all, HOST, 80, namespace).map(|table| shown(Some(table)).concat())
    };
    let rule = |namespace: &str| Some(format!("r spec.rules[0].matches[0]: {namespace}/own:80=1"));

    let private = [entry("a", "'.'"), entry("b", "'.'")];
    let one = [&private[..], &[route("a")]].concat();
    assert_eq!((of(&one, "a"), of(&one, "b")), (rule("a"), None), "b means its own, which has no routes");
    let both = [&private[..], &[route("a"), route("b")]].concat();
    assert_eq!((of(&both, "a"), of(&both, "b")), (rule("a"), rule("b")));

    let shared = [entry("a", "'.', c"), entry("b", "'*'"), route("a"), route("b")];
    assert_eq!((of(&shared, "a"), of(&shared, "b")), (rule("a"), rule("b")));
    assert_eq!(
        (of(&shared, "c"), of(&shared, "x")),
        (rule("a"), rule("b")),
        "of several the first that is seen"
    );
}

#[test]
fn s113_a_route_is_for_every_port_of_its_service_or_for_the_one_it_names() {
    let documents = with(&[route("shop/r", 1, &format!("rules: [{{{}}}]", to("v2")))]);
    let all = routes(&documents);
    for port in [80, 81] {
        assert_eq!(shown(http(&all, WEB, port, "x")), ["r spec.rules[0].matches[0]: shop/v2:80=1"]);
    }
    for (limit, open) in [("port: 81", 81), ("sectionName: http", 80)] {
        let one = documents.last().unwrap().replace("name: web,", &format!("name: web, {limit},"));
        let some = routes(&with(&[one]));
        for port in [80, 81] {
            assert_eq!(http(&some, WEB, port, "x").is_some(), port == open, "{limit}: {port}");
        }
    }
    let entry = document(
        "networking.istio.io/v1",
        "ServiceEntry",
        "shop/web",
        "hosts: [api.x.com, www.x.com], resolution: DNS, ports: [{name: http, number: 80, protocol: HTTP}, {name: alt, number: 81, protocol: HTTP}]",
    );
    let attached = documents
        .last()
        .unwrap()
        .replace("group: '', kind: Service,", "group: networking.istio.io, kind: ServiceEntry, port: 80,");
    let of_entry = routes(&with(&[entry, attached]));
    for host in ["api.x.com", "www.x.com"] {
        let rules = shown(http(&of_entry, host, 80, "x"));
        assert_eq!(rules, ["r spec.rules[0].matches[0]: shop/v2:80=1"], "{host}");
        assert_eq!(http(&of_entry, host, 81, "x"), None);
    }
    assert_eq!(http(&of_entry, WEB, 80, "x"), None, "the Service of that name is another");
    let other = documents
        .last()
        .unwrap()
        .replace("kind: Service", "kind: Gateway")
        .replace("''", GATEWAY.split('/').next().unwrap());
    assert!(routes(&with(&[other])).is_empty());
}

#[test]
fn s114_a_clients_own_routes_replace_those_of_the_service_for_it_alone() {
    let found = routes(&with(&[
        route("shop/producer", 1, &format!("rules: [{{{}}}]", to("web"))),
        route(
            "team/consumer",
            2,
            &format!("rules: [{{matches: [{{path: {{value: /only}}}}], {}}}]", to("v2")),
        ),
    ]));
    for client in ["shop", "x"] {
        assert_eq!(
            shown(http(&found, WEB, 80, client)),
            ["producer spec.rules[0].matches[0]: shop/web:80=1"]
        );
    }
    let own = http(&found, WEB, 80, "team").unwrap();
    assert_eq!(line(&own.rules[0]), "consumer spec.rules[0].matches[0]: shop/v2:80=1");
    assert_eq!((own.rules.len(), action(&own.unmatched).as_str()), (1, "answer 404 no_route"), "S115");
}

#[test]
fn s114_a_consumer_route_alone_leaves_everybody_else_without_a_table() {
    let found = routes(&with(&[route("team/consumer", 2, &format!("rules: [{{{}}}]", to("v2")))]));
    assert!(http(&found, WEB, 80, "team").is_some());
    assert_eq!(http(&found, WEB, 80, "shop"), None);
}

#[test]
fn s6_matches_are_tried_by_path_then_method_then_headers_then_query_then_age() {
    let rule = |matches: &str| format!("{{matches: [{matches}], {}}}", to("v2"));
    let path = |kind: &str, value: &str| format!("path: {{type: {kind}, value: {value}}}");
    let header = "headers: [{name: a, value: b}]";
    let young = [
        rule("{}"),
        rule(&format!("{{{}}}", path("RegularExpression", "/ab.*"))),
        rule(&format!("{{{}}}, {{{}}}", path("PathPrefix", "/a"), path("Exact", "/ab"))),
        rule(&format!("{{{}, queryParams: [{{name: q, value: r}}]}}", path("PathPrefix", "/a"))),
        rule(&format!("{{{}, {header}}}", path("PathPrefix", "/a"))),
        rule(&format!("{{{}, method: GET}}", path("PathPrefix", "/a"))),
        rule(&format!("{{{}}}", path("PathPrefix", "/a/bc"))),
    ];
    let old = [rule(&format!("{{{}}}", path("PathPrefix", "/a")))];
    let found = routes(&with(&[
        route("shop/a-young", 9, &format!("rules: [{}]", young.join(", "))),
        route("shop/z-old", 1, &format!("rules: [{}]", old.join(", "))),
    ]));
    let table = http(&found, WEB, 80, "x").unwrap();
    let order: Vec<String> = table.rules.iter().map(|r| r.origin.field.replace("spec.rules", "")).collect();
    assert_eq!(
        order,
        [
            "[2].matches[1]",
            "[6].matches[0]",
            "[5].matches[0]",
            "[4].matches[0]",
            "[3].matches[0]",
            // Of equals the older route's.
            "[0].matches[0]",
            "[2].matches[0]",
            "[1].matches[0]",
            "[0].matches[0]",
        ]
    );
    assert_eq!(&*table.rules[5].origin.name.name, "z-old");
    assert_eq!(&*table.rules[8].origin.name.name, "a-young");
}

#[test]
fn s6_of_routes_of_one_age_those_count_first_that_come_first_by_name() {
    let aged_route = |name: &str, status: &str| route(name, 5, &format!("rules: [{{{status}}}]"));
    let found = routes(&with(&[
        aged_route("shop/b", &to("v2")),
        aged_route("shop/a", &to("web")),
        aged_route("shop/c", &to("gone")),
    ]));
    let order: Vec<String> =
        http(&found, WEB, 80, "x").unwrap().rules.iter().map(|rule| rule.origin.name.to_string()).collect();
    assert_eq!(order, ["shop/a", "shop/b", "shop/c"]);
}

#[test]
fn s115_s116_what_is_wrong_with_a_backend_is_its_share_and_what_is_wrong_with_a_rule_is_500() {
    let table = [
        (
            "backendRefs: [{name: v2, port: 80, weight: 3}, {name: gone, port: 80}]",
            "shop/v2:80=3 500 BackendNotFound=1",
        ),
        ("backendRefs: [{name: v2, port: 99}]", "500 BackendNotFound=1"),
        ("backendRefs: [{name: v2, port: 80, weight: 0}]", "answer 500 no_backend"),
        ("name: nothing", "answer 500 no_backend"),
        ("backendRefs: [{group: other.io, kind: Thing, name: x, port: 80}]", "500 InvalidKind=1"),
        ("backendRefs: [{name: far, namespace: other, port: 80}]", "500 RefNotPermitted=1"),
        ("backendRefs: [{name: let, namespace: other, port: 80}]", "other/let:80=1"),
        ("filters: [{type: RequestRedirect, requestRedirect: {scheme: https}}]", "redirect 302"),
    ];
    for (rule, wanted) in table {
        let found = routes(&with(&[
            service("other/far", &["http:80"]),
            service("other/let", &["http:80"]),
            document(
                "gateway.networking.k8s.io/v1beta1",
                "ReferenceGrant",
                "other/g",
                "from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: shop}], to: [{group: '', kind: Service, name: let}]",
            ),
            route("shop/r", 1, &format!("rules: [{{{rule}}}]")),
        ]));
        assert_eq!(action(&http(&found, WEB, 80, "x").unwrap().rules[0].action), wanted, "{rule}");
    }
}

#[test]
fn s116_a_consumer_needs_no_grant_for_the_namespace_of_the_service_it_is_attached_to() {
    let found = routes(&with(&[
        service("other/far", &["http:80"]),
        route("team/r", 1, &format!("rules: [{{{}}}]", to("v2"))),
        route("team/s", 2, "rules: [{backendRefs: [{name: far, namespace: other, port: 80}]}]"),
    ]));
    let rules = shown(http(&found, WEB, 80, "team"));
    assert_eq!(
        rules,
        ["r spec.rules[0].matches[0]: shop/v2:80=1", "s spec.rules[0].matches[0]: 500 RefNotPermitted=1"]
    );
}

#[test]
fn s117_where_a_route_is_attached_a_virtual_service_has_no_effect_and_is_told() {
    let both = with(&[
        route("shop/r", 9, &format!("rules: [{{{}}}]", to("v2")))
            .replace("name: web,", "name: web, port: 80,"),
        vs("shop/v", "hosts: [web], http: [{directResponse: {status: 299}}]"),
    ]);
    let compiled = compile(&both);
    let found = compiled.snapshot.routes();
    assert_eq!(shown(http(found, WEB, 80, "x")), ["r spec.rules[0].matches[0]: shop/v2:80=1"]);
    assert_eq!(shown(http(found, WEB, 81, "x")), ["v spec.http[0]: answer 299 direct_response"]);
    let said: Vec<String> = compiled.problems.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("HTTPRoute shop/r is attached"), "{said:?}");
    assert!(over_the_link(&compiled.snapshot).same_world(&compiled.snapshot));
}

#[test]
fn s35_timeouts_and_retries_are_mapped_as_istio_does() {
    let table = [
        ("", None, Some((2, None))),
        ("timeouts: {request: 5s}, ", Some(5), Some((2, None))),
        ("timeouts: {request: 0s}, ", None, Some((2, None))),
        ("timeouts: {request: 5s, backendRequest: 2s}, ", Some(2), Some((2, None))),
        ("timeouts: {request: 5s, backendRequest: 2s}, retry: {}, ", Some(5), Some((2, Some(2)))),
        ("timeouts: {backendRequest: 2s}, retry: {attempts: 4, codes: [503]}, ", None, Some((4, Some(2)))),
        ("retry: {attempts: 0}, ", None, None),
        ("timeouts: {request: 5s, backendRequest: 2s}, retry: {attempts: 0, codes: [503]}, ", Some(2), None),
    ];
    for (rule, timeout, retries) in table {
        let found = routes(&with(&[route("shop/r", 1, &format!("rules: [{{{rule}{}}}]", to("v2")))]));
        let rule_made = http(&found, WEB, 80, "x").unwrap().rules[0].clone();
        assert_eq!(rule_made.timeout, timeout.map(Duration::from_secs), "{rule}");
        let policy = rule_made
            .retries
            .as_ref()
            .map(|policy| (policy.attempts, policy.per_try_timeout.map(|limit| limit.as_secs())));
        assert_eq!(policy, retries, "{rule}");
        // What takes longer than a try may is tried again, if it is written how.
        let repeats_slow = rule_made.retries.is_some_and(|policy| policy.on.try_timeout);
        assert_eq!(repeats_slow, retries.is_some_and(|(_, limit)| limit.is_some()), "{rule}");
    }
}

#[test]
fn s35_where_retry_is_written_lost_connections_are_made_good_and_no_try_begins_before_its_back_off() {
    let policy = |rule: &str| {
        let found = routes(&with(&[route("shop/r", 1, &format!("rules: [{{{rule}{}}}]", to("v2")))]));
        http(&found, WEB, 80, "x").unwrap().rules[0].retries.clone().unwrap()
    };
    let millis = Duration::from_millis;
    for (rule, reset, least, most) in [
        ("", false, millis(0), millis(25)),
        ("retry: {codes: [503]}, ", true, millis(0), millis(25)),
        ("retry: {backoff: 100ms}, ", true, millis(100), millis(125)),
        ("retry: {backoff: 8s}, ", true, millis(8_000), millis(10_000)),
    ] {
        let policy = policy(rule);
        assert_eq!(policy.on.reset, reset, "{rule}");
        assert_eq!(policy.backoff_before(1, 0), least, "{rule}");
        assert_eq!(policy.backoff_before(1, u64::MAX) + Duration::from_nanos(1), most, "{rule}");
    }
}

#[test]
fn grpc_routes_and_http_routes_of_one_service_are_one_table() {
    let grpc = "parentRefs: [{group: '', kind: Service, name: web}], rules: [{matches: [{method: {service: a.B, method: C}}], backendRefs: [{name: v2, port: 80}]}, {matches: [{method: {service: x.Y}}], backendRefs: [{name: gone, port: 80}]}]";
    let found = routes(&with(&[
        route("shop/h", 1, &format!("rules: [{{{}}}]", to("web"))),
        aged(GATEWAY, "GRPCRoute", "shop/g", Some(2), grpc),
    ]));
    assert_eq!(
        shown(http(&found, WEB, 80, "x")),
        [
            "g spec.rules[0].matches[0]: shop/v2:80=1",
            "g spec.rules[1].matches[0]: 503 BackendNotFound=1",
            "h spec.rules[0].matches[0]: shop/web:80=1",
        ]
    );
}

#[test]
fn s6_tls_and_tcp_routes_are_tables_of_connections() {
    let alpha = "gateway.networking.k8s.io/v1alpha2";
    let parent = "parentRefs: [{group: '', kind: Service, name: db}]";
    let rules = |backend: &str| format!("rules: [{{backendRefs: [{{name: {backend}, port: 80}}]}}]");
    let found = routes(&with(&[
        service("shop/db", &["tcp:5432"]),
        aged(alpha, "TCPRoute", "shop/young", Some(2), &format!("{parent}, {}", rules("web"))),
        aged(alpha, "TCPRoute", "shop/old", Some(1), &format!("{parent}, {}", rules("v2"))),
        aged(
            alpha,
            "TLSRoute",
            "shop/wild",
            Some(1),
            &format!("{parent}, hostnames: ['*.example.com'], {}", rules("web")),
        ),
        aged(
            alpha,
            "TLSRoute",
            "shop/exact",
            Some(2),
            &format!("{parent}, hostnames: [a.example.com], {}", rules("gone")),
        ),
    ]));
    let table = stream(&found, "db.shop.svc.cluster.local", 5432, "x").unwrap();
    assert_eq!((table.tcp.len(), targets(&table.tcp[0].backends).as_str()), (1, "shop/v2:80=1"));
    let names: Vec<&str> = table.tls.iter().map(|rule| &*rule.matches[0].sni[0]).collect();
    assert_eq!(names, ["a.example.com", "*.example.com"]);
    assert_eq!(targets(&table.tls[0].backends), "500 BackendNotFound=1");
}
