//! Which endpoint a try goes to, and what is remembered of how it went.
//!
//! Invariants:
//! - Endpoints of one destination are arranged once per change of the world, not per request.
//! - An endpoint that was put out by what one worker saw is out for all of them.

use std::{borrow::Cow, cell::RefCell, net::SocketAddr, time::Duration};

use mesh_core::{
    balance::{
        Ask, Balancer, Candidate, Client, Standing,
        locality::{Located, Place},
        outlier::{Observed, OutlierDetector, Record},
        zone::Peers,
    },
    route::{
        cluster::{Balancing, Locality, OutlierDetection, TrafficPolicy},
        scope::NO_LABELS,
    },
    snapshot::{Snapshot, Workload},
};

use super::endpoints::Member;

/// Endpoints as they are chosen among.
#[derive(Debug)]
pub(super) struct Arrangement {
    balancer: RefCell<Balancer>,
    /// Number of the change of [`Outliers`] that is known here.
    known: std::cell::Cell<u64>,
}

/// Which endpoints of a destination are out, for all workers.
#[derive(Debug, Default)]
pub(super) struct Outliers {
    detector: OutlierDetector,
    /// Grows whenever somebody goes out or comes back.
    changes: u64,
}

impl Outliers {
    /// Takes in how a try ended.
    pub(super) fn observe(
        &mut self,
        rules: &OutlierDetection,
        now: Duration,
        endpoint: SocketAddr,
        observed: Observed,
        total: usize,
    ) {
        if self.detector.observe(rules, now, endpoint, observed, total) {
            self.changes += 1;
        }
    }

    /// What is remembered of endpoints.
    pub(super) fn records(&self) -> impl Iterator<Item = (SocketAddr, Record)> {
        self.detector.records()
    }

    /// Brings back those whose time is over.
    fn sweep(&mut self, rules: &OutlierDetection, now: Duration) {
        if !self.detector.sweep(rules, now).is_empty() {
            self.changes += 1;
        }
    }
}

impl Arrangement {
    /// Arranges endpoints; who was known `before` is not new.
    pub(super) fn new(
        snapshot: &Snapshot,
        members: &[Member],
        client: Option<&Workload>,
        policy: Option<&TrafficPolicy>,
        before: Option<&Self>,
        now: Duration,
        seed: u64,
    ) -> Self {
        let default = Balancing::default();
        let balancing = policy.map_or(&default, |policy| &policy.balancing);
        let outlier = policy.and_then(|policy| policy.outlier.as_ref());
        let places: Vec<Cow<'_, Place>> = members
            .iter()
            .map(|member| Place::of_endpoint(member.workload.as_deref(), member.traits.as_deref()))
            .collect();
        let candidates: Vec<Candidate<'_>> = members
            .iter()
            .zip(&places)
            .map(|(member, place)| Candidate {
                addr: member.addr,
                weight: member.traits.as_ref().map_or(1, |traits| traits.weight.max(1)),
                located: located(place, member),
                since: now,
            })
            .collect();
        let own = Place::of_endpoint(client, None);
        let located = Located { place: &own, labels: client.map_or(&NO_LABELS, |client| &client.labels) };
        let peers = match (&balancing.locality, client) {
            (Locality::ZoneAware { .. }, Some(client)) => Peers::of(snapshot, client),
            // Nobody asks.
            _ => Peers::default(),
        };
        let client = Client { located, peers: &peers };
        let balancer = match before {
            Some(before) => {
                let mut balancer = before.balancer.borrow().clone();
                balancer.update(&candidates, &client, balancing, outlier, seed);
                balancer
            }
            None => Balancer::new(&candidates, &client, balancing, outlier, seed),
        };
        Self { balancer: RefCell::new(balancer), known: std::cell::Cell::new(u64::MAX) }
    }

    /// Learns who is out by now.
    pub(super) fn follow(
        &self,
        outliers: &mut Outliers,
        rules: &OutlierDetection,
        members: &[Member],
        now: Duration,
    ) {
        outliers.sweep(rules, now);
        if self.known.replace(outliers.changes) == outliers.changes {
            return;
        }
        let mut balancer = self.balancer.borrow_mut();
        for member in members {
            balancer.set_out(member.addr, outliers.detector.is_out(member.addr));
        }
    }

    /// The endpoints as they stand, for people.
    pub(super) fn standings(&self) -> Vec<Standing> {
        self.balancer.borrow().standings().collect()
    }

    /// The endpoint of the next try.
    pub(super) fn choose<'m>(&self, members: &'m [Member], ask: &Ask<'_>) -> Option<&'m Member> {
        let load = |index: usize| members.get(index).map_or(0, |member| member.load.get());
        members.get(self.balancer.borrow_mut().pick(ask, load)?)
    }
}

fn located<'a>(place: &'a Place, member: &'a Member) -> Located<'a> {
    let of_workload = || member.workload.as_ref().map_or(&NO_LABELS, |workload| &workload.labels);
    Located { place, labels: member.traits.as_ref().map_or_else(of_workload, |traits| &traits.labels) }
}
