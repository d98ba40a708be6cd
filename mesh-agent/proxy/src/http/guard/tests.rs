//! What passes the guard and what does not, whole and byte by byte.

use proptest::prelude::*;

use super::*;

/// What passes of `stream` if it arrives in pieces of `piece` bytes, and why no more does.
fn run(stream: &[u8], piece: usize) -> (Vec<u8>, Option<Refusal>) {
    let mut guard = Guard::new();
    let mut passed = Vec::new();
    for bytes in stream.chunks(piece) {
        if !guard.has_room() {
            break;
        }
        if guard.take(bytes) {
            passed.extend_from_slice(bytes);
        }
        let ready = guard.ready().to_vec();
        guard.consume(ready.len());
        passed.extend(ready);
    }
    (passed, guard.refusal())
}

fn refused(head: &str) -> Option<Refusal> {
    let stream = format!("{head}\r\n\r\n");
    let outcomes: Vec<_> = [1, 7, 100_000].map(|piece| run(stream.as_bytes(), piece)).into();
    for (passed, refusal) in &outcomes {
        assert_eq!(*refusal, outcomes[0].1, "{head}");
        assert_eq!(passed.is_empty(), refusal.is_some(), "nothing of a refused head passes: {head}");
    }
    outcomes[0].1
}

#[test]
fn ambiguous_heads_are_refused_by_name() {
    for (head, refusal) in [
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
            Refusal::LengthAndEncoding,
        ),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", Refusal::LengthAndEncoding),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: 5\r\ncontent-length: 6", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: 5, 5", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: +5", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: 0x5", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: -1", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length:", Refusal::Length),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked", Refusal::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: xchunked", Refusal::TransferEncoding),
        (
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            Refusal::TransferEncoding,
        ),
        ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked", Refusal::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding : chunked", Refusal::Header),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked, identity", Refusal::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked;q=1", Refusal::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: \x0bchunked", Refusal::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding: \"chunked\"", Refusal::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding:", Refusal::TransferEncoding),
        ("POST / HTTP/1.1\r\nTransfer-Encoding\t: chunked", Refusal::Header),
        ("POST / HTTP/1.1\r\nTransfer-Encoding", Refusal::Header),
        ("POST / HTTP/1.1\r\nContent-Length : 5", Refusal::Header),
        ("POST / HTTP/1.1\r\nContent-Length: 5 5", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: 5;", Refusal::Length),
        ("POST / HTTP/1.1\r\nContent-Length: 1_0", Refusal::Length),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 5", Refusal::Length),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nTransfer-Encoding: chunked", Refusal::TransferEncoding),
        ("GET / HTTP/1.1\r\n X: a", Refusal::Folding),
        ("GET / HTTP/1.1\rX: a", Refusal::BareCr),
        ("GET / HTTP/1.1 ", Refusal::RequestLine),
        ("GET / http/1.1", Refusal::RequestLine),
        ("GET / HTTP/1.1\r\nX: a\r\n b", Refusal::Folding),
        ("GET / HTTP/1.1\r\nX: a\r\n\tb", Refusal::Folding),
        ("GET / HTTP/1.1\r\nX: a\rb", Refusal::BareCr),
        ("GET / HTTP/1.1\r\nX: a\nY: b", Refusal::BareLf),
        ("GET / HTTP/1.1\r\nX: a\0b", Refusal::Header),
        ("GET / HTTP/1.1\r\nX", Refusal::Header),
        ("GET / HTTP/1.1\r\n: x", Refusal::Header),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b", Refusal::Host),
        ("GET /", Refusal::RequestLine),
        ("GET / HTTP/2.0", Refusal::RequestLine),
    ] {
        assert_eq!(refused(head), Some(refusal), "{head}");
    }
    for head in [
        "GET / HTTP/1.1\r\nHost: a",
        "\r\nGET / HTTP/1.0",
        "POST / HTTP/1.1\r\nTransfer-Encoding:  Chunked ",
        "POST / HTTP/1.1\r\nTransfer-Encoding:\tchunked\t",
        "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 0",
        "POST / HTTP/1.1\r\nContent-Length: 007",
    ] {
        assert_eq!(refused(head), None, "{head}");
    }
}

