//! The harness: nodes, pods and agents as network namespaces and cgroups on the real kernel.
//!
//! A test builds a [`World`], makes pods on its nodes, drives real sockets inside those pods through
//! [`tool::PodTool`], and drops the world, which leaves nothing behind. `tests/README.md` is the tour.

pub mod agent;
pub mod artefacts;
pub mod authority;
pub mod backends;
pub mod bookinfo;
mod bpf;
pub mod cgroup;
pub mod clean;
pub mod cluster;
pub mod controller;
pub mod docs;
pub mod foreign;
pub mod hbone;
pub mod kernel;
pub mod manifests;
pub mod nameserver;
pub mod netns;
pub mod place;
pub mod pod;
pub mod programs;
pub mod protocol;
pub mod require;
pub mod runtime;
mod saying;
pub mod shop;
pub mod signals;
pub mod tool;
pub mod translation;
pub mod verdict;
pub mod waiting;
pub mod web;
pub mod wiretap;
pub mod world;
mod yaml;

pub use agent::{Agent, AgentBuilder};
pub use authority::{Authority, Credentials, Leaf};
pub use controller::{Controller, ControllerSeat};
pub use kernel::{Counters, Kernel};
pub use manifests::Manifests;
pub use place::Place;
pub use pod::Pod;
pub use runtime::Runtime;
pub use shop::Shop;
pub use tool::{Connection, PodTool, Server, ToolError};
pub use verdict::{Failure, TestResult};
pub use waiting::{eventually, limit};
pub use world::{Link, Node, World, WorldBuilder};
