//! From the peer to apps: reading records, opening them in place, writing their data straight to sockets.

use std::{
    io::{IoSlice, Write},
    ops::Range,
    time::Instant,
};

use super::{
    super::{
        h2::{Cause, ErrorCode, Event, StreamKey},
        tls::session::Opened as Record,
        workspace::{READ, Workspace},
    },
    Role,
    leg::{Half, Leg},
    state::{Opened, State, TunnelEnd},
};
use crate::{
    close::{CloseReason, Direction},
    stream::Io,
};

/// Slices of one write to an app.
const SLICES_MAX: usize = 64;
/// Control frames that may wait for the socket before reading stops.
const BACKLOG_MAX: usize = 64 << 10;

/// Data of one stream, found in a read and not yet delivered.
#[derive(Default)]
struct Batch {
    key: Option<StreamKey>,
    ranges: Vec<Range<usize>>,
}

impl State {
    /// Reads and delivers until nothing is there (false) or the turn is used up (true).
    pub(super) fn read(&mut self, ws: &Workspace, reads: u32) -> Result<bool, TunnelEnd> {
        let incoming = &mut *ws.incoming.borrow_mut();
        if !self.partial.is_empty() && self.h2_is_fresh() {
            // What came behind the handshake may be whole records already.
            let kept = std::mem::take(&mut self.partial);
            let at = kept.len().min(incoming.len());
            incoming[..at].copy_from_slice(&kept[..at]);
            self.take(ws, incoming, at)?;
        }
        for _ in 0..reads {
            self.paused = self.held > 0 && ws.is_full() || self.h2.output().len() > BACKLOG_MAX;
            if !self.stream.is_readable() || self.paused {
                return Ok(false);
            }
            let kept = self.partial.len();
            incoming[..kept].copy_from_slice(&self.partial);
            let got = match self.stream.read(&mut incoming[kept..kept + READ]).map_err(TunnelEnd::Socket)? {
                Io::Blocked => return Ok(false),
                Io::Bytes(0) => return Err(TunnelEnd::Cut),
                Io::Bytes(got) => got,
            };
            self.take(ws, incoming, kept + got)?;
        }
        Ok(true)
    }

    /// Opens the records in `incoming[..filled]` and keeps the beginning of the last.
    fn take(&mut self, ws: &Workspace, incoming: &mut [u8], filled: usize) -> Result<(), TunnelEnd> {
        let now = Instant::now();
        let mut batch = Batch::default();
        let mut at = 0;
        loop {
            match self.session.open(&mut incoming[at..filled])? {
                Record::Partial => break,
                Record::Silent { end } => at += end,
                Record::Data { range, end } => {
                    let content = at + range.start..at + range.end;
                    self.frames(ws, incoming, content, now, &mut batch)?;
                    at += end;
                }
                Record::Closed => {
                    self.deliver(ws, incoming, &mut batch);
                    return Err(TunnelEnd::Closed);
                }
            }
        }
        self.deliver(ws, incoming, &mut batch);
        if at == filled {
            self.partial = Vec::new();
        } else {
            self.partial.clear();
            self.partial.extend_from_slice(&incoming[at..filled]);
        }
        Ok(())
    }

    fn frames(
        &mut self,
        ws: &Workspace,
        incoming: &[u8],
        content: Range<usize>,
        now: Instant,
        batch: &mut Batch,
    ) -> Result<(), TunnelEnd> {
        let bytes = &incoming[..content.end];
        let mut at = content.start;
        loop {
            let event = match self.h2.receive(now, bytes, &mut at) {
                Ok(Some(event)) => event,
                Ok(None) => return Ok(()),
                Err(violation) => {
                    self.deliver(ws, incoming, batch);
                    return Err(TunnelEnd::Http(violation));
                }
            };
            match event {
                Event::Data { stream, range, end } => {
                    if batch.key != Some(stream) || batch.ranges.len() == SLICES_MAX {
                        self.deliver(ws, incoming, batch);
                    }
                    batch.key = Some(stream);
                    batch.ranges.push(range);
                    if end {
                        self.deliver(ws, incoming, batch);
                        self.end_of(ws, stream);
                    }
                }
                Event::WindowOpened { stream: Some(stream) } => self.window_opened(stream),
                Event::WindowOpened { stream: None } | Event::SettingsChanged => {
                    let starved: Vec<StreamKey> =
                        self.legs.values().filter(|leg| leg.starved).map(|leg| leg.key).collect();
                    starved.into_iter().for_each(|key| self.window_opened(key));
                }
                Event::Refused { violation } => {
                    tracing::debug!(%violation, "request in a tunnel refused");
                    ws.metrics.closed(Direction::Inbound, CloseReason::HboneHeaders).inc();
                }
                Event::GoAway { last, code } => {
                    tracing::debug!(last, ?code, "the other side of a tunnel goes away");
                }
                other => {
                    // In the order of the wire: what was sent before is delivered before.
                    self.deliver(ws, incoming, batch);
                    self.obey(ws, other);
                }
            }
        }
    }

