//! Dialling an upstream from a pod's namespace, with a time-out.

use std::{io, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use mesh_core::{policy::DenyReason, route::cluster::ConnectionPool};
use socket2::{SockRef, TcpKeepalive};
use tokio::time::timeout;

use crate::{
    close::CloseReason,
    hbone::TunnelFailure,
    kernel::{PodHandle, Sockets, UpstreamTags},
    layers::LayerError,
    outbound::Transport,
    stream::Stream,
};

/// Why there is no upstream connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// The destination's policy says no.
    #[error("refused by the policy of {addr}: {}", reason.as_str())]
    Denied {
        /// The endpoint.
        addr: SocketAddr,
        /// Which rule.
        reason: DenyReason,
    },
    /// The connect failed.
    #[error("connect to upstream {addr}")]
    Failed {
        /// The endpoint.
        addr: SocketAddr,
        /// The kernel's verdict.
        #[source]
        source: io::Error,
    },
    /// What its policy puts between could not be had.
    #[error("connection to upstream {addr}")]
    Layer {
        /// The endpoint.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// The destination has as many connections as it may.
    #[error("the destination has as many connections as its policy allows")]
    Limit,
    /// The service has no endpoint that takes connections.
    #[error("no endpoint takes connections")]
    NoEndpoint,
    /// The server is called by a name that leads nowhere.
    #[error("the name {name:?} leads nowhere: {why}")]
    Unresolved {
        /// The name.
        name: Arc<str>,
        /// Why.
        why: &'static str,
    },
    /// A rule sends it to what does not exist.
    #[error("no destination: {reason}")]
    Nowhere {
        /// What is missing.
        reason: Arc<str>,
    },
    /// Nothing that the pod sees describes it, and its outbound policy is REGISTRY_ONLY.
    #[error("nothing describes {addr}, and the outbound policy is REGISTRY_ONLY")]
    Unknown {
        /// What was dialled.
        addr: SocketAddr,
    },
    /// No socket could be made in the pod's namespace.
    #[error("make a socket for upstream {addr}")]
    Socket {
        /// The endpoint.
        addr: SocketAddr,
        /// The kernel's verdict.
        #[source]
        source: io::Error,
    },
    /// No tunnel, or the other side of it refused.
    #[error("tunnel to {addr}: {failure}")]
    Tunnel {
        /// The endpoint.
        addr: SocketAddr,
        /// Why.
        failure: Rc<TunnelFailure>,
    },
    /// No answer.
    #[error("upstream {addr} did not answer within {limit_ms} ms")]
    TimedOut {
        /// The endpoint.
        addr: SocketAddr,
        /// The time it had.
        limit_ms: u128,
    },
}

impl ConnectError {
    pub(crate) fn close_reason(&self) -> CloseReason {
        match self {
            Self::Denied { .. } => CloseReason::PolicyDenied,
            Self::Failed { source, .. } => match source.kind() {
                io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => {
                    CloseReason::UpstreamRefused
                }
                io::ErrorKind::TimedOut => CloseReason::UpstreamTimeout,
                _ => CloseReason::UpstreamUnreachable,
            },
            Self::Layer { source, .. } => source.close_reason(),
            Self::Limit => CloseReason::Overflow,
            Self::NoEndpoint | Self::Unresolved { .. } => CloseReason::NoEndpoint,
            Self::Nowhere { .. } => CloseReason::NoCluster,
            Self::Unknown { .. } => CloseReason::BlackHole,
            Self::Socket { .. } => CloseReason::SocketFailed,
            Self::TimedOut { .. } => CloseReason::UpstreamTimeout,
            Self::Tunnel { failure, .. } => failure.reason,
        }
    }

    /// Whether another endpoint may do better.
    pub(crate) fn is_endpoints_fault(&self) -> bool {
        match self {
            Self::Failed { .. } | Self::TimedOut { .. } => true,
            Self::Layer { source, .. } => !matches!(source, LayerError::Setup(_)),
            // Neither its policy nor our own lack of a certificate is better elsewhere.
            Self::Tunnel { failure, .. } => {
                !matches!(failure.reason, CloseReason::PolicyDenied | CloseReason::CertificateMissing)
            }
            Self::Denied { .. }
            | Self::Limit
            | Self::NoEndpoint
            | Self::Unresolved { .. }
            | Self::Nowhere { .. }
            | Self::Unknown { .. }
            | Self::Socket { .. } => false,
        }
    }
}

/// Opens a TCP connection to `addr` from `pod`'s namespace.
///
/// Cancel safety: dropping the future closes the socket.
pub(crate) async fn dial(
    sockets: &dyn Sockets,
    pod: &PodHandle,
    addr: SocketAddr,
    tags: &UpstreamTags,
    limit: Duration,
) -> Result<Stream, ConnectError> {
    let socket = sockets.tcp(pod, addr, tags).map_err(|source| ConnectError::Socket { addr, source })?;
    match timeout(limit, Stream::connect(socket, addr)).await {
        Ok(outcome) => outcome.map_err(|source| ConnectError::Failed { addr, source }),
        Err(_) => Err(ConnectError::TimedOut { addr, limit_ms: limit.as_millis() }),
    }
}

/// Has the kernel probe a silent connection, if its destination's policy says so. One in a tunnel has no socket of its own.
pub(crate) fn keep_alive(transport: &Transport, pool: &ConnectionPool) {
    if let Transport::Tcp(stream) = transport {
        probe(stream, pool);
    }
}

/// The same of a socket.
pub(crate) fn probe(stream: &Stream, pool: &ConnectionPool) {
    let Some((probes, idle, interval)) = pool.keepalive else { return };
    let mut keepalive = TcpKeepalive::new();
    if let Some(probes) = probes {
        keepalive = keepalive.with_retries(probes);
    }
    if let Some(idle) = idle {
        keepalive = keepalive.with_time(idle);
    }
    if let Some(interval) = interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Err(error) = SockRef::from(stream.socket()).set_tcp_keepalive(&keepalive) {
        // Numbers beyond what the kernel takes: the connection works without.
        tracing::debug!(%error, "TCP keep-alive was not set");
    }
}

/// Formats an error with its causes, once, where it is logged.
pub(crate) fn report(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
