//! Tests of paths, locations, header changes and authorities.

use super::*;
use crate::route::{
    http::{Action, SearchRegex},
    matching::FullRegex,
};

fn view<'a>(path: &'a str, query: Option<&'a str>, headers: &'a Vec<(&str, &str)>) -> RequestView<'a> {
    RequestView { method: "GET", scheme: "http", authority: "web.example:8080", path, query, headers }
}

fn prefix(text: &str) -> PathMatch {
    PathMatch::Prefix { prefix: text.into(), ignore_case: false }
}

fn pattern(pattern: &str, substitution: &str) -> PathRewrite {
    PathRewrite::Regex { pattern: SearchRegex::new(pattern).unwrap(), substitution: substitution.into() }
}

#[test]
fn s118_segments_are_replaced_without_doubling_or_losing_a_slash() {
    // Path, prefix, replacement, result; a prefix has no trailing slash once it is compiled.
    let cases = [
        ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
        ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
        ("/foo", "/foo", "/xyz", "/xyz"),
        ("/foo/", "/foo", "/xyz", "/xyz/"),
        ("/foo/bar", "/foo", "", "/bar"),
        ("/foo/bar", "/foo", "/", "/bar"),
        ("/foo/", "/foo", "", "/"),
        ("/foo", "/foo", "", "/"),
        ("/foo/", "/foo", "/", "/"),
        ("/foo", "/foo", "/", "/"),
        ("/bar", "", "/xyz", "/xyz/bar"),
        ("/", "", "/xyz", "/xyz/"),
    ];
    for (path, matched, new, expected) in cases {
        let rewrite = PathRewrite::MatchedPrefix(new.into());
        let matched = PathMatch::Segments(matched.into());
        assert_eq!(rewrite.apply(path, Some(&matched)), expected, "{path} {matched:?} {new}");
    }
}

#[test]
fn d9_a_matched_prefix_is_replaced_character_by_character() {
    let cases = [
        ("/foo/bar", Some(prefix("/foo/")), "/", "/bar"),
        ("/foo/bar", Some(prefix("/foo")), "/", "//bar"),
        ("/foobar", Some(prefix("/foo")), "/x", "/xbar"),
        ("/foo", Some(prefix("/foo")), "", "/"),
        ("/foo/x", Some(prefix("/foo/")), "", "/x"),
        ("/FOO/x", Some(PathMatch::Prefix { prefix: "/foo".into(), ignore_case: true }), "/y", "/y/x"),
        ("/foo", None, "/x/", "/x/foo"),
        ("/foo", Some(PathMatch::Exact { path: "/foo".into(), ignore_case: false }), "/x", "/x"),
        ("/foo/y", Some(PathMatch::Regex(FullRegex::new("/foo.*").unwrap())), "/x", "/x"),
    ];
    for (path, matched, new, expected) in cases {
        let rewrite = PathRewrite::MatchedPrefix(new.into());
        assert_eq!(rewrite.apply(path, matched.as_ref()), expected, "{path} {matched:?} {new}");
    }
}

