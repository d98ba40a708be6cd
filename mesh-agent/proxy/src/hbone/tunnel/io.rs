//! A stream of a tunnel as a byte stream, for those who carry no app's socket but speak a protocol themselves.
//!
//! Invariants:
//! - One task reads and writes: there is one waker for both.
//! - What arrived before an end or a reset is read before it.

use std::{
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{TunnelStream, leg::Half};
use crate::connections::Live;

/// A stream whose server has answered; dropped before both ends it is reset.
#[derive(Debug)]
pub(crate) struct TunnelIo(TunnelStream);

impl TunnelIo {
    /// Takes a stream over that [`TunnelStream::answered`]; its bytes are counted at `live`.
    pub(crate) fn new(stream: TunnelStream, live: &Rc<Live>) -> Self {
        live.taken();
        live.rides(&stream.tunnel);
        if let Some(leg) = stream.tunnel.state.borrow_mut().legs.get_mut(&stream.key.id()) {
            leg.direct = true;
            leg.live = Some(Rc::clone(live));
        }
        Self(stream)
    }
}

impl AsyncRead for TunnelIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let TunnelStream { tunnel, key, .. } = &self.0;
        let state = &mut *tunnel.state.borrow_mut();
        let (role, tick) = (state.role, tunnel.workspace.tick.get());
        let Some(leg) = state.legs.get_mut(&key.id()) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        if leg.held.is_empty() {
            if leg.lost.is_some() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if leg.down != Half::Open {
                return Poll::Ready(Ok(()));
            }
            leg.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let got = leg.held.read(buf.initialize_unfilled());
        buf.advance(got);
        leg.count_down(role, got, tick);
        state.held -= got;
        tunnel.workspace.release(got);
        state.h2.consumed(*key, got);
        if state.paused {
            state.wake();
        }
        state.settle(tick, key.id());
        state.flush_or_fail(&tunnel.workspace);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let TunnelStream { tunnel, key, .. } = &self.0;
        let state = &mut *tunnel.state.borrow_mut();
        if state.is_over() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        match state.legs.get_mut(&key.id()) {
            Some(leg) if leg.up == Half::Open && leg.lost.is_none() => leg.waker = Some(cx.waker().clone()),
            _ => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        match state.send(&tunnel.workspace, *key, buf) {
            Ok(Some(sent)) => Poll::Ready(Ok(sent)),
            Ok(None) => Poll::Pending,
            Err(end) => {
                state.fail(&tunnel.workspace, end);
                Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.tunnel.state.borrow_mut().flush_or_fail(&self.0.tunnel.workspace);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let TunnelStream { tunnel, key, .. } = &self.0;
        let state = &mut *tunnel.state.borrow_mut();
        if let Some(leg) = state.legs.get_mut(&key.id())
            && leg.up == Half::Open
        {
            leg.up = Half::Ended;
            state.h2.end(*key);
            state.settle(tunnel.workspace.tick.get(), key.id());
            state.flush_or_fail(&tunnel.workspace);
        }
        Poll::Ready(Ok(()))
    }
}
