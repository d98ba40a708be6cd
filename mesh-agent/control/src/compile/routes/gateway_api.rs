//! Routes of the Gateway API that are attached to services: for whom they count, and what their rules become.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::{
    route::{
        cluster::ClusterKey,
        http::{Action, Backend, HeaderOps, HttpRule, HttpTable, Mirror, RetryPolicy, WeightedBackend},
        matching::HttpMatch,
        scope::Audience,
        stream::{StreamMatch, StreamRule, StreamTable},
    },
    snapshot::{Name, Service, ServicePort},
};

use super::{Context, precedence::Rank, registry, virtual_service::no_route};
use crate::{
    index::Index,
    problem::SourceError,
    resource::{
        BackendKind, BackendRef, GrpcRoute, GrpcRouteRule, HttpRoute, HttpRouteRule, Key, Kind, ParentKind,
        ParentRef, ReferenceGrant, Resource, RouteBackend, RouteMirror, RouteRetry, StreamRoute,
    },
};

/// Answer for what is wrong in an HTTPRoute (S115).
const BROKEN: u16 = 500;
/// The same in a GRPCRoute: clients see `UNAVAILABLE`.
const BROKEN_GRPC: u16 = 503;
/// Of a back-off that is written so many parts are what the first may be longer by, so that not all try at once.
const BACKOFF_JITTER: u32 = 4;

/// One route.
pub(super) struct Route<'a> {
    spec: Spec<'a>,
    created: Option<i64>,
    name: &'a Name,
    pub(super) parents: &'a [ParentRef],
}

