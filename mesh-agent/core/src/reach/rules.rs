//! What rules and names say about who needs a service that not everybody sees.
//!
//! A client that does not see a service is answered by its names all the same in some places: a service of Kubernetes has its name
//! whoever sees it, so that no wildcard takes it, and rules for its host are kept from those who do not see it. Where that could make
//! a difference the service has to be known.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    route::{
        Routes,
        http::{Action, Backend},
        lookup::suffixes,
        scope::{Scoped, SidecarScope},
    },
    snapshot::{Name, Service, Snapshot},
};

/// The clients that something is given to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Given {
    /// All.
    Everyone,
    /// Those of these namespaces.
    To(BTreeSet<Arc<str>>),
}

impl Given {
    fn of<T>(scoped: &Scoped<T>) -> Self {
        match scoped.default {
            Some(_) => Self::Everyone,
            None => Self::To(scoped.by_namespace.keys().cloned().collect()),
        }
    }

    fn join(&mut self, other: &Self) {
        match (&mut *self, other) {
            (Self::To(own), Self::To(more)) => own.extend(more.iter().cloned()),
            (Self::Everyone | Self::To(_), _) => *self = Self::Everyone,
        }
    }
}

/// Something by host, and by what follows the `*` of a wildcard.
#[derive(Debug, PartialEq, Eq)]
struct Hosts<T> {
    exact: BTreeMap<Arc<str>, T>,
    wild: BTreeMap<Arc<str>, T>,
    /// Some wildcard begins within a label.
    has_partial: bool,
}

impl<T> Default for Hosts<T> {
    fn default() -> Self {
        Self { exact: BTreeMap::new(), wild: BTreeMap::new(), has_partial: false }
    }
}

impl<T> Hosts<T> {
    fn entry(&mut self, host: &Arc<str>, value: T, join: impl FnOnce(&mut T, T)) {
        let (map, key) = match host.strip_prefix('*') {
            Some(suffix) => {
                self.has_partial |= !suffix.is_empty() && !suffix.starts_with('.');
                (&mut self.wild, suffix.into())
            }
            None => (&mut self.exact, Arc::clone(host)),
        };
        match map.get_mut(&key) {
            Some(known) => join(known, value),
            None => drop(map.insert(key, value)),
        }
    }

    /// All that is for a host, by its name or by wildcards.
    fn covering<'a>(&'a self, host: &'a str) -> impl Iterator<Item = &'a T> {
        let wild = suffixes(host, self.has_partial).chain([""]).filter_map(|suffix| self.wild.get(suffix));
        self.exact.get(host).into_iter().chain(wild)
    }

    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.wild.is_empty()
    }
}

/// What a snapshot's rules and names say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Rules {
    /// Hosts with HTTP tables, and who is given one.
    ruled: Hosts<Given>,
    /// Hosts of ServiceEntries.
    declared: Hosts<()>,
    /// Services that some rule leads to: rules bring their destinations with them, past any Sidecar (S66).
    led_to: BTreeSet<Name>,
    sidecars: BTreeMap<Name, Arc<SidecarScope>>,
}

impl Rules {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        let routes = snapshot.routes();
        let mut ruled = Hosts::default();
        for (at, tables) in &routes.http {
            ruled.entry(&at.host, Given::of(tables), |known: &mut Given, more| known.join(&more));
        }
        let mut declared = Hosts::default();
        for host in snapshot.services().filter_map(|service| service.hostname.as_ref()) {
            declared.entry(host, (), |(), ()| {});
        }
        // Without Sidecars it is exportTo alone that counts, and rules lead nobody past that.
        let led_to = if routes.sidecars.is_empty() { BTreeSet::new() } else { destinations(routes) };
        Self { ruled, declared, led_to, sidecars: routes.sidecars.clone() }
    }

    /// Sidecars that leave a service out.
    pub(super) fn blind(&self, snapshot: &Snapshot, service: &Service) -> BTreeSet<Name> {
        if self.sidecars.is_empty() || self.led_to.contains(&service.name) {
            return BTreeSet::new();
        }
        let host = snapshot.host_of(service);
        let blind = self.sidecars.iter().filter(|(_, scope)| !scope.sees_some(service, &host));
        blind.map(|(name, _)| name.clone()).collect()
    }

    /// Clients who would be answered otherwise if the service were not known, though they may not see it.
    pub(super) fn given_for(&self, snapshot: &Snapshot, service: &Service) -> Given {
        let mut given = Given::To(BTreeSet::new());
        if self.ruled.is_empty() && self.declared.is_empty() {
            return given;
        }
        let host = snapshot.host_of(service).into_owned();
        let mut names: Vec<String> = service.frontend_addrs().map(|addr| addr.to_string()).collect();
        names.extend(service.frontend_addrs().filter(|addr| addr.is_ipv6()).map(|addr| format!("[{addr}]")));
        if service.hostname.is_none() {
            let Name { namespace, name } = &service.name;
            names.extend([
                name.to_string(),
                format!("{name}.{namespace}"),
                format!("{name}.{namespace}.svc"),
                host.clone(),
            ]);
        }
        if names.iter().any(|name| self.declared.covering(name).next().is_some()) {
            return Given::Everyone;
        }
        names.push(host);
        for ruled in names.iter().flat_map(|name| self.ruled.covering(name)) {
            given.join(ruled);
        }
        given
    }
}

/// Every service that a rule may lead somebody to.
fn destinations(routes: &Routes) -> BTreeSet<Name> {
    let mut services = BTreeSet::new();
    let mut add = |backend: &Backend| match backend {
        Backend::Cluster(key) => drop(services.insert(key.service.clone())),
        Backend::Broken { .. } => {}
    };
    for table in routes.http.values().flat_map(Scoped::values) {
        let actions = table.rules.iter().map(|rule| &rule.action).chain([&table.unmatched]);
        actions.filter_map(Action::backends).flatten().for_each(|weighted| add(&weighted.backend));
        table.rules.iter().flat_map(|rule| &rule.mirrors).for_each(|mirror| add(&mirror.backend));
    }
    for table in routes.streams.values().flat_map(Scoped::values) {
        for rule in table.tls.iter().chain(&table.tcp) {
            rule.backends.iter().for_each(|weighted| add(&weighted.backend));
        }
    }
    for proxy in routes.sidecars.values().filter_map(|sidecar| sidecar.egress_proxy.as_ref()) {
        add(&proxy.backend);
    }
    services
}
