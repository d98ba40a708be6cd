//! Tunnels: two workers back to back on loopback, pods 127.0.0.1 on node `a` and 127.0.0.2 on node `b`.

use std::{io, net::SocketAddr, time::Duration};

use mesh_core::snapshot::{Name, Tunnel, Workload};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

use super::fixture::{World, eventually, in_world, reset, settings, soon, workload};
use crate::{
    close::{CloseReason, Direction},
    hbone::tunnel::Role,
    settings::Settings,
};

/// Two nodes and an app on the second.
pub(super) struct Nodes {
    pub(super) a: World,
    pub(super) b: World,
    pub(super) app: TcpListener,
}

pub(super) fn server_pod() -> Workload {
    Workload { tunnel: Tunnel::Hbone, ..workload("server", "b", [127, 0, 0, 2].into()) }
}

pub(super) fn test<F: Future<Output = ()>>(shape: impl Fn(&mut Settings), body: impl FnOnce(Nodes) -> F) {
    // The fixture's own world gives the runtime; these are built within it.
    in_world(
        false,
        |_| {},
        |_| async move {
            let mut of_b = settings("b");
            shape(&mut of_b);
            let b = World::of(server_pod(), of_b);
            let mut of_a = settings("a");
            of_a.hbone.port = b.hbone.port();
            shape(&mut of_a);
            let a = World::of(workload("client", "a", [127, 0, 0, 1].into()), of_a);
            a.publish(vec![server_pod()], Vec::new());
            b.publish(vec![server_pod()], Vec::new());
            let app = TcpListener::bind("127.0.0.2:0").await.unwrap();
            a.dial(app.local_addr().unwrap());
            body(Nodes { a, b, app }).await;
        },
    );
}

impl Nodes {
    pub(super) async fn pair(&self) -> (TcpStream, TcpStream) {
        let client = TcpStream::connect(self.a.outbound).await.unwrap();
        let (server, _) = soon(self.app.accept()).await.unwrap();
        let relayed =
            || self.a.worker.connections.views(1000, 0, 0).iter().all(|view| view.upstream.is_some());
        eventually(relayed, |all| *all).await;
        (client, server)
    }

    /// Waits until the connection has ended so on either node.
    async fn ended(&self, at_client: CloseReason, at_server: CloseReason) {
        let counts =
            || (self.a.closed(Direction::Outbound, at_client), self.b.closed(Direction::Inbound, at_server));
        eventually(counts, |counts| *counts == (1, 1)).await;
        eventually(|| self.a.worker.connections.len() + self.b.worker.connections.len(), |n| *n == 0).await;
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 251 + i % 241) as u8).collect()
}

async fn read_exactly(stream: &mut TcpStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    soon(stream.read_exact(&mut bytes)).await.unwrap();
    bytes
}

async fn read_all(stream: &mut TcpStream) -> (Vec<u8>, Option<io::ErrorKind>) {
    let mut bytes = Vec::new();
    let end = soon(stream.read_to_end(&mut bytes)).await.err().map(|error| error.kind());
    (bytes, end)
}

#[test]
fn bytes_and_half_closes_pass_in_both_directions() {
    test(
        |_| {},
        |nodes| async move {
            let (mut client, mut server) = nodes.pair().await;
            let (up, down) = (pattern(3_000_000), pattern(2_000_001));
            let (mut server_read, mut server_write) = server.split();
            let (mut client_read, mut client_write) = client.split();
            let mut at_server = Vec::new();
            let mut at_client = Vec::new();
            let sent = tokio::join!(
                async {
                    client_write.write_all(&up).await.unwrap();
                    client_write.shutdown().await.unwrap();
                },
                async {
                    soon(server_read.read_to_end(&mut at_server)).await.unwrap();
                    // After the client's end the server still has something to say.
                    server_write.write_all(b"last words").await.unwrap();
                    server_write.shutdown().await.unwrap();
                },
                async {
                    server_first(&mut client_read, &mut at_client).await;
                }
            );
            let ((), (), ()) = sent;
            assert!(at_server == up);
            assert_eq!(at_client, b"last words");
            drop(down);
            nodes.ended(CloseReason::Finished, CloseReason::Finished).await;
        },
    );
}

async fn server_first(read: &mut (impl AsyncReadExt + Unpin), into: &mut Vec<u8>) {
    soon(read.read_to_end(into)).await.unwrap();
}

