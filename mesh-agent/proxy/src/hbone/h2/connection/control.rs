//! Obeys control frames: SETTINGS, PING, GOAWAY, RST_STREAM, WINDOW_UPDATE.

use std::time::Instant;

use super::{
    super::{
        Cause, Event, StreamKey, Violation,
        frame::{
            ACK, DEFAULT_WINDOW, ErrorCode, Head, Kind, MAX_MAX_FRAME, MAX_STREAM, MAX_WINDOW, MIN_MAX_FRAME,
            WriteFrames, setting,
        },
        streams::Half,
    },
    Connection, DRAIN_PING, Leaving, Role,
};

/// Settings that one token of the allowance covers.
const SETTINGS_PER_TOKEN: u32 = 16;
/// Tokens that a WINDOW_UPDATE may cost are earned by each DATA frame we send.
pub(super) const UPDATES_PER_DATA: u32 = 10;

/// The first four bytes as a number; the length was checked with the frame header.
fn number(payload: &[u8]) -> Result<u32, Violation> {
    payload.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)).ok_or(Violation::FrameSize)
}

impl Connection {
    /// Obeys a frame whose payload is complete.
    pub(super) fn obey(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        match head.kind {
            Kind::Headers | Kind::Continuation => self.obey_headers(head, payload, now),
            Kind::Settings => self.obey_settings(head, payload, now),
            Kind::Ping => self.obey_ping(head, payload, now),
            Kind::GoAway => self.obey_go_away(payload, now),
            Kind::Reset => self.obey_reset(head, payload, now),
            Kind::WindowUpdate => self.obey_window_update(head, payload, now),
            Kind::Data | Kind::Priority | Kind::PushPromise | Kind::Unknown(_) => {
                Err(Violation::UnexpectedFrame)
            }
        }
    }

    fn obey_settings(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        if head.has(ACK) {
            if !payload.is_empty() {
                return Err(Violation::FrameSize);
            }
            if self.acknowledged {
                Self::spend(self.allowances.control.take(1, now), Violation::SettingsFlood)?;
            }
            self.obey_settings_ack();
            return Ok(None);
        }
        let cost = 1 + head.length / 6 / SETTINGS_PER_TOKEN;
        Self::spend(self.allowances.settings.take(cost, now), Violation::SettingsFlood)?;
        if !self.settled {
            self.settled = true;
            self.peer.max_streams = u32::MAX;
        }
        let mut initial_window = self.peer.initial_window;
        let (settings, _) = payload.as_chunks::<6>();
        for &[id_high, id_low, a, b, c, d] in settings {
            let value = u32::from_be_bytes([a, b, c, d]);
            match u16::from_be_bytes([id_high, id_low]) {
                setting::ENABLE_PUSH if value > u32::from(self.role == Role::Server) => {
                    return Err(Violation::BadSetting);
                }
                setting::MAX_CONCURRENT_STREAMS => self.peer.max_streams = value,
                setting::INITIAL_WINDOW_SIZE if value > MAX_WINDOW => return Err(Violation::WindowOverflow),
                setting::INITIAL_WINDOW_SIZE => initial_window = value,
                setting::MAX_FRAME_SIZE if !(MIN_MAX_FRAME..=MAX_MAX_FRAME).contains(&value) => {
                    return Err(Violation::BadSetting);
                }
                setting::MAX_FRAME_SIZE => self.peer.max_frame = value,
                setting::MAX_HEADER_LIST_SIZE => self.peer.max_header_list = value,
                // Our encoder uses no table, whatever its size.
                setting::HEADER_TABLE_SIZE => {}
                _ => {}
            }
        }
        self.move_send_windows(initial_window)?;
        self.reply()?;
        self.output.settings_ack();
        Ok(Some(Event::SettingsChanged))
    }

    /// A new initial window moves the windows of streams that exist (RFC 9113 §6.9.2), below zero if need be.
    fn move_send_windows(&mut self, initial: u32) -> Result<(), Violation> {
        let change = i64::from(initial) - i64::from(self.peer.initial_window);
        self.peer.initial_window = initial;
        if change == 0 {
            return Ok(());
        }
        for stream in self.streams.values_mut().filter(|stream| stream.local != Half::Ended) {
            stream.send_window += change;
            if stream.send_window > i64::from(MAX_WINDOW) {
                return Err(Violation::WindowOverflow);
            }
        }
        Ok(())
    }

    /// From now on the peer keeps to our windows, which may be smaller than the default it began with.
    fn obey_settings_ack(&mut self) {
        if self.acknowledged {
            return;
        }
        self.acknowledged = true;
        let change = i64::from(self.limits.stream_window) - i64::from(self.receive_initial);
        self.receive_initial = self.limits.stream_window;
        if change != 0 {
            self.streams.values_mut().for_each(|stream| stream.receive_window += change);
        }
    }

