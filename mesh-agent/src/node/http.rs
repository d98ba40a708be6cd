//! Owns how the agent serves HTTP/1.1 for its operators: the admin socket and the metrics address.
//!
//! Invariants: connections are bounded in number and time, requests have no body that is read, and a connection
//! that fails or panics ends alone.

use std::{convert::Infallible, future::Future, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::Semaphore,
    task::JoinSet,
};

use crate::view::ErrorView;

/// Connections served at once; a scraper and a few people need four.
const CONNECTIONS_MAX: usize = 64;
/// A client that does not send its request within this time is hung up on.
const HEADERS_WITHIN: Duration = Duration::from_secs(5);
/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// An answer.
pub(crate) type Answer = Response<Full<Bytes>>;

/// Answers requests; one value serves all connections of a listener.
pub(crate) trait Answers: Send + Sync + 'static {
    /// Answers a GET. Must not block the thread.
    fn get(&self, path: &str, query: &Query) -> impl Future<Output = Answer> + Send;

    /// Whether a path is for this host, or this pod, alone: others are refused.
    fn is_private(&self, _path: &str) -> bool {
        false
    }
}

/// Where a request comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Caller {
    /// This host or, in a network namespace of its own, this pod: also who comes by `kubectl port-forward`.
    Here,
    /// Anywhere.
    Elsewhere,
}

/// Something connections come from.
pub(crate) trait Accepts {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// Waits for the next one. Cancel safe.
    fn next(&self) -> impl Future<Output = io::Result<(Self::Stream, Caller)>> + Send;
}

impl Accepts for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn next(&self) -> io::Result<(Self::Stream, Caller)> {
        Ok((self.accept().await?.0, Caller::Here))
    }
}

impl Accepts for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn next(&self) -> io::Result<(Self::Stream, Caller)> {
        let (stream, peer) = self.accept().await?;
        let from = if peer.ip().to_canonical().is_loopback() { Caller::Here } else { Caller::Elsewhere };
        Ok((stream, from))
    }
}

/// Serves until it is dropped, which also ends its connections.
pub(crate) async fn serve<L: Accepts, A: Answers>(listener: L, answers: Arc<A>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.next().await {
            Ok((stream, from)) => {
                let answers = Arc::clone(&answers);
                connections.spawn(async move {
                    let _slot = slot;
                    serve_one(stream, from, answers).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept an operator's connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_one<S: AsyncRead + AsyncWrite + Unpin + 'static, A: Answers>(
    stream: S,
    from: Caller,
    answers: Arc<A>,
) {
    let service = service_fn(|request: Request<Incoming>| {
        let answers = Arc::clone(&answers);
        async move { Ok::<_, Infallible>(route(&request, from, &*answers).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "an operator's connection ended early");
    }
}

async fn route<A: Answers>(request: &Request<Incoming>, from: Caller, answers: &A) -> Answer {
    if request.method() != Method::GET {
        let mut refused = error(StatusCode::METHOD_NOT_ALLOWED, "only GET is served");
        refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return refused;
    }
    if from == Caller::Elsewhere && answers.is_private(request.uri().path()) {
        return error(StatusCode::FORBIDDEN, "only to whoever asks at the loopback address");
    }
    match Query::parse(request.uri().query().unwrap_or_default()) {
        Some(query) => answers.get(request.uri().path(), &query).await,
        None => error(StatusCode::BAD_REQUEST, "the query is not valid percent-encoded UTF-8"),
    }
}

/// Decoded parameters of a request.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn parse(text: &str) -> Option<Self> {
        let pairs = text.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Some((decode(key)?, decode(value)?))
        });
        Some(Self(pairs.collect::<Option<_>>()?))
    }

    /// All values of a parameter.
    pub(crate) fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// The first value of a parameter.
    pub(crate) fn value(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }
}

fn decode(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digit = |b: u8| char::from(b).to_digit(16);
                let value = digit(bytes.next()?)? * 16 + digit(bytes.next()?)?;
                u8::try_from(value).ok()?
            }
            b'+' => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok()
}

/// A text answer.
pub(crate) fn text(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}

/// A view as JSON.
pub(crate) fn json<T: serde::Serialize>(view: &T) -> Answer {
    match serde_json::to_vec(view) {
        Ok(body) => text(StatusCode::OK, "application/json", body),
        Err(cause) => error(StatusCode::INTERNAL_SERVER_ERROR, &format!("encode the answer: {cause}")),
    }
}

/// A refusal.
pub(crate) fn error(status: StatusCode, message: &str) -> Answer {
    let view = ErrorView { error: message.to_owned() };
    let body = serde_json::to_vec(&view).unwrap_or_default();
    text(status, "application/json", body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("from=shop%2Fcart&to=%5Bfd00::1%5D:80&flag&x=a+b").unwrap();
        assert_eq!(query.value("from"), Some("shop/cart"));
        assert_eq!(query.value("to"), Some("[fd00::1]:80"));
        assert_eq!(query.value("flag"), Some(""));
        assert_eq!(query.value("x"), Some("a b"));
        assert_eq!(query.value("y"), None);
    }

    #[test]
    fn a_query_that_cannot_be_decoded_is_refused() {
        for bad in ["a=%", "a=%4", "a=%zz", "a=%ff"] {
            assert!(Query::parse(bad).is_none(), "{bad}");
        }
    }
}
