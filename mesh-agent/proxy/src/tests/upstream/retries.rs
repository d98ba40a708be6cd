//! Which tries are repeated, how often, and with what body.

use std::cell::Cell;

use super::*;

fn on(shape: impl FnOnce(&mut RetryOn)) -> RetryOn {
    let mut on = RetryOn::default();
    shape(&mut on);
    on
}

fn repeated(world: &World, live: &Rc<Live>, attempts: u32, on: RetryOn) -> Plan {
    let route = retrying(attempts, on, None);
    Plan { route, retry: true, ..plan(world, live, destination(world, |_| {})) }
}

/// Fails as `bad` says for so many requests, then answers.
async fn failing(times: usize, bad: impl Fn() -> Reply + 'static) -> Server {
    let left = Cell::new(times);
    let answer = move |_: &str| {
        if left.get() == 0 {
            return Reply::ok("fine");
        }
        left.set(left.get() - 1);
        bad()
    };
    Server::start("127.0.0.1:0", answer).await
}

#[test]
fn s36_a_refused_connection_is_tried_elsewhere_when_that_is_wanted_and_is_uf_when_not() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("here")).await;
        let dead = refusing().await;
        publish(&world, vec![endpoint(dead, None)]);
        let open = client(&world);
        let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        let failed = failure(&answer);
        assert_eq!((failed.status, failed.flag), (503, Flag::UpstreamFailure));
        assert_eq!(answer.upstream.as_ref().unwrap().addr, dead);

        publish(&world, vec![endpoint(dead, None), endpoint(server.addr, None)]);
        for _ in 0..8 {
            let retry = on(|on| on.connect_failure = true);
            let answer = send(&world, get("/"), repeated(&world, open.live(), 2, retry)).await;
            assert!(answer.retries <= 1, "an endpoint that was tried is avoided");
            assert_eq!(read(answer).await, (200, b"here".to_vec()));
        }
    });
}

#[test]
fn a_status_that_is_named_is_tried_again_and_the_last_one_is_passed_on() {
    test(|world| async move {
        let server = failing(2, || Reply::status(503)).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let retry = || on(|on| on.statuses = vec![503]);
        let answer = send(&world, get("/"), repeated(&world, open.live(), 2, retry())).await;
        assert_eq!(answer.retries, 2);
        assert!(!answer.flags.contains(Flag::RetryLimit));
        assert_eq!(read(answer).await, (200, b"fine".to_vec()));
        assert!(server.heads()[2].to_lowercase().contains("x-envoy-attempt-count: 3\r\n"));

        let server = failing(9, || Reply::status(503)).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let answer = send(&world, get("/"), repeated(&world, open.live(), 2, retry())).await;
        assert_eq!((status(&answer), answer.retries), (503, 2));
        assert!(answer.flags.contains(Flag::RetryLimit), "URX");
        let other = on(|on| on.gateway_error = true);
        let server = failing(9, || Reply::status(500)).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let answer = send(&world, get("/"), repeated(&world, open.live(), 2, other)).await;
        assert_eq!((status(&answer), answer.retries), (500, 0));
    });
}

#[test]
fn a_response_with_a_header_that_the_request_names_is_tried_again_if_the_rule_asks_for_it() {
    test(|world| async move {
        let busy = || Reply::Bytes(b"HTTP/1.1 200 OK\r\nx-busy: yes\r\ncontent-length: 4\r\n\r\nbusy".into());
        let naming = || {
            let mut request = get("/");
            request.headers_mut().insert("x-envoy-retriable-header-names", "x-busy".parse().unwrap());
            request
        };
        let open = client(&world);
        for (request, asked, expected) in
            [(naming(), true, &b"fine"[..]), (naming(), false, b"busy"), (get("/"), true, b"busy")]
        {
            let server = failing(1, busy).await;
            publish(&world, vec![endpoint(server.addr, None)]);
            let retry = on(|on| on.headers_of_request = asked);
            let answer = send(&world, request, repeated(&world, open.live(), 2, retry)).await;
            assert_eq!(read(answer).await, (200, expected.to_vec()));
        }
    });
}

