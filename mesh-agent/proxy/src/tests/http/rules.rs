//! What rules do to requests and responses.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::Response;
use mesh_core::route::{
    HostPort, Origin, Routes,
    cluster::{Algorithm, Balancing, Cluster, ClusterKey, ConnectionPool, HashKey, HashTable, TrafficPolicy},
    defaults::{DefaultClusters, MeshDefaults},
    http::{
        Abort, Action, Backend, Cors, Fault, HeaderOps, HttpRule, HttpTable, Millionths, PathRewrite,
        Redirect, RedirectPort, RetryOn, RetryPolicy, Rewrite, WeightedBackend,
    },
    matching::{HeaderMatch, HttpMatch, PathMatch, StringMatch},
    normalize::PathNormalization,
    scope::{EgressHost, EgressListener, EgressProxy, InboundPools, OutboundPolicy, Scoped, SidecarScope},
    variables::HeaderText,
};
use mesh_core::snapshot::{Mesh, Name};
use tokio::time::Instant;

use super::fixture::{
    APART, Client, HOST, backend, cluster, echo, forward, full, no_route, publish, publish_mesh,
    publish_routes, rule, server, test,
};
use crate::{
    http::preview::{AskedRequest, preview},
    metrics::http::Refusal,
    tests::fixture::eventually,
};

fn prefix(path: &str) -> HttpMatch {
    HttpMatch {
        path: Some(PathMatch::Prefix { prefix: path.into(), ignore_case: false }),
        ..HttpMatch::default()
    }
}

#[test]
fn a_header_decides_between_two_services_and_a_request_nothing_matches_gets_404() {
    test(|world| async move {
        let (one, _) = echo("one").await;
        let (two, _) = echo("two").await;
        let mut for_jason = rule(Action::Forward(vec![backend("two", 1)]));
        for_jason.matches = vec![HttpMatch {
            headers: vec![HeaderMatch {
                name: "end-user".into(),
                value: StringMatch::Exact("jason".into()),
                inverted: false,
            }],
            ..HttpMatch::default()
        }];
        let mut for_all = forward();
        for_all.matches = vec![prefix("/api")];
        publish(&world, vec![for_jason, for_all], &[("web", one), ("two", two)]);
        let mut client = Client::connect(&world).await;
        assert_eq!(client.ask("GET", "/", "End-User: jason\r\n", "").await.header("x-server"), Some("two"));
        assert_eq!(client.get("/api/x").await.header("x-server"), Some("one"));
        assert_eq!(client.get("/other").await.status, 404);
        // Dots cannot lead around a rule.
        assert_eq!(client.get("/api/../other").await.status, 404);
    });
}

#[test]
fn weights_share_requests_of_one_connection() {
    test(|world| async move {
        let (one, first) = echo("one").await;
        let (two, second) = echo("two").await;
        let split = rule(Action::Forward(vec![backend("web", 50), backend("two", 50)]));
        publish(&world, vec![split], &[("web", one), ("two", two)]);
        let mut client = Client::connect(&world).await;
        for _ in 0..200 {
            assert_eq!(client.get("/").await.status, 200);
        }
        // One in ten million runs of fair draws falls outside.
        assert!((60..140).contains(&first.count()), "{}", first.count());
        assert_eq!(first.count() + second.count(), 200);
    });
}

#[test]
fn paths_authorities_and_headers_are_changed_on_the_way() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let mut changed = forward();
        changed.matches = vec![prefix("/old")];
        changed.rewrite = Rewrite {
            authority: Some("inner.example".into()),
            path: Some(PathRewrite::MatchedPrefix("/new".into())),
        };
        changed.request_headers = HeaderOps {
            set: vec![("x-set".into(), "1".into())],
            remove: vec!["x-gone".into()],
            ..HeaderOps::default()
        };
        let response = HeaderOps { add: vec![("x-added".into(), "2".into())], ..HeaderOps::default() };
        changed.action =
            Action::Forward(vec![WeightedBackend { response_headers: response, ..backend("web", 1) }]);
        publish(&world, vec![changed], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let reply = client.ask("GET", "/old/x?q=1", "X-Gone: 1\r\n", "").await;
        assert_eq!(reply.body, "GET /new/x?q=1 ");
        assert_eq!(reply.header("x-added"), Some("2"));
        let head = seen.last();
        assert_eq!(head.headers["host"], "inner.example");
        assert_eq!(head.headers["x-set"], "1");
        assert_eq!(head.headers["x-envoy-original-path"], "/old/x?q=1");
        assert!(!head.headers.contains_key("x-gone"));
    });
}

