//! Owns `sock_diag`: asking the kernel for the TCP sockets of a namespace, and closing one.
//!
//! Invariants:
//! - A socket is closed only by its cookie: the kernel's lookup by addresses falls back to listeners, and closing one
//!   of those would take an app off the network.
//! - Every read has a time limit and every answer is checked against its length; a malformed one is an error.
//!
//! Not here: which sockets matter (`direct.rs`).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
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

use crate::netns::Netns;

/// What a question may take; the kernel answers while it is asked, so this is for a broken kernel only.
const ANSWER_LIMIT_S: i64 = 2;
/// The largest part of a dump the kernel sends at once.
const PART_MAX: usize = 64 * 1024;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const HEADER: usize = 16;
const REQUEST: usize = 56;
const MESSAGE: usize = 72;
const SOCKET_ID: usize = 48;

/// Attributes of a request and of an answer (`linux/inet_diag.h`, `linux/sock_diag.h`).
const REQUEST_STORAGES: u16 = 2;
const REQUEST_STORAGE_MAP_FD: u16 = 1;
const ANSWER_INFO: u16 = 2;
const ANSWER_STORAGES: u16 = 20;
const STORAGE: u16 = 1;
const STORAGE_VALUE: u16 = 3;
/// Upper bits of an attribute's type are flags.
const ATTRIBUTE_TYPE: u16 = 0x3fff;

/// Offsets in `struct tcp_info`.
const INFO_BYTES_ACKED: usize = 120;
const INFO_BYTES_RECEIVED: usize = 128;

const TCP_LISTEN: u8 = 10;
/// Connections that carry, or may still carry, data: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
const LIVE_STATES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8;

/// One socket, as the kernel names it: family, addresses, ports, interface, cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SocketId {
    family: u8,
    raw: [u8; SOCKET_ID],
}

impl SocketId {
    /// The socket that has these two ends, whichever it is: without a cookie.
    fn between(local: SocketAddr, remote: SocketAddr) -> Self {
        let mut raw = [0; SOCKET_ID];
        raw[0..2].copy_from_slice(&local.port().to_be_bytes());
        raw[2..4].copy_from_slice(&remote.port().to_be_bytes());
        let family = match (local.ip().to_canonical(), remote.ip().to_canonical()) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                raw[4..8].copy_from_slice(&local.octets());
                raw[20..24].copy_from_slice(&remote.octets());
                libc::AF_INET
            }
            (local, remote) => {
                let octets = |ip: IpAddr| match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                raw[4..20].copy_from_slice(&octets(local));
                raw[20..36].copy_from_slice(&octets(remote));
                libc::AF_INET6
            }
        };
        raw[40..48].fill(0xff);
        Self { family: family as u8, raw }
    }

    /// The kernel's cookie: never reused.
    pub(crate) fn cookie(&self) -> u64 {
        u64::from(u32_at(&self.raw, 40)) | u64::from(u32_at(&self.raw, 44)) << 32
    }

    /// This end. IPv4 also for a mapped IPv6 socket.
    pub(crate) fn local(&self) -> SocketAddr {
        SocketAddr::new(self.ip(4), u16::from_be_bytes([self.raw[0], self.raw[1]]))
    }

    /// The other end.
    pub(crate) fn remote(&self) -> SocketAddr {
        SocketAddr::new(self.ip(20), u16::from_be_bytes([self.raw[2], self.raw[3]]))
    }

    fn ip(&self, at: usize) -> IpAddr {
        let mut octets = [0; 16];
        octets.copy_from_slice(&self.raw[at..at + 16]);
        if i32::from(self.family) == libc::AF_INET {
            return Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into();
        }
        Ipv6Addr::from(octets).to_canonical()
    }
}

/// A live TCP socket.
#[derive(Debug)]
pub(crate) struct LiveSocket<'a> {
    pub(crate) id: SocketId,
    /// Its value in the socket storage that was asked for, if it has one.
    pub(crate) storage: Option<&'a [u8]>,
    /// Bytes the peer has acknowledged, and bytes received; only if asked for.
    pub(crate) bytes: Option<(u64, u64)>,
}

