//! Tests of picks: shares, classes, places, warm-up, panic; and what holds whatever the endpoints are.

use std::{collections::BTreeMap, sync::Arc};

use proptest::prelude::*;

use super::*;
use crate::{
    balance::locality::Place,
    route::cluster::{Distribution, HashKey},
};

type Labels = BTreeMap<Arc<str>, Arc<str>>;

fn addr(index: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, (index >> 8) as u8, index as u8], 8080))
}

fn balancing(algorithm: Algorithm) -> Balancing {
    Balancing { algorithm, ..Balancing::default() }
}

fn hashed(table: HashTable) -> Balancing {
    balancing(Algorithm::ConsistentHash { key: HashKey::SourceIp, table })
}

fn outlier(min_health_percent: u32) -> OutlierDetection {
    OutlierDetection {
        consecutive_5xx: Some(5),
        consecutive_gateway: None,
        consecutive_local: None,
        split_local: false,
        interval: Duration::from_secs(10),
        base_ejection: Duration::from_secs(30),
        max_ejection_percent: 100,
        min_health_percent,
        error_statuses: Vec::new(),
    }
}

/// A balancer for a client in `eu/a/1`, of endpoints with these weights and places.
fn balancer(
    endpoints: &[(u32, &str)],
    balancing: &Balancing,
    outlier: Option<&OutlierDetection>,
) -> Balancer {
    balancer_of(endpoints, &Peers::default(), balancing, outlier)
}

/// The same for a client whose fellows are in these zones.
fn balancer_of(
    endpoints: &[(u32, &str)],
    peers: &Peers,
    balancing: &Balancing,
    outlier: Option<&OutlierDetection>,
) -> Balancer {
    with_candidates(endpoints, |candidates, client| {
        Balancer::new(candidates, &Client { peers, ..*client }, balancing, outlier, 0)
    })
}

fn with_candidates<T>(endpoints: &[(u32, &str)], then: impl FnOnce(&[Candidate<'_>], &Client<'_>) -> T) -> T {
    let none = Labels::new();
    let places: Vec<Place> = endpoints.iter().map(|(_, place)| Place::parse(place)).collect();
    let candidates: Vec<_> = endpoints
        .iter()
        .zip(&places)
        .enumerate()
        .map(|(index, ((weight, _), place))| Candidate {
            addr: addr(index),
            weight: *weight,
            located: Located { place, labels: &none },
            since: Duration::ZERO,
        })
        .collect();
    let here = Place::parse("eu/a/1");
    let located = Located { place: &here, labels: &none };
    then(&candidates, &Client { located, peers: &Peers::default() })
}

fn even(count: usize) -> Vec<(u32, &'static str)> {
    vec![(1, ""); count]
}

/// Shares of so many picks, without load.
fn picks(balancer: &mut Balancer, count: u32, ask: impl Fn(&mut Draws) -> Ask<'static>) -> Vec<f64> {
    let mut draws = Draws::new(5);
    let mut counts = vec![0_u32; balancer.standings().count()];
    for _ in 0..count {
        counts[balancer.pick(&ask(&mut draws), |_| 0).unwrap()] += 1;
    }
    counts.iter().map(|picked| f64::from(*picked) / f64::from(count)).collect()
}

fn at_random(draws: &mut Draws) -> Ask<'static> {
    Ask { draw: draws.word(), now: Duration::from_secs(3600), ..Ask::default() }
}

fn assert_near(shares: &[f64], expected: &[f64]) {
    assert_eq!(shares.len(), expected.len());
    let is_near = shares.iter().zip(expected).all(|(share, expected)| (share - expected).abs() < 0.02);
    assert!(is_near, "{shares:?} is not {expected:?}");
}

#[test]
fn c2_and_c10_without_load_every_algorithm_shares_by_weight() {
    for algorithm in [Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random] {
        let mut weighted = balancer(&[(1, ""), (3, ""), (6, "")], &balancing(algorithm.clone()), None);
        assert_near(&picks(&mut weighted, 20_000, at_random), &[0.1, 0.3, 0.6]);
        let mut same = balancer(&even(4), &balancing(algorithm), None);
        assert_near(&picks(&mut same, 20_000, at_random), &[0.25; 4]);
    }
}

