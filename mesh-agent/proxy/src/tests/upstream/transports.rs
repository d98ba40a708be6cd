//! HTTP/2, switched protocols, and the ways that the mesh has to an endpoint.

use std::cell::Cell;

use hyper::{
    body::{Frame, Incoming},
    service::service_fn,
};
use mesh_core::{
    mode::{Mode, PortModes},
    route::cluster::{Http2Keepalive, TrafficPolicy},
    snapshot::Workload,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::spawn_local,
};

use super::{
    super::{fixture::workload, hbone},
    *,
};
use crate::{
    http::io::{HyperIo, LocalTasks},
    kernel::{LocalPeer, TicketRequest},
    metrics::edges::Security,
    stream::Stream,
};

/// An HTTP/2 server that answers with the request's authority and path; counts its connections.
async fn http2_server() -> (SocketAddr, Rc<Cell<u32>>) {
    http2_server_of(None).await
}

/// The same, with as many streams at once as a connection may carry.
pub(super) async fn http2_server_of(streams_max: Option<u32>) -> (SocketAddr, Rc<Cell<u32>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let connections = Rc::new(Cell::new(0));
    let count = Rc::clone(&connections);
    spawn_local(async move {
        while let Ok((socket, _)) = listener.accept().await {
            count.set(count.get() + 1);
            let io = HyperIo(Stream::new(socket.into_std().unwrap()).unwrap());
            let answer = service_fn(|request: Request<Incoming>| async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let seen = format!("{} {:?}", request.uri(), request.headers().get("host"));
                Ok::<_, std::convert::Infallible>(Response::new(Body::full(seen)))
            });
            let mut http = hyper::server::conn::http2::Builder::new(LocalTasks);
            if let Some(max) = streams_max {
                http.max_concurrent_streams(max);
            }
            spawn_local(http.serve_connection(io, answer));
        }
    });
    (addr, connections)
}

/// A server that begins to speak HTTP/2 and says nothing more; how many connections it has had, and how many were given up.
async fn silent_http2_server() -> (SocketAddr, Rc<Cell<u32>>, Rc<Cell<u32>>) {
    const EMPTY_SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (begun, ended) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let (begins, ends) = (Rc::clone(&begun), Rc::clone(&ended));
    spawn_local(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            begins.set(begins.get() + 1);
            let ends = Rc::clone(&ends);
            spawn_local(async move {
                socket.write_all(&EMPTY_SETTINGS).await.ok();
                while socket.read(&mut [0; 1024]).await.is_ok_and(|read| read > 0) {}
                ends.set(ends.get() + 1);
            });
        }
    });
    (addr, begun, ended)
}

