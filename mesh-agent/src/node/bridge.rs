//! Owns the joint between the data path and the kernel: `mesh-proxy`'s two traits over `mesh-redirect`.
//!
//! Invariants:
//! - No call blocks longer than a few system calls; the lock is held only to look something up.
//! - A pod that left keeps nothing here, so its network namespace can go.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::{BorrowedFd, OwnedFd},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use mesh_core::id::WorkloadId;
use mesh_proxy::kernel::{
    Dialled, Kernel, LocalPeer, PodHandle, Sockets, TcpFigures, UpstreamTags, VerdictEntry,
};
use mesh_redirect::{LocalPeers, Maps, Origins, PodSockets, SocketTags, TicketTag, Verdicts};

/// The enrolled pods' way into the kernel, shared by all workers.
#[derive(Debug)]
pub(super) struct Bridge {
    origins: Origins,
    peers: LocalPeers,
    verdicts: Verdicts,
    /// Asked when it is not known which resolver a pod meant; by preference.
    resolvers: Vec<SocketAddr>,
    /// Whether an admitted pair bypasses the proxy from its second connection on.
    direct: bool,
    /// Another agent writes the node's tables: it may know of policies that this one does not, and its generations are for those.
    withholds_verdicts: AtomicBool,
    pods: RwLock<Pods>,
    unreadable: AtomicU64,
    verdicts_lost: AtomicU64,
}

#[derive(Debug, Default)]
struct Pods {
    sockets: HashMap<u32, PodSockets>,
    incarnations: HashMap<WorkloadId, u64>,
}

impl Bridge {
    pub(super) fn new(maps: &Arc<Maps>, resolvers: Vec<SocketAddr>, direct: bool) -> Self {
        Self {
            origins: Origins::new(maps),
            peers: LocalPeers::new(maps),
            verdicts: Verdicts::new(maps),
            resolvers,
            direct,
            withholds_verdicts: AtomicBool::new(false),
            pods: RwLock::default(),
            unreadable: AtomicU64::new(0),
            verdicts_lost: AtomicU64::new(0),
        }
    }

    /// Lets the data path make sockets in a pod. Before the proxy is given its listeners.
    pub(super) fn add(&self, pod: u32, workload: WorkloadId, sockets: PodSockets) {
        // An earlier agent of this node may have left verdicts that allow.
        if !self.direct
            && let Err(error) = self.verdicts.bump(workload)
        {
            tracing::warn!(error = %crate::report::report(&error), "void the verdicts of an earlier agent");
        }
        let mut pods = self.write();
        pods.incarnations.insert(workload, sockets.netns().cookie());
        pods.sockets.insert(pod, sockets);
    }

    /// A pod that the kernel has as enrolled is a peer of this node's others before this agent listens in it: its guard honours tickets,
    /// and nothing else under STRICT.
    pub(super) fn expect(&self, workload: WorkloadId, netns_cookie: u64) {
        self.write().incarnations.insert(workload, netns_cookie);
    }

    /// An expected pod could not be served.
    pub(super) fn expect_no_more(&self, workload: WorkloadId, netns_cookie: u64) {
        let mut pods = self.write();
        let is_served = pods.sockets.values().any(|sockets| sockets.netns().cookie() == netns_cookie);
        if !is_served && pods.incarnations.get(&workload) == Some(&netns_cookie) {
            pods.incarnations.remove(&workload);
        }
    }

    /// Whether verdicts are kept from the kernel from now on.
    pub(super) fn withhold_verdicts(&self, withhold: bool) {
        self.withholds_verdicts.store(withhold, Ordering::Release);
    }

    /// Forgets a pod; established connections need no new socket.
    pub(super) fn remove(&self, pod: u32) {
        let mut pods = self.write();
        let Some(sockets) = pods.sockets.remove(&pod) else { return };
        let cookie = sockets.netns().cookie();
        // A later incarnation of the workload may be here already.
        pods.incarnations.retain(|_, incarnation| *incarnation != cookie);
    }

    /// Whether a workload is enrolled and served on this node.
    pub(super) fn serves(&self, workload: WorkloadId) -> bool {
        self.read().incarnations.contains_key(&workload)
    }

    /// Reads of socket storage or maps that failed, and verdicts that found no room, since the start.
    pub(super) fn failures(&self) -> (u64, u64) {
        (self.unreadable.load(Ordering::Relaxed), self.verdicts_lost.load(Ordering::Relaxed))
    }

    fn sockets_of(&self, pod: &PodHandle) -> io::Result<PodSockets> {
        self.read().sockets.get(&pod.pod).cloned().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotConnected, format!("pod {} has left the mesh", pod.name))
        })
    }

    // Plain maps, changed by single insertions: a panic elsewhere leaves nothing half-written.
    fn read(&self) -> RwLockReadGuard<'_, Pods> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Pods> {
        self.pods.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sockets for Bridge {
    fn tcp(&self, pod: &PodHandle, dst: SocketAddr, tags: &UpstreamTags) -> io::Result<OwnedFd> {
        self.sockets_of(pod)?.tcp(dst, &socket_tags(tags))
    }

    fn udp(&self, pod: &PodHandle, dst: SocketAddr) -> io::Result<OwnedFd> {
        self.sockets_of(pod)?.udp(dst)
    }
}

