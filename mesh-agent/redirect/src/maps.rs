//! Owns the set of pinned maps: one typed handle for each map of the object.
//!
//! Invariant: the types here are those of `mesh-ebpf/src/maps.rs`; sizes are checked when the pins are opened.

use std::{
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::Pod;
use mesh_common::{
    Addr, maps,
    pod::{ExcludedKey, InboundCfg, PodCfg, PortKey, ProbeKey},
    service::{
        Affinity, AffinityKey, Backend, BackendIndexKey, BackendKey, ServiceKey, ServiceVal, WorkloadVal,
    },
    sock::{ClientAddr, DnsKey, OrigDst, OrigKey, SockState, UdpPeer, UdpPeerKey},
    stats::{EdgeKey, EdgeVal},
    ticket::{Ticket, TupleKey},
    verdict::{PolicyGen, Verdict, VerdictKey},
};

use crate::{
    map::{KernelMap, OpenMapError, PerCpuMap},
    sys,
};

/// Key of `EXCLUDED` as the kernel's prefix trie wants it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ExcludedPrefix {
    /// Bits of `data` that count, from its first byte.
    pub(crate) prefix_len: u32,
    pub(crate) data: ExcludedKey,
}

const _: () = assert!(size_of::<ExcludedPrefix>() == 24, "ExcludedPrefix has padding");

#[expect(unsafe_code, reason = "the marker trait is unsafe to implement")]
// SAFETY: `repr(C)`, `Copy`, integers only, no padding (asserted above).
unsafe impl Pod for ExcludedPrefix {}

/// Every pinned map of a node.
#[derive(Debug)]
pub struct Maps {
    pub(crate) pods: KernelMap<u64, PodCfg>,
    pub(crate) inbound: KernelMap<u32, InboundCfg>,
    pub(crate) port_cfgs: KernelMap<PortKey, u32>,
    /// Written with a descriptor as value, read with the socket's cookie as value.
    pub(crate) listeners: KernelMap<u64, u64>,
    pub(crate) probes: KernelMap<ProbeKey, u64>,
    pub(crate) excluded: KernelMap<ExcludedPrefix, u32>,
    pub(crate) services: KernelMap<ServiceKey, ServiceVal>,
    pub(crate) backends: KernelMap<BackendKey, Backend>,
    pub(crate) backend_index: KernelMap<BackendIndexKey, u32>,
    pub(crate) workloads: KernelMap<Addr, WorkloadVal>,
    pub(crate) affinity: KernelMap<AffinityKey, Affinity>,
    pub(crate) verdicts: KernelMap<VerdictKey, Verdict>,
    pub(crate) policy_gen: KernelMap<u64, PolicyGen>,
    pub(crate) tickets: KernelMap<TupleKey, Ticket>,
    pub(crate) tickets_used: KernelMap<u64, u64>,
    pub(crate) orig_dst: KernelMap<OrigKey, OrigDst>,
    pub(crate) client_addr: KernelMap<TupleKey, ClientAddr>,
    /// Keyed by descriptor.
    pub(crate) socks: KernelMap<i32, SockState>,
    pub(crate) dns_orig: KernelMap<DnsKey, ClientAddr>,
    pub(crate) udp_peers: KernelMap<UdpPeerKey, UdpPeer>,
    pub(crate) switches: KernelMap<u32, u64>,
    pub(crate) heartbeat: KernelMap<u32, u64>,
    pub(crate) counters: PerCpuMap<u32, u64>,
    pub(crate) hists: PerCpuMap<u32, u64>,
    pub(crate) edges: PerCpuMap<EdgeKey, EdgeVal>,
    /// Only its descriptor counts: ring buffers have no entries.
    pub(crate) events: OwnedFd,
    /// Likewise: the records of aya-log.
    pub(crate) logs: OwnedFd,
}

