//! gRPC by tonic, both ends: messages are plain text, so nothing has to be generated.
//!
//! Every response of `echo.Echo` says who answers in the header `x-server`, and how many calls of the method there have been in the
//! trailer `x-calls`.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::BodyExt as _;
use mesh_tests::web::messages::{Call, Called, Fields, Seen};
use tokio::net::TcpListener;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::tokio_stream::{self, Stream, StreamExt as _};
use tonic::codegen::{BoxFuture, Service};
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tonic::server::{NamedService, ServerStreamingService, StreamingService, UnaryService};
use tonic::transport::{Endpoint, Server, server::TcpIncoming};
use tonic::{Code, Status, Streaming};

use super::AnyError;
use super::server::fields;

/// Text as messages.
#[derive(Clone, Copy, Default)]
struct Text;

impl Encoder for Text {
    type Item = String;
    type Error = Status;

    fn encode(&mut self, item: String, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put_slice(item.as_bytes());
        Ok(())
    }
}

impl Decoder for Text {
    type Item = String;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<String>, Status> {
        let mut bytes = vec![0; from.remaining()];
        from.copy_to_slice(&mut bytes);
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }
}

impl Codec for Text {
    type Encode = String;
    type Decode = String;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

/// The service `echo.Echo`.
#[derive(Clone)]
struct Echo {
    name: String,
    /// Calls so far, by path.
    so_far: Arc<Mutex<BTreeMap<String, u64>>>,
}

impl NamedService for Echo {
    const NAME: &'static str = "echo.Echo";
}

type Answers = Pin<Box<dyn Stream<Item = Result<String, Status>> + Send>>;

impl Service<Request<tonic::body::Body>> for Echo {
    type Response = Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let echo = self.clone();
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Text);
            let seen = echo.see(&request);
            let calls = seen.so_far.get(&seen.path).copied().unwrap_or_default();
            let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
            let mut response = match method.as_str() {
                "Many" => grpc.server_streaming(echo, request).await,
                "Talk" => grpc.streaming(echo, request).await,
                _ => grpc.unary(One { seen: seen.clone(), method }, request).await,
            };
            if let Ok(name) = HeaderValue::try_from(seen.server) {
                response.headers_mut().insert("x-server", name);
            }
            if response.headers().contains_key(Status::GRPC_STATUS) {
                // A status without a response has no trailers: these headers are them.
                response.headers_mut().insert("x-calls", calls.into());
                return Ok(response);
            }
            let trailers = HeaderMap::from_iter([(HeaderName::from_static("x-calls"), calls.into())]);
            Ok(response
                .map(|body| tonic::body::Body::new(body.with_trailers(async move { Some(Ok(trailers)) }))))
        })
    }
}

impl Echo {
    /// Counts a call, and says what came.
    fn see(&self, request: &Request<tonic::body::Body>) -> Seen {
        let path = request.uri().path().to_owned();
        let mut so_far = self.so_far.lock().unwrap_or_else(PoisonError::into_inner);
        *so_far.entry(path.clone()).or_default() += 1;
        Seen {
            server: self.name.clone(),
            method: request.method().to_string(),
            path,
            host: request.uri().authority().map(ToString::to_string).unwrap_or_default(),
            version: format!("{:?}", request.version()),
            headers: fields(request.headers()),
            so_far: so_far.clone(),
            ..Seen::default()
        }
    }
}

/// The methods with one message each way.
struct One {
    seen: Seen,
    method: String,
}

impl UnaryService<String> for One {
    type Response = String;
    type Future = BoxFuture<tonic::Response<String>, Status>;

    fn call(&mut self, request: tonic::Request<String>) -> Self::Future {
        let (seen, method) = (self.seen.clone(), self.method.clone());
        Box::pin(async move {
            let name = &seen.server;
            let message = request.into_inner();
            let number: u64 = message.parse().unwrap_or_default();
            match method.as_str() {
                "Unary" => Ok(tonic::Response::new(format!("{name}: {message}"))),
                "Tell" => {
                    let told =
                        serde_json::to_string(&seen).map_err(|error| Status::internal(error.to_string()))?;
                    Ok(tonic::Response::new(told))
                }
                "Fail" => Err(Status::new(Code::from(i32::try_from(number).unwrap_or(2)), "as asked")),
                "Slow" => {
                    tokio::time::sleep(Duration::from_millis(number)).await;
                    Ok(tonic::Response::new(format!("{name}: at last")))
                }
                _ => Err(Status::unimplemented(method)),
            }
        })
    }
}

