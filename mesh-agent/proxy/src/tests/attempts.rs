//! Connections through tunnels whose server does not take them: another one is tried, or the client learns of it in time.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::{
    fixture::{endpoint, eventually, service, soon},
    hbone::{Nodes, server_pod, test},
    outbound::hanging,
};
use crate::{
    close::{CloseReason, Direction},
    hbone::tunnel::Role,
    kernel::TcpFigures,
    settings::Settings,
};

const VIP: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)), 80);

/// Only the client's node is in a hurry, so that it is its own limit that is met.
fn hurried(settings: &mut Settings) {
    if &*settings.node == "a" {
        settings.connect_timeout = Duration::from_millis(300);
        settings.attempt_timeout = Duration::from_millis(200);
    }
}

impl Nodes {
    /// The service has these endpoints in the pod of node `b`, and is what clients dial.
    fn serve(&self, addrs: &[SocketAddr]) {
        let id = server_pod().id;
        let endpoints = addrs.iter().map(|addr| endpoint(*addr, Some(id))).collect();
        self.a.publish(vec![server_pod()], vec![service("web", VIP.ip(), endpoints)]);
        self.a.dial(VIP);
    }

    /// A client that speaks at once gets through to the app.
    async fn exchange(&self) {
        let mut client = TcpStream::connect(self.a.outbound).await.unwrap();
        client.write_all(b"ping").await.unwrap();
        let (mut server, _) = soon(self.app.accept()).await.unwrap();
        soon(server.read_exact(&mut [0; 4])).await.unwrap();
        server.write_all(b"pong").await.unwrap();
        soon(client.read_exact(&mut [0; 4])).await.unwrap();
    }
}

/// An address of the pod on `b` where nobody listens.
async fn refusing() -> SocketAddr {
    TcpListener::bind("127.0.0.2:0").await.unwrap().local_addr().unwrap()
}

#[test]
fn a_server_that_refuses_is_left_for_another_one_though_the_client_spoke_at_once() {
    test(
        |_| {},
        |nodes| async move {
            nodes.serve(&[refusing().await, nodes.app.local_addr().unwrap()]);
            for _ in 0..20 {
                nodes.exchange().await;
            }
            assert!(nodes.a.metrics.connect_retries.get() > 0);
            assert_eq!(nodes.a.closed(Direction::Outbound, CloseReason::UpstreamRefused), 0);
        },
    );
}

#[test]
fn a_server_that_does_not_answer_is_left_for_another_one_though_the_client_spoke_at_once() {
    test(hurried, |nodes| async move {
        let (_hanging, silent, _fill) = hanging([127, 0, 0, 2]).await;
        nodes.serve(&[silent, nodes.app.local_addr().unwrap()]);
        for _ in 0..8 {
            nodes.exchange().await;
        }
        assert!(nodes.a.metrics.connect_retries.get() > 0);
        assert_eq!(nodes.a.closed(Direction::Outbound, CloseReason::UpstreamTimeout), 0);
    });
}

/// A client that spoke at once is reset in time by the only server's silence.
async fn met_with_silence(nodes: &Nodes) {
    let (_hanging, silent, _fill) = hanging([127, 0, 0, 2]).await;
    nodes.a.dial(silent);
    let begun = Instant::now();
    let mut client = TcpStream::connect(nodes.a.outbound).await.unwrap();
    client.write_all(b"ping").await.unwrap();
    let error = soon(client.read(&mut [0])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    let timed_out = || nodes.a.closed(Direction::Outbound, CloseReason::UpstreamTimeout);
    eventually(timed_out, |count| *count == 1).await;
    nodes.a.dial(nodes.app.local_addr().unwrap());
}

#[test]
fn a_server_that_does_not_answer_costs_the_connect_time_out_though_the_client_spoke_at_once() {
    test(hurried, |nodes| async move {
        met_with_silence(&nodes).await;
        // It was the app that did not answer, not the way to it.
        nodes.exchange().await;
        assert_eq!(nodes.a.metrics.tunnels.so_far(Role::Client), 1);
    });
}

#[test]
fn a_tunnel_whose_peer_acknowledges_nothing_is_not_used_again() {
    test(hurried, |nodes| async move {
        *nodes.a.kernel.figures.lock().unwrap() = Some(TcpFigures { srtt_us: 9, unanswered: true });
        met_with_silence(&nodes).await;
        nodes.exchange().await;
        assert_eq!(nodes.a.metrics.tunnels.so_far(Role::Client), 2);
    });
}

#[test]
fn a_flow_counts_what_was_taken_and_what_was_not() {
    test(
        |_| {},
        |nodes| async move {
            *nodes.a.kernel.figures.lock().unwrap() = Some(TcpFigures { srtt_us: 50, unanswered: false });
            nodes.exchange().await;
            nodes.a.dial(refusing().await);
            let mut refused = TcpStream::connect(nodes.a.outbound).await.unwrap();
            refused.write_all(b"ping").await.unwrap();
            soon(refused.read(&mut [0])).await.unwrap_err();
            let port = nodes.app.local_addr().unwrap().port();
            let sums = || {
                let mut flows = nodes.a.metrics.tunnelled();
                flows.sort_by_key(|flow| flow.port != port);
                flows
                    .iter()
                    .map(|flow| (flow.opened, flow.closed, flow.failed, flow.srtt_us))
                    .collect::<Vec<_>>()
            };
            eventually(sums, |sums| sums[..] == [(1, 1, 0, 50), (0, 0, 1, 0)]).await;
            let flows = nodes.a.metrics.tunnelled();
            assert!(flows.iter().all(|flow| (flow.connect_ns > 0) == (flow.port == port)), "{flows:?}");
            assert!(flows.iter().any(|flow| (flow.to_server, flow.to_client) == (4, 4)), "{flows:?}");
        },
    );
}
