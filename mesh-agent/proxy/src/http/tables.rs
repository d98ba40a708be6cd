//! Which table a request is routed by: of the Gateway API that of the service that was dialled, else that of the host it names, else of the
//! service that was dialled, else none.

use std::{net::SocketAddr, sync::Arc};

use mesh_core::{
    route::{
        Origin, Routes,
        cluster::{ClusterKey, ConnectionPool},
        host::resolve,
        http::{Action, Backend, HttpRule, HttpTable, WeightedBackend},
        request::ClientView,
        scope::{EgressProxy, NO_LABELS},
        sight::Sight,
    },
    snapshot::{Name, Protocol, Service, Snapshot, Workload},
};

use crate::{destination::seen_by, metrics::http::Refusal};

/// Why a request is refused that nothing describes, and the name of its route.
pub(super) const BLOCK_ALL: &str = "block_all";
/// The name of the route of a request that nothing describes and a proxy takes.
const ALLOW_ANY: &str = "allow_any";

/// Whether anything is said about HTTP at a port of a service, or of a host that may be asked for there.
pub(super) fn concerns(snapshot: &Snapshot, sight: &Sight<'_>, dialled: SocketAddr) -> bool {
    let routes = snapshot.routes();
    match sight.service_at(dialled, Protocol::Tcp) {
        Some((service, port)) => {
            routes.http(&snapshot.host_of(service), port.port).is_some()
                || has_policy(routes, &service.name, port.port)
                || sight.is_shared(dialled)
        }
        // Of an address that is no service's, only the host that is asked for can say it.
        None => {
            let port = dialled.port();
            snapshot.has_http_at(port) || sight.is_unlisted(port) || sight.holds(dialled)
        }
    }
}

/// Whether the requests of a connection may be counted by a server on this node: then they are told apart, whatever the client's side
/// has to say about them.
pub(super) fn is_counted(snapshot: &Snapshot, sight: &Sight<'_>, dialled: SocketAddr, node: &str) -> bool {
    if !snapshot.counts_requests() {
        return false;
    }
    let counts = |server: &Workload, port: u16| {
        let pool = (*server.node == *node).then(|| snapshot.inbound_pool(server, port)).flatten();
        pool.is_some_and(ConnectionPool::limits_requests)
    };
    match sight.service_at(dialled, Protocol::Tcp) {
        Some((_, port)) => port.endpoints.iter().any(|endpoint| {
            snapshot.workload_of(endpoint).is_some_and(|server| counts(server, endpoint.port))
        }),
        None => snapshot.workload_at(dialled.ip()).is_some_and(|server| counts(server, dialled.port())),
    }
}

fn has_policy(routes: &Routes, service: &Name, port: u16) -> bool {
    let first = ClusterKey { service: service.clone(), port, subset: None };
    routes.clusters.range(&first..).next().is_some_and(|(key, _)| key.service == *service && key.port == port)
}

/// The table for an authority; `None`: nothing is known of it, nor of what was dialled.
pub(super) fn table_of(
    snapshot: &Snapshot,
    client: Option<&Workload>,
    sight: &Sight<'_>,
    dialled: SocketAddr,
    authority: &str,
) -> Option<Arc<HttpTable>> {
    let port = dialled.port();
    let labels = client.map_or(&NO_LABELS, |client| &client.labels);
    let asks = ClientView { namespace: sight.namespace(), labels };
    let of_host = |host: &str, service| {
        let table = seen_by(snapshot.routes().http(host, port), client, sight.namespace());
        table.filter(|table| sight.sees_rules(table, host, service, port) && table.concerns(&asks))
    };
    let dialled_service = sight.service_at(dialled, Protocol::Tcp).map(|(service, _)| service);
    let of_dialled = dialled_service.and_then(|service| of_host(&snapshot.host_of(service), Some(service)));
    // What is attached to a service is for all that comes to its address, whatever a request calls it; Istio's rules go by what it does (S9).
    if of_dialled.as_ref().is_some_and(|table| table.virtual_service_namespace().is_none()) {
        return of_dialled;
    }
    let named = resolve(sight, authority, port);
    if let Some(table) = of_host(&named.host, named.service) {
        return Some(table);
    }
    let serves =
        |service: &&Arc<Service>| service.ports.iter().any(|p| p.port == port) && sight.sees(service, port);
    if let Some(service) = named.service.filter(serves) {
        return Some(default_table(snapshot, &service.name, port));
    }
    let Some(service) = dialled_service else {
        if sight.refuses(dialled) {
            return Some(block_all());
        }
        return sight.egress_proxy_to(dialled).map(through);
    };
    of_dialled.or_else(|| Some(default_table(snapshot, &service.name, port)))
}

/// What requests get that nothing describes, under REGISTRY_ONLY (F10).
fn block_all() -> Arc<HttpTable> {
    let body = Arc::default();
    let unmatched = Action::Respond { status: Refusal::BlackHole.status(), body, reason: BLOCK_ALL.into() };
    Arc::new(HttpTable::new(Vec::new(), unmatched))
}

/// What requests get that nothing describes, where a proxy takes them. As Istio's, it takes them once (S68).
fn through(proxy: &EgressProxy) -> Arc<HttpTable> {
    let rule = HttpRule {
        name: Some(ALLOW_ANY.into()),
        ..HttpRule::new(
            Arc::clone(&proxy.origin),
            Action::Forward(vec![WeightedBackend::alone(proxy.backend.clone())]),
        )
    };
    Arc::new(HttpTable::new(vec![rule], Action::Passthrough))
}

/// What holds for a service without rules: all of its endpoints, and the mesh's retries.
fn default_table(snapshot: &Snapshot, service: &Name, port: u16) -> Arc<HttpTable> {
    let key = ClusterKey { service: service.clone(), port, subset: None };
    let origin = Origin { kind: "Service".into(), name: service.clone(), field: "spec".into(), place: None };
    let rule = HttpRule {
        name: Some("default".into()),
        retries: snapshot.mesh().defaults.retries.clone(),
        ..HttpRule::new(origin, Action::Forward(vec![WeightedBackend::alone(Backend::Cluster(key))]))
    };
    Arc::new(HttpTable::new(vec![rule], Action::Passthrough))
}
