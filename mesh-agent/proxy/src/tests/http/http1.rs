//! HTTP/1: keep-alive, bodies, trailers, 100-continue, HTTP/1.0, and what is not HTTP.

use std::time::Duration;

use http::Response;
use hyper::body::Frame;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::fixture::{Client, HOST, echo, forward, frames, full, publish, server, test};
use crate::{
    close::{CloseReason, Direction},
    listener::Queued,
    tests::fixture::{eventually, in_world, soon},
};

#[test]
fn requests_of_one_connection_reach_the_server_and_its_answers_come_back() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        for n in 0..5 {
            let forged = "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/a/sa/admin\r\nx-envoy-internal: true\r\n";
            let reply = client.ask("POST", &format!("/{n}?a=b"), forged, "body").await;
            assert_eq!((reply.status, reply.body), (200, format!("POST /{n}?a=b body")));
            assert_eq!(reply.head.matches("x-server").count(), 1);
        }
        let head = seen.last();
        assert_eq!(head.headers["host"], "web");
        assert_eq!(head.headers["x-forwarded-proto"], "http");
        assert_eq!(head.headers["x-request-id"].len(), 36);
        for name in ["via", "x-forwarded-client-cert", "x-envoy-internal"] {
            assert!(!head.headers.contains_key(name), "{name}");
        }
        drop(client);
        world.ended(CloseReason::Finished, 1).await;
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &world.registry).unwrap();
        let counted = text.lines().find(|line| {
            line.starts_with("istio_requests_total{")
                && line.contains("response_code=\"200\"")
                && line.contains("response_flags=\"-\"")
                && line.contains("destination_service_name=\"web\"")
        });
        assert!(counted.is_some_and(|line| line.ends_with("} 5")), "{counted:?}");
    });
}

#[test]
fn what_a_client_or_another_proxy_said_of_a_request_is_kept() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let said = [
            ("x-request-id", "as the client calls it"),
            ("x-forwarded-for", "192.0.2.1, 198.51.100.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "front.example"),
            ("via", "1.1 front"),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ];
        let headers: String = said.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        assert_eq!(client.ask("GET", "/", &headers, "").await.status, 200);
        for (name, value) in said {
            let found: Vec<_> = seen.last().headers.get_all(name).iter().cloned().collect();
            assert_eq!(found, [value], "{name}");
        }
    });
}

#[test]
fn without_a_route_for_it_a_connection_is_relayed_as_bytes() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("other", listener.local_addr().unwrap())]);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nConnection:  weird\r\n\r\n").await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        let mut bytes = [0; 38];
        soon(server.read_exact(&mut bytes)).await.unwrap();
        assert_eq!(&bytes, b"GET / HTTP/1.1\r\nConnection:  weird\r\n\r\n");
    });
}

#[test]
fn a_server_that_speaks_first_is_relayed_when_the_port_says_nothing() {
    let shape = |settings: &mut crate::Settings| settings.http.sniff_timeout = Duration::from_millis(50);
    in_world(false, shape, |world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("web", listener.local_addr().unwrap())]);
        world.snapshots.send_modify(|snapshot| {
            let mut service = (**snapshot.services().next().unwrap()).clone();
            service.ports[0].name = "".into();
            let parts = mesh_core::snapshot::Parts {
                services: vec![service.into()],
                routes: snapshot.routes().clone(),
                ..Default::default()
            };
            *snapshot = std::sync::Arc::new(mesh_core::snapshot::Snapshot::new(9, parts));
        });
        let mut client = Client::connect(&world).await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        server.write_all(b"220 hello\r\n").await.unwrap();
        client.expect(b"220 hello\r\n").await;
    });
}

