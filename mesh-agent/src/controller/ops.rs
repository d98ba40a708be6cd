//! Owns what operators ask a controller over HTTP: `/metrics`, `/readyz`, `/healthz`, `/sessions`, `/resources`; the last two at the
//! loopback address only.
//!
//! Invariant: it answers from the controller's first moment on. Reading a large cluster, or waiting for its API server, may take longer than
//! the liveness probe's patience, and a restart would only begin it anew.

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::StatusCode;
use mesh_control::{
    publish::ads::Publication,
    source::pulse::{Pulse, STALE},
};
use mesh_identity::TrustMaterial;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use crate::node::http::{self, Answer, Answers, Query};

const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

/// Answers probes, scrapes and people.
#[derive(Debug)]
pub(super) struct Ops {
    registry: Mutex<Registry>,
    pulse: Pulse,
    /// Once agents can come.
    serving: OnceLock<Serving>,
    draining: AtomicBool,
}

#[derive(Debug)]
struct Serving {
    publication: Publication,
    trust: watch::Receiver<Arc<TrustMaterial>>,
}

impl Ops {
    /// Of a controller that starts. `pulse` is of the thread that compiles what is published.
    pub(super) fn new(registry: Registry, pulse: Pulse) -> Self {
        Self {
            registry: Mutex::new(registry),
            pulse,
            serving: OnceLock::new(),
            draining: AtomicBool::new(false),
        }
    }

    /// Agents can come from now on.
    pub(super) fn serve(&self, publication: Publication, trust: watch::Receiver<Arc<TrustMaterial>>) {
        self.serving.get_or_init(|| Serving { publication, trust });
    }

    /// Not ready from now on.
    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn metrics(&self) -> Answer {
        let mut body = String::new();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        match prometheus_client::encoding::text::encode(&mut body, &registry) {
            Ok(()) => http::text(StatusCode::OK, OPENMETRICS, body),
            Err(_) => {
                http::text(StatusCode::INTERNAL_SERVER_ERROR, PLAIN, "the metrics could not be encoded\n")
            }
        }
    }

    fn ready(&self) -> Result<&'static str, &'static str> {
        if self.draining.load(Ordering::Relaxed) {
            return Err("stopping\n");
        }
        let whole = |serving: &&Serving| {
            serving.publication.generation() > 0 && !serving.trust.borrow().roots.is_empty()
        };
        self.serving.get().filter(whole).map_or(Err("starting\n"), |_| Ok("ready\n"))
    }

    fn of_publication(&self, view: impl FnOnce(&Publication) -> Answer) -> Answer {
        self.serving.get().map_or_else(|| probe(Err("starting\n")), |serving| view(&serving.publication))
    }
}

/// A publishing thread that is stuck is worth a restart. One that was given nothing yet is not: the API server is waited for.
fn health(silence: Option<Duration>) -> Result<&'static str, String> {
    match silence {
        Some(silence) if silence > STALE => {
            Err(format!("the thread that publishes has not been seen for {} s\n", silence.as_secs()))
        }
        Some(_) | None => Ok("ok\n"),
    }
}

fn probe(found: Result<&'static str, impl Into<String>>) -> Answer {
    match found {
        Ok(well) => http::text(StatusCode::OK, PLAIN, well),
        Err(why) => {
            let why: String = why.into();
            http::text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, why)
        }
    }
}

impl Answers for Ops {
    /// They tell every service, pod, identity and named Secret. In a cluster each pod reaches this port.
    fn is_private(&self, path: &str) -> bool {
        matches!(path, "/sessions" | "/resources")
    }

    async fn get(&self, path: &str, _query: &Query) -> Answer {
        match path {
            "/metrics" => self.metrics(),
            "/readyz" => probe(self.ready()),
            "/healthz" => probe(health(self.pulse.silence())),
            "/sessions" => self.of_publication(|publication| http::json(&publication.sessions())),
            "/resources" => self.of_publication(|publication| http::json(&publication.resources())),
            _ => http::text(
                StatusCode::NOT_FOUND,
                PLAIN,
                "try /metrics, /readyz, /healthz, /sessions or /resources\n",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    async fn status(ops: &Ops, path: &str) -> u16 {
        ops.get(path, &Query::default()).await.status().as_u16()
    }

    #[tokio::test]
    async fn a_controller_that_starts_is_alive_and_not_ready() {
        let ops = Ops::new(Registry::default(), Pulse::default());
        for (path, wanted) in [("/healthz", 200), ("/metrics", 200), ("/readyz", 503), ("/resources", 503)] {
            assert_eq!(status(&ops, path).await, wanted, "{path}");
        }
        ops.drain();
        assert_eq!(ops.ready(), Err("stopping\n"));
        assert_eq!(status(&ops, "/healthz").await, 200, "it ends by itself");
    }

    #[tokio::test]
    async fn a_publishing_thread_that_is_silent_for_too_long_makes_it_unhealthy_and_a_busy_one_does_not() {
        let pulse = Pulse::default();
        let ops = Ops::new(Registry::default(), pulse.clone());
        let silent_for = |time: Duration| pulse.beat(Instant::now().checked_sub(time).unwrap());
        silent_for(STALE / 2);
        assert_eq!(status(&ops, "/healthz").await, 200);
        silent_for(STALE + Duration::from_secs(1));
        assert_eq!(status(&ops, "/healthz").await, 503);
        pulse.beat(Instant::now());
        assert_eq!(status(&ops, "/healthz").await, 200, "it was seen again");
    }

    #[test]
    fn what_is_wrong_is_said() {
        let said = health(Some(Duration::from_secs(400))).unwrap_err();
        assert_eq!(said, "the thread that publishes has not been seen for 400 s\n");
        assert_eq!(health(Some(STALE)), Ok("ok\n"));
        assert_eq!(health(None), Ok("ok\n"));
    }
}
