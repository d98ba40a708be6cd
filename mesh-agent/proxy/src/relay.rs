//! Carries the bytes of one connection, both directions in one task.
//!
//! Invariants:
//! - A half-close on one side becomes a half-close on the other, after every byte before it.
//! - A reset on one side becomes a reset on the other, never an orderly end; bytes that arrived before it are still
//!   delivered, as they would be without a proxy.
//! - Nothing is read for a receiver that does not take what it has: memory per direction is one read.
//! - A busy connection yields after [`flow::ROUNDS_MAX`] reads, so that it cannot starve its neighbours.
//!
//! Not here: where the sockets come from ([`crate::outbound`], [`crate::inbound`]) and the idle time-out, which the
//! worker's sweep imposes through [`Meter::stop`].

mod flow;

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    io,
    task::{Context, Poll, Waker},
};

use self::flow::{Fault, Flow};
use crate::{
    buffers::Buffers,
    close::{CloseReason, Side},
    stream::Stream,
};

/// Ticks without a byte after which a connection is between two exchanges: as long as requests on kept connections have when an agent
/// leaves.
const QUIET_TICKS: u32 = 10;

/// What a relay needs of its worker.
#[derive(Debug)]
pub(crate) struct RelayEnv<'a> {
    /// Memory and pipes.
    pub(crate) buffers: &'a Buffers,
    /// The worker's coarse clock, in ticks.
    pub(crate) tick: &'a Cell<u32>,
    /// Bulk flows may be spliced.
    pub(crate) splice: bool,
}

