//! Tests of decisions about preflights and of the headers of answers.

use std::time::Duration;

use super::*;
use crate::route::matching::FullRegex;

fn cors() -> Cors {
    Cors {
        origins: vec![
            StringMatch::Exact("https://a.example".into()),
            StringMatch::Prefix("https://b.".into()),
            StringMatch::Regex(FullRegex::new(r"https://.*\.c\.example").unwrap()),
        ],
        methods: vec!["GET".into(), "POST".into()],
        headers: vec!["x-one".into(), "x-two".into()],
        expose: vec!["x-shown".into()],
        max_age: Some(Duration::from_millis(86_400_999)),
        credentials: Some(true),
        answer_unmatched_preflights: false,
    }
}

fn request<'a>(method: &'a str, headers: &'a Vec<(&str, &str)>) -> RequestView<'a> {
    RequestView { method, scheme: "http", authority: "web", path: "/", query: None, headers }
}

fn texts<'a>(headers: impl Iterator<Item = (&'static str, Cow<'a, [u8]>)>) -> Vec<String> {
    headers.map(|(name, value)| format!("{name}: {}", value.escape_ascii())).collect()
}

#[test]
fn s22_a_preflight_is_options_with_an_origin_and_a_wanted_method() {
    use CorsDecision::*;
    let asked = ("access-control-request-method", "PUT");
    let known = ("origin", "https://a.example");
    let cases = [
        ("OPTIONS", vec![known, asked], Preflight),
        ("OPTIONS", vec![("origin", "https://b.anything"), asked], Preflight),
        ("OPTIONS", vec![("origin", "https://x.c.example"), asked], Preflight),
        ("OPTIONS", vec![("origin", "https://x.c.example.evil"), asked], Forward),
        ("OPTIONS", vec![("origin", "https://A.example"), asked], Forward),
        ("OPTIONS", vec![known], Share),
        ("OPTIONS", vec![known, ("access-control-request-method", "")], Share),
        ("OPTIONS", vec![asked], Forward),
        ("GET", vec![known, asked], Share),
        ("GET", vec![known], Share),
        ("GET", vec![("origin", "https://other.example")], Forward),
        ("GET", vec![("origin", "")], Forward),
        ("GET", vec![], Forward),
    ];
    for (method, headers, expected) in cases {
        assert_eq!(cors().decide(&request(method, &headers)), expected, "{method} {headers:?}");
    }
}

#[test]
fn s22_an_unmatched_preflight_is_answered_only_if_it_is_asked_for() {
    let cors = Cors { answer_unmatched_preflights: true, ..cors() };
    let headers = vec![("origin", "https://other.example"), ("access-control-request-method", "GET")];
    assert_eq!(cors.decide(&request("OPTIONS", &headers)), CorsDecision::EmptyPreflight);
    assert_eq!(cors.decide(&request("GET", &headers)), CorsDecision::Forward);
}

#[test]
fn an_exact_star_allows_every_origin() {
    let cors = Cors { origins: vec![StringMatch::Exact("*".into())], ..Cors::default() };
    let headers = vec![("origin", "null")];
    assert_eq!(cors.decide(&request("GET", &headers)), CorsDecision::Share);
    assert_eq!(
        texts(cors.response_headers(&request("GET", &headers))),
        ["access-control-allow-origin: null"]
    );
}

#[test]
fn s22_answers_echo_the_origin_and_say_what_is_allowed() {
    let headers = vec![("origin", "https://a.example"), ("access-control-request-method", "GET")];
    let request = request("OPTIONS", &headers);
    assert_eq!(
        texts(cors().preflight_headers(&request)),
        [
            "access-control-allow-origin: https://a.example",
            "access-control-allow-credentials: true",
            "access-control-allow-methods: GET,POST",
            "access-control-allow-headers: x-one,x-two",
            "access-control-max-age: 86400",
        ]
    );
    assert_eq!(
        texts(cors().response_headers(&request)),
        [
            "access-control-allow-origin: https://a.example",
            "access-control-allow-credentials: true",
            "access-control-expose-headers: x-shown",
        ]
    );
}

#[test]
fn credentials_are_mentioned_only_when_they_are_allowed() {
    for credentials in [None, Some(false)] {
        let cors = Cors { credentials, ..cors() };
        let headers = vec![("origin", "https://a.example")];
        let lines = texts(cors.response_headers(&request("GET", &headers)));
        assert!(lines.iter().all(|line| !line.contains("credentials")), "{lines:?}");
    }
}

#[test]
fn a_star_becomes_what_was_asked_for_when_credentials_are_allowed() {
    let headers = vec![
        ("origin", "https://a.example"),
        ("access-control-request-method", "PUT"),
        ("access-control-request-headers", "x-y"),
    ];
    let star = Cors { methods: vec!["*".into()], headers: vec!["*".into()], ..cors() };
    let lines = texts(star.preflight_headers(&request("OPTIONS", &headers)));
    assert!(lines.contains(&"access-control-allow-methods: PUT".to_owned()), "{lines:?}");
    assert!(lines.contains(&"access-control-allow-headers: x-y".to_owned()), "{lines:?}");
    let exposing = Cors { expose: vec!["*".into()], ..star.clone() };
    let lines = texts(exposing.response_headers(&request("GET", &headers)));
    assert!(lines.iter().all(|line| !line.contains("expose")), "{lines:?}");
    let lines =
        texts(Cors { credentials: Some(false), ..exposing }.response_headers(&request("GET", &headers)));
    assert!(lines.contains(&"access-control-expose-headers: *".to_owned()), "{lines:?}");
    let open = Cors { credentials: None, ..star };
    let lines = texts(open.preflight_headers(&request("OPTIONS", &headers)));
    assert!(lines.contains(&"access-control-allow-methods: *".to_owned()), "{lines:?}");
}
