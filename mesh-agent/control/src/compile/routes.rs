//! From the resources of Istio and the Gateway API to the one model of routes (`docs/routing.md`).
//!
//! Invariants:
//! - The outcome depends on the resources and the names of their files alone, not on the order of events.
//! - A resource that is not exported to a namespace has no part in what clients of that namespace see.
//! - A change is compiled for the hosts that it reaches ([`reach`]), and for all of them only when services or the mesh change
//!   their shape: endpoints come and go for free. Parts that come out as before keep their allocation, so that little is sent and
//!   applied.
//!
//! Not here: how resources are read and checked (`resource`), what the model means for a request (`mesh-core`), the endpoints of
//! services and what ServiceEntries become (`compile/entries.rs`).

mod destination_rule;
mod gateway_api;
mod precedence;
mod reach;
mod registry;
mod view;
mod virtual_service;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::{
    route::{
        self, HostPort, Routes,
        cluster::{ConnectionPool, Locality, OutlierDetection},
        defaults::{DefaultClusters, MeshDefaults},
        http::{HttpTable, RetryPolicy},
        protocol::AppProtocol,
        scope::{EgressProxy, Scoped},
        stream::StreamTable,
    },
    snapshot::{Mesh, Name, Service},
};

pub(super) use self::destination_rule::pool;
use self::{
    destination_rule::DestinationRules,
    gateway_api::GatewayRoutes,
    reach::{Affected, Reaches},
    view::scoped,
    virtual_service::{VirtualServices, backend},
};
pub(crate) use self::{
    gateway_api::services_of_entry,
    registry::{Registry, port as port_meant},
};
use super::sidecars;
use crate::{
    index::{Index, located},
    problem::{Level, SourceError},
    resource::{ExportTo, Key, Kind, MeshConfig, Resource, Sidecar, virtual_service::Retries},
};

impl Kind {
    /// Whether resources of this kind are what [`RouteCompiler`] reads.
    pub(crate) const fn is_of_routes(self) -> bool {
        matches!(
            self,
            Self::VirtualService
                | Self::DestinationRule
                | Self::Sidecar
                | Self::ServiceEntry
                | Self::HttpRoute
                | Self::GrpcRoute
                | Self::TlsRoute
                | Self::TcpRoute
                | Self::ReferenceGrant
        )
    }
}

/// Port at which hosts that no service has are found (S25).
const UNKNOWN_HOST_PORT: u16 = 80;

/// What the mesh says where a route or destination says nothing.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Defaults {
    /// Who sees a VirtualService.
    pub(super) virtual_services: ExportTo,
    /// Who sees a DestinationRule.
    pub(super) destination_rules: ExportTo,
    /// How tries are repeated (S30); `None` is never.
    pub(super) retries: Option<RetryPolicy>,
    /// What limits fall back to, one by one.
    pub(super) pool: ConnectionPool,
    /// Limits of destinations without any.
    pub(super) own_pool: Option<destination_rule::SpecPool>,
    /// Ejection of endpoints of destinations that say nothing of it.
    pub(super) outlier: Option<OutlierDetection>,
    /// Which endpoints are left, with outlier detection (fact 5).
    pub(super) locality: Locality,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            virtual_services: ExportTo::everyone(),
            destination_rules: ExportTo::everyone(),
            retries: Some(RetryPolicy::built_in()),
            pool: ConnectionPool::default(),
            own_pool: None,
            outlier: None,
            locality: Locality::Failover { regions: Vec::new(), labels: Vec::new(), forced: false },
        }
    }
}

impl Defaults {
    /// Those that the MeshConfig says, the others Istio's.
    pub(super) fn of(config: Option<&MeshConfig>) -> Self {
        let Some(routing) = config.map(|config| &config.routing) else { return Self::default() };
        let built_in = Self::default();
        let pool = ConnectionPool {
            connect_timeout: routing.connect_timeout(),
            keepalive: routing.keepalive,
            h2_upgrade: routing.h2_upgrade,
            ..built_in.pool
        };
        Self {
            virtual_services: routing.virtual_service_export_to.clone().unwrap_or(built_in.virtual_services),
            destination_rules: routing
                .destination_rule_export_to
                .clone()
                .unwrap_or(built_in.destination_rules),
            retries: match &routing.retries {
                None => built_in.retries,
                Some(Retries::Off) => None,
                Some(Retries::On(policy)) => Some(policy.clone()),
            },
            own_pool: routing.pool.clone(),
            outlier: routing.outlier.clone(),
            pool,
            locality: routing.locality().locality(),
        }
    }

