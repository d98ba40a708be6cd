//! Plaintext arrivals at a pod that the kernel assigned to its inbound listener: judge, then dial the app.
//!
//! Invariants:
//! - Only the pod's own addresses are dialled, and never the agent's own port: otherwise the agent would dial itself.
//! - Nothing is dialled before [`server_stage`] allowed it.
//! - The app sees the real client's address, by a tag on the upstream socket.

use std::net::TcpStream;

use mesh_core::policy::{Peer, Verdict};

use crate::{
    close::CloseReason,
    connect::{dial, keep_alive, report},
    connections::{Live, Names, Term},
    kernel::UpstreamTags,
    metrics::edges::{EdgeKey, Parties, Reporter, Security},
    outbound::{Transport, Upstream},
    server::{Full, ServerRequest, inbound_pool, log_dry_run, server_stage, take_inbound},
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
    // An accepted socket that has lost its address has lost its connection.
    let dst = canonical(accepted.local_addr().map_err(|_| CloseReason::ClientLost)?);
    live.set_original_dst(dst);
    if dst.port() == listener_port || !live.pod.addrs.contains(&dst.ip()) {
        return Err(CloseReason::Misdirected);
    }
    let snapshot = worker.snapshot();
    let destination = live.pod.workload;
    let request =
        ServerRequest { peer: Peer::Unauthenticated, source: Some(live.client.ip()), destination, addr: dst };
    let judgement = server_stage(&snapshot, &request);
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
    let part =
        take_inbound(worker, &snapshot, destination, dst.port()).map_err(|Full| CloseReason::Overflow)?;
    live.hold_inbound(part);
    // By address only: good enough to name a peer in views, never to trust it.
    let source = snapshot.workload_at(live.client.ip());
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
    let pool = inbound_pool(&snapshot, destination, dst.port());
    if let Some(pool) = pool {
        live.set_term(Term::of(pool));
        limit = limit.min(pool.connect_timeout);
    }
    let stream = dial(worker.sockets(), &live.pod, dst, &tags, limit).await.map_err(|error| {
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
    live.set_upstream(
        dst,
        Names {
            service: None,
            source: source.map(|workload| workload.name.clone()),
            destination: Some(live.pod.name.clone()),
            ..Names::default()
        },
    );
    let key = EdgeKey {
        reporter: Reporter::Destination,
        source: tags.src_workload,
        destination: tags.dst_workload,
        service: None,
        security: Security::Plaintext,
    };
    let parties = Parties {
        source: source.map(|workload| &**workload),
        destination: snapshot.workload(destination).map(|workload| &**workload),
        service: None,
        cluster_domain: snapshot.cluster_domain(),
    };
    live.join(worker.edge(key, parties));
    let transport = Transport::Tcp(stream);
    if let Some(pool) = pool {
        keep_alive(&transport, pool);
    }
    Ok(Upstream { transport, load: None, share: None })
}
