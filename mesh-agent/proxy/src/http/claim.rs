//! Which connections are looked into: what was declared for their port, else their first bytes.
//!
//! Invariants:
//! - Bytes are looked at, never taken: a connection that is not HTTP is relayed as if nobody had looked.
//! - Nobody waits for ever: without a first byte in time, or at ports of protocols in which the server speaks first, it is not HTTP.

use std::{future::poll_fn, io, net::SocketAddr, os::fd::AsFd, task::Poll, time::Duration};

use mesh_core::{
    route::{protocol::AppProtocol, scope::OutboundPolicy, sight::Sight},
    snapshot::{Protocol, Snapshot, Workload},
};
use tokio::time::timeout;

use super::tables;
use crate::{connections::Live, stream::Stream, target::canonical, worker::Worker};

/// A connection that is HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// What the client dialled.
    pub(crate) dialled: SocketAddr,
    /// The client speaks HTTP/2.
    pub(crate) http2: bool,
}

/// What the first bytes of a connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Http1,
    Http2,
    Other,
    /// Too few yet.
    Unclear,
}

/// Bytes that are looked at: as many as HTTP/2 begins with.
const LOOK: usize = 24;
const PREFACE: &[u8; LOOK] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Methods that a request without a declared protocol may begin with.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// Whether anything is said that makes connections worth a look.
pub(crate) fn may_claim(snapshot: &Snapshot) -> bool {
    !snapshot.routes().is_empty()
        || snapshot.has_unlisted()
        || snapshot.has_shared()
        || snapshot.counts_requests()
        || snapshot.mesh().defaults.outbound == OutboundPolicy::RegistryOnly
}

/// Decides whether an accepted outbound connection is HTTP that something is said about.
pub(crate) async fn claim(worker: &Worker, live: &Live, accepted: &mut Stream) -> Option<Claim> {
    let snapshot = worker.snapshot();
    let sight = snapshot.sight(live.pod.workload, &live.pod.name.namespace);
    // One that is not known is refused where all others are dialled.
    let dialled = canonical(worker.kernel().dialled(accepted.as_fd())?.dst);
    let is_counted = tables::is_counted(&snapshot, &sight, dialled, &worker.settings().node);
    if !is_counted && !tables::concerns(&snapshot, &sight, dialled) {
        return None;
    }
    let declared = declared(&sight, dialled);
    let detection_timeout = snapshot.mesh().defaults.detection_timeout;
    drop(snapshot);
    let http2 = is_http2(worker, accepted, declared, detection_timeout).await?;
    live.set_original_dst(dialled);
    Some(Claim { dialled, http2 })
}

/// Decides whether a connection to `dialled` of a local pod is HTTP, on the pod's own side.
pub(crate) async fn claim_own(
    worker: &Worker,
    server: &Workload,
    dialled: SocketAddr,
    accepted: &mut Stream,
) -> Option<Claim> {
    let snapshot = worker.snapshot();
    let declared = snapshot.spoken_at(server, dialled.port());
    let detection_timeout = snapshot.mesh().defaults.detection_timeout;
    drop(snapshot);
    let http2 = is_http2(worker, accepted, declared, detection_timeout).await?;
    Some(Claim { dialled, http2 })
}

/// Which HTTP a client speaks; `None`: none.
async fn is_http2(
    worker: &Worker,
    accepted: &mut Stream,
    declared: AppProtocol,
    detection_timeout: Option<Duration>,
) -> Option<bool> {
    let first = if declared.is_http() {
        // Idle connections are ended by the worker's sweep.
        look(accepted, |first| if first == First::Other { First::Http1 } else { first }).await
    } else if declared == AppProtocol::Sniffed {
        let limit = detection_timeout.unwrap_or(worker.settings().http.sniff_timeout);
        timeout(limit, look(accepted, |first| first)).await.unwrap_or(First::Other)
    } else {
        First::Other
    };
    match first {
        First::Http1 => Some(false),
        First::Http2 => Some(true),
        First::Other | First::Unclear => None,
    }
}

/// What is said of the protocol at an address.
pub(super) fn declared(sight: &Sight<'_>, dialled: SocketAddr) -> AppProtocol {
    match sight.service_at(dialled, Protocol::Tcp) {
        Some((_, port)) => AppProtocol::of(port),
        // Where servers speak first nobody would say anything.
        None => AppProtocol::of_number(dialled.port()),
    }
}

/// Waits until the first bytes say what they are. A connection that ends before is nothing.
async fn look(accepted: &mut Stream, read: impl Fn(First) -> First) -> First {
    poll_fn(|cx| {
        accepted.observe(cx);
        if !accepted.has_bytes() {
            return Poll::Pending;
        }
        let mut bytes = [0; LOOK];
        match accepted.socket().peek(&mut bytes) {
            Ok(0) => Poll::Ready(First::Other),
            Ok(count) => match read(first(&bytes[..count])) {
                // More bytes make another edge; after the end there is none.
                First::Unclear if accepted.is_read_closed() => Poll::Ready(First::Other),
                First::Unclear => Poll::Pending,
                clear => Poll::Ready(clear),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
            Err(_) => Poll::Ready(First::Other),
        }
    })
    .await
}

fn first(bytes: &[u8]) -> First {
    if bytes.starts_with(PREFACE) {
        return First::Http2;
    }
    if PREFACE.starts_with(bytes) {
        return First::Unclear;
    }
    let mut unclear = false;
    for method in METHODS {
        match bytes.strip_prefix(method.as_bytes()) {
            Some([b' ', next, ..]) if next.is_ascii_graphic() => return First::Http1,
            Some([] | [b' ']) => unclear = true,
            Some(_) => {}
            None => unclear |= method.as_bytes().starts_with(bytes),
        }
    }
    if unclear { First::Unclear } else { First::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bytes_tell_protocols_apart() {
        for (bytes, seen) in [
            (&b"GET / HTTP/1.1\r\n"[..], First::Http1),
            (b"OPTIONS * HTTP/1.1", First::Http1),
            (b"CONNECT a:1", First::Http1),
            (b"POST h", First::Http1),
            (b"G", First::Unclear),
            (b"P", First::Unclear),
            (b"PRI * HTTP/2.0\r\n", First::Unclear),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", First::Http2),
            (b"PUT ", First::Unclear),
            (b"GETS / ", First::Other),
            (b"get / HTTP/1.1", First::Other),
            (b"\x16\x03\x01", First::Other),
            (b"EHLO", First::Other),
            (b"*1\r\n$4", First::Other),
        ] {
            assert_eq!(first(bytes), seen, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
