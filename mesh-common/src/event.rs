//! Records of the event ring.

use crate::Addr;

shared! {
    /// One opening, closing or denial of a followed connection.
    pub struct Event {
        /// CLOCK_MONOTONIC nanoseconds.
        pub at_ns: u64,
        /// Socket cookie; equal in the open and close of one connection. 0 for arrivals denied by sk_lookup.
        pub sock_cookie: u64,
        /// Netns cookie of the client, 0 when unknown.
        pub netns_cookie: u64,
        /// Source workload id.
        pub src_workload: u64,
        /// Destination workload id.
        pub dst_workload: u64,
        /// Service id.
        pub service: u64,
        /// Bytes sent by the followed socket (close only).
        pub bytes_tx: u64,
        /// Bytes received by the followed socket (close only).
        pub bytes_rx: u64,
        /// Nanoseconds from connect to close (close only).
        pub duration_ns: u64,
        /// Local address.
        pub src: Addr,
        /// Remote address.
        pub dst: Addr,
        /// What the app dialled.
        pub dialled: Addr,
        /// Local port.
        pub sport: u16,
        /// Remote port.
        pub dport: u16,
        /// Port of `dialled`.
        pub dialled_port: u16,
        /// `EVENT_*`.
        pub kind: u8,
        /// `ROLE_*` of the socket, 0 for arrivals.
        pub role: u8,
        /// Smoothed RTT in microseconds (close only).
        pub srtt_us: u32,
        /// Retransmitted segments (close only).
        pub retrans: u16,
        /// [`crate::stats::Reason`].
        pub reason: u8,
        /// Zero.
        pub pad: u8,
    }
}

/// A connection was established.
pub const EVENT_OPEN: u8 = 1;
/// A followed connection ended.
pub const EVENT_CLOSE: u8 = 2;
/// A connect or an arrival was refused.
pub const EVENT_DENY: u8 = 3;
/// A connect failed before it was established.
pub const EVENT_FAIL: u8 = 4;

/// Bit of `SWITCHES`: report openings, closings and failures too. Refusals are always reported. Off unless somebody
/// reads them: two records cost a connection more than anything else its hooks do.
pub const SWITCH_CONNECTION_EVENTS: u64 = 1;
