//! One request from its first try to its answer.
//!
//! Invariants:
//! - The route's time begins when the client has sent the whole request, and covers everything from there to the end of the
//!   response ([`super::clock`]).
//! - A request is repeated only while no byte of a response has been passed on, and only with its whole body.

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header, request, uri::Authority};
use http_body_util::BodyExt;
use hyper::{
    Request, Response,
    body::{Body as _, Incoming},
};
use mesh_core::{
    balance::outlier::Observed,
    route::{
        cluster::{Algorithm, Cluster},
        http::RetryOn,
        protocol::AppProtocol,
        request::Headers,
        retry::{self, Outcome},
    },
    snapshot::Snapshot,
};
use tokio::{
    task::spawn_local,
    time::{sleep, timeout},
};

use super::{
    super::{
        body::Body,
        exchange::{Answer, Flag, Flags, Plan, Upgraded, UpstreamEnd},
    },
    Upstreams,
    clock::Clock,
    cluster::{Need, Site},
    connection::{Sender, Version},
    replay::{Source, Stage},
    reply::Fault,
    response::{self, Held},
};
use crate::{
    destination::{
        Destination,
        by_name::is_called,
        endpoints::{Load, Member, Unchosen, Wish},
        limits::Kind,
    },
    server::{Full, take_request},
    worker::Worker,
};

/// Connections that turn out to be closed before one is made anew for a request.
const STALE_MAX: u32 = 3;
/// Copies of requests on their way at once, on one worker; further ones are not sent.
const MIRRORS_MAX: u32 = 1024;
/// Time and bytes that the response of a mirror is read for, so that its connection can be used again.
const MIRROR_TIME: Duration = Duration::from_secs(15);
const MIRROR_BYTES: usize = 256 << 10;

/// One request's way.
pub(super) struct Exchange<'a> {
    worker: &'a Rc<Worker>,
    plan: Plan,
    trace: RefCell<Trace>,
}

/// What is known of it so far.
#[derive(Default)]
struct Trace {
    upstream: Option<UpstreamEnd>,
    retries: u32,
    flags: Flags,
}

/// What a try brought.
struct Brought {
    response: Response<Incoming>,
    /// What is held until the response's end; of one that switches protocols its bytes hold it.
    held: Option<Held>,
    upgraded: Option<Upgraded>,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(worker: &'a Rc<Worker>, plan: Plan) -> Self {
        Self { worker, plan, trace: RefCell::default() }
    }

    /// Sends the request.
    pub(super) async fn run(self, request: Request<Body>) -> Answer {
        let (head, body) = request.into_parts();
        let site = self.worker.sites.site(self.worker, self.plan.live.pod.pod, &self.plan.destination);
        let repeats = self.plan.retries().is_some_and(|policy| policy.attempts > 0);
        let has_body = !body.is_end_stream();
        let is_copied = repeats || !self.plan.mirrors.is_empty();
        let is_timed = self.plan.timeout.is_some()
            || self.plan.retries().is_some_and(|policy| policy.per_try_timeout.is_some());
        let (source, body) = match has_body && (is_copied || is_timed) {
            true => {
                let source = Source::new(body, &self.worker.sites.kept);
                if !is_copied {
                    source.settle();
                }
                (Some(source), Body::Empty)
            }
            false => (None, body),
        };
        self.mirror(&head, source.as_ref());
        let clock = self.plan.timeout.map(|limit| Clock::new(limit, source.clone()));
        let tries = self.tries(&site, head, body, source.as_ref());
        let outcome = match &clock {
            None => tries.await,
            Some(clock) => {
                tokio::select! {
                    biased;
                    outcome = tries => outcome,
                    () = clock.over() => {
                        self.observe(&site, Observed::LocalFailure);
                        Err(Fault::TimedOut)
                    }
                }
            }
        };
        let Trace { upstream, retries, mut flags } = self.trace.take();
        match outcome {
            Ok(Brought { response, held, upgraded }) => {
                let (parts, body) = response.into_parts();
                let body = match held {
                    Some(mut held) => {
                        held.source = source.filter(|_| self.plan.mirrors.is_empty());
                        response::body(body, held, clock)
                    }
                    None => Body::Empty,
                };
                let outcome = Ok(Response::from_parts(parts, body));
                Answer { outcome, upstream, retries, flags, upgraded }
            }
            Err(fault) => {
                source.iter().for_each(|source| source.abandon());
                let failure = fault.failure();
                flags.insert(failure.flag);
                Answer { outcome: Err(failure), upstream, retries, flags, upgraded: None }
            }
        }
    }

