//! Tests of the order of decisions; of single fields see `fields`, of whole policies against a naive reference see
//! `reference`.

use super::*;
use crate::{
    mode::PortModes,
    snapshot::{Mesh, Parts},
};

fn workload(default: Mode, ports: &[(u16, Mode)]) -> Workload {
    let modes = PortModes { default, ports: ports.iter().copied().collect() };
    Workload {
        policy_hash: policy_hash(&modes, &Mesh::default(), &[]),
        modes,
        ..Workload::named(Name::new("default", "web"))
    }
}

fn attempt(peer: &Peer, port: u16) -> Attempt<'_> {
    Attempt { peer, source: Some([10, 0, 0, 1].into()), destination: [10, 0, 0, 2].into(), port }
}

fn verdict(peer: &Peer, dest: &Workload, port: u16) -> Verdict {
    admit(&Snapshot::default(), &attempt(peer, port), dest).verdict
}

const KERNEL: Peer = Peer::Kernel(WorkloadId(7));

#[test]
fn only_plaintext_to_a_strict_port_is_refused() {
    let strict = Verdict::Deny(DenyReason::StrictPlaintext);
    let tls = Peer::Tls(Arc::new(Identity::new("cluster.local", "a", "b")));
    for mode in [Mode::Disable, Mode::Permissive, Mode::Strict] {
        let dest = workload(mode, &[]);
        let plaintext = if mode == Mode::Strict { strict } else { Verdict::Allow };
        assert_eq!(verdict(&Peer::Unauthenticated, &dest, 80), plaintext, "{mode:?}");
        assert_eq!(verdict(&KERNEL, &dest, 80), Verdict::Allow, "{mode:?}");
        assert_eq!(verdict(&tls, &dest, 80), Verdict::Allow, "{mode:?}");
    }
}

#[test]
fn a_port_override_beats_the_default_both_ways() {
    let snapshot = Snapshot::default();
    let opened = workload(Mode::Strict, &[(8080, Mode::Permissive)]);
    assert!(verdict(&Peer::Unauthenticated, &opened, 8080).is_allow());
    assert!(!verdict(&Peer::Unauthenticated, &opened, 8081).is_allow());
    let closed = workload(Mode::Permissive, &[(8080, Mode::Strict)]);
    assert!(!verdict(&Peer::Unauthenticated, &closed, 8080).is_allow());
    assert!(fail_closed_inbound(&snapshot, &closed, 8080));
    assert!(!fail_closed_inbound_default(&snapshot, &closed));
}

#[test]
fn an_unknown_destination_admits_nobody() {
    let known = Arc::new(workload(Mode::Disable, &[]));
    let snapshot = Snapshot::new(1, Parts { workloads: vec![Arc::clone(&known)], ..Parts::default() });
    let plain = attempt(&Peer::Unauthenticated, 80);
    assert!(admit_in(&snapshot, &plain, known.id).is_allow());
    let unknown = admit_in(&snapshot, &attempt(&KERNEL, 80), WorkloadId(1));
    assert_eq!(unknown.verdict, Verdict::Deny(DenyReason::UnknownWorkload));
}
