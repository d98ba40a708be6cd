//! Ids of workloads and services: hashes of their names, so that they survive a restart of the agent
//! while the kernel's maps, which hold them, do too.

use std::fmt;

/// A workload: one pod, for as long as its UID lives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct WorkloadId(pub u64);

/// A service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ServiceId(pub u64);

impl WorkloadId {
    /// Id of a pod. `uid` is `metadata.uid`, empty in hand-written manifests.
    pub fn of_pod(namespace: &str, name: &str, uid: &str) -> Self {
        Self(hash(&["pod", namespace, name, uid]))
    }
}

impl ServiceId {
    /// Id of a service.
    pub fn of_service(namespace: &str, name: &str) -> Self {
        Self(hash(&["service", namespace, name]))
    }
}

impl fmt::Debug for WorkloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{:016x}", self.0)
    }
}

impl fmt::Debug for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{:016x}", self.0)
    }
}

/// 64-bit FNV-1a with a final mix; part of the contract with pinned maps, so it must not change.
///
/// Never 0, which means "none" in the kernel's tables. Parts are separated, so `("a","bc")` and `("ab","c")`
/// differ. With 64 bits, a million workloads collide with a probability below 10⁻⁷.
pub fn hash(parts: &[&str]) -> u64 {
    let mut h: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for byte in part.bytes().chain([0xff]) {
            h = (h ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    h ^= h >> 32;
    h = h.wrapping_mul(0xd6e8_feb8_6659_fd93);
    h ^= h >> 32;
    h.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_concatenate_alike_have_different_ids() {
        assert_ne!(WorkloadId::of_pod("a", "bc", ""), WorkloadId::of_pod("ab", "c", ""));
        assert_ne!(WorkloadId::of_pod("a", "b", "1"), WorkloadId::of_pod("a", "b", "2"));
    }

    #[test]
    fn ids_are_fixed_for_ever_because_pinned_maps_hold_them() {
        assert_eq!(hash(&["service", "default", "web"]), hash(&["service", "default", "web"]));
        assert_eq!(WorkloadId::of_pod("a", "b", "").0, hash(&["pod", "a", "b", ""]));
    }
}
