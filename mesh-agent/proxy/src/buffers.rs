//! Memory and pipes that connections of one worker borrow while they hold bytes.
//!
//! Reading and writing happen in one go on the worker's thread, so one scratch buffer serves every connection.
//! Only bytes the receiver did not take at once are kept, in a buffer of the smallest class that fits (1 KiB, 16 KiB,
//! 256 KiB); an idle connection holds none.
//!
//! Invariants:
//! - Bytes held by connections beyond `held_max` are at most 1 KiB per stalled flow (see [`Buffers::read_max`]).
//! - The free lists hold at most [`FREE_MAX`] buffers of a class and [`PIPES_FREE_MAX`] pipes.
//! - A pipe on the free list is empty.

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::OwnedFd,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::pipe2,
};

/// Sizes of the buffer classes.
pub(crate) const SMALL: usize = 1 << 10;
pub(crate) const MEDIUM: usize = 16 << 10;
pub(crate) const LARGE: usize = 256 << 10;

/// Free buffers kept per class, per worker: at most 4 × 273 KiB.
const FREE_MAX: usize = 4;
/// Free pipes kept per worker, two descriptors each.
const PIPES_FREE_MAX: usize = 16;
/// Pipes in use per worker: descriptors must be left for connections.
const PIPES_USED_MAX: usize = 256;

/// The buffers of one worker.
#[derive(Debug)]
pub(crate) struct Buffers {
    scratch: RefCell<Box<[u8]>>,
    free: [RefCell<Vec<Box<[u8]>>>; 3],
    held: Cell<usize>,
    held_max: usize,
    pipes: RefCell<Vec<Pipe>>,
    pipes_used: Cell<usize>,
}

