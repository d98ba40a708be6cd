//! Tables of what users write in routes of the Gateway API, right and wrong.

use std::time::Duration;

use mesh_core::route::{
    http::{Millionths, PathRewrite, RedirectPort},
    matching::{PathMatch, StringMatch},
};

use super::*;
use crate::{
    problem::Level,
    resource::Resource,
    source::document::{Known, Parsed, Rules, parse},
};

fn parsed(text: &str) -> Parsed {
    parse("a.yaml".as_ref(), text, &Rules::default(), &Known::new())
}

fn said(parsed: &Parsed) -> Vec<String> {
    let level = |level| if level == Level::Error { "E" } else { "W" };
    parsed.problems.iter().map(|p| format!("{} {}", level(p.level), p.field)).collect()
}

fn document(kind: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: gateway.networking.k8s.io/v1, kind: {kind}, metadata: {{name: r, namespace: shop}}, spec: {{{spec}}}}}"
    )
}

const PARENT: &str = "parentRefs: [{group: '', kind: Service, name: web}]";
const BACKEND: &str = "backendRefs: [{name: web, port: 80}]";

fn http_spec(spec: &str) -> Parsed {
    parsed(&document("HTTPRoute", spec))
}

/// One rule of an HTTPRoute.
fn rule(rule: &str) -> Parsed {
    http_spec(&format!("{PARENT}, rules: [{{{rule}}}]"))
}

fn http_route_of(parsed: &Parsed) -> &HttpRoute {
    let [(_, resource)] = &parsed.resources[..] else { panic!("{:?}", parsed.problems) };
    let Resource::HttpRoute(route) = &**resource else { panic!("{resource:?}") };
    route
}

fn the_rule(text: &str) -> HttpRouteRule {
    let parsed = rule(text);
    assert_eq!(said(&parsed), Vec::<String>::new(), "{text}: {:?}", parsed.problems);
    http_route_of(&parsed).rules[0].clone()
}

/// Each rule has exactly these problems.
fn table(rows: &[(&str, &[&str])]) {
    for (text, wanted) in rows {
        let parsed = rule(text);
        let wanted: Vec<String> = wanted.iter().map(|w| w.replacen(' ', " spec.rules[0].", 1)).collect();
        assert_eq!(said(&parsed), wanted, "{text}: {:?}", parsed.problems);
        let good = !wanted.iter().any(|w| w.starts_with('E'));
        assert_eq!(parsed.resources.len(), usize::from(good), "{text}");
    }
}

#[test]
fn a_mesh_route_is_read_as_it_is_written() {
    let parsed = http_spec(
        "parentRefs: [{group: '', kind: Service, name: web, port: 80}, {group: '', kind: Service, name: web, port: 81},
         {group: networking.istio.io, kind: ServiceEntry, name: ext, namespace: egress}],
         rules: [{name: first, matches: [{path: {value: /a/}, method: GET, headers: [{name: X-User, value: ann}],
         queryParams: [{name: Q, value: 'a.*', type: RegularExpression}]}, {path: {type: Exact, value: /b}}],
         backendRefs: [{name: v1, port: 80, weight: 90}, {name: v2, namespace: other, port: 8080, weight: 0}],
         timeouts: {request: 1m30s, backendRequest: 500ms}, retry: {attempts: 3, codes: [503, 503, 429], backoff: 25ms}}]",
    );
    assert_eq!(parsed.problems, []);
    let route = http_route_of(&parsed);
    let parent = &route.parents[2];
    assert_eq!((&parent.kind, &*parent.name.namespace), (&ParentKind::ServiceEntry, "egress"));
    assert_eq!((route.parents[1].port, &*route.parents[1].name.namespace), (Some(81), "shop"));
    let rule = &route.rules[0];
    assert_eq!(rule.name.as_deref(), Some("first"));
    assert_eq!(rule.matches[0].path, Some(PathMatch::Segments("/a".into())), "without the slash at its end");
    assert_eq!(rule.matches[0].method, Some(StringMatch::Exact("GET".into())));
    assert_eq!(&*rule.matches[0].headers[0].name, "x-user");
    assert_eq!(&*rule.matches[0].query[0].name, "Q", "the case of a parameter counts");
    let weights: Vec<_> = rule.backends.iter().map(|b| (b.weight, b.backend.name.to_string())).collect();
    assert_eq!(weights, [(90, "shop/v1".to_owned()), (0, "other/v2".to_owned())]);
    assert_eq!(rule.timeout, Some(Duration::from_secs(90)));
    assert_eq!(rule.backend_timeout, Some(Duration::from_millis(500)));
    let retry = rule.retry.as_ref().unwrap();
    assert_eq!(
        (retry.attempts, &retry.codes[..], retry.backoff),
        (Some(3), &[503, 429][..], Some(Duration::from_millis(25)))
    );
}

