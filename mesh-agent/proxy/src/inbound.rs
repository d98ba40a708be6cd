//! Plaintext arrivals at a pod that the kernel assigned to its inbound listener: judge, then dial the app.
//!
//! Invariants:
//! - Only the pod's own addresses are dialled, and never the agent's own port: otherwise the agent would dial itself.
//! - Nothing is dialled before [`server_stage`] allowed it.
//! - The app sees the real client's address, by a tag on the upstream socket.

use std::{
    net::{SocketAddr, TcpStream},
    rc::Rc,
    time::Duration,
};

use mesh_core::{
    id::WorkloadId,
    policy::{Peer, Verdict},
    snapshot::{Snapshot, Workload},
};

use crate::{
    close::CloseReason,
    connect::{ConnectError, dial, probe, report},
    connections::{Live, Names, Term},
    http::{
        self, Claim, claim_own,
        own::{OwnSide, source_of},
    },
    kernel::UpstreamTags,
    metrics::edges::{EdgeKey, Parties, Reporter},
    outbound::{Transport, Upstream},
    server::{Full, ServerRequest, inbound_pool, log_dry_run, request_pool, server_stage, take_inbound},
    stream::Stream,
    target::canonical,
    worker::Worker,
};

/// Judges an arrival and dials the app behind it.
///
/// `listener_port` is the inbound listener's own port.
/// Cancel safety: dropping the future closes what it opened.
pub(crate) async fn open<'a>(
    worker: &'a Worker,
    live: &Live,
    accepted: &TcpStream,
    listener_port: u16,
) -> Result<Upstream<'a>, CloseReason> {
    let snapshot = worker.snapshot();
    let dst = admit(worker, live, &snapshot, accepted, listener_port)?;
    let stream = dial_counted(worker, live, &snapshot, dst).await?;
    Ok(Upstream { transport: Transport::Tcp(stream), load: None, share: None })
}

/// Decides whether an arrival is HTTP whose requests are limited. It is judged before a byte of it is waited for.
///
/// # Errors
/// It is refused.
pub(crate) async fn claim(
    worker: &Worker,
    live: &Live,
    accepted: &mut Stream,
    listener_port: u16,
) -> Result<Option<(Claim, Box<OwnSide>)>, CloseReason> {
    let snapshot = worker.snapshot();
    let port = accepted.socket().local_addr().map_err(|_| CloseReason::ClientLost)?.port();
    let Some(server) = snapshot.workload(live.pod.workload) else { return Ok(None) };
    if request_pool(worker, &snapshot, server, port).is_none() {
        return Ok(None);
    }
    let dst = admit(worker, live, &snapshot, accepted.socket(), listener_port)?;
    Ok(claim_admitted(worker, live, &snapshot, server, dst, accepted).await)
}

/// The same of a connection that was let in already.
async fn claim_admitted(
    worker: &Worker,
    live: &Live,
    snapshot: &Snapshot,
    server: &Workload,
    dst: SocketAddr,
    accepted: &mut Stream,
) -> Option<(Claim, Box<OwnSide>)> {
    let pool = request_pool(worker, snapshot, server, dst.port())?;
    let claim = claim_own(worker, server, dst, accepted).await?;
    Some((claim, Box::new(OwnSide::new(snapshot, live, dst, pool))))
}

/// Serves a connection that was let in to a port whose requests are limited: by request if it is HTTP, else as bytes.
///
/// `outer` is the tunnel's part of it.
pub(crate) async fn serve_admitted(
    worker: &Rc<Worker>,
    outer: &Live,
    live: &Rc<Live>,
    mut accepted: Stream,
    dst: SocketAddr,
) -> CloseReason {
    let snapshot = worker.snapshot();
    let look = Box::pin(async {
        let Some(server) = snapshot.workload(live.pod.workload) else { return Ok(None) };
        Ok::<_, CloseReason>(claim_admitted(worker, live, &snapshot, server, dst, &mut accepted).await)
    });
    match worker.unless_stopped(live, look).await {
        Ok(Some((claim, own))) => {
            return Box::pin(http::serve(worker, live, accepted, claim, Some(own))).await;
        }
        Ok(None) => {}
        Err(reason) => return reason,
    }
    let dial = Box::pin(dial_counted(worker, outer, &snapshot, dst));
    match worker.unless_stopped(live, dial).await {
        Ok(app) => worker.relay(live, accepted, app).await,
        Err(reason) => reason,
    }
}

