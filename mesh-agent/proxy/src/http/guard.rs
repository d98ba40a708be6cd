//! Watches the framing of HTTP/1 requests before the HTTP library sees them, and refuses what two parsers could read differently.
//!
//! The library is lenient where the RFC lets it be (it drops a `content-length` beside `transfer-encoding`, say); what
//! it understood is written anew for the server, so nothing of this could be smuggled on. Refusing it all the same keeps logs
//! and policies of both sides in agreement, and says by name what was tried.
//!
//! Invariants:
//! - A head is handed on only when it is complete and passed; so the library parses each head once, however slowly it drips.
//! - Bytes pass as they came, but for request lines that the library would refuse and others take ([`target`]); such a head is checked as
//!   it is handed on.
//! - At most [`HEAD_MAX`] bytes are held (three times as many of a read with such lines), and [`HELD_MAX`] behind a request that may switch protocols.
//! - Framing is followed to the byte; where it cannot be, the connection ends.

mod target;

use crate::metrics::http::Refusal;

/// Longest head, in bytes: Envoy's default of 60 KiB.
pub(crate) const HEAD_MAX: usize = 60 << 10;
/// Most headers of a request: Envoy's default.
pub(crate) const HEADERS_MAX: usize = 100;
/// Longest line with a chunk's size and extensions.
const CHUNK_LINE_MAX: usize = 4 << 10;
/// Largest chunk: none of an honest client comes near 1 TiB.
const CHUNK_MAX: u64 = 1 << 40;
/// Longest trailer section.
const TRAILERS_MAX: usize = 16 << 10;
/// Bytes that are taken behind a request that may switch protocols.
const HELD_MAX: usize = 64 << 10;
/// Empty lines before a request line, which clients of old send after a body.
const EMPTY_LINES_MAX: u8 = 2;

/// Where in the stream of requests the next byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In a head, so many empty lines before it.
    Head { empty_lines: u8 },
    /// In a body of which so much is left.
    Length(u64),
    /// In a line with the size of a chunk.
    ChunkSize,
    /// In a chunk of which so much is left, its line end included.
    Chunk(u64),
    /// In the trailer section, so far in.
    Trailers(usize),
    /// Behind a request that may switch protocols.
    Undecided,
    /// In another protocol.
    Opaque,
}

/// Follows the framing of one connection's requests.
#[derive(Debug)]
pub(crate) struct Guard {
    place: Place,
    /// Bytes not yet handed on.
    held: Vec<u8>,
    /// So many of them passed.
    passed: usize,
    /// The request whose body runs may switch protocols.
    may_switch: bool,
    /// Heads that passed.
    requests: u32,
    /// The line that takes the place of so many bytes behind those that passed.
    rewritten: Option<(usize, Vec<u8>)>,
    refusal: Option<Refusal>,
}

impl Guard {
    /// For a connection that begins with a request.
    pub(crate) fn new() -> Self {
        Self {
            place: Place::Head { empty_lines: 0 },
            held: Vec::new(),
            passed: 0,
            may_switch: false,
            requests: 0,
            rewritten: None,
            refusal: None,
        }
    }

    /// For a connection of another protocol: everything passes.
    pub(crate) fn off() -> Self {
        Self { place: Place::Opaque, ..Self::new() }
    }

