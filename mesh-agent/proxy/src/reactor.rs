//! Registering descriptors with the worker's event loop, in one place.

use std::{io, os::fd::AsRawFd};

use tokio::io::unix::AsyncFd;

/// A standard-library socket: its descriptor stays the same for its whole life.
pub(crate) trait Socket: AsRawFd {}

impl Socket for std::net::TcpListener {}
impl Socket for std::net::TcpStream {}
impl Socket for std::net::UdpSocket {}

/// Watches a non-blocking socket for both directions, edge-triggered.
///
/// # Errors
/// The event loop refuses the descriptor (e.g. ENOSPC of `max_user_watches`).
pub(crate) fn watch<T: Socket>(socket: T) -> io::Result<AsyncFd<T>> {
    #[expect(
        deprecated,
        reason = "its successor is unsafe because a foreign AsRawFd might change its descriptor; ours cannot, see `Socket`"
    )]
    AsyncFd::new(socket)
}
