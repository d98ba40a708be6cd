//! What one client sees of the mesh: `exportTo` of services, its `Sidecar`, and what happens to destinations that nothing describes.
//!
//! Invariants:
//! - Visibility is no firewall: a service that a client does not see is to it an address and a host like any outside the mesh.
//! - What a client does not see at one port it may see at another (S67).

use std::{net::SocketAddr, sync::Arc};

use crate::{
    id::{WorkloadId, hash},
    route::{
        http::{Backend, HttpTable},
        scope::{EgressProxy, OutboundPolicy, SidecarScope, leads_to},
    },
    snapshot::{Name, Protocol, Service, ServicePort, Snapshot, Workload, are_told_apart},
};

/// Kinds of sight that the kernel tells apart; more of them share.
pub const SIGHTS: u32 = 24;

/// One client's sight.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    snapshot: &'a Snapshot,
    namespace: &'a str,
    scope: Option<&'a SidecarScope>,
    /// Who looks, where that is known.
    client: Option<&'a Workload>,
    /// Everything is seen, and nothing refused.
    all: bool,
}

impl Snapshot {
    /// What a workload sees.
    pub fn sight_of<'a>(&'a self, client: &'a Workload) -> Sight<'a> {
        let scope = client.sidecar.as_ref().and_then(|name| self.routes().sidecars.get(name));
        let scope = scope.map(|scope| &**scope);
        Sight { snapshot: self, namespace: &client.name.namespace, scope, client: Some(client), all: false }
    }

    /// What a client sees of which nothing but the namespace is known.
    pub fn sight_from<'a>(&'a self, namespace: &'a str) -> Sight<'a> {
        Sight { snapshot: self, namespace, scope: None, client: None, all: false }
    }

    /// What a workload sees, or one that is gone and was in `namespace`.
    pub fn sight<'a>(&'a self, client: WorkloadId, namespace: &'a str) -> Sight<'a> {
        self.workload(client).map_or_else(|| self.sight_from(namespace), |client| self.sight_of(client))
    }

    /// What there is to see, for those who ask about nobody in particular.
    pub fn sight_of_all(&self) -> Sight<'_> {
        Sight { snapshot: self, namespace: "", scope: None, client: None, all: true }
    }

    /// Whether something is hidden from somebody.
    pub fn hides_anything(&self) -> bool {
        !self.routes().sidecars.is_empty() || self.services().any(|service| !service.audience.is_everyone())
    }
}

