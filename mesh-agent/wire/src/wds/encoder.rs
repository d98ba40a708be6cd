//! Snapshots become resources, and only those that changed since the snapshot before.
//!
//! Invariants:
//! - The resources of all edits so far, applied in order, are exactly those of the last snapshot.
//! - A resource's reach is a node's where only that needs it, a service's that of its clients and servers ([`mesh_core::reach`]), and that
//!   of endpoints which are no pod's that of the services that claim them. All else is for everyone.
//! - Parts of two snapshots that share their allocation are compared by it alone: a change costs one pass of pointer
//!   comparisons plus what it changes.
//!
//! Expected of a snapshot: pods are unique by namespace and name, services by namespace and host (a host that Kubernetes knows is no
//! ServiceEntry's, S53), ports of a service by name, number and protocol.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use mesh_core::{
    reach::{PodChange, Reach, Reaches, Touched},
    snapshot::{Mesh, Name, Service, Snapshot, Workload},
};

use super::{
    Kind, MESH_NAME, credential,
    endpoints::{Claim, Claims, Place},
    foreign, policy, route, service, workload,
};
use crate::proto::{nodemesh, security::Authorization, workload as wds};

/// One resource as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The encoded message.
    pub body: Vec<u8>,
    /// Other names it can be asked for, e.g. `/10.0.0.1`.
    pub aliases: Vec<String>,
    /// Who is told of it.
    pub reach: Reach,
}

impl Encoded {
    fn new(message: &impl prost::Message, aliases: Vec<String>) -> Self {
        Self { body: message.encode_to_vec(), aliases, reach: Reach::Everyone }
    }
}

/// What changed, by kind and name: `None` removes. A resource may be among them that is the same as before.
pub type Edits = BTreeMap<(Kind, String), Option<Encoded>>;

/// Encodes one snapshot after the other.
#[derive(Debug, Default)]
pub struct Encoder {
    last: Arc<Snapshot>,
    claims: Claims,
    /// Services by the addresses they claim.
    frontends: HashMap<IpAddr, BTreeSet<Name>>,
    /// Services by the host they declare.
    hosts: HashMap<Arc<str>, BTreeSet<Name>>,
    reaches: Reaches,
    /// Policies that say modes to foreign clients, and how many pods have them.
    modes: BTreeMap<Name, (usize, Authorization)>,
    names: BTreeSet<(Kind, String)>,
}

impl Encoder {
    /// An encoder whose clients have nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What turns the resources of the snapshot before into those of this one.
    pub fn update(&mut self, snapshot: &Arc<Snapshot>) -> Edits {
        if snapshot.mesh() != self.last.mesh() || self.names.is_empty() {
            return self.all(snapshot);
        }
        let mut edits = self.changes(snapshot);
        self.last = Arc::clone(snapshot);
        edits.retain(|key, edit| edit.is_some() || self.names.contains(key));
        for (key, edit) in &edits {
            match edit {
                Some(_) => drop(self.names.insert(key.clone())),
                None => drop(self.names.remove(key)),
            }
        }
        edits
    }

    /// Everything anew: names of services and policies depend on facts of the mesh.
    fn all(&mut self, snapshot: &Arc<Snapshot>) -> Edits {
        let gone = std::mem::take(self).names;
        // Changes from an empty world of the same mesh.
        let mesh = Arc::clone(snapshot.mesh());
        self.last = Arc::new(Snapshot::new(0, mesh_core::snapshot::Parts { mesh, ..Default::default() }));
        let mut edits = self.changes(snapshot);
        edits.insert((Kind::Mesh, MESH_NAME.to_owned()), Some(mesh_resource(snapshot.mesh())));
        edits.retain(|_, edit| edit.is_some());
        self.last = Arc::clone(snapshot);
        self.names = edits.keys().cloned().collect();
        for key in gone {
            edits.entry(key).or_insert(None);
        }
        edits
    }

