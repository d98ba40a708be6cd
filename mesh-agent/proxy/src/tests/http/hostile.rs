//! What clients must not send: refused with a status, counted by name, never passed on.

use std::time::Duration;

use http::Response;
use tokio::net::TcpListener;

use super::fixture::{Client, echo, forward, full, publish, server, test};
use crate::{
    close::CloseReason,
    metrics::http::Refusal,
    tests::fixture::{World, eventually, in_world, soon},
};

async fn refused(world: &World, reason: Refusal) {
    eventually(|| world.metrics.http.refused(reason).get(), |count| *count == 1).await;
}

#[test]
fn ambiguous_requests_are_refused_and_the_server_sees_nothing() {
    for (request, status, reason) in [
        (
            "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            Refusal::LengthAndEncoding,
        ),
        (
            "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
            400,
            Refusal::LengthAndEncoding,
        ),
        (
            "POST / HTTP/1.1\r\nHost: web\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
            400,
            Refusal::Length,
        ),
        (
            "POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: identity\r\n\r\n",
            501,
            Refusal::TransferEncoding,
        ),
        ("GET / HTTP/1.1\r\nHost: web\r\nX: a\r\n b\r\n\r\n", 400, Refusal::Folding),
        ("GET / HTTP/1.1\r\nHost: web\r\nX: a\rb\r\n\r\n", 400, Refusal::BareCr),
        ("GET / HTTP/1.1\r\nHost: web\nX: a\r\n\r\n", 400, Refusal::BareLf),
        ("GET / HTTP/1.1\r\nHost : web\r\n\r\n", 400, Refusal::Header),
        ("GET / HTTP/1.1\r\n\r\n", 400, Refusal::Host),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, Refusal::Host),
        ("get / HTTP/1.1\r\nHost: web\r\n\r\n", 400, Refusal::Method),
        ("GET /%00 HTTP/1.1\r\nHost: web\r\n\r\n", 400, Refusal::Path),
    ] {
        test(|world| async move {
            let (addr, seen) = echo("one").await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            client.send(request).await;
            let reply = client.reply().await;
            assert_eq!(reply.status, status, "{request}");
            assert!(client.is_ended().await, "{request}");
            refused(&world, reason).await;
            assert_eq!(seen.count(), 0, "{request}");
        });
    }
}

#[test]
fn a_head_without_end_is_refused_long_before_memory_is_short() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send(format!("GET / HTTP/1.1\r\nHost: web\r\nX: {}", "a".repeat(200 << 10))).await;
        assert_eq!(client.reply().await.status, 431);
        refused(&world, Refusal::HeadTooLarge).await;
        let mut client = Client::connect(&world).await;
        client.send(format!("GET / HTTP/1.1\r\nHost: web\r\n{}\r\n", "X: a\r\n".repeat(101))).await;
        assert_eq!(client.reply().await.status, 431);
        assert_eq!(seen.count(), 0);
    });
}

#[test]
fn absurd_chunks_end_the_request_and_are_not_taken_for_the_next_one() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send("POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        client.send("FFFFFFFFFFFFFFFFF\r\nGET /smuggled HTTP/1.1\r\nHost: web\r\n\r\n").await;
        assert_eq!(client.reply().await.status, 400);
        refused(&world, Refusal::ChunkSize).await;
        assert_eq!(seen.count(), 0);
    });
}

#[test]
fn a_good_request_before_a_bad_one_is_answered() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send("GET /good HTTP/1.1\r\nHost: web\r\n\r\nGET /bad HTTP/1.1\r\nX: a\nb\r\n\r\n").await;
        assert_eq!(client.reply().await.body, "GET /good ");
        assert_eq!(client.reply().await.status, 400);
        assert!(client.is_ended().await);
        assert_eq!(seen.count(), 1);
        refused(&world, Refusal::BareLf).await;
    });
}

#[test]
fn a_head_that_drips_is_cut_off() {
    let shape = |settings: &mut crate::Settings| settings.http.head_timeout = Duration::from_millis(400);
    in_world(false, shape, |world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nHost: w").await;
        assert_eq!(client.reply().await.status, 408);
        refused(&world, Refusal::HeadTimeout).await;
        world.ended(CloseReason::ClientProtocol, 1).await;
    });
}

#[test]
fn an_idle_connection_is_not_cut_off_like_a_dripping_head() {
    let shape = |settings: &mut crate::Settings| settings.http.head_timeout = Duration::from_millis(200);
    in_world(false, shape, |world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        for _ in 0..2 {
            assert_eq!(client.get("/").await.status, 200);
            tokio::time::sleep(Duration::from_millis(700)).await;
        }
        assert_eq!(client.get("/").await.status, 200);
    });
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_holds_little() {
    let shape = |settings: &mut crate::Settings| settings.http.stall_timeout = Duration::from_millis(500);
    in_world(false, shape, |world| async move {
        let (addr, _) = server("one", |_, _| Response::new(full(vec![b'x'; 64 << 20]))).await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send("GET / HTTP/1.1\r\nHost: web\r\n\r\n").await;
        refused(&world, Refusal::Stalled).await;
        world.ended(CloseReason::ClientProtocol, 1).await;
        let read = world.worker.connections.len();
        assert_eq!(read, 0);
        drop(client);
    });
}

#[test]
fn a_refused_connect_is_answered_with_503_and_its_flag() {
    test(|world| async move {
        let addr = {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            listener.local_addr().unwrap()
        };
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        let reply = soon(client.get("/")).await;
        assert_eq!(reply.status, 503);
        let reply = client.ask("POST", "/x", "Content-Type: application/grpc\r\n", "abc").await;
        assert_eq!((reply.status, reply.header("grpc-status")), (200, Some("14")));
    });
}
