//! Each type of frame: what it means, and what is wrong with it.

use super::{
    super::super::{
        Cause, ErrorCode, Limits, OpenError, SendError, Violation,
        frame::{ACK, END_HEADERS, END_STREAM, Kind, PADDED, PREFACE, PRIORITY},
    },
    super::Connection,
    fixture::{Seen, Side, block, connect, data, frame, go_away, ok, reset, settings, window_update},
};

fn server() -> Side {
    Side::server(Limits::default())
}

fn client() -> Side {
    Side::client(Limits::default())
}

/// A server with stream 1 open and answered.
fn tunnel(limits: Limits) -> Side {
    let mut side = Side::server(limits);
    assert_eq!(side.hear(&connect(1)), Ok(vec![Seen::Opened(1, false)]));
    side.connection.respond(side.keys[0], 200, &[], false).unwrap();
    side.connection.clear_output();
    side
}

fn refusal(mut side: Side, bytes: &[u8]) -> Violation {
    let violation = side.hear(bytes).expect_err("refused");
    let (kind, _, _, payload) = side.said().pop().expect("a last frame");
    assert_eq!(kind, Kind::GoAway);
    assert_eq!(payload[4..8], violation.code().0.to_be_bytes());
    assert_eq!(side.hear(&[]), Err(violation), "a failed connection reads nothing");
    assert!(side.connection.is_finished());
    violation
}

#[test]
fn a_client_begins_with_preface_and_settings() {
    let side = Side::new(Connection::client, Limits::default());
    let rest = side.connection.output().strip_prefix(PREFACE).unwrap();
    let frames = super::fixture::parse(rest);
    assert_eq!(frames[0].0, Kind::Settings);
    assert!(frames[0].3.starts_with(&[0, 2, 0, 0, 0, 0]), "push is off");
    assert_eq!(frames[1].0, Kind::WindowUpdate);
}

#[test]
fn anything_before_the_preface_or_settings_is_refused() {
    let fresh = || Side::new(Connection::server, Limits::default());
    assert_eq!(refusal(fresh(), b"GET / HTTP/1.1\r\n"), Violation::BadPreface);
    assert_eq!(refusal(fresh(), b"\x16\x03\x01"), Violation::BadPreface);
    for first in [
        connect(1),
        frame(Kind::Ping, 0, 0, &[0; 8]),
        frame(Kind::Settings, ACK, 0, &[]),
        data(1, b"x", true),
    ] {
        assert_eq!(refusal(fresh(), &[&PREFACE[..], &first].concat()), Violation::NoSettings);
    }
}

#[test]
fn settings_are_acknowledged_and_obeyed() {
    let mut side = client();
    let key = side.keys[0];
    assert_eq!(side.connection.send_capacity(key), 65_535);
    let list = [(3, 1), (4, 10), (5, 20_000), (6, 100), (1, 0), (8, 1), (0xfafa, 7)];
    assert_eq!(side.hear(&settings(&list)), Ok(vec![Seen::Settings]));
    assert_eq!(side.said(), [(Kind::Settings, ACK, 0, vec![])]);
    assert_eq!(side.connection.send_capacity(key), 10);
    assert_eq!(side.connection.max_data(), 20_000);
    assert_eq!(side.connection.room(), 0);
    assert_eq!(side.connection.open(&[], false), Err(OpenError::Full));
    side.hear(&settings(&[(3, 2)])).unwrap();
    assert_eq!(side.connection.open(&[("x", &"y".repeat(100))], false), Err(OpenError::HeadersTooLarge));
}

#[test]
fn wrong_settings_are_refused() {
    for (list, violation) in [
        (settings(&[(2, 2)]), Violation::BadSetting),
        (settings(&[(4, 1 << 31)]), Violation::WindowOverflow),
        (settings(&[(5, 16_383)]), Violation::BadSetting),
        (settings(&[(5, 1 << 24)]), Violation::BadSetting),
        (frame(Kind::Settings, 0, 0, &[0; 5]), Violation::FrameSize),
        (frame(Kind::Settings, ACK, 0, &[0; 6]), Violation::FrameSize),
        (frame(Kind::Settings, 0, 1, &[]), Violation::BadStreamId),
    ] {
        assert_eq!(refusal(server(), &list), violation);
    }
    assert_eq!(
        refusal(client(), &settings(&[(2, 1)])),
        Violation::BadSetting,
        "a server does not enable push"
    );
}