#[test]
fn without_rules_or_matches_every_path_is_meant() {
    let parsed = http_spec(PARENT);
    let [only] = &http_route_of(&parsed).rules[..] else { panic!() };
    assert_eq!(only.matches[0].path, Some(PathMatch::Segments("".into())));
    assert!(only.backends.is_empty());
    assert_eq!(said(&parsed), ["W spec.rules[0].backendRefs"]);
    assert_eq!(the_rule(BACKEND).matches[0].path, Some(PathMatch::Segments("".into())));
    assert_eq!(the_rule(BACKEND).backends[0].weight, 1);
}

#[test]
fn paths_are_absolute_and_normalised() {
    let path = |kind: &str, value: &str| {
        let parsed = rule(&format!("matches: [{{path: {{type: {kind}, value: '{value}'}}}}], {BACKEND}"));
        let messages: Vec<String> = parsed.problems.iter().map(|p| p.message.clone()).collect();
        (said(&parsed), messages.join("; "))
    };
    for good in ["/", "/a", "/a/", "/a.b/..c", "/%20", "/a;b=c:d@e,f!$&()*+~"] {
        for kind in ["Exact", "PathPrefix"] {
            assert_eq!(path(kind, good).0, Vec::<String>::new(), "{good}");
        }
    }
    for bad in [
        "a", "", "//", "/a//b", "/./a", "/a/../b", "/a/..", "/a/.", "/a%2fb", "/a%2Fb", "/a#b", "/a b",
        "/%zz", "/%2", "/ä", "/a?b",
    ] {
        for kind in ["Exact", "PathPrefix"] {
            let (said, message) = path(kind, bad);
            assert_eq!(said, ["E spec.rules[0].matches[0].path.value"], "{kind} {bad}");
            assert!(message.contains("wanted"), "{message}");
        }
    }
    assert_eq!(path("RegularExpression", "/a/.*|b").0, Vec::<String>::new(), "a pattern is no path");
    let (said, message) = path("RegularExpression", "a(");
    assert_eq!(said, ["E spec.rules[0].matches[0].path.value"]);
    assert!(message.contains("unclosed group"), "{message}");
    assert_eq!(path("Exact", &format!("/{}", "a".repeat(1024))).0, ["E spec.rules[0].matches[0].path.value"]);
    assert_eq!(path("Prefix", "/").0, ["E spec.rules[0].matches[0].path.type"]);
}

#[test]
fn conditions_are_checked_one_by_one() {
    let long = "a".repeat(257);
    let rows: Vec<(String, &[&str])> = vec![
        ("matches: [{method: get}]".into(), &["E matches[0].method"]),
        ("matches: [{headers: [{name: 'a b', value: x}]}]".into(), &["E matches[0].headers[0].name"]),
        ("matches: [{headers: [{name: a}]}]".into(), &["E matches[0].headers[0].value"]),
        ("matches: [{headers: [{value: x}]}]".into(), &["E matches[0].headers[0].name"]),
        (format!("matches: [{{headers: [{{name: {long}, value: x}}]}}]"), &["E matches[0].headers[0].name"]),
        (
            "matches: [{headers: [{name: a, value: x, type: Prefix}]}]".into(),
            &["E matches[0].headers[0].type"],
        ),
        (
            "matches: [{headers: [{name: a, value: '(', type: RegularExpression}]}]".into(),
            &["E matches[0].headers[0].value"],
        ),
        (
            "matches: [{headers: [{name: a, value: x}, {name: a, value: z}]}]".into(),
            &["E matches[0].headers[1].name"],
        ),
        // Names of one header in different letters: the first counts.
        (
            "matches: [{headers: [{name: a, value: x}, {name: A, value: z}]}]".into(),
            &["W matches[0].headers[1].name"],
        ),
        ("matches: [{queryParams: [{name: a, value: x}, {name: A, value: z}]}]".into(), &[]),
        (
            "matches: [{queryParams: [{name: a, value: x}, {name: a, value: z}]}]".into(),
            &["E matches[0].queryParams[1].name"],
        ),
    ];
    for (text, wanted) in rows {
        table(&[(&format!("{text}, {BACKEND}"), wanted)]);
    }
}

