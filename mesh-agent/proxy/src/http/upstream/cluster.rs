//! Connections to a destination's endpoints, for the requests of one pod on one worker.
//!
//! Invariants:
//! - A connection is only used for the pod, endpoint, workload, way and TLS settings it was made for.
//! - A request that waits for a connection hears of each that becomes free, on whatever worker, and in turn of each stream of its
//!   pool that ends.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use mesh_core::{
    id::WorkloadId,
    policy::Transport,
    route::cluster::{Cluster, ConnectionPool},
    snapshot::{Service, Snapshot},
};
use tokio::{sync::oneshot, task::spawn_local};

use super::{
    connect::{self, Wanted},
    connection::{Connection, Sender, Version, Waiters},
    pool::{Dialling, Lifetime, Pool},
    reply::Fault,
};
use crate::{
    close::CloseReason,
    connections::{Live, OpenRequest},
    destination::{
        UNUSED_TICKS_MAX,
        endpoints::{Endpoints, Member},
        limits::{ClusterId, Kind, Taken},
    },
    layers::{self, LayersKey},
    worker::{TICK_MS, Worker},
};

/// Other nodes have heard of a change that this one has heard of when these ticks are over.
const SETTLING_TICKS: u32 = (1000 / TICK_MS) as u32;

/// Requests of one worker that a connection serves while others wait for it on another worker: nobody waits for ever.
const TURNS_MAX: u32 = 32;

/// What a pooled connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct PoolKey {
    addr: SocketAddr,
    workload: Option<WorkloadId>,
    way: WayKind,
    version: Version,
    layers: Option<LayersKey>,
    /// On the server's own side: the app sees this client at the other end of the connection.
    client: Option<SocketAddr>,
    /// The server's own side counts requests (S45), on connections that begin while it does.
    is_counted: bool,
}

/// How an endpoint is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum WayKind {
    Local,
    Plain,
    Tunnel,
}

/// A destination of one pod on one worker.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) endpoints: Rc<Endpoints>,
    pools: RefCell<HashMap<PoolKey, Rc<Pool>>>,
    life: Cell<Lifetime>,
    used: Cell<u32>,
    /// Requests of this worker that wait for a connection.
    waiting: Cell<u32>,
    draining: Cell<bool>,
}

/// A connection lent to one request.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) connection: Rc<Connection>,
    pub(super) sender: Option<Sender>,
    _open: OpenRequest,
}

impl Lease {
    fn new(connection: Rc<Connection>, sender: Sender) -> Self {
        connection.served.set(connection.served.get() + 1);
        connection.streams.set(connection.streams.get() + 1);
        let _open = connection.live.begin_request();
        Self { connection, sender: Some(sender), _open }
    }

    /// The response is over: the connection can be used again.
    pub(super) fn finish(mut self) {
        if let Some(Sender::Http1(sender)) = self.sender.take() {
            self.connection.give_back(sender);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.connection.end_stream();
    }
}

/// What a request needs of a connection.
pub(super) struct Need<'a> {
    pub(super) live: &'a Rc<Live>,
    pub(super) snapshot: &'a Arc<Snapshot>,
    pub(super) service: Option<&'a Arc<Service>>,
    pub(super) member: &'a Member,
    pub(super) policy: Option<&'a Arc<Cluster>>,
    pub(super) version: Version,
    /// The host that the request is for, where TLS may need a name.
    pub(super) host: Option<&'a Arc<str>>,
    /// Nobody else may use it: the bytes may become somebody's.
    pub(super) is_exclusive: bool,
}

/// Whether a server counts its requests itself.
fn is_counted(need: &Need<'_>) -> bool {
    let Member { addr, workload: Some(server), .. } = need.member else { return false };
    need.snapshot.counts_requests()
        && need.snapshot.inbound_pool(server, addr.port()).is_some_and(ConnectionPool::limits_requests)
}

impl Site {
    pub(super) fn new(endpoints: Rc<Endpoints>) -> Self {
        Self {
            endpoints,
            pools: RefCell::default(),
            life: Cell::new(lifetime(None)),
            used: Cell::new(0),
            waiting: Cell::new(0),
            draining: Cell::new(false),
        }
    }

