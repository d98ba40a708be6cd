//! Clients of HTTP/2 that break its rules or use it to keep the agent busy: refused, counted, and held to little memory.

use std::time::Duration;

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::fixture::{echo, forward, publish, test};
use crate::{
    metrics::http::Refusal,
    tests::fixture::{World, eventually, soon},
};

/// What every client begins with, with empty SETTINGS.
const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Header fields as HPACK literals that nobody remembers.
fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "web")];

/// A connection on which frames are written by hand.
struct Raw {
    stream: TcpStream,
    early: Vec<u8>,
}

impl Raw {
    async fn connect(world: &World) -> Self {
        let mut stream = TcpStream::connect(world.outbound).await.unwrap();
        stream.write_all(HELLO).await.unwrap();
        Self { stream, early: Vec::new() }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.ok();
    }

    /// Type, stream and payload of the next frame; `None` at the end.
    async fn frame(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        loop {
            if self.early.len() >= 9 {
                let len = usize::from(self.early[1]) << 8 | usize::from(self.early[2]);
                if self.early.len() >= 9 + len {
                    let frame: Vec<u8> = self.early.drain(..9 + len).collect();
                    let stream = u32::from_be_bytes(frame[5..9].try_into().unwrap());
                    return Some((frame[3], stream, frame[9..].to_vec()));
                }
            }
            let mut piece = [0; 4096];
            match soon(self.stream.read(&mut piece)).await {
                Ok(got @ 1..) => self.early.extend_from_slice(&piece[..got]),
                _ => return None,
            }
        }
    }

    /// The error code that a stream is reset with.
    async fn reset_of(&mut self, stream: u32) -> Option<u8> {
        while let Some((kind, of, payload)) = self.frame().await {
            if kind == RST_STREAM && of == stream {
                return payload.last().copied();
            }
        }
        None
    }
}

async fn counted(world: &World, reason: Refusal, wanted: u64) {
    eventually(|| world.metrics.http.refused(reason).get(), |count| *count == wanted).await;
}

/// A request of these fields, and what follows it on its stream, is refused and never reaches the server; the connection
/// goes on.
fn stream_is_refused(
    what: &'static str,
    headers: Vec<(&'static str, &'static str)>,
    body: Option<&'static [u8]>,
) {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut raw = Raw::connect(&world).await;
        let flags = if body.is_some() { END_HEADERS } else { END_HEADERS | END_STREAM };
        raw.send(&frame(HEADERS, flags, 1, &fields(&headers))).await;
        if let Some(body) = body {
            raw.send(&frame(DATA, END_STREAM, 1, body)).await;
        }
        assert_eq!(raw.reset_of(1).await, Some(1), "{what}: PROTOCOL_ERROR");
        counted(&world, Refusal::H2Protocol, 1).await;
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 3, &fields(&GET))).await;
        while let Some((kind, stream, _)) = raw.frame().await {
            if kind == HEADERS && stream == 3 {
                assert_eq!(seen.count(), 1, "{what}");
                return;
            }
        }
        panic!("{what}: the connection ended with the stream");
    });
}

/// A request of these fields is refused, with its stream or with the whole connection.
fn is_refused(headers: Vec<(&'static str, &'static str)>) {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut raw = Raw::connect(&world).await;
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&headers))).await;
        counted(&world, Refusal::H2Protocol, 1).await;
        assert_eq!(seen.count(), 0, "{headers:?}");
    });
}

fn get_with(more: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    GET.iter().chain(more).copied().collect()
}

#[test]
fn headers_that_only_make_sense_on_one_connection_are_refused() {
    for header in [
        ("connection", "close"),
        ("transfer-encoding", "chunked"),
        ("upgrade", "websocket"),
        ("keep-alive", "5"),
        ("proxy-connection", "close"),
        ("te", "gzip"),
    ] {
        stream_is_refused(header.0, get_with(&[header]), None);
    }
}

#[test]
fn pseudo_headers_that_are_none_or_out_of_place_are_refused() {
    stream_is_refused("unknown", get_with(&[(":status", "200")]), None);
    stream_is_refused("twice", get_with(&[(":path", "/other")]), None);
    let late =
        vec![(":method", "GET"), (":scheme", "http"), ("x", "y"), (":path", "/"), (":authority", "web")];
    stream_is_refused("behind a header", late, None);
    stream_is_refused("no method", GET[1..].to_vec(), None);
}

#[test]
fn names_and_values_that_would_split_a_header_of_http_1_are_refused() {
    for (name, value) in
        [("X-Upper", "y"), ("x y", "z"), ("x", "a\r\ny: b"), ("x", "a\0b"), ("x", "a\nb"), ("", "x")]
    {
        is_refused(get_with(&[(name, value)]));
    }
    // A name that the table of HTTP/2 has no pseudo-header for.
    is_refused(get_with(&[(":proto", "x")]));
}

#[test]
fn a_length_that_the_body_does_not_have_is_refused() {
    for length in ["5", "3"] {
        test(|world| async move {
            let (addr, seen) = echo("one").await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut raw = Raw::connect(&world).await;
            let headers = fields(&get_with(&[("content-length", length)]));
            raw.send(&frame(HEADERS, END_HEADERS, 1, &headers)).await;
            raw.send(&frame(DATA, END_STREAM, 1, b"four")).await;
            assert_eq!(raw.reset_of(1).await, Some(1), "{length}");
            counted(&world, Refusal::H2Protocol, 1).await;
            assert_eq!(seen.count(), 0, "{length}");
        });
    }
}

