//! Endpoints among which only weight, load or a hash decides.

use std::sync::Arc;

use super::{
    balancer::{Member, Way},
    draws::Draws,
    table::Table,
};

/// Random draws before the members are gone through in turn.
const DRAWS_MAX: u32 = 8;

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    /// Its share in its class; only compared with its siblings'.
    weight: u32,
    /// Indices of its members, and the running sums of their weights.
    members: Vec<(u32, u64)>,
    /// All weights are equal.
    is_even: bool,
    /// How far each member is behind its due share, for round robin by weight.
    dues: Vec<f64>,
    /// Whose turn it is, for round robin among equals.
    turn: usize,
    /// Shared by clones of a balancer.
    table: Option<Arc<Table>>,
    /// How many members are not out.
    well: u32,
}

impl Group {
    pub(super) fn add(&mut self, index: u32, member: &Member, group_weight: u32) {
        let sum = self.total() + u64::from(member.weight);
        self.members.push((index, sum));
        self.weight = group_weight;
        self.well += u32::from(!member.is_out);
    }

    /// Makes what depends on all members.
    pub(super) fn finish(&mut self, way: Way, members: &[Member], seed: u64) {
        let own: Vec<_> = self
            .members
            .iter()
            .filter_map(|(index, _)| members.get(*index as usize).map(|m| (*index, m.addr, m.weight)))
            .collect();
        self.is_even = own.windows(2).all(|pair| matches!(pair, [(_, _, a), (_, _, b)] if a == b));
        match way {
            Way::Hash(kind) => self.table = Some(Arc::new(Table::new(kind, &own))),
            Way::RoundRobin => {
                self.dues = vec![0.0; own.len()];
                self.turn = seed.checked_rem(own.len() as u64).unwrap_or_default() as usize;
            }
            Way::LeastRequest | Way::Random => {}
        }
    }

    fn total(&self) -> u64 {
        self.members.last().map_or(0, |(_, sum)| *sum)
    }

    pub(super) fn len(&self) -> u32 {
        self.members.len() as u32
    }

    pub(super) fn well(&self) -> u32 {
        self.well
    }

    pub(super) fn weight(&self) -> u32 {
        self.weight
    }

    pub(super) fn set_well(&mut self, is_well: bool) {
        self.well = if is_well { self.well + 1 } else { self.well.saturating_sub(1) };
    }

    /// The weight, less when more members are out than spare capacity makes up for.
    pub(super) fn effective_weight(&self, in_panic: bool) -> u64 {
        let (len, weight) = (u64::from(self.len()), u64::from(self.weight));
        if in_panic || len == 0 {
            return if len == 0 { 0 } else { weight * 1_000 };
        }
        weight * (1_400 * u64::from(self.well) / len).min(1_000)
    }

    /// Picks a member. `factor` is what it has of its weight: 0.0 is never picked; unless `is_warming` it is 0.0 or 1.0.
    pub(super) fn pick(
        &mut self,
        way: Way,
        hash: Option<u64>,
        draws: &mut Draws,
        is_warming: bool,
        factor: impl Fn(u32) -> f64,
        load: impl Fn(u32) -> u32,
    ) -> Option<u32> {
        match (way, hash, &self.table) {
            (Way::Hash(_), Some(hash), Some(table)) => table.find(hash, |member| factor(member) > 0.0),
            (Way::RoundRobin, ..) if self.is_even && !is_warming => self.next_in_turn(factor),
            (Way::RoundRobin, ..) => self.most_behind(factor),
            (Way::LeastRequest, ..) => self.less_loaded(draws, factor, load),
            (Way::Random | Way::Hash(_), ..) => self.sample(draws, &factor),
        }
    }

    fn next_in_turn(&mut self, factor: impl Fn(u32) -> f64) -> Option<u32> {
        let len = self.members.len();
        let mut places = (0..len).map(|step| (self.turn + step) % len);
        let (place, member) = places.find_map(|place| {
            let (member, _) = *self.members.get(place)?;
            (factor(member) > 0.0).then_some((place, member))
        })?;
        self.turn = place + 1;
        Some(member)
    }

    /// Each gets its weight per turn, the one that is most behind is picked and pays for all: evenly interleaved, not in runs.
    fn most_behind(&mut self, factor: impl Fn(u32) -> f64) -> Option<u32> {
        let (mut total, mut before) = (0.0, 0);
        let mut best: Option<(usize, f64, u32)> = None;
        for (place, ((member, sum), due)) in self.members.iter().zip(&mut self.dues).enumerate() {
            let weight = (sum - before) as f64 * factor(*member);
            before = *sum;
            if weight <= 0.0 {
                continue;
            }
            *due += weight;
            total += weight;
            if best.is_none_or(|(_, most, _)| *due > most) {
                best = Some((place, *due, *member));
            }
        }
        let (place, _, member) = best?;
        if let Some(due) = self.dues.get_mut(place) {
            *due -= total;
        }
        Some(member)
    }

    /// Of two by weight, the one with fewer requests for its weight.
    fn less_loaded(
        &self,
        draws: &mut Draws,
        factor: impl Fn(u32) -> f64,
        load: impl Fn(u32) -> u32,
    ) -> Option<u32> {
        let first = self.sample(draws, &factor)?;
        let others = |member| if member == first { 0.0 } else { factor(member) };
        let Some(second) = self.sample(draws, &others) else { return Some(first) };
        let per_weight = |own: u32, other: u32| f64::from(load(own)) * self.weight_of(other) * factor(other);
        Some(if per_weight(second, first) < per_weight(first, second) { second } else { first })
    }

    fn weight_of(&self, member: u32) -> f64 {
        // Members stand in ascending order.
        let Ok(place) = self.members.binary_search_by_key(&member, |(index, _)| *index) else { return 0.0 };
        let before =
            place.checked_sub(1).and_then(|before| self.members.get(before)).map_or(0, |(_, sum)| *sum);
        self.members.get(place).map_or(0.0, |(_, sum)| (sum - before) as f64)
    }

    /// One at random, by weight times factor. Exact: draws that are refused leave the ratio of the others as it is.
    fn sample(&self, draws: &mut Draws, factor: &impl Fn(u32) -> f64) -> Option<u32> {
        for _ in 0..DRAWS_MAX {
            let place = if self.is_even {
                draws.below(self.members.len() as u64) as usize
            } else {
                let at = draws.below(self.total());
                self.members.partition_point(|(_, sum)| *sum <= at)
            };
            let (member, _) = *self.members.get(place)?;
            let share = factor(member);
            if share >= 1.0 || (share > 0.0 && draws.unit() < share) {
                return Some(member);
            }
        }
        let weights = || {
            let mut before = 0;
            self.members.iter().map(move |(member, sum)| {
                let own = sum - before;
                before = *sum;
                (*member, own as f64 * factor(*member))
            })
        };
        let mut left = draws.unit() * weights().map(|(_, weight)| weight).sum::<f64>();
        let mut last = None;
        for (member, weight) in weights().filter(|(_, weight)| *weight > 0.0) {
            last = Some(member);
            if left < weight {
                break;
            }
            left -= weight;
        }
        // Rounding may leave a little behind the last.
        last
    }
}
