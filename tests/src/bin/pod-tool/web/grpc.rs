//! gRPC by tonic, both ends: messages are plain text, so nothing has to be generated.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _};
use http::uri::PathAndQuery;
use http::{Request, Response};
use mesh_tests::web::messages::{Call, Called};
use tokio::net::TcpListener;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::tokio_stream::{self, Stream, StreamExt as _};
use tonic::codegen::{BoxFuture, Service};
use tonic::metadata::{MetadataKey, MetadataValue};
use tonic::server::{NamedService, ServerStreamingService, StreamingService, UnaryService};
use tonic::transport::{Endpoint, Server, server::TcpIncoming};
use tonic::{Code, Status, Streaming};

use super::AnyError;

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
            let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
            Ok(match method.as_str() {
                "Many" => grpc.server_streaming(echo, request).await,
                "Talk" => grpc.streaming(echo, request).await,
                _ => grpc.unary(One { echo, method }, request).await,
            })
        })
    }
}

/// The methods with one message each way.
struct One {
    echo: Echo,
    method: String,
}

impl UnaryService<String> for One {
    type Response = String;
    type Future = BoxFuture<tonic::Response<String>, Status>;

    fn call(&mut self, request: tonic::Request<String>) -> Self::Future {
        let (name, method) = (self.echo.name.clone(), self.method.clone());
        Box::pin(async move {
            let message = request.into_inner();
            let number: u64 = message.parse().unwrap_or_default();
            match method.as_str() {
                "Unary" => Ok(tonic::Response::new(format!("{name}: {message}"))),
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
    let server = Server::builder().add_service(Echo { name }).add_service(Health);
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
    let mut messages = Vec::new();
    let outcome = match call.method.as_str() {
        "Many" => {
            let first = call.messages.first().cloned().unwrap_or_default();
            let answers = grpc.server_streaming(with_metadata(first, &call)?, path, Text).await;
            gather(answers, &mut messages).await
        }
        "Talk" => {
            let said = with_metadata(tokio_stream::iter(call.messages.clone()), &call)?;
            let answers = grpc.streaming(said, path, Text).await;
            gather(answers, &mut messages).await
        }
        _ => {
            let first = call.messages.first().cloned().unwrap_or_default();
            let answer = grpc.unary(with_metadata(first, &call)?, path, Text).await;
            answer.map(|answer| messages.push(answer.into_inner()))
        }
    };
    let (code, message) = match outcome {
        Ok(()) => (0, String::new()),
        Err(status) => (status.code() as i32, status.message().to_owned()),
    };
    Ok(Called { code, message, messages })
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

async fn gather(
    answers: Result<tonic::Response<Streaming<String>>, Status>,
    into: &mut Vec<String>,
) -> Result<(), Status> {
    let mut answers = answers?.into_inner();
    while let Some(message) = answers.message().await? {
        into.push(message);
    }
    Ok(())
}