    /// Tries until there is something to answer with.
    async fn tries(
        &self,
        site: &Rc<Site>,
        head: request::Parts,
        body: Body,
        source: Option<&Rc<Source>>,
    ) -> Result<Brought, Fault> {
        let policy = self.plan.retries();
        let on = policy.map(|policy| policy.on.of_request(&Fields(&head.headers)));
        let mut tried: Vec<SocketAddr> = Vec::new();
        let mut head = Some(head);
        let mut body = Some(body);
        let mut _token = None;
        let mut done = 0;
        loop {
            let more = policy.is_some_and(|policy| done < policy.attempts);
            let own = if more { head.clone() } else { head.take() };
            let Some(own) = own else { return Err(Fault::LocalReset) };
            let content = match source {
                Some(source) => source.next(),
                None => body.take().unwrap_or_default(),
            };
            let attempt = self.attempt(site, own, content, done, &mut tried);
            let mut outcome = match policy.and_then(|policy| policy.per_try_timeout) {
                None => attempt.await,
                Some(limit) => {
                    let over = async {
                        sleep(limit).await;
                        // A client that is still sending takes its own time, not the endpoint's.
                        if let Some(source) = source.filter(|source| source.stage() == Stage::Arriving) {
                            source.sent().await;
                            sleep(limit).await;
                        }
                    };
                    tokio::select! {
                        biased;
                        outcome = attempt => outcome,
                        () = over => Err(Fault::TryTimedOut),
                    }
                }
            };
            if let Some(observed) = observed(&outcome, self.plan.grpc) {
                self.observe(site, observed);
            }
            let (Some(policy), true) = (policy, on.as_ref().is_some_and(|on| is_worth_another(on, &outcome)))
            else {
                return outcome;
            };
            if !more {
                self.trace.borrow_mut().flags.insert(Flag::RetryLimit);
                return outcome;
            }
            if source.is_some_and(|source| !source.can_repeat()) {
                return outcome;
            }
            let limits = self.cluster().map(|cluster| &cluster.policy);
            let max = limits.and_then(|limits| limits.pool.max_retries);
            let budget = limits.and_then(|limits| limits.retry_budget.as_ref());
            _token = None;
            let Some(taken) = site.endpoints.usage.take_retry(max, budget) else {
                self.trace.borrow_mut().flags.insert(Flag::Overflow);
                return outcome;
            };
            _token = Some(taken);
            if let Ok(Brought { held: Some(held), .. }) = &mut outcome {
                // The next try asks again whether the body is wanted, and the copy of this one never goes.
                source.into_iter().for_each(|source| source.supersede());
                held.asked.hand_on();
            }
            drop(outcome);
            done += 1;
            self.trace.borrow_mut().retries = done;
            sleep(policy.backoff_before(done, self.worker.random())).await;
        }
    }

