//! What is kept of one request until its response is complete: for metrics, the access log, and to see a client that stalls.
//!
//! Invariant: every request is counted and logged exactly once, when the last of it is gone, however it ended.

use std::{
    cell::{Cell, OnceCell, RefCell},
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Request};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use mesh_core::snapshot::Service;

use super::{
    body::{Body, BoxError},
    exchange::{Flag, Flags, UpstreamEnd},
    session::{Routing, Session},
};
use crate::{
    connections::OpenRequest,
    metrics::{
        edges::{EdgeKey, Parties, Reporter, Security},
        http::RequestKey,
    },
};

/// A request that is reset within this time was never meant to be answered.
const EARLY: Duration = Duration::from_secs(1);

/// What is kept of one request.
pub(super) struct Record {
    session: Rc<Session>,
    started: Instant,
    request_bytes: OnceCell<Rc<Cell<u64>>>,
    response_bytes: Cell<u64>,
    status: Cell<u16>,
    flags: Cell<Flags>,
    /// Envoy's response code details.
    pub(super) details: Cell<&'static str>,
    pub(super) grpc: Cell<bool>,
    grpc_status: Cell<Option<u8>>,
    pub(super) service: RefCell<Option<Arc<Service>>>,
    pub(super) routing: RefCell<Option<Rc<Routing>>>,
    pub(super) upstream: RefCell<Option<UpstreamEnd>>,
    /// Tick at which the client was offered bytes that it has not asked more after.
    offered: Cell<Option<u32>>,
    /// The response is complete.
    done: Cell<bool>,
    log: Option<Box<RefCell<Line>>>,
    _open: OpenRequest,
}

/// What only the access log wants.
#[derive(Debug, Default)]
pub(super) struct Line {
    method: String,
    path: String,
    version: String,
    user_agent: String,
    pub(super) authority: String,
    pub(super) request_id: String,
    pub(super) route: String,
    pub(super) retries: u32,
}

impl Record {
    /// A request has arrived.
    pub(super) fn begin(session: &Rc<Session>, request: &Request<Incoming>) -> Rc<Self> {
        let log = tracing::enabled!(target: "mesh_proxy::access", tracing::Level::DEBUG).then(|| {
            let agent = request.headers().get(http::header::USER_AGENT).map(|agent| agent.as_bytes());
            Box::new(RefCell::new(Line {
                method: request.method().to_string(),
                path: request.uri().path_and_query().map_or_else(String::new, ToString::to_string),
                version: format!("{:?}", request.version()),
                user_agent: String::from_utf8_lossy(agent.unwrap_or_default()).into_owned(),
                ..Line::default()
            }))
        });
        let record = Rc::new(Self {
            session: Rc::clone(session),
            started: Instant::now(),
            request_bytes: OnceCell::new(),
            response_bytes: Cell::new(0),
            status: Cell::new(0),
            flags: Cell::default(),
            details: Cell::new(""),
            grpc: Cell::new(false),
            grpc_status: Cell::new(None),
            service: RefCell::default(),
            routing: RefCell::default(),
            upstream: RefCell::default(),
            offered: Cell::new(None),
            done: Cell::new(false),
            log,
            _open: session.live.begin_request(),
        });
        session.begin(&record);
        record
    }

    /// Notes something for the access log, if there is one.
    pub(super) fn note(&self, note: impl FnOnce(&mut Line)) {
        if let Some(line) = &self.log {
            note(&mut line.borrow_mut());
        }
    }

    /// Since when the request is here.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// What is said about the response so far.
    pub(super) fn flags(&self) -> Flags {
        self.flags.get()
    }

    /// Adds a flag.
    pub(super) fn flag(&self, flag: Flag) {
        self.flags.set(self.flags.get().union(flag.into()));
    }

    /// Adds flags.
    pub(super) fn add_flags(&self, flags: Flags) {
        self.flags.set(self.flags.get().union(flags));
    }

    /// Tick since which the client leaves bytes of the response alone.
    pub(super) fn offered_since(&self) -> Option<u32> {
        self.offered.get()
    }

    /// The body of the request, counted.
    pub(super) fn receive(&self, body: Incoming) -> Body {
        if body.is_end_stream() {
            return Body::Empty;
        }
        let bytes = Rc::clone(self.request_bytes.get_or_init(Rc::default));
        Body::boxed(Received { body, bytes })
    }

    fn learn_grpc_status(&self, headers: &HeaderMap) {
        if self.grpc.get()
            && let Some(value) = headers.get("grpc-status")
        {
            let status =
                value.to_str().ok().and_then(|text| text.parse().ok()).filter(|status| *status <= 16);
            // What is no code is UNKNOWN.
            self.grpc_status.set(Some(status.unwrap_or(2)));
        }
    }

