//! The decisions the programs take, as pure functions over a table trait.
//!
//! Compiled into `mesh-ebpf` over BPF maps, and into the agent over the same maps read from user space, so
//! `meshctl explain` cannot tell another story than the kernel.
//!
//! Invariants:
//! - Nothing here writes anything; the caller acts on the returned decision.
//! - Every return carries exactly one [`Reason`].

use crate::{
    Addr,
    pod::{
        DIR_INBOUND, DIR_OUTBOUND, INBOUND_FAIL_CLOSED, INBOUND_PORTS, InboundCfg, POD_EXCLUDED,
        POD_FAIL_CLOSED, POD_PORTS, POD_PROXY_UNKNOWN, POD_SIGHT_SHIFT, PORT_EXCLUDED, PORT_FAIL_CLOSED,
        PORT_FAIL_OPEN, PORT_PROXY_UNKNOWN, PodCfg, PortKey,
    },
    ports,
    service::{
        Affinity, AffinityKey, Backend, BackendIndexKey, BackendKey, PEER_LOCAL, PEER_MESHED, PEER_PLAIN,
        SERVICE_ANSWERED, SERVICE_HIDDEN_SHIFT, SERVICE_L7, ServiceKey, ServiceVal, WorkloadVal,
    },
    stats::{Outcome, Reason},
    ticket::Ticket,
    verdict::{VERDICT_ALLOW, VERDICT_DENY, Verdict, VerdictKey},
};

/// Read access to the tables of a node.
pub trait Tables {
    /// `SERVICES`.
    fn service(&self, key: &ServiceKey) -> Option<ServiceVal>;
    /// `BACKENDS`.
    fn backend(&self, key: &BackendKey) -> Option<Backend>;
    /// `BACKEND_INDEX`.
    fn backend_slot(&self, key: &BackendIndexKey) -> Option<u32>;
    /// `WORKLOADS`.
    fn workload(&self, addr: &Addr) -> Option<WorkloadVal>;
    /// `PORT_CFGS`.
    fn port(&self, key: &PortKey) -> Option<u32>;
    /// `EXCLUDED`.
    fn excluded(&self, pod: u32, dst: &Addr) -> bool;
    /// `AFFINITY`.
    fn affinity(&self, key: &AffinityKey) -> Option<Affinity>;
    /// `VERDICTS`.
    fn verdict(&self, key: &VerdictKey) -> Option<Verdict>;
    /// `POLICY_GEN`.
    fn policy_gen(&self, workload: u64) -> Option<u64>;
    /// Whether the heartbeat is fresh.
    fn agent_alive(&self, now_ns: u64) -> bool;
    /// Whether the pod's outbound listener with this index is open.
    fn outbound_listener(&self, pod: u32, index: u32) -> bool;
}

/// A connect as the hook sees it.
#[derive(Clone, Copy, Debug)]
pub struct Dial {
    /// Destination.
    pub dst: Addr,
    /// Netns cookie of the dialling socket.
    pub netns_cookie: u64,
    /// CLOCK_MONOTONIC nanoseconds.
    pub now_ns: u64,
    /// Randomness for the slot: random for TCP, the socket cookie's hash for UDP.
    pub draw: u32,
    /// Destination port, host order.
    pub port: u16,
    /// IP protocol.
    pub proto: u16,
}

/// What to do with a connect.
#[derive(Clone, Copy, Debug)]
pub struct Decision {
    /// Bypass, Direct, Proxy or Deny.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// Whether TCP_CONNECT_CB must write a ticket.
    pub ticket: bool,
    /// Whether `backend` is set.
    pub has_backend: bool,
    /// Index into [`ports::OUTBOUND`] to start from when the outcome is Proxy.
    pub outbound_index: u32,
    /// Service id, 0 when none.
    pub service: u64,
    /// Policy generation of the destination, read before the verdict.
    pub policy_gen: u64,
    /// Slot table when the service has session affinity, else 0.
    pub affinity_slots: u64,
    /// The backend: destination of Direct, hint for Proxy.
    pub backend: Backend,
}

impl Decision {
    #[inline(always)]
    const fn new(outcome: Outcome, reason: Reason) -> Self {
        Self {
            outcome,
            reason,
            ticket: false,
            has_backend: false,
            outbound_index: 0,
            service: 0,
            policy_gen: 0,
            affinity_slots: 0,
            backend: Backend::ZERO,
        }
    }
}

