//! Owns what the node itself knows of its pods, and the world with that put in (`mesh_core::local` decides how).
//!
//! It stands between the source and all who read snapshots, so that a pod's network namespace and addresses, and whether it is
//! meshed, are the same for the kernel's tables and for the data path.
//!
//! Invariants:
//! - Whoever learns something puts it here; nothing is asked again.
//! - A namespace the container runtime gave back is not found again by a look at its processes, which live a little longer.
//! - What the runtime said is on disk before it is acted on, so that the next agent knows it too.

mod attachments;
mod running;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use mesh_core::{
    local::{Attached, Declared, LocalFacts},
    snapshot::{Name, Snapshot},
};
use mesh_redirect::{Netns, NetnsError, RunningPod};
use tokio::sync::{Notify, watch};

pub(super) use self::{
    attachments::FILE,
    running::{follow as follow_running, follow_missing},
};
use crate::cni::{
    known::KnownPods,
    protocol::{Attachment, ContainerRef},
};

/// Namespaces that were given back and are remembered, so that they are not found again.
const RELEASED_MAX: usize = 1024;

/// What is known of the node's pods.
#[derive(Debug)]
pub(super) struct LocalKnowledge {
    state: Mutex<State>,
    facts: watch::Sender<Arc<LocalFacts>>,
    /// Where the runtime's word is kept.
    file: PathBuf,
    /// Somebody misses a pod's namespace.
    look: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// With the order they came in: of two sandboxes of a pod the later counts.
    attachments: BTreeMap<ContainerRef, (u64, Attachment)>,
    next: u64,
    declared: BTreeMap<Name, Declared>,
    /// Opted-in namespaces, if somebody watches them.
    namespaces: Option<BTreeSet<String>>,
    running: BTreeMap<Arc<str>, RunningPod>,
    /// Namespaces given back, by inode: as long as they are open here or the kernel uses the number for no other.
    released: VecDeque<u64>,
    /// Open namespaces of attachments, by file.
    open: HashMap<String, Arc<Netns>>,
}

impl LocalKnowledge {
    /// Starts from what an earlier agent left in `file`.
    pub(super) fn load(file: PathBuf) -> Self {
        let mut state = State::default();
        for attachment in attachments::load(&file) {
            match open(&attachment.netns) {
                Ok(netns) => state.add(attachment, Arc::new(netns)),
                Err(error) => {
                    tracing::debug!(pod = %attachment.pod, error = %crate::report::report(&error), "a pod is gone since");
                }
            }
        }
        let (facts, _) = watch::channel(Arc::new(state.facts()));
        Self { state: Mutex::new(state), facts, file, look: Notify::new() }
    }

    /// What is known now, and each time it changes.
    pub(super) fn facts(&self) -> watch::Receiver<Arc<LocalFacts>> {
        self.facts.subscribe()
    }

    /// The runtime has made a pod's network. Blocking.
    pub(super) fn attach(&self, attachment: Attachment) -> Result<(), NetnsError> {
        let netns = Arc::new(open(&attachment.netns)?);
        let mut state = self.lock();
        state.add(attachment, netns);
        self.changed(&state, true);
        Ok(())
    }

    /// The runtime takes a pod's network away. Returns its file, if it was known. Blocking.
    pub(super) fn detach(&self, container: &ContainerRef) -> Option<String> {
        let mut state = self.lock();
        let netns = state.remove(container)?;
        self.changed(&state, true);
        Some(netns)
    }

    /// Forgets all but these. Returns how many. Blocking.
    pub(super) fn keep_only(&self, valid: &[ContainerRef]) -> usize {
        let valid: BTreeSet<&ContainerRef> = valid.iter().collect();
        let mut state = self.lock();
        let gone: Vec<ContainerRef> =
            state.attachments.keys().filter(|known| !valid.contains(known)).cloned().collect();
        for container in &gone {
            state.remove(container);
        }
        if !gone.is_empty() {
            self.changed(&state, true);
        }
        gone.len()
    }

    /// What the API server says of the node's pods, and which namespaces are opted in.
    pub(super) fn set_declared(&self, declared: BTreeMap<Name, Declared>, namespaces: BTreeSet<String>) {
        let mut state = self.lock();
        state.declared = declared;
        state.namespaces = Some(namespaces);
        self.changed(&state, false);
    }

    /// The pods whose processes were found.
    pub(super) fn set_running(&self, running: &BTreeMap<Arc<str>, RunningPod>) {
        let mut state = self.lock();
        state.running = running
            .iter()
            .filter(|(_, pod)| !state.released.contains(&pod.netns.inode()))
            .map(|(uid, pod)| (Arc::clone(uid), pod.clone()))
            .collect();
        self.changed(&state, false);
    }

    /// A namespace that is held open under this name.
    pub(super) fn opened(&self, path: &str) -> Option<Arc<Netns>> {
        let state = self.lock();
        let found = || state.running.values().find(|pod| pod.netns.path().to_str() == Some(path));
        state.open.get(path).cloned().or_else(|| found().map(|pod| Arc::clone(&pod.netns)))
    }

    /// Looks for pods soon.
    pub(super) fn look_soon(&self) {
        self.look.notify_one();
    }

