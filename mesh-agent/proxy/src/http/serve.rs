//! Serves one client's connection with the HTTP library, and ends it: in order, by refusal, or by reset.
//!
//! Invariants:
//! - One task for a connection of HTTP/1, one more for each stream of HTTP/2.
//! - A refusal is counted once; the client is told by a status where it still expects one.
//! - A response that broke off is never ended as if it were complete.

use std::{error::Error, future::poll_fn, pin::pin, rc::Rc, task::Poll, time::Duration};

use hyper::{
    rt::Executor,
    server::conn::{http1, http2},
    service::service_fn,
};
use tokio::{
    task::{spawn_local, yield_now},
    time::{Instant, Sleep, sleep, timeout_at},
};

use super::{
    claim::Claim,
    client_io::ClientIo,
    guard::{HEAD_MAX, HEADERS_MAX},
    own::OwnSide,
    pipeline::handle,
    session::Session,
    switch,
};
use crate::{
    close::CloseReason,
    connections::Live,
    metrics::http::Refusal,
    stream::{Io, Stream},
    worker::{TICK_MS, Worker},
};

/// The HTTP library's buffer for each direction: a head must fit.
const BUFFER_MAX: usize = 128 << 10;
/// Bytes of a response that wait for the client's window, per stream of HTTP/2.
const STREAM_BUFFER_MAX: usize = 64 << 10;
/// Window of a stream and of a connection of HTTP/2.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;
/// Streams that may be reset before they were looked at, in HTTP/2.
const UNSEEN_RESETS_MAX: usize = 20;
/// Streams of one connection that we reset for errors of the client's, in HTTP/2.
const ERRORS_MAX: usize = 200;
/// How often a connection in a drain is looked at.
const LEAVE_STEP: Duration = Duration::from_millis(200);
/// How long bytes of a client are thrown away after it was refused, so that it reads why.
const LINGER: Duration = Duration::from_secs(1);
/// The same for the rest of a body that nobody wants: as long as it keeps coming, and so much of it.
const LINGER_MAX: Duration = Duration::from_secs(10);
const LINGER_BYTES_MAX: usize = 64 << 20;
/// Bytes that are thrown away before others get their turn.
const LINGER_TURN: usize = 256 << 10;

/// Serves a connection until it ends, and says why it did.
///
/// `own`: on the server's side.
pub(crate) async fn serve(
    worker: &Rc<Worker>,
    live: &Rc<Live>,
    stream: Stream,
    claim: Claim,
    own: Option<Box<OwnSide>>,
) -> CloseReason {
    let is_own = own.is_some();
    let session = Session::new(worker, live, claim.dialled, claim.http2, own, stream);
    let reason = if claim.http2 { serve_http2(&session).await } else { serve_http1(&session).await };
    let stream = session.socket.borrow_mut().stream.take();
    if let Some(stream) = stream {
        let left_in_order = claim.http2 && reason == CloseReason::Finished && live.meter.is_finishing();
        let is_unread = reason == CloseReason::Finished && session.socket.borrow().guard.in_body();
        if reason == CloseReason::ClientProtocol || left_in_order {
            // Frames of a client that has not read GOAWAY yet would otherwise mean a reset, and lose it the last answers.
            linger(live, stream, LINGER).await;
        } else if is_unread {
            // Who writes everything before it reads would lose the answer too.
            linger(live, stream, LINGER_MAX).await;
        } else if reason.resets() {
            stream.reset();
        } else {
            stream.shutdown_write();
        }
    }
    if is_own {
        worker.sites.leave_client(live.client);
    }
    reason
}

