//! sk_lookup: what an arrival at one pod gets.

use core::ffi::c_void;

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_ns, bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release},
    programs::SkLookupContext,
};
use aya_log_ebpf::debug;
use mesh_common::{
    decide::{self, Arrival, Tables as _},
    pod::{LISTENER_INBOUND, PORT_EXCLUDED, listener_key},
    stats::{Hook, Outcome, Reason},
    ticket::TupleKey,
};

use crate::{
    account,
    count::count,
    ctx::SkLookup,
    maps::{INBOUND, LISTENERS, POD_ID, TICKETS},
    tables::Kernel,
};

const SK_DROP: u32 = 0;
const SK_PASS: u32 = 1;

/// The whole hook. Established connections never get here.
#[inline(always)]
pub fn run(raw: &SkLookupContext) -> u32 {
    let ctx = SkLookup::new(raw);
    let pod_id = POD_ID.load();
    // SAFETY: replaced whole; copied at once.
    let Some(pod) = (unsafe { INBOUND.get(pod_id).copied() }) else {
        // Being enrolled or removed: nothing is known, nothing is captured.
        count(Hook::SkLookup, Outcome::Pass, Reason::NotEnrolled);
        return SK_PASS;
    };
    let arrival = Arrival {
        src: ctx.remote(),
        dst: ctx.local(),
        // SAFETY: helper call.
        now_ns: unsafe { bpf_ktime_get_ns() },
        ifindex: ctx.ifindex(),
        sport: ctx.remote_port(),
        dport: ctx.local_port(),
        proto: ctx.protocol(),
    };
    if let Some((outcome, reason)) = decide::arrival_by_port(&arrival) {
        return settle(&arrival, pod.workload, outcome, reason);
    }
    let key = TupleKey { src: arrival.src, dst: arrival.dst, sport: arrival.sport, dport: arrival.dport };
    // SAFETY: copied at once.
    if let Some(ticket) = unsafe { TICKETS.get(key).copied() } {
        let reason = decide::judge_ticket(&ticket, &pod, Kernel.policy_gen(pod.workload), arrival.now_ns);
        if matches!(reason, Reason::Ticket) {
            return settle(&arrival, pod.workload, Outcome::Pass, reason);
        }
        // A void ticket counts as no ticket: the agent decides, as for any other arrival.
        count(Hook::SkLookup, Outcome::Error, reason);
    }
    let port_flags = decide::inbound_port_flags(&Kernel, pod_id, &pod, arrival.dport);
    if port_flags & PORT_EXCLUDED != 0 {
        return settle(&arrival, pod.workload, Outcome::Pass, Reason::ExcludedPort);
    }
    debug!(raw, "arrival for the agent at pod {} port {}", pod_id, arrival.dport);
    if Kernel.agent_alive(arrival.now_ns) {
        match assign(&ctx, pod_id) {
            Assigned::Yes => return settle(&arrival, pod.workload, Outcome::Capture, Reason::Captured),
            // The listener is open and still cannot take this packet. Passing it would hand it to the app.
            Assigned::Refused => return settle(&arrival, pod.workload, Outcome::Drop, Reason::AssignFailed),
            Assigned::NoListener => {}
        }
    }
    let (outcome, reason) = decide::agent_gone(&pod, port_flags);
    settle(&arrival, pod.workload, outcome, reason)
}

enum Assigned {
    Yes,
    NoListener,
    Refused,
}

/// Gives the arrival to the pod's inbound listener, if the agent holds it open.
#[inline(always)]
fn assign(ctx: &SkLookup, pod_id: u32) -> Assigned {
    let key = listener_key(pod_id, LISTENER_INBOUND);
    // SAFETY: the helper returns a referenced socket or null; the reference is given back.
    unsafe {
        let sk: *mut c_void = bpf_map_lookup_elem(LISTENERS.as_ptr(), (&raw const key).cast());
        if sk.is_null() {
            return Assigned::NoListener;
        }
        let result = bpf_sk_assign(ctx.as_ptr(), sk, 0);
        bpf_sk_release(sk);
        if result == 0 { Assigned::Yes } else { Assigned::Refused }
    }
}

/// Counts, reports refusals, and gives the kernel its answer.
#[inline(always)]
fn settle(arrival: &Arrival, workload: u64, outcome: Outcome, reason: Reason) -> u32 {
    count(Hook::SkLookup, outcome, reason);
    if matches!(outcome, Outcome::Drop) {
        account::denied_arrival(arrival, workload, reason);
        return SK_DROP;
    }
    SK_PASS
}
