//! Owns typed access to the pinned maps: shared by reference, one system call per operation.
//!
//! Invariants:
//! - A handle's key and value sizes equal the kernel's; checked when the pin is opened.
//! - Every method takes `&self`: the kernel does the locking, so workers and the control thread share handles.
//!
//! Not here: which values to write (`tables.rs`, `enrol.rs`), the programs' side (`mesh-ebpf`).

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::Pod;
use aya_obj::generated::bpf_map_type;
use mesh_common::{
    Addr, maps,
    pod::{ExcludedKey, InboundCfg, PodCfg, PortKey, ProbeKey},
    service::{
        Affinity, AffinityKey, Backend, BackendIndexKey, BackendKey, ServiceKey, ServiceVal, WorkloadVal,
    },
    sock::{ClientAddr, DnsKey, OrigDst, OrigKey, SockState, UdpPeer, UdpPeerKey},
    stats::{EdgeKey, EdgeVal},
    ticket::{Ticket, TupleKey},
    verdict::{Verdict, VerdictKey},
};
use nix::libc;

use crate::sys;

/// Entries asked for in one step of a walk. Larger than any hash bucket in practice; doubled when not.
const BATCH: u32 = 4096;
/// A bucket larger than this is a broken hash, not a reason to take more memory.
const BATCH_MAX: u32 = 1 << 20;

/// A failed operation on a map.
#[derive(Debug, thiserror::Error)]
#[error("{operation} map {map}")]
pub struct MapError {
    /// Name of the map ([`mesh_common::maps`]).
    pub map: &'static str,
    /// What was tried.
    pub operation: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

impl MapError {
    /// Whether the map has no room (as opposed to a broken call).
    pub fn is_full(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM))
    }
}

/// Why a pinned map cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenMapError {
    /// The pin is missing or not a map.
    #[error("open pinned map {name}")]
    Open {
        /// Name.
        name: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// Something else is pinned under the name.
    #[error(
        "pinned map {name} has keys of {key} and values of {value} bytes; {want_key} and {want_value} are wanted"
    )]
    Shape {
        /// Name.
        name: &'static str,
        /// Key size found.
        key: u32,
        /// Value size found.
        value: u32,
        /// Key size of this build.
        want_key: usize,
        /// Value size of this build.
        want_value: usize,
    },
}

