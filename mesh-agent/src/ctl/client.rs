//! Owns the way of a question to an agent: over the admin socket of this host, one HTTP/1.1 request and one JSON answer, or through a
//! cluster's API server to the agent of another node, where `meshctl ask` does the same.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::cluster::{AgentPod, Cluster, ClusterError};
use crate::view::ErrorView;

/// Largest answer accepted: 100 000 connections of 500 bytes each, and some.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why there is no answer. Each message names the socket and says what to do.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    #[error(
        "no agent listens at {socket}; start one with `mesh-agent node --config DIR`, or name its socket with \
         --admin-socket PATH or MESH_ADMIN_SOCKET"
    )]
    NoAgent {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("not allowed to open {socket}; run meshctl as the user of the agent (root)")]
    NotAllowed {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("connect to the agent at {socket}")]
    Connect {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the agent at {socket} did not answer within {limit:?}; its log may say why")]
    TimedOut { socket: PathBuf, limit: Duration },
    #[error("talk HTTP with the agent at {socket}")]
    Http {
        socket: PathBuf,
        #[source]
        source: hyper::Error,
    },
    #[error("read the answer of the agent at {socket}")]
    Body {
        socket: PathBuf,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{error}")]
    Refused { error: String },
    #[error(
        "the agent at {socket} answers in a form this meshctl ({}) does not know; use the meshctl of the \
         agent's version", env!("CARGO_PKG_VERSION")
    )]
    Decode {
        socket: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("start a runtime")]
    Runtime {
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

/// An agent that can be asked.
#[derive(Debug)]
pub(super) enum Client {
    /// The one of this host.
    Socket(AdminSocket),
    /// One in a cluster.
    Remote(Box<Remote>),
}

/// An agent in a cluster. The runtime carries the connection to the API server between questions.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) runtime: tokio::runtime::Runtime,
    pub(super) cluster: Cluster,
    pub(super) agent: AgentPod,
}

impl Client {
    pub(super) fn new(socket: &Path) -> Self {
        Self::Socket(AdminSocket::new(socket))
    }

    /// Asks one question. Blocking: until the answer is there or `within` has passed.
    pub(super) fn ask<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
        within: Duration,
    ) -> Result<T, AskError> {
        match self {
            Self::Socket(socket) => socket.ask(path, query, within),
            Self::Remote(remote) => {
                let Remote { runtime, cluster, agent } = &**remote;
                Ok(runtime.block_on(cluster.ask(agent, path, query, within))?)
            }
        }
    }
}

/// An agent's admin socket.
#[derive(Debug)]
pub(super) struct AdminSocket {
    path: PathBuf,
}

impl AdminSocket {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn ask<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, &str)],
        within: Duration,
    ) -> Result<T, AskError> {
        let (status, body) = self.get(&target(path, query), within)?;
        if status != StatusCode::OK {
            let error = serde_json::from_slice::<ErrorView>(&body).map_or_else(
                |_| format!("the agent at {} answered {status}", self.path.display()),
                |v| v.error,
            );
            return Err(AskError::Refused { error });
        }
        serde_json::from_slice(&body).map_err(|source| AskError::Decode { socket: self.path.clone(), source })
    }

    /// Gets one path as it is, whatever the answer.
    pub(super) fn get(&self, target: &str, within: Duration) -> Result<(StatusCode, Bytes), AskError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| AskError::Runtime { source })?;
        let answer = runtime.block_on(async { tokio::time::timeout(within, self.exchange(target)).await });
        answer.map_err(|_| AskError::TimedOut { socket: self.path.clone(), limit: within })?
    }

    async fn exchange(&self, target: &str) -> Result<(StatusCode, Bytes), AskError> {
        let socket = || self.path.clone();
        let stream = UnixStream::connect(&self.path).await.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                AskError::NoAgent { socket: socket(), source }
            }
            io::ErrorKind::PermissionDenied => AskError::NotAllowed { socket: socket(), source },
            _ => AskError::Connect { socket: socket(), source },
        })?;
        let http = |source| AskError::Http { socket: socket(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        let request = Request::get(target)
            .header(hyper::header::HOST, "nodemesh")
            .body(Empty::<Bytes>::new())
            .map_err(|source| AskError::Body { socket: socket(), source: source.into() })?;
        let answer = async {
            let response = sender.send_request(request).await.map_err(http)?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|source| AskError::Body { socket: socket(), source })?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(answer);
        tokio::pin!(connection);
        let mut open = true;
        loop {
            tokio::select! {
                answer = &mut answer => return answer,
                // The connection's own failure reaches the caller through the request.
                _ = &mut connection, if open => open = false,
            }
        }
    }
}

/// Path and query, percent-encoded.
pub(super) fn target(path: &str, query: &[(&str, &str)]) -> String {
    let mut out = path.to_owned();
    for (i, (key, value)) in query.iter().enumerate() {
        out.push(if i == 0 { '?' } else { '&' });
        out.push_str(key);
        out.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) {
                out.push(char::from(byte));
            } else {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_socket_is_named_with_what_to_do() {
        let client = Client::new(Path::new("/nonexistent/admin.sock"));
        let error = client.ask::<ErrorView>("/status", &[], Duration::from_secs(1)).unwrap_err();
        let text = crate::report::report(&error);
        assert!(text.contains("/nonexistent/admin.sock"), "{text}");
        assert!(text.contains("--admin-socket"), "{text}");
    }

    #[test]
    fn queries_are_percent_encoded() {
        assert_eq!(
            target("/explain", &[("from", "a/b"), ("to", "[fd00::1]:80"), ("x", "ä &")]),
            "/explain?from=a/b&to=%5Bfd00::1%5D:80&x=%C3%A4%20%26"
        );
        assert_eq!(target("/status", &[]), "/status");
    }
}
