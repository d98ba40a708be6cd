//! Sizes of the maps and ages of their entries. Each says where its number comes from.

use crate::layout::fnv1a;

/// Local pods: kubelet's default is 110, large nodes run 500; each costs one entry in several maps.
pub const PODS_MAX: usize = 4096;
/// Service frontends (address × port × protocol): 10 000 services × up to 6 frontends.
pub const SERVICES_MAX: usize = 65_536;
/// Backend slots over all frontends.
pub const BACKENDS_MAX: usize = 524_288;
/// Workload addresses known to the node.
pub const WORKLOADS_MAX: usize = 262_144;
/// Cached verdicts: (client pod × server × port) pairs in use on one node.
pub const VERDICTS_MAX: usize = 131_072;
/// Tickets alive at once: each lives only for a handshake.
pub const TICKETS_MAX: usize = 65_536;
/// Tickets alive at once for one source pod, so that nobody evicts a neighbour's.
pub const TICKETS_PER_POD_MAX: u64 = 8_192;
/// Original destinations waiting for the accept side of the in-pod hop.
pub const ORIG_DST_MAX: usize = 65_536;
/// Connections whose latency, edges and closing are followed.
pub const EDGES_MAX: usize = 8_192;
/// Client ↔ backend stickiness entries.
pub const AFFINITY_MAX: usize = 65_536;
/// Unconnected UDP peers whose replies are translated back.
pub const UDP_PEERS_MAX: usize = 65_536;
/// Per-pod, per-port settings.
pub const PORT_CFGS_MAX: usize = 65_536;
/// Excluded destination prefixes over all pods.
pub const EXCLUDED_MAX: usize = 16_384;
/// Bytes of the event ring: 100 ms at 20 000 connections a second, two events of 160 bytes each.
pub const EVENTS_BYTES: u32 = 1 << 20;

/// A ticket lives this long when no answer comes: Linux gives up on a SYN after about 130 s
/// (`tcp_syn_retries=6`), and apps that wait longer than 75 s are rare.
pub const TICKET_SYN_NS: u64 = 75_000_000_000;
/// After ACTIVE_ESTABLISHED the ticket is needed only for the final ACK under SYN cookies.
pub const TICKET_ESTABLISHED_NS: u64 = 3_000_000_000;
/// The agent stamps the heartbeat each 100 ms; older than this means the agent is down (`design.md` §2.1).
pub const HEARTBEAT_STALE_NS: u64 = 3_000_000_000;

pub(crate) const HASH: u64 = {
    let sizes = [
        PODS_MAX,
        SERVICES_MAX,
        BACKENDS_MAX,
        WORKLOADS_MAX,
        VERDICTS_MAX,
        TICKETS_MAX,
        ORIG_DST_MAX,
        EDGES_MAX,
        AFFINITY_MAX,
        UDP_PEERS_MAX,
        PORT_CFGS_MAX,
        EXCLUDED_MAX,
        EVENTS_BYTES as usize,
    ];
    let mut hash = 0;
    let mut i = 0;
    while i < sizes.len() {
        hash = fnv1a(hash, &(sizes[i] as u64).to_le_bytes());
        i += 1;
    }
    hash
};
