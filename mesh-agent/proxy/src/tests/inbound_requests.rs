//! Limits of the requests that workloads take (S45), on every way to them.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    route::{
        Routes,
        cluster::{Cluster, ClusterKey, ConnectionPool, TrafficPolicy},
        scope::{InboundPools, Scoped},
    },
    snapshot::{Name, Parts, Snapshot, Workload},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{
    fixture::{World, endpoint, eventually, in_world, service, soon, workload},
    hbone::{self, server_pod},
    inbound_limits::{publish, same_node},
    outbound::arrive,
};
use crate::close::{CloseReason, Direction};

fn one_request() -> ConnectionPool {
    ConnectionPool { max_requests: Some(1), ..ConnectionPool::default() }
}

/// One connection to the app, and one request that waits for it.
fn one_and_one() -> ConnectionPool {
    ConnectionPool { max_connections: Some(1), max_pending: Some(1), ..ConnectionPool::default() }
}

fn all(pool: ConnectionPool) -> InboundPools {
    InboundPools { all: Some(pool), ..InboundPools::default() }
}

async fn ask(client: &mut TcpStream) {
    client.write_all(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
}

/// A client that has asked.
async fn asks(mut client: TcpStream) -> TcpStream {
    ask(&mut client).await;
    client
}

/// The app's end of the next connection, with one request read.
async fn asked(app: &TcpListener) -> TcpStream {
    let (mut app, _) = soon(app.accept()).await.unwrap();
    head(&mut app).await;
    app
}

/// Reads one head.
async fn head(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        assert_eq!(soon(stream.read(&mut byte)).await.unwrap(), 1, "{:?}", String::from_utf8_lossy(&bytes));
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

async fn answer(app: &mut TcpStream) {
    app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
}

async fn is_answered(client: &mut TcpStream, status: u16) {
    let head = head(client).await;
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
    assert_eq!(head.contains("x-envoy-overloaded: true"), status == 503, "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    soon(client.read_exact(&mut vec![0; length.parse().unwrap()])).await.unwrap();
}

/// A pod of this very node at 127.0.0.1, with these limits.
fn own_pod(world: &World, pool: ConnectionPool) {
    publish(world, vec![workload("client", "a", [127, 0, 0, 1].into())], all(pool));
}

#[test]
fn s45_requests_beyond_the_limit_are_answered_503_until_one_is_over() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            own_pod(&world, one_request());
            let mut first = asks(arrive(&world, &listener, 1).await).await;
            let (mut app, shown) = soon(listener.accept()).await.unwrap();
            assert!(shown.ip().is_loopback());
            assert!(head(&mut app).await.starts_with("GET / HTTP/1.1\r\n"));
            let mut second = asks(arrive(&world, &listener, 1).await).await;
            // Two refusals take nothing away from the first.
            soon(is_answered(&mut second, 503)).await;
            ask(&mut second).await;
            soon(is_answered(&mut second, 503)).await;
            answer(&mut app).await;
            is_answered(&mut first, 200).await;
            ask(&mut second).await;
            // A connection of its own: its app sees its own client.
            let mut other = asked(&listener).await;
            answer(&mut other).await;
            is_answered(&mut second, 200).await;
            let asked = world.sockets.asked.lock().unwrap();
            let clients: Vec<SocketAddr> = asked.iter().filter_map(|(_, tags)| tags.client_addr).collect();
            assert_eq!(clients, [first.local_addr().unwrap(), second.local_addr().unwrap()]);
        },
    );
}

#[test]
fn s45_a_request_waits_for_a_connection_and_one_more_than_may_wait_is_answered_503() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            own_pod(&world, one_and_one());
            let mut first = asks(arrive(&world, &listener, 1).await).await;
            let mut app = asked(&listener).await;
            let mut second = asks(arrive(&world, &listener, 1).await).await;
            let usage = world
                .worker
                .shared()
                .inbound
                .usage(&(world.pod.handle.workload, listener.local_addr().unwrap().port()));
            eventually(|| usage.count(crate::destination::limits::Kind::Pending), |n| *n == 1).await;
            let mut third = asks(arrive(&world, &listener, 1).await).await;
            is_answered(&mut third, 503).await;
            answer(&mut app).await;
            is_answered(&mut first, 200).await;
            // The first client is still there and idle: its connection makes room.
            let mut app = asked(&listener).await;
            answer(&mut app).await;
            is_answered(&mut second, 200).await;
        },
    );
}

