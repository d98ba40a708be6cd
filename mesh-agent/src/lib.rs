//! Owns the two programs of Nodemesh as a library: `mesh-agent` (composition of the node's and the controller's parts) and
//! `meshctl` (its admin client), with the JSON shapes they share.
//!
//! Invariants:
//! - The only place where `mesh-control`, `mesh-redirect` and `mesh-proxy` meet.
//! - `ctl` knows the agent only by `view` and the admin socket.
//!
//! Not here: decisions (`mesh-core`), the kernel (`mesh-redirect`), the data path (`mesh-proxy`).
#![deny(missing_docs)]

pub mod authority;
pub mod cli;
pub mod cni;
pub mod controller;
pub mod ctl;
pub mod node;
pub mod report;
pub mod view;