    /// What the plugin needs while the agent is away. Without a watch of namespaces, one with a meshed pod is meshed.
    pub(super) fn known_pods(&self, snapshot: &Snapshot, node: &str) -> KnownPods {
        let state = self.lock();
        let meshed = |name: &Name| name.namespace.to_string();
        let meshed_namespaces = state
            .namespaces
            .clone()
            .unwrap_or_else(|| snapshot.workloads().filter(|w| w.meshed).map(|w| meshed(&w.name)).collect());
        let of_node =
            snapshot.workloads().filter(|w| &*w.node == node && !w.terminated && w.skipped.is_none());
        let pods = of_node
            .filter(|w| w.meshed != meshed_namespaces.contains(&*w.name.namespace))
            .map(|w| (w.name.to_string(), w.meshed))
            .collect();
        KnownPods { meshed_namespaces, pods }
    }

    fn changed(&self, state: &State, save: bool) {
        if save {
            attachments::save(&self.file, state.attachments.values().map(|(_, attachment)| attachment));
        }
        let facts = state.facts();
        self.facts.send_if_modified(|current| {
            let changed = **current != facts;
            if changed {
                *current = Arc::new(facts);
            }
            changed
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one insert or one replacement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, attachment: Attachment, netns: Arc<Netns>) {
        self.released.retain(|inode| *inode != netns.inode());
        self.open.insert(attachment.netns.clone(), netns);
        self.attachments.insert(attachment.container.clone(), (self.next, attachment));
        self.next += 1;
    }

    fn remove(&mut self, container: &ContainerRef) -> Option<String> {
        let (_, attachment) = self.attachments.remove(container)?;
        let path = attachment.netns;
        // One sandbox may have several interfaces.
        if !self.attachments.values().any(|(_, other)| other.netns == path)
            && let Some(netns) = self.open.remove(&path)
        {
            self.running.retain(|_, pod| pod.netns.inode() != netns.inode());
            if self.released.len() >= RELEASED_MAX {
                self.released.pop_front();
            }
            self.released.push_back(netns.inode());
        }
        Some(path)
    }

    fn facts(&self) -> LocalFacts {
        let mut attached: BTreeMap<Name, (u64, Attached)> = BTreeMap::new();
        for (order, attachment) in self.attachments.values() {
            let name = Name::new(&*attachment.pod.namespace, &*attachment.pod.name);
            if attached.get(&name).is_some_and(|(known, _)| known > order) {
                continue;
            }
            let fact = Attached {
                uid: attachment.pod.uid.as_str().into(),
                netns: attachment.netns.as_str().into(),
                addrs: attachment.addrs.clone(),
            };
            attached.insert(name, (*order, fact));
        }
        let path = |pod: &RunningPod| Some(Arc::from(pod.netns.path().to_str()?));
        LocalFacts {
            attached: attached.into_iter().map(|(name, (_, fact))| (name, fact)).collect(),
            declared: self.declared.clone(),
            running: self
                .running
                .iter()
                .filter_map(|(uid, pod)| Some((Arc::clone(uid), path(pod)?)))
                .collect(),
        }
    }
}

/// The namespace as the runtime names it. Its files may have come after this process got its view of the file system; the
/// host's own view has them.
fn open(path: &str) -> Result<Netns, NetnsError> {
    let here = Netns::open(path.as_ref());
    match here {
        Err(NetnsError::Open { .. } | NetnsError::NotANamespace { .. }) if path.starts_with('/') => {
            Netns::open(format!("/proc/1/root{path}").as_ref()).or(here)
        }
        here => here,
    }
}

/// Puts what is known into the source's world, for as long as the source lives.
#[derive(Debug)]
pub(super) struct Locator {
    node: String,
    source: watch::Receiver<Arc<Snapshot>>,
    facts: watch::Receiver<Arc<LocalFacts>>,
    out: watch::Sender<Arc<Snapshot>>,
}

impl Locator {
    /// Begins with what both have; the receiver has that at once.
    pub(super) fn new(
        node: &str,
        source: watch::Receiver<Arc<Snapshot>>,
        facts: watch::Receiver<Arc<LocalFacts>>,
    ) -> (Self, watch::Receiver<Arc<Snapshot>>) {
        let (out, snapshots) = watch::channel(Arc::default());
        let mut locator = Self { node: node.to_owned(), source, facts, out };
        locator.publish();
        (locator, snapshots)
    }

    /// Works until the source ends.
    pub(super) async fn run(mut self) {
        loop {
            let changed = tokio::select! {
                changed = self.source.changed() => changed,
                changed = self.facts.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            self.publish();
        }
    }

    fn publish(&mut self) {
        let (base, facts) =
            (Arc::clone(&self.source.borrow_and_update()), Arc::clone(&self.facts.borrow_and_update()));
        let changes = facts.changes(&base, &self.node);
        let last = self.out.borrow().version();
        let is_newer = base.version() > last;
        if changes.is_empty() && is_newer {
            self.out.send_replace(base);
            return;
        }
        let version = if is_newer { base.version() } else { last + 1 };
        let world = base.with_workloads(version, changes);
        if !world.same_world(&self.out.borrow()) {
            self.out.send_replace(Arc::new(world));
        }
    }
}

#[cfg(test)]
mod tests;