#[test]
fn what_http_1_refuses_of_hosts_and_methods_is_refused_in_http_2_too() {
    for (headers, reason) in [
        (get_with(&[("host", "a"), ("host", "b")]), Refusal::Host),
        (vec![(":method", "get"), GET[1], GET[2], GET[3]], Refusal::Method),
        (vec![GET[0], GET[1], (":path", "/a%00b"), GET[3]], Refusal::Path),
    ] {
        test(|world| async move {
            let (addr, seen) = echo("one").await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut raw = Raw::connect(&world).await;
            raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&headers))).await;
            counted(&world, reason, 1).await;
            assert_eq!(seen.count(), 0);
        });
    }
}

#[test]
fn a_host_beside_the_authority_is_not_what_the_server_sees() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut raw = Raw::connect(&world).await;
        let headers = fields(&get_with(&[("host", "elsewhere"), ("cookie", "a=1"), ("cookie", "b=2")]));
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &headers)).await;
        eventually(|| seen.count(), |count| *count == 1).await;
        let head = seen.last();
        assert_eq!(head.headers.get_all("host").iter().collect::<Vec<_>>(), ["web"]);
        assert_eq!(head.headers.get_all("cookie").iter().collect::<Vec<_>>(), ["a=1; b=2"], "one in HTTP/1");
    });
}

#[test]
fn too_many_headers_are_refused_however_small() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut raw = Raw::connect(&world).await;
        let mut headers = GET.to_vec();
        headers.resize(106, ("a", ""));
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&headers))).await;
        counted(&world, Refusal::HeadTooLarge, 1).await;
        assert_eq!(seen.count(), 0);
    });
}

#[test]
fn a_table_entry_named_again_and_again_is_a_head_too_large() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        // A literal of 4000 bytes that is remembered as entry 62, then the entry often: megabytes out of 5 kB.
        let bomb = |times: usize| {
            let literal = [&[0x40, 1, b'a', 0x7f, 0xa1, 0x1e][..], &[b'x'; 4000]].concat();
            [fields(&GET), literal, vec![0x80 | 62; times]].concat()
        };
        let mut raw = Raw::connect(&world).await;
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &bomb(20))).await;
        counted(&world, Refusal::HeadTooLarge, 1).await;
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 3, &bomb(1000))).await;
        // The library's own 431: it does not even gather that much.
        while let Some((kind, stream, payload)) = raw.frame().await {
            if kind == HEADERS && stream == 3 {
                assert!(payload.len() < 20, "{payload:?}");
                break;
            }
        }
        assert_eq!(seen.count(), 0);
    });
}

/// Sends a frame over and over and never reads: the connection ends or takes no more, before this many bytes.
fn flood_is_bounded(what: &'static str, flood: Vec<u8>, most: usize) {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut raw = Raw::connect(&world).await;
        let piece = flood.repeat(1000);
        let mut sent = 0;
        while sent < most {
            match timeout(Duration::from_secs(1), raw.stream.write_all(&piece)).await {
                Ok(Ok(())) => sent += piece.len(),
                Ok(Err(_)) | Err(_) => break,
            }
        }
        assert!(sent < most, "{what}: {sent} bytes were taken");
    });
}

#[test]
fn floods_of_control_frames_are_not_answered_for_ever() {
    // What kernels hold of both directions of a connection is up to a dozen MB.
    const MOST: usize = 64 << 20;
    flood_is_bounded("PING", frame(PING, 0, 0, &[7; 8]), MOST);
    flood_is_bounded("SETTINGS", frame(SETTINGS, 0, 0, &[]), MOST);
}

#[test]
fn data_frames_without_data_end_the_connection() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut raw = Raw::connect(&world).await;
        let post = [(":method", "POST"), GET[1], GET[2], GET[3]];
        raw.send(&frame(HEADERS, END_HEADERS, 1, &fields(&post))).await;
        raw.send(&frame(DATA, 0, 1, &[]).repeat(1000)).await;
        counted(&world, Refusal::H2Flood, 1).await;
        while raw.frame().await.is_some() {}
    });
}

#[test]
fn streams_beyond_the_limit_wait_and_are_answered() {
    test(|world| async move {
        let (addr, _) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let stream = TcpStream::connect(world.outbound).await.unwrap();
        let (send, connection) =
            soon(h2::client::Builder::new().handshake::<_, Bytes>(stream)).await.unwrap();
        drop(tokio::task::spawn_local(connection));
        let mut send = soon(send.ready()).await.unwrap();
        let max = world.worker.settings().http.streams_max;
        // The library waits for room itself once it knows the limit.
        let first = send.send_request(http::Request::get("http://web/").body(()).unwrap(), true).unwrap().0;
        assert_eq!(soon(first).await.unwrap().status(), 200);
        let mut waiting = Vec::new();
        for _ in 0..max + 50 {
            send = soon(send.ready()).await.unwrap();
            let request = http::Request::get("http://web/").body(()).unwrap();
            waiting.push(send.send_request(request, true).unwrap().0);
        }
        for response in waiting {
            assert_eq!(soon(response).await.unwrap().status(), 200);
        }
    });
}
