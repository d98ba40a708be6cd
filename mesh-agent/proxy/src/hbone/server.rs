//! Tunnels of agents elsewhere, on a pod's port 15008: who they are, what they ask for, and whether they may have it.
//!
//! Invariants:
//! - A peer is who its certificate says; its address is that of its TLS connection. Headers name the target, nothing else.
//! - Only the pod's own addresses are dialled, and none of the agent's ports.
//! - Nothing is dialled before [`server_stage`] allowed it, for each request anew.
//! - Every refusal is counted under a reason of its own.

use std::{
    io,
    net::{Shutdown, SocketAddr, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use mesh_core::{
    identity::Identity,
    policy::{Peer, Verdict},
};
use mesh_wire::hbone::authority::Authority;
use tokio::{
    task::spawn_local,
    time::{Instant, timeout, timeout_at},
};

use super::{
    TunnelFailure,
    client::peer_of,
    h2::Headers,
    limits,
    tls::handshake,
    tunnel::{Opened, Role, Tunnel, TunnelEnd, TunnelStream},
};
use crate::{
    close::{CloseReason, Direction},
    connect::{dial, report},
    connections::{Admission, Live, Names, Term},
    http::own::source_of,
    inbound,
    kernel::UpstreamTags,
    metrics::edges::{EdgeKey, Parties, Reporter, Security},
    server::{Full, ServerRequest, inbound_pool, log_dry_run, request_pool, server_stage, take_inbound},
    stream::{self, Stream},
    worker::{Accepted, Pod, Worker},
};

/// Ports that no request may name: those of Istio's and our own agents.
pub(crate) const RESERVED_PORTS: std::ops::RangeInclusive<u16> = 15_000..=15_021;

/// How long a client may take to end its half of a stream whose requests are over.
const LINGER: Duration = Duration::from_secs(2);

/// Serves an arrival on 15008 until its tunnel ends.
pub(crate) async fn serve(worker: &Rc<Worker>, accepted: Accepted) {
    let Accepted { socket, client, pod, .. } = accepted;
    let shared = worker.shared();
    let tunnel = {
        let (Some(_of_pod), Some(_of_all)) =
            (Counted::enter(&pod.handshakes), Counted::enter(&shared.handshakes))
        else {
            refuse(
                worker,
                &pod,
                client,
                &TunnelFailure::new(CloseReason::TooManyHandshakes, "too many TLS handshakes"),
            );
            return stream::reset(socket);
        };
        // Boxed: a handshake needs several times the memory of a tunnel's life, and for a moment only.
        match Box::pin(establish(worker, &pod, socket)).await {
            Ok(tunnel) => tunnel,
            Err(failure) => return refuse(worker, &pod, client, &failure),
        }
    };
    // A tunnel takes a descriptor like any connection, however few streams it carries.
    let (Some(_of_pod), Some(_of_all)) = (Counted::enter(&pod.admission), Counted::enter(&shared.admission))
    else {
        tunnel.abort(TunnelEnd::Stopped);
        let failure = TunnelFailure::new(CloseReason::Overloaded, "too many connections and tunnels");
        return refuse(worker, &pod, client, &failure);
    };
    let hbone = worker.hbone();
    hbone.served.borrow_mut().push((pod.handle.pod, Rc::clone(&tunnel)));
    let _served = Served { worker, tunnel: &tunnel };
    let open = |opened: Opened| {
        let (worker, pod, stream) = (Rc::clone(worker), Arc::clone(&pod), tunnel.stream(opened.key));
        drop(spawn_local(async move { answer(&worker, &pod, client, stream, &opened.headers).await }));
    };
    hbone.run(Role::Server, &tunnel, open).await;
}

async fn establish(worker: &Worker, pod: &Pod, socket: TcpStream) -> Result<Rc<Tunnel>, Rc<TunnelFailure>> {
    let shared = worker.shared();
    let settings = &shared.settings.hbone;
    let deadline = Instant::now() + settings.handshake_timeout;
    let identity = worker.snapshot().workload(pod.handle.workload).map(|workload| workload.identity());
    let missing =
        |why: &dyn std::fmt::Display| TunnelFailure::new(CloseReason::CertificateMissing, why.to_string());
    let identity = identity.ok_or_else(|| missing(&"the pod is not in the snapshot"))?;
    let mut stream = Stream::new(socket)
        .map_err(|error| TunnelFailure::new(CloseReason::Overloaded, error.to_string()))?;
    super::keep_alive(&stream);
    let certificates = &shared.certificates;
    let config = match certificates.server_config(&identity) {
        Ok(config) => config,
        Err(_) => {
            certificates.wait_for(&identity, deadline).await.map_err(|why| missing(&why))?;
            certificates.server_config(&identity).map_err(|why| missing(&why))?
        }
    };
    let established = match timeout_at(deadline, handshake::server(&mut stream, config)).await {
        Ok(established) => established.map_err(|error| TunnelFailure::of_handshake(&error))?,
        Err(_) => {
            stream.reset();
            return Err(TunnelFailure::new(CloseReason::TlsTimeout, "the TLS handshake took too long"));
        }
    };
    let peer = peer_of(&established)?;
    let workspace = Rc::clone(&worker.hbone().workspace);
    Ok(Tunnel::new(Role::Server, stream, established, peer, limits(settings), workspace))
}

fn refuse(worker: &Worker, pod: &Pod, client: SocketAddr, failure: &TunnelFailure) {
    worker.metrics().closed(Direction::Inbound, failure.reason).inc();
    if worker.may_log() {
        tracing::info!(
            pod = %pod.handle.name,
            %client,
            reason = failure.reason.as_str(),
            error = failure.text,
            "tunnel refused"
        );
    }
}

/// A request that is not granted.
struct Refusal {
    status: u16,
    reason: CloseReason,
}

/// Answers one request and carries what follows.
async fn answer(
    worker: &Rc<Worker>,
    pod: &Arc<Pod>,
    client: SocketAddr,
    stream: TunnelStream,
    headers: &Headers,
) {
    let _carried = worker.count_carried();
    let opened =
        worker.connections.open(Direction::Inbound, &pod.handle, &pod.admission, client, worker.tick());
    let Ok(open) = opened else { return stream.respond(503, true) };
    let live = Rc::clone(open.live());
    let app = {
        let found = Box::pin(find_app(worker, pod, &live, &stream, headers));
        worker.unless_stopped(&live, found).await
    };
    let reason = match app {
        Ok(App::Dialled(app)) => {
            stream.respond(200, false);
            live.meter.touch(worker.tick());
            stream.carry(&live, app).await
        }
        Ok(App::ByRequest(target)) => {
            stream.respond(200, false);
            live.meter.touch(worker.tick());
            carry_by_request(worker, &live, stream, target).await
        }
        Err(refusal) => {
            stream.respond(refusal.status, true);
            refusal.reason
        }
    };
    open.close(reason);
}

impl From<CloseReason> for Refusal {
    fn from(reason: CloseReason) -> Self {
        Self { status: 503, reason }
    }
}

/// What is behind a request that is granted.
enum App {
    /// The app itself.
    Dialled(Stream),
    /// What limits the app's requests, which have to be told apart first.
    ByRequest(SocketAddr),
}

/// Carries a stream to what looks for requests in it, through a pair of sockets.
async fn carry_by_request(
    worker: &Rc<Worker>,
    live: &Rc<Live>,
    stream: TunnelStream,
    target: SocketAddr,
) -> CloseReason {
    let Ok((ours, theirs, kept)) = pair() else { return CloseReason::SocketFailed };
    let Ok(inner) = worker.connections.open_shared(live, worker.tick()) else {
        return CloseReason::Overloaded;
    };
    let looked = Rc::clone(inner.live());
    looked.set_original_dst(target);
    looked.set_upstream(target, live.names());
    if let Some(request) = live.admitted() {
        looked.set_admitted(request);
    }
    let served = Box::pin(inbound::serve_admitted(worker, live, &looked, theirs, target));
    let mut carried = Box::pin(stream.carry(live, ours));
    let reason = tokio::select! {
        biased;
        reason = &mut carried => {
            inner.close(reason);
            return reason;
        }
        reason = served => reason,
    };
    inner.close(reason);
    if reason.resets() {
        live.meter.stop(reason);
        return carried.await;
    }
    // Closing it at once would be a reset to the tunnel, and might lose it the last bytes.
    kept.shutdown(Shutdown::Write).ok();
    timeout(LINGER, carried).await.unwrap_or(reason)
}

/// A pair of connected sockets, the second end twice.
fn pair() -> io::Result<(Stream, Stream, TcpStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    // What is done with sockets of TCP here works on these as well.
    let (ours, theirs) = (TcpStream::from(OwnedFd::from(ours)), TcpStream::from(OwnedFd::from(theirs)));
    let kept = theirs.try_clone()?;
    Ok((Stream::new(ours)?, Stream::new(theirs)?, kept))
}

/// Judges a request and dials the app behind it.
async fn find_app(
    worker: &Worker,
    pod: &Pod,
    live: &Live,
    stream: &TunnelStream,
    headers: &Headers,
) -> Result<App, Refusal> {
    let target = target(pod, headers).inspect_err(|refusal| {
        log_refused(worker, live, &stream.tunnel().peer, refusal.reason.as_str());
    })?;
    live.set_original_dst(target);
    let peer = &stream.tunnel().peer;
    let snapshot = worker.snapshot();
    let destination = live.pod.workload;
    let request = ServerRequest {
        peer: Peer::Tls(Arc::clone(peer)),
        source: Some(live.client.ip()),
        destination,
        addr: target,
    };
    let judgement = server_stage(&snapshot, &request);
    log_dry_run(worker, live, &judgement);
    if let Verdict::Deny(reason) = judgement.verdict {
        log_refused(worker, live, peer, reason.as_str());
        return Err(Refusal { status: 403, reason: CloseReason::PolicyDenied });
    }
    live.set_admitted(request);
    let server = snapshot.workload(destination);
    if server.is_some_and(|server| request_pool(worker, &snapshot, server, target.port()).is_some()) {
        let names = Names {
            service: None,
            source: source_of(&snapshot, live).map(|workload| workload.name.clone()),
            destination: Some(live.pod.name.clone()),
            security: Security::MutualTls,
            peer: Some(Arc::clone(peer)),
        };
        live.set_upstream(target, names);
        return Ok(App::ByRequest(target));
    }
    let part = take_inbound(worker, &snapshot, destination, target.port()).map_err(|Full| {
        log_refused(worker, live, peer, CloseReason::Overflow.as_str());
        Refusal::from(CloseReason::Overflow)
    })?;
    live.hold_inbound(part);
    // Named by its address only if it proved to be who lives there.
    let source = snapshot.workload_at(live.client.ip()).filter(|workload| workload.identity() == **peer);
    let tags = UpstreamTags {
        src_workload: source.map(|workload| workload.id),
        dst_workload: Some(destination),
        service: None,
        inbound: true,
        ticket: None,
        client_addr: Some(live.client),
        tunnel: false,
    };
    let mut limit = worker.settings().connect_timeout;
    if let Some(pool) = inbound_pool(&snapshot, destination, target.port()) {
        live.set_term(Term::of(pool));
        limit = limit.min(pool.connect_timeout);
    }
    let app = tokio::select! {
        dialled = dial(worker.sockets(), &live.pod, target, &tags, limit) => dialled.map_err(|error| {
            log_refused(worker, live, peer, &report(&error));
            let reason = error.close_reason();
            let status = if reason == CloseReason::UpstreamTimeout { 504 } else { 503 };
            Refusal { status, reason }
        })?,
        reason = stream.lost() => return Err(reason.into()),
    };
    live.set_upstream(
        target,
        Names {
            service: None,
            source: source.map(|workload| workload.name.clone()),
            destination: Some(live.pod.name.clone()),
            security: Security::MutualTls,
            peer: Some(Arc::clone(peer)),
        },
    );
    let key = EdgeKey {
        reporter: Reporter::Destination,
        source: tags.src_workload,
        destination: tags.dst_workload,
        service: None,
        security: Security::MutualTls,
    };
    let parties = Parties {
        source: source.map(|workload| &**workload),
        destination: snapshot.workload(destination).map(|workload| &**workload),
        service: None,
        cluster_domain: snapshot.cluster_domain(),
    };
    live.join(worker.edge(key, parties));
    Ok(App::Dialled(app))
}

/// The address of the app that a request names.
fn target(pod: &Pod, headers: &Headers) -> Result<SocketAddr, Refusal> {
    if headers.method() != Some(b"CONNECT") {
        return Err(Refusal { status: 405, reason: CloseReason::HboneHeaders });
    }
    // Names are never resolved here: clients know the pod by its address.
    let authority = headers.authority().and_then(|authority| Authority::parse(authority).ok());
    let Some(target) = authority.and_then(|authority| authority.address()) else {
        return Err(Refusal { status: 400, reason: CloseReason::HboneTarget });
    };
    if !pod.handle.addrs.contains(&target.ip()) {
        return Err(Refusal { status: 400, reason: CloseReason::HboneTarget });
    }
    if target.port() == 0
        || RESERVED_PORTS.contains(&target.port())
        || pod.private_ports.contains(&target.port())
    {
        return Err(Refusal { status: 403, reason: CloseReason::HbonePort });
    }
    Ok(target)
}

fn log_refused(worker: &Worker, live: &Live, peer: &Identity, reason: &str) {
    if worker.may_log() {
        tracing::info!(pod = %live.pod.name, client = %live.client, %peer, reason, "request in a tunnel refused");
    }
}

/// Counts a handshake or a tunnel while it lasts.
struct Counted<'a>(&'a Admission);

impl<'a> Counted<'a> {
    fn enter(admission: &'a Admission) -> Option<Self> {
        // Made only when it is in: its drop takes one off the count.
        admission.enter().then(|| Self(admission))
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Takes a tunnel off its worker's list; its streams hear of it even if its task panics.
struct Served<'a> {
    worker: &'a Worker,
    tunnel: &'a Rc<Tunnel>,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.tunnel.abort(TunnelEnd::Stopped);
        self.worker.hbone().served.borrow_mut().retain(|(_, tunnel)| !Rc::ptr_eq(tunnel, self.tunnel));
    }
}