#[test]
fn lists_are_bounded_as_in_the_api() {
    let times = |one: &str, count: usize| vec![one; count].join(", ");
    let rules = |count| format!("{PARENT}, rules: [{}]", times(&format!("{{{BACKEND}}}"), count));
    assert_eq!(said(&http_spec(&rules(16))), Vec::<String>::new());
    assert_eq!(said(&http_spec(&rules(17))), ["E spec.rules"]);
    assert_eq!(said(&http_spec(&format!("{PARENT}, rules: []"))), ["E spec.rules"]);
    let matches = |count| format!("matches: [{}], {BACKEND}", times("{method: GET}", count));
    table(&[(&matches(64), &[]), (&matches(65), &["E matches"])]);
    let many = format!("{PARENT}, rules: [{}]", times(&format!("{{{}}}", matches(64)), 3));
    assert_eq!(said(&http_spec(&many)), ["E spec.rules"], "192 together");
    let backends = |count| format!("backendRefs: [{}]", times("{name: web, port: 80}", count));
    table(&[(&backends(16), &[]), (&backends(17), &["E backendRefs"])]);
    let hostnames = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("h{n}.example.com")).collect();
        said(&http_spec(&format!("parentRefs: [{{name: gw}}], hostnames: [{}]", names.join(", "))))
    };
    assert!(!hostnames(16).contains(&"E spec.hostnames".to_owned()));
    assert!(hostnames(17).contains(&"E spec.hostnames".to_owned()));
    let parents: Vec<String> = (0..33).map(|n| format!("{{group: '', kind: Service, name: s{n}}}")).collect();
    let parsed = http_spec(&format!("parentRefs: [{}], rules: [{{{BACKEND}}}]", parents.join(", ")));
    assert_eq!(said(&parsed), ["E spec.parentRefs"]);
}

#[test]
fn backends_name_a_port_and_a_weight_in_range() {
    table(&[
        ("backendRefs: [{name: web}]", &["E backendRefs[0].port"]),
        ("backendRefs: [{name: web, port: 65536}]", &["E backendRefs[0].port"]),
        ("backendRefs: [{port: 80}]", &["E backendRefs[0].name"]),
        ("backendRefs: [{name: Web, port: 80}]", &["E backendRefs[0].name"]),
        ("backendRefs: [{name: web, port: 80, namespace: A}]", &["E backendRefs[0].namespace"]),
        ("backendRefs: [{name: web, port: 80, weight: -1}]", &["E backendRefs[0].weight"]),
        ("backendRefs: [{name: web, port: 80, weight: 1000000}]", &[]),
        ("backendRefs: [{name: web, port: 80, weight: 1000001}]", &["E backendRefs[0].weight"]),
        ("backendRefs: [{name: web, port: 80, weight: 0}]", &["W backendRefs"]),
        ("backendRefs: [{name: web, port: 80, weight: 0}, {name: web, port: 80}]", &[]),
        ("backendRefs: [{group: networking.istio.io, kind: Hostname, name: example.com, port: 443}]", &[]),
        ("backendRefs: [{group: networking.istio.io, kind: Hostname, name: example.com}]", &[]),
        ("backendRefs: [{group: example.com, kind: Bucket, name: b}]", &["W backendRefs[0].kind"]),
        ("backendRefs: [{kind: '', name: web, port: 80}]", &["E backendRefs[0].kind"]),
        ("backendRefs: []", &["W backendRefs"]),
        ("backendRefs: [{name: web, port: 80, wieght: 1}]", &["W backendRefs[0].wieght"]),
    ]);
    let broken = rule("backendRefs: [{group: example.com, kind: Bucket, name: b}]");
    let backend = &http_route_of(&broken).rules[0].backends[0].backend;
    assert_eq!(backend.kind, BackendKind::Other("example.com/Bucket".into()));
    assert_eq!(backend.group_kind(), ("example.com", "Bucket"));
}

