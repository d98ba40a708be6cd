//! A routed service with a server behind it, and clients that write bytes.

use std::{
    cell::RefCell,
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    body::{Body, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use mesh_core::{
    route::{
        HostPort, Origin, Routes,
        cluster::ClusterKey,
        http::{Action, Backend, HeaderOps, HttpRule, HttpTable, WeightedBackend},
        scope::Scoped,
    },
    snapshot::{Mesh, Name, Parts, Service, Snapshot, Workload},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::spawn_local,
};

use crate::tests::fixture::{World, endpoint, in_world, service, soon, workload};

pub(super) const VIP: &str = "10.96.0.1";
/// Where a client is that has a Sidecar.
pub(super) const APART: &str = "127.0.0.7";
pub(super) const HOST: &str = "web.default.svc.cluster.local";

/// A response's body in tests.
pub(super) type TestBody = UnsyncBoxBody<Bytes, Infallible>;

/// What a server has seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Each request: its head, and its body.
    pub(super) requests: RefCell<Vec<(http::request::Parts, Bytes)>>,
}

impl Seen {
    pub(super) fn last(&self) -> http::request::Parts {
        self.requests.borrow().last().expect("a request").0.clone()
    }

    pub(super) fn count(&self) -> usize {
        self.requests.borrow().len()
    }
}

/// A body of one piece.
pub(super) fn full(text: impl Into<Bytes>) -> TestBody {
    Full::new(text.into()).boxed_unsync()
}

/// A body of these frames.
pub(super) fn frames(frames: Vec<Frame<Bytes>>) -> TestBody {
    struct Frames(std::vec::IntoIter<Frame<Bytes>>);
    impl Body for Frames {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(self.0.next().map(Ok))
        }
    }
    Frames(frames.into_iter()).boxed_unsync()
}

/// Runs a test against a world.
pub(super) fn test<F: Future<Output = ()>>(body: impl FnOnce(World) -> F) {
    in_world(false, |_| {}, body);
}

/// An HTTP/1.1 server that answers with `respond`, and says its own name in `x-server`.
pub(super) async fn server(
    name: &'static str,
    respond: impl Fn(&http::request::Parts, Bytes) -> Response<TestBody> + 'static,
) -> (SocketAddr, Rc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let seen = Rc::new(Seen::default());
    let (record, respond) = (Rc::clone(&seen), Rc::new(respond));
    drop(spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            let (record, respond) = (Rc::clone(&record), Rc::clone(&respond));
            let service = service_fn(move |request: Request<Incoming>| {
                let (record, respond) = (Rc::clone(&record), Rc::clone(&respond));
                async move {
                    let (parts, body) = request.into_parts();
                    let Ok(body) = body.collect().await else { return Err(std::io::Error::other("cut off")) };
                    let body = body.to_bytes();
                    record.requests.borrow_mut().push((parts.clone(), body.clone()));
                    let mut response = respond(&parts, body);
                    response.headers_mut().insert("x-server", name.parse().unwrap());
                    Ok(response)
                }
            });
            drop(spawn_local(async move {
                http1::Builder::new().serve_connection(TokioIo::new(stream), service).await.ok();
            }));
        }
    }));
    (addr, seen)
}

/// A server that says what it was asked.
pub(super) async fn echo(name: &'static str) -> (SocketAddr, Rc<Seen>) {
    server(name, |parts, body| {
        let text = format!("{} {} {}", parts.method, parts.uri, String::from_utf8_lossy(&body));
        Response::new(full(text))
    })
    .await
}

/// The cluster of a service's port 80.
pub(super) fn cluster(service: &str) -> Backend {
    Backend::Cluster(ClusterKey { service: Name::new("default", service), port: 80, subset: None })
}

/// A backend with this weight.
pub(super) fn backend(service: &str, weight: u32) -> WeightedBackend {
    WeightedBackend {
        weight,
        backend: cluster(service),
        request_headers: HeaderOps::default(),
        response_headers: HeaderOps::default(),
    }
}

/// A rule for every request.
pub(super) fn rule(action: Action) -> HttpRule {
    let origin = Origin {
        kind: "VirtualService".into(),
        name: Name::new("default", "web"),
        field: "spec.http[0]".into(),
        place: None,
    };
    HttpRule::new(origin, action)
}

/// To the service `web`.
pub(super) fn forward() -> HttpRule {
    rule(Action::Forward(vec![backend("web", 1)]))
}

/// What nothing matches.
pub(super) fn no_route() -> Action {
    Action::Respond { status: 404, body: Arc::from(&b""[..]), reason: "no_route".into() }
}

/// Publishes services `web` (at the VIP), and others behind further addresses, and the rules of `web`; the client dials it.
pub(super) fn publish(world: &World, rules: Vec<HttpRule>, services: &[(&str, SocketAddr)]) {
    let table = HttpTable::new(rules, no_route());
    let mut routes = Routes::default();
    routes.http.insert(HostPort { host: HOST.into(), port: 80 }, Scoped::everywhere(Arc::new(table)));
    publish_routes(world, routes, services);
}

/// The same with all routes.
pub(super) fn publish_routes(world: &World, routes: Routes, services: &[(&str, SocketAddr)]) {
    publish_mesh(world, Mesh::default(), routes, services);
}

