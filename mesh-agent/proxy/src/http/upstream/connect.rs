//! Making a connection to an endpoint: the transport that the mesh wants, then what the destination's policy adds.

use std::{net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use mesh_core::{
    route::cluster::{Cluster, ConnectionPool, TrafficPolicy},
    snapshot::{Service, Snapshot, Traits, Workload},
};
use tokio::time::{Instant, timeout_at};

use super::{
    super::own::source_of,
    cluster::Failed,
    connection::{self, Protocol, Sender, Version},
    reply::Fault,
};
use crate::{
    close::CloseReason,
    connect::{ConnectError, keep_alive, report},
    connections::Live,
    hbone::tunnel::Early,
    inbound::dial_app,
    layers::{LayerError, Layers, Server, lay, tls::Inside},
    outbound::{Attempt, Bytes, Transport, open_transport},
    server::request_pool,
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
    /// What a resource says of the endpoint.
    pub(super) traits: Option<Arc<Traits>>,
    pub(super) cluster: Option<Arc<Cluster>>,
    pub(super) version: Version,
    /// The host that the request is for, where TLS may need a name.
    pub(super) host: Option<Arc<str>>,
    /// It is to the pod's own app, by its own side.
    pub(super) is_own: bool,
}

impl Wanted {
    /// What the policy puts between.
    fn layers<'a>(&'a self, worker: &Worker, policy: &'a TrafficPolicy) -> Option<Layers<'a>> {
        let (workload, traits) = (self.workload.as_ref(), self.traits.as_ref());
        let server = Server::of(worker, self.service.as_ref(), workload, traits, self.addr.port());
        layers_of(policy, self.host.as_deref(), self.version, &self.client, server)
    }
}

/// What a policy puts between, for requests of a client to a host.
pub(super) fn layers_of<'a>(
    policy: &'a TrafficPolicy,
    host: Option<&'a str>,
    version: Version,
    client: &Live,
    server: Server<'a>,
) -> Option<Layers<'a>> {
    let inside = match version {
        Version::Http1 => Inside::Http1,
        Version::Http2 => Inside::Http2,
    };
    Layers::of(policy, host.unwrap_or_default(), inside, client, server)
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
    let limit = pool.connect_timeout;
    let deadline = Instant::now() + limit;
    let opened = if wanted.is_own {
        let source = source_of(&wanted.snapshot, &wanted.client).map(|source| source.id);
        live.set_upstream(wanted.addr, wanted.client.names());
        dial_app(worker, live, source, wanted.addr, limit).await.map(Transport::Tcp)
    } else {
        open_in_turn(worker, live, wanted, limit).await
    };
    let transport = opened.map_err(|error| {
        log(worker, live, wanted, &report(&error));
        Failed { fault: fault_of(&error), reason: error.close_reason() }
    })?;
    keep_alive(&transport, pool);
    let layers = wanted.cluster.as_ref().and_then(|cluster| wanted.layers(worker, &cluster.policy));
    let laid = lay(worker, live, transport, layers.as_ref(), (limit, deadline)).await;
    let io = laid.map_err(|source| {
        let error = ConnectError::Layer { addr: wanted.addr, source };
        log(worker, live, wanted, &report(&error));
        Failed { fault: fault_of(&error), reason: error.close_reason() }
    })?;
    let spoken = connection::speak(io, wanted.version, pool).await;
    spoken.map_err(|error| {
        log(worker, live, wanted, &report(&error));
        Failed { fault: Fault::ConnectFailed, reason: CloseReason::UpstreamLost }
    })
}

/// Opens the transport that the endpoint needs. While a workload of this node has as many connections as it may, this waits its turn as
/// its limits allow, at most for as long as a connection may take.
async fn open_in_turn(
    worker: &Rc<Worker>,
    live: &Rc<Live>,
    wanted: &Wanted,
    limit: Duration,
) -> Result<Transport, ConnectError> {
    let choice = Choice { addr: wanted.addr, workload: wanted.workload.as_ref() };
    let attempt = Attempt { limit, early: Early::Held };
    let service = wanted.service.as_ref();
    let open = || open_transport(worker, live, &wanted.snapshot, service, choice, attempt, Bytes::Spoken);
    let port = wanted.addr.port();
    let counted = wanted.workload.as_ref().and_then(|server| {
        Some((server.id, request_pool(worker, &wanted.snapshot, server, port)?.max_pending))
    });
    let Some((server, max_pending)) = counted else { return open().await };
    let usage = worker.shared().inbound.usage(&(server, port));
    let deadline = Instant::now() + limit;
    let mut turn = None;
    loop {
        let freed = usage.freed.notified();
        tokio::pin!(freed);
        // From here on nothing that becomes free is missed.
        freed.as_mut().enable();
        match open().await {
            Err(ConnectError::Limit) => {}
            outcome => return outcome,
        }
        if turn.is_none() {
            turn = Some(usage.wait(max_pending).ok_or(ConnectError::Limit)?);
        }
        worker.make_room_at(server, port);
        if timeout_at(deadline, freed).await.is_err() {
            return Err(ConnectError::TimedOut { addr: wanted.addr, limit_ms: limit.as_millis() });
        }
    }
}

fn fault_of(error: &ConnectError) -> Fault {
    match (error, error.close_reason()) {
        (ConnectError::Limit, _) => Fault::Overflow,
        (_, CloseReason::PolicyDenied) => Fault::Denied,
        (ConnectError::Layer { source: LayerError::TimedOut { .. }, .. }, _) => Fault::ConnectTimeout,
        (ConnectError::Layer { .. }, reason) => Fault::TransportFailed(reason),
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