#[test]
fn heads_are_bounded_in_bytes_and_lines() {
    let long = format!("GET / HTTP/1.1\r\nX: {}", "a".repeat(HEAD_MAX));
    assert_eq!(run(long.as_bytes(), 1000).1, Some(Refusal::HeadTooLarge));
    let many = format!("GET / HTTP/1.1{}\r\n\r\n", "\r\nX: a".repeat(HEADERS_MAX + 1));
    assert_eq!(run(many.as_bytes(), 1000).1, Some(Refusal::HeadTooLarge));
    let mut guard = Guard::new();
    for _ in 0..10_000 {
        if guard.has_room() {
            guard.take(&[b'a'; 100]);
        }
    }
    assert!(guard.held.len() <= HEAD_MAX + 200, "{}", guard.held.len());
}

#[test]
fn a_head_that_drips_is_read_once_for_each_line_not_for_each_byte() {
    let head = format!("GET / HTTP/1.1\r\n{}X: {}", "A: b\r\n".repeat(80), "a".repeat(HEAD_MAX - 1000));
    let mut guard = Guard::new();
    for byte in head.as_bytes() {
        assert!(!guard.take(&[*byte]));
    }
    // Reading it anew for each of 60000 bytes takes minutes.
    assert_eq!((guard.refusal(), guard.in_head()), (None, true));
    assert!(!guard.take(b"\rb"));
    assert_eq!(guard.refusal(), Some(Refusal::BareCr));
    let mut guard = Guard::new();
    guard.take(head.as_bytes());
    guard.take(b"\r");
    guard.take(b"b");
    assert_eq!(guard.refusal(), Some(Refusal::BareCr), "also in two pieces");
    let mut guard = Guard::new();
    guard.take(head.as_bytes());
    for _ in 0..1100 {
        guard.take(b"a");
    }
    assert_eq!(guard.refusal(), Some(Refusal::HeadTooLarge));
}

#[test]
fn bodies_are_followed_to_the_byte() {
    let stream = b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nHello\
        POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nGET /\r\n00A\r\n0123456789\r\n0\r\nX: y\r\n\r\n\
        GET / HTTP/1.1\r\n\r\n";
    for piece in [1, 2, 3, 50, 1000] {
        assert_eq!(run(stream, piece), (stream.to_vec(), None), "{piece}");
    }
}

#[test]
fn targets_that_others_take_are_handed_on_encoded_and_the_requests_around_them_as_they_came() {
    const STREAM: &str = "GET /a?b=\"c\" HTTP/1.1\r\nX: <\"\r\n\r\n\
        POST /<d> HTTP/1.1\r\nContent-Length: 5\r\n\r\n<\"<\">\
        GET /`?`# HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n";
    const PASSED: &str = "GET /a?b=%22c%22 HTTP/1.1\r\nX: <\"\r\n\r\n\
        POST /%3Cd%3E HTTP/1.1\r\nContent-Length: 5\r\n\r\n<\"<\">\
        GET /%60?`# HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n";
    for piece in [1, 2, 7, 30, 1000] {
        let (passed, refusal) = run(STREAM.as_bytes(), piece);
        assert_eq!((String::from_utf8(passed).unwrap().as_str(), refusal), (PASSED, None), "{piece}");
    }
    // What is wrong with such a head is still said by name, and how long it may be is counted as it leaves.
    let stream = b"GET /?\" HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(run(stream, 1000), (Vec::new(), Some(Refusal::LengthAndEncoding)));
    let long = format!("GET /?{} HTTP/1.1\r\n\r\n", "\"".repeat(HEAD_MAX / 3));
    assert_eq!(run(long.as_bytes(), 100_000), (Vec::new(), Some(Refusal::HeadTooLarge)));
    let fits = format!("GET /?{} HTTP/1.1\r\n\r\n", "\"".repeat(HEAD_MAX / 3 - 100));
    assert_eq!(run(fits.as_bytes(), 1000).1, None);
}