    fn changes(&mut self, new: &Snapshot) -> Edits {
        let old = Arc::clone(&self.last);
        let mut changes = Changes { removed: BTreeSet::new(), set: Edits::new() };
        let scopes_changed = self.policies(&old, new, &mut changes);
        let mut places: BTreeSet<Place> = BTreeSet::new();
        let pods = workload_changes(&old, new);
        self.services(&old, new, &pods, &mut places, &mut changes);
        if !Arc::ptr_eq(old.routes(), new.routes()) {
            route::each_change(old.routes(), new.routes(), |name, message| match message {
                Some(message) => changes.set(Kind::Route, name, Encoded::new(&message, Vec::new())),
                None => changes.remove(Kind::Route, name),
            });
        }
        for credential in old.credentials() {
            changes.remove(Kind::Credential, credential::resource_name(credential));
        }
        for credential in new.credentials() {
            let before = old.credential(&credential.node, &credential.name);
            let name = credential::resource_name(credential);
            if before.is_some_and(|before| same(before, credential)) {
                changes.keep(&(Kind::Credential, name));
                continue;
            }
            let mut encoded = Encoded::new(&credential::encode(credential), Vec::new());
            encoded.reach = Reach::node(Arc::clone(&credential.node));
            changes.set(Kind::Credential, name, encoded);
        }
        for (before, after) in pods {
            for pod in [before, after].into_iter().flatten() {
                places.insert(Place::Workload(pod.id));
                for addr in &pod.addrs {
                    let claim = Claim::Address(*addr);
                    places.extend([claim.place(&old), claim.place(new), Place::Address(*addr)]);
                }
            }
            node_pod(before, after, &mut changes);
            self.count_modes(before, new.mesh(), false, &mut changes);
            self.count_modes(after, new.mesh(), true, &mut changes);
        }
        if scopes_changed {
            places.extend(new.workloads().map(|pod| Place::Workload(pod.id)));
        }
        for place in places {
            self.address(place, &old, new, &mut changes);
        }
        changes.edits()
    }

    /// Returns whether the set of policies, or the scope of one, is another.
    fn policies(&self, old: &Snapshot, new: &Snapshot, changes: &mut Changes) -> bool {
        let mut scopes_changed = false;
        for policy in old.policies().filter(|policy| new.policy(&policy.name).is_none()) {
            changes.remove(Kind::Authorization, policy::resource_name(&policy.name));
            scopes_changed = true;
        }
        for policy in new.policies() {
            let before = old.policy(&policy.name);
            scopes_changed |= before.map(|p| p.scope) != Some(policy.scope);
            if before.is_none_or(|before| !same(before, policy)) {
                let message = policy::encode(policy, new.mesh());
                let name = policy::resource_name(&policy.name);
                changes.set(Kind::Authorization, name, Encoded::new(&message, Vec::new()));
            }
        }
        scopes_changed
    }