#[test]
fn a_connection_of_http2_that_answers_no_ping_is_given_up_if_the_rule_asks_for_pings() {
    test(|world| async move {
        let (addr, begun, ended) = silent_http2_server().await;
        let mut web = service("web", VIP.into(), vec![endpoint(addr, None)]);
        web.ports[0].name = "grpc".into();
        world.publish(Vec::new(), vec![web]);
        let open = client(&world);
        let each = Duration::from_millis(50);
        let asking = |policy: &mut TrafficPolicy| {
            policy.pool.http2_keepalive = Some(Http2Keepalive { interval: each, timeout: each });
        };
        let to = destination(&world, asking);
        let asked = Box::pin(send(&world, get("/"), plan(&world, open.live(), to)));
        let answer = soon(asked).await;
        let failed = failure(&answer);
        assert_eq!((failed.status, failed.flag), (503, Flag::UpstreamClosed));
        soon(async {
            while ended.get() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        assert_eq!(begun.get(), 1);

        // Nobody asks: the request is left to its own limits.
        let to = destination(&world, |_| {});
        let waiting = send(&world, get("/"), plan(&world, open.live(), to));
        assert!(tokio::time::timeout(each * 8, waiting).await.is_err());
    });
}

#[test]
fn a_port_of_http2_is_spoken_to_in_streams_of_one_connection() {
    test(|world| async move {
        let (addr, connections) = http2_server().await;
        let mut web = service("web", VIP.into(), vec![endpoint(addr, None)]);
        web.ports[0].name = "grpc".into();
        world.publish(Vec::new(), vec![web]);
        let open = client(&world);
        let one = async || {
            let to = destination(&world, |_| {});
            read(send(&world, get("/x?y"), plan(&world, open.live(), to)).await).await
        };
        let (a, b, c) = tokio::join!(one(), one(), one());
        for (status, body) in [a, b, c] {
            assert_eq!(status, 200);
            assert_eq!(String::from_utf8(body).unwrap(), "http://web/x?y None");
        }
        assert_eq!(connections.get(), 1);
    });
}

#[test]
fn a_client_of_http1_is_upgraded_to_http2_where_the_rule_or_at_declared_ports_the_mesh_says_so() {
    test(|world| async move {
        // The port's name, who says it, and whether it is HTTP/2 then.
        let table = [
            ("http", Said::Nobody, false),
            ("http", Said::Mesh, true),
            ("http", Said::Rule, true),
            ("unnamed", Said::Nobody, false),
            ("unnamed", Said::Mesh, false),
            ("unnamed", Said::Rule, true),
        ];
        for (name, said, is_http2) in table {
            let (two, connections) = http2_server().await;
            let one = Server::start("127.0.0.1:0", |_| Reply::ok("one")).await;
            let at = if is_http2 { two } else { one.addr };
            let mut web = service("web", VIP.into(), vec![endpoint(at, None)]);
            web.ports[0].name = name.into();
            world.publish(Vec::new(), vec![web]);
            let to = destination(&world, |policy| {
                policy.pool.h2_upgrade = said != Said::Nobody;
                policy.pool.h2_upgrade_sniffed = said == Said::Rule;
            });
            let open = client(&world);
            let answer = send(&world, get("/x"), plan(&world, open.live(), to)).await;
            assert_eq!(status(&answer), 200, "{name} {said:?}");
            assert_eq!((connections.get(), one.connections()), (u32::from(is_http2), usize::from(!is_http2)));
        }
    });
}

/// Who wants HTTP/2 upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Nobody,
    Mesh,
    Rule,
}

#[test]
fn the_bytes_behind_a_switch_of_protocols_are_handed_over() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::Echo).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let request = Request::get("/")
            .header("host", "web")
            .header("connection", "upgrade")
            .header("upgrade", "echo")
            .body(Body::Empty)
            .unwrap();
        let switching = Plan { upgrade: true, ..plan(&world, open.live(), destination(&world, |_| {})) };
        let answer = send(&world, request, switching).await;
        assert_eq!(status(&answer), 101);
        let mut bytes = answer.upgraded.unwrap().0;
        let mut early = [0; 5];
        soon(bytes.read_exact(&mut early)).await.unwrap();
        assert_eq!(&early, b"ready");
        bytes.write_all(b"ping").await.unwrap();
        let mut echoed = [0; 4];
        soon(bytes.read_exact(&mut echoed)).await.unwrap();
        assert_eq!(&echoed, b"ping");
        assert_eq!(world.worker.connections.len(), 2);
        drop(bytes);
        eventually(|| world.worker.connections.len(), |left| *left == 1).await;
    });
}

/// A server on this node, as the kernel and the snapshot know it.
fn local(world: &World, addr: SocketAddr, policies: Vec<Name>, generation: u64) {
    local_at(world, addr, "http", policies, generation);
}

/// The same at a port of this name.
fn local_at(world: &World, addr: SocketAddr, port: &str, policies: Vec<Name>, generation: u64) {
    let modes = PortModes { default: Mode::Strict, ..PortModes::default() };
    let pod = Workload { modes, policies, ..workload("web", "a", addr.ip()) };
    let id = pod.id;
    world.kernel.local.lock().unwrap().insert(id, LocalPeer { incarnation: 5, policy_gen: generation });
    let mut web = service("web", VIP.into(), vec![endpoint(addr, Some(id))]);
    web.ports[0].name = port.into();
    world.publish(vec![pod], vec![web]);
}

#[test]
fn an_endpoint_on_this_node_is_judged_here_and_dialled_by_ticket() {
    test(|world| async move {
        let server = Server::start("127.0.0.2:0", |_| Reply::ok("local")).await;
        local(&world, server.addr, Vec::new(), 9);
        let open = client(&world);
        let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        assert_eq!(answer.upstream.as_ref().unwrap().security, Security::Kernel);
        assert_eq!(read(answer).await, (200, b"local".to_vec()));
        let asked = world.sockets.asked.lock().unwrap().clone();
        assert_eq!(asked[0].1.ticket, Some(TicketRequest { incarnation: 5, policy_gen: 9 }));
    });
}

