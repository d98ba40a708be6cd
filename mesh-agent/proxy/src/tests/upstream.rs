//! Requests to real servers on loopback, through the upstream side alone.

mod balancing;
mod limits;
mod retries;
mod server;
mod timeouts;
mod transports;

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use http_body_util::BodyExt;
use hyper::{Request, Response};
use mesh_core::{
    route::{
        Origin,
        cluster::{Cluster, ClusterKey, TrafficPolicy},
        http::{Action, HttpRule, HttpTable, RetryOn, RetryPolicy},
    },
    snapshot::{Endpoint, Name, Service},
};

use self::server::{Reply, Server};
use super::fixture::{World, endpoint, eventually, in_world, service, soon};
use crate::{
    close::Direction,
    connections::{Live, Open},
    http::{
        body::Body,
        exchange::{Answer, Destination, Failure, Flag, Plan, Route},
        upstream::Upstreams,
    },
};

const VIP: [u8; 4] = [10, 96, 0, 1];

fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    in_world(false, |_| {}, body);
}

/// A client's connection, as far as the upstream side knows it.
fn client(world: &World) -> Open<'_> {
    let client = SocketAddr::from(([127, 0, 0, 1], 40_000));
    world
        .worker
        .connections
        .open(Direction::Outbound, &world.pod.handle, &world.pod.admission, client, 0)
        .unwrap()
}

/// Publishes a service `web` with these endpoints.
fn publish(world: &World, endpoints: Vec<Endpoint>) {
    world.publish(Vec::new(), vec![service("web", VIP.into(), endpoints)]);
}

fn key() -> ClusterKey {
    ClusterKey { service: Name::new("default", "web"), port: 80, subset: None }
}

/// Where requests to `web` go under a policy.
fn destination(world: &World, shape: impl FnOnce(&mut TrafficPolicy)) -> Destination {
    let mut policy = TrafficPolicy::default();
    shape(&mut policy);
    let service: Arc<Service> =
        Arc::clone(world.worker.snapshot().service(&Name::new("default", "web")).unwrap());
    let cluster = Cluster { origin: None, labels: Default::default(), policy };
    Destination::Cluster { service, key: key(), policy: Some(Arc::new(cluster)) }
}

fn plan(world: &World, live: &Rc<Live>, destination: Destination) -> Plan {
    Plan {
        live: Rc::clone(live),
        snapshot: world.worker.snapshot(),
        destination,
        route: None,
        timeout: None,
        retry: false,
        hash: None,
        client_http2: false,
        grpc: false,
        upgrade: false,
        mirrors: Vec::new(),
        interim: None,
    }
}

/// A route whose tries are repeated so.
pub(super) fn retrying(attempts: u32, on: RetryOn, per_try_timeout: Option<Duration>) -> Option<Route> {
    let origin = Origin { kind: "Test".into(), name: Name::new("a", "b"), field: "".into(), place: None };
    let rule = HttpRule {
        retries: Some(RetryPolicy {
            attempts,
            per_try_timeout,
            on,
            backoff: Duration::from_millis(1),
            backoff_min: Duration::ZERO,
            ignore_previous_hosts: None,
            remote_localities: false,
        }),
        ..HttpRule::new(origin, Action::Passthrough)
    };
    Route::new(Arc::new(HttpTable::new(vec![rule], Action::Passthrough)), 0, None)
}

fn get(path: &str) -> Request<Body> {
    Request::builder().uri(path).header("host", "web").body(Body::Empty).unwrap()
}

fn post(content: &'static [u8]) -> Request<Body> {
    Request::builder().method("POST").uri("/").header("host", "web").body(Body::full(content)).unwrap()
}

async fn send(world: &World, request: Request<Body>, plan: Plan) -> Answer {
    soon(Upstreams::of(&world.worker).send(request, plan)).await
}

/// Status and body of an answer.
async fn read(answer: Answer) -> (u16, Vec<u8>) {
    let (parts, body): (_, Body) = answer.outcome.unwrap().into_parts();
    let bytes = soon(body.collect()).await.unwrap().to_bytes();
    (parts.status.as_u16(), bytes.to_vec())
}

fn failure(answer: &Answer) -> &Failure {
    answer.outcome.as_ref().unwrap_err()
}

fn status(answer: &Answer) -> u16 {
    answer.outcome.as_ref().map_or_else(|failure| failure.status, |r: &Response<Body>| r.status().as_u16())
}