    fn obey_ping(&mut self, head: Head, payload: &[u8], now: Instant) -> Result<Option<Event>, Violation> {
        let payload: [u8; 8] = payload.try_into().map_err(|_| Violation::FrameSize)?;
        if !head.has(ACK) {
            Self::spend(self.allowances.control.take(1, now), Violation::PingFlood)?;
            self.reply()?;
            self.output.ping(ACK, payload);
            return Ok(None);
        }
        if payload == DRAIN_PING && self.leaving == Leaving::Announced {
            self.leaving = Leaving::Final;
            self.output.go_away(self.peer_last, ErrorCode::NO_ERROR);
        } else {
            Self::spend(self.allowances.control.take(1, now), Violation::PingFlood)?;
        }
        Ok(None)
    }

    fn obey_go_away(&mut self, payload: &[u8], now: Instant) -> Result<Option<Event>, Violation> {
        Self::spend(self.allowances.control.take(1, now), Violation::UselessFrameFlood)?;
        let last = number(payload)? & MAX_STREAM;
        let code = ErrorCode(number(payload.get(4..).unwrap_or_default())?);
        self.peer_leaves = true;
        // It may name fewer streams later, never more.
        self.peer_takes = self.peer_takes.min(last);
        Ok(Some(Event::GoAway { last: self.peer_takes, code }))
    }

    fn obey_reset(&mut self, head: Head, payload: &[u8], now: Instant) -> Result<Option<Event>, Violation> {
        if self.is_idle(head.stream) {
            return Err(Violation::BadStreamId);
        }
        let code = ErrorCode(number(payload)?);
        let Some(key) = self.streams.find(head.stream) else {
            Self::spend(self.allowances.closed.take(1, now), Violation::ClosedStreamFlood)?;
            return Ok(None);
        };
        let unanswered = self.streams.get(key).is_some_and(|stream| stream.local == Half::Waiting);
        if unanswered {
            Self::spend(self.allowances.resets.take(1, now), Violation::RapidReset)?;
        }
        let cause = if code == ErrorCode::REFUSED_STREAM && self.role == Role::Client {
            Cause::Unprocessed
        } else {
            Cause::Peer(code)
        };
        self.streams.reset(key);
        Ok(Some(Event::Reset { stream: key, cause }))
    }

    fn obey_window_update(
        &mut self,
        head: Head,
        payload: &[u8],
        now: Instant,
    ) -> Result<Option<Event>, Violation> {
        Self::spend(self.allowances.window_updates.take(1, now), Violation::WindowUpdateFlood)?;
        let increment = i64::from(number(payload)? & MAX_WINDOW);
        if head.stream == 0 {
            if increment == 0 {
                return Err(Violation::ZeroIncrement);
            }
            let was_shut = self.send_window <= 0;
            self.send_window += increment;
            if self.send_window > i64::from(MAX_WINDOW) {
                return Err(Violation::WindowOverflow);
            }
            return Ok((was_shut && self.send_window > 0).then_some(Event::WindowOpened { stream: None }));
        }
        if self.is_idle(head.stream) {
            return Err(Violation::BadStreamId);
        }
        let Some(key) = self.streams.find(head.stream) else {
            Self::spend(self.allowances.closed.take(1, now), Violation::ClosedStreamFlood)?;
            return Ok(None);
        };
        if increment == 0 {
            return self.refuse_stream(key, Violation::ZeroIncrement, now).map(Some);
        }
        let Some(stream) = self.streams.get_mut(key) else { return Ok(None) };
        let was_shut = stream.send_window <= 0;
        stream.send_window += increment;
        let window = stream.send_window;
        if window > i64::from(MAX_WINDOW) {
            return self.refuse_stream(key, Violation::WindowOverflow, now).map(Some);
        }
        Ok((was_shut && window > 0).then_some(Event::WindowOpened { stream: Some(key) }))
    }

    /// Resets a stream for what the peer did on it.
    pub(super) fn refuse_stream(
        &mut self,
        stream: StreamKey,
        violation: Violation,
        now: Instant,
    ) -> Result<Event, Violation> {
        self.refuse_id(stream.id(), violation, now)?;
        self.streams.reset(stream);
        Ok(Event::Reset { stream, cause: Cause::Violation(violation) })
    }

    /// Writes RST_STREAM for what the peer did; a peer that provokes many is a flood of resets too.
    pub(super) fn refuse_id(&mut self, id: u32, violation: Violation, now: Instant) -> Result<(), Violation> {
        Self::spend(self.allowances.resets.take(1, now), Violation::RapidReset)?;
        self.reply()?;
        self.output.reset(id, violation.code());
        Ok(())
    }

    /// Bytes that nobody holds any more, for the connection's window.
    pub(super) fn credit_connection(&mut self, size: u32) {
        self.credit += size;
        if self.credit >= self.limits.connection_window.max(DEFAULT_WINDOW) / 2 {
            self.output.window_update(0, self.credit);
            self.receive_window += i64::from(self.credit);
            self.credit = 0;
        }
    }

    /// The same for a stream's window.
    pub(super) fn credit_stream(&mut self, key: StreamKey, size: u32) {
        let half = (self.limits.stream_window / 2).max(1);
        let Some(stream) = self.streams.get_mut(key) else { return };
        if stream.remote != Half::Open {
            return;
        }
        stream.credit += size;
        if stream.credit >= half {
            self.output.window_update(key.id(), stream.credit);
            stream.receive_window += i64::from(stream.credit);
            stream.credit = 0;
        }
    }
}
