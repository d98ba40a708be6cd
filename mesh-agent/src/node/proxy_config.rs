//! Owns the answers to `meshctl proxy-config`: the routes, destinations and endpoints of the newest snapshot as a pod sees them, joined
//! with what the data path knows of them.
//!
//! Invariants:
//! - What a pod sees is asked of the model and of the data path; nothing about visibility or fitness is decided here.
//! - Rows come in a fixed order, so that two answers can be compared.

mod endpoints;
pub(super) mod words;

use std::sync::Arc;

use mesh_common::{
    decide::Tables,
    ports,
    service::{PROTO_TCP, SERVICE_ANSWERED, ServiceKey},
};
use mesh_core::{
    route::{
        HostPort,
        cluster::{Cluster, ClusterKey},
        http::{Action, HttpRule},
        protocol::AppProtocol,
        scope::Scoped,
        stream::StreamRule,
    },
    slots::is_routed,
    snapshot::{Protocol, Service, ServicePort, Snapshot, Workload},
};
use mesh_proxy::{DestinationUse, UnusableTls, preview};

pub(super) use self::endpoints::{endpoints, row as endpoint_row};
use super::http::Query;
use crate::view::{
    ClusterView, ClustersView, InPodListenerView, InUseView, ListenersView, RetriesView, RouteRuleView,
    RouteTableView, RoutesView, ServicePortView, ShareView,
};

/// Which rows are asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    /// A host name, or its first labels.
    pub(super) host: Option<String>,
    /// A port of a service.
    pub(super) port: Option<u16>,
    /// A subset.
    pub(super) subset: Option<String>,
    /// An address.
    pub(super) address: Option<std::net::IpAddr>,
}

impl Filter {
    /// The filter of a question; an error says which parameter is none.
    pub(super) fn of(query: &Query) -> Result<Self, String> {
        let port = match query.value("port") {
            None => None,
            Some(text) => match text.parse::<u16>() {
                Ok(port @ 1..) => Some(port),
                _ => return Err(format!("port = {text:?} is not a number from 1 to 65535")),
            },
        };
        let address = match query.value("address") {
            None => None,
            Some(text) => Some(text.parse().map_err(|_| format!("address = {text:?} is not an IP address"))?),
        };
        let text = |name| query.value(name).map(|text: &str| text.trim_end_matches('.').to_ascii_lowercase());
        Ok(Self { host: text("host"), port, subset: query.value("subset").map(str::to_owned), address })
    }

    fn has_host(&self, host: &str) -> bool {
        self.host.as_deref().is_none_or(|wanted| {
            host.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        })
    }

    fn has_port(&self, port: u16) -> bool {
        self.port.is_none_or(|wanted| wanted == port)
    }

    fn has_subset(&self, subset: Option<&str>) -> bool {
        self.subset.as_deref().is_none_or(|wanted| Some(wanted) == subset)
    }

