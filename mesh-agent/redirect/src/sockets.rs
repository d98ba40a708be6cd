//! Owns making upstream sockets inside pods and reading what accepted sockets dialled.
//!
//! Invariants:
//! - A socket handed out is tagged as the agent's own: its connect is never redirected.
//! - Sockets are non-blocking, close-on-exec and unconnected.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use mesh_common::{
    Addr,
    addr::{FAMILY_V4, FAMILY_V6},
    sock::{
        DnsKey, ROLE_AGENT_ACCEPTED, ROLE_AGENT_UPSTREAM, SOCK_BACKEND, SOCK_CLIENT_ADDR, SOCK_EDGE,
        SOCK_EDGE_INBOUND, SOCK_TICKET, SockState,
    },
    stats::Reason,
};
use mesh_core::id::{ServiceId, WorkloadId};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{clock, map::MapError, maps::Maps, netns::Netns, sys};

/// What an upstream socket is for.
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketTags {
    /// Who dials, for the edge.
    pub src_workload: Option<WorkloadId>,
    /// Who is dialled, for the edge and the ticket.
    pub dst_workload: Option<WorkloadId>,
    /// Service that was dialled, for the edge.
    pub service: Option<ServiceId>,
    /// The dial is towards the pod the socket is in (accounted as inbound).
    pub inbound: bool,
    /// Ask for a ticket: the destination is on this node.
    pub ticket: Option<TicketTag>,
    /// The app sees this client instead of the agent's own address.
    pub client_addr: Option<SocketAddr>,
    /// It carries connections that are counted elsewhere: it has no edge of its own.
    pub tunnel: bool,
}

/// What a ticket vouches for.
#[derive(Clone, Copy, Debug)]
pub struct TicketTag {
    /// The destination pod's netns cookie.
    pub incarnation: u64,
    /// The destination's policy generation, read before the policy was evaluated.
    pub policy_gen: u64,
}

/// What an accepted connection dialled before it was redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialled {
    /// What the app dialled.
    pub dst: SocketAddr,
    /// The backend the kernel's balancer drew.
    pub backend: Option<SocketAddr>,
    /// Workload of that backend.
    pub dst_workload: Option<WorkloadId>,
    /// Service that was dialled.
    pub service: Option<ServiceId>,
    /// CLOCK_MONOTONIC nanoseconds of the connect.
    pub started_ns: u64,
    /// Why it is proxied.
    pub reason: Option<Reason>,
}

/// Makes sockets in one pod. Cheap to clone.
#[derive(Clone, Debug)]
pub struct PodSockets {
    netns: Arc<Netns>,
    maps: Arc<Maps>,
}

impl PodSockets {
    pub(crate) fn new(netns: Arc<Netns>, maps: Arc<Maps>) -> Self {
        Self { netns, maps }
    }

    /// The pod's namespace.
    pub fn netns(&self) -> &Arc<Netns> {
        &self.netns
    }

    /// A TCP socket for a connect to `dst`. Blocking: a few microseconds on the calling thread.
    pub fn tcp(&self, dst: SocketAddr, tags: &SocketTags) -> io::Result<OwnedFd> {
        let socket = self.socket(dst, Type::STREAM, Protocol::TCP)?;
        let state = self.upstream_state(dst, tags);
        self.tag(&socket, &state)?;
        Ok(socket.into())
    }

    /// A UDP socket for datagrams to `dst`.
    pub fn udp(&self, dst: SocketAddr) -> io::Result<OwnedFd> {
        let socket = self.socket(dst, Type::DGRAM, Protocol::UDP)?;
        let state =
            SockState { role: ROLE_AGENT_UPSTREAM, netns_cookie: self.netns.cookie(), ..SockState::ZERO };
        self.tag(&socket, &state)?;
        Ok(socket.into())
    }

    fn socket(&self, dst: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
        self.netns.enter(|| Socket::new(Domain::for_address(dst), kind.nonblocking(), Some(protocol)))?
    }

    fn tag(&self, socket: &Socket, state: &SockState) -> io::Result<()> {
        self.maps.socks.put(&socket.as_raw_fd(), state).map_err(|error| error.source)
    }

