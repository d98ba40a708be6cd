//! Owns the world that the data path sees: the source's, with what DNS says of endpoints that are given by names.
//!
//! Invariants:
//! - What the source publishes is passed on at once; nobody waits for DNS.
//! - An answer costs what it changes: the services that have the name, and one table of pointers.
//! - Versions grow with every publication, the source's own or ours.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use mesh_core::{
    resolve::{Answer, Failure, NameState, Names},
    snapshot::{Name, Resolution, Service, Snapshot},
};
use mesh_proxy::{Lookup, servers_of};
use tokio::{
    sync::watch,
    task::{Id, JoinSet},
    time::{Instant, sleep_until},
};

/// Names that are asked for at once.
const CONCURRENT_MAX: usize = 32;
/// Where the servers of the node are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// What is known of names: the resolver's, and looked at by operators.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    names: Names,
    answers: u64,
    failures: BTreeMap<Failure, u64>,
}

/// Numbers of all lookups so far.
#[derive(Debug)]
pub(super) struct Counts {
    /// That gave addresses.
    pub(super) answers: u64,
    /// That failed, by reason.
    pub(super) failures: BTreeMap<Failure, u64>,
}

impl Resolved {
    /// All names with their addresses and failures, and how many are left out because there are too many.
    pub(super) fn names(&self) -> (Vec<NameState>, usize) {
        let state = self.lock();
        (state.names.states().collect(), state.names.left_out())
    }

