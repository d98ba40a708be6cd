//! One client's HTTP connection: its socket, who the client is, what it dialled, and what its last request was routed by.
//!
//! Invariants:
//! - Belongs to one worker; shared by the connection's task and those of its streams.
//! - What is remembered of routing is dropped with the snapshot it came from.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Waker},
};

use mesh_core::{
    id::WorkloadId,
    route::{cluster::ClusterKey, http::HttpTable},
    snapshot::{Snapshot, Workload},
};

use super::{
    exchange::{Destination, Upgraded},
    guard::Guard,
    interim::Interim,
    own::OwnSide,
    record::Record,
    resets::Resets,
    tables,
    upstream::Upstreams,
};
use crate::{
    connections::Live,
    metrics::{
        edges::Parties,
        http::{Refusal, RequestKey, Requests},
    },
    stream::{Io, Stream},
    worker::{TICK_MS, Worker},
};

/// Streams that were given up before this many are no reason to end a connection.
const EARLY_RESETS_MIN: u32 = 200;

/// Milliseconds that an idle connection has in a drain for a request that may be on its way.
const LEAVE_MS: u64 = 1000;

/// Series that are remembered, so that counting takes no lock.
const SERIES_KEPT: usize = 8;

/// What a connection's requests share.
pub(crate) struct Session {
    pub(super) worker: Rc<Worker>,
    pub(super) live: Rc<Live>,
    /// What the client dialled.
    pub(super) dialled: SocketAddr,
    /// The client speaks HTTP/2.
    pub(super) http2: bool,
    /// It is the server's own side that looks into it, and routes nothing.
    pub(super) own: Option<Box<OwnSide>>,
    pub(super) socket: RefCell<Socket>,
    /// Requests whose responses are not complete.
    open: Cell<u32>,
    /// The same, to look for those that stall; of HTTP/2 all, of HTTP/1 the last.
    records: RefCell<Vec<Weak<Record>>>,
    /// Streams so far, and those that the client gave up early.
    streams: Cell<u32>,
    resets: Cell<u32>,
    /// The server's side of a protocol that was switched to.
    pub(super) switched: RefCell<Option<Upgraded>>,
    last: RefCell<Option<Rc<Routing>>>,
    /// Who reads on once no request is open any more.
    reader: RefCell<Option<Waker>>,
    /// The current request's response has begun.
    pub(super) answered: Cell<bool>,
    /// Series that requests were counted in last.
    series: RefCell<Vec<(RequestKey, Arc<Requests>)>>,
    pub(super) upstreams: Upstreams,
    /// Why the connection is to end, if the client broke the rules.
    pub(super) refused: Cell<Option<Refusal>>,
    /// What servers say before their responses, in HTTP/1.1.
    pub(super) interim: Interim,
    /// Tick at which the connection was first idle in a drain.
    leaving: Cell<Option<u32>>,
}

/// The client's socket with the bytes on their way from it.
pub(super) struct Socket {
    /// `None` once it was taken for another protocol.
    pub(super) stream: Option<Stream>,
    pub(super) guard: Guard,
    /// Tick since which a head is incomplete.
    pub(super) head_since: Option<u32>,
    /// What is sent, in HTTP/2.
    pub(super) resets: Option<Resets>,
    /// Interim responses that are sent before anything else.
    pub(super) said: Vec<u8>,
    /// The library has written something and not yet all of it.
    pub(super) mid_message: bool,
}

/// What requests for one authority are routed by.
pub(super) struct Routing {
    pub(super) snapshot: Arc<Snapshot>,
    /// The client's own pod.
    pub(super) client: Option<Arc<Workload>>,
    authority: String,
    /// Its rules; `None`: nothing is known of it.
    pub(super) table: Option<Arc<HttpTable>>,
    /// The port that counts for it.
    pub(super) port: u16,
    /// The last policy that was looked up.
    policy: RefCell<Option<(ClusterKey, Destination)>>,
}

