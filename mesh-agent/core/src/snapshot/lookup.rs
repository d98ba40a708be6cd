//! Services by the names that requests have, without allocating.

use std::{
    borrow::Borrow,
    borrow::Cow,
    cmp::Ordering,
    collections::BTreeSet,
    net::IpAddr,
    ops::Bound::{Included, Unbounded},
    sync::Arc,
};

use ipnet::IpNet;

use super::{Later, Name, Protocol, Resolution, Service, ServicePort, Shared, Snapshot, Workload};
use crate::{
    route::{lookup::suffixes, protocol::AppProtocol, scope::leads_to, sight::Sight},
    slots::is_routed,
};

/// Namespace and name, owned or borrowed; ordered as [`Name`] is.
trait NameParts {
    fn parts(&self) -> (&str, &str);
}

impl NameParts for Name {
    fn parts(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl NameParts for (&str, &str) {
    fn parts(&self) -> (&str, &str) {
        *self
    }
}

impl<'a> Borrow<dyn NameParts + 'a> for Name {
    fn borrow(&self) -> &(dyn NameParts + 'a) {
        self
    }
}

impl PartialEq for dyn NameParts + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for dyn NameParts + '_ {}

impl PartialOrd for dyn NameParts + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for dyn NameParts + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

/// Whether two service ports may have one address, because each request or server name says which is meant: of hosts that one namespace
/// declares, in one protocol that has names.
pub fn are_told_apart(one: (&Service, &ServicePort), other: (&Service, &ServicePort)) -> bool {
    let protocol = AppProtocol::of(one.1);
    one.0.name != other.0.name
        && one.0.hostname.is_some()
        && other.0.hostname.is_some()
        && one.0.name.namespace == other.0.name.namespace
        && protocol == AppProtocol::of(other.1)
        && !matches!(protocol, AppProtocol::Tcp | AppProtocol::Udp)
}

impl Snapshot {
    /// The service ports behind an address and port of TCP that only the name which is asked for tells apart: first the one that
    /// [`Self::service_at`] has. None where it is one's alone.
    pub fn sharing(&self, addr: IpAddr, port: u16) -> impl Iterator<Item = (&Arc<Service>, &ServicePort)> {
        let all = self.shared.get(&(addr.to_canonical(), port)).into_iter().flatten();
        all.filter_map(|(name, index)| {
            let service = self.service(name)?;
            Some((service, service.ports.get(*index)?))
        })
    }

    /// Whether services share an address or a network.
    pub fn has_shared(&self) -> bool {
        !self.shared.is_empty() || self.by_network.len() > 1
    }

    /// `later` are the service ports, with the address of each, that came after the first one there.
    pub(super) fn find_shared(&self, later: Later) -> Shared {
        let port_of = |(name, index): &(Name, usize)| {
            let service = self.service(name)?;
            Some((&**service, service.ports.get(*index)?))
        };
        let mut shared = Shared::default();
        for (frontend, one) in later {
            let Some(owner) = self.by_vip.get(&frontend) else { continue };
            let apart =
                port_of(owner).zip(port_of(&one)).is_some_and(|(owner, one)| are_told_apart(owner, one));
            let (addr, port, protocol) = frontend;
            if apart && protocol == Protocol::Tcp {
                shared.entry((addr, port)).or_insert_with(|| vec![owner.clone()]).push(one);
            }
        }
        for all in shared.values_mut() {
            all[1..].sort_unstable();
            all.dedup();
        }
        shared
    }

    /// A service by namespace and name.
    pub fn service_named(&self, namespace: &str, name: &str) -> Option<&Arc<Service>> {
        let parts = (namespace, name);
        self.services.get::<dyn NameParts + '_>(&parts)
    }

    /// The services of a namespace.
    pub(crate) fn services_in<'s>(&'s self, namespace: &'s str) -> impl Iterator<Item = &'s Arc<Service>> {
        let first = (namespace, "");
        let first: &(dyn NameParts + '_) = &first;
        let from = self.services.range::<dyn NameParts + '_, _>((Included(first), Unbounded));
        from.take_while(move |(name, _)| *name.namespace == *namespace).map(|(_, service)| service)
    }

    /// The services that declare a host which Kubernetes does not know, those of precedence first.
    pub fn services_declaring(&self, host: &str) -> &[Name] {
        self.by_host.get(host).map_or(&[], Vec::as_slice)
    }

    /// The services that have a network which an address is in, with that network's length, those of precedence first.
    pub fn services_with_network_of(&self, addr: IpAddr) -> impl Iterator<Item = (u8, &Arc<Service>)> {
        let of = move |(net, _): &&(IpNet, Name)| net.contains(&addr);
        let found = self.by_network.iter().filter(of);
        found.filter_map(|(net, name)| Some((net.prefix_len(), self.service(name)?)))
    }

    /// All networks that lead to services, each with its service, those of precedence first.
    pub fn networks(&self) -> &[(IpNet, Name)] {
        &self.by_network
    }

    /// Whether there are services that no address of their own leads to, and that matter all the same ([`Sight::is_unlisted`]).
    pub fn has_unlisted(&self) -> bool {
        !self.unlisted.is_empty()
    }

    /// Those services, each with such a port.
    pub(crate) fn unlisted(&self) -> impl Iterator<Item = (&Arc<Service>, u16)> {
        self.unlisted.iter().filter_map(|(name, port)| Some((self.service(name)?, *port)))
    }

    /// Hosts of ServiceEntries that only the name tells that is asked for, or a network. Where connections to them go where they were
    /// dialled and nothing is said about them, there is nothing to be told.
    pub(super) fn find_unlisted(&self) -> impl Iterator<Item = (Name, u16)> {
        let without_address = |service: &&Arc<Service>| {
            let is_nowhere = service.frontend_addrs().next().is_none();
            service.hostname.is_some() && (is_nowhere || !service.networks.is_empty())
        };
        let of_service = |service: &'_ Arc<Service>| {
            let matters = |port: &&ServicePort| {
                let is_told = !service.networks.is_empty() || AppProtocol::of(port) != AppProtocol::Tcp;
                port.protocol == Protocol::Tcp
                    && is_told
                    && (service.resolution != Resolution::Dialled || is_routed(self, service, port.port))
            };
            let named = |port: &ServicePort| (service.name.clone(), port.port);
            service.ports.iter().filter(matters).map(named).collect::<Vec<_>>()
        };
        self.services().filter(without_address).flat_map(of_service)
    }

    /// Ports of a workload at which it is dialled for services that have no address of their own and are routed. Which service is meant
    /// only the request says, so that no connection to them may go past the agent.
    pub fn ports_routed_by_name(&self, server: &Workload) -> BTreeSet<u16> {
        // Services lead to pods of their own namespace only.
        let own = self.routed_by_name.iter().filter(|(name, _)| name.namespace == server.name.namespace);
        let ports = own.flat_map(|(name, number)| {
            let ports = self.service(name).into_iter().flat_map(|service| &service.ports);
            ports.filter(move |port| port.port == *number && port.protocol == Protocol::Tcp)
        });
        ports.flat_map(|port| leads_to(port, server)).collect()
    }

    /// Services without an address of their own, with a port that is routed.
    pub(super) fn find_routed_by_name(&self) -> impl Iterator<Item = (Name, u16)> {
        let headless = self.services().filter(|service| service.vips.is_empty());
        headless.flat_map(|service| {
            let is_watched =
                |port: &&ServicePort| port.protocol == Protocol::Tcp && is_routed(self, service, port.port);
            service.ports.iter().filter(is_watched).map(|port| (service.name.clone(), port.port))
        })
    }

    fn service_of_kubernetes(&self, host: &str) -> Option<&Arc<Service>> {
        let short = host.strip_suffix(self.cluster_domain())?.strip_suffix(".svc.")?;
        let (name, namespace) = short.split_once('.')?;
        self.service_named(namespace, name).filter(|service| service.hostname.is_none())
    }

    /// The full name of a service.
    pub fn host_of<'s>(&self, service: &'s Service) -> Cow<'s, str> {
        service.host(self.cluster_domain())
    }
}

