//! Names in certificates, strictly read, and labels that are what dashboards rely on.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::fixture::{Claims, Forger, identity};

#[test]
fn labels_are_distinct_and_begin_alike() {
    let labels: BTreeSet<&str> = PeerError::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(labels.len(), PeerError::ALL.len());
    assert!(labels.iter().all(|label| label.starts_with("tls_")));
    let refusals: BTreeSet<&str> = crate::ca::Refusal::ALL.iter().map(|reason| reason.as_str()).collect();
    assert_eq!(refusals.len(), crate::ca::Refusal::ALL.len());
}

#[test]
fn a_node_reads_back_and_what_is_merely_similar_is_none() {
    let node = NodeIdentity::new("cluster.local", "n1.example").unwrap();
    assert_eq!(node.to_string(), "spiffe://cluster.local/node/n1.example");
    assert_eq!(NodeIdentity::parse(&node.to_string()), Ok(node.clone()));
    assert_eq!(Principal::parse(&node.to_string()), Ok(Principal::Node(node)));
    for text in [
        "spiffe://cluster.local/node/",
        "spiffe://cluster.local/node/a/b",
        "spiffe://cluster.local/node/..",
        "spiffe:///node/a",
        "spiffe://a/b/node/c",
        "spiffe://A/node/b",
        "spiffe://a/node/b?c",
        "a/node/b",
    ] {
        assert_eq!(NodeIdentity::parse(text), Err(PeerError::NotSpiffe), "{text}");
    }
    assert!(NodeIdentity::new("a", &"b".repeat(IDENTITY_BYTES_MAX)).is_err());
    assert!(Identity::parse("spiffe://cluster.local/node/n1").is_err(), "never a workload");
}

#[test]
fn a_name_beside_the_identity_does_not_matter() {
    let claims = Claims { dns: vec!["a.example".into()], ..Claims::of(identity("a")) };
    let forged = Forger::root("root").leaf(&claims);
    assert_eq!(identity_of(&forged.chain[0]), Ok(identity("a")));
}

#[test]
fn what_is_no_certificate_is_malformed() {
    let good = Forger::root("root").leaf(&Claims::of(identity("a"))).chain.remove(0).to_vec();
    let mut behind = good.clone();
    behind.push(0);
    for bytes in [&b""[..], b"0", &behind, &good[..good.len() - 1], &vec![0x30; CERTIFICATE_BYTES_MAX + 1]] {
        assert_eq!(identity_of(bytes), Err(PeerError::Malformed));
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        prop_assert!(identity_of(&bytes).is_err());
    }

    #[test]
    fn a_damaged_certificate_never_makes_the_reader_panic(at in any::<prop::sample::Index>(), flip in 1_u8..) {
        let mut der = Forger::root("root").leaf(&Claims::of(identity("a"))).chain.remove(0).to_vec();
        let at = at.index(der.len());
        der[at] ^= flip;
        drop(principal_of(&der));
    }
}
