//! What becomes of a resource, as its users are told: pure, from the index and the snapshot it was compiled to.

use std::{net::IpAddr, sync::Arc};

use mesh_core::snapshot::{Name, Snapshot};

use crate::{
    index::Index,
    problem::{Level, Problem, SourceError},
    resource::{
        BackendKind, BackendRef, Key, Kind, ParentKind, ParentRef, Resource, RouteBackend, ServiceEntry,
    },
};

/// What became of a resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// What is wrong with it, by itself and beside others.
    pub problems: Vec<Problem>,
    /// What rules of Istio's kinds refer to and is not there; for routes of the Gateway API their parents say it.
    pub missing: Vec<Problem>,
    /// Something of it is in force: what it says now, or what it said when it could last be used.
    pub in_force: bool,
    /// One for each of a route's parents that were read, in order.
    pub parents: Vec<ParentVerdict>,
    /// Addresses that the hosts of a ServiceEntry were given.
    pub addresses: Vec<(Arc<str>, IpAddr)>,
}

impl Verdict {
    /// Whether what it says now cannot be used.
    pub fn is_refused(&self) -> bool {
        self.problems.iter().any(|problem| problem.level == Level::Error)
    }
}

/// What became of a route at one of its parents.
#[derive(Clone, Debug, PartialEq)]
pub struct ParentVerdict {
    /// The parent.
    pub parent: ParentRef,
    /// Why it is not accepted there: reason and message.
    pub not_accepted: Option<(&'static str, String)>,
    /// Which reference leads nowhere: reason and message.
    pub unresolved: Option<(&'static str, String)>,
    /// What of it is not carried out.
    pub partial: Option<String>,
}

/// What is wrong with a resource beside others.
#[derive(Debug, Default)]
pub(super) struct Beside<'a> {
    /// As the compiler found it.
    pub(super) compiled: Vec<&'a SourceError>,
    /// What it refers to and is not there.
    pub(super) missing: Vec<&'a SourceError>,
}

/// Judges a resource. `own` is what is wrong with it by itself.
pub(super) fn judge(
    key: &Key,
    own: &[Problem],
    beside: Option<&Beside<'_>>,
    index: &Index,
    snapshot: &Snapshot,
) -> Verdict {
    // What is wrong beside others takes nothing out of force.
    let warning = |error: &&SourceError| Problem {
        level: Level::Warning,
        field: error.field.clone(),
        message: error.message.clone(),
    };
    let mut problems = own.to_vec();
    problems.extend(beside.into_iter().flat_map(|beside| &beside.compiled).map(warning));
    let missing = beside.into_iter().flat_map(|beside| &beside.missing).map(warning).collect();
    let resource = index.get(key);
    let (mut parents, mut addresses) = (Vec::new(), Vec::new());
    match resource {
        Some(Resource::ServiceEntry(entry)) => addresses = given(entry, snapshot),
        Some(resource) => {
            if let Some(route) = Route::of(resource) {
                parents = route.parents.iter().map(|parent| route.at(parent, key, index)).collect();
            }
        }
        None => {}
    }
    Verdict { problems, missing, in_force: resource.is_some(), parents, addresses }
}

/// The addresses that hosts were given because nobody wrote any down.
fn given(entry: &ServiceEntry, snapshot: &Snapshot) -> Vec<(Arc<str>, IpAddr)> {
    if !entry.addresses.is_empty() || !entry.auto_allocate {
        return Vec::new();
    }
    let of = |host: &Arc<str>| {
        let service = snapshot.service(&Name::new(Arc::clone(&entry.name.namespace), Arc::clone(host)));
        let vips = service.map(|service| service.vips.clone()).unwrap_or_default();
        vips.into_iter().map(|vip| (Arc::clone(host), vip)).collect::<Vec<_>>()
    };
    entry.hosts.iter().flat_map(of).collect()
}

/// What routes of all kinds have in common.
struct Route<'a> {
    parents: &'a [ParentRef],
    backends: Vec<&'a BackendRef>,
    unsupported: Option<&'a str>,
}

impl<'a> Route<'a> {
    fn of(resource: &'a Resource) -> Option<Self> {
        let mut route = Route { parents: &[], backends: Vec::new(), unsupported: None };
        match resource {
            Resource::HttpRoute(http) => {
                route.parents = &http.parents;
                for rule in &http.rules {
                    route.add(&rule.backends, rule.unsupported.as_deref());
                    route.backends.extend(rule.mirrors.iter().map(|mirror| &mirror.backend));
                }
            }
            Resource::GrpcRoute(grpc) => {
                route.parents = &grpc.parents;
                for rule in &grpc.rules {
                    route.add(&rule.backends, rule.unsupported.as_deref());
                    route.backends.extend(rule.mirrors.iter().map(|mirror| &mirror.backend));
                }
            }
            Resource::TlsRoute(stream) | Resource::TcpRoute(stream) => {
                route.parents = &stream.parents;
                for rule in &stream.rules {
                    route.add(&rule.backends, None);
                }
            }
            _ => return None,
        }
        Some(route)
    }

