//! The endpoints of a destination for one pod, what is outstanding at them, and the choice among them.
//!
//! Invariants:
//! - Endpoints are looked up again only when the world has changed.
//! - HTTP requests and connections that are relayed count at the same endpoints and limits.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
};

use mesh_core::{
    balance::{Ask, outlier::Observed},
    route::{
        cluster::{Algorithm, Cluster},
        scope::Labels,
    },
    snapshot::{Endpoint, Resolution, Service, Snapshot, Traits, Workload},
};

use super::{
    Destination,
    by_name::{Unresolved, is_called, servers},
    choice::Arrangement,
    limits::{Scope, Usage},
    standing::Unfit,
};
use crate::{connections::Live, worker::Worker};

/// One endpoint of a destination.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) addr: SocketAddr,
    pub(crate) workload: Option<Arc<Workload>>,
    /// What a resource says of the endpoint itself.
    pub(crate) traits: Option<Arc<Traits>>,
    /// Requests and connections outstanding from this worker.
    pub(crate) load: Rc<Cell<u32>>,
}

/// Counts a request or a connection at its endpoint.
#[derive(Debug)]
pub(crate) struct Load(Rc<Cell<u32>>);

impl Load {
    /// One more.
    pub(crate) fn new(load: &Rc<Cell<u32>>) -> Self {
        load.set(load.get() + 1);
        Self(Rc::clone(load))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// The endpoints of a destination as of one snapshot.
#[derive(Debug)]
struct Members {
    version: u64,
    policy: Option<Arc<Cluster>>,
    v4: bool,
    all: Vec<Member>,
    arrangement: Arrangement,
}

/// A destination of one pod on one worker.
#[derive(Debug)]
pub(crate) struct Endpoints {
    pub(crate) scope: Scope,
    pub(crate) usage: Arc<Usage>,
    members: RefCell<Option<Rc<Members>>>,
    loads: RefCell<HashMap<SocketAddr, Rc<Cell<u32>>>>,
    used: Cell<u32>,
}

/// For whom, and among what, an endpoint is chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    pub(crate) destination: &'a Destination,
    /// The client's connection.
    pub(crate) live: &'a Live,
    pub(crate) snapshot: &'a Snapshot,
    /// What consistent hashing goes by.
    pub(crate) hash: Option<u64>,
    /// To be avoided while there is another.
    pub(crate) tried: &'a [SocketAddr],
    /// Priority classes that are passed over while there is a farther one.
    pub(crate) skip_classes: u32,
}

/// Why there is no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unchosen {
    /// The destination does not exist.
    NoCluster,
    /// None of its endpoints takes anything.
    NoHealthy,
    /// Its servers are called by name, and the name leads nowhere.
    Unresolved(Unresolved),
}

impl Endpoints {
    pub(super) fn new(scope: Scope, usage: Arc<Usage>) -> Self {
        Self { scope, usage, members: RefCell::default(), loads: RefCell::default(), used: Cell::new(0) }
    }

    /// Tick of the last choice.
    pub(super) fn used(&self) -> u32 {
        self.used.get()
    }

