//! The world as one node sees it: workloads, services and their endpoints, immutable once published.

mod credential;
mod lookup;
mod resolution;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use foldhash::fast::RandomState;
use ipnet::IpNet;

pub use self::{
    credential::{Credential, Material},
    lookup::are_told_apart,
    resolution::{DnsEndpoint, DnsResolution, Resolution, Traits},
};
use crate::{
    balance::locality::Place,
    id::{ServiceId, WorkloadId},
    identity::Identity,
    mode::{ModeSources, PortModes},
    policy::AuthorizationPolicy,
    route::{
        Routes,
        cluster::ClusterKey,
        defaults::{Distribution, MeshDefaults},
        scope::Audience,
    },
};

/// Namespace and name of a resource.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Name {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name within the namespace.
    pub name: Arc<str>,
}

impl Name {
    /// Makes a name from its two parts.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Workload {
    /// Id.
    pub id: WorkloadId,
    /// Namespace and name.
    pub name: Name,
    /// Trust domain of its identity.
    pub trust_domain: Arc<str>,
    /// Service account, `default` when the manifest names none.
    pub service_account: Arc<str>,
    /// `spec.nodeName`; empty while unscheduled.
    pub node: Arc<str>,
    /// Region, zone and subzone, its own or its node's, and its network.
    pub place: Place,
    /// The Sidecar that limits what it sees; one of [`Routes::sidecars`].
    pub sidecar: Option<Name>,
    /// `status.podIPs` (or podIP): at most one per family; empty on the host network, whose address is the node's.
    pub addrs: Vec<IpAddr>,
    /// Opted in by namespace or pod, and not host-network.
    pub meshed: bool,
    /// Why a pod that asked for the mesh is not in it, e.g. host network.
    pub skipped: Option<Arc<str>>,
    /// The Ready condition (or, without conditions, `phase: Running` or no phase), and not being deleted.
    pub ready: bool,
    /// Succeeded or Failed: nothing of it runs. A pod that is being deleted is in the mesh until then.
    pub terminated: bool,
    /// `nodemesh.dev/netns`: where the network namespace is, in file mode.
    pub netns: Option<Arc<str>>,
    /// Labels, for selectors.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Container ports by name, for named target ports.
    pub named_ports: BTreeMap<Arc<str>, u16>,
    /// Effective mutual TLS modes.
    pub modes: PortModes,
    /// Which PeerAuthentications the modes come from.
    pub mode_sources: ModeSources,
    /// The AuthorizationPolicies that apply, sorted; those of [`Snapshot::policies`] with these names.
    pub policies: Vec<Name>,
    /// What peers of other nodes can reach it through.
    pub tunnel: Tunnel,
    /// Settings from annotations.
    pub settings: PodSettings,
    /// TCP ports of HTTP, TCP and gRPC probes.
    pub probe_ports: BTreeSet<u16>,
    /// Stable hash of everything about this workload that policy evaluation reads; it, and nothing else, moves
    /// the workload's policy generation. Endpoint churn never does.
    pub policy_hash: u64,
}

impl Workload {
    /// A pod of which nothing but the name is known: unmeshed, not ready, without addresses.
    pub fn named(name: Name) -> Self {
        Self {
            id: WorkloadId::of_pod(&name.namespace, &name.name, ""),
            name,
            trust_domain: Mesh::default().trust_domain,
            service_account: "default".into(),
            node: "".into(),
            place: Place::default(),
            sidecar: None,
            addrs: Vec::new(),
            meshed: false,
            skipped: None,
            ready: false,
            terminated: false,
            netns: None,
            labels: BTreeMap::new(),
            named_ports: BTreeMap::new(),
            modes: PortModes::default(),
            mode_sources: ModeSources::default(),
            policies: Vec::new(),
            tunnel: Tunnel::None,
            settings: PodSettings::default(),
            probe_ports: BTreeSet::new(),
            policy_hash: crate::policy::policy_hash(&PortModes::default(), &Mesh::default(), &[]),
        }
    }

    /// Who it is to its peers.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: Arc::clone(&self.trust_domain),
            namespace: Arc::clone(&self.name.namespace),
            service_account: Arc::clone(&self.service_account),
        }
    }
}

