//! What would become of a request, without sending it: the steps of the data path ([`super::pipeline`]) with nothing drawn and
//! nothing awaited.
//!
//! Invariants:
//! - Every decision is made by the code that makes it for real requests; here it is only gathered.
//! - Nothing is counted and no state of a worker is touched.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, header};
use mesh_core::{
    route::{
        Origin,
        cluster::{Cluster, ClusterKey},
        cors::CorsDecision,
        evaluate::StreamView,
        http::{Action, Backend, HttpRule, HttpTable, WeightedBackend},
        protocol::AppProtocol,
        request::ClientView,
        stream::StreamRule,
    },
    snapshot::{Service, Snapshot, Workload},
};

use super::{
    claim,
    exchange::Flag,
    fields,
    fields::Fields,
    pipeline::{check, flag_of, timeout, view},
    session::Routing,
    tables, variables,
};
use crate::{
    destination::{
        Destination,
        standing::{EndpointStanding, standings},
    },
    streams,
};

/// A request to ask about.
#[derive(Clone, Debug)]
pub struct AskedRequest {
    /// Method.
    pub method: String,
    /// Path, with query if there is one.
    pub target: String,
    /// `Host` or `:authority`.
    pub authority: String,
    /// Further headers.
    pub headers: Vec<(String, String)>,
}

/// Why there is nothing to say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreviewError {
    /// The question is no request.
    #[error("{what} = {text:?} cannot stand in a request")]
    Question {
        /// Which part.
        what: &'static str,
        /// The part.
        text: String,
    },
}

/// How connections to an address are treated before anything of a request is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Treatment {
    /// Some resource is about HTTP there.
    pub concerned: bool,
    /// What is said of the protocol.
    pub protocol: AppProtocol,
}

/// What would become of a request.
#[derive(Clone, Debug)]
pub struct Preview {
    /// How its connection is treated.
    pub treatment: Treatment,
    /// What the data path makes of it; the reason and status, if it is refused as no proper request.
    pub understood: Result<Understood, (&'static str, u16)>,
}

/// A request that is routed.
#[derive(Clone, Debug)]
pub struct Understood {
    /// Authority as it is matched.
    pub authority: String,
    /// Path and query as they are matched: normalised.
    pub target: String,
    /// Its rules; `None`: nothing is known of the host, nor of what was dialled.
    pub table: Option<Arc<HttpTable>>,
    /// Place of the rule that it gets, and of the match in it.
    pub hit: Option<(usize, Option<usize>)>,
    /// What cross-origin rules do with it.
    pub cors: Option<CorsDecision>,
    /// `Location`, when it is answered with a redirect.
    pub location: Option<String>,
    /// Path and query as they leave, if they are others.
    pub new_target: Option<String>,
    /// Limit over all tries; `None`: none, or a fault takes it away.
    pub timeout: Option<Duration>,
    /// Where it may go, in the order of the rule.
    pub backends: Vec<BackendPreview>,
    /// Where copies may go, in the order of the rule.
    pub mirrors: Vec<Result<DestinationPreview, NoDestination>>,
}

impl Understood {
    /// The rule that it gets.
    pub fn rule(&self) -> Option<&HttpRule> {
        self.table.as_ref()?.rules.get(self.hit?.0)
    }

    /// Envoy's letters for what is done with it, when it is answered without a server.
    pub fn flag(&self) -> Option<&'static str> {
        match self.action()? {
            Action::Respond { reason, .. } => flag_of(reason).map(Flag::as_str),
            _ => None,
        }
    }

    /// What is done with it; `None`: it goes to where it was dialled.
    pub fn action(&self) -> Option<&Action> {
        let table = self.table.as_ref()?;
        Some(self.rule().map_or(&table.unmatched, |rule| &rule.action))
    }
}

/// One of the backends of a rule.
#[derive(Clone, Debug)]
pub struct BackendPreview {
    /// Weight among its siblings.
    pub weight: u32,
    /// Authority that the request leaves with.
    pub authority: String,
    /// Headers that the request leaves with, without those that every request gets.
    pub headers: Vec<(String, String)>,
    /// Where to.
    pub destination: Result<DestinationPreview, NoDestination>,
}

/// Why a backend is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoDestination {
    /// What the client gets.
    pub status: u16,
    /// Envoy's letters for it.
    pub flag: &'static str,
    /// Why.
    pub reason: Arc<str>,
}

/// A destination with its endpoints as the client sees them.
#[derive(Clone, Debug)]
pub struct DestinationPreview {
    /// Service, port, and perhaps a subset.
    pub key: ClusterKey,
    /// What is said about it.
    pub policy: Option<Arc<Cluster>>,
    /// Its endpoints.
    pub endpoints: Vec<EndpointStanding>,
}

