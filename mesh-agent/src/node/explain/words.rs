//! Owns the sentences of `meshctl explain`.

use std::net::SocketAddr;

use mesh_common::stats::{Outcome, Reason};
use mesh_core::{
    route::{http::Backend, sight::Sight},
    snapshot::Snapshot,
};

use crate::node::proxy_config::words;

/// What becomes of connections to an address that nothing describes, unless they say a name that something does; `None`: they go there.
pub(super) fn undescribed(snapshot: &Snapshot, sight: &Sight<'_>, dialled: SocketAddr) -> Option<String> {
    const NOTHING: &str = "nothing that the pod sees describes it";
    if sight.refuses(dialled) {
        return Some(format!("{NOTHING}: refused, as the outbound policy is REGISTRY_ONLY"));
    }
    let proxy = sight.egress_proxy_to(dialled)?;
    let (to, _) = words::backend(snapshot, &proxy.backend);
    let origin = &proxy.origin;
    Some(match &proxy.backend {
        Backend::Cluster(_) => format!("{NOTHING}: sent to {to} by {origin}"),
        Backend::Broken { .. } => format!("{NOTHING}: refused ({to}), as {origin} leads nowhere"),
    })
}

/// What a connect hook's decision means.
pub(super) fn connect(outcome: Outcome, reason: Reason) -> &'static str {
    match reason {
        Reason::Loopback => "a loopback address never leaves the pod, so the mesh has no part in it",
        Reason::OwnAddress => "it is the pod's own address; the mesh has no part in it",
        Reason::ExcludedPort => "the pod excludes this port from capture",
        Reason::ExcludedPrefix => "the pod excludes this destination from capture",
        Reason::UnknownDestination => match outcome {
            Outcome::Proxy => "neither a service nor a pod of the mesh; the agent carries it outside",
            Outcome::Bypass
            | Outcome::Direct
            | Outcome::Deny
            | Outcome::Pass
            | Outcome::Drop
            | Outcome::Capture
            | Outcome::Error => {
                "neither a service nor a pod of the mesh; the kernel routes it as if there were no mesh"
            }
        },
        Reason::NoEndpoints => match outcome {
            Outcome::Proxy => {
                "the service has no ready endpoint, and something is said about its requests or connections: the agent answers or \
                 sends them elsewhere"
            }
            Outcome::Bypass
            | Outcome::Direct
            | Outcome::Deny
            | Outcome::Pass
            | Outcome::Drop
            | Outcome::Capture
            | Outcome::Error => "the service has no ready endpoint; the app gets an error at once",
        },
        Reason::L7 => "the service needs its requests looked at, so the agent carries it",
        Reason::Hairpin => "the backend is the client itself; it connects to itself over loopback",
        Reason::Unmeshed => "the backend is not in the mesh; the kernel connects to it without the agent",
        Reason::PlainPeer => {
            "the backend's policy wants plaintext (mode DISABLE); the kernel connects without the agent"
        }
        Reason::RemotePeer => "the backend is on another node, so the agent carries it",
        Reason::NoVerdict => {
            "no verdict about this pair is cached yet; the agent decides, carries this one, and caches the verdict"
        }
        Reason::StaleVerdict => {
            "the policy or the backend changed since the verdict was cached; the agent decides anew"
        }
        Reason::VerdictAllow => {
            "a cached verdict allows it; the kernel connects the two sockets without the agent"
        }
        Reason::VerdictDeny => "a cached verdict denies it; the app gets an error at once",
        Reason::AgentDown => match outcome {
            Outcome::Direct => {
                "the agent is down and this pod fails open; the kernel connects to a backend without it"
            }
            Outcome::Bypass
            | Outcome::Proxy
            | Outcome::Deny
            | Outcome::Pass
            | Outcome::Drop
            | Outcome::Capture
            | Outcome::Error => {
                "the agent is down and this pod fails open; the kernel routes it as if there were no mesh"
            }
        },
        Reason::NoListener => {
            "the agent does not listen in this pod, which fails open; the kernel connects without it"
        }
        Reason::FailClosed => {
            "the agent is down and this pod's outbound direction is closed then; the app gets an error"
        }
        // The hooks count these; a decision about a TCP connect has none of them.
        Reason::Ok
        | Reason::OwnSocket
        | Reason::OtherProtocol
        | Reason::NoOutboundPort
        | Reason::StorageFull
        | Reason::TicketsFull
        | Reason::TicketCap
        | Reason::ForgedSource
        | Reason::OrigDstMiss
        | Reason::OrigDstFull
        | Reason::ClientAddrFull
        | Reason::Ticket
        | Reason::TicketExpired
        | Reason::TicketStale
        | Reason::PrivatePort
        | Reason::Hbone
        | Reason::Captured
        | Reason::AssignFailed
        | Reason::Udp
        | Reason::Dns
        | Reason::UdpService
        | Reason::Probe
        | Reason::MapFull
        | Reason::EventLost
        | Reason::NotEnrolled
        | Reason::Shown
        | Reason::Restored => "see the reason",
    }
}

/// What happens to an arrival at the server.
pub(super) fn arrival(outcome: Outcome, reason: Reason) -> &'static str {
    match (outcome, reason) {
        (Outcome::Pass, Reason::ExcludedPort) => {
            "the port is excluded from capture: the app gets it as it is"
        }
        (Outcome::Pass, Reason::Ticket) => "the kernel's ticket proves where it comes from: the app gets it",
        (Outcome::Pass, Reason::Hbone) => {
            "the agent of the server's node takes it by HBONE, knows the client by its certificate, and its policy allows \
             it: the app gets it"
        }
        (Outcome::Pass, Reason::AgentDown) => "plaintext is let through to the app",
        (Outcome::Capture, _) => {
            "the agent of the server's node takes it and its policy allows plaintext: the app gets it"
        }
        (Outcome::Drop, Reason::FailClosed) => "plaintext is refused by the kernel",
        _ => "see the reason",
    }
}
