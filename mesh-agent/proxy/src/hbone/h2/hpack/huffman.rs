//! The Huffman code of HPACK (RFC 7541 §5.2 and appendix B).
//!
//! The code is canonical, so the lengths of its words say everything; the tables are computed from them at compile time.
//!
//! Invariants: decoding is total; its output is at most 8/5 of its input.

/// Symbols: every byte, and the end of string, which never occurs in one.
const SYMBOLS: usize = 257;
const END_OF_STRING: u16 = 256;
/// Bits of the longest word.
const LONGEST: usize = 30;
/// Words up to this length are found by one look.
const QUICK: usize = 9;

/// Length in bits of the word of each symbol.
#[rustfmt::skip]
const LENGTHS: [u8; SYMBOLS] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28,
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6,
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5,
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23,
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23,
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25,
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23,
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

struct Tables {
    /// Symbols ordered by the length of their word, then by value: the order in which words are counted up.
    sorted: [u16; SYMBOLS],
    /// Index into `sorted` of the first symbol of a length.
    start: [u16; LONGEST + 1],
    /// Words of a length.
    count: [u16; LONGEST + 1],
    /// The first word of a length.
    first: [u32; LONGEST + 1],
    /// By the next [`QUICK`] bits: the symbol and its length, or length 0 for longer words.
    quick: [(u8, u8); 1 << QUICK],
}

static TABLES: Tables = tables();

const fn tables() -> Tables {
    let mut tables = Tables {
        sorted: [0; SYMBOLS],
        start: [0; LONGEST + 1],
        count: [0; LONGEST + 1],
        first: [0; LONGEST + 1],
        quick: [(0, 0); 1 << QUICK],
    };
    let (mut word, mut filled, mut length) = (0_u32, 0_usize, 1_usize);
    while length <= LONGEST {
        word <<= 1;
        tables.first[length] = word;
        tables.start[length] = filled as u16;
        let mut symbol = 0;
        while symbol < SYMBOLS {
            if LENGTHS[symbol] as usize == length {
                tables.sorted[filled] = symbol as u16;
                filled += 1;
                tables.count[length] += 1;
                if length <= QUICK {
                    let spread = 1 << (QUICK - length);
                    let mut tail = 0;
                    while tail < spread {
                        tables.quick[((word as usize) << (QUICK - length)) + tail] =
                            (symbol as u8, length as u8);
                        tail += 1;
                    }
                }
                word += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    tables
}

/// A string that is not a Huffman-coded one: it holds the end-of-string word, or its padding is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Invalid;

/// Appends the decoded `coded` to `out`.
pub(super) fn decode(coded: &[u8], out: &mut Vec<u8>) -> Result<(), Invalid> {
    // The next bits, from the top; those below the top `held` are zero.
    let (mut bits, mut held) = (0_u64, 0_usize);
    let mut rest = coded.iter();
    loop {
        while held <= 56 {
            let Some(&byte) = rest.next() else { break };
            bits |= u64::from(byte) << (56 - held);
            held += 8;
        }
        let Some((symbol, length)) = word(bits, held)? else { break };
        out.push(symbol);
        bits <<= length;
        held -= length;
    }
    // The end of the last byte is filled with the first bits of the end-of-string word: ones, less than a byte.
    let padding_is_ones = held == 0 || bits >> (64 - held) == (1 << held) - 1;
    if held < 8 && padding_is_ones { Ok(()) } else { Err(Invalid) }
}

/// The word at the top of `bits`, of which `held` are real; none if they are the beginning of one.
fn word(bits: u64, held: usize) -> Result<Option<(u8, usize)>, Invalid> {
    let (symbol, length) = TABLES.quick[(bits >> (64 - QUICK)) as usize];
    let length = usize::from(length);
    if length != 0 {
        return Ok((length <= held).then_some((symbol, length)));
    }
    for length in QUICK + 1..=LONGEST.min(held) {
        let nth = ((bits >> (64 - length)) as u32).wrapping_sub(TABLES.first[length]);
        if nth < u32::from(TABLES.count[length]) {
            let symbol = TABLES.sorted[usize::from(TABLES.start[length]) + nth as usize];
            return match u8::try_from(symbol) {
                Ok(symbol) => Ok(Some((symbol, length))),
                Err(_) => {
                    debug_assert_eq!(symbol, END_OF_STRING);
                    Err(Invalid)
                }
            };
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::{Invalid, LENGTHS, LONGEST, SYMBOLS, TABLES, decode};

    /// The word of a symbol, for an encoder that the agent itself has no use for.
    fn word_of(symbol: u16) -> (u32, usize) {
        let length = usize::from(LENGTHS[usize::from(symbol)]);
        let place = TABLES.sorted.iter().position(|&sorted| sorted == symbol).unwrap();
        (TABLES.first[length] + u32::try_from(place).unwrap() - u32::from(TABLES.start[length]), length)
    }

    fn encode(text: &[u8]) -> Vec<u8> {
        let mut bits: Vec<bool> = Vec::new();
        for &byte in text {
            let (word, length) = word_of(u16::from(byte));
            bits.extend((0..length).rev().map(|bit| word >> bit & 1 == 1));
        }
        while !bits.len().is_multiple_of(8) {
            bits.push(true);
        }
        bits.chunks(8).map(|byte| byte.iter().fold(0, |sum, &bit| sum << 1 | u8::from(bit))).collect()
    }

    #[test]
    fn the_code_is_complete() {
        let filled: u64 = LENGTHS.iter().map(|&length| 1 << (LONGEST - usize::from(length))).sum();
        assert_eq!(filled, 1 << LONGEST);
    }

    #[test]
    fn words_are_those_of_the_rfc() {
        for (symbol, word, length) in
            [(b'0', 0, 5), (b'a', 3, 5), (b' ', 0x14, 6), (b':', 0x5c, 7), (b'&', 0xf8, 8), (b'!', 0x3f8, 10)]
        {
            assert_eq!(word_of(u16::from(symbol)), (word, length));
        }
        assert_eq!(word_of(0), (0x1ff8, 13));
        assert_eq!(word_of(22), (0x3fff_fffe, 30));
        assert_eq!(word_of(256), (0x3fff_ffff, 30));
    }

    #[test]
    fn strings_of_the_rfc_decode() {
        let mut out = Vec::new();
        decode(&[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff], &mut out).unwrap();
        assert_eq!(out, b"www.example.com");
    }

    #[test]
    fn every_byte_survives() {
        let text: Vec<u8> = (0..=255).chain((0..=255).rev()).collect();
        let mut out = Vec::new();
        decode(&encode(&text), &mut out).unwrap();
        assert_eq!(out, text);
        assert_eq!(SYMBOLS, 257);
    }

    #[test]
    fn wrong_padding_and_the_end_of_string_are_refused() {
        for coded in
            [&[0x00][..], &[0xff][..], &[0x1f, 0xff][..], &[0xff, 0xff, 0xff, 0xff][..], &[0x18, 0xfe][..]]
        {
            assert_eq!(decode(coded, &mut Vec::new()), Err(Invalid), "{coded:x?}");
        }
        assert_eq!(decode(&[], &mut Vec::new()), Ok(()));
        assert_eq!(decode(&[0x1f], &mut Vec::new()), Ok(()));
    }
}