fn socket_tags(tags: &UpstreamTags) -> SocketTags {
    let ticket = tags
        .ticket
        .map(|ticket| TicketTag { incarnation: ticket.incarnation, policy_gen: ticket.policy_gen });
    SocketTags {
        src_workload: tags.src_workload,
        dst_workload: tags.dst_workload,
        service: tags.service,
        inbound: tags.inbound,
        ticket,
        client_addr: tags.client_addr,
        tunnel: tags.tunnel,
    }
}

impl Kernel for Bridge {
    fn dialled(&self, accepted: BorrowedFd<'_>) -> Option<Dialled> {
        match self.origins.dialled(accepted) {
            Ok(found) => found.map(|found| Dialled {
                dst: found.dst,
                backend: found.backend,
                service: found.service,
                started_ns: found.started_ns,
            }),
            Err(error) => {
                self.unreadable.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(error = %crate::report::report(&error), "read what a connection dialled");
                None
            }
        }
    }

    fn local_peer(&self, workload: WorkloadId) -> Option<LocalPeer> {
        let incarnation = self.read().incarnations.get(&workload).copied()?;
        let policy_gen = self.peers.policy_gen(workload)?;
        Some(LocalPeer { incarnation, policy_gen })
    }

    fn put_verdict(&self, client: &PodHandle, verdict: VerdictEntry) {
        if (verdict.allow && !self.direct) || self.withholds_verdicts.load(Ordering::Acquire) {
            return;
        }
        let entry = mesh_redirect::VerdictEntry {
            client: client.netns_cookie,
            workload: verdict.dst,
            incarnation: verdict.incarnation,
            port: verdict.port,
            v4: verdict.v4,
            policy_gen: verdict.policy_gen,
            allow: verdict.allow,
        };
        if let Err(error) = self.verdicts.put(&entry) {
            // Costs the fast path of this pair, never a connection.
            if self.verdicts_lost.fetch_add(1, Ordering::Relaxed) == 0 {
                tracing::warn!(error = %crate::report::report(&error), "cache a verdict; later losses are only counted");
            }
        }
    }

    fn resolver(&self, pod: &PodHandle, client_port: u16, v4: bool) -> Option<SocketAddr> {
        let asked = self.origins.resolver(pod.netns_cookie, client_port, v4);
        asked.or_else(|| fallback(&self.resolvers, v4))
    }

    fn tcp_figures(&self, socket: BorrowedFd<'_>) -> Option<TcpFigures> {
        // Only figures: without them a row of `meshctl top` says less.
        let figures = mesh_redirect::TcpFigures::of(socket).ok()?;
        Some(TcpFigures { srtt_us: figures.srtt_us, unanswered: figures.timeouts > 0 })
    }
}

/// The first resolver of the family the pod asked by, else the first one.
fn fallback(resolvers: &[SocketAddr], v4: bool) -> Option<SocketAddr> {
    resolvers.iter().find(|addr| addr.is_ipv4() == v4).or_else(|| resolvers.first()).copied()
}

#[cfg(test)]
mod tests {
    use mesh_core::id::ServiceId;
    use mesh_proxy::kernel::TicketRequest;

    use super::*;

    #[test]
    fn every_tag_reaches_the_socket() {
        let tags = UpstreamTags {
            src_workload: Some(WorkloadId(1)),
            dst_workload: Some(WorkloadId(2)),
            service: Some(ServiceId(3)),
            inbound: true,
            ticket: Some(TicketRequest { incarnation: 4, policy_gen: 5 }),
            client_addr: Some("10.0.0.1:80".parse().unwrap()),
            tunnel: true,
        };
        let made = socket_tags(&tags);
        assert_eq!((made.src_workload, made.dst_workload), (Some(WorkloadId(1)), Some(WorkloadId(2))));
        assert_eq!((made.service, made.inbound), (Some(ServiceId(3)), true));
        assert_eq!(made.ticket.map(|t| (t.incarnation, t.policy_gen)), Some((4, 5)));
        assert_eq!(made.client_addr, tags.client_addr);
        assert!(made.tunnel);
    }

    #[test]
    fn a_fallback_resolver_is_of_the_family_the_pod_asked_by_if_there_is_one() {
        let both: Vec<SocketAddr> = vec!["10.0.0.1:53".parse().unwrap(), "[fd00::1]:53".parse().unwrap()];
        assert_eq!(fallback(&both, true), Some(both[0]));
        assert_eq!(fallback(&both, false), Some(both[1]));
        assert_eq!(fallback(&both[..1], false), Some(both[0]));
        assert_eq!(fallback(&[], true), None);
    }
}
