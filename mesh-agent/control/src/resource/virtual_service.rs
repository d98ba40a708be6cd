//! VirtualService: what requests and connections to a host are routed by.
//!
//! Read into forms that compilation uses: patterns are compiled, short names carry the namespace of their rule, gateways are
//! qualified. What depends on other resources (subsets, visibility, delegates) is not decided here.

mod action;
pub mod delegate;
mod http;
mod retry;
mod stream;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ipnet::IpNet;
use mesh_core::{
    route::{
        http::{Cors, Fault, HeaderOps, Millionths, Redirect, RetryPolicy, Rewrite},
        matching::StringMatch,
    },
    snapshot::Name,
};
use serde_json::Value;

use super::{
    Labels, fields,
    host::{self, RuleHost},
    metadata::{self, Scope},
    parts::{self, ExportTo},
};
use crate::problem::Problems;

pub(super) use self::action::retries;

/// The reserved gateway: workloads of the mesh.
pub const MESH_GATEWAY: &str = "mesh";

/// Routes of some hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtualService {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known: the oldest of several for one host wins.
    pub created: Option<i64>,
    /// Hosts; none for one that others delegate to.
    pub hosts: Vec<RuleHost>,
    /// `mesh`, or `namespace/name` of a gateway; never empty: without any in the manifest it is `mesh` alone (S2).
    pub gateways: Vec<Arc<str>>,
    /// Who sees it; `None`: as the mesh says.
    pub export_to: Option<ExportTo>,
    /// Rules for HTTP, in order.
    pub http: Vec<HttpRoute>,
    /// Rules for TLS that is not terminated, in order.
    pub tls: Vec<StreamRoute>,
    /// Rules for TCP, in order.
    pub tcp: Vec<StreamRoute>,
}

impl VirtualService {
    /// Whether it is only for others to delegate to.
    pub fn is_delegate(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Whether it is for workloads, and not for gateways only.
    pub fn is_for_mesh(&self) -> bool {
        is_for_mesh(&self.gateways)
    }
}

fn is_for_mesh(gateways: &[Arc<str>]) -> bool {
    gateways.iter().any(|gateway| &**gateway == MESH_GATEWAY)
}

/// A rule for HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRoute {
    /// The resource it was read from; after a merge that is the delegate.
    pub source: Name,
    /// Where in that resource, e.g. `spec.http[2]`.
    pub field: Arc<str>,
    /// Name in logs.
    pub name: Option<Arc<str>>,
    /// Any of these; none is every request.
    pub matches: Vec<HttpMatch>,
    /// What is done; `None`: nothing is said (only in delegates' roots before a merge).
    pub action: HttpAction,
    /// Changes before forwarding.
    pub rewrite: Option<Rewrite>,
    /// Over all tries; zero is no limit.
    pub timeout: Option<Duration>,
    /// How tries are repeated; `None`: as the mesh says.
    pub retries: Option<Retries>,
    /// Faults to inject.
    pub fault: Option<Fault>,
    /// Where copies go.
    pub mirrors: Vec<Mirror>,
    /// Cross-origin rules.
    pub cors: Option<Cors>,
    /// Changes to headers.
    pub headers: Option<Headers>,
}

/// What a rule for HTTP does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HttpAction {
    /// Forwards; never empty. With several destinations the weights are not all 0.
    Route(Vec<HttpDestination>),
    /// Answers with a redirect.
    Redirect(Redirect),
    /// Answers.
    Respond(DirectResponse),
    /// The rules of another VirtualService stand in its place.
    Delegate(Name),
}

/// An answer of the mesh's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectResponse {
    /// Status.
    pub status: u16,
    /// Body, at most 1 MiB.
    pub body: Arc<[u8]>,
}

/// One of several destinations of HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpDestination {
    /// Where to.
    pub destination: Destination,
    /// Share among its siblings; 0 is none, unless it is the only one (S17).
    pub weight: u32,
    /// Changes to headers.
    pub headers: Headers,
}

/// Where to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Destination {
    /// Host of a service.
    pub host: RuleHost,
    /// A subset of its DestinationRule.
    pub subset: Option<Arc<str>>,
    /// Its port; `None`: its only one, else the one that was dialled (S16).
    pub port: Option<u16>,
}

/// A destination of copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Where to.
    pub destination: Destination,
    /// Of how many requests.
    pub share: Millionths,
}

/// Changes to headers of both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers {
    /// Of requests.
    pub request: HeaderOps,
    /// Of responses.
    pub response: HeaderOps,
}

/// How tries are repeated, where something is said about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retries {
    /// Never.
    Off,
    /// So.
    On(RetryPolicy),
}

