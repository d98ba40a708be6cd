//! Peers that make work: each is stopped with its own reason, and memory stays small.

use std::time::Duration;

use super::{
    super::super::{
        ErrorCode, Limits, Violation,
        frame::{ACK, END_HEADERS, Kind},
    },
    fixture::{Side, block, connect, data, frame, reset, settings, window_update},
};

/// Sends `frame(n)` until it is refused; what was borne, and the reason.
fn flood(side: &mut Side, mut frame: impl FnMut(&mut Side, u32) -> Vec<u8>) -> (u32, Violation) {
    for n in 0..2_000_000 {
        let bytes = frame(side, n);
        if let Err(violation) = side.hear(&bytes) {
            assert!(side.connection.output().len() < 1 << 20, "the output is bounded");
            return (n, violation);
        }
    }
    panic!("borne for ever");
}

/// The same with a caller that writes the output at once.
fn flood_read(side: &mut Side, mut frame: impl FnMut(&mut Side, u32) -> Vec<u8>) -> (u32, Violation) {
    flood(side, |side, n| {
        side.connection.clear_output();
        frame(side, n)
    })
}

fn server() -> Side {
    let mut side = Side::server(Limits::default());
    side.hear(&connect(1)).unwrap();
    side.connection.respond(side.keys[0], 200, &[], false).unwrap();
    side.connection.clear_output();
    side
}

#[test]
fn frames_without_content_are_floods_by_their_kind() {
    let ack = frame(Kind::Settings, ACK, 0, &[]);
    for (bytes, reason) in [
        (settings(&[]), Violation::SettingsFlood),
        (ack, Violation::SettingsFlood),
        (frame(Kind::Ping, 0, 0, &[0; 8]), Violation::PingFlood),
        (frame(Kind::Ping, ACK, 0, &[0; 8]), Violation::PingFlood),
        (data(1, b"", false), Violation::EmptyDataFlood),
        (frame(Kind::Data, 8, 1, b"\x03PAD"), Violation::EmptyDataFlood),
        (frame(Kind::Priority, 0, 1, &[0; 5]), Violation::UselessFrameFlood),
        (frame(Kind::Unknown(0x42), 0, 0, b"?"), Violation::UselessFrameFlood),
        (frame(Kind::GoAway, 0, 0, &[0; 8]), Violation::UselessFrameFlood),
    ] {
        let (borne, violation) = flood_read(&mut server(), |_, _| bytes.clone());
        assert_eq!(violation, reason);
        assert!((90..2_000).contains(&borne), "{reason}: {borne}");
    }
}

#[test]
fn an_allowance_comes_back_with_time() {
    let mut side = server();
    for _ in 0..100 {
        for _ in 0..150 {
            side.hear(&frame(Kind::Ping, 0, 0, &[0; 8])).unwrap();
        }
        side.connection.clear_output();
        side.now += Duration::from_secs(1);
    }
}

#[test]
fn pings_among_data_are_no_flood() {
    let mut side = server();
    for _ in 0..10_000 {
        side.hear(&[frame(Kind::Ping, 0, 0, &[0; 8]), data(1, b"x", false)].concat()).unwrap();
        side.connection.consumed(side.keys[0], 1);
        side.connection.clear_output();
    }
}

#[test]
fn replies_nobody_reads_are_bounded() {
    let mut side = server();
    let (_, violation) = flood(&mut side, |side, _| {
        side.now += Duration::from_secs(1);
        frame(Kind::Ping, 0, 0, &[0; 8])
    });
    assert_eq!(violation, Violation::Backlog);
    assert!(side.connection.output().len() < 64 << 10);
}

#[test]
fn streams_opened_and_reset_at_once_are_a_flood() {
    let mut side = server();
    let (borne, violation) = flood_read(&mut side, |_, n| [connect(2 * n + 3), reset(2 * n + 3, 8)].concat());
    assert_eq!(violation, Violation::RapidReset);
    assert!(borne <= 200 + 2 * 256, "{borne}");
}