#[test]
fn s15_headers_say_what_is_known_of_the_exchange_and_how_its_route_is_called() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let text = |text: &str| HeaderText::parse(text).unwrap();
        let mut changed = HttpRule { name: Some("to-one".into()), ..forward() };
        changed.matches = vec![prefix("/none"), HttpMatch { name: Some("by-a".into()), ..prefix("/a") }];
        changed.request_headers = HeaderOps {
            set: vec![
                ("x-client".into(), text("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%")),
                ("x-kept".into(), text("%REQ(x-none)%")),
                ("x-swapped".into(), text("%REQ(x-kept)%")),
            ],
            add: vec![("x-how".into(), text("%PROTOCOL% %REQ(:path)% %ROUTE_NAME%"))],
            ..HeaderOps::default()
        };
        changed.response_headers = HeaderOps {
            set: vec![
                ("x-by".into(), text("%UPSTREAM_HOST%")),
                ("x-code".into(), text("%RESPONSE_CODE% %RESPONSE_FLAGS%")),
                ("x-asked".into(), text("%REQ(x-kept)%")),
            ],
            ..HeaderOps::default()
        };
        publish(&world, vec![changed], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let reply = client.ask("GET", "/a?b=c", "X-Kept: 1\r\n", "").await;
        let head = seen.last();
        assert_eq!(head.headers["x-client"], "127.0.0.1");
        assert_eq!(head.headers["x-kept"], "1", "a variable without a value changes nothing");
        assert_eq!(head.headers["x-swapped"], "1");
        assert_eq!(head.headers["x-how"], "HTTP/1.1 /a?b=c to-one.by-a");
        assert_eq!(reply.header("x-by"), Some(addr.to_string().as_str()));
        assert_eq!(reply.header("x-code"), Some("200 -"));
        assert_eq!(reply.header("x-asked"), Some("1"));
    });
}

#[test]
fn redirects_and_direct_responses_are_answered_here() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let mut moved = rule(Action::Redirect(Redirect {
            status: 301,
            scheme: None,
            authority: Some("there.example".into()),
            port: RedirectPort::OfScheme,
            path: Some(PathRewrite::Full("/moved".into())),
        }));
        moved.matches = vec![prefix("/a")];
        let teapot = rule(Action::Respond {
            status: 418,
            body: Arc::from(&b"short and stout"[..]),
            reason: "direct_response".into(),
        });
        publish(&world, vec![moved, teapot], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let reply = client.get("/a?x=y").await;
        assert_eq!((reply.status, reply.header("location")), (301, Some("http://there.example/moved?x=y")));
        let reply = client.get("/b").await;
        assert_eq!((reply.status, &*reply.body), (418, "short and stout"));
        assert_eq!(seen.count(), 0);
    });
}

#[test]
fn faults_delay_and_abort() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let mut faulty = forward();
        faulty.fault = Some(Fault {
            delay: Some((Millionths::ALL, Duration::from_millis(150))),
            abort: Some((Millionths::ALL, Abort::Http(555))),
        });
        publish(&world, vec![faulty.clone()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let begun = Instant::now();
        let reply = client.get("/").await;
        assert_eq!((reply.status, &*reply.body), (555, "fault filter abort"));
        assert!(begun.elapsed() >= Duration::from_millis(150));
        faulty.fault = Some(Fault { delay: None, abort: Some((Millionths::ALL, Abort::Grpc(14))) });
        publish(&world, vec![faulty], &[("web", addr)]);
        let reply = client.ask("POST", "/", "Content-Type: application/grpc\r\n", "").await;
        assert_eq!((reply.status, reply.header("grpc-status")), (200, Some("14")));
        assert_eq!(seen.count(), 0);
    });
}

#[test]
fn preflights_are_answered_here_and_responses_are_shared_with_allowed_origins() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let mut shared = forward();
        shared.cors = Some(Cors {
            origins: vec![StringMatch::Exact("http://a.example".into())],
            methods: vec!["GET".into()],
            ..Cors::default()
        });
        publish(&world, vec![shared], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let preflight = "Origin: http://a.example\r\nAccess-Control-Request-Method: GET\r\n";
        let reply = client.ask("OPTIONS", "/", preflight, "").await;
        assert_eq!((reply.status, reply.header("access-control-allow-methods")), (200, Some("GET")));
        assert_eq!(seen.count(), 0);
        let reply = client.ask("GET", "/", "Origin: http://a.example\r\n", "").await;
        assert_eq!(reply.header("access-control-allow-origin"), Some("http://a.example"));
        let reply = client.ask("GET", "/", "Origin: http://b.example\r\n", "").await;
        assert_eq!(reply.header("access-control-allow-origin"), None);
    });
}

