//! Connections to a destination that a rule or a policy is about.

use std::{net::SocketAddr, rc::Rc};

use mesh_core::{
    balance::outlier::Observed,
    route::cluster::{ClusterKey, ConnectionPool},
    snapshot::Snapshot,
};
use tokio::time::Instant;

use super::{Attempt, Bytes, Upstream, open_transport};
use crate::{
    connect::{ConnectError, keep_alive},
    connections::{Live, Term},
    destination::{
        Destination,
        endpoints::{Load, Unchosen, Wish},
        limits::{Kind, Taken},
    },
    layers::{Layers, Server, lay, tls::Inside},
    stream::Stream,
    streams::hash_of,
    target::{Choice, Target},
    worker::Worker,
};

/// A connection's part in the limits and the load of its destination; given back when dropped.
#[derive(Debug)]
pub(crate) struct Share {
    _connection: Taken,
    /// Where the connection is not counted at its endpoint otherwise.
    _load: Option<Load>,
}

/// What the mesh says about connections to services that no resource is about; `None`: nothing.
pub(super) fn pool_of_mesh<'s>(snapshot: &'s Snapshot, target: &Target<'_>) -> Option<&'s ConnectionPool> {
    let pool = &snapshot.mesh().defaults.clusters.get(target.service()?.distribution).policy.pool;
    (*pool != ConnectionPool::default()).then_some(pool)
}

/// A connection's part in the limit of a service that no resource is about.
///
/// # Errors
/// There are as many as there may be.
pub(super) fn share_of_mesh(
    worker: &Worker,
    live: &Live,
    snapshot: &Snapshot,
    target: &Target<'_>,
    pool: &ConnectionPool,
) -> Result<Option<Share>, ConnectError> {
    let Target::Service { service, port, .. } = target else { return Ok(None) };
    if pool.max_connections.is_none() {
        return Ok(None);
    }
    let key = ClusterKey { service: service.name.clone(), port: port.port, subset: None };
    let client = snapshot.workload(live.pod.workload).map(|client| &**client);
    let Some(destination) = Destination::of(snapshot, &key, client, &live.pod.name.namespace) else {
        return Ok(None);
    };
    let endpoints = worker.destinations.of(worker, live.pod.pod, &destination);
    let connection =
        endpoints.usage.take(Kind::Connection, pool.max_connections).ok_or(ConnectError::Limit)?;
    Ok(Some(Share { _connection: connection, _load: None }))
}

/// Opens a transport to an endpoint of a destination, by its policy; `name` is the server name that the client says.
pub(super) async fn connect<'a>(
    worker: &Rc<Worker>,
    live: &Rc<Live>,
    snapshot: &Snapshot,
    (destination, name): (&Destination, Option<&str>),
    accepted: &mut Stream,
) -> Result<Upstream<'a>, ConnectError> {
    let default = ConnectionPool::default();
    let policy = destination.policy();
    let pool = policy.map_or(&default, |cluster| &cluster.policy.pool);
    let endpoints = worker.destinations.of(worker, live.pod.pod, destination);
    let connection =
        endpoints.usage.take(Kind::Connection, pool.max_connections).ok_or(ConnectError::Limit)?;
    live.set_term(Term::of(pool));
    let host = destination.service().map(|service| snapshot.host_of(service)).unwrap_or_default();
    let settings = worker.settings();
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut last = ConnectError::NoEndpoint;
    for attempt in 1..=settings.attempts_max.max(1) {
        let wish = Wish {
            destination,
            live,
            snapshot,
            hash: hash_of(destination, live.client),
            tried: &tried,
            skip_classes: 0,
        };
        let member = match endpoints.choose_called(worker, &wish, name).await {
            // Nobody is left that was not tried.
            Ok(member) if tried.contains(&member.addr) => break,
            Ok(member) => member,
            Err(Unchosen::NoHealthy) => break,
            Err(Unchosen::Unresolved(why)) => {
                let name = name.unwrap_or_default().into();
                return Err(ConnectError::Unresolved { name, why: why.as_str() });
            }
            Err(Unchosen::NoCluster) => {
                return Err(ConnectError::Nowhere { reason: "no such service, port or subset".into() });
            }
        };
        if attempt > 1 {
            worker.metrics().connect_retries.inc();
        }
        tried.push(member.addr);
        let is_last = attempt == settings.attempts_max || endpoints.size() <= tried.len();
        let attempt = Attempt::of(settings, pool.connect_timeout, is_last);
        let load = Load::new(&member.load);
        let choice = Choice { addr: member.addr, workload: member.workload.as_ref() };
        let service = destination.service();
        let deadline = Instant::now() + attempt.limit;
        let (workload, traits) = (member.workload.as_ref(), member.traits.as_ref());
        let server = Server::of(worker, service, workload, traits, member.addr.port());
        let layers =
            policy.and_then(|cluster| Layers::of(&cluster.policy, &host, Inside::Bytes, live, server));
        let bytes = if layers.is_some() { Bytes::Wrapped } else { Bytes::Relayed(accepted) };
        let opened = open_transport(worker, live, snapshot, service, choice, attempt, bytes).await;
        match opened {
            Ok(transport) => {
                keep_alive(&transport, pool);
                let time = (attempt.limit, deadline);
                let transport = match &layers {
                    None => transport,
                    // It counts as a connection by now: no other endpoint is tried.
                    Some(layers) => match lay(worker, live, transport, Some(layers), time).await {
                        Ok(io) => io.into_transport(),
                        Err(source) => {
                            let error = ConnectError::Layer { addr: member.addr, source };
                            if error.is_endpoints_fault() {
                                endpoints.observe(policy, member.addr, Observed::LocalFailure);
                            }
                            return Err(error);
                        }
                    },
                };
                endpoints.observe(policy, member.addr, Observed::Success);
                let share = Share { _connection: connection, _load: Some(load) };
                return Ok(Upstream { transport, load: None, share: Some(share) });
            }
            Err(error) if error.is_endpoints_fault() => {
                endpoints.observe(policy, member.addr, Observed::LocalFailure);
                last = error;
            }
            Err(error) => return Err(error),
        }
    }
    Err(last)
}
