//! sock_ops: the life of TCP connections of meshed pods.

use core::arch::asm;

use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB,
    },
    helpers::generated::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_sock_ops_cb_flags_set},
    programs::SockOpsContext,
};
use mesh_common::{
    event::{EVENT_CLOSE, EVENT_FAIL, EVENT_OPEN},
    limits::{TICKET_ESTABLISHED_NS, TICKET_SYN_NS, TICKETS_PER_POD_MAX},
    ports,
    sock::{
        ClientAddr, OrigDst, OrigKey, ROLE_AGENT_ACCEPTED, ROLE_AGENT_LISTENER, ROLE_AGENT_UPSTREAM,
        ROLE_APP_ACCEPTED, ROLE_CLIENT_PROXY, ROLE_NONE, SOCK_CLIENT_ADDR, SOCK_SHOW, SOCK_TICKET, SockState,
    },
    stats::{Hist, Hook, Outcome, Reason},
    ticket::{Ticket, TupleKey},
};

use crate::{
    account::{self, Totals},
    count::{count, observe},
    ctx::SockOps,
    maps::{CLIENT_ADDR, ORIG_DST, PODS, TICKETS, TICKETS_USED},
    tables::{sock_state, sock_state_or_new},
};

const TCP_CLOSE: u32 = 7;

/// The whole hook; the return value means nothing for these operations.
#[inline(always)]
pub fn run(raw: &SockOpsContext) -> u32 {
    let ops = SockOps::new(raw);
    match ops.op() {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ops),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => connected(&ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ops),
        BPF_SOCK_OPS_STATE_CB if ops.arg1() == TCP_CLOSE => closed(&ops),
        _ => {}
    }
    1
}

/// The connection as the client's packets show it; seen from the client's socket.
#[inline(always)]
fn client_tuple(ops: &SockOps) -> TupleKey {
    TupleKey { src: ops.local(), dst: ops.remote(), sport: ops.local_port(), dport: ops.remote_port() }
}

/// The same connection seen from the server's socket.
#[inline(always)]
fn server_tuple(ops: &SockOps) -> TupleKey {
    TupleKey { src: ops.remote(), dst: ops.local(), sport: ops.remote_port(), dport: ops.local_port() }
}

/// Before the SYN: publish what the accepting side must find.
#[inline(always)]
fn connecting(ops: &SockOps) {
    let sk = ops.sk();
    if sk.is_null() {
        return;
    }
    let Some(state) = sock_state(sk) else { return };
    // SAFETY: storage of a live socket; this context owns its connect.
    let state = unsafe { &mut *state };
    if state.role == ROLE_NONE {
        return;
    }
    if state.role == ROLE_AGENT_UPSTREAM {
        // SAFETY: helper call. The agent's sockets have no connect hook to stamp them.
        state.started_ns = unsafe { bpf_ktime_get_ns() };
    }
    if state.role == ROLE_CLIENT_PROXY {
        publish_original(ops, state);
    }
    if state.flags & SOCK_TICKET != 0 {
        write_ticket(ops, state);
    }
    if state.flags & SOCK_CLIENT_ADDR != 0 {
        let client = ClientAddr { addr: state.shown, port: state.shown_port, pad: [0; 3] };
        if CLIENT_ADDR.insert(client_tuple(ops), client, BPF_ANY as u64).is_err() {
            count(Hook::SockOps, Outcome::Error, Reason::ClientAddrFull);
        }
    }
    let flags = ops.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG as u32;
    // SAFETY: helper call. It fails only for sockets that are not full, which have no storage.
    unsafe { bpf_sock_ops_cb_flags_set(ops.as_ptr(), flags as i32) };
}

#[inline(always)]
fn publish_original(ops: &SockOps, state: &SockState) {
    let key = OrigKey {
        src: ops.local(),
        dst: ops.remote(),
        netns_cookie: state.netns_cookie,
        sport: ops.local_port(),
        dport: ops.remote_port(),
        pad: 0,
    };
    let original = OrigDst {
        addr: state.shown,
        backend: state.backend,
        dst_workload: state.dst_workload,
        service: state.service,
        started_ns: state.started_ns,
        port: state.shown_port,
        backend_port: state.backend_port,
        flags: state.flags,
        reason: state.reason,
        pad: 0,
    };
    if ORIG_DST.insert(key, original, BPF_ANY as u64).is_err() {
        count(Hook::SockOps, Outcome::Error, Reason::OrigDstFull);
    }
}

