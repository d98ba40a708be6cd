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
        http::{Backend, WeightedBackend},
        protocol::AppProtocol,
        request::ClientView,
        scope::NO_LABELS,
        sight::Sight,
        stream::{StreamRule, StreamTable},
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
    To {
        /// Where to.
        destination: Destination,
        /// The server name of TLS that the client said.
        name: Option<String>,
    },
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
    let is_held = || snapshot.sight(live.pod.workload, &live.pod.name.namespace).holds(dialled);
    let is_quiet = routes.streams.is_empty()
        && routes.clusters.is_empty()
        && !snapshot.has_unlisted()
        && !snapshot.has_shared();
    if is_quiet && !is_held() {
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
    let sight = snapshot.sight(live.pod.workload, &live.pod.name.namespace);
    match sight.service_at(dialled, Protocol::Tcp) {
        Some((_, port)) => {
            let table = table_of(snapshot, &sight, client_of(snapshot, live), dialled, None);
            let needs_name = sight.is_shared(dialled) || table.is_some_and(|table| table.needs_sni());
            let is_tls = AppProtocol::of(port) == AppProtocol::Tls;
            needs_name.then_some(if is_tls { settings.hello_timeout } else { detection })
        }
        // Of an address that is no service's, only the name that is asked for can say it.
        None => {
            let is_held =
                || AppProtocol::of_number(dialled.port()) != AppProtocol::Tcp && sight.holds(dialled);
            let port = dialled.port();
            (snapshot.has_stream_at(port) || sight.is_unlisted(port) || is_held()).then_some(detection)
        }
    }
}

fn client_of<'s>(snapshot: &'s Snapshot, live: &Live) -> Option<&'s Workload> {
    snapshot.workload(live.pod.workload).map(|workload| &**workload)
}

/// The table of the service that was dialled; where none was, of the server that is asked for by name.
pub(crate) fn table_of(
    snapshot: &Snapshot,
    sight: &Sight<'_>,
    client: Option<&Workload>,
    dialled: SocketAddr,
    sni: Option<&str>,
) -> Option<Arc<StreamTable>> {
    let routes = snapshot.routes();
    let port = dialled.port();
    let table = match sight.service_at_named(dialled, sni) {
        Some((service, port)) => routes.stream(&snapshot.host_of(service), port.port),
        None => routes.stream(sni?.trim_end_matches('.'), port),
    };
    seen_by(table, client, sight.namespace())
}

fn decide(snapshot: &Snapshot, live: &Live, dialled: SocketAddr, hello: &Hello, draw: u64) -> Way {
    let namespace = &live.pod.name.namespace;
    let client = client_of(snapshot, live);
    let (tls, sni) = match hello {
        Hello::Tls { sni } => (true, sni.as_deref()),
        Hello::NotTls | Hello::Partial => (false, None),
    };
    let sight = snapshot.sight(live.pod.workload, namespace);
    let table = table_of(snapshot, &sight, client, dialled, sni);
    let view = StreamView { tls, sni, dialled: dialled.ip() };
    let of = ClientView { namespace, labels: client.map_or(&NO_LABELS, |client| &client.labels) };
    let name = || sni.map(str::to_owned);
    let by_rule = |rule: &StreamRule| {
        let missing = |reason: &str| Way::Nowhere { reason: format!("{}: {reason}", rule.origin).into() };
        match split(&rule.backends, draw).map(|weighted| &weighted.backend) {
            None => missing("no destination"),
            Some(Backend::Broken { reason, .. }) => missing(reason),
            Some(Backend::Cluster(key)) => match Destination::of(snapshot, key, client, namespace) {
                Some(destination) => Way::To { destination, name: name() },
                None => missing("no such service, port or subset"),
            },
        }
    };
    if let Some(rule) = table.as_ref().and_then(|table| table.route(&view, &of)) {
        return by_rule(rule);
    }
    if let Some(destination) = by_policy(snapshot, &sight, client, dialled, sni) {
        return Way::To { destination, name: name() };
    }
    through(&sight, dialled).map_or(Way::AsDialled, |rule| by_rule(&rule))
}

/// What holds for connections that nothing describes, where a proxy takes them (S68).
pub(crate) fn through(sight: &Sight<'_>, dialled: SocketAddr) -> Option<StreamRule> {
    let proxy = sight.egress_proxy_to(dialled)?;
    let backends = vec![WeightedBackend::alone(proxy.backend.clone())];
    Some(StreamRule { origin: Arc::clone(&proxy.origin), matches: Vec::new(), backends })
}

/// Where a connection goes that no rule is about: to the service as it is, if something is said about that. At an address of no
/// service it is the one whose name is asked for.
pub(crate) fn by_policy(
    snapshot: &Snapshot,
    sight: &Sight<'_>,
    client: Option<&Workload>,
    dialled: SocketAddr,
    sni: Option<&str>,
) -> Option<Destination> {
    let key = match sight.service_at_named(dialled, sni) {
        Some((service, port)) => {
            let key = ClusterKey { service: service.name.clone(), port: port.port, subset: None };
            (snapshot.routes().clusters.contains_key(&key) || sight.is_shared(dialled)).then_some(key)?
        }
        None => {
            let name = sni?.trim_end_matches('.').to_ascii_lowercase();
            let service = sight.service_of_server(&name, dialled.port())?;
            let key = ClusterKey { service: service.name.clone(), port: dialled.port(), subset: None };
            // A service with addresses is met there, whatever name is asked for elsewhere, unless nothing else is allowed.
            let is_met_by_name =
                sight.is_unlisted(dialled.port()) && service.frontend_addrs().next().is_none();
            (is_met_by_name || sight.holds(dialled)).then_some(key)?
        }
    };
    Destination::of(snapshot, &key, client, sight.namespace())
}

/// What consistent hashing goes by: of a connection only its source is known (S42).
pub(crate) fn hash_of(destination: &Destination, client: SocketAddr) -> Option<u64> {
    match &destination.policy()?.policy.balancing.algorithm {
        Algorithm::ConsistentHash { key: HashKey::SourceIp, .. } => Some(source_hash(client.ip())),
        _ => None,
    }
}
