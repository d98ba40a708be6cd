//! One HTTP/2 connection: its state, its beginning and its end.
//!
//! `receive` reads frames, `headers` makes streams of header blocks, `control` obeys control frames, `send` is what the
//! caller asks for.
//!
//! Invariants:
//! - After a violation of the connection nothing is read any more; GOAWAY with its code is in the output.
//! - Everything in the output is whole frames, and a header block's frames are adjacent.

mod control;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod headers;
mod receive;
mod send;

use std::time::Instant;

use super::{
    Limits, Violation,
    frame::{DEFAULT_WINDOW, ErrorCode, MAX_STREAM, MIN_MAX_FRAME, PREFACE, WriteFrames, setting},
    hpack::{Decoder, Encoder},
    limits::Allowances,
    streams::Streams,
};
use receive::Reading;

/// What a client assumes of a server's MAX_CONCURRENT_STREAMS until it has said something (RFC 9113 §6.5.2 advises
/// against less).
const STREAMS_BEFORE_SETTINGS: u32 = 100;
/// Payload of the PING that separates the two GOAWAYs of a drain.
const DRAIN_PING: [u8; 8] = *b"nm-drain";
/// Replies that wait in the output before the peer is thought not to read.
const MAX_REPLIES: u32 = 2_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Client,
    Server,
}

/// How far our own GOAWAY is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// Announced; streams on their way are still taken.
    Announced,
    /// Streams above the one named are not taken any more.
    Final,
}

/// What the peer announced, or the defaults.
#[derive(Debug)]
struct Peer {
    initial_window: u32,
    max_frame: u32,
    max_streams: u32,
    max_header_list: u32,
}

/// One HTTP/2 connection. See the [module](super) for how it is used.
#[derive(Debug)]
pub(crate) struct Connection {
    role: Role,
    limits: Limits,
    peer: Peer,
    streams: Streams,
    /// The next id this side opens.
    next_id: u32,
    /// The largest id the peer has opened.
    peer_last: u32,
    /// Streams of ours above this id are not processed by the peer.
    peer_takes: u32,
    peer_leaves: bool,
    leaving: Leaving,
    /// Bytes we may send on the connection.
    send_window: i64,
    /// Bytes the peer may send on it.
    receive_window: i64,
    /// Bytes consumed and not yet announced.
    credit: u32,
    /// What a stream begins with until our SETTINGS are acknowledged.
    receive_initial: u32,
    acknowledged: bool,
    settled: bool,
    decoder: Decoder,
    encoder: Encoder,
    reading: Reading,
    /// A header block that is not complete.
    block: Option<headers::Block>,
    allowances: Allowances,
    failed: Option<Violation>,
    output: Vec<u8>,
    /// The output holds headers.
    headers_waiting: bool,
    /// Replies in the output.
    replies: u32,
}

impl Connection {
    /// The side that opens streams. The output holds preface and SETTINGS; streams may be opened at once.
    pub(crate) fn client(limits: Limits, now: Instant) -> Self {
        Self::new(Role::Client, limits, now)
    }

    /// The side that is asked. The output holds SETTINGS.
    pub(crate) fn server(limits: Limits, now: Instant) -> Self {
        Self::new(Role::Server, limits, now)
    }

    fn new(role: Role, limits: Limits, now: Instant) -> Self {
        let limits = limits.normal();
        let mut output = Vec::with_capacity(128);
        let common = [
            (setting::INITIAL_WINDOW_SIZE, limits.stream_window),
            (setting::MAX_FRAME_SIZE, limits.max_frame),
            (setting::MAX_HEADER_LIST_SIZE, limits.max_header_list),
        ];
        match role {
            Role::Client => {
                output.extend_from_slice(PREFACE);
                output.settings(&[&[(setting::ENABLE_PUSH, 0)], &common[..]].concat());
            }
            Role::Server => {
                output.settings(
                    &[&[(setting::MAX_CONCURRENT_STREAMS, limits.max_streams)], &common[..]].concat(),
                );
            }
        }
        if limits.connection_window > DEFAULT_WINDOW {
            output.window_update(0, limits.connection_window - DEFAULT_WINDOW);
        }
        Self {
            role,
            limits,
            peer: Peer {
                initial_window: DEFAULT_WINDOW,
                max_frame: MIN_MAX_FRAME,
                max_streams: STREAMS_BEFORE_SETTINGS,
                max_header_list: u32::MAX,
            },
            streams: Streams::default(),
            next_id: if role == Role::Client { 1 } else { 2 },
            peer_last: 0,
            peer_takes: MAX_STREAM,
            peer_leaves: false,
            leaving: Leaving::No,
            send_window: i64::from(DEFAULT_WINDOW),
            receive_window: i64::from(limits.connection_window),
            credit: 0,
            receive_initial: limits.stream_window.max(DEFAULT_WINDOW),
            acknowledged: false,
            settled: false,
            decoder: Decoder::new(),
            encoder: Encoder::default(),
            reading: Reading::start(role == Role::Server),
            block: None,
            allowances: Allowances::new(limits.max_streams, now),
            failed: None,
            output,
            headers_waiting: false,
            replies: 0,
        }
    }