#[test]
fn chunked_bodies_and_trailers_pass_both_ways() {
    test(|world| async move {
        let (addr, seen) = server("one", |_, body| {
            let mut trailers = http::HeaderMap::new();
            trailers.insert("x-sum", "9".parse().unwrap());
            let mut response = Response::new(frames(vec![Frame::data(body), Frame::trailers(trailers)]));
            response.headers_mut().insert("trailer", "x-sum".parse().unwrap());
            response
        })
        .await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client
            .send("POST / HTTP/1.1\r\nHost: web\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
            .await;
        client.send("2\r\nde\r\n0\r\nX-End: 1\r\n\r\n").await;
        let reply = client.reply().await;
        assert_eq!(reply.body, "abcde");
        assert_eq!(reply.header("x-sum"), Some("9"));
        assert_eq!(seen.requests.borrow()[0].1, "abcde");
    });
}

#[test]
fn the_body_is_asked_for_only_when_somebody_wants_it() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client
            .send("POST / HTTP/1.1\r\nHost: web\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            .await;
        assert!(client.head().await.starts_with("HTTP/1.1 100 "));
        client.send("hello").await;
        assert_eq!(client.reply().await.body, "POST / hello");
    });
}

#[test]
fn http_1_0_is_answered_and_ended_or_kept_as_it_asks() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send("GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
        assert_eq!(client.reply().await.body, "GET /a ");
        client.send("GET /b HTTP/1.0\r\n\r\n").await;
        assert_eq!(client.reply().await.body, "GET /b ");
        assert!(client.is_ended().await);
        assert_eq!(seen.last().headers["host"], "10.96.0.1:80");
    });
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let request = |n| format!("GET /{n} HTTP/1.1\r\nHost: {HOST}\r\n\r\n");
        client.send([request(1), request(2), request(3)].concat()).await;
        for n in 1..=3 {
            assert_eq!(client.reply().await.body, format!("GET /{n} "));
        }
    });
}

#[test]
fn hop_by_hop_headers_stay_on_their_hop() {
    test(|world| async move {
        let (addr, seen) = server("one", |_, _| {
            let mut response = Response::new(full("x"));
            response.headers_mut().insert("keep-alive", "timeout=5".parse().unwrap());
            response
        })
        .await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let lines = "Connection: X-Secret, keep-alive\r\nX-Secret: 1\r\nTE: gzip\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\nX-Other: 2\r\n";
        let reply = client.ask("GET", "/", lines, "").await;
        assert_eq!(reply.header("keep-alive"), None);
        let head = seen.last();
        for name in ["x-secret", "te", "upgrade", "http2-settings", "connection"] {
            assert!(!head.headers.contains_key(name), "{name}: {:?}", head.headers);
        }
        assert_eq!(head.headers["x-other"], "2");
    });
}

#[test]
fn a_response_that_breaks_off_is_not_ended_as_if_it_were_complete() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("web", listener.local_addr().unwrap())]);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        soon(server.read(&mut [0; 1000])).await.unwrap();
        server.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await.unwrap();
        client.expect(b"abc\r\n").await;
        drop(server);
        let mut rest = Vec::new();
        let end = soon(client.stream.read_to_end(&mut rest)).await;
        assert!(end.is_err() && rest.is_empty(), "{end:?} {rest:?}");
    });
}

#[test]
fn a_client_that_goes_away_ends_its_request_at_the_server() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("web", listener.local_addr().unwrap())]);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        soon(server.read(&mut [0; 1000])).await.unwrap();
        drop(client);
        let end = soon(server.read(&mut [0; 10])).await;
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
        eventually(|| world.closed(Direction::Outbound, CloseReason::ClientReset), |count| *count == 1).await;
    });
}

#[test]
fn a_drain_lets_requests_finish_and_ends_idle_connections() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("web", listener.local_addr().unwrap())]);
        let mut busy = Client::connect(&world).await;
        busy.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        soon(server.read(&mut [0; 1000])).await.unwrap();
        let (done, drained) = tokio::sync::oneshot::channel();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        world
            .commands
            .send(crate::worker::Command::Drain { deadline, queued: Queued::Accepted, done })
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        assert_eq!(busy.reply().await.body, "ok");
        assert!(busy.is_ended().await);
        assert_eq!(soon(drained).await.unwrap(), 0);
    });
}