#[test]
fn parents_are_services_in_their_own_group() {
    let with = |refs: &str| said(&http_spec(&format!("parentRefs: [{refs}], rules: [{{{BACKEND}}}]")));
    assert_eq!(with("{group: '', kind: Service, name: web}"), Vec::<String>::new());
    assert_eq!(
        with("{kind: Service, name: web}"),
        ["E spec.parentRefs[0].group"],
        "the default group is another"
    );
    assert_eq!(with("{name: gw}"), ["W spec.parentRefs[0]"]);
    assert_eq!(with("{group: x.io, kind: Thing, name: gw}"), ["W spec.parentRefs[0]"]);
    assert_eq!(with("{group: '', kind: Service}"), ["E spec.parentRefs[0].name"]);
    assert_eq!(with("{group: '', kind: Service, name: web, port: 0}"), ["E spec.parentRefs[0].port"]);
    let web = "{group: '', kind: Service, name: web";
    assert_eq!(with(&format!("{web}}}, {web}}}")), ["E spec.parentRefs[1]"]);
    assert_eq!(
        with(&format!("{web}, port: 80}}, {web}}}")),
        ["E spec.parentRefs[1]"],
        "one is wider than the other"
    );
    assert_eq!(with(&format!("{web}, port: 80}}, {web}, port: 80}}")), ["E spec.parentRefs[1]"]);
    assert_eq!(with(&format!("{web}, port: 80}}, {web}, namespace: b}}")), Vec::<String>::new());
    assert_eq!(with(""), ["W spec.parentRefs"]);
}

#[test]
fn host_names_are_names_and_have_no_effect_in_the_mesh() {
    let with = |parent: &str, names: &str| {
        said(&http_spec(&format!("parentRefs: [{parent}], hostnames: [{names}], rules: [{{{BACKEND}}}]")))
    };
    assert_eq!(with("{group: '', kind: Service, name: web}", "a.example.com"), ["W spec.hostnames"]);
    for bad in ["'*'", "A.example.com", "10.0.0.1", "a.*.com", "'*.'", "'a:80'", "'fd00::1'", "''"] {
        let said = with("{name: gw}", bad);
        assert_eq!(said, ["W spec.parentRefs[0]", "E spec.hostnames[0]"], "{bad}");
    }
    assert_eq!(with("{name: gw}", "'*.example.com', a"), ["W spec.parentRefs[0]"]);
}

#[test]
fn names_of_rules_are_unique() {
    let with = |names: &[&str]| {
        let rules: Vec<String> = names.iter().map(|name| format!("{{name: {name}, {BACKEND}}}")).collect();
        said(&http_spec(&format!("{PARENT}, rules: [{}]", rules.join(", "))))
    };
    assert_eq!(with(&["a", "b"]), Vec::<String>::new());
    assert_eq!(with(&["a", "b", "a"]), ["E spec.rules[2].name"]);
    assert_eq!(with(&["A"]), ["E spec.rules[0].name"]);
}

#[test]
fn filters_exclude_each_other_as_the_api_says() {
    let set = "{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}]}}";
    let redirect = "{type: RequestRedirect, requestRedirect: {scheme: https}}";
    let rewrite = "{type: URLRewrite, urlRewrite: {hostname: a.example.com}}";
    let mirror = "{type: RequestMirror, requestMirror: {backendRef: {name: m, port: 80}}}";
    table(&[
        (&format!("filters: [{set}, {rewrite}, {mirror}, {mirror}], {BACKEND}"), &[]),
        (&format!("filters: [{redirect}]"), &[]),
        (&format!("filters: [{redirect}], {BACKEND}"), &["E backendRefs"]),
        (&format!("filters: [{redirect}, {rewrite}]"), &["E filters"]),
        (&format!("filters: [{set}, {set}], {BACKEND}"), &["E filters[1].type"]),
        (&format!("filters: [{redirect}, {redirect}]"), &["E filters[1].type"]),
        (&format!("filters: [{rewrite}, {rewrite}], {BACKEND}"), &["E filters[1].type"]),
        (&format!("filters: [{{type: Nothing}}], {BACKEND}"), &["E filters[0].type"]),
        (&format!("filters: [{{}}], {BACKEND}"), &["E filters[0].type"]),
        (&format!("filters: [{{type: URLRewrite}}], {BACKEND}"), &["E filters[0].urlRewrite"]),
        (
            &format!("filters: [{{type: URLRewrite, urlRewrite: {{hostname: a}}, cors: {{}}}}], {BACKEND}"),
            &["E filters[0].cors"],
        ),
        (
            &format!(
                "filters: [{{type: ExtensionRef, extensionRef: {{group: x, kind: Limit, name: z}}}}], {BACKEND}"
            ),
            &["W filters[0].type"],
        ),
    ]);
    let extension = rule("filters: [{type: ExtensionRef, extensionRef: {group: x, kind: Limit, name: z}}]");
    let unsupported = |kind: &str, extension: Option<&str>| {
        Some(UnsupportedFilter { kind: kind.into(), extension: extension.map(Into::into) })
    };
    assert_eq!(http_route_of(&extension).rules[0].unsupported, unsupported("ExtensionRef", Some("x/Limit")));
    let both = rule(
        "filters: [{type: ExternalAuth, externalAuth: {}}, {type: ExtensionRef, extensionRef: {group: x, kind: Limit, name: z}}]",
    );
    assert_eq!(http_route_of(&both).rules[0].unsupported, unsupported("ExternalAuth", Some("x/Limit")));
}