/// What peers of other nodes can reach a workload through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tunnel {
    /// Its own ports only.
    #[default]
    None,
    /// HTTP/2 CONNECT over mutual TLS at port 15008.
    Hbone,
}

/// Per-pod settings taken from annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PodSettings {
    /// `nodemesh.dev/fail-closed: outbound`: refuse connects that need the agent while it is down.
    pub outbound_fail_closed: bool,
    /// `nodemesh.dev/exclude-inbound-ports` (also Istio's `traffic.sidecar.istio.io/excludeInboundPorts`).
    pub exclude_inbound_ports: BTreeSet<u16>,
    /// `nodemesh.dev/exclude-outbound-ports`.
    pub exclude_outbound_ports: BTreeSet<u16>,
    /// `nodemesh.dev/exclude-outbound-cidrs`.
    pub exclude_outbound_cidrs: Vec<IpNet>,
    /// `nodemesh.dev/dns-capture: "false"` turns the DNS proxy off.
    pub dns_capture_off: bool,
}

/// Transport protocol of a service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One service.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Service {
    /// Id.
    pub id: ServiceId,
    /// Namespace and name.
    pub name: Name,
    /// The host of a service that Kubernetes does not know (ServiceEntry): lower case, without trailing dot, perhaps `*.example.com`.
    /// `None`: it is called by namespace and name.
    pub hostname: Option<Arc<str>>,
    /// Outside the mesh (`MESH_EXTERNAL`).
    pub external: bool,
    /// Cluster addresses (`spec.clusterIPs`), which DNS answers with; empty when headless.
    pub vips: Vec<IpAddr>,
    /// Networks that lead here, which only connections without another service have to do with.
    pub networks: Vec<IpNet>,
    /// Where its endpoints come from.
    pub resolution: Resolution,
    /// Names of which a server's certificate must have one, where TLS is asked for and nothing else is said; none: as the mesh does.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Further addresses that lead here (`externalIPs`, load balancer), never answered by DNS.
    pub external_ips: Vec<IpAddr>,
    /// `clusterIP: None`.
    pub headless: bool,
    /// `type: ExternalName`.
    pub external_name: Option<Arc<str>>,
    /// `sessionAffinity: ClientIP` with its time-out (default 3 h).
    pub affinity: Option<Duration>,
    /// Endpoints that are not ready are published in DNS (and only there).
    pub publish_not_ready: bool,
    /// Who sees it.
    pub audience: Audience,
    /// Which endpoints are preferred (`trafficDistribution`).
    pub distribution: Option<Distribution>,
    /// Ports in the order of the manifest.
    pub ports: Vec<ServicePort>,
}

impl Service {
    /// A service of which nothing but the name is known: no address, no port.
    pub fn named(name: Name) -> Self {
        Self {
            id: ServiceId::of_service(&name.namespace, &name.name),
            name,
            hostname: None,
            external: false,
            vips: Vec::new(),
            networks: Vec::new(),
            resolution: Resolution::Listed,
            subject_alt_names: Vec::new(),
            external_ips: Vec::new(),
            headless: false,
            external_name: None,
            affinity: None,
            publish_not_ready: false,
            audience: Audience::Everyone,
            distribution: None,
            ports: Vec::new(),
        }
    }

    /// Its full name, where services are called below `cluster_domain`.
    pub fn host(&self, cluster_domain: &str) -> Cow<'_, str> {
        match &self.hostname {
            Some(host) => Cow::Borrowed(host),
            None => Cow::Owned(format!("{}.{}.svc.{cluster_domain}", self.name.name, self.name.namespace)),
        }
    }

    /// Every address apps may dial this service at: cluster addresses, then the external ones.
    pub fn frontend_addrs(&self) -> impl Iterator<Item = IpAddr> {
        self.vips.iter().chain(&self.external_ips).copied()
    }
}

/// One port of a service with its endpoints.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ServicePort {
    /// Name, empty when the only port has none.
    pub name: Arc<str>,
    /// Port of the virtual address. 0 only in a headless service without ports, whose endpoints serve DNS alone.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// `appProtocol`, if given.
    pub app_protocol: Option<Arc<str>>,
    /// Endpoints, both families, ready or not, sorted by address and port.
    pub endpoints: Vec<Endpoint>,
}