#[test]
fn a_smaller_initial_window_makes_windows_negative() {
    let mut side = client();
    let key = side.keys[0];
    side.connection.data_frame(key, 16_000, false).unwrap();
    side.hear(&settings(&[(4, 6_000)])).unwrap();
    assert_eq!(side.connection.send_capacity(key), 0);
    assert_eq!(side.connection.data_frame(key, 1, false), Err(SendError::Window));
    assert_eq!(side.hear(&window_update(1, 10_000)), Ok(vec![]), "still zero");
    assert_eq!(side.hear(&window_update(1, 1)), Ok(vec![Seen::Window(Some(1))]));
    assert_eq!(side.connection.send_capacity(key), 1);
    assert_eq!(
        refusal(side, &[window_update(1, 0x7fff_0000), settings(&[(4, 0x7fff_ffff)])].concat()),
        Violation::WindowOverflow
    );
}

#[test]
fn windows_open_once_and_overflow_is_refused() {
    let mut side = client();
    let key = side.keys[0];
    side.hear(&settings(&[(4, 1 << 20)])).unwrap();
    for size in [16_384, 16_384, 16_384, 16_383] {
        assert!(side.connection.data_frame(key, size, false).is_ok());
    }
    assert_eq!(side.connection.send_capacity(key), 0);
    assert_eq!(side.hear(&window_update(0, 5)), Ok(vec![Seen::Window(None)]));
    assert_eq!(side.hear(&window_update(0, 5)), Ok(vec![]));
    assert_eq!(side.connection.send_capacity(key), 10);
    let overflow = Cause::Violation(Violation::WindowOverflow);
    assert_eq!(side.hear(&window_update(1, 0x7fff_ffff)), Ok(vec![Seen::Reset(1, overflow)]));
    assert_eq!(refusal(side, &window_update(0, 0x7fff_ffff)), Violation::WindowOverflow);
    assert_eq!(refusal(client(), &window_update(0, 0)), Violation::ZeroIncrement);
    assert_eq!(refusal(client(), &window_update(3, 1)), Violation::BadStreamId);
    assert_eq!(refusal(client(), &frame(Kind::WindowUpdate, 0, 0, &[0; 3])), Violation::FrameSize);
    let zero = Cause::Violation(Violation::ZeroIncrement);
    assert_eq!(client().hear(&window_update(1, 0)), Ok(vec![Seen::Reset(1, zero)]));
}

#[test]
fn pings_are_answered() {
    let mut side = server();
    assert_eq!(side.hear(&frame(Kind::Ping, 0, 0, b"12345678")), Ok(vec![]));
    assert_eq!(side.said(), [(Kind::Ping, ACK, 0, b"12345678".to_vec())]);
    assert_eq!(refusal(server(), &frame(Kind::Ping, 0, 0, &[0; 7])), Violation::FrameSize);
    assert_eq!(refusal(server(), &frame(Kind::Ping, 0, 1, &[0; 8])), Violation::BadStreamId);
}

#[test]
fn a_tunnel_opens_carries_and_ends() {
    let mut side = server();
    let request = [connect(1), data(1, b"early", false)].concat();
    assert_eq!(
        side.hear(&request),
        Ok(vec![Seen::Opened(1, false), Seen::Data(1, b"early".to_vec(), false)])
    );
    let key = side.keys[0];
    assert_eq!(side.connection.data_frame(key, 1, false), Err(SendError::NotOpen), "not answered");
    side.connection.respond(key, 200, &[("x-y", "z")], false).unwrap();
    assert_eq!(side.connection.respond(key, 200, &[], false), Err(SendError::NotOpen));
    assert_eq!(side.connection.data_frame(key, 1, false), Err(SendError::OutputFirst));
    let said = side.said();
    assert_eq!((said[0].0, said[0].1, said[0].2), (Kind::Headers, END_HEADERS, 1));
    assert_eq!(side.connection.data_frame(key, 3, true), Ok([0, 0, 3, 0, END_STREAM, 0, 0, 0, 1]));
    assert_eq!(side.connection.data_frame(key, 3, true), Err(SendError::NotOpen));
    side.connection.consumed(key, 5);
    assert_eq!(side.hear(&data(1, b"", true)), Ok(vec![Seen::Ended(1)]));
    assert_eq!(side.connection.streams(), 0);
    assert_eq!(side.connection.data_frame(key, 0, false), Err(SendError::Gone));
}