/// What a dump shall contain beside the sockets' names.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// A socket storage map.
    pub(crate) storage: BorrowedFd<'a>,
    /// Byte counts: takes each socket's lock for a moment.
    pub(crate) bytes: bool,
}

/// A way to ask about one namespace's sockets.
#[derive(Debug)]
pub(crate) struct Diag {
    socket: OwnedFd,
    sequence: u32,
}

impl Diag {
    /// Asks about a pod's sockets. Blocking: a few microseconds inside the namespace.
    pub(crate) fn inside(netns: &Netns) -> io::Result<Self> {
        netns.enter(Self::here)?
    }

    /// Asks about the sockets of the calling thread's namespace.
    pub(crate) fn here() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            Some(SockProtocol::NetlinkSockDiag),
        )?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_LIMIT_S, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Calls `visit` for each live TCP socket of the namespace, of both families.
    pub(crate) fn each(
        &mut self,
        wanted: Wanted<'_>,
        mut visit: impl FnMut(LiveSocket<'_>),
    ) -> io::Result<()> {
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut request = request(family as u8, if wanted.bytes { 1 << (ANSWER_INFO - 1) } else { 0 });
            let map = (wanted.storage.as_raw_fd() as u32).to_ne_bytes();
            let inner = attribute(REQUEST_STORAGE_MAP_FD, &map);
            let attributes = attribute(REQUEST_STORAGES, &inner);
            request[4..8].copy_from_slice(&LIVE_STATES.to_ne_bytes());
            let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
            self.ask(SOCK_DIAG_BY_FAMILY, flags, &request, &attributes)?;
            self.answers(|message| {
                visit(live_socket(message)?);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// The connected socket with these ends, if there is one.
    pub(crate) fn find(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<SocketId>> {
        let wanted = SocketId::between(local, remote);
        let mut request = request(wanted.family, 0);
        request[8..].copy_from_slice(&wanted.raw);
        self.ask(SOCK_DIAG_BY_FAMILY, libc::NLM_F_REQUEST | libc::NLM_F_ACK, &request, &[])?;
        let mut found = None;
        let answered = self.answers(|message| {
            let state = message.get(1).copied().ok_or_else(malformed)?;
            let id = live_socket(message)?.id;
            if state != TCP_LISTEN && id.local() == local && id.remote() == remote {
                found = Some(id);
            }
            Ok(())
        });
        match answered {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            other => other.map(|()| found),
        }
    }

    /// Aborts a connection: the app gets ECONNABORTED, the peer a reset. `false`: it was gone already.
    pub(crate) fn close(&mut self, id: &SocketId) -> io::Result<bool> {
        // Without a cookie the kernel would take a listener for it.
        if id.cookie() == u64::MAX {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        match self.destroy(id) {
            Ok(()) => Ok(true),
            // No such socket; or another one by now, which the cookie tells.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn destroy(&mut self, id: &SocketId) -> io::Result<()> {
        let mut request = request(id.family, 0);
        request[8..].copy_from_slice(&id.raw);
        self.ask(SOCK_DESTROY, libc::NLM_F_REQUEST | libc::NLM_F_ACK, &request, &[])?;
        self.answers(|_| Ok(()))
    }

    /// Whether this kernel can close connections at all (CONFIG_INET_DIAG_DESTROY, module tcp_diag).
    pub(crate) fn can_close(&mut self) -> io::Result<()> {
        // From nowhere to nowhere: cannot exist, and has a cookie nobody has.
        let nobody = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        let mut id = SocketId::between(nobody, nobody);
        id.raw[40..48].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80]);
        self.close(&id).map(drop)
    }

    fn ask(&mut self, kind: u16, flags: i32, body: &[u8], attributes: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let len = HEADER + body.len() + attributes.len();
        let mut message = Vec::with_capacity(len);
        message.extend_from_slice(&(len as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(flags as u16).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&0_u32.to_ne_bytes());
        message.extend_from_slice(body);
        message.extend_from_slice(attributes);
        let sent = send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        if sent == len { Ok(()) } else { Err(malformed()) }
    }

    /// Reads until the kernel says that it is done; the answers to earlier questions are skipped.
    fn answers(&mut self, mut visit: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = vec![0; PART_MAX];
        loop {
            let len = recv(self.socket.as_fd().as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC)?;
            let mut rest = buffer.get(..len).ok_or_else(malformed)?;
            while rest.len() >= HEADER {
                let len = u32_at(rest, 0) as usize;
                let body = rest.get(HEADER..len).ok_or_else(malformed)?;
                let (kind, sequence) = (u16::from_ne_bytes([rest[4], rest[5]]), u32_at(rest, 8));
                rest = rest.get(aligned(len)..).unwrap_or_default();
                if sequence != self.sequence {
                    continue;
                }
                match i32::from(kind) {
                    libc::NLMSG_DONE => return Ok(()),
                    libc::NLMSG_ERROR if body.len() < 4 => return Err(malformed()),
                    libc::NLMSG_ERROR => {
                        return match u32_at(body, 0) as i32 {
                            0 => Ok(()),
                            error => Err(io::Error::from_raw_os_error(-error)),
                        };
                    }
                    _ => visit(body)?,
                }
            }
        }
    }
}

/// `struct inet_diag_req_v2` without states and id.
fn request(family: u8, extensions: u8) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    request[0] = family;
    request[1] = libc::IPPROTO_TCP as u8;
    request[2] = extensions;
    request
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = Vec::with_capacity(aligned(len));
    bytes.extend_from_slice(&(len as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(aligned(len), 0);
    bytes
}

fn live_socket(message: &[u8]) -> io::Result<LiveSocket<'_>> {
    let fixed = message.get(..MESSAGE).ok_or_else(malformed)?;
    let mut raw = [0; SOCKET_ID];
    raw.copy_from_slice(&fixed[4..4 + SOCKET_ID]);
    let mut socket = LiveSocket { id: SocketId { family: fixed[0], raw }, storage: None, bytes: None };
    for (kind, value) in attributes(&message[MESSAGE..]) {
        match kind {
            ANSWER_STORAGES => {
                let one = attributes(value).find(|(kind, _)| *kind == STORAGE);
                socket.storage = one
                    .and_then(|(_, one)| attributes(one).find(|(kind, _)| *kind == STORAGE_VALUE))
                    .map(|(_, value)| value);
            }
            ANSWER_INFO if value.len() >= INFO_BYTES_RECEIVED + 8 => {
                socket.bytes = Some((u64_at(value, INFO_BYTES_ACKED), u64_at(value, INFO_BYTES_RECEIVED)));
            }
            _ => {}
        }
    }
    Ok(socket)
}

/// The attributes in `bytes`, up to the first that does not fit.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
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
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed answer of sock_diag")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_the_ends_it_was_named_by_in_both_families() {
        for (local, remote) in [
            ("10.0.0.1:80", "10.0.0.2:40000"),
            ("[fd00::1]:80", "[fd00::2]:40000"),
            ("0.0.0.0:1", "[fd00::2]:2"),
        ] {
            let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
            let id = SocketId::between(local, remote);
            assert_eq!((id.local(), id.remote()), (local, remote));
            assert_eq!(id.cookie(), u64::MAX);
        }
    }

    #[test]
    fn attributes_that_do_not_fit_end_the_walk() {
        let mut bytes = attribute(7, &[1, 2, 3, 4, 5]);
        bytes.extend(attribute(8 | 0x8000, &[9]));
        let all: Vec<_> = attributes(&bytes).collect();
        assert_eq!(all, [(7, &[1_u8, 2, 3, 4, 5][..]), (8, &[9][..])]);
        assert_eq!(attributes(&bytes[..bytes.len() - 4]).count(), 1);
        assert_eq!(attributes(&[2, 0, 1, 0]).count(), 0, "shorter than its own header");
        assert_eq!(attributes(&[0, 0, 0, 0, 0, 0]).count(), 0);
    }

    #[test]
    fn a_message_that_is_too_short_is_refused() {
        assert!(live_socket(&[0; MESSAGE - 1]).is_err());
        assert!(live_socket(&[0; MESSAGE]).is_ok());
    }
}
