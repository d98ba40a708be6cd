//! What is known of destinations and their endpoints, for those who ask: nothing here is on a request's path.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    balance::outlier::Record,
    route::cluster::{Cluster, ClusterKey},
    snapshot::{Service, Snapshot, Traits, Workload},
};

use super::{
    Outstanding,
    choice::Arrangement,
    endpoints::{Member, unfit},
    limits::{ClusterId, Kind, Limits, Scope},
};

/// Why an endpoint takes no requests of a client, whatever its health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// It is not ready.
    NotReady,
    /// Its labels are not those of the subset.
    OtherSubset,
    /// It has another address family than the client's connection, and others have the same.
    OtherFamily,
}

/// An endpoint of a destination as one client sees it, before any request.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointStanding {
    /// Its address.
    pub addr: SocketAddr,
    /// Its pod.
    pub workload: Option<Arc<Workload>>,
    /// What a resource says of the endpoint itself.
    pub traits: Option<Arc<Traits>>,
    /// Its weight among its siblings.
    pub weight: u32,
    /// Priority class, 0 is used first; `None`: it gets nothing by locality, or is unfit.
    pub class: Option<usize>,
    /// Why it takes no requests.
    pub unfit: Option<Unfit>,
}

/// The endpoints of a port of a service or subset as a client sees them. `v4` is the family of the client's connection; `None`: any.
pub(crate) fn standings(
    snapshot: &Snapshot,
    client: Option<&Workload>,
    service: &Service,
    port: u16,
    policy: Option<&Arc<Cluster>>,
    v4: Option<bool>,
) -> Vec<EndpointStanding> {
    let labels = policy.map(|cluster| &cluster.labels).filter(|labels| !labels.is_empty());
    let ports = service.ports.iter().filter(|candidate| candidate.port == port);
    let mut all: Vec<EndpointStanding> = ports
        .flat_map(|port| &port.endpoints)
        .map(|endpoint| EndpointStanding {
            addr: endpoint.socket_addr(),
            workload: snapshot.workload_of(endpoint).cloned(),
            traits: endpoint.traits.clone(),
            weight: 1,
            class: None,
            unfit: unfit(snapshot, endpoint, labels),
        })
        .collect();
    if let Some(v4) = v4
        && all.iter().any(|row| row.unfit.is_none() && row.addr.is_ipv4() == v4)
    {
        for row in all.iter_mut().filter(|row| row.unfit.is_none() && row.addr.is_ipv4() != v4) {
            row.unfit = Some(Unfit::OtherFamily);
        }
    }
    let members: Vec<Member> = all
        .iter()
        .filter(|row| row.unfit.is_none())
        .map(|row| Member {
            addr: row.addr,
            workload: row.workload.clone(),
            traits: row.traits.clone(),
            load: Default::default(),
        })
        .collect();
    let policy = policy.map(|cluster| &cluster.policy);
    let arrangement = Arrangement::new(snapshot, &members, client, policy, None, Duration::ZERO, 0);
    let by_addr: HashMap<SocketAddr, _> =
        arrangement.standings().into_iter().map(|standing| (standing.addr, standing)).collect();
    for row in all.iter_mut().filter(|row| row.unfit.is_none()) {
        if let Some(standing) = by_addr.get(&row.addr) {
            row.weight = standing.weight;
            row.class = standing.class;
        }
    }
    all
}

/// What one pod's requests have in use at a destination, over all workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationUse {
    /// Local pod id.
    pub pod: u32,
    /// The destination; `None`: the address of the only endpoint, which was dialled as such.
    pub cluster: Option<ClusterKey>,
    /// Connections.
    pub connections: u32,
    /// Requests that wait for a connection.
    pub pending: u32,
    /// Requests.
    pub requests: u32,
    /// Retries.
    pub retries: u32,
    /// Endpoints of which something is known.
    pub endpoints: BTreeMap<SocketAddr, EndpointUse>,
}

/// What is known of an endpoint from one pod's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EndpointUse {
    /// Requests outstanding.
    pub active: u32,
    /// Consecutive failures.
    pub failures: u32,
    /// Times that it was put out and has not outlived.
    pub ejections: u32,
    /// It is put out for so long from now.
    pub out_for: Option<Duration>,
}

/// Joins what all workers share with what each of them has outstanding.
pub(crate) fn destinations(limits: &Limits, active: Outstanding) -> Vec<DestinationUse> {
    let mut outstanding: HashMap<Scope, BTreeMap<SocketAddr, EndpointUse>> = HashMap::new();
    for (scope, endpoints) in active {
        let of_scope = outstanding.entry(scope).or_default();
        for (addr, count) in endpoints {
            of_scope.entry(addr).or_default().active += count;
        }
    }
    let mut all = Vec::new();
    limits.each(|scope, usage| {
        let mut endpoints = outstanding.remove(scope).unwrap_or_default();
        let now = usage.now();
        for (addr, Record { failures, ejections, out_until }) in usage.outliers().records() {
            let endpoint = endpoints.entry(addr).or_default();
            *endpoint = EndpointUse {
                failures,
                ejections,
                out_for: out_until.map(|until| until.saturating_sub(now)),
                ..*endpoint
            };
        }
        let cluster = match &scope.cluster {
            ClusterId::Cluster(key) => Some(key.clone()),
            ClusterId::Address(addr) | ClusterId::Own(addr) => {
                endpoints.entry(*addr).or_default();
                None
            }
        };
        all.push(DestinationUse {
            pod: scope.pod,
            cluster,
            connections: usage.count(Kind::Connection),
            pending: usage.count(Kind::Pending),
            requests: usage.count(Kind::Request),
            retries: usage.count(Kind::Retry),
            endpoints,
        });
    });
    all.sort_by(|a, b| (a.pod, &a.cluster).cmp(&(b.pod, &b.cluster)));
    all
}
