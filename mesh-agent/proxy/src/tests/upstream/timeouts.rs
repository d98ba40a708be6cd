//! When the time of a request with a body begins, and what it covers.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use hyper::body::Frame;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::spawn_local,
    time::{sleep, timeout},
};

use super::*;
use crate::http::body::BoxError;

const LIMIT: Duration = Duration::from_millis(60);

/// One piece at once, and the end when the other half is dropped.
struct Slow {
    piece: Option<Bytes>,
    end: oneshot::Receiver<()>,
}

impl Slow {
    fn post() -> (Request<Body>, oneshot::Sender<()>) {
        let (tell, end) = oneshot::channel();
        let body = Body::boxed(Self { piece: Some(Bytes::from_static(b"begun")), end });
        (Request::post("/").header("host", "web").body(body).unwrap(), tell)
    }
}

impl hyper::body::Body for Slow {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(piece) = self.piece.take() {
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        ready!(Pin::new(&mut self.end).poll(cx)).ok();
        Poll::Ready(None)
    }
}

fn limited(world: &World, live: &Rc<Live>, limit: Duration) -> Plan {
    let one = |policy: &mut TrafficPolicy| policy.pool.max_connections = Some(1);
    Plan { timeout: Some(limit), ..plan(world, live, destination(world, one)) }
}

#[test]
fn s32_time_spent_waiting_for_a_connection_is_the_requests_own_whether_or_not_it_has_a_body() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::Hang).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let (upstreams, holding) =
            (Upstreams::of(&world.worker), limited(&world, open.live(), LIMIT * 10_000));
        let held = spawn_local(async move { upstreams.send(get("/"), holding).await });
        eventually(|| server.heads().len(), |heads| *heads == 1).await;
        for request in [get("/"), post(b"all of it"), Slow::post().0] {
            let answer = send(&world, request, limited(&world, open.live(), LIMIT)).await;
            assert_eq!((failure(&answer).status, failure(&answer).flag), (504, Flag::UpstreamTimeout));
            assert_eq!(failure(&answer).details, "response_timeout");
        }
        assert_eq!(server.heads().len(), 1);
        held.abort();
    });
}

#[test]
fn s32_an_endpoint_that_takes_no_connection_is_not_waited_for_beyond_the_requests_time() {
    test(|world| async move {
        let deaf = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        deaf.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        deaf.listen(0).unwrap();
        let addr = deaf.local_addr().unwrap().as_socket().unwrap();
        // Those that fit into its queue; a further one gets no answer.
        let mut queued = Vec::new();
        while let Ok(stream) = timeout(Duration::from_millis(200), TcpStream::connect(addr)).await {
            queued.push(stream.unwrap());
        }
        publish(&world, vec![endpoint(addr, None)]);
        let open = client(&world);
        let on = RetryOn { connect_failure: true, ..RetryOn::default() };
        let limited =
            Plan { route: retrying(2, on, None), retry: true, ..limited(&world, open.live(), LIMIT) };
        let answer = send(&world, post(b"all of it"), limited).await;
        assert_eq!((failure(&answer).status, failure(&answer).flag), (504, Flag::UpstreamTimeout));
        // Without a time of its own a request waits for as long as a connection may take.
        let short = |policy: &mut TrafficPolicy| policy.pool.connect_timeout = LIMIT;
        let answer = send(&world, get("/"), plan(&world, open.live(), destination(&world, short))).await;
        assert_eq!((failure(&answer).status, failure(&answer).flag), (503, Flag::UpstreamFailure));
        assert_eq!(failure(&answer).details, "upstream_reset_before_response_started{connection_timeout}");
    });
}

#[test]
fn a_connection_serves_no_request_once_it_has_lived_as_long_as_it_may() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("done")).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let lived = |max: Option<Duration>| {
            let to = destination(&world, |policy| policy.pool.max_connection_duration = max);
            send(&world, get("/"), plan(&world, open.live(), to))
        };
        for (max, connections) in [(None, 1), (None, 1), (Some(Duration::from_secs(3600)), 1)] {
            assert_eq!(read(lived(max).await).await.0, 200);
            assert_eq!(server.connections(), connections);
            // Until it is back in the pool.
            sleep(Duration::from_millis(20)).await;
        }
        // A tick of the worker's clock later.
        sleep(Duration::from_millis(crate::worker::TICK_MS * 3)).await;
        let short = Some(Duration::from_millis(crate::worker::TICK_MS));
        assert_eq!(read(lived(short).await).await.0, 200);
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn s32_a_client_may_take_longer_to_send_than_the_endpoint_to_answer() {
    test(|world| async move {
        let server = Server::start("127.0.0.1:0", |_| Reply::ok("in time")).await;
        publish(&world, vec![endpoint(server.addr, None)]);
        let open = client(&world);
        let limit = Duration::from_secs(1);
        let (request, tell) = Slow::post();
        spawn_local(async move {
            sleep(limit * 2).await;
            drop(tell);
        });
        let answer = send(&world, request, limited(&world, open.live(), limit)).await;
        assert_eq!(read(answer).await, (200, b"in time".to_vec()));
        assert_eq!(server.bodies(), [b"begun".to_vec()]);
    });
}

/// Answers without end, and does not wait for the end of the request.
async fn answer_early(listener: TcpListener) -> std::io::Result<std::convert::Infallible> {
    let (mut stream, _) = listener.accept().await?;
    stream.read_u8().await?;
    stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await?;
    loop {
        stream.write_all(b"1\r\nx\r\n").await?;
        sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn s32_a_response_that_began_before_the_request_ended_has_its_time_from_that_end_on() {
    test(|world| async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        spawn_local(async move { answer_early(listener).await.err() });
        publish(&world, vec![endpoint(addr, None)]);
        let open = client(&world);
        let (request, tell) = Slow::post();
        let limit = Duration::from_secs(1);
        let answer = send(&world, request, limited(&world, open.live(), limit)).await;
        assert_eq!(status(&answer), 200);
        let mut body = answer.outcome.unwrap().into_body();
        sleep(limit * 2).await;
        for _ in 0..10 {
            assert!(soon(body.frame()).await.unwrap().is_ok(), "the client is still sending");
        }
        drop(tell);
        assert!(soon(body.collect()).await.is_err(), "it never ends by itself");
    });
}
