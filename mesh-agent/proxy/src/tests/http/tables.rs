//! Which table a request meets.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::route::{
    HostPort, Origin, Routes,
    http::{Action, HttpRule, HttpTable},
    matching::{HttpMatch, PathMatch},
    scope::Scoped,
};
use mesh_core::snapshot::Name;

use super::fixture::{Client, backend, echo, no_route, publish, publish_routes, rule, test};

fn by(namespace: Option<&str>, labels: &[(&str, &str)]) -> HttpMatch {
    HttpMatch {
        source_namespace: namespace.map(Into::into),
        source_labels: labels.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
        ..HttpMatch::default()
    }
}

#[test]
fn a_virtual_service_without_a_rule_for_a_client_leaves_it_the_service() {
    test(|world| async move {
        let (one, _) = echo("one").await;
        let (two, _) = echo("two").await;
        let to_two = |matches| HttpRule { matches, ..rule(Action::Forward(vec![backend("two", 1)])) };
        let on_path = HttpMatch {
            path: Some(PathMatch::Exact { path: "/x".into(), ignore_case: false }),
            ..HttpMatch::default()
        };
        let canary = || by(None, &[("app", "canary")]);
        for (matches, expected) in [
            (vec![canary()], (200, Some("one"))),
            (vec![by(Some("elsewhere"), &[])], (200, Some("one"))),
            (vec![by(Some("default"), &[])], (200, Some("two"))),
            (vec![canary(), by(Some("default"), &[])], (200, Some("two"))),
            // There is one, whatever this request is.
            (vec![canary(), on_path], (404, None)),
        ] {
            publish(&world, vec![to_two(matches.clone())], &[("web", one), ("two", two)]);
            let reply = Client::connect(&world).await.get("/").await;
            assert_eq!((reply.status, reply.header("x-server")), expected, "{matches:?}");
        }
    });
}

/// Answers with this status, by a rule of a kind.
fn says(kind: &str, status: u16) -> Arc<HttpTable> {
    let action = Action::Respond { status, body: Arc::default(), reason: "direct_response".into() };
    let origin =
        Origin { kind: kind.into(), name: Name::new("default", "r"), field: "spec".into(), place: None };
    Arc::new(HttpTable::new(vec![HttpRule::new(origin, action)], no_route()))
}

#[test]
fn s9_routes_of_the_gateway_api_go_by_the_address_that_was_dialled_and_virtual_services_by_host() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        let (gateway, istio) = ("HTTPRoute", "VirtualService");
        // Status 201 is what is said of the service that is dialled, 202 of the one that is asked for.
        for (of_dialled, of_other, expected) in [
            (Some(gateway), Some(gateway), 201),
            (Some(gateway), Some(istio), 201),
            (Some(gateway), None, 201),
            (Some(istio), Some(gateway), 202),
            (Some(istio), Some(istio), 202),
            (Some(istio), None, 200),
        ] {
            let mut routes = Routes::default();
            for (name, kind, status) in [("web", of_dialled, 201), ("two", of_other, 202)] {
                let host = format!("{name}.default.svc.cluster.local").into();
                if let Some(kind) = kind {
                    let table = Scoped::everywhere(says(kind, status));
                    routes.http.insert(HostPort { host, port: 80 }, table);
                }
            }
            publish_routes(&world, routes, &[("web", addr), ("two", addr)]);
            world.dial(SocketAddr::new([10, 96, 0, 1].into(), 80));
            let mut client = Client::connect(&world).await;
            let found = client.get_of("two", "").await.status;
            assert_eq!(found, expected, "{of_dialled:?} {of_other:?}");
            // By its own name, or by one that means nothing, it is asked for all the same.
            let own = if of_dialled.is_some() { 201 } else { 200 };
            for host in ["web", "web.default:80", "nobody.example"] {
                assert_eq!(client.get_of(host, "").await.status, own, "{host}: {of_dialled:?}");
            }
        }
    });
}