#[test]
fn an_end_may_come_with_headers_data_or_trailers() {
    let connect_end = frame(
        Kind::Headers,
        END_HEADERS | END_STREAM,
        1,
        &block(&[(":method", "CONNECT"), (":authority", "a:1")]),
    );
    assert_eq!(server().hear(&connect_end), Ok(vec![Seen::Opened(1, true)]));
    let mut side = tunnel(Limits::default());
    assert_eq!(side.hear(&data(1, b"last", true)), Ok(vec![Seen::Data(1, b"last".to_vec(), true)]));
    assert_eq!(refusal(side, &data(1, b"more", false)), Violation::StreamClosed);
    let trailers = |flags| frame(Kind::Headers, flags, 1, &block(&[("x", "y")]));
    let mut side = tunnel(Limits::default());
    assert_eq!(side.hear(&trailers(END_HEADERS | END_STREAM)), Ok(vec![Seen::Ended(1)]));
    assert_eq!(refusal(side, &trailers(END_HEADERS | END_STREAM)), Violation::StreamClosed);
    let malformed = Cause::Violation(Violation::MalformedHeaders);
    assert_eq!(tunnel(Limits::default()).hear(&trailers(END_HEADERS)), Ok(vec![Seen::Reset(1, malformed)]));
}

#[test]
fn responses_come_after_informational_ones_and_before_data() {
    let status = |status, flags| frame(Kind::Headers, flags, 1, &block(&[(":status", status)]));
    let mut side = client();
    assert_eq!(side.hear(&status("103", END_HEADERS)), Ok(vec![]));
    assert_eq!(side.hear(&ok(1)), Ok(vec![Seen::Response(1, 200, false)]));
    assert_eq!(side.hear(&data(1, b"x", true)), Ok(vec![Seen::Data(1, b"x".to_vec(), true)]));
    let mut side = client();
    assert_eq!(side.hear(&status("503", END_HEADERS | END_STREAM)), Ok(vec![Seen::Response(1, 503, true)]));
    assert_eq!(side.connection.streams(), 1, "our half is open");
    side.connection.end(side.keys[0]);
    assert_eq!(side.connection.streams(), 0);
    let malformed = || Ok(vec![Seen::Reset(1, Cause::Violation(Violation::MalformedHeaders))]);
    assert_eq!(client().hear(&data(1, b"too early", false)), malformed());
    assert_eq!(client().hear(&status("101", END_HEADERS)), malformed());
    assert_eq!(client().hear(&status("100", END_HEADERS | END_STREAM)), malformed());
    assert_eq!(client().hear(&connect(1)), malformed());
}

#[test]
fn padding_counts_and_does_not_show() {
    let mut side = tunnel(Limits { stream_window: 70_000, ..Limits::default() });
    let before = side.connection.receive_window;
    let padded = |payload: &[u8], flags| frame(Kind::Data, PADDED | flags, 1, payload);
    assert_eq!(side.hear(&padded(b"\x03dataPAD", 0)), Ok(vec![Seen::Data(1, b"data".to_vec(), false)]));
    assert_eq!(side.connection.receive_window, before - 8);
    assert_eq!(side.connection.credit, 4);
    assert_eq!(side.hear(&padded(b"\x00", 0)), Ok(vec![]));
    assert_eq!(side.hear(&padded(b"\x02PA", END_STREAM)), Ok(vec![Seen::Ended(1)]));
    assert_eq!(refusal(tunnel(Limits::default()), &padded(b"\x03PA", 0)), Violation::BadPadding);
    assert_eq!(refusal(tunnel(Limits::default()), &padded(b"", 0)), Violation::FrameSize);
}

