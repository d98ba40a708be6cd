//! cgroup/getpeername4 and getpeername6, which also serve `accept`'s address.

use aya_ebpf::programs::SockAddrContext;
use mesh_common::{
    sock::SOCK_SHOW,
    stats::{Hook, Outcome, Reason},
};

use crate::{connect::ALLOW, count::count, ctx::SockAddr, tables::sock_state};

/// Shows a client the address it dialled, and a server behind the agent the real client.
///
/// The agent's own sockets never carry `SOCK_SHOW`, so it sees true peers.
#[inline(always)]
pub fn run<const V6: bool>(raw: &SockAddrContext) -> i32 {
    let ctx = SockAddr::new(raw);
    let Some(state) = sock_state(ctx.sk()) else {
        return ALLOW;
    };
    // SAFETY: storage of a live socket; a racing connect on another thread gets one address or the other.
    let state = unsafe { &*state };
    if state.flags & SOCK_SHOW == 0 {
        return ALLOW;
    }
    if ctx.rewrite::<V6>(&state.shown, state.shown_port) {
        count(if V6 { Hook::Getpeername6 } else { Hook::Getpeername4 }, Outcome::Pass, Reason::Shown);
    }
    ALLOW
}
