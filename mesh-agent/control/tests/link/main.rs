//! The controller link over loopback TLS: a real server, real agents, and clients that are neither.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test's harness fails by panicking"
)]

mod bed;
mod certificates;
mod foreign;
mod state;