/// Bytes that were read and not yet written.
#[derive(Debug)]
pub(crate) struct Held {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// A pipe that carries spliced bytes.
#[derive(Debug)]
pub(crate) struct Pipe {
    /// End to splice from.
    pub(crate) out: OwnedFd,
    /// End to splice into.
    pub(crate) into: OwnedFd,
}

impl Held {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Forgets the first `count` bytes.
    pub(crate) fn advance(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

impl Buffers {
    pub(crate) fn new(held_max: usize) -> Self {
        Self {
            scratch: RefCell::new(boxed(LARGE)),
            free: Default::default(),
            held: Cell::new(0),
            held_max,
            pipes: RefCell::default(),
            pipes_used: Cell::new(0),
        }
    }

    /// Bytes that connections hold now.
    pub(crate) fn held(&self) -> usize {
        self.held.get()
    }

    /// How much one read may take: less once receivers fall behind, because what they do not take must be held.
    pub(crate) fn read_max(&self) -> usize {
        if self.held.get() < self.held_max / 2 {
            LARGE
        } else if self.held.get() < self.held_max {
            MEDIUM
        } else {
            SMALL
        }
    }

    /// Lends the scratch buffer. Never nested: `with` does not call back into the worker.
    pub(crate) fn with_scratch<R>(&self, with: impl FnOnce(&mut Box<[u8]>) -> R) -> R {
        with(&mut self.scratch.borrow_mut())
    }

    /// Keeps `scratch[start..end]`. A large rest takes the buffer itself and leaves another one in its place.
    pub(crate) fn hold(&self, scratch: &mut Box<[u8]>, start: usize, end: usize) -> Held {
        let len = end - start;
        let held = if len > MEDIUM {
            let bytes = std::mem::replace(scratch, self.take(LARGE));
            Held { bytes, start, end }
        } else {
            let mut bytes = self.take(if len > SMALL { MEDIUM } else { SMALL });
            bytes[..len].copy_from_slice(&scratch[start..end]);
            Held { bytes, start: 0, end: len }
        };
        self.held.set(self.held.get() + held.bytes.len());
        held
    }

    /// Takes a buffer back.
    pub(crate) fn release(&self, held: Held) {
        self.held.set(self.held.get().saturating_sub(held.bytes.len()));
        let mut free = self.free[class(held.bytes.len())].borrow_mut();
        if free.len() < FREE_MAX {
            free.push(held.bytes);
        }
    }

    /// An empty pipe, or `None` when too many are in use or none can be made: then bytes are copied.
    pub(crate) fn pipe(&self) -> Option<Pipe> {
        if self.pipes_used.get() >= PIPES_USED_MAX {
            return None;
        }
        let pipe = match self.pipes.borrow_mut().pop() {
            Some(pipe) => pipe,
            None => Pipe::new().ok()?,
        };
        self.pipes_used.set(self.pipes_used.get() + 1);
        Some(pipe)
    }

    /// Takes a pipe back; one that still holds bytes is closed.
    pub(crate) fn release_pipe(&self, pipe: Pipe, is_empty: bool) {
        self.pipes_used.set(self.pipes_used.get().saturating_sub(1));
        let mut pipes = self.pipes.borrow_mut();
        if is_empty && pipes.len() < PIPES_FREE_MAX {
            pipes.push(pipe);
        }
    }

    /// Gives free memory and pipes back; called when the worker is quiet.
    pub(crate) fn trim(&self) {
        for free in &self.free {
            *free.borrow_mut() = Vec::new();
        }
        *self.pipes.borrow_mut() = Vec::new();
    }

    fn take(&self, len: usize) -> Box<[u8]> {
        self.free[class(len)].borrow_mut().pop().unwrap_or_else(|| boxed(len))
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (out, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Best effort: without the larger size a pipe still works, in more pieces.
        fcntl(&into, FcntlArg::F_SETPIPE_SZ(i32::try_from(LARGE).unwrap_or(i32::MAX))).ok();
        Ok(Self { out, into })
    }
}

fn boxed(len: usize) -> Box<[u8]> {
    vec![0; len].into_boxed_slice()
}

fn class(len: usize) -> usize {
    match len {
        SMALL => 0,
        MEDIUM => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_is_held_in_the_smallest_class_and_given_back() {
        let buffers = Buffers::new(1 << 20);
        for (len, class) in [(1, SMALL), (SMALL, SMALL), (SMALL + 1, MEDIUM), (MEDIUM + 1, LARGE)] {
            let held = buffers.with_scratch(|scratch| {
                scratch[7] = 42;
                buffers.hold(scratch, 7, 7 + len)
            });
            assert_eq!(buffers.held(), class);
            assert_eq!((held.bytes().len(), held.bytes()[0]), (len, 42));
            buffers.release(held);
            assert_eq!(buffers.held(), 0);
        }
        buffers.with_scratch(|scratch| assert_eq!(scratch.len(), LARGE));
    }

    #[test]
    fn reads_shrink_as_receivers_fall_behind() {
        let buffers = Buffers::new(LARGE * 2);
        let hold = || buffers.with_scratch(|scratch| buffers.hold(scratch, 0, LARGE));
        assert_eq!(buffers.read_max(), LARGE);
        let first = hold();
        assert_eq!(buffers.read_max(), MEDIUM);
        let second = hold();
        assert_eq!(buffers.read_max(), SMALL);
        buffers.release(first);
        buffers.release(second);
        assert_eq!(buffers.read_max(), LARGE);
    }

    #[test]
    fn pipes_in_use_are_bounded_and_reused() {
        let buffers = Buffers::new(1 << 20);
        let pipes: Vec<Pipe> = std::iter::from_fn(|| buffers.pipe()).take(PIPES_USED_MAX + 1).collect();
        assert_eq!(pipes.len(), PIPES_USED_MAX);
        for pipe in pipes {
            buffers.release_pipe(pipe, true);
        }
        assert_eq!(buffers.pipes.borrow().len(), PIPES_FREE_MAX);
        let pipe = buffers.pipe().unwrap();
        buffers.release_pipe(pipe, false);
        assert_eq!(buffers.pipes.borrow().len(), PIPES_FREE_MAX - 1, "a pipe with bytes in it is not reused");
        buffers.trim();
        assert!(buffers.pipes.borrow().is_empty());
    }
}
