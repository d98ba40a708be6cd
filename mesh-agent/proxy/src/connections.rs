//! The live connections of one worker, and how each ends.
//!
//! Invariants:
//! - Owned by one thread: other threads ask for a copy, so counters cost no atomic operation per byte.
//! - A connection leaves the table, is counted by reason and adds its bytes to its edge exactly once, whether its
//!   task returns, is aborted or panics ([`Open`]'s drop).
//! - The table never holds more than the connections that were admitted ([`Admission`]).

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use mesh_core::{identity::Identity, route::cluster::ConnectionPool, snapshot::Name};
use serde::Serialize;

use crate::{
    close::{CloseReason, Direction},
    destination::limits::Taken,
    hbone::tunnel::Tunnel,
    kernel::PodHandle,
    metrics::{
        Metrics,
        edges::{Edge, Security},
        flows::Flow,
    },
    relay::Meter,
    server::ServerRequest,
    worker::ticks,
};

/// One live connection, as `meshctl connections` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ConnectionView {
    /// Unique within the agent's life; the worker's index is in the upper bits.
    pub id: u64,
    /// Inbound or outbound.
    pub direction: Direction,
    /// The local pod.
    pub pod: Name,
    /// The client's address.
    pub client: SocketAddr,
    /// What the client dialled.
    pub original_dst: Option<SocketAddr>,
    /// Where the connection was taken.
    pub upstream: Option<SocketAddr>,
    /// The service that was dialled.
    pub service: Option<Name>,
    /// The client's workload, if known.
    pub source: Option<Name>,
    /// The server's workload, if known.
    pub destination: Option<Name>,
    /// What protects it and proves the peer.
    pub security: Security,
    /// Whom the other side is proved to be, of an inbound connection the client, of an outbound one the server.
    #[serde(skip)]
    pub peer: Option<Arc<Identity>>,
    /// Bytes from the client to the server.
    pub bytes_to_server: u64,
    /// Bytes from the server to the client.
    pub bytes_to_client: u64,
    /// Age in milliseconds.
    pub age_ms: u64,
    /// Milliseconds since the last byte.
    pub idle_ms: u64,
}

/// What is known of a connection; filled in as it becomes known.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) id: u64,
    pub(crate) direction: Direction,
    pub(crate) pod: Arc<PodHandle>,
    pub(crate) client: SocketAddr,
    pub(crate) meter: Meter,
    /// Counts the connections of its pod.
    pub(crate) of_pod: Arc<Admission>,
    /// A client's, which is counted by how it ends.
    is_accepted: bool,
    started: u32,
    /// Requests on it that are not over, and the tick at which there were some last.
    requests: Cell<u32>,
    requested: Cell<Option<u32>>,
    term: Cell<Term>,
    original_dst: Cell<Option<SocketAddr>>,
    upstream: Cell<Option<SocketAddr>>,
    names: RefCell<Names>,
    edges: RefCell<Vec<EdgeShare>>,
    flow: RefCell<Option<FlowShare>>,
    /// What the server's side allowed here; judged again when policy changes.
    admitted: RefCell<Option<ServerRequest>>,
    /// Its part in the limit of the workload that takes it.
    inbound: RefCell<Option<Taken>>,
    /// The tunnel that carries a connection of the agent's own.
    tunnel: RefCell<Weak<Tunnel>>,
}

/// Counts a request as long as it is not over.
#[derive(Debug)]
pub(crate) struct OpenRequest(Rc<Live>);

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.0.requests.set(self.0.requests.get() - 1);
    }
}

/// How long a connection may live, in the worker's ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Term {
    /// Without a byte; `None`: as for all connections.
    idle_max: Option<u32>,
    /// Whatever it does.
    life_max: Option<u32>,
}

impl Term {
    /// Of a connection that no policy is about.
    pub(crate) const DEFAULT: Self = Self { idle_max: None, life_max: None };

    /// As a destination's policy says; zero is for ever.
    pub(crate) fn of(pool: &ConnectionPool) -> Self {
        let ticks = |time: Duration| if time.is_zero() { u32::MAX } else { ticks(time) };
        Self { idle_max: Some(ticks(pool.idle_timeout)), life_max: pool.max_connection_duration.map(ticks) }
    }

