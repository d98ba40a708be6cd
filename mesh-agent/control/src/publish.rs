//! The controller's side of the link: what it tells agents and other clients of WDS, and the certificates it issues.
//!
//! ```text
//! Snapshot ─▶ feed ─▶ world ─▶ session (one a stream) ─▶ ads ┐
//!                     CSR ─▶ certificates ─▶ Ca ─────────────┴─ server ─ listener (TLS)
//! ```

pub mod ads;
pub mod auth;
pub mod certificates;
pub mod feed;
pub mod hosted;
mod listener;
pub mod metrics;
pub mod seats;
pub mod server;
pub mod session;
pub mod world;
