//! Texts, what they are taken for, and what comes of them.

use proptest::prelude::*;

use super::*;

fn headers() -> Vec<(&'static str, &'static str)> {
    vec![("x-id", "seven"), ("x-two", "1"), ("x-two", "2"), ("x-path", "/a?b=c")]
}

fn response() -> Vec<(&'static str, &'static str)> {
    vec![("server", "nginx")]
}

/// What a text becomes on the way to the server, or with `answered` on the way back.
fn value(text: &str, answered: bool) -> Option<String> {
    let (headers, response) = (headers(), response());
    let facts = Facts {
        request: RequestView {
            method: "GET",
            scheme: "http",
            authority: "web.shop:80",
            path: "/p",
            query: Some("q=1"),
            headers: &headers,
        },
        response: answered.then_some((503, &response as &dyn Headers)),
        client: "10.1.2.3:4567".parse().unwrap(),
        dialled: "[fd00::1]:80".parse().unwrap(),
        upstream: answered.then(|| "10.9.9.9:8080".parse().unwrap()),
        protocol: "HTTP/1.1",
        started: Duration::new(1_709_210_096, 78_901_234),
        flags: "UF,URX",
        details: "via_upstream",
        route: "to-v1",
        host_name: "client",
    };
    match HeaderText::parse(text).unwrap() {
        HeaderText::Plain(text) => Some(text.to_string()),
        HeaderText::Template(template) => {
            template.value(&facts).map(|value| String::from_utf8(value).unwrap())
        }
    }
}

#[test]
fn variables_stand_for_what_is_known_of_the_request() {
    for (text, expected) in [
        ("%DOWNSTREAM_REMOTE_ADDRESS%", "10.1.2.3:4567"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "10.1.2.3"),
        ("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%", "10.1.2.3"),
        ("%DOWNSTREAM_REMOTE_PORT%", "4567"),
        ("%DOWNSTREAM_LOCAL_ADDRESS%", "[fd00::1]:80"),
        ("%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%", "fd00::1"),
        ("%DOWNSTREAM_LOCAL_PORT%", "80"),
        ("%REQ(X-Id)%", "seven"),
        ("%REQ(x-id):3%", "sev"),
        ("%REQ(x-id):0%x", "x"),
        ("%REQ(x-none?x-id)%", "seven"),
        ("%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/p?q=1"),
        ("%REQ(:AUTHORITY)%", "web.shop:80"),
        ("%REQ(:METHOD)% %REQ(:SCHEME)%", "GET http"),
        ("%REQ(x-two)%", "1"),
        ("%REQ_WITHOUT_QUERY(x-path)%", "/a"),
        ("%PROTOCOL%", "HTTP/1.1"),
        ("%ROUTE_NAME%@%HOSTNAME%", "to-v1@client"),
        ("%START_TIME%", "2024-02-29T12:34:56.078Z"),
        ("%START_TIME(%Y/%m/%d %H:%M:%S %a %b %e %j)%", "2024/02/29 12:34:56 Thu Feb 29 060"),
        ("%START_TIME(%s.%3f)%", "1709210096.078"),
        (
            "%START_TIME(%I%p %D %R %F %T %y %A %B %z %Z %% %f %E2S)%",
            "12PM 02/29/24 12:34 2024-02-29 12:34:56 24 Thursday February +0000 UTC % 078901234 56.07",
        ),
        ("100%%", "100%"),
        ("%%REQ(x-id)%%", "%REQ(x-id)%"),
        ("plain", "plain"),
        ("", ""),
    ] {
        assert_eq!(value(text, false).as_deref(), Some(expected), "{text}");
    }
}

#[test]
fn a_response_tells_more_and_what_stands_for_nothing_is_no_header() {
    for (text, before, after) in [
        ("%RESP(Server)%", None, Some("nginx")),
        ("%RESP(x?:STATUS)%", None, Some("503")),
        ("%RESPONSE_CODE%", None, Some("503")),
        ("%UPSTREAM_HOST%", None, Some("10.9.9.9:8080")),
        ("%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", None, Some("10.9.9.9")),
        ("%UPSTREAM_REMOTE_PORT%", None, Some("8080")),
        ("%RESPONSE_FLAGS%", Some("UF,URX"), Some("UF,URX")),
        ("%RESPONSE_CODE_DETAILS%", Some("via_upstream"), Some("via_upstream")),
        ("%REQ(x-none)%", None, None),
        ("%DOWNSTREAM_PEER_URI_SAN%%REQUESTED_SERVER_NAME%", None, None),
        ("a%REQ(x-none)%b", Some("ab"), Some("ab")),
    ] {
        assert_eq!(value(text, false).as_deref(), before, "{text}");
        assert_eq!(value(text, true).as_deref(), after, "{text}");
    }
}

