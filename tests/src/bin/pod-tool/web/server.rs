//! A server of HTTP/1.1 and HTTP/2 that says what it saw. The query of a request says how it answers: `status=N`, `delay=MS`,
//! `reset=1` (the connection or stream ends without an answer), `times=N` (those three for the first so many requests of the path alone), `bytes=N` (a body of that length), `chunks=N` (the same
//! without saying the length), `trailers=1`, `cut=1` (half of the body, then nothing), `ignore=1` (the body is not read), `close=1`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_tests::web::messages::{Fields, Seen, Serving};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::AnyError;

/// No answer, as was asked for.
#[derive(Debug, thiserror::Error)]
#[error("reset on request")]
struct Reset;

struct Shared {
    serving: Serving,
    so_far: Mutex<BTreeMap<String, u64>>,
    connections: AtomicU64,
    /// Answers by HTTP/1 say that they are the last of their connections.
    stopping: AtomicBool,
}

/// How long a connection by HTTP/1 may be without a request after SIGTERM. One that is closed at once takes along the request that is
/// just coming, and nothing tells its client that nobody looked at it.
const LINGER: Duration = Duration::from_secs(1);

/// Serve until SIGTERM; then finish what is under way.
pub(super) async fn serve(listener: TcpListener, serving: Serving) {
    let shared = Arc::new(Shared {
        serving,
        so_far: Mutex::default(),
        connections: AtomicU64::new(0),
        stopping: AtomicBool::new(false),
    });
    let (stop, stopped) = watch::channel(());
    let Ok(mut terminated) = signal(SignalKind::terminate()) else { return };
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = terminated.recv() => break,
        };
        if let Ok((stream, peer)) = stream {
            stream.set_nodelay(true).ok();
            let (mut stopped, served) = (stopped.clone(), stopped.clone());
            let shared = Arc::clone(&shared);
            tokio::spawn(async move {
                let number = shared.connections.fetch_add(1, Ordering::Relaxed) + 1;
                let stopping = async move { drop(stopped.changed().await) };
                if let Err(error) = connection(shared, stream, Caller { number, peer }, stopping).await {
                    eprintln!("connection {number}: {error}");
                }
                drop(served);
            });
        }
    }
    shared.stopping.store(true, Ordering::Relaxed);
    drop(listener);
    drop(stopped);
    // Each connection tells that it is over by dropping its `served`; what it waits with is gone as soon as it stops waiting.
    stop.send(()).ok();
    stop.closed().await;
}

/// The other end of a connection.
#[derive(Clone, Copy)]
struct Caller {
    number: u64,
    peer: SocketAddr,
}

async fn connection(
    shared: Arc<Shared>,
    stream: TcpStream,
    caller: Caller,
    stopping: impl Future<Output = ()>,
) -> Result<(), AnyError> {
    let mut first = [0; 4];
    let is_http2 = stream.peek(&mut first).await? == 4 && &first == b"PRI ";
    let service = service_fn(move |request| respond(Arc::clone(&shared), caller, request));
    let io = TokioIo::new(stream);
    tokio::pin!(stopping);
    if is_http2 {
        let connection = http2::Builder::new(TokioExecutor::new()).serve_connection(io, service);
        tokio::pin!(connection);
        tokio::select! {
            outcome = connection.as_mut() => return Ok(outcome?),
            () = stopping => connection.as_mut().graceful_shutdown(),
        }
        connection.await?;
    } else {
        let connection = http1::Builder::new().serve_connection(io, service);
        tokio::pin!(connection);
        tokio::select! {
            outcome = connection.as_mut() => return Ok(outcome?),
            () = stopping => {}
        }
        if let Ok(outcome) = tokio::time::timeout(LINGER, connection.as_mut()).await {
            return Ok(outcome?);
        }
        connection.as_mut().graceful_shutdown();
        connection.await?;
    }
    Ok(())
}

