//! Owns how an explained connection travels, and so what the server's policy gets to know of its client.

use std::{net::SocketAddr, sync::Arc};

use mesh_common::stats::{Outcome, Reason};
use mesh_core::{
    policy::{self, Attempt, Judgement, Peer, Transport},
    snapshot::{Snapshot, Workload},
};

use crate::view::TransportView;

/// How a connection reaches a meshed backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) outcome: Outcome,
    pub(super) reason: Reason,
    /// The kernel writes a ticket, or the agent dials with one.
    pub(super) ticketed: bool,
    /// The backend is a pod of this node.
    pub(super) local: bool,
}

impl Way {
    /// How the bytes travel, and so what the server's side gets to know of the client.
    pub(super) fn transport(self, dest: &Workload, port: u16) -> TransportView {
        match self.outcome {
            Outcome::Direct if self.ticketed => TransportView::Direct,
            // A cached verdict is about a pair of this node.
            Outcome::Deny if self.reason == Reason::VerdictDeny => TransportView::Kernel,
            Outcome::Proxy if self.local => TransportView::Kernel,
            Outcome::Proxy if policy::transport(dest, port) == Transport::Hbone => TransportView::MutualTls,
            _ => TransportView::Plaintext,
        }
    }
}

/// What the server's side says of a connection that reaches it over `transport`.
pub(super) fn judge(
    snapshot: &Snapshot,
    from: &Workload,
    dest: &Workload,
    backend: SocketAddr,
    transport: TransportView,
) -> Judgement {
    let peer = match transport {
        TransportView::Direct | TransportView::Kernel => Peer::Kernel(from.id),
        TransportView::MutualTls => Peer::Tls(Arc::new(from.identity())),
        TransportView::Plaintext => Peer::Unauthenticated,
    };
    let attempt = Attempt {
        peer: &peer,
        source: from.addrs.iter().copied().find(|own| own.is_ipv4() == backend.is_ipv4()),
        destination: backend.ip(),
        port: backend.port(),
    };
    policy::admit(snapshot, &attempt, dest)
}
