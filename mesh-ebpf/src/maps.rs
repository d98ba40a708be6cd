//! The maps, by the names of `mesh_common::maps`.

use core::ffi::c_void;

use aya_ebpf::{
    Global,
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, bpf_map_type::BPF_MAP_TYPE_SK_STORAGE,
        bpf_map_type::BPF_MAP_TYPE_SOCKHASH,
    },
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, LruPerCpuHashMap, PerCpuArray, RingBuf},
    macros::btf_map,
};
use mesh_common::{
    Addr,
    event::Event,
    limits,
    pod::{ExcludedKey, InboundCfg, PodCfg, PortKey, ProbeKey},
    service::{
        Affinity, AffinityKey, Backend, BackendIndexKey, BackendKey, ServiceKey, ServiceVal, WorkloadVal,
    },
    sock::{ClientAddr, DnsKey, OrigDst, OrigKey, SockState, UdpPeer, UdpPeerKey},
    stats::{COUNTERS_LEN, EdgeKey, EdgeVal, HIST_LEN},
    ticket::{Ticket, TupleKey},
    verdict::{PolicyGen, Verdict, VerdictKey},
};

/// Entries come and go one by one and most maps stay far below their size: no preallocation.
const LAZY: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub static PODS: HashMap<u64, PodCfg, { limits::PODS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static INBOUND: HashMap<u32, InboundCfg, { limits::PODS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static PORT_CFGS: HashMap<PortKey, u32, { limits::PORT_CFGS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static PROBES: HashMap<ProbeKey, u64, { limits::PORT_CFGS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static EXCLUDED: LpmTrie<ExcludedKey, u32, { limits::EXCLUDED_MAX }> = LpmTrie::new();
#[btf_map]
pub static SERVICES: HashMap<ServiceKey, ServiceVal, { limits::SERVICES_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static BACKENDS: HashMap<BackendKey, Backend, { limits::BACKENDS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static BACKEND_INDEX: HashMap<BackendIndexKey, u32, { limits::BACKENDS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static WORKLOADS: HashMap<Addr, WorkloadVal, { limits::WORKLOADS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, { limits::AFFINITY_MAX }> = LruHashMap::new();
#[btf_map]
pub static VERDICTS: HashMap<VerdictKey, Verdict, { limits::VERDICTS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static POLICY_GEN: HashMap<u64, PolicyGen, { limits::PODS_MAX }, LAZY> = HashMap::new();
/// Not LRU: nobody's flood may evict a neighbour's ticket. Full means "no ticket", counted.
#[btf_map]
pub static TICKETS: HashMap<TupleKey, Ticket, { limits::TICKETS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static TICKETS_USED: HashMap<u64, u64, { limits::PODS_MAX }, LAZY> = HashMap::new();
#[btf_map]
pub static ORIG_DST: LruHashMap<OrigKey, OrigDst, { limits::ORIG_DST_MAX }> = LruHashMap::new();
#[btf_map]
pub static CLIENT_ADDR: LruHashMap<TupleKey, ClientAddr, { limits::ORIG_DST_MAX }> = LruHashMap::new();
#[btf_map]
pub static DNS_ORIG: LruHashMap<DnsKey, ClientAddr, { limits::UDP_PEERS_MAX }> = LruHashMap::new();
#[btf_map]
pub static UDP_PEERS: LruHashMap<UdpPeerKey, UdpPeer, { limits::UDP_PEERS_MAX }> = LruHashMap::new();
#[btf_map]
pub static HEARTBEAT: Array<u64, 1> = Array::new();
#[btf_map]
pub static SWITCHES: Array<u64, 1> = Array::new();
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { COUNTERS_LEN as usize }> = PerCpuArray::new();
#[btf_map]
pub static HISTS: PerCpuArray<u64, { HIST_LEN as usize }> = PerCpuArray::new();
#[btf_map]
pub static EDGES: LruPerCpuHashMap<EdgeKey, EdgeVal, { limits::EDGES_MAX }> = LruPerCpuHashMap::new();
#[btf_map]
pub static EVENTS: RingBuf<Event, { limits::EVENTS_BYTES as usize }> = RingBuf::new();

/// aya's own type fixes the flags and the context; storage here is cloned to accepted sockets and used from
/// three program types.
#[repr(C)]
pub struct SockStorage {
    r#type: *const [i32; BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const SockState,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: a definition for the loader; never dereferenced.
unsafe impl Sync for SockStorage {}

impl SockStorage {
    const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }

    /// For the raw helper.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

#[btf_map]
pub static SOCKS: SockStorage = SockStorage::new();

/// aya's own type has a 4-byte value, which user space cannot read back; 8 bytes give it the socket cookie.
#[repr(C)]
pub struct Listeners {
    r#type: *const [i32; BPF_MAP_TYPE_SOCKHASH as usize],
    key: *const u64,
    value: *const u64,
    max_entries: *const [i32; 8 * limits::PODS_MAX],
    map_flags: *const [i32; 0],
}

// SAFETY: a definition for the loader; never dereferenced.
unsafe impl Sync for Listeners {}

impl Listeners {
    const fn new() -> Self {
        Self {
            r#type: core::ptr::null(),
            key: core::ptr::null(),
            value: core::ptr::null(),
            max_entries: core::ptr::null(),
            map_flags: core::ptr::null(),
        }
    }

    /// For the raw helper.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut c_void {
        core::ptr::from_ref(self).cast_mut().cast()
    }
}

#[btf_map]
pub static LISTENERS: Listeners = Listeners::new();

/// Local pod id of the namespace an `arrival` instance is attached to; set before load.
#[unsafe(no_mangle)]
pub static POD_ID: Global<u32> = Global::new(0);
