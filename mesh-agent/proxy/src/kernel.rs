//! What the data path asks of the kernel side: two small traits and the values they exchange.
//!
//! Invariants:
//! - Implementations never block longer than a few system calls: workers call them on the traffic path.
//! - A socket made by [`Sockets`] belongs to the pod's network namespace for its whole life.
//!
//! Not here: any implementation (the agent joins them to `mesh-redirect`; tests use plain sockets).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{BorrowedFd, OwnedFd},
};

use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::Name,
};

/// An enrolled pod, as the agent names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodHandle {
    /// Local pod id, unique on the node.
    pub pod: u32,
    /// Workload id.
    pub workload: WorkloadId,
    /// Namespace and name, for logs and views.
    pub name: Name,
    /// Cookie of the pod's network namespace: its incarnation.
    pub netns_cookie: u64,
    /// The pod's own addresses, one per family at most.
    pub addrs: Vec<IpAddr>,
}

/// The listening sockets of one pod, made in its namespace: non-blocking, listening (UDP: bound).
#[derive(Debug)]
pub struct PodListeners {
    /// Outbound TCP, one per outbound port.
    pub outbound: Vec<OwnedFd>,
    /// Inbound plaintext TCP: arrivals keep the address they dialled as the accepted socket's own address.
    pub inbound: OwnedFd,
    /// HBONE: TLS connections of agents on other nodes, for apps of this pod.
    pub hbone: OwnedFd,
    /// DNS over UDP.
    pub dns_udp: OwnedFd,
    /// DNS over TCP.
    pub dns_tcp: OwnedFd,
}

/// What an upstream socket is for; becomes the socket's storage in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamTags {
    /// The client's workload.
    pub src_workload: Option<WorkloadId>,
    /// The server's workload.
    pub dst_workload: Option<WorkloadId>,
    /// The service that was dialled.
    pub service: Option<ServiceId>,
    /// The agent's socket to a local app (true) or to a server elsewhere (false).
    pub inbound: bool,
    /// Ask for a ticket: the server is on this node and its side was decided already.
    pub ticket: Option<TicketRequest>,
    /// Show the app this client address instead of the agent's.
    pub client_addr: Option<SocketAddr>,
    /// It carries connections that are counted one by one elsewhere, so it counts as none itself.
    pub tunnel: bool,
}

/// What a ticket is valid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TicketRequest {
    /// Netns cookie of the destination.
    pub incarnation: u64,
    /// Policy generation of the destination, read *before* its policy was evaluated.
    pub policy_gen: u64,
}

/// What an accepted socket on an outbound port was meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dialled {
    /// What the app dialled.
    pub dst: SocketAddr,
    /// The backend the kernel's load balancer drew.
    pub backend: Option<SocketAddr>,
    /// The service the kernel matched.
    pub service: Option<ServiceId>,
    /// CLOCK_MONOTONIC nanoseconds of the app's connect.
    pub started_ns: u64,
}

/// A workload enrolled on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalPeer {
    /// Netns cookie.
    pub incarnation: u64,
    /// Current policy generation.
    pub policy_gen: u64,
}

/// A policy decision for the kernel to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerdictEntry {
    /// Destination workload.
    pub dst: WorkloadId,
    /// Netns cookie of the destination.
    pub incarnation: u64,
    /// Policy generation read before the evaluation: the entry is void under any other.
    pub policy_gen: u64,
    /// Destination port.
    pub port: u16,
    /// IPv4 (true) or IPv6.
    pub v4: bool,
    /// Whether the connection may go Direct.
    pub allow: bool,
}

/// What the kernel measured of a connected TCP socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpFigures {
    /// Smoothed round trip time in microseconds.
    pub srtt_us: u32,
    /// The peer has acknowledged nothing for so long that bytes were sent again, and has not answered since.
    pub unanswered: bool,
}

/// Makes sockets in a pod's network namespace.
pub trait Sockets: Send + Sync + 'static {
    /// A TCP socket of `dst`'s family: non-blocking, close-on-exec, unconnected, tagged.
    ///
    /// # Errors
    /// Whatever the kernel says to `setns` or `socket`.
    fn tcp(&self, pod: &PodHandle, dst: SocketAddr, tags: &UpstreamTags) -> io::Result<OwnedFd>;

    /// A UDP socket of `dst`'s family: non-blocking, close-on-exec, unconnected, never redirected.
    ///
    /// # Errors
    /// Whatever the kernel says to `setns` or `socket`.
    fn udp(&self, pod: &PodHandle, dst: SocketAddr) -> io::Result<OwnedFd>;
}

/// Everything else the data path asks the kernel.
pub trait Kernel: Send + Sync + 'static {
    /// The original destination of an accepted outbound socket; `None` closes and counts it, nothing is guessed.
    fn dialled(&self, accepted: BorrowedFd<'_>) -> Option<Dialled>;

    /// The workload, if it is enrolled on this node. Called before policy is evaluated.
    fn local_peer(&self, workload: WorkloadId) -> Option<LocalPeer>;

    /// Caches a verdict for later connects of `client`.
    fn put_verdict(&self, client: &PodHandle, verdict: VerdictEntry);

    /// The resolver the pod dialled when it sent a query from `client_port`.
    fn resolver(&self, pod: &PodHandle, client_port: u16, v4: bool) -> Option<SocketAddr>;

    /// What the kernel measured of a TCP socket; `None` where it cannot be asked.
    fn tcp_figures(&self, _socket: BorrowedFd<'_>) -> Option<TcpFigures> {
        None
    }
}
