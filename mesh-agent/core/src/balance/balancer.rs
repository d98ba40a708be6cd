//! Which endpoint of a destination a request goes to.
//!
//! In three steps: a priority class, a group of places within it (several only when shares are given), an endpoint of the group.
//!
//! Invariants:
//! - One that is out is picked only in panic; one that was tried only when its class has no other.
//! - Nothing is allocated for a pick. Tables are made when the endpoints change, and only then.
//! - With the same endpoints and the same hash the endpoint is the same, on every node of a locality.

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    time::Duration,
};

use super::{
    draws::{Draws, below, mix},
    group::Group,
    locality::{Judge, Located, Place, Preference},
    priority::{ClassHealth, ClassShare, shares},
    zone::{Peers, Plan, Zones},
};
use crate::route::cluster::{Algorithm, Balancing, HashTable, Locality, OutlierDetection, Warmup};

/// An endpoint that can be picked: it is ready and belongs to the subset.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Its address.
    pub addr: SocketAddr,
    /// Its share among the others; 0 counts as 1.
    pub weight: u32,
    /// Where it is.
    pub located: Located<'a>,
    /// When it became one, on the caller's clock. Of no account once a balancer knows it.
    pub since: Duration,
}

/// Whose endpoints they are.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Where it is.
    pub located: Located<'a>,
    /// Where its like are.
    pub peers: &'a Peers,
}

/// What one pick is for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ask<'a> {
    /// One random word.
    pub draw: u64,
    /// What the request is balanced by, if it is by hash.
    pub hash: Option<u64>,
    /// Endpoints to avoid.
    pub tried: &'a [SocketAddr],
    /// How many of the nearest classes are left out, if there are farther ones.
    pub skip_classes: u32,
    /// Now, on the caller's clock.
    pub now: Duration,
}

/// An endpoint as it is arranged.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Member {
    pub(super) addr: SocketAddr,
    pub(super) weight: u32,
    pub(super) since: Duration,
    /// `None`: it gets nothing.
    seat: Option<Seat>,
    pub(super) is_out: bool,
}

impl Member {
    /// Whether that is news.
    fn set_out(&mut self, classes: &mut [Vec<Group>], zones: Option<&mut Zones>, is_out: bool) -> bool {
        if self.is_out == is_out {
            return false;
        }
        self.is_out = is_out;
        let Some(seat) = self.seat else { return true };
        if let Some(group) = classes.get_mut(seat.class).and_then(|groups| groups.get_mut(seat.group)) {
            group.set_well(!is_out);
        }
        if let (Some(zones), Some(zone)) = (zones, seat.zone) {
            zones.set_well(zone, !is_out);
        }
        true
    }
}

/// Where a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seat {
    class: usize,
    group: usize,
    /// Of the group, among those of its class.
    group_weight: u32,
    /// Its zone, in the nearest class of zone-aware routing.
    zone: Option<usize>,
}

/// How endpoints within a group are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    LeastRequest,
    RoundRobin,
    Random,
    Hash(HashTable),
}

/// What a balancer was made by.
#[derive(Clone, Debug, PartialEq)]
struct Settings {
    way: Way,
    warmup: Option<Warmup>,
    panic_percent: u32,
    zones: Option<Plan>,
    members: Vec<Member>,
}

/// An endpoint as a balancer sees it, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Address.
    pub addr: SocketAddr,
    /// Weight.
    pub weight: u32,
    /// Priority class, 0 is the nearest; `None`: it gets nothing.
    pub class: Option<usize>,
    /// It is left out because it failed.
    pub is_out: bool,
}

/// The endpoints of one destination for one client.
#[derive(Clone, Debug)]
pub struct Balancer {
    settings: Settings,
    /// Groups by class.
    classes: Vec<Vec<Group>>,
    /// The nearest class once more, by zone.
    zones: Option<Zones>,
    /// By class.
    shares: Vec<ClassShare>,
    /// When the last member is warm.
    warm_at: Duration,
}

