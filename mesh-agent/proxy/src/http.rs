//! HTTP of local apps: which connections are looked into, and what is done with their requests.
//!
//! A connection comes here only when a route or a policy of a destination is known for what was dialled; all others are
//! relayed byte by byte as before ([`crate::relay`]).
//!
//! Invariants:
//! - The server side (this folder) never touches a socket towards a server, and the upstream side ([`upstream`]) never the
//!   client's connection; they meet in [`exchange`].
//! - What a client sends is bounded: heads, trailers, streams, stalls; what is refused is counted by reason.
//! - A request that leaves here was written anew from what was understood: ambiguous framing cannot be passed on.
//! - Bodies stream; nothing is gathered beyond a retry's replay buffer.

pub(crate) mod body;
mod claim;
mod client_io;
pub(crate) mod exchange;
mod fields;
mod guard;
mod hashing;
pub(crate) mod interim;
pub(crate) mod io;
pub(crate) mod own;
mod pipeline;
pub mod preview;
mod record;
mod replies;
mod resets;
mod serve;
mod session;
mod switch;
mod tables;
pub(crate) mod upstream;
mod variables;

pub(crate) use self::{
    claim::{Claim, claim, claim_own, may_claim},
    serve::serve,
};
