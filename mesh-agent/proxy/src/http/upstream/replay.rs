//! The body of a request that may be sent more than once: to another endpoint when a try fails, and to mirrors.
//!
//! Invariants:
//! - At most [`KEPT_MAX`] bytes of a body are kept, and [`KEPT_OF_WORKER_MAX`] over all requests of a worker; a body that
//!   outgrows this goes on to whom it is on its way to, and to nobody else.
//! - Only the newest try reads from the client; older ones end.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::sync::{Notify, futures::Notified};

use crate::http::body::{Body, BoxError};

/// Bytes of one request that are kept to be sent again: what Envoy's buffers hold by default.
pub(super) const KEPT_MAX: usize = 1 << 20;
/// The same over all requests of a worker.
pub(super) const KEPT_OF_WORKER_MAX: usize = 32 << 20;
/// Pieces of one request that are kept.
const PIECES_MAX: usize = 4096;

/// Bytes that requests of a worker keep.
pub(super) type Kept = Rc<Cell<usize>>;

/// Why a copy of a body ended.
#[derive(Debug, thiserror::Error)]
enum CopyEnd {
    #[error("another try took the place of this one")]
    Superseded,
    #[error("the body is too large to be sent more than once")]
    TooLarge,
    #[error("the request ended before its body")]
    Ended,
    #[error("the client broke off")]
    Broken,
}

/// A body and what is kept of it.
pub(super) struct Source {
    state: RefCell<State>,
    kept: Kept,
    /// Tells of each change of its stage.
    turned: Notify,
}

/// How far a body has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The newest try takes nothing of it yet.
    Untaken,
    /// The newest try takes it as it comes from the client.
    Arriving,
    /// Nothing more comes from the client.
    Over,
}

struct State {
    inner: Body,
    pieces: Vec<Bytes>,
    size: usize,
    trailers: Option<HeaderMap>,
    phase: Phase,
    /// Whether `pieces` still begins at the first byte.
    is_whole: bool,
    newest: u32,
    /// The newest try has begun to read.
    is_read: bool,
    waiting: Vec<Waker>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Ended,
    Broken,
    Abandoned,
}

impl Source {
    pub(super) fn new(inner: Body, kept: &Kept) -> Rc<Self> {
        let phase = if inner.is_end_stream() { Phase::Ended } else { Phase::Open };
        let state = State {
            inner,
            pieces: Vec::new(),
            size: 0,
            trailers: None,
            phase,
            is_whole: true,
            newest: 0,
            is_read: false,
            waiting: Vec::new(),
        };
        Rc::new(Self { state: RefCell::new(state), kept: Rc::clone(kept), turned: Notify::new() })
    }

    /// Whether another try can be made of it.
    pub(super) fn can_repeat(&self) -> bool {
        let state = self.state.borrow();
        state.is_whole && state.phase != Phase::Broken
    }

    /// How far it has come.
    pub(super) fn stage(&self) -> Stage {
        let state = self.state.borrow();
        match state.phase {
            Phase::Open if state.is_read => Stage::Arriving,
            Phase::Open => Stage::Untaken,
            Phase::Ended | Phase::Broken | Phase::Abandoned => Stage::Over,
        }
    }

    /// Waits for the next change of its stage.
    pub(super) fn turned(&self) -> Notified<'_> {
        self.turned.notified()
    }

    /// Waits until nothing more of it comes from the client.
    pub(super) async fn sent(&self) {
        loop {
            let turned = self.turned();
            tokio::pin!(turned);
            turned.as_mut().enable();
            if self.stage() == Stage::Over {
                return;
            }
            turned.await;
        }
    }

    /// The body for the next try; the one before gets no further.
    pub(super) fn next(self: &Rc<Self>) -> Body {
        let mut state = self.state.borrow_mut();
        if state.phase == Phase::Ended && state.pieces.is_empty() && state.trailers.is_none() {
            return Body::Empty;
        }
        self.replace(&mut state);
        let newest = Some(state.newest);
        Body::boxed(Copy { source: Rc::clone(self), of: newest, at: 0, trailers_sent: false })
    }

    /// The body for a mirror: it follows what the tries read.
    pub(super) fn mirror(self: &Rc<Self>) -> Body {
        let state = self.state.borrow();
        if state.phase == Phase::Ended && state.pieces.is_empty() && state.trailers.is_none() {
            return Body::Empty;
        }
        Body::boxed(Copy { source: Rc::clone(self), of: None, at: 0, trailers_sent: false })
    }

    /// The try that reads it gets no further; there will be another.
    pub(super) fn supersede(&self) {
        self.replace(&mut self.state.borrow_mut());
    }

    fn replace(&self, state: &mut State) {
        state.newest += 1;
        state.is_read = false;
        self.turned.notify_waiters();
    }

    /// No try will read any more.
    pub(super) fn abandon(&self) {
        let mut state = self.state.borrow_mut();
        self.replace(&mut state);
        if state.phase == Phase::Open {
            state.phase = Phase::Abandoned;
            state.inner = Body::Empty;
        }
        state.wake();
    }

    /// Nothing will be repeated from here on: what is kept is given back as it is sent.
    pub(super) fn settle(&self) {
        let mut state = self.state.borrow_mut();
        if state.phase != Phase::Ended {
            self.forget(&mut state);
        }
    }

    fn forget(&self, state: &mut State) {
        state.is_whole = false;
        state.wake();
    }

    /// Takes the next frame of the client's.
    fn pull(&self, state: &mut State, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = match Pin::new(&mut state.inner).poll_frame(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(frame) => frame,
        };
        match frame {
            None => self.end(state),
            Some(Err(error)) => {
                state.phase = Phase::Broken;
                self.turned.notify_waiters();
                state.wake();
                return Poll::Ready(Some(Err(error)));
            }
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    let size = state.size + data.len();
                    let of_worker = self.kept.get() + data.len();
                    if state.is_whole
                        && (size > KEPT_MAX
                            || of_worker > KEPT_OF_WORKER_MAX
                            || state.pieces.len() >= PIECES_MAX)
                    {
                        self.forget(state);
                    }
                    if state.is_whole {
                        state.size = size;
                        self.kept.set(of_worker);
                        state.pieces.push(data.clone());
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    state.trailers = Some(trailers.clone());
                }
                if state.inner.is_end_stream() {
                    self.end(state);
                }
                state.wake();
                return Poll::Ready(Some(Ok(frame)));
            }
        }
        state.wake();
        Poll::Ready(None)
    }

    fn end(&self, state: &mut State) {
        state.phase = Phase::Ended;
        self.turned.notify_waiters();
    }
}

