//! What the caller asks for: streams, responses, data, ends, resets, and the accounting of what it consumed.

use super::{
    super::{
        Event, OpenError, SendError, StreamKey,
        frame::{END_STREAM, ErrorCode, HEADER, Head, Kind, WriteFrames},
        hpack::field_size,
        streams::Half,
    },
    Connection, Role,
    control::UPDATES_PER_DATA,
};

impl Connection {
    /// Opens a stream with a request's headers, pseudo-headers first. DATA may follow at once.
    ///
    /// # Errors
    /// When there is no room, the connection goes away, or the peer takes no headers of this size. Nothing is written then.
    pub(crate) fn open(&mut self, fields: &[(&str, &str)], end: bool) -> Result<StreamKey, OpenError> {
        if self.role == Role::Server || self.takes_no_more() {
            return Err(OpenError::GoingAway);
        }
        if self.room() == 0 || self.streams.len() >= 2 * self.limits.max_streams as usize {
            return Err(OpenError::Full);
        }
        let fields = fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
        let size: usize = fields.clone().map(|(name, value)| field_size(name, value)).sum();
        if size > self.peer.max_header_list as usize {
            return Err(OpenError::HeadersTooLarge);
        }
        let id = self.next_id;
        self.next_id += 2;
        self.write_headers(id, end, fields);
        let local = if end { Half::Ended } else { Half::Open };
        Ok(self.streams.insert(id, self.new_stream(local, Half::Waiting)))
    }

    /// Answers a request.
    ///
    /// # Errors
    /// [`SendError::Gone`], or [`SendError::NotOpen`] if it was answered before.
    pub(crate) fn respond(
        &mut self,
        key: StreamKey,
        status: u16,
        fields: &[(&str, &str)],
        end: bool,
    ) -> Result<(), SendError> {
        let stream = self.streams.get_mut(key).ok_or(SendError::Gone)?;
        if stream.local != Half::Waiting {
            return Err(SendError::NotOpen);
        }
        stream.local = Half::Open;
        self.allowances.resets.give(1);
        let status = status.to_string();
        let head = std::iter::once((&b":status"[..], status.as_bytes()));
        let rest = fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
        self.write_headers(key.id(), end, head.chain(rest));
        if end {
            self.streams.end(key, |stream| &mut stream.local);
        }
        Ok(())
    }

    /// Bytes of DATA that windows allow on a stream now; zero for a stream that is gone or does not take data.
    pub(crate) fn send_capacity(&self, key: StreamKey) -> usize {
        match self.streams.get(key) {
            Some(stream) if stream.local == Half::Open => {
                usize::try_from(stream.send_window.min(self.send_window)).unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// Bytes of DATA that one frame may carry to this peer.
    pub(crate) fn max_data(&self) -> usize {
        self.peer.max_frame as usize
    }

    /// The header of a DATA frame of `length` bytes, which the caller writes at once behind the header; `end` ends our
    /// half. The windows are charged.
    ///
    /// # Errors
    /// Nothing is charged if the stream does not take this much now, or headers wait in the output.
    pub(crate) fn data_frame(
        &mut self,
        key: StreamKey,
        length: usize,
        end: bool,
    ) -> Result<[u8; HEADER], SendError> {
        let stream = self.streams.get_mut(key).ok_or(SendError::Gone)?;
        if stream.local != Half::Open {
            return Err(SendError::NotOpen);
        }
        if self.headers_waiting {
            return Err(SendError::OutputFirst);
        }
        let charge = i64::try_from(length).map_err(|_| SendError::Window)?;
        let window = stream.send_window.min(self.send_window);
        // An empty frame needs no window.
        if charge > i64::from(self.peer.max_frame) || (charge > 0 && charge > window) {
            return Err(SendError::Window);
        }
        stream.send_window -= charge;
        self.send_window -= charge;
        self.allowances.window_updates.give(UPDATES_PER_DATA);
        if end {
            self.streams.end(key, |stream| &mut stream.local);
        }
        let flags = if end { END_STREAM } else { 0 };
        Ok(Head { length: charge as u32, kind: Kind::Data, flags, stream: key.id() }.encode())
    }

    /// Ends our half with an empty DATA frame in the output. Nothing happens if it has ended, or the stream is gone.
    pub(crate) fn end(&mut self, key: StreamKey) {
        if self.streams.get(key).is_some_and(|stream| stream.local == Half::Open) {
            self.output.frame(Kind::Data, END_STREAM, key.id(), &[]);
            self.streams.end(key, |stream| &mut stream.local);
        }
    }

    /// Ends a stream in both directions and forgets it; what was not consumed counts as consumed. One that has ended in
    /// both directions, or was reset, is only forgotten.
    pub(crate) fn reset(&mut self, key: StreamKey, code: ErrorCode) {
        let Some(stream) = self.streams.get(key) else { return };
        if !stream.is_closed() {
            self.output.reset(key.id(), code);
        }
        if let Some(stream) = self.streams.remove(key) {
            self.credit_connection(stream.unconsumed);
        }
    }

    /// The caller has passed on `size` bytes of a stream: the peer may send as many more. May put WINDOW_UPDATEs into
    /// the output. Nothing happens if the stream is gone.
    pub(crate) fn consumed(&mut self, key: StreamKey, size: usize) {
        let Some(stream) = self.streams.get_mut(key) else { return };
        let size = u32::try_from(size).unwrap_or(u32::MAX).min(stream.unconsumed);
        stream.unconsumed -= size;
        self.credit_stream(key, size);
        self.credit_connection(size);
        self.streams.forget_finished(key);
    }
}

/// An event is moved for every DATA frame.
const _: () = assert!(size_of::<Event>() <= 40, "events are small");
