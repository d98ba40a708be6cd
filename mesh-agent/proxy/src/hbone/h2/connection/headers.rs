//! Gathers header blocks and makes streams, responses and trailers of them.
//!
//! Invariants:
//! - Every block is decoded, also of streams that are refused: the peer's table goes on.
//! - A block has at most [`MAX_FRAMES`] frames and four times the bytes of the list limit.

use std::time::Instant;

use super::{
    super::{
        Event, Headers, StreamKey, Violation,
        frame::{END_HEADERS, END_STREAM, Head, Kind, PADDED, PRIORITY, WriteFrames},
        headers::Shape,
        streams::{Half, Stream},
    },
    Connection, Leaving, Role,
};

/// Frames of one header block.
const MAX_FRAMES: u32 = 32;
/// A block may be this many times as long as a list may be.
const BLOCK: u32 = 4;

/// A header block of which not all frames have come.
#[derive(Debug)]
pub(super) struct Block {
    stream: u32,
    end: bool,
    frames: u32,
    bytes: Vec<u8>,
}

impl Connection {
    pub(super) fn in_header_block(&self) -> bool {
        self.block.is_some()
    }

    /// Whether the block may grow by a frame.
    pub(super) fn check_block_size(&self, head: Head) -> Result<(), Violation> {
        let gathered = self.block.as_ref().map_or(0, |block| block.bytes.len());
        if gathered + head.length as usize > (self.limits.max_header_list * BLOCK) as usize {
            return Err(Violation::HeaderBlockTooLarge);
        }
        Ok(())
    }

    /// HEADERS or CONTINUATION.
    pub(super) fn obey_headers(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        if head.kind == Kind::Continuation {
            return self.obey_continuation(head, payload, now);
        }
        if self.is_ours(head.stream) == (self.role == Role::Server)
            || (self.role == Role::Client && self.is_idle(head.stream))
        {
            // To a server only a client's ids may come, to a client only its own.
            return Err(Violation::BadStreamId);
        }
        let fragment = strip(head, payload)?;
        let end = head.has(END_STREAM);
        if head.has(END_HEADERS) {
            return self.obey_block(head.stream, end, fragment, now);
        }
        self.block = Some(Block { stream: head.stream, end, frames: 1, bytes: fragment.to_vec() });
        Ok(None)
    }

    fn obey_continuation(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        let Some(mut block) = self.block.take() else { return Err(Violation::UnexpectedFrame) };
        if block.stream != head.stream {
            return Err(Violation::UnexpectedFrame);
        }
        block.frames += 1;
        if block.frames > MAX_FRAMES {
            return Err(Violation::ContinuationFlood);
        }
        block.bytes.extend_from_slice(payload);
        if head.has(END_HEADERS) {
            return self.obey_block(block.stream, block.end, &block.bytes, now);
        }
        self.block = Some(block);
        Ok(None)
    }

    fn obey_block(
        &mut self,
        id: u32,
        end: bool,
        block: &[u8],
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        let list = self.decoder.decode(block, self.limits.max_header_list as usize)?;
        match self.streams.find(id) {
            Some(key) => self.obey_more_headers(key, end, list, now),
            None if self.role == Role::Server && self.is_idle(id) => self.obey_request(id, end, list, now),
            None => {
                // Trailers that crossed our reset are usual; a request on an id of the past never is.
                if list.is_some_and(|headers| headers.shape() == Ok(Shape::Request)) {
                    return Err(Violation::BadStreamId);
                }
                Self::spend(self.allowances.closed.take(1, now), Violation::ClosedStreamFlood)?;
                Ok(None)
            }
        }
    }

