//! The HTTP/1.1 server that every service runs.

use std::convert::Infallible;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use mesh_tests::bookinfo::LISTENING;
use tokio::net::TcpListener;

use crate::services::{Answer, Service};

/// Listen, say so, and serve until the process is ended.
pub(crate) async fn run(listen: SocketAddr, service: Service) -> io::Result<()> {
    let listener = TcpListener::bind(listen).await?;
    writeln!(io::stdout(), "{LISTENING}")?;
    let service = Arc::new(service);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Such as a peer that has gone again, or no descriptors left: the next may do better.
                eprintln!("accept: {error}");
                tokio::task::yield_now().await;
                continue;
            }
        };
        stream.set_nodelay(true)?;
        let service = Arc::clone(&service);
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let service = Arc::clone(&service);
                async move { Ok::<_, Infallible>(respond(&service, request).await) }
            });
            if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await {
                eprintln!("connection of {peer}: {error}");
            }
        });
    }
}

async fn respond(service: &Service, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let Answer { status, content_type, body } = service.answer(&request).await;
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