/// Writes the ticket, if the source address is the pod's own. Without one the arrival is judged as an
/// unauthenticated one: never more than it may.
#[inline(always)]
fn write_ticket(ops: &SockOps, state: &SockState) {
    let key = client_tuple(ops);
    // SAFETY: helper call on the context.
    let cookie = unsafe { bpf_get_netns_cookie(ops.as_ptr().cast()) };
    // SAFETY: replaced whole; readable until the program ends.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        count(Hook::SockOps, Outcome::Error, Reason::NotEnrolled);
        return;
    };
    let is_node = pod.workload == 0;
    if !is_node && !key.src.same(&pod.addr4) && !key.src.same(&pod.addr6) {
        count(Hook::SockOps, Outcome::Error, Reason::ForgedSource);
        return;
    }
    // Without a counter nobody could be held to the cap.
    let Some(used) = TICKETS_USED.get_ptr_mut(cookie) else {
        count(Hook::SockOps, Outcome::Error, Reason::TicketCap);
        return;
    };
    // SAFETY: a live map value; read once.
    if unsafe { *used } >= TICKETS_PER_POD_MAX {
        count(Hook::SockOps, Outcome::Error, Reason::TicketCap);
        return;
    }
    let ticket = Ticket {
        src_workload: pod.workload,
        dst_workload: state.dst_workload,
        incarnation: state.incarnation,
        policy_gen: state.policy_gen,
        // The connect began a moment ago.
        expires_ns: state.started_ns + TICKET_SYN_NS,
        netns_cookie: cookie,
    };
    if TICKETS.insert(key, ticket, BPF_ANY as u64).is_err() {
        count(Hook::SockOps, Outcome::Error, Reason::TicketsFull);
        return;
    }
    add(used, 1);
}

/// Adds to a pod's count of live tickets; the agent's sweep recomputes it, so a lost update does not stay.
#[inline(always)]
fn add(used: *mut u64, change: i64) {
    // SAFETY: an aligned word of a live map value. `core` offers no read-modify-write for this target.
    unsafe {
        asm!("lock *(u64 *)({word} + 0) += {change}", word = in(reg) used, change = in(reg) change, options(nostack))
    };
}

/// Removes a ticket and gives its place back to the source pod.
#[inline(always)]
fn drop_ticket(key: &TupleKey) {
    // SAFETY: copied at once.
    let Some(owner) = (unsafe { TICKETS.get(key).map(|ticket| ticket.netns_cookie) }) else {
        return;
    };
    // Only the one whose removal succeeds gives the place back.
    if TICKETS.remove(key).is_ok()
        && let Some(used) = TICKETS_USED.get_ptr_mut(owner)
    {
        add(used, -1);
    }
}

/// The client's side is established.
#[inline(always)]
fn connected(ops: &SockOps) {
    let sk = ops.sk();
    if sk.is_null() {
        return;
    }
    let Some(state) = sock_state(sk) else { return };
    // SAFETY: storage of a live socket.
    let state = unsafe { &mut *state };
    if state.role == ROLE_NONE {
        return;
    }
    // SAFETY: helper call.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let latency_ns = now_ns.saturating_sub(state.started_ns);
    state.established = 1;
    observe(Hist::ConnectNs, latency_ns);
    if state.flags & SOCK_TICKET != 0 {
        let key = client_tuple(ops);
        // Gone already when the server's side was quicker.
        if let Some(ticket) = TICKETS.get_ptr_mut(key) {
            // With SYN cookies the server looks the listener up again at the ACK, so it must outlive now. In place:
            // should the entry be another connection's by now, that one's ticket is as young and its time as good.
            // SAFETY: one aligned word of a live map value.
            unsafe { (*ticket).expires_ns = now_ns + TICKET_ESTABLISHED_NS };
        }
    }
    if let Some(edge) = account::edge(state) {
        edge.opened += 1;
        edge.connect_ns_sum += latency_ns;
        edge.last_ns = now_ns;
    }
    let totals = Totals { bytes_tx: 0, bytes_rx: 0, duration_ns: 0, srtt_us: 0, retrans: 0 };
    account::tcp_event(ops, state, EVENT_OPEN, &totals);
}