    /// One endpoint.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn choose(&self, worker: &Worker, wish: &Wish<'_>) -> Result<Member, Unchosen> {
        self.used.set(worker.tick());
        let snapshot = wish.snapshot;
        let (service, key, policy) = match wish.destination {
            Destination::Address(addr) | Destination::Own { addr, .. } => {
                return Ok(self.address(snapshot, *addr));
            }
            Destination::Cluster { service, key, policy } => (service, key, policy.as_ref()),
        };
        // As it is by now: a retry may be for an endpoint that was not there before.
        let service = snapshot.service(&key.service).unwrap_or(service);
        let has_port = service.ports.iter().any(|port| port.port == key.port);
        if !has_port || key.subset.is_some() && policy.is_none() {
            return Err(Unchosen::NoCluster);
        }
        let traffic = policy.map(|cluster| &cluster.policy);
        let is_passed_through = service.resolution == Resolution::Dialled
            || traffic.is_some_and(|policy| policy.balancing.algorithm == Algorithm::Passthrough);
        if is_passed_through && let Some(dialled) = wish.live.original_dst() {
            return Ok(self.address(snapshot, dialled));
        }
        let members = self.members(snapshot, service, key.port, policy, wish.live, worker.random());
        let now = self.usage.now();
        if let Some(rules) = traffic.and_then(|policy| policy.outlier.as_ref()) {
            members.arrangement.follow(&mut self.usage.outliers(), rules, &members.all, now);
        }
        let ask = Ask {
            draw: worker.random(),
            hash: wish.hash,
            tried: wish.tried,
            skip_classes: wish.skip_classes,
            now,
        };
        members.arrangement.choose(&members.all, &ask).cloned().ok_or(Unchosen::NoHealthy)
    }

    /// The same for a client that calls the server by name.
    ///
    /// # Errors
    /// There is none.
    pub(crate) async fn choose_called(
        &self,
        worker: &Worker,
        wish: &Wish<'_>,
        name: Option<&str>,
    ) -> Result<Member, Unchosen> {
        let (service, port) = match wish.destination {
            Destination::Cluster { service, key, .. } if is_called(service) => (service, key.port),
            _ => return self.choose(worker, wish),
        };
        self.used.set(worker.tick());
        let found = servers(worker, wish.snapshot, service, wish.live, name, port).await;
        let servers = found.map_err(Unchosen::Unresolved)?;
        let untried: Vec<_> = servers.iter().filter(|server| !wish.tried.contains(*server)).collect();
        // One that was tried is as good as any when there is no other.
        let from = if untried.is_empty() { servers.iter().collect() } else { untried };
        let drawn = usize::try_from(worker.random() % from.len().max(1) as u64).unwrap_or(0);
        let addr = from.get(drawn).ok_or(Unchosen::NoHealthy)?;
        Ok(self.address(wish.snapshot, **addr))
    }

    /// Remembers how a try at an endpoint went, if endpoints that fail are left out.
    pub(crate) fn observe(&self, policy: Option<&Arc<Cluster>>, addr: SocketAddr, observed: Observed) {
        if let Some(rules) = policy.and_then(|cluster| cluster.policy.outlier.as_ref()) {
            let (now, total) = (self.usage.now(), self.size());
            self.usage.outliers().observe(rules, now, addr, observed, total);
        }
    }

    /// The endpoints that take requests now, of one family.
    fn members(
        &self,
        snapshot: &Snapshot,
        service: &Service,
        port: u16,
        policy: Option<&Arc<Cluster>>,
        client: &Live,
        seed: u64,
    ) -> Rc<Members> {
        let v4 = client.client.ip().to_canonical().is_ipv4();
        let same_policy = |members: &Members| match (&members.policy, policy) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        if let Some(members) = &*self.members.borrow()
            && members.version == snapshot.version()
            && members.v4 == v4
            && same_policy(members)
        {
            return Rc::clone(members);
        }
        let labels = policy.map(|cluster| &cluster.labels).filter(|labels| !labels.is_empty());
        let ports = service.ports.iter().filter(|candidate| candidate.port == port);
        let mut all: Vec<Member> = ports
            .flat_map(|port| &port.endpoints)
            .filter(|endpoint| unfit(snapshot, endpoint, labels).is_none())
            .map(|endpoint| {
                let addr = endpoint.socket_addr();
                let workload = snapshot.workload_of(endpoint).cloned();
                Member { addr, workload, traits: endpoint.traits.clone(), load: self.load(addr) }
            })
            .collect();
        if all.iter().any(|member| member.addr.is_ipv4() == v4) {
            all.retain(|member| member.addr.is_ipv4() == v4);
        }
        let before = self.members.take();
        let arrangement = Arrangement::new(
            snapshot,
            &all,
            snapshot.workload(client.pod.workload).map(|workload| &**workload),
            policy.map(|cluster| &cluster.policy),
            before.as_ref().map(|members| &members.arrangement),
            self.usage.now(),
            seed,
        );
        let policy = policy.cloned();
        let members = Rc::new(Members { version: snapshot.version(), policy, v4, all, arrangement });
        *self.members.borrow_mut() = Some(Rc::clone(&members));
        drop(before);
        // What nobody holds is of an endpoint that is gone, and has nothing outstanding.
        self.loads.borrow_mut().retain(|_, load| Rc::strong_count(load) > 1);
        members
    }

    /// What is outstanding from this worker, by endpoint.
    pub(super) fn active(&self) -> Vec<(SocketAddr, u32)> {
        self.loads.borrow().iter().map(|(addr, load)| (*addr, load.get())).filter(|(_, n)| *n > 0).collect()
    }

    /// Number of endpoints, as far as it is known.
    pub(crate) fn size(&self) -> usize {
        self.members.borrow().as_ref().map_or(1, |members| members.all.len())
    }

    /// An address as the only endpoint.
    fn address(&self, snapshot: &Snapshot, addr: SocketAddr) -> Member {
        let workload = snapshot.workload_at(addr.ip()).cloned();
        Member { addr, workload, traits: None, load: self.load(addr) }
    }

    fn load(&self, addr: SocketAddr) -> Rc<Cell<u32>> {
        Rc::clone(self.loads.borrow_mut().entry(addr).or_default())
    }
}

/// Why an endpoint takes no requests, whatever its family and health.
pub(super) fn unfit(snapshot: &Snapshot, endpoint: &Endpoint, labels: Option<&Labels>) -> Option<Unfit> {
    if !endpoint.ready {
        return Some(Unfit::NotReady);
    }
    let labels = labels?;
    // What a resource says of the endpoint itself counts before what its workload is.
    let own = match &endpoint.traits {
        Some(traits) => Some(&traits.labels),
        None => snapshot.workload_of(endpoint).map(|workload| &workload.labels),
    };
    let has_them = own.is_some_and(|own| labels.iter().all(|(key, value)| own.get(key) == Some(value)));
    (!has_them).then_some(Unfit::OtherSubset)
}