    /// A connection for one request.
    ///
    /// Cancel safety: a connection that is being made serves another request.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) async fn lease(self: &Rc<Self>, worker: &Rc<Worker>, need: &Need<'_>) -> Result<Lease, Fault> {
        let life = lifetime(need.policy);
        self.life.set(life);
        self.used.set(worker.tick());
        let pool = self.pool(worker, need);
        if !need.is_exclusive
            && let Some((connection, sender)) = pool.take(&life, worker.tick())
        {
            return Ok(Lease::new(connection, sender));
        }
        let limits = need.policy.map(|cluster| &cluster.policy.pool);
        let max_pending = limits.and_then(|pool| pool.max_pending);
        let max_connections = limits.and_then(|pool| pool.max_connections);
        let _pending = self.endpoints.usage.take(Kind::Pending, max_pending).ok_or(Fault::Overflow)?;
        loop {
            let freed = self.endpoints.usage.freed.notified();
            tokio::pin!(freed);
            let room = pool.room.notified();
            tokio::pin!(room);
            // From here on nothing that becomes free is missed.
            freed.as_mut().enable();
            if !need.is_exclusive
                && let Some((connection, sender)) = pool.take(&life, worker.tick())
            {
                return Ok(Lease::new(connection, sender));
            }
            let dialling = pool.dialling.borrow().clone();
            if let Some(dialling) = dialling.filter(|_| !need.is_exclusive) {
                let done = dialling.done.notified();
                tokio::pin!(done);
                done.as_mut().enable();
                if !dialling.is_over.get() {
                    done.await;
                }
                if let Some(fault) = dialling.failed.get() {
                    return Err(fault);
                }
                continue;
            }
            if let Some(slot) = self.slot(need, &pool, max_connections) {
                match self.dial(worker, need, &pool, slot).await? {
                    Some(lease) => return Ok(lease),
                    None => continue,
                }
            }
            // Before others are asked: what they give back from here on is given up.
            let _waiting = Waiting::new(self);
            match need.member.workload.as_ref().filter(|_| self.is_own()) {
                Some(server) => worker.make_room_at(server.id, need.member.addr.port()),
                None if self.evict() => {}
                None => worker.ask_others_for_connections(&self.endpoints.scope),
            }
            tokio::select! {
                () = freed => {}
                () = room, if !need.is_exclusive => {}
            }
        }
    }

    /// The place of another connection.
    fn slot(&self, need: &Need<'_>, pool: &Pool, max: Option<u32>) -> Option<Taken> {
        let usage = &self.endpoints.usage;
        // Streams may last for hours, and this worker cannot lend what another one has: as in Envoy each has one connection at least. At a
        // pod's own side the limit is the app's, and the app has it exactly (S45).
        let is_without = need.version == Version::Http2 && !self.is_own() && !pool.is_carrying();
        usage
            .take(Kind::Connection, max)
            .or_else(|| is_without.then(|| usage.take(Kind::Connection, None)).flatten())
    }

    /// Makes a connection; `None` when it is one that many share, and stands in the pool now.
    async fn dial(
        self: &Rc<Self>,
        worker: &Rc<Worker>,
        need: &Need<'_>,
        pool: &Rc<Pool>,
        slot: Taken,
    ) -> Result<Option<Lease>, Fault> {
        let wanted = Wanted {
            client: Rc::clone(need.live),
            snapshot: Arc::clone(need.snapshot),
            service: need.service.cloned(),
            addr: need.member.addr,
            workload: need.member.workload.clone(),
            traits: need.member.traits.clone(),
            cluster: need.policy.cloned(),
            version: need.version,
            host: need.host.cloned(),
            is_own: self.is_own(),
        };
        let (site, pool, worker) = (Rc::clone(self), Rc::clone(pool), Rc::clone(worker));
        if need.version == Version::Http1 {
            let (tell, told) = oneshot::channel();
            drop(spawn_local(async move {
                let made = |made: Result<Lease, Fault>| {
                    // Whoever asked may have gone: then the next request gets it.
                    if let Err(Ok(lease)) = tell.send(made) {
                        lease.finish();
                    }
                };
                site.make(&worker, wanted, &pool, slot, made).await;
            }));
            // Without an answer the task has failed, and has said so.
            return told.await.unwrap_or(Err(Fault::LocalReset)).map(Some);
        }
        let dialling = Rc::new(Dialling::default());
        *pool.dialling.borrow_mut() = Some(Rc::clone(&dialling));
        let done = dialling.done.notified();
        tokio::pin!(done);
        done.as_mut().enable();
        let over = Over { pool: Rc::clone(&pool), dialling: Rc::clone(&dialling) };
        drop(spawn_local(async move {
            site.make(&worker, wanted, &pool, slot, move |made| over.tell(made)).await;
        }));
        done.await;
        dialling.failed.get().map_or(Ok(None), Err)
    }

    /// The task of a connection, from its making to its end.
    async fn make(
        self: Rc<Self>,
        worker: &Rc<Worker>,
        wanted: Wanted,
        pool: &Rc<Pool>,
        _slot: Taken,
        tell: impl FnOnce(Result<Lease, Fault>),
    ) {
        let Ok(open) = worker.connections.open_shared(&wanted.client, worker.tick()) else {
            return tell(Err(Fault::Overflow));
        };
        let live = Rc::clone(open.live());
        let made = worker.unless_stopped(&live, Box::pin(connect::connect(worker, &live, &wanted))).await;
        let (sender, protocol) = match made {
            Ok(made) => made,
            Err(failed) => {
                tell(Err(failed.fault));
                return open.close(failed.reason);
            }
        };
        let is_shared = matches!(sender, Sender::Http2(_));
        let waiters = is_shared
            .then(|| Waiters { room: Rc::clone(&pool.room), usage: Arc::clone(&self.endpoints.usage) });
        let connection = Connection::new(&live, worker.tick(), waiters);
        match sender {
            sender @ Sender::Http1(_) => tell(Ok(Lease::new(Rc::clone(&connection), sender))),
            Sender::Http2(sender) => {
                pool.share(&connection, sender);
                // Whoever waits finds it in the pool.
                tell(Ok(Lease::shared(&connection)));
            }
        }
        let reason = connection
            .drive(protocol, |sender| {
                let tick = worker.tick();
                let (all, here) = (self.endpoints.usage.waiting.load(Ordering::Acquire), self.waiting.get());
                let is_others_turn = here == 0 || connection.served.get().is_multiple_of(TURNS_MAX);
                let wanted_elsewhere = all > here && is_others_turn || live.is_wanted();
                let life = self.life.get();
                if life.allows(&connection, tick) && !wanted_elsewhere && !self.draining.get() {
                    pool.give_back(&connection, sender, tick);
                    self.endpoints.usage.freed.notify_waiters();
                }
            })
            .await;
        pool.forget(&connection);
        if is_shared {
            pool.end_shared();
        }
        open.close(reason);
    }

    fn pool(&self, worker: &Worker, need: &Need<'_>) -> Rc<Pool> {
        let member = need.member;
        let way = match &member.workload {
            Some(workload) if *workload.node == *worker.settings().node => WayKind::Local,
            Some(workload)
                if mesh_core::policy::transport(workload, member.addr.port()) == Transport::Hbone =>
            {
                WayKind::Tunnel
            }
            _ => WayKind::Plain,
        };
        let policy = need.policy.map(|cluster| &cluster.policy);
        let layers = policy.and_then(|policy| {
            let (workload, traits) = (member.workload.as_ref(), member.traits.as_ref());
            let server = layers::Server::of(worker, need.service, workload, traits, member.addr.port());
            connect::layers_of(policy, need.host.map(|host| &**host), need.version, need.live, server)
        });
        let key = PoolKey {
            addr: member.addr,
            workload: member.workload.as_ref().map(|workload| workload.id),
            way,
            version: need.version,
            layers: layers.map(|layers| layers.key(worker, need.live)),
            client: self.is_own().then_some(need.live.client),
            is_counted: !self.is_own() && is_counted(need),
        };
        let settled = key.is_counted.then(|| worker.tick().wrapping_add(SETTLING_TICKS));
        Rc::clone(self.pools.borrow_mut().entry(key).or_insert_with(|| Rc::new(Pool::settling(settled))))
    }

    /// Whether it is a pod's own side.
    fn is_own(&self) -> bool {
        matches!(self.endpoints.scope.cluster, ClusterId::Own(_))
    }

    /// Closes one connection to a workload's port that nobody uses; whether there was one.
    pub(super) fn evict_at(&self, server: WorkloadId, port: u16) -> bool {
        let pools = self.pools.borrow();
        let mut there =
            pools.iter().filter(|(key, _)| key.workload == Some(server) && key.addr.port() == port);
        there.any(|(_, pool)| pool.evict())
    }

    /// Closes the connections that were made for one client, which is gone.
    pub(super) fn leave_client(&self, client: SocketAddr) {
        self.pools.borrow_mut().retain(|key, pool| {
            let is_left = key.client == Some(client);
            if is_left {
                pool.close();
            }
            !is_left
        });
    }

    /// Closes one connection that nobody uses; whether there was one.
    pub(super) fn evict(&self) -> bool {
        self.pools.borrow().values().any(|pool| pool.evict())
    }

    /// Closes what is idle or too old; whether the destination is still of use.
    pub(super) fn sweep(&self, tick: u32) -> bool {
        let life = self.life.get();
        self.pools.borrow_mut().retain(|_, pool| {
            pool.sweep(&life, tick);
            Rc::strong_count(pool) > 1 || !pool.is_empty()
        });
        let is_used = tick.wrapping_sub(self.used.get()) < UNUSED_TICKS_MAX;
        is_used || !self.pools.borrow().is_empty()
    }

    /// Closes all connections once they are not in use.
    pub(super) fn close(&self) {
        self.draining.set(true);
        self.pools.borrow().values().for_each(|pool| pool.close());
    }
}