impl DestinationPreview {
    /// The DestinationRule that counts.
    pub fn origin(&self) -> Option<&Arc<Origin>> {
        self.policy.as_ref()?.origin.as_ref()
    }
}

/// How connections to an address are treated; without a client: those of anybody.
pub fn treatment(snapshot: &Snapshot, client: Option<&Workload>, dialled: SocketAddr) -> Treatment {
    let sight = client.map_or_else(|| snapshot.sight_of_all(), |client| snapshot.sight_of(client));
    Treatment {
        concerned: tables::concerns(snapshot, &sight, dialled),
        protocol: claim::declared(&sight, dialled),
    }
}

/// What is said about a destination as a client sees it.
pub fn policy_of<'s>(
    snapshot: &'s Snapshot,
    client: &Workload,
    key: &ClusterKey,
) -> Option<&'s Arc<Cluster>> {
    snapshot.routes().clusters.get(key)?.get(&client.name.namespace, &client.labels)
}

/// The endpoints of a port of a service or subset as a client sees them.
pub fn endpoints(
    snapshot: &Snapshot,
    client: Option<&Workload>,
    service: &Service,
    port: u16,
    policy: Option<&Arc<Cluster>>,
) -> Vec<EndpointStanding> {
    standings(snapshot, client, service, port, policy, None)
}

/// What would become of a request that `client` sends over a connection to `dialled`.
///
/// # Errors
/// When the question is none: a method, target or header that no request can have.
pub fn preview(
    snapshot: &Arc<Snapshot>,
    client: &Workload,
    dialled: SocketAddr,
    asked: &AskedRequest,
) -> Result<Preview, PreviewError> {
    let no = |what: &'static str, text: &str| PreviewError::Question { what, text: text.to_owned() };
    let mut headers = HeaderMap::new();
    for (name, value) in &asked.headers {
        let name = HeaderName::try_from(name.as_str()).map_err(|_| no("header", name))?;
        let value = HeaderValue::try_from(value.as_str()).map_err(|_| no("header", value))?;
        headers.append(name, value);
    }
    let authority =
        HeaderValue::try_from(asked.authority.as_str()).map_err(|_| no("authority", &asked.authority))?;
    // As with curl: whoever writes the header means it.
    if !headers.contains_key(header::HOST) {
        headers.insert(header::HOST, authority);
    }
    let mut given = headers.clone();
    given.remove(header::HOST);
    let method = Method::try_from(asked.method.as_str()).map_err(|_| no("method", &asked.method))?;
    let request = Request::builder().method(method).uri(asked.target.as_str()).body(());
    let (mut parts, ()) = request.map_err(|_| no("path", &asked.target))?.into_parts();
    parts.headers = headers;
    let treatment = treatment(snapshot, Some(client), dialled);
    let authority = match check(dialled, snapshot.mesh().defaults.path_normalization, &mut parts) {
        Ok(authority) => authority,
        Err(refusal) => {
            let refused = Err((refusal.as_str(), refusal.status()));
            return Ok(Preview { treatment, understood: refused });
        }
    };
    let grpc = fields::is_grpc(&parts.headers);
    drop(fields::strip_hop_by_hop(&mut parts.headers));
    let namespace = &*client.name.namespace;
    let routing = Routing::new(Arc::clone(snapshot), client.id, namespace, dialled, &authority);
    let all_fields = Fields(&parts.headers);
    let view = view(&parts, &authority, &all_fields);
    let table = routing.table.clone();
    let hit = table
        .as_ref()
        .and_then(|table| table.route(&view, &ClientView { namespace, labels: &client.labels }));
    let path_match = hit.and_then(|hit| hit.path_match());
    let rule = hit.map(|hit| hit.rule);
    let action = table.as_ref().map(|table| table.action(hit.as_ref()));
    let place = |key: &ClusterKey| destination(snapshot, client, dialled, &routing, key);
    let backend = |rule: &HttpRule, backend: &WeightedBackend| {
        let mut headers = given.clone();
        // Nobody has asked yet: variables are shown as they are written.
        let unfilled = variables::unfilled(&variables::templates(rule.request_edits(backend)));
        fields::edit(&mut headers, rule.request_edits(backend), unfilled);
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        BackendPreview {
            weight: backend.weight,
            authority: rule.new_authority(backend).map_or_else(|| authority.clone(), |new| new.to_string()),
            headers: headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
            destination: of_backend(&backend.backend, &place),
        }
    };
    let backends = match (rule, action) {
        (Some(rule), Some(Action::Forward(all))) => all.iter().map(|one| backend(rule, one)).collect(),
        _ => Vec::new(),
    };
    let understood = Understood {
        target: view.query.map_or_else(|| view.path.to_owned(), |query| format!("{}?{query}", view.path)),
        hit: hit.map(|hit| (hit.rule_index, hit.match_index)),
        cors: rule.and_then(|rule| rule.cors.as_ref()).map(|cors| cors.decide(&view)),
        location: match action {
            Some(Action::Redirect(redirect)) => Some(redirect.location(&view, path_match, routing.port)),
            _ => None,
        },
        new_target: rule.and_then(|rule| rule.rewrite.path_and_query(&view, path_match)),
        timeout: rule.and_then(|rule| timeout(rule, &parts.headers, grpc)),
        mirrors: rule
            .iter()
            .flat_map(|rule| &rule.mirrors)
            .map(|mirror| of_backend(&mirror.backend, &place))
            .collect(),
        backends,
        authority: authority.clone(),
        table: table.clone(),
    };
    Ok(Preview { treatment, understood: Ok(understood) })
}

