//! The state of a tunnel: who works on it when, how it ends, and what its legs hear of that.

use std::{
    collections::{HashMap, VecDeque},
    io,
    task::{Context, Poll, Waker},
};

use super::{
    super::{
        h2::{Connection, ErrorCode, Headers, OpenError, StreamKey, Violation},
        tls::{TlsError, handshake::Established, session::Session},
        workspace::{Unsent, Workspace},
    },
    Role,
    leg::{Half, Leg, Settled},
};
use crate::{close::CloseReason, stream::Stream};

/// Reads of a tunnel before other tasks get a turn.
const READS_MAX: u32 = 8;
/// Legs served in one turn of the tunnel's task.
const SERVED_MAX: u32 = 16;

/// Why a tunnel ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TunnelEnd {
    /// The peer closed it in order, or both sides had nothing left to say.
    #[error("closed in order")]
    Closed,
    /// The connection ended without an end of data.
    #[error("the connection was cut")]
    Cut,
    /// The peer is trusted no more.
    #[error("the peer is trusted no more")]
    Distrusted,
    /// The peer broke HTTP/2.
    #[error("HTTP/2: {0}")]
    Http(Violation),
    /// This agent ends it.
    #[error("ended by this agent")]
    Stopped,
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(io::Error),
    /// TLS failed.
    #[error("TLS: {0}")]
    Tls(#[from] TlsError),
}

impl TunnelEnd {
    /// Metric label.
    pub(crate) const fn as_str(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Cut => "cut",
            Self::Distrusted => "distrusted",
            Self::Http(violation) => violation.as_str(),
            Self::Stopped => "stopped",
            Self::Socket(_) => "socket",
            Self::Tls(_) => "tls",
        }
    }

    /// Every label.
    pub(crate) fn labels() -> impl Iterator<Item = &'static str> {
        let plain = ["closed", "cut", "distrusted", "stopped", "socket", "tls"];
        plain.into_iter().chain(Violation::ALL.into_iter().map(Violation::as_str))
    }
}

/// A request of a client.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) key: StreamKey,
    pub(crate) headers: Box<Headers>,
}

/// What a turn of the tunnel's task came to.
#[derive(Debug)]
pub(crate) enum Turn {
    /// It is over.
    Ended(TunnelEnd),
    /// Requests to be answered.
    Opened(Vec<Opened>),
    /// There is more to do at once; others first.
    Yield,
}

pub(crate) struct State {
    pub(super) role: Role,
    pub(super) stream: Stream,
    pub(super) session: Session,
    pub(super) h2: Connection,
    pub(super) legs: HashMap<u32, Leg>,
    /// The beginning of a record.
    pub(super) partial: Vec<u8>,
    /// Sealed bytes that the socket did not take.
    pub(super) unsent: Option<Unsent>,
    /// Legs that wait for the socket.
    pub(super) queue: VecDeque<StreamKey>,
    pub(super) opened: Vec<Opened>,
    /// Reading waits for apps to take what is kept.
    pub(super) paused: bool,
    pub(super) held: usize,
    waker: Option<Waker>,
    end: Option<Option<TunnelEnd>>,
    idle_since: u32,
}

impl State {
    pub(super) fn new(
        role: Role,
        stream: Stream,
        established: Established,
        h2: Connection,
        tick: u32,
    ) -> Self {
        let Established { session, unsent, rest, .. } = established;
        Self {
            role,
            stream,
            session,
            h2,
            legs: HashMap::new(),
            partial: rest,
            unsent: (!unsent.is_empty()).then(|| Unsent::of(unsent)),
            queue: VecDeque::new(),
            opened: Vec::new(),
            paused: false,
            held: 0,
            waker: None,
            end: None,
            idle_since: tick,
        }
    }

