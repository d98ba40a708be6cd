//! Owns the answer to `meshctl explain`: runs the programs' own decisions over the live tables, and the server's
//! side over the snapshot.
//!
//! Invariants:
//! - Nothing is sent and nothing is written.
//! - Every outcome comes from `mesh_common::decide` or `mesh_core::policy`; here it is only put into words.

mod policy;
mod request;
mod words;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use mesh_common::{
    addr::FAMILY_V4,
    decide::{self, Decision, Dial, Tables},
    pod::{INBOUND_FAIL_CLOSED, InboundCfg, PORT_EXCLUDED, PORT_FAIL_CLOSED, PORT_FAIL_OPEN, PodCfg},
    ports,
    service::{Backend, PEER_LOCAL, PEER_MESHED, PEER_PLAIN, PROTO_TCP, ServiceKey},
    stats::{Hook, Outcome, Reason},
    verdict::{VERDICT_ALLOW, VerdictKey},
};
use mesh_core::{
    dns::{self, DnsAnswer, QType, RecordData},
    id::WorkloadId,
    policy::{Verdict, fail_closed_inbound, fail_closed_inbound_default},
    snapshot::{Snapshot, Workload},
};

use self::policy::Way;
pub(super) use self::request::{Asked, RequestQuestion, explain_request};
use mesh_proxy::preview::PreviewError;

use super::names::Names;
use crate::view::{
    AddressView, ArrivalView, BackendView, ExplainView, HookView, PolicyView, ResolutionKind, ResolutionView,
    ServerView, TransportView, VerdictView, mode_word,
};

/// Backends of one address that are explained; more are only counted.
const SLOTS_MAX: u32 = 64;

/// What is asked.
#[derive(Debug)]
pub(super) struct Question<'a> {
    /// The client.
    pub(super) from: &'a Workload,
    /// Its entry in the kernel with its netns cookie, when it is enrolled.
    pub(super) pod: Option<(u64, PodCfg)>,
    /// Name or address.
    pub(super) host: &'a str,
    /// Port.
    pub(super) port: u16,
    /// CLOCK_MONOTONIC nanoseconds.
    pub(super) now_ns: u64,
    /// A request over the connection.
    pub(super) request: Option<RequestQuestion>,
}

/// The live world the question is about.
pub(super) struct World<'a, T> {
    /// Kernel tables.
    pub(super) tables: &'a T,
    /// The snapshot they were made from.
    pub(super) snapshot: &'a Arc<Snapshot>,
    /// Local pod id and inbound settings of an enrolled workload.
    pub(super) inbound: &'a dyn Fn(WorkloadId) -> Option<(u32, InboundCfg)>,
}

/// Explains one connect, and perhaps a request over it.
///
/// # Errors
/// When what is asked about is no request.
pub(super) fn explain<T: Tables>(
    world: &World<'_, T>,
    question: &Question<'_>,
) -> Result<ExplainView, PreviewError> {
    let resolution = resolve(world.snapshot, question.from, question.host);
    let names = Names::new(world.snapshot, &Arc::default());
    let addresses = match &question.pod {
        Some((cookie, pod)) => resolution
            .addrs
            .iter()
            .map(|addr| {
                let dialled = SocketAddr::new(*addr, question.port);
                explain_address(world, &names, question, (*cookie, pod), dialled)
            })
            .collect(),
        None => Vec::new(),
    };
    let request = question
        .request
        .as_ref()
        .map(|request| explain_request(world.snapshot, question.from, &resolution, question.port, request));
    Ok(ExplainView {
        from: question.from.name.to_string(),
        enrolled: question.pod.is_some(),
        without_certificate: None,
        to: format!("{}:{}", question.host, question.port),
        request: request.transpose()?,
        resolution,
        addresses,
    })
}

/// What the pod's resolver library gets to see for a host.
fn resolve(snapshot: &Snapshot, from: &Workload, host: &str) -> ResolutionView {
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(host);
    let none = |kind, note: Option<String>| ResolutionView {
        kind,
        name: Some(host.to_owned()),
        addrs: Vec::new(),
        note,
    };
    if let Ok(addr) = bare.parse::<IpAddr>() {
        return ResolutionView { kind: ResolutionKind::Literal, name: None, addrs: vec![addr], note: None };
    }
    if from.settings.dns_capture_off {
        return none(ResolutionKind::Forward, Some("the pod opted out of DNS capture".to_owned()));
    }
    let mut addrs = BTreeSet::new();
    let (mut name, mut alias) = (None, None);
    let mut nothing = ResolutionKind::NxDomain;
    for qtype in [QType::A, QType::Aaaa] {
        match dns::answer(snapshot, &snapshot.sight_of(from), host, qtype) {
            DnsAnswer::Answer { records, .. } => {
                for record in records {
                    match record.data {
                        RecordData::A(v4) => addrs.insert(IpAddr::V4(v4)),
                        RecordData::Aaaa(v6) => addrs.insert(IpAddr::V6(v6)),
                        RecordData::Cname(_) | RecordData::Srv { .. } => continue,
                    };
                    name = Some(record.name);
                }
            }
            DnsAnswer::Alias { target, .. } => alias = Some(target),
            DnsAnswer::NoData => nothing = ResolutionKind::NoData,
            DnsAnswer::NxDomain => {}
            DnsAnswer::Forward => return none(ResolutionKind::Forward, None),
        }
    }
    if let Some(target) = alias {
        let note = format!("{host} is an alias of {target}, which is outside the mesh");
        return none(ResolutionKind::Forward, Some(note));
    }
    if addrs.is_empty() {
        return none(nothing, None);
    }
    ResolutionView { kind: ResolutionKind::Mesh, name, addrs: addrs.into_iter().collect(), note: None }
}

