//! Who is enrolled, and as what, with each part of what a node can know.

use super::*;
use crate::{
    plan::{Obstacle, local_pods},
    policy::{Attempt, DenyReason, Peer, Verdict, admit},
    snapshot::Parts,
};

const NODE: &str = "n1";
const UID: &str = "uid-1";

fn cart() -> Name {
    Name::new("shop", "cart")
}

fn workload(uid: &str) -> Workload {
    Workload {
        id: WorkloadId::of_pod("shop", "cart", uid),
        node: NODE.into(),
        meshed: true,
        ..Workload::named(cart())
    }
}

fn world(workloads: Vec<Workload>) -> Snapshot {
    let workloads = workloads.into_iter().map(Arc::new).collect();
    Snapshot::new(7, Parts { workloads, ..Parts::default() })
}

fn attached(uid: &str) -> LocalFacts {
    let attached =
        Attached { uid: uid.into(), netns: "/run/netns/x".into(), addrs: vec!["10.0.0.9".parse().unwrap()] };
    LocalFacts { attached: BTreeMap::from([(cart(), attached)]), ..LocalFacts::default() }
}

fn declared(workload: Workload, runtime_uid: &str) -> LocalFacts {
    let declared = Declared { runtime_uid: runtime_uid.into(), workload: Arc::new(workload) };
    LocalFacts { declared: BTreeMap::from([(cart(), declared)]), ..LocalFacts::default() }
}

fn running(uid: &str) -> LocalFacts {
    LocalFacts { running: BTreeMap::from([(uid.into(), "/proc/9/ns/net".into())]), ..LocalFacts::default() }
}

fn seen(facts: &LocalFacts, snapshot: &Snapshot) -> Snapshot {
    snapshot.with_workloads(snapshot.version() + 1, facts.changes(snapshot, NODE))
}

#[test]
fn a_pod_of_the_source_gets_the_namespace_and_addresses_that_the_runtime_gave_it() {
    let base = world(vec![workload(UID)]);
    assert_eq!(local_pods(&base, NODE).blocked[&cart()], Obstacle::NoNetns);
    let world = seen(&attached(UID), &base);
    let config = local_pods(&world, NODE).wanted.remove(&workload(UID).id).unwrap();
    assert_eq!((&*config.netns, config.addrs.len()), ("/run/netns/x", 1));
    assert_eq!(world.workload_at("10.0.0.9".parse().unwrap()).unwrap().name, cart());
    // What the source knows of addresses is newer.
    let mut known = workload(UID);
    known.addrs = vec!["10.0.0.1".parse().unwrap()];
    let world = seen(&attached(UID), &self::world(vec![known]));
    assert_eq!(world.workload(workload(UID).id).unwrap().addrs, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
}

#[test]
fn a_pod_without_a_uid_is_known_by_its_name() {
    let world = seen(&attached(UID), &world(vec![workload("")]));
    assert_eq!(local_pods(&world, NODE).wanted.len(), 1);
}

#[test]
fn what_was_learnt_of_one_incarnation_is_not_put_into_another() {
    let base = world(vec![workload("uid-2")]);
    assert!(attached(UID).changes(&base, NODE).is_empty());
    assert!(running(UID).changes(&base, NODE).is_empty());
    let mut facts = declared(workload("uid-2"), "uid-2");
    facts.attached = attached(UID).attached;
    assert!(facts.changes(&base, NODE).iter().all(|w| w.netns.is_none()));
    assert_eq!(facts.membership(&base, &cart(), UID), Membership::Unknown);
}

#[test]
fn a_running_pod_is_found_by_its_uid_alone() {
    let world = seen(&running(UID), &world(vec![workload(UID)]));
    assert_eq!(world.workload(workload(UID).id).unwrap().netns.as_deref(), Some("/proc/9/ns/net"));
}

#[test]
fn the_runtime_says_where_a_pod_is_before_a_look_at_processes_does() {
    let facts = LocalFacts { attached: attached(UID).attached, ..running(UID) };
    let world = seen(&facts, &world(vec![workload(UID)]));
    assert_eq!(world.workload(workload(UID).id).unwrap().netns.as_deref(), Some("/run/netns/x"));
}

#[test]
fn a_static_pod_has_one_uid_at_the_runtime_and_another_at_the_api_server() {
    let mut facts = declared(workload("of-the-api"), "of-the-runtime");
    facts.attached = attached("of-the-runtime").attached;
    let world = seen(&facts, &world(Vec::new()));
    assert_eq!(world.workload(workload("of-the-api").id).unwrap().netns.as_deref(), Some("/run/netns/x"));
}

#[test]
fn the_nodes_own_watch_decides_who_is_meshed() {
    let base = world(vec![workload(UID)]);
    let out = Workload { meshed: false, ..workload(UID) };
    let facts = declared(out.clone(), UID);
    assert_eq!(facts.membership(&base, &cart(), UID), Membership::Unmeshed(None));
    assert!(!seen(&facts, &base).workload(out.id).unwrap().meshed);
    let skipped = Workload { skipped: Some("it has a sidecar".into()), ..out };
    let facts = declared(skipped, UID);
    let why = Some("it has a sidecar".into());
    assert_eq!(facts.membership(&base, &cart(), UID), Membership::Unmeshed(why));
    assert!(local_pods(&seen(&facts, &base), NODE).wanted.is_empty());
    assert_eq!(
        LocalFacts::default().membership(&base, &cart(), UID),
        Membership::Meshed(workload(UID).id),
        "without a watch the source does"
    );
}

#[test]
fn a_pod_the_source_has_not_heard_of_is_enrolled_and_admits_nobody() {
    let mut facts = declared(workload(UID), UID);
    facts.attached = attached(UID).attached;
    let caller = Workload { id: WorkloadId(5), ..Workload::named(Name::new("shop", "caller")) };
    let world = seen(&facts, &world(vec![caller]));
    let wanted = local_pods(&world, NODE).wanted.remove(&workload(UID).id).unwrap();
    assert!(wanted.inbound_fail_closed);
    let dest = world.workload(workload(UID).id).unwrap();
    assert!(!is_heard(dest));
    assert!(is_heard(seen(&facts, &self::world(vec![workload(UID)])).workload(workload(UID).id).unwrap()));
    let addr = "10.0.0.9".parse().unwrap();
    for peer in [Peer::Kernel(WorkloadId(5)), Peer::Unauthenticated] {
        let attempt = Attempt { peer: &peer, source: "10.0.0.1".parse().ok(), destination: addr, port: 80 };
        assert_eq!(admit(&world, &attempt, dest).verdict, Verdict::Deny(DenyReason::UnknownPolicy));
    }
    // Once it was heard of, its own policy counts, and the generation moves.
    let later = seen(&facts, &self::world(vec![workload(UID)]));
    let heard = later.workload(workload(UID).id).unwrap();
    assert!(heard.policies.is_empty());
    assert_ne!(heard.policy_hash, dest.policy_hash);
}

#[test]
fn what_changes_nothing_is_no_change() {
    let base = world(vec![workload(UID)]);
    let facts = attached(UID);
    let once = seen(&facts, &base);
    assert!(facts.changes(&once, NODE).is_empty());
    assert!(LocalFacts::default().changes(&base, NODE).is_empty());
}
