//! Where an endpoint travels: with the workload whose address it is, or alone.
//!
//! A changed endpoint then changes one small resource, not its service.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
};

use mesh_core::{
    id::WorkloadId,
    reach::PodChange,
    snapshot::{Endpoint, Name, Protocol, Service, ServicePort, Snapshot, Workload},
};

/// What an endpoint says about whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Claim {
    /// This workload's.
    Workload(WorkloadId),
    /// Whoever has the address.
    Address(IpAddr),
}

/// The resource that carries an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Place {
    /// The workload's, or one in the name of a workload that is not known.
    Workload(WorkloadId),
    /// One of its own.
    Address(IpAddr),
}

impl Claim {
    pub(super) fn of(endpoint: &Endpoint) -> Self {
        endpoint.workload.map_or(Self::Address(endpoint.addr), Self::Workload)
    }

    /// The resource that carries what claims this.
    pub(super) fn place(self, snapshot: &Snapshot) -> Place {
        match self {
            Self::Workload(id) => Place::Workload(id),
            Self::Address(addr) => {
                snapshot.workload_at(addr).map_or(Place::Address(addr), |owner| Place::Workload(owner.id))
            }
        }
    }
}

/// One endpoint with the service and port it belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry<'a> {
    pub(super) service: &'a Service,
    pub(super) port: &'a ServicePort,
    pub(super) endpoint: &'a Endpoint,
}

/// Which services have endpoints with a claim, and which: indexes of port and endpoint.
#[derive(Debug, Default)]
pub(super) struct Claims {
    by_claim: HashMap<Claim, BTreeMap<Name, Vec<(usize, usize)>>>,
}

impl Claims {
    /// Replaces what is known of a service. Returns the claims whose endpoints differ.
    pub(super) fn change(&mut self, old: Option<&Service>, new: Option<&Service>) -> HashSet<Claim> {
        let mut differing = HashSet::new();
        let (before, after) = (contents(old), contents(new));
        differing.extend(before.symmetric_difference(&after).map(|(_, endpoint)| Claim::of(endpoint)));
        for endpoint in old.into_iter().flat_map(|s| &s.ports).flat_map(|port| &port.endpoints) {
            let claim = Claim::of(endpoint);
            if let (Some(services), Some(old)) = (self.by_claim.get_mut(&claim), old) {
                services.remove(&old.name);
                if services.is_empty() {
                    self.by_claim.remove(&claim);
                }
            }
        }
        if let Some(new) = new {
            for (port_index, port) in new.ports.iter().enumerate() {
                for (index, endpoint) in port.endpoints.iter().enumerate() {
                    let services = self.by_claim.entry(Claim::of(endpoint)).or_default();
                    services.entry(new.name.clone()).or_default().push((port_index, index));
                }
            }
        }
        differing
    }

    /// The services with endpoints that may be on another node, or on none, after these pods changed.
    pub(super) fn services_of(&self, pods: &[PodChange<'_>]) -> BTreeSet<Name> {
        fn whereabouts(pod: &Workload) -> (&str, bool, &[IpAddr]) {
            (&pod.node, pod.terminated, &pod.addrs)
        }
        let moved = pods.iter().filter(|(before, after)| before.map(whereabouts) != after.map(whereabouts));
        let each = moved.flat_map(|(before, after)| before.iter().chain(after));
        let claims = each.flat_map(|pod| {
            let addrs = pod.addrs.iter().map(|addr| Claim::Address(*addr));
            addrs.chain([Claim::Workload(pod.id)])
        });
        claims.filter_map(|claim| self.by_claim.get(&claim)).flat_map(BTreeMap::keys).cloned().collect()
    }

    /// The endpoints that a resource carries, by service.
    pub(super) fn at<'a>(&self, place: Place, snapshot: &'a Snapshot) -> Vec<Entry<'a>> {
        let mut claims: Vec<Claim> = Vec::new();
        match place {
            Place::Workload(id) => {
                claims.push(Claim::Workload(id));
                let addrs = snapshot.workload(id).into_iter().flat_map(|workload| &workload.addrs);
                claims.extend(addrs.map(|addr| Claim::Address(*addr)));
            }
            Place::Address(addr) => claims.push(Claim::Address(addr)),
        }
        claims.retain(|claim| claim.place(snapshot) == place);
        let mut indexes: BTreeMap<&Name, Vec<(usize, usize)>> = BTreeMap::new();
        for (name, found) in claims.iter().filter_map(|claim| self.by_claim.get(claim)).flatten() {
            indexes.entry(name).or_default().extend(found);
        }
        let mut entries = Vec::new();
        for (name, mut found) in indexes {
            found.sort_unstable();
            found.dedup();
            let Some(service) = snapshot.service(name) else { continue };
            entries.extend(found.into_iter().filter_map(|(port, endpoint)| {
                let port = service.ports.get(port)?;
                Some(Entry { service, port, endpoint: port.endpoints.get(endpoint)? })
            }));
        }
        entries
    }
}

type PortKey<'a> = (&'a str, u16, Protocol);

fn contents(service: Option<&Service>) -> HashSet<(PortKey<'_>, &Endpoint)> {
    let ports = service.into_iter().flat_map(|service| &service.ports);
    ports
        .flat_map(|port| port.endpoints.iter().map(move |e| ((&*port.name, port.port, port.protocol), e)))
        .collect()
}