    /// Whole frames to write before any DATA that [`Connection::data_frame`] has not yet been asked for.
    pub(crate) fn output(&self) -> &[u8] {
        &self.output
    }

    /// Everything in the output is on its way.
    pub(crate) fn clear_output(&mut self) {
        /// What an idle connection may keep of a burst.
        const KEEP: usize = 1 << 10;
        self.output.clear();
        self.output.shrink_to(KEEP);
        self.headers_waiting = false;
        self.replies = 0;
    }

    /// Streams that are open, or hold bytes the caller has not consumed.
    #[cfg(test)]
    pub(crate) fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Streams [`Connection::open`] would still open now.
    pub(crate) fn room(&self) -> u32 {
        if self.takes_no_more() {
            return 0;
        }
        self.peer.max_streams.min(self.limits.max_streams).saturating_sub(self.streams.active())
    }

    /// The peer's first SETTINGS have come.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled
    }

    /// No new streams: one side said GOAWAY, or the connection failed, or its ids are used up.
    pub(crate) fn takes_no_more(&self) -> bool {
        self.peer_leaves || self.leaving != Leaving::No || self.failed.is_some() || self.next_id > MAX_STREAM
    }

    /// Nothing will happen here any more: the connection failed, or goes away and carries no stream.
    pub(crate) fn is_finished(&self) -> bool {
        let left = self.leaving == Leaving::Final || self.peer_leaves;
        self.failed.is_some() || (left && self.streams.len() == 0)
    }

    /// Goes away without losing a stream: a server announces it, takes what was on its way for one round trip, then
    /// names the last stream; a client just opens no more. Streams run on; see [`Connection::is_finished`].
    pub(crate) fn shutdown(&mut self) {
        if self.leaving != Leaving::No || self.failed.is_some() {
            return;
        }
        match self.role {
            Role::Client => {
                self.leaving = Leaving::Final;
                self.output.go_away(0, ErrorCode::NO_ERROR);
            }
            Role::Server => {
                self.leaving = Leaving::Announced;
                self.output.go_away(MAX_STREAM, ErrorCode::NO_ERROR);
                self.output.ping(0, DRAIN_PING);
            }
        }
    }

    /// Goes away now: GOAWAY with a code is the last frame. The caller writes the output and closes.
    pub(crate) fn go_away(&mut self, code: ErrorCode) {
        self.leaving = Leaving::Final;
        self.output.go_away(self.peer_last, code);
    }

    /// Ends the connection for what the peer did.
    fn fail(&mut self, violation: Violation) -> Violation {
        if self.failed.is_none() {
            self.failed = Some(violation);
            self.output.go_away(self.peer_last, violation.code());
        }
        violation
    }

    /// Takes from an allowance, or names the flood.
    fn spend(enough: bool, violation: Violation) -> Result<(), Violation> {
        if enough { Ok(()) } else { Err(violation) }
    }

    /// Counts a reply that is put into the output.
    fn reply(&mut self) -> Result<(), Violation> {
        self.replies += 1;
        Self::spend(self.replies <= MAX_REPLIES, Violation::Backlog)
    }

    fn is_ours(&self, id: u32) -> bool {
        (id % 2 == 1) == (self.role == Role::Client)
    }

    /// Whether a stream of this id was ever opened.
    fn is_idle(&self, id: u32) -> bool {
        if self.is_ours(id) { id >= self.next_id } else { id > self.peer_last }
    }
}

#[cfg(test)]
mod tests;