#[test]
fn padded_and_prioritised_headers_open_streams() {
    let list = block(&[(":method", "CONNECT"), (":authority", "a:1")]);
    let payload = [&[2][..], &[0x80, 0, 0, 1, 5], &list, b"PA"].concat();
    let flags = END_HEADERS | PADDED | PRIORITY;
    assert_eq!(server().hear(&frame(Kind::Headers, flags, 1, &payload)), Ok(vec![Seen::Opened(1, false)]));
    for (flags, payload, violation) in [
        (PADDED, &b""[..], Violation::FrameSize),
        (PADDED, b"\x01", Violation::BadPadding),
        (PRIORITY, b"1234", Violation::FrameSize),
        (0, b"\x80", Violation::HeaderCompression),
    ] {
        assert_eq!(refusal(server(), &frame(Kind::Headers, flags | END_HEADERS, 1, payload)), violation);
    }
}

#[test]
fn header_blocks_are_gathered_and_not_interrupted() {
    let list = block(&[(":method", "CONNECT"), (":authority", "a:1")]);
    let (first, second) = list.split_at(4);
    let begin = frame(Kind::Headers, END_STREAM, 1, first);
    let rest = frame(Kind::Continuation, END_HEADERS, 1, second);
    assert_eq!(server().hear(&[begin.clone(), rest.clone()].concat()), Ok(vec![Seen::Opened(1, true)]));
    for interruption in [
        data(1, b"x", false),
        frame(Kind::Ping, 0, 0, &[0; 8]),
        frame(Kind::Unknown(0xaa), 0, 0, &[]),
        connect(1),
        frame(Kind::Continuation, END_HEADERS, 3, second),
    ] {
        assert_eq!(refusal(server(), &[begin.clone(), interruption].concat()), Violation::UnexpectedFrame);
    }
    assert_eq!(refusal(server(), &rest), Violation::UnexpectedFrame);
}

#[test]
fn malformed_requests_are_refused_alone() {
    let mut side = server();
    let get = frame(Kind::Headers, END_HEADERS, 1, &block(&[(":method", "GET")]));
    assert_eq!(side.hear(&get), Ok(vec![Seen::Refused(Violation::MalformedHeaders)]));
    assert_eq!(side.said(), [(Kind::Reset, 0, 1, vec![0, 0, 0, 1])]);
    assert_eq!(side.hear(&data(1, b"on its way", false)), Ok(vec![]));
    assert_eq!(side.hear(&connect(3)), Ok(vec![Seen::Opened(3, false)]));
}

#[test]
fn a_header_list_too_large_is_answered_with_431() {
    let mut side = Side::server(Limits { max_header_list: 1_024, ..Limits::default() });
    let large = block(&[(":method", "CONNECT"), (":authority", "a:1"), ("x", &"y".repeat(1_100))]);
    let request = frame(Kind::Headers, END_HEADERS, 1, &large);
    assert_eq!(side.hear(&request), Ok(vec![Seen::Refused(Violation::HeaderListTooLarge)]));
    let kinds: Vec<_> = side.said().into_iter().map(|(kind, flags, ..)| (kind, flags)).collect();
    assert_eq!(kinds, [(Kind::Headers, END_HEADERS | END_STREAM), (Kind::Reset, 0)]);
    assert_eq!(side.hear(&connect(3)), Ok(vec![Seen::Opened(3, false)]));
}

#[test]
fn streams_over_the_limit_are_refused_until_others_end() {
    let mut side = Side::server(Limits { max_streams: 1, ..Limits::default() });
    side.hear(&connect(1)).unwrap();
    assert_eq!(side.hear(&connect(3)), Ok(vec![Seen::Refused(Violation::TooManyStreams)]));
    assert_eq!(side.said(), [(Kind::Reset, 0, 3, vec![0, 0, 0, 7])]);
    side.connection.reset(side.keys[0], ErrorCode::CANCEL);
    assert_eq!(side.hear(&connect(5)), Ok(vec![Seen::Opened(5, false)]));
}