    /// Why no more bytes pass, if that is so.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        self.refusal
    }

    /// Whether what was refused is part of the request that is being answered, rather than of one after it.
    pub(crate) fn refused_in_body(&self) -> bool {
        self.refusal.is_some() && !matches!(self.place, Place::Head { .. })
    }

    /// How many requests' heads have passed, modulo 2³².
    pub(crate) fn requests(&self) -> u32 {
        self.requests
    }

    /// Whether a request's body has arrived in part, or not at all.
    pub(crate) fn in_body(&self) -> bool {
        matches!(self.place, Place::Length(_) | Place::ChunkSize | Place::Chunk(_) | Place::Trailers(_))
    }

    /// Whether the beginning of a request has arrived, but not all of its head.
    pub(crate) fn in_head(&self) -> bool {
        matches!(self.place, Place::Head { .. }) && self.held.len() > self.passed
    }

    /// Whether a request must be answered before more can pass.
    pub(crate) fn is_undecided(&self) -> bool {
        self.place == Place::Undecided
    }

    /// Whether more bytes may be read from the client.
    pub(crate) fn has_room(&self) -> bool {
        self.refusal.is_none() && (self.place != Place::Undecided || self.held.len() < HELD_MAX)
    }

    /// Takes bytes of the client. True: all of them pass, nothing is held, the caller hands them on itself. False: they
    /// are held, as far as they were not refused.
    pub(crate) fn take(&mut self, bytes: &[u8]) -> bool {
        if self.held.is_empty() {
            let passed = self.follow(bytes);
            if passed == bytes.len() && self.refusal.is_none() {
                return true;
            }
            self.held.extend_from_slice(bytes);
            self.passed = passed;
            if self.rewritten.is_some() {
                self.follow_held();
            }
        } else {
            // A head that drips is read again for each piece; what ends no line cannot complete it.
            let is_same = self.in_head()
                && self.held.len() - self.passed + bytes.len() <= HEAD_MAX
                && self.held.last() != Some(&b'\r')
                && !bytes.iter().any(|byte| ends_line(*byte));
            self.held.extend_from_slice(bytes);
            if !is_same {
                self.follow_held();
            }
        }
        false
    }

    /// The request behind which protocols might have been switched was answered like any other.
    pub(crate) fn decided(&mut self) {
        if self.place == Place::Undecided {
            self.place = Place::Head { empty_lines: 0 };
            self.follow_held();
        }
    }

    /// Bytes that are held and have passed.
    pub(crate) fn ready(&self) -> &[u8] {
        &self.held[..self.passed]
    }

    /// So many of them were handed on.
    pub(crate) fn consume(&mut self, count: usize) {
        self.held.drain(..count);
        self.passed -= count;
        if self.held.is_empty() && self.held.capacity() > 4 << 10 {
            self.held = Vec::new();
        }
    }

    /// Protocols were switched: everything passes from here on.
    pub(crate) fn switched(&mut self) {
        self.place = Place::Opaque;
        self.passed = self.held.len();
    }

    /// Whether this is no HTTP/1 that is followed.
    pub(crate) fn is_opaque(&self) -> bool {
        self.place == Place::Opaque
    }

    fn follow_held(&mut self) {
        let mut held = std::mem::take(&mut self.held);
        loop {
            if let Some((len, line)) = self.rewritten.take() {
                held.splice(self.passed..self.passed + len, line);
            }
            self.passed += self.follow(&held[self.passed..]);
            if self.rewritten.is_none() {
                break;
            }
        }
        self.held = held;
    }

    /// Follows the framing through `bytes`, and says how many of them pass.
    fn follow(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() && self.refusal.is_none() {
            match self.step(&bytes[at..]) {
                Ok(0) => break,
                Ok(taken) => at += taken,
                Err(refusal) => self.refusal = Some(refusal),
            }
        }
        at
    }

    /// Takes one element of the stream; 0 when it is not complete.
    fn step(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        match self.place {
            Place::Opaque => Ok(bytes.len()),
            Place::Undecided => Ok(0),
            Place::Head { empty_lines } => self.head(bytes, empty_lines),
            Place::Length(left) => {
                let taken = clamp(left, bytes.len());
                let left = left - taken as u64;
                self.place = if left == 0 { self.after_body() } else { Place::Length(left) };
                Ok(taken)
            }
            Place::ChunkSize => {
                let Some(line) = line(bytes, CHUNK_LINE_MAX, Refusal::ChunkSize)? else { return Ok(0) };
                let size = chunk_size(line)?;
                // The line end behind the data is checked when it comes.
                self.place = if size == 0 { Place::Trailers(0) } else { Place::Chunk(size + 2) };
                Ok(line.len() + 2)
            }
            Place::Chunk(left @ 1..=2) => {
                let wanted: &[u8] = if left == 2 { b"\r" } else { b"\n" };
                if !bytes.starts_with(wanted) {
                    return Err(Refusal::ChunkSize);
                }
                self.place = if left == 2 { Place::Chunk(1) } else { Place::ChunkSize };
                Ok(1)
            }
            Place::Chunk(left) => {
                let taken = clamp(left - 2, bytes.len());
                self.place = Place::Chunk(left - taken as u64);
                Ok(taken)
            }
            Place::Trailers(before) => {
                let room = TRAILERS_MAX.saturating_sub(before);
                let Some(line) = line(bytes, room, Refusal::Trailers)? else { return Ok(0) };
                self.place = if line.is_empty() {
                    self.after_body()
                } else {
                    let (name, _) = field(line)?;
                    if is_framing(name) {
                        return Err(Refusal::Trailers);
                    }
                    Place::Trailers(before + line.len() + 2)
                };
                Ok(line.len() + 2)
            }
        }
    }

    fn after_body(&mut self) -> Place {
        if std::mem::take(&mut self.may_switch) { Place::Undecided } else { Place::Head { empty_lines: 0 } }
    }

    fn head(&mut self, bytes: &[u8], empty_lines: u8) -> Result<usize, Refusal> {
        if bytes.starts_with(b"\r\n") {
            if empty_lines == EMPTY_LINES_MAX {
                return Err(Refusal::RequestLine);
            }
            self.place = Place::Head { empty_lines: empty_lines + 1 };
            return Ok(2);
        }
        let Some(head) = Head::read(bytes)? else { return Ok(0) };
        if let Some(line) = target::encoded(&bytes[..head.line_len]) {
            // It is read again as it will be handed on.
            self.rewritten = Some((head.line_len, line));
            return Ok(0);
        }
        self.may_switch = head.may_switch;
        if head.connect && (head.chunked || head.length.is_some_and(|length| length > 0)) {
            // Whether bytes behind it are its body or the tunnel's is read both ways (RFC 9110 §9.3.6).
            return Err(if head.chunked { Refusal::TransferEncoding } else { Refusal::Length });
        }
        self.place = match (head.chunked, head.length) {
            (true, Some(_)) => return Err(Refusal::LengthAndEncoding),
            (true, None) if head.old => return Err(Refusal::TransferEncoding),
            (true, None) => Place::ChunkSize,
            (false, Some(length)) if length > 0 => Place::Length(length),
            (false, _) => self.after_body(),
        };
        self.requests = self.requests.wrapping_add(1);
        Ok(head.len)
    }
}

