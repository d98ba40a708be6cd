//! Owns `sock_diag`: asking the kernel for the TCP sockets of a namespace, and closing one.
//!
//! Invariants:
//! - A socket is closed only by its cookie: the kernel's lookup by addresses falls back to listeners, and closing one
//!   of those would take an app off the network.
//! - Every answer is checked against its length; a malformed one is an error.
//!
//! Not here: which sockets matter (`direct.rs`, `forget.rs`).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use nix::{libc, sys::socket::SockProtocol};

use crate::{
    netlink::{ALL, Netlink, ONE, attributes, malformed, put_attribute, u32_at},
    netns::Netns,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
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

/// Offsets in `struct tcp_info`.
const INFO_BYTES_ACKED: usize = 120;
const INFO_BYTES_RECEIVED: usize = 128;

const TCP_LISTEN: u8 = 10;
/// States of connections that carry, or may still carry, data: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
pub(crate) const LIVE_STATES: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8;
/// The same, and those that begin or whose end is not acknowledged: SYN_SENT, SYN_RECV, LAST_ACK, CLOSING.
pub(crate) const OPEN_STATES: u32 = LIVE_STATES | 1 << 2 | 1 << 3 | 1 << 9 | 1 << 11;

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
    /// Of sockets in which states, as bits.
    pub(crate) states: u32,
    /// A socket storage map.
    pub(crate) storage: BorrowedFd<'a>,
    /// Byte counts: takes each socket's lock for a moment.
    pub(crate) bytes: bool,
}

/// A way to ask about one namespace's sockets.
#[derive(Debug)]
pub(crate) struct Diag(Netlink);

impl Diag {
    /// Asks about a pod's sockets. Blocking: a few microseconds inside the namespace.
    pub(crate) fn inside(netns: &Netns) -> io::Result<Self> {
        netns.enter(Self::here)?
    }

    /// Asks about the sockets of the calling thread's namespace.
    pub(crate) fn here() -> io::Result<Self> {
        Netlink::here(SockProtocol::NetlinkSockDiag).map(Self)
    }

    /// Calls `visit` for each TCP socket of the namespace in one of the wanted states, of both families.
    pub(crate) fn each(
        &mut self,
        wanted: Wanted<'_>,
        mut visit: impl FnMut(LiveSocket<'_>),
    ) -> io::Result<()> {
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut request = request(family as u8, if wanted.bytes { 1 << (ANSWER_INFO - 1) } else { 0 });
            request[4..8].copy_from_slice(&wanted.states.to_ne_bytes());
            let mut map = Vec::new();
            put_attribute(
                &mut map,
                REQUEST_STORAGE_MAP_FD,
                &(wanted.storage.as_raw_fd() as u32).to_ne_bytes(),
            );
            let mut request = request.to_vec();
            put_attribute(&mut request, REQUEST_STORAGES, &map);
            self.0.ask(SOCK_DIAG_BY_FAMILY, ALL, &request, |message| {
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
        let mut found = None;
        let answered = self.0.ask(SOCK_DIAG_BY_FAMILY, ONE, &request, |message| {
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
        self.0.ask(SOCK_DESTROY, ONE, &request, |_| Ok(()))
    }

    /// Whether this kernel can close connections at all (CONFIG_INET_DIAG_DESTROY, module tcp_diag).
    pub(crate) fn can_close(&mut self) -> io::Result<()> {
        // From nowhere to nowhere: cannot exist, and has a cookie nobody has.
        let nobody = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        let mut id = SocketId::between(nobody, nobody);
        id.raw[40..48].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80]);
        self.close(&id).map(drop)
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

/// Callers have checked the length.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
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
    fn a_message_that_is_too_short_is_refused() {
        assert!(live_socket(&[0; MESSAGE - 1]).is_err());
        assert!(live_socket(&[0; MESSAGE]).is_ok());
    }
}