    /// What agents have to know of them, and of what else the MeshConfig says.
    pub(super) fn of_mesh(&self, config: Option<&MeshConfig>) -> MeshDefaults {
        let built_in = MeshDefaults::default();
        let routing = config.map(|config| &config.routing);
        MeshDefaults {
            outbound: routing.map_or(built_in.outbound, |routing| routing.outbound()),
            retries: self.retries.clone(),
            path_normalization: routing.map_or(built_in.path_normalization, |r| r.path_normalization),
            // Zero is no wait without end here: servers that speak first would never be reached.
            detection_timeout: routing.and_then(|r| r.detection_timeout).filter(|limit| !limit.is_zero()),
            dns_refresh: routing.and_then(|r| r.dns_refresh).unwrap_or(built_in.dns_refresh),
            clusters: DefaultClusters::of(&destination_rule::policy_of_mesh(self)),
        }
    }
}

/// What everything is compiled with.
struct Context<'a> {
    index: &'a Index,
    mesh: &'a Mesh,
    defaults: &'a Defaults,
    registry: &'a Registry,
}

impl Context<'_> {
    /// What a rule is from.
    fn origin(&self, key: &Key, field: &str) -> Arc<route::Origin> {
        let place = self.index.origin(key).map(|origin| origin.place(field).into());
        Arc::new(route::Origin {
            kind: key.kind.as_str().into(),
            name: key.name.clone(),
            field: field.into(),
            place,
        })
    }

    /// Something that is probably not meant.
    fn warning(&self, key: &Key, field: &str, message: String) -> Option<SourceError> {
        Some(located(key, self.index.origin(key)?, Level::Warning, field, message))
    }
}

/// What is wrong between resources, by the host that they are about.
type Problems = BTreeMap<Arc<str>, Vec<SourceError>>;

/// Compiles again and again, keeping what did not change.
#[derive(Debug, Default)]
pub(super) struct RouteCompiler {
    registry: Registry,
    defaults: Defaults,
    mesh: Mesh,
    reaches: Reaches,
    routes: Arc<Routes>,
    /// Of delegates, which are put together before hosts are looked at.
    delegation: Vec<SourceError>,
    problems: Problems,
}

impl RouteCompiler {
    /// What connections and requests are routed by: the same allocation as before when nothing in it changed. `changes` are the
    /// resources that changed since the last call.
    pub(super) fn update<'s>(
        &mut self,
        index: &Index,
        mesh: &Mesh,
        defaults: Defaults,
        services: impl Iterator<Item = &'s Arc<Service>>,
        changes: &BTreeSet<Key>,
    ) -> Arc<Routes> {
        let reshaped = self.registry.renew(services, mesh);
        let affected = self.reaches.follow(index, &self.registry, &mesh.cluster_domain, changes);
        let everything = reshaped || defaults != self.defaults || *mesh != self.mesh;
        if everything {
            self.defaults = defaults;
            self.mesh = mesh.clone();
        }
        let mut routes = Cow::Borrowed(&*self.routes);
        if everything || !affected.is_empty() {
            let cx = Context { index, mesh, defaults: &self.defaults, registry: &self.registry };
            let what = if everything { None } else { Some(affected) };
            self.delegation.clear();
            compile(&cx, what, routes.to_mut(), &mut self.problems, &mut self.delegation);
        }
        if everything || changes.iter().any(|key| key.kind == Kind::Sidecar) {
            let cx = Context { index, mesh, defaults: &self.defaults, registry: &self.registry };
            let sidecars = index.each(Kind::Sidecar).filter_map(|(_, resource)| match resource {
                Resource::Sidecar(sidecar) => {
                    let scope = sidecars::scope(sidecar, &self.defaults.pool, egress_proxy(&cx, sidecar));
                    Some((sidecar.name.clone(), scope))
                }
                _ => None,
            });
            routes.to_mut().sidecars = keep(&self.routes.sidecars, sidecars.collect());
        }
        if let Cow::Owned(routes) = routes
            && routes != *self.routes
        {
            self.routes = Arc::new(routes);
        }
        Arc::clone(&self.routes)
    }

    /// The services that rules can name, as of the last update.
    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// What is wrong between resources, as of the last update.
    pub(super) fn problems(&self) -> Vec<SourceError> {
        let mut problems: Vec<SourceError> =
            self.problems.values().flatten().chain(&self.delegation).cloned().collect();
        problems.sort();
        problems.dedup();
        problems
    }
}

