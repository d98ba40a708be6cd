//! From a client's request to its response: checked, normalised, routed, perhaps delayed or answered here, else sent.
//!
//! Order, as in Istio's proxy: what is no proper request is refused; faults; cross-origin preflights; then the rule's action.
//!
//! Invariants:
//! - What is matched is what is forwarded: path and authority are settled before a rule is looked for.
//! - Nothing is awaited while the request is borrowed by the matching.

use std::{borrow::Cow, convert::Infallible, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, Version, header, request::Parts,
    uri::PathAndQuery,
};
use hyper::body::{Body as _, Incoming};
use mesh_core::route::{
    cors::CorsDecision,
    evaluate::split,
    fault::DrawnFault,
    http::{Abort, Action, Backend, HttpRule, HttpTable, WeightedBackend},
    normalize::PathNormalization,
    request::{ClientView, RequestView},
    retry::grpc_timeout,
    scope::NO_LABELS,
};

use super::{
    body::Body,
    exchange::{Destination, Flag, Plan, Route},
    fields::{self, Fields},
    guard::{HEAD_MAX, HEADERS_MAX},
    hashing::{self, Cookie},
    interim::{Gated, Interim},
    record::{Outgoing, Record},
    replies,
    session::{Routing, Session},
    switch::Http2Switch,
    tables, variables,
};
use crate::metrics::http::Refusal;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
/// Details of an answer that is the server's own.
const VIA_UPSTREAM: &str = "via_upstream";
/// What clients must not say about themselves: they are the mesh's own words.
const INTERNAL: [&str; 4] = [
    "x-envoy-internal",
    "x-envoy-decorator-operation",
    "x-envoy-expected-rq-timeout-ms",
    "x-forwarded-client-cert",
];