enum Spec<'a> {
    Http(&'a HttpRoute),
    Grpc(&'a GrpcRoute),
    Tls(&'a StreamRoute),
    Tcp(&'a StreamRoute),
}

impl<'a> Route<'a> {
    pub(super) fn of(resource: &'a Resource) -> Option<Self> {
        let (spec, created, name, parents) = match resource {
            Resource::HttpRoute(r) => (Spec::Http(r), r.created, &r.name, &r.parents),
            Resource::GrpcRoute(r) => (Spec::Grpc(r), r.created, &r.name, &r.parents),
            Resource::TlsRoute(r) => (Spec::Tls(r), r.created, &r.name, &r.parents),
            Resource::TcpRoute(r) => (Spec::Tcp(r), r.created, &r.name, &r.parents),
            _ => return None,
        };
        Some(Self { spec, created, name, parents })
    }

    fn kind(&self) -> Kind {
        match self.spec {
            Spec::Http(_) => Kind::HttpRoute,
            Spec::Grpc(_) => Kind::GrpcRoute,
            Spec::Tls(_) => Kind::TlsRoute,
            Spec::Tcp(_) => Kind::TcpRoute,
        }
    }

    fn key(&self) -> Key {
        Key { kind: self.kind(), name: self.name.clone() }
    }

    fn is_http(&self) -> bool {
        matches!(self.spec, Spec::Http(_) | Spec::Grpc(_))
    }
}

/// All routes, by what they are attached to.
pub(super) struct GatewayRoutes<'a> {
    /// The oldest first, then by namespace, then by name (S6).
    all: Vec<Route<'a>>,
    /// Service with the port or port's name that is meant, and the place in `all`.
    by_service: BTreeMap<Name, Vec<(&'a ParentRef, usize)>>,
}

impl<'a> GatewayRoutes<'a> {
    pub(super) fn of(cx: &Context<'a>) -> Self {
        let kinds = [Kind::HttpRoute, Kind::GrpcRoute, Kind::TlsRoute, Kind::TcpRoute];
        let mut all: Vec<Route<'a>> = kinds
            .into_iter()
            .flat_map(|kind| cx.index.each(kind))
            .filter_map(|(_, resource)| Route::of(resource))
            .collect();
        all.sort_by_key(|route| (route.created, route.name, route.kind()));
        let mut by_service: BTreeMap<Name, Vec<(&'a ParentRef, usize)>> = BTreeMap::new();
        for (at, route) in all.iter().enumerate() {
            for parent in route.parents {
                let services = match parent.kind {
                    ParentKind::Service => vec![parent.name.clone()],
                    ParentKind::ServiceEntry => services_of_entry(cx.index, &parent.name),
                    ParentKind::Gateway | ParentKind::Other(_) => Vec::new(),
                };
                for service in services {
                    by_service.entry(service).or_default().push((parent, at));
                }
            }
        }
        Self { all, by_service }
    }

    /// The routes that are attached to a port of the services of one host, which come by precedence.
    pub(super) fn attached<'s>(&'s self, services: &[&'s Arc<Service>], port: u16) -> OfHost<'s> {
        OfHost(services.iter().map(|service| (&***service, self.attached_to(service, port))).collect())
    }

    fn attached_to<'s>(&'s self, service: &'s Service, number: u16) -> Attached<'s> {
        let mut attached =
            Attached { service_namespace: &service.name.namespace, http: Vec::new(), streams: Vec::new() };
        let ports: Vec<&ServicePort> = service.ports.iter().filter(|port| port.port == number).collect();
        let mut places = BTreeSet::new();
        for (parent, at) in self.by_service.get(&service.name).into_iter().flatten() {
            let is_meant = |port: &&ServicePort| {
                parent.port.is_none_or(|wanted| wanted == number)
                    && parent.section.as_ref().is_none_or(|name| *name == port.name)
            };
            if ports.iter().any(is_meant) {
                places.insert(*at);
            }
        }
        for at in places {
            let route = &self.all[at];
            let of_its_kind = if route.is_http() { &mut attached.http } else { &mut attached.streams };
            of_its_kind.push(route);
        }
        attached
    }
}

/// The services that a ServiceEntry makes: one for each host, called by it.
pub(crate) fn services_of_entry(index: &Index, name: &Name) -> Vec<Name> {
    let key = Key { kind: Kind::ServiceEntry, name: name.clone() };
    let Some(Resource::ServiceEntry(entry)) = index.get(&key) else { return Vec::new() };
    let own = |host: &Arc<str>| Name::new(Arc::clone(&name.namespace), Arc::clone(host));
    entry.hosts.iter().map(own).collect()
}

/// The routes of one port of a host, for each service that has the host. Several have one of a ServiceEntry: in each namespace a
/// client means one of them (S57), and what is attached to the others is none of its business.
#[derive(Default)]
pub(super) struct OfHost<'r>(Vec<(&'r Service, Attached<'r>)>);

impl<'r> OfHost<'r> {
    /// What is attached to the service that clients of a namespace mean; `None`: of one that nothing here names.
    fn meant_by(&self, client: Option<&str>) -> Option<&Attached<'r>> {
        let is_own = |service: &Service| client == Some(&*service.name.namespace);
        let is_seen = |service: &Service| match client {
            Some(namespace) => service.audience.includes(namespace),
            None => service.audience == Audience::Everyone,
        };
        let mut seen = self.0.iter().filter(|(service, _)| is_seen(service));
        // Who sees none is refused its rules with each request.
        let found = seen.clone().find(|(service, _)| is_own(service)).or_else(|| seen.next());
        found.or(self.0.first()).map(|(_, attached)| attached)
    }

    /// Namespaces whose clients may mean another service than others do.
    fn sides(&self) -> BTreeSet<Arc<str>> {
        if self.0.len() < 2 {
            return BTreeSet::new();
        }
        let named = |service: &Service| match &service.audience {
            Audience::Everyone => BTreeSet::new(),
            Audience::Only(namespaces) => namespaces.iter().cloned().collect(),
        };
        let of = |(service, _): &(&Service, _)| {
            let mut all: BTreeSet<Arc<str>> = named(service);
            all.insert(Arc::clone(&service.name.namespace));
            all
        };
        self.0.iter().flat_map(of).collect()
    }

    /// Namespaces whose clients may see other HTTP routes than others do: those with routes of their own for services of another
    /// (consumer routes, S114), and those that may mean another service.
    pub(super) fn http_namespaces(&self) -> BTreeSet<Arc<str>> {
        let consumers = self.0.iter().flat_map(|(_, attached)| attached.consumers(&attached.http));
        consumers.chain(self.sides()).collect()
    }

    /// The same for TLS and TCP.
    pub(super) fn stream_namespaces(&self) -> BTreeSet<Arc<str>> {
        let consumers = self.0.iter().flat_map(|(_, attached)| attached.consumers(&attached.streams));
        consumers.chain(self.sides()).collect()
    }

    /// The HTTP routes that count for clients of a namespace; `None` when there are none.
    pub(super) fn http_for(&self, client: Option<&str>) -> Option<Counting<'r>> {
        let attached = self.meant_by(client)?;
        attached.counting(&attached.http, client)
    }

    /// The same for TLS and TCP.
    pub(super) fn streams_for(&self, client: Option<&str>) -> Option<Counting<'r>> {
        let attached = self.meant_by(client)?;
        attached.counting(&attached.streams, client)
    }
}

/// The routes of one service port.
struct Attached<'r> {
    service_namespace: &'r str,
    http: Vec<&'r Route<'r>>,
    streams: Vec<&'r Route<'r>>,
}

/// The routes that count for some clients.
pub(super) struct Counting<'r> {
    service_namespace: &'r str,
    routes: Vec<&'r Route<'r>>,
}

