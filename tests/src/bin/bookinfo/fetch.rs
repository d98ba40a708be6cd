//! Calling another service: resolve its name, connect, GET, close.

use std::error::Error;
use std::io;
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderMap};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use mesh_tests::bookinfo::PORT;
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a call may take unless its caller is less patient.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// Headers that a service hands on with its own calls, so that one visit is one trace.
const HANDED_ON: [&str; 10] = [
    "x-request-id",
    "traceparent",
    "tracestate",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
    "end-user",
];

/// A call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("{host}: cannot connect")]
    Connect { host: String, source: io::Error },
    #[error("{host}: HTTP failed")]
    Http { host: String, source: hyper::Error },
    #[error("{host}: not a request")]
    Request { host: String, source: http::Error },
    #[error("{host}: nothing within {limit:?}")]
    Late { host: String, limit: Duration },
    #[error("{host}: answered {status}: {body}")]
    Status { host: String, status: StatusCode, body: String },
}

impl FetchError {
    /// The error with its causes, on one line.
    pub(crate) fn chain(&self) -> String {
        let causes = std::iter::successors(Some(self as &dyn Error), |error: &&dyn Error| (*error).source());
        causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
    }
}

/// GET `path` of the service `host` within `limit`, handing on the tracing headers of `incoming`.
pub(crate) async fn get(
    host: &str,
    path: &str,
    incoming: &HeaderMap,
    limit: Duration,
) -> Result<Bytes, FetchError> {
    timeout(limit, exchange(host, path, incoming))
        .await
        .unwrap_or_else(|_| Err(FetchError::Late { host: host.to_owned(), limit }))
}

async fn exchange(host: &str, path: &str, incoming: &HeaderMap) -> Result<Bytes, FetchError> {
    let http = |source| FetchError::Http { host: host.to_owned(), source };
    let connect = |source| FetchError::Connect { host: host.to_owned(), source };
    let stream = TcpStream::connect((host, PORT)).await.map_err(connect)?;
    stream.set_nodelay(true).map_err(connect)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let driver = tokio::spawn(connection);
    let mut request = Request::get(path).header(HOST, format!("{host}:{PORT}"));
    for name in HANDED_ON {
        if let Some(value) = incoming.get(name) {
            request = request.header(name, value);
        }
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|source| FetchError::Request { host: host.to_owned(), source })?;
    let response = sender.send_request(request).await.map_err(http)?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(http)?.to_bytes();
    // The client closes first: no idle connection is kept.
    driver.abort();
    if status.is_success() {
        return Ok(body);
    }
    let body = String::from_utf8_lossy(&body).into_owned();
    Err(FetchError::Status { host: host.to_owned(), status, body })
}
