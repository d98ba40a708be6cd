//! Everything of Nodemesh that talks to the kernel: programs, maps, pins, namespaces, cgroups, sockets.
//!
//! [`Node`] is the node's presence in the kernel. Small handles over its maps ([`Verdicts`], [`Stats`],
//! [`TableWriter`], [`Origins`], …) are handed to the parts that need one thing each.
//!
//! Invariants:
//! - `unsafe` stays in `sys.rs` (and one marker trait in `maps.rs`).
//! - What must survive the agent is pinned; what is pinned is adopted by the next agent.
//! - No call here awaits; those that block say so.
//!
//! Not here: what to enrol and which tables to write (`mesh-core`), the programs (`mesh-ebpf`), traffic
//! (`mesh-proxy`).
#![deny(missing_docs)]

mod arrival;
mod bpffs;
mod cgroup;
mod cleanup;
mod clock;
mod conntrack;
mod diag;
mod direct;
mod enrol;
mod entries;
mod explain;
mod folders;
mod forget;
mod handover;
mod heartbeat;
pub mod host;
mod links;
mod listeners;
mod logger;
mod map;
mod maps;
mod netlink;
mod netns;
mod node;
mod precheck;
mod prober;
mod removal;
mod running;
mod sockets;
mod stats;
mod status;
mod sweep;
#[expect(unsafe_code, reason = "the one module of raw system calls")]
mod sys;
mod tables;
mod verdicts;

pub use arrival::{InstanceError, TemplateError};
pub use cgroup::{AGENT_GROUP, CgroupError};
pub use cleanup::cleanup;
pub use clock::monotonic_ns;
pub use direct::{DirectBytes, DirectConnection, DirectError, DirectFlow, can_close_connections};
pub use enrol::{EnrolError, EnrolRequest, EnrolledPod};
pub use explain::{Explanation, LiveTables};
pub use forget::{ForgetError, Forgotten, TranslatedConnections};
pub use handover::{InheritedSockets, SOCKETS_PER_MESSAGE, receive_sockets, send_sockets};
pub use heartbeat::Heartbeat;
pub use links::AttachError;
pub use listeners::Listeners;
pub use logger::Logger;
pub use map::{KernelMap, MapError, OpenMapError, PerCpuMap};
pub use maps::Maps;
pub use netns::{Netns, NetnsError};
pub use node::{Node, NodeOptions, OpenError};
pub use precheck::{KERNEL_MIN, PrecheckError, cgroup2_mount, kernel_version};
pub use prober::Kubelet;
pub use running::{RunningPod, RunningPods};
pub use sockets::{Dialled, LocalPeer, LocalPeers, Origins, PodSockets, SocketTags, TcpFigures, TicketTag};
pub use stats::{
    Counter, EventKind, Events, EventsError, Histogram, ProgramRuns, RunStats, Stats, socket_addr,
};
pub use status::{ForeignProgram, MapFill, NodeStatus, ProgramStatus};
pub use sweep::Swept;
pub use sys::Refused;
pub use tables::{Applied, DesiredTables, TableWriter};
pub use verdicts::{VerdictEntry, Verdicts};

/// An error with all its causes on one line, for messages that end here.
pub(crate) fn report(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
