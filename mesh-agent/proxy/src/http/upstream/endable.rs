//! The bytes of an HTTP/2 connection, which the HTTP library keeps until its last stream ends, in a task that nobody can reach.
//!
//! Invariants:
//! - Once [`Ending`] is dropped, nothing more is read or written, and the library's task ends with its streams.
//! - [`Ending::poll_gone`] is ready when the library has let go of the bytes.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::layers::io::UpstreamIo;

/// What both ends know.
#[derive(Default)]
struct State {
    is_ended: Cell<bool>,
    is_gone: Cell<bool>,
    /// The library's task.
    library: RefCell<Option<Waker>>,
    /// Whoever waits for it to let go.
    watcher: RefCell<Option<Waker>>,
}

/// The bytes of a connection.
pub(super) struct Endable {
    io: UpstreamIo,
    state: Rc<State>,
}

/// Ends them when it is dropped.
pub(super) struct Ending(Rc<State>);

impl Endable {
    /// These bytes, and what ends them.
    pub(super) fn new(io: UpstreamIo) -> (Self, Ending) {
        let state = Rc::new(State::default());
        (Self { io, state: Rc::clone(&state) }, Ending(state))
    }

    /// The bytes, while they have not been ended.
    fn alive(&mut self, cx: &Context<'_>) -> io::Result<Pin<&mut UpstreamIo>> {
        if self.state.is_ended.get() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let mut library = self.state.library.borrow_mut();
        if !library.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *library = Some(cx.waker().clone());
        }
        Ok(Pin::new(&mut self.io))
    }
}

impl Ending {
    /// Waits until the library has let go of the bytes.
    pub(super) fn poll_gone(&self, cx: &Context<'_>) -> Poll<()> {
        if self.0.is_gone.get() {
            return Poll::Ready(());
        }
        *self.0.watcher.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.is_ended.set(true);
        if let Some(library) = self.0.library.take() {
            library.wake();
        }
    }
}

impl Drop for Endable {
    fn drop(&mut self) {
        self.state.is_gone.set(true);
        if let Some(watcher) = self.state.watcher.take() {
            watcher.wake();
        }
    }
}

impl AsyncRead for Endable {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().alive(cx)?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Endable {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().alive(cx)?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().alive(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().alive(cx)?.poll_shutdown(cx)
    }
}
