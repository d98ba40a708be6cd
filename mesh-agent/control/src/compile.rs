//! From the index to the snapshot.
//!
//! Invariants:
//! - The outcome depends on the resources and the names of their files alone, not on the order of events.
//! - Namespaces without changes are not computed again, and equal parts keep their allocation.

mod credentials;
mod endpoints;
mod entries;
mod modes;
mod policies;
mod routes;
mod sidecars;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use kube::core::{Selector, SelectorExt as _};
use mesh_core::{
    policy::AuthorizationPolicy,
    route::scope::Audience,
    snapshot::{
        Mesh, Name, Parts, Protocol, Service, ServicePort, Snapshot, Tunnel, Workload, are_told_apart,
    },
};

pub(crate) use self::routes::{Registry, port_meant, services_of_entry};
use self::{entries::Entries, routes::RouteCompiler, sidecars::NamespaceSidecars};
use crate::{
    index::{Index, Origin, located},
    problem::{Level, SourceError},
    resource::{ExportTo, Key, Kind, Node, PeerAuthentication, Pod, place_of},
};

/// Settings of the mesh.
#[derive(Clone, Debug)]
pub struct MeshSettings {
    /// DNS suffix of services.
    pub cluster_domain: String,
    /// Namespace of mesh-wide policies.
    pub root_namespace: String,
    /// Trust domain of identities, unless the MeshConfig names one.
    pub trust_domain: String,
    /// Secrets that DestinationRules name are read.
    pub read_secrets: bool,
    /// The nodes that have an agent, by their labels. On others nobody could put a pod into the mesh, whatever its labels ask for.
    pub agent_nodes: Selector,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            cluster_domain: "cluster.local".to_owned(),
            root_namespace: "istio-system".to_owned(),
            trust_domain: "cluster.local".to_owned(),
            read_secrets: true,
            agent_nodes: Selector::default(),
        }
    }
}

impl MeshSettings {
    /// Why nobody of this node is in the mesh. A node that is not known may have an agent.
    fn no_agent(&self, node: Option<&Node>) -> Option<Arc<str>> {
        let node = node.filter(|node| !self.agent_nodes.matches(&node.labels))?;
        Some(
            format!("its node {} has no agent, which is for nodes with {}", node.name, self.agent_nodes)
                .into(),
        )
    }

    /// The mesh as a whole: these settings, over which the MeshConfig in `index` wins.
    fn mesh(&self, index: &Index) -> Mesh {
        let config = index.mesh_config();
        Mesh {
            trust_domain: config
                .and_then(|config| config.trust_domain.clone())
                .unwrap_or_else(|| self.trust_domain.as_str().into()),
            trust_domain_aliases: config
                .map(|config| config.trust_domain_aliases.clone())
                .unwrap_or_default(),
            root_namespace: self.root_namespace.as_str().into(),
            cluster_domain: self.cluster_domain.to_ascii_lowercase().into(),
            defaults: Arc::new(routes::Defaults::of(config).of_mesh(config)),
        }
    }
}

/// Compiles again and again, keeping what did not change.
#[derive(Debug)]
pub struct Compiler {
    settings: MeshSettings,
    mesh: Arc<Mesh>,
    /// Who sees a service that does not say.
    service_audience: ExportTo,
    namespaces: BTreeMap<Arc<str>, CompiledNamespace>,
    entries: Entries,
    routes: RouteCompiler,
    snapshot: Arc<Snapshot>,
}

/// What one namespace contributes.
#[derive(Debug, Default)]
struct CompiledNamespace {
    /// Sorted by name.
    workloads: Vec<Arc<Workload>>,
    /// Sorted by name.
    services: Vec<Placed>,
    policies: Vec<Arc<AuthorizationPolicy>>,
    problems: Vec<SourceError>,
}

impl CompiledNamespace {
    fn is_empty(&self) -> bool {
        self.workloads.is_empty()
            && self.services.is_empty()
            && self.policies.is_empty()
            && self.problems.is_empty()
    }
}

/// Which pods of a namespace may become other workloads than before.
#[derive(Debug)]
enum StalePods {
    /// Those with these names.
    Some(BTreeSet<Arc<str>>),
    /// Something changed that all depend on.
    All,
}

impl Default for StalePods {
    fn default() -> Self {
        Self::Some(BTreeSet::new())
    }
}

impl StalePods {
    fn insert(&mut self, name: Arc<str>) {
        if let Self::Some(names) = self {
            names.insert(name);
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Some(names) => names.contains(name),
            Self::All => true,
        }
    }
}

/// A service with what decides who gets a contested address.
#[derive(Debug)]
struct Placed {
    created: Option<i64>,
    kind: Kind,
    /// The resource that it is from.
    declared: Name,
    origin: Origin,
    service: Arc<Service>,
}

