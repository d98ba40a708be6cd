//! Owns the list of connected clients: who they are and how far they have come.
//!
//! Invariant: a client is in the list for as long as its [`Entry`] lives, and counted as long.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use tonic::Status;

use super::{
    metrics::{Client, ClientLabels, PublishMetrics},
    session::{KindStatus, Session},
};
use crate::link::Kind;

/// Streams at once.
pub const SESSIONS_MAX: usize = 10_000;
/// Streams at once of one node: an agent has one, and a new one before the old is found dead.
pub const SESSIONS_PER_NODE_MAX: usize = 8;

/// A connected client, for operators.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SessionView {
    /// The node whose credentials it showed.
    pub node: Arc<str>,
    /// Where it comes from.
    pub remote: String,
    /// What it is.
    pub client: Client,
    /// What it calls itself.
    pub id: String,
    /// Seconds since it came.
    pub age_s: f64,
    /// Generations it has not been sent yet.
    pub behind: u64,
    /// State by kind of resource.
    pub kinds: BTreeMap<&'static str, KindStatus>,
}

/// What is known of a connected client. It is written at each message of each of them, and read when an operator asks.
#[derive(Debug)]
struct Seat {
    node: Arc<str>,
    remote: String,
    client: Client,
    id: String,
    since: Instant,
    seen: u64,
    kinds: [Option<KindStatus>; Kind::ALL.len()],
}

impl Seat {
    fn view(&self, generation: u64) -> SessionView {
        let kinds = Kind::ALL.iter().zip(&self.kinds);
        SessionView {
            node: Arc::clone(&self.node),
            remote: self.remote.clone(),
            client: self.client,
            id: self.id.clone(),
            age_s: self.since.elapsed().as_secs_f64(),
            behind: generation.saturating_sub(self.seen),
            kinds: kinds.filter_map(|(kind, status)| Some((kind.as_str(), status.clone()?))).collect(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Seats {
    all: Mutex<BTreeMap<u64, Seat>>,
    next: AtomicU64,
    metrics: PublishMetrics,
}

impl Seats {
    /// Nobody is there.
    pub(super) fn new(metrics: PublishMetrics) -> Self {
        Self { all: Mutex::default(), next: AtomicU64::new(0), metrics }
    }

    /// The clients, oldest first, at this generation.
    pub(super) fn views(&self, generation: u64) -> Vec<SessionView> {
        self.lock().values().map(|seat| seat.view(generation)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Seat>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a stream in the list, if there is room.
    pub(super) fn enter(self: &Arc<Self>, node: &Arc<str>, remote: String) -> Result<Entry, Status> {
        let mut sessions = self.lock();
        let of_node = sessions.values().filter(|seat| seat.node == *node).count();
        if sessions.len() >= SESSIONS_MAX || of_node >= SESSIONS_PER_NODE_MAX {
            self.metrics.refuse("too_many_sessions");
            return Err(Status::resource_exhausted("too_many_sessions: come again later"));
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let seat = Seat {
            node: Arc::clone(node),
            remote,
            client: Client::Foreign,
            id: String::new(),
            since: Instant::now(),
            seen: 0,
            kinds: Default::default(),
        };
        self.metrics.sessions.get_or_create(&ClientLabels { client: seat.client }).inc();
        sessions.insert(id, seat);
        Ok(Entry { seats: Arc::clone(self), id })
    }
}

/// A stream's place in the list; leaves it when dropped.
#[derive(Debug)]
pub(super) struct Entry {
    seats: Arc<Seats>,
    id: u64,
}

impl Entry {
    /// Notes how far the client has come.
    pub(super) fn update(&self, session: &Session) {
        let metrics = &self.seats.metrics;
        let mut sessions = self.seats.lock();
        let Some(seat) = sessions.get_mut(&self.id) else { return };
        let client = if session.is_agent() { Client::Agent } else { Client::Foreign };
        if client != seat.client {
            metrics.sessions.get_or_create(&ClientLabels { client: seat.client }).dec();
            metrics.sessions.get_or_create(&ClientLabels { client }).inc();
            seat.client = client;
        }
        seat.seen = session.seen();
        seat.kinds = Kind::ALL.map(|kind| session.status(kind).cloned());
    }

    /// Notes what the client calls itself.
    pub(super) fn name(&self, id: String) {
        if let Some(seat) = self.seats.lock().get_mut(&self.id) {
            seat.id = id.chars().take(256).collect();
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(seat) = self.seats.lock().remove(&self.id) {
            self.seats.metrics.sessions.get_or_create(&ClientLabels { client: seat.client }).dec();
        }
    }
}
