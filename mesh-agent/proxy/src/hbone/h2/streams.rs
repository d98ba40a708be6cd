//! The streams of a connection: their halves, their windows, and the table that finds them.
//!
//! Invariants:
//! - A key is dead once its stream is removed; a dead key finds nothing, even when its slot is in use again.
//! - Ids only grow, so the index of ids is a sorted list: no hash a peer could aim at.
//! - A stream that was reset is found by its key only, for as long as its bytes are not consumed.

/// Handle of a stream. Small slots are used again, so [`StreamKey::slot`] can index a caller's own table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StreamKey {
    id: u32,
    slot: u32,
}

impl StreamKey {
    /// The id on the wire, unique within a connection.
    pub(crate) const fn id(self) -> u32 {
        self.id
    }

    /// The place in the table, unique among the streams of a connection that live at the same time.
    pub(crate) const fn slot(self) -> usize {
        self.slot as usize
    }
}

/// One direction of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Half {
    /// The response is still to come.
    Waiting,
    /// Carries data.
    Open,
    /// Over.
    Ended,
}

/// State of one stream.
#[derive(Debug)]
pub(super) struct Stream {
    /// What we send.
    pub(super) local: Half,
    /// What the peer sends.
    pub(super) remote: Half,
    /// Bytes we may send; negative after the peer made its windows smaller.
    pub(super) send_window: i64,
    /// Bytes the peer may send; negative while it has not heard of our smaller windows.
    pub(super) receive_window: i64,
    /// Bytes given to the caller and not consumed.
    pub(super) unconsumed: u32,
    /// Bytes consumed and not yet announced to the peer.
    pub(super) credit: u32,
}

impl Stream {
    pub(super) fn is_closed(&self) -> bool {
        self.local == Half::Ended && self.remote == Half::Ended
    }
}

/// The table of streams.
#[derive(Debug, Default)]
pub(super) struct Streams {
    slots: Vec<Option<(u32, Stream)>>,
    free: Vec<u32>,
    /// Keys by id, without those that were reset.
    order: Vec<StreamKey>,
    /// The key found last: DATA of one stream comes in runs.
    recent: Option<StreamKey>,
    /// Streams that are not closed in both directions.
    active: u32,
}

impl Streams {
    /// Streams in the table, those among them that are closed and hold bytes not consumed.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Streams that are not closed in both directions.
    pub(super) fn active(&self) -> u32 {
        self.active
    }

    /// Adds a stream. Its id must be larger than any before.
    pub(super) fn insert(&mut self, id: u32, stream: Stream) -> StreamKey {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        let key = StreamKey { id, slot };
        debug_assert!(self.order.last().is_none_or(|last| last.id < id), "ids grow");
        self.active += u32::from(!stream.is_closed());
        self.slots[key.slot()] = Some((id, stream));
        self.order.push(key);
        key
    }

    /// The key of a living stream.
    pub(super) fn find(&mut self, id: u32) -> Option<StreamKey> {
        if let Some(recent) = self.recent
            && recent.id == id
        {
            return Some(recent);
        }
        let place = self.order.binary_search_by_key(&id, |key| key.id).ok()?;
        self.recent = Some(self.order[place]);
        self.recent
    }

    pub(super) fn get(&self, key: StreamKey) -> Option<&Stream> {
        match self.slots.get(key.slot()) {
            Some(Some((id, stream))) if *id == key.id => Some(stream),
            _ => None,
        }
    }

    pub(super) fn get_mut(&mut self, key: StreamKey) -> Option<&mut Stream> {
        match self.slots.get_mut(key.slot()) {
            Some(Some((id, stream))) if *id == key.id => Some(stream),
            _ => None,
        }
    }

    /// Ends a half, and forgets the stream if nothing is left of it. What is not consumed keeps it.
    pub(super) fn end(&mut self, key: StreamKey, half: impl FnOnce(&mut Stream) -> &mut Half) {
        let Some(stream) = self.get_mut(key) else { return };
        let before = stream.is_closed();
        *half(stream) = Half::Ended;
        let closed_now = !before && stream.is_closed();
        self.active -= u32::from(closed_now);
        self.forget_finished(key);
    }

