//! Why connections end: the closed set behind metric labels, logs and views.
//!
//! Invariant: every connection that a listener accepts ends with exactly one [`CloseReason`].

use mesh_identity::PeerError;
use serde::{Serialize, Serializer};

/// Which direction of a pod's traffic a connection belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Towards a local workload.
    Inbound,
    /// From a local workload.
    Outbound,
}

impl Direction {
    /// Metric label and view value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// Who ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The client.
    Downstream,
    /// The server.
    Upstream,
    /// This agent.
    Local,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// Nothing that the pod sees describes what it dialled, and its outbound policy is REGISTRY_ONLY.
    BlackHole,
    /// The task that carried it failed; a defect of the agent.
    Bug,
    /// The pod has no certificate yet, or none that is still valid.
    CertificateMissing,
    /// The client's side failed without a reset, e.g. its address went away.
    ClientLost,
    /// The client broke the rules of its protocol.
    ClientProtocol,
    /// The client reset it.
    ClientReset,
    /// The drain's grace period was over.
    Drained,
    /// Both sides ended their streams.
    Finished,
    /// No byte in either direction for the idle time-out.
    IdleTimeout,
    /// A request in a tunnel with other headers than CONNECT needs, or too many of them.
    HboneHeaders,
    /// A request in a tunnel for one of the agent's own ports.
    HbonePort,
    /// A request in a tunnel for an address that is not the pod's own.
    HboneTarget,
    /// It has lived as long as its destination's policy allows.
    MaxDuration,
    /// It asked for an address that is not the pod's own, or for the agent's own port.
    Misdirected,
    /// A rule sends it to what does not exist.
    NoCluster,
    /// The service has no endpoint that takes connections.
    NoEndpoint,
    /// The kernel holds no original destination for it.
    OriginalDstMiss,
    /// As many connections to its destination as that one's policy allows.
    Overflow,
    /// More connections than the agent or the pod may hold.
    Overloaded,
    /// The destination's policy refused it.
    PolicyDenied,
    /// The HTTP proxy that its destination's policy names did not take it.
    ProxyRefused,
    /// No upstream socket could be made in the pod's namespace.
    SocketFailed,
    /// The peer, or what it sent in the TLS handshake, was refused; or it refused us.
    Tls(PeerError),
    /// The TLS that its destination's policy wants cannot be set up.
    TlsSetup,
    /// The TLS handshake took too long.
    TlsTimeout,
    /// More TLS handshakes at once than the agent or the pod may have.
    TooManyHandshakes,
    /// The tunnel that carried it ended.
    TunnelLost,
    /// The agent on the other side did not take it.
    TunnelRefused,
    /// The server's side failed without a reset.
    UpstreamLost,
    /// The server refused the connection.
    UpstreamRefused,
    /// The server reset it.
    UpstreamReset,
    /// The server did not answer the connect in time.
    UpstreamTimeout,
    /// No way to the server, e.g. no route.
    UpstreamUnreachable,
}

impl CloseReason {
    /// The reasons without those of TLS handshakes.
    const PLAIN: [Self; 32] = [
        Self::BlackHole,
        Self::Bug,
        Self::CertificateMissing,
        Self::ClientLost,
        Self::ClientProtocol,
        Self::ClientReset,
        Self::Drained,
        Self::Finished,
        Self::HboneHeaders,
        Self::HbonePort,
        Self::HboneTarget,
        Self::IdleTimeout,
        Self::MaxDuration,
        Self::Misdirected,
        Self::NoCluster,
        Self::NoEndpoint,
        Self::OriginalDstMiss,
        Self::Overflow,
        Self::Overloaded,
        Self::PolicyDenied,
        Self::ProxyRefused,
        Self::SocketFailed,
        Self::TlsSetup,
        Self::TlsTimeout,
        Self::TooManyHandshakes,
        Self::TunnelLost,
        Self::TunnelRefused,
        Self::UpstreamLost,
        Self::UpstreamRefused,
        Self::UpstreamReset,
        Self::UpstreamTimeout,
        Self::UpstreamUnreachable,
    ];

    /// Every reason: the plain ones, then those of TLS handshakes.
    pub const ALL: [Self; Self::PLAIN.len() + PeerError::ALL.len()] = {
        let mut all = [Self::Bug; Self::PLAIN.len() + PeerError::ALL.len()];
        let mut at = 0;
        while at < all.len() {
            all[at] = if at < Self::PLAIN.len() {
                Self::PLAIN[at]
            } else {
                Self::Tls(PeerError::ALL[at - Self::PLAIN.len()])
            };
            at += 1;
        }
        all
    };

    /// Its place in [`Self::ALL`].
    pub fn index(self) -> usize {
        // Every reason is in the list, as a test shows.
        Self::ALL.iter().position(|reason| *reason == self).unwrap_or(0)
    }

