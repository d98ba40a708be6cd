//! Who sees what: the same host can mean different things to clients of different namespaces.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::{
    route::{
        Origin, Routes,
        cluster::{Cluster, ClusterKey, ConnectionPool},
        http::Backend,
        protocol::AppProtocol,
    },
    snapshot::{Endpoint, Protocol, Service, ServicePort, Snapshot, Workload},
};

/// Something that depends on the client's namespace, and on its labels where a resource selects workloads.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Scoped<T> {
    /// For clients of every namespace that is not in `by_namespace`; `None`: not there for them.
    pub default: Option<Arc<T>>,
    /// For clients of these namespaces.
    pub by_namespace: BTreeMap<Arc<str>, InNamespace<T>>,
}

/// Labels by key.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// Those of a client that is no workload of the mesh.
pub static NO_LABELS: Labels = Labels::new();

/// What clients of one namespace see.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InNamespace<T> {
    /// For workloads that these labels select, in order of precedence; before `all`.
    pub selected: Vec<(Labels, Arc<T>)>,
    /// For all others.
    pub all: Option<Arc<T>>,
}

impl<T> Scoped<T> {
    /// The same for every client.
    pub fn everywhere(value: Arc<T>) -> Self {
        Self { default: Some(value), by_namespace: BTreeMap::new() }
    }

    /// What a client of `namespace` with these labels sees.
    pub fn get(&self, namespace: &str, labels: &Labels) -> Option<&Arc<T>> {
        let Some(own) = self.by_namespace.get(namespace) else { return self.default.as_ref() };
        let selects = |selector: &Labels| selector.iter().all(|(key, value)| labels.get(key) == Some(value));
        let selected = own.selected.iter().find(|(selector, _)| selects(selector));
        selected.map(|(_, value)| value).or(own.all.as_ref())
    }

    /// All that some client sees.
    pub fn values(&self) -> impl Iterator<Item = &Arc<T>> {
        let own = self.by_namespace.values();
        let own = own.flat_map(|own| own.selected.iter().map(|(_, value)| value).chain(&own.all));
        self.default.iter().chain(own)
    }
}

/// The namespaces that see something (`exportTo`).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Audience {
    /// All.
    #[default]
    Everyone,
    /// These; perhaps none.
    Only(BTreeSet<Arc<str>>),
}

impl Audience {
    /// Whether there is nobody who does not see it.
    pub fn is_everyone(&self) -> bool {
        *self == Self::Everyone
    }

    /// Whether clients of a namespace see it.
    pub fn includes(&self, namespace: &str) -> bool {
        match self {
            Self::Everyone => true,
            Self::Only(namespaces) => namespaces.contains(namespace),
        }
    }
}

/// What an Istio `Sidecar` lets its workloads see. It limits visibility; it is no firewall (S65).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SidecarScope {
    /// What is visible at which ports; an egress listener without port is the rest.
    pub egress: Vec<EgressListener>,
    /// What happens to destinations that nothing describes; `None`: as the mesh says.
    pub outbound: Option<OutboundPolicy>,
    /// Where such destinations are reached through.
    #[serde(default)]
    pub egress_proxy: Option<EgressProxy>,
    /// Limits of the connections that its workloads take.
    #[serde(default)]
    pub inbound: InboundPools,
}

/// Where connections and requests go whose destination nothing describes, instead of to where they were dialled (S68).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EgressProxy {
    /// Who says so.
    pub origin: Arc<Origin>,
    /// The service. One that is not there is no reason to go past it.
    pub backend: Backend,
}

/// Limits of the server's side (S45): one of a port takes the place of the one for all.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InboundPools {
    /// Of ports without limits of their own.
    pub all: Option<ConnectionPool>,
    /// By the port that the workload listens on.
    pub ports: BTreeMap<u16, ConnectionPool>,
}

impl InboundPools {
    /// The limits of a port of each workload.
    pub fn of_port(&self, port: u16) -> Option<&ConnectionPool> {
        self.ports.get(&port).or(self.all.as_ref())
    }

    /// Whether some of them are about requests.
    pub(crate) fn limits_requests(&self) -> bool {
        self.all.iter().chain(self.ports.values()).any(ConnectionPool::limits_requests)
    }

    /// The ports whose connections are counted: all others under 0.
    fn counted(&self) -> impl Iterator<Item = Counted> {
        let of_ports = self.ports.iter().map(|(port, pool)| (*port, pool));
        let all = of_ports.chain(self.all.iter().map(|pool| (0, pool)));
        all.filter_map(|(port, pool)| Counted::of(port, pool))
    }
}

/// A port of a workload whose connections are counted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Counted {
    /// The port that the workload listens on; 0: every other.
    port: u16,
    max_connections: Option<u32>,
    by_request: bool,
}

impl Counted {
    fn of(port: u16, pool: &ConnectionPool) -> Option<Self> {
        let (max_connections, by_request) = (pool.max_connections, pool.limits_requests());
        pool.is_counted().then_some(Self { port, max_connections, by_request })
    }
}