#[test]
fn a_server_may_speak_first_and_the_app_sees_no_difference() {
    test(
        |_| {},
        |nodes| async move {
            let (mut client, mut server) = nodes.pair().await;
            server.write_all(b"welcome").await.unwrap();
            assert_eq!(read_exactly(&mut client, 7).await, b"welcome");
            client.write_all(b"hi").await.unwrap();
            assert_eq!(read_exactly(&mut server, 2).await, b"hi");
            let view = nodes.a.worker.connections.views(1, 0, 0).remove(0);
            assert_eq!(view.security.as_str(), "mutual_tls");
            assert_eq!(view.peer.unwrap().to_string(), "spiffe://cluster.local/ns/default/sa/default");
            // The app's side was told the client pod's address.
            let asked = nodes.b.sockets.asked.lock().unwrap().pop().unwrap().1;
            assert_eq!(asked.client_addr.unwrap().ip(), std::net::IpAddr::from([127, 0, 0, 1]));
            assert!(asked.inbound);
        },
    );
}

#[test]
fn connections_of_a_pair_of_pods_share_one_tunnel() {
    test(
        |_| {},
        |nodes| async move {
            let mut all = Vec::new();
            for _ in 0..50 {
                all.push(nodes.pair().await);
            }
            for (index, (client, server)) in all.iter_mut().enumerate() {
                client.write_all(&[index as u8; 3]).await.unwrap();
                assert_eq!(read_exactly(server, 3).await, [index as u8; 3]);
                server.write_all(&[index as u8; 2]).await.unwrap();
                assert_eq!(read_exactly(client, 2).await, [index as u8; 2]);
            }
            assert_eq!(nodes.a.metrics.tunnels.so_far(Role::Client), 1);
            assert_eq!(nodes.b.metrics.tunnels.so_far(Role::Server), 1);
        },
    );
}

#[test]
fn a_reset_passes_in_both_directions_after_the_bytes_before_it() {
    test(
        |_| {},
        |nodes| async move {
            let (mut client, mut server) = nodes.pair().await;
            client.write_all(b"before").await.unwrap();
            assert_eq!(read_exactly(&mut server, 6).await, b"before");
            reset(client);
            assert_eq!(read_all(&mut server).await.1, Some(io::ErrorKind::ConnectionReset));
            nodes.ended(CloseReason::ClientReset, CloseReason::ClientReset).await;
        },
    );
    test(
        |_| {},
        |nodes| async move {
            let (mut client, mut server) = nodes.pair().await;
            server.write_all(b"before").await.unwrap();
            assert_eq!(read_exactly(&mut client, 6).await, b"before");
            reset(server);
            assert_eq!(read_all(&mut client).await.1, Some(io::ErrorKind::ConnectionReset));
            nodes.ended(CloseReason::UpstreamReset, CloseReason::UpstreamReset).await;
        },
    );
}

#[test]
fn an_app_that_does_not_read_holds_back_its_own_peer_and_nobody_else() {
    test(
        |_| {},
        |nodes| async move {
            let (mut stuck, stuck_server) = nodes.pair().await;
            let (mut client, mut server) = nodes.pair().await;
            // Until nothing more is taken.
            let piece = pattern(1 << 20);
            let mut sent = 0;
            while let Ok(written) =
                tokio::time::timeout(Duration::from_millis(300), stuck.write(&piece)).await
            {
                sent += written.unwrap();
                assert!(sent < 64 << 20, "no end of taking");
            }
            let held = nodes.b.worker.hbone().held();
            assert!(held > 0 && held <= 512 << 10, "{held}");
            // The other stream of the same tunnel carries on.
            let bulk = pattern(8 << 20);
            let (_, got) = tokio::join!(
                async { client.write_all(&bulk).await.unwrap() },
                read_exactly(&mut server, bulk.len())
            );
            assert!(got == bulk);
            assert_eq!(nodes.b.metrics.tunnels.so_far(Role::Server), 1);
            // And everything arrives once it is read.
            let mut stuck_server = stuck_server;
            let got = read_exactly(&mut stuck_server, sent).await;
            assert!(got.chunks(piece.len()).zip(std::iter::repeat(&piece)).count() > 0);
            eventually(|| nodes.b.worker.hbone().held(), |held| *held == 0).await;
        },
    );
}

