//! HBONE: connections between pods of different nodes, as HTTP/2 CONNECT streams in mutual TLS (port 15008).
//!
//! - [`tls`]: the handshake by rustls, then records of our own, opened and sealed in place.
//! - [`h2`]: HTTP/2 as tunnels need it, without sockets.
//! - [`tunnel`]: one TLS connection with its streams and the apps' sockets behind them.
//! - [`client`]: who needs a tunnel gets one; tunnels are pooled by source pod, destination pod with its address, and identities.
//! - [`server`]: arrivals on 15008: who they are, what they ask for, whether they may.
//!
//! Invariants:
//! - A peer is who its certificate says; nothing it writes into headers is trusted.
//! - A failure here never falls back to plaintext.
//! - Tunnels belong to one worker, and so do their streams.

pub(crate) mod client;
mod h2;
mod recheck;
pub(crate) mod request;
pub(crate) mod server;
mod tls;
pub(crate) mod tunnel;
mod workspace;

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use mesh_identity::PeerError;
use socket2::{SockRef, TcpKeepalive};

#[cfg(fuzzing)]
pub(crate) use self::h2::fuzz;
use self::{
    client::Pool,
    h2::Limits,
    recheck::Recheck,
    tls::handshake::HandshakeError,
    tunnel::{Role, Tunnel, TunnelEnd, Turn},
    workspace::Workspace,
};
use crate::{
    close::CloseReason,
    settings::HboneSettings,
    stream::Stream,
    worker::{Shared, TICK_MS},
};

/// Why there is no tunnel, or no stream in it.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct TunnelFailure {
    pub(crate) reason: CloseReason,
    pub(crate) text: String,
}

impl TunnelFailure {
    pub(crate) fn new(reason: CloseReason, text: impl Into<String>) -> Rc<Self> {
        Rc::new(Self { reason, text: text.into() })
    }

    fn of_handshake(error: &HandshakeError) -> Rc<Self> {
        Self::new(reason_of(error), crate::connect::report(error))
    }
}

fn reason_of(error: &HandshakeError) -> CloseReason {
    match error {
        HandshakeError::Alpn => CloseReason::Tls(PeerError::Alpn),
        HandshakeError::NotTls => CloseReason::Tls(PeerError::NotTls),
        HandshakeError::Tls(error) => CloseReason::Tls(PeerError::of(error)),
        HandshakeError::Closed
        | HandshakeError::Socket(_)
        | HandshakeError::TakeOver(_)
        | HandshakeError::TooLarge => CloseReason::Tls(PeerError::Handshake),
    }
}

/// The tunnels of one worker.
pub(crate) struct Hbone {
    shared: Arc<Shared>,
    workspace: Rc<Workspace>,
    pool: Pool,
    /// Tunnels of agents elsewhere, with the local pod each is for.
    served: RefCell<Vec<(u32, Rc<Tunnel>)>>,
    draining: Cell<bool>,
    recheck: Recheck,
}

impl std::fmt::Debug for Hbone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hbone").finish_non_exhaustive()
    }
}

impl Hbone {
    pub(crate) fn new(shared: Arc<Shared>, tick: Rc<Cell<u32>>) -> Rc<Self> {
        let held_max = shared.settings.held_bytes_max;
        let workspace = Rc::new(Workspace::new(held_max, tick, Arc::clone(&shared.metrics)));
        Rc::new(Self {
            shared,
            workspace,
            pool: Pool::default(),
            served: RefCell::default(),
            draining: Cell::new(false),
            recheck: Recheck::default(),
        })
    }

    /// Bytes kept for apps that do not take them.
    pub(crate) fn held(&self) -> usize {
        self.workspace.held()
    }

    /// Gives free memory back.
    pub(crate) fn trim(&self) {
        self.workspace.trim();
    }

