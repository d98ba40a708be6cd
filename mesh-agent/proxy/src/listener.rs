//! Accepting: the listening sockets of pods on the event loops of workers.
//!
//! Invariants:
//! - A failing `accept` never ends a listener: without descriptors or memory it pauses and counts.
//! - A listener that is stopped takes what is queued before it closes.
//! - Each wake-up accepts what is queued, up to [`BATCH_MAX`], before others get a turn.
//! - Sockets inherit TCP_NODELAY from their listener, which saves a system call a connection.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::unix::AsyncFd,
    sync::Notify,
    task::{JoinHandle, spawn_local},
    time::sleep,
};

use crate::{
    close::Direction,
    dns, reactor,
    target::canonical,
    worker::{Accepted, Arrival, Pod, Worker},
};

/// Connections accepted before other tasks get a turn.
const BATCH_MAX: usize = 64;
/// Pause after `accept` failed for want of descriptors or memory: long enough for some to come back.
const PAUSE: Duration = Duration::from_millis(50);

/// One listening socket and what it is for.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: OwnedFd,
    pub(crate) purpose: Purpose,
}

/// What a listener is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    DnsTcp,
    DnsUdp,
    Hbone,
    Tcp(Direction),
}

/// A listener's task and the way to end it.
#[derive(Debug)]
pub(crate) struct Serving {
    stop: Rc<Notify>,
    task: JoinHandle<()>,
}

impl Serving {
    /// Takes what is queued, closes the socket and returns once that is done.
    pub(crate) async fn stop(self) {
        self.stop.notify_one();
        // A task that panicked has closed its socket too.
        self.task.await.ok();
    }
}

/// Serves a listener on this worker until it is stopped.
///
/// # Errors
/// The socket cannot be made non-blocking or registered with the event loop.
pub(crate) fn serve(worker: &Rc<Worker>, pod: &Arc<Pod>, listener: Listener) -> io::Result<()> {
    let Listener { socket, purpose } = listener;
    let stop = Rc::new(Notify::new());
    let stopped = Rc::clone(&stop);
    let (own, of) = (Rc::clone(worker), Arc::clone(pod));
    let task = match purpose {
        Purpose::Tcp(_) | Purpose::Hbone => {
            let listener = registered(socket)?;
            let (carrier, pod) = (Rc::clone(worker), Arc::clone(pod));
            let arrival = match purpose {
                Purpose::Tcp(direction) => Arrival::Tcp(direction),
                _ => Arrival::Tunnel,
            };
            let take = move |socket, client| {
                carrier.accept(Accepted { socket, client, arrival, pod: Arc::clone(&pod) });
            };
            spawn_local(async move { accept_all(&own, &listener, &stopped, take).await })
        }
        Purpose::DnsTcp => {
            let listener = registered(socket)?;
            let (carrier, pod) = (Rc::clone(worker), Arc::clone(pod));
            let take = move |socket, _| dns::tcp::accept(&carrier, &pod, socket);
            spawn_local(async move { accept_all(&own, &listener, &stopped, take).await })
        }
        Purpose::DnsUdp => {
            let socket = UdpSocket::from(socket);
            socket.set_nonblocking(true)?;
            let port = dns::udp::Port::new(socket)?;
            spawn_local(async move {
                tokio::select! {
                    () = dns::udp::serve(own, of, port) => {}
                    () = stopped.notified() => {}
                }
            })
        }
    };
    worker.own(pod.handle.pod, Serving { stop, task });
    Ok(())
}

fn registered(socket: OwnedFd) -> io::Result<AsyncFd<TcpListener>> {
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    SockRef::from(&listener).set_tcp_nodelay(true)?;
    reactor::watch(listener)
}

/// Why a batch of accepts ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batch {
    /// The queue is empty.
    Drained,
    /// There may be more.
    Full,
    /// No descriptor or no memory.
    OutOfResources,
}

async fn accept_all(
    worker: &Worker,
    listener: &AsyncFd<TcpListener>,
    stopped: &Notify,
    take: impl Fn(TcpStream, SocketAddr),
) {
    loop {
        let is_last = tokio::select! {
            ready = listener.readable() => match ready {
                // Before the accepts: an edge that comes during them is for the next turn.
                Ok(mut ready) => {
                    ready.clear_ready();
                    false
                }
                // The event loop is going away.
                Err(_) => return,
            },
            // Redirection has ended: what is queued now is all there will be.
            () = stopped.notified() => true,
        };
        loop {
            match accept_batch(worker, listener.get_ref(), &take) {
                Batch::Drained => break,
                Batch::Full => tokio::task::yield_now().await,
                Batch::OutOfResources if is_last => return,
                Batch::OutOfResources => sleep(PAUSE).await,
            }
        }
        if is_last {
            return;
        }
    }
}

fn accept_batch(worker: &Worker, listener: &TcpListener, take: impl Fn(TcpStream, SocketAddr)) -> Batch {
    for _ in 0..BATCH_MAX {
        match listener.accept() {
            Ok((socket, client)) => {
                if socket.set_nonblocking(true).is_ok() {
                    take(socket, canonical(client));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Batch::Drained,
            Err(error) if is_of_connection(&error) => {}
            Err(error) => {
                worker.metrics().accept_errors.inc();
                if worker.may_log() {
                    tracing::warn!(%error, "cannot accept connections");
                }
                return Batch::OutOfResources;
            }
        }
    }
    Batch::Full
}

/// Whether the error belongs to the connection that was next in the queue (accept(2): treat these like EAGAIN and try
/// the next) rather than to us.
fn is_of_connection(error: &io::Error) -> bool {
    use nix::libc::{
        ECONNABORTED, EHOSTDOWN, EHOSTUNREACH, EINTR, ENETDOWN, ENETUNREACH, ENONET, ENOPROTOOPT, EOPNOTSUPP,
        EPERM, EPROTO,
    };
    matches!(
        error.raw_os_error(),
        Some(
            ECONNABORTED
                | EHOSTDOWN
                | EHOSTUNREACH
                | EINTR
                | ENETDOWN
                | ENETUNREACH
                | ENONET
                | ENOPROTOOPT
                | EOPNOTSUPP
                | EPERM
                | EPROTO
        )
    )
}