    /// What came of lookups.
    pub(super) fn counts(&self) -> Counts {
        let state = self.lock();
        Counts { answers: state.answers, failures: state.failures.clone() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lookups under way, and what they are for.
#[derive(Debug, Default)]
struct Asking {
    lookups: JoinSet<Answer>,
    names: HashMap<Id, Arc<str>>,
}

/// Resolves names for as long as the source lives.
#[derive(Debug)]
pub(super) struct Resolver {
    source: watch::Receiver<Arc<Snapshot>>,
    out: watch::Sender<Arc<Snapshot>>,
    /// Servers to ask; none: those of the node.
    servers: Vec<SocketAddr>,
    resolved: Arc<Resolved>,
    lookup: Arc<Lookup>,
    started: Instant,
    base: Arc<Snapshot>,
    /// The services with names, as they are published.
    filled: BTreeMap<Name, Arc<Service>>,
    /// Services by the names they have.
    users: BTreeMap<Arc<str>, BTreeSet<Name>>,
}

impl Resolver {
    /// Begins with what the source has; the receiver has that at once.
    pub(super) fn new(
        mut source: watch::Receiver<Arc<Snapshot>>,
        servers: Vec<SocketAddr>,
    ) -> (Self, watch::Receiver<Arc<Snapshot>>, Arc<Resolved>) {
        let base = Arc::clone(&source.borrow_and_update());
        let (out, snapshots) = watch::channel(Arc::clone(&base));
        let resolved = Arc::new(Resolved::default());
        let mut resolver = Self {
            source,
            out,
            servers,
            resolved: Arc::clone(&resolved),
            lookup: Arc::default(),
            started: Instant::now(),
            base: Arc::default(),
            filled: BTreeMap::new(),
            users: BTreeMap::new(),
        };
        resolver.rebase(base);
        (resolver, snapshots, resolved)
    }

    /// Works until the source ends.
    pub(super) async fn run(mut self) {
        let mut asking = Asking::default();
        loop {
            self.ask(&mut asking);
            let next = self.resolved.lock().names.next_due();
            let next = next.filter(|_| asking.lookups.len() < CONCURRENT_MAX);
            let due = async {
                match next {
                    Some(due) => sleep_until(self.started + due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.source.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let base = Arc::clone(&self.source.borrow_and_update());
                    self.rebase(base);
                }
                Some(answered) = asking.lookups.join_next_with_id() => {
                    let (id, answer) = match answered {
                        Ok((id, answer)) => (id, answer),
                        Err(error) => {
                            tracing::error!(%error, "a DNS lookup failed; this is a defect of the agent");
                            (error.id(), Answer { v4: Err(Failure::BadReply), v6: Err(Failure::BadReply) })
                        }
                    };
                    if let Some(name) = asking.names.remove(&id) {
                        self.take(&name, answer);
                    }
                }
                () = due => {}
            }
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Begins as many lookups as may be under way.
    fn ask(&mut self, asking: &mut Asking) {
        let room = CONCURRENT_MAX.saturating_sub(asking.lookups.len());
        let due = self.resolved.lock().names.due(self.now(), room);
        if due.is_empty() {
            return;
        }
        let servers: Arc<[SocketAddr]> = if self.servers.is_empty() {
            // Read each time: it changes when the node's network does.
            servers_of(&std::fs::read_to_string(RESOLV_CONF).unwrap_or_default()).into()
        } else {
            self.servers.as_slice().into()
        };
        for name in due {
            let (lookup, servers, asked) =
                (Arc::clone(&self.lookup), Arc::clone(&servers), Arc::clone(&name));
            let task = asking.lookups.spawn(async move { lookup.addresses(&servers, &asked).await });
            asking.names.insert(task.id(), name);
        }
    }

    /// Takes in an answer, and publishes what it changes.
    fn take(&mut self, name: &Arc<str>, answer: Answer) {
        let failing = |names: &Names| names.failing(name).map(|(failure, _)| failure);
        let refresh = self.base.mesh().defaults.dns_refresh;
        let mut state = self.resolved.lock();
        let before = failing(&state.names);
        let changed = state.names.take(name, answer, self.now(), refresh);
        let after = failing(&state.names);
        match after {
            Some(failure) => *state.failures.entry(failure).or_default() += 1,
            None => state.answers += 1,
        }
        if after != before {
            match after {
                Some(failure) => {
                    tracing::warn!(%name, reason = failure.as_str(), "an endpoint's name cannot be resolved; what was known of it stays");
                }
                None => tracing::info!(%name, "an endpoint's name can be resolved again"),
            }
        }
        if !changed {
            return;
        }
        for service in self.users.get(name).into_iter().flatten() {
            if let Some(filled) = self.base.service(service).and_then(|service| state.names.fill(service)) {
                self.filled.insert(service.clone(), Arc::new(filled));
            }
        }
        drop(state);
        self.publish();
    }

    /// Takes over a world of the source.
    fn rebase(&mut self, base: Arc<Snapshot>) {
        let of_names = |service: &&Arc<Service>| matches!(service.resolution, Resolution::Dns(_));
        let mut needed: BTreeSet<Arc<str>> = BTreeSet::new();
        self.users.clear();
        for service in base.services().filter(of_names) {
            let Resolution::Dns(dns) = &service.resolution else { continue };
            for name in &dns.names {
                needed.insert(Arc::clone(&name.host));
                self.users.entry(Arc::clone(&name.host)).or_default().insert(service.name.clone());
            }
        }
        let mut state = self.resolved.lock();
        state.names.need(&needed, self.now());
        let mut filled = BTreeMap::new();
        for service in base.services().filter(of_names) {
            let Some(now) = state.names.fill(service) else { continue };
            let before = self.filled.remove(&service.name);
            let same = [Some(Arc::clone(service)), before].into_iter().flatten().find(|known| **known == now);
            filled.insert(service.name.clone(), same.unwrap_or_else(|| Arc::new(now)));
        }
        drop(state);
        self.filled = filled;
        self.base = base;
        self.publish();
    }

    fn publish(&self) {
        let last = self.out.borrow().version();
        let is_newer = self.base.version() > last;
        if self.filled.is_empty() && is_newer {
            self.out.send_replace(Arc::clone(&self.base));
            return;
        }
        let version = if is_newer { self.base.version() } else { last + 1 };
        let world = self.base.with_endpoints(version, self.filled.values().cloned());
        if !world.same_world(&self.out.borrow()) {
            self.out.send_replace(Arc::new(world));
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{
        resolve::Said,
        snapshot::{DnsEndpoint, DnsResolution, Parts, Protocol, ServicePort},
    };

    use super::*;

    fn service(host: &str) -> Arc<Service> {
        let names = vec![DnsEndpoint { host: host.into(), ports: vec![80], traits: None }];
        Arc::new(Service {
            hostname: Some(host.into()),
            resolution: Resolution::Dns(DnsResolution { one_at_a_time: false, names }),
            ports: vec![ServicePort {
                name: "http".into(),
                port: 80,
                protocol: Protocol::Tcp,
                app_protocol: None,
                endpoints: Vec::new(),
            }],
            ..Service::named(Name::new("shop", host))
        })
    }

    fn world(version: u64, services: Vec<Arc<Service>>) -> Arc<Snapshot> {
        Arc::new(Snapshot::new(version, Parts { services, ..Parts::default() }))
    }

    fn addresses(snapshot: &Snapshot, host: &str) -> Vec<String> {
        let service = snapshot.service(&Name::new("shop", host)).unwrap();
        service.ports[0].endpoints.iter().map(|endpoint| endpoint.addr.to_string()).collect()
    }

    fn answer(addr: &str) -> Answer {
        let said = |addrs| Ok(Said { addrs, ttl: Duration::from_secs(5) });
        Answer { v4: said(vec![addr.parse().unwrap()]), v6: said(Vec::new()) }
    }

    #[tokio::test]
    async fn an_answer_changes_the_services_that_have_the_name_and_no_other() {
        let (source, receiver) = watch::channel(world(4, vec![service("a.x"), service("b.x")]));
        let (mut resolver, snapshots, resolved) = Resolver::new(receiver, Vec::new());
        let first = Arc::clone(&snapshots.borrow());
        assert_eq!((first.version(), addresses(&first, "a.x").len()), (4, 0));
        assert_eq!(resolver.resolved.lock().names.due(resolver.now(), 9).len(), 2);

        resolver.take(&"a.x".into(), answer("192.0.2.1"));
        let second = Arc::clone(&snapshots.borrow());
        assert!(second.version() > first.version());
        assert_eq!(addresses(&second, "a.x"), ["192.0.2.1"]);
        let of = |snapshot: &Snapshot| Arc::clone(snapshot.service(&Name::new("shop", "b.x")).unwrap());
        assert!(Arc::ptr_eq(&of(&first), &of(&second)));

        let failed = Answer { v4: Err(Failure::TimedOut), v6: Err(Failure::TimedOut) };
        resolver.take(&"a.x".into(), failed);
        assert!(Arc::ptr_eq(&second, &snapshots.borrow()), "nothing changed, nothing is published");
        assert_eq!(resolved.counts().failures, [(Failure::TimedOut, 1)].into());
        assert_eq!(resolved.names().0[0].failing, Some((Failure::TimedOut, 1)));

        // The source's next world has what DNS said at once, and versions never go back.
        source.send_replace(world(5, vec![service("a.x")]));
        resolver.rebase(Arc::clone(&source.borrow()));
        let third = Arc::clone(&snapshots.borrow());
        assert!(third.version() > second.version());
        assert_eq!((addresses(&third, "a.x"), third.services().count()), (vec!["192.0.2.1".to_owned()], 1));
        source.send_replace(world(6, Vec::new()));
        resolver.rebase(Arc::clone(&source.borrow()));
        assert!(snapshots.borrow().version() > third.version());
    }
}