    fn upstream_state(&self, dst: SocketAddr, tags: &SocketTags) -> SockState {
        let edge = match (tags.tunnel, tags.inbound) {
            (true, _) => 0,
            (false, true) => SOCK_EDGE | SOCK_EDGE_INBOUND,
            (false, false) => SOCK_EDGE,
        };
        let mut state = SockState {
            backend: dst.ip().into(),
            backend_port: dst.port(),
            src_workload: tags.src_workload.map_or(0, |id| id.0),
            dst_workload: tags.dst_workload.map_or(0, |id| id.0),
            service: tags.service.map_or(0, |id| id.0),
            started_ns: clock::monotonic_ns(),
            netns_cookie: self.netns.cookie(),
            role: ROLE_AGENT_UPSTREAM,
            flags: SOCK_BACKEND | edge,
            ..SockState::ZERO
        };
        if let Some(ticket) = tags.ticket {
            state.incarnation = ticket.incarnation;
            state.policy_gen = ticket.policy_gen;
            state.flags |= SOCK_TICKET;
        }
        if let Some(client) = tags.client_addr {
            state.shown = client.ip().into();
            state.shown_port = client.port();
            state.flags |= SOCK_CLIENT_ADDR;
        }
        state
    }
}

/// What the kernel measured of a TCP connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFigures {
    /// Smoothed round trip time in microseconds.
    pub srtt_us: u32,
    /// Times in a row that the retransmission timer ran out without an answer since.
    pub timeouts: u8,
}

impl TcpFigures {
    /// Of a connected TCP socket.
    ///
    /// # Errors
    /// As `getsockopt(2)`, e.g. for a socket of another kind.
    pub fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let info = sys::tcp_info(socket)?;
        Ok(Self { srtt_us: info.tcpi_rtt, timeouts: info.tcpi_retransmits })
    }
}

/// Reads what the kernel knows of the agent's sockets. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Origins {
    maps: Arc<Maps>,
}

impl Origins {
    /// Over the node's maps.
    pub fn new(maps: &Arc<Maps>) -> Self {
        Self { maps: Arc::clone(maps) }
    }

    /// What a connection accepted on an outbound port dialled. `None`: the kernel lost it; the connection must
    /// be closed and counted, never guessed at.
    pub fn dialled(&self, accepted: BorrowedFd<'_>) -> Result<Option<Dialled>, MapError> {
        let Some(state) = self.maps.socks.get(&accepted.as_raw_fd())? else {
            return Ok(None);
        };
        if state.role != ROLE_AGENT_ACCEPTED {
            return Ok(None);
        }
        let some = |id: u64| (id != 0).then_some(id);
        let backend = (state.flags & SOCK_BACKEND != 0)
            .then(|| SocketAddr::new(IpAddr::from(state.backend), state.backend_port));
        Ok(Some(Dialled {
            dst: SocketAddr::new(IpAddr::from(state.shown), state.shown_port),
            backend,
            dst_workload: some(state.dst_workload).map(WorkloadId),
            service: some(state.service).map(ServiceId),
            started_ns: state.started_ns,
            reason: Reason::from_index(state.reason),
        }))
    }

    /// The resolver a pod's DNS query was meant for: by source port when the kernel knew it, else the last one
    /// the pod asked.
    pub fn resolver(&self, netns_cookie: u64, client_port: u16, v4: bool) -> Option<SocketAddr> {
        let family = u16::from(if v4 { FAMILY_V4 } else { FAMILY_V6 });
        let look_up = |sport| {
            let key = DnsKey { netns_cookie, sport, family, pad: 0 };
            self.maps.dns_orig.get(&key).ok().flatten()
        };
        let found = look_up(client_port).or_else(|| look_up(0))?;
        Some(SocketAddr::new(IpAddr::from(found.addr), found.port))
    }
}

/// The enrolled pods of the node, as a dialler needs them.
#[derive(Clone, Debug)]
pub struct LocalPeers {
    maps: Arc<Maps>,
}

/// An enrolled pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPeer {
    /// Netns cookie.
    pub incarnation: u64,
    /// Current policy generation. Read it before evaluating.
    pub policy_gen: u64,
}

impl LocalPeers {
    /// Over the node's maps.
    pub fn new(maps: &Arc<Maps>) -> Self {
        Self { maps: Arc::clone(maps) }
    }

    /// The pod that has this address, if it is enrolled here.
    pub fn at(&self, addr: IpAddr) -> Option<(WorkloadId, LocalPeer)> {
        let entry = self.maps.workloads.get(&Addr::from(addr)).ok().flatten()?;
        if entry.incarnation == 0 {
            return None;
        }
        let policy_gen = self.policy_gen(WorkloadId(entry.workload))?;
        Some((WorkloadId(entry.workload), LocalPeer { incarnation: entry.incarnation, policy_gen }))
    }

    /// Current policy generation of an enrolled pod.
    pub fn policy_gen(&self, workload: WorkloadId) -> Option<u64> {
        self.maps.policy_gen.get(&workload.0).ok().flatten().map(|now| now.generation)
    }
}
