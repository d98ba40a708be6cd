//! Limits of a destination: Istio's 503 with `UO`, and what waits instead.

use mesh_core::route::cluster::TrafficPolicy;

use super::{transports::http2_server_of, *};
use crate::destination::{limits, standing::destinations};

/// Starts a request that will be answered once it is let go.
fn held(
    world: &World,
    live: &Rc<Live>,
    shape: impl Fn(&mut TrafficPolicy),
) -> tokio::task::JoinHandle<Answer> {
    let request = plan(world, live, destination(world, shape));
    let upstreams = Upstreams::of(&world.worker);
    tokio::task::spawn_local(async move { upstreams.send(get("/"), request).await })
}

#[test]
fn beyond_one_connection_one_request_waits_and_the_next_is_refused() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("done")).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let one = |policy: &mut TrafficPolicy| {
            policy.pool.max_connections = Some(1);
            policy.pool.max_pending = Some(1);
        };
        // Its response is there, and keeps the connection until it is read.
        let first = send(&world, get("/"), plan(&world, open.live(), destination(&world, one))).await;
        assert_eq!(status(&first), 200);
        let waiting = held(&world, open.live(), one);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        let refused = send(&world, get("/"), plan(&world, open.live(), destination(&world, one))).await;
        let why = failure(&refused);
        assert_eq!((why.status, why.flag, why.overloaded), (503, Flag::Overflow, true));
        assert_eq!(why.details, "upstream_reset_before_response_started{overflow}");
        assert_eq!(read(first).await, (200, b"done".to_vec()));
        assert_eq!(read(soon(waiting).await.unwrap()).await, (200, b"done".to_vec()));
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn requests_at_once_are_limited_and_pods_have_limits_of_their_own() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::Endless).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let two = |policy: &mut TrafficPolicy| policy.pool.max_requests = Some(2);
        let mut kept = Vec::new();
        for _ in 0..2 {
            kept.push(send(&world, get("/"), plan(&world, open.live(), destination(&world, two))).await);
        }
        assert!(kept.iter().all(|answer| status(answer) == 200));
        let refused = send(&world, get("/"), plan(&world, open.live(), destination(&world, two))).await;
        assert_eq!((failure(&refused).status, failure(&refused).flag), (503, Flag::Overflow));
        kept.pop();
        let again = send(&world, get("/"), plan(&world, open.live(), destination(&world, two))).await;
        assert_eq!(status(&again), 200);
    });
}

#[test]
fn a_connection_serves_as_many_requests_as_it_may() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("x")).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        for _ in 0..4 {
            let two = |policy: &mut TrafficPolicy| policy.pool.max_requests_per_connection = Some(2);
            let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, two))).await;
            assert_eq!(read(answer).await.0, 200);
            tokio::task::yield_now().await;
        }
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn a_worker_that_never_runs_out_of_requests_leaves_the_connection_to_another_now_and_then() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("done")).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let one = |policy: &mut TrafficPolicy| policy.pool.max_connections = Some(1);
        let many = async |world: &World| {
            let asked = (0..100).map(|_| {
                let answer = held(world, open.live(), one);
                tokio::task::spawn_local(async move { read(answer.await.unwrap()).await.0 })
            });
            for status in asked.collect::<Vec<_>>() {
                assert_eq!(soon(status).await.unwrap(), 200);
            }
        };
        many(&world).await;
        assert_eq!(server.connections(), 1, "nobody else waits");
        let there =
            world.worker.destinations.of(&world.worker, open.live().pod.pod, &destination(&world, one));
        there.usage.waiting.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
        many(&world).await;
        assert!((3..=6).contains(&server.connections()), "{}", server.connections());
    });
}

/// Publishes a service `web` of HTTP/2 with this endpoint.
fn publish_streams(world: &World, addr: SocketAddr) {
    let mut web = service("web", VIP.into(), vec![endpoint(addr, None)]);
    web.ports[0].name = "grpc".into();
    world.publish(Vec::new(), vec![web]);
}