/// Decides a TCP connect of a meshed pod.
#[inline(always)]
pub fn connect<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial) -> Decision {
    if let Some(reason) = untouched(tables, pod, dial) {
        return Decision::new(Outcome::Bypass, reason);
    }
    let key = ServiceKey { addr: dial.dst, port: dial.port, proto: dial.proto };
    let Some(service) = tables.service(&key) else {
        return to_address(tables, pod, dial);
    };
    let Some(backend) = choose(tables, &service, dial) else {
        return to_nobody(tables, pod, dial, &service);
    };
    let asks_agent = service.flags & SERVICE_L7 != 0 || is_perhaps_hidden(pod, &service);
    let mut decision = to_backend(tables, pod, dial, backend, asks_agent);
    decision.service = service.service;
    if service.affinity_s != 0 {
        decision.affinity_slots = service.slots;
    }
    decision
}

/// A service without endpoints: refused, unless the agent lives and has an answer.
#[inline(always)]
fn to_nobody<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial, service: &ServiceVal) -> Decision {
    let mut decision = Decision::new(Outcome::Deny, Reason::NoEndpoints);
    decision.service = service.service;
    if service.flags & SERVICE_ANSWERED == 0 {
        return decision;
    }
    decision = proxied(tables, pod, dial, decision);
    if matches!(decision.outcome, Outcome::Bypass) {
        // Nobody else leads to the service's address either.
        decision.outcome = Outcome::Deny;
        decision.reason = Reason::NoEndpoints;
    }
    decision
}

/// Whether the pod is among those of which some do not see the service: the agent knows which.
#[inline(always)]
const fn is_perhaps_hidden(pod: &PodCfg, service: &ServiceVal) -> bool {
    // Five bits: the verifier wants to see that no shift is too large.
    let kind = (pod.flags >> POD_SIGHT_SHIFT) & 31;
    (service.flags >> SERVICE_HIDDEN_SHIFT) >> kind & 1 != 0
}

/// Decides a UDP connect or datagram of a meshed pod: balanced (Direct), or left alone.
#[inline(always)]
pub fn datagram<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial) -> Decision {
    if let Some(reason) = untouched(tables, pod, dial) {
        return Decision::new(Outcome::Bypass, reason);
    }
    let key = ServiceKey { addr: dial.dst, port: dial.port, proto: dial.proto };
    let Some(service) = tables.service(&key) else {
        return Decision::new(Outcome::Bypass, Reason::Udp);
    };
    let Some(backend) = choose(tables, &service, dial) else {
        let mut refused = Decision::new(Outcome::Deny, Reason::NoEndpoints);
        refused.service = service.service;
        return refused;
    };
    let mut decision = Decision::new(Outcome::Direct, Reason::UdpService);
    decision.service = service.service;
    decision.backend = backend;
    decision.has_backend = true;
    if service.affinity_s != 0 {
        decision.affinity_slots = service.slots;
    }
    decision
}

/// The reasons to leave a destination alone before any table of the mesh is asked.
#[inline(always)]
fn untouched<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial) -> Option<Reason> {
    if dial.dst.is_loopback() || dial.dst.is_unspecified() {
        return Some(Reason::Loopback);
    }
    if dial.dst.same(&pod.addr4) || dial.dst.same(&pod.addr6) {
        return Some(Reason::OwnAddress);
    }
    if pod.flags & POD_PORTS != 0 {
        let key = PortKey { pod: pod.pod, port: dial.port, dir: DIR_OUTBOUND };
        if tables.port(&key).unwrap_or(0) & PORT_EXCLUDED != 0 {
            return Some(Reason::ExcludedPort);
        }
    }
    if pod.flags & POD_EXCLUDED != 0 && tables.excluded(pod.pod, &dial.dst) {
        return Some(Reason::ExcludedPrefix);
    }
    None
}