impl Session {
    pub(super) fn new(
        worker: &Rc<Worker>,
        live: &Rc<Live>,
        dialled: SocketAddr,
        http2: bool,
        own: Option<Box<OwnSide>>,
        stream: Stream,
    ) -> Rc<Self> {
        let guard = if http2 { Guard::off() } else { Guard::new() };
        Rc::new(Self {
            worker: Rc::clone(worker),
            live: Rc::clone(live),
            dialled,
            http2,
            own,
            socket: RefCell::new(Socket {
                stream: Some(stream),
                guard,
                head_since: None,
                resets: http2.then(Resets::default),
                said: Vec::new(),
                mid_message: false,
            }),
            open: Cell::new(0),
            records: RefCell::default(),
            streams: Cell::new(0),
            resets: Cell::new(0),
            switched: RefCell::default(),
            last: RefCell::default(),
            reader: RefCell::default(),
            answered: Cell::new(false),
            series: RefCell::default(),
            upstreams: Upstreams::of(worker),
            refused: Cell::new(None),
            interim: Interim::default(),
            leaving: Cell::new(None),
        })
    }

    /// Whether an idle connection may end in a drain. Not at once: a request may be on its way, and its client would never
    /// know whether it was heard. Whoever sends one is answered, and told to make another connection.
    pub(super) fn may_leave(&self) -> bool {
        if !self.live.meter.is_finishing() {
            return false;
        }
        let now = self.worker.tick();
        let since = self.leaving.get().unwrap_or(now);
        self.leaving.set(Some(since));
        u64::from(now.wrapping_sub(since)) * TICK_MS >= LEAVE_MS
    }

    /// Has what the server said before its response go before whatever is written next, unless something is being written.
    pub(super) fn take_interim(&self) {
        let mut socket = self.socket.borrow_mut();
        if !self.answered.get() && !socket.mid_message && self.is_busy() {
            let heads = self.interim.heads();
            socket.said.extend_from_slice(&heads);
        }
    }

    /// Passes on what the server says before its response.
    pub(super) fn pass_interim(&self, cx: &Context<'_>) {
        if !self.is_busy() {
            return;
        }
        self.interim.wake_for(cx);
        self.take_interim();
        let mut socket = self.socket.borrow_mut();
        // What does not fit goes before the response.
        let Socket { stream: Some(stream), said, .. } = &mut *socket else { return };
        if !said.is_empty()
            && let Ok(Io::Bytes(sent)) = stream.write(said)
        {
            said.drain(..sent);
        }
    }

    /// Whether a request is not answered completely.
    pub(super) fn is_busy(&self) -> bool {
        self.open.get() > 0
    }

    /// Whether the body of the last request that has begun has not arrived in full.
    pub(super) fn is_receiving(&self) -> bool {
        let guard = &self.socket.borrow().guard;
        guard.in_body() && guard.requests() == self.begun()
    }

    /// Requests that have begun so far, modulo 2³².
    pub(super) fn begun(&self) -> u32 {
        self.streams.get()
    }

    /// A request begins.
    pub(super) fn begin(&self, record: &Rc<Record>) {
        self.open.set(self.open.get() + 1);
        self.answered.set(false);
        self.streams.set(self.streams.get().wrapping_add(1));
        let mut records = self.records.borrow_mut();
        if !self.http2 {
            records.clear();
        } else if records.len() >= 64 && records.len().is_power_of_two() {
            records.retain(|record| record.strong_count() > 0);
        }
        records.push(Rc::downgrade(record));
    }