#[test]
fn what_envoy_refuses_is_refused() {
    for text in [
        "100%",
        "50% off",
        "%REQ%",
        "%REQ()%",
        "%REQ(a b)%",
        "%REQ(a?b?c)%",
        "%REQ(x-id%",
        "%REQ(x-id)",
        "%REQ(x-id):%",
        "%REQ(x-id):x%",
        "%NO_SUCH_THING%",
        "%7C",
        "%req(x-id)%",
        "%PROTOCOL()%",
        "%START_TIME(%Q)%",
        "%START_TIME(%E)%",
        "%START_TIME(%3)%",
    ] {
        assert!(HeaderText::parse(text).is_err(), "{text}");
    }
    let unknown = HeaderText::parse("%NO_SUCH_THING%").unwrap_err().to_string();
    assert!(unknown.contains("%NO_SUCH_THING%"), "{unknown}");
}

#[test]
fn variables_that_never_have_a_value_are_told() {
    let text = HeaderText::parse("%REQ(a)%-%DURATION%-%DYNAMIC_METADATA(a:b)%-%START_TIME(%s)%").unwrap();
    assert_eq!(text.without_value(), ["DURATION", "DYNAMIC_METADATA"]);
    assert!(TemplateError::Stray { at: 3 }.to_string().contains('3'));
}

#[test]
fn a_value_that_clients_make_too_long_is_not_sent() {
    let long = "x".repeat(VALUE_MAX / 2 + 1);
    let headers = vec![("a", long.as_str())];
    let request = RequestView {
        method: "GET",
        scheme: "http",
        authority: "w",
        path: "/",
        query: None,
        headers: &headers,
    };
    let addr = "10.0.0.1:1".parse().unwrap();
    let facts = Facts {
        request,
        response: None,
        client: addr,
        dialled: addr,
        upstream: None,
        protocol: "HTTP/2",
        started: Duration::ZERO,
        flags: "-",
        details: "",
        route: "",
        host_name: "",
    };
    let len = |text: &str| {
        HeaderText::parse(text).unwrap().template().unwrap().value(&facts).map(|value| value.len())
    };
    assert_eq!(len("%REQ(a)%"), Some(long.len()));
    assert_eq!(len("%REQ(a)%%REQ(a)%"), None);
    assert_eq!(len("%REQ(a):5%%REQ(a):6%"), Some(11));
}

#[test]
fn a_text_is_written_down_so_that_it_is_read_as_the_same() {
    for text in ["plain", "100%%", "%REQ(a)%", "%%%PROTOCOL%"] {
        let text = HeaderText::parse(text).unwrap();
        let json = serde_json::to_string(&text).unwrap();
        assert_eq!(serde_json::from_str::<HeaderText>(&json).unwrap(), text, "{json}");
    }
    // What a resource wants to be taken literally stays that.
    let literal = HeaderText::from("%REQ(a)% 100%");
    let json = serde_json::to_string(&literal).unwrap();
    assert_eq!(serde_json::from_str::<HeaderText>(&json).unwrap(), literal);
    assert!(serde_json::from_str::<HeaderText>(r#"{"format": "%NO_SUCH%"}"#).is_err());
}

proptest! {
    #[test]
    fn any_text_is_taken_apart_or_refused(text in "[%A-Z()a-z:?0-9 é]{0,40}") {
        if let Ok(parsed) = HeaderText::parse(&text)
            && let HeaderText::Template(template) = &parsed
        {
            prop_assert_eq!(template.source(), text.as_str());
            parsed.without_value();
        }
    }

    #[test]
    fn doubled_signs_are_single_ones(text in "[a-z%]{0,20}") {
        let doubled = text.replace('%', "%%");
        prop_assert_eq!(HeaderText::parse(&doubled), Ok(HeaderText::from(text.as_str())));
    }

    #[test]
    fn days_follow_each_other(days in 0_u64..200_000) {
        let at = |days: u64| TimeFormat::parse("%Y %j %m %d").unwrap().apply(Duration::from_secs(days * 86_400));
        let (one, next) = (at(days), at(days + 1));
        prop_assert!(one < next, "{} {}", one, next);
    }
}
