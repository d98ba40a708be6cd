//! Tables of what users write, right and wrong, by rows of the semantics (S1 …).

mod delegates;
mod hosts;
mod stream;

use mesh_core::route::{
    http::{Abort, Fault, HeaderOps, Millionths, PathRewrite, Redirect, RedirectPort, RetryOn, RetryPolicy},
    matching::FullRegex,
    variables::HeaderText,
};

use super::*;
use crate::{
    problem::Level,
    resource::Resource,
    source::document::{Known, Rules, parse},
};

/// The resource, if it is used, and what was said: `E` or `W`, field, message.
fn read_in(meta: &str, spec: &str) -> (Option<VirtualService>, Vec<String>) {
    let text = format!(
        "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{{meta}}}, spec: {spec}}}"
    );
    let parsed = parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
    let said = parsed.problems.iter().map(|p| {
        let level = if p.level == Level::Error { "E" } else { "W" };
        format!("{level} {}: {}", p.field, p.message)
    });
    let read = parsed.resources.first().map(|(_, resource)| match &**resource {
        Resource::VirtualService(service) => (**service).clone(),
        other => panic!("{other:?}"),
    });
    (read, said.collect())
}

fn read(spec: &str) -> (Option<VirtualService>, Vec<String>) {
    read_in("name: v, namespace: shop", spec)
}

/// A VirtualService about which nothing was said.
fn good(spec: &str) -> VirtualService {
    let (read, said) = read(spec);
    assert_eq!(said, [""; 0], "{spec}");
    read.unwrap()
}

const ROUTE: &str = "route: [{destination: {host: web}}]";

/// The only HTTP rule of a VirtualService about which nothing was said.
fn rule(rule: &str) -> HttpRoute {
    let read = good(&format!("{{hosts: [web], http: [{{{rule}}}]}}"));
    let [only] = read.http.as_slice() else { panic!("{read:?}") };
    only.clone()
}