async fn serve_http1(session: &Rc<Session>) -> CloseReason {
    let service = {
        let session = Rc::clone(session);
        service_fn(move |request| handle(Rc::clone(&session), request))
    };
    // No `pipeline_flush`: with it the library takes a response's bytes whether or not the client does.
    let connection = http1::Builder::new()
        .max_headers(HEADERS_MAX)
        .max_header_size(HEAD_MAX)
        .max_buf_size(BUFFER_MAX)
        .serve_connection(ClientIo(Rc::clone(session)), service)
        .without_shutdown();
    let mut connection = pin!(connection);
    let mut watch = Watch::default();
    let outcome = poll_fn(|cx| {
        if let Some(reason) = session.live.meter.poll_stopped(cx) {
            return Poll::Ready(Err(reason));
        }
        if let Poll::Ready(outcome) = connection.as_mut().poll(cx) {
            return Poll::Ready(Ok(outcome));
        }
        session.pass_interim(cx);
        watch.poll(session, cx).map(Err)
    })
    .await;
    // What was refused belongs to the request that is being answered, or to one behind it.
    let in_body = session.socket.borrow().guard.refused_in_body();
    let can_reply =
        if in_body { !session.answered.get() } else { !session.is_busy() || !session.answered.get() };
    match outcome {
        Ok(Ok(parts)) => {
            let upgraded = session.switched.borrow_mut().take();
            match upgraded {
                Some(upgraded) => {
                    let mut relayed = pin!(switch::carry(session, &parts.read_buf, upgraded));
                    poll_fn(|cx| match session.live.meter.poll_stopped(cx) {
                        Some(reason) => Poll::Ready(reason),
                        None => relayed.as_mut().poll(cx),
                    })
                    .await
                }
                // An error between requests is an orderly end to the library.
                None => {
                    let refusal = session.socket.borrow().guard.refusal();
                    refusal.map_or(CloseReason::Finished, |reason| refuse(session, reason, can_reply))
                }
            }
        }
        Ok(Err(error)) => {
            let refusal = session.socket.borrow().guard.refusal();
            match refusal.or_else(|| refusal_of(&error)) {
                Some(reason) => {
                    // What the library refuses it answers itself.
                    refuse(session, reason, refusal.is_some() && can_reply)
                }
                None => reason_of(&error),
            }
        }
        Err(CloseReason::ClientProtocol) => {
            let reason = session.refused.get().unwrap_or(Refusal::Malformed);
            refuse(session, reason, can_reply && reason == Refusal::HeadTimeout)
        }
        Err(reason) => reason,
    }
}

/// Runs streams on the worker that has their connection.
#[derive(Clone, Copy, Debug)]
struct OnWorker;

impl<F: Future<Output: 'static> + 'static> Executor<F> for OnWorker {
    fn execute(&self, stream: F) {
        // It ends with its connection.
        drop(spawn_local(stream));
    }
}

async fn serve_http2(session: &Rc<Session>) -> CloseReason {
    let service = {
        let session = Rc::clone(session);
        service_fn(move |request| handle(Rc::clone(&session), request))
    };
    let settings = &session.worker.settings().http;
    let connection = http2::Builder::new(OnWorker)
        .max_concurrent_streams(settings.streams_max)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(STREAM_BUFFER_MAX)
        // What is larger it refuses without a word to us; what is smaller and still too large we refuse and count.
        .max_header_list_size(2 * HEAD_MAX as u32)
        .max_pending_accept_reset_streams(UNSEEN_RESETS_MAX)
        .max_local_error_reset_streams(ERRORS_MAX)
        .enable_connect_protocol()
        .serve_connection(ClientIo(Rc::clone(session)), service);
    let mut connection = pin!(connection);
    let mut watch = Watch::default();
    let mut finishing = false;
    let outcome = poll_fn(|cx| {
        if let Some(reason) = session.live.meter.poll_stopped(cx) {
            return Poll::Ready(Err(reason));
        }
        if !finishing && session.live.meter.is_finishing() {
            finishing = true;
            connection.as_mut().graceful_shutdown();
        }
        if let Poll::Ready(outcome) = connection.as_mut().poll(cx) {
            return Poll::Ready(Ok(outcome));
        }
        watch.poll(session, cx).map(Err)
    })
    .await;
    match outcome {
        Ok(Ok(())) => CloseReason::Finished,
        Ok(Err(error)) => match http2_refusal(&error) {
            Some(reason) => refuse(session, reason, false),
            None => reason_of(&error),
        },
        Err(CloseReason::ClientProtocol) => {
            refuse(session, session.refused.get().unwrap_or(Refusal::Malformed), false)
        }
        Err(reason) => reason,
    }
}

/// Looks for what takes too long; runs only while something may.
#[derive(Default)]
struct Watch {
    timer: Option<std::pin::Pin<Box<Sleep>>>,
    /// The connection is in a drain, and looked at more often.
    leaving: bool,
}

impl Watch {
    /// Ready when the client has used up its time or its credit.
    fn poll(&mut self, session: &Session, cx: &mut std::task::Context<'_>) -> Poll<CloseReason> {
        if session.refused.get().is_some() {
            return Poll::Ready(CloseReason::ClientProtocol);
        }
        let settings = &session.worker.settings().http;
        let mut step =
            (settings.head_timeout.min(settings.stall_timeout) / 4).max(Duration::from_millis(TICK_MS));
        let leaving = !session.http2 && session.live.meter.is_finishing();
        if leaving {
            step = step.min(LEAVE_STEP);
            if !std::mem::replace(&mut self.leaving, true) {
                self.timer = None;
            }
        }
        loop {
            let now = session.worker.tick();
            let head_since = session.socket.borrow().head_since;
            let is_watched = head_since.is_some() || session.is_busy() || leaving;
            let Some(timer) = &mut self.timer else {
                if !is_watched {
                    return Poll::Pending;
                }
                self.timer = Some(Box::pin(sleep(step)));
                continue;
            };
            // It runs on between requests: making one for each costs more than one look too many.
            if timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if !is_watched {
                self.timer = None;
                return Poll::Pending;
            }
            timer.as_mut().reset(Instant::now() + step);
            let is_over = |since: Option<u32>, limit: Duration| {
                since.is_some_and(|since| {
                    u128::from(now.wrapping_sub(since)) * u128::from(TICK_MS) >= limit.as_millis()
                })
            };
            let refusal = if is_over(head_since, settings.head_timeout) {
                Refusal::HeadTimeout
            } else if is_over(session.stalled_since(now), settings.stall_timeout) {
                Refusal::Stalled
            } else {
                continue;
            };
            session.refused.set(Some(refusal));
            return Poll::Ready(CloseReason::ClientProtocol);
        }
    }
}