#[test]
fn streams_closed_but_not_consumed_do_not_pile_up() {
    let mut side = Side::server(Limits { max_streams: 2, ..Limits::default() });
    for id in [1, 3, 5, 7] {
        assert_eq!(side.hear(&connect(id)), Ok(vec![Seen::Opened(id, false)]));
        side.hear(&data(id, b"kept", true)).unwrap();
        let key = *side.keys.last().unwrap();
        side.connection.respond(key, 200, &[], true).unwrap();
    }
    assert_eq!(side.hear(&connect(9)), Ok(vec![Seen::Refused(Violation::TooManyStreams)]));
    side.connection.consumed(side.keys[0], 4);
    assert_eq!(side.hear(&connect(11)), Ok(vec![Seen::Opened(11, false)]));
}

#[test]
fn ids_of_the_wrong_side_or_of_the_past_are_refused() {
    for (side, bytes) in [
        (server(), connect(2)),
        (server(), connect(0)),
        (server(), data(1, b"", false)),
        (server(), reset(1, 0)),
        (server(), frame(Kind::Priority, 0, 0, &[0; 5])),
        (client(), ok(2)),
        (client(), ok(3)),
        (client(), data(3, b"", false)),
        (client(), data(0, b"", false)),
    ] {
        assert_eq!(refusal(side, &bytes), Violation::BadStreamId, "{bytes:x?}");
    }
    let mut side = server();
    side.hear(&connect(5)).unwrap();
    assert_eq!(refusal(side, &connect(3)), Violation::BadStreamId);
    assert_eq!(
        refusal(client(), &frame(Kind::PushPromise, END_HEADERS, 1, &[0, 0, 0, 2])),
        Violation::UnexpectedFrame
    );
}

#[test]
fn a_reset_ends_both_halves_and_what_is_held_counts_until_it_is_consumed() {
    let mut side = tunnel(Limits::default());
    side.hear(&data(1, &[7; 1_000], false)).unwrap();
    assert_eq!(side.hear(&reset(1, 8)), Ok(vec![Seen::Reset(1, Cause::Peer(ErrorCode::CANCEL))]));
    assert_eq!((side.connection.credit, side.connection.streams()), (0, 1), "somebody holds the bytes");
    side.connection.consumed(side.keys[0], 400);
    assert_eq!(side.connection.credit, 400);
    side.connection.reset(side.keys[0], ErrorCode::CANCEL);
    assert!(side.said().is_empty(), "the peer knows");
    assert_eq!((side.connection.credit, side.connection.streams()), (1_000, 0));
    side.connection.consumed(side.keys[0], 1_000);
    assert_eq!(side.connection.credit, 1_000, "not twice");
    assert_eq!(side.hear(&[reset(1, 8), data(1, b"late", false)].concat()), Ok(vec![]));
    let mut side = client();
    assert_eq!(side.hear(&reset(1, 7)), Ok(vec![Seen::Reset(1, Cause::Unprocessed)]));
}

#[test]
fn data_that_crosses_our_reset_is_credited() {
    let mut side = tunnel(Limits::default());
    let frame = data(1, &[1; 100], true);
    let seen = side.hear(&frame[..59]).unwrap();
    assert_eq!(seen, [Seen::Data(1, vec![1; 50], false)]);
    side.connection.reset(side.keys[0], ErrorCode::CANCEL);
    assert_eq!(side.hear(&frame[59..]), Ok(vec![]));
    assert_eq!(side.connection.credit, 100);
    assert_eq!(side.hear(&data(1, &[1; 100], false)), Ok(vec![]));
    assert_eq!(side.connection.credit, 200);
    assert_eq!(side.hear(&[window_update(1, 7), reset(1, 0)].concat()), Ok(vec![]));
}

#[test]
fn consuming_announces_windows_by_halves() {
    let limits = Limits { stream_window: 100_000, connection_window: 1_000_000, ..Limits::default() };
    let mut side = tunnel(limits);
    side.hear(&frame(Kind::Settings, ACK, 0, &[])).unwrap();
    for _ in 0..10 {
        side.hear(&data(1, &[0; 10_000], false)).unwrap();
    }
    let key = side.keys[0];
    side.connection.consumed(key, 49_999);
    assert!(side.connection.output().is_empty());
    side.connection.consumed(key, 1);
    assert_eq!(side.said(), [(Kind::WindowUpdate, 0, 1, 50_000_u32.to_be_bytes().to_vec())]);
    assert_eq!(refusal(side, &data(1, &[0; 16_000], false).repeat(4)), Violation::WindowExceeded);
}

