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

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    future::poll_fn,
    net::{SocketAddr, TcpStream},
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use mesh_core::snapshot::Snapshot;
use nix::time::{ClockId, clock_gettime};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::spawn_local,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use crate::{
    buffers::Buffers,
    close::{CloseReason, Direction},
    connections::{Admission, ConnectionView, Connections, Live},
    inbound,
    kernel::{Kernel, PodHandle, Sockets},
    listener,
    metrics::{
        Metrics,
        edges::{EDGES_MAX, Edge, EdgeKey, Parties},
    },
    outbound,
    random::Random,
    relay::{RelayEnv, relay},
    server::is_denied_now,
    settings::Settings,
    stream::{self, Stream},
};

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

/// What all workers share.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) sockets: Arc<dyn Sockets>,
    pub(crate) kernel: Arc<dyn Kernel>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) links: Vec<Link>,
    /// Called with the oldest stamp (CLOCK_MONOTONIC nanoseconds) over all workers.
    pub(crate) alive: Box<dyn Fn(u64) + Send + Sync>,
}

/// What other threads see of a worker.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) commands: mpsc::Sender<Command>,
    /// Connections it carries or is about to.
    carried: AtomicUsize,
    /// CLOCK_MONOTONIC nanoseconds of its last tick.
    stamp_ns: AtomicU64,
}

impl Link {
    pub(crate) fn new(commands: mpsc::Sender<Command>) -> Self {
        Self { commands, carried: AtomicUsize::new(0), stamp_ns: AtomicU64::new(monotonic_ns()) }
    }
}

/// A pod as the workers share it.
#[derive(Debug)]
pub(crate) struct Pod {
    pub(crate) handle: Arc<PodHandle>,
    /// Its proxied connections.
    pub(crate) admission: Arc<Admission>,
    /// Port of its inbound listener.
    pub(crate) inbound_port: u16,
    /// Forwarded DNS queries in flight.
    pub(crate) dns_in_flight: Admission,
    /// DNS connections over TCP.
    pub(crate) dns_connections: Admission,
}

/// A connection fresh from `accept`, not yet known to any event loop.
#[derive(Debug)]
pub(crate) struct Accepted {
    pub(crate) socket: TcpStream,
    pub(crate) client: SocketAddr,
    pub(crate) direction: Direction,
    pub(crate) pod: Arc<Pod>,
}

/// What other threads ask of a worker.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve some of a pod's listeners.
    Serve { pod: Arc<Pod>, listeners: Vec<listener::Listener>, done: oneshot::Sender<std::io::Result<()>> },
    /// Close a pod's listeners; its connections live on.
    Remove { pod: u32, done: oneshot::Sender<()> },
    /// Carry a connection that another worker accepted.
    Adopt(Accepted),
    /// Show up to `max` connections.
    List { max: usize, done: oneshot::Sender<Vec<ConnectionView>> },
    /// Close all listeners, wait for connections until `deadline`, reset the rest and say how many those were.
    Drain { deadline: Instant, done: oneshot::Sender<usize> },
}

/// One worker's own state.
pub(crate) struct Worker {
    index: usize,
    shared: Arc<Shared>,
    pub(crate) connections: Connections,
    buffers: Buffers,
    random: Random,
    tick: Cell<u32>,
    snapshots: RefCell<watch::Receiver<Arc<Snapshot>>>,
    snapshot: RefCell<Arc<Snapshot>>,
    edges: RefCell<(u64, HashMap<EdgeKey, Arc<Edge>>)>,
    loads: RefCell<HashMap<SocketAddr, u32>>,
    listeners: RefCell<HashMap<u32, Vec<listener::Serving>>>,
    logged: Cell<(u32, u32)>,
    /// Version of the snapshot that established connections were last judged by.
    judged: Cell<u64>,
}

/// Counts a connection at its endpoint until dropped.
pub(crate) struct LoadGuard<'a> {
    worker: &'a Worker,
    addr: SocketAddr,
}

impl std::fmt::Debug for LoadGuard<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadGuard").field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Drop for LoadGuard<'_> {
    fn drop(&mut self) {
        let mut loads = self.worker.loads.borrow_mut();
        if let Some(load) = loads.get_mut(&self.addr) {
            *load -= 1;
            if *load == 0 {
                loads.remove(&self.addr);
            }
        }
    }
}

impl Worker {
    pub(crate) fn new(
        index: usize,
        shared: Arc<Shared>,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
    ) -> Self {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        Self {
            index,
            connections: Connections::new(index, Arc::clone(&shared.admission), Arc::clone(&shared.metrics)),
            buffers: Buffers::new(shared.settings.held_bytes_max),
            random: Random::default(),
            tick: Cell::new(0),
            snapshots: RefCell::new(snapshots),
            snapshot: RefCell::new(snapshot),
            edges: RefCell::default(),
            loads: RefCell::default(),
            listeners: RefCell::default(),
            logged: Cell::new((0, 0)),
            judged: Cell::new(0),
            shared,
        }
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

    /// Connections that this worker carries to an endpoint.
    pub(crate) fn load(&self, addr: SocketAddr) -> u32 {
        self.loads.borrow().get(&addr).copied().unwrap_or(0)
    }

    pub(crate) fn count_load(&self, addr: SocketAddr) -> LoadGuard<'_> {
        *self.loads.borrow_mut().entry(addr).or_default() += 1;
        LoadGuard { worker: self, addr }
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
        self.link().carried.fetch_add(1, Ordering::Relaxed);
        let worker = Rc::clone(self);
        // The table of connections owns the task: it can end it, waits for it in a drain, and hears of its panic.
        drop(spawn_local(async move {
            let _carried = Carried(Rc::clone(&worker));
            worker.serve(accepted).await;
        }));
    }

