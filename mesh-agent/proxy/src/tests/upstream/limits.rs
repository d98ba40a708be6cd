//! Limits of a destination: Istio's 503 with `UO`, and what waits instead.

use mesh_core::route::cluster::TrafficPolicy;

use super::*;
use crate::destination::standing::destinations;

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
