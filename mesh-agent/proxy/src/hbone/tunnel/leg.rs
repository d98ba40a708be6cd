//! One stream of a tunnel and the app's socket behind it.
//!
//! Invariants:
//! - What arrived for the app is delivered before its end or reset is; at most a stream window of it is kept.
//! - `outcome` is set once; the connection's task takes the leg away then.

use std::{collections::VecDeque, io, rc::Rc, task::Waker};

use super::{super::h2::StreamKey, Role};
use crate::{
    close::{CloseReason, Side},
    connections::Live,
    relay::reason_for,
    stream::{Io, Stream},
};

/// Records read from an app at once: small until the app proves to be bulk.
const LEVELS: [usize; 3] = [1, 4, super::super::workspace::SLOTS_MAX];
const FULL_READS_FOR_MORE: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    Open,
    /// The end has arrived and waits for what was before it.
    Ending,
    Ended,
}

#[derive(Debug)]
pub(super) struct Leg {
    pub(super) key: StreamKey,
    pub(super) app: Option<Stream>,
    pub(super) live: Option<Rc<Live>>,
    /// Bytes the app did not take.
    pub(super) held: Held,
    /// From the app to the peer.
    pub(super) up: Half,
    /// From the peer to the app.
    pub(super) down: Half,
    /// The tunnel's side is gone.
    pub(super) lost: Option<CloseReason>,
    /// The app's socket failed.
    pub(super) app_failed: Option<CloseReason>,
    pub(super) outcome: Option<CloseReason>,
    /// A server's answer.
    pub(super) status: Option<u16>,
    pub(super) waker: Option<Waker>,
    /// In the queue of those who wait for the tunnel's socket.
    pub(super) queued: bool,
    /// Waits for a window.
    pub(super) starved: bool,
    /// There is no socket: its task takes and gives the bytes itself.
    pub(super) direct: bool,
    level: u8,
    full: u8,
}

#[derive(Debug, Default)]
pub(super) struct Held {
    pieces: VecDeque<Box<[u8]>>,
    start: usize,
    len: usize,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn push(&mut self, piece: Box<[u8]>) {
        self.len += piece.len();
        self.pieces.push_back(piece);
    }

    /// Drops everything; returns how much it was.
    pub(super) fn clear(&mut self) -> usize {
        self.pieces = VecDeque::new();
        self.start = 0;
        std::mem::take(&mut self.len)
    }

    /// Takes the next bytes out; returns how many.
    pub(super) fn read(&mut self, into: &mut [u8]) -> usize {
        let mut all = 0;
        while let Some(piece) = self.pieces.front()
            && all < into.len()
        {
            let count = (piece.len() - self.start).min(into.len() - all);
            into[all..all + count].copy_from_slice(&piece[self.start..self.start + count]);
            all += count;
            self.len -= count;
            self.start += count;
            if self.start == piece.len() {
                self.start = 0;
                self.pieces.pop_front();
            }
        }
        if self.pieces.is_empty() {
            self.pieces = VecDeque::new();
        }
        all
    }

    fn write(&mut self, app: &mut Stream) -> io::Result<usize> {
        let mut all = 0;
        while let Some(piece) = self.pieces.front() {
            if !app.is_writable() {
                break;
            }
            let Io::Bytes(sent) = app.write(&piece[self.start..])? else { break };
            all += sent;
            self.len -= sent;
            self.start += sent;
            if self.start == piece.len() {
                self.start = 0;
                self.pieces.pop_front();
            }
        }
        if self.pieces.is_empty() {
            self.pieces = VecDeque::new();
        }
        Ok(all)
    }
}

impl Leg {
    pub(super) fn new(key: StreamKey) -> Self {
        Self {
            key,
            app: None,
            live: None,
            held: Held::default(),
            up: Half::Open,
            down: Half::Open,
            lost: None,
            app_failed: None,
            outcome: None,
            status: None,
            waker: None,
            queued: false,
            starved: false,
            direct: false,
            level: 0,
            full: 0,
        }
    }

    /// Whether there may be bytes of the app to carry.
    pub(super) fn is_readable(&self) -> bool {
        self.up == Half::Open && self.outcome.is_none() && self.app.as_ref().is_some_and(Stream::is_readable)
    }

