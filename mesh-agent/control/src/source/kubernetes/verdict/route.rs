//! What becomes of a route of the Gateway API at each of its parents (S116).
//!
//! Invariant: where a reference leads is asked of what the compiler asks, so that the status never says another thing than requests meet.

use std::sync::Arc;

use mesh_core::snapshot::{Protocol, Service, ServicePort};

use super::{Around, ParentVerdict, Refusal};
use crate::{
    compile::{port_meant, services_of_entry},
    problem::joined,
    resource::{
        BackendKind, BackendRef, Key, Kind, ParentKind, ParentRef, Resource, RouteBackend, UnsupportedFilter,
        attached,
    },
};

/// Longest text about what is not carried out, in bytes.
const UNSUPPORTED_BYTES_MAX: usize = 900;

/// What routes of all kinds have in common.
pub(super) struct Route<'a> {
    key: &'a Key,
    parents: &'a [ParentRef],
    backends: Vec<&'a BackendRef>,
    rules: usize,
    /// Rules of which nothing is carried out.
    unusable: usize,
    /// Filters that are not carried out, each with where it stands.
    unsupported: Vec<(String, &'a UnsupportedFilter)>,
}

impl<'a> Route<'a> {
    pub(super) fn of(key: &'a Key, resource: &'a Resource) -> Option<Self> {
        let of = |parents| Self {
            key,
            parents,
            backends: Vec::new(),
            rules: 0,
            unusable: 0,
            unsupported: Vec::new(),
        };
        let route = match resource {
            Resource::HttpRoute(http) => {
                let mut route = of(&http.parents);
                for rule in &http.rules {
                    route.add(&rule.backends, rule.unsupported.as_ref());
                    route.backends.extend(rule.mirrors.iter().map(|mirror| &mirror.backend));
                }
                route
            }
            Resource::GrpcRoute(grpc) => {
                let mut route = of(&grpc.parents);
                for rule in &grpc.rules {
                    route.add(&rule.backends, rule.unsupported.as_ref());
                    route.backends.extend(rule.mirrors.iter().map(|mirror| &mirror.backend));
                }
                route
            }
            Resource::TlsRoute(stream) | Resource::TcpRoute(stream) => {
                let mut route = of(&stream.parents);
                for rule in &stream.rules {
                    route.add(&rule.backends, None);
                }
                route
            }
            _ => return None,
        };
        Some(route)
    }

    /// Adds the next rule.
    fn add(&mut self, backends: &'a [RouteBackend], unsupported: Option<&'a UnsupportedFilter>) {
        let field = format!("spec.rules[{}]", self.rules);
        self.rules += 1;
        let mut with_share = backends.iter().filter(|backend| backend.weight > 0).peekable();
        let is_unusable = unsupported.is_some()
            || (with_share.peek().is_some() && with_share.all(|backend| backend.unsupported.is_some()));
        self.unusable += usize::from(is_unusable);
        self.unsupported.extend(unsupported.map(|filter| (field.clone(), filter)));
        let of_backends = backends.iter().enumerate().filter_map(|(at, backend)| {
            Some((format!("{field}.backendRefs[{at}]"), backend.unsupported.as_ref()?))
        });
        self.unsupported.extend(of_backends);
        self.backends.extend(backends.iter().map(|backend| &backend.backend));
    }

