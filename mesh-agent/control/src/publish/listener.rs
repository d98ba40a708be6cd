//! Owns how clients reach the controller: TLS connections, bounded in number and in the time their handshake takes.
//!
//! Invariants:
//! - A handshake never holds up another one, and only so many are under way at once.
//! - A connection keeps its place in the count for as long as it lives.
//! - The certificate shown is the one of the moment of the handshake.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use mesh_identity::peer::{PeerError, PeerRefusal, principal_of};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{codegen::tokio_stream::wrappers::ReceiverStream, transport::server::Connected};

use super::{auth::Connection, metrics::PublishMetrics};

/// Connections at once: one for each node, and a second while it renews.
const CONNECTIONS_MAX: usize = 10_000;
/// Handshakes under way at once.
const HANDSHAKES_MAX: usize = 256;
/// How long a handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// An accepted connection.
#[derive(Debug)]
pub(super) struct Accepted {
    stream: TlsStream<TcpStream>,
    connection: Connection,
    _place: OwnedSemaphorePermit,
}

/// Starts to accept. Ends when the stream is dropped.
pub(super) fn accept(
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    metrics: PublishMetrics,
) -> ReceiverStream<io::Result<Accepted>> {
    let (accepted, stream) = mpsc::channel(1);
    tokio::spawn(run(listener, tls, metrics, accepted));
    ReceiverStream::new(stream)
}

async fn run(
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    metrics: PublishMetrics,
    accepted: mpsc::Sender<io::Result<Accepted>>,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        if handshakes.len() >= HANDSHAKES_MAX {
            handshakes.join_next().await;
        }
        let (stream, remote) = tokio::select! {
            () = accepted.closed() => return,
            next = listener.accept() => match next {
                Ok(next) => next,
                Err(error) => {
                    tracing::warn!(%error, "accept a client");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            metrics.refuse("too_many_connections");
            continue;
        };
        let acceptor = TlsAcceptor::from(Arc::clone(&tls.borrow()));
        let (metrics, accepted) = (metrics.clone(), accepted.clone());
        handshakes.spawn(async move {
            match handshake(acceptor, stream, remote).await {
                Ok((stream, connection)) => {
                    let next = Accepted { stream, connection, _place: place };
                    // Nobody takes it any more only when the server ends.
                    accepted.send(Ok(next)).await.ok();
                }
                Err(refusal) => {
                    metrics.refuse(refusal.reason.as_str());
                    tracing::warn!(%remote, reason = refusal.reason.as_str(), %refusal, "refused a client's handshake");
                }
            }
        });
    }
}

async fn handshake(
    acceptor: TlsAcceptor,
    stream: TcpStream,
    remote: SocketAddr,
) -> Result<(TlsStream<TcpStream>, Connection), PeerRefusal> {
    let failed = |detail: String| PeerRefusal { reason: PeerError::Handshake, detail };
    // Small messages answer each other here.
    stream.set_nodelay(true).map_err(|error| failed(error.to_string()))?;
    let done = timeout(HANDSHAKE_WITHIN, acceptor.accept(stream)).await;
    let stream = done.map_err(|_late| failed("it took too long".to_owned()))?.map_err(|error| match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(error) => PeerRefusal::of(error),
        None => failed(error.to_string()),
    })?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let principal = leaf.map(|leaf| principal_of(leaf)).transpose()?;
    Ok((stream, Connection { remote, principal }))
}

impl Connected for Accepted {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for Accepted {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