#[test]
fn a_pooled_connection_ends_when_policy_denies_it_and_requests_are_403_from_then_on() {
    test(|world| async move {
        let server = Server::start("127.0.0.2:0", |_| Reply::ok("local")).await;
        local(&world, server.addr, Vec::new(), 9);
        let open = client(&world);
        let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        assert_eq!(read(answer).await.0, 200);
        // A policy that nobody knows admits nobody.
        local(&world, server.addr, vec![Name::new("default", "unknown")], 10);
        eventually(|| server.closed(), |closed| *closed == 1).await;
        let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        let failed = failure(&answer);
        assert_eq!(
            (failed.status, failed.flag, &*failed.text),
            (403, Flag::Unauthorized, "RBAC: access denied")
        );
    });
}

/// A body without end.
struct Endless(std::pin::Pin<Box<tokio::time::Sleep>>);

impl Endless {
    fn new() -> Self {
        Self(Box::pin(tokio::time::sleep(Duration::from_millis(5))))
    }
}

impl hyper::body::Body for Endless {
    type Data = bytes::Bytes;
    type Error = crate::http::body::BoxError;

    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<bytes::Bytes>, Self::Error>>> {
        let endless = self.get_mut();
        std::task::ready!(endless.0.as_mut().poll(cx));
        *endless = Self::new();
        std::task::Poll::Ready(Some(Ok(Frame::data(bytes::Bytes::from_static(b"x")))))
    }
}

#[test]
fn a_stream_of_http2_ends_with_its_connection_when_policy_denies_it() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let ended = Rc::new(Cell::new(0));
        let ends = Rc::clone(&ended);
        spawn_local(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let io = HyperIo(Stream::new(socket.into_std().unwrap()).unwrap());
                let answer = service_fn(|_: Request<Incoming>| async {
                    Ok::<_, std::convert::Infallible>(Response::new(Body::boxed(Endless::new())))
                });
                hyper::server::conn::http2::Builder::new(LocalTasks).serve_connection(io, answer).await.ok();
                ends.set(ends.get() + 1);
            }
        });
        local_at(&world, addr, "grpc", Vec::new(), 9);
        let open = client(&world);
        let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        let mut body = answer.outcome.unwrap().into_body();
        assert!(soon(body.frame()).await.unwrap().is_ok());
        // A policy that nobody knows admits nobody.
        local_at(&world, addr, "grpc", vec![Name::new("default", "unknown")], 10);
        assert!(soon(body.collect()).await.is_err(), "its bytes must not flow on");
        eventually(|| (ended.get(), world.worker.connections.len()), |now| *now == (1, 1)).await;
    });
}

/// A frame of HTTP/2.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// HEADERS with status 200 and these flags.
fn headers(flags: u8, stream: u32) -> Vec<u8> {
    const END_HEADERS: u8 = 4;
    frame(1, flags | END_HEADERS, stream, &[0x88])
}

const END_STREAM: u8 = 1;

/// GOAWAY without an error.
fn go_away(last: u32) -> Vec<u8> {
    frame(7, 0, 0, &[&last.to_be_bytes()[..], &[0; 4]].concat())
}

/// A server of HTTP/2 that says `answer` to each request: of that connection (the first is 1), which has had those streams.
async fn framing_server(answer: impl Fn(u32, &[u32]) -> Vec<u8> + 'static) -> (SocketAddr, Rc<Cell<u32>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let connections = Rc::new(Cell::new(0));
    let (count, answer) = (Rc::clone(&connections), Rc::new(answer));
    spawn_local(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            count.set(count.get() + 1);
            let (number, answer) = (count.get(), Rc::clone(&answer));
            spawn_local(async move { say(&mut socket, |streams| answer(number, streams)).await.err() });
        }
    });
    (addr, connections)
}

