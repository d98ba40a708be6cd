//! HTTP/2 for tunnels, without I/O: frames in, events out, control frames into a buffer.
//!
//! Both roles of RFC 9113 as far as CONNECT needs them, towards any conforming peer. The caller owns sockets, TLS,
//! buffers and time; [`Connection`] owns protocol state only:
//!
//! ```text
//! let mut at = 0;
//! while let Some(event) = connection.receive(now, plaintext, &mut at)? { … plaintext[range] … }
//! write(connection.output()); connection.clear_output();      // always before the next DATA frame
//! let room = connection.send_capacity(stream).min(connection.max_data());
//! let n = app.read(&mut record[9..][..room])?;
//! record[..9].copy_from_slice(&connection.data_frame(stream, n, false)?);
//! connection.consumed(stream, written_to_app);                 // may put WINDOW_UPDATEs into output()
//! ```
//!
//! Invariants:
//! - A peer's bytes never panic, and cost memory and work bounded by [`Limits`]; each refusal names a [`Violation`].
//! - DATA is neither copied nor gathered: a frame cut by reads or records arrives as several [`Event::Data`].
//! - Data received and not [`Connection::consumed`] never exceeds the windows of [`Limits`], whatever is closed since.
//! - No allocation for DATA, WINDOW_UPDATE and PING.

mod connection;
mod event;
mod frame;
mod headers;
mod hpack;
mod limits;
mod streams;
mod violation;

pub(crate) use connection::Connection;
#[cfg(fuzzing)]
pub(crate) use connection::fuzz::run as fuzz;
pub(crate) use event::{Cause, Event, OpenError, SendError};
pub(crate) use frame::ErrorCode;
pub(crate) use headers::Headers;
pub(crate) use limits::Limits;
pub(crate) use streams::StreamKey;
pub(crate) use violation::Violation;