/// What a Sidecar's `egressProxy` leads to. Which service that is depends on no more than what services look like to rules.
fn egress_proxy(cx: &Context<'_>, sidecar: &Sidecar) -> Option<EgressProxy> {
    let destination = sidecar.egress_proxy.as_ref()?;
    let key = Key { kind: Kind::Sidecar, name: sidecar.name.clone() };
    let origin = cx.origin(&key, "spec.outboundTrafficPolicy.egressProxy");
    // Whatever port was dialled is none of the proxy's.
    Some(EgressProxy { origin, backend: backend(cx, destination, &sidecar.name.namespace, 0) })
}

/// The new entries, with the allocations of `old` in the place of equal ones.
fn keep<K: Ord, V: PartialEq + Clone>(old: &BTreeMap<K, V>, mut new: BTreeMap<K, V>) -> BTreeMap<K, V> {
    for (key, value) in &mut new {
        if let Some(known) = old.get(key).filter(|known| *known == value) {
            value.clone_from(known);
        }
    }
    new
}

/// Compiles the tables of what is affected, all of them without it, into `routes`, which has what was known before.
fn compile(
    cx: &Context<'_>,
    affected: Option<Affected>,
    routes: &mut Routes,
    problems: &mut Problems,
    delegation: &mut Vec<SourceError>,
) {
    let virtual_services = VirtualServices::of(cx, delegation);
    let gateway_routes = GatewayRoutes::of(cx);
    let destination_rules = DestinationRules::of(cx);
    let affected = affected.map(|mut affected| {
        // A service's tables are those of its other names too.
        let of_affected = cx.registry.aliases().filter(|(_, target)| affected.has(&cx.registry.host(target)));
        let aliases: Vec<Arc<str>> = of_affected.map(|(alias, _)| cx.registry.host(alias)).collect();
        affected.add_names(aliases.into_iter());
        affected
    });
    let is_affected = |host: &str| affected.as_ref().is_none_or(|affected| affected.has(host));
    let services: BTreeMap<&Name, &Arc<Service>> = match &affected {
        Some(affected) => cx.registry.services_of(affected),
        None => cx.registry.services().map(|service| (&service.name, service)).collect(),
    };

    let mut new = Routes::default();
    let mut found = Problems::new();
    let hosts: BTreeSet<Arc<str>> = services.values().map(|service| cx.registry.host(service)).collect();
    for host in hosts {
        // Another name of a service: its requests are that one's (B2).
        let of_host: Vec<&Arc<Service>> =
            cx.registry.with_host(&host).filter(|service| cx.registry.alias_of(service).is_none()).collect();
        let ports = of_host.iter().flat_map(|service| &service.ports).filter(|port| port.port != 0);
        let mut protocols: BTreeMap<u16, Vec<AppProtocol>> = BTreeMap::new();
        for port in ports {
            protocols.entry(port.port).or_default().push(AppProtocol::of(port));
        }
        for (port, protocols) in protocols {
            let at = HostPort { host: Arc::clone(&host), port };
            let attached = gateway_routes.attached(&of_host, port);
            if protocols.iter().any(|protocol| protocol.carries_requests()) {
                let table = http_tables(cx, &virtual_services, &attached, &host, port, &mut found);
                if let Some(table) = table {
                    new.http.insert(at.clone(), table);
                }
            }
            if protocols.iter().any(|protocol| protocol.carries_streams()) {
                let table = stream_tables(cx, &virtual_services, &attached, &host, port);
                if let Some(table) = table {
                    new.streams.insert(at, table);
                }
            }
        }
        for service in of_host {
            for port in service.ports.iter().filter(|port| port.port != 0) {
                if AppProtocol::of(port) != AppProtocol::Udp {
                    destination_rules.clusters(cx, service, &host, port.port, &mut new.clusters);
                }
            }
        }
    }
    for host in virtual_services.unknown_hosts().filter(|host| is_affected(host)) {
        let nothing = gateway_api::OfHost::default();
        let table = http_tables(cx, &virtual_services, &nothing, host, UNKNOWN_HOST_PORT, &mut found);
        if let Some(table) = table {
            new.http.insert(HostPort { host: Arc::clone(host), port: UNKNOWN_HOST_PORT }, table);
        }
    }
    problems.retain(|host, _| !is_affected(host));
    problems.extend(found);

    fn renew<K: Ord, V: PartialEq + Clone>(
        known: &mut BTreeMap<K, V>,
        new: BTreeMap<K, V>,
        is_affected: impl Fn(&K) -> bool,
    ) {
        let new = keep(known, new);
        known.retain(|key, _| !is_affected(key));
        known.extend(new);
    }
    renew(&mut routes.http, new.http, |at| is_affected(&at.host));
    renew(&mut routes.streams, new.streams, |at| is_affected(&at.host));
    let is_all = affected.is_none();
    renew(&mut routes.clusters, new.clusters, |key| is_all || services.contains_key(&key.service));
    alias_tables(cx, routes);
}

