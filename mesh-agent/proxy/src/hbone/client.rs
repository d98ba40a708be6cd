//! Tunnels to pods of other nodes, made when they are needed and pooled.
//!
//! Invariants:
//! - A tunnel is only used for the source pod, the source identity, the destination pod, its address and the identity there that it
//!   was made for. A pod that is gone need not have said so, and the next one may have its address and its identity.
//! - Whoever needs a tunnel that is being made waits for it; it is made once, by a task that nobody's cancellation ends.
//! - A further tunnel is made while the sockets of all others keep streams waiting, or all are full; both are bounded.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
};

use mesh_core::{id::WorkloadId, identity::Identity};
use mesh_identity::{NotReady, identity_of};
use tokio::{
    sync::Notify,
    task::spawn_local,
    time::{Instant, timeout_at},
};

use super::{
    Hbone, TunnelFailure,
    h2::OpenError,
    limits, shutdown_idle,
    tls::handshake::{self, Established},
    tunnel::{Role, Tunnel, TunnelStream},
};
use crate::{
    close::CloseReason,
    connect::{ConnectError, dial},
    kernel::{PodHandle, UpstreamTags},
};

/// Times a tunnel may turn out to be full or leaving between its choice and its use.
const ATTEMPTS_MAX: u32 = 8;

/// What a tunnel is made for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Route {
    /// Local id of the source pod.
    pub(crate) pod: u32,
    /// Network namespace cookie of the source pod.
    pub(crate) incarnation: u64,
    pub(crate) source: Identity,
    pub(crate) workload: WorkloadId,
    pub(crate) destination: IpAddr,
    /// Whom the destination must prove to be.
    pub(crate) expected: Identity,
}

/// The tunnels of one worker to pods elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Pool(RefCell<HashMap<Route, Rc<Way>>>);

/// The tunnels of one route.
#[derive(Debug, Default)]
struct Way {
    tunnels: RefCell<Vec<Rc<Tunnel>>>,
    dialling: RefCell<Option<Rc<Dialling>>>,
}

/// A tunnel that is being made.
#[derive(Debug, Default)]
struct Dialling {
    done: Notify,
    outcome: RefCell<Option<Result<(), Rc<TunnelFailure>>>>,
    ended: Cell<bool>,
}

impl Pool {
    pub(super) fn sweep(&self, tick: u32, idle_max: u32) {
        self.0.borrow_mut().retain(|_, way| {
            way.tunnels.borrow().iter().for_each(|tunnel| shutdown_idle(tunnel, tick, idle_max));
            Rc::strong_count(way) > 1 || !way.tunnels.borrow().is_empty()
        });
    }

    pub(super) fn leave_pod(&self, pod: u32) {
        for (_, way) in self.0.borrow().iter().filter(|(route, _)| route.pod == pod) {
            way.tunnels.borrow().iter().for_each(|tunnel| tunnel.shutdown());
        }
    }

    pub(super) fn drain(&self) {
        for way in self.0.borrow().values() {
            way.tunnels.borrow().iter().for_each(|tunnel| tunnel.shutdown());
        }
    }

    pub(super) fn all(&self) -> Vec<Rc<Tunnel>> {
        self.0.borrow().values().flat_map(|way| way.tunnels.borrow().clone()).collect()
    }

    fn way(&self, route: &Route) -> Rc<Way> {
        Rc::clone(self.0.borrow_mut().entry(route.clone()).or_default())
    }
}

impl Hbone {
    /// A stream to the destination of a route, with a request's headers written and nothing answered yet.
    ///
    /// Cancel safety: a tunnel that is being made is made all the same.
    ///
    /// # Errors
    /// Why there is no tunnel.
    pub(crate) async fn open(
        self: &Rc<Self>,
        pod: &Arc<PodHandle>,
        route: &Route,
        tags: &UpstreamTags,
        fields: &[(&str, &str)],
    ) -> Result<TunnelStream, Rc<TunnelFailure>> {
        let way = self.pool.way(route);
        for _ in 0..ATTEMPTS_MAX {
            if let Some(tunnel) = self.choose(&way, pod, route, tags) {
                match tunnel.open(fields) {
                    Ok(stream) => return Ok(stream),
                    Err(OpenError::Full | OpenError::GoingAway) => continue,
                    Err(error @ OpenError::HeadersTooLarge) => {
                        return Err(TunnelFailure::new(CloseReason::TunnelRefused, error.to_string()));
                    }
                }
            }
            let dialling = self.dial_once(&way, pod, route, tags);
            let done = dialling.done.notified();
            if !dialling.ended.get() {
                done.await;
            }
            if let Some(Err(failure)) = &*dialling.outcome.borrow() {
                return Err(Rc::clone(failure));
            }
        }
        Err(TunnelFailure::new(CloseReason::TunnelRefused, "every tunnel is full or leaving"))
    }

    /// The tunnel for the next stream; starts a further one if those there are keep streams waiting.
    fn choose(
        self: &Rc<Self>,
        way: &Rc<Way>,
        pod: &Arc<PodHandle>,
        route: &Route,
        tags: &UpstreamTags,
    ) -> Option<Rc<Tunnel>> {
        let settings = &self.shared.settings.hbone;
        let tunnels = way.tunnels.borrow();
        let open = tunnels.iter().filter(|tunnel| !tunnel.is_leaving() && tunnel.room() > 0);
        let best = open.min_by_key(|tunnel| (tunnel.is_saturated(), tunnel.streams()))?;
        let best = Rc::clone(best);
        let more = best.is_saturated() && tunnels.len() < settings.tunnels_max;
        drop(tunnels);
        if more {
            self.dial_once(way, pod, route, tags);
        }
        Some(best)
    }