#[test]
fn resets_we_are_made_to_send_are_a_flood_too() {
    let mut side = server();
    let (borne, violation) =
        flood_read(&mut side, |_, n| [connect(2 * n + 3), window_update(2 * n + 3, 0)].concat());
    assert_eq!(violation, Violation::RapidReset);
    assert!(borne <= 200 + 2 * 256, "{borne}");
    let get = block(&[(":method", "GET")]);
    let (_, violation) = flood_read(&mut server(), |_, n| frame(Kind::Headers, END_HEADERS, 2 * n + 3, &get));
    assert_eq!(violation, Violation::RapidReset);
}

#[test]
fn streams_that_worked_may_be_reset_without_end() {
    let mut side = server();
    for n in 1..5_000 {
        let id = 2 * n + 1;
        side.hear(&connect(id)).unwrap();
        let key = *side.keys.last().unwrap();
        side.connection.respond(key, 200, &[], false).unwrap();
        side.connection.clear_output();
        side.hear(&[data(id, b"x", false), reset(id, 8)].concat()).unwrap();
        side.connection.consumed(key, 1);
    }
    assert_eq!(side.connection.streams(), 1);
}

#[test]
fn resets_do_not_free_what_the_caller_holds() {
    let mut side = server();
    let mut held = 0;
    let (_, violation) = flood_read(&mut side, |side, n| {
        side.connection.respond(*side.keys.last().unwrap(), 200, &[], false).ok();
        side.connection.clear_output();
        held += if n == 0 { 0 } else { 10_000 };
        let id = 2 * n + 3;
        [connect(id), data(id, &[0; 10_000], false), reset(id, 8)].concat()
    });
    assert!(matches!(violation, Violation::WindowExceeded | Violation::RapidReset), "{violation}");
    assert!(held <= side.connection.limits.connection_window, "{held}");
}

#[test]
fn header_blocks_without_end_are_refused() {
    let begin = frame(Kind::Headers, 0, 3, b"");
    let empty = frame(Kind::Continuation, 0, 3, b"");
    let (borne, violation) = flood(&mut server(), |_, n| if n == 0 { begin.clone() } else { empty.clone() });
    assert_eq!(violation, Violation::ContinuationFlood);
    assert!(borne < 64);
    let full = frame(Kind::Continuation, 0, 3, &[0; 16_000]);
    let (_, violation) = flood(&mut server(), |_, n| if n == 0 { begin.clone() } else { full.clone() });
    assert_eq!(violation, Violation::HeaderBlockTooLarge);
}

#[test]
fn a_header_bomb_ends_the_connection() {
    // The table is made large again, which `connect` made empty.
    let mut bomb = vec![0x3f, 0xe1, 0x1f, 0x40, 1, b'a', 0x7f, 0x81, 0x1e];
    bomb.extend(std::iter::repeat_n(b'v', 3_968));
    bomb.extend(std::iter::repeat_n(0xbe, 10_000));
    let (borne, violation) = flood(&mut server(), |_, _| frame(Kind::Headers, END_HEADERS, 3, &bomb));
    assert_eq!((borne, violation), (0, Violation::HeaderBomb));
}

#[test]
fn window_updates_without_data_are_a_flood() {
    let (borne, violation) = flood(&mut server(), |_, n| window_update(n % 2, 1));
    assert_eq!(violation, Violation::WindowUpdateFlood);
    assert!(borne <= 10_000);
    let mut side = server();
    for _ in 0..50_000 {
        side.connection.data_frame(side.keys[0], 1, false).unwrap();
        side.hear(&[window_update(0, 1), window_update(1, 1)].concat()).unwrap();
    }
}

#[test]
fn frames_on_closed_streams_are_a_flood_in_the_end() {
    let mut side = server();
    side.connection.reset(side.keys[0], ErrorCode::CANCEL);
    let (borne, violation) = flood_read(&mut side, |_, _| data(1, b"late", false));
    assert_eq!(violation, Violation::ClosedStreamFlood);
    assert!(borne >= 10_000, "what is on its way is borne: {borne}");
}
