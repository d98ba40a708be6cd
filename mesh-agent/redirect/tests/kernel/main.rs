//! The crate against the running kernel: real programs, namespaces, cgroups and sockets (tier `bpf`).
//!
//! Needs root; without it the tests say SKIP, or fail when `MESH_TESTS_REQUIRE=1`. One binary, one bed at a
//! time: the agent's cgroup is a property of the whole process.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::let_underscore_must_use,
    reason = "helpers of tests fail where they stand; clean-up goes on whatever fails"
)]

#[macro_use]
mod bed;
mod adoption;
mod arrival;
mod child;
mod connect;
mod cost;
mod direct;
mod enrol;
mod open;
mod sockets;
mod stats;
mod tables;