    /// One try.
    async fn attempt(
        &self,
        site: &Rc<Site>,
        mut head: request::Parts,
        body: Body,
        done: u32,
        tried: &mut Vec<SocketAddr>,
    ) -> Result<Brought, Fault> {
        let snapshot = if done == 0 { Arc::clone(&self.plan.snapshot) } else { self.worker.snapshot() };
        let member = self.choose(site, &snapshot, tried, &head).await?;
        tried.push(member.addr);
        self.trace.borrow_mut().upstream = Some(UpstreamEnd {
            addr: member.addr,
            workload: member.workload.clone(),
            security: crate::metrics::edges::Security::Plaintext,
        });
        let cluster = self.cluster();
        let max = cluster.and_then(|cluster| cluster.policy.pool.max_requests);
        let usage = &site.endpoints.usage;
        let taken = usage.take(Kind::Request, max).ok_or(Fault::Overflow)?;
        if done == 0 {
            usage.note_request(cluster.and_then(|cluster| cluster.policy.retry_budget.as_ref()));
        }
        let is_own = matches!(self.plan.destination, Destination::Own { .. });
        let of_server = match member.workload.as_ref().filter(|_| !is_own) {
            Some(server) => take_request(self.worker, &snapshot, server, member.addr.port()),
            None => Ok(None),
        };
        let of_server = of_server.map_err(|Full| Fault::Overflow)?;
        let load = Load::new(&member.load);
        let version = self.version();
        if !is_own {
            head.headers.insert("x-envoy-attempt-count", HeaderValue::from(done + 1));
        }
        address(&mut head, version);
        if version == Version::Http1 {
            delimit(&mut head, &body);
        }
        let wants_name = cluster.is_some_and(|cluster| cluster.policy.tls.is_some());
        let host = wants_name.then(|| host_of(&head));
        let is_connect = head.method == Method::CONNECT;
        if let Some(interim) = &self.plan.interim {
            match version {
                Version::Http1 if interim.is_waiting() => {
                    head.headers.insert(header::EXPECT, HeaderValue::from_static("100-continue"));
                }
                Version::Http1 => {}
                // The library tells nobody what is said before a response there.
                Version::Http2 => interim.open(),
            }
        }
        let mut request = Request::from_parts(head, body);
        if let Some(interim) = self.plan.interim.as_ref().filter(|_| version == Version::Http1) {
            interim.listen(&mut request);
        }
        let mut stale = 0;
        loop {
            let need = Need {
                live: &self.plan.live,
                snapshot: &snapshot,
                service: self.plan.destination.service(),
                member: &member,
                policy: cluster,
                version,
                host: host.as_ref(),
                is_exclusive: self.plan.upgrade || stale >= STALE_MAX && version == Version::Http1,
            };
            let mut lease = site.lease(self.worker, &need).await?;
            if let Some(end) = &mut self.trace.borrow_mut().upstream {
                end.security = lease.connection.live.security();
            }
            let switch = self.plan.upgrade.then(|| lease.connection.expect_switch());
            let sent = match &mut lease.sender {
                Some(Sender::Http1(sender)) => sender.try_send_request(request).await,
                Some(Sender::Http2(sender)) => sender.try_send_request(request).await,
                None => return Err(Fault::LocalReset),
            };
            let response = match sent {
                Ok(response) => response,
                Err(mut error) => match error.take_message() {
                    Some(unsent) if stale < STALE_MAX => {
                        // It was closed while it lay in the pool: nothing of the request has left.
                        stale += 1;
                        lease.connection.leaving.set(true);
                        request = unsent;
                        continue;
                    }
                    Some(_) => return Err(Fault::ConnectionEnded { sent: false }),
                    None => return Err(fault_of(error.error())),
                },
            };
            if !response::is_framed_once(&response) {
                return Err(Fault::Protocol);
            }
            let status = response.status();
            let switches = status == StatusCode::SWITCHING_PROTOCOLS || is_connect && status.is_success();
            let asked = response::Asked(self.plan.interim.clone());
            let held =
                Held { lease, _request: taken, _of_server: of_server, _load: load, source: None, asked };
            let Some(switch) = switch.filter(|_| switches) else {
                if status == StatusCode::SWITCHING_PROTOCOLS {
                    return Err(Fault::Protocol);
                }
                return Ok(Brought { response, held: Some(held), upgraded: None });
            };
            let mut switched = switch.await.map_err(|_| Fault::ConnectionEnded { sent: true })?;
            switched.held = Some(held);
            let upgraded = Some(Upgraded(Box::pin(switched)));
            return Ok(Brought { response, held: None, upgraded });
        }
    }

    fn cluster(&self) -> Option<&Arc<Cluster>> {
        self.plan.destination.policy()
    }

    /// The endpoint of the next try.
    async fn choose(
        &self,
        site: &Site,
        snapshot: &Snapshot,
        tried: &[SocketAddr],
        head: &request::Parts,
    ) -> Result<Member, Fault> {
        let is_hashed = self.cluster().is_some_and(|cluster| {
            matches!(cluster.policy.balancing.algorithm, Algorithm::ConsistentHash { .. })
        });
        let retries = self.plan.retries();
        let avoids = retries.is_some_and(|policy| policy.avoids_previous(is_hashed));
        let done = u32::try_from(tried.len()).unwrap_or(u32::MAX);
        let wish = Wish {
            destination: &self.plan.destination,
            live: &self.plan.live,
            snapshot,
            hash: self.plan.hash,
            tried: if avoids { tried } else { &[] },
            skip_classes: retries.map_or(0, |policy| policy.skipped_priorities(done)),
        };
        let is_called = self.plan.destination.service().is_some_and(|service| is_called(service));
        let name = is_called.then(|| host_of(head));
        let chosen = site.endpoints.choose_called(self.worker, &wish, name.as_deref()).await;
        chosen.map_err(|unchosen| match unchosen {
            Unchosen::Unresolved(_) => Fault::Unresolved,
            Unchosen::NoCluster => Fault::NoCluster,
            Unchosen::NoHealthy => Fault::NoHealthy,
        })
    }

