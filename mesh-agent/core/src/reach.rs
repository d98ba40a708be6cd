//! Which nodes need which services: those with a pod that sees one or is led to one by rules, and those that serve one.
//!
//! Invariants:
//! - A node that is left out would give each of its pods the same answers with the service and without it. More nodes than need one are
//!   allowed, fewer are not.
//! - While nothing is hidden from anybody nothing is computed and nothing kept.
//! - A change costs what it touches: a service is looked at again when it changes itself or what rules say does, and the nodes alone
//!   are put together again when pods come to nodes where nobody had their sight, or the last of them goes.
//!
//! Not here: what a client sees ([`crate::route::sight`]); who is told (`mesh-control`).

mod rules;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use self::rules::{Given, Rules};
use crate::{
    route::scope::Audience,
    snapshot::{Name, Protocol, Service, Snapshot, Workload},
};

/// Port of the resolvers that agents ask for their pods, whoever sees them.
const DNS_PORT: u16 = 53;

/// Who is told of something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// All nodes, those too that are not there yet.
    #[default]
    Everyone,
    /// These, sorted, each once; perhaps none.
    Nodes(Arc<[Arc<str>]>),
}

impl Reach {
    /// One node.
    pub fn node(node: Arc<str>) -> Self {
        Self::Nodes([node].into())
    }

    /// These nodes.
    pub fn nodes(nodes: impl IntoIterator<Item = Arc<str>>) -> Self {
        Self::Nodes(nodes.into_iter().collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// Whether there is nobody who is not told.
    pub fn is_everyone(&self) -> bool {
        *self == Self::Everyone
    }

    /// Whether a client is told; one of no node is told what everyone is.
    pub fn includes(&self, node: Option<&str>) -> bool {
        match self {
            Self::Everyone => true,
            Self::Nodes(nodes) => {
                node.is_some_and(|node| nodes.binary_search_by(|known| (**known).cmp(node)).is_ok())
            }
        }
    }

    /// The nodes, unless it is everyone.
    pub fn names(&self) -> Option<&[Arc<str>]> {
        match self {
            Self::Everyone => None,
            Self::Nodes(nodes) => Some(nodes),
        }
    }

    /// Whoever one of these includes.
    pub fn union<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut union: BTreeSet<Arc<str>> = BTreeSet::new();
        for reach in all {
            match reach {
                Self::Everyone => return Self::Everyone,
                Self::Nodes(nodes) => union.extend(nodes.iter().cloned()),
            }
        }
        Self::nodes(union)
    }
}

/// What pods of one sight have in common: their Sidecar and their namespace.
type SightKey = (Option<Name>, Arc<str>);

/// Who needs a service, wherever they run.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Who {
    /// Namespaces it is exported to; `None`: all.
    exported: Option<BTreeSet<Arc<str>>>,
    /// Sidecars that leave it out.
    blind: BTreeSet<Name>,
    /// Namespaces whose clients need to know it though they may not see it: rules for its names are given to them.
    ruled: BTreeSet<Arc<str>>,
}

impl Who {
    fn includes(&self, (sidecar, namespace): &SightKey) -> bool {
        let is_exported = self.exported.as_ref().is_none_or(|namespaces| namespaces.contains(namespace));
        let is_blind = sidecar.as_ref().is_some_and(|sidecar| self.blind.contains(sidecar));
        (is_exported && !is_blind) || self.ruled.contains(namespace)
    }
}

/// What is known of a service.
#[derive(Debug, Default)]
struct Known {
    /// `None`: everybody.
    who: Option<Arc<Who>>,
    /// Nodes of the pods behind it.
    serving: BTreeSet<Arc<str>>,
    reach: Reach,
}

/// A pod before and after.
pub type PodChange<'a> = (Option<&'a Workload>, Option<&'a Workload>);

/// What may be other than it was.
#[derive(Clone, Copy, Debug)]
pub struct Touched<'a> {
    /// Pods.
    pub pods: &'a [PodChange<'a>],
    /// Services that came, changed or went, and those whose endpoints are at addresses or pods that did.
    pub services: &'a BTreeSet<Name>,
    /// All services that have an address which another has too: whose it is must be the same everywhere.
    pub contested: &'a BTreeSet<Name>,
}

