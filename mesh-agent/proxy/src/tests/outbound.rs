//! Which server an outbound connection reaches, and what an arrival gets.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use mesh_core::{
    mode::{Mode, PortModes},
    snapshot::Workload,
};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::fixture::{World, endpoint, eventually, in_world, service, soon, workload};
use crate::{
    close::{CloseReason, Direction},
    kernel::{LocalPeer, TicketRequest, VerdictEntry},
    worker::{Accepted, Arrival, Pod},
};

const VIP: &str = "10.96.0.1";

fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    in_world(false, |_| {}, body);
}

fn vip() -> SocketAddr {
    SocketAddr::new(VIP.parse().unwrap(), 80)
}

async fn bound(addr: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind(addr).await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

/// An address where connects are refused.
async fn refusing() -> SocketAddr {
    bound("127.0.0.1:0").await.1
}

pub(super) async fn end_of(mut client: TcpStream) -> io::ErrorKind {
    soon(client.read(&mut [0])).await.unwrap_err().kind()
}

#[test]
fn without_an_original_destination_the_connection_is_reset_and_counted() {
    test(|world| async move {
        let client = TcpStream::connect(world.outbound).await.unwrap();
        assert_eq!(end_of(client).await, io::ErrorKind::ConnectionReset);
        world.ended(CloseReason::OriginalDstMiss, 1).await;
        assert!(world.sockets.asked.lock().unwrap().is_empty());
    });
}

#[test]
fn a_service_without_a_ready_endpoint_resets() {
    test(|world| async move {
        let (listener, addr) = bound("127.0.0.1:0").await;
        let mut unready = endpoint(addr, None);
        unready.ready = false;
        world.publish(Vec::new(), vec![service("web", VIP.parse().unwrap(), vec![unready])]);
        world.dial(vip());
        let client = TcpStream::connect(world.outbound).await.unwrap();
        assert_eq!(end_of(client).await, io::ErrorKind::ConnectionReset);
        world.ended(CloseReason::NoEndpoint, 1).await;
        drop(listener);
    });
}

#[test]
fn a_refused_connect_is_tried_on_another_endpoint() {
    test(|world| async move {
        let (listener, addr) = bound("127.0.0.1:0").await;
        let endpoints = vec![endpoint(refusing().await, None), endpoint(addr, None)];
        world.publish(Vec::new(), vec![service("web", VIP.parse().unwrap(), endpoints)]);
        world.dial(vip());
        for _ in 0..20 {
            let mut client = TcpStream::connect(world.outbound).await.unwrap();
            let (mut server, _) = soon(listener.accept()).await.unwrap();
            client.write_all(b"x").await.unwrap();
            soon(server.read_exact(&mut [0])).await.unwrap();
        }
        assert!(world.metrics.connect_retries.get() > 0);
        assert_eq!(world.closed(Direction::Outbound, CloseReason::UpstreamRefused), 0);
    });
}

#[test]
fn a_refused_connect_to_the_only_endpoint_resets_the_client() {
    test(|world| async move {
        let endpoints = vec![endpoint(refusing().await, None)];
        world.publish(Vec::new(), vec![service("web", VIP.parse().unwrap(), endpoints)]);
        world.dial(vip());
        let client = TcpStream::connect(world.outbound).await.unwrap();
        assert_eq!(end_of(client).await, io::ErrorKind::ConnectionReset);
        world.ended(CloseReason::UpstreamRefused, 1).await;
        assert_eq!(world.sockets.asked.lock().unwrap().len(), 1, "tried once");
    });
}

/// A listener whose queue is full, so that further connects hang.
pub(super) async fn hanging(at: [u8; 4]) -> (Socket, SocketAddr, Vec<TcpStream>) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((at, 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let addr = socket.local_addr().unwrap().as_socket().unwrap();
    let mut fill = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(100), TcpStream::connect(addr)).await {
        fill.push(stream.unwrap());
        assert!(fill.len() < 10);
    }
    (socket, addr, fill)
}

#[test]
fn an_endpoint_that_does_not_answer_is_left_for_the_next_one() {
    let shape = |settings: &mut crate::Settings| settings.attempt_timeout = Duration::from_millis(700);
    in_world(true, shape, |world| async move {
        let (_hanging, silent, _fill) = hanging([127, 0, 0, 3]).await;
        let (listener, addr) = bound("127.0.0.1:0").await;
        let endpoints = vec![endpoint(silent, None), endpoint(addr, None)];
        world.publish(Vec::new(), vec![service("web", VIP.parse().unwrap(), endpoints)]);
        // The kernel drew the silent one, which is not meshed, so it is tried first.
        world.dial_hinted(vip(), Some(silent));
        let begun = Instant::now();
        let _client = TcpStream::connect(world.outbound).await.unwrap();
        drop(listener.accept().await.unwrap());
        assert!((700..1000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
    });
}

#[test]
fn a_server_that_does_not_answer_costs_the_connect_time_out() {
    in_world(
        true,
        |_| {},
        |world| async move {
            let (_hanging, silent, _fill) = hanging([127, 0, 0, 3]).await;
            world.dial(silent);
            let mut client = TcpStream::connect(world.outbound).await.unwrap();
            let begun = Instant::now();
            let error = client.read(&mut [0]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(begun.elapsed().as_secs(), 10);
            world.ended(CloseReason::UpstreamTimeout, 1).await;
        },
    );
}

#[test]
fn the_least_loaded_endpoint_is_chosen() {
    test(|world| async move {
        let (one, first) = bound("127.0.0.1:0").await;
        let (two, second) = bound("127.0.0.1:0").await;
        let endpoints = vec![endpoint(first, None), endpoint(second, None)];
        world.publish(Vec::new(), vec![service("web", VIP.parse().unwrap(), endpoints)]);
        world.dial(vip());
        let mut held = Vec::new();
        for pairs in 1..=10 {
            for _ in 0..2 {
                held.push(TcpStream::connect(world.outbound).await.unwrap());
                eventually(
                    || world.worker.loads().of(first) + world.worker.loads().of(second),
                    |n| *n == held.len() as u32,
                )
                .await;
            }
            assert_eq!((world.worker.loads().of(first), world.worker.loads().of(second)), (pairs, pairs));
        }
        drop((held, one, two));
        eventually(|| world.worker.loads().of(first) + world.worker.loads().of(second), |n| *n == 0).await;
    });
}

#[test]
fn a_local_server_is_judged_here_and_dialled_by_ticket_and_the_verdict_is_cached() {
    test(|world| async move {
        let (listener, addr) = bound("127.0.0.2:0").await;
        let server = Workload {
            modes: PortModes { default: Mode::Strict, ..PortModes::default() },
            ..workload("web", "a", addr.ip())
        };
        let id = server.id;
        let web = service("web", VIP.parse().unwrap(), vec![endpoint(addr, Some(id))]);
        let service_id = web.id;
        world.publish(vec![server], vec![web]);
        world.kernel.local.lock().unwrap().insert(id, LocalPeer { incarnation: 5, policy_gen: 9 });
        world.dial_hinted(vip(), Some(addr));
        let mut client = TcpStream::connect(world.outbound).await.unwrap();
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        client.write_all(b"ping").await.unwrap();
        soon(server.read_exact(&mut [0; 4])).await.unwrap();

        let verdict =
            VerdictEntry { dst: id, incarnation: 5, policy_gen: 9, port: addr.port(), v4: true, allow: true };
        assert_eq!(*world.kernel.verdicts.lock().unwrap(), [verdict]);
        let asked = world.sockets.asked.lock().unwrap().clone();
        let [(dialled, tags)] = &asked[..] else { panic!("{asked:?}") };
        assert_eq!(*dialled, addr);
        assert_eq!(tags.ticket, Some(TicketRequest { incarnation: 5, policy_gen: 9 }));
        assert_eq!((tags.dst_workload, tags.service, tags.inbound), (Some(id), Some(service_id), false));

        drop((client, server));
        world.ended(CloseReason::Finished, 1).await;
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &world.registry).unwrap();
        for reporter in ["source", "destination"] {
            let bytes = text.lines().find(|line| {
                line.starts_with("istio_tcp_received_bytes_total{")
                    && line.contains(&format!("reporter=\"{reporter}\""))
                    && line.contains("destination_service_name=\"web\"")
                    && line.contains("connection_security_policy=\"kernel\"")
            });
            assert!(bytes.is_some_and(|line| line.ends_with("} 4")), "{reporter}: {bytes:?}");
        }
    });
}

#[test]
fn a_local_server_that_vanished_from_the_snapshot_is_not_dialled() {
    test(|world| async move {
        let (listener, addr) = bound("127.0.0.2:0").await;
        let server = workload("web", "a", addr.ip());
        let id = server.id;
        world.publish(vec![server], Vec::new());
        world.kernel.local.lock().unwrap().insert(id, LocalPeer { incarnation: 5, policy_gen: 9 });
        world.dial(addr);
        // The connection's own view is one snapshot old; judging uses the newest.
        let old = world.worker.snapshot();
        world.publish(Vec::new(), Vec::new());
        assert!(old.workload(id).is_some());
        let client = TcpStream::connect(world.outbound).await.unwrap();
        let accepted = tokio::time::timeout(Duration::from_millis(300), listener.accept()).await;
        // By address alone it is something outside the mesh now: dialled without ticket or verdict.
        assert!(accepted.is_ok());
        assert!(world.kernel.verdicts.lock().unwrap().is_empty());
        drop(client);
    });
}

/// Hands the worker a connection as the inbound listener would have accepted it, and gives the client's end.
pub(super) async fn arrive(world: &World, listener: &TcpListener, inbound_port: u16) -> TcpStream {
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, addr) = listener.accept().await.unwrap();
    let pod = Arc::new(Pod {
        handle: Arc::clone(&world.pod.handle),
        admission: Arc::clone(&world.pod.admission),
        inbound_port,
        private_ports: vec![inbound_port],
        handshakes: crate::connections::Admission::new(1),
        dns_in_flight: crate::connections::Admission::new(1),
        dns_connections: crate::connections::Admission::new(1),
    });
    let socket = accepted.into_std().unwrap();
    world.worker.accept(Accepted { socket, client: addr, arrival: Arrival::Tcp(Direction::Inbound), pod });
    client
}

#[test]
fn a_plaintext_arrival_reaches_the_app_with_the_clients_address() {
    test(|world| async move {
        // The agent dials the address the client dialled, so one listener plays the kernel's part and the app's.
        let (listener, addr) = bound("127.0.0.1:0").await;
        let mut client = arrive(&world, &listener, 1).await;
        let (mut app, _) = soon(listener.accept()).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        soon(app.read_exact(&mut [0; 5])).await.unwrap();
        let asked = world.sockets.asked.lock().unwrap().clone();
        let [(dialled, tags)] = &asked[..] else { panic!("{asked:?}") };
        assert_eq!((*dialled, tags.inbound, tags.ticket), (addr, true, None));
        assert_eq!(tags.client_addr, Some(client.local_addr().unwrap()));
    });
}

#[test]
fn a_plaintext_arrival_at_a_strict_port_is_reset_and_the_app_sees_nothing() {
    test(|world| async move {
        let (listener, addr) = bound("127.0.0.1:0").await;
        let strict = PortModes { default: Mode::Permissive, ports: [(addr.port(), Mode::Strict)].into() };
        let own = Workload { modes: strict, ..workload("client", "a", addr.ip()) };
        world.snapshots.send_replace(Arc::new(mesh_core::snapshot::Snapshot::new(
            9,
            mesh_core::snapshot::Parts {
                workloads: vec![Arc::new(own)],
                ..mesh_core::snapshot::Parts::default()
            },
        )));
        let client = arrive(&world, &listener, 1).await;
        assert_eq!(end_of(client).await, io::ErrorKind::ConnectionReset);
        assert_eq!(world.closed(Direction::Inbound, CloseReason::PolicyDenied), 1);
        assert!(world.sockets.asked.lock().unwrap().is_empty());
    });
}

#[test]
fn an_arrival_for_the_listeners_own_port_or_a_foreign_address_is_reset() {
    test(|world| async move {
        let (listener, addr) = bound("127.0.0.1:0").await;
        let own_port = arrive(&world, &listener, addr.port()).await;
        assert_eq!(end_of(own_port).await, io::ErrorKind::ConnectionReset);
        let (foreign, _) = bound("127.0.0.9:0").await;
        let client = arrive(&world, &foreign, 1).await;
        assert_eq!(end_of(client).await, io::ErrorKind::ConnectionReset);
        assert_eq!(world.closed(Direction::Inbound, CloseReason::Misdirected), 2);
        assert!(world.sockets.asked.lock().unwrap().is_empty());
    });
}
