//! [`Tables`] over the BPF maps, and small typed wrappers of raw helpers.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::generated::{bpf_map_lookup_elem, bpf_sk_release, bpf_sk_storage_get},
    maps::lpm_trie::Key,
};
use mesh_common::{
    Addr,
    decide::Tables,
    limits::HEARTBEAT_STALE_NS,
    pod::{ExcludedKey, PortKey, listener_key},
    service::{
        Affinity, AffinityKey, Backend, BackendIndexKey, BackendKey, ServiceKey, ServiceVal, WorkloadVal,
    },
    sock::SockState,
    verdict::{Verdict, VerdictKey},
};

use crate::maps::{
    AFFINITY, BACKEND_INDEX, BACKENDS, EXCLUDED, HEARTBEAT, LISTENERS, POLICY_GEN, PORT_CFGS, SERVICES,
    SOCKS, VERDICTS, WORKLOADS,
};

/// The node's tables, read in the kernel.
pub struct Kernel;

impl Tables for Kernel {
    #[inline(always)]
    fn service(&self, key: &ServiceKey) -> Option<ServiceVal> {
        // SAFETY: copied at once; entries are replaced whole, never changed in place.
        unsafe { SERVICES.get(key).copied() }
    }

    #[inline(always)]
    fn backend(&self, key: &BackendKey) -> Option<Backend> {
        // SAFETY: as above.
        unsafe { BACKENDS.get(key).copied() }
    }

    #[inline(always)]
    fn backend_slot(&self, key: &BackendIndexKey) -> Option<u32> {
        // SAFETY: as above.
        unsafe { BACKEND_INDEX.get(key).copied() }
    }

    #[inline(always)]
    fn workload(&self, addr: &Addr) -> Option<WorkloadVal> {
        // SAFETY: as above.
        unsafe { WORKLOADS.get(addr).copied() }
    }

    #[inline(always)]
    fn port(&self, key: &PortKey) -> Option<u32> {
        // SAFETY: as above.
        unsafe { PORT_CFGS.get(key).copied() }
    }

    #[inline(always)]
    fn excluded(&self, pod: u32, dst: &Addr) -> bool {
        let key = Key::new(160, ExcludedKey { pod_be: pod.to_be(), addr: *dst });
        EXCLUDED.get(&key).is_some()
    }

    #[inline(always)]
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        // SAFETY: as above.
        unsafe { AFFINITY.get(key).copied() }
    }

    #[inline(always)]
    fn verdict(&self, key: &VerdictKey) -> Option<Verdict> {
        // SAFETY: as above.
        unsafe { VERDICTS.get(key).copied() }
    }

    #[inline(always)]
    fn policy_gen(&self, workload: u64) -> Option<u64> {
        // SAFETY: as above.
        unsafe { POLICY_GEN.get(workload).map(|now| now.generation) }
    }

    #[inline(always)]
    fn agent_alive(&self, now_ns: u64) -> bool {
        // A stamp may be newer than `now_ns`: another CPU wrote it meanwhile.
        HEARTBEAT.get(0).is_some_and(|stamp| *stamp != 0 && now_ns < *stamp + HEARTBEAT_STALE_NS)
    }

    #[inline(always)]
    fn outbound_listener(&self, pod: u32, index: u32) -> bool {
        let key = listener_key(pod, index);
        // SAFETY: the helper returns a referenced socket or null; the reference is given back.
        unsafe {
            let sk = bpf_map_lookup_elem(LISTENERS.as_ptr(), (&raw const key).cast());
            if sk.is_null() {
                return false;
            }
            bpf_sk_release(sk);
        }
        true
    }
}

/// The state a socket carries, if any.
#[inline(always)]
pub fn sock_state(sk: *mut bpf_sock) -> Option<*mut SockState> {
    storage(sk, 0)
}

/// The state a socket carries, made (all zero) if there was none. `None`: out of memory.
#[inline(always)]
pub fn sock_state_or_new(sk: *mut bpf_sock) -> Option<*mut SockState> {
    storage(sk, BPF_SK_STORAGE_GET_F_CREATE as u64)
}

#[inline(always)]
fn storage(sk: *mut bpf_sock, flags: u64) -> Option<*mut SockState> {
    // SAFETY: `sk` comes from a context; the helper checks its type and returns the storage or null.
    let state =
        unsafe { bpf_sk_storage_get(SOCKS.as_ptr(), sk.cast::<c_void>(), core::ptr::null_mut(), flags) };
    if state.is_null() { None } else { Some(state.cast()) }
}