impl ServerStreamingService<String> for Echo {
    type Response = String;
    type ResponseStream = Answers;
    type Future = BoxFuture<tonic::Response<Answers>, Status>;

    fn call(&mut self, request: tonic::Request<String>) -> Self::Future {
        let count: u32 = request.into_inner().parse().unwrap_or_default();
        let answers: Answers = Box::pin(tokio_stream::iter((0..count).map(|n| Ok(n.to_string()))));
        Box::pin(async move { Ok(tonic::Response::new(answers)) })
    }
}

impl StreamingService<String> for Echo {
    type Response = String;
    type ResponseStream = Answers;
    type Future = BoxFuture<tonic::Response<Answers>, Status>;

    fn call(&mut self, request: tonic::Request<Streaming<String>>) -> Self::Future {
        let name = self.name.clone();
        let answers = request.into_inner().map(move |message| message.map(|text| format!("{name}: {text}")));
        Box::pin(async move { Ok(tonic::Response::new(Box::pin(answers) as Answers)) })
    }
}

/// The standard service by which servers say that they are well.
#[derive(Clone)]
struct Health;

impl NamedService for Health {
    const NAME: &'static str = "grpc.health.v1.Health";
}

/// Field 1, a number, 1: SERVING. Its bytes happen to be text.
const SERVING: &str = "\x08\x01";

impl Service<Request<tonic::body::Body>> for Health {
    type Response = Response<tonic::body::Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        Box::pin(async move { Ok(tonic::server::Grpc::new(Text).unary(Self, request).await) })
    }
}

impl UnaryService<String> for Health {
    type Response = String;
    type Future = BoxFuture<tonic::Response<String>, Status>;

    fn call(&mut self, _: tonic::Request<String>) -> Self::Future {
        Box::pin(async { Ok(tonic::Response::new(SERVING.to_owned())) })
    }
}

pub(super) async fn serve(listener: TcpListener, name: String) {
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = Server::builder().add_service(Echo { name, so_far: Arc::default() }).add_service(Health);
    if let Err(error) = server.serve_with_incoming(incoming).await {
        eprintln!("grpc: {error}");
    }
}

/// Make a call; what the server says is no error.
pub(super) async fn call(call: Call) -> Result<Called, AnyError> {
    let origin = format!("http://{}", call.authority).parse()?;
    let endpoint = Endpoint::from_shared(format!("http://{}", call.to))?.origin(origin).connect().await?;
    let mut grpc = tonic::client::Grpc::new(endpoint);
    grpc.ready().await?;
    let path: PathAndQuery = format!("/echo.Echo/{}", call.method).parse()?;
    let mut said = call.messages.clone();
    if !matches!(call.method.as_str(), "Talk") {
        said.truncate(1);
    }
    // A method with one message is the same on the wire; this shape tells headers from trailers.
    let said = with_metadata(tokio_stream::iter(said), &call)?;
    let mut called = Called::default();
    let outcome = match grpc.streaming(said, path, Text).await {
        Ok(answers) => {
            called.headers = metadata(answers.metadata());
            gather(answers.into_inner(), &mut called).await
        }
        // The status was the whole response.
        Err(status) => {
            called.headers = metadata(status.metadata());
            Err(status)
        }
    };
    if let Err(status) = outcome {
        (called.code, called.message) = (status.code() as i32, status.message().to_owned());
    }
    Ok(called)
}

fn metadata(metadata: &MetadataMap) -> Fields {
    fields(metadata.as_ref())
}

fn with_metadata<T>(message: T, call: &Call) -> Result<tonic::Request<T>, AnyError> {
    let mut request = tonic::Request::new(message);
    for (name, value) in &call.headers {
        request
            .metadata_mut()
            .insert(MetadataKey::from_bytes(name.as_bytes())?, MetadataValue::try_from(value)?);
    }
    if let Some(deadline) = call.deadline_ms {
        // Said to the server, and not watched here: what is seen is what the mesh does.
        let timeout = MetadataValue::try_from(format!("{deadline}m"))?;
        request.metadata_mut().insert("grpc-timeout", timeout);
    }
    Ok(request)
}

async fn gather(mut answers: Streaming<String>, called: &mut Called) -> Result<(), Status> {
    loop {
        match answers.message().await {
            Ok(Some(message)) => called.messages.push(message),
            Ok(None) => break,
            Err(status) => {
                called.trailers = metadata(status.metadata());
                return Err(status);
            }
        }
    }
    called.trailers = answers.trailers().await?.as_ref().map(metadata).unwrap_or_default();
    Ok(())
}