    pub(super) fn parents(&self) -> &'a [ParentRef] {
        self.parents
    }

    pub(super) fn at(&self, parent: &ParentRef, around: &Around<'_>) -> ParentVerdict {
        let mut verdict =
            ParentVerdict { parent: parent.clone(), not_accepted: None, unresolved: None, partial: None };
        let kind = match parent.kind {
            ParentKind::Service => Kind::Service,
            ParentKind::ServiceEntry => Kind::ServiceEntry,
            // Somebody else's to judge.
            ParentKind::Gateway | ParentKind::Other(_) => return verdict,
        };
        let ports = self.attached(parent, kind, around);
        // What asks for a grant is said first: what is there is told to those alone who may refer to it.
        let refused = self.backends.iter().find_map(|backend| self.not_permitted(backend, parent, around));
        let dialled = ports.as_deref().unwrap_or_default();
        let lost = || self.backends.iter().find_map(|backend| self.not_found(backend, dialled, around));
        verdict.unresolved = refused.or_else(lost).or_else(|| self.unknown_extension());
        match ports {
            Err(why) => verdict.not_accepted = Some(("NoMatchingParent", why)),
            Ok(_) if self.rules > 0 && self.unusable == self.rules => {
                verdict.not_accepted = self.not_carried_out().map(|what| ("UnsupportedValue", what));
            }
            Ok(_) => verdict.partial = self.not_carried_out(),
        }
        verdict
    }

    /// The ports of a parent that the route is in force at, or why there are none.
    fn attached(&self, parent: &ParentRef, kind: Kind, around: &Around<'_>) -> Result<Vec<u16>, String> {
        let what = format!("{kind} {}", parent.name);
        let names = match around.index.get(&Key { kind, name: parent.name.clone() }) {
            Some(Resource::ServiceEntry(_)) => services_of_entry(around.index, &parent.name),
            Some(_) => vec![parent.name.clone()],
            None => return Err(format!("{what} does not exist")),
        };
        let services: Vec<&Arc<Service>> =
            names.iter().filter_map(|name| around.snapshot.service(name)).collect();
        if services.is_empty() {
            return Err(format!("{what} has no host but those of Services: attach the route to these"));
        }
        if let Some(meant) = services.iter().find_map(|service| around.services.alias_of(service)) {
            let of = if meant.hostname.is_none() { "Service" } else { "the host" };
            return Err(format!(
                "{what} is another name (ExternalName) of {of} {}: attach the route to that one",
                meant.name
            ));
        }
        let ports = services.iter().flat_map(|service| &service.ports);
        attached(self.key.kind, parent, ports).map_err(|why| format!("{what} {why}"))
    }

    /// As the compiler has it: a backend of the route's own namespace, of its parent's, or one that a grant lets it name.
    fn not_permitted(
        &self,
        backend: &BackendRef,
        parent: &ParentRef,
        around: &Around<'_>,
    ) -> Option<Refusal> {
        let (own, of) = (&*self.key.name.namespace, &*backend.name.namespace);
        let is_named = matches!(backend.kind, BackendKind::Service | BackendKind::ServiceEntry);
        if !is_named || of == own || of == &*parent.name.namespace {
            return None;
        }
        let route = self.key.kind.as_str();
        let is_granted = around.index.each(Kind::ReferenceGrant).any(|(_, resource)| match resource {
            Resource::ReferenceGrant(grant) => grant.allows(route, own, backend),
            _ => false,
        });
        let (_, kind) = backend.group_kind();
        (!is_granted).then(|| {
            let message = format!(
                "{kind} {} is of another namespace, and no ReferenceGrant there lets {route}s of {own} refer to it",
                backend.name
            );
            ("RefNotPermitted", message)
        })
    }

    /// Why a backend leads nowhere from one of the ports that the route is in force at.
    fn not_found(&self, backend: &BackendRef, dialled: &[u16], around: &Around<'_>) -> Option<Refusal> {
        let name = &backend.name;
        let (what, service) = match &backend.kind {
            BackendKind::Other(kind) => {
                let message =
                    format!("{} is no kind that requests can be sent to", kind.trim_start_matches('/'));
                return Some(("InvalidKind", message));
            }
            BackendKind::Service => (format!("Service {name}"), around.services.named(name)),
            BackendKind::ServiceEntry => {
                let first = services_of_entry(around.index, name).into_iter().next();
                let service = first.and_then(|host| around.services.named(&host));
                (format!("ServiceEntry {name}"), service)
            }
            BackendKind::Hostname => {
                let service = around.services.at(&name.name, &self.key.name.namespace);
                (format!("the host {}", name.name), service)
            }
        };
        let Some(service) = service else {
            let message = match backend.kind {
                BackendKind::Hostname => format!("no service has {what}"),
                _ => format!("{what} does not exist"),
            };
            return Some(("BackendNotFound", message));
        };
        let named = backend.port.as_slice();
        // Without a number it depends on what is dialled.
        let asked = if named.is_empty() { dialled } else { named };
        let wanted = *asked.iter().find(|asked| port_meant(service, backend.port, **asked).is_none())?;
        let is_udp = |port: &ServicePort| port.port == wanted && port.protocol == Protocol::Udp;
        Some(if service.ports.iter().any(is_udp) {
            let message = format!("port {wanted} of {what} is UDP, and {}s lead to TCP alone", self.key.kind);
            ("UnsupportedProtocol", message)
        } else {
            ("BackendNotFound", format!("{what} has no port {wanted}"))
        })
    }

    /// A reference to a kind of filter: the mesh has none of them.
    fn unknown_extension(&self) -> Option<Refusal> {
        let extension = |(_, filter): &(String, &'a UnsupportedFilter)| filter.extension.clone();
        let (field, kind) = self.unsupported.iter().find_map(|one| Some((&one.0, extension(one)?)))?;
        let kind = kind.trim_start_matches('/').to_owned();
        Some((
            "InvalidKind",
            format!("{field} refers to a {kind}, which is no kind of filter that the mesh has"),
        ))
    }

    /// The filters that the mesh does not have, and what that means for requests.
    fn not_carried_out(&self) -> Option<String> {
        let answer = if self.key.kind == Kind::GrpcRoute { "UNAVAILABLE" } else { "500" };
        let one = |(field, filter): &(String, &UnsupportedFilter)| {
            format!(
                "{field} has {filter}, which the mesh does not carry out there: its requests are answered with {answer}"
            )
        };
        let all: Vec<String> = self.unsupported.iter().map(one).collect();
        (!all.is_empty()).then(|| joined(&all, UNSUPPORTED_BYTES_MAX))
    }
}
