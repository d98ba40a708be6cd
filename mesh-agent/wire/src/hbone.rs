//! Headers of HBONE: what a CONNECT request says besides the bytes it carries.
//!
//! Invariants:
//! - Parsing is total and its work and memory are bounded by the length of the value, which is bounded too.
//! - What is formatted parses to the same value.
//! - None of it is proof of anything: who a peer is its certificate says, where it may go policy does.
//!
//! Not here: HTTP/2 (`mesh-proxy`).

pub mod authority;
pub mod baggage;
pub mod canonical;
pub mod forwarded;
pub mod traceparent;

/// Name of the header of [`baggage::Baggage`].
pub const BAGGAGE: &str = "baggage";
/// Name of the header of [`forwarded::Forwarded`].
pub const FORWARDED: &str = "forwarded";
/// Name of the header of [`traceparent::Traceparent`].
pub const TRACEPARENT: &str = "traceparent";
/// Longest value that is parsed, in bytes; all values of one name together.
pub const HEADER_BYTES_MAX: usize = 8192;

/// A header that is not parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum HeaderError {
    /// Longer than [`HEADER_BYTES_MAX`].
    #[error("is longer than {HEADER_BYTES_MAX} bytes")]
    TooLong,
    /// Other bytes than the header may have.
    #[error("has bytes it may not have")]
    Bytes,
    /// Not of its form.
    #[error("is malformed")]
    Form,
}