    /// The rows that were asked for, for an answer without any.
    pub(super) fn describe(&self) -> Option<String> {
        let parts = [
            self.host.as_ref().map(|host| format!("host {host}")),
            self.port.map(|port| format!("port {port}")),
            self.subset.as_ref().map(|subset| format!("subset {subset}")),
            self.address.map(|address| format!("address {address}")),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// What `client` sees of something, or without a client what everybody sees, each with whom it is for.
fn seen<'a, T>(scoped: &'a Scoped<T>, client: Option<&Workload>) -> Vec<(Option<String>, &'a Arc<T>)> {
    if let Some(client) = client {
        let own = scoped.get(&client.name.namespace, &client.labels);
        return own.map(|own| (None, own)).into_iter().collect();
    }
    let mut all: Vec<_> = scoped.default.iter().map(|own| (Some("all".to_owned()), own)).collect();
    for (namespace, own) in &scoped.by_namespace {
        for (selector, value) in &own.selected {
            let labels: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
            all.push((Some(format!("{namespace} {}", labels.join(","))), value));
        }
        all.extend(own.all.iter().map(|value| (Some(format!("namespace {namespace}")), value)));
    }
    all
}

fn pod_name(client: Option<&Workload>) -> Option<String> {
    client.map(|client| client.name.to_string())
}

/// Rules by host and port.
pub(super) fn routes(snapshot: &Snapshot, client: Option<&Workload>, filter: &Filter) -> RoutesView {
    let is_wanted = |key: &HostPort| filter.has_host(&key.host) && filter.has_port(key.port);
    let routes = snapshot.routes();
    let mut tables = Vec::new();
    for (key, scoped) in routes.http.iter().filter(|(key, _)| is_wanted(key)) {
        for (clients, table) in seen(scoped, client) {
            tables.push(RouteTableView {
                host: key.host.to_string(),
                port: key.port,
                protocol: "http".to_owned(),
                clients,
                rules: table.rules.iter().map(|rule| http_rule(snapshot, rule)).collect(),
                unmatched: words::action(&table.unmatched),
            });
        }
    }
    for (key, scoped) in routes.streams.iter().filter(|(key, _)| is_wanted(key)) {
        for (clients, table) in seen(scoped, client) {
            for (protocol, rules) in [("tls", &table.tls), ("tcp", &table.tcp)] {
                if rules.is_empty() {
                    continue;
                }
                tables.push(RouteTableView {
                    host: key.host.to_string(),
                    port: key.port,
                    protocol: protocol.to_owned(),
                    clients: clients.clone(),
                    rules: rules.iter().map(|rule| stream_rule(snapshot, rule)).collect(),
                    unmatched: "as without rules".to_owned(),
                });
            }
        }
    }
    tables.sort_by(|a, b| (&a.host, a.port, &a.protocol).cmp(&(&b.host, b.port, &b.protocol)));
    RoutesView { pod: pod_name(client), tables }
}

/// One HTTP rule in its shape.
pub(super) fn http_rule(snapshot: &Snapshot, rule: &HttpRule) -> RouteRuleView {
    let backends = match &rule.action {
        Action::Forward(backends) => shares(snapshot, backends),
        _ => Vec::new(),
    };
    let retries = rule.retries.as_ref().map(|retries| RetriesView {
        attempts: retries.attempts,
        on: words::retry_on(&retries.on),
        per_try_timeout_ms: retries.per_try_timeout.map(words::millis),
    });
    RouteRuleView {
        name: rule.name.as_deref().map(str::to_owned),
        origin: words::origin(&rule.origin),
        matches: rule.matches.iter().map(words::http_match).collect(),
        action: forward_words(&backends).unwrap_or_else(|| words::action(&rule.action)),
        backends,
        timeout_ms: rule.timeout.map(words::millis),
        retries,
        fault: rule.fault.as_ref().map(words::fault).unwrap_or_default(),
        mirrors: rule.mirrors.iter().map(|mirror| words::mirror(snapshot, mirror)).collect(),
        changes: words::changes(rule),
        cors: rule.cors.is_some(),
    }
}

/// One TLS or TCP rule in its shape.
pub(super) fn stream_rule(snapshot: &Snapshot, rule: &StreamRule) -> RouteRuleView {
    let backends = shares(snapshot, &rule.backends);
    RouteRuleView {
        name: None,
        origin: words::origin(&rule.origin),
        matches: rule.matches.iter().map(words::stream_match).collect(),
        action: forward_words(&backends).unwrap_or_else(|| "close".to_owned()),
        backends,
        timeout_ms: None,
        retries: None,
        fault: Vec::new(),
        mirrors: Vec::new(),
        changes: Vec::new(),
        cors: false,
    }
}

fn shares(snapshot: &Snapshot, backends: &[mesh_core::route::http::WeightedBackend]) -> Vec<ShareView> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let percent = |weight: u32| match (total, backends.len()) {
        // One destination gets everything, whatever its weight is.
        (0, _) | (_, 1) => 100.0,
        (total, _) => (f64::from(weight) * 10_000.0 / total as f64).round() / 100.0,
    };
    backends
        .iter()
        .map(|backend| {
            let (cluster, broken_status) = words::backend(snapshot, &backend.backend);
            ShareView { percent: percent(backend.weight), cluster, broken_status }
        })
        .collect()
}

fn forward_words(backends: &[ShareView]) -> Option<String> {
    let one = |share: &ShareView| match (share.broken_status, backends.len()) {
        (Some(status), 1) => format!("respond {status}: {}", share.cluster),
        (Some(status), _) => format!("{}% respond {status}: {}", share.percent, share.cluster),
        (None, 1) => share.cluster.clone(),
        (None, _) => format!("{}% {}", share.percent, share.cluster),
    };
    (!backends.is_empty()).then(|| backends.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// TCP ports of services that a filter asks for, by name.
fn service_ports<'s>(
    snapshot: &'s Snapshot,
    filter: &Filter,
) -> impl Iterator<Item = (String, &'s Arc<Service>, &'s ServicePort)> {
    let wanted = snapshot.services().filter_map(|service| {
        let host = snapshot.host_of(service).into_owned();
        (service.external_name.is_none() && filter.has_host(&host)).then_some((host, service))
    });
    wanted.flat_map(|(host, service)| {
        let ports =
            service.ports.iter().filter(|port| port.protocol == Protocol::Tcp && filter.has_port(port.port));
        ports.map(move |port| (host.clone(), service, port))
    })
}

/// A destination, for whom it is, and what is said about it.
struct Destination<'s> {
    host: String,
    service: &'s Arc<Service>,
    port: &'s ServicePort,
    key: ClusterKey,
    clients: Option<String>,
    policy: Option<&'s Arc<Cluster>>,
}

/// The destinations that a filter asks for: each port, then its subsets.
fn destinations<'s>(
    snapshot: &'s Snapshot,
    client: Option<&Workload>,
    filter: &Filter,
) -> Vec<Destination<'s>> {
    let clusters = &snapshot.routes().clusters;
    let mut all = Vec::new();
    for (host, service, port) in service_ports(snapshot, filter) {
        let whole = ClusterKey { service: service.name.clone(), port: port.port, subset: None };
        let mut add = |key: &ClusterKey, views: Vec<(Option<String>, Option<&'s Arc<Cluster>>)>| {
            if !filter.has_subset(key.subset.as_deref()) {
                return;
            }
            for (clients, policy) in views {
                let (host, key) = (host.clone(), key.clone());
                all.push(Destination { host, service, port, key, clients, policy });
            }
        };
        let known = |scoped: &'s Scoped<Cluster>| -> Vec<_> {
            seen(scoped, client).into_iter().map(|(clients, policy)| (clients, Some(policy))).collect()
        };
        let mut of_whole = clusters.get(&whole).map(known).unwrap_or_default();
        if of_whole.is_empty() {
            of_whole.push((client.is_none().then(|| "all".to_owned()), None));
        }
        add(&whole, of_whole);
        let rest = clusters
            .range(&whole..)
            .take_while(|(key, _)| key.service == whole.service && key.port == whole.port);
        for (key, scoped) in rest.filter(|(key, _)| key.subset.is_some()) {
            add(key, known(scoped));
        }
    }
    all
}

