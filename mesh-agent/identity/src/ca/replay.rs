//! Keys that were certified already: a request must bring a fresh one.
//!
//! A request is proof of possession only once: whoever saw it pass could send it again, for the same identity or another. The
//! record is of this process and bounded; its overflow rule is that the oldest key is forgotten. A forgotten key's replay would
//! still need a requester that is allowed the identity, and yields a certificate nobody but the key's owner can use.

use std::collections::{HashSet, VecDeque};

/// Most keys remembered (32 bytes each, held twice).
pub const KEYS_MAX: usize = 65_536;

/// SHA-256 of public keys, the oldest first.
#[derive(Debug)]
pub(crate) struct Replays {
    seen: HashSet<[u8; 32]>,
    order: VecDeque<[u8; 32]>,
    capacity: usize,
}

impl Replays {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { seen: HashSet::new(), order: VecDeque::new(), capacity: capacity.max(1) }
    }

    /// Remembers a key; false if it is known.
    pub(crate) fn insert(&mut self, spki: &[u8]) -> bool {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, spki);
        let mut key = [0; 32];
        key.copy_from_slice(digest.as_ref());
        if !self.seen.insert(key) {
            return false;
        }
        self.order.push_back(key);
        while self.order.len() > self.capacity {
            if let Some(oldest) = self.order.pop_front() {
                self.seen.remove(&oldest);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_new_only_once_and_the_oldest_is_forgotten_first() {
        let mut replays = Replays::new(2);
        assert!(replays.insert(b"a"));
        assert!(!replays.insert(b"a"));
        assert!(replays.insert(b"b"));
        assert!(replays.insert(b"c"));
        assert!(!replays.insert(b"b"));
        assert!(replays.insert(b"a"), "the oldest of three was forgotten");
        assert_eq!((replays.seen.len(), replays.order.len()), (2, 2));
    }
}
