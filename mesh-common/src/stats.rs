//! Counters, histograms and edges the programs keep.

/// Defines a closed enum with a stable text for each variant, countable in an array.
macro_rules! closed_enum {
    ($(#[$meta:meta])* pub enum $name:ident { $( $(#[$vmeta:meta])* $variant:ident = $text:literal ),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum $name { $( $(#[$vmeta])* $variant ),+ }

        impl $name {
            /// All variants, in counter order.
            pub const ALL: &'static [Self] = &[ $( Self::$variant ),+ ];

            /// Metric label: stable.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$variant => $text ),+ }
            }

            /// The variant with this number, as stored in maps and events.
            pub fn from_index(index: u8) -> Option<Self> {
                Self::ALL.get(index as usize).copied()
            }
        }
    };
}

closed_enum! {
    /// Where a counter was bumped.
    pub enum Hook {
        /// cgroup/connect4.
        Connect4 = "connect4",
        /// cgroup/connect6.
        Connect6 = "connect6",
        /// cgroup/sendmsg4.
        Sendmsg4 = "sendmsg4",
        /// cgroup/sendmsg6.
        Sendmsg6 = "sendmsg6",
        /// cgroup/recvmsg4.
        Recvmsg4 = "recvmsg4",
        /// cgroup/recvmsg6.
        Recvmsg6 = "recvmsg6",
        /// cgroup/getpeername4.
        Getpeername4 = "getpeername4",
        /// cgroup/getpeername6.
        Getpeername6 = "getpeername6",
        /// sock_ops.
        SockOps = "sock_ops",
        /// sk_lookup.
        SkLookup = "sk_lookup",
    }
}

closed_enum! {
    /// What a hook did.
    pub enum Outcome {
        /// Left alone at connect.
        Bypass = "bypass",
        /// Sent straight to a backend.
        Direct = "direct",
        /// Sent to the agent.
        Proxy = "proxy",
        /// Refused at connect.
        Deny = "deny",
        /// An arrival given to the app.
        Pass = "pass",
        /// An arrival refused.
        Drop = "drop",
        /// An arrival given to the agent.
        Capture = "capture",
        /// Something that should not happen did; see the reason.
        Error = "error",
    }
}

closed_enum! {
    /// Why.
    pub enum Reason {
        /// Nothing special.
        Ok = "ok",
        /// The socket is the agent's own.
        OwnSocket = "own_socket",
        /// Destination is a loopback address, or the packet came over loopback.
        Loopback = "loopback",
        /// Destination is the pod's own address.
        OwnAddress = "own_address",
        /// Port excluded by the pod.
        ExcludedPort = "excluded_port",
        /// Destination prefix excluded by the pod.
        ExcludedPrefix = "excluded_prefix",
        /// Destination is neither a service nor a workload of the mesh.
        UnknownDestination = "unknown_destination",
        /// Protocol that is not redirected.
        OtherProtocol = "other_protocol",
        /// The service has no ready endpoint.
        NoEndpoints = "no_endpoints",
        /// The service needs L7 handling.
        L7 = "l7",
        /// The chosen backend is the client itself.
        Hairpin = "hairpin",
        /// The peer is not meshed.
        Unmeshed = "unmeshed",
        /// The peer takes plaintext by policy.
        PlainPeer = "plain_peer",
        /// The peer is on another node.
        RemotePeer = "remote_peer",
        /// No verdict cached yet.
        NoVerdict = "no_verdict",
        /// The cached verdict is of another policy generation.
        StaleVerdict = "stale_verdict",
        /// A cached verdict allows.
        VerdictAllow = "verdict_allow",
        /// A cached verdict denies.
        VerdictDeny = "verdict_deny",
        /// The agent's heartbeat is stale.
        AgentDown = "agent_down",
        /// The agent's listener is gone.
        NoListener = "no_listener",
        /// Closed because the agent is down and the direction is fail_closed.
        FailClosed = "fail_closed",
        /// Every outbound port is taken for this bound source port.
        NoOutboundPort = "no_outbound_port",
        /// Socket storage could not be made.
        StorageFull = "storage_full",
        /// The ticket map is full.
        TicketsFull = "tickets_full",
        /// The source pod holds too many tickets.
        TicketCap = "ticket_cap",
        /// The source address of a ticket request is not the pod's.
        ForgedSource = "forged_source",
        /// No original destination for an accepted connection.
        OrigDstMiss = "orig_dst_miss",
        /// The original destination could not be stored.
        OrigDstFull = "orig_dst_full",
        /// The client address could not be stored.
        ClientAddrFull = "client_addr_full",
        /// A valid ticket.
        Ticket = "ticket",
        /// The ticket has expired.
        TicketExpired = "ticket_expired",
        /// The ticket is of another policy generation, workload or incarnation.
        TicketStale = "ticket_stale",
        /// One of the agent's private ports was dialled from elsewhere.
        PrivatePort = "private_port",
        /// HBONE port, bound natively.
        Hbone = "hbone",
        /// Given to the agent's inbound listener.
        Captured = "captured",
        /// The kernel refused to assign the listener.
        AssignFailed = "assign_failed",
        /// UDP other than DNS: not policed.
        Udp = "udp",
        /// DNS sent to the in-pod proxy.
        Dns = "dns",
        /// UDP balanced to a backend.
        UdpService = "udp_service",
        /// A kubelet probe.
        Probe = "probe",
        /// A map was full: the connection goes unfollowed.
        MapFull = "map_full",
        /// The event ring was full: an event was lost.
        EventLost = "event_lost",
        /// The program's namespace has no pod entry.
        NotEnrolled = "not_enrolled",
        /// The peer address was translated for the app.
        Shown = "shown",
        /// A UDP reply's source was translated back.
        Restored = "restored",
    }
}

