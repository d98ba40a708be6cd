//! The model of the mesh and every decision taken in user space.
//!
//! Invariants:
//! - Pure: no runtime, no sockets, no clock, no randomness; `now` and random words are arguments.
//! - A published [`snapshot::Snapshot`] is immutable and its indexes agree with each other.
//!
//! Not here: where resources come from (`mesh-control`), kernel maps (`mesh-redirect`), sockets
//! (`mesh-proxy`).
#![deny(missing_docs)]

pub mod balance;
pub mod dns;
pub mod id;
pub mod identity;
pub mod local;
pub mod mode;
pub mod plan;
pub mod policy;
pub mod reach;
pub mod resolve;
pub mod route;
pub mod slots;
pub mod snapshot;
