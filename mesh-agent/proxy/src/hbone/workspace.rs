//! What the tunnels of one worker share: buffers to read into and to seal in, and the count of what they hold.
//!
//! Reading, opening, sealing and writing happen in one go on the worker's thread, so one buffer of each kind serves every
//! tunnel. A tunnel owns memory only while a socket does not take what it has: an idle one owns none.
//!
//! Invariants:
//! - A buffer is lent for one call and never nested.
//! - Spare buffers are at most [`SPARE_MAX`].

use std::{
    cell::{Cell, RefCell},
    io::{self, IoSliceMut, Read},
    rc::Rc,
    sync::Arc,
};

use super::tls::{
    TlsError,
    record::{CONTENT_MAX, HEADER, RECORD_MAX, TRAILER},
    session::Session,
};
use crate::{
    metrics::Metrics,
    stream::{Io, Stream},
};

/// Bytes of one read from a tunnel.
pub(crate) const READ: usize = 256 << 10;
/// HTTP/2's frame header in front of the data of a record.
const FRAME: usize = 9;
/// Most bytes of data in one record, behind a frame header.
pub(crate) const DATA_MAX: usize = CONTENT_MAX - FRAME;
/// Everything in a record of data that is not data.
const AROUND: usize = HEADER + FRAME + TRAILER;
/// Records of one read from an app at most.
pub(crate) const SLOTS_MAX: usize = 16;
/// Room for control frames in front of the data.
const CONTROL: usize = 64 << 10;
const SPARE_MAX: usize = 4;
/// A rest up to this size is copied, a larger one takes the buffer along.
const COPIED_MAX: usize = 16 << 10;

/// The shared buffers of a worker's tunnels.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// Read into, one unfinished record in front.
    pub(super) incoming: RefCell<Box<[u8]>>,
    pub(super) outbox: RefCell<Outbox>,
    spare: RefCell<Vec<Box<[u8]>>>,
    /// Bytes kept for apps that do not take them.
    held: Cell<usize>,
    held_max: usize,
    /// The worker's coarse clock.
    pub(super) tick: Rc<Cell<u32>>,
    pub(super) metrics: Arc<Metrics>,
}

/// Sealed records on their way to the socket.
#[derive(Debug)]
pub(crate) struct Outbox {
    bytes: Box<[u8]>,
    len: usize,
}

/// Sealed bytes that a socket did not take.
#[derive(Debug)]
pub(super) struct Unsent {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Workspace {
    pub(crate) fn new(held_max: usize, tick: Rc<Cell<u32>>, metrics: Arc<Metrics>) -> Self {
        Self {
            incoming: RefCell::new(vec![0; RECORD_MAX + READ].into()),
            outbox: RefCell::new(Outbox { bytes: outbox_bytes(), len: 0 }),
            spare: RefCell::default(),
            held: Cell::new(0),
            held_max,
            tick,
            metrics,
        }
    }

    /// Bytes kept for apps now.
    pub(crate) fn held(&self) -> usize {
        self.held.get()
    }

    /// Whether so much is kept that nothing more should be read for those who do not take it.
    pub(super) fn is_full(&self) -> bool {
        self.held.get() >= self.held_max
    }

    pub(super) fn hold(&self, count: usize) {
        self.held.set(self.held.get() + count);
    }

    pub(super) fn release(&self, count: usize) {
        self.held.set(self.held.get().saturating_sub(count));
    }

    /// Keeps what the socket did not take, from `sent` on.
    pub(super) fn keep(&self, outbox: &mut Outbox, sent: usize) -> Unsent {
        let end = std::mem::take(&mut outbox.len);
        if end - sent <= COPIED_MAX {
            return Unsent { bytes: outbox.bytes[sent..end].into(), start: 0, end: end - sent };
        }
        let fresh = self.spare.borrow_mut().pop().unwrap_or_else(outbox_bytes);
        Unsent { bytes: std::mem::replace(&mut outbox.bytes, fresh), start: sent, end }
    }

    /// Takes a buffer back.
    pub(super) fn give_back(&self, unsent: Unsent) {
        let mut spare = self.spare.borrow_mut();
        if unsent.bytes.len() > COPIED_MAX && spare.len() < SPARE_MAX {
            spare.push(unsent.bytes);
        }
    }

    /// Gives spare memory back; called when the worker is quiet.
    pub(crate) fn trim(&self) {
        *self.spare.borrow_mut() = Vec::new();
    }
}

fn outbox_bytes() -> Box<[u8]> {
    vec![0; CONTROL + SLOTS_MAX * (DATA_MAX + AROUND)].into()
}

impl Unsent {
    /// Bytes that were to go first.
    pub(super) fn of(bytes: Vec<u8>) -> Self {
        let end = bytes.len();
        Self { bytes: bytes.into(), start: 0, end }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn advance(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }
}

impl Outbox {
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends sealed bytes.
    pub(super) fn push(&mut self, sealed: &[u8]) {
        self.reserve(sealed.len());
        self.bytes[self.len..self.len + sealed.len()].copy_from_slice(sealed);
        self.len += sealed.len();
    }

    /// Appends records with these frames.
    pub(super) fn seal(&mut self, session: &mut Session, frames: &[u8]) -> Result<(), TlsError> {
        for content in frames.chunks(CONTENT_MAX) {
            let size = HEADER + content.len() + TRAILER;
            self.reserve(size);
            let record = &mut self.bytes[self.len..self.len + size];
            record[HEADER..HEADER + content.len()].copy_from_slice(content);
            session.seal(record)?;
            self.len += size;
        }
        Ok(())
    }

    /// Reads up to `want` bytes of an app into the places of data of the next records, `chunk` bytes a record.
    pub(super) fn read(&mut self, app: &mut Stream, want: usize, chunk: usize) -> io::Result<Io> {
        let slots = want.div_ceil(chunk).min(SLOTS_MAX);
        let want = want.min(slots * chunk);
        self.reserve(slots * (chunk + AROUND));
        let space = &mut self.bytes[self.len..];
        if slots == 1 {
            let data = &mut space[HEADER + FRAME..][..want];
            return app.read_by(want, |mut socket| socket.read(data));
        }
        let mut left = want;
        let mut places: Vec<IoSliceMut<'_>> = space
            .chunks_mut(chunk + AROUND)
            .take(slots)
            .map(|slot| {
                let size = chunk.min(left);
                left -= size;
                IoSliceMut::new(&mut slot[HEADER + FRAME..][..size])
            })
            .collect();
        app.read_by(want, |mut socket| socket.read_vectored(&mut places))
    }

    /// Puts bytes into the place of data of the next record.
    pub(super) fn copy(&mut self, data: &[u8]) {
        self.reserve(data.len() + AROUND);
        self.bytes[self.len + HEADER + FRAME..][..data.len()].copy_from_slice(data);
    }

    /// Seals the next record, whose `size` bytes of data are in place behind the frame header given here.
    pub(super) fn seal_data(
        &mut self,
        session: &mut Session,
        head: [u8; FRAME],
        size: usize,
    ) -> Result<(), TlsError> {
        let record = &mut self.bytes[self.len..self.len + size + AROUND];
        record[HEADER..HEADER + FRAME].copy_from_slice(&head);
        session.seal(record)?;
        self.len += size + AROUND;
        Ok(())
    }

    /// Makes room; more than there is at first is needed only for a backlog of control frames.
    fn reserve(&mut self, more: usize) {
        if self.bytes.len() - self.len < more {
            let mut larger = vec![0; self.len + more];
            larger[..self.len].copy_from_slice(&self.bytes[..self.len]);
            self.bytes = larger.into();
        }
    }
}