#[test]
fn broken_chunks_are_refused() {
    const POST: &str = "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (body, refusal) in [
        ("FFFFFFFFFFFFFFFFF\r\n", Refusal::ChunkSize),
        ("FFFFFFFFFFFFFFFF\r\n", Refusal::ChunkSize),
        ("10000000001\r\n", Refusal::ChunkSize),
        ("\r\n", Refusal::ChunkSize),
        ("-1\r\n", Refusal::ChunkSize),
        ("0x5\r\nHello\r\n", Refusal::ChunkSize),
        ("5 5\r\nHello\r\n", Refusal::ChunkSize),
        ("5\nHello\r\n", Refusal::BareLf),
        ("5\r\nHelloX\n", Refusal::ChunkSize),
        ("5\r\nHello\n0", Refusal::ChunkSize),
        ("5;\rx\r\n", Refusal::BareCr),
        ("0\r\nContent-Length: 5\r\n\r\n", Refusal::Trailers),
        ("0\r\nX: a\nY: b\r\n\r\n", Refusal::BareLf),
    ] {
        for piece in [1, 1000] {
            let (passed, seen) = run(format!("{POST}{body}").as_bytes(), piece);
            assert_eq!(seen, Some(refusal), "{body}");
            assert!(passed.starts_with(POST.as_bytes()));
        }
    }
    let long = format!("{POST}5;{}\r\n", "x".repeat(CHUNK_LINE_MAX));
    assert_eq!(run(long.as_bytes(), 1000).1, Some(Refusal::ChunkSize));
    let trailers = format!("{POST}0\r\n{}", "X: 0123456789\r\n".repeat(TRAILERS_MAX / 15 + 2));
    assert_eq!(run(trailers.as_bytes(), 1000).1, Some(Refusal::Trailers));
}

#[test]
fn a_bad_request_behind_a_good_one_leaves_the_good_one_alone() {
    const GOOD: &[u8] = b"GET / HTTP/1.1\r\n\r\n";
    let stream = [GOOD, b"GET / HTTP/1.1\r\nX: a\nb\r\n\r\n"].concat();
    let mut guard = Guard::new();
    assert!(!guard.take(&stream));
    assert_eq!(guard.ready(), GOOD);
    assert_eq!(guard.refusal(), Some(Refusal::BareLf));
    assert!(!guard.refused_in_body());
}

#[test]
fn what_follows_a_possible_switch_waits_for_its_outcome() {
    const ASK: &[u8] = b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    for rest in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x81\x02hi"] {
        let mut guard = Guard::new();
        assert!(!guard.take(&[ASK, rest].concat()));
        assert_eq!(guard.ready(), ASK);
        guard.consume(ASK.len());
        assert!(guard.is_undecided());
        guard.take(b"");
        assert!(guard.ready().is_empty());
        let mut not_switched = guard;
        not_switched.decided();
        assert_eq!(not_switched.ready(), if rest[0] == b'G' { rest } else { b"" });
    }
    let mut guard = Guard::new();
    guard.take(ASK);
    guard.held.extend_from_slice(if guard.held.is_empty() { ASK } else { b"" });
    guard.passed = ASK.len();
    while guard.has_room() {
        guard.take(&[0; 1000]);
    }
    assert!(guard.held.len() < HELD_MAX + 1000);
    guard.consume(ASK.len());
    guard.switched();
    assert_eq!(guard.ready().len(), guard.held.len(), "all of it is for the other protocol");
}

proptest! {
    #[test]
    fn how_bytes_are_cut_makes_no_difference(
        lines in proptest::collection::vec("(GET / HTTP/1\\.1|[XT]: [a\r\n]{0,3}|Content-Length: [0-9]|Transfer-Encoding: chunked|[0-3]|)", 1..12),
        piece in 1_usize..9,
    ) {
        let stream = lines.join("\r\n").into_bytes();
        let (whole, whole_refusal) = run(&stream, stream.len().max(1));
        let (cut, cut_refusal) = run(&stream, piece);
        prop_assert_eq!(whole_refusal, cut_refusal);
        // A body's bytes pass as they come, so a cut stream may have got further into a broken element, never less far.
        prop_assert!(stream.starts_with(&cut) && stream.starts_with(&whole));
    }
}