#[test]
fn requests_wait_in_turn_for_the_streams_of_the_one_connection_there_may_be() {
    // Who says that a connection has two streams: the policy, or the server.
    for (of_policy, of_server) in [(Some(2), None), (None, Some(2))] {
        test(move |world| async move {
            let (addr, connections) = http2_server_of(of_server).await;
            publish_streams(&world, addr);
            let open = client(&world);
            let one = |policy: &mut TrafficPolicy| {
                policy.pool.max_connections = Some(1);
                policy.pool.max_concurrent_streams = of_policy;
            };
            let first = send(&world, get("/"), plan(&world, open.live(), destination(&world, one))).await;
            assert_eq!(status(&first), 200);
            let kept = send(&world, get("/"), plan(&world, open.live(), destination(&world, one))).await;
            assert_eq!(status(&kept), 200);
            let waiting: Vec<_> = (0..3).map(|_| held(&world, open.live(), one)).collect();
            tokio::time::sleep(Duration::from_millis(60)).await;
            // A stream whose response is there, read or not, is over for the server.
            let is_any_early = waiting.iter().any(|request| request.is_finished());
            assert!(of_server.is_some() || !is_any_early);
            assert_eq!(read(first).await.0, 200);
            for request in waiting {
                assert_eq!(read(soon(request).await.unwrap()).await.0, 200);
            }
            assert_eq!((read(kept).await.0, connections.get()), (200, 1));
        });
    }
}

#[test]
fn beyond_the_streams_of_a_connection_another_is_made() {
    test(|world| async move {
        let (addr, connections) = http2_server_of(None).await;
        publish_streams(&world, addr);
        let open = client(&world);
        let two = |policy: &mut TrafficPolicy| policy.pool.max_concurrent_streams = Some(2);
        let mut kept = Vec::new();
        for expected in [1, 1, 2, 2, 3] {
            let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, two))).await;
            assert_eq!((status(&answer), connections.get()), (200, expected));
            kept.push(answer);
        }
    });
}

#[test]
fn a_worker_has_one_connection_of_streams_whatever_the_others_have() {
    test(|world| async move {
        let (addr, connections) = http2_server_of(None).await;
        publish_streams(&world, addr);
        let open = client(&world);
        let one = |policy: &mut TrafficPolicy| {
            policy.pool.max_connections = Some(1);
            policy.pool.max_concurrent_streams = Some(1);
        };
        let to = destination(&world, one);
        let there = world.worker.destinations.of(&world.worker, open.live().pod.pod, &to);
        let of_another = there.usage.take(limits::Kind::Connection, Some(1)).unwrap();
        let first = send(&world, get("/"), plan(&world, open.live(), to)).await;
        assert_eq!(status(&first), 200);
        // One, and no more: the next waits for its stream.
        let waiting = held(&world, open.live(), one);
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert!(!waiting.is_finished());
        assert_eq!(read(first).await.0, 200);
        assert_eq!(read(soon(waiting).await.unwrap()).await.0, 200);
        assert_eq!(connections.get(), 1);
        // A connection of HTTP/1 is one of those that are counted for all.
        let plain = Server::start("127.0.0.1:0", |_| Reply::ok("one")).await;
        publish(&world, vec![endpoint(plain.addr, None)]);
        let waiting = held(&world, open.live(), one);
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert!(!waiting.is_finished());
        drop(of_another);
        assert_eq!(read(soon(waiting).await.unwrap()).await.0, 200);
    });
}