#[test]
fn backends_have_filters_for_headers_and_others_are_answered_with_500() {
    let with = |filter: &str| format!("backendRefs: [{{name: web, port: 80, filters: [{filter}]}}]");
    let set = "{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: X-A, value: b}]}}";
    let read = the_rule(&with(set));
    assert_eq!(read.backends[0].response_headers.add, [("x-a".into(), "b".into())]);
    let text = with("{type: URLRewrite, urlRewrite: {hostname: a.example.com}}");
    table(&[(&text, &["W backendRefs[0].filters[0].type"])]);
    let read = http_route_of(&rule(&text)).rules[0].backends[0].unsupported.clone();
    assert_eq!(read, Some(UnsupportedFilter { kind: "URLRewrite".into(), extension: None }));
}

#[test]
fn headers_are_set_added_and_removed_once_each() {
    let with = |ops: &str| {
        format!("filters: [{{type: RequestHeaderModifier, requestHeaderModifier: {{{ops}}}}}], {BACKEND}")
    };
    let ops = the_rule(&with(
        "set: [{name: X-B, value: '1'}, {name: X-A, value: '2'}, {name: Host, value: v2.example.com}], add: [{name: c, value: d}], remove: [X-Old, x-old]",
    ))
    .request_headers;
    assert_eq!(ops.set, [("x-a".into(), "2".into()), ("x-b".into(), "1".into())]);
    assert_eq!(ops.authority.as_deref(), Some("v2.example.com"));
    assert_eq!((ops.add.len(), &ops.remove[..]), (1, &["x-old".into()][..]));
    let at = |field: &str| format!("filters[0].requestHeaderModifier.{field}");
    for (text, wanted) in [
        ("set: [{name: a, value: b}, {name: a, value: c}]", format!("E {}", at("set[1].name"))),
        ("set: [{name: a, value: b}, {name: A, value: c}]", format!("W {}", at("set[1].name"))),
        ("set: [{name: ':path', value: b}]", format!("E {}", at("set[0].name"))),
        ("add: [{name: a}]", format!("E {}", at("add[0].value"))),
        ("add: [{name: a, value: \"x\\r\\ny: z\"}]", format!("E {}", at("add[0].value"))),
        ("remove: ['']", format!("E {}", at("remove[0]"))),
        ("remove: [host]", format!("W {}", at("remove[0]"))),
    ] {
        table(&[(&with(text), &[&wanted])]);
    }
}

#[test]
fn a_prefix_is_replaced_only_where_exactly_one_is_matched() {
    let with = |matches: &str, filter: &str, field: &str| {
        format!(
            "{matches}filters: [{{type: {filter}, {field}: {{path: {{type: ReplacePrefixMatch, replacePrefixMatch: /new}}}}}}]"
        )
    };
    let prefix = "matches: [{path: {type: PathPrefix, value: /old}}], ";
    for (filter, field, tail) in [
        ("URLRewrite", "urlRewrite", ", backendRefs: [{name: web, port: 80}]"),
        ("RequestRedirect", "requestRedirect", ""),
    ] {
        let good = the_rule(&(with(prefix, filter, field) + tail));
        let path = good.rewrite.path.or(good.redirect.and_then(|redirect| redirect.path));
        assert_eq!(path, Some(PathRewrite::MatchedPrefix("/new".into())));
        for matches in [
            "matches: [{path: {type: Exact, value: /old}}], ",
            "matches: [{path: {value: /old}}, {path: {value: /older}}], ",
        ] {
            let text = with(matches, filter, field) + tail;
            table(&[(&text, &[&format!("E filters[0].{field}.path.replacePrefixMatch")])]);
        }
    }
    let path =
        |path: &str| format!("filters: [{{type: URLRewrite, urlRewrite: {{path: {{{path}}}}}}}], {BACKEND}");
    assert_eq!(
        the_rule(&path("type: ReplaceFullPath, replaceFullPath: /x")).rewrite.path,
        Some(PathRewrite::Full("/x".into()))
    );
    table(&[
        (&path("type: ReplaceFullPath"), &["E filters[0].urlRewrite.path.replaceFullPath"]),
        (&path("type: Replace, replaceFullPath: /x"), &["E filters[0].urlRewrite.path.type"]),
        (
            &path("type: ReplaceFullPath, replaceFullPath: /x, replacePrefixMatch: /y"),
            &["E filters[0].urlRewrite.path.replacePrefixMatch"],
        ),
        (
            &path("type: ReplaceFullPath, replaceFullPath: '/x?y'"),
            &["E filters[0].urlRewrite.path.replaceFullPath"],
        ),
    ]);
}