    /// The tunnel that is being made, begun if there is none.
    fn dial_once(
        self: &Rc<Self>,
        way: &Rc<Way>,
        pod: &Arc<PodHandle>,
        route: &Route,
        tags: &UpstreamTags,
    ) -> Rc<Dialling> {
        if let Some(dialling) = &*way.dialling.borrow() {
            return Rc::clone(dialling);
        }
        let dialling = Rc::new(Dialling::default());
        if way.tunnels.borrow().len() >= self.shared.settings.hbone.full_tunnels_max {
            dialling.end(Err(TunnelFailure::new(CloseReason::Overloaded, "too many tunnels to this pod")));
            return dialling;
        }
        *way.dialling.borrow_mut() = Some(Rc::clone(&dialling));
        let tags = UpstreamTags {
            src_workload: tags.src_workload,
            dst_workload: tags.dst_workload,
            tunnel: true,
            ..UpstreamTags::default()
        };
        let task = Task { way: Rc::clone(way), dialling: Rc::clone(&dialling) };
        let (hbone, pod, route) = (Rc::clone(self), Arc::clone(pod), route.clone());
        drop(spawn_local(async move {
            match hbone.dial(&pod, &route, &tags).await {
                Ok(tunnel) => {
                    task.way.tunnels.borrow_mut().push(Rc::clone(&tunnel));
                    task.finish(Ok(()));
                    let _listed = Listed { way: &task.way, tunnel: &tunnel };
                    // A server opens no streams.
                    hbone.run(Role::Client, &tunnel, |_| {}).await;
                }
                Err(failure) => task.finish(Err(failure)),
            }
        }));
        dialling
    }

    async fn dial(
        &self,
        pod: &Arc<PodHandle>,
        route: &Route,
        tags: &UpstreamTags,
    ) -> Result<Rc<Tunnel>, Rc<TunnelFailure>> {
        let settings = &self.shared.settings;
        let certificates = &self.shared.certificates;
        let deadline = Instant::now() + settings.hbone.handshake_timeout;
        let missing = |why: NotReady| TunnelFailure::new(CloseReason::CertificateMissing, why.to_string());
        let expected = std::slice::from_ref(&route.expected);
        let config = match certificates.client_config(&route.source, expected) {
            Ok(config) => config,
            Err(_) => {
                certificates.wait_for(&route.source, deadline).await.map_err(missing)?;
                certificates.client_config(&route.source, expected).map_err(missing)?
            }
        };
        let addr = SocketAddr::new(route.destination, settings.hbone.port);
        let dialled = dial(&*self.shared.sockets, pod, addr, tags, settings.connect_timeout).await;
        let mut stream = dialled.map_err(|error: ConnectError| {
            TunnelFailure::new(error.close_reason(), crate::connect::report(&error))
        })?;
        super::keep_alive(&stream);
        let established = match timeout_at(deadline, handshake::client(&mut stream, config)).await {
            Ok(established) => established.map_err(|error| TunnelFailure::of_handshake(&error))?,
            Err(_) => {
                return Err(TunnelFailure::new(CloseReason::TlsTimeout, "the TLS handshake took too long"));
            }
        };
        let peer = peer_of(&established)?;
        let limits = limits(&settings.hbone);
        Ok(Tunnel::new(Role::Client, stream, established, peer, limits, Rc::clone(&self.workspace)))
    }
}

/// Whom a verified peer proved to be.
pub(super) fn peer_of(established: &Established) -> Result<Arc<Identity>, Rc<TunnelFailure>> {
    let certificate = established.peer.first().map(|certificate| certificate.as_ref());
    match identity_of(certificate.unwrap_or_default()) {
        Ok(identity) => Ok(Arc::new(identity)),
        Err(error) => Err(TunnelFailure::new(CloseReason::Tls(error), error.to_string())),
    }
}

/// The task of a tunnel; those who wait for it hear of its end even if it panics.
struct Task {
    way: Rc<Way>,
    dialling: Rc<Dialling>,
}

impl Task {
    fn finish(&self, outcome: Result<(), Rc<TunnelFailure>>) {
        if !self.dialling.ended.get() {
            *self.way.dialling.borrow_mut() = None;
            self.dialling.end(outcome);
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.finish(Err(TunnelFailure::new(CloseReason::TunnelLost, "the tunnel's task ended")));
    }
}

impl Dialling {
    fn end(&self, outcome: Result<(), Rc<TunnelFailure>>) {
        *self.outcome.borrow_mut() = Some(outcome);
        self.ended.set(true);
        self.done.notify_waiters();
    }
}

/// Takes a tunnel off its route's list.
struct Listed<'a> {
    way: &'a Way,
    tunnel: &'a Rc<Tunnel>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.tunnel.abort(super::tunnel::TunnelEnd::Stopped);
        self.way.tunnels.borrow_mut().retain(|tunnel| !Rc::ptr_eq(tunnel, self.tunnel));
    }
}