    pub(crate) async fn serve(&self, accepted: Accepted) {
        let Accepted { socket, client, direction, pod } = accepted;
        let opened = self.connections.open(direction, &pod.handle, &pod.admission, client, self.tick.get());
        let Ok(open) = opened else { return stream::reset(socket) };
        let live = Rc::clone(open.live());
        let upstream = {
            // Boxed: finding the server needs several times the memory of relaying, and for a moment only.
            let mut find = Box::pin(async {
                match direction {
                    Direction::Outbound => outbound::open(self, &live, &socket).await,
                    Direction::Inbound => inbound::open(self, &live, &socket, pod.inbound_port).await,
                }
            });
            stoppable(&live, find.as_mut()).await
        };
        let reason = match upstream {
            Ok(upstream) => {
                let _load = upstream.load;
                live.meter.touch(self.tick.get());
                match Stream::new(socket) {
                    Ok(downstream) => {
                        let env = RelayEnv {
                            buffers: &self.buffers,
                            tick: &self.tick,
                            splice: self.settings().splice,
                        };
                        relay(&env, &live.meter, downstream, upstream.stream).await
                    }
                    Err(_) => CloseReason::Overloaded,
                }
            }
            Err(reason) => {
                stream::reset(socket);
                reason
            }
        };
        open.close(reason);
    }

    fn link(&self) -> &Link {
        &self.shared.links[self.index]
    }

    /// Keeps a listener's task, to end it when the pod is removed.
    pub(crate) fn own(&self, pod: u32, serving: listener::Serving) {
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
            self.sweep(tick);
        }
        if tick.is_multiple_of(PUBLISH_TICKS) {
            self.connections.each(|live| live.publish_bytes());
        }
        if tick.is_multiple_of(TRIM_TICKS) {
            if self.buffers().held() == 0 {
                self.buffers.trim();
            }
            if self.index == 0 {
                self.shared.metrics.edges.retain(&self.snapshot());
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
            if live.admitted().is_some_and(|request| is_denied_now(&snapshot, request)) {
                if self.may_log() {
                    tracing::info!(pod = %live.pod.name, client = %live.client, "connection closed: a policy now denies it");
                }
                live.meter.stop(CloseReason::PolicyDenied);
            }
        });
    }

    fn sweep(&self, tick: u32) {
        let idle_max = ticks(self.settings().idle_timeout);
        let linger_max = ticks(self.settings().reset_linger);
        self.connections.each(|live| {
            if let Some(reason) = overdue(live, tick, idle_max, linger_max) {
                live.meter.stop(reason);
            }
        });
    }

    async fn drain(&self, deadline: Instant) -> usize {
        let listeners = std::mem::take(&mut *self.listeners.borrow_mut());
        for serving in listeners.into_values().flatten() {
            serving.stop().await;
        }
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
                drop(spawn_local(async move {
                    for serving in listeners {
                        serving.stop().await;
                    }
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
            Command::Drain { deadline, done } => {
                let worker = Rc::clone(self);
                drop(spawn_local(async move {
                    done.send(worker.drain(deadline).await).ok();
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
            let now = i64::try_from(ticking.buffers().held()).unwrap_or(i64::MAX);
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
struct Carried(Rc<Worker>);

impl Drop for Carried {
    fn drop(&mut self) {
        self.0.link().carried.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Runs `work` until it is done or the connection is told to stop.
async fn stoppable<T>(
    live: &Live,
    mut work: Pin<&mut impl Future<Output = Result<T, CloseReason>>>,
) -> Result<T, CloseReason> {
    poll_fn(|cx| match live.meter.poll_stopped(cx) {
        Some(reason) => Poll::Ready(Err(reason)),
        None => work.as_mut().poll(cx),
    })
    .await
}

/// Why the sweep ends a connection, if it does.
fn overdue(live: &Live, tick: u32, idle_max: u32, linger_max: u32) -> Option<CloseReason> {
    if let Some((since, reason)) = live.meter.lingering()
        && tick.wrapping_sub(since) >= linger_max
    {
        return Some(reason);
    }
    (tick.wrapping_sub(live.meter.active()) >= idle_max).then_some(CloseReason::IdleTimeout)
}

fn ticks(duration: Duration) -> u32 {
    // Rounded up, and one more because the current tick has begun already.
    u32::try_from(duration.as_millis().div_ceil(u128::from(TICK_MS))).unwrap_or(u32::MAX - 1) + 1
}

fn monotonic_ns() -> u64 {
    // CLOCK_MONOTONIC always exists; 0 reads as "long ago", which fails safe.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
}
