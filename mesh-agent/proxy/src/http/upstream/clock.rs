//! The time that a route gives a request.
//!
//! Invariants:
//! - What a client takes to send its body is its own time; what comes behind the body is the route's.
//! - While no endpoint takes the body it cannot be known whether the client has sent it. Such time (for a connection, or for a turn
//!   at a limit) is the route's too, or a request would wait for ever where nobody takes anything.

use std::{cell::Cell, pin::Pin, rc::Rc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::replay::{Source, Stage};

/// The time of one request.
pub(super) struct Clock {
    /// Its body, if it has one.
    source: Option<Rc<Source>>,
    /// What is left of the time before the client has sent everything.
    left: Cell<Duration>,
    /// When it is over; known once the client has sent everything.
    at: Cell<Option<Instant>>,
}

impl Clock {
    /// It begins now.
    pub(super) fn new(limit: Duration, source: Option<Rc<Source>>) -> Self {
        Self { source, left: Cell::new(limit), at: Cell::new(None) }
    }

    /// Waits until the time is over.
    pub(super) async fn over(&self) {
        if let Some(source) = &self.source {
            loop {
                let turned = source.turned();
                tokio::pin!(turned);
                // From here on no turn is missed.
                turned.as_mut().enable();
                match source.stage() {
                    Stage::Untaken => {
                        let since = Instant::now();
                        if timeout(self.left.get(), turned).await.is_err() {
                            return;
                        }
                        self.left.set(self.left.get().saturating_sub(since.elapsed()));
                    }
                    Stage::Arriving => turned.await,
                    Stage::Over => break,
                }
            }
        }
        let at = Instant::now() + self.left.get();
        self.at.set(Some(at));
        sleep_until(at).await;
    }

    /// The same for what is left once the response has begun.
    pub(super) fn rest(self) -> Pin<Box<dyn Future<Output = ()>>> {
        match (self.at.get(), self.source) {
            (Some(at), _) => Box::pin(sleep_until(at)),
            // The endpoint answers a client that is still sending.
            (None, source) => Box::pin(async move {
                if let Some(source) = source {
                    source.sent().await;
                }
                sleep(self.left.get()).await;
            }),
        }
    }
}