/// Outcome of a compilation.
#[derive(Debug)]
pub struct Compiled {
    /// The world; the same allocation as before when nothing in it changed.
    pub snapshot: Arc<Snapshot>,
    /// What is wrong between resources, each of which is good by itself.
    pub problems: Vec<SourceError>,
    /// The Secrets that DestinationRules name for workloads.
    pub secrets: BTreeSet<Name>,
}

impl Compiler {
    /// Starts from an empty world.
    pub fn new(settings: MeshSettings) -> Self {
        let mesh = Arc::new(settings.mesh(&Index::default()));
        Self {
            settings,
            mesh,
            service_audience: ExportTo::everyone(),
            namespaces: BTreeMap::new(),
            entries: Entries::default(),
            routes: RouteCompiler::default(),
            snapshot: Arc::default(),
        }
    }

    /// The services that rules can name, as of the last compilation.
    pub(crate) fn registry(&self) -> &Registry {
        self.routes.registry()
    }

    /// Compiles what changed in `index` since the last call, which took the changes.
    pub fn compile(&mut self, index: &mut Index) -> Compiled {
        let mut problems = Vec::new();
        let changes = index.take_changes();
        let hosts_changed = changes.iter().any(|key| matches!(key.kind, Kind::ServiceEntry | Kind::Service));
        let mut stale = self.stale(index, &changes);
        let mesh = self.settings.mesh(index);
        let routing = index.mesh_config().map(|config| &config.routing);
        let audience = routing.and_then(|r| r.service_export_to.clone()).unwrap_or_else(ExportTo::everyone);
        let mesh_changed = mesh != *self.mesh;
        if mesh_changed || audience != self.service_audience {
            self.service_audience = audience;
            self.mesh = Arc::new(mesh);
            for namespace in self.namespaces.keys() {
                stale.insert(Arc::clone(namespace), StalePods::All);
            }
        }
        if hosts_changed || mesh_changed {
            let entries = Entries::of(index, &self.mesh);
            for namespace in entries.differing(&self.entries) {
                stale.entry(namespace).or_default();
            }
            self.entries = entries;
        }
        let mesh_wide = modes::widest(index, &self.mesh.root_namespace, &mut problems);
        for (namespace, pods) in stale {
            let before = self.namespaces.remove(&namespace).unwrap_or_default();
            let cx = World {
                index,
                settings: &self.settings,
                mesh: &self.mesh,
                mesh_wide,
                audience: &self.service_audience,
                entries: &self.entries,
            };
            let now = compile_namespace(&cx, &namespace, &before, &pods);
            if !now.is_empty() {
                self.namespaces.insert(namespace, now);
            }
        }
        let workloads: Vec<_> = self.namespaces.values().flat_map(|n| &n.workloads).cloned().collect();
        let services = self.services_by_precedence(&mut problems);
        let defaults = routes::Defaults::of(index.mesh_config());
        let routes = self.routes.update(index, &self.mesh, defaults, services.iter(), &changes);
        problems.extend(self.routes.problems());
        problems.extend(self.namespaces.values().flat_map(|n| &n.problems).cloned());

        let version = self.snapshot.version() + 1;
        let policies = self.namespaces.values().flat_map(|n| &n.policies).cloned().collect();
        let is_read = self.settings.read_secrets;
        let found = credentials::of(index, &workloads, &self.snapshot, is_read, &mut problems);
        let parts = Parts {
            workloads,
            services,
            policies,
            routes,
            credentials: found.all,
            mesh: Arc::clone(&self.mesh),
        };
        let snapshot = Snapshot::new(version, parts);
        // The first compilation is published even if it is empty: "nothing configured" is an answer.
        if version == 1 || !snapshot.same_world(&self.snapshot) {
            self.snapshot = Arc::new(snapshot);
        }
        Compiled { snapshot: Arc::clone(&self.snapshot), problems, secrets: found.wanted }
    }

