//! cgroup/connect4 and connect6: where a meshed pod's connect goes.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_F_CURRENT_NETNS, bpf_sock_tuple},
    helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie,
        bpf_ktime_get_ns, bpf_set_retval, bpf_sk_release, bpf_skc_lookup_tcp,
    },
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use mesh_common::{
    Addr,
    addr::{FAMILY_V4, FAMILY_V6},
    decide::{self, Decision, Dial, Tables as _},
    limits::TICKETS_PER_POD_MAX,
    pod::{POD_DNS, POD_NODE, PodCfg, ProbeKey},
    ports,
    service::{Affinity, AffinityKey, PROTO_TCP, PROTO_UDP},
    sock::{
        ClientAddr, DnsKey, ROLE_AGENT_LISTENER, ROLE_AGENT_UPSTREAM, ROLE_CLIENT_DIRECT, ROLE_CLIENT_PROXY,
        ROLE_NONE, ROLE_PROBE, SOCK_BACKEND, SOCK_EDGE, SOCK_SHOW, SOCK_TICKET, SockState,
    },
    stats::{Hook, Outcome, Reason},
};

use crate::{
    account,
    count::count,
    ctx::{SockAddr, local_port, tcp_state},
    datagram,
    maps::{AFFINITY, DNS_ORIG, PODS, PROBES, TICKETS_USED},
    tables::{Kernel, sock_state, sock_state_or_new},
};

/// Go on with the call.
pub const ALLOW: i32 = 1;
/// Fail the call; `EPERM` unless [`deny_with`] set another error.
pub const DENY: i32 = 0;

const EAGAIN: i32 = 11;
const ENOBUFS: i32 = 105;
const ECONNREFUSED: i32 = 111;
const TCP_LISTEN: u32 = 10;

/// The whole hook, for one family of the socket.
#[inline(always)]
pub fn run<const V6: bool>(raw: &SockAddrContext) -> i32 {
    let ctx = SockAddr::new(raw);
    // SAFETY: helper call on the context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: pod entries are replaced whole; this one stays readable until the program ends.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return ALLOW;
    };
    let hook = if V6 { Hook::Connect6 } else { Hook::Connect4 };
    let sk = ctx.sk();
    let known = sock_state(sk);
    if let Some(state) = known {
        // SAFETY: storage of a live socket.
        let role = unsafe { (*state).role };
        if role == ROLE_AGENT_UPSTREAM || role == ROLE_AGENT_LISTENER {
            count(hook, Outcome::Bypass, Reason::OwnSocket);
            return ALLOW;
        }
    }
    let dial = Dial {
        dst: ctx.addr::<V6>(),
        netns_cookie: cookie,
        // SAFETY: helper call.
        now_ns: unsafe { bpf_ktime_get_ns() },
        draw: 0,
        port: ctx.port(),
        proto: ctx.protocol(),
    };
    if pod.flags & POD_NODE != 0 {
        return probe(&ctx, pod, &dial);
    }
    if dial.proto == PROTO_TCP {
        // SAFETY: helper call.
        let draw = unsafe { bpf_get_prandom_u32() };
        tcp::<V6>(raw, &ctx, hook, pod, &Dial { draw, ..dial }, known)
    } else if dial.proto == PROTO_UDP {
        udp::<V6>(&ctx, hook, pod, &dial, known)
    } else {
        forget(known);
        count(hook, Outcome::Bypass, Reason::OtherProtocol);
        ALLOW
    }
}

#[inline(always)]
fn tcp<const V6: bool>(
    raw: &SockAddrContext,
    ctx: &SockAddr,
    hook: Hook,
    pod: &PodCfg,
    dial: &Dial,
    known: Option<*mut SockState>,
) -> i32 {
    if dns_captured(pod, dial) {
        return dns_over_tcp::<V6>(ctx, hook, pod, dial);
    }
    let decision = decide::connect(&Kernel, pod, dial);
    debug!(
        raw,
        "connect port {} outcome {} reason {}", dial.port, decision.outcome as u8, decision.reason as u8
    );
    match decision.outcome {
        Outcome::Direct => direct::<V6>(ctx, hook, pod, dial, &decision),
        Outcome::Proxy => proxy::<V6>(ctx, hook, pod, dial, &decision),
        Outcome::Deny => {
            forget(known);
            let error = if matches!(decision.reason, Reason::VerdictDeny) { 0 } else { ECONNREFUSED };
            refuse(ctx, hook, pod, dial, decision.reason, error)
        }
        _ => {
            forget(known);
            count(hook, Outcome::Bypass, decision.reason);
            ALLOW
        }
    }
}