    /// Why a connection is over that began, and moved its last byte, so many ticks ago.
    pub(crate) fn ended(self, age: u32, idle: u32, idle_max: u32) -> Option<CloseReason> {
        if idle >= self.idle_max.unwrap_or(idle_max) {
            return Some(CloseReason::IdleTimeout);
        }
        self.life_max.is_some_and(|max| age >= max).then_some(CloseReason::MaxDuration)
    }
}

/// Whom a connection is between.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    pub(crate) service: Option<Name>,
    pub(crate) source: Option<Name>,
    pub(crate) destination: Option<Name>,
    pub(crate) security: Security,
    /// Whom the other side is proved to be.
    pub(crate) peer: Option<Arc<Identity>>,
}

/// The bytes of a connection already added to an edge.
#[derive(Debug)]
struct EdgeShare {
    edge: Arc<Edge>,
    to_server: u64,
    to_client: u64,
}

/// A connection's part in a flow through tunnels.
#[derive(Debug)]
struct FlowShare {
    flow: Arc<Flow>,
    /// When the other node was asked for it, until it has taken it.
    asked: Option<Instant>,
    /// Smoothed round trip time of its tunnel, in microseconds.
    srtt_us: u32,
}

impl FlowShare {
    fn end(self, meter: &Meter) {
        match self.asked {
            Some(_) => self.flow.fail(),
            None => self.flow.close(meter.to_server(), meter.to_client(), self.srtt_us),
        }
    }
}

impl Live {
    /// Notes what the client dialled.
    pub(crate) fn set_original_dst(&self, addr: SocketAddr) {
        self.original_dst.set(Some(addr));
    }

    /// Holds its part in the limit of the workload that takes it, in place of the one before.
    pub(crate) fn hold_inbound(&self, part: Option<Taken>) {
        *self.inbound.borrow_mut() = part;
    }

    /// Whether others wait for its part in that limit.
    pub(crate) fn is_wanted(&self) -> bool {
        self.inbound.borrow().as_ref().is_some_and(Taken::is_wanted)
    }

    /// Tells those who wait for it that it can be asked for now.
    pub(crate) fn tell_waiting(&self) {
        if let Some(part) = &*self.inbound.borrow() {
            part.tell_waiting();
        }
    }

    /// Notes what the server's side allowed. Before the app is dialled, so that no policy change falls in between.
    pub(crate) fn set_admitted(&self, request: ServerRequest) {
        *self.admitted.borrow_mut() = Some(request);
    }

    /// What the server's side allowed, if that was decided here.
    pub(crate) fn admitted(&self) -> Option<ServerRequest> {
        self.admitted.borrow().clone()
    }

    /// Limits its life as its destination's policy says.
    pub(crate) fn set_term(&self, term: Term) {
        self.term.set(term);
    }

    /// A request begins on it. As long as it lasts, the connection is not idle, whatever it carries.
    pub(crate) fn begin_request(self: &Rc<Self>) -> OpenRequest {
        self.requests.set(self.requests.get() + 1);
        OpenRequest(Rc::clone(self))
    }

    /// Why its time is over at a tick, if it is. Asked at every look at the connections.
    pub(crate) fn overdue(&self, tick: u32, idle_max: u32) -> Option<CloseReason> {
        if self.requests.get() > 0 {
            self.requested.set(Some(tick));
        }
        let age = tick.wrapping_sub(self.started);
        let silent = tick.wrapping_sub(self.meter.active());
        let idle = self.requested.get().map_or(silent, |at| silent.min(tick.wrapping_sub(at)));
        self.term.get().ended(age, idle, idle_max)
    }

    /// What the client dialled, as far as it is known.
    pub(crate) fn original_dst(&self) -> Option<SocketAddr> {
        self.original_dst.get()
    }

    /// What protects it towards the server.
    pub(crate) fn security(&self) -> Security {
        self.names.borrow().security
    }

    /// Whom it is between.
    pub(crate) fn names(&self) -> Names {
        self.names.borrow().clone()
    }

    /// Notes where it is taken, and whom it is between.
    pub(crate) fn set_upstream(&self, addr: SocketAddr, names: Names) {
        self.upstream.set(Some(addr));
        *self.names.borrow_mut() = names;
    }

    /// Counts the connection as opened on an edge; its bytes and its end will be counted there too.
    pub(crate) fn join(&self, edge: Arc<Edge>) {
        edge.opened.inc();
        self.edges.borrow_mut().push(EdgeShare { edge, to_server: 0, to_client: 0 });
    }