/// Destinations; `in_use` is what the pod's requests have in use, `unusable` what TLS wants and cannot have.
pub(super) fn clusters(
    snapshot: &Snapshot,
    client: Option<&Workload>,
    (in_use, unusable): (&[DestinationUse], &[UnusableTls]),
    filter: &Filter,
) -> ClustersView {
    let rows = destinations(snapshot, client, filter).into_iter().map(|destination| {
        let Destination { host, port, key, clients, policy, .. } = destination;
        let default = mesh_core::route::cluster::TrafficPolicy::default();
        let settings = policy.map_or(&default, |cluster| &cluster.policy);
        let origin = policy.and_then(|cluster| cluster.origin.as_deref());
        let problem = unusable.iter().find(|unusable| Some(&*unusable.origin) == origin);
        let used = in_use.iter().find(|used| used.cluster.as_ref() == Some(&key));
        ClusterView {
            name: words::cluster(snapshot, &key),
            host,
            port: key.port,
            subset: key.subset.as_deref().map(str::to_owned),
            clients,
            protocol: words::protocol(AppProtocol::of(port)).to_owned(),
            balancing: words::balancing(&settings.balancing),
            limits: words::limits(&settings.pool),
            outlier: settings.outlier.as_ref().map(words::outlier),
            tls: words::tls(settings.tls.as_ref()),
            tls_problem: problem.map(|problem| match problem.before_in_use {
                true => format!("{}; what was read before is in use", problem.reason),
                false => format!("{}; connections are refused", problem.reason),
            }),
            origin: origin.map(words::origin),
            in_use: used.map(|used| InUseView {
                connections: used.connections,
                pending: used.pending,
                requests: used.requests,
                retries: used.retries,
            }),
        }
    });
    ClustersView { pod: pod_name(client), clusters: rows.collect() }
}

/// What takes a pod's connections.
pub(super) fn listeners<T: Tables>(
    snapshot: &Snapshot,
    tables: &T,
    client: Option<&Workload>,
    enrolled: bool,
    filter: &Filter,
) -> ListenersView {
    let outbound = ports::OUTBOUND.map(|port| (port, "outbound: what the pod dials and the agent takes"));
    let others = [
        (ports::INBOUND, "inbound: plaintext from outside the mesh"),
        (ports::HBONE, "inbound: HBONE from other nodes, mutual TLS"),
        (ports::DNS, "DNS of the pod"),
    ];
    let in_pod = outbound.into_iter().chain(others).filter(|(port, _)| filter.has_port(*port));
    let is_about_services = filter.host.is_some() || filter.address.is_some();
    let listed = in_pod
        .filter(|_| !is_about_services)
        .map(|(port, purpose)| InPodListenerView { port, purpose: purpose.to_owned() });
    let mut services = Vec::new();
    for (host, service, port) in service_ports(snapshot, filter) {
        let addrs =
            service.frontend_addrs().filter(|addr| filter.address.is_none_or(|wanted| wanted == *addr));
        for addr in addrs {
            let key = ServiceKey { addr: addr.into(), port: port.port, proto: PROTO_TCP };
            let entry = tables.service(&key);
            let protocol = AppProtocol::of(port);
            let decision = match &entry {
                None => "absent",
                Some(entry) if entry.count == 0 && entry.flags & SERVICE_ANSWERED == 0 => "refuse",
                Some(_)
                    if !is_routed(snapshot, service, port.port)
                        && snapshot.sharing(addr, port.port).next().is_none() =>
                {
                    "direct"
                }
                Some(_) => {
                    let treatment = preview::treatment(snapshot, None, (addr, port.port).into());
                    let looks = protocol.is_http() || protocol == AppProtocol::Sniffed;
                    if treatment.concerned && looks { "http" } else { "proxy" }
                }
            };
            services.push(ServicePortView {
                addr,
                port: port.port,
                host: host.clone(),
                protocol: words::protocol(protocol).to_owned(),
                decision: decision.to_owned(),
                backends: entry.map_or(0, |entry| entry.count),
            });
        }
    }
    ListenersView { pod: pod_name(client), enrolled, in_pod: listed.collect(), services }
}

#[cfg(test)]
mod tests;