/// Sends the connect to the backend the kernel drew.
#[inline(always)]
fn direct<const V6: bool>(ctx: &SockAddr, hook: Hook, pod: &PodCfg, dial: &Dial, decision: &Decision) -> i32 {
    if decision.ticket {
        // SAFETY: a counter of this pod; read once.
        let used = unsafe { TICKETS_USED.get(dial.netns_cookie).copied().unwrap_or(0) };
        if used >= TICKETS_PER_POD_MAX {
            return refuse(ctx, hook, pod, dial, Reason::TicketCap, EAGAIN);
        }
    }
    let Some(state) = remember(ctx.sk(), ROLE_CLIENT_DIRECT, pod, dial, decision) else {
        return refuse(ctx, hook, pod, dial, Reason::StorageFull, ENOBUFS);
    };
    // SAFETY: storage of the connecting socket, which this call owns.
    unsafe {
        (*state).flags |= SOCK_EDGE | if decision.ticket { SOCK_TICKET } else { 0 };
    }
    if decision.affinity_slots != 0 {
        stick(dial, decision);
    }
    if !ctx.rewrite::<V6>(&decision.backend.addr, decision.backend.port) {
        return refuse(ctx, hook, pod, dial, Reason::OtherProtocol, ECONNREFUSED);
    }
    count(hook, Outcome::Direct, decision.reason);
    ALLOW
}

/// Sends the connect to one of the agent's listeners in the pod's own namespace, at the pod's own address: so
/// `getsockname` stays true and a bound device or source address keeps working.
#[inline(always)]
fn proxy<const V6: bool>(ctx: &SockAddr, hook: Hook, pod: &PodCfg, dial: &Dial, decision: &Decision) -> i32 {
    let own = own_address(pod, dial);
    if own.is_unspecified() {
        forget(sock_state(ctx.sk()));
        // The pod has no address of this family, so nothing of it can be reached anyway.
        count(hook, Outcome::Bypass, Reason::OtherProtocol);
        return ALLOW;
    }
    let Some(index) = outbound_index(ctx, own, decision.outbound_index) else {
        return refuse(ctx, hook, pod, dial, Reason::NoOutboundPort, EAGAIN);
    };
    if remember(ctx.sk(), ROLE_CLIENT_PROXY, pod, dial, decision).is_none() {
        return refuse(ctx, hook, pod, dial, Reason::StorageFull, ENOBUFS);
    }
    let port = ports::OUTBOUND[0] + (index & 3) as u16;
    if !ctx.rewrite::<V6>(own, port) {
        return refuse(ctx, hook, pod, dial, Reason::OtherProtocol, ECONNREFUSED);
    }
    if decision.affinity_slots != 0 && decision.has_backend {
        stick(dial, decision);
    }
    count(hook, Outcome::Proxy, decision.reason);
    ALLOW
}

/// An outbound port whose 4-tuple with the socket's bound source port is free.
///
/// An app that binds one source port and dials two destinations would collide on the in-pod hop; unbound
/// sockets get a free source port from the kernel.
#[inline(always)]
fn outbound_index(ctx: &SockAddr, own: &Addr, first: u32) -> Option<u32> {
    let sport = local_port(ctx.sk());
    if sport == 0 {
        return Some(first);
    }
    for step in 0..ports::OUTBOUND.len() as u32 {
        let index = (first + step) & 3;
        if !taken(ctx, own, ports::OUTBOUND[0] + index as u16, sport) {
            return Some(index);
        }
    }
    None
}

const _: () = assert!(ports::OUTBOUND.len() == 4 && ports::OUTBOUND[3] == ports::OUTBOUND[0] + 3);

/// Whether the pod already has a connection from `sport` to `dport` on its own address.
#[inline(always)]
fn taken(ctx: &SockAddr, own: &Addr, dport: u16, sport: u16) -> bool {
    // As a packet that comes back to the client socket: from the listener to the source port.
    // SAFETY: plain integers; zero is valid.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let size = if own.is_v4() {
        // SAFETY: writing one variant of a union of integers.
        unsafe {
            let v4 = &mut tuple.__bindgen_anon_1.ipv4;
            v4.saddr = own.words[3];
            v4.daddr = own.words[3];
            v4.sport = dport.to_be();
            v4.dport = sport.to_be();
        }
        12
    } else {
        // SAFETY: as above.
        unsafe {
            let v6 = &mut tuple.__bindgen_anon_1.ipv6;
            v6.saddr = own.words;
            v6.daddr = own.words;
            v6.sport = dport.to_be();
            v6.dport = sport.to_be();
        }
        36
    };
    // SAFETY: helper call; the returned reference is given back below.
    unsafe {
        let sk = bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut tuple, size, BPF_F_CURRENT_NETNS as u64, 0);
        if sk.is_null() {
            return false;
        }
        let state = tcp_state(sk);
        bpf_sk_release(sk.cast());
        state != TCP_LISTEN
    }
}

