//! Against the `h2` crate, which ztunnel uses: both roles, small and large windows, many streams, drains, resets.

use std::{collections::VecDeque, time::Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    task::JoinSet,
};

use super::super::{
    super::{Cause, ErrorCode, Event, Limits, StreamKey, Violation},
    Connection,
};

/// Bytes of a stream that wait to go back.
struct Echo {
    key: StreamKey,
    queue: VecDeque<u8>,
    ended: bool,
}

/// What a driven connection has to tell.
#[derive(Debug, Default)]
struct Outcome {
    opened: u32,
    resets: Vec<Cause>,
    failed: Option<Violation>,
}

/// Writes the output, and what waits on streams as far as windows go.
async fn flush(
    io: &mut DuplexStream,
    connection: &mut Connection,
    echoes: &mut Vec<Echo>,
) -> std::io::Result<()> {
    loop {
        let output = connection.output().to_vec();
        connection.clear_output();
        io.write_all(&output).await?;
        let mut moved = false;
        for echo in echoes.iter_mut() {
            let size = connection.send_capacity(echo.key).min(connection.max_data()).min(echo.queue.len());
            if size == 0 && !(echo.ended && echo.queue.is_empty()) {
                continue;
            }
            let end = echo.ended && size == echo.queue.len();
            let Ok(head) = connection.data_frame(echo.key, size, end) else { continue };
            let bytes: Vec<u8> = echo.queue.drain(..size).collect();
            io.write_all(&[&head[..], &bytes].concat()).await?;
            connection.consumed(echo.key, size);
            moved = true;
        }
        echoes.retain(|echo| !(echo.ended && echo.queue.is_empty()));
        if !moved && connection.output().is_empty() {
            return Ok(());
        }
    }
}

/// A server of ours that sends back what it gets, and drains after so many requests. `read` cuts what arrives.
async fn serve_echo(mut io: DuplexStream, limits: Limits, read: usize, drain_after: u32) -> Outcome {
    let mut connection = Connection::server(limits, Instant::now());
    let mut echoes: Vec<Echo> = Vec::new();
    let mut outcome = Outcome::default();
    let mut buffer = vec![0; read];
    loop {
        if flush(&mut io, &mut connection, &mut echoes).await.is_err() || connection.is_finished() {
            return outcome;
        }
        let Ok(size @ 1..) = io.read(&mut buffer).await else { return outcome };
        let mut at = 0;
        loop {
            let event = match connection.receive(Instant::now(), &buffer[..size], &mut at) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(violation) => {
                    outcome.failed = Some(violation);
                    let _written = flush(&mut io, &mut connection, &mut echoes).await;
                    return outcome;
                }
            };
            match event {
                Event::Opened { stream, headers, end } => {
                    outcome.opened += 1;
                    assert_eq!(headers.method(), Some(&b"CONNECT"[..]));
                    assert_eq!(headers.authority(), Some(&b"10.1.2.3:8080"[..]));
                    assert_eq!(
                        headers.get("baggage"),
                        Some(&b"k8s.namespace.name=default,k8s.pod.name=a-1"[..])
                    );
                    connection.respond(stream, 200, &[], false).unwrap();
                    echoes.push(Echo { key: stream, queue: VecDeque::new(), ended: end });
                    if outcome.opened == drain_after {
                        connection.shutdown();
                    }
                }
                Event::Data { stream, range, end } => {
                    let echo = echoes.iter_mut().find(|echo| echo.key == stream).expect("a known stream");
                    echo.queue.extend(&buffer[range]);
                    echo.ended |= end;
                }
                Event::Ended { stream } => {
                    echoes.iter_mut().filter(|echo| echo.key == stream).for_each(|echo| echo.ended = true);
                }
                Event::Reset { stream, cause } => {
                    outcome.resets.push(cause);
                    connection.reset(stream, ErrorCode::NO_ERROR);
                    echoes.retain(|echo| echo.key != stream);
                }
                Event::WindowOpened { .. } | Event::SettingsChanged | Event::GoAway { .. } => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}

fn request() -> Request<()> {
    Request::builder()
        .method(Method::CONNECT)
        .uri("10.1.2.3:8080")
        .header("baggage", "k8s.namespace.name=default,k8s.pod.name=a-1")
        .body(())
        .unwrap()
}

fn body(size: usize, seed: usize) -> Vec<u8> {
    (0..size).map(|place| (place.wrapping_mul(seed + 7) >> 3) as u8).collect()
}

/// Sends `text` on a stream of the `h2` crate as windows allow.
async fn send_all(stream: &mut h2::SendStream<Bytes>, text: &[u8]) {
    let mut rest = text;
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len().min(100_000));
        let size = std::future::poll_fn(|context| stream.poll_capacity(context))
            .await
            .unwrap()
            .unwrap()
            .min(rest.len());
        let (now, after) = rest.split_at(size);
        stream.send_data(Bytes::copy_from_slice(now), false).unwrap();
        rest = after;
    }
    stream.send_data(Bytes::new(), true).unwrap();
}

