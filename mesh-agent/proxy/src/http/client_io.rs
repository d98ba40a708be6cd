//! The client's socket as the HTTP library sees it: guarded, counted, and shared with the task that ends it.
//!
//! Invariant: at most one read ahead of what the library takes is held here.

use std::{
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use hyper::rt::{Read, ReadBufCursor, Write};

use super::session::{Session, Socket};
use crate::stream::{Io, Stream};

/// Longest read: what the library's own buffer takes at most.
const READ_MAX: usize = 64 << 10;

/// The client's socket.
pub(super) struct ClientIo(pub(super) Rc<Session>);

impl Read for ClientIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut cursor: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let session = &*self.0;
        let mut socket = session.socket.borrow_mut();
        let Socket { stream, guard, head_since, .. } = &mut *socket;
        let Some(stream) = stream else { return Poll::Ready(Ok(())) };
        loop {
            if guard.is_undecided() && !session.is_busy() {
                guard.decided();
            }
            let ready = guard.ready();
            if !ready.is_empty() {
                let count = ready.len().min(cursor.remaining());
                cursor.put_slice(&ready[..count]);
                guard.consume(count);
                *head_since = None;
                return Poll::Ready(Ok(()));
            }
            if guard.refusal().is_some() {
                // A request before it is answered first. It may not have begun yet:
                // the library reads on before it hands a request over.
                let is_answering = session.is_busy() || session.begun() != guard.requests();
                if is_answering && !guard.refused_in_body() {
                    session.wake_when_idle(cx);
                    return Poll::Pending;
                }
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            // In a drain no further request is waited for.
            let is_idle = !session.is_busy() && !guard.in_head() && !guard.is_opaque();
            if is_idle && session.may_leave() {
                return Poll::Ready(Ok(()));
            }
            if guard.is_undecided() {
                // Its answer decides how what is held goes on.
                session.wake_when_idle(cx);
            }
            if !guard.has_room() {
                return Poll::Pending;
            }
            if !stream.is_readable() {
                stream.observe(cx);
                if !stream.is_readable() {
                    if session.live.meter.is_finishing() {
                        session.wake_when_idle(cx);
                    }
                    return Poll::Pending;
                }
            }
            let tick = session.worker.tick();
            let passed = session.worker.buffers().with_scratch(|scratch| {
                let want = cursor.remaining().min(READ_MAX).min(scratch.len());
                let got = match stream.read(&mut scratch[..want])? {
                    Io::Bytes(got) => got,
                    Io::Blocked => return Ok(false),
                };
                session.live.meter.add_to_server(got as u64, tick);
                let bytes = &scratch[..got];
                if got == 0 || guard.take(bytes) {
                    cursor.put_slice(bytes);
                    return Ok(true);
                }
                Ok::<bool, io::Error>(false)
            })?;
            if passed {
                return Poll::Ready(Ok(()));
            }
            if guard.in_head() && head_since.is_none() {
                *head_since = Some(tick);
            }
        }
    }
}

impl ClientIo {
    fn write(
        &self,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
        write: impl Fn(&mut Stream) -> io::Result<Io>,
    ) -> Poll<io::Result<usize>> {
        let session = &*self.0;
        let mut socket = session.socket.borrow_mut();
        let Socket { stream, resets, said, mid_message, .. } = &mut *socket;
        let Some(stream) = stream else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        loop {
            if !stream.is_writable() {
                stream.observe(cx);
                if !stream.is_writable() {
                    return Poll::Pending;
                }
            }
            if !said.is_empty() {
                if let Io::Bytes(sent) = stream.write(said)? {
                    said.drain(..sent);
                }
                continue;
            }
            if let Io::Bytes(sent) = write(stream)? {
                *mid_message = true;
                if let Some(resets) = resets {
                    let mut left = sent;
                    for buf in bufs {
                        let part = left.min(buf.len());
                        resets.follow(&buf[..part], |reason| {
                            session.worker.metrics().http.refused(reason).inc();
                        });
                        left -= part;
                    }
                }
                session.live.meter.add_to_client(sent as u64, session.worker.tick());
                return Poll::Ready(Ok(sent));
            }
        }
    }
}

impl Write for ClientIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, &[io::IoSlice::new(buf)], |stream| stream.write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let offered = bufs.iter().map(|buf| buf.len()).sum();
        self.write(cx, bufs, |stream| {
            stream.write_by(offered, |mut socket| io::Write::write_vectored(&mut socket, bufs))
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is held here; the library asks for this when it has written all it had.
        self.0.socket.borrow_mut().mid_message = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(stream) = &self.0.socket.borrow().stream {
            stream.shutdown_write();
        }
        Poll::Ready(Ok(()))
    }
}
