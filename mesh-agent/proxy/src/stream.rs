//! One TCP socket on an event loop, with its readiness kept by us.
//!
//! The reactor only reports edges; what they mean for the next system call is remembered here, so that a relay
//! reads and writes without asking the reactor first, and hears of a reset even on a socket it does not read.
//!
//! Invariants:
//! - `readable`/`writable` false means that an edge will wake the task when that changes.
//! - A short read clears `readable` only while no end of stream was announced: under edge-triggered polling the
//!   end that arrives together with the last bytes makes no second edge.
//!
//! Not here: policy of any kind; see [`crate::relay`].

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::io::{Ready, unix::AsyncFd};

use crate::reactor;

/// A connected, non-blocking TCP socket registered with this thread's event loop.
#[derive(Debug)]
pub(crate) struct Stream {
    io: AsyncFd<TcpStream>,
    readable: bool,
    writable: bool,
    /// FIN or RST has arrived: reading never blocks again.
    read_closed: bool,
    /// Both directions are shut, or the socket failed.
    hung_up: bool,
}

/// What a non-blocking call achieved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Io {
    /// So many bytes; 0 from a read is the end of the stream.
    Bytes(usize),
    /// Nothing now; an edge will tell.
    Blocked,
}

impl Stream {
    /// Registers a connected socket. It is taken for readable and writable until a call says otherwise.
    ///
    /// # Errors
    /// The event loop refuses the descriptor (e.g. ENOSPC of `max_user_watches`).
    pub(crate) fn new(socket: TcpStream) -> io::Result<Self> {
        Ok(Self {
            io: reactor::watch(socket)?,
            readable: true,
            writable: true,
            read_closed: false,
            hung_up: false,
        })
    }

    /// Dials `addr` from a fresh non-blocking socket and waits for the outcome.
    ///
    /// Cancel safety: dropping the future closes the socket.
    ///
    /// # Errors
    /// The kernel's verdict on the connect.
    pub(crate) async fn connect(socket: OwnedFd, addr: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::from(socket);
        // Without it the last piece of each message waits for the peer's delayed ACK.
        socket.set_nodelay(true)?;
        match SockRef::from(&socket).connect(&addr.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => {
                // A peer on this machine answers before `connect` returns, which says EINPROGRESS all the same: the
                // answer is taken up when the socket is unlocked. Looking again saves a turn of the event loop.
                if socket.peer_addr().is_err() {
                    return Self::finish_connect(socket, addr).await;
                }
            }
            Err(error) => return Err(error),
        }
        Self::connected(reactor::watch(socket)?, addr)
    }

    async fn finish_connect(socket: TcpStream, addr: SocketAddr) -> io::Result<Self> {
        let io = reactor::watch(socket)?;
        io.writable().await?.retain_ready();
        match io.get_ref().take_error()? {
            Some(error) => Err(error),
            None => Self::connected(io, addr),
        }
    }

    fn connected(io: AsyncFd<TcpStream>, addr: SocketAddr) -> io::Result<Self> {
        // A dial to a port of this very host where nobody listens may draw that port as its own and meet itself.
        if io.get_ref().local_addr()? == addr {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        // Nothing has been sent yet, so most servers have nothing to say yet either: wait for the edge.
        Ok(Self { io, readable: false, writable: true, read_closed: false, hung_up: false })
    }

    /// Collects edges and registers the task for the next ones.
    pub(crate) fn observe(&mut self, cx: &mut Context<'_>) {
        while !self.read_closed {
            // An error means that the loop shuts down; the task is dropped with it.
            let Poll::Ready(Ok(mut guard)) = self.io.poll_read_ready(cx) else { break };
            self.read_closed = guard.ready().is_read_closed();
            self.readable = true;
            guard.clear_ready_matching(Ready::READABLE);
        }
        while !self.hung_up {
            let Poll::Ready(Ok(mut guard)) = self.io.poll_write_ready(cx) else { break };
            self.hung_up = guard.ready().is_write_closed();
            self.writable = true;
            guard.clear_ready_matching(Ready::WRITABLE);
        }
    }

    /// The socket itself, for its addresses.
    pub(crate) fn socket(&self) -> &TcpStream {
        self.io.get_ref()
    }

    pub(crate) fn is_readable(&self) -> bool {
        self.readable
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// The other side has said that no more bytes come.
    pub(crate) fn is_read_closed(&self) -> bool {
        self.read_closed
    }

    /// Both directions are shut, or the socket failed.
    pub(crate) fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// Makes the next reads real ones, whatever the edges said: used to fetch what a failed socket still holds.
    pub(crate) fn assume_readable(&mut self) {
        self.readable = true;
    }

    /// Whether a read would return at once: there are bytes, an end or an error.
    pub(crate) fn has_bytes(&mut self) -> bool {
        if self.readable && !self.read_closed {
            // A fresh socket is only taken for readable.
            let peeked = self.io.get_ref().peek(&mut [0]);
            self.readable = !peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        }
        self.readable
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// As `recv(2)`.
    pub(crate) fn read(&mut self, buf: &mut [u8]) -> io::Result<Io> {
        let outcome = retry(|| self.io.get_ref().read(buf));
        self.after_read(outcome, buf.len())
    }

    /// Writes what fits.
    ///
    /// # Errors
    /// As `send(2)`.
    pub(crate) fn write(&mut self, buf: &[u8]) -> io::Result<Io> {
        let outcome = retry(|| self.io.get_ref().write(buf));
        self.after_write(outcome, buf.len())
    }

    /// Reads by a call of the caller's choice that wants up to `wanted` bytes.
    ///
    /// # Errors
    /// Those of `call`.
    pub(crate) fn read_by(
        &mut self,
        wanted: usize,
        call: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> io::Result<Io> {
        let mut call = call;
        let outcome = retry(|| call(self.io.get_ref()));
        self.after_read(outcome, wanted)
    }

    /// Writes by a call of the caller's choice that offers `offered` bytes.
    ///
    /// # Errors
    /// Those of `call`.
    pub(crate) fn write_by(
        &mut self,
        offered: usize,
        call: impl FnMut(&TcpStream) -> io::Result<usize>,
    ) -> io::Result<Io> {
        let mut call = call;
        let outcome = retry(|| call(self.io.get_ref()));
        self.after_write(outcome, offered)
    }

    fn after_read(&mut self, outcome: io::Result<usize>, wanted: usize) -> io::Result<Io> {
        match outcome {
            Ok(got) => {
                if got < wanted && !self.read_closed {
                    self.readable = false;
                }
                Ok(Io::Bytes(got))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(Io::Blocked)
            }
            Err(error) => Err(error),
        }
    }

    fn after_write(&mut self, outcome: io::Result<usize>, offered: usize) -> io::Result<Io> {
        match outcome {
            Ok(sent) => {
                if sent < offered {
                    self.writable = false;
                }
                Ok(Io::Bytes(sent))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Ok(Io::Blocked)
            }
            Err(error) => Err(error),
        }
    }

    /// Ends our half.
    pub(crate) fn shutdown_write(&self) {
        // ENOTCONN: the peer has reset meanwhile, which the next read or edge reports.
        self.io.get_ref().shutdown(Shutdown::Write).ok();
    }

    /// Closes with a reset instead of an orderly end.
    pub(crate) fn reset(self) {
        reset(self.io.into_inner());
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.get_ref().as_fd()
    }
}

/// Closes an unregistered socket with a reset.
pub(crate) fn reset(socket: TcpStream) {
    // It cannot fail on a TCP socket; if it did, the close below would still end the connection.
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).ok();
}

fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}
