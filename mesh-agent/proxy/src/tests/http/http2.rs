//! Clients that speak HTTP/2 without TLS, among them those that abuse it.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Request, Response};
use hyper::body::Frame;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    task::{JoinHandle, spawn_local},
};

use super::fixture::{echo, forward, frames, full, publish, server, test};
use crate::{
    close::CloseReason,
    metrics::http::Refusal,
    tests::fixture::{World, eventually, in_world, soon},
};

async fn connect(world: &World) -> (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let stream = TcpStream::connect(world.outbound).await.unwrap();
    let (send, connection) = soon(h2::client::handshake(stream)).await.unwrap();
    (send, spawn_local(connection))
}

fn get(path: &str) -> Request<()> {
    Request::get(format!("http://web{path}")).body(()).unwrap()
}

async fn text(mut body: h2::RecvStream) -> (String, Option<http::HeaderMap>) {
    let mut all = Vec::new();
    while let Some(data) = soon(body.data()).await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        all.extend_from_slice(&data);
    }
    (String::from_utf8(all).unwrap(), soon(body.trailers()).await.unwrap())
}

async fn world_with(world: &World) -> SocketAddr {
    let (addr, _) = echo("one").await;
    publish(world, vec![forward()], &[("web", addr)]);
    addr
}

#[test]
fn many_streams_share_a_connection() {
    test(|world| async move {
        world_with(&world).await;
        let (send, _connection) = connect(&world).await;
        let mut send = soon(send.ready()).await.unwrap();
        let responses: Vec<_> =
            (0..20).map(|n| send.send_request(get(&format!("/{n}")), true).unwrap().0).collect();
        for (n, response) in responses.into_iter().enumerate() {
            let response = soon(response).await.unwrap();
            assert_eq!(response.status(), 200);
            assert_eq!(response.headers()["x-server"], "one");
            assert_eq!(text(response.into_body()).await.0, format!("GET /{n} "));
        }
    });
}

#[test]
fn a_body_and_trailers_pass_to_a_server_of_http_1() {
    test(|world| async move {
        let (addr, seen) = server("one", |_, body| {
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            let mut response = Response::new(frames(vec![Frame::data(body), Frame::trailers(trailers)]));
            response.headers_mut().insert("trailer", "grpc-status".parse().unwrap());
            response
        })
        .await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let (send, _connection) = connect(&world).await;
        let mut send = soon(send.ready()).await.unwrap();
        let request = Request::post("http://web/a")
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .body(())
            .unwrap();
        let (response, mut body) = send.send_request(request, false).unwrap();
        body.send_data(Bytes::from_static(b"hello"), true).unwrap();
        let (body, trailers) = text(soon(response).await.unwrap().into_body()).await;
        assert_eq!(body, "hello");
        assert_eq!(trailers.unwrap()["grpc-status"], "0");
        assert_eq!(seen.last().headers["host"], "web");
        let mut text = String::new();
        eventually(
            || {
                text.clear();
                prometheus_client::encoding::text::encode(&mut text, &world.registry).unwrap();
                text.lines().any(|line| {
                    line.starts_with("istio_requests_total{")
                        && line.contains("request_protocol=\"grpc\"")
                        && line.contains("grpc_response_status=\"0\"")
                })
            },
            |counted| *counted,
        )
        .await;
    });
}

#[test]
fn bodies_of_any_method_reach_a_server_of_http_1_and_empty_ones_are_said_to_be() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let (send, _connection) = connect(&world).await;
        let mut send = soon(send.ready()).await.unwrap();
        let (response, mut body) = send.send_request(get("/"), false).unwrap();
        body.send_data(Bytes::from_static(b"hello"), true).unwrap();
        assert_eq!(text(soon(response).await.unwrap().into_body()).await.0, "GET / hello");
        for (method, expected) in
            [("POST", Some("0")), ("PUT", Some("0")), ("PATCH", Some("0")), ("GET", None)]
        {
            let request = Request::builder().method(method).uri("http://web/").body(()).unwrap();
            let (response, _) = send.send_request(request, true).unwrap();
            assert_eq!(text(soon(response).await.unwrap().into_body()).await.0, format!("{method} / "));
            let head = seen.last();
            let length = head.headers.get("content-length").map(|length| length.to_str().unwrap());
            assert_eq!(
                (length, head.headers.contains_key("transfer-encoding")),
                (expected, false),
                "{method}"
            );
        }
    });
}