async fn respond(
    shared: Arc<Shared>,
    caller: Caller,
    request: Request<Incoming>,
) -> Result<Response<Answer>, Reset> {
    let (parts, body) = request.into_parts();
    let query = parts.uri.query().unwrap_or_default().to_owned();
    let asked = |name: &str| {
        query
            .split('&')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
            .map(|(_, value)| value)
    };
    let number = |name: &str| asked(name).and_then(|value| value.parse::<u64>().ok());
    let mut seen = Seen {
        server: shared.serving.name.clone(),
        connection: caller.number,
        peer: Some(caller.peer),
        method: parts.method.to_string(),
        path: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        host: parts.uri.authority().map(ToString::to_string).unwrap_or_default(),
        version: format!("{:?}", parts.version),
        headers: fields(&parts.headers),
        ..Seen::default()
    };
    if let Some(host) = parts.headers.get("host") {
        seen.host = String::from_utf8_lossy(host.as_bytes()).into_owned();
    }
    if asked("ignore").is_none() {
        (seen.bytes, seen.trailers) = read(body).await;
    }
    let so_far_here = {
        let mut so_far = shared.so_far.lock().unwrap_or_else(PoisonError::into_inner);
        let here = so_far.entry(parts.uri.path().to_owned()).or_default();
        *here += 1;
        let here = *here;
        seen.so_far.clone_from(&so_far);
        here
    };
    let is_over = number("times").is_some_and(|times| so_far_here > times);
    if let Some(delay) = number("delay").filter(|_| !is_over) {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    if asked("reset").is_some() && !is_over {
        return Err(Reset);
    }
    let text = serde_json::to_vec(&seen).unwrap_or_default();
    let (bytes, chunks) = (number("bytes"), number("chunks"));
    let is_filler = bytes.or(chunks).is_some();
    let length = bytes.or(chunks).unwrap_or(text.len() as u64);
    let mut trailers = None;
    if asked("trailers").is_some() {
        let mut map = HeaderMap::new();
        map.insert("x-checksum", HeaderValue::from(length));
        trailers = Some(map);
    }
    let answer = Answer {
        text: if is_filler { Vec::new() } else { text },
        left: length,
        say_length: chunks.is_none() && trailers.is_none(),
        breaks_at: asked("cut").map(|_| length / 2),
        trailers,
    };
    let mut response = Response::new(answer);
    let status = if shared.serving.failing { Some(503) } else { number("status").filter(|_| !is_over) };
    if let Some(status) = status.and_then(|status| u16::try_from(status).ok()) {
        *response.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
    }
    let headers = response.headers_mut();
    if let Ok(name) = HeaderValue::try_from(&*shared.serving.name) {
        headers.insert("x-server", name);
    }
    headers.insert("x-connection", HeaderValue::from(caller.number));
    if asked("trailers").is_some() {
        headers.insert("trailer", HeaderValue::from_static("x-checksum"));
    }
    if (asked("close").is_some() || shared.stopping.load(Ordering::Relaxed))
        && parts.version < Version::HTTP_2
    {
        headers.insert("connection", HeaderValue::from_static("close"));
    }
    Ok(response)
}

/// Length and trailers of a body, read to its end.
async fn read(mut body: Incoming) -> (u64, Fields) {
    let (mut bytes, mut trailers) = (0, Vec::new());
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(data) = frame.data_ref() {
            bytes += data.len() as u64;
        } else if let Some(map) = frame.trailers_ref() {
            trailers = fields(map);
        }
    }
    (bytes, trailers)
}

/// Headers as they are told.
pub(super) fn fields(headers: &HeaderMap) -> Fields {
    let told = headers.iter();
    told.map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect()
}

/// A body that is made as it is read.
struct Answer {
    /// What it says; else it is filled with `x`.
    text: Vec<u8>,
    left: u64,
    say_length: bool,
    breaks_at: Option<u64>,
    trailers: Option<HeaderMap>,
}

/// Bytes of one piece.
const PIECE: usize = 64 << 10;

impl Body for Answer {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let answer = self.get_mut();
        if answer.breaks_at.is_some_and(|at| answer.left <= at) {
            return Poll::Ready(Some(Err(std::io::Error::other("cut off as asked"))));
        }
        if answer.left == 0 {
            return Poll::Ready(answer.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        if !answer.text.is_empty() && answer.breaks_at.is_none() {
            answer.left = 0;
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut answer.text).into()))));
        }
        static FILLER: [u8; PIECE] = [b'x'; PIECE];
        let stop = answer.breaks_at.unwrap_or(0);
        let piece = usize::try_from(answer.left - stop).unwrap_or(PIECE).min(PIECE);
        answer.left -= piece as u64;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&FILLER[..piece])))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0 && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.say_length { SizeHint::with_exact(self.left) } else { SizeHint::default() }
    }
}
