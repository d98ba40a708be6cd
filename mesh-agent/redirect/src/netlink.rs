//! Owns questions to the kernel by netlink: one socket, one question at a time, and the bytes around both.
//!
//! Invariants:
//! - Every read has a time limit, and every answer is checked against its length; a malformed one is an error.
//! - Answers to earlier questions are never taken for the answer to this one.
//!
//! Not here: what is asked, and what is in an answer (`diag.rs`, `conntrack.rs`).

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
};

use nix::{
    libc,
    sys::{
        socket::{
            AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket,
            sockopt,
        },
        time::TimeVal,
    },
};

/// What a read may take; the kernel answers while it is asked, so this is for a broken kernel only.
const ANSWER_LIMIT_S: i64 = 2;
/// The largest part of a dump the kernel sends at once.
const PART_MAX: usize = 64 * 1024;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// Upper bits of an attribute's type are flags.
const ATTRIBUTE_TYPE: u16 = 0x3fff;

/// A question for one answer, or for none: the kernel says how it went.
pub(crate) const ONE: i32 = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
/// A question for all there is.
pub(crate) const ALL: i32 = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;

/// A way to ask one part of the kernel about the namespace in which this was made.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    /// Kept between questions.
    buffer: Vec<u8>,
}

impl Netlink {
    /// Asks about the calling thread's namespace, whichever thread asks later.
    pub(crate) fn here(protocol: SockProtocol) -> io::Result<Self> {
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, Some(protocol))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_LIMIT_S, 0))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::new() })
    }

    /// Asks, and calls `visit` with the body of each message of the answer.
    ///
    /// # Errors
    /// The kernel's, or the first one of `visit`. After that of a visit in the midst of a dump nothing else can be asked.
    pub(crate) fn ask(
        &mut self,
        kind: u16,
        flags: i32,
        body: &[u8],
        visit: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let len = HEADER + body.len();
        let mut message = Vec::with_capacity(len);
        message.extend_from_slice(&(len as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags as u16).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0_u32.to_ne_bytes());
        message.extend_from_slice(body);
        let sent = send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        if sent == len { self.answers(visit) } else { Err(malformed()) }
    }

    /// Reads until the kernel says that it is done; the answers to earlier questions are skipped.
    fn answers(&mut self, mut visit: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        self.buffer.resize(PART_MAX, 0);
        loop {
            let len = recv(self.socket.as_fd().as_raw_fd(), &mut self.buffer, MsgFlags::MSG_TRUNC)?;
            let mut rest = self.buffer.get(..len).ok_or_else(malformed)?;
            while rest.len() >= HEADER {
                let len = u32_at(rest, 0) as usize;
                let body = rest.get(HEADER..len).ok_or_else(malformed)?;
                let (kind, sequence) = (u16::from_ne_bytes([rest[4], rest[5]]), u32_at(rest, 8));
                rest = rest.get(aligned(len)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_DONE | libc::NLMSG_ERROR if body.len() < 4 => return Err(malformed()),
                    // A dump that fails midway ends with the error instead of a length.
                    libc::NLMSG_DONE | libc::NLMSG_ERROR => {
                        return match u32_at(body, 0) as i32 {
                            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                            _ => Ok(()),
                        };
                    }
                    _ => visit(body)?,
                }
            }
        }
    }
}

/// Appends an attribute.
pub(crate) fn put_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = 4 + value.len();
    bytes.extend_from_slice(&(len as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len() + aligned(len) - len, 0);
}

/// The attributes in `bytes`, up to the first that does not fit.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (len, kind) = (bytes.get(0..2)?, bytes.get(2..4)?);
        let len = usize::from(u16::from_ne_bytes([len[0], len[1]]));
        let kind = u16::from_ne_bytes([kind[0], kind[1]]) & ATTRIBUTE_TYPE;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Netlink pads everything to four bytes.
const fn aligned(len: usize) -> usize {
    (len + 3) & !3
}

/// Callers have checked the length.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// An answer that is not what it should be.
pub(crate) fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed answer by netlink")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_do_not_fit_end_the_walk() {
        let mut bytes = Vec::new();
        put_attribute(&mut bytes, 7, &[1, 2, 3, 4, 5]);
        put_attribute(&mut bytes, 8 | 0x8000, &[9]);
        let all: Vec<_> = attributes(&bytes).collect();
        assert_eq!(all, [(7, &[1_u8, 2, 3, 4, 5][..]), (8, &[9][..])]);
        assert_eq!(attributes(&bytes[..bytes.len() - 4]).count(), 1);
        assert_eq!(attributes(&[2, 0, 1, 0]).count(), 0, "shorter than its own header");
        assert_eq!(attributes(&[0, 0, 0, 0, 0, 0]).count(), 0);
    }
}