    fn add(&mut self, backends: &'a [RouteBackend], unsupported: Option<&'a str>) {
        let of_backends = backends.iter().find_map(|backend| backend.unsupported.as_deref());
        self.unsupported = self.unsupported.or(unsupported).or(of_backends);
        self.backends.extend(backends.iter().map(|backend| &backend.backend));
    }

    fn at(&self, parent: &ParentRef, key: &Key, index: &Index) -> ParentVerdict {
        // What asks for a grant is said first (S116).
        let refused = self.backends.iter().find_map(|backend| not_permitted(backend, parent, key, index));
        let unresolved =
            refused.or_else(|| self.backends.iter().find_map(|backend| not_found(backend, index)));
        let partial = self
            .unsupported
            .map(|what| format!("the mesh does not carry out {what}; such requests are answered with 500"));
        ParentVerdict {
            parent: parent.clone(),
            not_accepted: not_accepted(parent, index),
            unresolved,
            partial,
        }
    }
}

fn not_accepted(parent: &ParentRef, index: &Index) -> Option<(&'static str, String)> {
    let no_match = |message: String| Some(("NoMatchingParent", message));
    let name = &parent.name;
    let (kind, ports) = match parent.kind {
        ParentKind::Service => (Kind::Service, ports(Kind::Service, name, index)),
        ParentKind::ServiceEntry => (Kind::ServiceEntry, ports(Kind::ServiceEntry, name, index)),
        // Somebody else's to judge.
        ParentKind::Gateway | ParentKind::Other(_) => return None,
    };
    let Some(ports) = ports else { return no_match(format!("{kind} {name} does not exist")) };
    if let Some(port) = parent.port
        && !ports.iter().any(|(number, _)| *number == port)
    {
        return no_match(format!("{kind} {name} has no port {port}"));
    }
    if let Some(section) = &parent.section
        && !ports.iter().any(|(_, name)| name == section)
    {
        return no_match(format!("{kind} {name} has no port called {section:?}"));
    }
    None
}

/// Ports of a Service or ServiceEntry with their names; `None` if there is none of that name.
fn ports(kind: Kind, name: &Name, index: &Index) -> Option<Vec<(u16, Arc<str>)>> {
    match index.get(&Key { kind, name: name.clone() })? {
        Resource::Service(service) => {
            Some(service.service.ports.iter().map(|port| (port.port, Arc::clone(&port.name))).collect())
        }
        Resource::ServiceEntry(entry) => {
            Some(entry.ports.iter().map(|port| (port.number, Arc::clone(&port.name))).collect())
        }
        _ => None,
    }
}

/// As the compiler has it: a backend of the route's own namespace, of its parent's, or one that a grant lets it name.
fn not_permitted(
    backend: &BackendRef,
    parent: &ParentRef,
    key: &Key,
    index: &Index,
) -> Option<(&'static str, String)> {
    let (own, of) = (&*key.name.namespace, &*backend.name.namespace);
    let is_named = matches!(backend.kind, BackendKind::Service | BackendKind::ServiceEntry);
    if !is_named || of == own || of == &*parent.name.namespace {
        return None;
    }
    let is_granted = index.each(Kind::ReferenceGrant).any(|(_, resource)| match resource {
        Resource::ReferenceGrant(grant) => grant.allows(key.kind.as_str(), own, backend),
        _ => false,
    });
    let (_, kind) = backend.group_kind();
    (!is_granted).then(|| {
        let message = format!(
            "{kind} {} is of another namespace, and no ReferenceGrant there lets {}s of {own} refer to it",
            backend.name, key.kind
        );
        ("RefNotPermitted", message)
    })
}

fn not_found(backend: &BackendRef, index: &Index) -> Option<(&'static str, String)> {
    let kind = match &backend.kind {
        BackendKind::Service => Kind::Service,
        BackendKind::ServiceEntry => Kind::ServiceEntry,
        // Which service has a host name depends on who asks.
        BackendKind::Hostname => return None,
        BackendKind::Other(kind) => {
            let message = format!("{} is no kind that requests can be sent to", kind.trim_start_matches('/'));
            return Some(("InvalidKind", message));
        }
    };
    let name = &backend.name;
    let Some(ports) = ports(kind, name, index) else {
        return Some(("BackendNotFound", format!("{kind} {name} does not exist")));
    };
    let port = backend.port.filter(|port| !ports.iter().any(|(number, _)| number == port))?;
    Some(("BackendNotFound", format!("{kind} {name} has no port {port}")))
}
