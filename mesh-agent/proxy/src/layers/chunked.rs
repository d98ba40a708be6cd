//! Bytes as bodies of one HTTP/1.1 exchange: chunks on the way there, whatever the proxy chose on the way back.
//!
//! Invariants:
//! - What is read beyond an answer is bounded, and what breaks the framing is an error, never bytes.
//! - An end of ours is the last chunk; the connection stays open for what the proxy still has to say.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes of an app in one chunk.
const CHUNK_MAX: usize = 16 << 10;
/// Bytes that are read ahead.
const READ_MAX: usize = 16 << 10;
/// Bytes of a chunk's size line, or of all trailers.
const LINE_MAX: usize = 4 << 10;

/// How the answer's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// With the connection.
    Open,
    /// After so many bytes.
    Length(u64),
    /// With its last chunk.
    Chunked,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Bytes until the connection's end.
    Open,
    /// So many bytes more, then nothing.
    Length(u64),
    /// A size line.
    Size,
    /// So many bytes of a chunk more.
    Data(u64),
    /// The line's end behind a chunk.
    DataEnd,
    /// Lines behind the last chunk; so many bytes of them so far.
    Trailers(usize),
    Done,
}

/// A connection whose bytes are bodies.
#[derive(Debug)]
pub(super) struct Chunked<T> {
    io: T,
    out: BytesMut,
    has_ended: bool,
    read: BytesMut,
    state: State,
}

impl<T> Chunked<T> {
    /// Behind the heads; `early` came with the answer's.
    pub(super) fn new(io: T, framing: Framing, early: &[u8]) -> Self {
        let state = match framing {
            Framing::Open => State::Open,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::Size,
        };
        Self { io, out: BytesMut::new(), has_ended: false, read: early.into(), state }
    }

    /// What lies below.
    pub(super) fn into_inner(self) -> T {
        self.io
    }
}

/// Takes bytes of a body off what was read; `None`: more must be read first.
fn decode(state: &mut State, read: &mut BytesMut, room: &mut ReadBuf<'_>) -> io::Result<Option<()>> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    let take = |left: u64, read: &mut BytesMut, room: &mut ReadBuf<'_>| {
        let count = read.len().min(room.remaining()).min(usize::try_from(left).unwrap_or(usize::MAX));
        room.put_slice(&read[..count]);
        read.advance(count);
        left - count as u64
    };
    loop {
        match *state {
            State::Done => return Ok(Some(())),
            State::Length(0) => *state = State::Done,
            _ if read.is_empty() => return Ok(None),
            State::Open => {
                take(u64::MAX, read, room);
                return Ok(Some(()));
            }
            State::Length(left) => {
                *state = State::Length(take(left, read, room));
                return Ok(Some(()));
            }
            State::Data(left) => {
                let left = take(left, read, room);
                *state = if left == 0 { State::DataEnd } else { State::Data(left) };
                return Ok(Some(()));
            }
            State::Size => {
                let Some(line) = line_of(read)? else { return Ok(None) };
                let digits = line[..].split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
                let is_hex = (1..=15).contains(&digits.len()) && digits.iter().all(u8::is_ascii_hexdigit);
                let digits = std::str::from_utf8(digits).ok().filter(|_| is_hex).ok_or_else(broken)?;
                let size = u64::from_str_radix(digits, 16).map_err(|_| broken())?;
                *state = if size == 0 { State::Trailers(0) } else { State::Data(size) };
            }
            State::DataEnd => {
                let Some(line) = line_of(read)? else { return Ok(None) };
                if !line.is_empty() {
                    return Err(broken());
                }
                *state = State::Size;
            }
            State::Trailers(so_far) => {
                let Some(line) = line_of(read)? else { return Ok(None) };
                let so_far = so_far + line.len() + 2;
                if so_far > LINE_MAX {
                    return Err(broken());
                }
                *state = if line.is_empty() { State::Done } else { State::Trailers(so_far) };
            }
        }
    }
}

/// A line that is whole, without its end.
fn line_of(read: &mut BytesMut) -> io::Result<Option<BytesMut>> {
    match read.windows(2).position(|two| two == b"\r\n") {
        Some(at) if at <= LINE_MAX => {
            let line = read.split_to(at);
            read.advance(2);
            Ok(Some(line))
        }
        None if read.len() <= LINE_MAX => Ok(None),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Chunked<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if decode(&mut this.state, &mut this.read, buf)?.is_some() {
                return Poll::Ready(Ok(()));
            }
            let mut ahead = [0; READ_MAX];
            let mut ahead = ReadBuf::new(&mut ahead);
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut ahead))?;
            if ahead.filled().is_empty() {
                return Poll::Ready(match this.state {
                    State::Open => Ok(()),
                    _ => Err(io::ErrorKind::UnexpectedEof.into()),
                });
            }
            this.read.extend_from_slice(ahead.filled());
        }
    }
}

