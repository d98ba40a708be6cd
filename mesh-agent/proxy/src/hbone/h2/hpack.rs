//! HPACK (RFC 7541): a decoder for hostile input, and an encoder without state.
//!
//! Written here because of what the crates do with hostile input (looked at: hpack, fluke-hpack, loona-hpack, httlib-hpack): they
//! build a hash map of the Huffman code for every string, move the rest of the block for every field, or copy a field
//! of 4 KiB for each byte that refers to it, without a limit.
//!
//! Invariants:
//! - Decoding is total. Its work and memory are bounded by the block's size and four times the list limit.
//! - The decoder's state after a list that was too large is the peer's all the same: later lists decode.
//! - The encoder never refers to the peer's table, and tells the peer so in its first block.

mod huffman;
mod table;

use super::{headers::Headers, violation::Violation};
use table::{OVERHEAD, STATIC, Table};

/// The size of the dynamic table that a peer may use: the default of HTTP/2, so it is not announced.
const TABLE_SIZE: usize = 4_096;
/// A list this many times over its limit ends the connection.
const BOMB: usize = 4;
/// Integers of more continuation bytes than this are refused.
const INTEGER_BYTES: usize = 5;

const INVALID: Violation = Violation::HeaderCompression;

/// The decoding end of a connection.
#[derive(Debug)]
pub(crate) struct Decoder {
    table: Table,
}

impl Decoder {
    pub(crate) const fn new() -> Self {
        Self { table: Table::new(TABLE_SIZE) }
    }

    /// Decodes a whole header block. `None`: the list is larger than `limit` (as HTTP/2 counts), or has too many
    /// fields.
    ///
    /// # Errors
    /// Those of the connection: [`Violation::HeaderCompression`], [`Violation::HeaderBomb`].
    pub(crate) fn decode(&mut self, block: &[u8], limit: usize) -> Result<Option<Headers>, Violation> {
        let mut input = Input { rest: block };
        let mut list = List { headers: Headers::default(), size: 0, limit, fits: true };
        let (mut name, mut value) = (Vec::new(), Vec::new());
        let mut begun = false;
        while let Some(&first) = input.rest.first() {
            if first & 0x80 != 0 {
                begun = true;
                let (name, value) = self.table.get(input.integer(7)?).ok_or(INVALID)?;
                list.add(name, value)?;
                continue;
            }
            if first & 0xe0 == 0x20 {
                // A resize stands before the fields (RFC 7541 §4.2).
                let size = input.integer(5)?;
                if begun || size > TABLE_SIZE {
                    return Err(INVALID);
                }
                self.table.resize(size);
                continue;
            }
            begun = true;
            let stored = first & 0x40 != 0;
            name.clear();
            value.clear();
            match input.integer(if stored { 6 } else { 4 })? {
                0 => input.string(&mut name)?,
                index => name.extend_from_slice(self.table.get(index).ok_or(INVALID)?.0),
            }
            input.string(&mut value)?;
            list.add(&name, &value)?;
            if stored {
                self.table.insert(&name, &value);
            }
        }
        Ok(list.fits.then_some(list.headers))
    }
}

struct List {
    headers: Headers,
    size: usize,
    limit: usize,
    fits: bool,
}

impl List {
    fn add(&mut self, name: &[u8], value: &[u8]) -> Result<(), Violation> {
        self.size += name.len() + value.len() + OVERHEAD;
        if self.size > self.limit * BOMB {
            return Err(Violation::HeaderBomb);
        }
        self.fits = self.fits && self.size <= self.limit && self.headers.push(name, value);
        Ok(())
    }
}

struct Input<'a> {
    rest: &'a [u8],
}

impl Input<'_> {
    fn byte(&mut self) -> Result<u8, Violation> {
        let (&byte, rest) = self.rest.split_first().ok_or(INVALID)?;
        self.rest = rest;
        Ok(byte)
    }

    /// An integer whose first byte has `prefix` bits of it (RFC 7541 §5.1).
    fn integer(&mut self, prefix: u32) -> Result<usize, Violation> {
        let mask = (1_usize << prefix) - 1;
        let mut value = usize::from(self.byte()?) & mask;
        if value < mask {
            return Ok(value);
        }
        for shift in 0..INTEGER_BYTES {
            let byte = self.byte()?;
            value = value.checked_add(usize::from(byte & 0x7f) << (7 * shift)).ok_or(INVALID)?;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(INVALID)
    }

    /// Appends a string (RFC 7541 §5.2) to `out`.
    fn string(&mut self, out: &mut Vec<u8>) -> Result<(), Violation> {
        let coded = self.rest.first().is_some_and(|byte| byte & 0x80 != 0);
        let length = self.integer(7)?;
        let (string, rest) = self.rest.split_at_checked(length).ok_or(INVALID)?;
        self.rest = rest;
        if coded {
            huffman::decode(string, out).map_err(|_| INVALID)
        } else {
            out.extend_from_slice(string);
            Ok(())
        }
    }
}

/// The encoding end of a connection.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    /// The peer knows that its table stays empty.
    told: bool,
}

impl Encoder {
    /// Appends the block of a header list.
    pub(crate) fn encode<'a>(
        &mut self,
        fields: impl Iterator<Item = (&'a [u8], &'a [u8])>,
        out: &mut Vec<u8>,
    ) {
        if !self.told {
            self.told = true;
            out.push(0x20);
        }
        for (name, value) in fields {
            encode_field(name, value, out);
        }
    }
}

/// The size of a field as HTTP/2 counts it in MAX_HEADER_LIST_SIZE.
pub(crate) const fn field_size(name: &[u8], value: &[u8]) -> usize {
    name.len() + value.len() + OVERHEAD
}

fn encode_field(name: &[u8], value: &[u8], out: &mut Vec<u8>) {
    let named = STATIC.iter().position(|field| field.0 == name);
    let whole = STATIC.iter().position(|field| *field == (name, value));
    if let Some(place) = whole {
        integer(0x80, 7, place + 1, out);
        return;
    }
    match named {
        Some(place) => integer(0, 4, place + 1, out),
        None => {
            out.push(0);
            string(name, out);
        }
    }
    string(value, out);
}

fn string(text: &[u8], out: &mut Vec<u8>) {
    integer(0, 7, text.len(), out);
    out.extend_from_slice(text);
}

fn integer(flags: u8, prefix: u32, value: usize, out: &mut Vec<u8>) {
    let mask = (1_usize << prefix) - 1;
    if value < mask {
        out.push(flags | value as u8);
        return;
    }
    out.push(flags | mask as u8);
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

#[cfg(test)]
mod tests;