#[test]
fn a_connection_whose_last_stream_ends_makes_room_for_a_request_of_another_kind() {
    test(|world| async move {
        let (addr, _) = http2_server_of(None).await;
        publish_streams(&world, addr);
        let open = client(&world);
        let one = |policy: &mut TrafficPolicy| policy.pool.max_connections = Some(1);
        let first = send(&world, get("/"), plan(&world, open.live(), destination(&world, one))).await;
        assert_eq!(status(&first), 200);
        let plain = Server::start("127.0.0.1:0", |_| Reply::ok("one")).await;
        publish(&world, vec![endpoint(plain.addr, None)]);
        let waiting = held(&world, open.live(), one);
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert!(!waiting.is_finished());
        assert_eq!(read(first).await.0, 200);
        assert_eq!(read(soon(waiting).await.unwrap()).await, (200, b"one".to_vec()));
    });
}

#[test]
fn the_connection_to_one_endpoint_makes_room_for_another_when_only_one_may_be() {
    test(|world| async move {
        let servers = [
            Server::start("127.0.0.1:0", |_| Reply::ok("a")).await,
            Server::start("127.0.0.1:0", |_| Reply::ok("b")).await,
        ];
        publish(&world, servers.iter().map(|server| endpoint(server.addr, None)).collect());
        let open = client(&world);
        for _ in 0..6 {
            let one = |policy: &mut TrafficPolicy| {
                policy.pool.max_connections = Some(1);
                policy.balancing.algorithm = mesh_core::route::cluster::Algorithm::RoundRobin;
            };
            let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, one))).await;
            assert_eq!(read(answer).await.0, 200);
            tokio::task::yield_now().await;
        }
        assert!(servers.iter().all(|server| server.connections() >= 2));
    });
}

#[test]
fn an_idle_connection_ends_by_the_time_of_requests_else_by_that_of_all() {
    test(|world| async move {
        let soon_over = Duration::from_millis(200);
        let all = |policy: &mut TrafficPolicy| policy.pool.idle_timeout = soon_over;
        let requests = |policy: &mut TrafficPolicy| policy.pool.http_idle_timeout = Some(soon_over);
        for shape in [&all as &dyn Fn(&mut TrafficPolicy), &requests] {
            let server = Server::start("127.0.0.1:0", |_| Reply::ok("a")).await;
            publish(&world, vec![endpoint(server.addr, None)]);
            let open = client(&world);
            let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, shape))).await;
            assert_eq!(read(answer).await.0, 200);
            eventually(|| server.closed(), |closed| *closed == 1).await;
        }
    });
}

#[test]
fn what_is_in_use_and_who_failed_can_be_asked_for() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |head| match head.contains("/bad") {
            true => Reply::status(503),
            false => Reply::Endless,
        })
        .await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let watched = |policy: &mut TrafficPolicy| {
            policy.outlier = Some(mesh_core::route::cluster::OutlierDetection {
                consecutive_5xx: Some(5),
                consecutive_gateway: None,
                consecutive_local: None,
                split_local: false,
                interval: Duration::from_secs(60),
                base_ejection: Duration::from_secs(60),
                max_ejection_percent: 100,
                min_health_percent: 0,
                error_statuses: Vec::new(),
            });
        };
        let once = async |path| {
            let plan = Plan { retry: false, ..plan(&world, open.live(), destination(&world, watched)) };
            send(&world, get(path), plan).await
        };
        for _ in 0..2 {
            assert_eq!(status(&once("/bad").await), 503);
        }
        let kept = once("/").await;
        assert_eq!(status(&kept), 200);
        let shown = || {
            let shown = destinations(&world.worker.shared().limits, world.worker.destinations.active());
            let [one] = &shown[..] else { panic!("{shown:?}") };
            let endpoint = one.endpoints.get(&server.addr).copied().unwrap_or_default();
            (one.requests, endpoint.active, endpoint.failures, endpoint.out_for.is_some())
        };
        assert_eq!(shown(), (1, 1, 0, false), "the success has made up for the failures");
        drop(kept);
        eventually(&shown, |now| *now == (0, 0, 0, false)).await;
        for _ in 0..4 {
            once("/bad").await;
        }
        assert_eq!(shown(), (0, 0, 4, false));
        once("/bad").await;
        assert_eq!(shown(), (0, 0, 0, true));
    });
}
