//! Tickets: the kernel's proof, for one exact connection, that the client side was decided on this node.

use crate::Addr;

shared! {
    /// Key of `TICKETS` and `CLIENT_ADDR`: a connection as the client's packets show it.
    pub struct TupleKey {
        /// Client address.
        pub src: Addr,
        /// Server address.
        pub dst: Addr,
        /// Client port, host order.
        pub sport: u16,
        /// Server port, host order.
        pub dport: u16,
    }
}

shared! {
    /// Value of `TICKETS`. Written at TCP_CONNECT_CB, before the SYN leaves.
    pub struct Ticket {
        /// Source workload id; 0 for a kubelet probe.
        pub src_workload: u64,
        /// Destination workload id.
        pub dst_workload: u64,
        /// Destination's netns cookie.
        pub incarnation: u64,
        /// Destination's policy generation the verdict was made for.
        pub policy_gen: u64,
        /// CLOCK_MONOTONIC nanoseconds after which the ticket is void.
        pub expires_ns: u64,
        /// Netns cookie of the source, whose count in `TICKETS_USED` it takes.
        pub netns_cookie: u64,
    }
}