impl Balancer {
    /// Arranges endpoints. `seed` is one random word: whose turn is first.
    pub fn new(
        candidates: &[Candidate<'_>],
        client: &Client<'_>,
        balancing: &Balancing,
        outlier: Option<&OutlierDetection>,
        seed: u64,
    ) -> Self {
        Self::build(Settings::new(candidates, client, balancing, outlier), seed)
    }

    /// Takes over endpoints and settings as they are now; whether anything changed. Who was out stays so, unless nothing detects it any
    /// more; who was there is not new.
    pub fn update(
        &mut self,
        candidates: &[Candidate<'_>],
        client: &Client<'_>,
        balancing: &Balancing,
        outlier: Option<&OutlierDetection>,
        seed: u64,
    ) -> bool {
        let mut new = Settings::new(candidates, client, balancing, outlier);
        let known: HashMap<SocketAddr, &Member> =
            self.settings.members.iter().map(|member| (member.addr, member)).collect();
        for member in &mut new.members {
            if let Some(was) = known.get(&member.addr) {
                member.is_out = was.is_out && outlier.is_some();
                member.since = was.since;
            }
        }
        if new == self.settings {
            return false;
        }
        *self = Self::build(new, seed);
        true
    }

    fn build(settings: Settings, seed: u64) -> Self {
        let mut classes: Vec<Vec<Group>> = Vec::new();
        let mut zones = settings.zones.as_ref().map(Zones::new);
        for (member, index) in settings.members.iter().zip(0..) {
            let Some(seat) = member.seat else { continue };
            if classes.len() <= seat.class {
                classes.resize_with(seat.class + 1, Vec::new);
            }
            let Some(groups) = classes.get_mut(seat.class) else { continue };
            if groups.len() <= seat.group {
                groups.resize_with(seat.group + 1, Group::default);
            }
            if let Some(group) = groups.get_mut(seat.group) {
                group.add(index, member, seat.group_weight);
            }
            if let (Some(zones), Some(zone)) = (&mut zones, seat.zone) {
                zones.add(zone, index, member);
            }
        }
        let of_zones = zones.iter_mut().flat_map(|zones| &mut zones.groups);
        for group in classes.iter_mut().flatten().chain(of_zones) {
            group.finish(settings.way, &settings.members, seed);
        }
        let warm_at = settings.warmup.map_or(Duration::ZERO, |warmup| {
            let youngest = settings.members.iter().map(|member| member.since).max().unwrap_or_default();
            youngest.saturating_add(warmup.duration)
        });
        let mut balancer = Self { settings, classes, zones, shares: Vec::new(), warm_at };
        balancer.share_out();
        balancer
    }

    /// Leaves an endpoint out, or takes it back.
    pub fn set_out(&mut self, addr: SocketAddr, is_out: bool) {
        let members = &mut self.settings.members;
        let Some(member) = members.iter_mut().find(|member| member.addr == addr) else { return };
        if member.set_out(&mut self.classes, self.zones.as_mut(), is_out) {
            self.share_out();
        }
    }

    /// Says of each endpoint whether it is left out.
    pub fn set_all_out(&mut self, is_out: impl Fn(SocketAddr) -> bool) {
        let mut is_changed = false;
        for member in &mut self.settings.members {
            is_changed |= member.set_out(&mut self.classes, self.zones.as_mut(), is_out(member.addr));
        }
        if is_changed {
            self.share_out();
        }
    }

    fn share_out(&mut self) {
        let health = |groups: &Vec<Group>| {
            groups.iter().fold(ClassHealth::default(), |sum, group| ClassHealth {
                total: sum.total + group.len(),
                well: sum.well + group.well(),
            })
        };
        let health: Vec<ClassHealth> = self.classes.iter().map(health).collect();
        shares(&health, self.settings.panic_percent, &mut self.shares);
        self.zones.iter_mut().for_each(Zones::share_out);
    }

    /// Picks an endpoint, by its index among the candidates; `None` when none can be used. `load` is the number of requests
    /// outstanding at one.
    pub fn pick(&mut self, ask: &Ask<'_>, load: impl Fn(usize) -> u32) -> Option<usize> {
        let mut draws = Draws::new(ask.draw);
        // What is chosen by hash is so in every step.
        let word = ask.hash.map_or_else(|| draws.word(), mix);
        let class = self.class(ask.skip_classes, word)?;
        let in_panic = self.shares.get(class)?.in_panic;
        let warmup = self.settings.warmup.filter(|_| ask.now < self.warm_at);
        let groups = self.classes.get_mut(class)?;
        let members = &self.settings.members;
        let way = self.settings.way;
        let load = |index: u32| load(index as usize);
        let first = group_by_weight(groups, in_panic, mix(word))?;
        // The nearest class has one group if it is told by zones.
        let zones = self.zones.as_mut().filter(|_| class == 0 && !in_panic);
        let mut zone = zones.and_then(|zones| zones.choose(mix(word)));
        for avoids_tried in [true, false] {
            if !avoids_tried && ask.tried.is_empty() {
                break;
            }
            // Nothing, or how much of its weight a member has.
            let factor = |index: u32| match members.get(index as usize) {
                Some(member) if member.is_out && !in_panic => 0.0,
                Some(member) if avoids_tried && ask.tried.contains(&member.addr) => 0.0,
                Some(member) => {
                    warmup.map_or(1.0, |warmup| warmup.share(ask.now.saturating_sub(member.since)))
                }
                None => 0.0,
            };
            // A zone of which all were tried leaves it to the others.
            if let Some(zone) = zone.take()
                && let Some(picked) = zone.pick(way, ask.hash, &mut draws, warmup.is_some(), factor, load)
            {
                return Some(picked as usize);
            }
            let order = std::iter::once(first).chain((0..groups.len()).filter(|index| *index != first));
            for index in order {
                let Some(group) = groups.get_mut(index).filter(|group| group.weight() > 0) else { continue };
                if let Some(picked) = group.pick(way, ask.hash, &mut draws, warmup.is_some(), factor, load) {
                    return Some(picked as usize);
                }
            }
        }
        None
    }

    fn class(&self, skip: u32, word: u64) -> Option<usize> {
        let is_usable = |index: &usize| {
            self.shares.get(*index).is_some_and(|share| share.in_panic)
                || self.classes.get(*index).is_some_and(|groups| groups.iter().any(|group| group.well() > 0))
        };
        if skip > 0
            && let Some(farther) = (skip as usize..self.classes.len()).find(is_usable)
        {
            return Some(farther);
        }
        let mut left = below(word, 100) as u32;
        self.shares.iter().position(|share| {
            let is_hit = left < share.percent;
            left = left.saturating_sub(share.percent);
            is_hit
        })
    }

    /// The endpoints as they stand, in the order of the candidates.
    pub fn standings(&self) -> impl Iterator<Item = Standing> {
        self.settings.members.iter().map(|member| Standing {
            addr: member.addr,
            weight: member.weight,
            class: member.seat.map(|seat| seat.class),
            is_out: member.is_out,
        })
    }
}

/// A group by its weight, which shrinks with the share of its members that are well.
fn group_by_weight(groups: &[Group], in_panic: bool, word: u64) -> Option<usize> {
    if groups.len() < 2 {
        return (!groups.is_empty()).then_some(0);
    }
    let weights = || groups.iter().map(|group| group.effective_weight(in_panic));
    let mut left = below(word, weights().sum());
    weights().position(|weight| {
        let is_hit = left < weight;
        left = left.saturating_sub(weight);
        is_hit
    })
}

impl Settings {
    fn new(
        candidates: &[Candidate<'_>],
        client: &Client<'_>,
        balancing: &Balancing,
        outlier: Option<&OutlierDetection>,
    ) -> Self {
        let way = match &balancing.algorithm {
            // Who passes through picks nothing; where nothing was dialled it is as usual.
            Algorithm::LeastRequest | Algorithm::Passthrough => Way::LeastRequest,
            Algorithm::RoundRobin => Way::RoundRobin,
            Algorithm::Random => Way::Random,
            Algorithm::ConsistentHash { table, .. } => Way::Hash(*table),
        };
        // Who is chosen by hash is the same for clients of all zones.
        let mut zones = match balancing.locality {
            Locality::ZoneAware { min_size, .. } if !matches!(way, Way::Hash(_)) => {
                Some(Plan::new(client.located.place, client.peers, min_size))
            }
            _ => None,
        };
        Self {
            way,
            // Only these two know weights that change (C5).
            warmup: balancing.warmup.filter(|_| matches!(way, Way::LeastRequest | Way::RoundRobin)),
            panic_percent: outlier.map_or(0, |outlier| outlier.min_health_percent),
            members: arrange(candidates, client, &balancing.locality, outlier.is_some(), &mut zones),
            zones,
        }
    }
}

/// Gives each endpoint its seat. Classes are numbered without gaps.
fn arrange(
    candidates: &[Candidate<'_>],
    client: &Client<'_>,
    locality: &Locality,
    has_outlier_detection: bool,
    zones: &mut Option<Plan>,
) -> Vec<Member> {
    let client = &client.located;
    let judge = Judge::new(locality, client, has_outlier_detection);
    let preferences: Vec<Preference> =
        candidates.iter().map(|candidate| judge.judge(client, &candidate.located)).collect();
    let ranks: BTreeSet<u32> = preferences
        .iter()
        .filter_map(|preference| match preference {
            Preference::Class(rank) => Some(*rank),
            Preference::Share { .. } | Preference::Nothing => None,
        })
        .collect();
    let mut seat = |place: &Place, preference: &Preference| match *preference {
        Preference::Class(rank) => {
            let class = ranks.range(..rank).count();
            let zones = zones.as_mut().filter(|_| class == 0 && place.region == client.place.region);
            let zone = zones.map(|zones| zones.zone(&place.zone));
            Some(Seat { class, group: 0, group_weight: 1, zone })
        }
        Preference::Share { group, weight } => {
            Some(Seat { class: 0, group, group_weight: weight, zone: None })
        }
        Preference::Nothing => None,
    };
    let member = |(candidate, preference): (&Candidate<'_>, &Preference)| Member {
        addr: candidate.addr,
        weight: candidate.weight.max(1),
        since: candidate.since,
        seat: seat(candidate.located.place, preference),
        is_out: false,
    };
    candidates.iter().zip(&preferences).map(member).collect()
}

impl Warmup {
    /// The share of its weight that an endpoint of this age has, from 0.0 (excluded) to 1.0 (C5).
    pub fn share(&self, age: Duration) -> f64 {
        if age >= self.duration {
            return 1.0;
        }
        let age = age.as_secs_f64().max(1.0);
        let aggression = if self.aggression > 0.0 { self.aggression } else { 1.0 };
        let grown = (age / self.duration.as_secs_f64()).powf(aggression.recip());
        grown.max(self.minimum_percent / 100.0).clamp(f64::MIN_POSITIVE, 1.0)
    }
}

#[cfg(test)]
mod tests;
