//! Owns cached verdicts and the generations that void them.
//!
//! Invariants:
//! - A generation never returns: it starts at the clock and only grows, so a verdict from before a pod left
//!   cannot become valid again when it comes back.
//! - A verdict carries the generation its caller read before it evaluated the policy.
//! - A restarted agent keeps a generation only if it judges from the same policy by the same rules.

use std::sync::Arc;

use mesh_common::{
    addr::{FAMILY_V4, FAMILY_V6},
    verdict::{PolicyGen, VERDICT_ALLOW, VERDICT_DENY, Verdict, VerdictKey},
};
use mesh_core::id::{WorkloadId, hash};

use crate::{clock, map::MapError, maps::Maps};

/// One evaluated question: may this client pod talk to this port of this incarnation of that workload?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerdictEntry {
    /// Netns cookie of the client.
    pub client: u64,
    /// Destination.
    pub workload: WorkloadId,
    /// Netns cookie of the destination.
    pub incarnation: u64,
    /// Destination port.
    pub port: u16,
    /// IPv4, else IPv6.
    pub v4: bool,
    /// The destination's generation, read before the evaluation.
    pub policy_gen: u64,
    /// The answer.
    pub allow: bool,
}

/// Writes verdicts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Verdicts {
    maps: Arc<Maps>,
}

impl Verdicts {
    /// Over the node's maps.
    pub fn new(maps: &Arc<Maps>) -> Self {
        Self { maps: Arc::clone(maps) }
    }

    /// Caches an answer for the connect hook. A full map costs speed, not safety: the proxy goes on deciding.
    pub fn put(&self, entry: &VerdictEntry) -> Result<(), MapError> {
        let key = VerdictKey {
            netns_cookie: entry.client,
            workload: entry.workload.0,
            incarnation: entry.incarnation,
            port: entry.port,
            family: u16::from(if entry.v4 { FAMILY_V4 } else { FAMILY_V6 }),
            pad: 0,
        };
        let action = if entry.allow { VERDICT_ALLOW } else { VERDICT_DENY };
        self.maps.verdicts.put(&key, &Verdict { policy_gen: entry.policy_gen, action, pad: 0 })
    }

    /// Current generation of an enrolled workload. Read it before evaluating.
    pub fn policy_gen(&self, workload: WorkloadId) -> Result<Option<u64>, MapError> {
        Ok(self.maps.policy_gen.get(&workload.0)?.map(|now| now.generation))
    }

    /// Voids every verdict and every unused ticket towards a workload.
    pub fn bump(&self, workload: WorkloadId) -> Result<(), MapError> {
        let basis = self.maps.policy_gen.get(&workload.0)?.map_or(0, |last| last.basis);
        renew(&self.maps, workload, basis)
    }

    /// Deletes verdicts that are void anyway; returns how many.
    pub fn sweep(&self) -> Result<u32, MapError> {
        let mut current = std::collections::HashMap::new();
        self.maps.policy_gen.each(|workload, now| {
            current.insert(*workload, now.generation);
        })?;
        self.maps
            .verdicts
            .delete_where(|key, verdict| current.get(&key.workload) != Some(&verdict.policy_gen))
    }
}

/// Gives a workload a generation it never had, for verdicts made from `basis`.
pub(crate) fn renew(maps: &Maps, workload: WorkloadId, basis: u64) -> Result<(), MapError> {
    let last = maps.policy_gen.get(&workload.0)?.map_or(0, |last| last.generation);
    let generation = clock::monotonic_ns().max(last.wrapping_add(1));
    maps.policy_gen.put(&workload.0, &PolicyGen { generation, basis })
}

/// Keeps the generation that an earlier agent left if its verdicts were made from the same; else gives a new one.
pub(crate) fn keep_or_renew(maps: &Maps, workload: WorkloadId, basis: u64) -> Result<(), MapError> {
    match maps.policy_gen.get(&workload.0)? {
        Some(last) if last.basis == basis => Ok(()),
        _ => renew(maps, workload, basis),
    }
}

/// Voids every verdict on this node, and with them those on a client whose identity is another now: a verdict names
/// its client by namespace alone. Rare, so all may pay for it.
pub(crate) fn renew_all(maps: &Maps) -> Result<(), MapError> {
    let mut all = Vec::new();
    maps.policy_gen.each(|workload, last| all.push((WorkloadId(*workload), last.basis)))?;
    all.into_iter().try_for_each(|(workload, basis)| renew(maps, workload, basis))
}

/// What verdicts on a destination are made from: its policy, and the rules this build judges by.
pub(crate) fn basis(policy_hash: u64) -> u64 {
    hash(&["verdicts", &policy_hash.to_string(), env!("CARGO_PKG_VERSION")])
}