#[test]
fn redirects_have_the_apis_defaults() {
    let with =
        |redirect: &str| format!("filters: [{{type: RequestRedirect, requestRedirect: {{{redirect}}}}}]");
    let read = |redirect: &str| the_rule(&with(redirect)).redirect.unwrap();
    let plain = read("hostname: a.example.com");
    assert_eq!(
        (plain.status, plain.port, plain.authority.as_deref()),
        (302, RedirectPort::OfRequest, Some("a.example.com"))
    );
    assert_eq!(read("scheme: https").port, RedirectPort::OfScheme);
    assert_eq!((read("port: 8443").port, read("statusCode: 308").status), (RedirectPort::Number(8443), 308));
    let at = |field: &str| format!("E filters[0].requestRedirect.{field}");
    for (text, field) in [
        ("statusCode: 304", "statusCode"),
        ("scheme: ftp", "scheme"),
        ("port: 0", "port"),
        ("hostname: '*.example.com'", "hostname"),
        ("hostname: 10.0.0.1", "hostname"),
    ] {
        table(&[(&with(text), &[&at(field)])]);
    }
}

#[test]
fn mirrors_take_a_share_in_one_of_two_forms() {
    let with = |share: &str| {
        format!(
            "filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: m, port: 80}}{share}}}}}], {BACKEND}"
        )
    };
    let share = |text: &str| the_rule(&with(text)).mirrors[0].share;
    assert_eq!(share(""), Millionths::ALL);
    assert_eq!((share(", percent: 0"), share(", percent: 5")), (Millionths(0), Millionths(50_000)));
    assert_eq!(share(", fraction: {numerator: 1}"), Millionths(10_000));
    assert_eq!(share(", fraction: {numerator: 1, denominator: 3}"), Millionths(333_333));
    let at = |field: &str| format!("E filters[0].requestMirror.{field}");
    for (text, field) in [
        (", percent: 101", "percent"),
        (", percent: 1, fraction: {numerator: 1}", "fraction"),
        (", fraction: {numerator: 2, denominator: 1}", "fraction.numerator"),
        (", fraction: {numerator: 1, denominator: 0}", "fraction.denominator"),
        (", fraction: {denominator: 1}", "fraction.numerator"),
    ] {
        table(&[(&with(text), &[&at(field)])]);
    }
    table(&[(
        &format!("filters: [{{type: RequestMirror, requestMirror: {{}}}}], {BACKEND}"),
        &["E filters[0].requestMirror.backendRef"],
    )]);
}

#[test]
fn timeouts_are_ordered_and_zero_is_none() {
    let with = |timeouts: &str| format!("timeouts: {{{timeouts}}}, {BACKEND}");
    let read = |timeouts: &str| {
        let rule = the_rule(&with(timeouts));
        (rule.timeout, rule.backend_timeout)
    };
    assert_eq!(read("request: 0s, backendRequest: 2s"), (None, Some(Duration::from_secs(2))));
    assert_eq!(read("request: 2s, backendRequest: 2s").0, Some(Duration::from_secs(2)));
    assert_eq!(read("request: 1h2m3s4ms").0, Some(Duration::from_millis(3_723_004)));
    table(&[(&with("request: 1s, backendRequest: 1001ms"), &["E timeouts.backendRequest"])]);
    for bad in ["1", "1.5s", "-1s", "s", "''", "100000s", "1s1s1s1s1s", "1d", "1 s"] {
        table(&[(&with(&format!("request: '{bad}'")), &["E timeouts.request"])]);
    }
    table(&[
        (&format!("retry: {{codes: [399, 600]}}, {BACKEND}"), &["E retry.codes[0]", "E retry.codes[1]"]),
        (&format!("retry: {{attempts: -1}}, {BACKEND}"), &["E retry.attempts"]),
        (&format!("retry: {{backoff: soon}}, {BACKEND}"), &["E retry.backoff"]),
        (&format!("sessionPersistence: {{type: Cookie}}, {BACKEND}"), &["W sessionPersistence"]),
    ]);
}

