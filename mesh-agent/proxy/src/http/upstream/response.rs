//! The response of an endpoint on its way back: what it holds until its last byte, and where it ends.
//!
//! Not here: headers that stop at this hop, which [`super::super::fields`] takes away for whoever asked.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Response, header};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};

use super::{
    super::{
        body::{Body, BoxError},
        interim::Interim,
    },
    clock::Clock,
    cluster::Lease,
    replay::Source,
};
use crate::destination::{endpoints::Load, limits::Taken};

/// The response took longer than its route allows.
#[derive(Debug, thiserror::Error)]
#[error("the response's time is over")]
struct TooSlow;

/// What a request holds until its response is over.
pub(super) struct Held {
    pub(super) lease: Lease,
    pub(super) _request: Taken,
    /// The same where the server counts them too.
    pub(super) _of_server: Option<Taken>,
    pub(super) _load: Load,
    pub(super) source: Option<Rc<Source>>,
    pub(super) asked: Asked,
}

/// Ends a body that the endpoint has not asked for, when the response is over.
pub(super) struct Asked(pub(super) Option<Interim>);

impl Drop for Asked {
    fn drop(&mut self) {
        if let Some(interim) = &self.0 {
            interim.close();
        }
    }
}

impl Asked {
    /// Another try takes the question over: the copy of the body that waits for this one is looked at once more, and ends.
    pub(super) fn hand_on(&mut self) {
        if let Some(interim) = self.0.take() {
            interim.wake_body();
        }
    }
}

/// A response's body; at its end the connection is given back.
struct Tracked {
    inner: Incoming,
    held: Option<Held>,
    limit: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

/// The body for whoever asked: the connection is theirs until it has ended or was dropped.
pub(super) fn body(inner: Incoming, held: Held, clock: Option<Clock>) -> Body {
    if inner.is_end_stream() {
        finish(held);
        return Body::Empty;
    }
    let limit = clock.map(Clock::rest);
    Body::boxed(Tracked { inner, held: Some(held), limit })
}

fn finish(held: Held) {
    if let Some(source) = &held.source {
        source.settle();
    }
    // A connection on which a body is still to come serves nobody else.
    if held.asked.0.as_ref().is_some_and(Interim::is_waiting) {
        return;
    }
    held.lease.finish();
}

impl HttpBody for Tracked {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let body = self.get_mut();
        if let Some(limit) = &mut body.limit
            && limit.as_mut().poll(cx).is_ready()
        {
            body.held = None;
            return Poll::Ready(Some(Err(TooSlow.into())));
        }
        let frame = match Pin::new(&mut body.inner).poll_frame(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(frame) => frame,
        };
        match &frame {
            Some(Err(_)) => body.held = None,
            Some(Ok(_)) if !body.inner.is_end_stream() => {}
            Some(Ok(_)) | None => body.held.take().into_iter().for_each(finish),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Whether there is one reading of where a response ends. The library takes `chunked` where both are given, and reads
/// encodings before it as part of the body; others may not.
pub(super) fn is_framed_once<B>(response: &Response<B>) -> bool {
    let headers = response.headers();
    let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let Some(encoding) = encodings.next() else { return true };
    encodings.next().is_none()
        && encoding.as_bytes().eq_ignore_ascii_case(b"chunked")
        && response.version() == http::Version::HTTP_11
        && !headers.contains_key(header::CONTENT_LENGTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_ends_where_everybody_says_it_does() {
        const CHUNKED: (&str, &str) = ("transfer-encoding", "chunked");
        for (headers, is_good) in [
            (&[][..], true),
            (&[("content-length", "5")], true),
            (&[("transfer-encoding", "Chunked")], true),
            (&[CHUNKED, ("content-length", "5")], false),
            (&[CHUNKED, CHUNKED], false),
            (&[("transfer-encoding", "gzip, chunked")], false),
            (&[("transfer-encoding", "identity")], false),
        ] {
            let response = headers
                .iter()
                .fold(Response::builder(), |response, (name, value)| response.header(*name, *value));
            assert_eq!(is_framed_once(&response.body(()).unwrap()), is_good, "{headers:?}");
        }
        let old = Response::builder().version(http::Version::HTTP_10).header(CHUNKED.0, CHUNKED.1);
        assert!(!is_framed_once(&old.body(()).unwrap()));
    }
}
