//! What is said when no endpoint answered: the statuses, flags and texts of Istio's proxy.

use super::super::exchange::{Failure, Flag};
use crate::close::CloseReason;

/// Why a try came to nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// No connection to the endpoint.
    ConnectFailed,
    /// No connection within the time for one.
    ConnectTimeout,
    /// A connection, but not what the destination's policy puts between.
    TransportFailed(CloseReason),
    /// The endpoint ended the connection before it answered.
    ConnectionEnded {
        /// Whether something of the request may have left.
        sent: bool,
    },
    /// The endpoint's policy refuses the client.
    Denied,
    /// No endpoint takes requests.
    NoHealthy,
    /// The destination does not exist.
    NoCluster,
    /// A limit of the destination is reached.
    Overflow,
    /// The endpoint's response could not be read.
    Protocol,
    /// The endpoint refused the stream before it processed it.
    Refused,
    /// The endpoint reset the stream before it answered.
    StreamReset,
    /// The client's side broke off.
    LocalReset,
    /// The request's time is over.
    TimedOut,
    /// The time of one try is over.
    TryTimedOut,
    /// The host that the request is for leads nowhere.
    Unresolved,
}

impl Fault {
    /// What the client is told.
    pub(super) fn failure(self) -> Failure {
        let (status, flag, details, text) = match self {
            Self::ConnectFailed => (
                503,
                Flag::UpstreamFailure,
                "upstream_reset_before_response_started{remote_connection_failure}",
                "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure",
            ),
            Self::TransportFailed(reason) => (
                503,
                Flag::UpstreamFailure,
                // The same words as in metrics and logs of connections.
                reason.as_str(),
                "upstream connect error or disconnect/reset before headers. reset reason: remote connection failure",
            ),
            Self::ConnectTimeout => (
                503,
                Flag::UpstreamFailure,
                "upstream_reset_before_response_started{connection_timeout}",
                "upstream connect error or disconnect/reset before headers. reset reason: connection timeout",
            ),
            Self::ConnectionEnded { .. } => (
                503,
                Flag::UpstreamClosed,
                "upstream_reset_before_response_started{connection_termination}",
                "upstream connect error or disconnect/reset before headers. reset reason: connection termination",
            ),
            Self::Denied => (403, Flag::Unauthorized, "rbac_access_denied", "RBAC: access denied"),
            Self::NoHealthy => (503, Flag::NoHealthyUpstream, "no_healthy_upstream", "no healthy upstream"),
            Self::NoCluster => (503, Flag::NoCluster, "cluster_not_found", ""),
            Self::Overflow => (
                503,
                Flag::Overflow,
                "upstream_reset_before_response_started{overflow}",
                "upstream connect error or disconnect/reset before headers. reset reason: overflow",
            ),
            Self::Protocol => (
                502,
                Flag::UpstreamProtocolError,
                "upstream_reset_before_response_started{protocol_error}",
                "upstream connect error or disconnect/reset before headers. reset reason: protocol error",
            ),
            Self::Refused | Self::StreamReset => (
                503,
                Flag::UpstreamReset,
                "upstream_reset_before_response_started{remote_reset}",
                "upstream connect error or disconnect/reset before headers. reset reason: remote reset",
            ),
            Self::LocalReset => (
                503,
                Flag::LocalReset,
                "upstream_reset_before_response_started{local_reset}",
                "upstream connect error or disconnect/reset before headers. reset reason: local reset",
            ),
            Self::Unresolved => (503, Flag::DnsFailure, "dns_resolution_failure", "DNS resolution failure"),
            Self::TimedOut => (504, Flag::UpstreamTimeout, "response_timeout", "upstream request timeout"),
            Self::TryTimedOut => {
                (504, Flag::UpstreamTimeout, "upstream_per_try_timeout", "upstream request timeout")
            }
        };
        let text = match self {
            Self::TransportFailed(reason) => {
                format!("{text}, transport failure reason: {}", reason.as_str()).into()
            }
            _ => text.into(),
        };
        Failure { status, flag, details, text, overloaded: self == Self::Overflow }
    }
}