/// Gives services that are another name of one its tables.
fn alias_tables(cx: &Context<'_>, routes: &mut Routes) {
    for (alias, target) in cx.registry.aliases() {
        let (alias, host) = (cx.registry.host(alias), cx.registry.host(target));
        for port in &target.ports {
            let (from, to) = (
                HostPort { host: Arc::clone(&host), port: port.port },
                HostPort { host: Arc::clone(&alias), port: port.port },
            );
            if let Some(table) = routes.http.get(&from).cloned() {
                routes.http.insert(to.clone(), table);
            }
            if let Some(table) = routes.streams.get(&from).cloned() {
                routes.streams.insert(to, table);
            }
        }
    }
}

/// The HTTP tables of a host and port: Gateway API routes of the client's namespace, then those of the service's, then the
/// VirtualService that has the host.
fn http_tables(
    cx: &Context<'_>,
    virtual_services: &VirtualServices<'_>,
    attached: &gateway_api::OfHost<'_>,
    host: &Arc<str>,
    port: u16,
    found: &mut Problems,
) -> Option<Scoped<HttpTable>> {
    let candidates = virtual_services.for_host(host, virtual_service::Protocol::Http);
    let mut namespaces: BTreeSet<Arc<str>> = candidates.namespaces();
    namespaces.extend(attached.http_namespaces());
    let mut made = view::Made::default();
    let mut problems: Vec<SourceError> = Vec::new();
    let tables = scoped(namespaces, |client| {
        let chosen = candidates.chosen(client, |one| {
            made.or_make_some(one.identity(), || virtual_service::http_table(cx, one, port))
        });
        if let Some(routes) = attached.http_for(client) {
            if let Some(chosen) = chosen {
                problems.extend(routes.replace(cx, &chosen.key(), host, port));
            }
            return Some(made.or_make(routes.identity(), || gateway_api::http_table(cx, &routes, port)));
        }
        let chosen = chosen?;
        problems.extend(chosen.losers(cx, client, host));
        Some(chosen.table)
    });
    if !problems.is_empty() {
        found.entry(Arc::clone(host)).or_default().extend(problems);
    }
    tables
}

/// The TLS and TCP tables of a host and port, by the same order.
fn stream_tables(
    cx: &Context<'_>,
    virtual_services: &VirtualServices<'_>,
    attached: &gateway_api::OfHost<'_>,
    host: &Arc<str>,
    port: u16,
) -> Option<Scoped<StreamTable>> {
    let candidates = virtual_services.for_host(host, virtual_service::Protocol::Stream);
    let mut namespaces: BTreeSet<Arc<str>> = candidates.namespaces();
    namespaces.extend(attached.stream_namespaces());
    let mut made = view::Made::default();
    scoped(namespaces, |client| {
        if let Some(routes) = attached.streams_for(client) {
            return Some(made.or_make(routes.identity(), || gateway_api::stream_table(cx, &routes, port)));
        }
        let chosen = candidates.chosen(client, |one| {
            made.or_make_some(one.identity(), || virtual_service::stream_table(cx, one, port))
        });
        chosen.map(|chosen| chosen.table)
    })
}

#[cfg(test)]
mod tests;
