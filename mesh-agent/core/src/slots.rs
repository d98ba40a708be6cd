//! The kernel's load-balancing tables as plain values: services, backend slots and workload addresses.
//!
//! Invariants:
//! - Slots `0..count` of a table are all filled, with ready endpoints of one family, each once.
//! - A change of endpoints moves as few slots as can be: connections the kernel is choosing meanwhile see a
//!   backend that was or is valid.
//! - What did not change keeps its allocation, so that a writer may compare by pointer first.
//!
//! Not here: the ABI of the maps and their writing (`mesh-redirect`).

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use crate::{
    balance::locality::{Nearest, Place},
    id::{ServiceId, WorkloadId, hash},
    mode::Mode,
    route::{
        cluster::ClusterKey,
        defaults::Distribution,
        protocol::AppProtocol,
        sight::{Sight, sight_kind},
    },
    snapshot::{Endpoint, Protocol, Resolution, Service, ServicePort, Snapshot, Workload},
};

/// An endpoint within one slot table.
pub type EndpointKey = SocketAddr;

/// Puts the endpoints of `now` into slots, leaving in place whatever `previous` has in a slot that still exists.
///
/// The result holds each of `now` once and nothing else. Slots that change are as few as possible: those whose
/// endpoint is gone and those beyond the old length. Duplicates in `now` count once; order is the caller's way to
/// make a first assignment reproducible.
pub fn assign(previous: &[EndpointKey], now: &[EndpointKey]) -> Vec<EndpointKey> {
    let mut waiting: HashSet<EndpointKey> = now.iter().copied().collect();
    let len = waiting.len();
    let mut slots: Vec<Option<EndpointKey>> = vec![None; len];
    for (slot, key) in slots.iter_mut().zip(previous) {
        if waiting.remove(key) {
            *slot = Some(*key);
        }
    }
    let mut rest = now.iter().filter(|key| waiting.remove(key)).copied();
    slots.into_iter().filter_map(|slot| slot.or_else(|| rest.next())).collect()
}

/// What this node knows beyond the snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Pods enrolled on this node, with their incarnation (cookie of their network namespace).
    pub enrolled: BTreeMap<WorkloadId, u64>,
}

/// The desired contents of the kernel's tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// By what apps dial.
    pub services: HashMap<Frontend, ServiceEntry>,
    /// Backends by slot table id and slot.
    pub backends: HashMap<u64, Arc<[BackendEntry]>>,
    /// Pods by their own address.
    pub workloads: HashMap<IpAddr, PeerEntry>,
}

/// Where an app dials.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// Virtual address.
    pub addr: IpAddr,
    /// Port.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// What a frontend leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Id, for telemetry.
    pub service: ServiceId,
    /// Slot table id, never 0: names service, port, protocol and family.
    pub slots: u64,
    /// Number of slots; 0 means refuse, unless `answered`.
    pub count: u32,
    /// Session affinity in seconds; 0 for none.
    pub affinity_s: u32,
    /// Every connection needs the proxy.
    pub l7: bool,
    /// While there is no slot, connections go to the proxy instead of being refused.
    pub answered: bool,
    /// Those of clients whose sight is of these kinds do ([`sight_kind`]), as bits: some of them do not see it.
    pub hidden: u32,
}

/// What the kernel must know of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PeerEntry {
    /// Workload, when the address is one's.
    pub workload: Option<WorkloadId>,
    /// Cookie of its network namespace when it is enrolled on this node, else 0.
    pub incarnation: u64,
    /// Part of the mesh.
    pub meshed: bool,
    /// Enrolled on this node, so that a ticket works.
    pub local: bool,
    /// Takes plaintext on purpose (mode DISABLE).
    pub plain: bool,
}

/// One slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendEntry {
    /// Address and port to dial.
    pub addr: SocketAddr,
    /// Who is there.
    pub peer: PeerEntry,
}

