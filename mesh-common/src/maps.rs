//! Names of the maps, as in the object file and as pinned. Kernel names hold at most 15 bytes.

/// Pods by netns cookie: `u64` → [`crate::pod::PodCfg`].
pub const PODS: &str = "PODS";
/// Inbound settings by local pod id: `u32` → [`crate::pod::InboundCfg`].
pub const INBOUND: &str = "INBOUND";
/// Per-port settings: [`crate::pod::PortKey`] → `u32` flags.
pub const PORT_CFGS: &str = "PORT_CFGS";
/// Listening sockets of the agent: `u64` made by [`crate::pod::listener_key`] → socket.
pub const LISTENERS: &str = "LISTENERS";
/// Prober targets: [`crate::pod::ProbeKey`] → `u64` destination workload.
pub const PROBES: &str = "PROBES";
/// Excluded destination prefixes: LPM {pod, address} → `u32`.
pub const EXCLUDED: &str = "EXCLUDED";
/// Service frontends: [`crate::service::ServiceKey`] → [`crate::service::ServiceVal`].
pub const SERVICES: &str = "SERVICES";
/// Backend slots: [`crate::service::BackendKey`] → [`crate::service::Backend`].
pub const BACKENDS: &str = "BACKENDS";
/// Which slot a backend is in, for affinity: [`crate::service::BackendIndexKey`] → `u32`.
pub const BACKEND_INDEX: &str = "BACKEND_INDEX";
/// Workloads by address: [`crate::Addr`] → [`crate::service::WorkloadVal`].
pub const WORKLOADS: &str = "WORKLOADS";
/// Stickiness: [`crate::service::AffinityKey`] → [`crate::service::Affinity`].
pub const AFFINITY: &str = "AFFINITY";
/// Cached verdicts: [`crate::verdict::VerdictKey`] → [`crate::verdict::Verdict`].
pub const VERDICTS: &str = "VERDICTS";
/// Policy generation by destination workload: `u64` → [`crate::verdict::PolicyGen`].
pub const POLICY_GEN: &str = "POLICY_GEN";
/// Tickets: [`crate::ticket::TupleKey`] → [`crate::ticket::Ticket`].
pub const TICKETS: &str = "TICKETS";
/// Tickets alive by source netns cookie: `u64` → `u64`.
pub const TICKETS_USED: &str = "TICKETS_USED";
/// Original destinations in flight: [`crate::sock::OrigKey`] → [`crate::sock::OrigDst`].
pub const ORIG_DST: &str = "ORIG_DST";
/// Client addresses in flight: [`crate::ticket::TupleKey`] → [`crate::sock::ClientAddr`].
pub const CLIENT_ADDR: &str = "CLIENT_ADDR";
/// Socket storage: fd → [`crate::sock::SockState`].
pub const SOCKS: &str = "SOCKS";
/// Last resolver a pod dialled: [`crate::sock::DnsKey`] → [`crate::sock::ClientAddr`].
pub const DNS_ORIG: &str = "DNS_ORIG";
/// Reverse translation of UDP replies: [`crate::sock::UdpPeerKey`] → [`crate::sock::UdpPeer`].
pub const UDP_PEERS: &str = "UDP_PEERS";
/// What the programs do on demand: index 0 → `u64` of [`crate::event`]'s `SWITCH_*` bits.
pub const SWITCHES: &str = "SWITCHES";
/// Agent liveness: index 0 → `u64` CLOCK_MONOTONIC nanoseconds of the oldest worker stamp.
pub const HEARTBEAT: &str = "HEARTBEAT";
/// Counters by hook × outcome × reason, per CPU: see [`crate::stats::counter_index`].
pub const COUNTERS: &str = "COUNTERS";
/// log2 histograms, per CPU: see [`crate::stats::hist_index`].
pub const HISTS: &str = "HISTS";
/// Edges, LRU per CPU: [`crate::stats::EdgeKey`] → [`crate::stats::EdgeVal`].
pub const EDGES: &str = "EDGES";
/// Ring buffer of [`crate::event::Event`].
pub const EVENTS: &str = "EVENTS";

/// Ring buffer of aya-log, one for all instances.
pub const LOGS: &str = "AYA_LOGS";
/// Read-only global of aya-log: 0 turns every log statement off, and the verifier removes them.
pub const LOG_LEVEL_GLOBAL: &str = "AYA_LOG_LEVEL";

/// Every map that is pinned and shared by all program instances.
pub const ALL: [&str; 27] = [
    PODS,
    INBOUND,
    PORT_CFGS,
    LISTENERS,
    PROBES,
    EXCLUDED,
    SERVICES,
    BACKENDS,
    BACKEND_INDEX,
    WORKLOADS,
    AFFINITY,
    VERDICTS,
    POLICY_GEN,
    TICKETS,
    TICKETS_USED,
    ORIG_DST,
    CLIENT_ADDR,
    SOCKS,
    DNS_ORIG,
    UDP_PEERS,
    SWITCHES,
    HEARTBEAT,
    COUNTERS,
    HISTS,
    EDGES,
    EVENTS,
    LOGS,
];

/// Read-only global of the `sk_lookup` program: the local pod id of the namespace it is attached to.
pub const POD_ID_GLOBAL: &str = "POD_ID";

const _: () = {
    let mut i = 0;
    while i < ALL.len() {
        assert!(ALL[i].len() <= 15, "kernel map names hold 15 bytes");
        i += 1;
    }
};