fn explain_address<T: Tables>(
    world: &World<'_, T>,
    names: &Names<'_>,
    question: &Question<'_>,
    (netns_cookie, pod): (u64, &PodCfg),
    dialled: SocketAddr,
) -> AddressView {
    let key = ServiceKey { addr: dialled.ip().into(), port: dialled.port(), proto: PROTO_TCP };
    let slots = world.tables.service(&key).map_or(0, |service| service.count);
    let mut decisions: Vec<HookView> = Vec::new();
    // The hook takes the draw modulo the number of slots, so these draws hit each slot once.
    for draw in 0..slots.clamp(1, SLOTS_MAX) {
        let dial = Dial {
            dst: key.addr,
            netns_cookie,
            now_ns: question.now_ns,
            draw,
            port: dialled.port(),
            proto: PROTO_TCP,
        };
        let decision = decide::connect(world.tables, pod, &dial);
        let slot = (slots > 0 && decision.has_backend).then_some(draw);
        let view = hook_view(world, question.from, &dial, &decision, slot);
        // A sticky client gets one backend whatever is drawn.
        let known = |seen: &HookView| match (&seen.backend, &view.backend) {
            (Some(a), Some(b)) => a.addr == b.addr,
            (a, b) => a == b,
        };
        if !decisions.iter().any(known) {
            decisions.push(view);
        }
    }
    let service = world.tables.service(&key).and_then(|service| names.service(service.service));
    let undescribed = words::undescribed(world.snapshot, &world.snapshot.sight_of(question.from), dialled);
    let slots_left_off = slots.saturating_sub(SLOTS_MAX);
    AddressView { dialled, service, decisions, slots_left_off, undescribed }
}

fn hook_view<T: Tables>(
    world: &World<'_, T>,
    from: &Workload,
    dial: &Dial,
    decision: &Decision,
    slot: Option<u32>,
) -> HookView {
    let hook = if dial.dst.family() == FAMILY_V4 { Hook::Connect4 } else { Hook::Connect6 };
    let backend = decision.has_backend.then_some(&decision.backend);
    let dest = backend.and_then(|b| world.snapshot.workload(WorkloadId(b.workload)));
    let through_agent = decision.outcome == Outcome::Proxy;
    let sides = backend.zip(dest).and_then(|(b, dest)| sides(world, from, decision, b, dest));
    let (policy, server) = sides.unwrap_or_default();
    HookView {
        hook: hook.as_str().to_owned(),
        outcome: decision.outcome.as_str().to_owned(),
        reason: decision.reason.as_str().to_owned(),
        text: words::connect(decision.outcome, decision.reason).to_owned(),
        ticket: decision.ticket,
        outbound_port: through_agent
            .then(|| ports::OUTBOUND.get(decision.outbound_index as usize).copied())
            .flatten(),
        backend: backend.map(|b| backend_view(b, dest.map(|w| &**w), slot)),
        verdict: backend.and_then(|b| verdict_view(world.tables, dial, b)),
        policy,
        server,
    }
}

fn backend_view(backend: &Backend, dest: Option<&Workload>, slot: Option<u32>) -> BackendView {
    BackendView {
        addr: SocketAddr::new(backend.addr.into(), backend.port),
        workload: dest.map(|w| w.name.to_string()),
        node: dest.map(|w| w.node.to_string()).filter(|node| !node.is_empty()),
        slot,
        meshed: backend.flags & PEER_MESHED != 0,
        local: backend.flags & PEER_LOCAL != 0,
        plain: backend.flags & PEER_PLAIN != 0,
    }
}

