//! The services that rules can name, by host.
//!
//! Invariant: what is answered depends on the shapes of services alone (names, ports, aliases), never on their endpoints.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::snapshot::{Mesh, Name, Protocol, Service, ServicePort};

use super::reach::Affected;

/// Most aliases (`ExternalName`) that lead from one to the next.
const ALIASES_MAX: usize = 8;

/// The full name of a service, as tables have it.
fn host(service: &Service, domain: &str) -> Arc<str> {
    match &service.hostname {
        Some(host) => Arc::clone(host),
        None => service.host(domain).into(),
    }
}

/// The services.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    services: BTreeMap<Name, Arc<Service>>,
    /// Services of hosts that Kubernetes does not know, by precedence.
    order: Vec<Name>,
    /// Names of services by host, a Kubernetes service before others (S53), then by precedence (S57).
    by_host: BTreeMap<Arc<str>, Vec<Name>>,
    domain: Arc<str>,
}

impl Registry {
    /// Takes the services of now; returns whether anything that rules can see of them is another.
    pub(super) fn renew<'s>(
        &mut self,
        services: impl Iterator<Item = &'s Arc<Service>>,
        mesh: &Mesh,
    ) -> bool {
        let mut changed = mesh.cluster_domain != self.domain;
        let mut now: BTreeMap<Name, Arc<Service>> = BTreeMap::new();
        let mut order = Vec::with_capacity(self.order.len());
        for service in services {
            if service.hostname.is_some() {
                order.push(service.name.clone());
            }
            changed |= self.services.get(&service.name).is_none_or(|known| !is_alike(known, service));
            now.insert(service.name.clone(), Arc::clone(service));
        }
        changed |= now.len() != self.services.len() || order != self.order;
        self.order = order;
        self.services = now;
        if changed {
            self.domain = Arc::clone(&mesh.cluster_domain);
            self.by_host.clear();
            let own = self.services.values().filter(|service| service.hostname.is_none());
            let declared = self.order.iter().filter_map(|name| self.services.get(name));
            for service in own.chain(declared) {
                self.by_host.entry(host(service, &self.domain)).or_default().push(service.name.clone());
            }
        }
        changed
    }

    /// All services, by name.
    pub(super) fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// The full name of a service of these, as tables have it.
    pub(super) fn host(&self, service: &Service) -> Arc<str> {
        host(service, &self.domain)
    }

    /// The full name of a service by its name.
    pub(super) fn host_of(&self, name: &Name) -> Option<Arc<str>> {
        self.services.get(name).map(|service| self.host(service))
    }

    /// The services whose hosts are affected, by name.
    pub(super) fn services_of(&self, affected: &Affected) -> BTreeMap<&Name, &Arc<Service>> {
        let with_patterns =
            || self.by_host.iter().filter(|(host, _)| affected.has(host)).map(|(_, names)| names);
        let named = || affected.names().filter_map(|host| self.by_host.get(host));
        let names: Vec<&Name> = if affected.has_patterns() {
            with_patterns().flatten().collect()
        } else {
            named().flatten().collect()
        };
        names.into_iter().filter_map(|name| Some((name, self.services.get(name)?))).collect()
    }

    /// Services that are another name of one, which comes second.
    pub(super) fn aliases(&self) -> impl Iterator<Item = (&Arc<Service>, &Arc<Service>)> {
        self.services.values().filter_map(|service| Some((service, self.alias_of(service)?)))
    }

    /// The services that have a host, by precedence.
    pub(super) fn with_host(&self, host: &str) -> impl Iterator<Item = &Arc<Service>> {
        self.by_host.get(host).into_iter().flatten().filter_map(|name| self.services.get(name))
    }

    /// All hosts.
    pub(super) fn hosts(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_host.keys()
    }

    /// A service by name; of an alias, what it stands for.
    pub(crate) fn named(&self, name: &Name) -> Option<&Arc<Service>> {
        let service = self.services.get(name)?;
        Some(self.alias_of(service).unwrap_or(service))
    }

    /// The service that a rule of `namespace` means by a host; of an alias, what it stands for. One of the rule's own namespace
    /// comes first, then those that it sees (S57).
    pub(crate) fn at(&self, host: &str, namespace: &str) -> Option<&Arc<Service>> {
        let names = self.by_host.get(host.strip_suffix('.').unwrap_or(host))?;
        let is_own = |name: &&&Name| &*name.namespace == namespace;
        let is_seen = |name: &&Name| {
            self.services.get(*name).is_some_and(|service| service.audience.includes(namespace))
        };
        let mut seen = names.iter().filter(is_seen);
        // Whether a client sees what is left is asked for each of its requests.
        let found = seen.clone().find(|name| is_own(&name)).or_else(|| seen.next()).or(names.first());
        self.named(found?)
    }

    /// The service that an `ExternalName` stands for, if it is one of the mesh.
    pub(crate) fn alias_of(&self, service: &Service) -> Option<&Arc<Service>> {
        let mut target = service.external_name.as_ref()?;
        for _ in 0..ALIASES_MAX {
            let names = self.by_host.get(target)?;
            let found = self.services.get(names.first()?)?;
            match &found.external_name {
                Some(next) => target = next,
                None => return Some(found),
            }
        }
        None
    }
}

/// Whether rules can tell no difference.
fn is_alike(one: &Arc<Service>, other: &Arc<Service>) -> bool {
    let shape = |port: &ServicePort| (port.port, port.protocol, port.name.clone(), port.app_protocol.clone());
    Arc::ptr_eq(one, other)
        || (one.external_name == other.external_name
            && one.hostname == other.hostname
            && one.subject_alt_names == other.subject_alt_names
            && one.distribution == other.distribution
            && one.audience == other.audience
            && one.ports.len() == other.ports.len()
            && one.ports.iter().zip(&other.ports).all(|(a, b)| shape(a) == shape(b)))
}

/// The port that a rule means: the one it names, else the only one, else the one that was dialled (S16). `None` if the service
/// does not have it.
pub(crate) fn port(service: &Service, named: Option<u16>, dialled: u16) -> Option<u16> {
    let tcp = || service.ports.iter().filter(|port| port.protocol == Protocol::Tcp).map(|port| port.port);
    let wanted = match named {
        Some(port) => port,
        None => {
            let mut ports = tcp();
            match (ports.next(), ports.next()) {
                (Some(only), None) => only,
                _ => dialled,
            }
        }
    };
    // An alias of something outside has no ports of its own; what it leads to is asked when it is dialled.
    let is_open = service.external_name.is_some() && service.ports.is_empty();
    (is_open || tcp().any(|port| port == wanted)).then_some(wanted)
}
