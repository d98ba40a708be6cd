//! The server's side of every connection: the only place where a destination's policy is enforced.
//!
//! Called for plaintext arrivals ([`crate::inbound`]), for same-node connections after an endpoint was chosen
//! ([`crate::outbound`], once per attempt), and for whatever transport ends at this node.
//!
//! Invariant: nothing dials a local app before [`server_stage`] allowed it.

use std::net::{IpAddr, SocketAddr};

use mesh_core::{
    id::WorkloadId,
    policy::{self, Attempt, Judgement, Peer},
    route::cluster::ConnectionPool,
    snapshot::{Snapshot, Workload},
};

use crate::{
    connections::Live,
    destination::limits::{Kind, Taken},
    worker::Worker,
};

/// What a peer wants of a local workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerRequest {
    /// Who asks, as far as that is proved.
    pub(crate) peer: Peer,
    /// The client's address, as packets to the server would have it.
    pub(crate) source: Option<IpAddr>,
    /// The workload asked.
    pub(crate) destination: WorkloadId,
    /// Its own address and port.
    pub(crate) addr: SocketAddr,
}

/// Whether a connection that was allowed once is denied now. A workload that has left the mesh has no policy any more:
/// its connections live on.
pub(crate) fn is_denied_now(snapshot: &Snapshot, request: &ServerRequest) -> bool {
    let meshed = snapshot
        .workload(request.destination)
        .is_some_and(|workload| workload.meshed && !workload.terminated);
    meshed && !server_stage(snapshot, request).is_allow()
}

/// Judges a connection to a local workload. Read the destination's policy generation *before* loading `snapshot`
/// when the verdict is to be cached.
pub(crate) fn server_stage(snapshot: &Snapshot, request: &ServerRequest) -> Judgement {
    let attempt = Attempt {
        peer: &request.peer,
        source: request.source,
        destination: request.addr.ip(),
        port: request.addr.port(),
    };
    policy::admit_in(snapshot, &attempt, request.destination)
}

/// The part of a connection to a local workload in the limit of its port (S45); `None` where there is no limit.
///
/// # Errors
/// There are as many as the workload's Sidecar allows.
pub(crate) fn take_inbound(
    worker: &Worker,
    snapshot: &Snapshot,
    server: WorkloadId,
    port: u16,
) -> Result<Option<Taken>, Full> {
    let Some(max) = inbound_pool(snapshot, server, port).and_then(|pool| pool.max_connections) else {
        return Ok(None);
    };
    worker.shared().inbound.usage(&(server, port)).take(Kind::Connection, Some(max)).map(Some).ok_or(Full)
}

/// The part of a request in the limits of a workload of this node (S45); `None` where there are none.
///
/// # Errors
/// There are as many as the workload may have.
pub(crate) fn take_request(
    worker: &Worker,
    snapshot: &Snapshot,
    server: &Workload,
    port: u16,
) -> Result<Option<Taken>, Full> {
    let Some(pool) = request_pool(worker, snapshot, server, port) else { return Ok(None) };
    worker
        .shared()
        .inbound
        .usage(&(server.id, port))
        .take(Kind::Request, pool.max_requests)
        .map(Some)
        .ok_or(Full)
}

/// Limits of the requests to a port of a workload, if it is on this node, so that they are counted here.
pub(crate) fn request_pool<'s>(
    worker: &Worker,
    snapshot: &'s Snapshot,
    server: &'s Workload,
    port: u16,
) -> Option<&'s ConnectionPool> {
    if !snapshot.counts_requests() || *server.node != *worker.settings().node {
        return None;
    }
    snapshot.inbound_pool(server, port).filter(|pool| pool.limits_requests())
}

/// A workload has as many connections as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// Limits of the connections to a port of a local workload.
pub(crate) fn inbound_pool(snapshot: &Snapshot, server: WorkloadId, port: u16) -> Option<&ConnectionPool> {
    snapshot.inbound_pool(snapshot.workload(server)?, port)
}

/// Says what policies that are only tried out would refuse.
pub(crate) fn log_dry_run(worker: &Worker, live: &Live, judgement: &Judgement) {
    for tried in judgement.dry_run.iter().filter(|tried| tried.would_deny()) {
        if worker.may_log() {
            tracing::info!(
                policy = %tried.policy,
                action = %tried.action,
                rule = ?tried.rule,
                pod = %live.pod.name,
                client = %live.client,
                "dry run: this policy would refuse the connection"
            );
        }
    }
}
