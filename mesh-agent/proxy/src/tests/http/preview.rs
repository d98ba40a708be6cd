//! What is said of a request before it is sent is what becomes of it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_core::route::{
    cluster::ClusterKey,
    http::{
        Abort, Action, Fault, HeaderOps, HttpRule, Millionths, PathRewrite, Redirect, RedirectPort, Rewrite,
        WeightedBackend,
    },
    matching::{HttpMatch, PathMatch},
    protocol::AppProtocol,
};

use super::fixture::{Client, VIP, backend, echo, forward, publish, rule, test};
use crate::{
    http::preview::{AskedRequest, Preview, PreviewError, Understood, preview},
    tests::fixture::World,
};

fn asked(method: &str, target: &str, headers: &[(&str, &str)]) -> AskedRequest {
    AskedRequest {
        method: method.into(),
        target: target.into(),
        authority: "web".into(),
        headers: headers.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
    }
}

fn ask(world: &World, request: &AskedRequest) -> Result<Preview, PreviewError> {
    let snapshot = Arc::clone(&world.snapshots.borrow());
    let client = Arc::clone(snapshot.workload_at("127.0.0.1".parse().unwrap()).unwrap());
    preview(&snapshot, &client, SocketAddr::new(VIP.parse().unwrap(), 80), request)
}

fn understood(world: &World, request: &AskedRequest) -> Understood {
    ask(world, request).unwrap().understood.unwrap()
}

fn prefixed(prefix: &str, rule: HttpRule) -> HttpRule {
    let path = Some(PathMatch::Prefix { prefix: prefix.into(), ignore_case: false });
    HttpRule { matches: vec![HttpMatch { path, ..HttpMatch::default() }], ..rule }
}

#[test]
fn a_request_that_is_forwarded_leaves_as_it_was_said_to() {
    test(|world| async move {
        let (one, seen) = echo("one").await;
        let (two, _) = echo("two").await;
        let mut changed = prefixed("/old", forward());
        changed.rewrite = Rewrite {
            authority: Some("inner.example".into()),
            path: Some(PathRewrite::MatchedPrefix("/new".into())),
        };
        changed.request_headers = HeaderOps {
            set: vec![("x-set".into(), "1".into())],
            remove: vec!["x-gone".into()],
            ..HeaderOps::default()
        };
        publish(
            &world,
            vec![changed, rule(Action::Forward(vec![backend("two", 1)]))],
            &[("web", one), ("two", two)],
        );
        let said = understood(&world, &asked("GET", "/a/../old/x?q=1", &[("x-gone", "1"), ("x-kept", "2")]));
        assert_eq!((said.hit, &*said.target), (Some((0, Some(0))), "/old/x?q=1"));
        let to = &said.backends[0];
        let destination = to.destination.as_ref().unwrap();
        assert_eq!(
            destination.key,
            ClusterKey { service: mesh_core::snapshot::Name::new("default", "web"), port: 80, subset: None }
        );
        assert_eq!(
            destination.endpoints.iter().map(|e| (e.addr, e.class)).collect::<Vec<_>>(),
            [(one, Some(0))]
        );
        let mut client = Client::connect(&world).await;
        client.ask("GET", "/a/../old/x?q=1", "X-Gone: 1\r\nX-Kept: 2\r\n", "").await;
        let head = seen.last();
        assert_eq!(head.uri.path_and_query().map(|p| p.as_str()), said.new_target.as_deref());
        assert_eq!(head.headers["host"], to.authority.as_str());
        for (name, value) in &to.headers {
            assert_eq!(head.headers[name.as_str()], value.as_str());
        }
        assert_eq!(to.headers.len(), 2, "{:?}", to.headers);
        assert_eq!(understood(&world, &asked("GET", "/else", &[])).hit, Some((1, None)));
    });
}

