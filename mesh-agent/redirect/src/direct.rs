//! Owns the live Direct connections of this node's pods: listing them, and closing those that policy denies.
//!
//! Nothing is recorded per connection: what there is, the kernel says, from each pod's sockets and what the connect
//! hook left in their storage. So a connection costs nothing to follow, and none can be forgotten.
//!
//! Invariant: only connections that the connect hook sent to a backend are listed; those of the agent, of loopback, and
//! those that were there before the pod was meshed are not.

use std::{io, net::SocketAddr, os::fd::AsFd as _, sync::Arc};

use mesh_common::{
    sock::{ROLE_CLIENT_DIRECT, SOCK_TICKET, SockState},
    stats::Reason,
};
use mesh_core::{
    id::{ServiceId, WorkloadId},
    snapshot::Name,
};

use crate::{
    diag::{Diag, LIVE_STATES, LiveSocket, SocketId, Wanted},
    netns::Netns,
    node::{Node, lock},
    stats::socket_addr,
    sys,
};

/// A live Direct connection, and how to close it.
#[derive(Clone, Debug)]
pub struct DirectConnection {
    /// What is known of it.
    pub flow: DirectFlow,
    socket: SocketId,
}

/// A Direct connection as its client sees it.
#[derive(Clone, Debug)]
pub struct DirectFlow {
    /// Local pod id of the client.
    pub pod: u32,
    /// The client.
    pub source: WorkloadId,
    /// The server, if it is a workload of the mesh.
    pub destination: Option<WorkloadId>,
    /// Service that was dialled.
    pub service: Option<ServiceId>,
    /// The client's end.
    pub client: SocketAddr,
    /// The server's end.
    pub server: SocketAddr,
    /// What the app dialled.
    pub dialled: SocketAddr,
    /// Why it went Direct.
    pub reason: Option<Reason>,
    /// The destination admitted it by policy, under [`Self::policy_gen`]; else the server is not of this mesh, takes
    /// plaintext, or the agent was down.
    pub ticket: bool,
    /// Policy generation of the destination at the connect; 0 without a ticket.
    pub policy_gen: u64,
    /// CLOCK_MONOTONIC nanoseconds of the connect.
    pub started_ns: u64,
    /// Bytes so far, if they were asked for.
    pub bytes: Option<DirectBytes>,
}

/// Bytes of a live connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectBytes {
    /// Sent by the client and acknowledged by the server. Linux counts the SYN as one.
    pub sent: u64,
    /// Received by the client.
    pub received: u64,
}

/// Why sockets of a pod could not be listed or closed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} the connections of pod {pod}")]
pub struct DirectError {
    /// Which pod.
    pub pod: Name,
    /// What was tried.
    pub operation: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

impl Node {
    /// The live Direct connections of every enrolled pod, and the pods whose sockets could not be read.
    ///
    /// Blocking: the kernel walks its table of connections twice for each pod, about 0.2 ms each, and 1 µs more
    /// for each connection. `bytes` asks for byte counts as well.
    pub fn direct_connections(&self, bytes: bool) -> (Vec<DirectConnection>, Vec<DirectError>) {
        let pods: Vec<(u32, Name, Arc<Netns>)> = lock(&self.pods)
            .iter()
            .map(|(pod, served)| (*pod, served.config.name.clone(), Arc::clone(served.sockets.netns())))
            .collect();
        let (mut found, mut errors) = (Vec::new(), Vec::new());
        let wanted = Wanted { states: LIVE_STATES, storage: self.maps.socks.as_fd(), bytes };
        for (pod, name, netns) in pods {
            let listed = Diag::inside(&netns)
                .and_then(|mut diag| diag.each(wanted, |socket| found.extend(direct(pod, &socket))));
            if let Err(source) = listed {
                errors.push(DirectError { pod: name, operation: "list", source });
            }
        }
        (found, errors)
    }

    /// Closes a connection at both ends, as far as they are on this node. The apps see ECONNABORTED. Returns whether
    /// there was anything left to close.
    pub fn close_direct(&self, connection: &DirectConnection) -> Result<bool, DirectError> {
        let flow = &connection.flow;
        let (client, server) = {
            let pods = lock(&self.pods);
            let end = |served: &crate::enrol::Enrolled| {
                (served.config.name.clone(), Arc::clone(served.sockets.netns()))
            };
            let server = pods.values().find(|served| served.config.addrs.contains(&flow.server.ip()));
            (pods.get(&flow.pod).map(end), server.map(end))
        };
        let mut closed = false;
        // The server's end first: afterwards the client's reset would find nothing to say.
        if let Some((pod, netns)) = server {
            closed |= Diag::inside(&netns)
                .and_then(|mut diag| match diag.find(flow.server, flow.client)? {
                    Some(socket) => diag.close(&socket),
                    None => Ok(false),
                })
                .map_err(|source| DirectError { pod, operation: "close", source })?;
        }
        if let Some((pod, netns)) = client {
            closed |= Diag::inside(&netns)
                .and_then(|mut diag| diag.close(&connection.socket))
                .map_err(|source| DirectError { pod, operation: "close", source })?;
        }
        Ok(closed)
    }
}

/// Whether this kernel lets the agent close other processes' connections; else a policy change cannot reach
/// established Direct ones.
pub fn can_close_connections() -> io::Result<()> {
    Diag::here()?.can_close()
}

fn direct(pod: u32, socket: &LiveSocket<'_>) -> Option<DirectConnection> {
    let state: SockState = sys::read_pod(socket.storage?)?;
    if state.role != ROLE_CLIENT_DIRECT {
        return None;
    }
    let some = |id: u64| (id != 0).then_some(id);
    let flow = DirectFlow {
        pod,
        source: WorkloadId(state.src_workload),
        destination: some(state.dst_workload).map(WorkloadId),
        service: some(state.service).map(ServiceId),
        client: socket.id.local(),
        server: socket.id.remote(),
        dialled: socket_addr(state.shown, state.shown_port),
        reason: Reason::from_index(state.reason),
        ticket: state.flags & SOCK_TICKET != 0,
        policy_gen: state.policy_gen,
        started_ns: state.started_ns,
        bytes: socket.bytes.map(|(sent, received)| DirectBytes { sent, received }),
    };
    Some(DirectConnection { flow, socket: socket.id })
}
