//! HBONE by other hands: a client and a server of HTTP/2 CONNECT over mutual TLS, from the `h2` and
//! `tokio-rustls` crates, the way Istio's ztunnel is built. They share no code with the agent's data path, so
//! what passes between them and an agent is compatible.
//!
//! Sockets are made inside a [`crate::Place`]'s namespace by the test process itself: the cgroup programs of an
//! agent do not see them, `sk_lookup` programs do.

mod client;
mod grpc;
mod knock;
mod server;
mod tls;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::runtime::{Builder, Handle};

use crate::authority::AuthorityError;
use crate::netns::NetNsError;
use crate::waiting::limit;

pub use client::{Connect, Session, Tunnel};
pub use grpc::{CallOutcome, request_certificate, request_certificate_here};
pub use knock::{Answer, End, client_hello_of_tls12, half_open, knock, raise_descriptor_limit};
pub use server::{HboneServer, Seen};

/// Where HBONE listens in a pod.
pub const PORT: u16 = 15008;

/// All addresses of a place, both families, with this port: where a server listens.
#[must_use]
pub fn everywhere(port: u16) -> SocketAddr {
    SocketAddr::from(([0u16; 8], port))
}

/// No step of a client takes longer.
const STEP_LIMIT: Duration = Duration::from_secs(5);

/// What an HBONE client or server can end with.
#[derive(Debug, thiserror::Error)]
pub enum HboneError {
    /// A socket call.
    #[error("cannot {doing}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// HTTP/2, or the TLS below it, which then is the cause.
    #[error("{doing}: {source}")]
    Http2 {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: h2::Error,
    },
    /// The server refused the CONNECT.
    #[error("CONNECT {authority} was answered {status}")]
    Refused {
        /// What was asked for.
        authority: String,
        /// How it was answered.
        status: u16,
    },
    /// A request that cannot be written down.
    #[error("not a request")]
    Request(#[from] http::Error),
    /// Nothing happened in time.
    #[error("{doing}: nothing within {waited:?}")]
    TimedOut {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        waited: Duration,
    },
    /// Bytes that no server of the harness sends.
    #[error("not an identity: {0:?}")]
    Gibberish(String),
    /// Certificates.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
}

impl HboneError {
    /// The status that the server answered with, if it did.
    #[must_use]
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Whether TLS failed, as far as the client was told: an alert, or an end before the first frame.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        match self {
            Self::Io { .. } => true,
            Self::Http2 { source, .. } => source.is_io(),
            _ => false,
        }
    }
}

/// The runtime on which all connections of the process live: one thread in the process's own namespace. Sockets
/// are made elsewhere and stay where they were made.
pub(crate) fn runtime() -> &'static Handle {
    static RUNTIME: OnceLock<Handle> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            #[expect(clippy::expect_used, reason = "without a runtime no test of this process can go on")]
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            drop(sender.send(runtime.handle().clone()));
            runtime.block_on(std::future::pending::<()>());
        });
        #[expect(clippy::expect_used, reason = "the thread above sends it or panics")]
        receiver.recv().expect("the runtime's thread")
    })
}

/// Wait for `work`, at most [`STEP_LIMIT`] (scaled).
fn within<T>(
    doing: &'static str,
    work: impl Future<Output = Result<T, HboneError>>,
) -> Result<T, HboneError> {
    let waited = limit(STEP_LIMIT);
    runtime().block_on(async {
        tokio::time::timeout(waited, work).await.map_err(|_| HboneError::TimedOut { doing, waited })?
    })
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> HboneError {
    move |source| HboneError::Io { doing, source }
}

fn http2_error(doing: &'static str) -> impl FnOnce(h2::Error) -> HboneError {
    move |source| HboneError::Http2 { doing, source }
}
