//! Requests that hide another one: refused by name before the server sees anything of them, and the connection ends.

use super::fixture::{Client, echo, forward, publish, test};
use crate::{
    metrics::http::Refusal,
    tests::fixture::{World, eventually},
};

/// What an attacker wants the server to see.
const HIDDEN: &str = "GET /hidden HTTP/1.1\r\nHost: web\r\n\r\n";

async fn refused(world: &World, reason: Refusal) {
    eventually(|| world.metrics.http.refused(reason).get(), |count| *count == 1).await;
}

/// Sends a POST with these header lines and this behind it: it must be refused for this reason, alone.
fn is_refused(headers: &str, behind: &str, status: u16, reason: Refusal) {
    let request = format!("POST /first HTTP/1.1\r\nHost: web\r\n{headers}\r\n\r\n{behind}{HIDDEN}");
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send(&request).await;
        assert_eq!(client.reply().await.status, status, "{request:?}");
        assert!(client.is_ended().await, "{request:?}");
        refused(&world, reason).await;
        assert_eq!(seen.count(), 0, "{request:?}");
    });
}

#[test]
fn lengths_that_can_be_read_in_two_ways() {
    for length in
        ["+5", " 5 5", "0x5", "5,5", "5;a", "-5", "5\t6", "1e1", "\u{0661}", "", "18446744073709551616"]
    {
        is_refused(&format!("Content-Length: {length}"), "hello", 400, Refusal::Length);
    }
    is_refused("Content-Length: 5\r\nContent-Length: 5", "hello", 400, Refusal::Length);
    is_refused("Content-Length: 0\r\ncontent-length: 5", "hello", 400, Refusal::Length);
}

#[test]
fn encodings_that_can_be_read_in_two_ways() {
    for encoding in [
        "xchunked",
        "chunked, identity",
        "identity",
        "gzip, chunked",
        "chunked;x=y",
        "\x0bchunked",
        "chunked\x0c",
        "\"chunked\"",
    ] {
        is_refused(&format!("Transfer-Encoding: {encoding}"), "0\r\n\r\n", 501, Refusal::TransferEncoding);
    }
    let twice = "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity";
    is_refused(twice, "0\r\n\r\n", 501, Refusal::TransferEncoding);
}

#[test]
fn a_length_beside_an_encoding_in_any_order() {
    for headers in [
        "Content-Length: 6\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 6",
        "Transfer-Encoding:\tchunked\r\nContent-Length: 6",
        "Transfer-Encoding: chunked\r\nX: y\r\nContent-Length: 0",
    ] {
        is_refused(headers, "0\r\n\r\n", 400, Refusal::LengthAndEncoding);
    }
}

#[test]
fn header_lines_that_some_see_and_others_do_not() {
    for (headers, reason) in [
        ("Transfer-Encoding : chunked", Refusal::Header),
        ("Transfer-Encoding\t: chunked", Refusal::Header),
        ("Content-Length\x00: 5", Refusal::Header),
        ("X: a\x00b", Refusal::Header),
        ("X\u{e9}: a", Refusal::Header),
        ("X: a\r\n Transfer-Encoding: chunked", Refusal::Folding),
        ("X: a\r\n\tContent-Length: 5", Refusal::Folding),
        ("X: a\rTransfer-Encoding: chunked", Refusal::BareCr),
        ("X: a\nTransfer-Encoding: chunked", Refusal::BareLf),
        ("Host: other", Refusal::Host),
    ] {
        is_refused(headers, "0\r\n\r\n", 400, reason);
    }
}

#[test]
fn chunks_that_others_would_read_differently_end_the_request_they_are_in() {
    for (body, reason) in [
        ("FFFFFFFFFFFFFFFF0\r\n", Refusal::ChunkSize),
        ("10000000000000005\r\nhello\r\n0\r\n\r\n", Refusal::ChunkSize),
        ("0x5\r\nhello\r\n0\r\n\r\n", Refusal::ChunkSize),
        ("+5\r\nhello\r\n0\r\n\r\n", Refusal::ChunkSize),
        ("5 \x0b\r\nhello\r\n0\r\n\r\n", Refusal::ChunkSize),
        ("5\r\nhello0\r\n\r\n", Refusal::ChunkSize),
        ("5\nhello\r\n0\r\n\r\n", Refusal::BareLf),
        ("5;a\nb\r\nhello\r\n0\r\n\r\n", Refusal::BareLf),
        ("5;a\rb\r\nhello\r\n0\r\n\r\n", Refusal::BareCr),
        ("0\r\nContent-Length: 50\r\n\r\n", Refusal::Trailers),
        ("0\r\nX : a\r\n\r\n", Refusal::Header),
    ] {
        test(|world| async move {
            let (addr, seen) = echo("one").await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            client.send("POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n").await;
            client.send(format!("{body}{HIDDEN}")).await;
            assert_eq!(client.reply().await.status, 400, "{body:?}");
            assert!(client.is_ended().await, "{body:?}");
            refused(&world, reason).await;
            // What the server got of the first request broke off.
            assert_eq!(seen.count(), 0, "{body:?}");
        });
    }
}

#[test]
fn extensions_and_case_of_chunks_are_understood_and_not_passed_on() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send("POST / HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: CHUNKED\r\n\r\n").await;
        client.send(format!("00A;x=\"y z\"\r\n{}\r\n000\r\n\r\n{HIDDEN}", "0123456789")).await;
        assert_eq!(client.reply().await.body, "POST / 0123456789");
        assert_eq!(client.reply().await.body, "GET /hidden ", "in the open it is a request like any other");
        assert_eq!(seen.count(), 2);
    });
}

#[test]
fn an_absolute_target_counts_and_the_server_sees_only_that() {
    test(|world| async move {
        let (addr, seen) = echo("one").await;
        publish(&world, vec![forward()], &[("web", addr)]);
        let mut client = Client::connect(&world).await;
        client.send("GET http://web/a?b HTTP/1.1\r\nHost: elsewhere\r\n\r\n").await;
        assert_eq!(client.reply().await.body, "GET /a?b ");
        assert_eq!(seen.last().headers["host"], "web");
        client.send("GET http://user@web/ HTTP/1.1\r\nHost: web\r\n\r\n").await;
        assert_eq!(client.reply().await.status, 400);
        assert_eq!(seen.count(), 1);
    });
}

#[test]
fn hosts_that_are_no_names_are_refused() {
    for host in ["web, other", "web/x", "web\\x", "we b", "web?x", "web#x", "web\u{e9}", ""] {
        test(|world| async move {
            let (addr, seen) = echo("one").await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            client.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
            assert_eq!(client.reply().await.status, 400, "{host:?}");
            refused(&world, Refusal::Host).await;
            assert_eq!(seen.count(), 0, "{host:?}");
        });
    }
}

#[test]
fn a_tunnel_with_a_body_is_refused() {
    for (headers, status, reason) in [
        ("Content-Length: 5", 400, Refusal::Length),
        ("Transfer-Encoding: chunked", 501, Refusal::TransferEncoding),
    ] {
        test(|world| async move {
            let (addr, seen) = echo("one").await;
            publish(&world, vec![forward()], &[("web", addr)]);
            let mut client = Client::connect(&world).await;
            client
                .send(format!("CONNECT web:80 HTTP/1.1\r\nHost: web:80\r\n{headers}\r\n\r\n{HIDDEN}"))
                .await;
            assert_eq!(client.reply().await.status, status);
            refused(&world, reason).await;
            assert_eq!(seen.count(), 0);
        });
    }
}