    /// Wakes the reader when no request is open any more.
    pub(super) fn wake_when_idle(&self, cx: &Context<'_>) {
        let mut reader = self.reader.borrow_mut();
        if !reader.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *reader = Some(cx.waker().clone());
        }
    }

    /// A request is over; `early`: the client gave it up as soon as it was sent.
    pub(super) fn end(&self, early: bool) {
        self.open.set(self.open.get().saturating_sub(1));
        if !self.is_busy()
            && let Some(reader) = self.reader.take()
        {
            reader.wake();
        }
        if early && self.http2 {
            let resets = self.resets.get() + 1;
            self.resets.set(resets);
            if resets >= EARLY_RESETS_MIN && resets > self.streams.get() / 2 {
                self.refused.set(Some(Refusal::RapidReset));
            }
        }
    }

    /// The client's pod.
    pub(super) fn source(&self) -> Option<WorkloadId> {
        match &self.own {
            Some(own) => own.source.as_ref().map(|source| source.id),
            None => Some(self.live.pod.workload),
        }
    }

    /// Where requests go that no rule is about.
    pub(super) fn as_dialled(&self) -> Destination {
        self.own.as_ref().map_or(Destination::Address(self.dialled), |own| own.destination.clone())
    }

    /// Counts a request in its series.
    pub(super) fn count(
        &self,
        key: RequestKey,
        parties: Parties<'_>,
        flags: impl FnOnce() -> String,
        add: impl FnOnce(&Requests),
    ) {
        let mut series = self.series.borrow_mut();
        if let Some((_, requests)) = series.iter().find(|(known, _)| *known == key) {
            return add(requests);
        }
        let Some(requests) = self.worker.metrics().http.requests(key, parties, flags) else { return };
        add(&requests);
        if series.len() >= SERIES_KEPT {
            series.remove(0);
        }
        series.push((key, requests));
    }

    /// Since which tick the longest-waiting response is not taken by the client.
    pub(super) fn stalled_since(&self, now: u32) -> Option<u32> {
        let records = self.records.borrow();
        let stalls = records.iter().filter_map(|record| record.upgrade()?.offered_since());
        stalls.max_by_key(|since| now.wrapping_sub(*since))
    }

    /// What requests for `authority` are routed by in the newest snapshot.
    pub(super) fn routing(&self, authority: &str) -> Rc<Routing> {
        let snapshot = self.worker.snapshot();
        let mut last = self.last.borrow_mut();
        if let Some(last) = &*last
            && last.snapshot.version() == snapshot.version()
            && last.authority == authority
        {
            return Rc::clone(last);
        }
        let pod = &self.live.pod;
        let routing = match &self.own {
            Some(own) => Routing {
                client: own.source.clone(),
                authority: authority.to_owned(),
                table: None,
                port: self.dialled.port(),
                policy: RefCell::default(),
                snapshot,
            },
            None => Routing::new(snapshot, pod.workload, &pod.name.namespace, self.dialled, authority),
        };
        let routing = Rc::new(routing);
        *last = Some(Rc::clone(&routing));
        routing
    }
}

impl Routing {
    /// What requests for `authority` are routed by for a client of `namespace`.
    pub(super) fn new(
        snapshot: Arc<Snapshot>,
        client: WorkloadId,
        namespace: &str,
        dialled: SocketAddr,
        authority: &str,
    ) -> Self {
        let client = snapshot.workload(client).cloned();
        let port = dialled.port();
        let sight = match &client {
            Some(client) => snapshot.sight_of(client),
            None => snapshot.sight_from(namespace),
        };
        let table = tables::table_of(&snapshot, client.as_deref(), &sight, dialled, authority);
        Self { client, authority: authority.to_owned(), table, port, policy: RefCell::default(), snapshot }
    }

    /// Where requests for a cluster go; `None`: there is no such destination.
    pub(super) fn destination(&self, key: &ClusterKey, namespace: &str) -> Option<Destination> {
        let mut policy = self.policy.borrow_mut();
        if let Some((known, destination)) = &*policy
            && known == key
        {
            return Some(destination.clone());
        }
        let destination = Destination::of(&self.snapshot, key, self.client.as_deref(), namespace)?;
        *policy = Some((key.clone(), destination.clone()));
        Some(destination)
    }
}