/// All conditions hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HttpMatch {
    /// Name in logs.
    pub name: Option<Arc<str>>,
    /// The path without its query; [`StringMatch::Present`] is every path.
    pub uri: Option<StringMatch>,
    /// Letters of either case match in `uri`; no effect on regular expressions.
    pub ignore_uri_case: bool,
    /// `http` or `https`.
    pub scheme: Option<StringMatch>,
    /// The method.
    pub method: Option<StringMatch>,
    /// The authority.
    pub authority: Option<StringMatch>,
    /// Headers by name, lower case. `uri`, `scheme`, `method` and `authority` are not among them (D3).
    pub headers: BTreeMap<Arc<str>, StringMatch>,
    /// Headers that must not match, by name, lower case.
    pub without_headers: BTreeMap<Arc<str>, StringMatch>,
    /// Query parameters by name.
    pub query: BTreeMap<Arc<str>, StringMatch>,
    /// Port that was dialled.
    pub port: Option<u16>,
    /// Labels of the client's pod; no effect with `gateways` (S12).
    pub source_labels: Labels,
    /// Namespace of the client's pod; no effect with `gateways` (S12).
    pub source_namespace: Option<Arc<str>>,
    /// Only at these (as [`VirtualService::gateways`]); none: at all of the resource's.
    pub gateways: Vec<Arc<str>>,
}

/// A rule for TLS or TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRoute {
    /// Where in the resource, e.g. `spec.tcp[0]`.
    pub field: Arc<str>,
    /// Any of these; none is every connection.
    pub matches: Vec<StreamMatch>,
    /// Where to; never empty. With several destinations the weights are not all 0.
    pub destinations: Vec<StreamDestination>,
}

/// One of several destinations of TLS or TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamDestination {
    /// Where to.
    pub destination: Destination,
    /// Share among its siblings; 0 is none, unless it is the only one.
    pub weight: u32,
}

/// All conditions hold, those on the client even with `gateways` (S12).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamMatch {
    /// Any of these server names, lower case, maybe with `*`; for TLS never empty, for TCP always.
    pub sni: Vec<Arc<str>>,
    /// The dialled address lies in one of these.
    pub subnets: Vec<IpNet>,
    /// Port that was dialled.
    pub port: Option<u16>,
    /// Labels of the client's pod.
    pub source_labels: Labels,
    /// Namespace of the client's pod.
    pub source_namespace: Option<Arc<str>>,
    /// Only at these (as [`VirtualService::gateways`]); none: at all of the resource's.
    pub gateways: Vec<Arc<str>>,
}

/// Reads a VirtualService.
pub(crate) fn read(value: &Value, problems: &mut Problems) -> VirtualService {
    let (meta, mut spec) = fields::document(value, problems);
    let name = metadata::name(&meta, Scope::Namespaced, problems);
    let hosts = hosts(&mut spec, &name.namespace, problems);
    let gateways = gateways(&mut spec, &name.namespace, problems);
    let has_gateways = !gateways.is_empty();
    let gateways = if has_gateways { gateways } else { vec![MESH_GATEWAY.into()] };
    let hosts = distinct(hosts, is_for_mesh(&gateways), problems);
    let is_delegate = spec.list("hosts", &mut Problems::default()).is_empty();
    let export_to = parts::export_to(&mut spec, "exportTo", problems);
    let scope = RuleScope { name: &name, hosts: &hosts, is_delegate };
    let http = http::read(&mut spec, &scope, problems);
    let tls = stream::read(&mut spec, stream::Proto::Tls, &scope, problems);
    let tcp = stream::read(&mut spec, stream::Proto::Tcp, &scope, problems);
    if scope.is_delegate {
        let only = "is there without spec.hosts: a VirtualService that others delegate to has http alone";
        let others = [("gateways", has_gateways), ("tls", !tls.is_empty()), ("tcp", !tcp.is_empty())];
        for (field, given) in others {
            if given {
                problems.error(spec.at(field), only);
            }
        }
        if http.is_empty() && tls.is_empty() && tcp.is_empty() && !has_gateways {
            problems.error(spec.at("hosts"), "is missing, wanted at least one host");
        }
    }
    let listed = ["http", "tls", "tcp"].map(|name| !spec.list(name, &mut Problems::default()).is_empty());
    if listed == [false; 3] {
        problems.error("spec", "has no rules, wanted at least one of http, tls and tcp");
    }
    spec.finish(problems);
    VirtualService { name, created: metadata::created(&meta), hosts, gateways, export_to, http, tls, tcp }
}

/// What the rules of one VirtualService are read with.
struct RuleScope<'a> {
    name: &'a Name,
    hosts: &'a [RuleHost],
    is_delegate: bool,
}

/// A host with the path and the text that it was read from.
struct WrittenHost<'a> {
    path: String,
    text: &'a str,
    host: RuleHost,
}

fn hosts<'a>(
    spec: &mut fields::Object<'a>,
    namespace: &Arc<str>,
    problems: &mut Problems,
) -> Vec<WrittenHost<'a>> {
    let mut hosts = Vec::new();
    for (path, text) in spec.texts("hosts", problems) {
        match host::check_pattern(text) {
            Err(wanted) if text.parse::<std::net::IpAddr>().is_err() => {
                problems.error(path, format!("is {text:?}, wanted {wanted}"));
            }
            _ => hosts.push(WrittenHost { path, text, host: RuleHost::new(text, namespace) }),
        }
    }
    hosts
}