#[test]
fn a_refused_connect_resets_the_client_with_its_own_reason() {
    test(
        |_| {},
        |nodes| async move {
            let unused = TcpListener::bind("127.0.0.2:0").await.unwrap().local_addr().unwrap();
            nodes.a.dial(unused);
            let mut client = TcpStream::connect(nodes.a.outbound).await.unwrap();
            assert_eq!(soon(client.read(&mut [0])).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            nodes.ended(CloseReason::UpstreamRefused, CloseReason::UpstreamRefused).await;
        },
    );
}

#[test]
fn a_request_for_anything_but_the_pods_own_ports_is_refused() {
    for (target, reason) in [
        ("127.0.0.2:15001", CloseReason::HbonePort),
        ("127.0.0.2:15020", CloseReason::HbonePort),
        ("127.0.0.2:1", CloseReason::HbonePort),
    ] {
        test(
            |_| {},
            |nodes| async move {
                let target: SocketAddr = target.parse().unwrap();
                nodes.a.dial(target);
                let mut client = TcpStream::connect(nodes.a.outbound).await.unwrap();
                assert_eq!(
                    soon(client.read(&mut [0])).await.unwrap_err().kind(),
                    io::ErrorKind::ConnectionReset
                );
                eventually(|| nodes.b.closed(Direction::Inbound, reason), |count| *count == 1).await;
            },
        );
    }
}

#[test]
fn a_policy_that_comes_to_deny_a_stream_closes_it_and_refuses_the_next() {
    test(
        |_| {},
        |nodes| async move {
            let (mut client, _server) = nodes.pair().await;
            // A workload to which a policy applies that nobody knows is closed to everybody.
            let policed = Workload { policies: vec![Name::new("default", "unknown")], ..server_pod() };
            nodes.b.publish(vec![policed], Vec::new());
            assert_eq!(soon(client.read(&mut [0])).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            nodes.ended(CloseReason::UpstreamReset, CloseReason::PolicyDenied).await;
            let mut client = TcpStream::connect(nodes.a.outbound).await.unwrap();
            assert_eq!(soon(client.read(&mut [0])).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            eventually(
                || nodes.a.closed(Direction::Outbound, CloseReason::PolicyDenied),
                |count| *count == 1,
            )
            .await;
            assert_eq!(nodes.b.metrics.tunnels.so_far(Role::Server), 1, "refusals cost no tunnel");
        },
    );
}

#[test]
fn plaintext_to_the_tunnel_port_is_refused_and_counted() {
    test(
        |_| {},
        |nodes| async move {
            let mut client = TcpStream::connect(nodes.b.hbone).await.unwrap();
            client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            read_all(&mut client).await;
            let reason = CloseReason::Tls(mesh_identity::PeerError::NotTls);
            eventually(|| nodes.b.closed(Direction::Inbound, reason), |count| *count == 1).await;
        },
    );
}

#[test]
fn a_slow_handshake_ends_and_handshakes_at_once_are_bounded() {
    let shape = |settings: &mut Settings| {
        settings.hbone.handshake_timeout = Duration::from_millis(1500);
        settings.hbone.pod_handshakes_max = 2;
    };
    test(shape, |nodes| async move {
        let mut slow = Vec::new();
        for _ in 0..4 {
            // Those beyond the limit may be reset already.
            let Ok(mut client) = TcpStream::connect(nodes.b.hbone).await else { continue };
            client.write_all(&[22, 3, 1]).await.ok();
            slow.push(client);
        }
        let of = |reason| nodes.b.closed(Direction::Inbound, reason);
        eventually(|| of(CloseReason::TooManyHandshakes), |count| *count == 2).await;
        eventually(|| of(CloseReason::TlsTimeout), |count| *count == 2).await;
        // There is room again.
        drop(nodes.pair().await);
    });
}

#[test]
fn an_idle_tunnel_is_closed_and_made_anew_when_needed() {
    let shape = |settings: &mut Settings| settings.hbone.idle_timeout = Duration::from_millis(500);
    test(shape, |nodes| async move {
        drop(nodes.pair().await);
        eventually(|| nodes.a.metrics.tunnels.now(Role::Client), |now| *now == 0).await;
        eventually(|| nodes.b.metrics.tunnels.now(Role::Server), |now| *now == 0).await;
        drop(nodes.pair().await);
        assert_eq!(nodes.a.metrics.tunnels.so_far(Role::Client), 2);
    });
}

#[test]
fn a_leaving_tunnel_finishes_its_streams_and_new_ones_go_elsewhere() {
    test(
        |_| {},
        |nodes| async move {
            let (mut client, mut server) = nodes.pair().await;
            nodes.b.worker.hbone().leave_pod(1);
            eventually(|| nodes.a.metrics.tunnels.now(Role::Client), |now| *now == 1).await;
            sleep(Duration::from_millis(50)).await;
            drop(nodes.pair().await);
            assert_eq!(nodes.a.metrics.tunnels.so_far(Role::Client), 2);
            client.write_all(b"still").await.unwrap();
            assert_eq!(read_exactly(&mut server, 5).await, b"still");
            drop((client, server));
            eventually(|| nodes.a.metrics.tunnels.now(Role::Client), |now| *now == 1).await;
        },
    );
}

#[test]
fn full_tunnels_are_joined_by_further_ones() {
    test(
        |settings| settings.hbone.streams_max = 3,
        |nodes| async move {
            let mut held = Vec::new();
            for _ in 0..8 {
                held.push(nodes.pair().await);
            }
            for (client, server) in &mut held {
                client.write_all(b"x").await.unwrap();
                read_exactly(server, 1).await;
            }
            assert_eq!(nodes.b.metrics.tunnels.now(Role::Server), 3);
        },
    );
}
