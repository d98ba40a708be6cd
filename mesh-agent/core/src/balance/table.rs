//! Tables that lead from a hash to an endpoint: ring and maglev.
//!
//! Invariants:
//! - An endpoint that comes or goes moves the keys of its own share, and few others.
//! - What cannot be used is passed over without moving the keys of those that can.
//! - Tables are bounded: [`RING_MAX`] points, [`MAGLEV_MAX`] entries.

use std::net::SocketAddr;

use super::hash::hash_endpoint;
use crate::route::cluster::HashTable;

/// Most points of a ring.
pub const RING_MAX: u64 = 1 << 20;

/// Most entries of a maglev table.
pub const MAGLEV_MAX: u64 = 5_000_011;

/// Leads from a hash to the index of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Table {
    /// Points in ascending order with their members.
    Ring(Vec<(u64, u32)>),
    /// Members by the remainder of the hash.
    Maglev(Vec<u32>),
}

impl Table {
    /// Makes a table of members with their positive weights.
    pub(super) fn new(kind: HashTable, members: &[(u32, SocketAddr, u32)]) -> Self {
        match kind {
            HashTable::Ring(size_min) => Self::Ring(ring(size_min, members)),
            HashTable::Maglev(size) => Self::Maglev(maglev(size, members)),
        }
    }

    /// The member that a hash leads to: the first from its place on that is usable.
    pub(super) fn find(&self, hash: u64, is_usable: impl Fn(u32) -> bool) -> Option<u32> {
        match self {
            Self::Ring(points) => {
                let at = points.partition_point(|(point, _)| *point < hash);
                let (before, after) = points.split_at_checked(at)?;
                after.iter().chain(before).map(|(_, member)| *member).find(|member| is_usable(*member))
            }
            Self::Maglev(entries) => {
                let at = usize::try_from(hash.checked_rem(entries.len() as u64)?).ok()?;
                let (before, after) = entries.split_at_checked(at)?;
                after.iter().chain(before).copied().find(|member| is_usable(*member))
            }
        }
    }
}