impl Counting<'_> {
    /// What tells them from others while one compilation lasts.
    pub(super) fn identity(&self) -> Vec<usize> {
        self.routes.iter().map(|route| std::ptr::from_ref(*route) as usize).collect()
    }

    /// Says of a VirtualService that it has no effect where these count.
    pub(super) fn replace(
        &self,
        cx: &Context<'_>,
        virtual_service: &Key,
        host: &str,
        port: u16,
    ) -> Option<SourceError> {
        let first = self.routes.first()?.key();
        let message =
            format!("hold {host}, to whose port {port} {first} is attached: this one has no effect there");
        cx.warning(virtual_service, "spec.hosts", message)
    }
}

impl<'r> Attached<'r> {
    fn consumers(&self, routes: &[&Route<'_>]) -> BTreeSet<Arc<str>> {
        let namespaces = routes.iter().map(|route| &route.name.namespace);
        namespaces.filter(|namespace| ***namespace != *self.service_namespace).cloned().collect()
    }

    /// The client's own routes replace those of the service's namespace (S114).
    fn counting(&self, all: &[&'r Route<'r>], client: Option<&str>) -> Option<Counting<'r>> {
        let of = |namespace: &str| -> Vec<&'r Route<'r>> {
            all.iter().filter(|route| &*route.name.namespace == namespace).copied().collect()
        };
        let mut routes = client.map(of).unwrap_or_default();
        if routes.is_empty() {
            routes = of(self.service_namespace);
        }
        let service_namespace = self.service_namespace;
        (!routes.is_empty()).then_some(Counting { service_namespace, routes })
    }
}

/// The table that routes make of a service port: rules of all of them by precedence, 404 for the rest (S115).
pub(super) fn http_table(cx: &Context<'_>, counting: &Counting<'_>, port: u16) -> HttpTable {
    let mut ranked: Vec<(Rank, HttpRule)> = Vec::new();
    for route in &counting.routes {
        let at = At { cx, route, service_namespace: counting.service_namespace, port };
        match route.spec {
            Spec::Http(spec) => {
                for (index, rule) in spec.rules.iter().enumerate() {
                    at.add(index, &rule.matches, &at.http_rule(rule), &mut ranked);
                }
            }
            Spec::Grpc(spec) => {
                for (index, rule) in spec.rules.iter().enumerate() {
                    let matches: Vec<HttpMatch> = rule.matches.iter().map(|one| one.http.clone()).collect();
                    at.add(index, &matches, &at.grpc_rule(rule), &mut ranked);
                }
            }
            Spec::Tls(_) | Spec::Tcp(_) => {}
        }
    }
    // Stable: of equals the order of routes and of their rules stays.
    ranked.sort_by_key(|(rank, _)| *rank);
    HttpTable::new(ranked.into_iter().map(|(_, rule)| rule).collect(), no_route())
}

/// A route at the port it is compiled for.
struct At<'r> {
    cx: &'r Context<'r>,
    route: &'r Route<'r>,
    service_namespace: &'r str,
    port: u16,
}

