//! Admission, panics, drains, removal and views: the life of the proxy rather than of one connection.

use std::{
    io,
    net::TcpListener as StdListener,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_core::{id::WorkloadId, snapshot::Snapshot};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    time::{Instant, sleep},
};

use super::fixture::{
    FakeKernel, FakeSockets, PANIC_PORT, World, eventually, in_world, pod_name, reset, soon,
};
use crate::{
    Dependencies, Metrics, Proxy, Settings,
    close::{CloseReason, Direction},
    kernel::{Dialled, PodHandle, PodListeners},
    listener::Queued,
    worker::Command,
};

fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    in_world(false, |_| {}, body);
}

async fn refused(addr: std::net::SocketAddr) -> bool {
    TcpStream::connect(addr).await.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

async fn drain(world: &World, grace: Duration) -> usize {
    let (done_tx, done_rx) = oneshot::channel();
    let deadline = Instant::now() + grace;
    let drain = Command::Drain { deadline, queued: Queued::Accepted, done: done_tx };
    world.commands.send(drain).await.unwrap();
    done_rx.await.unwrap()
}

#[test]
fn a_panic_takes_its_connection_and_nothing_else() {
    test(|world| async move {
        let (mut other, mut server) = world.pair().await;
        world.dial(([127, 0, 0, 1], PANIC_PORT).into());
        let mut client = TcpStream::connect(world.outbound).await.unwrap();
        assert!(matches!(soon(client.read(&mut [0])).await, Ok(0) | Err(_)));
        world.ended(CloseReason::Bug, 1).await;
        other.write_all(b"still there").await.unwrap();
        soon(server.read_exact(&mut [0; 11])).await.unwrap();
        drop(world.pair().await);
    });
}

#[test]
fn more_connections_than_allowed_are_reset_and_counted() {
    for (all, pod) in [(2, 10), (10, 2)] {
        let shape = |settings: &mut Settings| {
            (settings.connections_max, settings.pod_connections_max) = (all, pod);
        };
        in_world(false, shape, |world| async move {
            let first = world.pair().await;
            let _second = world.pair().await;
            let mut third = TcpStream::connect(world.outbound).await.unwrap();
            assert_eq!(soon(third.read(&mut [0])).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(world.closed(Direction::Outbound, CloseReason::Overloaded), 1);
            // A place that becomes free is given again.
            drop(first);
            world.ended(CloseReason::Finished, 1).await;
            drop(world.pair().await);
        });
    }
}

#[test]
fn a_drain_ends_early_when_the_last_connection_does() {
    in_world(
        true,
        |_| {},
        |world| async move {
            let pair = world.pair().await;
            drop(tokio::task::spawn_local(async move {
                sleep(Duration::from_secs(3)).await;
                drop(pair);
            }));
            let begun = Instant::now();
            assert_eq!(drain(&world, Duration::from_secs(30)).await, 0);
            assert!((3000..3200).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
            assert_eq!(world.closed(Direction::Outbound, CloseReason::Finished), 1);
        },
    );
}

#[test]
fn a_drain_takes_nothing_new_and_ends_what_is_left_after_the_grace_period() {
    in_world(
        true,
        |_| {},
        |world| async move {
            let (mut client, mut server) = world.pair().await;
            let (mut idle, mut its_server) = world.pair().await;
            let begun = Instant::now();
            let during = async {
                sleep(Duration::from_secs(1)).await;
                assert!(refused(world.outbound).await);
                idle.write_all(b"x").await.unwrap();
                its_server.read_exact(&mut [0]).await.unwrap();
                while begun.elapsed() < Duration::from_millis(4800) {
                    client.write_all(b"x").await.unwrap();
                    server.read_exact(&mut [0]).await.unwrap();
                    sleep(Duration::from_millis(200)).await;
                }
            };
            let (rest, ()) = tokio::join!(drain(&world, Duration::from_secs(5)), during);
            assert_eq!(rest, 2);
            assert!((5000..6000).contains(&begun.elapsed().as_millis()), "{:?}", begun.elapsed());
            assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(server.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            // Of one that says nothing, nothing is cut off.
            assert_eq!(idle.read(&mut [0]).await.unwrap(), 0);
            assert_eq!(its_server.read(&mut [0]).await.unwrap(), 0);
            world.ended(CloseReason::Drained, 2).await;
        },
    );
}

#[test]
fn a_removed_pods_connections_live_on() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        let (done_tx, done_rx) = oneshot::channel();
        world.commands.send(Command::Remove { pod: 1, done: done_tx }).await.unwrap();
        done_rx.await.unwrap();
        assert!(refused(world.outbound).await, "closed before the answer");
        client.write_all(b"x").await.unwrap();
        soon(server.read_exact(&mut [0])).await.unwrap();
    });
}

#[test]
fn connections_queued_when_a_listener_is_stopped_are_served() {
    test(|world| async move {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        world.dial(server.local_addr().unwrap());
        // Blocking connects: the worker, which shares this thread, has no chance to accept in between.
        let queued: Vec<_> = (0..70).map(|_| std::net::TcpStream::connect(world.outbound).unwrap()).collect();
        assert_eq!(drain(&world, Duration::ZERO).await, 70);
        drop((queued, server));
    });
}

#[test]
fn a_view_shows_a_connection_and_its_bytes() {
    test(|world| async move {
        let (mut client, mut server) = world.pair().await;
        client.write_all(b"12345").await.unwrap();
        soon(server.read_exact(&mut [0; 5])).await.unwrap();
        server.write_all(b"123").await.unwrap();
        soon(client.read_exact(&mut [0; 3])).await.unwrap();
        let views = world.worker.connections.views(10, 0, 100);
        let [view] = &views[..] else { panic!("{views:?}") };
        assert_eq!((view.bytes_to_server, view.bytes_to_client), (5, 3));
        assert_eq!((view.direction, &view.pod), (Direction::Outbound, &pod_name()));
        assert_eq!(view.client, client.local_addr().unwrap());
        assert_eq!((view.original_dst, view.upstream), (view.upstream, Some(server.local_addr().unwrap())));
        assert_eq!(view.source, Some(pod_name()));
        reset(client);
        eventually(|| world.worker.connections.views(10, 0, 100).len(), |n| *n == 0).await;
    });
}

#[test]
fn a_connections_task_stays_small() {
    test(|world| async move {
        let (client, _server) = world.pair().await;
        let accepted = crate::worker::Accepted {
            socket: client.into_std().unwrap(),
            client: world.outbound,
            arrival: crate::worker::Arrival::Tcp(Direction::Outbound),
            pod: Arc::clone(&world.pod),
        };
        let size = size_of_val(&world.worker.serve(accepted, Direction::Outbound));
        assert!((300..1000).contains(&size), "{size} bytes");
    });
}

/// A proxy with several workers and one pod, and the addresses of the pod's outbound listeners.
async fn proxy(
    workers: usize,
    alive: Box<dyn Fn(u64) + Send + Sync>,
) -> (Proxy, Arc<Metrics>, TcpListener, Vec<std::net::SocketAddr>) {
    let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = Dialled { dst: server.local_addr().unwrap(), backend: None, service: None, started_ns: 0 };
    let kernel = FakeKernel { dialled: Mutex::new(Some(dialled)), ..FakeKernel::default() };
    let mut settings = Settings::new("a");
    settings.workers = NonZeroUsize::new(workers).unwrap();
    let metrics = Arc::new(Metrics::register(&mut Registry::default()));
    let (_, snapshots) = watch::channel(Arc::new(Snapshot::default()));
    let dependencies = Dependencies {
        sockets: Arc::new(FakeSockets::default()),
        kernel: Arc::new(kernel),
        snapshots,
        metrics: Arc::clone(&metrics),
        certificates: super::fixture::idle_certificates(),
        alive,
    };
    let proxy = Proxy::start(settings, dependencies).unwrap();
    let outbound: Vec<StdListener> = (0..4).map(|_| StdListener::bind("127.0.0.1:0").unwrap()).collect();
    let addrs = outbound.iter().map(|l| l.local_addr().unwrap()).collect();
    let listeners = PodListeners {
        outbound: outbound.into_iter().map(Into::into).collect(),
        inbound: StdListener::bind("127.0.0.1:0").unwrap().into(),
        hbone: StdListener::bind("127.0.0.1:0").unwrap().into(),
        dns_udp: std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into(),
        dns_tcp: StdListener::bind("127.0.0.1:0").unwrap().into(),
    };
    let handle = PodHandle {
        pod: 1,
        workload: WorkloadId(7),
        name: pod_name(),
        netns_cookie: 1,
        addrs: vec!["127.0.0.1".parse().unwrap()],
    };
    proxy.add_pod(handle, listeners).await.unwrap();
    (proxy, metrics, server, addrs)
}

#[tokio::test]
async fn a_busy_worker_hands_connections_to_an_idle_one() {
    let (proxy, metrics, server, outbound) = proxy(2, Box::new(|_| {})).await;
    let mut held = Vec::new();
    for _ in 0..20 {
        let mut client = TcpStream::connect(outbound[0]).await.unwrap();
        let (mut accepted, _) = soon(server.accept()).await.unwrap();
        client.write_all(b"x").await.unwrap();
        soon(accepted.read_exact(&mut [0])).await.unwrap();
        held.push((client, accepted));
    }
    let by_worker: Vec<u64> = proxy.connections(100).await.iter().map(|row| row.id >> 48).collect();
    let second = by_worker.iter().filter(|worker| **worker == 1).count();
    assert_eq!(by_worker.len(), 20);
    assert!((7..=13).contains(&second), "{by_worker:?}");
    assert!(metrics.handovers.get() >= 7);
}

#[tokio::test]
async fn listeners_of_every_worker_serve_and_stop_with_the_pod() {
    let (proxy, _, server, outbound) = proxy(3, Box::new(|_| {})).await;
    let mut held = Vec::new();
    for addr in &outbound {
        held.push((TcpStream::connect(addr).await.unwrap(), soon(server.accept()).await.unwrap()));
    }
    proxy.remove_pod(1).await;
    for addr in &outbound {
        assert!(refused(*addr).await);
    }
    assert_eq!(proxy.connections(100).await.len(), 4);
    assert_eq!(proxy.drain(Duration::from_millis(50), Queued::Accepted).await.aborted, 4);
    assert!(proxy.connections(100).await.is_empty());
}

#[tokio::test]
async fn what_waits_when_listeners_are_left_to_a_successor_is_accepted_there() {
    let (proxy, _, server, outbound) = proxy(2, Box::new(|_| {})).await;
    let given: Vec<StdListener> =
        proxy.duplicate_listeners().await.unwrap().into_iter().map(StdListener::from).collect();
    assert_eq!(given.len(), 8, "four outbound, inbound, HBONE, DNS twice");
    // Given away is not left: this process accepts as before.
    let held = TcpStream::connect(outbound[0]).await.unwrap();
    soon(server.accept()).await.unwrap();
    let drained = proxy.drain(Duration::from_millis(50), Queued::LeftToSuccessor).await;
    assert_eq!(drained.aborted, 1);
    drop(held);
    for addr in &outbound {
        let waits = TcpStream::connect(addr).await.unwrap();
        let same = given.iter().find(|socket| socket.local_addr().is_ok_and(|own| own == *addr)).unwrap();
        let accepted = eventually(|| same.accept().ok(), Option::is_some).await;
        assert_eq!(accepted.unwrap().1, waits.local_addr().unwrap());
    }
    drop(given);
    assert!(refused(outbound[0]).await, "nobody else had it");
}

#[tokio::test]
async fn workers_show_that_they_live_and_end_with_the_proxy() {
    let last = Arc::new(AtomicU64::new(0));
    let stamps = Arc::clone(&last);
    let (proxy, _, _server, outbound) =
        proxy(2, Box::new(move |ns| stamps.store(ns, Ordering::Relaxed))).await;
    let first = eventually(|| last.load(Ordering::Relaxed), |ns| *ns > 0).await;
    eventually(|| last.load(Ordering::Relaxed), |ns| *ns > first + 150_000_000).await;
    drop(proxy);
    soon(async {
        while !refused(outbound[0]).await {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}