/// The reach of each service, from one snapshot to the next.
#[derive(Debug, Default)]
pub struct Reaches {
    is_on: bool,
    /// Pods of each sight by node. One that has terminated needs nothing.
    sights: BTreeMap<SightKey, BTreeMap<Arc<str>, usize>>,
    rules: Rules,
    contested: BTreeSet<Name>,
    services: BTreeMap<Name, Known>,
    /// What several services share is kept once.
    whos: BTreeSet<Arc<Who>>,
    sets: BTreeSet<Arc<[Arc<str>]>>,
    looks: u64,
}

impl Reaches {
    /// The reach of a service.
    pub fn of(&self, service: &Name) -> Reach {
        self.services.get(service).map_or(Reach::Everyone, |known| known.reach.clone())
    }

    /// How often a service was looked at so far.
    pub fn looks(&self) -> u64 {
        self.looks
    }

    /// Follows a change of the world. Returns the services that are there and whose reach is another now.
    pub fn update(&mut self, old: &Snapshot, new: &Snapshot, touched: &Touched<'_>) -> BTreeSet<Name> {
        if !new.hides_anything() {
            let before = std::mem::replace(self, Self { looks: self.looks, ..Self::default() });
            let narrow = before.services.into_iter().filter(|(_, known)| !known.reach.is_everyone());
            return narrow.map(|(name, _)| name).filter(|name| new.service(name).is_some()).collect();
        }
        let is_new = !std::mem::replace(&mut self.is_on, true);
        let moved = match is_new {
            true => self.count(&new.workloads().map(|pod| (None, Some(&**pod))).collect::<Vec<_>>()),
            false => self.count(touched.pods),
        };
        let names_changed = || touched.services.iter().any(|name| host(old, name) != host(new, name));
        let mut all = is_new;
        if is_new || !Arc::ptr_eq(old.routes(), new.routes()) || names_changed() {
            let rules = Rules::of(new);
            all |= rules != self.rules;
            self.rules = rules;
        }
        let before = std::mem::replace(&mut self.contested, touched.contested.clone());
        let contest = before.symmetric_difference(touched.contested).cloned();
        let look: BTreeSet<Name> = match all {
            true => new.services().map(|service| &service.name).chain(touched.services).cloned().collect(),
            false => contest.chain(touched.services.iter().cloned()).collect(),
        };
        for name in &look {
            match new.service(name) {
                Some(service) => self.look(new, service),
                None => drop(self.services.remove(name)),
            }
        }
        let changed = if moved { self.place(None) } else { self.place(Some(&look)) };
        self.whos.retain(|who| Arc::strong_count(who) > 1);
        self.sets.retain(|set| Arc::strong_count(set) > 1);
        changed
    }