impl At<'_> {
    /// A rule of its own for each match: precedence is between matches, not between rules.
    fn add(&self, index: usize, matches: &[HttpMatch], rule: &HttpRule, ranked: &mut Vec<(Rank, HttpRule)>) {
        let key = self.route.key();
        if matches.is_empty() {
            let origin = self.cx.origin(&key, &format!("spec.rules[{index}]"));
            ranked.push((Rank::of(&HttpMatch::default()), HttpRule { origin, ..rule.clone() }));
        }
        for (at, one) in matches.iter().enumerate() {
            let origin = self.cx.origin(&key, &format!("spec.rules[{index}].matches[{at}]"));
            ranked.push((Rank::of(one), HttpRule { origin, matches: vec![one.clone()], ..rule.clone() }));
        }
    }

    fn http_rule(&self, rule: &HttpRouteRule) -> HttpRule {
        let action = match (&rule.unsupported, &rule.redirect) {
            (Some(filter), _) => broken(BROKEN, &format!("unsupported_filter: {filter}")),
            (None, Some(redirect)) => Action::Redirect(redirect.clone()),
            (None, None) => self.forward(&rule.backends, BROKEN),
        };
        let backend_timeout = rule.backend_timeout;
        // S35: the limit of a try is the rule's where no retry is written. So it is where there is but one try.
        let limit = backend_timeout.or(rule.timeout);
        let (timeout, retries) = match &rule.retry {
            None => (limit, self.cx.defaults.retries.clone()),
            Some(RouteRetry { attempts: Some(0), .. }) => (limit, None),
            Some(retry) => {
                let built_in = RetryPolicy::built_in();
                let mut policy = RetryPolicy {
                    attempts: retry.attempts.unwrap_or(built_in.attempts),
                    per_try_timeout: backend_timeout,
                    // What is written is the least, and about what the first takes.
                    backoff: retry.backoff.map_or(built_in.backoff, |least| least / BACKOFF_JITTER),
                    backoff_min: retry.backoff.unwrap_or_default(),
                    ..built_in
                };
                policy.on.statuses.clone_from(&retry.codes);
                policy.on.try_timeout = backend_timeout.is_some();
                // GEP-1731 wants it of whoever writes `retry`; what has been sent is kept for it within limits.
                policy.on.reset = true;
                (rule.timeout, Some(policy))
            }
        };
        HttpRule {
            name: rule.name.clone(),
            timeout,
            retries,
            mirrors: self.mirrors(&rule.mirrors, BROKEN),
            cors: rule.cors.clone(),
            request_headers: rule.request_headers.clone(),
            response_headers: rule.response_headers.clone(),
            rewrite: rule.rewrite.clone(),
            ..self.bare(action)
        }
    }

    fn grpc_rule(&self, rule: &GrpcRouteRule) -> HttpRule {
        let action = match &rule.unsupported {
            Some(filter) => broken(BROKEN_GRPC, &format!("unsupported_filter: {filter}")),
            None => self.forward(&rule.backends, BROKEN_GRPC),
        };
        HttpRule {
            name: rule.name.clone(),
            retries: self.cx.defaults.retries.clone(),
            mirrors: self.mirrors(&rule.mirrors, BROKEN_GRPC),
            request_headers: rule.request_headers.clone(),
            response_headers: rule.response_headers.clone(),
            ..self.bare(action)
        }
    }

    /// A rule that does only this.
    fn bare(&self, action: Action) -> HttpRule {
        HttpRule::new(self.cx.origin(&self.route.key(), "spec.rules"), action)
    }

    fn forward(&self, backends: &[RouteBackend], status: u16) -> Action {
        let backends = self.backends(backends, status);
        if backends.is_empty() { broken(status, "no_backend") } else { Action::Forward(backends) }
    }

    fn backends(&self, backends: &[RouteBackend], status: u16) -> Vec<WeightedBackend> {
        let with_share = backends.iter().filter(|backend| backend.weight > 0);
        with_share
            .map(|one| WeightedBackend {
                weight: one.weight,
                backend: match &one.unsupported {
                    Some(filter) => {
                        Backend::Broken { status, reason: format!("unsupported_filter: {filter}").into() }
                    }
                    None => self.backend(&one.backend, status),
                },
                request_headers: one.request_headers.clone(),
                response_headers: one.response_headers.clone(),
            })
            .collect()
    }

    fn mirrors(&self, mirrors: &[RouteMirror], status: u16) -> Vec<Mirror> {
        let mirrors = mirrors.iter().filter(|mirror| mirror.share.0 > 0);
        mirrors.map(|one| Mirror { backend: self.backend(&one.backend, status), share: one.share }).collect()
    }

    /// The cluster of a backend; one that does not exist or may not be referred to is an answer (S115, S116).
    fn backend(&self, backend: &BackendRef, status: u16) -> Backend {
        let broken = |reason: String| Backend::Broken { status, reason: reason.into() };
        let registry = self.cx.registry;
        let service = match &backend.kind {
            BackendKind::Other(kind) => return broken(format!("InvalidKind: {kind}")),
            BackendKind::Service if !self.may_refer(backend) => {
                return broken(format!("RefNotPermitted: {}", backend.name));
            }
            BackendKind::ServiceEntry if !self.may_refer(backend) => {
                return broken(format!("RefNotPermitted: {}", backend.name));
            }
            BackendKind::Service => registry.named(&backend.name),
            BackendKind::ServiceEntry => {
                services_of_entry(self.cx.index, &backend.name).first().and_then(|name| registry.named(name))
            }
            // What a host name means is not of a namespace: who sees the service may send requests to it.
            BackendKind::Hostname => registry.at(&backend.name.name, &self.route.name.namespace),
        };
        let Some(service) = service else { return broken(format!("BackendNotFound: {}", backend.name)) };
        match registry::port(service, backend.port, self.port) {
            Some(port) => Backend::Cluster(ClusterKey { service: service.name.clone(), port, subset: None }),
            None => {
                let port = backend.port.unwrap_or(self.port);
                broken(format!("BackendNotFound: {} has no TCP port {port}", backend.name))
            }
        }
    }

    /// Whether the route may name a backend: one of its own namespace, one of the namespace of the service it is attached to (its
    /// clients reach that anyway), or one that a ReferenceGrant lets it.
    fn may_refer(&self, backend: &BackendRef) -> bool {
        let own = &*self.route.name.namespace;
        let of = &*backend.name.namespace;
        let (kind, index) = (self.route.kind(), self.cx.index);
        of == own
            || (of == self.service_namespace && own != of)
            || index.each(Kind::ReferenceGrant).any(|(_, resource)| match resource {
                Resource::ReferenceGrant(grant) => ReferenceGrant::allows(grant, kind.as_str(), own, backend),
                _ => false,
            })
    }
}