    fn obey(&mut self, ws: &Workspace, event: Event) {
        let tick = ws.tick.get();
        match event {
            Event::Opened { stream, headers, end } => {
                let mut leg = Leg::new(stream);
                if end {
                    leg.down = Half::Ending;
                }
                self.legs.insert(stream.id(), leg);
                self.opened.push(Opened { key: stream, headers });
            }
            Event::Response { stream, status, end } => {
                let Some(leg) = self.legs.get_mut(&stream.id()) else { return };
                leg.status = Some(status);
                if !(200..300).contains(&status) {
                    leg.lose(refusal(status));
                    self.h2.reset(stream, ErrorCode::CANCEL);
                } else {
                    if let Some(live) = &leg.live {
                        live.taken();
                    }
                    if end {
                        leg.down = Half::Ending;
                    }
                }
                leg.wake();
                self.settle(tick, stream.id());
            }
            Event::Ended { stream } => self.end_of(ws, stream),
            Event::Reset { stream, cause } => {
                let role = self.role;
                let Some(leg) = self.legs.get_mut(&stream.id()) else {
                    // Nobody holds its bytes any more.
                    return self.h2.reset(stream, ErrorCode::NO_ERROR);
                };
                leg.lose(match (cause, role) {
                    (Cause::Unprocessed, _) => CloseReason::TunnelRefused,
                    (Cause::Violation(_), _) => CloseReason::TunnelLost,
                    (Cause::Peer(_), Role::Client) => CloseReason::UpstreamReset,
                    (Cause::Peer(_), Role::Server) => CloseReason::ClientReset,
                });
                leg.wake();
                self.settle(tick, stream.id());
            }
            Event::Data { .. }
            | Event::WindowOpened { .. }
            | Event::SettingsChanged
            | Event::GoAway { .. }
            | Event::Refused { .. } => {}
        }
    }

    fn end_of(&mut self, ws: &Workspace, stream: StreamKey) {
        if let Some(leg) = self.legs.get_mut(&stream.id())
            && leg.down == Half::Open
        {
            leg.down = Half::Ending;
            if leg.direct {
                leg.wake();
            }
        }
        self.settle(ws.tick.get(), stream.id());
    }

    fn window_opened(&mut self, key: StreamKey) {
        if let Some(leg) = self.legs.get_mut(&key.id())
            && std::mem::replace(&mut leg.starved, false)
        {
            self.enqueue(key);
        }
    }

    /// Writes a batch to its app; what the app does not take is kept.
    fn deliver(&mut self, ws: &Workspace, incoming: &[u8], batch: &mut Batch) {
        let Some(key) = batch.key.take() else { return };
        let all: usize = batch.ranges.iter().map(ExactSizeIterator::len).sum();
        let role = self.role;
        let tick = ws.tick.get();
        let Some(leg) = self.legs.get_mut(&key.id()).filter(|leg| leg.down == Half::Open) else {
            // Nobody is left to take it.
            batch.ranges.clear();
            self.h2.consumed(key, all);
            return;
        };
        let mut sent = 0;
        if leg.held.is_empty()
            && let Some(app) = leg.app.as_mut().filter(|app| app.is_writable())
        {
            let outcome = match &*batch.ranges {
                [range] => app.write(&incoming[range.clone()]),
                ranges => {
                    let slices: Vec<IoSlice<'_>> =
                        ranges.iter().map(|range| IoSlice::new(&incoming[range.clone()])).collect();
                    app.write_by(all, |mut socket| socket.write_vectored(&slices))
                }
            };
            match outcome {
                Ok(Io::Bytes(count)) => sent = count,
                Ok(Io::Blocked) => {}
                Err(error) => leg.fail_app(role, &error),
            }
            leg.count_down(role, sent, tick);
        }
        if leg.app_failed.is_some() {
            batch.ranges.clear();
            self.h2.consumed(key, all);
            self.enqueue(key);
            self.settle(tick, key.id());
            return;
        }
        if sent < all {
            let mut rest = Vec::with_capacity(all - sent);
            let mut skip = sent;
            for range in &batch.ranges {
                let piece = &incoming[range.clone()];
                let from = skip.min(piece.len());
                skip -= from;
                rest.extend_from_slice(&piece[from..]);
            }
            ws.hold(rest.len());
            self.held += rest.len();
            leg.held.push(rest.into());
            if leg.direct {
                leg.wake();
            }
        }
        batch.ranges.clear();
        self.h2.consumed(key, sent);
    }

    /// Writes what is kept for an app that takes bytes again.
    pub(super) fn flush_held(&mut self, ws: &Workspace, key: StreamKey) {
        let (role, tick) = (self.role, ws.tick.get());
        let Some(leg) = self.legs.get_mut(&key.id()) else { return };
        let mut sent = leg.flush(role, tick);
        if leg.app_failed.is_some() {
            sent += leg.held.clear();
        }
        if sent > 0 {
            self.held -= sent;
            ws.release(sent);
            self.h2.consumed(key, sent);
            if self.paused {
                self.wake();
            }
        }
        self.settle(tick, key.id());
    }

    /// Whether the tunnel has not read from its socket yet.
    fn h2_is_fresh(&self) -> bool {
        !self.h2.is_settled()
    }
}

/// What a server's refusal means for the connection.
fn refusal(status: u16) -> CloseReason {
    match status {
        401 | 403 => CloseReason::PolicyDenied,
        503 => CloseReason::UpstreamRefused,
        504 => CloseReason::UpstreamTimeout,
        _ => CloseReason::TunnelRefused,
    }
}