    /// The namespaces that changes reach.
    fn stale(&self, index: &Index, changes: &BTreeSet<Key>) -> BTreeMap<Arc<str>, StalePods> {
        let mut stale: BTreeMap<Arc<str>, StalePods> = BTreeMap::new();
        for key in changes {
            match key.kind {
                // No part of a namespace: routes are compiled by host.
                Kind::VirtualService
                | Kind::DestinationRule
                | Kind::HttpRoute
                | Kind::GrpcRoute
                | Kind::TlsRoute
                | Kind::TcpRoute
                | Kind::ReferenceGrant
                | Kind::Secret => {}
                Kind::Pod => {
                    let pods = stale.entry(Arc::clone(&key.name.namespace)).or_default();
                    pods.insert(Arc::clone(&key.name.name));
                }
                // What becomes of a pod does not depend on who serves by it.
                Kind::Service | Kind::EndpointSlice | Kind::ServiceEntry | Kind::WorkloadEntry => {
                    stale.entry(Arc::clone(&key.name.namespace)).or_default();
                }
                Kind::Namespace => {
                    stale.insert(Arc::clone(&key.name.name), StalePods::All);
                }
                Kind::Node => {
                    let has_pod =
                        |of: &CompiledNamespace| of.workloads.iter().any(|w| w.node == key.name.name);
                    let of = self.namespaces.iter().filter(|(_, of)| has_pod(of));
                    stale.extend(of.map(|(namespace, _)| (Arc::clone(namespace), StalePods::All)));
                }
                Kind::PeerAuthentication | Kind::AuthorizationPolicy | Kind::Sidecar
                    if key.name.namespace == self.mesh.root_namespace =>
                {
                    let all = index.namespaces().into_iter().chain(self.namespaces.keys().cloned());
                    stale.extend(all.map(|namespace| (namespace, StalePods::All)));
                }
                _ => {
                    stale.insert(Arc::clone(&key.name.namespace), StalePods::All);
                }
            }
        }
        stale.remove("");
        stale
    }

    /// All services, those first that keep an address both they and a later one claim: the oldest, then the first
    /// by origin.
    fn services_by_precedence(&self, problems: &mut Vec<SourceError>) -> Vec<Arc<Service>> {
        let mut placed: Vec<&Placed> = self.namespaces.values().flat_map(|n| &n.services).collect();
        let mut owners: HashMap<(IpAddr, u16, Protocol), &Placed> = HashMap::new();
        // Sorting is only worth its time when somebody claims what is another's.
        let mut hosts: HashSet<&str> = HashSet::new();
        let contested = placed.iter().any(|p| {
            let is_second = p.service.hostname.as_deref().is_some_and(|host| !hosts.insert(host));
            is_second || !p.claim(&mut owners).is_empty()
        });
        if contested {
            // Services of Kubernetes come before entries (S53).
            placed.sort_by_key(|p| {
                let is_entry = p.kind != Kind::Service;
                let (place, name) = ((!is_entry).then_some(&p.origin), is_entry.then_some(&p.declared));
                // Entries as all of Istio's resources (S6).
                let name = name.map(|name| (&name.name, &name.namespace));
                (is_entry, p.created, place, name, &p.service.name)
            });
            owners.clear();
            for p in &placed {
                for (addr, owner) in p.claim(&mut owners) {
                    if !p.shares_with(owner) {
                        problems.push(p.loses(addr, owner));
                    }
                }
            }
        }
        placed.iter().map(|p| Arc::clone(&p.service)).collect()
    }
}

impl Placed {
    /// Enters the service as owner of its frontends; returns, by address, who has one of them already.
    fn claim<'a>(
        &'a self,
        owners: &mut HashMap<(IpAddr, u16, Protocol), &'a Self>,
    ) -> BTreeMap<IpAddr, &'a Self> {
        let mut lost = BTreeMap::new();
        for addr in self.service.frontend_addrs() {
            for port in &self.service.ports {
                let owner = *owners.entry((addr, port.port, port.protocol)).or_insert(self);
                if owner.service.name != self.service.name {
                    // Of several owners the one that keeps it to itself is told of.
                    let known = lost.entry(addr).or_insert(owner);
                    if self.shares_with(known) {
                        *known = owner;
                    }
                }
            }
        }
        lost
    }

    /// Whether both may have an address, at all ports that both have: hosts of entries that requests or server names tell apart. Those of
    /// one entry are meant so, whatever is spoken there.
    fn shares_with(&self, owner: &Self) -> bool {
        if self.kind == Kind::ServiceEntry && owner.kind == self.kind && self.declared == owner.declared {
            return true;
        }
        let both = self.service.ports.iter().filter_map(|port| {
            let same = |other: &&ServicePort| (other.port, other.protocol) == (port.port, port.protocol);
            Some((port, owner.service.ports.iter().find(same)?))
        });
        let mut both = both.peekable();
        both.peek().is_some()
            && both.all(|(own, other)| are_told_apart((&owner.service, other), (&self.service, own)))
    }

    fn loses(&self, addr: IpAddr, owner: &Self) -> SourceError {
        if self.kind == Kind::ServiceEntry {
            let message = format!(
                "holds {addr}, which service {} has on the same port; that one keeps it",
                owner.service.name
            );
            let key = Key { kind: self.kind, name: self.declared.clone() };
            return located(&key, &self.origin, Level::Error, "spec.addresses", message);
        }
        let key = Key { kind: Kind::Service, name: self.service.name.clone() };
        let field = if self.service.vips.contains(&addr) { "spec.clusterIP" } else { "spec.externalIPs" };
        let message = format!(
            "is {addr}, which service {} ({}, document {}) has on the same port; that one keeps it",
            owner.service.name,
            owner.origin.file.display(),
            owner.origin.document
        );
        located(&key, &self.origin, Level::Error, field, message)
    }
}