/// The same of another mesh. What stands several times in a row is one service of as many endpoints. The client has the first Sidecar of the routes, if there is one, and is then not at the servers' address:
/// who is behind an egress proxy is not sent to it.
pub(super) fn publish_mesh(world: &World, mesh: Mesh, routes: Routes, services: &[(&str, SocketAddr)]) {
    let version = world.snapshots.borrow().version() + 1;
    let sidecar = routes.sidecars.keys().next().cloned();
    let addr = if sidecar.is_none() { "127.0.0.1" } else { APART };
    let own = Workload { sidecar, ..workload("client", "a", addr.parse().unwrap()) };
    let made: Vec<Arc<Service>> = services
        .chunk_by(|(one, _), (next, _)| one == next)
        .enumerate()
        .map(|(index, of_one)| {
            let vip = format!("10.96.0.{}", index + 1).parse().unwrap();
            let endpoints = of_one.iter().map(|(_, addr)| endpoint(*addr, None)).collect();
            Arc::new(service(of_one[0].0, vip, endpoints))
        })
        .collect();
    world.snapshots.send_replace(Arc::new(Snapshot::new(
        version,
        Parts {
            workloads: vec![Arc::new(own)],
            services: made,
            routes: Arc::new(routes),
            mesh: Arc::new(mesh),
            ..Parts::default()
        },
    )));
    world.dial(SocketAddr::new(VIP.parse().unwrap(), 80));
}

/// A response as a client read it.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) head: String,
    pub(super) body: String,
}

impl Reply {
    /// The value of a header.
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (own, value) = line.split_once(':')?;
            own.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }
}

/// A client's connection to the worker.
pub(super) struct Client {
    pub(super) stream: TcpStream,
    early: Vec<u8>,
}

impl Client {
    pub(super) async fn connect(world: &World) -> Self {
        let stream = TcpStream::connect(world.outbound).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, early: Vec::new() }
    }

    pub(super) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // A proxy that has hung up meanwhile shows in what is read.
        self.stream.write_all(bytes.as_ref()).await.ok();
    }

    /// A GET of `/` for this host, and its response.
    pub(super) async fn get_of(&mut self, host: &str, headers: &str) -> Reply {
        self.send(format!("GET / HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n")).await;
        self.reply().await
    }

    /// A GET of this path, and its response.
    pub(super) async fn get(&mut self, path: &str) -> Reply {
        self.ask("GET", path, "", "").await
    }

    /// A request with further header lines (each with its end), and its response.
    pub(super) async fn ask(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Reply {
        let length =
            if body.is_empty() { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        self.send(format!("{method} {path} HTTP/1.1\r\nHost: web\r\n{headers}{length}\r\n{body}")).await;
        self.reply_to(method).await
    }

    /// The next response.
    pub(super) async fn reply(&mut self) -> Reply {
        self.reply_to("GET").await
    }

    /// The head of the next response.
    pub(super) async fn head(&mut self) -> String {
        loop {
            if let Some(end) = self.early.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = self.early.drain(..end + 4).collect();
                return String::from_utf8(head).unwrap();
            }
            assert!(self.read().await > 0, "no response: {:?}", String::from_utf8_lossy(&self.early));
        }
    }

    /// The response to a request of this method.
    pub(super) async fn reply_to(&mut self, method: &str) -> Reply {
        let head = self.head().await;
        let status: u16 = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut reply = Reply { status, head, body: String::new() };
        let mut body = Vec::new();
        if method == "HEAD" || status == 204 || status == 101 {
            return reply;
        }
        if reply.header("transfer-encoding").is_some() {
            loop {
                while !self.early.windows(2).any(|two| two == b"\r\n") {
                    assert!(self.read().await > 0, "cut off");
                }
                let end = self.early.windows(2).position(|two| two == b"\r\n").unwrap();
                let line: Vec<u8> = self.early.drain(..end + 2).collect();
                let line = String::from_utf8(line).unwrap();
                let size = usize::from_str_radix(line.trim(), 16).unwrap();
                if size == 0 {
                    break;
                }
                while self.early.len() < size + 2 {
                    assert!(self.read().await > 0, "cut off");
                }
                body.extend(self.early.drain(..size));
                self.early.drain(..2);
            }
            // Trailers, up to an empty line.
            loop {
                while !self.early.windows(2).any(|two| two == b"\r\n") {
                    assert!(self.read().await > 0, "cut off");
                }
                let end = self.early.windows(2).position(|two| two == b"\r\n").unwrap();
                let line: Vec<u8> = self.early.drain(..end + 2).collect();
                if line.len() == 2 {
                    break;
                }
                reply.head.push_str(&String::from_utf8(line).unwrap());
            }
        } else if let Some(length) = reply.header("content-length") {
            let length: usize = length.parse().unwrap();
            while body.len() + self.early.len() < length {
                assert!(self.read().await > 0, "cut off");
            }
            body.extend(self.early.drain(..length - body.len()));
        } else {
            while self.read().await > 0 {}
            body = std::mem::take(&mut self.early);
        }
        reply.body = String::from_utf8(body).unwrap();
        reply
    }

    /// Whether the worker ends the connection, in order or by a reset.
    pub(super) async fn is_ended(&mut self) -> bool {
        matches!(soon(self.stream.read(&mut [0; 64])).await, Ok(0) | Err(_))
    }

    /// Reads what there is; 0 is the end.
    pub(super) async fn read(&mut self) -> usize {
        let mut piece = vec![0; 16 << 10];
        let got = soon(self.stream.read(&mut piece)).await.unwrap_or(0);
        self.early.extend_from_slice(&piece[..got]);
        got
    }

    /// Waits until this text has arrived, and takes everything up to its end.
    pub(super) async fn expect(&mut self, text: &[u8]) -> Vec<u8> {
        loop {
            if let Some(at) = self.early.windows(text.len()).position(|part| part == text) {
                return self.early.drain(..at + text.len()).collect();
            }
            assert!(self.read().await > 0, "only {:?}", String::from_utf8_lossy(&self.early));
        }
    }
}