/// Picks the sticky backend when there is one, else the drawn slot.
#[inline(always)]
fn choose<T: Tables>(tables: &T, service: &ServiceVal, dial: &Dial) -> Option<Backend> {
    if service.count == 0 {
        return None;
    }
    if service.affinity_s != 0 {
        let key = AffinityKey { netns_cookie: dial.netns_cookie, slots: service.slots };
        if let Some(last) = tables.affinity(&key) {
            let age_ns = dial.now_ns.saturating_sub(last.used_ns);
            if age_ns < service.affinity_s as u64 * 1_000_000_000 {
                let key =
                    BackendIndexKey { slots: service.slots, addr: last.addr, port: last.port, pad: [0; 3] };
                if let Some(slot) = tables.backend_slot(&key) {
                    let key = BackendKey { slots: service.slots, slot, pad: 0 };
                    if let Some(backend) = tables.backend(&key) {
                        return Some(backend);
                    }
                }
            }
        }
    }
    let slot = dial.draw % service.count;
    let key = BackendKey { slots: service.slots, slot, pad: 0 };
    match tables.backend(&key) {
        Some(backend) => Some(backend),
        // The count shrank between the two reads; slot 0 is the last one to go.
        None => tables.backend(&BackendKey { slots: service.slots, slot: 0, pad: 0 }),
    }
}

/// A destination that is no service: a pod by its own address, or something outside.
#[inline(always)]
fn to_address<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial) -> Decision {
    let Some(peer) = tables.workload(&dial.dst) else {
        // Metadata and agents of the node itself are no part of any registry.
        if dial.dst.is_link_local() || !asks_about_unknown(tables, pod, dial) {
            return Decision::new(Outcome::Bypass, Reason::UnknownDestination);
        }
        return proxied(tables, pod, dial, Decision::new(Outcome::Proxy, Reason::UnknownDestination));
    };
    let backend = Backend {
        addr: dial.dst,
        workload: peer.workload,
        incarnation: peer.incarnation,
        port: dial.port,
        flags: peer.flags,
        pad: 0,
    };
    to_backend(tables, pod, dial, backend, false)
}

/// Whether the agent decides on what no table knows, at this port or at all.
#[inline(always)]
fn asks_about_unknown<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial) -> bool {
    if pod.flags & POD_PROXY_UNKNOWN != 0 {
        return true;
    }
    if pod.flags & POD_PORTS == 0 {
        return false;
    }
    let key = PortKey { pod: pod.pod, port: dial.port, dir: DIR_OUTBOUND };
    tables.port(&key).unwrap_or(0) & PORT_PROXY_UNKNOWN != 0
}

#[inline(always)]
fn to_backend<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial, backend: Backend, l7: bool) -> Decision {
    let mut decision = Decision::new(Outcome::Proxy, Reason::L7);
    decision.backend = backend;
    decision.has_backend = true;
    if l7 {
        return proxied(tables, pod, dial, decision);
    }
    if backend.addr.same(&pod.addr4) || backend.addr.same(&pod.addr6) {
        // Over loopback there is nobody between the pod and itself.
        decision.outcome = Outcome::Direct;
        decision.reason = Reason::Hairpin;
        return decision;
    }
    if backend.flags & PEER_MESHED == 0 {
        decision.outcome = Outcome::Direct;
        decision.reason = Reason::Unmeshed;
        return decision;
    }
    if backend.flags & PEER_LOCAL != 0 {
        let generation = tables.policy_gen(backend.workload);
        let key = VerdictKey {
            netns_cookie: dial.netns_cookie,
            workload: backend.workload,
            incarnation: backend.incarnation,
            port: backend.port,
            family: backend.addr.family() as u16,
            pad: 0,
        };
        decision.reason = match (generation, tables.verdict(&key)) {
            (Some(generation), Some(verdict)) if verdict.policy_gen == generation => {
                if verdict.action == VERDICT_ALLOW {
                    decision.outcome = Outcome::Direct;
                    decision.reason = Reason::VerdictAllow;
                    decision.policy_gen = generation;
                    decision.ticket = true;
                    return decision;
                }
                if verdict.action == VERDICT_DENY {
                    decision.outcome = Outcome::Deny;
                    decision.reason = Reason::VerdictDeny;
                    return decision;
                }
                Reason::NoVerdict
            }
            (Some(_), Some(_)) => Reason::StaleVerdict,
            _ => Reason::NoVerdict,
        };
        return proxied(tables, pod, dial, decision);
    }
    if backend.flags & PEER_PLAIN != 0 {
        decision.outcome = Outcome::Direct;
        decision.reason = Reason::PlainPeer;
        return decision;
    }
    decision.reason = Reason::RemotePeer;
    proxied(tables, pod, dial, decision)
}