#[test]
fn a_preflight_is_aborted_before_it_is_answered_as_any_request_is() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        let mut failing = forward();
        failing.cors = Some(Cors {
            origins: vec![StringMatch::Exact("http://a.example".into())],
            methods: vec!["GET".into()],
            ..Cors::default()
        });
        failing.fault = Some(Fault { delay: None, abort: Some((Millionths::ALL, Abort::Http(418))) });
        publish(&world, vec![failing], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let preflight = "Origin: http://a.example\r\nAccess-Control-Request-Method: GET\r\n";
        let reply = client.ask("OPTIONS", "/", preflight, "").await;
        assert_eq!((reply.status, reply.header("access-control-allow-methods")), (418, None));
        assert_eq!(seen.count(), 0);
    });
}

#[test]
fn a_backend_that_does_not_exist_fails_its_share() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        let broken = Backend::Broken { status: 500, reason: "no_backend".into() };
        let mut first = rule(Action::Forward(vec![WeightedBackend { backend: broken, ..backend("web", 1) }]));
        first.matches = vec![prefix("/broken")];
        let gone = rule(Action::Forward(vec![backend("gone", 1)]));
        publish(&world, vec![first, gone], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        assert_eq!(client.get("/broken").await.status, 500);
        assert_eq!(client.get("/").await.status, 503);
    });
}

#[test]
fn a_new_route_counts_for_the_next_request_of_a_connection() {
    test(|world| async move {
        let (one, _) = echo("one").await;
        let (two, _) = echo("two").await;
        publish(&world, vec![forward()], &[("web", one), ("two", two)]);
        let mut client = Client::connect(&world).await;
        assert_eq!(client.get("/").await.header("x-server"), Some("one"));
        publish(&world, vec![rule(Action::Forward(vec![backend("two", 1)]))], &[("web", one), ("two", two)]);
        assert_eq!(client.get("/").await.header("x-server"), Some("two"));
    });
}

#[test]
fn copies_go_to_mirrors_and_their_answers_nowhere() {
    test(|world| async move {
        let (one, _) = echo("one").await;
        let (two, copies) = echo("two").await;
        let mut mirrored = forward();
        mirrored.mirrors =
            vec![mesh_core::route::http::Mirror { backend: cluster("two"), share: Millionths::ALL }];
        publish(&world, vec![mirrored], &[("web", one), ("two", two)]);
        let mut client = Client::connect(&world).await;
        let reply = client.ask("POST", "/x", "", "body").await;
        assert_eq!((reply.header("x-server"), &*reply.body), (Some("one"), "POST /x body"));
        eventually(|| copies.count(), |count| *count == 1).await;
        assert_eq!(copies.requests.borrow()[0].1, "body");
    });
}

#[test]
fn s9_the_host_that_is_asked_for_counts_before_the_address_that_was_dialled() {
    test(|world| async move {
        let (one, _) = echo("one").await;
        let (two, _) = echo("two").await;
        publish(&world, vec![rule(Action::Forward(vec![backend("web", 1)]))], &[("web", one), ("two", two)]);
        let mut client = Client::connect(&world).await;
        for (host, server) in [
            ("two", "two"),
            ("two.default:80", "two"),
            ("TWO.default.svc.cluster.local.", "two"),
            ("10.96.0.2", "two"),
            ("unknown.example", "one"),
        ] {
            client.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
            assert_eq!(client.reply().await.header("x-server"), Some(server), "{host}");
        }
        // An address of nobody, at a port that rules are about.
        world.dial("192.0.2.1:80".parse().unwrap());
        let mut client = Client::connect(&world).await;
        for (host, server) in [("two", "two"), ("web", "one")] {
            client.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
            assert_eq!(client.reply().await.header("x-server"), Some(server), "{host}");
        }
    });
}