/// One address behind a service port.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Endpoint {
    /// Address.
    pub addr: IpAddr,
    /// Target port, already resolved from its name.
    pub port: u16,
    /// The pod, when the address is one's.
    pub workload: Option<WorkloadId>,
    /// Takes new connections.
    pub ready: bool,
    /// `hostname` of the endpoint, for per-pod DNS names of headless services.
    pub hostname: Option<Arc<str>>,
    /// What a resource says of the endpoint itself; `None`: what its workload is.
    pub traits: Option<Arc<Traits>>,
}

/// What holds for the mesh as a whole.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mesh {
    /// Trust domain of its identities.
    pub trust_domain: Arc<str>,
    /// Trust domains whose identities count as this one's.
    pub trust_domain_aliases: Vec<Arc<str>>,
    /// Namespace of mesh-wide policies.
    pub root_namespace: Arc<str>,
    /// DNS suffix of services, lower case.
    pub cluster_domain: Arc<str>,
    /// What connections and requests are routed by where no resource says more.
    pub defaults: Arc<MeshDefaults>,
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            root_namespace: "istio-system".into(),
            cluster_domain: "cluster.local".into(),
            defaults: Arc::default(),
        }
    }
}

impl Mesh {
    /// The trust domain, then its aliases.
    pub fn trust_domains(&self) -> impl Iterator<Item = &str> {
        std::iter::once(&*self.trust_domain).chain(self.trust_domain_aliases.iter().map(|alias| &**alias))
    }

    /// Whether identities of this trust domain count as the mesh's own.
    pub fn is_own_trust_domain(&self, domain: &str) -> bool {
        self.trust_domains().any(|own| own == domain)
    }
}

/// What a snapshot is made of.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// Workloads, in any order.
    pub workloads: Vec<Arc<Workload>>,
    /// Services; of two with one frontend the earlier has it.
    pub services: Vec<Arc<Service>>,
    /// AuthorizationPolicies that apply to some workload, in any order.
    pub policies: Vec<Arc<AuthorizationPolicy>>,
    /// What connections and requests are routed by.
    pub routes: Arc<Routes>,
    /// Secrets that DestinationRules name, of each node that may have them.
    pub credentials: Vec<Arc<Credential>>,
    /// The mesh as a whole.
    pub mesh: Arc<Mesh>,
}

/// What is looked up for connections and filled anew for each state of a large cluster.
type Map<K, V> = HashMap<K, V, RandomState>;

/// Services and places of their ports, by what is dialled.
type Frontends = Map<(IpAddr, u16, Protocol), (Name, usize)>;

/// Those that came after the first one at an address, by what is dialled.
type Later = Vec<((IpAddr, u16, Protocol), (Name, usize))>;

/// Of those that several services share, all of them.
type Shared = Map<(IpAddr, u16), Vec<(Name, usize)>>;

/// Secrets by node and name.
type Credentials = BTreeMap<(Arc<str>, Name), Arc<Credential>>;

/// Immutable world; build with [`Snapshot::new`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    version: u64,
    workloads: Arc<Map<WorkloadId, Arc<Workload>>>,
    services: BTreeMap<Name, Arc<Service>>,
    policies: Arc<BTreeMap<Name, Arc<AuthorizationPolicy>>>,
    by_addr: Arc<Map<IpAddr, WorkloadId>>,
    by_vip: Arc<Frontends>,
    /// Those of TCP that the name which is asked for tells apart: the one in `by_vip`, then the others by name.
    shared: Arc<Shared>,
    /// Services by the hosts that Kubernetes does not know, those of precedence first.
    by_host: Arc<HashMap<Arc<str>, Vec<Name>>>,
    /// Whether a wildcard among those hosts begins within a label, as `*-a.b` does.
    has_partial_hosts: bool,
    /// Services by the networks that lead to them.
    by_network: Arc<[(IpNet, Name)]>,
    routes: Arc<Routes>,
    /// By node and Secret.
    credentials: Arc<Credentials>,
    /// Ports at which some host has an HTTP table.
    http_ports: BTreeSet<u16>,
    stream_ports: BTreeSet<u16>,
    /// Destinations of which a DestinationRule limits the requests.
    pub(crate) limited_by_request: Arc<[ClusterKey]>,
    /// Whether a Sidecar limits requests.
    pub(crate) counts_requests_of_sidecars: bool,
    /// Services, with a port, that are told by name or network alone and that something is said about.
    unlisted: Arc<[(Name, u16)]>,
    /// Services without an address of their own, with a port that something is said about.
    routed_by_name: Arc<[(Name, u16)]>,
    mesh: Arc<Mesh>,
}