    /// Writes what is held; returns how much the app took.
    pub(super) fn flush(&mut self, role: Role, tick: u32) -> usize {
        let Some(app) = self.app.as_mut().filter(|_| !self.held.is_empty()) else { return 0 };
        match self.held.write(app) {
            Ok(sent) => {
                self.count_down(role, sent, tick);
                sent
            }
            Err(error) => {
                self.fail_app(role, &error);
                0
            }
        }
    }

    /// The app's socket failed while it was written to: what it had sent before is still owed to the peer.
    pub(super) fn fail_app(&mut self, role: Role, error: &io::Error) {
        self.app_failed.get_or_insert(reason_for(role.app_side(), error));
        self.down = Half::Ended;
        if let Some(app) = &mut self.app {
            app.assume_readable();
        }
    }

    /// The app's socket failed while it was read.
    pub(super) fn fail_reading(&mut self, role: Role, error: &io::Error) {
        self.app_failed.get_or_insert(reason_for(role.app_side(), error));
        self.up = Half::Ended;
    }

    /// The tunnel's side is gone; what had arrived is still delivered.
    pub(super) fn lose(&mut self, reason: CloseReason) {
        self.lost.get_or_insert(reason);
        self.up = Half::Ended;
    }

    pub(super) fn count_down(&self, role: Role, bytes: usize, tick: u32) {
        if let Some(live) = &self.live {
            match role {
                Role::Client => live.meter.add_to_client(bytes as u64, tick),
                Role::Server => live.meter.add_to_server(bytes as u64, tick),
            }
        }
    }

    pub(super) fn count_up(&self, role: Role, bytes: usize, tick: u32) {
        if let Some(live) = &self.live {
            match role {
                Role::Client => live.meter.add_to_server(bytes as u64, tick),
                Role::Server => live.meter.add_to_client(bytes as u64, tick),
            }
        }
    }

    /// Records to read next.
    pub(super) fn records(&self) -> usize {
        LEVELS[usize::from(self.level)]
    }

    /// Adapts the size of reads to what the last one brought.
    pub(super) fn learn(&mut self, got: usize, want: usize) {
        if got == want {
            self.full = self.full.saturating_add(1);
            if self.full >= FULL_READS_FOR_MORE && usize::from(self.level) + 1 < LEVELS.len() {
                self.level += 1;
                self.full = 0;
            }
        } else {
            self.full = 0;
            if got < want / 4 {
                self.level = self.level.saturating_sub(1);
            }
        }
    }

    /// What is to be done about the ends of both sides.
    pub(super) fn settle(&mut self, role: Role, tick: u32) -> Settled {
        if self.outcome.is_some() {
            return Settled::Done;
        }
        if self.down == Half::Ending && self.held.is_empty() {
            // With both halves over, the close that follows says it without a call of its own.
            if let Some(app) = self.app.as_ref().filter(|_| self.up != Half::Ended) {
                app.shutdown_write();
            }
            self.down = Half::Ended;
        }
        let hung_up = self.app.as_ref().is_some_and(Stream::is_hung_up);
        let app_reset = match role.app_side() {
            Side::Downstream => CloseReason::ClientReset,
            Side::Upstream | Side::Local => CloseReason::UpstreamReset,
        };
        if let Some(reason) = self.lost {
            if self.held.is_empty() || self.app.is_none() {
                return self.end(reason, false);
            }
            self.linger(reason, tick);
        } else if let Some(reason) = self.app_failed {
            if self.up == Half::Ended {
                return self.end(reason, true);
            }
            self.linger(reason, tick);
        } else if self.up == Half::Ended && self.down == Half::Ended {
            return self.end(CloseReason::Finished, false);
        } else if hung_up && self.up == Half::Ended {
            // It has sent its end and then hung up: only the direction towards it was left.
            return self.end(app_reset, true);
        } else if hung_up {
            self.linger(app_reset, tick);
        }
        Settled::Open
    }

    fn end(&mut self, reason: CloseReason, reset: bool) -> Settled {
        self.outcome = Some(reason);
        self.wake();
        if reset { Settled::ResetPeer } else { Settled::Done }
    }

    fn linger(&self, reason: CloseReason, tick: u32) {
        if let Some(live) = &self.live {
            live.meter.linger(reason, tick);
        }
    }

    pub(super) fn wake(&self) {
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    Open,
    Done,
    /// The peer's stream must be reset.
    ResetPeer,
}