#[test]
fn a_connection_that_ends_before_the_response_is_uc_unless_resets_are_repeated() {
    test(|world| async move {
        let server = failing(1, || Reply::Close).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let connect = on(|on| on.connect_failure = true);
        let answer = send(&world, get("/"), repeated(&world, open.live(), 2, connect)).await;
        let failed = failure(&answer);
        assert_eq!((failed.status, failed.flag, answer.retries), (503, Flag::UpstreamClosed, 0));
        let server = failing(1, || Reply::Close).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let resets = on(|on| on.reset = true);
        let answer = send(&world, get("/"), repeated(&world, open.live(), 2, resets)).await;
        assert_eq!((status(&answer), answer.retries), (200, 1));
    });
}

#[test]
fn s36_a_request_is_repeated_with_its_whole_body() {
    test(|world| async move {
        let server = failing(2, || Reply::status(502)).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let gateway = on(|on| on.gateway_error = true);
        let answer = send(&world, post(b"all of it"), repeated(&world, open.live(), 3, gateway)).await;
        assert_eq!(read(answer).await, (200, b"fine".to_vec()));
        assert_eq!(server.bodies(), [b"all of it".to_vec(), b"all of it".to_vec(), b"all of it".to_vec()]);
    });
}

#[test]
fn s36_a_body_that_cannot_be_kept_is_sent_once() {
    test(|world| async move {
        let server = failing(1, || Reply::status(502)).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let large = vec![7_u8; (1 << 20) + 1];
        let request = Request::post("/").header("host", "web").body(Body::full(large)).unwrap();
        let gateway = on(|on| on.gateway_error = true);
        let answer = send(&world, request, repeated(&world, open.live(), 3, gateway)).await;
        assert_eq!((status(&answer), answer.retries), (502, 0));
        assert_eq!(server.bodies().len(), 1);
        assert_eq!(server.bodies()[0].len(), (1 << 20) + 1);
    });
}

#[test]
fn s32_s36_each_try_has_its_own_limit_and_a_slow_one_is_repeated_like_a_5xx() {
    test(|world| async move {
        let server = failing(1, || Reply::Hang).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let limited = |attempts, on| Plan {
            route: retrying(attempts, on, Some(Duration::from_millis(60))),
            ..repeated(&world, open.live(), 1, RetryOn::default())
        };
        let answer = send(&world, get("/"), limited(1, on(|on| on.server_error = true))).await;
        assert_eq!((status(&answer), answer.retries), (200, 1));
        let server = failing(1, || Reply::Hang).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let answer = send(&world, get("/"), limited(1, on(|on| on.try_timeout = true))).await;
        assert_eq!((status(&answer), answer.retries), (200, 1));
        let server = failing(9, || Reply::Hang).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let answer = send(&world, get("/"), limited(1, on(|on| on.connect_failure = true))).await;
        let failed = failure(&answer);
        assert_eq!((failed.status, failed.flag, answer.retries), (504, Flag::UpstreamTimeout, 0));
        assert_eq!(failed.details, "upstream_per_try_timeout");
    });
}

#[test]
fn no_more_retries_run_at_once_than_the_destination_allows() {
    test(|world| async move {
        let server = failing(9, || Reply::status(503)).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let none = destination(&world, |policy| policy.pool.max_retries = Some(0));
        let statuses = on(|on| on.statuses = vec![503]);
        let limited = Plan { destination: none, ..repeated(&world, open.live(), 2, statuses) };
        let answer = send(&world, get("/"), limited).await;
        assert_eq!((status(&answer), answer.retries), (503, 0));
        assert!(answer.flags.contains(Flag::Overflow));
    });
}