    fn obey_request(
        &mut self,
        id: u32,
        end: bool,
        list: Option<Headers>,
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        if self.leaving == Leaving::Final {
            // Above the last stream we named: the client knows that nothing was done.
            Self::spend(self.allowances.closed.take(1, now), Violation::ClosedStreamFlood)?;
            return Ok(None);
        }
        self.peer_last = id;
        let refused = |violation| Ok(Some(Event::Refused { violation }));
        let Some(headers) = list else {
            self.write_headers(id, true, [(&b":status"[..], &b"431"[..])].into_iter());
            self.refuse_id(id, Violation::HeaderListTooLarge, now)?;
            return refused(Violation::HeaderListTooLarge);
        };
        if headers.shape() != Ok(Shape::Request) {
            self.refuse_id(id, Violation::MalformedHeaders, now)?;
            return refused(Violation::MalformedHeaders);
        }
        let max = self.limits.max_streams;
        if self.streams.active() >= max || self.streams.len() >= 2 * max as usize {
            self.refuse_id(id, Violation::TooManyStreams, now)?;
            return refused(Violation::TooManyStreams);
        }
        let remote = if end { Half::Ended } else { Half::Open };
        let stream = self.streams.insert(id, self.new_stream(Half::Waiting, remote));
        Ok(Some(Event::Opened { stream, headers: Box::new(headers), end }))
    }

    /// A response or trailers.
    fn obey_more_headers(
        &mut self,
        key: StreamKey,
        end: bool,
        list: Option<Headers>,
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        let Some(remote) = self.streams.get(key).map(|stream| stream.remote) else { return Ok(None) };
        if remote == Half::Ended {
            return Err(Violation::StreamClosed);
        }
        let Some(headers) = list else {
            return self.refuse_stream(key, Violation::HeaderListTooLarge, now).map(Some);
        };
        match (remote, headers.shape(), end) {
            (Half::Open, Ok(Shape::Trailers), true) => {
                self.streams.end(key, |stream| &mut stream.remote);
                Ok(Some(Event::Ended { stream: key }))
            }
            (Half::Waiting, Ok(Shape::Response(status)), false) if status < 200 && status != 101 => {
                Self::spend(self.allowances.control.take(1, now), Violation::UselessFrameFlood)?;
                Ok(None)
            }
            (Half::Waiting, Ok(Shape::Response(status @ 200..)), end) => {
                if let Some(stream) = self.streams.get_mut(key) {
                    stream.remote = Half::Open;
                }
                if end {
                    self.streams.end(key, |stream| &mut stream.remote);
                }
                Ok(Some(Event::Response { stream: key, status, end }))
            }
            _ => self.refuse_stream(key, Violation::MalformedHeaders, now).map(Some),
        }
    }

    pub(super) fn new_stream(&self, local: Half, remote: Half) -> Stream {
        Stream {
            local,
            remote,
            send_window: i64::from(self.peer.initial_window),
            receive_window: i64::from(self.receive_initial),
            unconsumed: 0,
            credit: 0,
        }
    }

    /// Writes a header list as HEADERS and as many CONTINUATIONs as the peer's frame size makes of it.
    pub(super) fn write_headers<'a>(
        &mut self,
        id: u32,
        end: bool,
        fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
    ) {
        let mut block = Vec::with_capacity(256);
        self.encoder.encode(fields, &mut block);
        let mut pieces = block.chunks(self.peer.max_frame as usize).peekable();
        let mut kind = Kind::Headers;
        let mut flags = if end { END_STREAM } else { 0 };
        while let Some(piece) = pieces.next() {
            if pieces.peek().is_none() {
                flags |= END_HEADERS;
            }
            self.output.frame(kind, flags, id, piece);
            kind = Kind::Continuation;
            flags = 0;
        }
        self.headers_waiting = true;
    }
}

/// The fragment of a header block within HEADERS: without padding and priority.
fn strip(head: Head, payload: &[u8]) -> Result<&[u8], Violation> {
    let mut rest = payload;
    let mut padding = 0;
    if head.has(PADDED) {
        let (&length, after) = rest.split_first().ok_or(Violation::FrameSize)?;
        padding = usize::from(length);
        rest = after;
    }
    if head.has(PRIORITY) {
        rest = rest.get(5..).ok_or(Violation::FrameSize)?;
    }
    let end = rest.len().checked_sub(padding).ok_or(Violation::BadPadding)?;
    Ok(&rest[..end])
}