impl State {
    fn wake(&mut self) {
        self.waiting.drain(..).for_each(Waker::wake);
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let size = self.state.get_mut().size;
        self.kept.set(self.kept.get().saturating_sub(size));
    }
}

/// One reading of a source.
struct Copy {
    source: Rc<Source>,
    /// Number of the try; `None` of a mirror.
    of: Option<u32>,
    /// Pieces it has had.
    at: usize,
    trailers_sent: bool,
}

impl HttpBody for Copy {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let copy = self.get_mut();
        let state = &mut *copy.source.state.borrow_mut();
        let is_newest = copy.of == Some(state.newest);
        if copy.of.is_some() && !is_newest {
            return Poll::Ready(Some(Err(CopyEnd::Superseded.into())));
        }
        if is_newest && !state.is_read {
            state.is_read = true;
            copy.source.turned.notify_waiters();
        }
        if copy.at < state.pieces.len() {
            copy.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(state.pieces[copy.at - 1].clone()))));
        }
        if !state.is_whole && !is_newest {
            return Poll::Ready(Some(Err(CopyEnd::TooLarge.into())));
        }
        match state.phase {
            Phase::Ended => match state.trailers.clone().filter(|_| !copy.trailers_sent) {
                Some(trailers) => {
                    copy.trailers_sent = true;
                    Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                }
                None => Poll::Ready(None),
            },
            Phase::Broken => Poll::Ready(Some(Err(CopyEnd::Broken.into()))),
            Phase::Abandoned => Poll::Ready(Some(Err(CopyEnd::Ended.into()))),
            Phase::Open if is_newest => {
                let frame = copy.source.pull(state, cx);
                if state.is_whole {
                    copy.at = state.pieces.len();
                }
                copy.trailers_sent = state.trailers.is_some();
                frame
            }
            Phase::Open => {
                state.waiting.push(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let state = self.source.state.borrow();
        state.phase == Phase::Ended
            && self.at >= state.pieces.len()
            && (state.trailers.is_none() || self.trailers_sent)
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.source.state.borrow();
        let rest: u64 = state.pieces.iter().skip(self.at).map(|piece| piece.len() as u64).sum();
        match (state.phase, state.inner.size_hint().exact()) {
            (Phase::Ended, _) => SizeHint::with_exact(rest),
            (_, Some(more)) => SizeHint::with_exact(rest + more),
            (_, None) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use http_body_util::BodyExt;

    use super::*;

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(work)
    }

    async fn collect(body: Body) -> Result<Vec<u8>, BoxError> {
        Ok(body.collect().await?.to_bytes().to_vec())
    }

    /// A body that nobody knows the length of.
    struct Pieces(VecDeque<Vec<u8>>);

    impl HttpBody for Pieces {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            Poll::Ready(self.get_mut().0.pop_front().map(|piece| Ok(Frame::data(piece.into()))))
        }
    }

    fn stream(pieces: Vec<Vec<u8>>) -> Body {
        Body::boxed(Pieces(pieces.into()))
    }

    #[test]
    fn a_second_try_gets_what_the_first_had_and_what_it_had_not() {
        run(async {
            let kept = Kept::default();
            let source = Source::new(stream(vec![b"ab".to_vec(), b"cd".to_vec()]), &kept);
            let mut first = source.next();
            let frame = first.frame().await.unwrap().unwrap();
            assert_eq!(&frame.into_data().unwrap()[..], b"ab");
            let second = source.next();
            assert!(first.frame().await.unwrap().is_err(), "the first gets no further");
            assert_eq!(collect(second).await.unwrap(), b"abcd");
            assert_eq!(collect(source.next()).await.unwrap(), b"abcd");
            assert_eq!(kept.get(), 4);
            drop((first, source));
            assert_eq!(kept.get(), 0);
        });
    }

    #[test]
    fn a_body_beyond_the_limit_passes_once_and_is_not_kept() {
        run(async {
            let kept = Kept::default();
            let pieces = vec![vec![7; KEPT_MAX / 2]; 5];
            let source = Source::new(stream(pieces), &kept);
            let mirror = source.mirror();
            assert_eq!(collect(source.next()).await.unwrap().len(), KEPT_MAX / 2 * 5);
            assert!(kept.get() <= KEPT_MAX);
            assert!(!source.can_repeat());
            assert!(collect(mirror).await.is_err(), "a mirror gets all of it or an error");
        });
    }

    #[test]
    fn a_mirror_of_a_request_that_ended_early_ends_too() {
        run(async {
            let source = Source::new(stream(vec![b"ab".to_vec(), b"cd".to_vec()]), &Kept::default());
            let mut body = source.next();
            body.frame().await.unwrap().unwrap();
            let mirror = source.mirror();
            source.abandon();
            assert!(collect(mirror).await.is_err());
        });
    }
}