/// Id of the slot table of a service port for what was dialled: one for each family, or for each address where connections go to just that.
pub fn slots_id(service: &Service, port: &ServicePort, dialled: IpAddr) -> u64 {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let what = match (&service.resolution, dialled) {
        (Resolution::Dialled, addr) => Cow::Owned(addr.to_string()),
        (_, IpAddr::V4(_)) => Cow::Borrowed("4"),
        (_, IpAddr::V6(_)) => Cow::Borrowed("6"),
    };
    hash(&["slots", &service.name.namespace, &service.name.name, &port.port.to_string(), protocol, &what])
}

/// Computes the tables; slots stay where `previous` has them.
pub fn tables(snapshot: &Snapshot, view: &NodeView, previous: &Tables) -> Tables {
    let mut tables = Tables {
        services: HashMap::with_capacity(previous.services.len()),
        backends: HashMap::with_capacity(previous.backends.len()),
        workloads: HashMap::with_capacity(previous.workloads.len()),
    };
    let clients: Vec<&Workload> =
        view.enrolled.keys().filter_map(|id| Some(&**snapshot.workload(*id)?)).collect();
    let sights = sights(snapshot, &clients);
    let here = clients.iter().find(|client| !client.place.is_unknown()).map(|client| &client.place);
    for (addr, service, port) in snapshot.frontends() {
        let slots = slots_id(service, port, addr);
        let count = match tables.backends.get(&slots) {
            Some(filled) => filled.len(),
            None => {
                let before = previous.backends.get(&slots);
                let filled = match service.resolution {
                    Resolution::Dialled => itself(snapshot, view, SocketAddr::new(addr, port.port), before),
                    Resolution::Listed | Resolution::ByName | Resolution::Dns(_) => {
                        let near = (service.distribution, here);
                        fill(snapshot, view, near, port, addr.is_ipv4(), before)
                    }
                };
                let count = filled.len();
                tables.backends.insert(slots, filled);
                count
            }
        };
        let frontend = Frontend { addr, port: port.port, protocol: port.protocol };
        // Of several services behind one address only who hears the name knows which is meant.
        let shared = port.protocol == Protocol::Tcp && snapshot.sharing(addr, port.port).next().is_some();
        let l7 = shared || port.protocol == Protocol::Tcp && is_routed(snapshot, service, port.port);
        let entry = ServiceEntry {
            service: service.id,
            slots,
            count: u32::try_from(count).unwrap_or(u32::MAX),
            affinity_s: service.affinity.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX)),
            l7,
            answered: shared || l7 && is_answered(snapshot, service, port),
            hidden: sights
                .iter()
                .filter(|(_, sight)| port.protocol == Protocol::Tcp && !sight.sees(service, port.port))
                .fold(0, |hidden, (kind, _)| hidden | 1 << kind),
        };
        tables.services.insert(frontend, entry);
    }
    for (addr, workload) in snapshot.workload_addrs() {
        tables.workloads.insert(addr, address_entry(workload, view));
    }
    tables
}

/// The different sights of clients with their kinds, if anything is hidden from anybody.
fn sights<'a>(snapshot: &'a Snapshot, clients: &[&'a Workload]) -> Vec<(u32, Sight<'a>)> {
    if !snapshot.hides_anything() {
        return Vec::new();
    }
    let mut known = BTreeSet::new();
    let different = clients.iter().filter(|client| known.insert((&client.name.namespace, &client.sidecar)));
    different.map(|client| (sight_kind(client), snapshot.sight_of(client))).collect()
}

/// Whether something is said about connections to a port of a service, so that the agent must see them.
pub fn is_routed(snapshot: &Snapshot, service: &Service, port: u16) -> bool {
    let routes = snapshot.routes();
    if routes.is_empty() {
        return false;
    }
    let first = ClusterKey { service: service.name.clone(), port, subset: None };
    let has_policy = routes.clusters.range(&first..).next().is_some_and(|(key, _)| {
        // The port itself stands before its subsets.
        key.service == first.service && key.port == port
    });
    if has_policy {
        return true;
    }
    let host = snapshot.host_of(service);
    routes.http(&host, port).is_some() || routes.stream(&host, port).is_some()
}

