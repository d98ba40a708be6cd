//! Tests of the order of decisions. Single fields are in `fields`, whole policies against a naive reading in `reference`.

mod fields;
mod reference;

use super::*;
use crate::{
    mode::PortModes,
    snapshot::{Mesh, Parts},
};

fn workload(default: Mode, ports: &[(u16, Mode)]) -> Workload {
    let modes = PortModes { default, ports: ports.iter().copied().collect() };
    Workload { modes, ..Workload::named(Name::new("default", "web")) }
}

/// A world of one policed workload and the pod `kernel` is.
fn world(policies: &[AuthorizationPolicy]) -> (Snapshot, Workload) {
    let web = Workload {
        policies: policies.iter().map(|p| p.name.clone()).collect(),
        ..workload(Mode::Permissive, &[])
    };
    let client = Workload { service_account: "cart".into(), ..Workload::named(Name::new("shop", "client")) };
    let parts = Parts {
        workloads: vec![Arc::new(web.clone()), Arc::new(client)],
        policies: policies.iter().cloned().map(Arc::new).collect(),
        ..Parts::default()
    };
    (Snapshot::new(1, parts), web)
}

/// The pod shop/client with service account cart.
fn kernel() -> Peer {
    Peer::Kernel(WorkloadId::of_pod("shop", "client", ""))
}

fn tls(text: &str) -> Peer {
    Peer::Tls(Arc::new(Identity::parse(&format!("spiffe://{text}")).unwrap()))
}

fn attempt(peer: &Peer, port: u16) -> Attempt<'_> {
    Attempt { peer, source: Some([10, 0, 0, 1].into()), destination: [10, 0, 0, 2].into(), port }
}

fn verdict(peer: &Peer, dest: &Workload, port: u16) -> Verdict {
    admit(&Snapshot::default(), &attempt(peer, port), dest).verdict
}

/// A policy with one rule for each list of ports.
fn policy(name: &str, action: Action, rules: &[&[u16]]) -> AuthorizationPolicy {
    let rule = |ports: &&[u16]| match ports {
        [] => Rule::default(),
        ports => {
            Rule { clauses: vec![vec![Match { destination_ports: ports.to_vec(), ..Match::default() }]] }
        }
    };
    AuthorizationPolicy {
        action,
        rules: rules.iter().map(rule).collect(),
        ..AuthorizationPolicy::named(Name::new("default", name))
    }
}

fn decided(name: &str, rule: Option<usize>) -> Option<DecidedBy> {
    Some(DecidedBy { policy: Name::new("default", name), rule })
}

const DENIED: Verdict = Verdict::Deny(DenyReason::PolicyDenied);
const UNALLOWED: Verdict = Verdict::Deny(DenyReason::NoPolicyAllows);

