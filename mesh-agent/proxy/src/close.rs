//! Why connections end: the closed set behind metric labels, logs and views.
//!
//! Invariant: every connection that a listener accepts ends with exactly one [`CloseReason`].

use serde::Serialize;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CloseReason {
    /// The task that carried it failed; a defect of the agent.
    Bug,
    /// The client's side failed without a reset, e.g. its address went away.
    ClientLost,
    /// The client reset it.
    ClientReset,
    /// The drain's grace period was over.
    Drained,
    /// Both sides ended their streams.
    Finished,
    /// No byte in either direction for the idle time-out.
    IdleTimeout,
    /// It asked for an address that is not the pod's own, or for the agent's own port.
    Misdirected,
    /// The service has no endpoint that takes connections.
    NoEndpoint,
    /// The kernel holds no original destination for it.
    OriginalDstMiss,
    /// More connections than the agent or the pod may hold.
    Overloaded,
    /// The destination's policy refused it.
    PolicyDenied,
    /// No upstream socket could be made in the pod's namespace.
    SocketFailed,
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
    /// Every reason, in the order of the declaration.
    pub const ALL: [Self; 17] = [
        Self::Bug,
        Self::ClientLost,
        Self::ClientReset,
        Self::Drained,
        Self::Finished,
        Self::IdleTimeout,
        Self::Misdirected,
        Self::NoEndpoint,
        Self::OriginalDstMiss,
        Self::Overloaded,
        Self::PolicyDenied,
        Self::SocketFailed,
        Self::UpstreamLost,
        Self::UpstreamRefused,
        Self::UpstreamReset,
        Self::UpstreamTimeout,
        Self::UpstreamUnreachable,
    ];

    /// Metric label and log value: stable, never derived from an error's text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bug => "bug",
            Self::ClientLost => "client_lost",
            Self::ClientReset => "client_reset",
            Self::Drained => "drained",
            Self::Finished => "finished",
            Self::IdleTimeout => "idle_timeout",
            Self::Misdirected => "misdirected",
            Self::NoEndpoint => "no_endpoint",
            Self::OriginalDstMiss => "original_dst_miss",
            Self::Overloaded => "overloaded",
            Self::PolicyDenied => "policy_denied",
            Self::SocketFailed => "socket_failed",
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
            Self::ClientLost | Self::ClientReset | Self::Finished => Side::Downstream,
            Self::UpstreamLost
            | Self::UpstreamRefused
            | Self::UpstreamReset
            | Self::UpstreamTimeout
            | Self::UpstreamUnreachable => Side::Upstream,
            Self::Bug
            | Self::Drained
            | Self::IdleTimeout
            | Self::Misdirected
            | Self::NoEndpoint
            | Self::OriginalDstMiss
            | Self::Overloaded
            | Self::PolicyDenied
            | Self::SocketFailed => Side::Local,
        }
    }

    /// Istio's `response_flags` label.
    pub const fn response_flags(self) -> &'static str {
        match self {
            Self::Finished => "-",
            Self::ClientLost | Self::ClientReset => "DC",
            Self::IdleTimeout => "SI",
            Self::NoEndpoint => "UH",
            Self::Overloaded => "UO",
            Self::PolicyDenied => "UAEX",
            Self::UpstreamLost | Self::UpstreamReset => "UC",
            Self::UpstreamRefused | Self::UpstreamTimeout | Self::UpstreamUnreachable => "UF",
            Self::Bug | Self::Drained | Self::Misdirected | Self::OriginalDstMiss | Self::SocketFailed => {
                "LR"
            }
        }
    }

    /// Whether the peer that is still there learns of it by a reset rather than by an orderly end.
    pub const fn resets(self) -> bool {
        !matches!(self, Self::Finished)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_listed_once_at_its_own_index() {
        for (index, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index, "{reason:?}");
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
