//! A stream of a tunnel as a connection's task sees it.

use std::{
    future::poll_fn,
    rc::Rc,
    task::{Context, Poll},
};

use tokio::time::{Instant, sleep_until};

use super::{
    super::h2::{ErrorCode, StreamKey},
    Tunnel,
};
use crate::{close::CloseReason, connections::Live, stream::Stream};

/// Reads of one app before other tasks get a turn.
const ROUNDS_MAX: u32 = 8;

/// A stream; dropped before its end it is reset.
#[derive(Debug)]
pub(crate) struct TunnelStream {
    pub(super) tunnel: Rc<Tunnel>,
    pub(super) key: StreamKey,
    /// When a server must have answered.
    answer_by: Option<Instant>,
}

/// When the bytes of an app may follow a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Early {
    /// At once, together with it: saves a round trip.
    Sent,
    /// When the server has taken it: until then another one can be asked.
    Held,
}

impl TunnelStream {
    pub(super) fn new(tunnel: Rc<Tunnel>, key: StreamKey) -> Self {
        Self { tunnel, key, answer_by: None }
    }

    /// The tunnel it belongs to.
    pub(crate) fn tunnel(&self) -> &Rc<Tunnel> {
        &self.tunnel
    }

    /// Answers a request. With `end` that is all there will be; else the answer is sent by the first turn of
    /// [`TunnelStream::carry`], after the app has got what came with the request.
    pub(crate) fn respond(&self, status: u16, end: bool) {
        let mut state = self.tunnel.state.borrow_mut();
        // A stream that is gone needs no answer.
        state.h2.respond(self.key, status, &[], end).ok();
        if end {
            // RFC 9113 §8.1: the answer is complete, whatever the client still sends.
            state.h2.reset(self.key, ErrorCode::NO_ERROR);
            state.remove(&self.tunnel.workspace, self.key);
            state.flush_or_fail(&self.tunnel.workspace);
        }
    }

    /// Waits until the server has answered, or with [`Early::Sent`] the app has bytes for it: from then on no other server
    /// can be tried. An answer that is still missing then must come until `answer_by`, or [`TunnelStream::carry`] ends.
    ///
    /// # Errors
    /// The server refused before a byte of the app was taken.
    pub(crate) async fn ready(
        &mut self,
        app: &mut Stream,
        early: Early,
        answer_by: Instant,
    ) -> Result<(), CloseReason> {
        self.answer_by = Some(answer_by);
        poll_fn(|cx| self.poll_ready(app, early, cx)).await
    }

    fn poll_ready(
        &self,
        app: &mut Stream,
        early: Early,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), CloseReason>> {
        let mut state = self.tunnel.state.borrow_mut();
        {
            let Some(leg) = state.legs.get_mut(&self.key.id()) else {
                return Poll::Ready(Err(CloseReason::TunnelLost));
            };
            leg.waker = Some(cx.waker().clone());
            if let Some(reason) = leg.lost.or(leg.outcome) {
                return Poll::Ready(Err(reason));
            }
            if leg.status.is_some() {
                return Poll::Ready(Ok(()));
            }
        }
        app.observe(cx);
        if early == Early::Sent && app.has_bytes() || app.is_hung_up() {
            // The request goes out together with them.
            return Poll::Ready(Ok(()));
        }
        state.flush_or_fail(&self.tunnel.workspace);
        Poll::Pending
    }

    /// Waits until the server has answered.
    ///
    /// # Errors
    /// It refused, or will never answer.
    pub(crate) async fn answered(&self) -> Result<(), CloseReason> {
        poll_fn(|cx| {
            let mut state = self.tunnel.state.borrow_mut();
            let Some(leg) = state.legs.get_mut(&self.key.id()) else {
                return Poll::Ready(Err(CloseReason::TunnelLost));
            };
            leg.waker = Some(cx.waker().clone());
            if let Some(reason) = leg.lost.or(leg.outcome) {
                return Poll::Ready(Err(reason));
            }
            if leg.status.is_some() {
                return Poll::Ready(Ok(()));
            }
            state.flush_or_fail(&self.tunnel.workspace);
            Poll::Pending
        })
        .await
    }

