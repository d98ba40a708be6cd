//! Reads frames out of whatever pieces the bytes come in, and delivers DATA without gathering it.
//!
//! Invariants:
//! - Only frames other than DATA are gathered, at most [`GATHER`] bytes at a time beside a header block.
//! - Every byte of DATA ends up consumed by the caller, or credited to the connection here.

use std::{ops::Range, time::Instant};

use super::{
    super::{
        Event, StreamKey, Violation,
        frame::{END_STREAM, HEADER, Head, Kind, PADDED, PREFACE},
        streams::{Half, Stream},
    },
    Connection, Role,
};

/// The longest payload of a control frame that is gathered; what may be longer is skipped or is part of a header block.
const GATHER: u32 = 16 << 10;

/// Where in the frames the reader is.
#[derive(Debug)]
pub(super) enum Reading {
    /// Within a client's preface, of which `seen` bytes have come.
    Preface { seen: usize },
    /// Within a frame header.
    Header { bytes: [u8; HEADER], seen: usize },
    /// Within DATA, before its pad length.
    PadLength(Data),
    /// Within DATA.
    Data(Data),
    /// Within any other frame, whose payload is gathered.
    Payload { head: Head, bytes: Vec<u8> },
    /// Within bytes that mean nothing.
    Skip { left: u32 },
}

/// A DATA frame that is being read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Data {
    /// `None` if nobody wants it.
    stream: Option<StreamKey>,
    /// Bytes to come that are not padding.
    left: u32,
    /// Padding to come.
    padding: u32,
    end: bool,
}

#[cfg(any(test, fuzzing))]
impl Data {
    /// Bytes of the frame that are neither delivered nor credited; padding is credited once its length is known.
    pub(super) const fn undelivered(self) -> u32 {
        self.left
    }
}

impl Reading {
    pub(super) const fn start(preface: bool) -> Self {
        if preface { Self::Preface { seen: 0 } } else { Self::frame() }
    }

    const fn frame() -> Self {
        Self::Header { bytes: [0; HEADER], seen: 0 }
    }
}

/// The next at most `most` bytes.
fn take(bytes: &[u8], at: &mut usize, most: usize) -> Range<usize> {
    let start = (*at).min(bytes.len());
    let end = bytes.len().min(start.saturating_add(most));
    *at = end;
    start..end
}

impl Connection {
    /// Reads on at `bytes[*at]` and moves `at` behind what it has read. `None` when all of `bytes` is read.
    ///
    /// Call it until it answers `None`, then write the output. `now` is looked at only when an allowance is used up.
    ///
    /// # Errors
    /// The peer broke the protocol or a limit; the output ends with GOAWAY, and the connection is over.
    pub(crate) fn receive(
        &mut self,
        now: Instant,
        bytes: &[u8],
        at: &mut usize,
    ) -> Result<Option<Event>, Violation> {
        if let Some(violation) = self.failed {
            return Err(violation);
        }
        match self.advance(now, bytes, at) {
            Ok(event) => Ok(event),
            Err(violation) => Err(self.fail(violation)),
        }
    }