/// What a head says about framing.
struct Head {
    len: usize,
    /// Of the request line, without its end.
    line_len: usize,
    /// HTTP/1.0.
    old: bool,
    connect: bool,
    chunked: bool,
    length: Option<u64>,
    may_switch: bool,
}

impl Head {
    /// Reads a head; `None` when it is not complete.
    fn read(bytes: &[u8]) -> Result<Option<Self>, Refusal> {
        let Some(first) = line(bytes, HEAD_MAX, Refusal::HeadTooLarge)? else { return Ok(None) };
        let version = first.strip_suffix(b"1").or_else(|| first.strip_suffix(b"0"));
        if !version.is_some_and(|rest| rest.ends_with(b" HTTP/1.")) {
            return Err(Refusal::RequestLine);
        }
        let connect = first.starts_with(b"CONNECT ");
        let mut head = Self {
            len: first.len() + 2,
            line_len: first.len(),
            old: first.ends_with(b"0"),
            connect,
            chunked: false,
            length: None,
            may_switch: connect,
        };
        let (mut count, mut hosts, mut encodings) = (0, 0_u8, 0_u8);
        loop {
            let room = HEAD_MAX.saturating_sub(head.len);
            let Some(line) = line(&bytes[head.len..], room, Refusal::HeadTooLarge)? else {
                return Ok(None);
            };
            head.len += line.len() + 2;
            if line.is_empty() {
                return Ok(Some(head));
            }
            count += 1;
            if count > HEADERS_MAX {
                return Err(Refusal::HeadTooLarge);
            }
            if matches!(line[0], b' ' | b'\t') {
                return Err(Refusal::Folding);
            }
            let (name, value) = field(line)?;
            match name.len() {
                4 if name.eq_ignore_ascii_case(b"host") => {
                    hosts += 1;
                    if hosts > 1 {
                        return Err(Refusal::Host);
                    }
                }
                7 if name.eq_ignore_ascii_case(b"upgrade") => head.may_switch |= !head.old,
                14 if name.eq_ignore_ascii_case(b"content-length") => {
                    if head.length.is_some() {
                        return Err(Refusal::Length);
                    }
                    head.length = Some(length(value)?);
                }
                17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                    encodings += 1;
                    if encodings > 1 || !value.eq_ignore_ascii_case(b"chunked") {
                        return Err(Refusal::TransferEncoding);
                    }
                    head.chunked = true;
                }
                _ => {}
            }
        }
    }
}

