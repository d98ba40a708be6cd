//! From apps to the peer: reading into records, sealing, sending, and waiting in turn.

use super::{
    super::{
        h2::StreamKey,
        workspace::{DATA_MAX, Outbox, SLOTS_MAX, Workspace},
    },
    leg::Half,
    state::{State, TunnelEnd},
};
use crate::stream::Io;

impl State {
    /// Carries bytes of an app until it has none, somebody blocks (false) or the turn is used up (true).
    pub(super) fn pump(&mut self, ws: &Workspace, key: StreamKey, rounds: u32) -> Result<bool, TunnelEnd> {
        let tick = ws.tick.get();
        for _ in 0..rounds {
            let Some(leg) = self.legs.get(&key.id()) else { return Ok(false) };
            if leg.direct {
                // Its task has what is to be sent.
                leg.wake();
                return Ok(false);
            }
            if !leg.is_readable() {
                return Ok(false);
            }
            if !self.send_unsent(ws)? {
                self.enqueue(key);
                return Ok(false);
            }
            let outbox = &mut *ws.outbox.borrow_mut();
            outbox.clear();
            self.stage_control(outbox)?;
            let window = self.h2.send_capacity(key);
            let chunk = self.h2.max_data().min(DATA_MAX);
            let Some(leg) = self.legs.get_mut(&key.id()) else { return Ok(false) };
            if window == 0 {
                leg.starved = true;
                self.transmit(ws, outbox)?;
                return Ok(false);
            }
            let want = window.min(leg.records() * chunk);
            let Some(app) = &mut leg.app else { return Ok(false) };
            match outbox.read(app, want, chunk) {
                Ok(Io::Blocked) => {
                    self.transmit(ws, outbox)?;
                    return Ok(false);
                }
                Ok(Io::Bytes(0)) => {
                    leg.up = Half::Ended;
                    // Behind a failed write this is what is left of a reset: no end that the app meant.
                    if leg.app_failed.is_none() {
                        self.h2.end(key);
                    }
                    self.settle(tick, key.id());
                    self.stage_control(outbox)?;
                    self.transmit(ws, outbox)?;
                    return Ok(false);
                }
                Ok(Io::Bytes(got)) => {
                    leg.learn(got, want);
                    leg.count_up(self.role, got, tick);
                    let mut left = got;
                    while left > 0 {
                        let size = left.min(chunk);
                        left -= size;
                        // Within the window that was asked for just now.
                        let Ok(head) = self.h2.data_frame(key, size, false) else { return Ok(false) };
                        outbox.seal_data(&mut self.session, head, size)?;
                    }
                    self.transmit(ws, outbox)?;
                }
                Err(error) => {
                    leg.fail_reading(self.role, &error);
                    self.settle(tick, key.id());
                    self.stage_control(outbox)?;
                    self.transmit(ws, outbox)?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Sends bytes of a leg without a socket; `None` when it has to wait for the tunnel's socket or a window, and will be woken.
    pub(super) fn send(
        &mut self,
        ws: &Workspace,
        key: StreamKey,
        bytes: &[u8],
    ) -> Result<Option<usize>, TunnelEnd> {
        if !self.send_unsent(ws)? {
            self.enqueue(key);
            return Ok(None);
        }
        let outbox = &mut *ws.outbox.borrow_mut();
        outbox.clear();
        self.stage_control(outbox)?;
        let window = self.h2.send_capacity(key);
        let chunk = self.h2.max_data().min(DATA_MAX);
        let Some(leg) = self.legs.get_mut(&key.id()) else { return Ok(None) };
        if window == 0 {
            leg.starved = true;
            self.transmit(ws, outbox)?;
            return Ok(None);
        }
        let bytes = &bytes[..bytes.len().min(window).min(SLOTS_MAX * chunk)];
        leg.count_up(self.role, bytes.len(), ws.tick.get());
        for piece in bytes.chunks(chunk) {
            // Within the window that was asked for just now.
            let Ok(head) = self.h2.data_frame(key, piece.len(), false) else { break };
            outbox.copy(piece);
            outbox.seal_data(&mut self.session, head, piece.len())?;
        }
        self.transmit(ws, outbox)?;
        Ok(Some(bytes.len()))
    }

    /// Sends control frames, if there are any and the socket takes them.
    pub(super) fn flush(&mut self, ws: &Workspace) -> Result<(), TunnelEnd> {
        if !self.send_unsent(ws)? || (self.h2.output().is_empty() && !self.session.owes_update()) {
            return Ok(());
        }
        let outbox = &mut *ws.outbox.borrow_mut();
        outbox.clear();
        self.stage_control(outbox)?;
        self.transmit(ws, outbox)
    }

    /// The same for those who cannot pass an error on.
    pub(super) fn flush_or_fail(&mut self, ws: &Workspace) {
        if self.is_over() {
            return;
        }
        if let Err(end) = self.flush(ws) {
            self.fail(ws, end);
        }
    }

    /// Serves those who wait for the socket, one read each; true if there are more and it takes more.
    pub(super) fn serve_queue(&mut self, ws: &Workspace, mut legs: u32) -> Result<bool, TunnelEnd> {
        while !self.queue.is_empty() {
            if !self.send_unsent(ws)? {
                return Ok(false);
            }
            if legs == 0 {
                return Ok(true);
            }
            legs -= 1;
            let Some(key) = self.queue.pop_front() else { break };
            if let Some(leg) = self.legs.get_mut(&key.id()) {
                leg.queued = false;
            }
            if self.pump(ws, key, 1)? {
                self.enqueue(key);
            }
        }
        Ok(false)
    }

    pub(super) fn enqueue(&mut self, key: StreamKey) {
        if let Some(leg) = self.legs.get_mut(&key.id())
            && !std::mem::replace(&mut leg.queued, true)
        {
            self.queue.push_back(key);
        }
    }

    /// Tells the peer why it ends, as far as the socket takes it.
    pub(super) fn farewell(&mut self, ws: &Workspace, end: &TunnelEnd) {
        let outbox = &mut *ws.outbox.borrow_mut();
        outbox.clear();
        if self.send_unsent(ws).is_ok_and(|sent| sent) && self.stage_control(outbox).is_ok() {
            let last = match end {
                TunnelEnd::Tls(error) => error.alert().map(|code| self.session.fatal(code)),
                _ => Some(self.session.close_notify()),
            };
            if let Some(Ok(alert)) = last {
                outbox.push(&alert);
            }
            self.stream.write(outbox.bytes()).ok();
        }
    }

    /// Whether the socket has taken everything before.
    fn send_unsent(&mut self, ws: &Workspace) -> Result<bool, TunnelEnd> {
        if let Some(unsent) = &mut self.unsent {
            while !unsent.bytes().is_empty() {
                if !self.stream.is_writable() {
                    return Ok(false);
                }
                match self.stream.write(unsent.bytes()).map_err(TunnelEnd::Socket)? {
                    Io::Bytes(count) => unsent.advance(count),
                    Io::Blocked => return Ok(false),
                }
            }
            if let Some(sent) = self.unsent.take() {
                ws.give_back(sent);
            }
        }
        Ok(self.stream.is_writable())
    }

    fn stage_control(&mut self, outbox: &mut Outbox) -> Result<(), TunnelEnd> {
        if let Some(update) = self.session.before_batch()? {
            outbox.push(&update);
        }
        if !self.h2.output().is_empty() {
            outbox.seal(&mut self.session, self.h2.output())?;
            self.h2.clear_output();
        }
        Ok(())
    }

    fn transmit(&mut self, ws: &Workspace, outbox: &mut Outbox) -> Result<(), TunnelEnd> {
        if outbox.is_empty() {
            return Ok(());
        }
        let sent = match self.stream.write(outbox.bytes()).map_err(TunnelEnd::Socket)? {
            Io::Bytes(sent) => sent,
            Io::Blocked => 0,
        };
        if sent < outbox.bytes().len() {
            self.unsent = Some(ws.keep(outbox, sent));
        }
        Ok(())
    }
}