impl Routes {
    /// Destinations of which a DestinationRule limits the requests, for some client at least: their servers count them too.
    pub(crate) fn limited_by_request(&self) -> impl Iterator<Item = &ClusterKey> {
        let limits =
            |scoped: &Scoped<Cluster>| scoped.values().any(|cluster| cluster.policy.pool.limits_requests());
        self.clusters
            .iter()
            .filter(move |(key, scoped)| key.subset.is_none() && limits(scoped))
            .map(|(key, _)| key)
    }
}

impl Snapshot {
    /// Limits of the connections to a port of a workload: by its Sidecar, as a whole, else those of a DestinationRule for a service that
    /// leads there, if they are about requests.
    pub fn inbound_pool<'a>(&'a self, server: &'a Workload, port: u16) -> Option<&'a ConnectionPool> {
        let sidecar = server.sidecar.as_ref().and_then(|name| self.routes().sidecars.get(name));
        sidecar
            .and_then(|sidecar| sidecar.inbound.of_port(port))
            .or_else(|| self.ruled_ports(server).find(|(at, _)| *at == port).map(|(_, pool)| pool))
    }

    /// Whether servers may have to understand requests to count them.
    pub fn counts_requests(&self) -> bool {
        self.counts_requests_of_sidecars || !self.limited_by_request.is_empty()
    }

    /// What is spoken at a port of a workload, as a service says that leads there.
    pub fn spoken_at(&self, server: &Workload, port: u16) -> AppProtocol {
        let services = self.services_in(&server.name.namespace);
        let ports =
            services.flat_map(|service| &service.ports).filter(|known| known.protocol == Protocol::Tcp);
        let mut of_server = ports.filter(|known| leads_to(known, server).any(|own| own == port));
        of_server.next().map_or_else(|| AppProtocol::of_number(port), AppProtocol::of)
    }

    /// The ports of a workload whose connections are counted there.
    pub(crate) fn counted_ports(&self, server: &Workload) -> Vec<Counted> {
        let sidecar = server.sidecar.as_ref().and_then(|name| self.routes().sidecars.get(name));
        let own = sidecar.iter().flat_map(|sidecar| sidecar.inbound.counted());
        // Those that a Sidecar replaces change nothing by being listed.
        let ruled = self.ruled_ports(server).filter_map(|(port, pool)| Counted::of(port, pool));
        let mut all: Vec<Counted> = own.chain(ruled).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Ports of a workload that DestinationRules limit the requests to, as its own namespace sees them. Rules that select clients are for
    /// what these send (S39).
    fn ruled_ports<'a>(&'a self, server: &'a Workload) -> impl Iterator<Item = (u16, &'a ConnectionPool)> {
        let namespace = &server.name.namespace;
        // Services lead to pods of their own namespace only.
        let of_namespace =
            self.limited_by_request.iter().filter(move |key| key.service.namespace == *namespace);
        of_namespace.flat_map(move |key| {
            let cluster =
                self.routes().clusters.get(key).and_then(|scoped| scoped.get(namespace, &NO_LABELS));
            let pool = cluster.map(|cluster| &cluster.policy.pool).filter(|pool| pool.limits_requests());
            let service = self.service(&key.service).filter(|_| pool.is_some());
            let ports = service.into_iter().flat_map(|service| &service.ports);
            let ports = ports.filter(move |port| port.port == key.port && port.protocol == Protocol::Tcp);
            let own = ports.flat_map(move |port| leads_to(port, server));
            own.filter_map(move |port| Some((port, pool?)))
        })
    }
}

/// The ports of a workload that a service's port leads to.
pub(crate) fn leads_to<'a>(port: &'a ServicePort, server: &'a Workload) -> impl Iterator<Item = u16> + 'a {
    let of = |endpoint: &&Endpoint| match endpoint.workload {
        Some(id) => id == server.id,
        None => server.addrs.contains(&endpoint.addr),
    };
    port.endpoints.iter().filter(of).map(|endpoint| endpoint.port)
}

/// One egress listener of a `Sidecar`.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EgressListener {
    /// Only for this port.
    pub port: Option<u16>,
    /// Visible hosts; excluded ones win.
    pub hosts: Vec<EgressHost>,
}

/// `namespace/host` of an egress listener.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct EgressHost {
    /// Written `~namespace/host`: takes away.
    pub excluded: bool,
    /// Namespace of the service; `None` is every one.
    pub namespace: Option<Arc<str>>,
    /// Host name, `*`, or `*.suffix`.
    pub host: Arc<str>,
}

/// What happens to destinations that no resource describes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum OutboundPolicy {
    /// They are reached as if there were no mesh.
    #[default]
    AllowAny,
    /// 502 for HTTP, a reset for TCP.
    RegistryOnly,
}

impl SidecarScope {
    /// Whether a host of a service in `namespace` can be seen at a port. Listeners for that very port are the only ones that count where
    /// there are any (S67).
    pub fn sees(&self, namespace: &str, host: &str, port: u16) -> bool {
        let has_own = self.egress.iter().any(|listener| listener.port == Some(port));
        let port = has_own.then_some(port);
        self.egress.iter().any(|listener| listener.port == port && listener.sees(namespace, host))
    }

