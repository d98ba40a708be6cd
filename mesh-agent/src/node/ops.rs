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
    beat::Silence,
    http::{self, Answer, Answers, Query},
    shared::Shared,
};
use crate::{report::report, view::Phase};

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";
/// A worker stamps each 100 ms from when it begins. One that has not by now does not run at all.
const FIRST_STAMP_WITHIN_NS: u64 = 60_000_000_000;
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
}

fn ready((phase, waiting_for): (Phase, Vec<String>)) -> Result<&'static str, String> {
    match phase {
        Phase::Ready => Ok("ready\n"),
        Phase::Starting => Err(format!("starting, waits for: {}\n", waiting_for.join("; "))),
        Phase::Draining => Err("draining\n".to_owned()),
    }
}

/// Dead workers are worth a restart; an unready agent is not.
fn health(silence: Silence) -> Result<&'static str, String> {
    let (ns, who, limit_ns) = match silence {
        Silence::SinceStamp(ns) => (ns, "a worker", HEARTBEAT_STALE_NS),
        Silence::SinceStart(ns) => (ns, "some worker", FIRST_STAMP_WITHIN_NS),
    };
    if ns > limit_ns {
        Err(format!("{who} has not been seen for {} ms\n", ns / 1_000_000))
    } else {
        Ok("ok\n")
    }
}

fn probe(found: Result<&'static str, String>) -> Answer {
    match found {
        Ok(well) => http::text(StatusCode::OK, PLAIN, well),
        Err(why) => http::text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, why),
    }
}

impl Answers for Ops {
    async fn get(&self, path: &str, _query: &Query) -> Answer {
        match path {
            "/metrics" => self.metrics().await,
            "/readyz" => probe(ready(self.shared.readiness.now())),
            "/healthz" => probe(health(self.shared.beat.silence(monotonic_ns()))),
            _ => http::text(StatusCode::NOT_FOUND, PLAIN, "try /metrics, /readyz or /healthz\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::readiness::Readiness;

    #[test]
    fn an_agent_is_not_ready_before_its_first_snapshot_and_says_what_it_waits_for() {
        let readiness = Readiness::new();
        let why = ready(readiness.now()).unwrap_err();
        assert_eq!(why, "starting, waits for: the kernel programs and the first snapshot\n");
        assert_eq!(probe(Err(why)).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(readiness.report(Vec::new()));
        assert_eq!(ready(readiness.now()), Ok("ready\n"));
        readiness.drain();
        assert_eq!(ready(readiness.now()), Err("draining\n".to_owned()));
    }

    #[test]
    fn a_worker_that_is_not_seen_makes_the_agent_unhealthy() {
        let why = health(Silence::SinceStamp(HEARTBEAT_STALE_NS + 1)).unwrap_err();
        assert_eq!(why, "a worker has not been seen for 3000 ms\n");
        assert_eq!(probe(Err(why)).status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(health(Silence::SinceStamp(HEARTBEAT_STALE_NS)), Ok("ok\n"));
        // Threads of a busy machine begin late.
        assert_eq!(health(Silence::SinceStart(HEARTBEAT_STALE_NS * 10)), Ok("ok\n"));
        let why = health(Silence::SinceStart(FIRST_STAMP_WITHIN_NS + 1)).unwrap_err();
        assert_eq!(why, "some worker has not been seen for 60000 ms\n");
        assert_eq!(probe(Ok("ok\n")).status(), StatusCode::OK);
    }
}