/// The counters of a connection, and the worker's way to end it.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Bytes handed to the server's side.
    to_server: Cell<u64>,
    /// Bytes handed to the client's side.
    to_client: Cell<u64>,
    /// Tick of the last byte.
    active: Cell<u32>,
    /// Tick since which one side has been reset while bytes it sent wait for the other.
    lingering: Cell<Option<(u32, CloseReason)>>,
    stopped: Cell<Option<CloseReason>>,
    finishing: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Meter {
    pub(crate) fn to_server(&self) -> u64 {
        self.to_server.get()
    }

    pub(crate) fn to_client(&self) -> u64 {
        self.to_client.get()
    }

    /// Tick of the last byte.
    pub(crate) fn active(&self) -> u32 {
        self.active.get()
    }

    /// Starts the idle clock.
    pub(crate) fn touch(&self, tick: u32) {
        self.active.set(tick);
    }

    /// Since when, and with which reason, a reset waits to be passed on.
    pub(crate) fn lingering(&self) -> Option<(u32, CloseReason)> {
        self.lingering.get()
    }

    /// Counts bytes handed to the server's side.
    pub(crate) fn add_to_server(&self, bytes: u64, tick: u32) {
        self.count(&self.to_server, bytes, tick);
    }

    /// Counts bytes handed to the client's side.
    pub(crate) fn add_to_client(&self, bytes: u64, tick: u32) {
        self.count(&self.to_client, bytes, tick);
    }

    /// Starts the clock of a reset that waits to be passed on, if it does not run yet.
    pub(crate) fn linger(&self, reason: CloseReason, tick: u32) {
        if self.lingering.get().is_none() {
            self.lingering.set(Some((tick, reason)));
        }
    }

    /// Ends the connection with a reset at its next turn. The first reason stays.
    pub(crate) fn stop(&self, reason: CloseReason) {
        if self.stopped.get().is_none() {
            self.stopped.set(Some(reason));
        }
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Lets a connection that carries requests end behind those that have begun. Others end as they would.
    pub(crate) fn finish(&self) {
        self.finishing.set(true);
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Whether no further request is waited for.
    pub(crate) fn is_finishing(&self) -> bool {
        self.finishing.get()
    }

    /// The reason given to [`Meter::stop`], after registering the task for it.
    pub(crate) fn poll_stopped(&self, cx: &Context<'_>) -> Option<CloseReason> {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        self.stopped.get()
    }
}

/// Carries bytes until the connection ends, and says why it did.
///
/// Cancel safety: dropping the future closes both sockets and gives back what was borrowed.
pub(crate) async fn relay(
    env: &RelayEnv<'_>,
    meter: &Meter,
    downstream: Stream,
    upstream: Stream,
) -> CloseReason {
    let mut relay = Relay {
        env,
        meter,
        downstream,
        upstream,
        request: Flow::new(env),
        response: Flow::new(env),
        failed: None,
    };
    let reason = loop {
        match poll_fn(|cx| relay.poll(cx)).await {
            Turn::Ended(reason) => break reason,
            // Through the reactor, so that other sockets' edges are seen in between.
            Turn::Yield => tokio::task::yield_now().await,
        }
    };
    if reason.resets() && !relay.leaves_in_order(reason) {
        relay.downstream.reset();
        relay.upstream.reset();
    }
    reason
}

struct Relay<'a> {
    env: &'a RelayEnv<'a>,
    meter: &'a Meter,
    downstream: Stream,
    upstream: Stream,
    /// From the client to the server.
    request: Flow<'a>,
    /// From the server to the client.
    response: Flow<'a>,
    /// The side that failed first, while what it had sent is still being delivered.
    failed: Option<(Side, CloseReason)>,
}

#[derive(Debug)]
enum Turn {
    Ended(CloseReason),
    Yield,
}

impl Relay<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        if let Some(reason) = self.meter.poll_stopped(cx) {
            return Poll::Ready(Turn::Ended(reason));
        }
        self.downstream.observe(cx);
        self.upstream.observe(cx);

        let tick = self.env.tick.get();
        let response_ended = self.response.is_ended();
        let moved = self.request.pump(&mut self.downstream, &mut self.upstream, response_ended);
        self.meter.count(&self.meter.to_server, self.request.take_moved(), tick);
        let more_request = self.settle(moved, Side::Downstream);

        let request_ended = self.request.is_ended();
        let moved = self.response.pump(&mut self.upstream, &mut self.downstream, request_ended);
        self.meter.count(&self.meter.to_client, self.response.take_moved(), tick);
        let more_response = self.settle(moved, Side::Upstream);

        if let Some(reason) = self.ended() {
            return Poll::Ready(Turn::Ended(reason));
        }
        if more_request || more_response { Poll::Ready(Turn::Yield) } else { Poll::Pending }
    }

    /// Takes the outcome of the flow whose source is on side `from`; true if it has more to do at once.
    fn settle(&mut self, moved: Result<bool, Fault>, from: Side) -> bool {
        let to = if from == Side::Downstream { Side::Upstream } else { Side::Downstream };
        match moved {
            Ok(more) => more,
            Err(Fault::Source(error)) => {
                self.failed.get_or_insert((from, reason_for(from, &error)));
                false
            }
            Err(Fault::Sink(error)) => {
                self.failed.get_or_insert((to, reason_for(to, &error)));
                // What the failed side sent before is still owed to the other one.
                match to {
                    Side::Downstream => self.downstream.assume_readable(),
                    Side::Upstream | Side::Local => self.upstream.assume_readable(),
                }
                true
            }
        }
    }

    fn ended(&mut self) -> Option<CloseReason> {
        if self.failed.is_none() {
            if self.request.is_ended() && self.response.is_ended() {
                return Some(CloseReason::Finished);
            }
            // A side that has sent its end and then hangs up has reset: only the direction towards it was left.
            if self.downstream.is_hung_up() && self.request.is_ended() && !self.response.is_ended() {
                return Some(CloseReason::ClientReset);
            }
            if self.upstream.is_hung_up() && self.response.is_ended() && !self.request.is_ended() {
                return Some(CloseReason::UpstreamReset);
            }
        }
        match self.failed {
            Some((Side::Downstream, reason)) if self.request.is_ended() => return Some(reason),
            Some((Side::Upstream | Side::Local, reason)) if self.response.is_ended() => return Some(reason),
            Some((_, reason)) => self.linger(reason),
            None if self.downstream.is_hung_up() => self.linger(CloseReason::ClientReset),
            None if self.upstream.is_hung_up() => self.linger(CloseReason::UpstreamReset),
            None => {}
        }
        None
    }

    fn linger(&self, reason: CloseReason) {
        self.meter.linger(reason, self.env.tick.get());
    }

    /// Whether both sides may learn of the end by an orderly one: the agent leaves, and neither has said anything for a while, so that
    /// nothing is cut off in its middle. A side that has sent something meanwhile is reset by the kernel all the same.
    fn leaves_in_order(&self, reason: CloseReason) -> bool {
        let quiet = self.env.tick.get().wrapping_sub(self.meter.active.get());
        reason == CloseReason::Drained
            && self.failed.is_none()
            && quiet >= QUIET_TICKS
            && self.request.holds_nothing()
            && self.response.holds_nothing()
    }
}

impl Meter {
    fn count(&self, bytes: &Cell<u64>, moved: u64, tick: u32) {
        if moved > 0 {
            bytes.set(bytes.get() + moved);
            self.active.set(tick);
        }
    }
}

/// Why a connection ended whose socket on `side` failed.
pub(crate) fn reason_for(side: Side, error: &io::Error) -> CloseReason {
    let reset = matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted
    );
    match (side, reset) {
        (Side::Downstream, true) => CloseReason::ClientReset,
        (Side::Downstream, false) => CloseReason::ClientLost,
        (Side::Upstream | Side::Local, true) => CloseReason::UpstreamReset,
        (Side::Upstream | Side::Local, false) => CloseReason::UpstreamLost,
    }
}
