//! Limits of what workloads take, by their Sidecar (S45), on every way to them.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use mesh_core::{
    id::WorkloadId,
    route::{
        Routes,
        cluster::ConnectionPool,
        scope::{InboundPools, SidecarScope},
    },
    snapshot::{Name, Parts, Snapshot, Workload},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::{
    fixture::{World, eventually, in_world, soon, workload},
    hbone::{self, server_pod},
    outbound::{arrive, end_of},
};
use crate::{
    close::{CloseReason, Direction},
    kernel::LocalPeer,
};

fn one_connection() -> ConnectionPool {
    ConnectionPool { max_connections: Some(1), ..ConnectionPool::default() }
}

/// Publishes these workloads, all of which have a Sidecar with these limits.
pub(super) fn publish(world: &World, workloads: Vec<Workload>, inbound: InboundPools) {
    let name = Name::new("default", "limits");
    let scope = SidecarScope { egress: Vec::new(), outbound: None, egress_proxy: None, inbound };
    let routes = Routes { sidecars: [(name.clone(), Arc::new(scope))].into(), ..Routes::default() };
    let with = |workload| Arc::new(Workload { sidecar: Some(name.clone()), ..workload });
    let workloads = workloads.into_iter().map(with).collect();
    let version = world.snapshots.borrow().version() + 1;
    let parts = Parts { workloads, routes: Arc::new(routes), ..Parts::default() };
    world.snapshots.send_replace(Arc::new(Snapshot::new(version, parts)));
}

/// A server of the client's own node with these limits, which the client dials.
pub(super) fn same_node(world: &World, addr: SocketAddr, inbound: InboundPools) -> WorkloadId {
    let server = workload("web", "a", addr.ip());
    let id = server.id;
    publish(world, vec![server, workload("client", "a", [127, 0, 0, 1].into())], inbound);
    world.kernel.local.lock().unwrap().insert(id, LocalPeer { incarnation: 5, policy_gen: 9 });
    world.dial(addr);
    id
}

fn limited() -> InboundPools {
    InboundPools { all: Some(one_connection()), ..InboundPools::default() }
}

async fn says_hello(client: &mut TcpStream, app: &mut TcpStream) {
    client.write_all(b"hello").await.unwrap();
    soon(app.read_exact(&mut [0; 5])).await.unwrap();
}

#[test]
fn s45_plaintext_arrivals_beyond_the_limit_are_reset_until_one_ends() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let own = || workload("client", "a", [127, 0, 0, 1].into());
            publish(&world, vec![own()], limited());
            let mut first = arrive(&world, &listener, 1).await;
            let (mut app, _) = soon(listener.accept()).await.unwrap();
            says_hello(&mut first, &mut app).await;
            let second = arrive(&world, &listener, 1).await;
            assert_eq!(end_of(second).await, io::ErrorKind::ConnectionReset);
            assert_eq!(world.closed(Direction::Inbound, CloseReason::Overflow), 1);
            drop((first, app));
            eventually(|| world.worker.connections.len(), |open| *open == 0).await;
            let mut third = arrive(&world, &listener, 1).await;
            let (mut app, _) = soon(listener.accept()).await.unwrap();
            says_hello(&mut third, &mut app).await;
            // A port with limits of its own is not counted with the others, and has none of theirs.
            let ports = [(listener.local_addr().unwrap().port(), ConnectionPool::default())].into();
            publish(&world, vec![own()], InboundPools { all: Some(one_connection()), ports });
            let mut fourth = arrive(&world, &listener, 1).await;
            let (mut app, _) = soon(listener.accept()).await.unwrap();
            says_hello(&mut fourth, &mut app).await;
        },
    );
}

#[test]
fn s45_connections_of_the_same_node_count_and_none_goes_past_the_agent() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
            same_node(&world, listener.local_addr().unwrap(), limited());
            let mut first = TcpStream::connect(world.outbound).await.unwrap();
            let (mut app, _) = soon(listener.accept()).await.unwrap();
            says_hello(&mut first, &mut app).await;
            let second = TcpStream::connect(world.outbound).await.unwrap();
            assert_eq!(end_of(second).await, io::ErrorKind::ConnectionReset);
            assert_eq!(world.closed(Direction::Outbound, CloseReason::Overflow), 1);
            assert!(world.kernel.verdicts.lock().unwrap().is_empty(), "the kernel counts nobody");
            drop((first, app));
            eventually(|| world.worker.connections.len(), |open| *open == 0).await;
            let mut third = TcpStream::connect(world.outbound).await.unwrap();
            let (mut app, _) = soon(listener.accept()).await.unwrap();
            says_hello(&mut third, &mut app).await;
        },
    );
}

#[test]
fn s45_streams_of_tunnels_count_and_the_limit_is_the_servers_own() {
    hbone::test(
        |_| {},
        |nodes| async move {
            publish(&nodes.b, vec![server_pod()], limited());
            let (mut client, mut app) = nodes.pair().await;
            says_hello(&mut client, &mut app).await;
            let second = TcpStream::connect(nodes.a.outbound).await.unwrap();
            assert_eq!(end_of(second).await, io::ErrorKind::ConnectionReset);
            eventually(|| nodes.b.closed(Direction::Inbound, CloseReason::Overflow), |n| *n > 0).await;
            drop((client, app));
            eventually(|| nodes.b.worker.connections.len(), |open| *open == 0).await;
            let (mut client, mut app) = nodes.pair().await;
            says_hello(&mut client, &mut app).await;
        },
    );
}

#[test]
fn s45_connections_live_as_long_as_the_servers_side_says() {
    in_world(
        false,
        |_| {},
        |world| async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let pool = ConnectionPool {
                max_connection_duration: Some(Duration::from_millis(300)),
                ..ConnectionPool::default()
            };
            let own = workload("client", "a", [127, 0, 0, 1].into());
            publish(&world, vec![own], InboundPools { all: Some(pool), ..InboundPools::default() });
            let mut client = arrive(&world, &listener, 1).await;
            let (mut app, _) = soon(listener.accept()).await.unwrap();
            says_hello(&mut client, &mut app).await;
            let ended = || world.closed(Direction::Inbound, CloseReason::MaxDuration);
            eventually(ended, |count| *count == 1).await;
        },
    );
}
