//! Every field of a match, positive and negative, for every kind of peer.

use super::*;

/// Whether an ALLOW policy with this match lets the attempt in; a DENY policy with it must do the opposite.
fn holds(m: &Match, attempt: &Attempt<'_>) -> bool {
    let of = |action| AuthorizationPolicy {
        rules: vec![Rule { clauses: vec![vec![m.clone()]] }],
        ..policy("p", action, &[])
    };
    let (snapshot, web) = world(&[of(Action::Allow)]);
    let allowed = admit(&snapshot, attempt, &web).is_allow();
    let (snapshot, web) = world(&[of(Action::Deny)]);
    let denied = !admit(&snapshot, attempt, &web).is_allow();
    assert_eq!(allowed, denied, "{m:?}");
    allowed
}

fn texts(values: &[&str]) -> Vec<StringMatch> {
    values.iter().map(|value| StringMatch::parse(value)).collect()
}

fn accounts(values: &[(&str, &str)]) -> Vec<ServiceAccountMatch> {
    let of =
        |(ns, name): &(&str, &str)| ServiceAccountMatch { namespace: (*ns).into(), name: (*name).into() };
    values.iter().map(of).collect()
}

fn nets(values: &[&str]) -> Vec<ipnet::IpNet> {
    values.iter().map(|value| value.parse().unwrap()).collect()
}

/// Checks a field and its negation for three peers: the kernel's (cluster.local, shop, cart), a certificate's
/// (cluster.local, bank, teller), nobody.
fn check_identity(positive: Match, negative: Match, wanted: [bool; 2]) {
    let peers = [kernel(), tls("cluster.local/ns/bank/sa/teller"), Peer::Unauthenticated];
    for (peer, wanted) in peers.iter().zip([wanted[0], wanted[1], false]) {
        assert_eq!(holds(&positive, &attempt(peer, 80)), wanted, "{peer:?} {positive:?}");
        // Whoever proves nothing is none of those named, so "not" holds for him.
        assert_eq!(holds(&negative, &attempt(peer, 80)), !wanted, "{peer:?} {negative:?}");
    }
}

#[test]
fn principals() {
    for (values, wanted) in [
        (&["cluster.local/ns/shop/sa/cart"][..], [true, false]),
        (&["cluster.local/ns/shop/sa/car"], [false, false]),
        (&["cluster.local/ns/shop/*"], [true, false]),
        (&["*/sa/teller"], [false, true]),
        (&["*"], [true, true]),
        (&["x", "*/sa/teller", "*/sa/cart"], [true, true]),
        (&["spiffe://cluster.local/ns/shop/sa/cart"], [false, false]),
    ] {
        check_identity(
            Match { principals: texts(values), ..Match::default() },
            Match { not_principals: texts(values), ..Match::default() },
            wanted,
        );
    }
}

#[test]
fn namespaces() {
    for (values, wanted) in [
        (&["shop"][..], [true, false]),
        (&["sho"], [false, false]),
        (&["sh*"], [true, false]),
        (&["*nk"], [false, true]),
        (&["s*p"], [true, false]),
        (&["*"], [true, true]),
        (&["shop", "bank"], [true, true]),
    ] {
        check_identity(
            Match { namespaces: texts(values), ..Match::default() },
            Match { not_namespaces: texts(values), ..Match::default() },
            wanted,
        );
    }
}

#[test]
fn service_accounts() {
    for (values, wanted) in [
        (&[("shop", "cart")][..], [true, false]),
        (&[("bank", "cart")], [false, false]),
        (&[("shop", "*")], [false, false]),
        (&[("shop", "cart"), ("bank", "teller")], [true, true]),
    ] {
        check_identity(
            Match { service_accounts: accounts(values), ..Match::default() },
            Match { not_service_accounts: accounts(values), ..Match::default() },
            wanted,
        );
    }
}

#[test]
fn trust_domains() {
    for (values, wanted) in [
        (&["cluster.local"][..], [true, true]),
        (&["*.local"], [true, true]),
        (&["cluster.*"], [true, true]),
        (&["else"], [false, false]),
        (&["*"], [true, true]),
    ] {
        check_identity(
            Match { trust_domains: texts(values), ..Match::default() },
            Match { not_trust_domains: texts(values), ..Match::default() },
            wanted,
        );
    }
}

#[test]
fn source_addresses() {
    for (values, source, wanted) in [
        (&["10.0.0.1/32"][..], "10.0.0.1", true),
        (&["10.0.0.1/32"], "10.0.0.2", false),
        (&["10.0.0.0/8"], "10.9.9.9", true),
        (&["0.0.0.0/0"], "fd00::1", false),
        (&["0.0.0.0/0", "::/0"], "fd00::1", true),
        (&["fd00::/64"], "fd00::1", true),
        (&["fd00::/64"], "fd01::1", false),
        (&["10.0.0.0/8"], "::ffff:10.0.0.1", true),
    ] {
        let peers = [kernel(), tls("cluster.local/ns/bank/sa/teller"), Peer::Unauthenticated];
        for peer in &peers {
            let attempt = Attempt { source: Some(source.parse().unwrap()), ..attempt(peer, 80) };
            let positive = Match { source_ips: nets(values), ..Match::default() };
            assert_eq!(holds(&positive, &attempt), wanted, "{values:?} {source}");
            let negative = Match { not_source_ips: nets(values), ..Match::default() };
            assert_eq!(holds(&negative, &attempt), !wanted, "not {values:?} {source}");
        }
    }
}