/// The server's side is established: hand over what the client's side published.
#[inline(always)]
fn accepted(ops: &SockOps) {
    // SAFETY: helper call on the context.
    let cookie = unsafe { bpf_get_netns_cookie(ops.as_ptr().cast()) };
    // SAFETY: only asked for presence.
    if unsafe { PODS.get(cookie) }.is_none() {
        return;
    }
    let sk = ops.sk();
    if sk.is_null() {
        return;
    }
    // The storage of a listener is cloned to what it accepts: only the agent's listeners have any.
    if let Some(state) = sock_state(sk) {
        // SAFETY: storage of a socket nobody has accepted yet.
        let state = unsafe { &mut *state };
        if state.role == ROLE_AGENT_LISTENER {
            let port = ops.local_port();
            if port >= ports::OUTBOUND[0] && port <= ports::OUTBOUND[3] {
                take_original(ops, cookie, state);
            }
            return;
        }
        // A socket that first dialled and then listened: what it carried is not its children's.
        state.role = ROLE_NONE;
        state.flags = 0;
    }
    let key = server_tuple(ops);
    if key.src.same(&key.dst) {
        take_client_addr(ops, sk, cookie, &key);
    } else {
        drop_ticket(&key);
    }
}

#[inline(always)]
fn take_original(ops: &SockOps, cookie: u64, state: &mut SockState) {
    let key = OrigKey {
        src: ops.remote(),
        dst: ops.local(),
        netns_cookie: cookie,
        sport: ops.remote_port(),
        dport: ops.local_port(),
        pad: 0,
    };
    // SAFETY: copied at once.
    let Some(original) = (unsafe { ORIG_DST.get(key).copied() }) else {
        // The role stays "listener": the agent closes the connection and counts it. Never guess.
        count(Hook::SockOps, Outcome::Error, Reason::OrigDstMiss);
        return;
    };
    let _ = ORIG_DST.remove(key);
    state.shown = original.addr;
    state.shown_port = original.port;
    state.backend = original.backend;
    state.backend_port = original.backend_port;
    state.dst_workload = original.dst_workload;
    state.service = original.service;
    state.started_ns = original.started_ns;
    state.netns_cookie = cookie;
    // Not SOCK_SHOW: the agent sees the true peer.
    state.flags = original.flags & !SOCK_SHOW;
    state.reason = original.reason;
    state.role = ROLE_AGENT_ACCEPTED;
}

#[inline(always)]
fn take_client_addr(_ops: &SockOps, sk: *mut aya_ebpf::bindings::bpf_sock, cookie: u64, key: &TupleKey) {
    // SAFETY: copied at once.
    let Some(client) = (unsafe { CLIENT_ADDR.get(key).copied() }) else {
        return;
    };
    let _ = CLIENT_ADDR.remove(key);
    let Some(state) = sock_state_or_new(sk) else {
        count(Hook::SockOps, Outcome::Error, Reason::StorageFull);
        return;
    };
    // SAFETY: storage of a socket nobody has accepted yet.
    let state = unsafe { &mut *state };
    state.shown = client.addr;
    state.shown_port = client.port;
    state.netns_cookie = cookie;
    state.role = ROLE_APP_ACCEPTED;
    state.flags = SOCK_SHOW;
}

/// A followed connection ended, or a connect failed.
#[inline(always)]
fn closed(ops: &SockOps) {
    let sk = ops.sk();
    if sk.is_null() {
        return;
    }
    let Some(state) = sock_state(sk) else { return };
    // SAFETY: storage of a live socket.
    let state = unsafe { &mut *state };
    if state.role == ROLE_NONE {
        return;
    }
    // The server's side has taken the ticket of an established connection, or it runs out within seconds.
    if state.flags & SOCK_TICKET != 0 && state.established == 0 {
        drop_ticket(&client_tuple(ops));
    }
    // SAFETY: helper call.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let totals = Totals {
        bytes_tx: ops.bytes_acked(),
        bytes_rx: ops.bytes_received(),
        duration_ns: now_ns.saturating_sub(state.started_ns),
        srtt_us: ops.srtt_us(),
        retrans: ops.total_retrans(),
    };
    if state.established == 0 {
        if let Some(edge) = account::edge(state) {
            edge.failed += 1;
            edge.last_ns = now_ns;
        }
        account::tcp_event(ops, state, EVENT_FAIL, &totals);
        return;
    }
    observe(Hist::SrttUs, totals.srtt_us as u64);
    observe(Hist::DurationNs, totals.duration_ns);
    if let Some(edge) = account::edge(state) {
        edge.closed += 1;
        edge.bytes_tx += totals.bytes_tx;
        edge.bytes_rx += totals.bytes_rx;
        edge.retrans += totals.retrans as u64;
        edge.srtt_us_sum += totals.srtt_us as u64;
        edge.last_ns = now_ns;
    }
    account::tcp_event(ops, state, EVENT_CLOSE, &totals);
}
