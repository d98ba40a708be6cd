//! The body of the fuzz target for frames, which the property tests run too.

use std::time::Instant;

use super::{
    super::{
        ErrorCode, Event, Limits,
        frame::{Head, Kind, PREFACE, WriteFrames},
    },
    Connection,
    receive::Reading,
};

/// What the first byte of the input chooses.
struct Choice {
    server: bool,
    /// The peer begins as it should.
    greets: bool,
    /// Bytes of one read.
    read: usize,
}

/// Feeds `input` to a connection in reads of one size, does something with what comes out, and checks the accounts.
pub(crate) fn run(input: &[u8]) {
    let Some((&first, frames)) = input.split_first() else { return };
    let choice =
        Choice { server: first & 1 == 0, greets: first & 2 == 0, read: 1 + usize::from(first >> 2) * 9 };
    let now = Instant::now();
    let limits = Limits {
        stream_window: 5_000,
        connection_window: 70_000,
        max_streams: 4,
        max_header_list: 2_000,
        ..Limits::default()
    };
    let mut connection =
        if choice.server { Connection::server(limits, now) } else { Connection::client(limits, now) };
    let mut wire = Vec::new();
    if choice.greets {
        if choice.server {
            wire.extend_from_slice(PREFACE);
        }
        wire.settings(&[]);
    }
    wire.extend_from_slice(frames);
    for bytes in wire.chunks(choice.read) {
        let mut at = 0;
        if !choice.server && connection.room() > 1 {
            let _opened =
                connection.open(&[(":method", "CONNECT"), (":authority", "a:1")], bytes.len() % 7 == 0);
        }
        loop {
            match connection.receive(now, bytes, &mut at) {
                Ok(Some(event)) => answer(&mut connection, event),
                Ok(None) => break,
                Err(_) => return check_output(&connection),
            }
            check_windows(&connection);
        }
        assert_eq!(at, bytes.len(), "everything is read");
        check_output(&connection);
        connection.clear_output();
    }
}

/// A caller that does a little of everything, depending on what it sees.
fn answer(connection: &mut Connection, event: Event) {
    match event {
        Event::Opened { stream, headers, .. } => {
            match headers.iter().map(|(_, value)| value.len()).sum::<usize>() % 4 {
                0 => connection.reset(stream, ErrorCode::CANCEL),
                1 => {}
                rest => drop(connection.respond(stream, 200, &[("a", "b")], rest == 2)),
            }
        }
        Event::Data { stream, range, end } => {
            if range.len() % 5 != 0 {
                connection.consumed(stream, range.len());
            }
            if end {
                connection.end(stream);
            }
            connection.clear_output();
            let _sent = connection.data_frame(stream, range.len(), end);
        }
        Event::Ended { stream } => connection.end(stream),
        Event::Response { stream, status, .. } if status >= 400 => {
            connection.reset(stream, ErrorCode::NO_ERROR)
        }
        Event::GoAway { .. } => connection.shutdown(),
        _ => {}
    }
}

/// Whatever was received is either open to the peer, held by a stream, credited, or still within its frame.
pub(super) fn check_windows(connection: &Connection) {
    let in_frame = match connection.reading {
        Reading::Data(data) | Reading::PadLength(data) => data.undelivered(),
        _ => 0,
    };
    let held = connection.streams.values().map(|stream| i64::from(stream.unconsumed)).sum::<i64>();
    let total = connection.receive_window + i64::from(connection.credit) + held + i64::from(in_frame);
    assert_eq!(total, i64::from(connection.limits.connection_window));
    assert!(connection.receive_window >= 0);
    assert!(connection.streams.len() <= 2 * connection.limits.max_streams as usize);
}

/// The output is whole frames, and not many.
fn check_output(connection: &Connection) {
    let mut rest = connection.output().strip_prefix(PREFACE).unwrap_or(connection.output());
    assert!(rest.len() < 1 << 20);
    while let Some((head, after)) = rest.split_first_chunk() {
        let head = Head::decode(*head);
        assert!(!matches!(head.kind, Kind::Unknown(_) | Kind::PushPromise | Kind::Priority));
        let whole = after.split_at_checked(head.length as usize);
        assert!(whole.is_some(), "whole frames only");
        rest = whole.map_or(&[][..], |(_, rest)| rest);
    }
    assert!(rest.is_empty());
}