#[test]
fn destination_addresses() {
    for (values, wanted) in [
        (&["10.0.0.2/32"][..], true),
        (&["10.0.0.0/24"], true),
        (&["10.0.0.1/32"], false),
        (&["::/0"], false),
    ] {
        let positive = Match { destination_ips: nets(values), ..Match::default() };
        assert_eq!(holds(&positive, &attempt(&kernel(), 80)), wanted, "{values:?}");
        let negative = Match { not_destination_ips: nets(values), ..Match::default() };
        assert_eq!(holds(&negative, &attempt(&kernel(), 80)), !wanted, "not {values:?}");
    }
}

#[test]
fn destination_ports() {
    for (values, wanted) in [(&[80][..], true), (&[1, 80], true), (&[8080], false)] {
        let positive = Match { destination_ports: values.to_vec(), ..Match::default() };
        assert_eq!(holds(&positive, &attempt(&kernel(), 80)), wanted, "{values:?}");
        let negative = Match { not_destination_ports: values.to_vec(), ..Match::default() };
        assert_eq!(holds(&negative, &attempt(&kernel(), 80)), !wanted, "not {values:?}");
    }
}

#[test]
fn the_fields_of_a_match_hold_together_or_not_at_all() {
    let both = |ports: &[u16]| Match {
        namespaces: texts(&["shop"]),
        destination_ports: ports.to_vec(),
        not_principals: texts(&["*/sa/teller"]),
        ..Match::default()
    };
    assert!(holds(&both(&[80]), &attempt(&kernel(), 80)));
    assert!(!holds(&both(&[81]), &attempt(&kernel(), 80)));
    assert!(!holds(&both(&[80]), &attempt(&tls("cluster.local/ns/shop/sa/teller"), 80)));
}

#[test]
fn an_empty_clause_holds_and_a_match_without_fields_does_not() {
    let allows = |clauses: Vec<Vec<Match>>| {
        let rules = vec![Rule { clauses }];
        let (snapshot, web) = world(&[AuthorizationPolicy { rules, ..policy("p", Action::Allow, &[]) }]);
        admit(&snapshot, &attempt(&kernel(), 80), &web).is_allow()
    };
    let port = |port| Match { destination_ports: vec![port], ..Match::default() };
    assert!(allows(vec![]));
    assert!(allows(vec![vec![]]));
    assert!(allows(vec![vec![], vec![port(80)]]));
    assert!(allows(vec![vec![port(1), port(80)]]), "one of a clause is enough");
    assert!(!allows(vec![vec![port(80)], vec![port(1)]]), "every clause has to hold");
    assert!(!allows(vec![vec![Match::default()]]));
    assert!(allows(vec![vec![Match::default(), port(80)]]));
}

#[test]
fn a_field_of_requests_voids_an_allow_rule_and_widens_a_deny_rule() {
    let request = Match { l7: true, ..Match::default() };
    let port = |port| Match { destination_ports: vec![port], ..Match::default() };
    let of = |action, clauses: Vec<Vec<Match>>| {
        let rules = vec![Rule { clauses }];
        let (snapshot, web) = world(&[AuthorizationPolicy { rules, ..policy("p", action, &[]) }]);
        admit(&snapshot, &attempt(&kernel(), 80), &web).is_allow()
    };
    assert!(!of(Action::Allow, vec![vec![request.clone()]]));
    assert!(!of(Action::Allow, vec![vec![port(80), request.clone()]]), "void as a whole");
    assert!(!of(Action::Deny, vec![vec![request.clone()]]));
    assert!(!of(Action::Deny, vec![vec![Match { l7: true, ..port(80) }]]));
    assert!(of(Action::Deny, vec![vec![Match { l7: true, ..port(81) }]]), "its other fields still count");
    assert!(of(Action::Deny, vec![vec![request], vec![port(81)]]));
}

#[test]
fn an_unknown_source_address_is_let_in_by_no_rule_and_kept_out_by_every_one() {
    let peer = kernel();
    let attempt = Attempt { source: None, ..attempt(&peer, 80) };
    let all = nets(&["0.0.0.0/0"]);
    for m in [
        Match { source_ips: all.clone(), ..Match::default() },
        Match { not_source_ips: all.clone(), ..Match::default() },
    ] {
        for action in [Action::Allow, Action::Deny] {
            let rules = vec![Rule { clauses: vec![vec![m.clone()]] }];
            let (snapshot, web) = world(&[AuthorizationPolicy { rules, ..policy("p", action, &[]) }]);
            assert!(!admit(&snapshot, &attempt, &web).is_allow(), "{action} {m:?}");
        }
    }
}