async fn receive_all(stream: &mut h2::RecvStream) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(piece) = stream.data().await {
        let piece = piece.unwrap();
        all.extend_from_slice(&piece);
        stream.flow_control().release_capacity(piece.len()).unwrap();
    }
    all
}

/// One tunnel of an `h2` client: everything that is sent comes back.
async fn exchange(mut sender: h2::client::SendRequest<Bytes>, size: usize, seed: usize) {
    sender = sender.ready().await.unwrap();
    let (response, mut stream) = sender.send_request(request(), false).unwrap();
    let text = body(size, seed);
    let sent = text.clone();
    let sending = tokio::spawn(async move { send_all(&mut stream, &sent).await });
    let response = response.await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let back = receive_all(&mut response.into_body()).await;
    sending.await.unwrap();
    assert!(back == text, "{size} bytes come back");
}

#[tokio::test]
async fn an_h2_client_is_served() {
    for (window, connection_window, read, sizes) in [
        (1_000, 65_535, 333, &[0, 1, 20_000, 100_000][..]),
        (65_535, 65_535, 64 << 10, &[3_000_000][..]),
        (1 << 20, 4 << 20, 16 << 10, &[500_000; 20][..]),
    ] {
        let (near, far) = tokio::io::duplex(50_000);
        let limits = Limits { stream_window: window, connection_window, ..Limits::default() };
        let server = tokio::spawn(serve_echo(far, limits, read, u32::MAX));
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(window * 3)
            .max_frame_size(20_000)
            .header_table_size(0)
            .handshake(near)
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        let mut tasks = JoinSet::new();
        for (seed, &size) in sizes.iter().enumerate() {
            tasks.spawn(exchange(sender.clone(), size, seed));
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        drop(sender);
        connection.await.unwrap().unwrap();
        let outcome = server.await.unwrap();
        assert_eq!(outcome.failed, None);
        assert_eq!(outcome.opened as usize, sizes.len());
        assert_eq!(outcome.resets, []);
    }
}

#[tokio::test]
async fn an_h2_client_loses_nothing_when_the_server_drains() {
    let (near, far) = tokio::io::duplex(50_000);
    let server = tokio::spawn(serve_echo(far, Limits::default(), 4_096, 5));
    let (sender, connection) = h2::client::handshake(near).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut tasks = JoinSet::new();
    for seed in 0..5 {
        tasks.spawn(exchange(sender.clone(), 200_000, seed));
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(server.await.unwrap().failed, None);
    connection.await.unwrap().unwrap();
    assert!(sender.ready().await.is_err(), "the client knows that the server goes away");
}

#[tokio::test]
async fn an_h2_client_may_reset_and_be_reset() {
    let (near, far) = tokio::io::duplex(50_000);
    let server = tokio::spawn(serve_echo(far, Limits::default(), 4_096, u32::MAX));
    let (sender, connection) = h2::client::handshake(near).await.unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..50 {
        let mut ready = sender.clone().ready().await.unwrap();
        let (response, mut stream) = ready.send_request(request(), false).unwrap();
        response.await.unwrap();
        stream.send_data(Bytes::from_static(b"x"), false).unwrap();
        stream.send_reset(h2::Reason::CANCEL);
    }
    exchange(sender.clone(), 10_000, 0).await;
    drop(sender);
    connection.await.unwrap().unwrap();
    let outcome = server.await.unwrap();
    assert_eq!(outcome.resets, [Cause::Peer(ErrorCode::CANCEL); 50]);
    assert_eq!(outcome.failed, None);
}

/// A server of the `h2` crate that sends back what it gets.
async fn h2_echo_server(io: DuplexStream, window: u32, streams: u32, drain_after: usize) {
    let mut server = h2::server::Builder::new()
        .initial_window_size(window)
        .max_concurrent_streams(streams)
        .max_frame_size(30_000)
        .handshake::<_, Bytes>(io)
        .await
        .unwrap();
    let mut tasks = JoinSet::new();
    let mut accepted = 0;
    while let Some(accept) = server.accept().await {
        let (request, mut respond) = accept.unwrap();
        assert_eq!(request.method(), Method::CONNECT);
        accepted += 1;
        if accepted == drain_after {
            server.graceful_shutdown();
        }
        tasks.spawn(async move {
            let mut answer = respond.send_response(Response::new(()), false).unwrap();
            let text = receive_all(&mut request.into_body()).await;
            send_all(&mut answer, &text).await;
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

struct Tunnel {
    key: StreamKey,
    to_send: VecDeque<u8>,
    expected: Vec<u8>,
    received: Vec<u8>,
    done: bool,
}

/// A client of ours that opens tunnels until all bodies went there and back, or the server goes away; how many did.
async fn drive_client(mut io: DuplexStream, limits: Limits, mut bodies: Vec<Vec<u8>>) -> usize {
    let mut connection = Connection::client(limits, Instant::now());
    let mut tunnels: Vec<Tunnel> = Vec::new();
    let mut buffer = vec![0; 10_000];
    let fields = [
        (":method", "CONNECT"),
        (":authority", "10.1.2.3:8080"),
        ("baggage", "k8s.namespace.name=default"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ];
    loop {
        while let Some(text) = bodies.pop() {
            match connection.open(&fields, false) {
                Ok(key) => tunnels.push(Tunnel {
                    key,
                    to_send: text.iter().copied().collect(),
                    expected: text,
                    received: Vec::new(),
                    done: false,
                }),
                Err(_) => {
                    bodies.push(text);
                    break;
                }
            }
        }
        io.write_all(connection.output()).await.unwrap();
        connection.clear_output();
        for tunnel in &mut tunnels {
            loop {
                let size =
                    connection.send_capacity(tunnel.key).min(connection.max_data()).min(tunnel.to_send.len());
                let end = size == tunnel.to_send.len();
                if size == 0 && !end {
                    break;
                }
                let Ok(head) = connection.data_frame(tunnel.key, size, end) else { break };
                let bytes: Vec<u8> = tunnel.to_send.drain(..size).collect();
                io.write_all(&[&head[..], &bytes].concat()).await.unwrap();
            }
        }
        let finished = tunnels.iter().all(|tunnel| tunnel.done);
        if finished && (bodies.is_empty() || connection.takes_no_more()) {
            for tunnel in &tunnels {
                assert!(tunnel.received == tunnel.expected, "everything comes back");
            }
            return tunnels.len();
        }
        let size = io.read(&mut buffer).await.unwrap();
        assert!(size > 0, "the server does not just leave");
        let mut at = 0;
        while let Some(event) = connection.receive(Instant::now(), &buffer[..size], &mut at).unwrap() {
            match event {
                Event::Response { status, end, .. } => assert_eq!((status, end), (200, false)),
                Event::Data { stream, range, end } => {
                    let tunnel = tunnels.iter_mut().find(|tunnel| tunnel.key == stream).unwrap();
                    connection.consumed(stream, range.len());
                    tunnel.received.extend_from_slice(&buffer[range]);
                    tunnel.done |= end;
                }
                Event::Ended { stream } => {
                    tunnels
                        .iter_mut()
                        .filter(|tunnel| tunnel.key == stream)
                        .for_each(|tunnel| tunnel.done = true);
                }
                Event::GoAway { code, .. } => assert_eq!(code, ErrorCode::NO_ERROR),
                Event::Reset { stream, cause } => {
                    // Opened before the server said how many it takes, or above the last of its GOAWAY.
                    assert_eq!(cause, Cause::Unprocessed);
                    let place = tunnels.iter().position(|tunnel| tunnel.key == stream).unwrap();
                    bodies.push(tunnels.swap_remove(place).expected);
                }
                Event::WindowOpened { .. } | Event::SettingsChanged => {}
                other => panic!("unexpected {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn an_h2_server_serves_us() {
    for (window, streams, own_window, sizes) in [
        (500, 2, 700, vec![0, 1, 30_000, 50_000, 7]),
        (65_535, 100, 1 << 20, vec![400_000; 10]),
        (1 << 20, 3, 65_535, vec![1_000_000; 6]),
    ] {
        let (near, far) = tokio::io::duplex(4 << 20);
        let server = tokio::spawn(h2_echo_server(far, window, streams, usize::MAX));
        let limits = Limits { stream_window: own_window, ..Limits::default() };
        let bodies: Vec<_> = sizes.iter().enumerate().map(|(seed, &size)| body(size, seed)).collect();
        let count = bodies.len();
        assert_eq!(drive_client(near, limits, bodies).await, count);
        server.abort();
    }
}

#[tokio::test]
async fn an_h2_server_that_drains_finishes_our_streams() {
    let (near, far) = tokio::io::duplex(4 << 20);
    let server = tokio::spawn(h2_echo_server(far, 65_535, 5, 4));
    let bodies: Vec<_> = (0..50).map(|seed| body(20_000, seed)).collect();
    let served = drive_client(near, Limits::default(), bodies).await;
    assert!((4..50).contains(&served), "{served}");
    server.await.unwrap();
}
