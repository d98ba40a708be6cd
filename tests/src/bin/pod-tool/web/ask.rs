//! A client of HTTP/1.1 and HTTP/2.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_tests::web::messages::{Ask, Script, Told};
use tokio::net::TcpStream;

use super::AnyError;
use super::server::fields;

/// Bytes of a body that are told.
const TEXT_MAX: usize = 64 << 10;

/// A connection of either version.
pub(super) enum Client {
    Http1(http1::SendRequest<Sent>),
    Http2(http2::SendRequest<Sent>),
}

impl Client {
    pub(super) async fn connect(to: std::net::SocketAddr, is_http2: bool) -> Result<Self, AnyError> {
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        if is_http2 {
            let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            Ok(Self::Http2(sender))
        } else {
            let (sender, connection) = http1::handshake(io).await?;
            tokio::spawn(connection.with_upgrades());
            Ok(Self::Http1(sender))
        }
    }

    pub(super) async fn send(&mut self, request: Request<Sent>) -> Result<Response<Incoming>, AnyError> {
        Ok(match self {
            Self::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
            Self::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
        })
    }

    pub(super) fn is_closed(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_closed(),
            Self::Http2(sender) => sender.is_closed(),
        }
    }
}

/// Requests one after the other; a connection that ended is made anew.
pub(super) async fn ask(script: &Script) -> Vec<Told> {
    let mut told = Vec::new();
    let mut client = None;
    for request in &script.requests {
        let begun = Instant::now();
        let mut answer = Told::default();
        if let Err(error) = one(&mut client, script, request, &mut answer).await {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(at) = cause {
                text = format!("{text}: {at}");
                cause = at.source();
            }
            answer.error = Some(text);
            client = None;
        }
        answer.ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        told.push(answer);
    }
    told
}

async fn one(
    client: &mut Option<Client>,
    script: &Script,
    ask: &Ask,
    told: &mut Told,
) -> Result<(), AnyError> {
    let usable = client.take().filter(|client| !client.is_closed());
    let client = match usable {
        Some(usable) => client.insert(usable),
        None => client.insert(Client::connect(script.to, script.http2).await?),
    };
    let response = client.send(request(ask, script.http2)?).await?;
    told.status = response.status().as_u16();
    told.version = format!("{:?}", response.version());
    told.headers = fields(response.headers());
    if ask.dawdle_ms > 0 {
        tokio::time::sleep(Duration::from_millis(ask.dawdle_ms)).await;
    }
    let mut body = response.into_body();
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame?;
        if let Some(data) = frame.data_ref() {
            told.bytes += data.len() as u64;
            text.extend_from_slice(&data[..data.len().min(TEXT_MAX - text.len())]);
            told.text = String::from_utf8_lossy(&text).into_owned();
        } else if let Some(trailers) = frame.trailers_ref() {
            told.trailers = fields(trailers);
        }
    }
    Ok(())
}

/// The request as the library wants it.
pub(super) fn request(ask: &Ask, is_http2: bool) -> Result<Request<Sent>, AnyError> {
    let mut request = Request::builder().method(&*ask.method);
    if is_http2 {
        request = request.uri(format!("http://{}{}", ask.host, ask.path));
    } else {
        request = request.uri(&*ask.path).header("host", &*ask.host);
    }
    for (name, value) in &ask.headers {
        request = request.header(name, value);
    }
    let mut trailers = HeaderMap::new();
    for (name, value) in &ask.trailers {
        trailers.append(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
        request = request.header("trailer", name);
    }
    let sent = Sent {
        left: ask.bytes.unwrap_or(0),
        say_length: !ask.chunked,
        trailers: (!trailers.is_empty()).then_some(trailers),
    };
    Ok(request.body(sent)?)
}

/// A body that is made as it is sent.
#[derive(Default)]
pub(super) struct Sent {
    left: u64,
    say_length: bool,
    trailers: Option<HeaderMap>,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        static FILLER: [u8; 64 << 10] = [b'y'; 64 << 10];
        let sent = self.get_mut();
        if sent.left == 0 {
            return Poll::Ready(sent.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let piece = usize::try_from(sent.left).unwrap_or(FILLER.len()).min(FILLER.len());
        sent.left -= piece as u64;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&FILLER[..piece])))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0 && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.say_length { SizeHint::with_exact(self.left) } else { SizeHint::default() }
    }
}