#[test]
fn a_request_that_meets_a_drain_on_its_way_is_answered_and_the_connection_then_ends() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let (mut late, mut idle) = (Client::connect(&world).await, Client::connect(&world).await);
        assert_eq!(late.get("/").await.status, 200);
        assert_eq!(idle.get("/").await.header("connection"), None);
        let (done, drained) = tokio::sync::oneshot::channel();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        world
            .commands
            .send(crate::worker::Command::Drain { deadline, queued: Queued::Accepted, done })
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let reply = late.get("/late").await;
        assert_eq!((reply.status, reply.header("connection")), (200, Some("close")));
        assert!(late.is_ended().await && idle.is_ended().await);
        assert_eq!(soon(drained).await.unwrap(), 0);
    });
}

#[test]
fn a_body_reaches_the_server_whatever_the_method_and_however_its_end_is_told() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        for method in ["GET", "DELETE", "POST"] {
            let head = format!("{method} / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n");
            client.send(format!("{head}5\r\nhello\r\n0\r\n\r\n")).await;
            assert_eq!(client.reply().await.body, format!("{method} / hello"));
            assert_eq!(client.ask(method, "/", "", "hello").await.body, format!("{method} / hello"));
        }
        client
            .send("HEAD / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
            .await;
        assert_eq!(client.reply_to("HEAD").await.status, 200);
        assert_eq!(seen.requests.borrow().last().unwrap().1, "hi");
        // None is made up for those without one.
        client.get("/").await;
        let head = seen.last();
        assert!(
            !head.headers.contains_key("content-length") && !head.headers.contains_key("transfer-encoding")
        );
    });
}

#[test]
fn a_target_that_servers_take_is_not_refused_for_characters_that_ought_to_be_encoded() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        for (asked, expected) in [
            ("/q?query=up{job=\"x\"}>0", "/q?query=up{job=%22x%22}%3E0"),
            ("/<a>/`b`?c", "/%3Ca%3E/%60b%60?c"),
            ("http://web/q?\"", "/q?%22"),
            ("/plain?a|b", "/plain?a|b"),
        ] {
            let reply = client.get(asked).await;
            assert_eq!((reply.status, reply.body), (200, format!("GET {expected} ")), "{asked}");
        }
    });
}

#[test]
fn a_connection_with_a_request_on_it_is_not_idle_however_long_nothing_is_said() {
    let shape = |settings: &mut crate::Settings| settings.idle_timeout = Duration::from_secs(1);
    in_world(false, shape, |world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("web", listener.local_addr().unwrap())]);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        soon(server.read(&mut [0; 1000])).await.unwrap();
        // Several looks at what is idle.
        tokio::time::sleep(Duration::from_secs(4)).await;
        server.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        assert_eq!(client.reply().await.body, "ok");
        // From here on it is.
        assert!(client.is_ended().await);
        world.ended(CloseReason::IdleTimeout, 1).await;
        eventually(|| world.worker.connections.len(), |open| *open == 0).await;
    });
}

#[test]
fn a_connection_that_has_switched_protocols_is_not_idle_either() {
    let shape = |settings: &mut crate::Settings| settings.idle_timeout = Duration::from_secs(1);
    in_world(false, shape, |world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        publish(&world, vec![forward()], &[("web", listener.local_addr().unwrap())]);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nHost: web\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n").await;
        let (mut server, _) = soon(listener.accept()).await.unwrap();
        soon(server.read(&mut [0; 1000])).await.unwrap();
        server
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
            .await
            .unwrap();
        assert!(client.head().await.starts_with("HTTP/1.1 101 "));
        tokio::time::sleep(Duration::from_secs(4)).await;
        server.write_all(b"still here").await.unwrap();
        client.expect(b"still here").await;
    });
}
