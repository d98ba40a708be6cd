//! Connections of local apps that the kernel sent to an outbound port: find what was dialled, choose an endpoint, open a
//! transport to it.
//!
//! Invariants:
//! - Nothing is guessed: without an original destination the connection is reset and counted.
//! - The server is dialled without waiting for the client's first byte: servers that speak first work.
//! - Another endpoint is tried only while no byte has been exchanged; while there is one, an app's bytes wait until the
//!   first has been taken by its server.
//! - A verdict is cached only under a policy generation that was read before the snapshot it was made from.
//!
//! Not here: the choice itself ([`crate::target`]), policy ([`crate::server`]), moving bytes ([`crate::relay`]).

mod routed;

use std::{net::SocketAddr, os::fd::AsFd, rc::Rc, sync::Arc, time::Duration};

use mesh_core::{
    policy::{Peer, Verdict, transport},
    route::cluster::ConnectionPool,
    snapshot::{Service, Snapshot, Workload},
};
use tokio::time::{Instant, timeout_at};

use crate::{
    Settings,
    close::CloseReason,
    connect::{ConnectError, dial, keep_alive, report},
    connections::{Live, Names, Term},
    hbone::{
        TunnelFailure,
        client::Route,
        request::Request,
        tunnel::{Early, TunnelStream},
    },
    kernel::{TicketRequest, UpstreamTags, VerdictEntry},
    layers::io::UpstreamIo,
    loads::LoadGuard,
    metrics::{
        edges::{EdgeKey, Parties, Reporter, Security},
        flows::FlowKey,
    },
    server::{Full, ServerRequest, log_dry_run, server_stage, take_inbound},
    stream::Stream,
    streams::{self, Way},
    target::{Choice, Target, canonical},
    worker::Worker,
};

pub(crate) use self::routed::Share;

/// How bytes reach the server.
#[derive(Debug)]
pub(crate) enum Transport {
    /// A socket of its own.
    Tcp(Stream),
    /// A stream in a tunnel to the server's node.
    Tunnel(TunnelStream),
    /// Either, with what the destination's policy puts between.
    Layered(Box<UpstreamIo>),
}

/// An open way to the server.
#[derive(Debug)]
pub(crate) struct Upstream<'a> {
    pub(crate) transport: Transport,
    /// Counts the connection at its endpoint for as long as it lives.
    pub(crate) load: Option<LoadGuard<'a>>,
    /// The same at a destination that something is said about.
    pub(crate) share: Option<Share>,
}

/// How one endpoint is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempt {
    /// Time for it.
    pub(crate) limit: Duration,
    /// Whether the app's bytes go with the request for a tunnel's stream.
    pub(crate) early: Early,
}

impl Attempt {
    /// Of an endpoint that may take `limit`: short when there is somewhere else to go, and then nothing of the app's is
    /// sent that could not be sent again.
    fn of(settings: &Settings, limit: Duration, is_last: bool) -> Self {
        if is_last {
            Self { limit, early: Early::Sent }
        } else {
            Self { limit: settings.attempt_timeout.min(limit), early: Early::Held }
        }
    }
}

/// Whose bytes a transport is for.
#[derive(Debug)]
pub(crate) enum Bytes<'a> {
    /// An app's, carried as they are: the connection is reported as one between two workloads.
    Relayed(&'a mut Stream),
    /// An app's, which follow once there is something between: reported alike.
    Wrapped,
    /// The agent's own, which speaks a protocol and reports what it says.
    Spoken,
}

/// Finds and dials the server of a connection that was accepted at `since`.
///
/// Cancel safety: dropping the future closes what it opened.
pub(crate) async fn open<'a>(
    worker: &'a Rc<Worker>,
    live: &Rc<Live>,
    accepted: &mut Stream,
    since: Instant,
) -> Result<Upstream<'a>, CloseReason> {
    let Some(dialled) = worker.kernel().dialled(accepted.as_fd()) else {
        return Err(CloseReason::OriginalDstMiss);
    };
    let dst = canonical(dialled.dst);
    live.set_original_dst(dst);
    let way = streams::route(worker, live, dst, accepted, since).await;
    let snapshot = worker.snapshot();
    let client = snapshot.workload(live.pod.workload).map(|client| &**client);
    let sight = snapshot.sight(live.pod.workload, &live.pod.name.namespace);
    let opened = match way {
        Way::AsDialled if sight.refuses(dst) => Err(ConnectError::Unknown { addr: dst }),
        Way::AsDialled => {
            let target = Target::of(&snapshot, &sight, client, &dialled);
            connect(worker, live, &snapshot, &target, accepted).await
        }
        Way::To { destination, name } => {
            let to = (&destination, name.as_deref());
            Box::pin(routed::connect(worker, live, &snapshot, to, accepted)).await
        }
        Way::Nowhere { reason } => Err(ConnectError::Nowhere { reason }),
    };
    opened.map_err(|error| {
        if worker.may_log() {
            tracing::info!(
                pod = %live.pod.name,
                client = %live.client,
                dialled = %dst,
                error = report(&error),
                "outbound connection refused"
            );
        }
        error.close_reason()
    })
}

