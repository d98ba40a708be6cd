//! One connection to an endpoint: its bytes, the HTTP spoken over it, and the task that keeps both going.
//!
//! Invariants:
//! - The task of a connection outlives whoever asked for it: a connection that came too late serves the next request.
//! - A connection stands in the worker's table as long as it is open, so that a policy change, a drain and the sweep end it.
//! - It counts at its destination's limit from before it is dialled until it is closed.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    pin::Pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use hyper::client::conn::{http1, http2};
use mesh_core::route::cluster::ConnectionPool;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    sync::{Notify, oneshot},
    time::timeout,
};

use super::{
    super::{
        body::Body,
        io::{HyperIo, LocalTasks, Timer},
    },
    endable::{Endable, Ending},
    response::Held,
};
use crate::{close::CloseReason, connections::Live, destination::limits::Usage, layers::io::UpstreamIo};

/// After our end of a tunnelled connection, how long the other side has for its own before the stream is reset.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of a response's head at most: what Envoy takes, and more than any server means.
const HEAD_MAX: usize = 96 << 10;
/// HTTP/2 windows: a stream's and a connection's.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Bytes of a request that wait for the endpoint's window, per stream of HTTP/2.
const STREAM_BUFFER_MAX: usize = 256 << 10;

/// The HTTP of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Version {
    /// One request at a time.
    Http1,
    /// Streams.
    Http2,
}

/// Who waits for an end of streams.
#[derive(Debug)]
pub(super) struct Waiters {
    /// Requests of this pool, in turn.
    pub(super) room: Rc<Notify>,
    /// Requests that want the connection's place.
    pub(super) usage: Arc<Usage>,
}

/// What requests and the pool know of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) live: Rc<Live>,
    /// Requests that were given to it.
    pub(super) served: Cell<u32>,
    /// Requests on it now.
    pub(super) streams: Cell<u32>,
    /// Requests at once that the endpoint allows.
    pub(super) room: Cell<u32>,
    /// It takes no more requests.
    pub(super) leaving: Cell<bool>,
    /// Tick of its making, and of its last use.
    pub(super) made: u32,
    pub(super) used: Cell<u32>,
    /// Its response is over; it goes back to the pool once it can take another request.
    returned: RefCell<Option<http1::SendRequest<Body>>>,
    /// Who gets its bytes after a switch of protocols.
    switch: RefCell<Option<oneshot::Sender<Switched>>>,
    waker: RefCell<Option<Waker>>,
    /// Where streams share it.
    waiters: Option<Waiters>,
}

impl Connection {
    pub(super) fn new(live: &Rc<Live>, tick: u32, waiters: Option<Waiters>) -> Rc<Self> {
        Rc::new(Self {
            live: Rc::clone(live),
            served: Cell::new(0),
            streams: Cell::new(0),
            room: Cell::new(u32::MAX),
            leaving: Cell::new(false),
            made: tick,
            used: Cell::new(tick),
            returned: RefCell::default(),
            switch: RefCell::default(),
            waker: RefCell::default(),
            waiters,
        })
    }

    /// A request is over.
    pub(super) fn end_stream(&self) {
        let left = self.streams.get() - 1;
        self.streams.set(left);
        let Some(waiters) = &self.waiters else { return };
        waiters.room.notify_one();
        if left > 0 {
            return;
        }
        // Nobody uses it: whoever wants its place asks for it again, and gets it now.
        if waiters.usage.waiting.load(Ordering::Acquire) > 0 {
            waiters.usage.freed.notify_waiters();
        }
        self.live.tell_waiting();
    }

    /// The endpoint allows so many requests at once.
    fn set_room(&self, room: u32) {
        let before = self.room.replace(room);
        if let Some(waiters) = self.waiters.as_ref().filter(|_| room > before) {
            waiters.room.notify_waiters();
        }
    }

    /// Gives it back after a response.
    pub(super) fn give_back(&self, sender: http1::SendRequest<Body>) {
        *self.returned.borrow_mut() = Some(sender);
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Asks for its bytes should the endpoint switch protocols.
    pub(super) fn expect_switch(&self) -> oneshot::Receiver<Switched> {
        let (sender, receiver) = oneshot::channel();
        *self.switch.borrow_mut() = Some(sender);
        receiver
    }
}

/// The bytes of a connection behind a switch of protocols.
pub(crate) struct Switched {
    io: UpstreamIo,
    live: Rc<Live>,
    early: Bytes,
    /// The request counts for as long as its bytes flow.
    pub(super) held: Option<Held>,
    /// The connection's task waits for it to be dropped.
    _done: oneshot::Sender<()>,
}

impl std::fmt::Debug for Switched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Switched").field("io", &self.io).finish_non_exhaustive()
    }
}