#[test]
fn origins_may_have_wildcards_and_stars_stand_alone() {
    let with = |cors: &str| format!("filters: [{{type: CORS, cors: {{{cors}}}}}], {BACKEND}");
    let cors = the_rule(&with(
        "allowOrigins: ['https://a.example.com', 'https://*.example.com:8443'], allowMethods: [GET, PUT], allowCredentials: true, maxAge: 60",
    ))
    .cors
    .unwrap();
    assert_eq!(cors.origins[0], StringMatch::Exact("https://a.example.com".into()));
    let StringMatch::Regex(pattern) = &cors.origins[1] else { panic!("{:?}", cors.origins) };
    assert!(pattern.is_match("https://a.b.example.com:8443"));
    assert!(!pattern.is_match("https://example.com:8443") && !pattern.is_match("https://axexample.com:8443"));
    assert_eq!((cors.max_age, cors.credentials), (Some(Duration::from_secs(60)), Some(true)));
    assert_eq!(the_rule(&with("allowOrigins: ['*']")).cors.unwrap().origins, [StringMatch::Present]);
    for (allowed, origin, wanted) in [
        ("https://a:443", "https://a", true),
        ("http://a:80", "http://a", true),
        ("https://a:80", "https://a", false),
        ("https://a:80", "https://a:80", true),
        ("https://*.a:443", "https://b.a", true),
        ("https://*.a:443", "https://b.a:443", false),
        ("https://*", "https://a", true),
        ("https://*", "https://[fd00::1]", true),
        ("https://*", "https://a:8443", false),
        ("https://*", "https://[fd00::1]:8443", false),
        ("https://*:8443", "https://a:8443", true),
        ("https://*:8443", "https://a", false),
        ("https://*", "http://a", false),
    ] {
        let origins = the_rule(&with(&format!("allowOrigins: ['{allowed}']"))).cors.unwrap().origins;
        assert_eq!(origins[0].matches(origin.as_bytes()), wanted, "{allowed} {origin}");
    }
    for (text, field) in [
        ("allowOrigins: ['*', 'https://a']", "allowOrigins"),
        ("allowOrigins: [example.com]", "allowOrigins[0]"),
        ("allowOrigins: ['https://a/b']", "allowOrigins[0]"),
        ("allowMethods: ['*', GET]", "allowMethods"),
        ("allowHeaders: ['a b']", "allowHeaders[0]"),
        ("maxAge: 0", "maxAge"),
    ] {
        table(&[(&with(text), &[&format!("E filters[0].cors.{field}")])]);
    }
}

fn grpc(rule: &str) -> (Vec<String>, Option<GrpcRoute>) {
    let parsed = parsed(&document("GRPCRoute", &format!("{PARENT}, rules: [{{{rule}}}]")));
    let route = parsed.resources.first().map(|(_, resource)| match &**resource {
        Resource::GrpcRoute(route) => (**route).clone(),
        other => panic!("{other:?}"),
    });
    (said(&parsed), route)
}

#[test]
fn calls_are_matched_by_service_and_method() {
    let path = |method: &str| {
        let (said, route) = grpc(&format!("matches: [{{method: {{{method}}}}}], {BACKEND}"));
        assert_eq!(said, Vec::<String>::new(), "{method}");
        route.unwrap().rules[0].matches[0].http.path.clone().unwrap()
    };
    assert_eq!(
        path("service: a.B, method: C"),
        PathMatch::Exact { path: "/a.B/C".into(), ignore_case: false }
    );
    assert_eq!(path("service: a.B"), PathMatch::Prefix { prefix: "/a.B/".into(), ignore_case: false });
    let matches = |method: &str, text: &str| match path(method) {
        PathMatch::Regex(regex) => regex.is_match(text),
        other => panic!("{other:?}"),
    };
    assert!(matches("method: C", "/a.B/C") && !matches("method: C", "/a.B/D") && !matches("method: C", "/C"));
    let regex = "type: RegularExpression, service: 'a|b', method: 'Get.*'";
    assert!(matches(regex, "/a/GetX") && matches(regex, "/b/Get") && !matches(regex, "/c/Get"));
    for (method, field) in [
        ("", ""),
        ("type: Exact", ""),
        ("service: a/b", ".service"),
        ("service: a..b", ".service"),
        ("method: 1a", ".method"),
        ("type: RegularExpression, method: '('", ".method"),
        ("type: Prefix, method: a", ".type"),
    ] {
        let (said, route) = grpc(&format!("matches: [{{method: {{{method}}}}}], {BACKEND}"));
        assert_eq!(said, [format!("E spec.rules[0].matches[0].method{field}")], "{method}");
        assert!(route.is_none());
    }
    let (said, _) = grpc(&format!("filters: [{{type: URLRewrite, urlRewrite: {{hostname: a}}}}], {BACKEND}"));
    assert_eq!(said, ["E spec.rules[0].filters[0].type"], "no filter of GRPCRoutes");
    let (said, route) = grpc(&format!("matches: [{{headers: [{{name: X-A, value: b}}]}}], {BACKEND}"));
    assert_eq!((said, route.unwrap().rules[0].matches[0].http.path.clone()), (Vec::new(), None));
}