    fn services(
        &mut self,
        old: &Snapshot,
        new: &Snapshot,
        pods: &[PodChange<'_>],
        places: &mut BTreeSet<Place>,
        changes: &mut Changes,
    ) {
        let gone = old.services().filter(|service| new.service(&service.name).is_none());
        let mut changed: Vec<(Option<&Service>, Option<&Service>)> =
            gone.map(|service| (Some(&**service), None)).collect();
        changed.extend(new.services().filter_map(|service| {
            let before = old.service(&service.name);
            let differs = before.is_none_or(|before| !same(before, service));
            differs.then(|| (before.map(|before| &**before), Some(&**service)))
        }));
        let mut encode: BTreeSet<Name> = BTreeSet::new();
        // Those too that are gone.
        let mut touched: BTreeSet<Name> = BTreeSet::new();
        for (before, after) in changed {
            touched.extend(before.into_iter().chain(after).map(|service| service.name.clone()));
            let differing: HashSet<Claim> = self.claims.change(before, after);
            places.extend(differing.iter().flat_map(|claim| [claim.place(old), claim.place(new)]));
            // What a pod says of its services to foreign clients depends on more than the endpoint.
            if before.map(foreign_view) != after.map(foreign_view) {
                let endpoints = after.into_iter().flat_map(|s| &s.ports).flat_map(|port| &port.endpoints);
                places.extend(endpoints.map(|endpoint| {
                    endpoint.workload.map_or(Claim::Address(endpoint.addr), Claim::Workload).place(new)
                }));
            }
            for addr in before.into_iter().flat_map(Service::frontend_addrs) {
                if let (Some(names), Some(before)) = (self.frontends.get_mut(&addr), before) {
                    names.remove(&before.name);
                    encode.extend(names.iter().cloned());
                    if names.is_empty() {
                        self.frontends.remove(&addr);
                    }
                }
            }
            if let Some(before) = before
                && let Some(host) = &before.hostname
                && let Some(names) = self.hosts.get_mut(host)
            {
                names.remove(&before.name);
                encode.extend(names.iter().cloned());
                if names.is_empty() {
                    self.hosts.remove(host);
                }
            }
            if let (Some(before), Some(after)) = (before, after)
                && before.hostname != after.hostname
            {
                changes.remove(Kind::Address, service::resource_name(before, old.mesh()));
            }
            if let Some(after) = after {
                if let Some(host) = &after.hostname {
                    self.hosts.entry(Arc::clone(host)).or_default().insert(after.name.clone());
                }
                for addr in after.frontend_addrs() {
                    self.frontends.entry(addr).or_default().insert(after.name.clone());
                }
                encode.insert(after.name.clone());
            } else if let Some(before) = before {
                changes.remove(Kind::Address, service::resource_name(before, old.mesh()));
            }
        }
        // Who has a contested address, host or network may change without any of the services.
        let contested: BTreeSet<Name> =
            self.frontends.values().filter(|names| names.len() > 1).flatten().cloned().collect();
        encode.extend(contested.iter().cloned());
        encode.extend(self.hosts.values().filter(|names| names.len() > 1).flatten().cloned());
        encode.extend(service::sharing_networks(old));
        encode.extend(service::sharing_networks(new));
        touched.extend(self.claims.services_of(pods));
        let touched = Touched { pods, services: &touched, contested: &contested };
        let moved = self.reaches.update(old, new, &touched);
        for service in moved.iter().filter_map(|name| new.service(name)) {
            let endpoints = service.ports.iter().flat_map(|port| &port.endpoints);
            let carriers = endpoints.map(|endpoint| Claim::of(endpoint).place(new));
            // A pod is for everyone whatever it serves.
            places.extend(carriers.filter(|place| match place {
                Place::Workload(id) => new.workload(*id).is_none(),
                Place::Address(_) => true,
            }));
        }
        encode.extend(moved);
        for service in encode.iter().filter_map(|name| new.service(name)) {
            let (message, aliases) = service::encode(service, new);
            let address = wds::Address { r#type: Some(wds::address::Type::Service(message)) };
            let name = service::resource_name(service, new.mesh());
            let encoded =
                Encoded { reach: self.reaches.of(&service.name), ..Encoded::new(&address, aliases) };
            changes.set(Kind::Address, name, encoded);
        }
    }

    fn count_modes(&mut self, pod: Option<&Workload>, mesh: &Mesh, is_there: bool, changes: &mut Changes) {
        let modes = pod.filter(|pod| pod.meshed).and_then(|pod| foreign::of_modes(&pod.modes, mesh));
        let Some((name, authorization)) = modes else { return };
        let resource = policy::resource_name(&name);
        let (count, authorization) = self.modes.entry(name.clone()).or_insert((0, authorization));
        if is_there {
            *count += 1;
            if *count == 1 {
                changes.set(Kind::Authorization, resource, Encoded::new(authorization, Vec::new()));
            }
        } else {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.modes.remove(&name);
                changes.drop_set(Kind::Authorization, resource);
            }
        }
    }

    /// Encodes what is at a place, and removes what was there under another name.
    fn address(&self, place: Place, old: &Snapshot, new: &Snapshot, changes: &mut Changes) {
        let pods = match place {
            Place::Workload(id) => (old.workload(id), new.workload(id)),
            Place::Address(_) => (None, None),
        };
        changes.remove(Kind::Address, workload::endpoint_resource_name(place));
        if let (Some(pod), _) = pods {
            changes.remove(Kind::Address, workload::resource_name(&pod.name));
        }
        let entries = self.claims.at(place, new);
        let (name, encoded, reach) = match pods {
            (_, Some(pod)) => {
                let encoded = Some(workload::encode(pod, &entries, new));
                (workload::resource_name(&pod.name), encoded, Reach::Everyone)
            }
            _ => {
                let name = workload::endpoint_resource_name(place);
                let claiming: BTreeSet<&Name> = entries.iter().map(|entry| &entry.service.name).collect();
                let reaches: Vec<Reach> = claiming.into_iter().map(|name| self.reaches.of(name)).collect();
                (name, workload::encode_endpoints(place, &entries, new.mesh()), Reach::union(&reaches))
            }
        };
        if let Some((message, aliases)) = encoded {
            let address = wds::Address { r#type: Some(wds::address::Type::Workload(message)) };
            changes.set(Kind::Address, name, Encoded { reach, ..Encoded::new(&address, aliases) });
        }
    }
}

/// Edits in the making: what is set wins over what is removed under the same name.
struct Changes {
    removed: BTreeSet<(Kind, String)>,
    set: Edits,
}

impl Changes {
    fn remove(&mut self, kind: Kind, name: String) {
        self.removed.insert((kind, name));
    }

    /// Takes a removal back.
    fn keep(&mut self, key: &(Kind, String)) {
        self.removed.remove(key);
    }

    fn set(&mut self, kind: Kind, name: String, encoded: Encoded) {
        self.set.insert((kind, name), Some(encoded));
    }

    /// Removes, also what was set before.
    fn drop_set(&mut self, kind: Kind, name: String) {
        self.set.remove(&(kind, name.clone()));
        self.removed.insert((kind, name));
    }

    fn edits(self) -> Edits {
        let mut edits: Edits = self.removed.into_iter().map(|key| (key, None)).collect();
        edits.extend(self.set);
        edits
    }
}

/// What foreign clients are told of a service in its pods, its endpoints apart.
fn foreign_view(service: &Service) -> bool {
    service.external_name.is_some()
}

fn same<T: PartialEq>(a: &Arc<T>, b: &Arc<T>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}

fn workload_changes<'a>(old: &'a Snapshot, new: &'a Snapshot) -> Vec<PodChange<'a>> {
    let gone = old.workloads().filter(|pod| new.workload(pod.id).is_none());
    let mut changes: Vec<_> = gone.map(|pod| (Some(&**pod), None)).collect();
    changes.extend(new.workloads().filter_map(|pod| {
        let before = old.workload(pod.id);
        let differs = before.is_none_or(|before| !same(before, pod));
        differs.then(|| (before.map(|before| &**before), Some(&**pod)))
    }));
    changes
}

fn node_pod(before: Option<&Workload>, after: Option<&Workload>, changes: &mut Changes) {
    if let Some(before) = before {
        changes.remove(Kind::NodePod, workload::resource_name(&before.name));
    }
    if let Some(after) = after
        && let Some(message) = workload::encode_node_pod(after)
    {
        let mut encoded = Encoded::new(&message, Vec::new());
        encoded.reach = Reach::node(Arc::clone(&after.node));
        changes.set(Kind::NodePod, workload::resource_name(&after.name), encoded);
    }
}

fn mesh_resource(mesh: &Mesh) -> Encoded {
    let message = nodemesh::Mesh {
        trust_domain: mesh.trust_domain.to_string(),
        trust_domain_aliases: mesh.trust_domain_aliases.iter().map(|alias| alias.to_string()).collect(),
        root_namespace: mesh.root_namespace.to_string(),
        cluster_domain: mesh.cluster_domain.to_string(),
        defaults: route::encode_defaults(&mesh.defaults),
    };
    Encoded::new(&message, Vec::new())
}