    /// Counts it in one series.
    fn count(&self, reporter: Reporter, security: Security, duration: Duration) {
        let routing = self.routing.borrow();
        let upstream = self.upstream.borrow();
        let service = self.service.borrow();
        let destination = upstream.as_ref().and_then(|end| end.workload.as_ref());
        let flags = self.flags.get();
        let key = RequestKey {
            edge: EdgeKey {
                reporter,
                source: self.session.source(),
                destination: destination.map(|workload| workload.id),
                service: service.as_ref().map(|service| service.id),
                security,
            },
            grpc: self.grpc.get(),
            status: self.status.get(),
            grpc_status: self.grpc_status.get(),
            flags: flags.bits(),
        };
        let parties = Parties {
            source: routing.as_ref().and_then(|routing| routing.client.as_deref()),
            destination: destination.map(|workload| &**workload),
            service: service.as_deref(),
            cluster_domain: routing.as_ref().map_or("", |routing| routing.snapshot.cluster_domain()),
        };
        let request_bytes = self.request_bytes.get().map_or(0, |bytes| bytes.get());
        self.session.count(
            key,
            parties,
            || flags.to_string(),
            |requests| {
                requests.add(duration, request_bytes, self.response_bytes.get());
            },
        );
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let duration = self.started.elapsed();
        if !self.done.get() && self.flags.get().is_empty() {
            self.flag(Flag::DownstreamClosed);
        }
        let closed = self.flags.get().contains(Flag::DownstreamClosed);
        self.session.end(closed && duration < EARLY);
        let security = self.upstream.borrow().as_ref().map_or(Security::Plaintext, |end| end.security);
        let reporter = if self.session.own.is_some() { Reporter::Destination } else { Reporter::Source };
        self.count(reporter, security, duration);
        if security == Security::Kernel {
            // Both sides are done in this pass, so both report.
            self.count(Reporter::Destination, security, duration);
        }
        let Some(line) = self.log.take().map(|line| line.into_inner()) else { return };
        let upstream = self.upstream.take();
        tracing::debug!(
            target: "mesh_proxy::access",
            id = self.session.live.id,
            pod = %self.session.live.pod.name,
            client = %self.session.live.client,
            method = line.method,
            path = line.path,
            protocol = line.version,
            response_code = self.status.get(),
            response_flags = %self.flags.get(),
            response_code_details = self.details.get(),
            grpc_status = self.grpc_status.get(),
            bytes_received = self.request_bytes.get().map_or(0, |bytes| bytes.get()),
            bytes_sent = self.response_bytes.get(),
            duration_ms = duration.as_secs_f64() * 1000.0,
            user_agent = line.user_agent,
            request_id = line.request_id,
            authority = line.authority,
            upstream = ?upstream.as_ref().map(|end| end.addr),
            upstream_cluster = ?self.service.borrow().as_ref().map(|service| service.name.to_string()),
            downstream_local_address = %self.session.dialled,
            route = line.route,
            retries = line.retries,
            "request"
        );
    }
}

/// A request's body on its way to the server.
struct Received {
    body: Incoming,
    bytes: Rc<Cell<u64>>,
}

impl HttpBody for Received {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.bytes.set(self.bytes.get() + data.len() as u64);
        }
        polled.map(|frame| frame.map(|outcome| outcome.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body on its way to the client.
pub(super) struct Outgoing {
    body: Body,
    /// Bytes that are left of a body of known length.
    left: Option<u64>,
    record: Rc<Record>,
}

impl Outgoing {
    /// The body of a response with this status and these headers.
    pub(super) fn new(body: Body, status: u16, headers: &HeaderMap, record: Rc<Record>) -> Self {
        record.status.set(status);
        record.session.answered.set(true);
        record.learn_grpc_status(headers);
        let left = body.size_hint().exact();
        record.done.set(body.is_end_stream() || left == Some(0));
        Self { body, left, record }
    }

    /// There is no body though one is announced, as in the response to a HEAD.
    pub(super) fn without_body(self) -> Self {
        self.record.done.set(true);
        self
    }
}

impl HttpBody for Outgoing {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        let record = Rc::clone(&self.record);
        record.offered.set(None);
        match &polled {
            Poll::Pending => {}
            Poll::Ready(None) => record.done.set(true),
            Poll::Ready(Some(Err(_))) => record.flag(Flag::UpstreamClosed),
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    let len = data.len() as u64;
                    record.response_bytes.set(record.response_bytes.get() + len);
                    self.left = self.left.map(|left| left.saturating_sub(len));
                    record.offered.set(Some(record.session.worker.tick()));
                } else if let Some(trailers) = frame.trailers_ref() {
                    record.learn_grpc_status(trailers);
                    record.done.set(true);
                }
                if self.left == Some(0) || self.body.is_end_stream() {
                    record.done.set(true);
                }
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