    /// Whether a service, whose full name is `host`, can be seen at any of its ports.
    pub fn sees_some(&self, service: &Service, host: &str) -> bool {
        let sees = |port| self.sees(&service.name.namespace, host, port);
        // A name that leads elsewhere has no ports; 0 is one that no listener is for.
        service.ports.iter().any(|port| sees(port.port)) || (service.ports.is_empty() && sees(0))
    }
}

impl EgressListener {
    fn sees(&self, namespace: &str, host: &str) -> bool {
        let is_named = |excluded: bool| {
            self.hosts.iter().any(|own| own.excluded == excluded && own.names(namespace, host))
        };
        is_named(false) && !is_named(true)
    }
}

impl EgressHost {
    /// Whether host and namespace are meant, whatever follows from it.
    pub fn names(&self, namespace: &str, host: &str) -> bool {
        let is_host = match self.host.strip_prefix('*') {
            Some(suffix) => host.ends_with(suffix),
            None => *self.host == *host,
        };
        is_host && self.namespace.as_deref().is_none_or(|own| own == namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn s39_a_selected_workload_comes_before_its_namespace_and_that_before_everybody() {
        let own = InNamespace {
            selected: vec![
                (labels(&[("app", "a"), ("v", "1")]), Arc::new("a1")),
                (labels(&[("app", "a")]), Arc::new("a")),
            ],
            all: Some(Arc::new("own")),
        };
        let empty = InNamespace { selected: Vec::new(), all: None };
        let scoped = Scoped {
            default: Some(Arc::new("default")),
            by_namespace: [("own".into(), own), ("blind".into(), empty)].into(),
        };
        let get = |namespace, pairs| scoped.get(namespace, &labels(pairs)).map(|value| **value);
        assert_eq!(get("own", &[("app", "a"), ("v", "1")]), Some("a1"));
        assert_eq!(get("own", &[("app", "a")]), Some("a"));
        assert_eq!(get("own", &[]), Some("own"));
        assert_eq!(get("other", &[("app", "a")]), Some("default"));
        assert_eq!(get("blind", &[]), None, "what a namespace does not see, it does not see");
    }

    fn listener(port: Option<u16>, hosts: &[&str]) -> EgressListener {
        let host = |text: &&str| {
            let (excluded, text) = text.strip_prefix('~').map_or((false, *text), |rest| (true, rest));
            let (namespace, host) = text.split_once('/').unwrap();
            EgressHost {
                excluded,
                namespace: (namespace != "*").then(|| namespace.into()),
                host: host.into(),
            }
        };
        EgressListener { port, hosts: hosts.iter().map(host).collect() }
    }

    #[test]
    fn s65_hosts_are_seen_by_namespace_and_name_unless_they_are_excluded() {
        let scope = |hosts: &[&str]| SidecarScope {
            egress: vec![listener(None, hosts)],
            outbound: None,
            egress_proxy: None,
            inbound: InboundPools::default(),
        };
        let cases: [(&[&str], &str, &str, bool); 8] = [
            (&["*/*"], "a", "web.a.svc", true),
            (&["a/*"], "a", "web.a.svc", true),
            (&["a/*"], "b", "web.b.svc", false),
            (&["*/*.example.com"], "a", "x.example.com", true),
            (&["*/*.example.com"], "a", "example.com", false),
            (&["*/*", "~b/*"], "b", "web.b.svc", false),
            (&["*/*", "~b/api"], "b", "web.b.svc", true),
            (&[], "a", "web.a.svc", false),
        ];
        for (hosts, namespace, host, expected) in cases {
            assert_eq!(scope(hosts).sees(namespace, host, 80), expected, "{hosts:?} {namespace}/{host}");
        }
    }

    #[test]
    fn s67_a_listener_for_the_port_is_the_only_one_that_counts_there() {
        let scope = SidecarScope {
            egress: vec![listener(Some(80), &["a/*"]), listener(None, &["b/*"])],
            outbound: None,
            egress_proxy: None,
            inbound: InboundPools::default(),
        };
        assert!(scope.sees("a", "web", 80) && !scope.sees("b", "web", 80));
        assert!(scope.sees("b", "web", 81) && !scope.sees("a", "web", 81));
    }

    #[test]
    fn s45_limits_of_a_port_take_the_place_of_those_of_all_ports() {
        let pool = |max| ConnectionPool { max_connections: Some(max), ..ConnectionPool::default() };
        let both = InboundPools {
            all: Some(pool(9)),
            ports: [(80, pool(1)), (81, ConnectionPool::default())].into(),
        };
        let max = |port| both.of_port(port).unwrap().max_connections;
        assert_eq!([80, 81, 82].map(max), [Some(1), None, Some(9)], "replaced as a whole");
        let counted: Vec<_> = both.counted().map(|counted| (counted.port, counted.max_connections)).collect();
        assert_eq!(counted, [(80, Some(1)), (0, Some(9))]);
        assert_eq!(InboundPools::default().of_port(80), None);
    }
}