/// What all namespaces are compiled with.
struct World<'a> {
    index: &'a Index,
    settings: &'a MeshSettings,
    mesh: &'a Mesh,
    mesh_wide: Option<&'a PeerAuthentication>,
    /// Who sees a service that does not say.
    audience: &'a ExportTo,
    entries: &'a Entries,
}

/// The namespaces that `exportTo` of something in `own` means.
fn audience(export_to: &ExportTo, own: &str) -> Audience {
    if export_to.everyone {
        return Audience::Everyone;
    }
    let own = export_to.own.then(|| own.into());
    Audience::Only(export_to.namespaces.iter().cloned().chain(own).collect())
}

fn compile_namespace(
    cx: &World<'_>,
    namespace: &str,
    before: &CompiledNamespace,
    stale: &StalePods,
) -> CompiledNamespace {
    let World { index, settings, mesh, mesh_wide, entries, .. } = *cx;
    let mut problems = Vec::new();
    let opt_in = index.namespace(namespace).and_then(|n| n.opt_in).unwrap_or(false);
    let modes_of =
        modes::NamespacePolicies::of(index, namespace, &mesh.root_namespace, mesh_wide, &mut problems);
    let mut rules = policies::NamespaceRules::of(index, namespace, mesh);
    let sidecars = NamespaceSidecars::of(index, namespace, &mesh.root_namespace);
    let pods: Vec<&Pod> = index.pods(namespace).collect();

    let mut workloads = Vec::with_capacity(pods.len());
    for pod in &pods {
        let known = before.workloads.binary_search_by(|w| w.name.cmp(&pod.workload.name)).ok();
        let known = known.map(|at| &before.workloads[at]);
        if let Some(known) = known.filter(|_| !stale.has(&pod.workload.name.name)) {
            workloads.push(Arc::clone(known));
            continue;
        }
        let (modes, mode_sources) = modes_of.modes(&pod.workload.labels);
        let (policies, policy_hash) = rules.of_workload(&pod.workload.labels, &modes);
        let node = index.node(&pod.workload.node);
        let (meshed, skipped) = match pod.membership(opt_in) {
            (true, _) => {
                let obstacle = settings.no_agent(node);
                (obstacle.is_none(), obstacle)
            }
            other => other,
        };
        let workload = Workload {
            meshed,
            skipped,
            tunnel: if meshed && !pod.tunnel_off { Tunnel::Hbone } else { Tunnel::None },
            trust_domain: Arc::clone(&mesh.trust_domain),
            place: place_of(&pod.workload.place, &pod.workload.node, node),
            sidecar: sidecars.of_workload(&pod.workload.labels),
            policies,
            policy_hash,
            modes,
            mode_sources,
            ..pod.workload.clone()
        };
        workloads.push(reuse(known, workload));
    }

    let sources = endpoints::Sources::of(index, namespace, &pods);
    let mut services = Vec::new();
    let mut place = |created: Option<i64>, kind: Kind, declared: &Name, origin: &Origin, service: Service| {
        let known = before.services.binary_search_by(|p| p.service.name.cmp(&service.name)).ok();
        let service = reuse(known.map(|at| &before.services[at].service), service);
        services.push(Placed { created, kind, declared: declared.clone(), origin: origin.clone(), service });
    };
    for (origin, declared) in index.services(namespace) {
        let mut service = sources.fill(declared, origin, &mut problems);
        service.subject_alt_names = entries.subject_alt_names(&service.name).to_vec();
        service.audience = audience(declared.export_to.as_ref().unwrap_or(cx.audience), namespace);
        place(declared.created, Kind::Service, &declared.service.name, origin, service);
    }
    for (origin, entry) in index.service_entries(namespace) {
        let seen_by = audience(entry.export_to.as_ref().unwrap_or(cx.audience), namespace);
        for mut service in entries.services(entry, origin, &sources, &mut problems) {
            service.audience = seen_by.clone();
            place(entry.created, Kind::ServiceEntry, &entry.name, origin, service);
        }
    }
    services.sort_by(|a, b| a.service.name.cmp(&b.service.name));
    CompiledNamespace { workloads, services, policies: policies::declared(index, namespace), problems }
}

/// The old allocation when it holds the same.
fn reuse<T: PartialEq>(old: Option<&Arc<T>>, new: T) -> Arc<T> {
    match old {
        Some(old) if **old == new => Arc::clone(old),
        _ => Arc::new(new),
    }
}

#[cfg(test)]
mod tests;
