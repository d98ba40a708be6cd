//! One worker: a thread with an event loop of its own, the connections it carries and what they share.
//!
//! Invariants:
//! - Everything in [`Worker`] belongs to one thread; other threads talk to it through [`Command`]s and through the
//!   counters of its [`Link`].
//! - A connection stays on the worker that accepted it, unless that one carries clearly more than another; it moves
//!   at most once, before its first byte.
//! - A panic in a connection's task ends that connection with [`CloseReason::Bug`]; the loop goes on.
//!
//! Not here: what is done with a connection ([`crate::outbound`], [`crate::inbound`]); accepting
//! ([`crate::listener`]).

mod link;
mod sweep;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use mesh_core::{id::WorkloadId, snapshot::Snapshot};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_local,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use crate::{
    buffers::Buffers,
    close::{CloseReason, Direction},
    connections::{Connections, Live},
    destination::{Destinations, limits::Scope},
    hbone::{self, Hbone},
    http::{self, upstream::Sites},
    inbound,
    kernel::{Kernel, Sockets},
    layers,
    listener::{self, Queued, Serving},
    loads::Loads,
    metrics::{
        Metrics,
        edges::{EDGES_MAX, Edge, EdgeKey, Parties},
    },
    outbound::{self, Transport, Upstream},
    random::Random,
    relay::{RelayEnv, relay},
    server::is_denied_now,
    settings::Settings,
    stream::{self, Stream},
};

use self::link::monotonic_ns;
pub(crate) use self::link::{Accepted, Arrival, Command, Link, Pod, Shared};
pub(crate) use self::sweep::ticks;

/// The worker's coarse clock: liveness is stamped, and idle connections are looked for, in these steps.
pub(crate) const TICK: Duration = Duration::from_millis(100);
pub(crate) const TICK_MS: u64 = 100;
/// Ticks between two looks at every connection.
const SWEEP_TICKS: u32 = 10;
/// Ticks between two publications of byte counts.
const PUBLISH_TICKS: u32 = 50;
/// Ticks between two rounds of giving memory and old series back.
const TRIM_TICKS: u32 = 300;
/// How much more a worker must carry than another before it hands connections over: moving one costs a wake-up.
const HANDOVER_MARGIN: usize = 2;
/// Log lines about refused connections, per worker and second: the counters have the rest.
const LOG_LINES_PER_S: u32 = 10;
/// Commands waiting for a worker; connections handed over are carried by the sender when it is full.
pub(crate) const COMMANDS_MAX: usize = 1024;

/// One worker's own state.
pub(crate) struct Worker {
    index: usize,
    shared: Arc<Shared>,
    pub(crate) connections: Connections,
    buffers: Buffers,
    random: Random,
    tick: Rc<Cell<u32>>,
    hbone: Rc<Hbone>,
    /// Destinations of its pods.
    pub(crate) destinations: Destinations,
    /// Connections for HTTP requests.
    pub(crate) sites: Sites,
    snapshots: RefCell<watch::Receiver<Arc<Snapshot>>>,
    snapshot: RefCell<Arc<Snapshot>>,
    edges: RefCell<(u64, HashMap<EdgeKey, Arc<Edge>>)>,
    loads: Loads,
    listeners: RefCell<HashMap<u32, Vec<Serving>>>,
    logged: Cell<(u32, u32)>,
    /// Version of the snapshot that established connections were last judged by.
    judged: Cell<u64>,
}

