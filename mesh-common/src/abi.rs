//! The version of the kernel ↔ agent contract.

use crate::{
    event::Event,
    layout::fnv1a,
    limits, maps,
    pod::{InboundCfg, PodCfg, PortKey, ProbeKey},
    service::{
        Affinity, AffinityKey, Backend, BackendIndexKey, BackendKey, ServiceKey, ServiceVal, WorkloadVal,
    },
    sock::{ClientAddr, DnsKey, OrigDst, OrigKey, SockState, UdpPeer, UdpPeerKey},
    stats::{COUNTERS_LEN, EdgeKey, EdgeVal, HIST_LEN},
    ticket::{Ticket, TupleKey},
    verdict::{PolicyGen, Verdict, VerdictKey},
};

/// Bumped by hand when the *meaning* of a map changes while every layout stays.
pub const SEMANTICS: u64 = 1;

/// Hash over every shared layout, map name and map size. Maps and links are pinned under
/// `nodemesh/<node>/v<VERSION in hex>/`: two agents with equal versions may share pins, others may not.
pub const VERSION: u64 = {
    let layouts = [
        SEMANTICS,
        Affinity::LAYOUT,
        AffinityKey::LAYOUT,
        Backend::LAYOUT,
        BackendIndexKey::LAYOUT,
        BackendKey::LAYOUT,
        ClientAddr::LAYOUT,
        DnsKey::LAYOUT,
        EdgeKey::LAYOUT,
        EdgeVal::LAYOUT,
        Event::LAYOUT,
        InboundCfg::LAYOUT,
        OrigDst::LAYOUT,
        OrigKey::LAYOUT,
        PodCfg::LAYOUT,
        PolicyGen::LAYOUT,
        PortKey::LAYOUT,
        ProbeKey::LAYOUT,
        ServiceKey::LAYOUT,
        ServiceVal::LAYOUT,
        SockState::LAYOUT,
        Ticket::LAYOUT,
        TupleKey::LAYOUT,
        UdpPeer::LAYOUT,
        UdpPeerKey::LAYOUT,
        Verdict::LAYOUT,
        VerdictKey::LAYOUT,
        WorkloadVal::LAYOUT,
        HIST_LEN as u64,
        COUNTERS_LEN as u64,
        limits::HASH,
    ];
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut i = 0;
    while i < layouts.len() {
        hash = fnv1a(hash, &layouts[i].to_le_bytes());
        i += 1;
    }
    let mut i = 0;
    while i < maps::ALL.len() {
        hash = fnv1a(hash, maps::ALL[i].as_bytes());
        i += 1;
    }
    hash
};