/// Room per outcome in the counter array; a power of two so that the verifier sees the bound.
pub const REASONS_MAX: u32 = 64;
/// Room per hook, in outcomes.
pub const OUTCOMES_MAX: u32 = 8;
/// Entries of `COUNTERS`.
pub const COUNTERS_LEN: u32 = 16 * OUTCOMES_MAX * REASONS_MAX;

const _: () = assert!(Reason::ALL.len() <= REASONS_MAX as usize);
const _: () = assert!(Outcome::ALL.len() <= OUTCOMES_MAX as usize);
const _: () = assert!(Hook::ALL.len() <= 16);

/// Index into `COUNTERS`.
#[inline(always)]
pub const fn counter_index(hook: Hook, outcome: Outcome, reason: Reason) -> u32 {
    (hook as u32) * OUTCOMES_MAX * REASONS_MAX + (outcome as u32) * REASONS_MAX + reason as u32
}

closed_enum! {
    /// What a histogram measures. Bucket i counts values v with floor(log2(v)) = i.
    pub enum Hist {
        /// Nanoseconds from connect to established, as the app sees them.
        ConnectNs = "connect_ns",
        /// Smoothed RTT at close, in microseconds.
        SrttUs = "srtt_us",
        /// Nanoseconds from connect to close.
        DurationNs = "duration_ns",
    }
}

/// Buckets of one histogram.
pub const HIST_BUCKETS: u32 = 64;
/// Entries of `HISTS`.
pub const HIST_LEN: u32 = 4 * HIST_BUCKETS;

/// Index into `HISTS` for one value.
#[inline(always)]
pub const fn hist_index(hist: Hist, value: u64) -> u32 {
    let bucket = if value == 0 { 0 } else { 63 - value.leading_zeros() };
    (hist as u32) * HIST_BUCKETS + (bucket & (HIST_BUCKETS - 1))
}

shared! {
    /// Key of `EDGES`.
    pub struct EdgeKey {
        /// Source workload id, 0 when unknown.
        pub src_workload: u64,
        /// Destination workload id, 0 when unknown.
        pub dst_workload: u64,
        /// Service id, 0 when none.
        pub service: u64,
        /// Destination port, host order.
        pub port: u16,
        /// [`crate::pod::DIR_INBOUND`] or [`crate::pod::DIR_OUTBOUND`].
        pub dir: u8,
        /// `Outcome::Direct` or `Outcome::Proxy` as a number.
        pub path: u8,
        /// Zero.
        pub pad: u32,
    }
}

shared! {
    /// Value of `EDGES`, one per CPU; the reader sums.
    pub struct EdgeVal {
        /// Connections established.
        pub opened: u64,
        /// Connections closed.
        pub closed: u64,
        /// Connects that failed.
        pub failed: u64,
        /// Bytes from source to destination, added at close.
        pub bytes_tx: u64,
        /// Bytes from destination to source, added at close.
        pub bytes_rx: u64,
        /// Retransmitted segments, added at close.
        pub retrans: u64,
        /// Sum of connect latencies in nanoseconds, over `opened`.
        pub connect_ns_sum: u64,
        /// Sum of smoothed RTTs in microseconds, over `closed`.
        pub srtt_us_sum: u64,
        /// CLOCK_MONOTONIC nanoseconds of the last change.
        pub last_ns: u64,
    }
}