/// Who owns each address.
fn owners(workloads: &Map<WorkloadId, Arc<Workload>>) -> Map<IpAddr, WorkloadId> {
    let mut owners = Map::with_capacity_and_hasher(workloads.len(), RandomState::default());
    let rank = |id: WorkloadId| workloads.get(&id).map(|workload| (&workload.name, id));
    for workload in workloads.values().filter(|workload| !workload.terminated) {
        for addr in &workload.addrs {
            let owner = owners.entry(*addr).or_insert(workload.id);
            if *owner != workload.id && rank(*owner) < rank(workload.id) {
                *owner = workload.id;
            }
        }
    }
    owners
}

impl Snapshot {
    /// Indexes the parts. Invariant of the result: every index entry points at an existing part.
    ///
    /// Two live workloads with one address: the one that is not terminated wins, then the larger name, so that
    /// the outcome does not depend on order. Two services with one address, port and protocol: the earlier in
    /// `services` has it. Two with one host: the earlier comes first there too.
    pub fn new(version: u64, parts: Parts) -> Self {
        let Parts { workloads, services, policies, routes, credentials, mesh } = parts;
        let by_id: Map<WorkloadId, Arc<Workload>> =
            workloads.into_iter().map(|workload| (workload.id, workload)).collect();
        let by_addr = owners(&by_id);
        let mut by_vip = Frontends::default();
        let mut by_host: HashMap<Arc<str>, Vec<Name>> = HashMap::new();
        let mut by_network = Vec::new();
        let mut later = Later::new();
        for service in &services {
            if let Some(host) = &service.hostname {
                by_host.entry(Arc::clone(host)).or_default().push(service.name.clone());
            }
            by_network.extend(service.networks.iter().map(|net| (*net, service.name.clone())));
            for vip in service.frontend_addrs() {
                for (index, port) in service.ports.iter().enumerate() {
                    let frontend = (vip, port.port, port.protocol);
                    let owner = by_vip.entry(frontend).or_insert_with(|| (service.name.clone(), index));
                    if owner.0 != service.name {
                        later.push((frontend, (service.name.clone(), index)));
                    }
                }
            }
        }
        let mut snapshot = Self {
            version,
            workloads: Arc::new(by_id),
            services: services.into_iter().map(|s| (s.name.clone(), s)).collect(),
            policies: Arc::new(policies.into_iter().map(|p| (p.name.clone(), p)).collect()),
            by_addr: Arc::new(by_addr),
            by_vip: Arc::new(by_vip),
            shared: Arc::default(),
            has_partial_hosts: by_host.keys().any(|host| host.starts_with('*') && !host.starts_with("*.")),
            by_host: Arc::new(by_host),
            by_network: by_network.into(),
            http_ports: routes.http.keys().map(|at| at.port).collect(),
            stream_ports: routes.streams.keys().map(|at| at.port).collect(),
            limited_by_request: routes.limited_by_request().cloned().collect(),
            counts_requests_of_sidecars: routes
                .sidecars
                .values()
                .any(|scope| scope.inbound.limits_requests()),
            unlisted: Arc::default(),
            routed_by_name: Arc::default(),
            credentials: Arc::new(
                credentials.into_iter().map(|c| ((Arc::clone(&c.node), c.name.clone()), c)).collect(),
            ),
            routes,
            mesh,
        };
        snapshot.shared = Arc::new(snapshot.find_shared(later));
        snapshot.unlisted = snapshot.find_unlisted().collect();
        snapshot.routed_by_name = snapshot.find_routed_by_name().collect();
        snapshot
    }

    /// The same world with other endpoints: `changed` are services of it that differ in nothing else. What is not theirs is shared.
    pub fn with_endpoints(&self, version: u64, changed: impl IntoIterator<Item = Arc<Service>>) -> Self {
        let mut next = Self { version, ..self.clone() };
        for service in changed {
            if let Some(known) = next.services.get_mut(&service.name) {
                *known = service;
            }
        }
        next
    }