/// What would become of a connection that is not looked into.
#[derive(Clone, Debug)]
pub struct StreamPreview {
    /// How the connection is treated before.
    pub treatment: Treatment,
    /// The rule that it gets, with the place of the match in it.
    pub rule: Option<(StreamRule, Option<usize>)>,
    /// Where it may go, with weights, in the order of the rule; without a rule the service's own destination, if something is said
    /// about that. None: where it was dialled.
    pub backends: Vec<(u32, Result<DestinationPreview, NoDestination>)>,
}

/// What would become of a TLS connection of `client` to `dialled` that asks for this server name.
pub fn preview_tls(
    snapshot: &Snapshot,
    client: &Workload,
    dialled: SocketAddr,
    sni: Option<&str>,
) -> StreamPreview {
    let namespace = &*client.name.namespace;
    let sight = snapshot.sight_of(client);
    let table = streams::table_of(snapshot, &sight, Some(client), dialled, sni);
    let view = StreamView { tls: true, sni, dialled: dialled.ip() };
    let of = ClientView { namespace, labels: &client.labels };
    let by_policy = || streams::by_policy(snapshot, &sight, Some(client), dialled, sni);
    let rule = table.as_ref().and_then(|table| table.route(&view, &of)).cloned();
    let rule = rule.or_else(|| by_policy().is_none().then(|| streams::through(&sight, dialled)).flatten());
    let place = |key: &ClusterKey| {
        shown(snapshot, client, dialled, &Destination::of(snapshot, key, Some(client), namespace)?)
    };
    let backends = match &rule {
        Some(rule) => {
            rule.backends.iter().map(|one| (one.weight, of_backend(&one.backend, &place))).collect()
        }
        None => by_policy()
            .and_then(|destination| shown(snapshot, client, dialled, &destination))
            .map(|destination| (1, Ok(destination)))
            .into_iter()
            .collect(),
    };
    let matched = |rule: &StreamRule| rule.matches.iter().position(|one| one.holds(&view, &of));
    StreamPreview {
        treatment: treatment(snapshot, Some(client), dialled),
        rule: rule.map(|rule| (rule.clone(), matched(&rule))),
        backends,
    }
}

fn of_backend(
    backend: &Backend,
    place: &impl Fn(&ClusterKey) -> Option<DestinationPreview>,
) -> Result<DestinationPreview, NoDestination> {
    match backend {
        Backend::Cluster(key) => place(key).ok_or_else(|| NoDestination {
            status: 503,
            flag: Flag::NoCluster.as_str(),
            reason: "no_destination".into(),
        }),
        Backend::Broken { status, reason } => {
            Err(NoDestination { status: *status, flag: Flag::NoCluster.as_str(), reason: Arc::clone(reason) })
        }
    }
}

fn destination(
    snapshot: &Snapshot,
    client: &Workload,
    dialled: SocketAddr,
    routing: &Routing,
    key: &ClusterKey,
) -> Option<DestinationPreview> {
    shown(snapshot, client, dialled, &routing.destination(key, &client.name.namespace)?)
}

/// A destination with its endpoints; `None` for an address.
fn shown(
    snapshot: &Snapshot,
    client: &Workload,
    dialled: SocketAddr,
    destination: &Destination,
) -> Option<DestinationPreview> {
    match destination {
        Destination::Cluster { service, key, policy } => {
            let v4 = Some(dialled.ip().to_canonical().is_ipv4());
            let endpoints = standings(snapshot, Some(client), service, key.port, policy.as_ref(), v4);
            Some(DestinationPreview { key: key.clone(), policy: policy.clone(), endpoints })
        }
        Destination::Address(_) | Destination::Own { .. } => None,
    }
}