/// Every member has points in proportion to its weight; the number of points for one unit of weight is a power of two, so that
/// it seldom changes when members come and go.
fn ring(size_min: u64, members: &[(u32, SocketAddr, u32)]) -> Vec<(u64, u32)> {
    let unit = members.iter().fold(0, |unit, (_, _, weight)| gcd(unit, u64::from(*weight))).max(1);
    let total: u64 = members.iter().map(|(_, _, weight)| u64::from(*weight) / unit).sum();
    let size_min = size_min.clamp(1, RING_MAX);
    let each = size_min.div_ceil(total.max(1)).next_power_of_two();
    let points_of = |weight: u32| {
        let units = u64::from(weight) / unit;
        // Twice the maximum is what rounding up may make of it.
        if total * each <= 2 * RING_MAX { units * each } else { (units * RING_MAX / total).max(1) }
    };
    let mut points: Vec<(u64, u32)> = members
        .iter()
        .flat_map(|(member, addr, weight)| {
            (0..points_of(*weight)).map(|index| (hash_endpoint(*addr, index), *member))
        })
        .collect();
    points.sort_unstable();
    points
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Members take turns in claiming the next free entry of their own permutation; one with less weight skips turns.
fn maglev(size: u64, members: &[(u32, SocketAddr, u32)]) -> Vec<u32> {
    let size = size.clamp(2, MAGLEV_MAX) as usize;
    let heaviest = members.iter().map(|(_, _, weight)| u64::from(*weight)).max().unwrap_or_default();
    if heaviest == 0 {
        return Vec::new();
    }
    struct Turn {
        member: u32,
        next: usize,
        step: usize,
        tried: usize,
        weight: u64,
        credit: u64,
    }
    let mut turns: Vec<Turn> = members
        .iter()
        .map(|(member, addr, weight)| Turn {
            member: *member,
            next: (hash_endpoint(*addr, 0) % size as u64) as usize,
            step: (hash_endpoint(*addr, 1) % (size as u64 - 1)) as usize + 1,
            tried: 0,
            weight: u64::from(*weight),
            credit: 0,
        })
        .collect();
    const FREE: u32 = u32::MAX;
    let mut entries = vec![FREE; size];
    let mut free = size;
    while free > 0 {
        for turn in &mut turns {
            turn.credit += turn.weight;
            if turn.credit < heaviest || free == 0 {
                continue;
            }
            turn.credit -= heaviest;
            while let Some(entry) = entries.get_mut(turn.next) {
                let is_free = *entry == FREE;
                if is_free {
                    *entry = turn.member;
                    free -= 1;
                }
                turn.tried += 1;
                // A size that is no prime has steps that come round early; then every entry in turn.
                let step = if turn.tried < size { turn.step } else { 1 };
                turn.next = (turn.next + step) % size;
                if is_free {
                    break;
                }
            }
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::balance::Draws;

    fn member(index: u32, weight: u32) -> (u32, SocketAddr, u32) {
        let octets = index.to_be_bytes();
        (index, SocketAddr::from(([10, octets[1], octets[2], octets[3]], 8080)), weight)
    }

    fn shares(table: &Table, members: usize, keys: u32) -> Vec<u32> {
        let mut counts = vec![0; members];
        let mut draws = Draws::new(11);
        for _ in 0..keys {
            counts[table.find(draws.word(), |_| true).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn c3_a_ring_has_at_least_as_many_points_as_asked_for_and_no_more_than_the_bound() {
        let size = |size_min, weights: &[u32]| {
            let members: Vec<_> =
                weights.iter().zip(0..).map(|(weight, index)| member(index, *weight)).collect();
            match Table::new(HashTable::Ring(size_min), &members) {
                Table::Ring(points) => points.len() as u64,
                Table::Maglev(_) => unreachable!(),
            }
        };
        assert_eq!(size(1024, &[1]), 1024);
        assert_eq!(size(1024, &[1, 1, 1]), 3 * 512);
        assert_eq!(size(1024, &[100, 100]), 1024);
        assert_eq!(size(0, &[1, 2]), 3);
        assert!((RING_MAX..=2 * RING_MAX).contains(&size(u64::MAX, &[1, 1, 1])));
        assert!(size(1024, &[u32::MAX, 1]) <= 2 * RING_MAX);
        assert_eq!(size(1024, &[]), 0);
    }

    #[test]
    fn c3_maglev_gives_everyone_the_share_of_its_weight() {
        let members = [member(0, 1), member(1, 1), member(2, 2)];
        let Table::Maglev(entries) = Table::new(HashTable::Maglev(65_537), &members) else { unreachable!() };
        assert_eq!(entries.len(), 65_537);
        let of = |index| entries.iter().filter(|entry| **entry == index).count();
        assert!(of(0).abs_diff(16_384) <= 2 && of(1).abs_diff(16_384) <= 2 && of(2).abs_diff(32_768) <= 2);
    }

    #[test]
    fn a_ring_gives_everyone_about_the_share_of_its_weight() {
        let members = [member(0, 1), member(1, 1), member(2, 2)];
        let counts = shares(&Table::new(HashTable::Ring(16_384), &members), 3, 40_000);
        assert!((8_000..12_000).contains(&counts[0]), "{counts:?}");
        assert!((17_000..23_000).contains(&counts[2]), "{counts:?}");
    }

    #[test]
    fn a_table_of_no_prime_size_is_filled_too() {
        let members = [member(0, 1), member(1, 3), member(2, 1)];
        for size in [2, 4, 6, 100, 1024] {
            let Table::Maglev(entries) = Table::new(HashTable::Maglev(size), &members) else {
                unreachable!()
            };
            assert!(entries.iter().all(|entry| *entry < 3), "{size}: {entries:?}");
        }
    }

    #[test]
    fn nobody_usable_is_nobody() {
        for kind in [HashTable::Ring(8), HashTable::Maglev(7)] {
            let table = Table::new(kind, &[member(0, 1), member(1, 1)]);
            assert_eq!(table.find(3, |_| false), None);
            assert_eq!(Table::new(kind, &[]).find(3, |_| true), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_ring_moves_only_the_keys_of_the_endpoint_that_goes(
            count in 2_u32..12, gone in 0_u32..12, seed in any::<u64>(),
        ) {
            let gone = gone % count;
            let all: Vec<_> = (0..count).map(|index| member(index, 1)).collect();
            let rest: Vec<_> = all.iter().copied().filter(|(index, _, _)| *index != gone).collect();
            let (before, after) = (Table::new(HashTable::Ring(1024), &all), Table::new(HashTable::Ring(1024), &rest));
            // The density of points is the same unless the number of members passes a power of two.
            let same_density = 1024_u64.div_ceil(u64::from(count)).next_power_of_two()
                == 1024_u64.div_ceil(u64::from(count) - 1).next_power_of_two();
            let mut draws = Draws::new(seed);
            let mut moved = 0;
            for _ in 0..2_000 {
                let key = draws.word();
                let (was, is) = (before.find(key, |_| true).unwrap(), after.find(key, |_| true).unwrap());
                if was != gone && was != is {
                    moved += 1;
                }
            }
            if same_density {
                prop_assert_eq!(moved, 0);
            } else {
                prop_assert!(moved < 1_400, "{}", moved);
            }
        }

        #[test]
        fn maglev_moves_few_keys_besides_those_of_the_endpoint_that_goes(
            count in 2_u32..12, gone in 0_u32..12, seed in any::<u64>(),
        ) {
            let gone = gone % count;
            let all: Vec<_> = (0..count).map(|index| member(index, 1)).collect();
            let rest: Vec<_> = all.iter().copied().filter(|(index, _, _)| *index != gone).collect();
            let kind = HashTable::Maglev(5003);
            let (before, after) = (Table::new(kind, &all), Table::new(kind, &rest));
            let mut draws = Draws::new(seed);
            let moved = (0..2_000).filter(|_| {
                let key = draws.word();
                let was = before.find(key, |_| true).unwrap();
                was != gone && after.find(key, |_| true).unwrap() != was
            }).count();
            prop_assert!(moved < 400, "{}", moved);
        }

        #[test]
        fn what_is_not_usable_moves_no_key_of_what_is(
            count in 2_u32..12, out in 0_u32..12, seed in any::<u64>(), is_ring in any::<bool>(),
        ) {
            let out = out % count;
            let members: Vec<_> = (0..count).map(|index| member(index, 1)).collect();
            let kind = if is_ring { HashTable::Ring(1024) } else { HashTable::Maglev(1009) };
            let table = Table::new(kind, &members);
            let mut draws = Draws::new(seed);
            for _ in 0..500 {
                let key = draws.word();
                let was = table.find(key, |_| true).unwrap();
                let is = table.find(key, |member| member != out).unwrap();
                prop_assert!(is != out && (was == out || was == is));
            }
        }
    }
}
