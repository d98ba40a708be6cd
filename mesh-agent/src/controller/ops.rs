//! Owns what operators ask a controller over HTTP: `/metrics`, `/readyz`, `/healthz`, `/sessions`, `/resources`; the last two at the
//! loopback address only.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use hyper::StatusCode;
use mesh_control::publish::ads::Publication;
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
    publication: Publication,
    trust: watch::Receiver<Arc<TrustMaterial>>,
    draining: AtomicBool,
}

impl Ops {
    pub(super) fn new(
        registry: Registry,
        publication: Publication,
        trust: watch::Receiver<Arc<TrustMaterial>>,
    ) -> Self {
        Self { registry: Mutex::new(registry), publication, trust, draining: AtomicBool::new(false) }
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

    fn ready(&self) -> Answer {
        if self.draining.load(Ordering::Relaxed) {
            return http::text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, "stopping\n");
        }
        if self.publication.generation() == 0 || self.trust.borrow().roots.is_empty() {
            return http::text(StatusCode::SERVICE_UNAVAILABLE, PLAIN, "starting\n");
        }
        http::text(StatusCode::OK, PLAIN, "ready\n")
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
            "/readyz" => self.ready(),
            "/healthz" => http::text(StatusCode::OK, PLAIN, "ok\n"),
            "/sessions" => http::json(&self.publication.sessions()),
            "/resources" => http::json(&self.publication.resources()),
            _ => http::text(
                StatusCode::NOT_FOUND,
                PLAIN,
                "try /metrics, /readyz, /healthz, /sessions or /resources\n",
            ),
        }
    }
}
