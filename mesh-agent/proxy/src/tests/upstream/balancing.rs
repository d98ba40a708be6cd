//! Which of several endpoints gets a request, and which is left out.

use mesh_core::{
    route::cluster::{Algorithm, OutlierDetection, TrafficPolicy},
    snapshot::Traits,
};

use super::*;

/// In turn; two failures put an endpoint out for longer than the test takes.
pub(super) fn detecting(policy: &mut TrafficPolicy) {
    policy.balancing.algorithm = Algorithm::RoundRobin;
    policy.outlier = Some(OutlierDetection {
        consecutive_5xx: Some(2),
        consecutive_gateway: None,
        consecutive_local: None,
        split_local: false,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 100,
        min_health_percent: 0,
        error_statuses: Vec::new(),
    });
}

#[test]
fn an_endpoint_that_fails_again_and_again_is_left_out_and_without_another_there_is_none() {
    test(|world| async move {
        let good = Server::start("127.0.0.1:0", |_| Reply::ok("good")).await;
        let bad = Server::start("127.0.0.1:0", |_| Reply::status(500)).await;
        publish(&world, vec![endpoint(good.addr, None), endpoint(bad.addr, None)]);
        let open = client(&world);
        let mut statuses = Vec::new();
        for _ in 0..20 {
            let to = destination(&world, detecting);
            let answer = send(&world, get("/"), plan(&world, open.live(), to)).await;
            statuses.push(status(&answer));
        }
        assert_eq!(statuses.iter().filter(|status| **status == 500).count(), 2);
        assert_eq!(bad.heads().len(), 2);

        publish(&world, vec![endpoint(bad.addr, None)]);
        let to = destination(&world, detecting);
        let answer = send(&world, get("/"), plan(&world, open.live(), to)).await;
        assert_eq!((failure(&answer).status, failure(&answer).flag), (503, Flag::NoHealthyUpstream));
    });
}

#[test]
fn an_endpoint_of_three_times_the_weight_gets_three_times_the_requests() {
    test(|world| async move {
        let heavy = Server::start("127.0.0.1:0", |_| Reply::ok("heavy")).await;
        let light = Server::start("127.0.0.1:0", |_| Reply::ok("light")).await;
        let traits = Some(Arc::new(Traits { weight: 3, ..Traits::default() }));
        let weighty = Endpoint { traits, ..endpoint(heavy.addr, None) };
        publish(&world, vec![weighty, endpoint(light.addr, None)]);
        let open = client(&world);
        for _ in 0..40 {
            let to = destination(&world, |policy| policy.balancing.algorithm = Algorithm::RoundRobin);
            let answer = send(&world, get("/"), plan(&world, open.live(), to)).await;
            assert_eq!(status(&answer), 200);
        }
        assert_eq!((heavy.heads().len(), light.heads().len()), (30, 10));
    });
}

#[test]
fn requests_with_one_hash_stay_at_one_endpoint() {
    test(|world| async move {
        let servers = [
            Server::start("127.0.0.1:0", |_| Reply::ok("")).await,
            Server::start("127.0.0.1:0", |_| Reply::ok("")).await,
            Server::start("127.0.0.1:0", |_| Reply::ok("")).await,
        ];
        publish(&world, servers.iter().map(|server| endpoint(server.addr, None)).collect());
        let open = client(&world);
        let mut chosen = std::collections::HashSet::new();
        for _ in 0..12 {
            let to = destination(&world, |policy| {
                policy.balancing.algorithm = Algorithm::ConsistentHash {
                    key: mesh_core::route::cluster::HashKey::Header("x-user".into()),
                    table: mesh_core::route::cluster::HashTable::Maglev(65_537),
                };
            });
            let hashed = Plan { hash: Some(42), ..plan(&world, open.live(), to) };
            let answer = send(&world, get("/"), hashed).await;
            chosen.insert(answer.upstream.unwrap().addr);
        }
        assert_eq!(chosen.len(), 1);
    });
}

#[test]
fn an_endpoint_whose_grpc_fails_again_and_again_is_left_out_though_its_http_does_not() {
    test(|world| async move {
        let saying = |code: &'static str| {
            move |_: &str| {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ncontent-length: 0";
                Reply::Bytes(format!("{head}\r\ngrpc-status: {code}\r\n\r\n").into())
            }
        };
        for (code, is_grpc, expected) in
            [("14", true, 2), ("0", true, 10), ("5", true, 10), ("14", false, 10)]
        {
            let good = Server::start("127.0.0.1:0", saying("0")).await;
            let other = Server::start("127.0.0.1:0", saying(code)).await;
            publish(&world, vec![endpoint(good.addr, None), endpoint(other.addr, None)]);
            let open = client(&world);
            for _ in 0..20 {
                let to = destination(&world, detecting);
                let call = Plan { grpc: is_grpc, ..plan(&world, open.live(), to) };
                assert_eq!(read(send(&world, post(b"x"), call).await).await.0, 200);
            }
            assert_eq!(other.heads().len(), expected, "{code} {is_grpc}");
        }
    });
}