impl AsyncRead for Switched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let switched = self.get_mut();
        if switched.live.meter.poll_stopped(cx).is_some() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if !switched.early.is_empty() {
            let piece = switched.early.split_to(switched.early.len().min(buf.remaining()));
            buf.put_slice(&piece);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut switched.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Switched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

/// Sends requests over a connection.
#[derive(Debug)]
pub(super) enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// The protocol side of a connection, to be driven.
pub(super) enum Protocol {
    Http1(Box<http1::Connection<HyperIo<UpstreamIo>, Body>>),
    Http2(Box<http2::Connection<HyperIo<Endable>, Body, LocalTasks>>, Ending),
}

/// Begins to speak HTTP.
///
/// # Errors
/// The connection failed at once.
pub(super) async fn speak(
    io: UpstreamIo,
    version: Version,
    pool: &ConnectionPool,
) -> hyper::Result<(Sender, Protocol)> {
    match version {
        Version::Http1 => {
            let (sender, protocol) =
                http1::Builder::new().max_header_size(HEAD_MAX).handshake(HyperIo(io)).await?;
            Ok((Sender::Http1(sender), Protocol::Http1(Box::new(protocol))))
        }
        Version::Http2 => {
            let mut builder = http2::Builder::new(LocalTasks);
            builder
                .timer(Timer)
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_send_buf_size(STREAM_BUFFER_MAX)
                .max_header_list_size(HEAD_MAX as u32);
            if let Some(max) = pool.max_concurrent_streams {
                builder.initial_max_send_streams(max as usize);
            }
            if let Some(alive) = pool.http2_keepalive {
                // One that rests in the pool is asked too: a request must not be the first to learn that it is dead.
                builder
                    .keep_alive_interval(alive.interval)
                    .keep_alive_timeout(alive.timeout)
                    .keep_alive_while_idle(true);
            }
            let (io, ending) = Endable::new(io);
            let (sender, protocol) = builder.handshake(HyperIo(io)).await?;
            Ok((Sender::Http2(sender), Protocol::Http2(Box::new(protocol), ending)))
        }
    }
}

impl Connection {
    /// Drives the connection to its end. `free` takes it whenever it can serve another request.
    pub(super) async fn drive(
        &self,
        mut protocol: Protocol,
        mut free: impl FnMut(http1::SendRequest<Body>),
    ) -> CloseReason {
        let reason = poll_fn(|cx| {
            if let Some(reason) = self.live.meter.poll_stopped(cx) {
                return Poll::Ready(reason);
            }
            if !self.waker.borrow().as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *self.waker.borrow_mut() = Some(cx.waker().clone());
            }
            let polled = match &mut protocol {
                // After a switch the bytes are somebody else's: nothing may be shut down.
                Protocol::Http1(http) if self.switch.borrow().is_some() => http.poll_without_shutdown(cx),
                Protocol::Http1(http) => Pin::new(http).poll(cx),
                Protocol::Http2(http, _) => {
                    let polled = Pin::new(&mut **http).poll(cx);
                    let room = http.current_max_send_streams();
                    self.set_room(u32::try_from(room).unwrap_or(u32::MAX));
                    polled
                }
            };
            if let Poll::Ready(outcome) = polled {
                return Poll::Ready(outcome.map_or(CloseReason::UpstreamLost, |()| CloseReason::Finished));
            }
            let returned = self.returned.take();
            if let Some(mut sender) = returned {
                match sender.poll_ready(cx) {
                    Poll::Ready(Ok(())) => free(sender),
                    Poll::Ready(Err(_)) => {}
                    Poll::Pending => *self.returned.borrow_mut() = Some(sender),
                }
            }
            Poll::Pending
        })
        .await;
        self.leaving.set(true);
        let http = match protocol {
            Protocol::Http1(http) => http,
            Protocol::Http2(http, ending) => {
                drop(http);
                return self.behind_streams(reason, ending).await;
            }
        };
        let parts = http.into_parts();
        let HyperIo(mut io) = parts.io;
        let switch = self.switch.take();
        match (switch, reason) {
            (Some(switch), CloseReason::Finished) => {
                let (done, ended) = oneshot::channel();
                let switched = Switched {
                    io,
                    live: Rc::clone(&self.live),
                    early: parts.read_buf,
                    held: None,
                    _done: done,
                };
                if switch.send(switched).is_ok() {
                    // Resolves when the other end is dropped.
                    ended.await.ok();
                }
            }
            (_, CloseReason::Finished) if io.is_tunnel() => {
                let rest = async { while io.read(&mut [0; 256]).await.is_ok_and(|got| got > 0) {} };
                timeout(LINGER, rest).await.ok();
            }
            _ => {}
        }
        reason
    }

    /// Waits for the streams that go on when no more are begun, as behind a GOAWAY, and ends them when the connection is to end.
    async fn behind_streams(&self, reason: CloseReason, ending: Ending) -> CloseReason {
        poll_fn(|cx| match self.live.meter.poll_stopped(cx) {
            Some(reason) => Poll::Ready(reason),
            None => ending.poll_gone(cx).map(|()| reason),
        })
        .await
    }
}