/// Answers one request. It never fails: what fails is answered.
pub(super) async fn handle(
    session: Rc<Session>,
    mut request: Request<Incoming>,
) -> Result<Response<Outgoing>, Infallible> {
    let record = Record::begin(&session, &request);
    let is_head = request.method() == Method::HEAD;
    let http2 = if session.http2 { Http2Switch::of(&mut request) } else { None };
    let (parts, body) = request.into_parts();
    let has_body = !body.is_end_stream();
    let exchange =
        Exchange { session: &session, record: &record, is_head, tunnel: parts.method == Method::CONNECT };
    let asked = Asked { parts, body, switch_to: None, http2 };
    let mut response = match exchange.answer(asked).await {
        Ok(response) => response,
        Err(refusal) => {
            session.worker.metrics().http.refused(refusal).inc();
            record.flag(Flag::DownstreamProtocolError);
            record.details.set(refusal.as_str());
            let mut response = replies::any(refusal.status(), "", record.grpc.get());
            if !session.http2 {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    };
    let is_unread = has_body && record.details.get() != VIA_UPSTREAM && session.is_receiving();
    let ends = is_unread || session.interim.is_unasked() || session.live.meter.is_finishing();
    if ends && !session.http2 && session.switched.borrow().is_none() {
        // A body that was not asked for may come all the same, and nobody reads one that is answered here; in a drain the next request goes
        // elsewhere.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if record.grpc.get() && !session.http2 {
        // Trailers are all that says how it ended.
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    if !session.http2 {
        // They may have come with the response.
        session.take_interim();
    }
    let (parts, body) = response.into_parts();
    let outgoing = Outgoing::new(body, parts.status.as_u16(), &parts.headers, record);
    let outgoing = if is_head { outgoing.without_body() } else { outgoing };
    Ok(Response::from_parts(parts, outgoing))
}

/// One request on its way.
struct Exchange<'a> {
    session: &'a Rc<Session>,
    record: &'a Rc<Record>,
    is_head: bool,
    /// It asks for a tunnel.
    tunnel: bool,
}

/// A request with all that belongs to it.
struct Asked {
    parts: Parts,
    body: Incoming,
    /// The protocol that it wants to switch to.
    switch_to: Option<HeaderValue>,
    /// The same, or a tunnel, asked for by HTTP/2.
    http2: Option<Http2Switch>,
}

/// What was found out about a request while it was matched.
struct Decision {
    /// The rule that it is handled by; `None`: that of the table for unmatched requests.
    route: Option<Route>,
    /// Its place among the backends of the rule.
    backend: usize,
    fault: DrawnFault,
    /// Path and query as they leave, if they are others.
    path: Option<String>,
    /// Of a redirect.
    location: Option<String>,
    cors: Cors,
}

impl Decision {
    /// What is done with the request.
    fn action<'a>(&'a self, table: &'a HttpTable) -> &'a Action {
        self.route.as_ref().map_or(&table.unmatched, |route| &route.rule().action)
    }
}

/// What becomes of a cross-origin request.
#[derive(Default)]
enum Cors {
    #[default]
    Nothing,
    /// Answered here.
    Preflight(Vec<(&'static str, HeaderValue)>),
    /// Said in the response.
    Share(Vec<(&'static str, HeaderValue)>),
}

impl Exchange<'_> {
    async fn answer(&self, mut asked: Asked) -> Result<Response<Body>, Refusal> {
        let (session, record) = (self.session, self.record);
        let parts = &mut asked.parts;
        if session.http2 {
            fields::join_cookies(&mut parts.headers);
            // HTTP/1 has been measured before.
            let size: usize =
                parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
            if parts.headers.len() > HEADERS_MAX || size > HEAD_MAX {
                return Err(Refusal::HeadTooLarge);
            }
        }
        if let Some(http2) = &asked.http2
            && let Some(protocol) = http2.protocol()
        {
            if !fields::is_switch(protocol.as_bytes()) {
                return Err(Refusal::Malformed);
            }
            // Rules see what the server will see.
            http2.as_http1(parts, [session.worker.random(), session.worker.random()]);
        }
        record.grpc.set(fields::is_grpc(&parts.headers));
        let normalization = session.worker.snapshot().mesh().defaults.path_normalization;
        let authority = check(session.dialled, normalization, parts)?;
        let old = parts.version == Version::HTTP_10;
        let asks =
            !session.http2 && !old && !asked.body.is_end_stream() && fields::asks_first(&parts.headers);
        session.interim.begin(asks);
        asked.switch_to = fields::strip_hop_by_hop(&mut parts.headers).filter(|_| !old);
        if let Some(http2) = &asked.http2 {
            asked.switch_to = http2.protocol().cloned();
        }
        self.complete_headers(&mut parts.headers);
        let routing = session.routing(&authority);
        *record.routing.borrow_mut() = Some(Rc::clone(&routing));
        record.note(|line| {
            line.authority.clone_from(&authority);
            let id =
                parts.headers.get(REQUEST_ID).map(|id| String::from_utf8_lossy(id.as_bytes()).into_owned());
            line.request_id = id.unwrap_or_default();
        });
        let Some(table) = routing.table.clone() else {
            return Ok(self.pass(asked, &routing).await);
        };
        let mut decision = self.decide(parts, &authority, &routing, &table);
        record.note(|line| {
            line.route = decision.route.as_ref().map(Route::name).unwrap_or_default();
        });
        let aborted = self.inject(decision.fault).await;
        let shared = match std::mem::take(&mut decision.cors) {
            Cors::Preflight(headers) if aborted.is_none() => {
                record.details.set("cors_preflight");
                let mut response = replies::text(200, "");
                add_all(response.headers_mut(), headers);
                return Ok(response);
            }
            Cors::Share(headers) => headers,
            Cors::Preflight(_) | Cors::Nothing => Vec::new(),
        };
        let mut response = match aborted {
            // An answer as any other: browsers do not even tell the status of one that is not shared.
            Some(aborted) => self.as_ruled(aborted, &decision, &table, &asked.parts),
            None => self.act(asked, &routing, &table, decision).await,
        };
        for (name, _) in &shared {
            response.headers_mut().remove(*name);
        }
        add_all(response.headers_mut(), shared);
        Ok(response)
    }

    /// Does what the request's rule says, or the table of requests without one.
    async fn act(
        &self,
        asked: Asked,
        routing: &Routing,
        table: &HttpTable,
        mut decision: Decision,
    ) -> Response<Body> {
        let (session, record) = (self.session, self.record);
        let path = decision.path.take();
        match decision.action(table) {
            Action::Redirect(redirect) => {
                record.details.set("direct_response");
                let response =
                    replies::redirect(redirect.status, decision.location.as_deref().unwrap_or("/"));
                self.as_ruled(response, &decision, table, &asked.parts)
            }
            Action::Respond { status, body, reason } => {
                let flag = flag_of(reason);
                if &**reason == tables::BLOCK_ALL {
                    session.worker.metrics().http.refused(Refusal::BlackHole).inc();
                    record.note(|line| line.route = tables::BLOCK_ALL.to_owned());
                }
                if let Some(flag) = flag {
                    record.flag(flag);
                }
                record.details.set(if flag.is_some() { "route_not_found" } else { "direct_response" });
                let response = if record.grpc.get() {
                    replies::any(*status, "", true)
                } else {
                    replies::text(*status, bytes::Bytes::copy_from_slice(body))
                };
                self.as_ruled(response, &decision, table, &asked.parts)
            }
            Action::Passthrough => self.pass(asked, routing).await,
            Action::Forward(backends) => match (&decision.route, backends.get(decision.backend)) {
                (Some(route), Some(backend)) => match self.destination(routing, backend) {
                    Ok(destination) => self.forward(asked, routing, route, backend, destination, path).await,
                    Err(status) => self.as_ruled(self.no_destination(status), &decision, table, &asked.parts),
                },
                _ => self.no_destination(503),
            },
        }
    }

    /// An answer that is made here, with what its rule changes of responses.
    fn as_ruled(
        &self,
        mut response: Response<Body>,
        decision: &Decision,
        table: &HttpTable,
        request: &Parts,
    ) -> Response<Body> {
        let Some(route) = &decision.route else { return response };
        let rule = route.rule();
        let backend = decision.action(table).backends().and_then(|backends| backends.get(decision.backend));
        let templates = variables::templates(rule.response_edits(backend));
        let answered = Some((response.status().as_u16(), response.headers()));
        let filled = variables::fill(&templates, self.session, self.record, route, request, answered);
        fields::edit(response.headers_mut(), rule.response_edits(backend), filled);
        if self.record.grpc.get() {
            // Else its client would not look for the status.
            response.headers_mut().insert(header::CONTENT_TYPE, fields::GRPC);
        }
        response
    }

    /// What a sidecar adds to every request.
    fn complete_headers(&self, headers: &mut HeaderMap) {
        for name in INTERNAL {
            headers.remove(name);
        }
        headers.remove(header::EXPECT);
        if !headers.contains_key(FORWARDED_PROTO) {
            headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
        }
        if !headers.contains_key(REQUEST_ID) {
            let random = [self.session.worker.random(), self.session.worker.random()];
            if let Some(id) = fields::request_id(random) {
                headers.insert(REQUEST_ID, id);
            }
        }
    }

    fn decide(&self, parts: &Parts, authority: &str, routing: &Routing, table: &Arc<HttpTable>) -> Decision {
        let headers = Fields(&parts.headers);
        let view = view(parts, authority, &headers);
        let namespace = &*self.session.live.pod.name.namespace;
        let labels = routing.client.as_ref().map_or(&NO_LABELS, |client| &client.labels);
        let hit = table.route(&view, &ClientView { namespace, labels });
        let path_match = hit.and_then(|hit| hit.path_match());
        let rule = hit.map(|hit| hit.rule);
        let word = self.session.worker.random();
        let cors = rule.and_then(|rule| rule.cors.as_ref()).map_or(Cors::Nothing, |cors| {
            let owned = |(name, value): (&'static str, Cow<'_, [u8]>)| {
                HeaderValue::from_bytes(&value).ok().map(|value| (name, value))
            };
            match cors.decide(&view) {
                CorsDecision::Forward => Cors::Nothing,
                CorsDecision::EmptyPreflight => Cors::Preflight(Vec::new()),
                CorsDecision::Preflight => {
                    Cors::Preflight(cors.preflight_headers(&view).filter_map(owned).collect())
                }
                CorsDecision::Share => Cors::Share(cors.response_headers(&view).filter_map(owned).collect()),
            }
        });
        let backend = match rule.map(|rule| &rule.action) {
            Some(Action::Forward(backends)) if backends.len() > 1 => split(backends, word)
                .and_then(|chosen| backends.iter().position(|backend| std::ptr::eq(backend, chosen)))
                .unwrap_or(0),
            _ => 0,
        };
        Decision {
            backend,
            fault: rule
                .and_then(|rule| rule.fault.as_ref())
                .map_or_else(DrawnFault::default, |fault| fault.draw(self.session.worker.random())),
            path: rule.and_then(|rule| rule.rewrite.path_and_query(&view, path_match)),
            location: match table.action(hit.as_ref()) {
                Action::Redirect(redirect) => Some(redirect.location(&view, path_match, routing.port)),
                _ => None,
            },
            cors,
            route: hit.and_then(|hit| Route::new(Arc::clone(table), hit.rule_index, hit.match_index)),
        }
    }

    /// Delays the request, and gives the response it is aborted with.
    async fn inject(&self, fault: DrawnFault) -> Option<Response<Body>> {
        if let Some(delay) = fault.delay {
            self.record.flag(Flag::DelayInjected);
            tokio::time::sleep(delay).await;
        }
        let abort = fault.abort?;
        self.record.flag(Flag::FaultInjected);
        self.record.details.set("fault_filter_abort");
        const TEXT: &str = "fault filter abort";
        Some(match abort {
            Abort::Http(status) => replies::any(status, TEXT, self.record.grpc.get()),
            Abort::Grpc(code) => replies::grpc_status(code, TEXT),
        })
    }

    fn no_destination(&self, status: u16) -> Response<Body> {
        self.record.flag(Flag::NoCluster);
        self.record.details.set("cluster_not_found");
        replies::any(status, "", self.record.grpc.get())
    }

    /// Sends it to where it was dialled, as if there were no mesh.
    async fn pass(&self, asked: Asked, routing: &Routing) -> Response<Body> {
        let plan = Plan {
            live: Rc::clone(&self.session.live),
            snapshot: Arc::clone(&routing.snapshot),
            destination: self.session.as_dialled(),
            route: None,
            timeout: None,
            retry: false,
            hash: None,
            client_http2: self.session.http2,
            grpc: self.record.grpc.get(),
            upgrade: self.tunnel || asked.switch_to.is_some(),
            mirrors: Vec::new(),
            interim: self.interim(&asked.parts),
        };
        self.send(asked, plan).await
    }

    /// Where a backend is; the status to answer with, if it is nowhere.
    fn destination(&self, routing: &Routing, backend: &WeightedBackend) -> Result<Destination, u16> {
        match &backend.backend {
            Backend::Cluster(key) => {
                routing.destination(key, &self.session.live.pod.name.namespace).ok_or(503)
            }
            Backend::Broken { status, .. } => Err(*status),
        }
    }

    async fn forward(
        &self,
        mut asked: Asked,
        routing: &Routing,
        route: &Route,
        backend: &WeightedBackend,
        destination: Destination,
        path: Option<String>,
    ) -> Response<Body> {
        let rule = route.rule();
        let parts = &mut asked.parts;
        if let Destination::Cluster { service, .. } = &destination {
            *self.record.service.borrow_mut() = Some(Arc::clone(service));
        }
        let templates = variables::templates(rule.request_edits(backend));
        let filled = variables::fill(&templates, self.session, self.record, route, parts, None);
        fields::edit(&mut parts.headers, rule.request_edits(backend), filled);
        if let Some(authority) = rule.new_authority(backend)
            && let Ok(authority) = HeaderValue::try_from(&**authority)
        {
            parts.headers.insert(header::HOST, authority);
        }
        if let Some(path) = path {
            set_path(parts, path);
        }
        // By what the server will see, as Envoy does.
        let (hash, cookie) = match &destination {
            Destination::Cluster { policy: Some(policy), .. } => self.hash(policy, parts),
            _ => (None, None),
        };
        let plan = Plan {
            live: Rc::clone(&self.session.live),
            snapshot: Arc::clone(&routing.snapshot),
            destination,
            route: Some(route.clone()),
            timeout: timeout(rule, &parts.headers, self.record.grpc.get()),
            // Not at a hop with faults (S21).
            retry: rule.fault.is_none(),
            hash,
            client_http2: self.session.http2,
            grpc: self.record.grpc.get(),
            upgrade: self.tunnel || asked.switch_to.is_some(),
            mirrors: self.mirrors(rule, routing),
            interim: self.interim(&asked.parts),
        };
        let templates = variables::templates(rule.response_edits(Some(backend)));
        let kept = (!templates.is_empty()).then(|| variables::keep(&asked.parts));
        let mut response = self.send(asked, plan).await;
        let filled = kept.map_or_else(Vec::new, |request| {
            let answered = Some((response.status().as_u16(), response.headers()));
            variables::fill(&templates, self.session, self.record, route, &request, answered)
        });
        fields::edit(response.headers_mut(), rule.response_edits(Some(backend)), filled);
        if let Some(cookie) = cookie.and_then(|cookie| cookie.header()) {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
        response
    }

    /// Who hears what servers say before their responses: clients of HTTP/1.1.
    fn interim(&self, parts: &Parts) -> Option<Interim> {
        (parts.version == Version::HTTP_11 && !self.tunnel).then(|| self.session.interim.clone())
    }

    fn mirrors(&self, rule: &HttpRule, routing: &Routing) -> Vec<Destination> {
        let namespace = &*self.session.live.pod.name.namespace;
        let drawn = rule.mirrors.iter().filter(|mirror| {
            let word = self.session.worker.random();
            mirror.share.hits((word >> 32) as u32)
        });
        drawn
            .filter_map(|mirror| match &mirror.backend {
                Backend::Cluster(key) => routing.destination(key, namespace),
                Backend::Broken { .. } => None,
            })
            .collect()
    }

    fn hash(
        &self,
        policy: &mesh_core::route::cluster::Cluster,
        parts: &Parts,
    ) -> (Option<u64>, Option<Cookie>) {
        let headers = Fields(&parts.headers);
        let view = view(parts, fields::host(&parts.headers), &headers);
        let client = self.session.live.client.ip();
        hashing::of(&policy.policy.balancing.algorithm, &view, client, || self.session.worker.random())
    }

    async fn send(&self, asked: Asked, plan: Plan) -> Response<Body> {
        let (session, record) = (self.session, self.record);
        let Asked { mut parts, body, switch_to, http2 } = asked;
        if let Some(protocol) = &switch_to {
            parts.headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            parts.headers.insert(header::UPGRADE, protocol.clone());
        }
        // Of a stream that asks for another protocol everything behind the head is that one's.
        let body = if http2.is_some() { Body::Empty } else { record.receive(body) };
        let body = match session.interim.is_waiting() {
            true => Body::boxed(Gated::new(body, session.interim.clone())),
            false => body,
        };
        let answer = session.upstreams.send(Request::from_parts(parts, body), plan).await;
        record.add_flags(answer.flags);
        record.note(|line| line.retries = answer.retries);
        *record.upstream.borrow_mut() = answer.upstream;
        let mut response = match answer.outcome {
            Ok(response) => response,
            Err(failure) => {
                // A body that was refused on its way is the client's failure, not the server's.
                let guard = &session.socket.borrow().guard;
                if let Some(refusal) = guard.refusal().filter(|_| guard.refused_in_body()) {
                    record.flag(Flag::DownstreamProtocolError);
                    return replies::any(refusal.status(), "", record.grpc.get());
                }
                record.flag(failure.flag);
                record.details.set(failure.details);
                return replies::failure(&failure, record.grpc.get());
            }
        };
        record.details.set(VIA_UPSTREAM);
        let switched_to =
            response.headers().get(header::UPGRADE).filter(|_| answer.upgraded.is_some()).cloned();
        fields::strip_hop_by_hop(response.headers_mut());
        let elapsed_ms = u64::try_from(record.started().elapsed().as_millis()).unwrap_or(u64::MAX);
        response.headers_mut().insert(SERVICE_TIME, HeaderValue::from(elapsed_ms));
        *response.version_mut() = if session.http2 { Version::HTTP_2 } else { Version::HTTP_11 };
        if let (Some(answered), Some(asked)) = (&switched_to, &switch_to)
            && !fields::is_asked_for(answered, asked)
        {
            record.flag(Flag::UpstreamProtocolError);
            return replies::any(502, "", record.grpc.get());
        }
        match (answer.upgraded, http2) {
            (Some(upgraded), Some(http2)) => return http2.answer(session, response, upgraded),
            (Some(upgraded), None) => {
                // Neither has a body that a length could be about.
                response.headers_mut().remove(header::CONTENT_LENGTH);
                if let Some(protocol) = switched_to.or(switch_to) {
                    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                    response.headers_mut().insert(header::UPGRADE, protocol);
                }
                *session.switched.borrow_mut() = Some(upgraded);
                return response.map(|_| Body::Empty);
            }
            (None, _) => {}
        }
        // A switch that nobody asked for.
        if response.status() == http::StatusCode::SWITCHING_PROTOCOLS {
            record.flag(Flag::UpstreamProtocolError);
            return replies::any(502, "", record.grpc.get());
        }
        if self.is_head && session.http2 {
            return response.map(|_| Body::Empty);
        }
        response
    }
}

/// What the reason of an answer of the mesh itself is in logs.
pub(super) fn flag_of(reason: &str) -> Option<Flag> {
    (reason == "no_route").then_some(Flag::NoRoute)
}

/// Checks a request and gives it its normal form: path normalised, authority in `host`, URI in origin form.
pub(super) fn check(
    dialled: SocketAddr,
    normalization: PathNormalization,
    parts: &mut Parts,
) -> Result<String, Refusal> {
    // Servers behind compare methods by case or not: an attacker's choice (S96).
    if parts.method.as_str().bytes().any(|byte| byte.is_ascii_lowercase()) {
        return Err(Refusal::Method);
    }
    if parts.headers.get_all(header::HOST).iter().nth(1).is_some() {
        return Err(Refusal::Host);
    }
    let host =
        parts.headers.get(header::HOST).map(|host| host.to_str()).transpose().map_err(|_| Refusal::Host)?;
    let authority = match (parts.uri.authority(), host) {
        // RFC 9112 §3.2.2: an absolute target counts, whatever `host` says.
        (Some(authority), _) => authority.as_str(),
        (None, Some(host)) => host,
        (None, None) if parts.version == Version::HTTP_10 => "",
        (None, None) => return Err(Refusal::Host),
    };
    // Names with userinfo, lists and the like mean different hosts to different readers.
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~:[]%".contains(&byte);
    if !authority.bytes().all(is_name) || (authority.is_empty() && parts.version != Version::HTTP_10) {
        return Err(Refusal::Host);
    }
    let authority = if authority.is_empty() { dialled.to_string() } else { authority.to_owned() };
    if parts.headers.get(header::HOST).is_none_or(|host| host != authority.as_str()) {
        let value = HeaderValue::try_from(&*authority).map_err(|_| Refusal::Host)?;
        parts.headers.insert(header::HOST, value);
    }
    if parts.method == Method::CONNECT {
        return Ok(authority);
    }
    let path = parts.uri.path();
    let normal = normalization.apply(path).map_err(|_| Refusal::Path)?;
    let changed = match normal {
        Cow::Owned(path) => Some(match parts.uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        }),
        Cow::Borrowed(_) if parts.uri.authority().is_some() => {
            Some(parts.uri.path_and_query().map_or("/", PathAndQuery::as_str).to_owned())
        }
        Cow::Borrowed(_) => None,
    };
    if let Some(path) = changed {
        let path = PathAndQuery::try_from(path).map_err(|_| Refusal::Path)?;
        parts.uri = Uri::from(path);
    }
    Ok(authority)
}

/// The path that a request leaves with; what it was is told to the server.
fn set_path(parts: &mut Parts, path: String) {
    let Ok(new) = PathAndQuery::try_from(path) else { return };
    if let Some(old) = parts.uri.path_and_query()
        && let Ok(old) = HeaderValue::try_from(old.as_str())
    {
        parts.headers.insert(ORIGINAL_PATH, old);
    }
    parts.uri = Uri::from(new);
}

/// Time for the whole of a request, retries and all: what the rule says, or what a gRPC client asks for if that is less. None at a hop
/// with faults (S21).
pub(super) fn timeout(rule: &HttpRule, headers: &HeaderMap, is_grpc: bool) -> Option<Duration> {
    if rule.fault.is_some() {
        return None;
    }
    let asked = headers.get("grpc-timeout").filter(|_| is_grpc);
    // Nothing is no limit, to Envoy.
    let asked = asked.and_then(|value| grpc_timeout(value.as_bytes())).filter(|asked| !asked.is_zero());
    rule.timeout.into_iter().chain(asked).min()
}

pub(super) fn view<'a>(parts: &'a Parts, authority: &'a str, headers: &'a Fields<'a>) -> RequestView<'a> {
    RequestView {
        method: parts.method.as_str(),
        scheme: "http",
        authority,
        path: parts.uri.path(),
        query: parts.uri.query(),
        headers,
    }
}

fn add_all(headers: &mut HeaderMap, new: Vec<(&'static str, HeaderValue)>) {
    for (name, value) in new {
        headers.append(name, value);
    }
}