#[test]
fn no_server_is_grpcs_unavailable_for_grpc_clients() {
    test(|world| async move {
        publish(&world, vec![forward()], &[("web", "127.0.0.1:1".parse().unwrap())]);
        let (send, _connection) = connect(&world).await;
        let mut send = soon(send.ready()).await.unwrap();
        let request =
            Request::post("http://web/a").header("content-type", "application/grpc").body(()).unwrap();
        let (response, _) = send.send_request(request, true).unwrap();
        let response = soon(response).await.unwrap();
        assert_eq!(
            (response.status().as_u16(), &response.headers()["grpc-status"]),
            (200, &"14".parse().unwrap())
        );
    });
}

#[test]
fn requests_that_are_reset_at_once_end_the_connection() {
    test(|world| async move {
        let (addr, _) = server("one", |_, _| Response::new(full("x"))).await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let (send, connection) = connect(&world).await;
        let mut send = soon(send.ready()).await.unwrap();
        let mut ended = false;
        for _ in 0..2000 {
            match send.send_request(get("/"), true) {
                Ok((_, mut stream)) => stream.send_reset(h2::Reason::CANCEL),
                Err(_) => {
                    ended = true;
                    break;
                }
            }
            tokio::task::yield_now().await;
            send = match tokio::time::timeout(Duration::from_secs(1), send.ready()).await {
                Ok(Ok(send)) => send,
                _ => {
                    ended = true;
                    break;
                }
            };
        }
        assert!(ended, "still open after 2000 resets");
        drop(connection);
        let refused = || {
            world.metrics.http.refused(Refusal::RapidReset).get()
                + world.metrics.http.refused(Refusal::H2Flood).get()
        };
        eventually(refused, |count| *count == 1).await;
    });
}

/// What every HTTP/2 client begins with, with empty SETTINGS.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[test]
fn headers_that_go_on_for_ever_end_the_connection() {
    test(|world| async move {
        world_with(&world).await;
        let mut stream = TcpStream::connect(world.outbound).await.unwrap();
        stream.write_all(HELLO).await.unwrap();
        // HEADERS without END_HEADERS, then CONTINUATIONs of a literal header, never the last.
        stream.write_all(&frame(1, 0, 1, &[0x82, 0x86, 0x84])).await.unwrap();
        let literal = [&[0x00, 1, b'a', 0x7f, 0x81, 0x7f][..], &[b'x'; 16_000]].concat();
        for _ in 0..400 {
            if stream.write_all(&frame(9, 0, 1, &literal)).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        let refused = || {
            world.metrics.http.refused(Refusal::H2Flood).get()
                + world.metrics.http.refused(Refusal::H2Protocol).get()
        };
        eventually(refused, |count| *count == 1).await;
    });
}

#[test]
fn frames_that_break_the_protocol_end_the_connection() {
    test(|world| async move {
        world_with(&world).await;
        let mut stream = TcpStream::connect(world.outbound).await.unwrap();
        // DATA on a stream that was never opened.
        stream.write_all(&[HELLO, &frame(0, 0, 1, b"x")].concat()).await.unwrap();
        eventually(|| world.metrics.http.refused(Refusal::H2Protocol).get(), |count| *count == 1).await;
        world.ended(CloseReason::ClientProtocol, 1).await;
    });
}

#[test]
fn a_client_that_grants_no_window_is_cut_off() {
    let shape = |settings: &mut crate::Settings| settings.http.stall_timeout = Duration::from_millis(500);
    in_world(false, shape, |world| async move {
        let (addr, _) = server("one", |_, _| Response::new(full(vec![b'x'; 8 << 20]))).await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let (send, _connection) = connect(&world).await;
        let mut send = soon(send.ready()).await.unwrap();
        let (response, _) = send.send_request(get("/"), true).unwrap();
        let response = soon(response).await.unwrap();
        // Nothing is ever released.
        eventually(|| world.metrics.http.refused(Refusal::Stalled).get(), |count| *count == 1).await;
        drop(response);
    });
}