/// Counts a refusal, and tells the client of it.
fn refuse(session: &Session, refusal: Refusal, reply: bool) -> CloseReason {
    let worker = &session.worker;
    worker.metrics().http.refused(refusal).inc();
    if worker.may_log() {
        tracing::info!(
            pod = %session.live.pod.name,
            client = %session.live.client,
            dialled = %session.dialled,
            reason = refusal.as_str(),
            "a client's HTTP was refused"
        );
    }
    if reply && let Some(stream) = &mut session.socket.borrow_mut().stream {
        let status = match refusal.status() {
            408 => "408 Request Timeout",
            431 => "431 Request Header Fields Too Large",
            501 => "501 Not Implemented",
            _ => "400 Bad Request",
        };
        let text = format!(
            "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\nserver: nodemesh\r\n\r\n"
        );
        // A client that has no room for it does not read it either.
        if let Ok(Io::Bytes(sent)) = stream.write(text.as_bytes()) {
            session.live.meter.add_to_client(sent as u64, worker.tick());
        }
    }
    CloseReason::ClientProtocol
}

/// Ends our half, and throws away what still comes: closing with unread bytes would reset the connection, and the client
/// might never read why.
async fn linger(live: &Live, mut stream: Stream, longest: Duration) {
    stream.shutdown_write();
    let deadline = Instant::now() + longest;
    let mut thrown_away = vec![0; 16 << 10];
    let (mut left, mut turn) = (LINGER_BYTES_MAX, LINGER_TURN);
    loop {
        let piece = poll_fn(|cx| {
            loop {
                if live.meter.poll_stopped(cx).is_some() {
                    return Poll::Ready(0);
                }
                stream.observe(cx);
                if !stream.is_readable() {
                    return Poll::Pending;
                }
                match stream.read(&mut thrown_away) {
                    Ok(Io::Bytes(got)) => return Poll::Ready(got),
                    Ok(Io::Blocked) => {}
                    Err(_) => return Poll::Ready(0),
                }
            }
        });
        // Whoever is silent, or sends for longer or more, is reset.
        let Ok(got @ 1..) = timeout_at(deadline.min(Instant::now() + LINGER), piece).await else { return };
        if got > left {
            return;
        }
        left -= got;
        match turn.checked_sub(got) {
            Some(rest) => turn = rest,
            None => {
                turn = LINGER_TURN;
                yield_now().await;
            }
        }
    }
}

/// Why the library refused a client's HTTP/1, if it did.
fn refusal_of(error: &hyper::Error) -> Option<Refusal> {
    if error.is_parse_too_large() {
        Some(Refusal::HeadTooLarge)
    } else if error.is_parse() {
        Some(Refusal::Malformed)
    } else {
        None
    }
}

/// Why a client's HTTP/2 was refused, if it was.
fn http2_refusal(error: &hyper::Error) -> Option<Refusal> {
    let error = error.source()?.downcast_ref::<h2::Error>()?;
    if error.is_io() || error.is_remote() {
        return None;
    }
    Some(match error.reason()? {
        h2::Reason::NO_ERROR | h2::Reason::CANCEL => return None,
        h2::Reason::ENHANCE_YOUR_CALM => Refusal::H2Flood,
        h2::Reason::FLOW_CONTROL_ERROR => Refusal::H2FlowControl,
        _ => Refusal::H2Protocol,
    })
}

/// Why a connection ended whose client kept to the rules.
fn reason_of(error: &hyper::Error) -> CloseReason {
    // The body of a response broke off.
    if error.is_user() {
        return CloseReason::UpstreamReset;
    }
    if error.is_incomplete_message() {
        return CloseReason::ClientReset;
    }
    let io = error.source().and_then(|source| {
        let of_http2 = source.downcast_ref::<h2::Error>().and_then(h2::Error::get_io);
        of_http2.or_else(|| source.downcast_ref::<std::io::Error>())
    });
    match io.map(std::io::Error::kind) {
        Some(std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe) => {
            CloseReason::ClientReset
        }
        _ => CloseReason::ClientLost,
    }
}
