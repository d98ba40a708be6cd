//! Random words: one that the caller brings, and as many more as are made from it.

/// Maps a random word to 0..`n` with less bias than a remainder; 0 when `n` is 0.
pub fn below(word: u64, n: u64) -> u64 {
    ((u128::from(word) * u128::from(n)) >> 64) as u64
}

/// A stream of random words from a seed, for one decision. Not for secrets.
#[derive(Clone, Debug)]
pub struct Draws {
    state: u64,
}

impl Draws {
    /// The stream that belongs to a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next word: a Weyl sequence, mixed.
    pub fn word(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// The next word, mapped to 0..`n`.
    pub fn below(&mut self, n: u64) -> u64 {
        below(self.word(), n)
    }

    /// The next word, mapped to 0.0..1.0.
    pub fn unit(&mut self) -> f64 {
        // 53 bits are what a double holds.
        (self.word() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Spreads every bit of a word over all others.
pub(crate) fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_fall_evenly_and_within_bounds() {
        let mut draws = Draws::new(3);
        let mut counts = [0_u32; 10];
        for _ in 0..100_000 {
            counts[draws.below(10) as usize] += 1;
            assert!((0.0..1.0).contains(&draws.unit()));
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
        assert_eq!((below(u64::MAX, 10), below(0, 10), below(u64::MAX, 0)), (9, 0, 0));
    }
}
