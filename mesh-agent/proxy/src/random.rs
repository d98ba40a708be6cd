//! Random words for endpoint choice and DNS message ids.
//!
//! Unpredictable without a dependency: SipHash under the standard library's random keys is a keyed
//! pseudo-random function, and a counter never repeats an input. That is enough for ids a stranger must not guess.

use std::{
    cell::Cell,
    hash::{BuildHasher, RandomState},
};

/// A source of random words, one per worker.
#[derive(Debug, Default)]
pub(crate) struct Random {
    keys: RandomState,
    counter: Cell<u64>,
}

impl Random {
    pub(crate) fn next(&self) -> u64 {
        self.counter.set(self.counter.get().wrapping_add(1));
        self.keys.hash_one(self.counter.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_differ_within_and_between_sources() {
        let (a, b) = (Random::default(), Random::default());
        let mut words: Vec<u64> = (0..1000).flat_map(|_| [a.next(), b.next()]).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 2000);
    }
}