#[test]
fn only_plaintext_to_a_strict_port_is_refused() {
    let strict = Verdict::Deny(DenyReason::StrictPlaintext);
    for mode in [Mode::Disable, Mode::Permissive, Mode::Strict] {
        let dest = workload(mode, &[]);
        let plaintext = if mode == Mode::Strict { strict } else { Verdict::Allow };
        assert_eq!(verdict(&Peer::Unauthenticated, &dest, 80), plaintext, "{mode:?}");
        assert_eq!(verdict(&Peer::Kernel(WorkloadId(7)), &dest, 80), Verdict::Allow, "{mode:?}");
        assert_eq!(verdict(&tls("cluster.local/ns/a/sa/b"), &dest, 80), Verdict::Allow, "{mode:?}");
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
fn without_policies_a_port_fails_closed_exactly_when_plaintext_is_refused_there() {
    let snapshot = Snapshot::default();
    for mode in [Mode::Disable, Mode::Permissive, Mode::Strict] {
        let dest = workload(mode, &[(1, Mode::Strict), (2, Mode::Disable)]);
        for port in [1, 2, 3] {
            let refused = !verdict(&Peer::Unauthenticated, &dest, port).is_allow();
            assert_eq!(fail_closed_inbound(&snapshot, &dest, port), refused);
        }
    }
}

#[test]
fn an_enforced_policy_fails_closed_and_a_dry_run_does_not() {
    let allow = policy("a", Action::Allow, &[&[]]);
    let (snapshot, web) = world(std::slice::from_ref(&allow));
    assert!(fail_closed_inbound(&snapshot, &web, 80) && fail_closed_inbound_default(&snapshot, &web));
    let (snapshot, web) = world(&[AuthorizationPolicy { dry_run: true, ..allow }]);
    assert!(!fail_closed_inbound(&snapshot, &web, 80) && !fail_closed_inbound_default(&snapshot, &web));
    let lost = Workload { policies: vec![Name::new("default", "lost")], ..web };
    assert!(fail_closed_inbound(&snapshot, &lost, 80), "a policy that has not arrived may refuse");
}

#[test]
fn an_unknown_destination_admits_nobody() {
    let known = Arc::new(workload(Mode::Disable, &[]));
    let snapshot = Snapshot::new(1, Parts { workloads: vec![Arc::clone(&known)], ..Parts::default() });
    let plain = attempt(&Peer::Unauthenticated, 80);
    assert!(admit_in(&snapshot, &plain, known.id).is_allow());
    let unknown = admit_in(&snapshot, &plain, WorkloadId(1));
    assert_eq!(unknown.verdict, Verdict::Deny(DenyReason::UnknownWorkload));
}

#[test]
fn an_unknown_peer_of_the_kernel_passes_only_where_nothing_is_policed() {
    let ghost = Peer::Kernel(WorkloadId(404));
    let allow_all = policy("a", Action::Allow, &[&[]]);
    let (snapshot, web) = world(std::slice::from_ref(&allow_all));
    let judgement = admit(&snapshot, &attempt(&ghost, 80), &web);
    assert_eq!(judgement.verdict, Verdict::Deny(DenyReason::UnknownPeer));
    let (snapshot, web) = world(&[AuthorizationPolicy { dry_run: true, ..allow_all }]);
    assert!(admit(&snapshot, &attempt(&ghost, 80), &web).is_allow());
}

#[test]
fn a_policy_that_is_not_there_refuses_everybody() {
    let (snapshot, web) = world(&[policy("a", Action::Allow, &[&[]])]);
    let web = Workload { policies: vec![Name::new("default", "a"), Name::new("default", "lost")], ..web };
    let judgement = admit(&snapshot, &attempt(&kernel(), 80), &web);
    assert_eq!(judgement.verdict, Verdict::Deny(DenyReason::UnknownPolicy));
    assert_eq!(judgement.decided_by, decided("lost", None));
}

#[test]
fn a_certificate_of_another_trust_domain_is_refused_before_any_policy() {
    let (snapshot, web) = world(&[policy("a", Action::Allow, &[&[]])]);
    let judgement = admit(&snapshot, &attempt(&tls("else/ns/a/sa/b"), 80), &web);
    assert_eq!(judgement.verdict, Verdict::Deny(DenyReason::PeerTrustDomain));
}

#[test]
fn deny_wins_over_allow_and_allow_over_nothing() {
    let (allow, deny) = (Action::Allow, Action::Deny);
    type Case<'a> = (&'a [(&'a str, Action, &'a [&'a [u16]])], Verdict, Option<DecidedBy>);
    let table: &[Case<'_>] = &[
        (&[], Verdict::Allow, None),
        (&[("a", allow, &[&[80]])], Verdict::Allow, decided("a", Some(0))),
        (&[("a", allow, &[&[1], &[2], &[80]])], Verdict::Allow, decided("a", Some(2))),
        (&[("a", allow, &[&[1]])], UNALLOWED, decided("a", None)),
        (&[("a", allow, &[])], UNALLOWED, decided("a", None)),
        (&[("a", allow, &[&[1]]), ("b", allow, &[&[2]])], UNALLOWED, None),
        (&[("a", allow, &[&[1]]), ("b", allow, &[&[80]])], Verdict::Allow, decided("b", Some(0))),
        (&[("a", deny, &[])], Verdict::Allow, None),
        (&[("a", deny, &[&[1]])], Verdict::Allow, None),
        (&[("a", deny, &[&[1], &[]])], DENIED, decided("a", Some(1))),
        (&[("a", allow, &[&[]]), ("b", deny, &[&[80]])], DENIED, decided("b", Some(0))),
        (&[("a", deny, &[&[80]]), ("b", deny, &[&[]])], DENIED, decided("a", Some(0))),
        (&[("a", deny, &[&[1]]), ("b", allow, &[&[80]])], Verdict::Allow, decided("b", Some(0))),
        (&[("a", deny, &[&[1]]), ("b", allow, &[&[2]])], UNALLOWED, decided("b", None)),
    ];
    for (policies, verdict, by) in table {
        let policies: Vec<_> =
            policies.iter().map(|(name, action, rules)| policy(name, *action, rules)).collect();
        let (snapshot, web) = world(&policies);
        let judgement = admit(&snapshot, &attempt(&kernel(), 80), &web);
        assert_eq!((judgement.verdict, &judgement.decided_by), (*verdict, by), "{policies:?}");
    }
}

#[test]
fn strict_is_asked_before_any_policy() {
    let (snapshot, web) = world(&[policy("a", Action::Allow, &[&[]])]);
    let web = Workload { modes: PortModes { default: Mode::Strict, ..PortModes::default() }, ..web };
    let judgement = admit(&snapshot, &attempt(&Peer::Unauthenticated, 80), &web);
    assert_eq!(judgement.verdict, Verdict::Deny(DenyReason::StrictPlaintext));
    assert_eq!(judgement.decided_by, None);
}

#[test]
fn dry_run_policies_say_what_they_would_do_and_do_nothing() {
    let dry =
        |name, action, rules: &[&[u16]]| AuthorizationPolicy { dry_run: true, ..policy(name, action, rules) };
    let (snapshot, web) = world(&[
        dry("a", Action::Allow, &[&[1]]),
        dry("b", Action::Allow, &[&[80]]),
        dry("c", Action::Deny, &[&[1], &[80]]),
        dry("d", Action::Deny, &[&[1]]),
        policy("e", Action::Allow, &[&[80]]),
    ]);
    let judgement = admit(&snapshot, &attempt(&kernel(), 80), &web);
    assert_eq!((judgement.verdict, judgement.decided_by), (Verdict::Allow, decided("e", Some(0))));
    let said: Vec<_> =
        judgement.dry_run.iter().map(|d| (&*d.policy.name, d.action, d.rule, d.would_deny())).collect();
    assert_eq!(
        said,
        [
            ("a", Action::Allow, None, true),
            ("b", Action::Allow, Some(0), false),
            ("c", Action::Deny, Some(1), true),
            ("d", Action::Deny, None, false),
        ]
    );
}

#[test]
fn hbone_is_spoken_to_whoever_has_it_unless_the_port_wants_plaintext() {
    let modes = PortModes { default: Mode::Permissive, ports: [(81, Mode::Disable)].into() };
    let there = Workload { meshed: true, tunnel: Tunnel::Hbone, modes, ..workload(Mode::Strict, &[]) };
    assert_eq!(transport(&there, 80), Transport::Hbone);
    assert_eq!(transport(&there, 81), Transport::Plaintext);
    let strict = workload(Mode::Strict, &[]);
    assert_eq!(transport(&strict, 80), Transport::Plaintext, "there is nothing at 15008");
    let left = Workload { meshed: false, ..there };
    assert_eq!(transport(&left, 80), Transport::Plaintext);
}

#[test]
fn the_hash_moves_with_verdicts_and_with_nothing_else() {
    let mesh = Mesh::default();
    let modes =
        |default, ports: &[(u16, Mode)]| PortModes { default, ports: ports.iter().copied().collect() };
    let base = modes(Mode::Permissive, &[]);
    let none = policy_hash(&base, &mesh, &[]);
    assert_eq!(none, policy_hash(&modes(Mode::Permissive, &[(80, Mode::Permissive)]), &mesh, &[]));
    let root = Mesh { root_namespace: "x".into(), cluster_domain: "y".into(), ..Mesh::default() };
    assert_eq!(none, policy_hash(&base, &root, &[]));

    let renamed = AuthorizationPolicy {
        scope: Scope::Mesh,
        name: Name::new("x", "y"),
        ..policy("a", Action::Allow, &[&[80]])
    };
    let of = |policy: &AuthorizationPolicy| content_hash(policy).unwrap();
    assert_eq!(of(&renamed), of(&policy("a", Action::Allow, &[&[80]])));
    assert_eq!(content_hash(&AuthorizationPolicy { dry_run: true, ..renamed }), None);

    let m = |m: Match| AuthorizationPolicy {
        rules: vec![Rule { clauses: vec![vec![m]] }],
        ..policy("a", Action::Allow, &[])
    };
    let texts = || vec![StringMatch::parse("a")];
    let nets = || vec!["10.0.0.0/8".parse().unwrap()];
    let accounts = || vec![ServiceAccountMatch { namespace: "a".into(), name: "b".into() }];
    let mut hashes = vec![
        none,
        policy_hash(&modes(Mode::Strict, &[]), &mesh, &[]),
        policy_hash(&modes(Mode::Disable, &[]), &mesh, &[]),
        policy_hash(&modes(Mode::Permissive, &[(80, Mode::Strict)]), &mesh, &[]),
        policy_hash(&modes(Mode::Permissive, &[(81, Mode::Strict)]), &mesh, &[]),
        policy_hash(&base, &Mesh { trust_domain: "x".into(), ..Mesh::default() }, &[]),
        policy_hash(&base, &Mesh { trust_domain_aliases: vec!["x".into()], ..Mesh::default() }, &[]),
        policy_hash(&base, &mesh, &[1]),
        policy_hash(&base, &mesh, &[1, 2]),
        of(&policy("a", Action::Allow, &[])),
        of(&policy("a", Action::Deny, &[])),
        of(&policy("a", Action::Allow, &[&[]])),
        of(&policy("a", Action::Allow, &[&[], &[]])),
        of(&policy("a", Action::Allow, &[&[80, 81]])),
        of(&policy("a", Action::Allow, &[&[80], &[81]])),
        of(&m(Match::default())),
        of(&m(Match { principals: texts(), ..Match::default() })),
        of(&m(Match { principals: vec![StringMatch::parse("a*")], ..Match::default() })),
        of(&m(Match { principals: vec![StringMatch::Exact("a*".into())], ..Match::default() })),
        of(&m(Match { not_principals: texts(), ..Match::default() })),
        of(&m(Match { namespaces: texts(), ..Match::default() })),
        of(&m(Match { not_namespaces: texts(), ..Match::default() })),
        of(&m(Match { service_accounts: accounts(), ..Match::default() })),
        of(&m(Match { not_service_accounts: accounts(), ..Match::default() })),
        of(&m(Match { trust_domains: texts(), ..Match::default() })),
        of(&m(Match { not_trust_domains: texts(), ..Match::default() })),
        of(&m(Match { source_ips: nets(), ..Match::default() })),
        of(&m(Match { not_source_ips: nets(), ..Match::default() })),
        of(&m(Match { destination_ips: nets(), ..Match::default() })),
        of(&m(Match { not_destination_ips: nets(), ..Match::default() })),
        of(&m(Match { destination_ports: vec![80], ..Match::default() })),
        of(&m(Match { not_destination_ports: vec![80], ..Match::default() })),
        of(&m(Match { l7: true, ..Match::default() })),
    ];
    let count = hashes.len();
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), count);
}

#[test]
fn hashes_are_the_same_after_a_restart() {
    let content = content_hash(&policy("a", Action::Allow, &[&[80]])).unwrap();
    assert_eq!(content, 5_053_151_065_345_139_796);
    assert_eq!(policy_hash(&PortModes::default(), &Mesh::default(), &[content]), 7_046_231_758_930_303_771);
}

#[test]
fn reasons_have_labels_of_their_own() {
    let mut labels: Vec<_> = DenyReason::ALL.iter().map(|reason| reason.as_str()).collect();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels.len(), DenyReason::ALL.len());
}
