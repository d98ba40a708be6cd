//! What a worker shares with other threads: its settings and traits, its commands, and the counters others look at.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use nix::time::{ClockId, clock_gettime};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use mesh_core::id::WorkloadId;
use mesh_identity::Certificates;

use crate::{
    close::Direction,
    connections::{Admission, ConnectionView},
    destination::{
        Outstanding,
        by_name::CalledNames,
        limits::{Limits, Scope},
    },
    kernel::{Kernel, PodHandle, Sockets},
    layers::tls::Origination,
    listener,
    metrics::Metrics,
    settings::Settings,
};

/// What all workers share.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) sockets: Arc<dyn Sockets>,
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) metrics: Arc<Metrics>,
    /// Certificates of this node's workloads.
    pub(crate) certificates: Arc<Certificates>,
    /// Inbound TLS handshakes now.
    pub(crate) handshakes: Admission,
    /// What is in use at destinations.
    pub(crate) limits: Limits,
    /// Connections that this node's workloads have taken, by workload and port.
    pub(crate) inbound: Limits<(WorkloadId, u16)>,
    /// What is known of servers that clients call by name.
    pub(crate) called_names: CalledNames,
    /// TLS that policies want towards endpoints.
    pub(crate) origination: Origination,
    pub(crate) admission: Arc<Admission>,
    pub(crate) links: Vec<Link>,
    /// Called with the oldest stamp (CLOCK_MONOTONIC nanoseconds) over all workers.
    pub(crate) alive: Box<dyn Fn(u64) + Send + Sync>,
}

/// What other threads see of a worker.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) commands: mpsc::Sender<Command>,
    /// Connections it carries or is about to.
    pub(super) carried: AtomicUsize,
    /// CLOCK_MONOTONIC nanoseconds of its last tick.
    pub(super) stamp_ns: AtomicU64,
}

impl Link {
    pub(crate) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self { commands, carried: AtomicUsize::new(0), stamp_ns: AtomicU64::new(monotonic_ns()) }
    }
}

/// A pod as the workers share it.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) handle: Arc<PodHandle>,
    /// Its proxied connections.
    pub(crate) admission: Arc<Admission>,
    /// Port of its inbound listener.
    pub(crate) inbound_port: u16,
    /// Ports of all the agent's listeners in it.
    pub(crate) private_ports: Vec<u16>,
    /// Its inbound TLS handshakes now.
    pub(crate) handshakes: Admission,
    /// Forwarded DNS queries in flight.
    pub(crate) dns_in_flight: Admission,
    /// DNS connections over TCP.
    pub(crate) dns_connections: Admission,
}

/// A connection fresh from `accept`, not yet known to any event loop.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) socket: TcpStream,
    pub(crate) client: SocketAddr,
    pub(crate) arrival: Arrival,
    pub(crate) pod: Arc<Pod>,
}

/// What an accepted connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// One connection of an app.
    Tcp(Direction),
    /// A tunnel of an agent elsewhere.
    Tunnel,
}

/// What other threads ask of a worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve some of a pod's listeners.
    Serve { pod: Arc<Pod>, listeners: Vec<listener::Listener>, done: oneshot::Sender<std::io::Result<()>> },
    /// Close a pod's listeners; its connections live on.
    Remove { pod: u32, done: oneshot::Sender<()> },
    /// Carry a connection that another worker accepted.
    Adopt(Accepted),
    /// Close a connection to this destination that nobody uses: another worker waits for one.
    MakeRoom(Scope),
    /// The same for a port of a local workload.
    MakeRoomAt(WorkloadId, u16),
    /// Show up to `max` connections.
    List { max: usize, done: oneshot::Sender<Vec<ConnectionView>> },
    /// Say how many requests are outstanding, by destination and endpoint.
    ListActive { done: oneshot::Sender<Outstanding> },
    /// Give second descriptors of all listeners.
    Duplicate { done: oneshot::Sender<std::io::Result<Vec<OwnedFd>>> },
    /// Close all listeners, wait for connections until `deadline`, reset the rest and say how many those were.
    Drain { deadline: Instant, queued: listener::Queued, done: oneshot::Sender<usize> },
}

/// Now, for liveness stamps.
pub(super) fn monotonic_ns() -> u64 {
    // CLOCK_MONOTONIC always exists; 0 reads as "long ago", which fails safe.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
}