    /// Remembers how a try went, if endpoints that fail are left out.
    fn observe(&self, site: &Site, observed: Observed) {
        if let Some(end) = &self.trace.borrow().upstream {
            site.endpoints.observe(self.cluster(), end.addr, observed);
        }
    }

    /// The HTTP that the endpoint is spoken to in.
    fn version(&self) -> Version {
        let of_client = if self.plan.client_http2 { Version::Http2 } else { Version::Http1 };
        let (service, key, policy) = match &self.plan.destination {
            _ if self.plan.upgrade => return Version::Http1,
            Destination::Address(_) | Destination::Own { .. } => return of_client,
            Destination::Cluster { service, key, policy } => (service, key, policy),
        };
        let pool = policy.as_ref().map(|cluster| &cluster.policy.pool);
        if pool.is_some_and(|pool| pool.use_client_protocol) {
            return of_client;
        }
        let port = service.ports.iter().find(|port| port.port == key.port);
        match port.map(AppProtocol::of) {
            Some(protocol) if protocol.is_http2() => Version::Http2,
            _ if pool.is_some_and(|pool| pool.h2_upgrade_sniffed) => Version::Http2,
            Some(protocol) if protocol.is_http() && pool.is_some_and(|pool| pool.h2_upgrade) => {
                Version::Http2
            }
            Some(protocol) if protocol.is_http() => Version::Http1,
            _ => of_client,
        }
    }

    /// Sends the copies.
    fn mirror(&self, head: &request::Parts, source: Option<&Rc<Source>>) {
        let sites = &self.worker.sites;
        for destination in &self.plan.mirrors {
            if sites.mirrors.get() >= MIRRORS_MAX {
                return;
            }
            let plan = Plan {
                live: Rc::clone(&self.plan.live),
                snapshot: Arc::clone(&self.plan.snapshot),
                destination: destination.clone(),
                route: None,
                timeout: self.plan.timeout,
                retry: false,
                hash: self.plan.hash,
                client_http2: self.plan.client_http2,
                grpc: self.plan.grpc,
                upgrade: false,
                mirrors: Vec::new(),
                interim: None,
            };
            let body = source.map_or(Body::Empty, |source| source.mirror());
            let request = Request::from_parts(head.clone(), body);
            let worker = Rc::clone(self.worker);
            sites.mirrors.set(sites.mirrors.get() + 1);
            let copy = async move {
                let _counted = Mirrored(Rc::clone(&worker));
                let send = async {
                    let Ok(response) = Upstreams::of(&worker).send(request, plan).await.outcome else {
                        return;
                    };
                    let mut body = response.into_body();
                    let mut read = 0;
                    while read < MIRROR_BYTES
                        && let Some(Ok(frame)) = body.frame().await
                    {
                        read += frame.data_ref().map_or(0, bytes::Bytes::len);
                    }
                };
                timeout(MIRROR_TIME, send).await.ok();
            };
            // Of a named type, because sending a request may send copies.
            let copy: std::pin::Pin<Box<dyn Future<Output = ()>>> = Box::pin(copy);
            drop(spawn_local(copy));
        }
    }
}

/// Counts a copy while it is on its way.
struct Mirrored(Rc<Worker>);

impl Drop for Mirrored {
    fn drop(&mut self) {
        let mirrors = &self.0.sites.mirrors;
        mirrors.set(mirrors.get().saturating_sub(1));
    }
}

fn is_worth_another(on: &RetryOn, outcome: &Result<Brought, Fault>) -> bool {
    let outcome = match outcome {
        Ok(brought) if brought.upgraded.is_some() => return false,
        Ok(brought) => {
            let (status, headers) = (brought.response.status(), brought.response.headers());
            if headers.contains_key("x-envoy-overloaded") {
                // Another try would only add to it.
                return false;
            }
            return on.decides(&Outcome::Response { status: status.as_u16(), headers: &Fields(headers) });
        }
        Err(fault) => match fault {
            Fault::ConnectFailed | Fault::ConnectTimeout | Fault::TransportFailed(_) => {
                Outcome::ConnectFailure
            }
            Fault::ConnectionEnded { sent } => Outcome::Reset { request_sent: *sent },
            Fault::Refused => Outcome::RefusedStream,
            Fault::Protocol | Fault::StreamReset => Outcome::Reset { request_sent: true },
            Fault::TryTimedOut => Outcome::PerTryTimeout,
            Fault::Overflow
            | Fault::NoHealthy
            | Fault::NoCluster
            | Fault::Unresolved
            | Fault::Denied
            | Fault::LocalReset
            | Fault::TimedOut => return false,
        },
    };
    on.decides(&outcome)
}

