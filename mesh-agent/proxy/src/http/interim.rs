//! What a server says before its response (`100 Continue`, `103 Early Hints`), and bodies that wait for it.
//!
//! A client that asks whether its body is wanted (`expect: 100-continue`) is answered by the server, not by us: the body
//! waits here until the server says so, or has been silent for [`PATIENCE`]. A final response before that means that
//! the body is never asked for.
//!
//! Invariants:
//! - At most [`HEADS_MAX`] bytes of interim responses wait for a client; further ones are left out.
//! - A body that was not asked for ends with an error once the response is over, so that its connection ends too.

use std::{
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::{
    body::{Body, BoxError},
    fields,
};

/// How long a server may think about whether it wants a body. Clients do not wait longer themselves.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of interim responses on their way to one client.
const HEADS_MAX: usize = 16 << 10;

/// The body was not asked for.
#[derive(Debug, thiserror::Error)]
#[error("the server answered without asking for the body")]
struct NotWanted;

/// Shared by a client's connection and the requests on it. The HTTP library wants what it calls to be `Send`.
#[derive(Clone, Default)]
pub(crate) struct Interim(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    gate: Gate,
    body: Option<Waker>,
    heads: Vec<u8>,
    client: Option<Waker>,
}

/// Whether the current request's body may go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Gate {
    #[default]
    Open,
    Waiting,
    Closed,
}

impl fmt::Debug for Interim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Interim({:?})", self.state().gate)
    }
}

impl Interim {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request begins; `asks`: whether its body is wanted.
    pub(super) fn begin(&self, asks: bool) {
        let mut state = self.state();
        state.gate = if asks { Gate::Waiting } else { Gate::Open };
        state.heads.clear();
    }

    /// Has the library tell us of what is said before the response.
    pub(crate) fn listen<B>(&self, request: &mut Request<B>) {
        let interim = self.clone();
        hyper::ext::on_informational(request, move |response| {
            interim.said(response.status(), response.headers());
        });
    }

    fn said(&self, status: StatusCode, headers: &HeaderMap) {
        if status == StatusCode::CONTINUE {
            // The library tells the client when the body is read.
            return self.open();
        }
        let mut state = self.state();
        let mut head =
            format!("HTTP/1.1 {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or_default())
                .into_bytes();
        let mut headers = headers.clone();
        fields::strip_hop_by_hop(&mut headers);
        headers.remove(header::CONTENT_LENGTH);
        for (name, value) in &headers {
            for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
                head.extend_from_slice(part);
            }
        }
        head.extend_from_slice(b"\r\n");
        if state.heads.len() + head.len() <= HEADS_MAX {
            state.heads.extend_from_slice(&head);
            if let Some(client) = &state.client {
                client.wake_by_ref();
            }
        }
    }

    /// Lets the body go.
    pub(crate) fn open(&self) {
        self.change(Gate::Open);
    }

    /// The response is over: a body that nobody asked for never goes.
    pub(crate) fn close(&self) {
        self.change(Gate::Closed);
    }

    fn change(&self, to: Gate) {
        let mut state = self.state();
        if state.gate == Gate::Waiting {
            state.gate = to;
            if let Some(body) = state.body.take() {
                body.wake();
            }
        }
    }

    /// Has whoever waits for the body look again.
    pub(crate) fn wake_body(&self) {
        if let Some(body) = self.state().body.take() {
            body.wake();
        }
    }

    /// Whether the current request's body was never asked for, and may come all the same.
    pub(super) fn is_unasked(&self) -> bool {
        self.state().gate != Gate::Open
    }

    /// Whether the body is still not asked for.
    pub(crate) fn is_waiting(&self) -> bool {
        self.state().gate == Gate::Waiting
    }

    /// Wakes the client's task when there are interim responses for it.
    pub(super) fn wake_for(&self, cx: &Context<'_>) {
        let mut state = self.state();
        if !state.client.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.client = Some(cx.waker().clone());
        }
    }

    /// Interim responses for the client.
    pub(super) fn heads(&self) -> Vec<u8> {
        std::mem::take(&mut self.state().heads)
    }
}

/// A body that waits until it is asked for.
pub(super) struct Gated {
    body: Body,
    interim: Interim,
    is_open: bool,
    patience: Option<Pin<Box<Sleep>>>,
}

impl Gated {
    pub(super) fn new(body: Body, interim: Interim) -> Self {
        Self { body, interim, is_open: false, patience: None }
    }

    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NotWanted>> {
        let mut state = self.interim.state();
        match state.gate {
            Gate::Open => return Poll::Ready(Ok(())),
            Gate::Closed => return Poll::Ready(Err(NotWanted)),
            Gate::Waiting => state.body = Some(cx.waker().clone()),
        }
        drop(state);
        let patience = self.patience.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
        if patience.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.interim.open();
        Poll::Ready(Ok(()))
    }
}

impl HttpBody for Gated {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let gated = self.get_mut();
        if !gated.is_open {
            match gated.poll_open(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                Poll::Ready(Ok(())) => gated.is_open = true,
            }
        }
        Pin::new(&mut gated.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