#[test]
fn d9_a_pattern_is_replaced_wherever_it_is_found() {
    let cases = [
        (
            "/service/foo/v1/api",
            pattern("^/service/([^/]+)(/.*)$", r"\2/instance/\1"),
            "/v1/api/instance/foo",
        ),
        ("/xxx/one/yyy/one/zzz", pattern("one", "two"), "/xxx/two/yyy/two/zzz"),
        ("/xxx/one/yyy/one/zzz", pattern("^(.*?)one(.*)$", r"\1two\2"), "/xxx/two/yyy/one/zzz"),
        ("/aaa/XxX/bbb", pattern("(?i)/xxx/", "/yyy/"), "/aaa/yyy/bbb"),
        ("/a", pattern("b", "c"), "/a"),
        ("/a", pattern("a", r"\0\0\\"), r"/aa\"),
        ("/a", pattern("(a)|(b)", r"x\2"), "/x"),
        ("/a", pattern("^/a$", "b"), "/b"),
        ("/abc", pattern("", "-"), "/-/-a-b-c-"),
        ("/a", pattern("/a", ""), "/"),
        ("/é", pattern("é", "e"), "/e"),
        ("/a", pattern("a", r"\9\"), r"/\"),
    ];
    for (path, rewrite, expected) in cases {
        assert_eq!(rewrite.apply(path, None), expected, "{path} {rewrite:?}");
    }
}

#[test]
fn a_pattern_that_blows_a_path_up_changes_nothing() {
    let long = format!("/{}", "a".repeat(1000));
    let substitution = "b".repeat(1000);
    assert_eq!(pattern("a", &substitution).apply(&long, None), long);
    assert!(matches!(pattern("a", &substitution).apply(&long, None), Cow::Borrowed(_)));
}

#[test]
fn a_rewrite_keeps_the_query_unless_it_brings_one() {
    let none = Vec::new();
    let rewrite = |new: &str| Rewrite { authority: None, path: Some(PathRewrite::Full(new.into())) };
    let request = view("/a", Some("q=1"), &none);
    assert_eq!(rewrite("/b").path_and_query(&request, None).as_deref(), Some("/b?q=1"));
    assert_eq!(rewrite("/b?x=2").path_and_query(&request, None).as_deref(), Some("/b?x=2"));
    assert_eq!(Rewrite::default().path_and_query(&request, None), None);
    let empty = view("/a", Some(""), &none);
    assert_eq!(rewrite("/b").path_and_query(&empty, None).as_deref(), Some("/b?"));
}

#[test]
fn s19_locations_leave_out_the_port_of_their_scheme() {
    let none = Vec::new();
    let redirect = |scheme: Option<&str>, authority: Option<&str>, port, path| Redirect {
        status: 301,
        scheme: scheme.map(Into::into),
        authority: authority.map(Into::into),
        port,
        path,
    };
    let full = |path: &str| Some(PathRewrite::Full(path.into()));
    use RedirectPort::*;
    let cases = [
        (redirect(None, None, OfScheme, full("/new")), "http://web.example/new?q=1"),
        (redirect(Some("https"), None, OfScheme, None), "https://web.example/a/b?q=1"),
        (redirect(None, None, OfRequest, None), "http://web.example:8080/a/b?q=1"),
        (redirect(None, Some("new.example"), Number(80), None), "http://new.example/a/b?q=1"),
        (redirect(Some("https"), None, Number(80), None), "https://web.example:80/a/b?q=1"),
        (redirect(Some("https"), None, Number(443), None), "https://web.example/a/b?q=1"),
        (redirect(None, None, Number(443), None), "http://web.example:443/a/b?q=1"),
        (redirect(None, None, OfScheme, full("/new?own")), "http://web.example/new?own"),
        (
            redirect(None, None, OfScheme, Some(PathRewrite::MatchedPrefix("/c".into()))),
            "http://web.example/c/b?q=1",
        ),
    ];
    let matched = PathMatch::Segments("/a".into());
    for (redirect, expected) in cases {
        let location = redirect.location(&view("/a/b", Some("q=1"), &none), Some(&matched), 8080);
        assert_eq!(location, expected, "{redirect:?}");
    }
}

#[test]
fn s19_a_virtual_services_location_keeps_the_port_that_the_client_wrote() {
    let none = Vec::new();
    let redirect = |scheme: Option<&str>, authority: Option<&str>| Redirect {
        status: 301,
        scheme: scheme.map(Into::into),
        authority: authority.map(Into::into),
        port: RedirectPort::OfHost,
        path: Some(PathRewrite::Full("/new".into())),
    };
    for (asked, scheme, authority, expected) in [
        ("reviews:9080", None, None, "http://reviews:9080/new"),
        ("reviews:9080", Some("https"), None, "https://reviews:9080/new"),
        ("reviews:80", Some("https"), None, "https://reviews/new"),
        ("reviews:443", Some("https"), None, "https://reviews:443/new"),
        ("reviews:80", None, None, "http://reviews:80/new"),
        ("reviews:80", Some("http"), None, "http://reviews:80/new"),
        ("reviews", Some("https"), None, "https://reviews/new"),
        ("reviews:9080", None, Some("other.example"), "http://other.example/new"),
        ("reviews:9080", None, Some("other.example:81"), "http://other.example:81/new"),
        ("[fd00::1]:9080", None, None, "http://[fd00::1]:9080/new"),
    ] {
        let request = RequestView { authority: asked, ..view("/", None, &none) };
        assert_eq!(redirect(scheme, authority).location(&request, None, 7), expected, "{asked} {scheme:?}");
    }
}

#[test]
fn locations_keep_the_brackets_of_addresses() {
    let none = Vec::new();
    let request = RequestView { authority: "[fd00::1]:8080", ..view("/", None, &none) };
    let redirect =
        Redirect { status: 302, scheme: None, authority: None, port: RedirectPort::OfRequest, path: None };
    assert_eq!(redirect.location(&request, None, 8080), "http://[fd00::1]:8080/");
}

fn ops(set: &[(&str, &str)], add: &[(&str, &str)], remove: &[&str], authority: Option<&str>) -> HeaderOps {
    let pairs = |pairs: &[(&str, &str)]| pairs.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect();
    HeaderOps {
        set: pairs(set),
        add: pairs(add),
        remove: remove.iter().map(|name| (*name).into()).collect(),
        authority: authority.map(Into::into),
    }
}

fn backend(request_headers: HeaderOps, response_headers: HeaderOps) -> WeightedBackend {
    WeightedBackend {
        weight: 1,
        backend: crate::route::http::Backend::Broken { status: 503, reason: "".into() },
        request_headers,
        response_headers,
    }
}

fn rule(request_headers: HeaderOps, response_headers: HeaderOps, authority: Option<&str>) -> HttpRule {
    let origin = crate::route::Origin {
        kind: "VirtualService".into(),
        name: crate::snapshot::Name::new("a", "b"),
        field: "".into(),
        place: None,
    };
    HttpRule {
        request_headers,
        response_headers,
        rewrite: Rewrite { authority: authority.map(Into::into), path: None },
        ..HttpRule::new(origin, Action::Passthrough)
    }
}

#[test]
fn s18_headers_are_removed_then_set_then_added() {
    let ops = ops(&[("a", "1"), ("b", "2")], &[("a", "3")], &["a", "c"], Some("other"));
    let edits: Vec<_> = ops.edits().collect();
    let [one, two, three] = ["1", "2", "3"].map(HeaderText::from);
    let expected = [
        HeaderEdit::Remove("a"),
        HeaderEdit::Remove("c"),
        HeaderEdit::Set("a", &one),
        HeaderEdit::Set("b", &two),
        HeaderEdit::Add("a", &three),
    ];
    assert_eq!(edits, expected);
}

#[test]
fn the_backends_changes_lie_inside_the_rules() {
    let rule = rule(ops(&[("x", "rule")], &[], &[], None), ops(&[("y", "rule")], &[], &[], None), None);
    let backend = backend(ops(&[("x", "backend")], &[], &[], None), ops(&[("y", "backend")], &[], &[], None));
    let request: Vec<_> = rule.request_edits(&backend).collect();
    let [of_rule, of_backend] = ["rule", "backend"].map(HeaderText::from);
    assert_eq!(request, [HeaderEdit::Set("x", &of_rule), HeaderEdit::Set("x", &of_backend)]);
    let response: Vec<_> = rule.response_edits(Some(&backend)).collect();
    assert_eq!(response, [HeaderEdit::Set("y", &of_backend), HeaderEdit::Set("y", &of_rule)]);
}

#[test]
fn s18_of_several_authorities_the_rewrites_wins_then_the_rules() {
    let header = |authority| ops(&[], &[], &[], authority);
    let none = || header(None);
    let with = |rewrite, own, theirs| {
        let backend = backend(header(theirs), none());
        rule(header(own), none(), rewrite).new_authority(&backend).map(|authority| authority.to_string())
    };
    assert_eq!(with(Some("r"), Some("h"), Some("b")).as_deref(), Some("r"));
    assert_eq!(with(None, Some("h"), Some("b")).as_deref(), Some("h"));
    assert_eq!(with(None, None, Some("b")).as_deref(), Some("b"));
    assert_eq!(with(None, None, None), None);
}