/// A map with one value per key.
#[derive(Debug)]
pub struct KernelMap<K, V> {
    fd: OwnedFd,
    name: &'static str,
    max_entries: u32,
    kind: u32,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> KernelMap<K, V> {
    /// Opens `folder/name` and checks its shape.
    pub(crate) fn open(folder: &Path, name: &'static str) -> Result<Self, OpenMapError> {
        let fd = sys::open_pin(&folder.join(name)).map_err(|source| OpenMapError::Open { name, source })?;
        let info = sys::map_info(fd.as_fd()).map_err(|source| OpenMapError::Open { name, source })?;
        let (want_key, want_value) = (size_of::<K>(), size_of::<V>());
        if info.key_size as usize != want_key || info.value_size as usize != want_value {
            let (key, value) = (info.key_size, info.value_size);
            return Err(OpenMapError::Shape { name, key, value, want_key, want_value });
        }
        Ok(Self { fd, name, max_entries: info.max_entries, kind: info.type_, types: PhantomData })
    }

    /// Name as pinned.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Entries the map can hold.
    pub fn max_entries(&self) -> u32 {
        self.max_entries
    }

    /// Whether old entries make room for new ones, so that it is never "full".
    pub(crate) fn evicts(&self) -> bool {
        self.kind == bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32
            || self.kind == bpf_map_type::BPF_MAP_TYPE_LRU_PERCPU_HASH as u32
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>, MapError> {
        sys::map_lookup(self.fd.as_fd(), key).map_err(|source| self.error("read", source))
    }

    /// Creates or replaces an entry.
    pub fn put(&self, key: &K, value: &V) -> Result<(), MapError> {
        sys::map_update(self.fd.as_fd(), key, value, sys::ANY).map_err(|source| self.error("write", source))
    }

    /// Creates an entry; `false` when there is one already, which stays.
    pub fn put_new(&self, key: &K, value: &V) -> Result<bool, MapError> {
        match sys::map_update(self.fd.as_fd(), key, value, sys::NOEXIST) {
            Ok(()) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(source) => Err(self.error("write", source)),
        }
    }

    /// Deletes an entry; `false` when there was none.
    pub fn delete(&self, key: &K) -> Result<bool, MapError> {
        sys::map_delete(self.fd.as_fd(), key).map_err(|source| self.error("delete from", source))
    }

    /// Calls `visit` for every entry. Entries that change meanwhile may be seen or not.
    pub fn each(&self, mut visit: impl FnMut(&K, &V)) -> Result<(), MapError> {
        let walked = walk(self.fd.as_fd(), 1, |keys: &[K], values: &[V]| {
            for (key, value) in keys.iter().zip(values) {
                visit(key, value);
            }
        });
        match walked {
            Err(error) if lacks_batches(&error) => self.each_by_key(visit),
            other => other.map_err(|source| self.error("walk", source)),
        }
    }

    /// For map types without batches on some kernels. Bounded by the map's size: a deleted key restarts the
    /// kernel's walk.
    fn each_by_key(&self, mut visit: impl FnMut(&K, &V)) -> Result<(), MapError> {
        let mut key = None;
        for _ in 0..=self.max_entries {
            let next = sys::map_next_key(self.fd.as_fd(), key.as_ref());
            let Some(next) = next.map_err(|source| self.error("walk", source))? else { break };
            if let Some(value) = self.get(&next)? {
                visit(&next, &value);
            }
            key = Some(next);
        }
        Ok(())
    }

    /// Number of entries, by counting.
    pub fn count(&self) -> Result<u32, MapError> {
        let mut count = 0;
        self.each(|_, _| count += 1)?;
        Ok(count)
    }

    /// Deletes the entries `doomed` names and returns how many went.
    pub fn delete_where(&self, mut doomed: impl FnMut(&K, &V) -> bool) -> Result<u32, MapError> {
        let mut keys = Vec::new();
        self.each(|key, value| {
            if doomed(key, value) {
                keys.push(*key);
            }
        })?;
        let mut gone = 0;
        for key in &keys {
            gone += u32::from(self.delete(key)?);
        }
        Ok(gone)
    }

    fn error(&self, operation: &'static str, source: io::Error) -> MapError {
        MapError { map: self.name, operation, source }
    }
}

impl<K, V> AsFd for KernelMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A map with one value per key and CPU.
#[derive(Debug)]
pub struct PerCpuMap<K, V> {
    inner: KernelMap<K, V>,
    cpus: usize,
}

impl<K: Pod, V: Pod> PerCpuMap<K, V> {
    fn open(folder: &Path, name: &'static str, cpus: usize) -> Result<Self, OpenMapError> {
        Ok(Self { inner: KernelMap::open(folder, name)?, cpus })
    }

    /// The values of a key, one per possible CPU.
    pub fn get(&self, key: &K) -> Result<Option<Vec<V>>, MapError> {
        sys::map_lookup_per_cpu(self.as_fd(), key, self.cpus)
            .map_err(|source| self.inner.error("read", source))
    }

    /// Calls `visit` for every key with its values.
    pub fn each(&self, mut visit: impl FnMut(&K, &[V])) -> Result<(), MapError> {
        let cpus = self.cpus;
        let walked = walk(self.as_fd(), cpus, |keys: &[K], values: &[V]| {
            for (key, values) in keys.iter().zip(values.chunks(cpus)) {
                visit(key, values);
            }
        });
        match walked {
            Err(error) if lacks_batches(&error) => self.each_by_key(visit),
            other => other.map_err(|source| self.inner.error("walk", source)),
        }
    }

    fn each_by_key(&self, mut visit: impl FnMut(&K, &[V])) -> Result<(), MapError> {
        let mut key = None;
        for _ in 0..=self.inner.max_entries {
            let next = sys::map_next_key(self.as_fd(), key.as_ref());
            let Some(next) = next.map_err(|source| self.inner.error("walk", source))? else { break };
            if let Some(values) = self.get(&next)? {
                visit(&next, &values);
            }
            key = Some(next);
        }
        Ok(())
    }
}

impl<K, V> AsFd for PerCpuMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

/// `EINVAL` or the kernel-internal `ENOTSUPP`: this map type has no batched walk here.
fn lacks_batches(error: &io::Error) -> bool {
    const ENOTSUPP: i32 = 524;
    matches!(error.raw_os_error(), Some(libc::EINVAL | ENOTSUPP))
}

fn walk<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    per_key: usize,
    mut visit: impl FnMut(&[K], &[V]),
) -> io::Result<()> {
    let mut cursor = sys::BatchCursor::new();
    let mut batch = BATCH;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        match sys::map_lookup_batch(map, &mut cursor, batch, per_key, &mut keys, &mut values) {
            Ok(more) => {
                visit(&keys, &values);
                if !more {
                    return Ok(());
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && batch < BATCH_MAX => batch *= 2,
            Err(error) => return Err(error),
        }
    }
}

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
    pub(crate) policy_gen: KernelMap<u64, u64>,
    pub(crate) tickets: KernelMap<TupleKey, Ticket>,
    pub(crate) tickets_used: KernelMap<u64, u64>,
    pub(crate) orig_dst: KernelMap<OrigKey, OrigDst>,
    pub(crate) client_addr: KernelMap<TupleKey, ClientAddr>,
    /// Keyed by descriptor.
    pub(crate) socks: KernelMap<i32, SockState>,
    pub(crate) dns_orig: KernelMap<DnsKey, ClientAddr>,
    pub(crate) udp_peers: KernelMap<UdpPeerKey, UdpPeer>,
    pub(crate) direct_conns: KernelMap<TupleKey, SockState>,
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
            direct_conns: KernelMap::open(folder, maps::DIRECT_CONNS)?,
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
            maps::DIRECT_CONNS => self.direct_conns.as_fd(),
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
