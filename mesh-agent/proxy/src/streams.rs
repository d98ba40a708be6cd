//! Where a connection goes that is not looked into: by TLS and TCP rules, else by what is said about the service it dialled.
//!
//! Invariants:
//! - The first bytes are waited for only where a rule asks for a server name, and never for longer than a limit; a server
//!   that speaks first is that much slower there.
//! - The world a connection is routed by is the one after the wait.
//!
//! Not here: the rules (`mesh-core`), the endpoint of a destination ([`crate::destination`]).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use mesh_core::{
    route::{
        cluster::{Algorithm, ClusterKey, HashKey},
        evaluate::{StreamView, split},
        http::Backend,
        protocol::AppProtocol,
        request::ClientView,
        stream::StreamTable,
    },
    snapshot::{Protocol, Snapshot, Workload},
};

use tokio::time::Instant;

use crate::{
    connections::Live,
    destination::{Destination, seen_by, source_hash},
    hello::{self, Hello},
    stream::Stream,
    worker::Worker,
};

/// What is to be done with a connection.
#[derive(Debug)]
pub(crate) enum Way {
    /// Nothing is said about it.
    AsDialled,
    /// It goes there.
    To(Destination),
    /// A rule sends it to what does not exist.
    Nowhere {
        /// Why, for logs.
        reason: Arc<str>,
    },
}

/// Decides where a connection goes that was accepted at `since`.
pub(crate) async fn route(
    worker: &Worker,
    live: &Live,
    dialled: SocketAddr,
    accepted: &mut Stream,
    since: Instant,
) -> Way {
    let snapshot = worker.snapshot();
    let routes = snapshot.routes();
    if routes.streams.is_empty() && routes.clusters.is_empty() {
        return Way::AsDialled;
    }
    let hello = match patience(worker, live, &snapshot, dialled) {
        None => Hello::NotTls,
        Some(limit) => {
            drop(snapshot);
            // Less what was spent on looking for HTTP. What is there by now is seen in any case.
            hello::look(worker, accepted, limit.saturating_sub(since.elapsed())).await
        }
    };
    decide(&worker.snapshot(), live, dialled, &hello, worker.random())
}

/// How long the first bytes are waited for; `None`: not at all.
fn patience(worker: &Worker, live: &Live, snapshot: &Snapshot, dialled: SocketAddr) -> Option<Duration> {
    let settings = worker.settings();
    let detection = snapshot.mesh().defaults.detection_timeout.unwrap_or(settings.http.sniff_timeout);
    match snapshot.service_at(dialled.ip(), dialled.port(), Protocol::Tcp) {
        Some((_, port)) => {
            let client = client_of(snapshot, live);
            let needs_name = table_of(snapshot, client, &live.pod.name.namespace, dialled, None)?.needs_sni();
            let is_tls = AppProtocol::of(port) == AppProtocol::Tls;
            needs_name.then_some(if is_tls { settings.hello_timeout } else { detection })
        }
        // Of an address that is no service's, only the name that is asked for can say it.
        None => snapshot.has_stream_at(dialled.port()).then_some(detection),
    }
}

fn client_of<'s>(snapshot: &'s Snapshot, live: &Live) -> Option<&'s Workload> {
    snapshot.workload(live.pod.workload).map(|workload| &**workload)
}

/// The table of the service that was dialled; where none was, of the server that is asked for by name.
pub(crate) fn table_of(
    snapshot: &Snapshot,
    client: Option<&Workload>,
    namespace: &str,
    dialled: SocketAddr,
    sni: Option<&str>,
) -> Option<Arc<StreamTable>> {
    let routes = snapshot.routes();
    let port = dialled.port();
    let table = match snapshot.service_at(dialled.ip(), port, Protocol::Tcp) {
        Some((service, port)) => routes.stream(&snapshot.host_of(service), port.port),
        None => routes.stream(sni?.trim_end_matches('.'), port),
    };
    seen_by(table, client, namespace)
}

fn decide(snapshot: &Snapshot, live: &Live, dialled: SocketAddr, hello: &Hello, draw: u64) -> Way {
    let namespace = &live.pod.name.namespace;
    let client = client_of(snapshot, live);
    let (tls, sni) = match hello {
        Hello::Tls { sni } => (true, sni.as_deref()),
        Hello::NotTls | Hello::Partial => (false, None),
    };
    let table = table_of(snapshot, client, namespace, dialled, sni);
    let view = StreamView { tls, sni, dialled: dialled.ip() };
    static NO_LABELS: std::collections::BTreeMap<Arc<str>, Arc<str>> = std::collections::BTreeMap::new();
    let of = ClientView { namespace, labels: client.map_or(&NO_LABELS, |client| &client.labels) };
    if let Some(rule) = table.as_ref().and_then(|table| table.route(&view, &of)) {
        let missing = |reason: &str| Way::Nowhere { reason: format!("{}: {reason}", rule.origin).into() };
        return match split(&rule.backends, draw).map(|weighted| &weighted.backend) {
            None => missing("no destination"),
            Some(Backend::Broken { reason, .. }) => missing(reason),
            Some(Backend::Cluster(key)) => match Destination::of(snapshot, key, client, namespace) {
                Some(destination) => Way::To(destination),
                None => missing("no such service, port or subset"),
            },
        };
    }
    by_policy(snapshot, client, namespace, dialled).map_or(Way::AsDialled, Way::To)
}

/// Where a connection goes that no rule is about: to the service as it is, if something is said about that.
pub(crate) fn by_policy(
    snapshot: &Snapshot,
    client: Option<&Workload>,
    namespace: &str,
    dialled: SocketAddr,
) -> Option<Destination> {
    let (service, port) = snapshot.service_at(dialled.ip(), dialled.port(), Protocol::Tcp)?;
    let key = ClusterKey { service: service.name.clone(), port: port.port, subset: None };
    if !snapshot.routes().clusters.contains_key(&key) {
        return None;
    }
    Destination::of(snapshot, &key, client, namespace)
}

/// What consistent hashing goes by: of a connection only its source is known (S42).
pub(crate) fn hash_of(destination: &Destination, client: SocketAddr) -> Option<u64> {
    match &destination.policy()?.policy.balancing.algorithm {
        Algorithm::ConsistentHash { key: HashKey::SourceIp, .. } => Some(source_hash(client.ip())),
        _ => None,
    }
}