impl<T: AsyncWrite + Unpin> Chunked<T> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let sent = ready!(Pin::new(&mut self.io).poll_write(cx, &self.out))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(sent);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Chunked<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // One chunk at a time is held for a proxy that does not take it.
        ready!(this.poll_drain(cx))?;
        let piece = &buf[..buf.len().min(CHUNK_MAX)];
        if piece.is_empty() || this.has_ended {
            return Poll::Ready(Ok(0));
        }
        this.out.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        this.out.extend_from_slice(piece);
        this.out.extend_from_slice(b"\r\n");
        match this.poll_drain(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) | Poll::Pending => Poll::Ready(Ok(piece.len())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.has_ended {
            this.has_ended = true;
            this.out.extend_from_slice(b"0\r\n\r\n");
        }
        ready!(this.poll_drain(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    fn run<F: Future>(work: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    /// What is read of an answer's body that arrives in pieces of so many bytes.
    fn heard(framing: Framing, body: &[u8], piece: usize) -> io::Result<Vec<u8>> {
        run(async {
            let (ours, mut theirs) = duplex(piece);
            let mut chunked = Chunked::new(ours, framing, b"");
            let mut heard = Vec::new();
            // What follows an answer may never be taken.
            let send = async move {
                theirs.write_all(body).await.ok();
                drop(theirs);
                std::future::pending::<io::Result<usize>>().await
            };
            let outcome = tokio::select! {
                outcome = chunked.read_to_end(&mut heard) => outcome,
                never = send => never,
            };
            outcome.map(|_| heard)
        })
    }

    #[test]
    fn answers_end_as_their_framing_says() {
        for piece in [1, 3, 100] {
            let chunks = b"5;x=y\r\nhello\r\n1\r\n!\r\n0\r\na: b\r\n\r\nmore";
            assert_eq!(heard(Framing::Chunked, chunks, piece).unwrap(), b"hello!");
            assert_eq!(heard(Framing::Length(5), b"hello and more", piece).unwrap(), b"hello");
            assert_eq!(heard(Framing::Open, b"hello", piece).unwrap(), b"hello");
        }
        for broken in
            [&b"5\r\nhel"[..], b"x\r\n", b"-1\r\n", b"\r\n", b"2\r\nabc\r\n", b"ffffffffffffffff\r\n"]
        {
            assert!(heard(Framing::Chunked, broken, 100).is_err(), "{broken:?}");
        }
        assert!(heard(Framing::Length(6), b"hello", 100).is_err());
        assert!(heard(Framing::Chunked, &vec![b'1'; LINE_MAX + 100], 10_000).is_err());
    }

    #[test]
    fn an_end_is_the_last_chunk_and_leaves_the_connection_open() {
        run(async {
            let (ours, mut theirs) = duplex(1000);
            let mut chunked = Chunked::new(ours, Framing::Open, b"early");
            chunked.write_all(b"hello").await.unwrap();
            chunked.shutdown().await.unwrap();
            let mut seen = [0; 15];
            theirs.read_exact(&mut seen).await.unwrap();
            assert_eq!(&seen, b"5\r\nhello\r\n0\r\n\r\n");
            theirs.write_all(b" answer").await.unwrap();
            drop(theirs);
            let mut heard = String::new();
            chunked.read_to_string(&mut heard).await.unwrap();
            assert_eq!(heard, "early answer");
        });
    }

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(
            bytes in prop::collection::vec(any::<u8>(), 0..40_000),
            room in 1_usize..9000,
        ) {
            run(async {
                let (ours, theirs) = duplex(room);
                let (mut ours, mut theirs) =
                    (Chunked::new(ours, Framing::Open, b""), Chunked::new(theirs, Framing::Chunked, b""));
                let send = async {
                    ours.write_all(&bytes).await.unwrap();
                    ours.shutdown().await.unwrap();
                };
                let mut heard = Vec::new();
                let (_, outcome) = tokio::join!(send, theirs.read_to_end(&mut heard));
                outcome.unwrap();
                assert_eq!(heard, bytes);
            });
        }

        #[test]
        fn no_answer_makes_it_panic(answer in prop::collection::vec(any::<u8>(), 0..200)) {
            heard(Framing::Chunked, &answer, 64).ok();
            heard(Framing::Chunked, &[b"3\r\nabc\r\n", &answer[..]].concat(), 64).ok();
        }
    }
}