#[test]
fn answers_of_the_mesh_itself_are_foretold() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        let moved = Action::Redirect(Redirect {
            status: 301,
            scheme: None,
            authority: Some("there.example".into()),
            port: RedirectPort::OfScheme,
            path: None,
        });
        let gone = Action::Forward(vec![backend("gone", 1)]);
        let mut slow = forward();
        slow.timeout = Some(Duration::from_secs(1));
        let mut faulty = slow.clone();
        faulty.fault = Some(Fault { delay: None, abort: Some((Millionths::ALL, Abort::Http(500))) });
        let rules = [("/moved", rule(moved)), ("/gone", rule(gone)), ("/slow", slow), ("/faulty", faulty)];
        publish(&world, rules.map(|(path, rule)| prefixed(path, rule)).into(), &[("web", addr)]);
        let mut client = Client::connect(&world).await;

        let said = understood(&world, &asked("GET", "/moved?a", &[]));
        assert_eq!(client.get("/moved?a").await.header("location"), said.location.as_deref());

        let said = understood(&world, &asked("GET", "/gone", &[]));
        let status = said.backends[0].destination.as_ref().unwrap_err().status;
        assert_eq!(client.get("/gone").await.status, status);

        assert_eq!(understood(&world, &asked("GET", "/slow", &[])).timeout, Some(Duration::from_secs(1)));
        assert_eq!(understood(&world, &asked("GET", "/faulty", &[])).timeout, None);
        // The less of what the rule and the client say.
        let within = |path: &str, asked_for: &str| {
            let headers = [("content-type", "application/grpc"), ("grpc-timeout", asked_for)];
            understood(&world, &asked("POST", path, &headers)).timeout.map(|limit| limit.as_millis())
        };
        for (asked_for, slow) in [("200m", 200), ("5S", 1000), ("0S", 1000), ("soon", 1000)] {
            assert_eq!(within("/slow", asked_for), Some(slow), "{asked_for}");
        }
        assert_eq!([within("/gone", "5S"), within("/gone", "0S")], [Some(5000), None]);
        let plain = asked("GET", "/slow", &[("grpc-timeout", "200m")]);
        assert_eq!(understood(&world, &plain).timeout, Some(Duration::from_secs(1)), "it is no gRPC");

        let said = understood(&world, &asked("GET", "/none", &[]));
        let Some(Action::Respond { status, .. }) = said.action() else { panic!("{said:?}") };
        assert_eq!((said.hit, client.get("/none").await.status), (None, *status));

        let refused = ask(&world, &asked("get", "/", &[])).unwrap().understood.unwrap_err();
        assert_eq!(client.ask("get", "/", "", "").await.status, refused.1);
    });
}

#[test]
fn what_is_no_request_is_no_question() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        for (request, what) in [
            (asked("G T", "/", &[]), "method"),
            (asked("GET", "no path", &[]), "path"),
            (asked("GET", "/", &[("a b", "1")]), "header"),
            (asked("GET", "/", &[("a", "1\n2")]), "header"),
            (AskedRequest { authority: "\r\n".into(), ..asked("GET", "/", &[]) }, "authority"),
        ] {
            let error = ask(&world, &request).unwrap_err();
            assert!(error.to_string().starts_with(what), "{error}");
        }
        let host = asked("GET", "/", &[("host", "other.example")]);
        assert_eq!(understood(&world, &host).authority, "other.example");
    });
}

#[test]
fn a_port_without_rules_is_not_looked_into() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr), ("two", addr)]);
        let at = |vip: &str| {
            crate::http::preview::treatment(
                &world.snapshots.borrow(),
                None,
                SocketAddr::new(vip.parse().unwrap(), 80),
            )
        };
        assert!(at(VIP).concerned);
        assert_eq!(at(VIP).protocol, AppProtocol::Http);
        assert!(!at("10.96.0.2").concerned);
        // The two services of the fixture differ in nothing but rules.
        let weights = WeightedBackend { weight: 3, ..backend("two", 1) };
        publish(
            &world,
            vec![rule(Action::Forward(vec![backend("web", 1), weights]))],
            &[("web", addr), ("two", addr)],
        );
        let said = understood(&world, &asked("GET", "/", &[]));
        assert_eq!(said.backends.iter().map(|b| b.weight).collect::<Vec<_>>(), [1, 3]);
    });
}