#[test]
fn c2_of_two_the_one_with_fewer_requests_for_its_weight_is_taken() {
    let least = balancing(Algorithm::LeastRequest);
    let mut two = balancer(&[(1, ""), (3, "")], &least, None);
    for draw in 0..200 {
        let ask = Ask { draw, ..Ask::default() };
        assert_eq!(two.pick(&ask, |index| [1, 2][index]), Some(1), "two of three is less than one of one");
        assert_eq!(two.pick(&ask, |index| [1, 4][index]), Some(0));
    }
}

#[test]
fn c2_round_robin_goes_through_all_and_interleaves_by_weight() {
    let robin = balancing(Algorithm::RoundRobin);
    let sequence = |endpoints: &[(u32, &str)], count: usize| -> Vec<usize> {
        let mut balancer = balancer(endpoints, &robin, None);
        (0..count).map(|_| balancer.pick(&Ask::default(), |_| 0).unwrap()).collect()
    };
    assert_eq!(sequence(&even(3), 7), [0, 1, 2, 0, 1, 2, 0]);
    assert_eq!(sequence(&[(3, ""), (1, "")], 8), [0, 0, 1, 0, 0, 0, 1, 0]);
}

#[test]
fn the_first_turn_depends_on_the_seed_so_that_workers_do_not_march_in_step() {
    let robin = balancing(Algorithm::RoundRobin);
    let first = |seed| {
        with_candidates(&even(5), |candidates, client| {
            Balancer::new(candidates, client, &robin, None, seed).pick(&Ask::default(), |_| 0)
        })
    };
    assert_eq!([first(0), first(1), first(7)], [Some(0), Some(1), Some(2)]);
}

#[test]
fn s30_tried_endpoints_are_avoided_while_there_are_others() {
    for algorithm in [Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random] {
        let mut three = balancer(&even(3), &balancing(algorithm), None);
        let tried = [addr(0), addr(2)];
        let all = [addr(0), addr(1), addr(2)];
        for draw in 0..100 {
            let ask = Ask { draw, tried: &tried, ..Ask::default() };
            assert_eq!(three.pick(&ask, |_| 0), Some(1));
            assert!(three.pick(&Ask { tried: &all, ..ask }, |_| 0).is_some());
        }
    }
}

#[test]
fn nobody_is_nobody() {
    assert_eq!(balancer(&[], &Balancing::default(), None).pick(&Ask::default(), |_| 0), None);
}

#[test]
fn fact_6_without_a_panic_threshold_an_endpoint_that_is_out_is_never_picked() {
    let mut three = balancer(&even(3), &Balancing::default(), Some(&outlier(0)));
    three.set_out(addr(1), true);
    assert_near(&picks(&mut three, 5_000, at_random), &[0.5, 0.0, 0.5]);
    three.set_all_out(|_| true);
    assert_eq!(three.pick(&Ask::default(), |_| 0), None);
    three.set_all_out(|own| own != addr(1));
    assert_eq!(three.pick(&Ask::default(), |_| 0), Some(1));
}

#[test]
fn e5_below_the_panic_threshold_all_endpoints_are_used() {
    let mut four = balancer(&even(4), &Balancing::default(), Some(&outlier(50)));
    four.set_out(addr(0), true);
    four.set_out(addr(1), true);
    assert_near(&picks(&mut four, 5_000, at_random), &[0.0, 0.0, 0.5, 0.5]);
    four.set_out(addr(2), true);
    assert_near(&picks(&mut four, 20_000, at_random), &[0.25; 4]);
}

fn failover() -> Balancing {
    let locality = Locality::Failover { regions: Vec::new(), labels: Vec::new(), forced: false };
    Balancing { locality, ..Balancing::default() }
}