impl<'a> Sight<'a> {
    /// The world that is looked at.
    pub fn snapshot(&self) -> &'a Snapshot {
        self.snapshot
    }

    /// The client's namespace.
    pub fn namespace(&self) -> &'a str {
        self.namespace
    }

    /// Whether a service is seen at one of its ports.
    pub fn sees(&self, service: &Service, port: u16) -> bool {
        (self.all || service.audience.includes(self.namespace))
            && self.scope.is_none_or(|scope| {
                scope.sees(&service.name.namespace, &self.snapshot.host_of(service), port)
            })
    }

    /// Whether a service is seen at any of its ports, as its name is.
    pub fn sees_name(&self, service: &Service) -> bool {
        (self.all || service.audience.includes(self.namespace))
            && self.scope.is_none_or(|scope| scope.sees_some(service, &self.snapshot.host_of(service)))
    }

    /// Whether rules for a host are seen: those of a VirtualService by its namespace, wherever its delegates are (S66), others as the
    /// service itself is.
    pub fn sees_rules(
        &self,
        table: &HttpTable,
        host: &str,
        service: Option<&Arc<Service>>,
        port: u16,
    ) -> bool {
        let Some(scope) = self.scope else { return service.is_none_or(|service| self.sees(service, port)) };
        match table.virtual_service_namespace() {
            Some(namespace) => scope.sees(namespace, host, port),
            None => service.is_none_or(|service| self.sees(service, port)),
        }
    }

    /// The service port behind an address, if the client sees it.
    pub fn service_at(
        &self,
        dialled: SocketAddr,
        protocol: Protocol,
    ) -> Option<(&'a Arc<Service>, &'a ServicePort)> {
        let found = self.snapshot.service_at(dialled.ip(), dialled.port(), protocol);
        let seen = found.filter(|(service, _)| self.sees(service, dialled.port()));
        let other = || self.sharing(dialled).next().or_else(|| self.service_of_network(dialled));
        seen.or_else(|| if protocol == Protocol::Tcp { other() } else { None })
    }

    /// The service port of TCP behind an address for who asks for a server of this name there: of several it is the one with that host.
    pub fn service_at_named(
        &self,
        dialled: SocketAddr,
        name: Option<&str>,
    ) -> Option<(&'a Arc<Service>, &'a ServicePort)> {
        let named = name.and_then(|name| {
            let name = name.trim_end_matches('.').to_ascii_lowercase();
            let rank = |service: &Service| match service.hostname.as_deref()?.strip_prefix('*') {
                Some(suffix) => name.ends_with(suffix).then_some((false, suffix.len())),
                None => (service.hostname.as_deref() == Some(&*name)).then_some((true, 0)),
            };
            let ranked = self.all_sharing(dialled).into_iter();
            let ranked = ranked.filter_map(|found| Some((rank(found.0)?, found)));
            Some(ranked.max_by_key(|(rank, _)| *rank)?.1)
        });
        named.or_else(|| self.service_at(dialled, Protocol::Tcp))
    }

    /// Whether an address leads to several services that the client sees, so that the name which is asked for says what is meant.
    pub fn is_shared(&self, dialled: SocketAddr) -> bool {
        self.all_sharing(dialled).len() > 1
    }

    /// The services that the client sees and that share an address of their own.
    fn sharing(&self, dialled: SocketAddr) -> impl Iterator<Item = (&'a Arc<Service>, &'a ServicePort)> {
        let all = self.snapshot.sharing(dialled.ip(), dialled.port());
        all.filter(move |(service, _)| self.sees(service, dialled.port()))
    }

    /// The services that share an address, or the network that it is in.
    fn all_sharing(&self, dialled: SocketAddr) -> Vec<(&'a Arc<Service>, &'a ServicePort)> {
        if !self.snapshot.has_shared() {
            return Vec::new();
        }
        let listed: Vec<_> = self.sharing(dialled).collect();
        if !listed.is_empty() {
            return listed;
        }
        let Some(first) = self.service_at(dialled, Protocol::Tcp).filter(|(s, _)| !s.networks.is_empty())
        else {
            return Vec::new();
        };
        let lengths = |service: &Service| {
            let of = service.networks.iter().filter(|net| net.contains(&dialled.ip()));
            of.map(ipnet::IpNet::prefix_len).max()
        };
        let others = self.snapshot.services_with_network_of(dialled.ip()).filter_map(|(length, service)| {
            let port = tcp_port(service, dialled.port())?;
            let is_one = Some(length) == lengths(first.0) && self.sees(service, dialled.port());
            (is_one && are_told_apart((first.0, first.1), (service, port))).then_some((service, port))
        });
        std::iter::once(first).chain(others).collect()
    }

    /// The service with the smallest network that an address is in, unless the address is a pod's.
    fn service_of_network(&self, dialled: SocketAddr) -> Option<(&'a Arc<Service>, &'a ServicePort)> {
        let (addr, number) = (dialled.ip(), dialled.port());
        let tcp = |service: &'a Arc<Service>| Some((service, tcp_port(service, number)?));
        let all =
            self.snapshot.services_with_network_of(addr).filter(|(_, service)| self.sees(service, number));
        let ports = all.filter_map(|(length, service)| Some((length, tcp(service)?)));
        // Of equal ones the first, which has precedence.
        let smallest = ports.reduce(|one, other| if other.0 > one.0 { other } else { one });
        smallest.map(|(_, found)| found).filter(|_| self.snapshot.workload_at(addr).is_none())
    }

    /// Ports at which connections to addresses of no service may be for one all the same.
    pub fn unlisted_ports(&self) -> impl Iterator<Item = u16> {
        let seen = self.snapshot.unlisted().filter(|(service, port)| self.sees(service, *port));
        seen.map(|(_, port)| port)
    }

    /// Whether a connection to this port of an address of no service may be for one that the client sees: by the name that it asks for.
    pub fn is_unlisted(&self, port: u16) -> bool {
        self.unlisted_ports().any(|known| known == port)
    }

    /// Whether an address is refused, because nothing that the client sees describes it (F10).
    pub fn refuses(&self, dialled: SocketAddr) -> bool {
        !self.all && self.outbound() == OutboundPolicy::RegistryOnly && self.is_unknown(dialled)
    }

    /// What connections to an address go through, because nothing that the client sees describes it (S68).
    pub fn egress_proxy_to(&self, dialled: SocketAddr) -> Option<&'a EgressProxy> {
        // Who is behind the proxy is looked for last: most of what is dialled is described.
        let is_named = self.scope.is_some_and(|scope| scope.egress_proxy.is_some());
        if is_named && self.is_unknown(dialled) { self.egress_proxy() } else { None }
    }

    /// Whether a connection to an address does not simply go there, because nothing that the client sees describes it.
    pub fn holds(&self, dialled: SocketAddr) -> bool {
        self.refuses(dialled) || self.egress_proxy_to(dialled).is_some()
    }

    /// Whether some addresses are held so.
    pub fn holds_unknown(&self) -> bool {
        self.outbound() == OutboundPolicy::RegistryOnly || self.egress_proxy().is_some()
    }

    /// Whether nothing that the client sees describes an address, and it is no pod's.
    fn is_unknown(&self, dialled: SocketAddr) -> bool {
        self.service_at(dialled, Protocol::Tcp).is_none() && self.snapshot.workload_at(dialled.ip()).is_none()
    }

    /// The service that a TLS server's name means at a port (lower case, without trailing dot), if the client sees it there.
    pub fn service_of_server(&self, name: &str, port: u16) -> Option<&'a Arc<Service>> {
        self.service_covering(name).filter(|service| has_tcp(service, port) && self.sees(service, port))
    }

    /// What happens to destinations that nothing describes (S68).
    pub fn outbound(&self) -> OutboundPolicy {
        self.scope.and_then(|scope| scope.outbound).unwrap_or(self.snapshot.mesh().defaults.outbound)
    }

    /// What destinations that nothing describes are reached through. Who is behind that service is not sent to itself.
    pub fn egress_proxy(&self) -> Option<&'a EgressProxy> {
        let proxy = self.scope?.egress_proxy.as_ref()?;
        let service = match &proxy.backend {
            Backend::Cluster(key) => self.snapshot.service(&key.service),
            Backend::Broken { .. } => None,
        };
        let leads_to_it = |client: &Workload| {
            let ports = service.iter().flat_map(|service| &service.ports);
            ports.into_iter().any(|port| leads_to(port, client).next().is_some())
        };
        (!self.client.is_some_and(leads_to_it)).then_some(proxy)
    }
}

fn has_tcp(service: &Service, number: u16) -> bool {
    tcp_port(service, number).is_some()
}

fn tcp_port(service: &Service, number: u16) -> Option<&ServicePort> {
    service.ports.iter().find(|port| port.port == number && port.protocol == Protocol::Tcp)
}

/// Which of [`SIGHTS`] kinds a workload's sight is. It depends on nothing but the workload, so that the tables of services and of pods
/// need not change together.
pub fn sight_kind(client: &Workload) -> u32 {
    let namespace = &*client.name.namespace;
    let sidecar = client.sidecar.as_ref().map_or(["", ""], |Name { namespace, name }| [namespace, name]);
    (hash(&["sight", namespace, sidecar[0], sidecar[1]]) % u64::from(SIGHTS)) as u32
}

#[cfg(test)]
mod tests;