impl Worker {
    pub(crate) fn new(
        index: usize,
        shared: Arc<Shared>,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> Self {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        let tick = Rc::new(Cell::new(0));
        Self {
            hbone: Hbone::new(Arc::clone(&shared), Rc::clone(&tick)),
            index,
            connections: Connections::new(index, Arc::clone(&shared.admission), Arc::clone(&shared.metrics)),
            buffers: Buffers::new(shared.settings.held_bytes_max),
            random: Random::default(),
            tick,
            destinations: Destinations::default(),
            sites: Sites::default(),
            snapshots: RefCell::new(snapshots),
            snapshot: RefCell::new(snapshot),
            edges: RefCell::default(),
            loads: Loads::default(),
            listeners: RefCell::default(),
            logged: Cell::new((0, 0)),
            judged: Cell::new(0),
            shared,
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The tunnels of this worker.
    pub(crate) fn hbone(&self) -> &Rc<Hbone> {
        &self.hbone
    }

    /// The coarse clock.
    pub(crate) fn tick(&self) -> u32 {
        self.tick.get()
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    pub(crate) fn sockets(&self) -> &dyn Sockets {
        &*self.shared.sockets
    }

    pub(crate) fn kernel(&self) -> &dyn Kernel {
        &*self.shared.kernel
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Memory lent to connections.
    pub(crate) fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    pub(crate) fn random(&self) -> u64 {
        self.random.next()
    }

    /// The newest snapshot. The shared lock is taken only when there is a new one.
    pub(crate) fn snapshot(&self) -> Arc<Snapshot> {
        let mut snapshots = self.snapshots.borrow_mut();
        // An error means that no newer one will come.
        if snapshots.has_changed().unwrap_or(false) {
            *self.snapshot.borrow_mut() = Arc::clone(&snapshots.borrow_and_update());
        }
        Arc::clone(&self.snapshot.borrow())
    }

    /// An edge's counters, from this worker's own table when it has them.
    pub(crate) fn edge(&self, key: EdgeKey, parties: Parties<'_>) -> Arc<Edge> {
        let version = self.snapshot.borrow().version();
        let mut edges = self.edges.borrow_mut();
        if edges.0 != version || edges.1.len() > EDGES_MAX {
            // Edges of workloads that are gone must not be kept alive here.
            *edges = (version, HashMap::new());
        }
        let of_all_workers = || self.shared.metrics.edges.edge(key, parties);
        Arc::clone(edges.1.entry(key).or_insert_with(of_all_workers))
    }

    /// Asks the other workers to give up a connection that nobody uses: a request here waits for one.
    pub(crate) fn ask_others_for_connections(&self, scope: &Scope) {
        let others = self.shared.links.iter().enumerate().filter(|(index, _)| *index != self.index);
        for (_, link) in others {
            // One that has no time for it closes connections soon enough by itself.
            link.commands.try_send(Command::MakeRoom(scope.clone())).ok();
        }
    }

    /// Has a connection to a workload's port given up that nobody uses, here or on the other workers: a request waits for one.
    pub(crate) fn make_room_at(&self, server: WorkloadId, port: u16) {
        if self.sites.make_room_at(server, port) {
            return;
        }
        let others = self.shared.links.iter().enumerate().filter(|(index, _)| *index != self.index);
        for (_, link) in others {
            link.commands.try_send(Command::MakeRoomAt(server, port)).ok();
        }
    }

    /// The connections this worker carries, by endpoint.
    pub(crate) fn loads(&self) -> &Loads {
        &self.loads
    }

    /// Whether another line about a refused connection may be logged this second.
    pub(crate) fn may_log(&self) -> bool {
        let second = self.tick.get() / 10;
        let (last, lines) = self.logged.get();
        let lines = if last == second { lines + 1 } else { 1 };
        self.logged.set((second, lines));
        lines <= LOG_LINES_PER_S
    }

    /// Carries an accepted connection, here or on a worker that carries clearly less.
    pub(crate) fn accept(self: &Rc<Self>, accepted: Accepted) {
        let mine = self.link().carried.load(Ordering::Relaxed);
        let links = self.shared.links.iter();
        let least = links.min_by_key(|link| link.carried.load(Ordering::Relaxed));
        let Some(least) = least else { return self.carry(accepted) };
        let theirs = least.carried.load(Ordering::Relaxed);
        if mine <= theirs + HANDOVER_MARGIN + theirs / 4 {
            return self.carry(accepted);
        }
        least.carried.fetch_add(1, Ordering::Relaxed);
        match least.commands.try_send(Command::Adopt(accepted)) {
            Ok(()) => {
                self.metrics().handovers.inc();
            }
            Err(mpsc::error::TrySendError::Full(command) | mpsc::error::TrySendError::Closed(command)) => {
                least.carried.fetch_sub(1, Ordering::Relaxed);
                if let Command::Adopt(accepted) = command {
                    self.carry(accepted);
                }
            }
        }
    }

    fn carry(self: &Rc<Self>, accepted: Accepted) {
        let carried = self.count_carried();
        let worker = Rc::clone(self);
        // The table of connections owns the task: it can end it, waits for it in a drain, and hears of its panic.
        drop(spawn_local(async move {
            let _carried = carried;
            match accepted.arrival {
                Arrival::Tcp(direction) => worker.serve(accepted, direction).await,
                Arrival::Tunnel => hbone::server::serve(&worker, accepted).await,
            }
        }));
    }

    /// Counts something this worker carries, until it is dropped.
    pub(crate) fn count_carried(self: &Rc<Self>) -> Carried {
        self.link().carried.fetch_add(1, Ordering::Relaxed);
        Carried(Rc::clone(self))
    }

    pub(crate) async fn serve(self: &Rc<Self>, accepted: Accepted, direction: Direction) {
        let since = Instant::now();
        let Accepted { socket, client, pod, .. } = accepted;
        let opened = self.connections.open(direction, &pod.handle, &pod.admission, client, self.tick.get());
        let Ok(open) = opened else { return stream::reset(socket) };
        let live = Rc::clone(open.live());
        let Ok(mut downstream) = Stream::new(socket) else { return open.close(CloseReason::Overloaded) };
        let may_be_http = match direction {
            Direction::Outbound => http::may_claim(&self.snapshot()),
            Direction::Inbound => self.snapshot().counts_requests(),
        };
        if may_be_http {
            let look = Box::pin(async {
                match direction {
                    Direction::Outbound => {
                        Ok(http::claim(self, &live, &mut downstream).await.map(|claim| (claim, None)))
                    }
                    Direction::Inbound => {
                        let found = inbound::claim(self, &live, &mut downstream, pod.inbound_port).await?;
                        Ok::<_, CloseReason>(found.map(|(claim, own)| (claim, Some(own))))
                    }
                }
            });
            match self.unless_stopped(&live, look).await {
                Ok(None) => {}
                Ok(Some((claim, own))) => {
                    return open.close(Box::pin(http::serve(self, &live, downstream, claim, own)).await);
                }
                Err(reason) => {
                    downstream.reset();
                    return open.close(reason);
                }
            }
        }
        let upstream = {
            // Boxed: finding the server needs several times the memory of relaying, and for a moment only.
            let find = Box::pin(async {
                match direction {
                    Direction::Outbound => outbound::open(self, &live, &mut downstream, since).await,
                    Direction::Inbound => {
                        inbound::open(self, &live, downstream.socket(), pod.inbound_port).await
                    }
                }
            });
            self.unless_stopped(&live, find).await
        };
        let reason = match upstream {
            Ok(Upstream { transport, load, share }) => {
                let _held = (load, share);
                live.meter.touch(self.tick.get());
                match transport {
                    Transport::Tcp(upstream) => self.relay(&live, downstream, upstream).await,
                    Transport::Tunnel(stream) => outbound::carry(self, &live, stream, downstream).await,
                    Transport::Layered(io) => Box::pin(layers::carry(&live, downstream, *io)).await,
                }
            }
            Err(reason) => {
                downstream.reset();
                reason
            }
        };
        open.close(reason);
    }

    /// Moves bytes between two sockets until the connection ends, and says why it did.
    pub(crate) async fn relay(&self, live: &Live, downstream: Stream, upstream: Stream) -> CloseReason {
        let env = RelayEnv { buffers: &self.buffers, tick: &self.tick, splice: self.settings().splice };
        relay(&env, &live.meter, downstream, upstream).await
    }

    /// Runs `work` until it is done or the connection is told to stop.
    pub(crate) async fn unless_stopped<T, E: From<CloseReason>>(
        &self,
        live: &Live,
        mut work: Pin<Box<impl Future<Output = Result<T, E>>>>,
    ) -> Result<T, E> {
        poll_fn(|cx| match live.meter.poll_stopped(cx) {
            Some(reason) => Poll::Ready(Err(reason.into())),
            None => work.as_mut().poll(cx),
        })
        .await
    }

    fn link(&self) -> &Link {
        &self.shared.links[self.index]
    }

    /// Keeps a listener's task, to end it when the pod is removed.
    pub(crate) fn own(&self, pod: u32, serving: Serving) {
        self.listeners.borrow_mut().entry(pod).or_default().push(serving);
    }

    /// One step of the coarse clock.
    fn on_tick(&self) {
        let tick = self.tick.get().wrapping_add(1);
        self.tick.set(tick);
        self.link().stamp_ns.store(monotonic_ns(), Ordering::Relaxed);
        if self.index == 0 {
            // A worker that hangs holds the oldest stamp back; if this one hangs, nobody stamps at all.
            let stamps = self.shared.links.iter().map(|link| link.stamp_ns.load(Ordering::Relaxed));
            (self.shared.alive)(stamps.min().unwrap_or(0));
        }
        self.judge_again();
        if tick.is_multiple_of(SWEEP_TICKS) {
            sweep::end_overdue(&self.connections, self.settings(), tick);
            self.hbone.sweep(tick);
            self.sites.sweep(tick);
            self.destinations.sweep(tick);
        }
        if tick.is_multiple_of(PUBLISH_TICKS) {
            self.connections.each(|live| live.publish_bytes());
        }
        if tick.is_multiple_of(TRIM_TICKS) {
            if self.buffers().held() == 0 {
                self.buffers.trim();
                self.hbone.trim();
            }
            if self.index == 0 {
                self.shared.limits.forget_unused();
                self.shared.inbound.forget_unused();
                self.shared.metrics.edges.retain(&self.snapshot());
                self.shared.metrics.flows.retain(&self.snapshot());
                self.shared.metrics.http.retain(&self.snapshot());
            }
        }
    }

    /// Closes the connections that the newest policy denies: within one tick of its arrival.
    fn judge_again(&self) {
        let snapshot = self.snapshot();
        if self.judged.replace(snapshot.version()) == snapshot.version() {
            return;
        }
        self.connections.each(|live| {
            if live.admitted().is_some_and(|request| is_denied_now(&snapshot, &request)) {
                if self.may_log() {
                    tracing::info!(pod = %live.pod.name, client = %live.client, "connection closed: a policy now denies it");
                }
                live.meter.stop(CloseReason::PolicyDenied);
            }
        });
    }

    async fn drain(&self, deadline: Instant, queued: Queued) -> usize {
        let listeners = std::mem::take(&mut *self.listeners.borrow_mut());
        listener::stop(listeners.into_values().flatten(), queued).await;
        self.hbone.drain();
        self.sites.drain();
        self.connections.each(|live| live.meter.finish());
        while self.connections.len() > 0 && Instant::now() < deadline {
            sleep(Duration::from_millis(10)).await;
        }
        let rest = self.connections.len();
        self.connections.each(|live| live.meter.stop(CloseReason::Drained));
        // Each needs one turn to send its reset.
        let patience = Instant::now() + Duration::from_secs(1);
        while self.connections.len() > 0 && Instant::now() < patience {
            sleep(Duration::from_millis(1)).await;
        }
        rest
    }

    fn obey(self: &Rc<Self>, command: Command) {
        match command {
            Command::Serve { pod, listeners, done } => {
                let outcome = listeners.into_iter().try_for_each(|l| listener::serve(self, &pod, l));
                // Whoever asked may have gone; the listeners are served all the same.
                done.send(outcome).ok();
            }
            Command::Remove { pod, done } => {
                let listeners = self.listeners.borrow_mut().remove(&pod).unwrap_or_default();
                self.hbone.leave_pod(pod);
                self.sites.leave_pod(pod);
                drop(spawn_local(async move {
                    listener::stop(listeners, Queued::Accepted).await;
                    done.send(()).ok();
                }));
            }
            Command::Adopt(accepted) => {
                self.link().carried.fetch_sub(1, Ordering::Relaxed);
                self.carry(accepted);
            }
            Command::List { max, done } => {
                done.send(self.connections.views(max, self.tick.get(), TICK_MS)).ok();
            }
            Command::ListActive { done } => {
                done.send(self.destinations.active()).ok();
            }
            Command::MakeRoom(scope) => self.sites.make_room(&scope),
            Command::MakeRoomAt(server, port) => {
                self.sites.make_room_at(server, port);
            }
            Command::Duplicate { done } => {
                let listeners = self.listeners.borrow();
                done.send(listeners.values().flatten().filter_map(Serving::duplicate).collect()).ok();
            }
            Command::Drain { deadline, queued, done } => {
                let worker = Rc::clone(self);
                drop(spawn_local(async move {
                    done.send(worker.drain(deadline, queued).await).ok();
                }));
            }
        }
    }
}

/// Runs a worker until `stop`'s sender is gone.
pub(crate) async fn run(
    worker: Rc<Worker>,
    mut commands: mpsc::Receiver<Command>,
    mut stop: watch::Receiver<()>,
) {
    let ticking = Rc::clone(&worker);
    let clock = spawn_local(async move {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut held = 0_i64;
        loop {
            ticks.tick().await;
            ticking.on_tick();
            let now = i64::try_from(ticking.buffers().held() + ticking.hbone.held()).unwrap_or(i64::MAX);
            ticking.metrics().held_bytes.inc_by(now - held);
            held = now;
        }
    });
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                Some(command) => worker.obey(command),
                None => break,
            },
            changed = stop.changed() => if changed.is_err() { break },
        }
    }
    clock.abort();
}

/// Takes a connection off its worker's count.
pub(crate) struct Carried(Rc<Worker>);

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.link().carried.fetch_sub(1, Ordering::Relaxed);
    }
}
