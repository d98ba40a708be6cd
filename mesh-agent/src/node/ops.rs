//! Owns the metrics address: `/metrics`, `/readyz`, `/healthz`.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper::StatusCode;
use mesh_common::limits::HEARTBEAT_STALE_NS;
use mesh_redirect::monotonic_ns;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};

use super::{
    http::{self, Answer, Answers, Query},
    shared::Shared,
};
use crate::{report::report, view::Phase};

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";
/// Pause between two tries to listen.
const TRY_EACH: Duration = Duration::from_millis(100);

/// The address cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("listen for metrics at {addr}; name another address with --metrics")]
pub(super) struct ListenError {
    addr: SocketAddr,
    #[source]
    source: io::Error,
}

/// Listens, waiting up to `wait` for a draining predecessor to let go of the address.
pub(super) async fn listen(addr: SocketAddr, wait: Duration) -> Result<TcpListener, ListenError> {
    let give_up = Instant::now() + wait;
    loop {
        match TcpListener::bind(addr).await {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < give_up => {
                sleep(TRY_EACH).await;
            }
            Err(source) => return Err(ListenError { addr, source }),
        }
    }
}

/// Answers probes and scrapes.
#[derive(Debug)]
pub(super) struct Ops {
    shared: Arc<Shared>,
    /// Locked while a scrape is encoded, on the blocking pool.
    registry: Arc<Mutex<Registry>>,
}

impl Ops {
    pub(super) fn new(shared: &Arc<Shared>, registry: &Arc<Mutex<Registry>>) -> Self {
        Self { shared: Arc::clone(shared), registry: Arc::clone(registry) }
    }

    async fn metrics(&self) -> Answer {
        let (registry, shared) = (Arc::clone(&self.registry), Arc::clone(&self.shared));
        let encoded = tokio::task::spawn_blocking(move || {
            if let Err(error) = shared.fold_direct() {
                tracing::warn!(error = %report(&error), "read the edges");
            }
            let mut body = String::new();
            let registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
            prometheus_client::encoding::text::encode(&mut body, &registry).map(|()| body)
        });
        match encoded.await {
            Ok(Ok(body)) => http::text(StatusCode::OK, OPENMETRICS, body),
            Ok(Err(_)) | Err(_) => {
                http::text(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, "the metrics could not be encoded\n")
            }
        }
    }

    fn ready(&self) -> Answer {
        let (phase, waiting_for) = self.shared.readiness.now();
        match phase {
            Phase::Ready => http::text(StatusCode::OK, PLAIN, "ready\n"),
            Phase::Starting => {
                let body = format!("starting, waits for: {}\n", waiting_for.join("; "));
                http::text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, body)
            }
            Phase::Draining => http::text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, "draining\n"),
        }
    }

    /// Dead workers are worth a restart; an unready agent is not.
    fn health(&self) -> Answer {
        match self.shared.beat.age_ns(monotonic_ns()) {
            Some(age_ns) if age_ns > HEARTBEAT_STALE_NS => {
                let body = format!("a worker has not been seen for {} ms\n", age_ns / 1_000_000);
                http::text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, body)
            }
            Some(_) | None => http::text(StatusCode::OK, PLAIN, "ok\n"),
        }
    }
}

impl Answers for Ops {
    async fn get(&self, path: &str, _query: &Query) -> Answer {
        match path {
            "/metrics" => self.metrics().await,
            "/readyz" => self.ready(),
            "/healthz" => self.health(),
            _ => http::text(StatusCode::NOT_FOUND, PLAIN, "try /metrics, /readyz or /healthz\n"),
        }
    }
}