    /// The same world with these workloads, in place of those with their ids or in addition. What is not theirs is shared.
    pub fn with_workloads(&self, version: u64, changed: impl IntoIterator<Item = Arc<Workload>>) -> Self {
        let mut workloads = Map::clone(&self.workloads);
        workloads.extend(changed.into_iter().map(|workload| (workload.id, workload)));
        let by_addr = Arc::new(owners(&workloads));
        Self { version, workloads: Arc::new(workloads), by_addr, ..self.clone() }
    }

    /// Whether both describe the same world, whatever their versions.
    pub fn same_world(&self, other: &Self) -> bool {
        self.services == other.services
            && self.workloads == other.workloads
            && self.by_addr == other.by_addr
            && self.by_vip == other.by_vip
            && self.shared == other.shared
            && self.by_host == other.by_host
            && self.policies == other.policies
            && self.routes == other.routes
            && self.credentials == other.credentials
            && self.mesh == other.mesh
    }

    /// Grows with every publication; 0 is "never published".
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The mesh as a whole.
    pub fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }

    /// What connections and requests are routed by.
    pub fn routes(&self) -> &Arc<Routes> {
        &self.routes
    }

    /// The Secrets of all nodes that are known here: on an agent those of its own.
    pub fn credentials(&self) -> impl Iterator<Item = &Arc<Credential>> {
        self.credentials.values()
    }

    /// A Secret, if a DestinationRule names it for pods of a node.
    pub fn credential(&self, node: &str, name: &Name) -> Option<&Arc<Credential>> {
        self.credentials.get(&(node.into(), name.clone()))
    }

    /// Whether any host has an HTTP table at a port.
    pub fn has_http_at(&self, port: u16) -> bool {
        self.http_ports.contains(&port)
    }

    /// Whether any host has a TLS or TCP table at a port.
    pub fn has_stream_at(&self, port: u16) -> bool {
        self.stream_ports.contains(&port)
    }

    /// DNS suffix of services, usually `cluster.local`.
    pub fn cluster_domain(&self) -> &str {
        &self.mesh.cluster_domain
    }

    /// An AuthorizationPolicy by name.
    pub fn policy(&self, name: &Name) -> Option<&Arc<AuthorizationPolicy>> {
        self.policies.get(name)
    }

    /// All AuthorizationPolicies that apply to some workload, by namespace and name.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<AuthorizationPolicy>> {
        self.policies.values()
    }

    /// A workload by id.
    pub fn workload(&self, id: WorkloadId) -> Option<&Arc<Workload>> {
        self.workloads.get(&id)
    }

    /// All workloads, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The workload that owns an address.
    pub fn workload_at(&self, addr: IpAddr) -> Option<&Arc<Workload>> {
        self.workload(*self.by_addr.get(&addr.to_canonical())?)
    }

    /// The workload behind an endpoint: the one it names, else the owner of its address.
    pub fn workload_of(&self, endpoint: &Endpoint) -> Option<&Arc<Workload>> {
        endpoint.workload.and_then(|id| self.workload(id)).or_else(|| self.workload_at(endpoint.addr))
    }

    /// The addresses that lead to a workload.
    pub fn workload_addrs(&self) -> impl Iterator<Item = (IpAddr, &Arc<Workload>)> {
        self.by_addr.iter().filter_map(|(addr, id)| Some((*addr, self.workload(*id)?)))
    }

    /// A service by name.
    pub fn service(&self, name: &Name) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All services, by namespace and name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// Every address, port and protocol that leads to a service port, in no order.
    pub fn frontends(&self) -> impl Iterator<Item = (IpAddr, &Arc<Service>, &ServicePort)> {
        self.by_vip.iter().filter_map(|((addr, _, _), (name, index))| {
            let service = self.services.get(name)?;
            Some((*addr, service, service.ports.get(*index)?))
        })
    }

    /// The service port behind a virtual address.
    pub fn service_at(
        &self,
        addr: IpAddr,
        port: u16,
        protocol: Protocol,
    ) -> Option<(&Arc<Service>, &ServicePort)> {
        let (name, index) = self.by_vip.get(&(addr.to_canonical(), port, protocol))?;
        let service = self.services.get(name)?;
        Some((service, service.ports.get(*index)?))
    }
}
