//! Accepting: the listening sockets of pods on the event loops of workers.
//!
//! Invariants:
//! - A failing `accept` never ends a listener: without descriptors or memory it pauses and counts.
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
use tokio::{io::unix::AsyncFd, task::spawn_local, time::sleep};

use crate::{
    close::Direction,
    dns, reactor,
    target::canonical,
    worker::{Accepted, Pod, Worker},
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
    Tcp(Direction),
}

/// Serves a listener on this worker until its pod is removed.
///
/// # Errors
/// The socket cannot be made non-blocking or registered with the event loop.
pub(crate) fn serve(worker: &Rc<Worker>, pod: &Arc<Pod>, listener: Listener) -> io::Result<()> {
    let Listener { socket, purpose } = listener;
    let task = match purpose {
        Purpose::Tcp(direction) => {
            let listener = registered(socket)?;
            let take = {
                let (worker, pod) = (Rc::clone(worker), Arc::clone(pod));
                move |socket, client| {
                    worker.accept(Accepted { socket, client, direction, pod: Arc::clone(&pod) })
                }
            };
            spawn_local(accept_all(Rc::clone(worker), listener, take))
        }
        Purpose::DnsTcp => {
            let listener = registered(socket)?;
            let take = {
                let (worker, pod) = (Rc::clone(worker), Arc::clone(pod));
                move |socket, _| dns::tcp::accept(&worker, &pod, socket)
            };
            spawn_local(accept_all(Rc::clone(worker), listener, take))
        }
        Purpose::DnsUdp => {
            let socket = UdpSocket::from(socket);
            socket.set_nonblocking(true)?;
            let socket = dns::udp::Port::new(socket)?;
            spawn_local(dns::udp::serve(Rc::clone(worker), Arc::clone(pod), socket))
        }
    };
    worker.own(pod.handle.pod, task.abort_handle());
    Ok(())
}

fn registered(socket: OwnedFd) -> io::Result<AsyncFd<TcpListener>> {
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    SockRef::from(&listener).set_tcp_nodelay(true)?;
    reactor::watch(listener)
}

async fn accept_all(
    worker: Rc<Worker>,
    listener: AsyncFd<TcpListener>,
    take: impl Fn(TcpStream, SocketAddr),
) {
    // An error here means that the event loop is going away.
    while let Ok(mut ready) = listener.readable().await {
        let mut accepted = 0;
        loop {
            match listener.get_ref().accept() {
                Ok((socket, client)) => {
                    if socket.set_nonblocking(true).is_ok() {
                        take(socket, canonical(client));
                    }
                    accepted += 1;
                    if accepted == BATCH_MAX {
                        ready.retain_ready();
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    break;
                }
                Err(error) if out_of_resources(&error) => {
                    worker.metrics().accept_errors.inc();
                    if worker.may_log() {
                        tracing::warn!(%error, "cannot accept connections");
                    }
                    sleep(PAUSE).await;
                    break;
                }
                // The connection has failed while it was queued (ECONNABORTED and network errors): take the next.
                Err(_) => {}
            }
        }
        drop(ready);
        if accepted == BATCH_MAX {
            tokio::task::yield_now().await;
        }
    }
}

fn out_of_resources(error: &io::Error) -> bool {
    use nix::libc::{EBADF, EFAULT, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOTSOCK, EPERM};
    matches!(
        error.raw_os_error(),
        // The second half cannot happen on a listener; if it did, this keeps the loop from spinning.
        Some(EMFILE | ENFILE | ENOBUFS | ENOMEM | EPERM | EBADF | EFAULT | EINVAL | ENOTSOCK)
    )
}
