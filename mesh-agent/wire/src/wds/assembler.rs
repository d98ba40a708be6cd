//! Resources become the parts of a snapshot.
//!
//! Invariants:
//! - [`decode`] and [`Assembler::set`] are apart, so that a response with one bad resource changes nothing.
//! - The outcome depends on the resources, not on the order of their arrival.
//! - What no resource changed keeps its allocation from one call of [`Assembler::parts`] to the next.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use mesh_core::{
    policy::{self, AuthorizationPolicy, Scope},
    route::Routes,
    snapshot::{Credential, Mesh, Name, Parts, Service, Workload},
};
use prost::Message as _;

use super::{
    DecodeError, Kind, RESOURCE_BYTES_MAX, ROUTE_BYTES_MAX, credential,
    policy::Policy,
    route::{self, Entry},
    service,
    value::{self, Located, Problem},
    workload::{self, NodePod, Pod, PortRef, ServiceRef, Serving},
};
use crate::proto::{nodemesh, workload as wds};

/// A decoded resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource(Content);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Policy(Policy),
    Workload(Box<workload::Decoded>),
    Service(Box<service::Decoded>),
    Mesh(Arc<Mesh>),
    Route(Entry),
    Credential(Arc<Credential>),
    NodePod(Box<NodePod>),
}

/// Decodes a resource.
///
/// # Errors
/// It is too large, malformed, or has a value that cannot be used.
pub fn decode(kind: Kind, name: &str, body: &[u8]) -> Result<Resource, DecodeError> {
    decode_content(kind, name, body).map(Resource).map_err(|e| e.of(kind, name))
}

fn decode_content(kind: Kind, name: &str, body: &[u8]) -> Result<Content, Located> {
    let bytes_max = if kind == Kind::Route { ROUTE_BYTES_MAX } else { RESOURCE_BYTES_MAX };
    if body.len() > bytes_max {
        return Err(Located::at("message", Problem::TooLarge(body.len())));
    }
    value::text_at("name", name)?;
    let malformed = |e| Located::at("message", Problem::Malformed(e));
    match kind {
        Kind::Authorization => super::policy::decode(name, body).map(Content::Policy),
        Kind::Address => match wds::Address::decode(body).map_err(malformed)?.r#type {
            Some(wds::address::Type::Workload(message)) => {
                workload::decode(&message).map(Box::new).map(Content::Workload)
            }
            Some(wds::address::Type::Service(message)) => {
                service::decode(&message).map(Box::new).map(Content::Service)
            }
            None => Err(Located::at("type", Problem::Missing)),
        },
        Kind::Mesh => decode_mesh(&nodemesh::Mesh::decode(body).map_err(malformed)?).map(Content::Mesh),
        Kind::Route => {
            route::decode(name, &nodemesh::Route::decode(body).map_err(malformed)?).map(Content::Route)
        }
        Kind::Credential => {
            let message = nodemesh::Credential::decode(body).map_err(malformed)?;
            credential::decode(&message).map(Arc::new).map(Content::Credential)
        }
        Kind::NodePod => {
            let message = nodemesh::NodePod::decode(body).map_err(malformed)?;
            NodePod::decode(&message).map(Box::new).map(Content::NodePod)
        }
    }
}

fn decode_mesh(message: &nodemesh::Mesh) -> Result<Arc<Mesh>, Located> {
    let needed = |field: &str, text: &str| match text {
        "" => Err(Located::at(field, Problem::Missing)),
        text => value::text_at(field, text),
    };
    Ok(Arc::new(Mesh {
        trust_domain: needed("trust_domain", &message.trust_domain)?,
        trust_domain_aliases: value::each("trust_domain_aliases", &message.trust_domain_aliases, |alias| {
            value::text(alias)
        })?,
        root_namespace: needed("root_namespace", &message.root_namespace)?,
        cluster_domain: needed("cluster_domain", &message.cluster_domain)?,
        defaults: message
            .defaults
            .as_ref()
            .map(|defaults| route::decode_defaults(defaults).map_err(|error| error.within("defaults")))
            .transpose()?
            .unwrap_or_default(),
    }))
}

/// Holds resources and makes parts of them.
#[derive(Debug, Default)]
pub struct Assembler {
    /// By xDS name, as everything here.
    pods: BTreeMap<Arc<str>, Held>,
    node_pods: HashMap<Arc<str>, NodePod>,
    services: BTreeMap<Arc<str>, HeldService>,
    policies: BTreeMap<Arc<str>, Arc<AuthorizationPolicy>>,
    mesh: Arc<Mesh>,
    routes: BTreeMap<Arc<str>, Entry>,
    credentials: BTreeMap<Arc<str>, Arc<Credential>>,
    /// `None` while they have to be made again.
    made_routes: Option<Arc<Routes>>,
    /// Endpoints of each service by the resource that carries them.
    serving: HashMap<ServiceRef, BTreeMap<Arc<str>, Vec<Serving>>>,
    /// The services that a resource carries endpoints of.
    carried: HashMap<Arc<str>, BTreeSet<ServiceRef>>,
}

