//! Edges and events.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_RB_NO_WAKEUP},
    helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_ns},
};
use mesh_common::{
    Addr,
    decide::{Arrival, Dial},
    event::{EVENT_DENY, SWITCH_CONNECTION_EVENTS},
    pod::{DIR_INBOUND, DIR_OUTBOUND, PodCfg},
    sock::{ROLE_CLIENT_DIRECT, SOCK_EDGE, SOCK_EDGE_INBOUND, SockState},
    stats::{EdgeKey, EdgeVal, Hook, Outcome, Reason},
};

use crate::{
    count::count,
    ctx::SockOps,
    maps::{EDGES, EVENTS, SWITCHES},
};

/// The edge a socket's connection belongs to, if it is accounted.
#[inline(always)]
pub fn edge<'a>(state: &SockState) -> Option<&'a mut EdgeVal> {
    if state.flags & SOCK_EDGE == 0 {
        return None;
    }
    let inbound = state.flags & SOCK_EDGE_INBOUND != 0;
    let direct = state.role == ROLE_CLIENT_DIRECT;
    // The server's own port on either path, so that one edge does not become two as its connections turn Direct.
    let key = EdgeKey {
        src_workload: state.src_workload,
        dst_workload: state.dst_workload,
        service: state.service,
        port: state.backend_port,
        dir: if inbound { DIR_INBOUND } else { DIR_OUTBOUND } as u8,
        path: if direct { Outcome::Direct } else { Outcome::Proxy } as u8,
        pad: 0,
    };
    let slot = match EDGES.get_ptr_mut(key) {
        Some(slot) => slot,
        None => {
            if EDGES.insert(key, EdgeVal::ZERO, BPF_ANY as u64).is_err() {
                count(Hook::SockOps, Outcome::Error, Reason::MapFull);
                return None;
            }
            EDGES.get_ptr_mut(key)?
        }
    };
    // SAFETY: per CPU; an eviction in between loses this update and nothing else.
    Some(unsafe { &mut *slot })
}

/// What a close adds to an event.
#[derive(Clone, Copy)]
pub struct Totals {
    /// Bytes sent and acknowledged.
    pub bytes_tx: u64,
    /// Bytes received.
    pub bytes_rx: u64,
    /// Nanoseconds since connect.
    pub duration_ns: u64,
    /// Smoothed RTT.
    pub srtt_us: u32,
    /// Retransmitted segments.
    pub retrans: u32,
}

/// Reports an opening, closing or failure of a followed socket, if anybody wants to know.
#[inline(always)]
pub fn tcp_event(ops: &SockOps, state: &SockState, kind: u8, totals: &Totals) {
    if SWITCHES.get(0).is_none_or(|switches| *switches & SWITCH_CONNECTION_EVENTS == 0) {
        return;
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        count(Hook::SockOps, Outcome::Error, Reason::EventLost);
        return;
    };
    // SAFETY: the reservation has room for one event; every field is written below.
    let event = unsafe { &mut *entry.as_mut_ptr() };
    // SAFETY: helper calls.
    event.at_ns = unsafe { bpf_ktime_get_ns() };
    event.sock_cookie = unsafe { bpf_get_socket_cookie(ops.as_ptr().cast()) };
    event.netns_cookie = state.netns_cookie;
    event.src_workload = state.src_workload;
    event.dst_workload = state.dst_workload;
    event.service = state.service;
    event.bytes_tx = totals.bytes_tx;
    event.bytes_rx = totals.bytes_rx;
    event.duration_ns = totals.duration_ns;
    event.src = ops.local();
    event.dst = ops.remote();
    event.dialled = state.shown;
    event.sport = ops.local_port();
    event.dport = ops.remote_port();
    event.dialled_port = state.shown_port;
    event.kind = kind;
    event.role = state.role;
    event.srtt_us = totals.srtt_us;
    event.retrans = if totals.retrans > u16::MAX as u32 { u16::MAX } else { totals.retrans as u16 };
    event.reason = state.reason;
    event.pad = 0;
    // The agent polls: waking it for each connection would cost more than the connection's own hooks.
    entry.submit(BPF_RB_NO_WAKEUP as u64);
}

/// Reports a connect that was refused.
#[inline(always)]
pub fn denied_connect(pod: &PodCfg, dial: &Dial, sock_cookie: u64, reason: Reason) {
    let src = if dial.dst.is_v4() { &pod.addr4 } else { &pod.addr6 };
    denied(
        dial.now_ns,
        sock_cookie,
        dial.netns_cookie,
        (pod.workload, 0),
        (src, 0),
        (&dial.dst, dial.port),
        reason,
    );
}

/// Reports an arrival that was refused.
#[inline(always)]
pub fn denied_arrival(arrival: &Arrival, workload: u64, reason: Reason) {
    denied(
        arrival.now_ns,
        0,
        0,
        (0, workload),
        (&arrival.src, arrival.sport),
        (&arrival.dst, arrival.dport),
        reason,
    );
}

#[inline(always)]
fn denied(
    at_ns: u64,
    sock_cookie: u64,
    netns_cookie: u64,
    workloads: (u64, u64),
    src: (&Addr, u16),
    dst: (&Addr, u16),
    reason: Reason,
) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        count(Hook::SockOps, Outcome::Error, Reason::EventLost);
        return;
    };
    // SAFETY: the reservation has room for one event; every field is written below.
    let event = unsafe { &mut *entry.as_mut_ptr() };
    event.at_ns = at_ns;
    event.sock_cookie = sock_cookie;
    event.netns_cookie = netns_cookie;
    event.src_workload = workloads.0;
    event.dst_workload = workloads.1;
    event.service = 0;
    event.bytes_tx = 0;
    event.bytes_rx = 0;
    event.duration_ns = 0;
    event.src = *src.0;
    event.dst = *dst.0;
    event.dialled = *dst.0;
    event.sport = src.1;
    event.dport = dst.1;
    event.dialled_port = dst.1;
    event.kind = EVENT_DENY;
    event.role = 0;
    event.srtt_us = 0;
    event.retrans = 0;
    event.reason = reason as u8;
    event.pad = 0;
    entry.submit(BPF_RB_NO_WAKEUP as u64);
}
