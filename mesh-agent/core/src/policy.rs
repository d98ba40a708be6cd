//! Policy evaluation: may this peer talk to this port of this workload?
//!
//! Invariants:
//! - [`admit`] is the only place that answers; the kernel only caches its answers or follows
//!   [`fail_closed_inbound`], which comes from the same inputs.
//! - Everything evaluation reads of a workload is covered by [`policy_hash`].

use crate::{
    id::{WorkloadId, hash},
    mode::{Mode, PortModes},
    snapshot::{Snapshot, Workload},
};

/// Who is on the other side of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A meshed pod of this node; the kernel says which one (socket → network namespace → pod).
    Kernel(WorkloadId),
    /// Nothing is proved: plaintext from anywhere.
    Unauthenticated,
}

/// What a peer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on.
    Allow,
    /// Refused, counted and logged under this reason.
    Deny(DenyReason),
}

impl Verdict {
    /// Whether the peer may go on.
    pub fn is_allow(self) -> bool {
        self == Self::Allow
    }
}

/// Why a peer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenyReason {
    /// The port's mode is STRICT and the peer proves no identity.
    StrictPlaintext,
    /// The destination is not in the snapshot: nothing is known of its policy, so nothing passes.
    UnknownWorkload,
}

impl DenyReason {
    /// Stable text for metric labels and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::StrictPlaintext => "strict_plaintext",
            Self::UnknownWorkload => "unknown_workload",
        }
    }
}

/// Judges a connection to `port` (the workload's own port, not the service's) of `dest`.
pub fn admit(peer: Peer, dest: &Workload, port: u16) -> Verdict {
    match (peer, dest.modes.of(port)) {
        (Peer::Unauthenticated, Mode::Strict) => Verdict::Deny(DenyReason::StrictPlaintext),
        (Peer::Kernel(_) | Peer::Unauthenticated, Mode::Disable | Mode::Permissive)
        | (Peer::Kernel(_), Mode::Strict) => Verdict::Allow,
    }
}

/// [`admit`] for a destination by id; one that the snapshot does not know is refused.
pub fn admit_in(snapshot: &Snapshot, peer: Peer, dest: WorkloadId, port: u16) -> Verdict {
    match snapshot.workload(dest) {
        Some(dest) => admit(peer, dest, port),
        None => Verdict::Deny(DenyReason::UnknownWorkload),
    }
}

/// Whether plaintext arrivals at this port are dropped while the agent is down.
///
/// True exactly where a live agent might refuse an unauthenticated peer.
pub fn fail_closed_inbound(dest: &Workload, port: u16) -> bool {
    mode_fails_closed(dest.modes.of(port))
}

/// [`fail_closed_inbound`] for ports without a mode of their own.
pub fn fail_closed_inbound_default(dest: &Workload) -> bool {
    mode_fails_closed(dest.modes.default)
}

fn mode_fails_closed(mode: Mode) -> bool {
    mode == Mode::Strict
}

/// Hash of everything [`admit`] reads of a workload; equal hashes mean equal verdicts for every peer and port.
///
/// Stable across restarts. Overrides equal to the default change nothing and do not count.
pub fn policy_hash(modes: &PortModes) -> u64 {
    let text = |mode: Mode| match mode {
        Mode::Disable => "disable",
        Mode::Permissive => "permissive",
        Mode::Strict => "strict",
    };
    let overrides: Vec<(String, &str)> = modes
        .ports
        .iter()
        .filter(|(_, mode)| **mode != modes.default)
        .map(|(port, mode)| (port.to_string(), text(*mode)))
        .collect();
    let mut parts = vec!["modes", text(modes.default)];
    for (port, mode) in &overrides {
        parts.extend([port.as_str(), mode]);
    }
    hash(&parts)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::snapshot::Name;

    fn workload(default: Mode, ports: &[(u16, Mode)]) -> Workload {
        let modes = PortModes { default, ports: ports.iter().copied().collect() };
        Workload { policy_hash: policy_hash(&modes), modes, ..Workload::named(Name::new("default", "web")) }
    }

    const KERNEL: Peer = Peer::Kernel(WorkloadId(7));

    #[test]
    fn only_plaintext_to_a_strict_port_is_refused() {
        let strict = Verdict::Deny(DenyReason::StrictPlaintext);
        for (mode, peer, wanted) in [
            (Mode::Disable, KERNEL, Verdict::Allow),
            (Mode::Disable, Peer::Unauthenticated, Verdict::Allow),
            (Mode::Permissive, KERNEL, Verdict::Allow),
            (Mode::Permissive, Peer::Unauthenticated, Verdict::Allow),
            (Mode::Strict, KERNEL, Verdict::Allow),
            (Mode::Strict, Peer::Unauthenticated, strict),
        ] {
            assert_eq!(admit(peer, &workload(mode, &[]), 80), wanted, "{mode:?} {peer:?}");
        }
    }

    #[test]
    fn a_port_override_beats_the_default_both_ways() {
        let opened = workload(Mode::Strict, &[(8080, Mode::Permissive)]);
        assert!(admit(Peer::Unauthenticated, &opened, 8080).is_allow());
        assert!(!admit(Peer::Unauthenticated, &opened, 8081).is_allow());
        let closed = workload(Mode::Permissive, &[(8080, Mode::Strict)]);
        assert!(!admit(Peer::Unauthenticated, &closed, 8080).is_allow());
        assert!(fail_closed_inbound(&closed, 8080));
        assert!(!fail_closed_inbound_default(&closed));
    }

    #[test]
    fn a_port_fails_closed_exactly_when_plaintext_is_refused_there() {
        for mode in [Mode::Disable, Mode::Permissive, Mode::Strict] {
            let dest = workload(mode, &[(1, Mode::Strict), (2, Mode::Disable)]);
            for port in [1, 2, 3] {
                assert_eq!(
                    fail_closed_inbound(&dest, port),
                    !admit(Peer::Unauthenticated, &dest, port).is_allow()
                );
            }
        }
    }

    #[test]
    fn an_unknown_destination_admits_nobody() {
        let known = Arc::new(workload(Mode::Disable, &[]));
        let snapshot = Snapshot::new(1, vec![Arc::clone(&known)], Vec::new(), "cluster.local");
        assert!(admit_in(&snapshot, Peer::Unauthenticated, known.id, 80).is_allow());
        assert_eq!(
            admit_in(&snapshot, KERNEL, WorkloadId(1), 80),
            Verdict::Deny(DenyReason::UnknownWorkload)
        );
    }

    #[test]
    fn the_hash_moves_with_verdicts_and_with_nothing_else() {
        let base = workload(Mode::Permissive, &[]);
        let relabelled = Workload { ready: !base.ready, node: "b".into(), ..base.clone() };
        assert_eq!(policy_hash(&base.modes), policy_hash(&relabelled.modes));
        assert_eq!(
            policy_hash(&base.modes),
            policy_hash(&workload(Mode::Permissive, &[(80, Mode::Permissive)]).modes)
        );
        let others = [
            workload(Mode::Strict, &[]),
            workload(Mode::Disable, &[]),
            workload(Mode::Permissive, &[(80, Mode::Strict)]),
            workload(Mode::Permissive, &[(81, Mode::Strict)]),
            workload(Mode::Permissive, &[(80, Mode::Strict), (81, Mode::Strict)]),
        ];
        let mut hashes: Vec<u64> = others.iter().map(|w| policy_hash(&w.modes)).collect();
        hashes.push(policy_hash(&base.modes));
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), others.len() + 1);
    }
}