#[test]
fn s8_what_nothing_describes_goes_as_dialled_or_is_refused_as_the_mesh_says() {
    test(|world| async move {
        let (addr, seen) = server("outside", |parts, _| {
            let status = if parts.uri.path() == "/fails" { 503 } else { 200 };
            Response::builder().status(status).body(full("")).unwrap()
        })
        .await;
        let mesh = |outbound| {
            // Retries of the mesh are for what it knows.
            let on = RetryOn { server_error: true, ..RetryOn::default() };
            let retries = Some(RetryPolicy { on, ..RetryPolicy::built_in() });
            let defaults = MeshDefaults { outbound, retries, ..MeshDefaults::default() };
            Mesh { defaults: Arc::new(defaults), ..Mesh::default() }
        };
        let routes = || {
            let table = HttpTable::new(vec![forward()], no_route());
            let at = HostPort { host: "known.example".into(), port: addr.port() };
            Routes { http: [(at, Scoped::everywhere(Arc::new(table)))].into(), ..Routes::default() }
        };
        publish_mesh(&world, mesh(OutboundPolicy::AllowAny), routes(), &[]);
        world.dial(addr);
        let mut client = Client::connect(&world).await;
        assert_eq!(client.get("/").await.header("x-server"), Some("outside"));
        assert_eq!(client.get("/fails").await.status, 503);
        assert_eq!(seen.count(), 2, "once, whatever it answers");
        publish_mesh(&world, mesh(OutboundPolicy::RegistryOnly), routes(), &[]);
        world.dial(SocketAddr::new("192.0.2.1".parse().unwrap(), addr.port()));
        let mut client = Client::connect(&world).await;
        assert_eq!(client.get("/").await.status, 502);
        let refused = world.metrics.http.refused(Refusal::BlackHole).get();
        assert_eq!((seen.count(), refused), (2, 1));
        let mut bytes = Client::connect(&world).await;
        bytes.send(b"\x00\x01 no request at all\r\n").await;
        assert!(bytes.is_ended().await, "nor do bytes get through");
        assert_eq!(seen.count(), 2);
    });
}

#[test]
fn s68_requests_that_nothing_describes_go_to_the_egress_proxy_as_they_are() {
    test(|world| async move {
        let (proxy, seen) = server("proxy", |parts, _| {
            let status = if parts.uri.path() == "/fails" { 503 } else { 200 };
            Response::builder().status(status).body(full("")).unwrap()
        })
        .await;
        let (web, _) = echo("web").await;
        let publish = |backend: Backend| {
            let name = Name::new("default", "own");
            let origin = Origin { kind: "Sidecar".into(), name: name.clone(), field: "".into(), place: None };
            let all = EgressHost { excluded: false, namespace: None, host: "*".into() };
            let scope = SidecarScope {
                egress: vec![EgressListener { port: None, hosts: vec![all] }],
                outbound: None,
                egress_proxy: Some(EgressProxy { origin: Arc::new(origin), backend }),
                inbound: InboundPools::default(),
            };
            let on = RetryOn { server_error: true, ..RetryOn::default() };
            let retries = Some(RetryPolicy { on, ..RetryPolicy::built_in() });
            let defaults = MeshDefaults { retries, ..MeshDefaults::default() };
            let mesh = Mesh { defaults: Arc::new(defaults), ..Mesh::default() };
            let routes = Routes { sidecars: [(name, Arc::new(scope))].into(), ..Routes::default() };
            publish_mesh(&world, mesh, routes, &[("web", web), ("out", proxy)]);
        };
        publish(cluster("out"));
        let unknown: SocketAddr = "192.0.2.1:80".parse().unwrap();
        world.dial(unknown);
        let mut client = Client::connect(&world).await;
        for (host, name) in [("unknown.example:8080", "proxy"), ("web", "web"), ("192.0.2.1", "proxy")] {
            client.send(format!("GET /x?y HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
            assert_eq!(client.reply().await.header("x-server"), Some(name), "{host}");
            if name == "proxy" {
                let last = seen.last();
                let seen_host = last.headers["host"].to_str().unwrap();
                assert_eq!((last.uri.to_string().as_str(), seen_host), ("/x?y", host));
            }
        }
        client.send("GET /fails HTTP/1.1\r\nHost: other.example\r\n\r\n").await;
        assert_eq!(client.reply().await.status, 503);
        assert_eq!(seen.count(), 3, "once, whatever it answers");
        // What is told before is what is done.
        let asked = AskedRequest {
            method: "GET".into(),
            target: "/".into(),
            authority: "other.example".into(),
            headers: Vec::new(),
        };
        let told = || {
            let snapshot = Arc::clone(&world.snapshots.borrow());
            let client = Arc::clone(snapshot.workload_at(APART.parse().unwrap()).unwrap());
            let told = preview(&snapshot, &client, unknown, &asked).unwrap();
            let understood = told.understood.unwrap();
            let rule = understood.rule().unwrap();
            let backend = understood.backends[0].destination.as_ref();
            let to = backend.map(|to| to.key.service.name.to_string()).map_err(|none| none.status);
            (told.treatment.concerned, rule.origin.kind.to_string(), to)
        };
        assert_eq!(told(), (true, "Sidecar".to_owned(), Ok("out".to_owned())));

        publish(Backend::Broken { status: 503, reason: "gone".into() });
        world.dial(unknown);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nHost: other.example\r\n\r\n").await;
        assert_eq!(client.reply().await.status, 503);
        assert_eq!(seen.count(), 3, "nothing goes past a proxy that is not there");
        assert_eq!(told(), (true, "Sidecar".to_owned(), Err(503)));
    });
}

#[test]
fn a_cookie_is_made_for_clients_without_one() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        let key = HashKey::Cookie {
            name: "user".into(),
            path: None,
            ttl: Some(Duration::from_secs(60)),
            attributes: Vec::new(),
        };
        let algorithm = Algorithm::ConsistentHash { key, table: HashTable::Maglev(65_537) };
        let policy = TrafficPolicy {
            balancing: Balancing { algorithm, ..Balancing::default() },
            ..TrafficPolicy::default()
        };
        let policy = Cluster { origin: None, labels: Default::default(), policy };
        let key = ClusterKey { service: Name::new("default", "web"), port: 80, subset: None };
        let table = HttpTable::new(vec![forward()], no_route());
        let mut routes = Routes::default();
        routes.http.insert(HostPort { host: HOST.into(), port: 80 }, Scoped::everywhere(Arc::new(table)));
        routes.clusters.insert(key, Scoped::everywhere(Arc::new(policy)));
        publish_routes(&world, routes, &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let reply = client.get("/").await;
        assert!(reply.header("set-cookie").is_some_and(|cookie| cookie.starts_with("user=\"")), "{reply:?}");
        let reply = client.ask("GET", "/", "Cookie: user=abc\r\n", "").await;
        assert_eq!(reply.header("set-cookie"), None);
    });
}