impl Maps {
    /// Opens every map below `folder`.
    pub(crate) fn open(folder: &Path) -> Result<Self, OpenMapError> {
        let cpus = aya::util::nr_cpus()
            .map_err(|(_, source)| OpenMapError::Open { name: maps::COUNTERS, source })?;
        Ok(Self {
            pods: KernelMap::open(folder, maps::PODS)?,
            inbound: KernelMap::open(folder, maps::INBOUND)?,
            port_cfgs: KernelMap::open(folder, maps::PORT_CFGS)?,
            listeners: KernelMap::open(folder, maps::LISTENERS)?,
            probes: KernelMap::open(folder, maps::PROBES)?,
            excluded: KernelMap::open(folder, maps::EXCLUDED)?,
            services: KernelMap::open(folder, maps::SERVICES)?,
            backends: KernelMap::open(folder, maps::BACKENDS)?,
            backend_index: KernelMap::open(folder, maps::BACKEND_INDEX)?,
            workloads: KernelMap::open(folder, maps::WORKLOADS)?,
            affinity: KernelMap::open(folder, maps::AFFINITY)?,
            verdicts: KernelMap::open(folder, maps::VERDICTS)?,
            policy_gen: KernelMap::open(folder, maps::POLICY_GEN)?,
            tickets: KernelMap::open(folder, maps::TICKETS)?,
            tickets_used: KernelMap::open(folder, maps::TICKETS_USED)?,
            orig_dst: KernelMap::open(folder, maps::ORIG_DST)?,
            client_addr: KernelMap::open(folder, maps::CLIENT_ADDR)?,
            socks: KernelMap::open(folder, maps::SOCKS)?,
            dns_orig: KernelMap::open(folder, maps::DNS_ORIG)?,
            udp_peers: KernelMap::open(folder, maps::UDP_PEERS)?,
            switches: KernelMap::open(folder, maps::SWITCHES)?,
            heartbeat: KernelMap::open(folder, maps::HEARTBEAT)?,
            counters: PerCpuMap::open(folder, maps::COUNTERS, cpus)?,
            hists: PerCpuMap::open(folder, maps::HISTS, cpus)?,
            edges: PerCpuMap::open(folder, maps::EDGES, cpus)?,
            events: open_ring(folder, maps::EVENTS)?,
            logs: open_ring(folder, maps::LOGS)?,
        })
    }

    /// The descriptor of a map by name, for relocations.
    pub(crate) fn descriptor(&self, name: &str) -> Option<BorrowedFd<'_>> {
        Some(match name {
            maps::PODS => self.pods.as_fd(),
            maps::INBOUND => self.inbound.as_fd(),
            maps::PORT_CFGS => self.port_cfgs.as_fd(),
            maps::LISTENERS => self.listeners.as_fd(),
            maps::PROBES => self.probes.as_fd(),
            maps::EXCLUDED => self.excluded.as_fd(),
            maps::SERVICES => self.services.as_fd(),
            maps::BACKENDS => self.backends.as_fd(),
            maps::BACKEND_INDEX => self.backend_index.as_fd(),
            maps::WORKLOADS => self.workloads.as_fd(),
            maps::AFFINITY => self.affinity.as_fd(),
            maps::VERDICTS => self.verdicts.as_fd(),
            maps::POLICY_GEN => self.policy_gen.as_fd(),
            maps::TICKETS => self.tickets.as_fd(),
            maps::TICKETS_USED => self.tickets_used.as_fd(),
            maps::ORIG_DST => self.orig_dst.as_fd(),
            maps::CLIENT_ADDR => self.client_addr.as_fd(),
            maps::SOCKS => self.socks.as_fd(),
            maps::DNS_ORIG => self.dns_orig.as_fd(),
            maps::UDP_PEERS => self.udp_peers.as_fd(),
            maps::SWITCHES => self.switches.as_fd(),
            maps::HEARTBEAT => self.heartbeat.as_fd(),
            maps::COUNTERS => self.counters.as_fd(),
            maps::HISTS => self.hists.as_fd(),
            maps::EDGES => self.edges.as_fd(),
            maps::EVENTS => self.events.as_fd(),
            maps::LOGS => self.logs.as_fd(),
            _ => return None,
        })
    }
}

fn open_ring(folder: &Path, name: &'static str) -> Result<OwnedFd, OpenMapError> {
    sys::open_pin(&folder.join(name)).map_err(|source| OpenMapError::Open { name, source })
}
