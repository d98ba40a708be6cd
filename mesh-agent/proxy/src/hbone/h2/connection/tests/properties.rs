//! Any bytes: no panic, no loss of window, and the same meaning however they are cut.

use proptest::prelude::*;

use super::{
    super::{
        super::{
            ErrorCode, Limits, Violation,
            frame::{Kind, PREFACE},
        },
        Connection,
        fuzz::{self, check_windows},
    },
    fixture::{Seen, Side, block, connect, frame, ok, settings},
};

/// Frames that are right often enough to get somewhere.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let stream = prop_oneof![8 => 0_u32..8, 1 => any::<u32>().prop_map(|id| id >> 1)];
    let bytes = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..40),
        1 => prop::collection::vec(any::<u8>(), 0..4_000),
    ];
    prop_oneof![
        3 => (1_u32..12).prop_map(connect),
        2 => (1_u32..12).prop_map(ok),
        6 => (any::<u8>(), stream.clone(), bytes.clone())
            .prop_map(|(flags, stream, bytes)| frame(Kind::Data, flags & 9, stream, &bytes)),
        2 => (any::<u8>(), stream.clone(), bytes.clone())
            .prop_map(|(flags, stream, bytes)| frame(Kind::Headers, flags, stream, &bytes)),
        1 => (any::<u8>(), stream.clone())
            .prop_map(|(flags, stream)| frame(Kind::Headers, flags & 0x25, stream, &block(&[("x", "trailer")]))),
        1 => (any::<u8>(), stream.clone(), bytes.clone())
            .prop_map(|(flags, stream, bytes)| frame(Kind::Continuation, flags & 4, stream, &bytes)),
        2 => (stream.clone(), any::<u32>())
            .prop_map(|(stream, value)| frame(Kind::WindowUpdate, 0, stream, &(value >> 8).to_be_bytes())),
        1 => (stream.clone(), 0_u32..16).prop_map(|(stream, code)| frame(Kind::Reset, 0, stream, &code.to_be_bytes())),
        1 => prop::collection::vec((0_u16..8, prop_oneof![0_u32..3, any::<u32>()]), 0..4)
            .prop_map(|list| settings(&list)),
        1 => (0_u8..2, any::<[u8; 8]>()).prop_map(|(flags, bytes)| frame(Kind::Ping, flags, 0, &bytes)),
        1 => (0_u8..2).prop_map(|_| frame(Kind::Settings, 1, 0, &[])),
        1 => (stream.clone(), 0_u32..3)
            .prop_map(|(last, code)| frame(Kind::GoAway, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat())),
        1 => (any::<u8>(), any::<u8>(), stream, bytes)
            .prop_map(|(kind, flags, stream, bytes)| frame(Kind::Unknown(kind), flags, stream, &bytes)),
    ]
}

fn any_frames() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any_frame(), 0..40).prop_map(|frames| frames.concat())
}

fn limits() -> Limits {
    Limits { stream_window: 20_000, connection_window: 100_000, max_streams: 4, ..Limits::default() }
}

/// A side that has begun, with streams of its own if it is a client.
fn side(server: bool) -> Side {
    if server {
        let mut side = Side::new(Connection::server, limits());
        side.hear(&[&PREFACE[..], &settings(&[])].concat()).unwrap();
        return side;
    }
    let mut side = Side::client(limits());
    for _ in 0..3 {
        let key = side.connection.open(&[(":method", "CONNECT"), (":authority", "a:1")], false).unwrap();
        side.keys.push(key);
    }
    side
}

/// Hears bytes in pieces of the given sizes.
fn hear_in_pieces(side: &mut Side, bytes: &[u8], cuts: &[usize]) -> (Vec<Seen>, Option<Violation>) {
    let mut seen = Vec::new();
    let mut rest = bytes;
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let size = cuts.next().map_or(rest.len(), |&cut| cut.clamp(1, rest.len()));
        let (piece, after) = rest.split_at(size);
        if let Err(violation) = side.hear_into(piece, &mut seen) {
            return (seen, Some(violation));
        }
        check_windows(&side.connection);
        rest = after;
    }
    (seen, None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn cuts_change_nothing(server: bool, bytes in any_frames(), cuts in prop::collection::vec(1_usize..60, 1..8)) {
        let mut whole = side(server);
        let mut pieces = side(server);
        let expected = hear_in_pieces(&mut whole, &bytes, &[]);
        let got = hear_in_pieces(&mut pieces, &bytes, &cuts);
        prop_assert_eq!(expected, got);
        prop_assert_eq!(whole.connection.output(), pieces.connection.output());
    }

    #[test]
    fn garbage_never_panics(server: bool, greet: bool, bytes in prop::collection::vec(any::<u8>(), 0..2_000)) {
        let mut side = if greet {
            side(server)
        } else {
            Side::new(if server { Connection::server } else { Connection::client }, limits())
        };
        let _seen = side.hear(&bytes);
    }

    #[test]
    fn the_fuzz_target_holds(choice: u8, bytes in any_frames()) {
        fuzz::run(&[&[choice][..], &bytes].concat());
    }

    #[test]
    fn a_caller_in_any_order_loses_no_window(
        server: bool,
        rounds in prop::collection::vec((any_frames(), any::<u8>(), any::<prop::sample::Index>(), 0_usize..9_000), 1..8),
    ) {
        let mut side = side(server);
        for (bytes, action, place, size) in rounds {
            if side.hear(&bytes).is_err() {
                break;
            }
            if !side.keys.is_empty() {
                let key = side.keys[place.index(side.keys.len())];
                match action % 6 {
                    0 => side.connection.consumed(key, size),
                    1 => side.connection.reset(key, ErrorCode::CANCEL),
                    2 => side.connection.end(key),
                    3 => drop(side.connection.respond(key, 200, &[], size % 2 == 0)),
                    4 => side.connection.shutdown(),
                    _ => {
                        side.connection.clear_output();
                        let _sent = side.connection.data_frame(key, size, false);
                    }
                }
            }
            check_windows(&side.connection);
        }
    }
}