    /// Closes tunnels that nobody has used for long.
    pub(crate) fn sweep(&self, tick: u32) {
        let settings = &self.shared.settings.hbone;
        self.pool.sweep(tick, ticks(settings.idle_timeout));
        let idle_max = ticks(settings.server_idle_timeout);
        for (_, tunnel) in &*self.served.borrow() {
            shutdown_idle(tunnel, tick, idle_max);
        }
        if let Some(judge) = self.recheck.judge(&self.shared.certificates) {
            let served = self.served.borrow().iter().map(|(_, tunnel)| Rc::clone(tunnel)).collect::<Vec<_>>();
            for tunnel in served.into_iter().chain(self.pool.all()) {
                if let Some(reason) = judge.refuses(tunnel.role, &tunnel.chain) {
                    tracing::warn!(peer = %tunnel.peer, reason = reason.as_str(), "tunnel closed: its peer is trusted no more");
                    tunnel.abort(TunnelEnd::Distrusted);
                }
            }
        }
    }

    /// No new streams in the tunnels from or to a pod; those that there are run on.
    pub(crate) fn leave_pod(&self, pod: u32) {
        self.pool.leave_pod(pod);
        for (_, tunnel) in self.served.borrow().iter().filter(|(of, _)| *of == pod) {
            tunnel.shutdown();
        }
    }

    /// The same for all tunnels, and for those that other nodes are still making.
    pub(crate) fn drain(&self) {
        self.draining.set(true);
        self.pool.drain();
        for (_, tunnel) in &*self.served.borrow() {
            tunnel.shutdown();
        }
    }

    /// Runs a tunnel until it ends; `opened` takes each request.
    async fn run(&self, role: Role, tunnel: &Rc<Tunnel>, mut opened: impl FnMut(tunnel::Opened)) {
        let metrics = &self.shared.metrics;
        metrics.tunnels.opened(role);
        let _open = OpenTunnel(&self.shared, role);
        // A tunnel of a client's is made in a drain for a connection that came before it.
        if role == Role::Server && self.draining.get() {
            tunnel.shutdown();
        }
        loop {
            match tunnel.turn().await {
                Turn::Opened(requests) => requests.into_iter().for_each(&mut opened),
                // Through the reactor, so that other sockets' edges are seen in between.
                Turn::Yield => tokio::task::yield_now().await,
                Turn::Ended(end) => {
                    metrics.tunnels.ended(role, &end);
                    tracing::debug!(role = role.as_str(), peer = %tunnel.peer, %end, "tunnel ended");
                    return;
                }
            }
        }
    }
}

/// Counts a tunnel while it is open.
struct OpenTunnel<'a>(&'a Shared, Role);

impl Drop for OpenTunnel<'_> {
    fn drop(&mut self) {
        self.0.metrics.tunnels.left(self.1);
    }
}

fn limits(settings: &HboneSettings) -> Limits {
    Limits {
        stream_window: settings.stream_window,
        connection_window: settings.tunnel_window,
        max_streams: settings.streams_max,
        ..Limits::default()
    }
}

fn shutdown_idle(tunnel: &Tunnel, tick: u32, idle_max: u32) {
    if !tunnel.is_leaving() && tunnel.idle_since().is_some_and(|since| tick.wrapping_sub(since) >= idle_max) {
        tunnel.shutdown();
    }
}

/// Notices a peer that is gone without a word: probes after a minute of silence, and gives unanswered bytes as long.
fn keep_alive(stream: &Stream) {
    const SILENCE: Duration = Duration::from_secs(60);
    let socket = SockRef::from(stream.socket());
    let probes =
        TcpKeepalive::new().with_time(SILENCE).with_interval(Duration::from_secs(10)).with_retries(6);
    // Best effort: without them a dead peer is noticed by the next bytes.
    socket.set_tcp_keepalive(&probes).ok();
    socket.set_tcp_user_timeout(Some(SILENCE)).ok();
}

fn ticks(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis() / u128::from(TICK_MS)).unwrap_or(u32::MAX)
}
