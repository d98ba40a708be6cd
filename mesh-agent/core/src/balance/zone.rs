//! Zone-aware routing (C9): a client stays in its zone as far as the zone's endpoints are not asked for more than their share.
//!
//! As Envoy does it: what each zone has of the endpoints is held against what it has of the clients, which are the pods of the client's own
//! service. A zone with a greater share of endpoints keeps all of its clients' traffic. One with a smaller share keeps what its endpoints can
//! take, and the rest goes to the zones that have some to spare, by how much. So every endpoint of the region gets as much as any other.
//!
//! Invariant: zones are of the client's own region; nothing here sends a request out of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{balancer::Member, group::Group, locality::Place};
use crate::{
    id::WorkloadId,
    snapshot::{Endpoint, Snapshot, Workload},
};

/// The client's fellows: how many ready pods of its service each zone of its region has, itself among them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers(BTreeMap<Arc<str>, u32>);

impl Peers {
    /// Those of a client. Of several services of its namespace that have it for an endpoint the first by name counts; without one nobody is
    /// known.
    pub fn of(snapshot: &Snapshot, client: &Workload) -> Self {
        let is_client = |endpoint: &Endpoint| endpoint.workload == Some(client.id);
        let own = snapshot
            .services_in(&client.name.namespace)
            .find(|service| service.ports.iter().flat_map(|port| &port.endpoints).any(is_client));
        let mut seen: BTreeSet<WorkloadId> = BTreeSet::new();
        let mut zones = BTreeMap::new();
        for endpoint in own.iter().flat_map(|service| &service.ports).flat_map(|port| &port.endpoints) {
            let Some(workload) = snapshot.workload_of(endpoint).filter(|_| endpoint.ready) else { continue };
            let place = Place::of_endpoint(Some(workload), endpoint.traits.as_deref());
            if place.region == client.place.region && seen.insert(workload.id) {
                *zones.entry(Arc::clone(&place.zone)).or_default() += 1;
            }
        }
        Self(zones)
    }
}

#[cfg(test)]
impl<const N: usize> From<[(&str, u32); N]> for Peers {
    fn from(zones: [(&str, u32); N]) -> Self {
        Self(zones.into_iter().map(|(zone, count)| (zone.into(), count)).collect())
    }
}

/// How zones are told apart, for one client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// Zones that have clients or endpoints, the client's own first.
    names: Vec<Arc<str>>,
    /// Clients by zone.
    clients: Vec<u32>,
    /// With fewer endpoints in all, zones play no part.
    min_size: u32,
}

impl Plan {
    /// For a client at `here`.
    pub(super) fn new(here: &Place, peers: &Peers, min_size: u32) -> Self {
        let mut plan = Self { names: vec![Arc::clone(&here.zone)], clients: vec![0], min_size };
        for (zone, clients) in &peers.0 {
            let at = plan.zone(zone);
            plan.clients.get_mut(at).into_iter().for_each(|count| *count = *clients);
        }
        plan
    }

    /// The number of a zone.
    pub(super) fn zone(&mut self, zone: &Arc<str>) -> usize {
        let known = self.names.iter().position(|name| name == zone);
        known.unwrap_or_else(|| {
            self.names.push(Arc::clone(zone));
            self.clients.push(0);
            self.names.len() - 1
        })
    }

    /// What each zone gets of this client's traffic; `None`: zones play no part.
    fn weights(&self, size: &[u32], well: &[u32]) -> Option<Vec<u64>> {
        let all: u32 = size.iter().sum();
        let is_spread = size.iter().filter(|size| **size > 0).count() > 1;
        if all < self.min_size || !is_spread {
            return None;
        }
        weights(&self.clients, well)
    }
}

/// What each zone gets of the traffic of a client in the first one. `None` if no client or no well endpoint is there.
fn weights(clients: &[u32], well: &[u32]) -> Option<Vec<u64>> {
    const ALL: f64 = 1e6;
    let sum = |counts: &[u32]| counts.iter().map(|count| u64::from(*count)).sum::<u64>();
    let (all_clients, all_well) = (sum(clients), sum(well));
    let (own_clients, own_well) = (*clients.first()?, *well.first()?);
    if own_clients == 0 || own_well == 0 {
        return None;
    }
    let mut weights = vec![0; well.len()];
    let share = |count: u32, all: u64| f64::from(count) / all as f64;
    if u64::from(own_well) * all_clients >= u64::from(own_clients) * all_well {
        *weights.first_mut()? = ALL as u64;
        return Some(weights);
    }
    let kept = share(own_well, all_well) / share(own_clients, all_clients);
    let spare =
        |(well, clients): (&u32, &u32)| (share(*well, all_well) - share(*clients, all_clients)).max(0.0);
    let all_spare: f64 = well.iter().zip(clients).map(spare).sum();
    for ((weight, well), clients) in weights.iter_mut().zip(well).zip(clients) {
        *weight = ((1.0 - kept) * spare((well, clients)) / all_spare * ALL).round() as u64;
    }
    *weights.first_mut()? = (kept * ALL).round() as u64;
    Some(weights)
}