fn verdict_view<T: Tables>(tables: &T, dial: &Dial, backend: &Backend) -> Option<VerdictView> {
    let key = VerdictKey {
        netns_cookie: dial.netns_cookie,
        workload: backend.workload,
        incarnation: backend.incarnation,
        port: backend.port,
        family: u16::from(backend.addr.family()),
        pad: 0,
    };
    let verdict = tables.verdict(&key)?;
    let current_gen = tables.policy_gen(backend.workload);
    Some(VerdictView {
        action: if verdict.action == VERDICT_ALLOW { "allow" } else { "deny" }.to_owned(),
        policy_gen: verdict.policy_gen,
        current_gen,
        valid: current_gen == Some(verdict.policy_gen),
    })
}

/// What the policy of a meshed backend says, and what its side does if the connect gets there.
fn sides<T: Tables>(
    world: &World<'_, T>,
    from: &Workload,
    decision: &Decision,
    backend: &Backend,
    dest: &Workload,
) -> Option<(Option<PolicyView>, Option<ServerView>)> {
    if backend.flags & PEER_MESHED == 0 || decision.reason == Reason::Hairpin {
        return None;
    }
    let local = (backend.flags & PEER_LOCAL != 0).then(|| (world.inbound)(dest.id)).flatten();
    let flags = match &local {
        Some((id, inbound)) => decide::inbound_port_flags(world.tables, *id, inbound, backend.port),
        None => flags_of(world.snapshot, dest, backend.port),
    };
    let gone = match &local {
        Some((_, inbound)) => decide::agent_gone(inbound, flags),
        None => decide::agent_gone(&inbound_of(world.snapshot, dest), flags),
    };
    let excluded = flags & PORT_EXCLUDED != 0;
    let way = Way {
        outcome: decision.outcome,
        reason: decision.reason,
        ticketed: decision.ticket,
        local: local.is_some(),
    };
    let addr = SocketAddr::new(backend.addr.into(), backend.port);
    let transport = way.transport(dest, backend.port);
    let judgement = policy::judge(world.snapshot, from, dest, addr, transport);
    let identity = (transport != TransportView::Plaintext).then(|| from.identity());
    let policy =
        (!excluded).then(|| PolicyView::of(identity.as_ref(), dest, backend.port, transport, &judgement));
    if decision.outcome == Outcome::Deny {
        return Some((policy, None));
    }
    let arrival = match transport {
        _ if excluded => said(Outcome::Pass, Reason::ExcludedPort),
        TransportView::Direct => said(Outcome::Pass, Reason::Ticket),
        // The agent judges the client by what the kernel attests, then dials with a ticket.
        TransportView::Kernel => judged(judgement.verdict, Reason::Ticket, Outcome::Pass),
        TransportView::MutualTls => judged(judgement.verdict, Reason::Hbone, Outcome::Pass),
        TransportView::Plaintext => judged(judgement.verdict, Reason::Captured, Outcome::Capture),
    };
    let agent_down = match (excluded, decision.ticket) {
        (true, _) => said(Outcome::Pass, Reason::ExcludedPort),
        (false, true) => said(Outcome::Pass, Reason::Ticket),
        (false, false) => said(gone.0, gone.1),
    };
    let mode = mode_word(dest.modes.of(backend.port)).to_owned();
    let fail_closed = fail_closed_inbound(world.snapshot, dest, backend.port);
    Some((policy, Some(ServerView { mode, fail_closed, excluded, arrival, agent_down })))
}

/// What another node's kernel holds about a port of its pod: made of the same snapshot as there.
fn flags_of(snapshot: &Snapshot, dest: &Workload, port: u16) -> u32 {
    let excluded = if dest.settings.exclude_inbound_ports.contains(&port) { PORT_EXCLUDED } else { 0 };
    let closed = if fail_closed_inbound(snapshot, dest, port) { PORT_FAIL_CLOSED } else { PORT_FAIL_OPEN };
    excluded | closed
}

fn inbound_of(snapshot: &Snapshot, dest: &Workload) -> InboundCfg {
    let closed = fail_closed_inbound_default(snapshot, dest);
    InboundCfg {
        workload: dest.id.0,
        flags: if closed { INBOUND_FAIL_CLOSED } else { 0 },
        ..InboundCfg::ZERO
    }
}

fn said(outcome: Outcome, reason: Reason) -> ArrivalView {
    ArrivalView {
        outcome: outcome.as_str().to_owned(),
        reason: reason.as_str().to_owned(),
        text: words::arrival(outcome, reason).to_owned(),
    }
}

fn judged(verdict: Verdict, reason: Reason, allowed: Outcome) -> ArrivalView {
    match verdict {
        Verdict::Allow => said(allowed, reason),
        Verdict::Deny(why) => ArrivalView {
            outcome: "deny".to_owned(),
            reason: why.as_str().to_owned(),
            text: format!("{why}: the connection is reset"),
        },
    }
}

#[cfg(test)]
mod tests;