/// The hosts of one resource, each of which has to be for names of its own: which rules a name had would be a matter of luck. Compared
/// as they are written, short names too, since Istio refuses by that alone. Rules for workloads may not take every name there is.
fn distinct(hosts: Vec<WrittenHost<'_>>, is_for_mesh: bool, problems: &mut Problems) -> Vec<RuleHost> {
    let mut distinct: Vec<(String, RuleHost)> = Vec::new();
    for WrittenHost { path, text, host } in hosts {
        if text == "*" && is_for_mesh {
            let wanted =
                "wanted names or \"*.suffix\": rules for workloads (gateway \"mesh\") are not for every host";
            problems.error(path, format!("is \"*\", {wanted}"));
            continue;
        }
        let lower = text.to_ascii_lowercase();
        match distinct.iter().find(|(before, _)| host::overlap(before, &lower)) {
            Some((before, _)) if *before == lower => {
                problems.error(path, format!("is {text:?}, which is there already"));
            }
            Some((before, _)) => {
                problems.error(path, format!("is {text:?}, which has names in common with {before:?}"));
            }
            None => distinct.push((lower, host)),
        }
    }
    distinct.into_iter().map(|(_, host)| host).collect()
}

/// Reads `gateways`, of the whole or of one match.
fn gateways(object: &mut fields::Object<'_>, namespace: &str, problems: &mut Problems) -> Vec<Arc<str>> {
    let mut gateways: Vec<Arc<str>> = Vec::new();
    for (path, text) in object.texts("gateways", problems) {
        let (of, gateway) = text.split_once('/').unwrap_or((namespace, text));
        if !(metadata::is_label(of) || of == ".") || !metadata::is_subdomain(gateway) {
            problems
                .error(path, format!("is {text:?}, wanted \"mesh\", NAME or NAMESPACE/NAME of a Gateway"));
            continue;
        }
        gateways.push(match text {
            MESH_GATEWAY => MESH_GATEWAY.into(),
            _ if of == "." => format!("{namespace}/{gateway}").into(),
            _ => format!("{of}/{gateway}").into(),
        });
    }
    gateways
}

/// Reads a destination in a resource of `namespace`.
pub(super) fn destination(
    object: &mut fields::Object<'_>,
    namespace: &Arc<str>,
    problems: &mut Problems,
) -> Option<Destination> {
    let host = match object.text("host", problems) {
        None => {
            if !object.has("host") {
                problems.error(object.at("host"), "is missing, wanted the host of a service");
            }
            None
        }
        Some("*") => {
            problems.error(object.at("host"), "is \"*\", wanted the host of one service");
            None
        }
        Some(text) => match host::check_pattern(text) {
            Err(wanted) if text.parse::<std::net::IpAddr>().is_err() => {
                problems.error(object.at("host"), format!("is {text:?}, wanted {wanted}"));
                None
            }
            _ => Some(RuleHost::new(text, namespace)),
        },
    };
    let subset = object.text("subset", problems);
    if let Some(subset) = subset.filter(|subset| !metadata::is_label(&subset.to_ascii_lowercase())) {
        let wanted = "wanted letters, digits and '-', at most 63";
        problems.error(object.at("subset"), format!("is {subset:?}, {wanted}"));
    }
    let port = object.object("port", problems).and_then(|mut port| {
        let number = port.port("number", problems);
        if !port.has("number") {
            problems.error(port.at("number"), "is missing, wanted a number from 1 to 65535");
        }
        port.finish(problems);
        number
    });
    Some(Destination { host: host?, subset: subset.map(Arc::from), port })
}

/// Reads `weight`, and checks that several weights are not all 0 (S17).
fn weight(object: &mut fields::Object<'_>, problems: &mut Problems) -> u32 {
    object.count("weight", problems).unwrap_or_default()
}

fn check_weights(path: &str, weights: &[u32], problems: &mut Problems) {
    if weights.len() < 2 {
        return;
    }
    let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
    if total == 0 {
        problems
            .error(path, "has several destinations and only weights of 0, wanted a weight for at least one");
    } else if total > u64::from(u32::MAX) {
        problems.error(path, format!("has weights of {total} in all, wanted at most {}", u32::MAX));
    }
}

/// What a match says about clients and the dialled port.
struct ClientMatch {
    port: Option<u16>,
    source_labels: Labels,
    source_namespace: Option<Arc<str>>,
    gateways: Vec<Arc<str>>,
}

/// Reads the part of a match that [`ClientMatch`] has.
fn client(object: &mut fields::Object<'_>, scope: &RuleScope<'_>, problems: &mut Problems) -> ClientMatch {
    let port = object.port("port", problems);
    let source_labels = parts::labels(object, "sourceLabels", problems);
    let namespace = object.text("sourceNamespace", problems);
    if let Some(namespace) = namespace.filter(|namespace| !metadata::is_label(namespace)) {
        problems
            .error(object.at("sourceNamespace"), format!("is {namespace:?}, wanted the name of a namespace"));
    }
    let gateways = gateways(object, &scope.name.namespace, problems);
    ClientMatch { port, source_labels, source_namespace: namespace.map(Arc::from), gateways }
}

#[cfg(test)]
mod tests;
