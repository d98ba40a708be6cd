//! Owns how the API server reaches the webhook: TLS, HTTP/2 or 1.1, one path, bounded in everything.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::review;
use crate::source::document::Rules;

/// Where the API server asks.
pub const PATH: &str = "/validate";
/// Connections at once; each API server has few.
const CONNECTIONS_MAX: usize = 256;
/// Questions at once on one connection.
const STREAMS_MAX: u32 = 100;
/// Longest question, in bytes: the API server takes no larger objects, and sends the old one too.
const BODY_BYTES_MAX: usize = 8 << 20;
/// How long a handshake, the headers, or a body may take.
const WITHIN: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What the webhook counts.
#[derive(Clone, Debug, Default)]
pub struct WebhookMetrics {
    reviews: Family<OutcomeLabels, Counter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

impl WebhookMetrics {
    /// Counters under their names in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "mesh_admission_reviews",
            "Resources that the API server asked about, by outcome",
            metrics.reviews.clone(),
        );
        metrics
    }

    fn count(&self, outcome: &'static str) {
        self.reviews.get_or_create(&OutcomeLabels { outcome }).inc();
    }
}

/// The webhook.
#[derive(Debug)]
pub struct Webhook {
    /// Settings that checking depends on.
    pub rules: Rules,
    /// Counters.
    pub metrics: WebhookMetrics,
}

impl Webhook {
    /// Serves until dropped, which also ends its connections. `tls` is what to show, newest last.
    pub async fn serve(self: Arc<Self>, listener: TcpListener, tls: watch::Receiver<Arc<ServerConfig>>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accept the API server");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let mut config = (**tls.borrow()).clone();
            config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
            let (webhook, acceptor) = (Arc::clone(&self), TlsAcceptor::from(Arc::new(config)));
            connections.spawn(async move {
                let _place = place;
                webhook.serve_one(stream, acceptor).await;
            });
        }
    }

    async fn serve_one(self: Arc<Self>, stream: TcpStream, acceptor: TlsAcceptor) {
        let stream = match timeout(WITHIN, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                self.metrics.count("handshake_failed");
                tracing::warn!(%error, "the API server's handshake with the webhook failed");
                return;
            }
            Err(_late) => return self.metrics.count("handshake_failed"),
        };
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let service = service_fn(|request| {
            let webhook = Arc::clone(&self);
            async move { Ok::<_, Infallible>(webhook.route(request).await) }
        });
        let served = if is_h2 {
            let mut server = http2::Builder::new(TokioExecutor::new());
            server.timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX);
            server.keep_alive_interval(Some(WITHIN)).serve_connection(TokioIo::new(stream), service).await
        } else {
            let mut server = http1::Builder::new();
            server.timer(TokioTimer::new()).header_read_timeout(WITHIN);
            server.serve_connection(TokioIo::new(stream), service).await
        };
        if let Err(error) = served {
            tracing::debug!(%error, "a connection of the API server to the webhook ended early");
        }
    }

    async fn route(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let plain = |status, text: String| response(status, "text/plain; charset=utf-8", text);
        if request.uri().path() != PATH {
            return plain(StatusCode::NOT_FOUND, format!("try {PATH}\n"));
        }
        if request.method() != Method::POST {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only POST is served\n".to_owned());
        }
        let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
        let body = match timeout(WITHIN, body).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) | Err(_) => {
                self.metrics.count("unreadable");
                return plain(
                    StatusCode::BAD_REQUEST,
                    "the body is too long, too slow or broken\n".to_owned(),
                );
            }
        };
        match review::answer(&body, &self.rules) {
            Ok(answer) => {
                self.metrics.count(if answer.response.allowed { "allowed" } else { "refused" });
                if let Some(refusal) = &answer.response.status {
                    tracing::info!(message = refusal.message, "refused a resource");
                }
                // Text and numbers can always be written as JSON.
                let body = serde_json::to_vec(&answer).unwrap_or_default();
                response(StatusCode::OK, "application/json", body)
            }
            Err(error) => {
                self.metrics.count("unreadable");
                plain(StatusCode::BAD_REQUEST, format!("{error}\n"))
            }
        }
    }
}

fn response(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
