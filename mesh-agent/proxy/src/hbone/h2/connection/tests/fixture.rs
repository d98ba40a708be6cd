//! Hand-made frames, and a connection that writes down what it sees.

use std::time::Instant;

use super::super::{
    super::{
        Cause, Event, Limits, StreamKey, Violation,
        frame::{END_HEADERS, END_STREAM, Head, Kind, PREFACE},
        hpack::Encoder,
    },
    Connection,
};

/// An event without what differs between ways to cut the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Opened(u32, bool),
    Response(u32, u16, bool),
    /// Adjacent pieces of a stream are one.
    Data(u32, Vec<u8>, bool),
    Ended(u32),
    Reset(u32, Cause),
    Refused(Violation),
    Window(Option<u32>),
    Settings,
    GoAway(u32, u32),
}

/// A connection under test.
pub(super) struct Side {
    pub(super) connection: Connection,
    pub(super) now: Instant,
    pub(super) keys: Vec<StreamKey>,
}

impl Side {
    pub(super) fn new(connection: impl FnOnce(Limits, Instant) -> Connection, limits: Limits) -> Self {
        let now = Instant::now();
        Self { connection: connection(limits, now), now, keys: Vec::new() }
    }

    /// A server that has heard preface and SETTINGS; its output is empty.
    pub(super) fn server(limits: Limits) -> Self {
        let mut side = Self::new(Connection::server, limits);
        assert_eq!(side.hear(PREFACE), Ok(vec![]));
        assert_eq!(side.hear(&settings(&[])), Ok(vec![Seen::Settings]));
        side.connection.clear_output();
        side
    }

    /// A client that has heard SETTINGS and opened stream 1; its output is empty.
    pub(super) fn client(limits: Limits) -> Self {
        let mut side = Self::new(Connection::client, limits);
        assert_eq!(side.hear(&settings(&[])), Ok(vec![Seen::Settings]));
        let key = side.connection.open(&[(":method", "CONNECT"), (":authority", "a:1")], false).unwrap();
        side.keys.push(key);
        side.connection.clear_output();
        side
    }

    /// Everything that the bytes mean, in one piece.
    pub(super) fn hear(&mut self, bytes: &[u8]) -> Result<Vec<Seen>, Violation> {
        let mut seen = Vec::new();
        self.hear_into(bytes, &mut seen)?;
        Ok(seen)
    }

    pub(super) fn hear_into(&mut self, bytes: &[u8], seen: &mut Vec<Seen>) -> Result<(), Violation> {
        let mut at = 0;
        while let Some(event) = self.connection.receive(self.now, bytes, &mut at)? {
            self.note(event, bytes, seen);
        }
        assert_eq!(at, bytes.len(), "all is read");
        Ok(())
    }

    fn note(&mut self, event: Event, bytes: &[u8], seen: &mut Vec<Seen>) {
        let entry = match event {
            Event::Opened { stream, end, .. } => {
                self.keys.push(stream);
                Seen::Opened(stream.id(), end)
            }
            Event::Response { stream, status, end } => Seen::Response(stream.id(), status, end),
            Event::Data { stream, range, end } => {
                assert!(!range.is_empty());
                let bytes = &bytes[range];
                if let Some(Seen::Data(id, data, ended)) = seen.last_mut()
                    && *id == stream.id()
                    && !*ended
                {
                    data.extend_from_slice(bytes);
                    *ended = end;
                    return;
                }
                Seen::Data(stream.id(), bytes.to_vec(), end)
            }
            Event::Ended { stream } => Seen::Ended(stream.id()),
            Event::Reset { stream, cause } => Seen::Reset(stream.id(), cause),
            Event::Refused { violation } => Seen::Refused(violation),
            Event::WindowOpened { stream } => Seen::Window(stream.map(StreamKey::id)),
            Event::SettingsChanged => Seen::Settings,
            Event::GoAway { last, code } => Seen::GoAway(last, code.0),
        };
        seen.push(entry);
    }

    /// The frames in the output, which is cleared.
    pub(super) fn said(&mut self) -> Vec<(Kind, u8, u32, Vec<u8>)> {
        let frames = parse(self.connection.output());
        self.connection.clear_output();
        frames
    }
}

/// Takes whole frames apart.
pub(super) fn parse(mut bytes: &[u8]) -> Vec<(Kind, u8, u32, Vec<u8>)> {
    let mut frames = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk() {
        let head = Head::decode(*head);
        let (payload, rest) = rest.split_at(head.length as usize);
        frames.push((head.kind, head.flags, head.stream, payload.to_vec()));
        bytes = rest;
    }
    assert!(bytes.is_empty(), "whole frames only");
    frames
}

pub(super) fn frame(kind: Kind, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [&Head { length, kind, flags, stream }.encode()[..], payload].concat()
}

pub(super) fn settings(list: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> =
        list.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
    frame(Kind::Settings, 0, 0, &payload)
}

pub(super) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    Encoder::default()
        .encode(fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())), &mut block);
    block
}

/// HEADERS that open a tunnel.
pub(super) fn connect(stream: u32) -> Vec<u8> {
    let block = block(&[(":method", "CONNECT"), (":authority", "10.0.0.1:80")]);
    frame(Kind::Headers, END_HEADERS, stream, &block)
}

/// HEADERS of a 200.
pub(super) fn ok(stream: u32) -> Vec<u8> {
    frame(Kind::Headers, END_HEADERS, stream, &block(&[(":status", "200")]))
}

pub(super) fn data(stream: u32, payload: &[u8], end: bool) -> Vec<u8> {
    frame(Kind::Data, if end { END_STREAM } else { 0 }, stream, payload)
}

pub(super) fn window_update(stream: u32, increment: u32) -> Vec<u8> {
    frame(Kind::WindowUpdate, 0, stream, &increment.to_be_bytes())
}

pub(super) fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(Kind::Reset, 0, stream, &code.to_be_bytes())
}

pub(super) fn go_away(last: u32, code: u32) -> Vec<u8> {
    frame(Kind::GoAway, 0, 0, &[last.to_be_bytes(), code.to_be_bytes()].concat())
}