/// Says `answer` to each request of a connection, until it ends.
async fn say(
    socket: &mut tokio::net::TcpStream,
    answer: impl Fn(&[u32]) -> Vec<u8>,
) -> std::io::Result<std::convert::Infallible> {
    const PREFACE: usize = 24;
    socket.read_exact(&mut [0; PREFACE]).await?;
    socket.write_all(&frame(4, 0, 0, &[])).await?;
    let mut streams = Vec::new();
    loop {
        let mut head = [0; 9];
        socket.read_exact(&mut head).await?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        socket.read_exact(&mut vec![0; len as usize]).await?;
        if head[3] == 1 {
            streams.push(u32::from_be_bytes([head[5], head[6], head[7], head[8]]));
            socket.write_all(&answer(&streams)).await?;
        }
    }
}

fn publish_grpc(world: &World, addr: SocketAddr) {
    let mut web = service("web", VIP.into(), vec![endpoint(addr, None)]);
    web.ports[0].name = "grpc".into();
    world.publish(Vec::new(), vec![web]);
}

#[test]
fn s34_a_stream_above_the_last_of_a_goaway_was_not_processed_and_is_tried_again() {
    test(|world| async move {
        let (addr, connections) = framing_server(|connection, streams| match (connection, streams) {
            (1, [_]) => Vec::new(),
            (1, [first, ..]) => [go_away(*first), headers(END_STREAM, *first)].concat(),
            (_, streams) => headers(END_STREAM, *streams.last().unwrap()),
        })
        .await;
        publish_grpc(&world, addr);
        let open = client(&world);
        // One failure would put the only endpoint out.
        let strict = |policy: &mut TrafficPolicy| {
            balancing::detecting(policy);
            policy.outlier.as_mut().unwrap().consecutive_5xx = Some(1);
        };
        let refused = || RetryOn { refused_stream: true, ..RetryOn::default() };
        let one = async || {
            let route = retrying(1, refused(), None);
            let plan = Plan { route, retry: true, ..plan(&world, open.live(), destination(&world, strict)) };
            let answer = send(&world, get("/"), plan).await;
            (status(&answer), answer.retries)
        };
        let (first, second) = tokio::join!(one(), one());
        assert_eq!((first.0, second.0, first.1 + second.1), (200, 200, 1));
        assert_eq!(connections.get(), 2);
    });
}

#[test]
fn a_connection_behind_a_goaway_is_known_until_its_last_stream_ends() {
    test(|world| async move {
        let (addr, connections) = framing_server(|connection, streams| match (connection, streams) {
            (1, [first]) => [headers(0, *first), go_away(*first)].concat(),
            (_, streams) => headers(END_STREAM, *streams.last().unwrap()),
        })
        .await;
        publish_grpc(&world, addr);
        let open = client(&world);
        let one =
            async || send(&world, get("/"), plan(&world, open.live(), destination(&world, |_| {}))).await;
        let kept = one().await;
        assert_eq!(status(&kept), 200);
        // The second meets the GOAWAY, and goes elsewhere.
        assert_eq!(status(&one().await), 200);
        assert_eq!(connections.get(), 2);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(world.worker.connections.len(), 3, "the client's, and both to the server");
        drop(kept);
        eventually(|| world.worker.connections.len(), |left| *left == 2).await;
    });
}

#[test]
fn an_endpoint_of_another_node_is_reached_through_a_tunnel_and_its_connection_is_kept() {
    hbone::test(
        |_| {},
        |nodes| async move {
            let hbone::Nodes { a, b, app } = nodes;
            let addr = app.local_addr().unwrap();
            let server = Server::on(app, |_| Reply::ok("far"));
            let pod = hbone::server_pod();
            let web = service("web", VIP.into(), vec![endpoint(addr, Some(pod.id))]);
            a.publish(vec![pod], vec![web]);
            let open = client(&a);
            for _ in 0..3 {
                let answer = send(&a, get("/"), plan(&a, open.live(), destination(&a, |_| {}))).await;
                assert_eq!(answer.upstream.as_ref().unwrap().security, Security::MutualTls);
                assert_eq!(read(answer).await, (200, b"far".to_vec()));
                tokio::task::yield_now().await;
            }
            let large = vec![b'z'; 3 << 20];
            let request = Request::post("/").header("host", "web").body(Body::full(large.clone())).unwrap();
            let answer = send(&a, request, plan(&a, open.live(), destination(&a, |_| {}))).await;
            assert_eq!(read(answer).await.0, 200);
            assert!(server.bodies()[3] == large);
            assert_eq!(server.connections(), 1);
            assert_eq!(b.worker.connections.len(), 1, "one stream for all of them");
        },
    );
}
