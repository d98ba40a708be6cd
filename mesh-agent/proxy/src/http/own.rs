//! HTTP that a pod of this node takes and that is understood on its own side, because its requests are limited there (S45).
//!
//! Nothing is routed here: every request goes to the port that was dialled, on a connection that shows the app its client's address.
//! What is in use counts for all clients, whatever way they came.
//!
//! Not here: whether the client is let in ([`crate::inbound`], [`crate::hbone::server`]).

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    policy::Peer,
    route::cluster::{Cluster, ConnectionPool, TrafficPolicy},
    snapshot::{Snapshot, Workload},
};

use super::exchange::Destination;
use crate::connections::Live;

/// The server's own side of a connection.
#[derive(Debug)]
pub(crate) struct OwnSide {
    /// The client's pod, as far as it is known.
    pub(super) source: Option<Arc<Workload>>,
    /// The pod itself.
    pub(super) destination: Destination,
}

impl OwnSide {
    /// That of a connection to `addr` of the pod that has it, with the limits there.
    pub(crate) fn new(snapshot: &Snapshot, live: &Live, addr: SocketAddr, pool: &ConnectionPool) -> Self {
        let policy = TrafficPolicy { pool: pool.clone(), ..TrafficPolicy::default() };
        let policy = Arc::new(Cluster { origin: None, labels: Default::default(), policy });
        Self {
            source: source_of(snapshot, live).cloned(),
            destination: Destination::Own { server: live.pod.workload, addr, policy },
        }
    }
}

/// The pod that a connection comes from: by its address, and where it proved who it is only if that is who lives there.
pub(crate) fn source_of<'s>(snapshot: &'s Snapshot, live: &Live) -> Option<&'s Arc<Workload>> {
    let source = snapshot.workload_at(live.client.ip())?;
    match live.admitted().map(|request| request.peer) {
        Some(Peer::Tls(peer)) => (source.identity() == *peer).then_some(source),
        _ => Some(source),
    }
}
