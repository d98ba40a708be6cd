//! UDP: cgroup/sendmsg4, sendmsg6, recvmsg4 and recvmsg6, and what they share with connect.

use aya_ebpf::{
    bindings::BPF_ANY,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns},
    programs::SockAddrContext,
};
use mesh_common::{
    Addr,
    decide::{self, Dial},
    pod::{POD_NODE, PodCfg},
    ports,
    service::PROTO_UDP,
    sock::{ROLE_AGENT_LISTENER, ROLE_AGENT_UPSTREAM, UdpPeer, UdpPeerKey},
    stats::{Hook, Outcome, Reason},
};

use crate::{
    connect::{ALLOW, DENY, dns_captured, own_address, remember_resolver},
    count::count,
    ctx::{SockAddr, local_port},
    maps::{PODS, UDP_PEERS},
    tables::{Kernel, sock_state},
};

/// Where a datagram goes.
pub enum Target {
    /// Where the app said.
    Leave(Reason),
    /// Nowhere.
    Refuse(Reason),
    /// Somewhere else.
    Send {
        /// Address.
        addr: Addr,
        /// Port, host order.
        port: u16,
        /// Why.
        reason: Reason,
    },
}

/// Decides a datagram. The slot is drawn by socket cookie, so that one socket keeps one backend.
#[inline(always)]
pub fn target(ctx: &SockAddr, pod: &PodCfg, dial: &Dial) -> Target {
    if dns_captured(pod, dial) {
        remember_resolver(dial, local_port(ctx.sk()));
        return Target::Send { addr: *own_address(pod, dial), port: ports::DNS, reason: Reason::Dns };
    }
    balanced(ctx, pod, dial)
}

#[inline(always)]
fn balanced(ctx: &SockAddr, pod: &PodCfg, dial: &Dial) -> Target {
    // SAFETY: helper call on the context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let mixed = (cookie as u32 ^ (cookie >> 32) as u32).wrapping_mul(0x9e37_79b1);
    let decision = decide::datagram(&Kernel, pod, &Dial { draw: mixed ^ (mixed >> 16), ..*dial });
    match decision.outcome {
        Outcome::Direct => {
            Target::Send { addr: decision.backend.addr, port: decision.backend.port, reason: decision.reason }
        }
        Outcome::Deny => Target::Refuse(decision.reason),
        _ => Target::Leave(decision.reason),
    }
}

/// Notes what the app dialled, so that `recvmsg` shows replies as coming from there.
#[inline(always)]
pub fn remember_peer(ctx: &SockAddr, to: &Addr, port: u16, dial: &Dial) {
    // SAFETY: helper call on the context.
    let sock_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let key = UdpPeerKey { sock_cookie, addr: *to, port, pad: [0; 3] };
    let value = UdpPeer { addr: dial.dst, port: dial.port, pad: [0; 3] };
    // SAFETY: copied at once.
    if unsafe { UDP_PEERS.get(key).copied() } == Some(value) {
        return;
    }
    if UDP_PEERS.insert(key, value, BPF_ANY as u64).is_err() {
        count(Hook::Sendmsg4, Outcome::Error, Reason::MapFull);
    }
}

/// An unconnected datagram leaves.
#[inline(always)]
pub fn sendmsg<const V6: bool>(raw: &SockAddrContext) -> i32 {
    let ctx = SockAddr::new(raw);
    // SAFETY: helper call on the context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: pod entries are replaced whole; this one stays readable until the program ends.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return ALLOW;
    };
    if pod.flags & POD_NODE != 0 {
        return ALLOW;
    }
    let hook = if V6 { Hook::Sendmsg6 } else { Hook::Sendmsg4 };
    if let Some(state) = sock_state(ctx.sk()) {
        // SAFETY: storage of a live socket.
        let role = unsafe { (*state).role };
        if role == ROLE_AGENT_UPSTREAM || role == ROLE_AGENT_LISTENER {
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
        proto: PROTO_UDP,
    };
    match target(&ctx, pod, &dial) {
        Target::Leave(reason) => {
            count(hook, Outcome::Bypass, reason);
            ALLOW
        }
        Target::Refuse(reason) => {
            count(hook, Outcome::Deny, reason);
            DENY
        }
        Target::Send { addr, port, reason } => {
            remember_peer(&ctx, &addr, port, &dial);
            if !ctx.rewrite::<V6>(&addr, port) {
                count(hook, Outcome::Deny, Reason::OtherProtocol);
                return DENY;
            }
            count(hook, Outcome::Direct, reason);
            ALLOW
        }
    }
}

/// A datagram is handed to the app: show the address it dialled.
#[inline(always)]
pub fn recvmsg<const V6: bool>(raw: &SockAddrContext) -> i32 {
    let ctx = SockAddr::new(raw);
    // SAFETY: helper call on the context.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: only asked for presence.
    if unsafe { PODS.get(cookie) }.is_none() {
        return ALLOW;
    }
    // SAFETY: helper call on the context.
    let sock_cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let key = UdpPeerKey { sock_cookie, addr: ctx.addr::<V6>(), port: ctx.port(), pad: [0; 3] };
    // SAFETY: copied at once.
    if let Some(peer) = unsafe { UDP_PEERS.get(key).copied() } {
        if ctx.rewrite::<V6>(&peer.addr, peer.port) {
            count(if V6 { Hook::Recvmsg6 } else { Hook::Recvmsg4 }, Outcome::Pass, Reason::Restored);
        }
    }
    ALLOW
}