fn broken(status: u16, reason: &str) -> Action {
    Action::Respond { status, body: Arc::default(), reason: reason.into() }
}

/// The table that TLSRoutes and TCPRoutes make of a service port. Of several TCPRoutes the oldest counts, of several rules the first:
/// nothing tells their connections apart.
pub(super) fn stream_table(cx: &Context<'_>, counting: &Counting<'_>, port: u16) -> StreamTable {
    let mut tls = Vec::new();
    let mut tcp = Vec::new();
    for route in &counting.routes {
        let at = At { cx, route, service_namespace: counting.service_namespace, port };
        match route.spec {
            Spec::Tls(spec) => {
                let Some(rule) = at.stream_rule(spec) else { continue };
                if spec.hostnames.is_empty() {
                    tls.push((None, rule));
                } else {
                    tls.extend(spec.hostnames.iter().map(|host| {
                        let one = StreamMatch { sni: vec![Arc::clone(host)], ..StreamMatch::default() };
                        (Some(host), StreamRule { matches: vec![one], ..rule.clone() })
                    }));
                }
            }
            Spec::Tcp(spec) if tcp.is_empty() => tcp.extend(at.stream_rule(spec)),
            Spec::Tcp(_) | Spec::Http(_) | Spec::Grpc(_) => {}
        }
    }
    // Names before wildcards, longer ones first, those for any name last. Stable: of equals the oldest.
    tls.sort_by_key(|(host, _)| match host {
        Some(host) => (0, host.starts_with('*'), Reverse(host.len())),
        None => (1, false, Reverse(0)),
    });
    StreamTable { tls: tls.into_iter().map(|(_, rule)| rule).collect(), tcp }
}

impl At<'_> {
    fn stream_rule(&self, spec: &StreamRoute) -> Option<StreamRule> {
        let rule = spec.rules.first()?;
        let mut backends = self.backends(&rule.backends, BROKEN);
        if backends.is_empty() {
            backends.push(WeightedBackend {
                weight: 1,
                backend: Backend::Broken { status: BROKEN, reason: "no_backend".into() },
                request_headers: HeaderOps::default(),
                response_headers: HeaderOps::default(),
            });
        }
        let origin = self.cx.origin(&self.route.key(), "spec.rules[0]");
        Some(StreamRule { origin, matches: Vec::new(), backends })
    }
}
