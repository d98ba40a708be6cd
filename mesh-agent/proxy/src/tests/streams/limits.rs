//! Limits, lives and failures of connections as a policy has them.

use mesh_core::{
    route::{
        cluster::OutlierDetection,
        defaults::{DefaultClusters, MeshDefaults},
    },
    snapshot::Mesh,
};
use socket2::SockRef;

use super::*;
use crate::tests::fixture::eventually;

fn refused_soon() -> OutlierDetection {
    OutlierDetection {
        consecutive_5xx: Some(1),
        consecutive_gateway: None,
        consecutive_local: None,
        split_local: false,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 100,
        min_health_percent: 0,
        error_statuses: Vec::new(),
    }
}

#[test]
fn no_more_connections_than_the_policy_allows_are_made() {
    test(|world| async move {
        let a = Server::named("A").await;
        let services = vec![plain("web", VIP, "tcp", &[a.addr])];
        publish(&world, services, policy(|policy| policy.pool.max_connections = Some(2)));
        let mut held = Vec::new();
        for _ in 0..2 {
            let mut client = connect(&world).await;
            assert_eq!(answered(&mut client, b"").await, 'A');
            held.push(client);
        }
        let mut refused = connect(&world).await;
        assert!(soon(refused.read(&mut [0])).await.is_err());
        world.ended_so_far(CloseReason::Overflow, 1).await;
        assert_eq!(CloseReason::Overflow.response_flags(), "UO");
        drop(held.pop());
        eventually(|| world.worker.connections.len(), |count| *count == 1).await;
        let mut next = connect(&world).await;
        assert_eq!(answered(&mut next, b"").await, 'A');
    });
}

#[test]
fn an_endpoint_that_cannot_be_reached_is_left_out() {
    test(|world| async move {
        let a = Server::named("A").await;
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let services = vec![plain("web", VIP, "tcp", &[gone, a.addr])];
        publish(&world, services, policy(|policy| policy.outlier = Some(refused_soon())));
        assert_eq!(spread(&world, 30).await, HashMap::from([('A', 30)]));
        let asked = world.sockets.asked.lock().unwrap();
        assert!(asked.iter().filter(|(addr, _)| *addr == gone).count() <= 1, "asked once, then left out");
    });
}

#[test]
fn without_an_endpoint_that_is_well_connections_are_reset() {
    test(|world| async move {
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let services = vec![plain("web", VIP, "tcp", &[gone])];
        publish(&world, services, policy(|policy| policy.outlier = Some(refused_soon())));
        for reason in [CloseReason::UpstreamRefused, CloseReason::NoEndpoint] {
            let mut client = connect(&world).await;
            assert!(soon(client.read(&mut [0])).await.is_err());
            world.ended_so_far(reason, 1).await;
        }
    });
}

#[test]
fn connections_live_as_long_as_the_policy_lets_them() {
    test(|world| async move {
        let a = Server::named("A").await;
        let services = || vec![plain("web", VIP, "tcp", &[a.addr])];
        publish(&world, services(), policy(|policy| policy.pool.idle_timeout = Duration::from_millis(300)));
        let mut idle = connect(&world).await;
        assert_eq!(answered(&mut idle, b"").await, 'A');
        assert!(soon(idle.read(&mut [0])).await.is_err());
        world.ended_so_far(CloseReason::IdleTimeout, 1).await;
        let short = Some(Duration::from_millis(300));
        publish(&world, services(), policy(|policy| policy.pool.max_connection_duration = short));
        let mut busy = connect(&world).await;
        assert_eq!(answered(&mut busy, b"").await, 'A');
        let over = async {
            loop {
                if busy.write_all(b"x").await.is_err() || busy.read_exact(&mut [0]).await.is_err() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        soon(over).await;
        world.ended_so_far(CloseReason::MaxDuration, 1).await;
    });
}

#[test]
fn the_idle_time_of_requests_is_none_of_relayed_bytes() {
    test(|world| async move {
        let a = Server::named("A").await;
        let services = || vec![plain("web", VIP, "tcp", &[a.addr])];
        publish(
            &world,
            services(),
            policy(|policy| policy.pool.http_idle_timeout = Some(Duration::from_millis(100))),
        );
        let mut long = connect(&world).await;
        assert_eq!(answered(&mut long, b"").await, 'A');
        // One that begins later and ends by its own time shows that the first one's would have been over.
        publish(&world, services(), policy(|policy| policy.pool.idle_timeout = Duration::from_millis(400)));
        let mut short = connect(&world).await;
        assert_eq!(answered(&mut short, b"").await, 'A');
        assert!(soon(short.read(&mut [0])).await.is_err());
        world.ended_so_far(CloseReason::IdleTimeout, 1).await;
        long.write_all(b"x").await.unwrap();
        soon(long.read_exact(&mut [0])).await.unwrap();
    });
}

#[test]
fn keep_alive_is_set_as_the_policy_says() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let opened = crate::stream::Stream::connect(
            crate::kernel::Sockets::tcp(&*world.sockets, &world.pod.handle, addr, &Default::default())
                .unwrap(),
            addr,
        );
        let transport = crate::outbound::Transport::Tcp(soon(opened).await.unwrap());
        let mut pool = TrafficPolicy::default().pool;
        let seen = |transport: &crate::outbound::Transport| {
            let crate::outbound::Transport::Tcp(stream) = transport else { panic!() };
            let socket = SockRef::from(stream.socket());
            (
                socket.keepalive().unwrap(),
                socket.tcp_keepalive_time().unwrap(),
                socket.tcp_keepalive_retries().unwrap(),
            )
        };
        crate::connect::keep_alive(&transport, &pool);
        assert!(!seen(&transport).0, "nothing is said");
        pool.keepalive = Some((Some(4), Some(Duration::from_secs(77)), None));
        crate::connect::keep_alive(&transport, &pool);
        assert_eq!(seen(&transport), (true, Duration::from_secs(77), 4));
    });
}

#[test]
fn what_the_mesh_says_holds_for_services_that_nothing_else_is_said_about() {
    test(|world| async move {
        let a = Server::named("A").await;
        let mut policy = TrafficPolicy::default();
        policy.pool.max_connections = Some(1);
        policy.pool.idle_timeout = Duration::from_millis(300);
        let clusters = DefaultClusters::of(&policy);
        let defaults = MeshDefaults { clusters, ..MeshDefaults::default() };
        let own = workload("client", "a", "127.0.0.1".parse().unwrap());
        let parts = Parts {
            workloads: vec![Arc::new(own)],
            services: vec![Arc::new(plain("web", VIP, "tcp", &[a.addr]))],
            mesh: Arc::new(Mesh { defaults: Arc::new(defaults), ..Mesh::default() }),
            ..Parts::default()
        };
        world.snapshots.send_replace(Arc::new(Snapshot::new(2, parts)));
        world.dial(SocketAddr::new(VIP.parse().unwrap(), 80));
        let mut first = connect(&world).await;
        assert_eq!(answered(&mut first, b"").await, 'A');
        let mut second = connect(&world).await;
        assert!(soon(second.read(&mut [0])).await.is_err());
        world.ended_so_far(CloseReason::Overflow, 1).await;
        assert!(soon(first.read(&mut [0])).await.is_err());
        world.ended_so_far(CloseReason::IdleTimeout, 1).await;
        // An address is no service.
        world.dial(a.addr);
        let mut held = Vec::new();
        for _ in 0..2 {
            held.push(connect(&world).await);
        }
        for client in &mut held {
            assert_eq!(answered(client, b"").await, 'A');
        }
    });
}