    /// Forgets a stream that is closed and holds nothing.
    pub(super) fn forget_finished(&mut self, key: StreamKey) {
        if self.get(key).is_some_and(|stream| stream.is_closed() && stream.unconsumed == 0) {
            self.remove(key);
        }
    }

    /// Forgets a stream.
    pub(super) fn remove(&mut self, key: StreamKey) -> Option<Stream> {
        self.get(key)?;
        self.unlist(key);
        let (_, stream) = self.slots[key.slot()].take()?;
        self.free.push(key.slot);
        self.active -= u32::from(!stream.is_closed());
        if self.len() == 0 {
            // A burst of streams leaves no table behind.
            *self = Self::default();
        }
        Some(stream)
    }

    /// Ends both halves at once: the id means nothing any more, the key lives until everything is consumed.
    pub(super) fn reset(&mut self, key: StreamKey) {
        self.end(key, |stream| &mut stream.local);
        self.end(key, |stream| &mut stream.remote);
        self.unlist(key);
    }

    fn unlist(&mut self, key: StreamKey) {
        if let Ok(place) = self.order.binary_search_by_key(&key.id, |key| key.id) {
            self.order.remove(place);
        }
        if self.recent == Some(key) {
            self.recent = None;
        }
    }

    /// The stream with the largest id that was not reset.
    pub(super) fn newest(&self) -> Option<StreamKey> {
        self.order.last().copied()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn values(&self) -> impl Iterator<Item = &Stream> {
        self.slots.iter().flatten().map(|(_, stream)| stream)
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Stream> {
        self.slots.iter_mut().flatten().map(|(_, stream)| stream)
    }
}

#[cfg(test)]
mod tests {
    use super::{Half, Stream, Streams};

    fn stream() -> Stream {
        Stream {
            local: Half::Open,
            remote: Half::Open,
            send_window: 0,
            receive_window: 0,
            unconsumed: 0,
            credit: 0,
        }
    }

    #[test]
    fn a_dead_key_finds_nothing_although_its_slot_lives_on() {
        let mut streams = Streams::default();
        let first = streams.insert(1, stream());
        let other = streams.insert(3, stream());
        assert_eq!(streams.find(1), Some(first));
        assert!(streams.remove(first).is_some());
        let second = streams.insert(5, stream());
        assert_eq!(second.slot(), first.slot());
        assert!(streams.get(first).is_none() && streams.get_mut(first).is_none());
        assert!(streams.remove(first).is_none());
        assert_eq!(streams.find(1), None);
        assert_eq!(streams.find(3), Some(other));
        assert_eq!(streams.newest(), Some(second));
        assert_eq!(streams.active(), 2);
    }

    #[test]
    fn a_reset_stream_is_found_by_its_key_until_its_bytes_are_consumed() {
        let mut streams = Streams::default();
        let (idle, holding) = (streams.insert(1, stream()), streams.insert(3, stream()));
        streams.get_mut(holding).unwrap().unconsumed = 5;
        streams.reset(idle);
        streams.reset(holding);
        assert_eq!((streams.find(1), streams.find(3), streams.newest()), (None, None, None));
        assert!(streams.get(idle).is_none() && streams.get(holding).is_some());
        assert_eq!((streams.active(), streams.len()), (0, 1));
        assert!(streams.remove(holding).is_some());
        assert_eq!(streams.len(), 0);
    }

    #[test]
    fn a_closed_stream_stays_until_its_bytes_are_consumed() {
        let mut streams = Streams::default();
        let key = streams.insert(1, stream());
        streams.get_mut(key).unwrap().unconsumed = 5;
        streams.end(key, |stream| &mut stream.remote);
        assert_eq!(streams.active(), 1);
        streams.end(key, |stream| &mut stream.local);
        assert_eq!((streams.active(), streams.len()), (0, 1));
        streams.get_mut(key).unwrap().unconsumed = 0;
        streams.forget_finished(key);
        assert_eq!((streams.active(), streams.len()), (0, 0));
    }
}
