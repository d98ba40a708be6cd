//! Accepting: the listening sockets of pods on the event loops of workers.
//!
//! Invariants:
//! - A failing `accept` never ends a listener: without descriptors or memory it pauses and counts.
//! - A listener that is stopped takes what is queued before it closes, unless another process has it too: then that one does.
//! - Each wake-up accepts what is queued, up to [`BATCH_MAX`], before others get a turn.
//! - Sockets inherit TCP_NODELAY from their listener, which saves a system call a connection.

use std::{
    fmt, io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, OwnedFd},
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::unix::AsyncFd,
    sync::oneshot,
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

/// What becomes of connections that wait in a listener's queue when it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queued {
    /// They are accepted here: nobody else can.
    Accepted,
    /// They are left to another process that has the same socket.
    LeftToSuccessor,
}

/// A listener's task and the way to end it.
pub(crate) struct Serving {
    stop: oneshot::Sender<Queued>,
    task: JoinHandle<()>,
    /// The socket, as long as it is open.
    socket: Weak<dyn AsFd>,
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("is_open", &(self.socket.strong_count() > 0)).finish_non_exhaustive()
    }
}

impl Serving {
    /// A second descriptor of the socket; `None` if it is closed, e.g. because its task panicked.
    pub(crate) fn duplicate(&self) -> Option<io::Result<OwnedFd>> {
        Some(self.socket.upgrade()?.as_fd().try_clone_to_owned())
    }
}

/// Stops listeners, closes their sockets and returns once that is done.
pub(crate) async fn stop(listeners: impl IntoIterator<Item = Serving>, queued: Queued) {
    let stopping = listeners.into_iter().map(|Serving { stop, task, .. }| {
        // A task that panicked has closed its socket too.
        stop.send(queued).ok();
        task
    });
    for task in stopping.collect::<Vec<_>>() {
        task.await.ok();
    }
}

/// Serves a listener on this worker until it is stopped.
///
/// # Errors
/// The socket cannot be made non-blocking or registered with the event loop.
pub(crate) fn serve(worker: &Rc<Worker>, pod: &Arc<Pod>, listener: Listener) -> io::Result<()> {
    let Listener { socket, purpose } = listener;
    let (stop, stopped) = oneshot::channel();
    let (own, carrier, pod) = (Rc::clone(worker), Rc::clone(worker), Arc::clone(pod));
    let id = pod.handle.pod;
    let serving = match purpose {
        Purpose::Tcp(_) | Purpose::Hbone => {
            let listener = registered(socket)?;
            let socket: Weak<dyn AsFd> = weak(&listener);
            let arrival = match purpose {
                Purpose::Tcp(direction) => Arrival::Tcp(direction),
                _ => Arrival::Tunnel,
            };
            let take = move |socket, client| {
                carrier.accept(Accepted { socket, client, arrival, pod: Arc::clone(&pod) });
            };
            let task = spawn_local(async move { accept_all(&own, &listener, stopped, take).await });
            Serving { stop, task, socket }
        }
        Purpose::DnsTcp => {
            let listener = registered(socket)?;
            let socket: Weak<dyn AsFd> = weak(&listener);
            let take = move |socket, _| dns::tcp::accept(&carrier, &pod, socket);
            let task = spawn_local(async move { accept_all(&own, &listener, stopped, take).await });
            Serving { stop, task, socket }
        }
        Purpose::DnsUdp => {
            let socket = UdpSocket::from(socket);
            socket.set_nonblocking(true)?;
            let port = Rc::new(dns::udp::Port::new(socket)?);
            let socket: Weak<dyn AsFd> = weak(&port);
            let task = spawn_local(async move {
                let queued = tokio::select! {
                    () = dns::udp::serve(&own, &pod, &port) => return,
                    queued = stopped => queued.unwrap_or(Queued::Accepted),
                };
                if queued == Queued::LeftToSuccessor {
                    dns::udp::answer_rest(&own, &pod).await;
                }
            });
            Serving { stop, task, socket }
        }
    };
    worker.own(id, serving);
    Ok(())
}

fn weak<T: AsFd + 'static>(socket: &Rc<T>) -> Weak<dyn AsFd> {
    let weak: Weak<T> = Rc::downgrade(socket);
    weak
}

fn registered(socket: OwnedFd) -> io::Result<Rc<AsyncFd<TcpListener>>> {
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    SockRef::from(&listener).set_tcp_nodelay(true)?;
    reactor::watch(listener).map(Rc::new)
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
    mut stopped: oneshot::Receiver<Queued>,
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
            queued = &mut stopped => match queued {
                Ok(Queued::LeftToSuccessor) => return,
                // Redirection has ended: what is queued now is all there will be.
                Ok(Queued::Accepted) | Err(_) => true,
            },
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