/// Proxy if the agent can take it; else what the table of `design.md` §2.2 says for a dead agent.
#[inline(always)]
fn proxied<T: Tables>(tables: &T, pod: &PodCfg, dial: &Dial, mut decision: Decision) -> Decision {
    let index = dial.dst.spread(dial.port) % ports::OUTBOUND.len() as u32;
    let down = if !tables.agent_alive(dial.now_ns) {
        Reason::AgentDown
    } else if !tables.outbound_listener(pod.pod, index) {
        Reason::NoListener
    } else {
        decision.outcome = Outcome::Proxy;
        decision.outbound_index = index;
        return decision;
    };
    if pod.flags & POD_FAIL_CLOSED != 0 {
        decision.outcome = Outcome::Deny;
        decision.reason = Reason::FailClosed;
        return decision;
    }
    decision.reason = down;
    // Balanced by the kernel, without a ticket: the server's side decides by its own table.
    decision.outcome = if decision.has_backend { Outcome::Direct } else { Outcome::Bypass };
    decision
}

/// An arrival at a meshed pod that found no established socket.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Source of the packet.
    pub src: Addr,
    /// Destination of the packet.
    pub dst: Addr,
    /// CLOCK_MONOTONIC nanoseconds.
    pub now_ns: u64,
    /// Interface it came in by; 1 is loopback.
    pub ifindex: u32,
    /// Source port, host order.
    pub sport: u16,
    /// Destination port, host order.
    pub dport: u16,
    /// IP protocol.
    pub proto: u16,
}

/// The kernel gives the loopback device this index in every namespace.
const LOOPBACK_IFINDEX: u32 = 1;

/// The part of an arrival's decision that needs no ticket: `None` means "look for a ticket".
#[inline(always)]
pub fn arrival_by_port(arrival: &Arrival) -> Option<(Outcome, Reason)> {
    // 0 is a lookup by another program of ours (connect asks whether a bound port is taken), no packet.
    // A packet from the pod to its own address crosses loopback too, but the kernel reports the interface
    // that owns the address (`orig_oif` in net/ipv4/route.c, `IP6CB(skb)->iif` in net/ipv6/ip6_input.c). So equal
    // addresses count as loopback. IPv4 drops such packets from outside as martians; IPv6 lets them in, but the
    // answer to a forged one goes to the pod itself, so no handshake can be completed with it.
    if arrival.ifindex <= LOOPBACK_IFINDEX || arrival.src.same(&arrival.dst) {
        return Some((Outcome::Pass, Reason::Loopback));
    }
    if ports::is_private(arrival.dport) {
        return Some((Outcome::Drop, Reason::PrivatePort));
    }
    if arrival.proto != crate::service::PROTO_TCP {
        return Some((Outcome::Pass, Reason::Udp));
    }
    if arrival.dport == ports::HBONE {
        return Some((Outcome::Pass, Reason::Hbone));
    }
    None
}

/// Judges a ticket. `generation` is the pod's current policy generation.
#[inline(always)]
pub fn judge_ticket(ticket: &Ticket, pod: &InboundCfg, generation: Option<u64>, now_ns: u64) -> Reason {
    if ticket.dst_workload != pod.workload || ticket.incarnation != pod.incarnation {
        return Reason::TicketStale;
    }
    if generation != Some(ticket.policy_gen) {
        return Reason::TicketStale;
    }
    if now_ns > ticket.expires_ns {
        return Reason::TicketExpired;
    }
    Reason::Ticket
}

/// The per-port flags of an inbound port.
#[inline(always)]
pub fn inbound_port_flags<T: Tables>(tables: &T, pod_id: u32, pod: &InboundCfg, port: u16) -> u32 {
    if pod.flags & INBOUND_PORTS == 0 {
        return 0;
    }
    tables.port(&PortKey { pod: pod_id, port, dir: DIR_INBOUND }).unwrap_or(0)
}

/// What an arrival gets when the agent cannot take it: the last columns of the table of `design.md` §2.2.
#[inline(always)]
pub const fn agent_gone(pod: &InboundCfg, port_flags: u32) -> (Outcome, Reason) {
    if port_flags & PORT_FAIL_OPEN != 0 {
        return (Outcome::Pass, Reason::AgentDown);
    }
    if port_flags & PORT_FAIL_CLOSED != 0 || pod.flags & INBOUND_FAIL_CLOSED != 0 {
        return (Outcome::Drop, Reason::FailClosed);
    }
    (Outcome::Pass, Reason::AgentDown)
}

#[cfg(test)]
mod tests;
