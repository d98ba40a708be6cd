//! DNS over UDP: one loop per pod.
//!
//! Invariants:
//! - A reply leaves from the very address its query was sent to: a client whose socket is connected drops any other.
//! - Our own answers are sent at once; a forwarded query is a task of its own, of which there are at most so many.

use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use nix::{
    libc::{in_addr, in_pktinfo, in6_addr, in6_pktinfo},
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg,
        sendmsg, setsockopt, sockopt,
    },
};
use tokio::{
    io::unix::AsyncFd,
    task::spawn_local,
    time::{Instant, sleep},
};

use super::{Plan, Transport, forward, plan};
use crate::{
    metrics::DnsOutcome,
    reactor,
    worker::{Pod, Worker},
};

/// Datagrams dealt with before other tasks get a turn.
const BATCH_MAX: usize = 32;
/// Larger queries do not exist: the protocol's limit for UDP without options is 512.
const QUERY_MAX: usize = 4096;

/// How often a socket that is about to close is looked at for queries under way.
const REST_EACH: Duration = Duration::from_millis(10);

/// A pod's DNS socket.
#[derive(Debug)]
pub(crate) struct Port {
    io: AsyncFd<UdpSocket>,
    is_v6: bool,
}

/// A datagram's two ends.
#[derive(Clone, Copy, Debug)]
struct Ends {
    client: SocketAddr,
    /// The address the client sent to, and the interface for link-local ones.
    local: Option<(IpAddr, u32)>,
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.io.as_fd()
    }
}

impl Port {
    /// Takes a bound, non-blocking socket.
    ///
    /// # Errors
    /// It cannot be set up or registered with the event loop.
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Self> {
        let is_v6 = socket.local_addr()?.is_ipv6();
        if is_v6 {
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        Ok(Self { io: reactor::watch(socket)?, is_v6 })
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<(usize, Ends)> {
        let mut control = nix::cmsg_space!(in6_pktinfo, in_pktinfo);
        let mut iov = [IoSliceMut::new(buf)];
        let fd = self.io.get_ref().as_raw_fd();
        let message = recvmsg::<SockaddrStorage>(fd, &mut iov, Some(&mut control), MsgFlags::empty())?;
        let client = message.address.as_ref().and_then(socket_addr);
        let client = client.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        let local = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                Some((IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)), info.ipi6_ifindex))
            }
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                Some((IpAddr::V4(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr))), 0))
            }
            _ => None,
        });
        Ok((message.bytes, Ends { client, local }))
    }

    /// Sends a reply. Errors are the client's loss, as with any datagram: it asks again.
    fn send(&self, bytes: &[u8], ends: Ends) {
        let iov = [IoSlice::new(bytes)];
        let (v4, v6);
        let control = match (ends.local, self.is_v6) {
            (Some((addr, interface)), true) => {
                let addr = match addr {
                    IpAddr::V4(addr) => addr.to_ipv6_mapped(),
                    IpAddr::V6(addr) => addr,
                };
                // Naming the interface is wrong for any but link-local addresses: replies to ourselves go by loopback.
                let ipi6_ifindex = if addr.is_unicast_link_local() { interface } else { 0 };
                v6 = in6_pktinfo { ipi6_addr: in6_addr { s6_addr: addr.octets() }, ipi6_ifindex };
                Some(ControlMessage::Ipv6PacketInfo(&v6))
            }
            (Some((IpAddr::V4(addr), _)), false) => {
                v4 = in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: in_addr { s_addr: u32::from(addr).to_be() },
                    ipi_addr: in_addr { s_addr: 0 },
                };
                Some(ControlMessage::Ipv4PacketInfo(&v4))
            }
            (Some((IpAddr::V6(_), _)) | None, _) => None,
        };
        let fd = self.io.get_ref().as_raw_fd();
        let control = control.as_slice();
        let flags = MsgFlags::MSG_DONTWAIT;
        let sent = match ends.client {
            SocketAddr::V4(addr) => sendmsg(fd, &iov, control, flags, Some(&SockaddrIn::from(addr))),
            SocketAddr::V6(addr) => sendmsg(fd, &iov, control, flags, Some(&SockaddrIn6::from(addr))),
        };
        if let Err(error) = sent {
            tracing::trace!(%error, client = %ends.client, "DNS reply not sent");
        }
    }
}

/// Serves a pod's queries until the future is dropped.
pub(crate) async fn serve(worker: &Rc<Worker>, pod: &Arc<Pod>, port: &Rc<Port>) {
    let mut buf = vec![0; QUERY_MAX].into_boxed_slice();
    // An error means that the event loop is going away.
    while let Ok(mut ready) = port.io.readable().await {
        let mut handled = 0;
        while handled < BATCH_MAX {
            match port.receive(&mut buf) {
                Ok((len, ends)) => answer(worker, pod, port, &buf[..len], ends),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready.clear_ready();
                    break;
                }
                // An ICMP error for an earlier reply, or a datagram without an address: the next one may be fine.
                Err(_) => {}
            }
            handled += 1;
        }
        drop(ready);
        if handled == BATCH_MAX {
            tokio::task::yield_now().await;
        }
    }
}

/// Waits until the queries are answered that were forwarded, while whoever calls keeps the socket open. They end by a time-out of their
/// own.
pub(crate) async fn answer_rest(worker: &Worker, pod: &Pod) {
    let give_up = Instant::now() + worker.settings().dns.forward_timeout;
    while pod.dns_in_flight.is_used() && Instant::now() < give_up {
        sleep(REST_EACH).await;
    }
}

fn answer(worker: &Rc<Worker>, pod: &Arc<Pod>, port: &Rc<Port>, query: &[u8], ends: Ends) {
    let question = match plan(worker, pod, query, Transport::Udp) {
        Plan::Ignore => return,
        Plan::Reply(reply) => return port.send(&reply, ends),
        Plan::Forward(question) => question,
    };
    if !pod.dns_in_flight.enter() {
        worker.metrics().dns(DnsOutcome::Overloaded).inc();
        return;
    }
    // The socket closes with the loop: the pod may be enrolled anew before a resolver answers.
    let (worker, pod, port) = (Rc::clone(worker), Arc::clone(pod), Rc::downgrade(port));
    // Not owned by anybody: it ends by its own time-out, and there are only so many.
    drop(spawn_local(async move {
        let _entered = Entered(Arc::clone(&pod));
        let reply = forward::ask(&worker, &pod, ends.client, &question, Transport::Udp).await;
        if let Some(port) = port.upgrade() {
            port.send(&reply, ends);
        }
    }));
}

/// Takes a forwarded query off the pod's count.
struct Entered(Arc<Pod>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.dns_in_flight.leave();
    }
}

fn socket_addr(addr: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = addr.as_sockaddr_in() {
        return Some(SocketAddrV4::from(*v4).into());
    }
    addr.as_sockaddr_in6().map(|v6| SocketAddrV6::from(*v6).into())
}
