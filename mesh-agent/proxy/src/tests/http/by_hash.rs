//! Endpoints that are chosen by what stands in a request.

use std::{collections::BTreeSet, sync::Arc};

use mesh_core::route::{
    HostPort, Routes,
    cluster::{Algorithm, Balancing, Cluster, ClusterKey, HashKey, HashTable, TrafficPolicy},
    http::{HeaderOps, HttpRule, HttpTable, Rewrite},
    scope::Scoped,
    variables::HeaderText,
};
use mesh_core::snapshot::Name;

use super::fixture::{Client, HOST, echo, forward, no_route, publish_routes, test};

/// By this header, and by this rule.
fn routes(header: &str, rule: HttpRule) -> Routes {
    let key = HashKey::Header(header.into());
    let algorithm = Algorithm::ConsistentHash { key, table: HashTable::Maglev(65_537) };
    let balancing = Balancing { algorithm, ..Balancing::default() };
    let policy = TrafficPolicy { balancing, ..TrafficPolicy::default() };
    let cluster = Cluster { origin: None, labels: Default::default(), policy };
    let key = ClusterKey { service: Name::new("default", "web"), port: 80, subset: None };
    let table = HttpTable::new(vec![rule], no_route());
    let mut routes = Routes::default();
    routes.http.insert(HostPort { host: HOST.into(), port: 80 }, Scoped::everywhere(Arc::new(table)));
    routes.clusters.insert(key, Scoped::everywhere(Arc::new(cluster)));
    routes
}

#[test]
fn s42_a_hash_is_of_the_request_as_its_server_will_see_it() {
    test(|world| async move {
        let servers = [echo("one").await.0, echo("two").await.0, echo("three").await.0];
        let services = servers.map(|addr| ("web", addr));
        let set = |value: &str| HeaderOps {
            set: vec![("x-user".into(), HeaderText::parse(value).unwrap())],
            ..HeaderOps::default()
        };
        let named = HttpRule { request_headers: set("ann"), ..forward() };
        let copied = HttpRule { request_headers: set("%REQ(x-from)%"), ..forward() };
        let rewrite = Rewrite { authority: Some("inner.example".into()), path: None };
        let rewritten = HttpRule { rewrite, ..forward() };
        // A header, a rule, and how many of the three answer to twenty-four requests that differ in host and headers.
        for (header, rule, expected) in [
            (":authority", forward(), 3),
            ("host", forward(), 3),
            (":authority", rewritten, 1),
            ("x-user", forward(), 3),
            ("x-user", named, 1),
            ("x-user", copied, 3),
        ] {
            publish_routes(&world, routes(header, rule.clone()), &services);
            let mut client = Client::connect(&world).await;
            let mut chosen = BTreeSet::new();
            for number in 0..24 {
                let host = format!("h{number}.example");
                let headers = format!("X-User: u{number}\r\nX-From: u{number}\r\n");
                let mut answers = BTreeSet::new();
                for _ in 0..3 {
                    let reply = client.get_of(&host, &headers).await;
                    answers.extend(reply.header("x-server").map(str::to_owned));
                }
                assert_eq!(answers.len(), 1, "the same of the same: {header} {rule:?}");
                chosen.append(&mut answers);
            }
            assert_eq!(chosen.len(), expected, "{header} {rule:?}");
        }
    });
}
