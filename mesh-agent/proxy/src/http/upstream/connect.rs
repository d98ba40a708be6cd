//! Making a connection to an endpoint: the transport that the mesh wants, then what the destination's policy adds.

use std::{net::SocketAddr, rc::Rc, sync::Arc};

use mesh_core::{
    route::cluster::{ClientTls, ClientTlsMode, Cluster, ConnectionPool, TrafficPolicy},
    snapshot::{Service, Snapshot, Workload},
};

use super::{
    cluster::Failed,
    connection::{self, Protocol, Sender, UpstreamIo, Version, Way},
    reply::Fault,
};
use crate::{
    close::CloseReason,
    connect::{ConnectError, keep_alive, report},
    connections::Live,
    hbone::tunnel::{Early, TunnelIo},
    outbound::{Attempt, Bytes, Transport, open_transport},
    target::Choice,
    worker::Worker,
};

/// A connection that is wanted.
pub(super) struct Wanted {
    /// The client's connection that it is first made for.
    pub(super) client: Rc<Live>,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) service: Option<Arc<Service>>,
    pub(super) addr: SocketAddr,
    pub(super) workload: Option<Arc<Workload>>,
    pub(super) cluster: Option<Arc<Cluster>>,
    pub(super) version: Version,
}

/// Makes a connection and begins to speak HTTP on it.
///
/// # Errors
/// What the client is told, and what the connection's end is counted under.
pub(super) async fn connect(
    worker: &Rc<Worker>,
    live: &Rc<Live>,
    wanted: &Wanted,
) -> Result<(Sender, Protocol), Failed> {
    let default = ConnectionPool::default();
    let pool = wanted.cluster.as_ref().map_or(&default, |cluster| &cluster.policy.pool);
    if let Some(what) = wanted.cluster.as_ref().and_then(|cluster| beyond(&cluster.policy)) {
        // What a policy asks for is done or refused, never left out.
        log(worker, live, wanted, what);
        return Err(Failed { fault: Fault::ConnectFailed, reason: CloseReason::UpstreamUnreachable });
    }
    let limit = pool.connect_timeout.min(worker.settings().connect_timeout.max(pool.connect_timeout));
    let choice = Choice { addr: wanted.addr, workload: wanted.workload.as_ref() };
    let attempt = Attempt { limit, early: Early::Held };
    let service = wanted.service.as_ref();
    let opened =
        open_transport(worker, live, &wanted.snapshot, service, choice, attempt, Bytes::Spoken).await;
    let transport = opened.map_err(|error| {
        log(worker, live, wanted, &report(&error));
        Failed { fault: fault_of(&error), reason: error.close_reason() }
    })?;
    keep_alive(&transport, pool);
    let way = match transport {
        Transport::Tcp(stream) => Way::Tcp(stream),
        Transport::Tunnel(stream) => Way::Tunnel(TunnelIo::new(stream, live)),
    };
    let io = UpstreamIo::new(way, live, worker);
    let spoken = connection::speak(io, wanted.version, pool.max_concurrent_streams).await;
    spoken.map_err(|error| {
        log(worker, live, wanted, &report(&error));
        Failed { fault: Fault::ConnectFailed, reason: CloseReason::UpstreamLost }
    })
}

/// What a policy asks for that cannot be done.
fn beyond(policy: &TrafficPolicy) -> Option<&'static str> {
    let own = |tls: &ClientTls| matches!(tls.mode, ClientTlsMode::Simple | ClientTlsMode::Mutual);
    if policy.tls.as_ref().is_some_and(own) {
        return Some("TLS origination is not supported");
    }
    if policy.tunnel.is_some() {
        return Some("tunnels through an endpoint are not supported");
    }
    policy.proxy_protocol.map(|_| "the PROXY protocol is not supported")
}

fn fault_of(error: &ConnectError) -> Fault {
    match (error, error.close_reason()) {
        (_, CloseReason::PolicyDenied) => Fault::Denied,
        (ConnectError::NoEndpoint, _) => Fault::NoHealthy,
        (_, CloseReason::UpstreamTimeout | CloseReason::TlsTimeout) => Fault::ConnectTimeout,
        _ => Fault::ConnectFailed,
    }
}

fn log(worker: &Worker, live: &Live, wanted: &Wanted, error: &str) {
    if worker.may_log() {
        tracing::info!(pod = %live.pod.name, endpoint = %wanted.addr, error, "no connection for a request");
    }
}