/// Writes what the later hooks need into the socket's storage. Overwrites whatever an earlier connect on
/// the same socket left.
#[inline(always)]
fn remember(
    sk: *mut aya_ebpf::bindings::bpf_sock,
    role: u8,
    pod: &PodCfg,
    dial: &Dial,
    decision: &Decision,
) -> Option<*mut SockState> {
    let state = sock_state_or_new(sk)?;
    // SAFETY: storage of the connecting socket, which this call owns.
    let s = unsafe { &mut *state };
    s.shown = dial.dst;
    s.backend = decision.backend.addr;
    s.src_workload = pod.workload;
    s.dst_workload = decision.backend.workload;
    s.service = decision.service;
    s.incarnation = decision.backend.incarnation;
    s.policy_gen = decision.policy_gen;
    s.started_ns = dial.now_ns;
    s.netns_cookie = dial.netns_cookie;
    s.shown_port = dial.port;
    s.backend_port = decision.backend.port;
    s.role = role;
    s.flags = SOCK_SHOW | if decision.has_backend { SOCK_BACKEND } else { 0 };
    s.reason = decision.reason as u8;
    s.established = 0;
    Some(state)
}

/// A socket that connects again, now outside the mesh, must not show or account the old destination.
#[inline(always)]
pub fn forget(known: Option<*mut SockState>) {
    if let Some(state) = known {
        // SAFETY: storage of the connecting socket, which this call owns.
        unsafe {
            (*state).role = ROLE_NONE;
            (*state).flags = 0;
        }
    }
}

#[inline(always)]
fn stick(dial: &Dial, decision: &Decision) {
    let key = AffinityKey { netns_cookie: dial.netns_cookie, slots: decision.affinity_slots };
    let value = Affinity {
        addr: decision.backend.addr,
        used_ns: dial.now_ns,
        port: decision.backend.port,
        pad: [0; 3],
    };
    // An LRU map: an insert fails only when it is under heavy contention, and stickiness is best effort.
    let _ = AFFINITY.insert(key, value, BPF_ANY as u64);
}

/// Counts and reports a refusal. `error` 0 leaves the kernel's EPERM.
#[inline(always)]
fn refuse(ctx: &SockAddr, hook: Hook, pod: &PodCfg, dial: &Dial, reason: Reason, error: i32) -> i32 {
    count(hook, Outcome::Deny, reason);
    // SAFETY: helper call on the context.
    let sock_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    account::denied_connect(pod, dial, sock_cookie, reason);
    if error != 0 {
        // SAFETY: helper call; allowed in connect hooks since 5.18.
        unsafe { bpf_set_retval(-error) };
    }
    DENY
}

/// A connect from the node's own namespace: only the kubelet's probes matter.
#[inline(always)]
fn probe(ctx: &SockAddr, node: &PodCfg, dial: &Dial) -> i32 {
    // SAFETY: helper call. The exact id, never an ancestor: pods may sit below the kubelet's group.
    if dial.proto != PROTO_TCP || unsafe { bpf_get_current_cgroup_id() } != node.prober_cgroup {
        return ALLOW;
    }
    let key = ProbeKey { addr: dial.dst, port: dial.port, pad: 0 };
    // SAFETY: copied at once.
    let Some(workload) = (unsafe { PROBES.get(key).copied() }) else {
        return ALLOW;
    };
    let generation = Kernel.policy_gen(workload);
    // SAFETY: copied at once.
    let incarnation = unsafe { crate::maps::WORKLOADS.get(dial.dst).map(|w| w.incarnation) };
    let (Some(policy_gen), Some(incarnation), Some(state)) =
        (generation, incarnation, sock_state_or_new(ctx.sk()))
    else {
        return ALLOW;
    };
    // SAFETY: storage of the connecting socket, which this call owns.
    let s = unsafe { &mut *state };
    s.dst_workload = workload;
    s.incarnation = incarnation;
    s.policy_gen = policy_gen;
    s.netns_cookie = dial.netns_cookie;
    s.started_ns = dial.now_ns;
    s.role = ROLE_PROBE;
    s.flags = SOCK_TICKET;
    count(Hook::Connect4, Outcome::Bypass, Reason::Probe);
    ALLOW
}