/// Judges an arrival; where it goes.
fn admit(
    worker: &Worker,
    live: &Live,
    snapshot: &Snapshot,
    accepted: &TcpStream,
    listener_port: u16,
) -> Result<SocketAddr, CloseReason> {
    // An accepted socket that has lost its address has lost its connection.
    let dst = canonical(accepted.local_addr().map_err(|_| CloseReason::ClientLost)?);
    live.set_original_dst(dst);
    if dst.port() == listener_port || !live.pod.addrs.contains(&dst.ip()) {
        return Err(CloseReason::Misdirected);
    }
    let destination = live.pod.workload;
    let request =
        ServerRequest { peer: Peer::Unauthenticated, source: Some(live.client.ip()), destination, addr: dst };
    let judgement = server_stage(snapshot, &request);
    log_dry_run(worker, live, &judgement);
    if let Verdict::Deny(reason) = judgement.verdict {
        if worker.may_log() {
            tracing::info!(
                pod = %live.pod.name,
                client = %live.client,
                port = dst.port(),
                reason = reason.as_str(),
                "inbound connection denied"
            );
        }
        return Err(CloseReason::PolicyDenied);
    }
    live.set_admitted(request);
    live.set_upstream(dst, names(snapshot, live));
    Ok(dst)
}

/// Whom a connection that was let in is between.
fn names(snapshot: &Snapshot, live: &Live) -> Names {
    Names {
        source: source_of(snapshot, live).map(|workload| workload.name.clone()),
        destination: Some(live.pod.name.clone()),
        ..live.names()
    }
}

/// Dials the app for a connection that was let in, and counts it as one.
async fn dial_counted(
    worker: &Worker,
    live: &Live,
    snapshot: &Snapshot,
    dst: SocketAddr,
) -> Result<Stream, CloseReason> {
    let destination = live.pod.workload;
    let part =
        take_inbound(worker, snapshot, destination, dst.port()).map_err(|Full| CloseReason::Overflow)?;
    live.hold_inbound(part);
    // By address only where nothing else is known: good enough to name a peer in views, never to trust it.
    let source = source_of(snapshot, live);
    let mut limit = worker.settings().connect_timeout;
    let pool = inbound_pool(snapshot, destination, dst.port());
    if let Some(pool) = pool {
        live.set_term(Term::of(pool));
        limit = limit.min(pool.connect_timeout);
    }
    let stream = dial_app(worker, live, source.map(|source| source.id), dst, limit).await;
    let stream = stream.map_err(|error| {
        if worker.may_log() {
            tracing::info!(
                pod = %live.pod.name,
                client = %live.client,
                error = report(&error),
                "the app does not take an inbound connection"
            );
        }
        error.close_reason()
    })?;
    let key = EdgeKey {
        reporter: Reporter::Destination,
        source: source.map(|workload| workload.id),
        destination: Some(destination),
        service: None,
        security: live.security(),
    };
    let parties = Parties {
        source: source.map(|workload| &**workload),
        destination: snapshot.workload(destination).map(|workload| &**workload),
        service: None,
        cluster_domain: snapshot.cluster_domain(),
    };
    live.join(worker.edge(key, parties));
    if let Some(pool) = pool {
        probe(&stream, pool);
    }
    Ok(stream)
}

/// Dials the app of a pod for a client that the pod's own side has let in; the app sees the client's address.
pub(crate) async fn dial_app(
    worker: &Worker,
    live: &Live,
    source: Option<WorkloadId>,
    dst: SocketAddr,
    limit: Duration,
) -> Result<Stream, ConnectError> {
    let tags = UpstreamTags {
        src_workload: source,
        dst_workload: Some(live.pod.workload),
        service: None,
        inbound: true,
        ticket: None,
        client_addr: Some(live.client),
        tunnel: false,
    };
    dial(worker.sockets(), &live.pod, dst, &tags, limit).await
}