    /// Another node is about to be asked for it. One that was asked before did not take it.
    pub(crate) fn ask(&self, flow: Option<Arc<Flow>>) {
        let share = flow.map(|flow| FlowShare { flow, asked: Some(Instant::now()), srtt_us: 0 });
        if let Some(before) = self.flow.replace(share) {
            before.end(&self.meter);
        }
    }

    /// It is carried by this tunnel from here on.
    pub(crate) fn rides(&self, tunnel: &Rc<Tunnel>) {
        *self.tunnel.borrow_mut() = Rc::downgrade(tunnel);
    }

    /// Whether the tunnel that carries it is about to end: nothing that can go elsewhere should be begun on it.
    pub(crate) fn tunnel_leaves(&self) -> bool {
        self.tunnel.borrow().upgrade().is_some_and(|tunnel| tunnel.is_leaving())
    }

    /// The other node has taken it.
    pub(crate) fn taken(&self) {
        if let Some(share) = &mut *self.flow.borrow_mut()
            && let Some(asked) = share.asked.take()
        {
            share.flow.open(asked.elapsed());
        }
    }

    /// Notes the round trip time of its tunnel.
    pub(crate) fn set_srtt(&self, srtt_us: u32) {
        if let Some(share) = &mut *self.flow.borrow_mut() {
            share.srtt_us = srtt_us;
        }
    }

    /// Adds the bytes since the last time to the edges.
    pub(crate) fn publish_bytes(&self) {
        for share in &mut *self.edges.borrow_mut() {
            let (to_server, to_client) = (self.meter.to_server(), self.meter.to_client());
            share.edge.received_bytes.inc_by(to_server - share.to_server);
            share.edge.sent_bytes.inc_by(to_client - share.to_client);
            (share.to_server, share.to_client) = (to_server, to_client);
        }
    }

    fn view(&self, now: u32, tick_ms: u64) -> ConnectionView {
        let names = self.names.borrow().clone();
        ConnectionView {
            id: self.id,
            direction: self.direction,
            pod: self.pod.name.clone(),
            client: self.client,
            original_dst: self.original_dst.get(),
            upstream: self.upstream.get(),
            service: names.service,
            source: names.source,
            destination: names.destination,
            security: names.security,
            peer: names.peer,
            bytes_to_server: self.meter.to_server(),
            bytes_to_client: self.meter.to_client(),
            age_ms: u64::from(now.wrapping_sub(self.started)) * tick_ms,
            idle_ms: u64::from(now.wrapping_sub(self.meter.active())) * tick_ms,
        }
    }
}

/// How many connections there are, over all workers.
#[derive(Debug)]
pub(crate) struct Admission {
    live: AtomicUsize,
    max: usize,
}

impl Admission {
    pub(crate) fn new(max: usize) -> Self {
        Self { live: AtomicUsize::new(0), max }
    }

    /// Counts one more, if there may be one more.
    pub(crate) fn enter(&self) -> bool {
        if self.live.fetch_add(1, Ordering::Relaxed) < self.max {
            return true;
        }
        self.leave();
        false
    }

    pub(crate) fn leave(&self) {
        self.live.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether there is one now.
    pub(crate) fn is_used(&self) -> bool {
        self.live.load(Ordering::Relaxed) > 0
    }
}

/// The live connections of one worker.
#[derive(Debug)]
pub(crate) struct Connections {
    live: RefCell<HashMap<u64, Rc<Live>>>,
    next_id: Cell<u64>,
    total: Arc<Admission>,
    metrics: Arc<Metrics>,
}

/// A connection in the table; it leaves when this is dropped.
#[derive(Debug)]
pub(crate) struct Open<'a> {
    table: &'a Connections,
    live: Rc<Live>,
    reason: Option<CloseReason>,
}

/// The agent or the pod holds as many connections as it may.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overloaded;

impl Connections {
    pub(crate) fn new(worker: usize, total: Arc<Admission>, metrics: Arc<Metrics>) -> Self {
        Self { live: RefCell::default(), next_id: Cell::new((worker as u64) << 48), total, metrics }
    }