/// An address where connects are refused.
async fn refusing() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[test]
fn one_connection_serves_one_request_after_the_other() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("hello")).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        for _ in 0..3 {
            let to = destination(&world, |_| {});
            let answer = send(&world, get("/a?b=c"), plan(&world, open.live(), to)).await;
            assert_eq!(answer.upstream.as_ref().unwrap().addr, server.addr);
            assert_eq!(read(answer).await, (200, b"hello".to_vec()));
            tokio::task::yield_now().await;
        }
        assert_eq!(server.connections(), 1);
        let heads = server.heads();
        assert_eq!(heads.len(), 3);
        assert!(heads[0].starts_with("GET /a?b=c HTTP/1.1\r\n"), "{}", heads[0]);
        assert!(heads[0].to_lowercase().contains("host: web\r\n"), "{}", heads[0]);
        assert!(heads[0].to_lowercase().contains("x-envoy-attempt-count: 1\r\n"), "{}", heads[0]);
    });
}

#[test]
fn requests_at_once_have_a_connection_each_and_a_body_that_is_dropped_ends_its_own() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::Endless).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let first = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        let second = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        assert_eq!((status(&first), status(&second), server.connections()), (200, 200, 2));
        assert_eq!(world.worker.connections.len(), 3);
        drop(first);
        eventually(|| (server.closed(), world.worker.connections.len()), |now| *now == (1, 2)).await;
        drop(second);
        eventually(|| (server.closed(), world.worker.connections.len()), |now| *now == (2, 1)).await;
        assert!(world.worker.loads().of(server.addr) == 0);
    });
}

#[test]
fn a_service_without_endpoints_and_one_that_is_not_there_are_told_apart() {
    test(|world| async move {
        publish(&world, Vec::new());
        let open = client(&world);
        let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        let failed = failure(&answer);
        assert_eq!(
            (failed.status, failed.flag, &*failed.text),
            (503, Flag::NoHealthyUpstream, "no healthy upstream")
        );
        let Destination::Cluster { service, key, policy } = destination(&world, |_| {}) else { panic!() };
        let other_port = ClusterKey { port: 81, ..key.clone() };
        let missing = Destination::Cluster { service: Arc::clone(&service), key: other_port, policy };
        let answer = send(&world, get("/"), plan(&world, open.live(), missing)).await;
        assert_eq!((failure(&answer).status, failure(&answer).flag), (503, Flag::NoCluster));
        let no_subset = ClusterKey { subset: Some("v9".into()), ..key };
        let missing = Destination::Cluster { service, key: no_subset, policy: None };
        let answer = send(&world, get("/"), plan(&world, open.live(), missing)).await;
        assert_eq!((failure(&answer).status, failure(&answer).flag), (503, Flag::NoCluster));
    });
}

#[test]
fn a_response_that_takes_too_long_is_given_up_and_so_is_its_body() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |head| match head.contains("/slow-body") {
            true => Reply::Endless,
            false => Reply::Hang,
        })
        .await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let limited = || Plan {
            timeout: Some(Duration::from_millis(60)),
            ..plan(&world, open.live(), destination(&world, |_| {}))
        };
        let answer = send(&world, get("/slow-head"), limited()).await;
        let failed = failure(&answer);
        assert_eq!((failed.status, failed.flag), (504, Flag::UpstreamTimeout));
        assert_eq!((failed.details, &*failed.text), ("response_timeout", "upstream request timeout"));
        let answer = send(&world, get("/slow-body"), limited()).await;
        let body = answer.outcome.unwrap().into_body();
        assert!(soon(body.collect()).await.is_err(), "it never ends by itself");
        eventually(|| server.closed(), |closed| *closed == 2).await;
    });
}

#[test]
fn a_mirror_gets_the_request_and_its_answer_is_thrown_away() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("real")).await;
        let shadow = Server::start("127.0.0.1:0", |_| Reply::status(500)).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let copied = Plan {
            mirrors: vec![Destination::Address(shadow.addr)],
            ..plan(&world, open.live(), destination(&world, |_| {}))
        };
        let answer = send(&world, post(b"content"), copied).await;
        assert_eq!(read(answer).await, (200, b"real".to_vec()));
        eventually(|| shadow.bodies(), |bodies| bodies.len() == 1).await;
        assert_eq!(shadow.bodies(), [b"content".to_vec()]);
        assert_eq!(server.bodies(), [b"content".to_vec()]);
    });
}