#[test]
fn s45_what_is_no_http_is_carried_as_bytes_where_requests_are_limited() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            own_pod(&world, one_request());
            for _ in 0..2 {
                let mut client = arrive(&world, &listener, 1).await;
                client.write_all(b"*1\r\n$4\r\nPING\r\n").await.unwrap();
                let (mut app, _) = soon(listener.accept()).await.unwrap();
                let mut read = [0; 14];
                soon(app.read_exact(&mut read)).await.unwrap();
                app.write_all(b"+PONG\r\n").await.unwrap();
                soon(client.read_exact(&mut read[..7])).await.unwrap();
                assert_eq!(&read[..7], b"+PONG\r\n");
            }
        },
    );
}

#[test]
fn s45_requests_of_the_same_node_count_with_all_others_and_none_goes_past_the_agent() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
            same_node(&world, listener.local_addr().unwrap(), all(one_request()));
            let mut first = asks(TcpStream::connect(world.outbound).await.unwrap()).await;
            let mut app = asked(&listener).await;
            let mut second = asks(TcpStream::connect(world.outbound).await.unwrap()).await;
            is_answered(&mut second, 503).await;
            assert!(world.kernel.verdicts.lock().unwrap().is_empty(), "the kernel counts nobody");
            answer(&mut app).await;
            is_answered(&mut first, 200).await;
            ask(&mut second).await;
            head(&mut app).await;
            answer(&mut app).await;
            is_answered(&mut second, 200).await;
        },
    );
}

#[test]
fn s45_a_request_of_the_same_node_waits_for_a_connection_that_another_client_has() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let id = same_node(&world, addr, all(one_and_one()));
            // As another worker or another client's pod has it.
            let usage = world.worker.shared().inbound.usage(&(id, addr.port()));
            let taken = usage.take(crate::destination::limits::Kind::Connection, Some(1)).unwrap();
            let mut first = asks(TcpStream::connect(world.outbound).await.unwrap()).await;
            eventually(|| usage.count(crate::destination::limits::Kind::Pending), |n| *n == 1).await;
            let mut second = asks(TcpStream::connect(world.outbound).await.unwrap()).await;
            is_answered(&mut second, 503).await;
            assert!(taken.is_wanted());
            drop(taken);
            let mut app = asked(&listener).await;
            answer(&mut app).await;
            is_answered(&mut first, 200).await;
        },
    );
}

#[test]
fn s45_requests_in_tunnels_are_limited_by_the_servers_own_side() {
    hbone::test(
        |_| {},
        |nodes| async move {
            // All of it: a world lives as long as what publishes to it.
            let nodes = nodes;
            publish(&nodes.b, vec![server_pod()], all(one_request()));
            let mut first = asks(TcpStream::connect(nodes.a.outbound).await.unwrap()).await;
            let mut app = asked(&nodes.app).await;
            let mut second = asks(TcpStream::connect(nodes.a.outbound).await.unwrap()).await;
            is_answered(&mut second, 503).await;
            answer(&mut app).await;
            is_answered(&mut first, 200).await;
            ask(&mut second).await;
            // By the same connection: the app sees the client's pod at its other end, which both are of.
            head(&mut app).await;
            // What breaks off is never ended as if it were whole.
            app.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await.unwrap();
            head(&mut second).await;
            soon(second.read_exact(&mut [0; 4])).await.unwrap();
            drop(app);
            let end = soon(second.read(&mut [0; 1])).await;
            assert!(end.is_err(), "{end:?}");
            drop(first);
            let open = || nodes.b.worker.connections.len();
            eventually(open, |open| *open == 0).await;
            assert_eq!(nodes.b.closed(Direction::Inbound, CloseReason::Overflow), 0, "no connection was");
        },
    );
}

#[test]
fn s45_without_a_sidecar_the_rule_for_a_service_that_leads_there_counts() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let own: Workload = workload("client", "a", addr.ip());
            let web = service("web", "10.96.0.1".parse().unwrap(), vec![endpoint(addr, Some(own.id))]);
            let policy = TrafficPolicy { pool: one_request(), ..TrafficPolicy::default() };
            let cluster = Arc::new(Cluster { origin: None, labels: Default::default(), policy });
            let key =
                ClusterKey { service: Name::new("default", "web"), port: web.ports[0].port, subset: None };
            let routes =
                Routes { clusters: [(key, Scoped::everywhere(cluster))].into(), ..Routes::default() };
            let parts = Parts {
                workloads: vec![Arc::new(own)],
                services: vec![Arc::new(web)],
                routes: Arc::new(routes),
                ..Parts::default()
            };
            let version = world.snapshots.borrow().version() + 1;
            world.snapshots.send_replace(Arc::new(Snapshot::new(version, parts)));
            let _first = asks(arrive(&world, &listener, 1).await).await;
            let _app = asked(&listener).await;
            let mut second = asks(arrive(&world, &listener, 1).await).await;
            is_answered(&mut second, 503).await;
        },
    );
}