    pub(super) fn poll(&mut self, ws: &Workspace, cx: &mut Context<'_>) -> Poll<Turn> {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waker = Some(cx.waker().clone());
        }
        self.stream.observe(cx);
        let mut more = false;
        if self.end.is_none() {
            match self.work(ws) {
                Ok(again) => more = again,
                Err(end) => self.fail(ws, end),
            }
        }
        if !self.opened.is_empty() {
            return Poll::Ready(Turn::Opened(std::mem::take(&mut self.opened)));
        }
        if self.end.is_none() && self.h2.is_finished() && self.legs.is_empty() && self.unsent.is_none() {
            self.fail(ws, TunnelEnd::Closed);
        }
        if let Some(end) = &mut self.end {
            return Poll::Ready(Turn::Ended(end.take().unwrap_or(TunnelEnd::Stopped)));
        }
        if more { Poll::Ready(Turn::Yield) } else { Poll::Pending }
    }

    fn work(&mut self, ws: &Workspace) -> Result<bool, TunnelEnd> {
        // First, so that a backlog of control frames keeps from reading only while the socket does not take it: its edge
        // comes back here.
        self.flush(ws)?;
        let mut more = self.read(ws, READS_MAX)?;
        more |= self.serve_queue(ws, SERVED_MAX)?;
        self.flush(ws)?;
        Ok(more)
    }

    pub(super) fn open(&mut self, fields: &[(&str, &str)]) -> Result<StreamKey, OpenError> {
        if self.end.is_some() {
            return Err(OpenError::GoingAway);
        }
        let key = self.h2.open(fields, false)?;
        self.legs.insert(key.id(), Leg::new(key));
        Ok(key)
    }

    pub(super) fn room(&self) -> u32 {
        if self.end.is_some() { 0 } else { self.h2.room() }
    }

    pub(super) fn streams(&self) -> usize {
        self.legs.len()
    }

    pub(super) fn is_blocked(&self) -> bool {
        self.unsent.is_some()
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.end.is_some() || self.h2.takes_no_more()
    }

    pub(super) fn idle_since(&self) -> Option<u32> {
        self.legs.is_empty().then_some(self.idle_since)
    }

    pub(super) fn is_over(&self) -> bool {
        self.end.is_some()
    }

    pub(super) fn shutdown(&mut self, ws: &Workspace) {
        self.h2.shutdown();
        self.flush_or_fail(ws);
        self.wake();
    }

    pub(super) fn go_away(&mut self, code: ErrorCode) {
        if self.end.is_none() {
            self.h2.go_away(code);
        }
    }

    /// Ends the tunnel: the peer is told as far as the socket takes it, every leg hears of it.
    pub(super) fn fail(&mut self, ws: &Workspace, end: TunnelEnd) {
        if self.end.is_some() {
            return;
        }
        if !matches!(end, TunnelEnd::Socket(_) | TunnelEnd::Cut) {
            self.farewell(ws, &end);
        }
        if matches!(end, TunnelEnd::Closed) {
            // The peer may still be reading; a close with unread bytes would reset what it has not read yet.
            self.stream.shutdown_write();
        }
        self.end = Some(Some(end));
        let reason = CloseReason::TunnelLost;
        let tick = ws.tick.get();
        for leg in self.legs.values_mut() {
            // An app that has every byte of its peer and has said all it had to has lost nothing.
            if !(leg.up == Half::Ended && leg.down != Half::Open) {
                leg.lose(reason);
            }
            leg.settle(self.role, tick);
            leg.wake();
        }
        self.queue.clear();
        self.wake();
    }

    /// Frees one leg.
    pub(super) fn remove(&mut self, ws: &Workspace, key: StreamKey) -> Option<Leg> {
        let mut leg = self.legs.remove(&key.id())?;
        let held = leg.held.clear();
        self.held -= held;
        ws.release(held);
        if leg.queued {
            self.queue.retain(|queued| *queued != key);
        }
        if self.legs.is_empty() {
            self.idle_since = ws.tick.get();
            if self.is_leaving() {
                // It was what the end waited for.
                self.wake();
            }
        }
        if self.paused {
            self.wake();
        }
        Some(leg)
    }

    pub(super) fn release_all(&mut self, ws: &Workspace) {
        ws.release(std::mem::take(&mut self.held));
    }

    /// Looks at the ends of a leg after something changed.
    pub(super) fn settle(&mut self, tick: u32, id: u32) {
        let Some(leg) = self.legs.get_mut(&id) else { return };
        if leg.settle(self.role, tick) == Settled::ResetPeer {
            self.h2.reset(leg.key, ErrorCode::CONNECT_ERROR);
        }
    }

    pub(super) fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}