#[derive(Debug)]
struct Held {
    pod: Pod,
    /// `None` while it has to be made again.
    made: Option<Arc<Workload>>,
}

#[derive(Debug)]
struct HeldService {
    decoded: service::Decoded,
    made: Option<Arc<Service>>,
}

impl Assembler {
    /// Nothing yet; `mesh` holds until a resource says otherwise, which istiod has none for.
    pub fn new(mesh: Arc<Mesh>) -> Self {
        Self { mesh, ..Self::default() }
    }

    /// Adds or replaces a resource.
    pub fn set(&mut self, name: &str, resource: Resource) {
        let name: Arc<str> = name.into();
        match resource.0 {
            Content::Policy(Policy::Own(policy)) => {
                if self.policies.get(&name) != Some(&policy) {
                    self.policies.insert(name, policy);
                    self.remake_pods();
                }
            }
            Content::Policy(Policy::ForeignOnly) => self.remove(Kind::Authorization, &name),
            Content::Workload(decoded) => {
                self.forget_service(&name);
                self.set_workload(name, *decoded);
            }
            Content::Service(decoded) => {
                self.forget_workload(&name);
                self.services.insert(name, HeldService { decoded: *decoded, made: None });
            }
            Content::Mesh(mesh) => {
                if self.mesh != mesh {
                    self.mesh = mesh;
                    self.remake_pods();
                }
            }
            Content::Route(entry) => {
                if self.routes.get(&name) != Some(&entry) {
                    self.routes.insert(name, entry);
                    self.made_routes = None;
                }
            }
            Content::Credential(credential) => {
                if self.credentials.get(&name) != Some(&credential) {
                    self.credentials.insert(name, credential);
                }
            }
            Content::NodePod(node_pod) => {
                self.remake_pod(&name);
                self.node_pods.insert(name, *node_pod);
            }
        }
    }

    /// Removes a resource; one that is not there is no error.
    pub fn remove(&mut self, kind: Kind, name: &str) {
        match kind {
            Kind::Authorization => {
                if self.policies.remove(name).is_some() {
                    self.remake_pods();
                }
            }
            Kind::Address => {
                self.forget_workload(name);
                self.forget_service(name);
            }
            // What holds for the mesh stays what it was.
            Kind::Mesh => {}
            Kind::Route => {
                if self.routes.remove(name).is_some() {
                    self.made_routes = None;
                }
            }
            Kind::Credential => drop(self.credentials.remove(name)),
            Kind::NodePod => {
                if self.node_pods.remove(name).is_some() {
                    self.remake_pod(name);
                }
            }
        }
    }

    /// The parts of a snapshot.
    pub fn parts(&mut self) -> Parts {
        let services = self.make_services();
        self.make_pods();
        let workloads = self.pods.values().filter_map(|held| held.made.clone()).collect();
        let policies = self.policies.values().cloned().collect();
        let routes = Arc::clone(self.made_routes.get_or_insert_with(|| Arc::new(route::all(&self.routes))));
        let credentials = self.credentials.values().cloned().collect();
        Parts { workloads, services, policies, routes, credentials, mesh: Arc::clone(&self.mesh) }
    }

    fn set_workload(&mut self, name: Arc<str>, decoded: workload::Decoded) {
        self.forget_endpoints(&name);
        let mut services = BTreeSet::new();
        for serving in decoded.endpoints {
            services.insert(serving.service.clone());
            let carriers = self.serving.entry(serving.service.clone()).or_default();
            carriers.entry(Arc::clone(&name)).or_default().push(serving);
        }
        services.iter().for_each(|service| self.remake_service(service));
        if !services.is_empty() {
            self.carried.insert(Arc::clone(&name), services);
        }
        match decoded.pod {
            Some(pod) => {
                let unchanged = self.pods.get(&name).is_some_and(|held| held.pod == pod);
                if !unchanged {
                    self.pods.insert(name, Held { pod, made: None });
                }
            }
            None => drop(self.pods.remove(&name)),
        }
    }

    fn forget_workload(&mut self, name: &str) {
        self.pods.remove(name);
        self.forget_endpoints(name);
    }

    fn forget_endpoints(&mut self, name: &str) {
        for service in self.carried.remove(name).unwrap_or_default() {
            if let Some(carriers) = self.serving.get_mut(&service) {
                carriers.remove(name);
                if carriers.is_empty() {
                    self.serving.remove(&service);
                }
            }
            self.remake_service(&service);
        }
    }

    fn forget_service(&mut self, name: &str) {
        self.services.remove(name);
    }

    fn remake_pods(&mut self) {
        self.pods.values_mut().for_each(|held| held.made = None);
    }

    fn remake_pod(&mut self, name: &str) {
        if let Some(held) = self.pods.get_mut(name) {
            held.made = None;
        }
    }

    fn remake_service(&mut self, service: &ServiceRef) {
        match service {
            ServiceRef::Resource(name) => {
                if let Some(held) = self.services.get_mut(name) {
                    held.made = None;
                }
            }
            // The resource's name begins with the namespace and the service's name.
            ServiceRef::Name(name) => {
                let from: Arc<str> = format!("{}/{}", name.namespace, name.name).into();
                let held =
                    self.services.range_mut(Arc::clone(&from)..).take_while(|(n, _)| n.starts_with(&*from));
                held.filter(|(_, held)| held.decoded.service.name == *name)
                    .for_each(|(_, held)| held.made = None);
            }
        }
    }