/// Endpoints of the nearest class by zone.
#[derive(Clone, Debug)]
pub(super) struct Zones {
    plan: Plan,
    pub(super) groups: Vec<Group>,
    /// What each gets; empty: all endpoints of the class are alike.
    weights: Vec<u64>,
}

impl Zones {
    /// Without endpoints yet.
    pub(super) fn new(plan: &Plan) -> Self {
        let groups = vec![Group::default(); plan.names.len()];
        Self { plan: plan.clone(), groups, weights: Vec::new() }
    }

    /// Adds an endpoint to its zone.
    pub(super) fn add(&mut self, zone: usize, index: u32, member: &Member) {
        self.groups.get_mut(zone).into_iter().for_each(|group| group.add(index, member, 1));
    }

    /// Says that an endpoint of a zone went out or came back.
    pub(super) fn set_well(&mut self, zone: usize, is_well: bool) {
        self.groups.get_mut(zone).into_iter().for_each(|group| group.set_well(is_well));
    }

    /// Shares traffic out anew.
    pub(super) fn share_out(&mut self) {
        let size: Vec<u32> = self.groups.iter().map(Group::len).collect();
        let well: Vec<u32> = self.groups.iter().map(Group::well).collect();
        self.weights = self.plan.weights(&size, &well).unwrap_or_default();
    }

    /// The zone of one request, if zones play a part.
    pub(super) fn choose(&mut self, word: u64) -> Option<&mut Group> {
        let sum = self.weights.iter().sum();
        if sum == 0 {
            return None;
        }
        let mut left = super::below(word, sum);
        let zone = self.weights.iter().position(|weight| {
            let is_hit = left < *weight;
            left = left.saturating_sub(*weight);
            is_hit
        })?;
        self.groups.get_mut(zone)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn percents(clients: &[u32], well: &[u32]) -> Option<Vec<u64>> {
        Some(weights(clients, well)?.into_iter().map(|weight| (weight + 5_000) / 10_000).collect())
    }

    #[test]
    fn c9_a_zone_keeps_what_its_endpoints_can_take_and_gives_the_rest_to_those_with_some_to_spare() {
        for (clients, well, expected) in [
            // As many endpoints as clients, or more: nobody leaves.
            (&[3, 3][..], &[3, 3][..], Some(vec![100, 0])),
            (&[1, 3], &[3, 3], Some(vec![100, 0])),
            // Two thirds of the clients, a third of the endpoints.
            (&[2, 1], &[1, 2], Some(vec![50, 50])),
            // The spare of two others is 1/6 and 1/3 of all.
            (&[4, 1, 1], &[2, 4, 6], Some(vec![25, 25, 50])),
            // One that is short itself gets nothing.
            (&[3, 3, 0], &[1, 1, 4], Some(vec![33, 0, 67])),
            (&[1, 1], &[0, 4], None),
            (&[0, 4], &[4, 4], None),
            (&[], &[], None),
        ] {
            assert_eq!(percents(clients, well), expected, "{clients:?} {well:?}");
        }
    }

    #[test]
    fn c9_zones_play_no_part_for_few_endpoints_or_one_zone() {
        let here = Place::parse("eu/a");
        let peers = Peers::from([("a", 1)]);
        let plan = |min_size| {
            let mut plan = Plan::new(&here, &peers, min_size);
            plan.zone(&"b".into());
            plan
        };
        assert!(plan(6).weights(&[3, 3], &[3, 3]).is_some());
        assert!(plan(6).weights(&[3, 3], &[1, 1]).is_some(), "those that are out count for the size");
        assert!(plan(7).weights(&[3, 3], &[3, 3]).is_none());
        assert!(plan(0).weights(&[6, 0], &[6, 0]).is_none());
    }

    proptest! {
        #[test]
        fn c9_every_endpoint_gets_as_much_as_any_other(
            zones in prop::collection::vec((1_u32..40, 1_u32..40), 2..6),
        ) {
            let (clients, well): (Vec<u32>, Vec<u32>) = zones.into_iter().unzip();
            let sum = |counts: &[u32]| f64::from(counts.iter().sum::<u32>());
            let mut got = vec![0.0; well.len()];
            for from in 0..clients.len() {
                let (mut of_clients, mut of_well) = (clients.clone(), well.clone());
                of_clients.swap(0, from);
                of_well.swap(0, from);
                let mut share = weights(&of_clients, &of_well).unwrap();
                share.swap(0, from);
                prop_assert!(share.iter().sum::<u64>().abs_diff(1_000_000) < 10);
                for (got, share) in got.iter_mut().zip(share) {
                    *got += f64::from(clients[from]) / sum(&clients) * share as f64 / 1e6;
                }
            }
            for (got, well_here) in got.iter().zip(&well) {
                let due = f64::from(*well_here) / sum(&well);
                prop_assert!((got - due).abs() < 1e-4, "{got} {due}");
            }
        }
    }
}
