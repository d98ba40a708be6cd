//! Tests of matching, of precedence, of TLS and TCP rules, and of splits.

use std::{collections::BTreeMap, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::{
    balance::Draws,
    route::{
        Origin,
        cluster::ClusterKey,
        http::{Backend, HeaderOps},
        matching::FullRegex,
    },
    snapshot::Name,
};

fn regex(pattern: &str) -> StringMatch {
    StringMatch::Regex(FullRegex::new(pattern).unwrap())
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn rule(name: &str, matches: Vec<HttpMatch>) -> HttpRule {
    let origin = Origin {
        kind: "VirtualService".into(),
        name: Name::new("default", "web"),
        field: "spec.http[0]".into(),
        place: None,
    };
    HttpRule { name: Some(name.into()), matches, ..HttpRule::new(origin, Action::Passthrough) }
}

fn table(rules: Vec<HttpRule>) -> HttpTable {
    HttpTable::new(rules, Action::Passthrough)
}

struct Request {
    method: &'static str,
    scheme: &'static str,
    authority: &'static str,
    path: &'static str,
    query: Option<&'static str>,
    headers: Vec<(&'static str, &'static [u8])>,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            method: "GET",
            scheme: "http",
            authority: "web:80",
            path: "/",
            query: None,
            headers: Vec::new(),
        }
    }
}

impl Request {
    fn to(path: &'static str) -> Self {
        Self { path, ..Self::default() }
    }

    fn with(name: &'static str, value: &'static str) -> Self {
        Self { headers: vec![(name, value.as_bytes())], ..Self::default() }
    }