    /// Counts pods. Returns whether there is a node where somebody has a sight that nobody had there, or the other way round.
    fn count(&mut self, pods: &[PodChange<'_>]) -> bool {
        let place = |pod: &Workload| {
            let key = (pod.sidecar.clone(), Arc::clone(&pod.name.namespace));
            (!pod.terminated && !pod.node.is_empty()).then(|| (key, Arc::clone(&pod.node)))
        };
        let mut moved = false;
        // Those that come first: a pod in the place of another is no change.
        for (key, node) in pods.iter().filter_map(|(_, after)| place((*after)?)) {
            let count = self.sights.entry(key).or_default().entry(node).or_insert(0);
            moved |= *count == 0;
            *count += 1;
        }
        for (key, node) in pods.iter().filter_map(|(before, _)| place((*before)?)) {
            let Some(nodes) = self.sights.get_mut(&key) else { continue };
            let Some(count) = nodes.get_mut(&node) else { continue };
            *count -= 1;
            if *count == 0 {
                moved = true;
                nodes.remove(&node);
                if nodes.is_empty() {
                    self.sights.remove(&key);
                }
            }
        }
        moved
    }

    /// Finds out who needs a service.
    fn look(&mut self, snapshot: &Snapshot, service: &Service) {
        self.looks += 1;
        let who = self.who(snapshot, service).map(|who| match self.whos.get(&who) {
            Some(known) => Arc::clone(known),
            None => {
                let who = Arc::new(who);
                self.whos.insert(Arc::clone(&who));
                who
            }
        });
        let endpoints = service.ports.iter().flat_map(|port| &port.endpoints).filter(|_| who.is_some());
        // As servers themselves find the services that lead to them.
        let servers = endpoints.filter_map(|endpoint| match endpoint.workload {
            Some(id) => snapshot.workload(id),
            None => snapshot.workload_at(endpoint.addr),
        });
        let servers = servers.filter(|server| !server.terminated && !server.node.is_empty());
        let serving = servers.map(|server| Arc::clone(&server.node)).collect();
        let known = self.services.entry(service.name.clone()).or_default();
        (known.who, known.serving) = (who, serving);
    }

    /// `None`: everybody.
    fn who(&self, snapshot: &Snapshot, service: &Service) -> Option<Who> {
        // Datagrams know no visibility, and pods' questions go to their resolvers whoever sees these.
        let is_for_all =
            |port: &_| matches!(port, (Protocol::Udp, _) | (_, DNS_PORT)) && has_frontend(service);
        // A name that leads elsewhere leads clients there that do not see it.
        if service.external_name.is_some()
            || self.contested.contains(&service.name)
            || service.ports.iter().any(|port| is_for_all(&(port.protocol, port.port)))
        {
            return None;
        }
        let exported = match &service.audience {
            Audience::Everyone => None,
            Audience::Only(namespaces) => Some(namespaces.clone()),
        };
        let blind = self.rules.blind(snapshot, service);
        if exported.is_none() && blind.is_empty() {
            return None;
        }
        match self.rules.given_for(snapshot, service) {
            Given::Everyone => None,
            Given::To(ruled) => Some(Who { exported, blind, ruled }),
        }
    }

    /// Puts the nodes of services together, of all or of these. Returns those with another reach than before.
    fn place(&mut self, these: Option<&BTreeSet<Name>>) -> BTreeSet<Name> {
        let (sights, sets) = (&self.sights, &mut self.sets);
        let mut shared: HashMap<*const Who, Arc<[Arc<str>]>> = HashMap::new();
        let mut changed = BTreeSet::new();
        let mut place = |name: &Name, known: &mut Known| {
            let reach = match &known.who {
                None => Reach::Everyone,
                Some(who) => {
                    let nodes = shared.entry(Arc::as_ptr(who)).or_insert_with(|| {
                        let seeing = sights.iter().filter(|(sight, _)| who.includes(sight));
                        once(sets, seeing.flat_map(|(_, nodes)| nodes.keys().cloned()).collect())
                    });
                    let is_in = |node: &Arc<str>| nodes.binary_search(node).is_ok();
                    Reach::Nodes(match known.serving.iter().all(is_in) {
                        true => Arc::clone(nodes),
                        false => once(sets, nodes.iter().chain(&known.serving).cloned().collect()),
                    })
                }
            };
            if known.reach != reach {
                known.reach = reach;
                changed.insert(name.clone());
            }
        };
        match these {
            None => self.services.iter_mut().for_each(|(name, known)| place(name, known)),
            Some(names) => {
                for name in names {
                    if let Some(known) = self.services.get_mut(name) {
                        place(name, known);
                    }
                }
            }
        }
        changed
    }
}

/// A set that is kept once.
fn once(sets: &mut BTreeSet<Arc<[Arc<str>]>>, nodes: BTreeSet<Arc<str>>) -> Arc<[Arc<str>]> {
    let nodes: Arc<[Arc<str>]> = nodes.into_iter().collect();
    match sets.get(&nodes) {
        Some(known) => Arc::clone(known),
        None => {
            sets.insert(Arc::clone(&nodes));
            nodes
        }
    }
}

fn has_frontend(service: &Service) -> bool {
    service.frontend_addrs().next().is_some()
}

/// The host that a service declares.
fn host<'a>(snapshot: &'a Snapshot, service: &Name) -> Option<&'a str> {
    snapshot.service(service)?.hostname.as_deref()
}

#[cfg(test)]
mod tests;
