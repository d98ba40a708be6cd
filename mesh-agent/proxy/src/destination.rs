//! Where connections and requests of pods go, and which endpoint of it: one piece for HTTP, TLS and TCP.
//!
//! - [`endpoints`]: the endpoints of a destination for one pod, and the choice among them.
//! - [`choice`]: how they are arranged, and which of them are out.
//! - [`standing`]: what is known of destinations and endpoints, for those who ask.
//! - [`limits`]: what is in use at a destination, over all workers.
//!
//! Not here: which rule leads to a destination, and how an endpoint is reached and spoken to.

pub(crate) mod by_name;
mod choice;
pub(crate) mod endpoints;
pub(crate) mod limits;
pub(crate) mod standing;

use std::{
    cell::RefCell,
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

use mesh_core::{
    id::WorkloadId,
    route::{
        cluster::{Cluster, ClusterKey},
        scope::{NO_LABELS, Scoped},
    },
    snapshot::{Service, Snapshot, Workload},
};

use self::{
    endpoints::Endpoints,
    limits::{ClusterId, Scope},
};
use crate::worker::Worker;

/// Destinations that a worker keeps the endpoints of.
const DESTINATIONS_MAX: usize = 16_384;
/// Ticks after which a destination that nobody asks for is forgotten.
pub(crate) const UNUSED_TICKS_MAX: u32 = 3000;

/// Where a request or a connection goes.
#[derive(Clone, Debug)]
pub(crate) enum Destination {
    /// A port of a service, or of a subset of it.
    Cluster {
        /// The service, as of the snapshot it was routed by.
        service: Arc<Service>,
        /// It, its port and perhaps a subset.
        key: ClusterKey,
        /// What the client's namespace sees of its policy, else what the mesh says; `None` only for a subset that is gone.
        policy: Option<Arc<Cluster>>,
    },
    /// The address that was dialled.
    Address(SocketAddr),
    /// A workload of this node, as its own side reaches it; what is in use there counts for all clients.
    Own {
        /// The workload.
        server: WorkloadId,
        /// Its address and port.
        addr: SocketAddr,
        /// Its limits (S45).
        policy: Arc<Cluster>,
    },
}

impl Destination {
    /// The destination that a rule names; `None`: there is none for this client.
    pub(crate) fn of(
        snapshot: &Snapshot,
        key: &ClusterKey,
        client: Option<&Workload>,
        namespace: &str,
    ) -> Option<Self> {
        let service = Arc::clone(snapshot.service(&key.service)?);
        // Rules of others do not show what is hidden; what a Sidecar leaves out comes with the rules that it lets in (S66).
        if !service.audience.includes(namespace) {
            return None;
        }
        let policy = seen_by(snapshot.routes().clusters.get(key), client, namespace);
        let of_mesh = || Arc::clone(snapshot.mesh().defaults.clusters.get(service.distribution));
        let policy = if key.subset.is_none() { Some(policy.unwrap_or_else(of_mesh)) } else { policy };
        // A subset that no DestinationRule names is no destination (S41).
        if !service.ports.iter().any(|port| port.port == key.port)
            || (key.subset.is_some() && policy.is_none())
        {
            return None;
        }
        Some(Self::Cluster { service, key: key.clone(), policy })
    }

    /// What is said about it.
    pub(crate) fn policy(&self) -> Option<&Arc<Cluster>> {
        match self {
            Self::Cluster { policy, .. } => policy.as_ref(),
            Self::Address(_) => None,
            Self::Own { policy, .. } => Some(policy),
        }
    }

    /// The service, if it is one's.
    pub(crate) fn service(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Cluster { service, .. } => Some(service),
            Self::Address(_) | Self::Own { .. } => None,
        }
    }
}

/// What a client sees of something that depends on who it is.
pub(crate) fn seen_by<T>(
    what: Option<&Scoped<T>>,
    client: Option<&Workload>,
    namespace: &str,
) -> Option<Arc<T>> {
    what?.get(namespace, client.map_or(&NO_LABELS, |client| &client.labels)).cloned()
}

/// The hash of a client's address. The same on every node and after every restart.
pub(crate) fn source_hash(client: IpAddr) -> u64 {
    digest(client.to_canonical().to_string().as_bytes())
}

/// FNV-1a with its bits mixed: short texts differ in all of them.
pub(crate) fn digest(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mixed = (fnv ^ fnv >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mixed = (mixed ^ mixed >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    mixed ^ mixed >> 33
}

/// What is outstanding by destination and endpoint.
pub(crate) type Outstanding = Vec<(Scope, Vec<(SocketAddr, u32)>)>;

/// The destinations of a worker's pods.
#[derive(Debug, Default)]
pub(crate) struct Destinations(RefCell<HashMap<Scope, Rc<Endpoints>>>);

impl Destinations {
    /// The endpoints of a destination, for one pod.
    pub(crate) fn of(&self, worker: &Worker, pod: u32, destination: &Destination) -> Rc<Endpoints> {
        let scope = Scope { pod, cluster: ClusterId::of(destination) };
        let mut all = self.0.borrow_mut();
        if let Some(endpoints) = all.get(&scope) {
            return Rc::clone(endpoints);
        }
        if all.len() >= DESTINATIONS_MAX {
            // Addresses come from apps: what nobody uses makes room.
            all.retain(|_, endpoints| Rc::strong_count(endpoints) > 1);
        }
        let usage = match destination {
            Destination::Own { server, addr, .. } => worker.shared().inbound.usage(&(*server, addr.port())),
            Destination::Cluster { .. } | Destination::Address(_) => worker.shared().limits.usage(&scope),
        };
        let endpoints = Rc::new(Endpoints::new(scope.clone(), usage));
        all.insert(scope, Rc::clone(&endpoints));
        endpoints
    }

    /// What is outstanding from this worker, by destination and endpoint; idle endpoints are left out.
    pub(crate) fn active(&self) -> Outstanding {
        let all = self.0.borrow();
        let rows = all.iter().map(|(scope, endpoints)| (scope.clone(), endpoints.active()));
        rows.filter(|(_, active)| !active.is_empty()).collect()
    }

    /// Forgets those that nobody has asked for.
    pub(crate) fn sweep(&self, tick: u32) {
        self.0.borrow_mut().retain(|_, endpoints| {
            Rc::strong_count(endpoints) > 1 || tick.wrapping_sub(endpoints.used()) < UNUSED_TICKS_MAX
        });
    }
}