    fn view(&self) -> RequestView<'_> {
        RequestView {
            method: self.method,
            scheme: self.scheme,
            authority: self.authority,
            path: self.path,
            query: self.query,
            headers: &self.headers,
        }
    }

    fn is_matched_by(&self, conditions: &HttpMatch) -> bool {
        let labels = labels(&[("app", "client")]);
        conditions.holds(&self.view(), &ClientView { namespace: "default", labels: &labels })
    }
}

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<Arc<str>, Arc<str>> {
    pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

fn path(path: PathMatch) -> HttpMatch {
    HttpMatch { path: Some(path), ..HttpMatch::default() }
}

#[test]
fn s13_and_s118_paths_match_as_their_api_says() {
    let prefix = |text: &str, ignore_case| PathMatch::Prefix { prefix: text.into(), ignore_case };
    let exactly = |text: &str, ignore_case| PathMatch::Exact { path: text.into(), ignore_case };
    let cases: [(PathMatch, &[&str], &[&str]); 8] = [
        (exactly("/foo", false), &["/foo"], &["/foo/", "/Foo", "/foobar", "/"]),
        (exactly("/foo", true), &["/foo", "/FOO"], &["/FOO/"]),
        (prefix("/foo", false), &["/foo", "/foobar", "/foo/bar"], &["/Foo", "/fo", "/"]),
        (prefix("/foo", true), &["/fOObar", "/foo"], &["/fo", "/f\u{f6}o"]),
        (PathMatch::Segments("/foo".into()), &["/foo", "/foo/", "/foo/x"], &["/foobar", "/", "/Foo"]),
        (PathMatch::Segments("".into()), &["/", "/x", "/x/y"], &[]),
        (
            PathMatch::Regex(FullRegex::new("/v[12]/.*").unwrap()),
            &["/v1/", "/v2/x/y"],
            &["/v3/", "/x/v1/", "/v1"],
        ),
        (PathMatch::Regex(FullRegex::new("(?i)/a|/b").unwrap()), &["/A", "/b"], &["/ab", "/a/b"]),
    ];
    for (pattern, matched, unmatched) in cases {
        for text in matched {
            assert!(pattern.matches(text), "{pattern:?} {text}");
        }
        for text in unmatched {
            assert!(!pattern.matches(text), "{pattern:?} {text}");
        }
    }
}

#[test]
fn s14_headers_match_by_value_presence_and_absence() {
    let on = |value, inverted| HttpMatch {
        headers: vec![HeaderMatch { name: "end-user".into(), value, inverted }],
        ..HttpMatch::default()
    };
    // Conditions, then whether they hold for `jason`, for an empty header, and without it.
    let cases = [
        (on(exact("jason"), false), [true, false, false]),
        (on(exact("Jason"), false), [false, false, false]),
        (on(StringMatch::Prefix("ja".into()), false), [true, false, false]),
        (on(regex("j.*"), false), [true, false, false]),
        (on(regex("aso"), false), [false, false, false]),
        (on(regex("(?i)JASON"), false), [true, false, false]),
        (on(regex(".*"), false), [true, true, false]),
        (on(StringMatch::Present, false), [true, true, false]),
        (on(StringMatch::Present, true), [false, false, true]),
        (on(exact("jason"), true), [false, true, true]),
        (on(exact(""), true), [true, false, false]),
        (on(regex(".*"), true), [false, false, false]),
    ];
    let requests = [Request::with("end-user", "jason"), Request::with("end-user", ""), Request::default()];
    for (conditions, expected) in cases {
        for (request, expected) in requests.iter().zip(expected) {
            assert_eq!(request.is_matched_by(&conditions), expected, "{conditions:?} {:?}", request.headers);
        }
    }
}

#[test]
fn bytes_that_are_no_text_are_compared_but_match_no_pattern() {
    let request = Request { headers: vec![("x", b"a\xff")], ..Request::default() };
    let on = |value| HttpMatch {
        headers: vec![HeaderMatch { name: "x".into(), value, inverted: false }],
        ..HttpMatch::default()
    };
    assert!(request.is_matched_by(&on(StringMatch::Prefix("a".into()))));
    assert!(request.is_matched_by(&on(StringMatch::Present)));
    assert!(!request.is_matched_by(&on(regex("(?s).*"))));
}

#[test]
fn s96_repeated_headers_are_joined_before_they_are_matched() {
    let request = Request { headers: vec![("x", b"a"), ("x", b"b")], ..Request::default() };
    let on = |value| HttpMatch {
        headers: vec![HeaderMatch { name: "x".into(), value, inverted: false }],
        ..HttpMatch::default()
    };
    assert!(request.is_matched_by(&on(exact("a,b"))));
    assert!(!request.is_matched_by(&on(exact("a"))));
}

#[test]
fn method_scheme_and_authority_are_matched_as_they_were_sent() {
    let request = Request { method: "POST", authority: "Web.example:8080", ..Request::default() };
    let any = HttpMatch::default;
    assert!(request.is_matched_by(&HttpMatch { method: Some(exact("POST")), ..any() }));
    assert!(!request.is_matched_by(&HttpMatch { method: Some(exact("post")), ..any() }));
    assert!(request.is_matched_by(&HttpMatch { method: Some(regex("GET|POST")), ..any() }));
    assert!(!request.is_matched_by(&HttpMatch { scheme: Some(exact("https")), ..any() }));
    assert!(
        request.is_matched_by(&HttpMatch { authority: Some(StringMatch::Prefix("Web.".into())), ..any() })
    );
    assert!(!request.is_matched_by(&HttpMatch { authority: Some(exact("Web.example")), ..any() }));
}

#[test]
fn query_parameters_match_by_their_first_occurrence() {
    let request = Request { query: Some("v=2&flag&v=1"), ..Request::default() };
    let on = |name: &str, value| HttpMatch {
        query: vec![QueryMatch { name: name.into(), value }],
        ..HttpMatch::default()
    };
    assert!(request.is_matched_by(&on("v", exact("2"))));
    assert!(!request.is_matched_by(&on("v", exact("1"))));
    assert!(request.is_matched_by(&on("flag", StringMatch::Present)));
    assert!(!request.is_matched_by(&on("w", StringMatch::Present)));
    assert!(!Request::default().is_matched_by(&on("v", StringMatch::Present)));
}

#[test]
fn s12_source_labels_and_namespace_must_be_the_clients() {
    let request = Request::default();
    let meant = |namespace: Option<&str>, pairs: &[(&str, &str)]| {
        request.is_matched_by(&HttpMatch {
            source_namespace: namespace.map(Into::into),
            source_labels: labels(pairs),
            ..HttpMatch::default()
        })
    };
    assert!(meant(Some("default"), &[("app", "client")]));
    assert!(!meant(Some("other"), &[]));
    assert!(!meant(None, &[("app", "client"), ("version", "v1")]));
    assert!(!meant(None, &[("app", "other")]));
}

#[test]
fn s10_conditions_of_a_match_are_anded_matches_ored_and_the_first_rule_wins() {
    let method = |method| HttpMatch { method: Some(exact(method)), ..HttpMatch::default() };
    let both = HttpMatch {
        name: Some("both".into()),
        method: Some(exact("PUT")),
        headers: vec![HeaderMatch { name: "x".into(), value: exact("1"), inverted: false }],
        ..HttpMatch::default()
    };
    let table = table(vec![
        rule("first", vec![both, method("POST")]),
        rule("second", vec![path(PathMatch::Prefix { prefix: "/a".into(), ignore_case: false })]),
        rule("last", Vec::new()),
        rule("never", Vec::new()),
    ]);
    let labels = BTreeMap::new();
    let client = ClientView { namespace: "default", labels: &labels };
    let name_of = |request: Request| table.route(&request.view(), &client).unwrap().name().to_string();
    assert_eq!(name_of(Request { method: "PUT", ..Request::with("x", "1") }), "first.both");
    assert_eq!(name_of(Request { method: "PUT", ..Request::default() }), "last");
    assert_eq!(name_of(Request { method: "POST", ..Request::to("/a") }), "first");
    assert_eq!(name_of(Request::to("/abc")), "second");
    assert_eq!(name_of(Request::to("/b")), "last");
}

#[test]
fn without_a_rule_that_matches_the_tables_own_action_counts() {
    let respond = Action::Respond { status: 404, body: Arc::from([]), reason: "no_route".into() };
    let rules = vec![rule("a", vec![path(PathMatch::Segments("/a".into()))])];
    let table = HttpTable::new(rules, respond.clone());
    let labels = BTreeMap::new();
    let client = ClientView { namespace: "default", labels: &labels };
    let hit = table.route(&Request::to("/b").view(), &client);
    assert_eq!(hit, None);
    assert_eq!(*table.action(hit.as_ref()), respond);
    let request = Request::to("/a/b");
    let hit = table.route(&request.view(), &client).unwrap();
    assert_eq!((hit.rule_index, hit.match_index), (0, Some(0)));
    assert_eq!(hit.path_match(), Some(&PathMatch::Segments("/a".into())));
    assert_eq!(*table.action(Some(&hit)), Action::Passthrough);
}

fn stream_rule(field: &str, matches: Vec<StreamMatch>) -> StreamRule {
    let origin = Origin {
        kind: "VirtualService".into(),
        name: Name::new("default", "db"),
        field: field.into(),
        place: None,
    };
    StreamRule { origin: Arc::new(origin), matches, backends: Vec::new() }
}

#[test]
fn fact_15_server_names_match_by_plain_suffix_and_tls_without_a_rule_of_its_own_is_tcp() {
    let sni = |names: &[&str]| StreamMatch {
        sni: names.iter().map(|name| (*name).into()).collect(),
        ..StreamMatch::default()
    };
    let table = StreamTable {
        tls: vec![
            stream_rule("exact", vec![sni(&["login.example.com", "x.test"])]),
            stream_rule("wildcard", vec![sni(&["*.com"])]),
        ],
        tcp: vec![stream_rule("tcp", Vec::new())],
    };
    let labels = BTreeMap::new();
    let client = ClientView { namespace: "default", labels: &labels };
    let dialled = [10, 0, 0, 1].into();
    let field = |tls, sni| {
        table.route(&StreamView { tls, sni, dialled }, &client).map(|rule| rule.origin.field.to_string())
    };
    for (name, expected) in [
        ("login.example.com", "exact"),
        ("LOGIN.example.com.", "exact"),
        ("x.test", "exact"),
        ("example.com", "wildcard"),
        ("a.b.COM", "wildcard"),
        ("com", "tcp"),
        ("x.org", "tcp"),
    ] {
        assert_eq!(field(true, Some(name)).as_deref(), Some(expected), "{name}");
    }
    assert_eq!(field(true, None).as_deref(), Some("tcp"));
    assert_eq!(field(false, None).as_deref(), Some("tcp"));
    assert!(table.needs_sni());
}

#[test]
fn connections_match_by_subnet_and_by_client() {
    let table = StreamTable {
        tls: Vec::new(),
        tcp: vec![stream_rule(
            "subnet",
            vec![StreamMatch {
                subnets: vec!["10.1.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
                source_namespace: Some("default".into()),
                ..StreamMatch::default()
            }],
        )],
    };
    let labels = BTreeMap::new();
    let hits = |namespace, dialled: &str| {
        let stream = StreamView { tls: false, sni: None, dialled: dialled.parse().unwrap() };
        table.route(&stream, &ClientView { namespace, labels: &labels }).is_some()
    };
    assert!(hits("default", "10.1.2.3"));
    assert!(hits("default", "::ffff:10.1.2.3"));
    assert!(hits("default", "fd00::1"));
    assert!(!hits("default", "10.2.0.1"));
    assert!(!hits("other", "10.1.2.3"));
    assert!(!table.needs_sni());
}

fn backend(name: &str, weight: u32) -> WeightedBackend {
    WeightedBackend {
        weight,
        backend: Backend::Cluster(ClusterKey { service: Name::new("default", name), port: 80, subset: None }),
        request_headers: HeaderOps::default(),
        response_headers: HeaderOps::default(),
    }
}

#[test]
fn s17_one_destination_gets_everything() {
    for weight in [0, 1, 100] {
        let only = [backend("a", weight)];
        assert_eq!(split(&only, u64::MAX), Some(&only[0]));
    }
    assert_eq!(split(&[], 0), None);
}

proptest! {
    #[test]
    fn requests_are_split_in_the_ratio_of_the_weights(
        weights in prop::collection::vec(1_u32..1000, 1..6),
        seed in any::<u64>(),
    ) {
        let backends: Vec<_> = weights.iter().map(|weight| backend("a", *weight)).collect();
        let total: u32 = weights.iter().sum();
        let mut draws = Draws::new(seed);
        let mut counts = vec![0_u32; backends.len()];
        for _ in 0..20_000 {
            let picked = split(&backends, draws.word()).unwrap();
            let index = backends.iter().position(|own| std::ptr::eq(own, picked)).unwrap();
            counts[index] += 1;
        }
        for (count, weight) in counts.iter().zip(&weights) {
            let share = f64::from(*weight) / f64::from(total);
            // Six standard deviations of a binomial distribution.
            let slack = 6.0 * (share * (1.0 - share) / 20_000.0).sqrt() + 1e-9;
            let seen = f64::from(*count) / 20_000.0;
            prop_assert!((seen - share).abs() <= slack, "{} of {}: {}", weight, total, seen);
        }
    }

    #[test]
    fn the_rule_is_the_first_that_matches_on_its_own(
        prefixes in prop::collection::vec(prop::collection::vec("/[ab]{0,2}", 0..3), 0..6),
        asked in "/[ab]{0,3}",
    ) {
        let prefix = |text: &String| path(PathMatch::Prefix { prefix: text.as_str().into(), ignore_case: false });
        let rules: Vec<_> = prefixes.iter().map(|own| rule("r", own.iter().map(prefix).collect())).collect();
        let table = table(rules);
        let headers: Vec<(&str, &str)> = Vec::new();
        let request = RequestView {
            method: "GET", scheme: "http", authority: "web", path: &asked, query: None, headers: &headers,
        };
        let labels = BTreeMap::new();
        let client = ClientView { namespace: "default", labels: &labels };
        let expected = prefixes.iter().position(|own| own.is_empty() || own.iter().any(|p| asked.starts_with(p.as_str())));
        let hit = table.route(&request, &client);
        prop_assert_eq!(hit.map(|hit| hit.rule_index), expected);
        if let Some(hit) = hit {
            let own = &prefixes[hit.rule_index];
            prop_assert_eq!(hit.match_index, own.iter().position(|p| asked.starts_with(p.as_str())));
        }
    }
}
