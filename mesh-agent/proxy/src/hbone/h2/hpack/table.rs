//! The tables of HPACK (RFC 7541 §2.3): the static one of the RFC, and the dynamic one that a peer fills.
//!
//! Invariant: the dynamic table's size as HPACK counts it (32 bytes more per entry) never exceeds its limit.

use std::collections::VecDeque;

/// What an entry costs beside its text.
pub(super) const OVERHEAD: usize = 32;

/// A name and a value; index 1 is the first.
#[rustfmt::skip]
pub(super) static STATIC: [(&[u8], &[u8]); 61] = [
    (b":authority", b""), (b":method", b"GET"), (b":method", b"POST"), (b":path", b"/"), (b":path", b"/index.html"),
    (b":scheme", b"http"), (b":scheme", b"https"), (b":status", b"200"), (b":status", b"204"), (b":status", b"206"),
    (b":status", b"304"), (b":status", b"400"), (b":status", b"404"), (b":status", b"500"), (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"), (b"accept-language", b""), (b"accept-ranges", b""), (b"accept", b""),
    (b"access-control-allow-origin", b""), (b"age", b""), (b"allow", b""), (b"authorization", b""),
    (b"cache-control", b""), (b"content-disposition", b""), (b"content-encoding", b""), (b"content-language", b""),
    (b"content-length", b""), (b"content-location", b""), (b"content-range", b""), (b"content-type", b""),
    (b"cookie", b""), (b"date", b""), (b"etag", b""), (b"expect", b""), (b"expires", b""), (b"from", b""),
    (b"host", b""), (b"if-match", b""), (b"if-modified-since", b""), (b"if-none-match", b""), (b"if-range", b""),
    (b"if-unmodified-since", b""), (b"last-modified", b""), (b"link", b""), (b"location", b""),
    (b"max-forwards", b""), (b"proxy-authenticate", b""), (b"proxy-authorization", b""), (b"range", b""),
    (b"referer", b""), (b"refresh", b""), (b"retry-after", b""), (b"server", b""), (b"set-cookie", b""),
    (b"strict-transport-security", b""), (b"transfer-encoding", b""), (b"user-agent", b""), (b"vary", b""),
    (b"via", b""), (b"www-authenticate", b""),
];

#[derive(Debug)]
struct Entry {
    text: Box<[u8]>,
    name: usize,
}

/// What the peer's encoder has stored, newest first.
#[derive(Debug)]
pub(super) struct Table {
    entries: VecDeque<Entry>,
    size: usize,
    limit: usize,
}

impl Table {
    pub(super) const fn new(limit: usize) -> Self {
        Self { entries: VecDeque::new(), size: 0, limit }
    }

    /// The field at an index of the joined tables.
    pub(super) fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let place = index.checked_sub(1)?;
        match place.checked_sub(STATIC.len()) {
            None => Some(STATIC[place]),
            Some(place) => self.entries.get(place).map(|entry| entry.text.split_at(entry.name)),
        }
    }

    /// Sets the limit, and drops what is over it.
    pub(super) fn resize(&mut self, limit: usize) {
        self.limit = limit;
        self.evict(limit);
    }

    /// Stores a field; one that is over the limit by itself leaves the table empty (RFC 7541 §4.4).
    pub(super) fn insert(&mut self, name: &[u8], value: &[u8]) {
        let cost = name.len() + value.len() + OVERHEAD;
        match self.limit.checked_sub(cost) {
            Some(room) => {
                self.evict(room);
                self.size += cost;
                self.entries.push_front(Entry { text: [name, value].concat().into(), name: name.len() });
            }
            None => self.evict(0),
        }
    }

    fn evict(&mut self, limit: usize) {
        while self.size > limit
            && let Some(oldest) = self.entries.pop_back()
        {
            self.size -= oldest.text.len() + OVERHEAD;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn old_entries_make_room_for_new_ones() {
        let mut table = Table::new(2 * 34);
        for name in [b"a", b"b", b"c"] {
            table.insert(name, b"1");
        }
        assert_eq!(table.get(62), Some((&b"c"[..], &b"1"[..])));
        assert_eq!(table.get(63), Some((&b"b"[..], &b"1"[..])));
        assert_eq!(table.get(64), None);
        table.resize(34);
        assert_eq!(table.get(63), None);
        table.insert(b"too", b"large for this");
        assert_eq!(table.get(62), None);
        assert_eq!(table.size, 0);
    }

    #[test]
    fn index_zero_is_nothing() {
        assert_eq!(Table::new(0).get(0), None);
        assert_eq!(Table::new(0).get(61), Some((&b"www-authenticate"[..], &b""[..])));
    }
}