#[test]
fn small_windows_hold_once_the_peer_knows_them() {
    let limits = Limits { stream_window: 1_000, ..Limits::default() };
    let mut side = tunnel(limits);
    // Before the acknowledgement the peer may still think of 65535.
    side.hear(&data(1, &[0; 10_000], false)).unwrap();
    side.hear(&frame(Kind::Settings, ACK, 0, &[])).unwrap();
    let key = side.keys[0];
    side.connection.consumed(key, 10_000);
    assert_eq!(side.connection.streams.get(key).unwrap().receive_window, 1_000);
    assert_eq!(refusal(side, &data(1, &[0; 1_001], false)), Violation::WindowExceeded);
}

#[test]
fn frames_over_the_announced_size_are_refused() {
    let long = vec![0; 16_385];
    for kind in [Kind::Data, Kind::Headers, Kind::Unknown(99), Kind::GoAway] {
        assert_eq!(
            refusal(tunnel(Limits::default()), &frame(kind, 0, u32::from(kind != Kind::GoAway), &long)),
            Violation::FrameSize
        );
    }
}

#[test]
fn go_away_leaves_out_later_streams() {
    let mut side = client();
    let request = [(":method", "CONNECT"), (":authority", "a:1")];
    for _ in 0..2 {
        side.connection.open(&request, false).unwrap();
    }
    assert_eq!(
        side.hear(&go_away(1, 0)),
        Ok(vec![Seen::GoAway(1, 0), Seen::Reset(5, Cause::Unprocessed), Seen::Reset(3, Cause::Unprocessed),])
    );
    assert_eq!(side.connection.open(&request, false), Err(OpenError::GoingAway));
    assert!(!side.connection.is_finished());
    assert_eq!(side.hear(&[ok(1), data(1, b"still", false)].concat()).unwrap().len(), 2);
    assert_eq!(side.hear(&go_away(u32::MAX, 0)), Ok(vec![Seen::GoAway(1, 0)]), "it cannot take more again");
    side.connection.reset(side.keys[0], ErrorCode::CANCEL);
    assert!(side.connection.is_finished());
}

#[test]
fn a_server_drains_in_two_steps() {
    let mut side = tunnel(Limits::default());
    side.connection.shutdown();
    side.connection.shutdown();
    let said = side.said();
    assert_eq!(said.len(), 2);
    assert_eq!(said[0].3[..4], 0x7fff_ffff_u32.to_be_bytes());
    assert_eq!(side.hear(&connect(3)), Ok(vec![Seen::Opened(3, false)]), "it was on its way");
    assert!(!side.connection.is_finished());
    side.hear(&frame(Kind::Ping, ACK, 0, &said[1].3)).unwrap();
    assert_eq!(side.said()[0].3[..4], 3_u32.to_be_bytes());
    assert_eq!(side.hear(&connect(5)), Ok(vec![]));
    for key in side.keys.clone() {
        side.connection.reset(key, ErrorCode::NO_ERROR);
    }
    assert!(side.connection.is_finished());
}

#[test]
fn headers_longer_than_a_frame_are_continued() {
    let mut side = client();
    let long = "v".repeat(20_000);
    side.connection.open(&[(":method", "CONNECT"), (":authority", "a:1"), ("x", &long)], false).unwrap();
    let said = side.connection.output().to_vec();
    let kinds: Vec<_> = side.said().into_iter().map(|(kind, flags, ..)| (kind, flags)).collect();
    assert_eq!(kinds, [(Kind::Headers, 0), (Kind::Continuation, END_HEADERS)]);
    let mut server = Side::server(Limits { max_header_list: 30_000, ..Limits::default() });
    server.hear(&connect(1)).unwrap();
    assert_eq!(server.hear(&said), Ok(vec![Seen::Opened(3, false)]));
}