    /// Adds an accepted connection.
    pub(crate) fn open(
        &self,
        direction: Direction,
        pod: &Arc<PodHandle>,
        of_pod: &Arc<Admission>,
        client: SocketAddr,
        now: u32,
    ) -> Result<Open<'_>, Overloaded> {
        self.add(true, direction, pod, of_pod, client, now)
    }

    /// Adds a connection that the agent makes for the requests of several of a pod's connections. It takes a descriptor and
    /// is judged, shown and ended as they are, and is not one of them where they are counted.
    pub(crate) fn open_shared(&self, of: &Live, now: u32) -> Result<Open<'_>, Overloaded> {
        self.add(false, of.direction, &of.pod, &of.of_pod, of.client, now)
    }

    fn add(
        &self,
        is_accepted: bool,
        direction: Direction,
        pod: &Arc<PodHandle>,
        of_pod: &Arc<Admission>,
        client: SocketAddr,
        now: u32,
    ) -> Result<Open<'_>, Overloaded> {
        if !of_pod.enter() {
            self.count(direction, CloseReason::Overloaded);
            return Err(Overloaded);
        }
        if !self.total.enter() {
            of_pod.leave();
            self.count(direction, CloseReason::Overloaded);
            return Err(Overloaded);
        }
        let id = self.next_id.get() + 1;
        self.next_id.set(id);
        let live = Rc::new(Live {
            id,
            direction,
            pod: Arc::clone(pod),
            client,
            meter: Meter::default(),
            of_pod: Arc::clone(of_pod),
            is_accepted,
            started: now,
            requests: Cell::new(0),
            requested: Cell::new(None),
            term: Cell::new(Term::DEFAULT),
            original_dst: Cell::new(None),
            upstream: Cell::new(None),
            names: RefCell::default(),
            edges: RefCell::default(),
            flow: RefCell::default(),
            tunnel: RefCell::default(),
            admitted: RefCell::default(),
            inbound: RefCell::default(),
        });
        live.meter.touch(now);
        self.live.borrow_mut().insert(id, Rc::clone(&live));
        if is_accepted {
            self.metrics.open(direction).inc();
        }
        Ok(Open { table: self, live, reason: None })
    }

    pub(crate) fn len(&self) -> usize {
        self.live.borrow().len()
    }

    /// How many of them clients made.
    #[cfg(test)]
    pub(crate) fn accepted(&self) -> usize {
        self.live.borrow().values().filter(|live| live.is_accepted).count()
    }

    /// Calls `visit` with every connection. `visit` must not open or close any.
    pub(crate) fn each(&self, visit: impl FnMut(&Rc<Live>)) {
        self.live.borrow().values().for_each(visit);
    }

    /// Copies up to `max` rows.
    pub(crate) fn views(&self, max: usize, now: u32, tick_ms: u64) -> Vec<ConnectionView> {
        self.live.borrow().values().take(max).map(|live| live.view(now, tick_ms)).collect()
    }

    fn count(&self, direction: Direction, reason: CloseReason) {
        self.metrics.closed(direction, reason).inc();
    }
}

impl Open<'_> {
    pub(crate) fn live(&self) -> &Rc<Live> {
        &self.live
    }

    /// Ends it.
    pub(crate) fn close(mut self, reason: CloseReason) {
        self.reason = Some(reason);
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let reason = self.reason.unwrap_or_else(|| {
            // Without a reason the task was dropped: by its own panic, or by the end of its worker.
            if std::thread::panicking() {
                self.table.metrics.panics.inc();
                CloseReason::Bug
            } else {
                CloseReason::Drained
            }
        });
        self.table.live.borrow_mut().remove(&self.live.id);
        self.live.publish_bytes();
        for share in &*self.live.edges.borrow() {
            share.edge.closed(reason).inc();
        }
        if let Some(share) = self.live.flow.take() {
            share.end(&self.live.meter);
        }
        if self.live.is_accepted {
            self.table.count(self.live.direction, reason);
            self.table.metrics.open(self.live.direction).dec();
        }
        self.live.of_pod.leave();
        self.table.total.leave();
        tracing::debug!(
            target: "mesh_proxy::access",
            id = self.live.id,
            direction = self.live.direction.as_str(),
            pod = %self.live.pod.name,
            client = %self.live.client,
            original_dst = ?self.live.original_dst.get(),
            upstream = ?self.live.upstream.get(),
            to_server = self.live.meter.to_server(),
            to_client = self.live.meter.to_client(),
            reason = reason.as_str(),
            "connection closed"
        );
    }
}