#[test]
fn tls_and_tcp_routes_have_one_rule_with_backends() {
    let of = |kind: &str, spec: &str| parsed(&document(kind, &format!("{PARENT}, {spec}")));
    for kind in ["TLSRoute", "TCPRoute"] {
        let parsed = of(kind, &format!("rules: [{{{BACKEND}}}]"));
        assert_eq!(said(&parsed), Vec::<String>::new());
        assert_eq!(said(&of(kind, "rules: []")), ["E spec.rules"]);
        assert_eq!(said(&of(kind, "rules: [{}]")), ["E spec.rules[0].backendRefs"]);
        assert_eq!(said(&of(kind, &format!("rules: [{{{BACKEND}}}, {{{BACKEND}}}]"))), ["W spec.rules[1]"]);
        assert_eq!(
            said(&of(kind, "rules: [{backendRefs: [{name: web}]}]")),
            ["E spec.rules[0].backendRefs[0].port"]
        );
    }
    let tls = of("TLSRoute", &format!("hostnames: ['*.example.com'], rules: [{{{BACKEND}}}]"));
    let Resource::TlsRoute(route) = &*tls.resources[0].1 else { panic!("{tls:?}") };
    assert_eq!(route.hostnames, ["*.example.com".into()]);
    assert_eq!(said(&tls), Vec::<String>::new(), "its names are looked at in the mesh too");
    let tcp = of("TCPRoute", &format!("hostnames: [a], rules: [{{{BACKEND}}}]"));
    assert_eq!(said(&tcp), ["W spec.hostnames"], "no field of it");
}

#[test]
fn older_versions_of_the_api_are_read_alike() {
    for (kind, version) in [
        ("HTTPRoute", "v1beta1"),
        ("GRPCRoute", "v1alpha2"),
        ("TLSRoute", "v1alpha3"),
        ("TLSRoute", "v1alpha2"),
        ("TCPRoute", "v1alpha2"),
    ] {
        let text = document(kind, &format!("{PARENT}, rules: [{{{BACKEND}}}]"))
            .replace("/v1,", &format!("/{version},"));
        let parsed = parsed(&text);
        assert_eq!((said(&parsed), parsed.resources.len()), (Vec::new(), 1), "{kind} {version}");
    }
}

#[test]
fn a_grant_allows_what_it_names() {
    let grant = |spec: &str| parsed(&document("ReferenceGrant", spec));
    let read = |spec: &str| {
        let parsed = grant(spec);
        assert_eq!(said(&parsed), Vec::<String>::new());
        match &*parsed.resources[0].1 {
            Resource::ReferenceGrant(grant) => grant.clone(),
            other => panic!("{other:?}"),
        }
    };
    let backend = |namespace: &str, name: &str| BackendRef {
        kind: BackendKind::Service,
        name: Name::new(namespace, name),
        port: Some(80),
    };
    let from = "from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: front}]";
    let all = read(&format!("{from}, to: [{{group: '', kind: Service}}]"));
    assert!(all.allows("HTTPRoute", "front", &backend("shop", "web")));
    assert!(!all.allows("GRPCRoute", "front", &backend("shop", "web")), "another kind");
    assert!(!all.allows("HTTPRoute", "back", &backend("shop", "web")), "another namespace");
    assert!(!all.allows("HTTPRoute", "front", &backend("bank", "web")), "not the grant's namespace");
    let one = read(&format!("{from}, to: [{{group: core, kind: Service, name: web}}]"));
    assert!(one.allows("HTTPRoute", "front", &backend("shop", "web")));
    assert!(!one.allows("HTTPRoute", "front", &backend("shop", "db")));
    assert_eq!(said(&grant("")), ["E spec.from", "E spec.to"]);
    assert_eq!(
        said(&grant("from: [{group: a, kind: b}], to: [{kind: Service}]")),
        ["E spec.from[0].namespace", "E spec.to[0].group"]
    );
}
