//! What a node itself knows of its pods, and the world with that put in.
//!
//! The runtime, the API server and the controller each know a part: where a pod's network namespace is and which addresses
//! it got (CNI, or a look at the node's processes), whether it shall be meshed (the node's own watch), and how it is policed.
//! A pod's first connect may come before the last of them is heard, so nothing here waits for anybody.
//!
//! Invariants:
//! - What the node knows of a pod counts for the incarnation it was learnt of, and for no other.
//! - A pod that the source has not heard of is enrolled all the same, and admits nobody until it has.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use crate::{
    id::WorkloadId,
    policy,
    snapshot::{Name, Snapshot, Tunnel, Workload},
};

/// Name of the policy of a pod that the source has not heard of: there is none of that name, and what is not known grants
/// nothing.
const UNHEARD: (&str, &str) = ("", "the controller has not heard of this pod yet");

/// What the container runtime said of a pod (CNI ADD).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Attached {
    /// Its uid as the runtime has it: of a static pod the hash of its manifest.
    pub uid: Arc<str>,
    /// File of its network namespace.
    pub netns: Arc<str>,
    /// Its addresses, at most one per family.
    pub addrs: Vec<IpAddr>,
}

/// What the API server says of a pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Declared {
    /// Its uid as the runtime has it.
    pub runtime_uid: Arc<str>,
    /// The pod. `meshed` and `skipped` are what its labels and its namespace's say; policy is not known here.
    pub workload: Arc<Workload>,
}

/// Everything the node knows of its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalFacts {
    /// From the container runtime.
    pub attached: BTreeMap<Name, Attached>,
    /// From the API server.
    pub declared: BTreeMap<Name, Declared>,
    /// Files of the network namespaces that processes of pods were found in, by the runtime's uid of the pod.
    pub running: BTreeMap<Arc<str>, Arc<str>>,
}

/// Whether a pod is meshed, as far as is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Membership {
    /// It shall be in the mesh.
    Meshed(WorkloadId),
    /// It shall not be, or cannot be; with the reason if it asked for it.
    Unmeshed(Option<Arc<str>>),
    /// Nobody has heard of it.
    Unknown,
}

impl LocalFacts {
    /// Nothing is known that the source does not say.
    pub fn is_empty(&self) -> bool {
        self.attached.is_empty() && self.declared.is_empty() && self.running.is_empty()
    }

    /// Whether a pod is meshed. What the API server says to the node itself comes first: it is never older than what the
    /// controller made of it.
    pub fn membership(&self, snapshot: &Snapshot, name: &Name, runtime_uid: &str) -> Membership {
        let declared = self.declared.get(name).filter(|d| &*d.runtime_uid == runtime_uid);
        let workload = match declared {
            Some(declared) => &declared.workload,
            None => match heard_of(snapshot, name, runtime_uid) {
                Some(workload) => workload,
                None => return Membership::Unknown,
            },
        };
        match (&workload.skipped, workload.meshed) {
            (Some(why), _) => Membership::Unmeshed(Some(Arc::clone(why))),
            (None, true) => Membership::Meshed(workload.id),
            (None, false) => Membership::Unmeshed(None),
        }
    }