async fn connect<'a>(
    worker: &'a Worker,
    live: &Live,
    snapshot: &Snapshot,
    target: &Target<'_>,
    accepted: &mut Stream,
) -> Result<Upstream<'a>, ConnectError> {
    let settings = worker.settings();
    let pool = routed::pool_of_mesh(snapshot, target);
    let mut share = None;
    let mut connect_timeout = settings.connect_timeout;
    if let Some(pool) = pool {
        share = routed::share_of_mesh(worker, live, snapshot, target, pool)?;
        live.set_term(Term::of(pool));
        connect_timeout = pool.connect_timeout;
    }
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut last = ConnectError::NoEndpoint;
    for attempt in 1..=settings.attempts_max.max(1) {
        let choose = |tried: &[SocketAddr]| {
            target.choose(snapshot, &settings.node, tried, worker.random(), |addr| worker.loads().of(addr))
        };
        let Some(choice) = choose(&tried) else { break };
        if attempt > 1 {
            worker.metrics().connect_retries.inc();
        }
        tried.push(choice.addr);
        let is_last = attempt == settings.attempts_max || choose(&tried).is_none();
        let attempt = Attempt::of(settings, connect_timeout, is_last);
        let load = worker.loads().count(choice.addr);
        let service = target.service();
        let bytes = Bytes::Relayed(accepted);
        match open_transport(worker, live, snapshot, service, choice, attempt, bytes).await {
            Ok(transport) => {
                if let Some(pool) = pool {
                    keep_alive(&transport, pool);
                }
                return Ok(Upstream { transport, load: Some(load), share });
            }
            Err(error) if error.is_endpoints_fault() => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Opens the transport that the chosen endpoint needs: TCP, or a stream in a tunnel to a meshed pod of another node, and
/// then nothing but that. A peer on this node is dialled by ticket, after its own side has been decided here.
pub(crate) async fn open_transport(
    worker: &Worker,
    live: &Live,
    snapshot: &Snapshot,
    service: Option<&Arc<Service>>,
    choice: Choice<'_>,
    attempt: Attempt,
    bytes: Bytes<'_>,
) -> Result<Transport, ConnectError> {
    let ticket = admit_local(worker, live, choice)?;
    let is_relayed = !matches!(bytes, Bytes::Spoken);
    let tags = UpstreamTags {
        src_workload: Some(live.pod.workload),
        dst_workload: choice.workload.map(|workload| workload.id),
        service: service.map(|service| service.id),
        inbound: false,
        ticket,
        client_addr: None,
        tunnel: false,
    };
    let source = snapshot.workload(live.pod.workload);
    let tunnelled = choice.workload.filter(|workload| {
        ticket.is_none()
            && *workload.node != *worker.settings().node
            && transport(workload, choice.addr.port()) == mesh_core::policy::Transport::Hbone
    });
    let (way, security) = match tunnelled {
        Some(destination) => {
            let flow = FlowKey {
                source: tags.src_workload,
                destination: tags.dst_workload,
                service: tags.service,
                port: choice.addr.port(),
            };
            live.ask(worker.metrics().flows.flow(flow));
            let source = source.map(|source| &**source);
            let stream =
                open_tunnel(worker, live, source, destination, choice.addr, &tags, attempt, bytes).await?;
            (Transport::Tunnel(stream), Security::MutualTls)
        }
        None => {
            let stream = dial(worker.sockets(), &live.pod, choice.addr, &tags, attempt.limit).await?;
            let security = if ticket.is_some() { Security::Kernel } else { Security::Plaintext };
            (Transport::Tcp(stream), security)
        }
    };

    let attested = choice.workload.filter(|_| security != Security::Plaintext);
    live.set_upstream(
        choice.addr,
        Names {
            service: service.map(|service| service.name.clone()),
            source: Some(live.pod.name.clone()),
            destination: choice.workload.map(|workload| workload.name.clone()),
            security,
            peer: attested.map(|workload| Arc::new(workload.identity())),
        },
    );
    if !is_relayed {
        return Ok(way);
    }
    let key = EdgeKey {
        reporter: Reporter::Source,
        source: tags.src_workload,
        destination: tags.dst_workload,
        service: tags.service,
        security,
    };
    let parties = Parties {
        source: source.map(|workload| &**workload),
        destination: choice.workload.map(|workload| &**workload),
        service: service.map(|service| &**service),
        cluster_domain: snapshot.cluster_domain(),
    };
    live.join(worker.edge(key, parties));
    if ticket.is_some() {
        // Both sides are done in this pass, so both report.
        live.join(worker.edge(EdgeKey { reporter: Reporter::Destination, ..key }, parties));
    }
    Ok(way)
}

/// Opens a stream to a pod of another node, and waits until its node answers or the app has bytes for it.
#[expect(clippy::too_many_arguments, reason = "each is looked up by the caller already")]
async fn open_tunnel(
    worker: &Worker,
    live: &Live,
    source: Option<&Workload>,
    destination: &Workload,
    addr: SocketAddr,
    tags: &UpstreamTags,
    attempt: Attempt,
    bytes: Bytes<'_>,
) -> Result<TunnelStream, ConnectError> {
    let failed = |failure| ConnectError::Tunnel { addr, failure };
    let Some(source) = source else {
        let text = "the pod is not in the snapshot";
        return Err(failed(TunnelFailure::new(CloseReason::CertificateMissing, text)));
    };
    let route = Route {
        pod: live.pod.pod,
        incarnation: live.pod.netns_cookie,
        source: source.identity(),
        workload: destination.id,
        destination: addr.ip(),
        expected: destination.identity(),
    };
    let fields = Request::new(source, live.client, addr, worker.random());
    let timed_out = || ConnectError::TimedOut { addr, limit_ms: attempt.limit.as_millis() };
    let deadline = Instant::now() + attempt.limit;
    let fields = fields.fields();
    let opening = worker.hbone().open(&live.pod, &route, tags, &fields);
    let Ok(opened) = timeout_at(deadline, opening).await else { return Err(timed_out()) };
    let mut stream = opened.map_err(failed)?;
    let taken = async {
        match bytes {
            Bytes::Relayed(app) => stream.ready(app, attempt.early, deadline).await,
            Bytes::Wrapped | Bytes::Spoken => stream.answered().await,
        }
    };
    match timeout_at(deadline, taken).await {
        Ok(Ok(())) => {
            if !stream.awaits_answer() {
                live.taken();
            }
            Ok(stream)
        }
        Ok(Err(reason)) => {
            let text = format!("the other side did not take it: {}", reason.as_str());
            Err(failed(TunnelFailure::new(reason, text)))
        }
        Err(_) => {
            stream.tunnel().leave_if_unanswered(worker.kernel());
            Err(timed_out())
        }
    }
}

/// Carries a connection through its tunnel, and says why it ended.
pub(crate) async fn carry(
    worker: &Worker,
    live: &Rc<Live>,
    stream: TunnelStream,
    accepted: Stream,
) -> CloseReason {
    let tunnel = Rc::clone(stream.tunnel());
    let reason = stream.carry(live, accepted).await;
    if let Some(figures) = tunnel.figures(worker.kernel()) {
        live.set_srtt(figures.srtt_us);
    }
    if reason == CloseReason::UpstreamTimeout {
        tunnel.leave_if_unanswered(worker.kernel());
    }
    reason
}

/// The server's side of a same-node connection; `None` when the endpoint is not on this node.
fn admit_local(
    worker: &Worker,
    live: &Live,
    choice: Choice<'_>,
) -> Result<Option<TicketRequest>, ConnectError> {
    // Of an endpoint that was tried before.
    live.hold_inbound(None);
    let Some(workload) = choice.workload else { return Ok(None) };
    let Some(peer) = worker.kernel().local_peer(workload.id) else { return Ok(None) };
    // Loaded after the generation was read: a newer policy than this one has a newer generation too.
    let snapshot = worker.snapshot();
    let request = ServerRequest {
        peer: Peer::Kernel(live.pod.workload),
        // The address that the pod dials from, whatever the client's socket is bound to.
        source: live.pod.addrs.iter().copied().find(|own| own.is_ipv4() == choice.addr.is_ipv4()),
        destination: workload.id,
        addr: choice.addr,
    };
    let judgement = server_stage(&snapshot, &request);
    log_dry_run(worker, live, &judgement);
    let verdict = judgement.verdict;
    let pool = snapshot.inbound_pool(workload, choice.addr.port());
    // With a verdict connections would go past the agent, where nobody counts or routes them.
    let is_watched = || {
        pool.is_some_and(ConnectionPool::is_counted)
            || snapshot.ports_routed_by_name(workload).contains(&choice.addr.port())
    };
    if !(verdict.is_allow() && is_watched()) {
        worker.kernel().put_verdict(
            &live.pod,
            VerdictEntry {
                dst: workload.id,
                incarnation: peer.incarnation,
                policy_gen: peer.policy_gen,
                port: choice.addr.port(),
                v4: choice.addr.is_ipv4(),
                allow: verdict.is_allow(),
            },
        );
    }
    match verdict {
        Verdict::Allow => {
            let part = take_inbound(worker, &snapshot, workload.id, choice.addr.port());
            live.hold_inbound(part.map_err(|Full| ConnectError::Limit)?);
            live.set_admitted(request);
            Ok(Some(TicketRequest { incarnation: peer.incarnation, policy_gen: peer.policy_gen }))
        }
        Verdict::Deny(reason) => Err(ConnectError::Denied { addr: choice.addr, reason }),
    }
}