/// The first line without its end; `None` when it is not complete. Only CR LF ends a line.
fn line(bytes: &[u8], max: usize, too_long: Refusal) -> Result<Option<&[u8]>, Refusal> {
    let Some(end) = bytes.iter().position(|byte| ends_line(*byte)) else {
        return if bytes.len() > max { Err(too_long) } else { Ok(None) };
    };
    if end > max {
        return Err(too_long);
    }
    match (bytes[end], bytes.get(end + 1)) {
        (b'\r', Some(b'\n')) => Ok(Some(&bytes[..end])),
        (b'\r', None) => Ok(None),
        (b'\r', Some(_)) => Err(Refusal::BareCr),
        (b'\n', _) => Err(Refusal::BareLf),
        _ => Err(Refusal::Header),
    }
}

/// Whether a line goes no farther than this byte: by its end, or because it must not be in one.
fn ends_line(byte: u8) -> bool {
    matches!(byte, b'\r' | b'\n' | 0)
}

/// Name and value of a header line.
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), Refusal> {
    let Some(colon) = line.iter().position(|byte| *byte == b':') else { return Err(Refusal::Header) };
    let name = &line[..colon];
    // A blank before the colon makes another name of it for some.
    if name.is_empty() || name.iter().any(|byte| !is_token(*byte)) {
        return Err(Refusal::Header);
    }
    Ok((name, trim_blanks(&line[colon + 1..])))
}

/// Without the blanks at both ends that HTTP allows there: no others, or a value would be read in two ways.
fn trim_blanks(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Names that must not come late.
fn is_framing(name: &[u8]) -> bool {
    [&b"content-length"[..], b"transfer-encoding", b"host", b"connection", b"upgrade", b"trailer", b"te"]
        .iter()
        .any(|framing| name.eq_ignore_ascii_case(framing))
}

/// A `content-length`: digits and nothing else.
fn length(value: &[u8]) -> Result<u64, Refusal> {
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(Refusal::Length);
    }
    Ok(value.iter().fold(0_u64, |sum, digit| sum * 10 + u64::from(digit - b'0')).min(i64::MAX as u64))
}

/// The size of a chunk; extensions are passed over.
fn chunk_size(line: &[u8]) -> Result<u64, Refusal> {
    let end = line.iter().position(|byte| matches!(byte, b';' | b' ' | b'\t')).unwrap_or(line.len());
    let digits = &line[..end];
    if digits.is_empty() || digits.len() > 16 {
        return Err(Refusal::ChunkSize);
    }
    let rest = trim_blanks(&line[end..]);
    if !rest.is_empty() && rest[0] != b';' {
        return Err(Refusal::ChunkSize);
    }
    let mut size = 0_u64;
    for digit in digits {
        let value = char::from(*digit).to_digit(16).ok_or(Refusal::ChunkSize)?;
        size = size << 4 | u64::from(value);
    }
    if size > CHUNK_MAX { Err(Refusal::ChunkSize) } else { Ok(size) }
}

fn clamp(left: u64, room: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(room)
}

#[cfg(test)]
mod tests;