impl<'a> Sight<'a> {
    /// The service that the client means by a full name (lower case, without trailing dot): that of Kubernetes, seen or not, else of
    /// those that declare the host and that it sees, the one of its own namespace, else the one of precedence (S57).
    pub fn service_by_host(&self, host: &str) -> Option<&'a Arc<Service>> {
        self.snapshot().service_of_kubernetes(host).or_else(|| self.declared(host))
    }

    /// The same, and where no service has the name, the one with the longest wildcard that covers it (S3, S4).
    pub fn service_covering(&self, host: &str) -> Option<&'a Arc<Service>> {
        if let Some(service) = self.service_by_host(host) {
            return Some(service);
        }
        if self.snapshot().by_host.is_empty() {
            return None;
        }
        suffixes(host, self.snapshot().has_partial_hosts)
            .find_map(|suffix| self.declared(&format!("*{suffix}")))
    }

    fn declared(&self, host: &str) -> Option<&'a Arc<Service>> {
        let all = self.snapshot().services_declaring(host).iter();
        let mut seen =
            all.filter_map(|name| self.snapshot().service(name)).filter(|service| self.sees_name(service));
        let first = seen.next()?;
        if &*first.name.namespace == self.namespace() {
            return Some(first);
        }
        Some(seen.find(|service| &*service.name.namespace == self.namespace()).unwrap_or(first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Parts;

    #[test]
    fn services_are_found_by_their_full_names_only() {
        let names = [("a", "web"), ("a-b", "web"), ("b", "web"), ("b", "api")];
        let services =
            names.iter().map(|(ns, name)| Arc::new(Service::named(Name::new(*ns, *name)))).collect();
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        for (namespace, name) in names {
            let found = snapshot.service_named(namespace, name).unwrap();
            assert_eq!(found.name, Name::new(namespace, name));
            let host = snapshot.host_of(found).into_owned();
            assert_eq!(host, format!("{name}.{namespace}.svc.cluster.local"));
            assert_eq!(snapshot.sight_from("a").service_by_host(&host), Some(found));
        }
        for host in [
            "web.a",
            "web.a.svc",
            "web.c.svc.cluster.local",
            "x.web.a.svc.cluster.local",
            "svc.cluster.local",
        ] {
            assert_eq!(snapshot.sight_from("a").service_by_host(host), None, "{host}");
        }
    }

    /// A service of a host that Kubernetes does not know.
    fn declaring(namespace: &str, host: &str) -> Arc<Service> {
        Arc::new(Service { hostname: Some(host.into()), ..Service::named(Name::new(namespace, host)) })
    }

    #[test]
    fn s57_a_host_is_the_clients_own_namespaces_else_that_of_precedence() {
        let services = vec![declaring("b", "api.x"), declaring("a", "api.x"), declaring("c", "other.x")];
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        let of =
            |namespace, host| Some(&*snapshot.sight_from(namespace).service_by_host(host)?.name.namespace);
        assert_eq!(of("a", "api.x"), Some("a"));
        assert_eq!(of("b", "api.x"), Some("b"));
        assert_eq!(of("z", "api.x"), Some("b"), "the first of the parts");
        assert_eq!(of("a", "other.x"), Some("c"));
        assert_eq!(of("a", "x"), None);
        let service = snapshot.service(&Name::new("c", "other.x")).unwrap();
        assert_eq!(snapshot.host_of(service), "other.x");
    }

    #[test]
    fn s53_a_service_of_kubernetes_has_its_name_whoever_else_declares_it() {
        let host = "web.a.svc.cluster.local";
        let services = vec![declaring("a", host), Arc::new(Service::named(Name::new("a", "web")))];
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        assert_eq!(&*snapshot.sight_from("a").service_by_host(host).unwrap().name.name, "web");
    }

    #[test]
    fn s4_a_wildcard_covers_what_no_name_is_and_the_longest_counts() {
        let services = vec![declaring("a", "*.x"), declaring("a", "*.b.x"), declaring("a", "own.b.x")];
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        let covering = |host| Some(&*snapshot.sight_from("a").service_covering(host)?.name.name);
        assert_eq!(covering("own.b.x"), Some("own.b.x"));
        assert_eq!(covering("c.b.x"), Some("*.b.x"));
        assert_eq!(covering("d.c.b.x"), Some("*.b.x"));
        assert_eq!(covering("b.x"), Some("*.x"));
        assert_eq!(covering("x"), None);
        assert_eq!(snapshot.sight_from("a").service_by_host("c.b.x"), None);
    }

    #[test]
    fn s3_a_wildcard_may_begin_within_a_label() {
        let services = vec![declaring("a", "*oo.x"), declaring("a", "*-db.b.x"), declaring("a", "*.b.x")];
        let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
        let covering = |host| Some(&*snapshot.sight_from("a").service_covering(host)?.name.name);
        assert_eq!(covering("foo.x"), Some("*oo.x"));
        assert_eq!(covering("oo.x"), Some("*oo.x"));
        assert_eq!(covering("bar.x"), None);
        assert_eq!(covering("1-db.b.x"), Some("*-db.b.x"));
        assert_eq!(covering("1db.b.x"), Some("*.b.x"));
    }
}