impl Lease {
    /// What stands for a connection in the pool: nothing is sent over it.
    fn shared(connection: &Rc<Connection>) -> Self {
        connection.streams.set(connection.streams.get() + 1);
        let _open = connection.live.begin_request();
        Self { connection: Rc::clone(connection), sender: None, _open }
    }
}

/// Tells those who wait for a shared connection, even if its task panics.
struct Over {
    pool: Rc<Pool>,
    dialling: Rc<Dialling>,
}

impl Over {
    fn tell(&self, made: Result<Lease, Fault>) {
        self.dialling.failed.set(made.err());
        self.end();
    }

    fn end(&self) {
        if !self.dialling.is_over.replace(true) {
            *self.pool.dialling.borrow_mut() = None;
            self.dialling.done.notify_waiters();
        }
    }
}

impl Drop for Over {
    fn drop(&mut self) {
        if !self.dialling.is_over.get() {
            self.dialling.failed.set(Some(Fault::LocalReset));
            self.end();
        }
    }
}

/// Counts a request that waits for a connection.
struct Waiting<'a>(&'a Site);

impl<'a> Waiting<'a> {
    fn new(site: &'a Site) -> Self {
        site.waiting.set(site.waiting.get() + 1);
        site.endpoints.usage.waiting.fetch_add(1, Ordering::AcqRel);
        Self(site)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
        self.0.endpoints.usage.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How long connections may be used under a policy.
fn lifetime(policy: Option<&Arc<Cluster>>) -> Lifetime {
    let default = ConnectionPool::default();
    let pool = policy.map_or(&default, |cluster| &cluster.policy.pool);
    let ticks =
        |duration: Duration| u32::try_from(duration.as_millis() / u128::from(TICK_MS)).unwrap_or(u32::MAX);
    let or_never = |duration: Duration| if duration.is_zero() { u32::MAX } else { ticks(duration).max(1) };
    Lifetime {
        requests_max: pool.max_requests_per_connection.filter(|max| *max > 0).unwrap_or(u32::MAX),
        streams_max: pool.max_concurrent_streams.filter(|max| *max > 0).unwrap_or(u32::MAX),
        ticks_max: pool.max_connection_duration.map_or(u32::MAX, or_never),
        idle_ticks_max: or_never(pool.http_idle_timeout.unwrap_or(pool.idle_timeout)),
    }
}

/// Why no connection came of an attempt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    pub(super) fault: Fault,
    pub(super) reason: CloseReason,
}

impl From<CloseReason> for Failed {
    fn from(reason: CloseReason) -> Self {
        Self { fault: Fault::LocalReset, reason }
    }
}