/// Whether the agent has something to say to clients of a routed port that has no endpoint: a response where requests are looked at,
/// or another destination where rules for TLS or TCP may name one. A policy alone about a port of bytes is no answer.
fn is_answered(snapshot: &Snapshot, service: &Service, port: &ServicePort) -> bool {
    AppProtocol::of(port).carries_requests()
        || snapshot.routes().stream(&snapshot.host_of(service), port.port).is_some()
}

/// Fills one slot table, or returns the previous one when nothing in it changed.
///
/// With a preference the nearest endpoints alone are in it: everybody on this node is where the node is.
fn fill(
    snapshot: &Snapshot,
    view: &NodeView,
    (distribution, here): (Option<Distribution>, Option<&Place>),
    port: &ServicePort,
    v4: bool,
    previous: Option<&Arc<[BackendEntry]>>,
) -> Arc<[BackendEntry]> {
    let usable = |endpoint: &Endpoint| endpoint.ready && endpoint.addr.is_ipv4() == v4;
    let nearest = distribution.zip(here).map(|(distribution, here)| {
        Nearest::of(snapshot, distribution, here, port.endpoints.iter().filter(|e| usable(e)))
    });
    let is_near = |endpoint: &Endpoint| nearest.as_ref().is_none_or(|near| near.has(snapshot, endpoint));
    let ready = port.endpoints.iter().filter(|e| usable(e) && is_near(e));
    // The common case, without an allocation: nothing happened to this port.
    if let Some(previous) = previous
        && previous.len() == ready.clone().count()
        && previous.iter().all(|backend| {
            let at = port.endpoints.binary_search_by_key(&backend.addr, Endpoint::socket_addr);
            at.is_ok_and(|at| {
                port.endpoints[at].ready
                    && is_near(&port.endpoints[at])
                    && backend_entry(snapshot, view, &port.endpoints[at]) == *backend
            })
        })
    {
        return Arc::clone(previous);
    }
    let entries: HashMap<EndpointKey, BackendEntry> =
        ready.clone().map(|e| (e.socket_addr(), backend_entry(snapshot, view, e))).collect();
    let order: Vec<EndpointKey> = ready.map(Endpoint::socket_addr).collect();
    let before: Vec<EndpointKey> = previous.iter().flat_map(|p| p.iter()).map(|b| b.addr).collect();
    let slots = assign(&before, &order);
    let filled = slots.iter().filter_map(|key| entries.get(key)).copied();
    filled.collect()
}

/// The slot of an address that connections go to because it was dialled.
fn itself(
    snapshot: &Snapshot,
    view: &NodeView,
    addr: SocketAddr,
    previous: Option<&Arc<[BackendEntry]>>,
) -> Arc<[BackendEntry]> {
    let only = peer_at(snapshot.workload_at(addr.ip()), view, addr);
    previous.filter(|previous| ***previous == [only]).map_or_else(|| Arc::from([only]), Arc::clone)
}

fn backend_entry(snapshot: &Snapshot, view: &NodeView, endpoint: &Endpoint) -> BackendEntry {
    peer_at(snapshot.workload_of(endpoint), view, endpoint.socket_addr())
}

fn peer_at(workload: Option<&Arc<Workload>>, view: &NodeView, addr: SocketAddr) -> BackendEntry {
    let peer = workload.map_or_else(PeerEntry::default, |workload| {
        peer_entry(workload, view, workload.modes.of(addr.port()) == Mode::Disable)
    });
    BackendEntry { addr, peer }
}

/// A pod dialled by its own address. The port is not known here, so `plain` needs every port to be.
fn address_entry(workload: &Workload, view: &NodeView) -> PeerEntry {
    let modes = &workload.modes;
    let plain = modes.default == Mode::Disable && modes.ports.values().all(|mode| *mode == Mode::Disable);
    peer_entry(workload, view, plain)
}

fn peer_entry(workload: &Workload, view: &NodeView, plain: bool) -> PeerEntry {
    let enrolled = if workload.meshed { view.enrolled.get(&workload.id).copied() } else { None };
    PeerEntry {
        workload: Some(workload.id),
        incarnation: enrolled.unwrap_or(0),
        meshed: workload.meshed,
        local: enrolled.is_some(),
        plain: workload.meshed && plain,
    }
}

#[cfg(test)]
mod tests;
