//! Owns how listening sockets get from one agent of a node to the next: over a unix stream, and into the next one's enrolments.
//!
//! The sockets stay what they are: the maps that lead to them, connections that wait in their queues and datagrams that wait in their
//! buffers come along.
//!
//! Invariants:
//! - What a received socket is, the kernel says (its storage, its protocol, its port), never the sender.
//! - A socket that is not a listener of an agent in a pod is closed, and counted.
//! - A pod is enrolled with each of its sockets that came; only the others are made anew.
//!
//! Not here: what two agents tell each other (`mesh-agent`).

use std::{
    collections::{BTreeSet, HashMap},
    io::{self, IoSlice},
    os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    os::unix::net::UnixStream,
};

use mesh_common::sock::ROLE_AGENT_LISTENER;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use socket2::{SockRef, Type};

use crate::{
    maps::Maps,
    node::{Node, lock},
    sys,
};

/// Sockets that one message carries at most.
pub const SOCKETS_PER_MESSAGE: usize = sys::DESCRIPTORS_MAX;

/// Sends bytes, and sockets with them: [`SOCKETS_PER_MESSAGE`] at most. Blocking.
///
/// # Errors
/// As `sendmsg(2)`; a part that was sent is an error too.
pub fn send_sockets(stream: &UnixStream, bytes: &[u8], sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
    let raw: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let fd = stream.as_raw_fd();
    let sent = sendmsg::<()>(fd, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives what [`send_sockets`] sent. No bytes: the other side has closed. Blocking.
///
/// # Errors
/// As `recvmsg(2)`; also when descriptors found no room in this process.
pub fn receive_sockets(stream: &UnixStream, buf: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    sys::receive_with_descriptors(stream.as_fd(), buf)
}

/// Which of the agent's listeners a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Slot {
    /// Cookie of the pod's network namespace.
    pub(crate) netns_cookie: u64,
    pub(crate) port: u16,
    /// TCP, else UDP.
    pub(crate) is_stream: bool,
}

/// Listeners of an earlier agent that wait for the enrolment of their pods.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    sockets: HashMap<Slot, OwnedFd>,
}

impl Inherited {
    /// Takes a listener out.
    pub(crate) fn take(&mut self, slot: Slot) -> Option<OwnedFd> {
        self.sockets.remove(&slot)
    }
}

/// What came from an earlier agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InheritedSockets {
    /// Pods with at least one listener.
    pub pods: usize,
    /// Listeners.
    pub sockets: usize,
    /// Sockets that are nothing the agent listens with; they were closed.
    pub refused: usize,
}

impl Node {
    /// Keeps listeners of an earlier agent for the enrolments to come.
    pub fn inherit(&self, sockets: Vec<OwnedFd>) -> InheritedSockets {
        let mut found = InheritedSockets::default();
        let mut pods = BTreeSet::new();
        let mut inherited = lock(&self.inherited_sockets);
        for socket in sockets {
            match slot_of(&self.maps, &socket) {
                Some(slot) => {
                    found.sockets += 1;
                    pods.insert(slot.netns_cookie);
                    inherited.sockets.insert(slot, socket);
                }
                None => found.refused += 1,
            }
        }
        found.pods = pods.len();
        found
    }

    /// Closes the listeners of an earlier agent that no enrolment wanted. Returns how many.
    pub fn close_inherited(&self) -> usize {
        let left = std::mem::take(&mut *lock(&self.inherited_sockets));
        left.sockets.len()
    }
}

/// What a socket is, as the kernel has it; `None`: no listener of an agent's.
fn slot_of(maps: &Maps, socket: &OwnedFd) -> Option<Slot> {
    let state = maps.socks.get(&socket.as_raw_fd()).ok().flatten()?;
    if state.role != ROLE_AGENT_LISTENER {
        return None;
    }
    let socket = SockRef::from(socket);
    let is_stream = socket.r#type().ok()? == Type::STREAM;
    if is_stream && !socket.is_listener().ok()? {
        return None;
    }
    let port = socket.local_addr().ok()?.as_socket()?.port();
    Some(Slot { netns_cookie: state.netns_cookie, port, is_stream })
}