    fn make_pods(&mut self) {
        let mut wide: BTreeMap<Option<&str>, Vec<&Name>> = BTreeMap::new();
        let mut by_name: HashMap<&Name, &AuthorizationPolicy> = HashMap::new();
        for policy in self.policies.values() {
            by_name.insert(&policy.name, policy);
            match policy.scope {
                Scope::Mesh => wide.entry(None).or_default().push(&policy.name),
                Scope::Namespace => wide.entry(Some(&policy.name.namespace)).or_default().push(&policy.name),
                Scope::Selector => {}
            }
        }
        for (name, held) in &mut self.pods {
            if held.made.is_some() {
                continue;
            }
            let mut pod = held.pod.workload.clone();
            if let Some(node_pod) = self.node_pods.get(name) {
                node_pod.apply(&mut pod);
            }
            if !held.pod.policies_are_all {
                let scopes = [None, Some(&*pod.name.namespace)];
                let found = scopes.into_iter().filter_map(|scope| wide.get(&scope)).flatten();
                let all: BTreeSet<Name> = found.map(|name| (*name).clone()).chain(pod.policies).collect();
                pod.policies = all.into_iter().collect();
            }
            // A policy that is not there refuses everybody; 0 is no policy's hash.
            let content = |name| by_name.get(name).map_or(Some(0), |policy| policy::content_hash(policy));
            let contents: Vec<u64> = pod.policies.iter().filter_map(content).collect();
            pod.policy_hash = policy::policy_hash(&pod.modes, &self.mesh, &contents);
            held.made = Some(Arc::new(pod));
        }
    }

    /// Services, those that yield an address after those they yield to.
    fn make_services(&mut self) -> Vec<Arc<Service>> {
        let mut by_name: BTreeMap<Name, (Arc<Service>, &BTreeSet<Name>)> = BTreeMap::new();
        for (resource, held) in &mut self.services {
            let HeldService { decoded, made } = held;
            let service = made.get_or_insert_with(|| {
                let refs = [
                    ServiceRef::Name(decoded.service.name.clone()),
                    ServiceRef::Resource(Arc::clone(resource)),
                ];
                let serving = refs.iter().filter_map(|r| self.serving.get(r)).flat_map(BTreeMap::values);
                Arc::new(fill(decoded, serving.flatten()))
            });
            by_name.insert(service.name.clone(), (Arc::clone(service), &decoded.yields_to));
        }
        let mut ordered = Vec::with_capacity(by_name.len());
        let mut placed: BTreeSet<&Name> = BTreeSet::new();
        for name in by_name.keys() {
            place(name, &by_name, &mut placed, &mut ordered);
        }
        ordered
    }
}

/// Places what a service yields to, then the service. A cycle ends where it was entered.
fn place<'a>(
    name: &'a Name,
    all: &'a BTreeMap<Name, (Arc<Service>, &'a BTreeSet<Name>)>,
    placed: &mut BTreeSet<&'a Name>,
    ordered: &mut Vec<Arc<Service>>,
) {
    // Own stack: a chain may be as long as there are services.
    let mut stack = vec![(name, false)];
    while let Some((name, is_ready)) = stack.pop() {
        let Some((service, yields_to)) = all.get(name) else { continue };
        if is_ready {
            ordered.push(Arc::clone(service));
        } else if placed.insert(name) {
            stack.push((name, true));
            stack
                .extend(yields_to.iter().filter(|other| !placed.contains(other)).map(|other| (other, false)));
        }
    }
}

/// The service with its endpoints, sorted, each address and port once.
fn fill<'a>(decoded: &service::Decoded, serving: impl Iterator<Item = &'a Serving>) -> Service {
    let mut by_number: HashMap<u16, Vec<&Serving>> = HashMap::new();
    for serving in serving {
        let (PortRef::Exact { port, .. } | PortRef::Number(port)) = serving.port;
        by_number.entry(port).or_default().push(serving);
    }
    let mut service = decoded.service.clone();
    for port in &mut service.ports {
        let target =
            decoded.targets.iter().find(|(number, _)| *number == port.port).map(|(_, target)| *target);
        let here = by_number.get(&port.port).into_iter().flatten().filter(|serving| match &serving.port {
            PortRef::Exact { name, protocol, .. } => *name == port.name && *protocol == port.protocol,
            PortRef::Number(_) => true,
        });
        port.endpoints = here
            .map(|serving| {
                let mut endpoint = serving.endpoint.clone();
                if endpoint.port == 0 && matches!(serving.port, PortRef::Number(_)) {
                    endpoint.port = target.filter(|target| *target != 0).unwrap_or(port.port);
                }
                endpoint
            })
            .collect();
        port.endpoints.sort_unstable();
        port.endpoints.dedup_by(|a, b| (a.addr, a.port) == (b.addr, b.port));
    }
    service
}
