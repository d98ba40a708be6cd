//! What a connection reports, and why it cannot do what it is asked.

use std::ops::Range;

use thiserror::Error;

use super::{ErrorCode, Headers, StreamKey, Violation};

/// What the peer's bytes meant.
#[derive(Debug)]
pub(crate) enum Event {
    /// To a server: a well-formed request. Answer with `respond`, or `reset`.
    Opened {
        stream: StreamKey,
        headers: Box<Headers>,
        /// The client's half is over already.
        end: bool,
    },
    /// To a client: the final response (informational ones are swallowed).
    Response {
        stream: StreamKey,
        status: u16,
        /// The server's half is over already.
        end: bool,
    },
    /// Bytes of a stream: `range` of the bytes given to this call of `receive`, never empty. Report them with
    /// `consumed` when they are passed on.
    Data {
        stream: StreamKey,
        range: Range<usize>,
        /// They are the last.
        end: bool,
    },
    /// The peer's half of a stream ended without more data (an empty DATA frame, or trailers).
    Ended { stream: StreamKey },
    /// The stream is over in both directions. What was not consumed still counts against the connection's window: consume
    /// it, or `reset` the stream, which only forgets it now.
    Reset { stream: StreamKey, cause: Cause },
    /// A request of the peer was refused before there was a stream; nothing to do but count it.
    Refused { violation: Violation },
    /// Sending may go on where the window was exhausted: on one stream, or on all (`None`).
    WindowOpened { stream: Option<StreamKey> },
    /// The peer's SETTINGS were applied: more streams may be allowed, windows may have changed.
    SettingsChanged,
    /// The peer takes no more streams. Those above `last` follow as resets with [`Cause::Unprocessed`].
    GoAway { last: u32, code: ErrorCode },
}

/// Why a stream was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// The peer reset it.
    Peer(ErrorCode),
    /// The peer says it has done nothing for it (GOAWAY, REFUSED_STREAM): it may be tried elsewhere.
    Unprocessed,
    /// This side reset it, for what the peer did.
    Violation(Violation),
}

/// Why no stream was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum OpenError {
    /// As many streams are open as the peer or [`super::Limits`] allow.
    #[error("the connection carries as many streams as it may")]
    Full,
    /// One side said GOAWAY, the connection failed, or its stream ids are used up.
    #[error("the connection takes no more streams")]
    GoingAway,
    /// The headers exceed what the peer announced.
    #[error("the peer takes no headers of this size")]
    HeadersTooLarge,
}

/// Why nothing was sent on a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum SendError {
    /// The key is of a stream that is gone.
    #[error("the stream is gone")]
    Gone,
    /// This side has ended its half, or has not answered the request yet.
    #[error("the stream does not take data now")]
    NotOpen,
    /// Headers are in the output buffer: they must be on their way first.
    #[error("headers must be sent before data")]
    OutputFirst,
    /// More than the window or the peer's frame size allows.
    #[error("the window does not allow this many bytes")]
    Window,
}