    /// Resolves when the peer gives the stream up.
    pub(crate) async fn lost(&self) -> CloseReason {
        poll_fn(|cx| {
            let mut state = self.tunnel.state.borrow_mut();
            let Some(leg) = state.legs.get_mut(&self.key.id()) else {
                return Poll::Ready(CloseReason::TunnelLost);
            };
            leg.waker = Some(cx.waker().clone());
            leg.lost.or(leg.outcome).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Carries bytes between an app and the stream until the connection ends, and says why it did.
    ///
    /// Cancel safety: dropping the future closes the app's socket and resets the stream.
    pub(crate) async fn carry(self, live: &Rc<Live>, app: Stream) -> CloseReason {
        {
            let mut state = self.tunnel.state.borrow_mut();
            let over = state.is_over();
            match state.legs.get_mut(&self.key.id()) {
                Some(leg) => {
                    if leg.status.is_some() {
                        live.taken();
                    }
                    leg.live = Some(Rc::clone(live));
                    leg.app = Some(app);
                }
                None => {
                    app.reset();
                    return if over { CloseReason::TunnelLost } else { CloseReason::Bug };
                }
            }
        }
        let mut timer = self.answer_by.filter(|_| self.awaits_answer()).map(|by| Box::pin(sleep_until(by)));
        loop {
            let turn = poll_fn(|cx| {
                if let Some(running) = &mut timer {
                    if !self.awaits_answer() {
                        timer = None;
                    } else if running.as_mut().poll(cx).is_ready() {
                        timer = None;
                        self.lose(CloseReason::UpstreamTimeout);
                    }
                }
                self.poll(live, cx)
            });
            match turn.await {
                Some(reason) => return reason,
                // Through the reactor, so that other sockets' edges are seen in between.
                None => tokio::task::yield_now().await,
            }
        }
    }

    /// Whether the server has neither taken nor refused it yet.
    pub(crate) fn awaits_answer(&self) -> bool {
        let state = self.tunnel.state.borrow();
        state.legs.get(&self.key.id()).is_some_and(|leg| leg.status.is_none())
    }

    /// Nothing is expected of the other side any more.
    fn lose(&self, reason: CloseReason) {
        if let Some(leg) = self.tunnel.state.borrow_mut().legs.get_mut(&self.key.id()) {
            leg.lose(reason);
        }
    }

    /// `None`: there is more to do at once.
    fn poll(&self, live: &Live, cx: &mut Context<'_>) -> Poll<Option<CloseReason>> {
        let mut state = self.tunnel.state.borrow_mut();
        let ws = &*self.tunnel.workspace;
        let id = self.key.id();
        let stopped = live.meter.poll_stopped(cx);
        {
            let Some(leg) = state.legs.get_mut(&id) else { return Poll::Ready(Some(CloseReason::Bug)) };
            if !leg.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                leg.waker = Some(cx.waker().clone());
            }
            if let Some(reason) = stopped {
                leg.outcome.get_or_insert(reason);
            } else if let Some(app) = &mut leg.app {
                app.observe(cx);
            }
        }
        let mut more = false;
        state.flush_held(ws, self.key);
        if !state.is_over() {
            match state.pump(ws, self.key, ROUNDS_MAX) {
                Ok(again) => more = again,
                Err(end) => state.fail(ws, end),
            }
        }
        state.settle(ws.tick.get(), id);
        if let Some(reason) = state.legs.get(&id).and_then(|leg| leg.outcome) {
            if let Some(app) = state.remove(ws, self.key).and_then(|leg| leg.app)
                && reason.resets()
            {
                app.reset();
            }
            state.h2.reset(self.key, code_of(reason));
            state.flush_or_fail(ws);
            return Poll::Ready(Some(reason));
        }
        state.flush_or_fail(ws);
        if more { Poll::Ready(None) } else { Poll::Pending }
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        // Not while a panic unwinds through a borrow of it.
        let Ok(mut state) = self.tunnel.state.try_borrow_mut() else { return };
        if let Some(leg) = state.remove(&self.tunnel.workspace, self.key) {
            if let Some(app) = leg.app {
                app.reset();
            }
            state.h2.reset(self.key, ErrorCode::CANCEL);
            state.flush_or_fail(&self.tunnel.workspace);
        }
    }
}

/// How the peer learns of an end that is not its own.
fn code_of(reason: CloseReason) -> ErrorCode {
    match reason {
        // Both halves are over: nothing is sent for it.
        CloseReason::Finished => ErrorCode::NO_ERROR,
        _ => ErrorCode::CONNECT_ERROR,
    }
}
