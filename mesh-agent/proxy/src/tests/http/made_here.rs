//! What rules change of responses that no server gave.

use mesh_core::route::{
    http::{
        Abort, Action, Backend, Cors, Fault, HeaderOps, HttpRule, Millionths, Redirect, RedirectPort,
        WeightedBackend,
    },
    matching::{HttpMatch, PathMatch, StringMatch},
    variables::HeaderText,
};

use super::fixture::{Client, backend, echo, publish, rule, test};

const ORIGIN: &str = "Origin: http://a.example\r\n";

fn at(path: &str, rule: HttpRule) -> HttpRule {
    let path = Some(PathMatch::Prefix { prefix: path.into(), ignore_case: false });
    HttpRule { matches: vec![HttpMatch { path, ..HttpMatch::default() }], ..rule }
}

fn set(name: &str, value: &str) -> HeaderOps {
    HeaderOps { set: vec![(name.into(), HeaderText::parse(value).unwrap())], ..HeaderOps::default() }
}

fn answer(status: u16, body: &'static str) -> HttpRule {
    rule(Action::Respond { status, body: body.as_bytes().into(), reason: "direct_response".into() })
}

fn shared(rule: HttpRule) -> HttpRule {
    let origins = vec![StringMatch::Exact("http://a.example".into())];
    HttpRule { cors: Some(Cors { origins, ..Cors::default() }), ..rule }
}

#[test]
fn redirects_and_direct_responses_have_the_headers_of_their_rule() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let mut moved = at(
            "/a",
            rule(Action::Redirect(Redirect {
                status: 301,
                scheme: None,
                authority: Some("there.example".into()),
                port: RedirectPort::OfScheme,
                path: None,
            })),
        );
        moved.response_headers = set("x-moved", "%RESPONSE_CODE% %REQ(x-kept)% %REQ(:path)%");
        let mut json = shared(answer(203, "{}"));
        json.response_headers = set("content-type", "application/json");
        publish(&world, vec![moved, json], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let reply = client.ask("GET", "/a", "X-Kept: 1\r\n", "").await;
        assert_eq!((reply.status, reply.header("location")), (301, Some("http://there.example/a")));
        assert_eq!(reply.header("x-moved"), Some("301 1 /a"));
        let reply = client.ask("GET", "/b", ORIGIN, "").await;
        assert_eq!((reply.status, &*reply.body), (203, "{}"));
        assert_eq!(reply.head.to_ascii_lowercase().matches("content-type").count(), 1, "{}", reply.head);
        assert_eq!(reply.header("content-type"), Some("application/json"));
        assert_eq!(reply.header("access-control-allow-origin"), Some("http://a.example"));
        // Its client looks for a status only in what is gRPC.
        let reply = client.ask("POST", "/b", "Content-Type: application/grpc\r\n", "").await;
        assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/grpc")));
        assert!(reply.header("grpc-status").is_some(), "{}", reply.head);
        assert_eq!(seen.count(), 0);
    });
}

#[test]
fn faults_and_missing_backends_are_shared_with_allowed_origins_and_have_the_headers_of_rule_and_backend() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let to = |to: Backend| {
            let inner = WeightedBackend { response_headers: set("x-backend", "b"), ..backend("web", 1) };
            let mut made = shared(rule(Action::Forward(vec![WeightedBackend { backend: to, ..inner }])));
            made.response_headers = set("x-rule", "r");
            made
        };
        let mut faulty = at("/faulty", to(backend("web", 1).backend));
        faulty.fault = Some(Fault { delay: None, abort: Some((Millionths::ALL, Abort::Http(555))) });
        let broken = to(Backend::Broken { status: 500, reason: "no_backend".into() });
        publish(&world, vec![faulty, broken], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        for (path, status) in [("/faulty", 555), ("/broken", 500)] {
            let reply = client.ask("GET", path, ORIGIN, "").await;
            assert_eq!(reply.status, status);
            assert_eq!(reply.header("access-control-allow-origin"), Some("http://a.example"), "{path}");
            assert_eq!((reply.header("x-rule"), reply.header("x-backend")), (Some("r"), Some("b")), "{path}");
        }
        assert_eq!(seen.count(), 0);
    });
}