#[test]
fn what_the_mesh_says_holds_where_no_rule_and_no_policy_says_more() {
    test(|world| async move {
        let (one, seen) = server("one", |parts, _| {
            let status = if parts.uri.path().ends_with("/fails") { 500 } else { 200 };
            Response::builder().status(status).body(full(parts.uri.path().to_owned())).unwrap()
        })
        .await;
        let (other, _) = echo("other").await;
        let defaults = MeshDefaults {
            path_normalization: PathNormalization::MergeSlashes,
            retries: Some(RetryPolicy {
                attempts: 4,
                on: RetryOn { server_error: true, ..RetryOn::default() },
                ..RetryPolicy::built_in()
            }),
            clusters: DefaultClusters::of(&TrafficPolicy {
                pool: ConnectionPool { max_requests: Some(1), ..ConnectionPool::default() },
                ..TrafficPolicy::default()
            }),
            ..MeshDefaults::default()
        };
        let mesh = Mesh { defaults: Arc::new(defaults), ..Mesh::default() };
        // The rule is about another service: nothing is said of `web`, but its port is looked into.
        let mut routes = Routes::default();
        let table = HttpTable::new(vec![forward()], no_route());
        let at = HostPort { host: "other.default.svc.cluster.local".into(), port: 80 };
        routes.http.insert(at, Scoped::everywhere(Arc::new(table)));
        let key = ClusterKey { service: Name::new("default", "web"), port: 80, subset: Some("v1".into()) };
        let v1 = Cluster { origin: None, labels: Default::default(), policy: TrafficPolicy::default() };
        routes.clusters.insert(key, Scoped::everywhere(Arc::new(v1)));
        publish_mesh(&world, mesh, routes, &[("web", one), ("other", other)]);
        let mut client = Client::connect(&world).await;
        assert_eq!(client.get("/a//b").await.body, "/a/b");
        assert_eq!(client.get("/fails").await.status, 500);
        assert_eq!(seen.count(), 1 + 5, "four times again");
    });
}