#[test]
fn c7_the_nearest_class_takes_everything_until_too_few_of_it_are_well() {
    let places = [(1, "eu/a/1"), (1, "eu/a/1"), (1, "eu/b/1"), (1, "us/a/1")];
    let mut balancer = balancer(&places, &failover(), Some(&outlier(0)));
    assert_eq!(
        balancer.standings().map(|standing| standing.class).collect::<Vec<_>>(),
        [Some(0), Some(0), Some(1), Some(2)]
    );
    assert_near(&picks(&mut balancer, 5_000, at_random), &[0.5, 0.5, 0.0, 0.0]);
    balancer.set_out(addr(0), true);
    // Half of the class × 1.4.
    assert_near(&picks(&mut balancer, 20_000, at_random), &[0.0, 0.7, 0.3, 0.0]);
    balancer.set_out(addr(1), true);
    assert_near(&picks(&mut balancer, 5_000, at_random), &[0.0, 0.0, 1.0, 0.0]);
    balancer.set_out(addr(2), true);
    assert_near(&picks(&mut balancer, 5_000, at_random), &[0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn fact_5_without_outlier_detection_failover_has_no_effect() {
    let mut balancer = balancer(&[(1, "eu/a/1"), (1, "us/a/1")], &failover(), None);
    assert_near(&picks(&mut balancer, 5_000, at_random), &[0.5, 0.5]);
}

#[test]
fn s33_retries_may_skip_to_farther_classes_and_stay_when_there_is_none() {
    let mut balancer = balancer(&[(1, "eu/a/1"), (1, "us/a/1")], &failover(), Some(&outlier(0)));
    let mut pick = |skip_classes| balancer.pick(&Ask { skip_classes, ..Ask::default() }, |_| 0);
    assert_eq!([pick(0), pick(1), pick(2)], [Some(0), Some(1), Some(0)]);
}

#[test]
fn c6_places_get_their_shares_whatever_the_number_of_their_endpoints() {
    let to = vec![("eu/a/*".into(), 80), ("eu/b/*".into(), 20)];
    let locality = Locality::Distribute(vec![Distribution { from: "eu/*".into(), to }]);
    let balancing = Balancing { locality, ..Balancing::default() };
    let places = [(1, "eu/a/1"), (1, "eu/b/1"), (1, "eu/b/2"), (1, "us/a/1")];
    let mut balancer = balancer(&places, &balancing, Some(&outlier(0)));
    assert_near(&picks(&mut balancer, 20_000, at_random), &[0.8, 0.1, 0.1, 0.0]);
    // Half of the second place is out, which spare capacity covers for 70 % of its share.
    balancer.set_out(addr(1), true);
    assert_near(&picks(&mut balancer, 20_000, at_random), &[0.851, 0.0, 0.149, 0.0]);
    balancer.set_out(addr(0), true);
    assert_near(&picks(&mut balancer, 5_000, at_random), &[0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn c5_a_new_endpoint_gets_its_share_by_and_by() {
    let warmup = Warmup { duration: Duration::from_secs(100), minimum_percent: 10.0, aggression: 1.0 };
    assert_eq!(warmup.share(Duration::ZERO), 0.1);
    assert_eq!(warmup.share(Duration::from_secs(50)), 0.5);
    assert_eq!(warmup.share(Duration::from_secs(100)), 1.0);
    let slow = Warmup { aggression: 2.0, ..warmup };
    assert_eq!(slow.share(Duration::from_secs(25)), 0.5);
    for algorithm in [Algorithm::LeastRequest, Algorithm::RoundRobin] {
        let balancing = Balancing { algorithm, warmup: Some(warmup), ..Balancing::default() };
        let none = Labels::new();
        let here = Place::default();
        let located = Located { place: &here, labels: &none };
        let candidate = |index, since| Candidate { addr: addr(index), weight: 1, located, since };
        let start = Duration::from_secs(1000);
        let mut balancer = Balancer::new(
            &[candidate(0, Duration::ZERO), candidate(1, start)],
            &Client { located, peers: &Peers::default() },
            &balancing,
            None,
            0,
        );
        for (age, expected) in [(0, 0.1 / 1.1), (50, 0.5 / 1.5), (100, 0.5)] {
            let now = start + Duration::from_secs(age);
            let shares =
                picks(&mut balancer, 20_000, |draws| Ask { draw: draws.word(), now, ..Ask::default() });
            assert_near(&shares, &[1.0 - expected, expected]);
        }
    }
}

#[test]
fn c5_hashes_and_random_choice_know_no_warmup() {
    let warmup = Warmup { duration: Duration::from_secs(100), minimum_percent: 1.0, aggression: 1.0 };
    let balancing = Balancing { algorithm: Algorithm::Random, warmup: Some(warmup), ..Balancing::default() };
    let mut two = balancer(&even(2), &balancing, None);
    assert_near(&picks(&mut two, 5_000, |draws| Ask { draw: draws.word(), ..Ask::default() }), &[0.5, 0.5]);
}

#[test]
fn c9_zones_of_the_region_get_what_their_endpoints_can_take_and_other_regions_what_is_left() {
    let places = ["eu/a/1", "eu/a/2", "eu/b/1", "eu/b/1", "eu/b/1", "eu/b/2", "us/a/1"];
    let endpoints: Vec<_> = places.iter().map(|place| (1, *place)).collect();
    let locality = |min_size| Locality::ZoneAware { regions: Vec::new(), labels: Vec::new(), min_size };
    let ask = |draws: &mut Draws| Ask { draw: draws.word(), ..Ask::default() };
    let shares = |balancer: &mut Balancer| {
        let of = picks(balancer, 20_000, ask);
        [of[0] + of[1], of[2..6].iter().sum(), of[6]]
    };
    let near_enough = |shares: [f64; 3], expected: [f64; 3]| assert_near(&shares, &expected);
    for algorithm in [Algorithm::LeastRequest, Algorithm::RoundRobin, Algorithm::Random] {
        let of = |min_size, peers: &Peers| {
            let balancing = Balancing { locality: locality(min_size), ..balancing(algorithm.clone()) };
            balancer_of(&endpoints, peers, &balancing, Some(&outlier(0)))
        };
        // A third of the endpoints: it keeps a third of the clients, and of half of the clients two thirds.
        near_enough(shares(&mut of(6, &Peers::from([("a", 1), ("b", 2)]))), [1.0, 0.0, 0.0]);
        near_enough(shares(&mut of(6, &Peers::from([("a", 1), ("b", 1)]))), [2.0 / 3.0, 1.0 / 3.0, 0.0]);
        // Zones play no part: all of the region.
        near_enough(shares(&mut of(7, &Peers::from([("a", 1), ("b", 2)]))), [1.0 / 3.0, 2.0 / 3.0, 0.0]);
        near_enough(shares(&mut of(6, &Peers::default())), [1.0 / 3.0, 2.0 / 3.0, 0.0]);

        let mut failing = of(6, &Peers::from([("a", 1), ("b", 2)]));
        failing.set_out(addr(0), true);
        // A fifth of those that are well, a third of the clients.
        near_enough(shares(&mut failing), [0.6, 0.4, 0.0]);
        failing.set_out(addr(1), true);
        assert_eq!(shares(&mut failing)[0], 0.0, "nobody of the own zone is well");
        failing.set_out(addr(0), false);
        failing.set_out(addr(1), false);
        near_enough(shares(&mut failing), [1.0, 0.0, 0.0]);
        failing.set_all_out(|endpoint| endpoint != addr(6));
        near_enough(shares(&mut failing), [0.0, 0.0, 1.0]);
    }
}

#[test]
fn c9_a_zone_of_which_all_were_tried_leaves_the_next_try_to_the_others() {
    let endpoints = [(1, "eu/a/1"), (1, "eu/b/1"), (1, "us/a/1")];
    let locality = Locality::ZoneAware { regions: Vec::new(), labels: Vec::new(), min_size: 0 };
    let balancing = Balancing { locality, ..Balancing::default() };
    let mut balancer = balancer_of(&endpoints, &Peers::from([("a", 1), ("b", 1)]), &balancing, None);
    let own = [addr(0)];
    let tried = picks(&mut balancer, 100, |_| Ask::default());
    assert_eq!(tried, [1.0, 0.0, 0.0]);
    let mut draws = Draws::new(5);
    for _ in 0..100 {
        let ask = Ask { draw: draws.word(), tried: &own, ..Ask::default() };
        assert_eq!(balancer.pick(&ask, |_| 0), Some(1));
    }
}

#[test]
fn c9_who_is_chosen_by_hash_is_the_same_for_clients_of_all_zones() {
    let endpoints = [(1, "eu/a/1"), (1, "eu/b/1"), (1, "eu/b/1"), (1, "us/a/1")];
    let locality = Locality::ZoneAware { regions: Vec::new(), labels: Vec::new(), min_size: 0 };
    let balancing = Balancing { locality, ..hashed(HashTable::Maglev(1009)) };
    let of = |peers: Peers| balancer_of(&endpoints, &peers, &balancing, None);
    let (mut one, mut other) = (of(Peers::from([("a", 1), ("b", 9)])), of(Peers::from([("a", 1), ("b", 2)])));
    let mut seen = BTreeSet::new();
    for hash in 0..200 {
        let ask = Ask { hash: Some(hash), ..Ask::default() };
        let picked = one.pick(&ask, |_| 0).unwrap();
        assert_eq!(other.pick(&ask, |_| 0), Some(picked));
        seen.insert(picked);
    }
    assert_eq!(seen, BTreeSet::from([0, 1, 2]), "all of the region, nobody of another");
}

#[test]
fn an_update_without_change_builds_nothing_and_one_with_keeps_who_is_out() {
    let rules = outlier(0);
    let balancing = balancing(Algorithm::RoundRobin);
    let mut balancer = balancer(&even(3), &balancing, Some(&rules));
    balancer.set_out(addr(1), true);
    let update = |balancer: &mut Balancer, count, rules| {
        with_candidates(&even(count), |candidates, client| {
            balancer.update(candidates, client, &balancing, rules, 0)
        })
    };
    assert!(!update(&mut balancer, 3, Some(&rules)));
    assert!(update(&mut balancer, 4, Some(&rules)));
    let out: Vec<bool> = balancer.standings().map(|standing| standing.is_out).collect();
    assert_eq!(out, [false, true, false, false]);
    assert!(update(&mut balancer, 4, None));
    assert!(balancer.standings().all(|standing| !standing.is_out));
}

#[test]
fn a_request_without_anything_to_hash_is_balanced_at_random() {
    let mut balancer = balancer(&even(4), &hashed(HashTable::Maglev(1009)), None);
    assert_near(&picks(&mut balancer, 20_000, at_random), &[0.25; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_is_picked_may_be_picked(
        weights in prop::collection::vec(0_u32..5, 1..10),
        out in prop::collection::vec(any::<bool>(), 10),
        tried in prop::collection::vec(any::<bool>(), 10),
        loads in prop::collection::vec(0_u32..4, 10),
        way in 0_u8..5, panic_percent in prop_oneof![Just(0_u32), Just(50)], seed in any::<u64>(),
    ) {
        let endpoints: Vec<_> = weights.iter().map(|weight| (*weight, "")).collect();
        let balancing = match way {
            0 => balancing(Algorithm::LeastRequest),
            1 => balancing(Algorithm::RoundRobin),
            2 => balancing(Algorithm::Random),
            3 => hashed(HashTable::Ring(64)),
            _ => hashed(HashTable::Maglev(101)),
        };
        let mut balancer = balancer(&endpoints, &balancing, Some(&outlier(panic_percent)));
        let count = endpoints.len();
        for index in (0..count).filter(|index| out[*index]) {
            balancer.set_out(addr(index), true);
        }
        let tried_addrs: Vec<_> = (0..count).filter(|index| tried[*index]).map(addr).collect();
        let well = (0..count).filter(|index| !out[*index]).count();
        let in_panic = well * 100 < panic_percent as usize * count;
        let usable = |index: usize| in_panic || !out[index];
        let any_fresh = (0..count).any(|index| usable(index) && !tried[index]);
        let mut draws = Draws::new(seed);
        for _ in 0..50 {
            let ask = Ask { draw: draws.word(), hash: Some(draws.word()), tried: &tried_addrs, ..Ask::default() };
            match balancer.pick(&ask, |index| loads[index]) {
                Some(index) => {
                    prop_assert!(usable(index));
                    prop_assert!(!any_fresh || !tried[index]);
                }
                None => prop_assert!((0..count).all(|index| !usable(index))),
            }
        }
    }

    #[test]
    fn one_hash_leads_to_one_endpoint_and_only_the_share_of_one_that_is_out_moves(
        count in 2_usize..10, out in 0_usize..10, seed in any::<u64>(), is_ring in any::<bool>(),
    ) {
        let out = out % count;
        let kind = if is_ring { HashTable::Ring(1024) } else { HashTable::Maglev(1009) };
        let rules = outlier(0);
        let mut before = balancer(&even(count), &hashed(kind), Some(&rules));
        let mut after = before.clone();
        after.set_out(addr(out), true);
        let mut draws = Draws::new(seed);
        for _ in 0..300 {
            let hash = Some(draws.word());
            let first = before.pick(&Ask { draw: draws.word(), hash, ..Ask::default() }, |_| 0).unwrap();
            let again = before.pick(&Ask { draw: draws.word(), hash, ..Ask::default() }, |_| 9).unwrap();
            prop_assert_eq!(first, again);
            let moved = after.pick(&Ask { draw: draws.word(), hash, ..Ask::default() }, |_| 0).unwrap();
            prop_assert!(moved != out && (first == out || first == moved));
        }
    }
}