/// A connected UDP socket: DNS to the in-pod proxy, a service to one of its backends.
#[inline(always)]
fn udp<const V6: bool>(
    ctx: &SockAddr,
    hook: Hook,
    pod: &PodCfg,
    dial: &Dial,
    known: Option<*mut SockState>,
) -> i32 {
    let (to, to_port, reason) = match datagram::target(ctx, pod, dial) {
        datagram::Target::Leave(reason) => {
            forget(known);
            count(hook, Outcome::Bypass, reason);
            return ALLOW;
        }
        datagram::Target::Refuse(reason) => {
            forget(known);
            return refuse(ctx, hook, pod, dial, reason, ECONNREFUSED);
        }
        datagram::Target::Send { addr, port, reason } => (addr, port, reason),
    };
    let Some(state) = sock_state_or_new(ctx.sk()) else {
        return refuse(ctx, hook, pod, dial, Reason::StorageFull, ENOBUFS);
    };
    show_only(state, dial);
    datagram::remember_peer(ctx, &to, to_port, dial);
    if !ctx.rewrite::<V6>(&to, to_port) {
        return refuse(ctx, hook, pod, dial, Reason::OtherProtocol, ECONNREFUSED);
    }
    count(hook, Outcome::Direct, reason);
    ALLOW
}

/// Whether port 53 of this pod is answered by the agent right now. While the agent is down, DNS fails open to
/// the pod's own resolver.
#[inline(always)]
pub fn dns_captured(pod: &PodCfg, dial: &Dial) -> bool {
    if dial.port != ports::DNS_CAPTURED || pod.flags & POD_DNS == 0 || dial.dst.is_loopback() {
        return false;
    }
    let own = own_address(pod, dial);
    !own.is_unspecified()
        && !dial.dst.same(own)
        && Kernel.agent_alive(dial.now_ns)
        && Kernel.outbound_listener(pod.pod, 0)
}

/// The pod's address of the family dialled; unspecified when it has none.
#[inline(always)]
pub fn own_address<'a>(pod: &'a PodCfg, dial: &Dial) -> &'a Addr {
    if dial.dst.is_v4() { &pod.addr4 } else { &pod.addr6 }
}

/// A TCP connect to a resolver goes to the agent's DNS proxy; the app keeps seeing the resolver.
#[inline(always)]
fn dns_over_tcp<const V6: bool>(ctx: &SockAddr, hook: Hook, pod: &PodCfg, dial: &Dial) -> i32 {
    let Some(state) = sock_state_or_new(ctx.sk()) else {
        return refuse(ctx, hook, pod, dial, Reason::StorageFull, ENOBUFS);
    };
    show_only(state, dial);
    remember_resolver(dial, 0);
    if !ctx.rewrite::<V6>(own_address(pod, dial), ports::DNS) {
        return refuse(ctx, hook, pod, dial, Reason::OtherProtocol, ECONNREFUSED);
    }
    count(hook, Outcome::Proxy, Reason::Dns);
    ALLOW
}

/// The socket shows what it dialled and is not followed further.
#[inline(always)]
fn show_only(state: *mut SockState, dial: &Dial) {
    // SAFETY: storage of the connecting socket, which this call owns.
    let s = unsafe { &mut *state };
    s.shown = dial.dst;
    s.shown_port = dial.port;
    s.role = ROLE_NONE;
    s.flags = SOCK_SHOW;
}

/// Notes which resolver the pod asked, for names the agent forwards.
#[inline(always)]
pub fn remember_resolver(dial: &Dial, sport: u16) {
    let family = if dial.dst.is_v4() { FAMILY_V4 } else { FAMILY_V6 } as u16;
    let value = ClientAddr { addr: dial.dst, port: dial.port, pad: [0; 3] };
    let last = DnsKey { netns_cookie: dial.netns_cookie, sport: 0, family, pad: 0 };
    // LRU maps; without an entry the agent falls back to its own resolver.
    let _ = DNS_ORIG.insert(last, value, BPF_ANY as u64);
    if sport != 0 {
        let exact = DnsKey { netns_cookie: dial.netns_cookie, sport, family, pad: 0 };
        let _ = DNS_ORIG.insert(exact, value, BPF_ANY as u64);
    }
}
