//! The bytes of a connection to an endpoint, however it is reached and whatever lies between.
//!
//! Invariants:
//! - What is counted at the connection is what is sent and received inside of TLS, except in a tunnel of the mesh, which counts
//!   what it carries.
//! - Bytes that came with a proxy's answer are read first.

use std::{
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::client::TlsStream;

use super::{chunked::Chunked, connect::Opened};
use crate::{
    connections::Live, hbone::tunnel::TunnelIo, outbound::Transport, stream::Stream, worker::Worker,
};

/// How the bytes leave.
#[derive(Debug)]
pub(crate) enum Raw {
    /// Over a socket.
    Tcp(Stream),
    /// Through a tunnel to another node.
    Tunnel(TunnelIo),
}

/// What is between, if anything.
#[derive(Debug)]
pub(super) enum Base {
    /// Nothing.
    Raw(Raw),
    /// TLS of ours.
    Tls(Box<TlsStream<Raw>>),
}

#[derive(Debug)]
enum Way {
    Plain(Base),
    /// As bodies of an exchange with an HTTP proxy.
    Posted(Box<Chunked<Base>>),
}

/// The bytes of a connection to an endpoint.
pub(crate) struct UpstreamIo {
    way: Way,
    early: Bytes,
    is_tunnel: bool,
    live: Rc<Live>,
    worker: Rc<Worker>,
}

impl std::fmt::Debug for UpstreamIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UpstreamIo").field("way", &self.way).finish_non_exhaustive()
    }
}

impl UpstreamIo {
    /// Over a transport, with nothing or with TLS between.
    pub(super) fn new(worker: &Rc<Worker>, live: &Rc<Live>, base: Base) -> Self {
        let raw = match &base {
            Base::Raw(raw) => raw,
            Base::Tls(tls) => tls.get_ref().0,
        };
        let is_tunnel = matches!(raw, Raw::Tunnel(_));
        let (live, worker) = (Rc::clone(live), Rc::clone(worker));
        Self { way: Way::Plain(base), early: Bytes::new(), is_tunnel, live, worker }
    }

    /// Through the tunnel that was opened over it.
    pub(super) fn through(self, opened: Opened) -> Self {
        match (self.way, opened) {
            (Way::Plain(base), Opened { early, framing: Some(framing) }) => {
                let way = Way::Posted(Box::new(Chunked::new(base, framing, &early)));
                Self { way, ..self }
            }
            (way, Opened { early, .. }) => Self { way, early, ..self },
        }
    }

    /// Whether it goes through a tunnel of the mesh.
    pub(crate) fn is_tunnel(&self) -> bool {
        self.is_tunnel
    }

    /// As a transport: the socket alone, if there is nothing else to it.
    pub(crate) fn into_transport(self) -> Transport {
        match self {
            Self { way: Way::Plain(Base::Raw(Raw::Tcp(stream))), early, .. } if early.is_empty() => {
                Transport::Tcp(stream)
            }
            other => Transport::Layered(Box::new(other)),
        }
    }

    /// Ends it with a reset.
    pub(super) fn reset(self) {
        let base = match self.way {
            Way::Plain(base) => base,
            Way::Posted(posted) => posted.into_inner(),
        };
        let raw = match base {
            Base::Raw(raw) => raw,
            Base::Tls(tls) => tls.into_inner().0,
        };
        // A stream of a tunnel is reset when it is dropped.
        if let Raw::Tcp(stream) = raw {
            stream.reset();
        }
    }
}

impl AsyncRead for UpstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let io = self.get_mut();
        let before = buf.filled().len();
        let outcome = if io.early.is_empty() {
            match &mut io.way {
                Way::Plain(base) => Pin::new(base).poll_read(cx, buf),
                Way::Posted(posted) => Pin::new(posted).poll_read(cx, buf),
            }
        } else {
            let piece = io.early.split_to(io.early.len().min(buf.remaining()));
            buf.put_slice(&piece);
            Poll::Ready(Ok(()))
        };
        if !io.is_tunnel {
            let got = buf.filled().len() - before;
            io.live.meter.add_to_client(got as u64, io.worker.tick());
        }
        outcome
    }
}

impl AsyncWrite for UpstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let io = self.get_mut();
        let outcome = match &mut io.way {
            Way::Plain(base) => Pin::new(base).poll_write(cx, buf),
            Way::Posted(posted) => Pin::new(posted).poll_write(cx, buf),
        };
        if let Poll::Ready(Ok(sent)) = &outcome
            && !io.is_tunnel
        {
            io.live.meter.add_to_server(*sent as u64, io.worker.tick());
        }
        outcome
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().way {
            Way::Plain(base) => Pin::new(base).poll_flush(cx),
            Way::Posted(posted) => Pin::new(posted).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().way {
            Way::Plain(base) => Pin::new(base).poll_shutdown(cx),
            Way::Posted(posted) => Pin::new(posted).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Base {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Raw(raw) => Pin::new(raw).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Base {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Raw(raw) => Pin::new(raw).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Raw(raw) => Pin::new(raw).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Raw(raw) => Pin::new(raw).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Raw {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tunnel(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Raw {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tunnel(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tunnel(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