    /// Metric label and log value: stable, never derived from an error's text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tls(reason) => reason.as_str(),
            Self::BlackHole => "black_hole",
            Self::Bug => "bug",
            Self::CertificateMissing => "certificate_missing",
            Self::ClientLost => "client_lost",
            Self::ClientProtocol => "client_protocol",
            Self::ClientReset => "client_reset",
            Self::Drained => "drained",
            Self::Finished => "finished",
            Self::HboneHeaders => "hbone_headers",
            Self::HbonePort => "hbone_port",
            Self::HboneTarget => "hbone_target",
            Self::IdleTimeout => "idle_timeout",
            Self::MaxDuration => "max_duration",
            Self::Misdirected => "misdirected",
            Self::NoCluster => "no_cluster",
            Self::NoEndpoint => "no_endpoint",
            Self::OriginalDstMiss => "original_dst_miss",
            Self::Overflow => "overflow",
            Self::Overloaded => "overloaded",
            Self::PolicyDenied => "policy_denied",
            Self::ProxyRefused => "proxy_refused",
            Self::SocketFailed => "socket_failed",
            Self::TlsSetup => "tls_setup",
            Self::TlsTimeout => "tls_timeout",
            Self::TooManyHandshakes => "tls_too_many_handshakes",
            Self::TunnelLost => "tunnel_lost",
            Self::TunnelRefused => "tunnel_refused",
            Self::UpstreamLost => "upstream_lost",
            Self::UpstreamRefused => "upstream_refused",
            Self::UpstreamReset => "upstream_reset",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::UpstreamUnreachable => "upstream_unreachable",
        }
    }

    /// Who ended it.
    pub const fn side(self) -> Side {
        match self {
            Self::ClientLost
            | Self::ClientProtocol
            | Self::ClientReset
            | Self::Finished
            | Self::HboneHeaders
            | Self::HbonePort
            | Self::HboneTarget => Side::Downstream,
            Self::ProxyRefused
            | Self::TunnelLost
            | Self::TunnelRefused
            | Self::UpstreamLost
            | Self::UpstreamRefused
            | Self::UpstreamReset
            | Self::UpstreamTimeout
            | Self::UpstreamUnreachable => Side::Upstream,
            Self::BlackHole
            | Self::Bug
            | Self::CertificateMissing
            | Self::Drained
            | Self::IdleTimeout
            | Self::MaxDuration
            | Self::Misdirected
            | Self::NoCluster
            | Self::NoEndpoint
            | Self::OriginalDstMiss
            | Self::Overflow
            | Self::Overloaded
            | Self::PolicyDenied
            | Self::SocketFailed
            | Self::TlsSetup
            | Self::TlsTimeout
            | Self::TooManyHandshakes
            | Self::Tls(_) => Side::Local,
        }
    }

    /// Istio's `response_flags` label.
    pub const fn response_flags(self) -> &'static str {
        match self {
            Self::Bug
            | Self::CertificateMissing
            | Self::Drained
            | Self::HboneHeaders
            | Self::HbonePort
            | Self::HboneTarget
            | Self::Misdirected
            | Self::OriginalDstMiss
            | Self::SocketFailed => "LR",
            Self::ClientLost | Self::ClientReset => "DC",
            Self::ClientProtocol => "DPE",
            Self::Finished => "-",
            Self::IdleTimeout => "SI",
            Self::MaxDuration => "DT",
            Self::NoCluster => "NC",
            Self::BlackHole | Self::NoEndpoint => "UH",
            Self::Overflow | Self::Overloaded | Self::TooManyHandshakes => "UO",
            Self::PolicyDenied => "UAEX",
            Self::ProxyRefused
            | Self::TlsSetup
            | Self::TlsTimeout
            | Self::TunnelRefused
            | Self::UpstreamRefused
            | Self::UpstreamTimeout
            | Self::UpstreamUnreachable
            | Self::Tls(_) => "UF",
            Self::TunnelLost | Self::UpstreamLost | Self::UpstreamReset => "UC",
        }
    }

    /// Whether the peer that is still there learns of it by a reset rather than by an orderly end.
    pub const fn resets(self) -> bool {
        !matches!(self, Self::Finished)
    }
}

impl Serialize for CloseReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_listed_once_and_found_at_its_index() {
        for (index, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index, "{reason:?}");
        }
        for reason in PeerError::ALL {
            assert_eq!(CloseReason::ALL[CloseReason::Tls(reason).index()], CloseReason::Tls(reason));
        }
    }

    #[test]
    fn labels_are_distinct() {
        let mut labels: Vec<_> = CloseReason::ALL.iter().map(|r| r.as_str()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), CloseReason::ALL.len());
    }
}
