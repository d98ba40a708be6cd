//! What a socket carries, and the two maps that hand it from the client socket to the accepted one.

use crate::Addr;

shared! {
    /// Value of `SOCKS` (socket storage, cloned from a listener to the sockets it accepts). User space reads it by
    /// descriptor, and that of other processes' sockets through `sock_diag`.
    ///
    /// The only proof that a socket is the agent's is its `role`, set by fd from user space or by
    /// the connect hook; marks, ports and cgroups are never trusted.
    pub struct SockState {
        /// Address `getpeername` shows: what the app dialled, or the real client of an accepted socket.
        pub shown: Addr,
        /// Backend the kernel chose (Direct: where the connection goes; Proxy: a hint for the agent).
        pub backend: Addr,
        /// Source workload id.
        pub src_workload: u64,
        /// Destination workload id, 0 when unknown.
        pub dst_workload: u64,
        /// Service id, 0 when none.
        pub service: u64,
        /// Destination's netns cookie, for the ticket.
        pub incarnation: u64,
        /// Destination's policy generation as read before the decision, for the ticket.
        pub policy_gen: u64,
        /// CLOCK_MONOTONIC nanoseconds of the connect.
        pub started_ns: u64,
        /// Netns cookie the socket was opened in.
        pub netns_cookie: u64,
        /// Port of `shown`, host order.
        pub shown_port: u16,
        /// Port of `backend`, host order.
        pub backend_port: u16,
        /// `ROLE_*`.
        pub role: u8,
        /// `SOCK_*` flags.
        pub flags: u8,
        /// `Reason` of the decision (see [`crate::stats::Reason`]).
        pub reason: u8,
        /// Connect latency histogram bucket was recorded (1) or not (0).
        pub established: u8,
    }
}

/// No role: the storage exists but means nothing.
pub const ROLE_NONE: u8 = 0;
/// App socket whose connection goes to the in-pod outbound listener.
pub const ROLE_CLIENT_PROXY: u8 = 1;
/// App socket whose connection goes straight to a backend.
pub const ROLE_CLIENT_DIRECT: u8 = 2;
/// The agent's listener (any in-pod port). Cloned to what it accepts until sock_ops says more.
pub const ROLE_AGENT_LISTENER: u8 = 3;
/// Accepted by the agent on an outbound port; `shown` is the original destination.
pub const ROLE_AGENT_ACCEPTED: u8 = 4;
/// The agent's own upstream socket: never redirected.
pub const ROLE_AGENT_UPSTREAM: u8 = 5;
/// The app's accepted socket behind the agent; `shown` is the real client.
pub const ROLE_APP_ACCEPTED: u8 = 6;
/// A kubelet probe.
pub const ROLE_PROBE: u8 = 7;

/// TCP_CONNECT_CB writes a ticket for this connection.
pub const SOCK_TICKET: u8 = 1;
/// TCP_CONNECT_CB publishes `shown` as the client address for the accepting app.
pub const SOCK_CLIENT_ADDR: u8 = 1 << 1;
/// Closing adds to an edge (set for Direct clients and the agent's upstream sockets).
pub const SOCK_EDGE: u8 = 1 << 2;
/// The edge is inbound (the agent's socket to the app) rather than outbound.
pub const SOCK_EDGE_INBOUND: u8 = 1 << 3;
/// `getpeername` shows `shown`.
pub const SOCK_SHOW: u8 = 1 << 4;
/// `backend` holds a hint (Proxy) or the destination (Direct).
pub const SOCK_BACKEND: u8 = 1 << 5;

shared! {
    /// Key of `ORIG_DST`: the in-pod hop as the accepted side will see it.
    pub struct OrigKey {
        /// Client address of the hop (the pod itself).
        pub src: Addr,
        /// Address dialled on the hop (the pod itself).
        pub dst: Addr,
        /// Netns cookie: another namespace's entry can never match.
        pub netns_cookie: u64,
        /// Source port, host order.
        pub sport: u16,
        /// Destination port, host order.
        pub dport: u16,
        /// Zero.
        pub pad: u32,
    }
}

shared! {
    /// Value of `ORIG_DST`, moved into the accepted socket's [`SockState`].
    pub struct OrigDst {
        /// What the app dialled.
        pub addr: Addr,
        /// The backend the kernel's load balancer drew, if `SOCK_BACKEND` is in `flags`.
        pub backend: Addr,
        /// Workload of that backend.
        pub dst_workload: u64,
        /// Service id, 0 when none.
        pub service: u64,
        /// CLOCK_MONOTONIC nanoseconds of the connect.
        pub started_ns: u64,
        /// Port of `addr`, host order.
        pub port: u16,
        /// Port of `backend`, host order.
        pub backend_port: u16,
        /// `SOCK_*` flags.
        pub flags: u8,
        /// Why the connection is proxied ([`crate::stats::Reason`]).
        pub reason: u8,
        /// Zero.
        pub pad: u16,
    }
}

shared! {
    /// Value of `CLIENT_ADDR` and `DNS_ORIG`: an address and port.
    pub struct ClientAddr {
        /// Address.
        pub addr: Addr,
        /// Port, host order.
        pub port: u16,
        /// Zero.
        pub pad: [u16; 3],
    }
}

shared! {
    /// Key of `DNS_ORIG`.
    pub struct DnsKey {
        /// Netns cookie of the pod.
        pub netns_cookie: u64,
        /// Source port when it was known, 0 for "the last resolver this pod used".
        pub sport: u16,
        /// [`crate::addr::FAMILY_V4`] or [`crate::addr::FAMILY_V6`].
        pub family: u16,
        /// Zero.
        pub pad: u32,
    }
}

shared! {
    /// Key of `UDP_PEERS`.
    pub struct UdpPeerKey {
        /// Socket cookie of the client socket.
        pub sock_cookie: u64,
        /// Address the replies come from.
        pub addr: Addr,
        /// Port, host order.
        pub port: u16,
        /// Zero.
        pub pad: [u16; 3],
    }
}

shared! {
    /// Value of `UDP_PEERS`: the address the app dialled.
    pub struct UdpPeer {
        /// Virtual address.
        pub addr: Addr,
        /// Port, host order.
        pub port: u16,
        /// Zero.
        pub pad: [u16; 3],
    }
}
