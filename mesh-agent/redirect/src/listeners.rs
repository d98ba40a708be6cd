//! Owns making the agent's listeners inside a pod's namespace.
//!
//! Invariant: a socket carries its role before it listens, so no connection is accepted from an untagged one
//! (the kernel clones the listener's storage to what it accepts).

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::Mutex,
    time::Duration,
};

use mesh_common::{
    ports,
    sock::{ROLE_AGENT_LISTENER, SockState},
};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    handover::{Inherited, Slot},
    map::MapError,
    maps::Maps,
    node::lock,
};

/// Connections waiting to be accepted. The kernel cuts it to `net.core.somaxconn` (4096 by default).
const BACKLOG: i32 = 4096;
/// A pod that leaves and comes back within one namespace finds its old listeners still being closed by the
/// proxy's workers; that takes a few milliseconds.
const TAKEN_RETRIES: u32 = 20;
const TAKEN_PAUSE: Duration = Duration::from_millis(5);

/// The agent's listeners in one pod.
#[derive(Debug)]
pub struct Listeners {
    /// On [`ports::OUTBOUND`], in that order; TCP.
    pub outbound: Vec<OwnedFd>,
    /// On [`ports::INBOUND`]; TCP. Accepted sockets have the original destination as local address.
    pub inbound: OwnedFd,
    /// On [`ports::HBONE`]; TCP. Peers on other nodes reach it like any port of the pod.
    pub hbone: OwnedFd,
    /// On [`ports::DNS`]; UDP.
    pub dns_udp: OwnedFd,
    /// On [`ports::DNS`]; TCP.
    pub dns_tcp: OwnedFd,
}

/// Why a listener could not be made.
#[derive(Debug)]
pub(crate) enum ListenError {
    /// Somebody in the pod has the port.
    Taken { port: u16, protocol: &'static str },
    /// Any other refusal.
    Socket { port: u16, source: io::Error },
    /// The role could not be stored.
    Role { source: MapError },
}

/// Makes all listeners in the namespace of the calling thread, but for those that an earlier agent left to this one.
pub(crate) fn listen(
    maps: &Maps,
    netns_cookie: u64,
    inherited: &Mutex<Inherited>,
) -> Result<Listeners, ListenError> {
    let listener = |kind, port| {
        let slot = Slot { netns_cookie, port, is_stream: kind == Type::STREAM };
        let left = lock(inherited).take(slot);
        left.map_or_else(|| bound(maps, netns_cookie, kind, port), Ok)
    };
    let tcp = |port| listener(Type::STREAM, port);
    Ok(Listeners {
        outbound: ports::OUTBOUND.into_iter().map(tcp).collect::<Result<_, _>>()?,
        inbound: tcp(ports::INBOUND)?,
        hbone: tcp(ports::HBONE)?,
        dns_tcp: tcp(ports::DNS)?,
        dns_udp: listener(Type::DGRAM, ports::DNS)?,
    })
}

fn bound(maps: &Maps, netns_cookie: u64, kind: Type, port: u16) -> Result<OwnedFd, ListenError> {
    let failed = |source| ListenError::Socket { port, source };
    let (socket, addr) = open(kind, port).map_err(failed)?;
    let state = SockState { role: ROLE_AGENT_LISTENER, netns_cookie, ..SockState::ZERO };
    maps.socks.put(&socket.as_fd().as_raw_fd(), &state).map_err(|source| ListenError::Role { source })?;
    for attempt in 0.. {
        let result = socket.bind(&addr.into()).and_then(|()| match kind {
            Type::STREAM => socket.listen(BACKLOG),
            _ => Ok(()),
        });
        match result {
            Ok(()) => break,
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => {
                if attempt >= TAKEN_RETRIES {
                    let protocol = if kind == Type::STREAM { "TCP" } else { "UDP" };
                    return Err(ListenError::Taken { port, protocol });
                }
                std::thread::sleep(TAKEN_PAUSE);
            }
            Err(error) => return Err(failed(error)),
        }
    }
    Ok(socket.into())
}

/// A dual-stack socket; an IPv4 one where the pod has no IPv6 at all.
fn open(kind: Type, port: u16) -> io::Result<(Socket, SocketAddr)> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let (socket, addr) = match Socket::new(Domain::IPV6, kind.nonblocking(), Some(protocol)) {
        Ok(socket) => {
            socket.set_only_v6(false)?;
            (socket, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            let socket = Socket::new(Domain::IPV4, kind.nonblocking(), Some(protocol))?;
            (socket, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))
        }
        Err(error) => return Err(error),
    };
    if kind == Type::STREAM {
        // Connections of an earlier agent in TIME_WAIT must not block the port. For UDP the option would let
        // an app of the pod share it.
        socket.set_reuse_address(true)?;
    }
    Ok((socket, addr))
}
