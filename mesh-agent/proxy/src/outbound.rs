//! Connections of local apps that the kernel sent to an outbound port: find what was dialled, choose an endpoint, open a
//! transport to it.
//!
//! Invariants:
//! - Nothing is guessed: without an original destination the connection is reset and counted.
//! - The server is dialled without waiting for the client's first byte: servers that speak first work.
//! - Another endpoint is tried only while no byte has been exchanged.
//! - A verdict is cached only under a policy generation that was read before the snapshot it was made from.
//!
//! Not here: the choice itself ([`crate::target`]), policy ([`crate::server`]), moving bytes ([`crate::relay`]).

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;

use mesh_core::{
    policy::{Peer, Verdict},
    snapshot::Snapshot,
};

use crate::{
    close::CloseReason,
    connect::{ConnectError, dial, report},
    connections::{Live, Names},
    kernel::{TicketRequest, UpstreamTags, VerdictEntry},
    loads::LoadGuard,
    metrics::edges::{EdgeKey, Parties, Reporter, Security},
    server::{ServerRequest, server_stage},
    stream::Stream,
    target::{Choice, Target, canonical},
    worker::Worker,
};

/// An open way to the server.
#[derive(Debug)]
pub(crate) struct Upstream<'a> {
    pub(crate) stream: Stream,
    /// Counts the connection at its endpoint for as long as it lives.
    pub(crate) load: Option<LoadGuard<'a>>,
}

/// Finds and dials the server of an accepted connection.
///
/// Cancel safety: dropping the future closes what it opened.
pub(crate) async fn open<'a>(
    worker: &'a Worker,
    live: &Live,
    accepted: &TcpStream,
) -> Result<Upstream<'a>, CloseReason> {
    let Some(dialled) = worker.kernel().dialled(accepted.as_fd()) else {
        return Err(CloseReason::OriginalDstMiss);
    };
    live.set_original_dst(canonical(dialled.dst));
    let snapshot = worker.snapshot();
    let target = Target::of(&snapshot, &dialled);
    connect(worker, live, &snapshot, &target).await.map_err(|error| {
        if worker.may_log() {
            tracing::info!(
                pod = %live.pod.name,
                client = %live.client,
                dialled = %canonical(dialled.dst),
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
) -> Result<Upstream<'a>, ConnectError> {
    let settings = worker.settings();
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
        // Short only when there is somewhere else to go.
        let is_last = attempt == settings.attempts_max || choose(&tried).is_none();
        let limit = if is_last {
            settings.connect_timeout
        } else {
            settings.attempt_timeout.min(settings.connect_timeout)
        };
        let load = worker.loads().count(choice.addr);
        match open_transport(worker, live, snapshot, target, choice, limit).await {
            Ok(stream) => return Ok(Upstream { stream, load: Some(load) }),
            Err(error) if error.is_endpoints_fault() => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(last)
}

/// Opens the transport that the chosen endpoint needs: TCP. A peer on this node is dialled by ticket, after its own side
/// has been decided here.
async fn open_transport(
    worker: &Worker,
    live: &Live,
    snapshot: &Snapshot,
    target: &Target<'_>,
    choice: Choice<'_>,
    limit: std::time::Duration,
) -> Result<Stream, ConnectError> {
    let ticket = admit_local(worker, live, choice)?;
    let service = target.service();
    let tags = UpstreamTags {
        src_workload: Some(live.pod.workload),
        dst_workload: choice.workload.map(|workload| workload.id),
        service: service.map(|service| service.id),
        inbound: false,
        ticket,
        client_addr: None,
    };
    let stream = dial(worker.sockets(), &live.pod, choice.addr, &tags, limit).await?;

    let source = snapshot.workload(live.pod.workload);
    live.set_upstream(
        choice.addr,
        Names {
            service: service.map(|service| service.name.clone()),
            source: Some(live.pod.name.clone()),
            destination: choice.workload.map(|workload| workload.name.clone()),
        },
    );
    let key = EdgeKey {
        reporter: Reporter::Source,
        source: tags.src_workload,
        destination: tags.dst_workload,
        service: tags.service,
        security: if ticket.is_some() { Security::Kernel } else { Security::Plaintext },
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
    Ok(stream)
}

/// The server's side of a same-node connection; `None` when the endpoint is not on this node.
fn admit_local(
    worker: &Worker,
    live: &Live,
    choice: Choice<'_>,
) -> Result<Option<TicketRequest>, ConnectError> {
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
    let verdict = server_stage(&snapshot, &request).verdict;
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
    match verdict {
        Verdict::Allow => {
            live.set_admitted(request);
            Ok(Some(TicketRequest { incarnation: peer.incarnation, policy_gen: peer.policy_gen }))
        }
        Verdict::Deny(reason) => Err(ConnectError::Denied { addr: choice.addr, reason }),
    }
}
