//! Which hosts a resource has a part in: what is compiled again when it changes.
//!
//! Invariant: a resource that changes, comes or goes changes the tables of the hosts that it reaches before or after, and of no
//! other. What services look like to rules, and what the mesh says, are not resources here: with them everything changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::snapshot::Name;

use super::{
    gateway_api::{Route, services_of_entry},
    registry::Registry,
    virtual_service::full,
};
use crate::{
    index::Index,
    resource::{HttpAction, Key, Kind, ParentKind, Resource, is_within},
};

/// What one resource reaches.
#[derive(Debug, Default)]
struct Reach {
    /// Full names and patterns.
    hosts: Vec<Arc<str>>,
    /// Services that it is attached to.
    services: Vec<Name>,
    /// VirtualServices whose rules become its own.
    delegates: Vec<Name>,
}

impl Reach {
    fn of(index: &Index, domain: &str, resource: &Resource) -> Self {
        match resource {
            Resource::VirtualService(rules) if rules.is_for_mesh() => {
                let delegate = |action: &HttpAction| match action {
                    HttpAction::Delegate(name) => Some(name.clone()),
                    _ => None,
                };
                Self {
                    hosts: rules.hosts.iter().map(|host| full(host.full(domain))).collect(),
                    delegates: rules.http.iter().filter_map(|rule| delegate(&rule.action)).collect(),
                    services: Vec::new(),
                }
            }
            Resource::DestinationRule(rule) => {
                Self { hosts: vec![full(rule.host.full(domain))], ..Self::default() }
            }
            other => {
                let parents = Route::of(other).map(|route| route.parents).unwrap_or_default();
                let services = parents.iter().flat_map(|parent| match parent.kind {
                    ParentKind::Service => vec![parent.name.clone()],
                    ParentKind::ServiceEntry => services_of_entry(index, &parent.name),
                    ParentKind::Gateway | ParentKind::Other(_) => Vec::new(),
                });
                Self { services: services.collect(), ..Self::default() }
            }
        }
    }
}

/// What all resources reach, as of the last compilation.
#[derive(Debug, Default)]
pub(super) struct Reaches(BTreeMap<Key, Reach>);

impl Reaches {
    /// Takes in what changed since the last call, and says whose tables are others now.
    pub(super) fn follow(
        &mut self,
        index: &Index,
        registry: &Registry,
        domain: &str,
        changes: &BTreeSet<Key>,
    ) -> Affected {
        let mut reached: Vec<Reach> = Vec::new();
        let mut affected = Affected::default();
        for key in changes {
            match key.kind {
                // Scopes of clients are no part of tables.
                Kind::Sidecar => {}
                // What routes may name, and what they are attached to by another name.
                Kind::ReferenceGrant | Kind::ServiceEntry => {
                    let attaches =
                        |key: &Key| !matches!(key.kind, Kind::VirtualService | Kind::DestinationRule);
                    for (key, reach) in self.0.iter_mut().filter(|(key, _)| attaches(key)) {
                        affected.add(reach, registry);
                        if let Some(now) = index.get(key) {
                            *reach = Reach::of(index, domain, now);
                            affected.add(reach, registry);
                        }
                    }
                }
                _ if key.kind.is_of_routes() => {
                    reached.extend(self.0.remove(key));
                    if let Some(resource) = index.get(key) {
                        let reach = Reach::of(index, domain, resource);
                        affected.add(&reach, registry);
                        self.0.insert(key.clone(), reach);
                    }
                    if key.kind == Kind::VirtualService {
                        let is_root = |reach: &&Reach| reach.delegates.contains(&key.name);
                        self.0.values().filter(is_root).for_each(|root| affected.add(root, registry));
                    }
                }
                _ => {}
            }
        }
        reached.iter().for_each(|before| affected.add(before, registry));
        affected
    }
}

/// Hosts whose tables are to be compiled.
#[derive(Debug, Default)]
pub(super) struct Affected {
    names: BTreeSet<Arc<str>>,
    patterns: BTreeSet<Arc<str>>,
}

impl Affected {
    fn add(&mut self, reach: &Reach, registry: &Registry) {
        for host in &reach.hosts {
            // A pattern is a host too: requests to hosts that nobody knows are looked up by it.
            self.names.insert(Arc::clone(host));
            if host.starts_with('*') {
                self.patterns.insert(Arc::clone(host));
            }
        }
        self.names.extend(reach.services.iter().filter_map(|name| registry.host_of(name)));
    }

    /// The hosts, and the patterns that cover further ones.
    pub(super) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names.iter()
    }

    /// Whether there are patterns among them.
    pub(super) fn has_patterns(&self) -> bool {
        !self.patterns.is_empty()
    }

    /// Whether nothing is to be done.
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether the tables of a host, or of a pattern, may be others.
    pub(super) fn has(&self, host: &str) -> bool {
        self.names.contains(host) || self.patterns.iter().any(|pattern| is_within(host, pattern))
    }

    /// Adds other names of what is affected already.
    pub(super) fn add_names(&mut self, names: impl Iterator<Item = Arc<str>>) {
        self.names.extend(names);
    }
}