/// What a try says about its endpoint; nothing if none was asked.
fn observed(outcome: &Result<Brought, Fault>, is_grpc: bool) -> Option<Observed> {
    match outcome {
        Ok(Brought { response, .. }) => {
            // What gRPC says in trailers comes too late, as it does for Envoy's detector.
            let code = is_grpc.then(|| retry::grpc_status_or_unknown(&Fields(response.headers()))).flatten();
            Some(Observed::Status(code.map_or(response.status().as_u16(), retry::http_status_of_grpc)))
        }
        Err(
            Fault::ConnectFailed
            | Fault::ConnectTimeout
            | Fault::TransportFailed(_)
            | Fault::ConnectionEnded { .. }
            | Fault::Protocol
            | Fault::StreamReset
            | Fault::TryTimedOut,
        ) => Some(Observed::LocalFailure),
        Err(
            Fault::Denied
            | Fault::LocalReset
            | Fault::NoCluster
            | Fault::NoHealthy
            | Fault::Overflow
            | Fault::Refused
            | Fault::TimedOut
            | Fault::Unresolved,
        ) => None,
    }
}

/// Headers for those who know nothing of `http`.
struct Fields<'a>(&'a HeaderMap);

impl Headers for Fields<'_> {
    fn visit<'s>(&'s self, name: &str, each: &mut dyn FnMut(&'s [u8])) {
        self.0.get_all(name).iter().for_each(|value| each(value.as_bytes()));
    }
}

/// The host that a request is for, without its port.
fn host_of(head: &request::Parts) -> Arc<str> {
    let of_header = || head.headers.get(header::HOST)?.to_str().ok()?.parse::<Authority>().ok();
    let authority = head.uri.authority().cloned().or_else(of_header);
    authority.map_or_else(|| "".into(), |authority| authority.host().into())
}

/// Puts the authority where the version of HTTP wants it.
fn address(head: &mut request::Parts, version: Version) {
    match version {
        Version::Http1 => {
            head.version = http::Version::HTTP_11;
            if !head.headers.contains_key(header::HOST)
                && let Some(authority) = head.uri.authority()
                && let Ok(host) = HeaderValue::from_str(authority.as_str())
            {
                head.headers.insert(header::HOST, host);
            }
            if head.method != Method::CONNECT && head.uri.authority().is_some() {
                let path = head.uri.path_and_query().cloned();
                head.uri = path.map_or_else(|| Uri::from_static("/"), Uri::from);
            }
        }
        Version::Http2 => {
            head.version = http::Version::HTTP_2;
            let host = head.headers.remove(header::HOST);
            if head.uri.authority().is_none()
                && let Some(authority) = host.and_then(|host| host.to_str().ok()?.parse().ok())
            {
                let mut parts = std::mem::take(&mut head.uri).into_parts();
                parts.scheme = Some(http::uri::Scheme::HTTP);
                parts.authority = Some(authority);
                parts.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
                head.uri = Uri::from_parts(parts).unwrap_or_default();
            }
            for name in ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"] {
                head.headers.remove(name);
            }
        }
    }
}

/// Says in HTTP/1.1 where the body ends, where the library would not: it takes a GET or a HEAD for one without a body, and says nothing
/// of an empty one, which a server may wait for (RFC 9110 §8.6).
fn delimit(head: &mut request::Parts, body: &Body) {
    if head.headers.contains_key(header::CONTENT_LENGTH) || head.method == Method::CONNECT {
        return;
    }
    if !body.is_end_stream() {
        if body.size_hint().exact().is_none() {
            head.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
    } else if [Method::POST, Method::PUT, Method::PATCH].contains(&head.method) {
        head.headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
}

/// What became of a request whose connection failed while it was under way.
fn fault_of(error: &hyper::Error) -> Fault {
    if error.is_parse() {
        return Fault::Protocol;
    }
    if error.is_user() || error.is_body_write_aborted() {
        return Fault::LocalReset;
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(at) = cause {
        if let Some(h2) = at.downcast_ref::<h2::Error>() {
            return match h2.reason() {
                Some(h2::Reason::REFUSED_STREAM) => Fault::Refused,
                // The library says this only of streams above the last one that a GOAWAY names, and of those never sent: a
                // connection that ends under the others is an I/O error to them.
                _ if h2.is_go_away() && h2.is_remote() => Fault::Refused,
                _ if h2.is_reset() => Fault::StreamReset,
                _ => Fault::ConnectionEnded { sent: true },
            };
        }
        cause = at.source();
    }
    Fault::ConnectionEnded { sent: true }
}