    /// The workloads of `node` that look different with what is known here; their count is bounded by the node's pods.
    pub fn changes(&self, snapshot: &Snapshot, node: &str) -> Vec<Arc<Workload>> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut changed: HashMap<WorkloadId, Workload> = HashMap::new();
        for declared in self.declared.values() {
            let workload = &declared.workload;
            let now = match snapshot.workload(workload.id) {
                Some(heard) => Workload {
                    meshed: workload.meshed,
                    skipped: workload.skipped.clone(),
                    terminated: heard.terminated || workload.terminated,
                    ..Workload::clone(heard)
                },
                None => unheard(snapshot, workload),
            };
            changed.insert(now.id, now);
        }
        for (name, attached) in &self.attached {
            let Some(id) = self.id_of(snapshot, name, &attached.uid) else { continue };
            let Some(workload) = entry(&mut changed, snapshot, id) else { continue };
            workload.netns = Some(Arc::clone(&attached.netns));
            if workload.addrs.is_empty() {
                workload.addrs.clone_from(&attached.addrs);
            }
        }
        self.add_running(snapshot, node, &mut changed);
        changed
            .into_values()
            .filter(|now| snapshot.workload(now.id).is_none_or(|before| **before != *now))
            .map(Arc::new)
            .collect()
    }

    /// Network namespaces that were found, for pods without one.
    fn add_running(&self, snapshot: &Snapshot, node: &str, changed: &mut HashMap<WorkloadId, Workload>) {
        if self.running.is_empty() {
            return;
        }
        let mut uids: HashMap<WorkloadId, &Arc<str>> = HashMap::new();
        for declared in self.declared.values() {
            uids.insert(declared.workload.id, &declared.runtime_uid);
        }
        // An id is made of name and uid, and the source says only names: each is tried with each uid.
        let of_node = |w: &&Arc<Workload>| &*w.node == node && !w.terminated && w.netns.is_none();
        for workload in snapshot.workloads().filter(of_node) {
            if uids.contains_key(&workload.id) {
                continue;
            }
            let name = &workload.name;
            let is = |uid: &&Arc<str>| WorkloadId::of_pod(&name.namespace, &name.name, uid) == workload.id;
            if let Some(uid) = self.running.keys().find(is) {
                uids.insert(workload.id, uid);
            }
        }
        for (id, uid) in uids {
            let Some(netns) = self.running.get(uid) else { continue };
            let Some(workload) = entry(changed, snapshot, id) else { continue };
            if workload.netns.is_none() {
                workload.netns = Some(Arc::clone(netns));
            }
        }
    }

    /// The workload that a pod of the runtime is.
    fn id_of(&self, snapshot: &Snapshot, name: &Name, runtime_uid: &str) -> Option<WorkloadId> {
        match self.declared.get(name) {
            Some(declared) if &*declared.runtime_uid == runtime_uid => Some(declared.workload.id),
            _ => heard_of(snapshot, name, runtime_uid).map(|workload| workload.id),
        }
    }
}

/// A workload of the source by name and uid; a hand-written one has no uid.
fn heard_of<'a>(snapshot: &'a Snapshot, name: &Name, uid: &str) -> Option<&'a Arc<Workload>> {
    let by = |uid: &str| snapshot.workload(WorkloadId::of_pod(&name.namespace, &name.name, uid));
    by(uid).or_else(|| by(""))
}

/// A workload about to change.
fn entry<'a>(
    changed: &'a mut HashMap<WorkloadId, Workload>,
    snapshot: &Snapshot,
    id: WorkloadId,
) -> Option<&'a mut Workload> {
    use std::collections::hash_map::Entry;
    match changed.entry(id) {
        Entry::Occupied(known) => Some(known.into_mut()),
        Entry::Vacant(new) => Some(new.insert(Workload::clone(snapshot.workload(id)?))),
    }
}

/// Whether the source has told of a workload, and not only the node itself.
pub fn is_heard(workload: &Workload) -> bool {
    !workload.policies.iter().any(|name| (&*name.namespace, &*name.name) == UNHEARD)
}

/// A pod before the source has heard of it: who it is is known, so that it can call others; who may call it is not.
fn unheard(snapshot: &Snapshot, declared: &Workload) -> Workload {
    let policies = vec![Name::new(UNHEARD.0, UNHEARD.1)];
    let policy_hash = policy::policy_hash(&declared.modes, snapshot.mesh(), &[]).wrapping_add(1);
    Workload {
        trust_domain: Arc::clone(&snapshot.mesh().trust_domain),
        tunnel: if declared.meshed { Tunnel::Hbone } else { Tunnel::None },
        policies,
        policy_hash,
        ..declared.clone()
    }
}

#[cfg(test)]
mod tests;