/// The only match of a rule about which nothing was said.
fn one_match(one: &str) -> HttpMatch {
    let rule = rule(&format!("match: [{one}], {ROUTE}"));
    let [only] = rule.matches.as_slice() else { panic!("{rule:?}") };
    only.clone()
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn prefix(text: &str) -> StringMatch {
    StringMatch::Prefix(text.into())
}

fn regex(text: &str) -> StringMatch {
    StringMatch::Regex(FullRegex::new(text).unwrap())
}

/// Checks what is said about a spec: the level and field of each problem, and words that its message holds.
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

/// As [`says`], for the content of one HTTP rule.
fn rule_says(rule: &str, wanted: &[(&str, &str)]) {
    says(&format!("{{hosts: [web], http: [{{{rule}}}]}}"), wanted);
}

#[test]
fn s1_only_names_without_a_dot_are_completed_by_the_rules_namespace() {
    for (host, full) in [
        ("reviews", "reviews.shop.svc.cluster.local"),
        ("REVIEWS", "reviews.shop.svc.cluster.local"),
        ("reviews.prod", "reviews.prod"),
        ("reviews.prod.svc.cluster.local", "reviews.prod.svc.cluster.local"),
        ("'*.example.com'", "*.example.com"),
        ("10.0.0.1", "10.0.0.1"),
        ("'fd00::1'", "fd00::1"),
    ] {
        let read = good(&format!("{{hosts: [{host}], http: [{{{ROUTE}}}]}}"));
        assert_eq!(&*read.hosts[0].full("cluster.local"), full);
    }
    let text = "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v, namespace: shop}, \
                spec: {hosts: [a.b], http: [{route: [{destination: {host: reviews}}], \
                mirror: {host: shadow}}]}}";
    let parsed = parse("a.yaml".as_ref(), text, &Rules::default(), &Known::new());
    let Resource::VirtualService(read) = &*parsed.resources[0].1 else { panic!("{parsed:?}") };
    let HttpAction::Route(to) = &read.http[0].action else { panic!("{read:?}") };
    assert_eq!(&*to[0].destination.host.full("my.domain"), "reviews.shop.svc.my.domain");
    assert_eq!(&*read.http[0].mirrors[0].destination.host.full("my.domain"), "shadow.shop.svc.my.domain");
}

#[test]
fn s2_gateways_are_qualified_and_without_any_it_is_the_mesh() {
    for (gateways, wanted, mesh) in [
        ("", vec!["mesh"], true),
        ("gateways: [mesh],", vec!["mesh"], true),
        ("gateways: [edge],", vec!["shop/edge"], false),
        ("gateways: [infra/edge, mesh],", vec!["infra/edge", "mesh"], true),
        ("gateways: [./edge],", vec!["shop/edge"], false),
    ] {
        let read = good(&format!("{{hosts: [a.b], {gateways} http: [{{{ROUTE}}}]}}"));
        let found: Vec<&str> = read.gateways.iter().map(|gateway| &**gateway).collect();
        assert_eq!((found, read.is_for_mesh()), (wanted, mesh), "{gateways}");
    }
    says(
        "{hosts: [a.b], gateways: [A_b], http: [{route: [{destination: {host: w}}]}]}",
        &[("E spec.gateways[0]", "wanted \"mesh\"")],
    );
}

#[test]
fn durations_names_and_nulls_follow_protobufs_json() {
    for (text, wanted) in [
        ("10s", Some(10_000)),
        ("0.5s", Some(500)),
        ("1h", Some(3_600_000)),
        ("1m30s", Some(90_000)),
        ("100ms", Some(100)),
        ("0s", Some(0)),
        ("10", None),
        ("s", None),
        ("-1s", None),
        ("1d", None),
        ("0.1ms", None),
        ("99999999999h", None),
    ] {
        let (read, said) = read(&format!("{{hosts: [w], http: [{{timeout: '{text}', {ROUTE}}}]}}"));
        match wanted {
            Some(ms) => assert_eq!(read.unwrap().http[0].timeout, Some(Duration::from_millis(ms)), "{text}"),
            None => assert!(
                said.len() == 1 && said[0].starts_with("E spec.http[0].timeout: is "),
                "{text}: {said:?}"
            ),
        }
    }
    let snake = good(
        "{hosts: [w], export_to: ['.'], http: [{match: [{uri: null, ignore_uri_case: true, source_labels: {a: b}}], \
         route: [{destination: {host: w}}], cors_policy: null, retries: {attempts: 1, per_try_timeout: 1s}}]}",
    );
    assert!(snake.export_to.is_some_and(|to| to.own));
    assert!(snake.http[0].matches[0].ignore_uri_case && snake.http[0].matches[0].uri.is_none());
    assert!(
        matches!(&snake.http[0].retries, Some(Retries::On(on)) if on.per_try_timeout == Some(Duration::from_secs(1)))
    );
    rule_says(&format!("{ROUTE}, timeOut: 1s"), &[("W spec.http[0].timeOut", "is not a field")]);
    rule_says(
        "route: [{destination: {host: w}}], corsPolicy: {max_age: 1s, maxAge: 2s}",
        &[("E spec.http[0].corsPolicy.max_age", "is there beside maxAge")],
    );
    says(
        "{hosts: web, http: []}",
        &[
            ("E spec.hosts", "is \"web\", wanted a list"),
            ("E spec.hosts", "is missing"),
            ("E spec", "has no rules"),
        ],
    );
}

#[test]
fn wrong_types_are_located_and_hide_no_other_problem() {
    let spec = "{hosts: [7, web], http: [{match: [{uri: /a, headers: [x]}], timeout: 5, route: [{destination: {host: w, port: {number: '80'}}, weight: a}]}, 5]}";
    let (_, said) = read(spec);
    let fields: Vec<&str> = said.iter().map(|said| said.split(": ").next().unwrap()).collect();
    assert_eq!(
        fields,
        [
            "E spec.hosts[0]",
            "E spec.http[0].match[0].uri",
            "E spec.http[0].match[0].headers",
            "E spec.http[0].route[0].destination.port.number",
            "E spec.http[0].route[0].weight",
            "E spec.http[0].timeout",
            "E spec.http[1]",
        ],
        "{said:#?}"
    );
}

#[test]
fn s10_a_rule_after_one_for_every_request_is_warned_about() {
    for (first, is_last) in [
        ("", true),
        ("match: [{uri: {prefix: /}}], ", true),
        ("match: [{uri: {regex: .*}}], ", true),
        ("match: [{}], ", true),
        ("match: [{uri: {exact: /}}], ", false),
        ("match: [{uri: {prefix: /}, headers: {a: {exact: b}}}], ", false),
        ("match: [{port: 80}], ", false),
        ("match: [{sourceLabels: {a: b}}], ", false),
    ] {
        let spec = format!("{{hosts: [w], http: [{{{first}{ROUTE}}}, {{{ROUTE}}}]}}");
        let wanted: &[_] = if is_last { &[("W spec.http[1]", "never reached: spec.http[0]")] } else { &[] };
        says(&spec, wanted);
    }
}

#[test]
fn s11_to_s14_every_part_of_a_match_is_read() {
    let all = one_match(
        "{name: m, uri: {prefix: /foo}, ignoreUriCase: true, scheme: {exact: http}, method: {regex: GET|PUT}, \
         authority: {prefix: a.}, headers: {X-One: {exact: a}, x-two: {}, x-three: {regex: '*'}, x-four: null}, \
         withoutHeaders: {X-No: {prefix: b}}, queryParams: {q: {exact: v}, p: {}}, port: 80, sourceLabels: {app: a}, \
         sourceNamespace: prod}",
    );
    let there = StringMatch::Present;
    let named =
        |pairs: &[(&str, StringMatch)]| pairs.iter().map(|(n, m)| (Arc::from(*n), m.clone())).collect();
    assert_eq!(
        all,
        HttpMatch {
            name: Some("m".into()),
            uri: Some(prefix("/foo")),
            ignore_uri_case: true,
            scheme: Some(exact("http")),
            method: Some(regex("GET|PUT")),
            authority: Some(prefix("a.")),
            headers: named(&[
                ("x-one", exact("a")),
                ("x-two", there.clone()),
                ("x-three", there.clone()),
                ("x-four", there.clone()),
            ]),
            without_headers: named(&[("x-no", prefix("b"))]),
            query: named(&[("q", exact("v")), ("p", there)]),
            port: Some(80),
            source_labels: [(Arc::from("app"), Arc::from("a"))].into(),
            source_namespace: Some("prod".into()),
            gateways: Vec::new(),
        }
    );
    assert_eq!(one_match("{gateways: [mesh, edge]}").gateways, ["mesh".into(), "shop/edge".into()]);
    assert_eq!(one_match("{uri: {regex: '/a/[0-9]+'}}").uri, Some(regex("/a/[0-9]+")));
}

#[test]
fn s12_to_s14_mistakes_in_matches_name_the_field() {
    let long = "a".repeat(1025);
    for (one, start, words) in [
        ("{uri: {exact: a, prefix: b}}", "E spec.http[0].match[0].uri.prefix", "beside exact"),
        ("{uri: {prefix: ''}}", "E spec.http[0].match[0].uri.prefix", "is empty"),
        ("{uri: {regex: ''}}", "E spec.http[0].match[0].uri.regex", "is empty"),
        ("{uri: {regex: '('}}", "E spec.http[0].match[0].uri.regex", "wanted a regular expression"),
        ("{uri: {regex: 'a)(b'}}", "E spec.http[0].match[0].uri.regex", "wanted a regular expression"),
        ("{uri: {regex: '*'}}", "E spec.http[0].match[0].uri.regex", "wanted a regular expression"),
        (&format!("{{uri: {{regex: {long}}}}}"), "E spec.http[0].match[0].uri.regex", "wanted at most 1024"),
        ("{uri: {suffix: a}}", "W spec.http[0].match[0].uri.suffix", "is not a field"),
        (
            "{headers: {'a b': {exact: c}}}",
            "E spec.http[0].match[0].headers.a b",
            "wanted the name of a header",
        ),
        ("{headers: {uri: {exact: c}}}", "W spec.http[0].match[0].headers.uri", "is no header"),
        ("{headers: {A: {}, a: {}}}", "E spec.http[0].match[0].headers.a", "in other letters"),
        (
            "{headers: {'@request.auth.claims.a': {exact: b}}}",
            "E spec.http[0].match[0].headers.@request.auth.claims.a",
            "only gateways",
        ),
        ("{port: 0}", "E spec.http[0].match[0].port", "from 1 to 65535"),
        ("{port: 65536}", "E spec.http[0].match[0].port", "from 1 to 65535"),
        ("{sourceLabels: {'-a': b}}", "E spec.http[0].match[0].sourceLabels.-a", "a label"),
        ("{sourceLabels: {a: 'b c'}}", "E spec.http[0].match[0].sourceLabels.a", "a label"),
        ("{sourceNamespace: A}", "E spec.http[0].match[0].sourceNamespace", "name of a namespace"),
        ("{gateways: [mesh], sourceNamespace: a}", "W spec.http[0].match[0]", "beside gateways"),
        ("{uri: {regex: a}, ignoreUriCase: true}", "W spec.http[0].match[0].ignoreUriCase", "(?i)"),
        ("{statPrefix: a}", "W spec.http[0].match[0].statPrefix", "no effect"),
        ("null", "E spec.http[0].match[0]", "wanted a match"),
    ] {
        rule_says(&format!("match: [{one}], {ROUTE}"), &[(start, words)]);
    }
}

#[test]
fn s16_s17_destinations_have_host_subset_port_and_weight() {
    let read = rule(
        "route: [{destination: {host: reviews, subset: v1, port: {number: 9080}}, weight: 75}, \
         {destination: {host: reviews, subset: v2}, weight: 0}, {destination: {host: a.b.c}, weight: 26}]",
    );
    let HttpAction::Route(to) = &read.action else { panic!("{read:?}") };
    let first = Destination {
        host: RuleHost::Short { name: "reviews".into(), namespace: "shop".into() },
        subset: Some("v1".into()),
        port: Some(9080),
    };
    assert_eq!((&to[0].destination, to[0].weight), (&first, 75));
    assert_eq!((to[1].weight, to[2].weight), (0, 26));
    assert!(
        matches!(&rule("route: [{destination: {host: w}, weight: 0}]").action, HttpAction::Route(to) if to.len() == 1)
    );
    for (route, start, words) in [
        ("[{destination: {host: a}}, {destination: {host: b}}]", "E spec.http[0].route", "only weights of 0"),
        ("[{destination: {host: a}, weight: -1}]", "E spec.http[0].route[0].weight", "is -1"),
        ("[{weight: 1}]", "E spec.http[0].route[0].destination", "is missing"),
        ("[{destination: {}}]", "E spec.http[0].route[0].destination.host", "is missing"),
        ("[{destination: {host: '*'}}]", "E spec.http[0].route[0].destination.host", "one service"),
        ("[{destination: {host: a_b}}]", "E spec.http[0].route[0].destination.host", "a host name"),
        (
            "[{destination: {host: a, port: {}}}]",
            "E spec.http[0].route[0].destination.port.number",
            "is missing",
        ),
        (
            "[{destination: {host: a, port: 80}}]",
            "E spec.http[0].route[0].destination.port",
            "wanted an object",
        ),
        (
            "[{destination: {host: a, subset: 'a b'}}]",
            "E spec.http[0].route[0].destination.subset",
            "letters",
        ),
    ] {
        rule_says(&format!("route: {route}"), &[(start, words)]);
    }
}

#[test]
fn s18_header_operations_are_sorted_and_an_authority_is_told_apart() {
    let read_http = |headers: &str| read(&format!("{{hosts: [web], http: [{{{headers}, {ROUTE}}}]}}"));
    let read = rule(
        "headers: {request: {set: {B: '2', a: '1', Host: new.example}, add: {C: '3'}, remove: [D]}, response: {add: {e: '5'}}}, \
         route: [{destination: {host: w}, headers: {request: {add: {':authority': 'dest:80'}}}}]",
    );
    let pair = |name: &str, value: &str| (Arc::from(name), HeaderText::from(value));
    let request = HeaderOps {
        set: vec![pair("a", "1"), pair("b", "2")],
        add: vec![pair("c", "3")],
        remove: vec!["d".into()],
        authority: Some("new.example".into()),
    };
    let response = HeaderOps { add: vec![pair("e", "5")], ..HeaderOps::default() };
    assert_eq!(read.headers, Some(Headers { request, response }));
    let HttpAction::Route(to) = &read.action else { panic!("{read:?}") };
    assert_eq!(to[0].headers.request.authority.as_deref(), Some("dest:80"));
    let (several, _) = read_http(
        "headers: {request: {add: {host: two}, set: {':authority': one, ':path': /a}, remove: [host]}, response: {set: {host: a}}}",
    );
    let request = HeaderOps { authority: Some("one".into()), ..HeaderOps::default() };
    assert_eq!(several.unwrap().http[0].headers, Some(Headers { request, response: HeaderOps::default() }));
    for (headers, start, words) in [
        ("{request: {set: {':path': /a}}}", "W spec.http[0].headers.request.set.:path", "request line"),
        ("{response: {set: {host: a}}}", "W spec.http[0].headers.response.set.host", "request line"),
        ("{request: {remove: [Host]}}", "W spec.http[0].headers.request.remove[0]", "request line"),
        ("{request: {set: {'a b': c}}}", "E spec.http[0].headers.request.set.a b", "name of a header"),
        ("{request: {set: {a: \"b\\nc\"}}}", "E spec.http[0].headers.request.set.a", "control characters"),
        (
            "{request: {set: {a: b}, add: {A: c}, zip: 1}}",
            "W spec.http[0].headers.request.zip",
            "not a field",
        ),
        (
            "{request: {set: {host: a}, add: {':authority': b}}}",
            "W spec.http[0].headers.request.add.:authority",
            "the first one counts",
        ),
        (
            "{request: {set: {a: '%DURATION%'}}}",
            "W spec.http[0].headers.request.set.a",
            "%DURATION%, which stands for nothing here",
        ),
        ("{request: {set: {a: '%NO_SUCH%'}}}", "E spec.http[0].headers.request.set.a", "%NO_SUCH% is none"),
    ] {
        rule_says(&format!("headers: {headers}, {ROUTE}"), &[(start, words)]);
    }
    let read = rule(
        "headers: {request: {set: {a: '%DOWNSTREAM_REMOTE_ADDRESS%', b: '100%%'}}}, route: [{destination: {host: w}}]",
    );
    let set = read.headers.unwrap().request.set;
    assert!(set[0].1.template().is_some());
    assert_eq!(set[1].1, HeaderText::from("100%"));
    rule_says(
        &format!("headers: {{request: {{set: {{host: a}}}}}}, rewrite: {{authority: b}}, {ROUTE}"),
        &[("W spec.http[0].rewrite.authority", "this one counts")],
    );
}

#[test]
fn s19_redirects_are_read_with_their_defaults() {
    let redirect = |text: &str| match rule(&format!("redirect: {text}")).action {
        HttpAction::Redirect(redirect) => redirect,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        redirect("{uri: /new}"),
        Redirect {
            status: 301,
            scheme: None,
            authority: None,
            port: RedirectPort::OfHost,
            path: Some(PathRewrite::Full("/new".into())),
        }
    );
    let all = redirect("{authority: a.b, scheme: https, port: 8443, redirectCode: 308}");
    assert_eq!((all.status, all.port), (308, RedirectPort::Number(8443)));
    assert_eq!(redirect("{authority: a, derivePort: FROM_REQUEST_PORT}").port, RedirectPort::OfRequest);
    assert_eq!(redirect("{uri: /a, derivePort: FROM_PROTOCOL_DEFAULT}").port, RedirectPort::OfScheme);
    assert_eq!(redirect("{authority: a, redirectCode: 0}").status, 301);
    let by_prefix = rule("match: [{uri: {prefix: /a}}], redirect: {prefixRewrite: /b}");
    assert!(matches!(
        by_prefix.action,
        HttpAction::Redirect(Redirect { path: Some(PathRewrite::MatchedPrefix(_)), .. })
    ));
    for (rule, start, words) in [
        ("redirect: {}", "E spec.http[0].redirect", "says nothing"),
        ("redirect: {uri: /, redirectCode: 304}", "E spec.http[0].redirect.redirectCode", "wanted 301"),
        (
            "redirect: {uri: /, port: 1, derivePort: FROM_REQUEST_PORT}",
            "E spec.http[0].redirect.derivePort",
            "beside port",
        ),
        ("redirect: {uri: /, scheme: ftp}", "E spec.http[0].redirect.scheme", "http or https"),
        (
            "redirect: {derivePort: X}",
            "E spec.http[0].redirect.derivePort",
            "FROM_PROTOCOL_DEFAULT or FROM_REQUEST_PORT",
        ),
        (
            "match: [{uri: {exact: /a}}], redirect: {prefixRewrite: /b}",
            "E spec.http[0].redirect.prefixRewrite",
            "uri.prefix",
        ),
        ("redirect: {prefixRewrite: /b}", "E spec.http[0].redirect.prefixRewrite", "uri.prefix"),
        (
            "match: [{uri: {prefix: /a}}], redirect: {uri: /, prefixRewrite: /b}",
            "E spec.http[0].redirect.prefixRewrite",
            "beside uri",
        ),
    ] {
        let (_, said) = read(&format!("{{hosts: [w], http: [{{{rule}}}]}}"));
        assert!(said[0].starts_with(&format!("{start}: ")) && said[0].contains(words), "{rule}: {said:?}");
    }
}

#[test]
fn s20_mirrors_have_all_requests_unless_a_share_is_given() {
    for (mirror, shares) in [
        ("mirror: {host: m}", vec![1_000_000]),
        ("mirror: {host: m}, mirrorPercentage: {value: 12.5}", vec![125_000]),
        ("mirror: {host: m}, mirrorPercentage: {value: 0}", vec![0]),
        ("mirror: {host: m}, mirrorPercent: 50", vec![500_000]),
        (
            "mirrors: [{destination: {host: m}}, {destination: {host: m2}, percentage: {value: 0.0001}}]",
            vec![1_000_000, 1],
        ),
    ] {
        let read = rule(&format!("{mirror}, {ROUTE}"));
        let found: Vec<u32> = read.mirrors.iter().map(|mirror| mirror.share.0).collect();
        assert_eq!(found, shares, "{mirror}");
    }
    for (mirror, start, words) in [
        (
            "mirror: {host: m}, mirrors: [{destination: {host: m2}}]",
            "E spec.http[0].mirrors",
            "beside mirror",
        ),
        (
            "mirror: {host: m}, mirrorPercentage: {value: 101}",
            "E spec.http[0].mirrorPercentage.value",
            "from 0 to 100",
        ),
        ("mirrorPercentage: {value: 5}", "W spec.http[0].mirrorPercentage", "without mirror"),
        ("mirrors: [{}]", "E spec.http[0].mirrors[0].destination", "is missing"),
    ] {
        rule_says(&format!("{mirror}, {ROUTE}"), &[(start, words)]);
    }
}

#[test]
fn s21_faults_hit_nobody_without_a_percentage() {
    let fault = |text: &str| rule(&format!("fault: {text}, {ROUTE}")).fault.unwrap();
    let seven = Duration::from_secs(7);
    assert_eq!(
        fault("{delay: {fixedDelay: 7s, percentage: {value: 100}}}"),
        Fault { delay: Some((Millionths::ALL, seven)), abort: None }
    );
    assert_eq!(
        fault("{abort: {httpStatus: 500, percent: 10}}").abort,
        Some((Millionths(100_000), Abort::Http(500)))
    );
    assert_eq!(
        fault("{abort: {grpcStatus: UNAVAILABLE, percentage: {value: 1}}}").abort,
        Some((Millionths(10_000), Abort::Grpc(14)))
    );
    let (read, said) =
        read(&format!("{{hosts: [w], http: [{{fault: {{abort: {{httpStatus: 500}}}}, {ROUTE}}}]}}"));
    assert_eq!(read.unwrap().http[0].fault.as_ref().unwrap().abort, Some((Millionths(0), Abort::Http(500))));
    assert!(
        said[0].starts_with("W spec.http[0].fault.abort.percentage: is missing, which means 0"),
        "{said:?}"
    );
    for (fault, start, words) in [
        ("{}", "E spec.http[0].fault", "says nothing"),
        ("{delay: {percentage: {value: 1}}}", "E spec.http[0].fault.delay.fixedDelay", "is missing"),
        (
            "{delay: {fixedDelay: 0s, percentage: {value: 1}}}",
            "E spec.http[0].fault.delay.fixedDelay",
            "at least 1ms",
        ),
        (
            "{delay: {exponentialDelay: 1s, percent: 1}}",
            "E spec.http[0].fault.delay.exponentialDelay",
            "not supported",
        ),
        ("{abort: {percentage: {value: 1}}}", "E spec.http[0].fault.abort", "has no status"),
        (
            "{abort: {httpStatus: 199, percent: 1}}",
            "E spec.http[0].fault.abort.httpStatus",
            "from 200 to 599",
        ),
        (
            "{abort: {httpStatus: 600, percent: 1}}",
            "E spec.http[0].fault.abort.httpStatus",
            "from 200 to 599",
        ),
        (
            "{abort: {grpcStatus: '14', percent: 1}}",
            "E spec.http[0].fault.abort.grpcStatus",
            "name of a gRPC status",
        ),
        (
            "{abort: {httpStatus: 500, grpcStatus: INTERNAL, percent: 1}}",
            "E spec.http[0].fault.abort.grpcStatus",
            "beside httpStatus",
        ),
        ("{abort: {http2Error: X, percent: 1}}", "E spec.http[0].fault.abort.http2Error", "not supported"),
        (
            "{abort: {httpStatus: 500, percentage: {value: -1}}}",
            "E spec.http[0].fault.abort.percentage.value",
            "from 0 to 100",
        ),
    ] {
        rule_says(&format!("fault: {fault}, {ROUTE}"), &[(start, words)]);
    }
}

#[test]
fn s22_cors_is_read_and_its_age_is_in_whole_seconds() {
    let cors = rule(&format!(
        "corsPolicy: {{allowOrigins: [{{exact: 'https://a.b'}}, {{regex: '.*c'}}, {{exact: '*'}}], allowMethods: [GET, '*'], \
         allowHeaders: [X-a], exposeHeaders: [x-b], maxAge: 24h, allowCredentials: false, unmatchedPreflights: IGNORE}}, {ROUTE}"
    ))
    .cors
    .unwrap();
    assert_eq!(cors.origins, [exact("https://a.b"), regex(".*c"), StringMatch::Present]);
    assert_eq!(cors.max_age, Some(Duration::from_secs(86_400)));
    assert_eq!((cors.credentials, cors.answer_unmatched_preflights), (Some(false), true));
    for (cors, start, words) in [
        ("{maxAge: 1500ms}", "E spec.http[0].corsPolicy.maxAge", "whole seconds"),
        ("{allowMethods: ['G T']}", "E spec.http[0].corsPolicy.allowMethods[0]", "name of a method"),
        ("{allowMethods: [get]}", "E spec.http[0].corsPolicy.allowMethods[0]", "capital letters"),
        ("{allowHeaders: ['a b']}", "E spec.http[0].corsPolicy.allowHeaders[0]", "name of a header"),
        ("{allowOrigins: [{}]}", "E spec.http[0].corsPolicy.allowOrigins[0]", "wanted exact"),
        (
            "{unmatchedPreflights: MAYBE}",
            "E spec.http[0].corsPolicy.unmatchedPreflights",
            "FORWARD or IGNORE",
        ),
    ] {
        rule_says(&format!("corsPolicy: {cors}, {ROUTE}"), &[(start, words)]);
    }
}

#[test]
fn s23_what_excludes_each_other_is_refused() {
    let answer = "directResponse: {status: 200}";
    let redirect = "redirect: {uri: /}";
    for (rule, wanted) in [
        ("timeout: 1s".to_owned(), vec![("E spec.http[0]", "does nothing")]),
        (format!("{ROUTE}, {redirect}"), vec![("E spec.http[0].redirect", "beside route")]),
        (format!("{ROUTE}, {answer}"), vec![("E spec.http[0].directResponse", "beside route")]),
        (format!("{redirect}, {answer}"), vec![("E spec.http[0].directResponse", "beside redirect")]),
        (format!("{redirect}, rewrite: {{uri: /}}"), vec![("E spec.http[0].rewrite", "beside redirect")]),
        (format!("{answer}, rewrite: {{uri: /}}"), vec![("E spec.http[0].rewrite", "beside directResponse")]),
        (
            format!("{redirect}, fault: {{abort: {{httpStatus: 500, percent: 1}}}}"),
            vec![("E spec.http[0].fault", "beside redirect")],
        ),
        (
            format!("{answer}, fault: {{abort: {{httpStatus: 500, percent: 1}}}}"),
            vec![("E spec.http[0].fault", "beside directResponse")],
        ),
        (format!("{redirect}, mirror: {{host: m}}"), vec![("W spec.http[0].mirror", "no effect")]),
        (format!("delegate: {{name: d}}, {ROUTE}"), vec![("E spec.http[0].delegate", "beside route")]),
        (format!("delegate: {{name: d}}, {redirect}"), vec![("E spec.http[0].delegate", "beside redirect")]),
        (format!("rewrite: {{}}, {ROUTE}"), vec![("E spec.http[0].rewrite", "says nothing")]),
        (
            format!("rewrite: {{uri: /, uriRegexRewrite: {{match: a, rewrite: b}}}}, {ROUTE}"),
            vec![("E spec.http[0].rewrite.uriRegexRewrite", "beside uri")],
        ),
        (
            format!("rewrite: {{uriRegexRewrite: {{match: a}}}}, {ROUTE}"),
            vec![("E spec.http[0].rewrite.uriRegexRewrite.rewrite", "is missing")],
        ),
        (
            format!("rewrite: {{uriRegexRewrite: {{match: (a), rewrite: '\\2'}}}}, {ROUTE}"),
            vec![("E spec.http[0].rewrite.uriRegexRewrite.rewrite", "\\1")],
        ),
        (
            format!("rewrite: {{authority: 'a b'}}, {ROUTE}"),
            vec![("E spec.http[0].rewrite.authority", "wanted a host")],
        ),
    ] {
        rule_says(&rule, &wanted);
    }
    for (spec, wanted) in [
        ("{hosts: [a.b]}", vec![("E spec", "has no rules")]),
        ("{hosts: [a.b], http: []}", vec![("E spec", "has no rules")]),
        (
            "{hosts: [a.b, A.B], http: [{route: [{destination: {host: w}}]}]}",
            vec![("E spec.hosts[1]", "there already")],
        ),
        (
            "{hosts: ['a..b'], http: [{route: [{destination: {host: w}}]}]}",
            vec![("E spec.hosts[0]", "a host name")],
        ),
        (
            "{hosts: ['a.*'], http: [{route: [{destination: {host: w}}]}]}",
            vec![("E spec.hosts[0]", "a host name")],
        ),
    ] {
        let (used, said) = read(spec);
        assert!(used.is_none(), "{spec}");
        for (start, words) in wanted {
            assert!(
                said.iter().any(|said| said.starts_with(start) && said.contains(words)),
                "{spec}: {said:?}"
            );
        }
    }
}

#[test]
fn s23_the_body_of_an_answer_has_at_most_one_mebibyte() {
    let answer = |text: &str| match rule(&format!("directResponse: {text}")).action {
        HttpAction::Respond(answer) => (answer.status, answer.body.to_vec()),
        other => panic!("{other:?}"),
    };
    assert_eq!(answer("{status: 503}"), (503, vec![]));
    assert_eq!(answer("{status: 200, body: {string: hi}}"), (200, b"hi".to_vec()));
    assert_eq!(answer("{status: 200, body: {bytes: aGk=}}"), (200, b"hi".to_vec()));
    let max = "a".repeat(1 << 20);
    assert_eq!(answer(&format!("{{status: 200, body: {{string: {max}}}}}")).1.len(), 1 << 20);
    for (answer, start, words) in [
        (
            format!("{{status: 200, body: {{string: {max}a}}}}"),
            "E spec.http[0].directResponse.body",
            "at most 1048576",
        ),
        (
            "{status: 200, body: {bytes: '!'}}".to_owned(),
            "E spec.http[0].directResponse.body.bytes",
            "no base64",
        ),
        ("{status: 99}".to_owned(), "E spec.http[0].directResponse.status", "from 200 to 599"),
        ("{}".to_owned(), "E spec.http[0].directResponse.status", "is missing"),
    ] {
        rule_says(&format!("directResponse: {answer}"), &[(start, words)]);
    }
}

#[test]
fn s26_export_to_says_who_sees_it() {
    let to = |text: &str| good(&format!("{{hosts: [w], exportTo: {text}, http: [{{{ROUTE}}}]}}")).export_to;
    assert!(to("[]").is_none());
    let everyone = to("['*']").unwrap();
    assert!(everyone.includes("any", "shop"));
    let own = to("['.', prod]").unwrap();
    assert!(own.includes("shop", "shop") && own.includes("prod", "shop") && !own.includes("other", "shop"));
    assert!(!to("['~']").unwrap().includes("shop", "shop"));
    for (to, start, words) in [
        ("['*', a]", "E spec.exportTo[0]", "wanted it alone"),
        ("[A_]", "E spec.exportTo[0]", "wanted a namespace"),
        ("[a, a]", "E spec.exportTo[1]", "there already"),
    ] {
        says(&format!("{{hosts: [w], exportTo: {to}, http: [{{{ROUTE}}}]}}"), &[(start, words)]);
    }
}

#[test]
fn s30_to_s33_retries_are_read_with_their_defaults() {
    let retries = |text: &str| rule(&format!("retries: {text}, {ROUTE}")).retries.unwrap();
    assert_eq!(retries("{attempts: 0}"), Retries::Off);
    assert_eq!(retries("{}"), Retries::Off);
    let plain = RetryPolicy {
        attempts: 3,
        per_try_timeout: None,
        on: RetryOn::built_in(),
        backoff: Duration::from_millis(25),
        backoff_min: Duration::ZERO,
        ignore_previous_hosts: None,
        remote_localities: false,
    };
    assert_eq!(retries("{attempts: 3}"), Retries::On(plain.clone()));
    assert_eq!(retries("{attempts: 3, retryOn: ' , '}"), Retries::On(plain));
    let Retries::On(all) = retries(
        "{attempts: 2, perTryTimeout: 2s, backoff: 100ms, retryRemoteLocalities: true, retryIgnorePreviousHosts: false, \
         retryOn: '5xx, gateway-error,reset,reset-before-request,connect-failure,refused-stream,retriable-4xx,\
         retriable-status-codes,503,500,503,cancelled,deadline-exceeded,internal,resource-exhausted,unavailable'}",
    ) else {
        panic!()
    };
    assert_eq!(all.on.statuses, [500, 503]);
    assert_eq!(all.on.grpc, [1, 4, 8, 13, 14]);
    let on = &all.on;
    assert!(on.server_error && on.gateway_error && on.reset && on.reset_before_request);
    assert!(on.connect_failure && on.refused_stream && on.retriable_4xx);
    assert_eq!((all.remote_localities, all.ignore_previous_hosts), (true, Some(false)));
    let by_header = retries("{attempts: 1, retryOn: 'retriable-headers,envoy-ratelimited'}");
    let Retries::On(RetryPolicy { on, .. }) = by_header else { panic!() };
    assert!(on.headers_of_request);
    assert_eq!(on.headers, ["x-envoy-ratelimited".into()]);
    for (retries, start, words) in [
        ("{attempts: -1}", "E spec.http[0].retries.attempts", "is negative"),
        ("{attempts: 0, retryOn: 5xx}", "E spec.http[0].retries.attempts", "turns retries off"),
        ("{perTryTimeout: 1s}", "E spec.http[0].retries.attempts", "turns retries off"),
        ("{attempts: 1, perTryTimeout: 0s}", "E spec.http[0].retries.perTryTimeout", "at least 1ms"),
        ("{attempts: 1, retryOn: '5xx,whenever'}", "E spec.http[0].retries.retryOn", "\"whenever\""),
        ("{attempts: 1, retryOn: '700'}", "E spec.http[0].retries.retryOn", "\"700\""),
        (
            "{attempts: 1, retryOn: 'http3-post-connect-failure'}",
            "W spec.http[0].retries.retryOn",
            "no effect",
        ),
    ] {
        rule_says(&format!("retries: {retries}, {ROUTE}"), &[(start, words)]);
    }
}