    fn advance(&mut self, now: Instant, bytes: &[u8], at: &mut usize) -> Result<Option<Event>, Violation> {
        if let Some(event) = self.next_unprocessed() {
            return Ok(Some(event));
        }
        loop {
            let event = match &mut self.reading {
                Reading::Header { bytes: gathered, seen } => {
                    // The usual case first: the whole header is there.
                    let head = if *seen == 0
                        && let Some(whole) = bytes.get(*at..).and_then(<[u8]>::first_chunk)
                    {
                        *at += HEADER;
                        Head::decode(*whole)
                    } else {
                        let part = take(bytes, at, HEADER - *seen);
                        gathered[*seen..*seen + part.len()].copy_from_slice(&bytes[part.clone()]);
                        *seen += part.len();
                        if *seen < HEADER {
                            return Ok(None);
                        }
                        Head::decode(*gathered)
                    };
                    self.reading = Reading::frame();
                    self.begin(head, now)?
                }
                Reading::Data(data) => {
                    if data.left == 0 && data.padding == 0 {
                        self.reading = Reading::frame();
                        continue;
                    }
                    if *at >= bytes.len() {
                        return Ok(None);
                    }
                    if data.left == 0 {
                        let part = take(bytes, at, data.padding as usize);
                        data.padding -= part.len() as u32;
                        continue;
                    }
                    let part = take(bytes, at, data.left as usize);
                    data.left -= part.len() as u32;
                    let data = *data;
                    self.deliver(data, part)
                }
                Reading::PadLength(data) => {
                    let part = take(bytes, at, 1);
                    let Some(&padding) = bytes.get(part.start) else { return Ok(None) };
                    let padding = u32::from(padding);
                    // The pad length itself is the byte that `left` still counts.
                    let left = (data.left - 1).checked_sub(padding).ok_or(Violation::BadPadding)?;
                    let data = Data { left, padding, ..*data };
                    self.reading = Reading::Data(data);
                    self.credit_padding(data.stream, padding + 1);
                    self.begin_data(data, now)?
                }
                Reading::Payload { head, bytes: gathered } => {
                    let head = *head;
                    let missing = head.length as usize - gathered.len();
                    let part = take(bytes, at, missing);
                    if gathered.is_empty() && part.len() == missing {
                        self.reading = Reading::frame();
                        self.obey(head, &bytes[part], now)?
                    } else {
                        gathered.extend_from_slice(&bytes[part]);
                        if gathered.len() < head.length as usize {
                            return Ok(None);
                        }
                        let payload = std::mem::take(gathered);
                        self.reading = Reading::frame();
                        self.obey(head, &payload, now)?
                    }
                }
                Reading::Skip { left } => {
                    let part = take(bytes, at, *left as usize);
                    *left -= part.len() as u32;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.reading = Reading::frame();
                    None
                }
                Reading::Preface { seen } => {
                    let part = take(bytes, at, PREFACE.len() - *seen);
                    let expected = &PREFACE[*seen..*seen + part.len()];
                    *seen += part.len();
                    if &bytes[part] != expected {
                        return Err(Violation::BadPreface);
                    }
                    if *seen < PREFACE.len() {
                        return Ok(None);
                    }
                    self.reading = Reading::frame();
                    None
                }
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    /// Judges a frame by its header, and sets how its payload is read.
    fn begin(&mut self, head: Head, now: Instant) -> Result<Option<Event>, Violation> {
        if head.kind == Kind::Data && self.settled && !self.in_header_block() {
            return self.begin_data_frame(head, now);
        }
        self.check_order(head)?;
        if head.length > self.limits.max_frame {
            return Err(Violation::FrameSize);
        }
        let length_fits = match head.kind {
            Kind::Priority => head.length == 5,
            Kind::Reset | Kind::WindowUpdate => head.length == 4,
            Kind::Settings => head.length.is_multiple_of(6) && head.length <= GATHER,
            Kind::Ping => head.length == 8,
            Kind::GoAway => head.length >= 8,
            Kind::Headers | Kind::Continuation | Kind::Data | Kind::PushPromise | Kind::Unknown(_) => true,
        };
        if !length_fits {
            return Err(Violation::FrameSize);
        }
        match head.kind {
            Kind::Data | Kind::PushPromise => return Err(Violation::UnexpectedFrame),
            Kind::Priority | Kind::Unknown(_) => {
                if head.kind == Kind::Priority && head.stream == 0 {
                    return Err(Violation::BadStreamId);
                }
                Self::spend(self.allowances.control.take(1, now), Violation::UselessFrameFlood)?;
                self.reading = Reading::Skip { left: head.length };
            }
            Kind::Headers | Kind::Continuation => {
                self.check_block_size(head)?;
                self.reading = Reading::Payload { head, bytes: Vec::new() };
            }
            Kind::GoAway if head.length > GATHER => return Err(Violation::FrameSize),
            Kind::Reset | Kind::Settings | Kind::Ping | Kind::GoAway | Kind::WindowUpdate => {
                self.reading = Reading::Payload { head, bytes: Vec::new() };
            }
        }
        Ok(None)
    }

    fn begin_data_frame(&mut self, head: Head, now: Instant) -> Result<Option<Event>, Violation> {
        if head.stream == 0 || self.is_idle(head.stream) {
            return Err(Violation::BadStreamId);
        }
        if head.length > self.limits.max_frame {
            return Err(Violation::FrameSize);
        }
        let length = i64::from(head.length);
        if length > self.receive_window {
            return Err(Violation::WindowExceeded);
        }
        self.receive_window -= length;
        let stream = self.streams.find(head.stream);
        let mut wanted = None;
        if let Some(key) = stream
            && let Some(stream) = self.streams.get_mut(key)
        {
            match stream.remote {
                Half::Open => {
                    if length > stream.receive_window {
                        return Err(Violation::WindowExceeded);
                    }
                    stream.receive_window -= length;
                    wanted = Some(key);
                }
                Half::Ended => return Err(Violation::StreamClosed),
                Half::Waiting => {}
            }
        } else {
            Self::spend(self.allowances.closed.take(1, now), Violation::ClosedStreamFlood)?;
        }
        let data = Data { stream: wanted, left: head.length, padding: 0, end: head.has(END_STREAM) };
        // A response must come before its body.
        let early = stream.filter(|_| wanted.is_none());
        if head.has(PADDED) {
            if head.length == 0 {
                return Err(Violation::FrameSize);
            }
            self.reading = Reading::PadLength(data);
        } else {
            self.reading = Reading::Data(data);
            if early.is_none() {
                return self.begin_data(data, now);
            }
        }
        early.map_or(Ok(None), |key| self.refuse_stream(key, Violation::MalformedHeaders, now).map(Some))
    }

    /// What the length of the content of a DATA frame says, once it is known.
    fn begin_data(&mut self, data: Data, now: Instant) -> Result<Option<Event>, Violation> {
        if data.left > 0 {
            self.allowances.control.give(1);
            return Ok(None);
        }
        if !data.end {
            Self::spend(self.allowances.control.take(1, now), Violation::EmptyDataFlood)?;
            return Ok(None);
        }
        let open = |stream: &Stream| stream.remote == Half::Open;
        let living = data.stream.filter(|&key| self.streams.get(key).is_some_and(open));
        Ok(living.map(|stream| {
            self.streams.end(stream, |stream| &mut stream.remote);
            Event::Ended { stream }
        }))
    }

    /// Hands a piece of a DATA frame to the caller, or credits it if the stream is gone.
    fn deliver(&mut self, data: Data, range: Range<usize>) -> Option<Event> {
        let size = range.len() as u32;
        let living = data.stream.and_then(|key| Some((key, self.streams.get_mut(key)?)));
        let Some((key, stream)) = living.filter(|(_, stream)| stream.remote == Half::Open) else {
            self.credit_connection(size);
            return None;
        };
        stream.unconsumed += size;
        let end = data.end && data.left == 0;
        if end {
            self.streams.end(key, |stream| &mut stream.remote);
        }
        Some(Event::Data { stream: key, range, end })
    }

    /// Padding counts against the windows and is consumed as it comes.
    fn credit_padding(&mut self, stream: Option<StreamKey>, size: u32) {
        self.credit_connection(size);
        if let Some(key) = stream {
            self.credit_stream(key, size);
        }
    }

    /// Order of frames: SETTINGS first, and nothing within a header block.
    fn check_order(&self, head: Head) -> Result<(), Violation> {
        if !self.settled && (head.kind != Kind::Settings || head.flags & super::super::frame::ACK != 0) {
            return Err(Violation::NoSettings);
        }
        if self.in_header_block() != (head.kind == Kind::Continuation) {
            return Err(Violation::UnexpectedFrame);
        }
        let of_connection = matches!(head.kind, Kind::Settings | Kind::Ping | Kind::GoAway);
        let of_stream = matches!(head.kind, Kind::Data | Kind::Headers | Kind::Reset | Kind::Continuation);
        if (of_connection && head.stream != 0) || (of_stream && head.stream == 0) {
            return Err(Violation::BadStreamId);
        }
        Ok(())
    }

    /// A stream that the peer's GOAWAY left out, if there is one.
    fn next_unprocessed(&mut self) -> Option<Event> {
        if !self.peer_leaves || self.role == Role::Server {
            return None;
        }
        let stream = self.streams.newest().filter(|key| key.id() > self.peer_takes)?;
        self.streams.reset(stream);
        Some(Event::Reset { stream, cause: super::super::Cause::Unprocessed })
    }
}
