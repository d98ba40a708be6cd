//! What a destination's policy puts between a transport and the bytes, in this order: the header of the PROXY protocol, TLS, a
//! tunnel through an HTTP proxy.
//!
//! Invariants:
//! - All of it is there before a byte of an app is sent; what cannot be had is an error, never left out.
//! - Time for it is part of the time for the connection.

mod chunked;
mod connect;
pub(crate) mod io;
mod proxy_protocol;
pub(crate) mod tls;

use std::{
    borrow::Cow, error::Error, future::poll_fn, net::SocketAddr, pin::pin, rc::Rc, sync::Arc, task::Poll,
    time::Duration,
};

use mesh_core::{
    identity::Identity,
    policy,
    route::{
        cluster::{ClientTls, ClientTlsMode, ConnectTunnel, ProxyProtocol, TrafficPolicy},
        matching::StringMatch,
    },
    snapshot::{Mesh, Service, Snapshot, Traits, Workload},
};
use mesh_identity::PeerError;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;

use self::{
    connect::TunnelError,
    io::{Base, Raw, UpstreamIo},
    tls::{Inside, Ready, SetupError, is_named, is_wanted, server_name},
};
use crate::{
    close::CloseReason, connections::Live, hbone::tunnel::TunnelIo, outbound::Transport, stream::Stream,
    worker::Worker,
};

/// What lies between.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layers<'a> {
    policy: &'a TrafficPolicy,
    /// The server, where the policy names none for TLS.
    pub(crate) host: &'a str,
    /// What is spoken inside.
    pub(crate) inside: Inside,
    /// Whose connection it is.
    pub(crate) client: SocketAddr,
    /// What that dialled.
    pub(crate) dialled: Option<SocketAddr>,
    /// The endpoint.
    server: Server<'a>,
}

/// Who an endpoint is, as far as the mesh proves it by itself, and who resources say it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Server<'a> {
    /// At the other end of a tunnel, or on this node.
    proved: Option<&'a Workload>,
    service: Option<&'a Service>,
    /// Its service account, in the namespace of the service.
    account: Option<&'a str>,
}

/// What tells connections apart that lie over different layers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LayersKey {
    /// Settings of TLS (0: they cannot be used), and the server's name.
    tls: Option<(u64, String)>,
    tunnel: Option<ConnectTunnel>,
    proxy: Option<(ProxyProtocol, SocketAddr)>,
}

/// Why something does not lie between.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// The connection failed meanwhile.
    #[error("the connection ended")]
    Io(#[source] std::io::Error),
    /// The server was refused, or refused us.
    #[error("TLS: {reason}")]
    Tls {
        /// Why.
        reason: PeerError,
        /// In the words of the library.
        #[source]
        source: std::io::Error,
    },
    /// Settings that cannot be used.
    #[error("TLS cannot be set up")]
    Setup(#[from] SetupError),
    /// No end in time.
    #[error("{}was not done within {limit_ms} ms", if *tls { "the TLS handshake " } else { "" })]
    TimedOut {
        /// The time it had.
        limit_ms: u128,
        /// TLS was asked for.
        tls: bool,
    },
    /// The HTTP proxy did not agree.
    #[error("no tunnel through the proxy")]
    Tunnel(#[from] TunnelError),
}

impl LayerError {
    pub(crate) fn close_reason(&self) -> CloseReason {
        match self {
            Self::Io(_) => CloseReason::UpstreamLost,
            Self::Tls { reason, .. } => CloseReason::Tls(*reason),
            Self::Setup(_) => CloseReason::TlsSetup,
            Self::TimedOut { tls: true, .. } => CloseReason::TlsTimeout,
            Self::TimedOut { tls: false, .. } => CloseReason::UpstreamTimeout,
            Self::Tunnel(_) => CloseReason::ProxyRefused,
        }
    }

    fn of_handshake(error: std::io::Error) -> Self {
        let tls = error
            .get_ref()
            .and_then(|inner| (inner as &(dyn Error + 'static)).downcast_ref::<rustls::Error>());
        match tls {
            Some(tls) => Self::Tls { reason: PeerError::of(tls), source: error },
            None => Self::Io(error),
        }
    }
}

impl<'a> Layers<'a> {
    /// What a policy wants; `None`: nothing.
    pub(crate) fn of(
        policy: &'a TrafficPolicy,
        host: &'a str,
        inside: Inside,
        live: &Live,
        server: Server<'a>,
    ) -> Option<Self> {
        let wanted = policy.tls.as_ref().is_some_and(|tls| is_wanted(tls, server.proved))
            || policy.tunnel.is_some()
            || policy.proxy_protocol.is_some();
        let (client, dialled) = (live.client, live.original_dst());
        wanted.then_some(Self { policy, host, inside, client, dialled, server })
    }

    /// What is wanted of TLS.
    fn tls(&self) -> Option<&'a ClientTls> {
        self.policy.tls.as_ref().filter(|tls| is_wanted(tls, self.server.proved))
    }

    /// What is spoken inside of TLS: to an HTTP proxy nothing that its answer could be about.
    fn inside_tls(&self) -> Inside {
        if self.policy.tunnel.is_some() { Inside::Bytes } else { self.inside }
    }

    /// What a connection over them is told apart by.
    pub(crate) fn key(&self, worker: &Worker, live: &Live) -> LayersKey {
        let tls = self.tls().map(|tls| {
            let ready = ready(worker, live, tls, self);
            (ready.map_or(0, |ready| ready.id), tls.sni.as_deref().unwrap_or(self.host).to_owned())
        });
        LayersKey {
            tls,
            tunnel: self.policy.tunnel.clone(),
            proxy: self.policy.proxy_protocol.map(|version| (version, self.client)),
        }
    }
}

impl<'a> Server<'a> {
    /// An endpoint at `port`, which is a workload's perhaps.
    pub(crate) fn of(
        worker: &Worker,
        service: Option<&'a Arc<Service>>,
        workload: Option<&'a Arc<Workload>>,
        traits: Option<&'a Arc<Traits>>,
        port: u16,
    ) -> Self {
        let is_near = |workload: &Workload| workload.meshed && *workload.node == *worker.settings().node;
        let is_proved = |workload: &Workload| {
            policy::transport(workload, port) == policy::Transport::Hbone || is_near(workload)
        };
        Self {
            proved: workload.map(|workload| &**workload).filter(|workload| is_proved(workload)),
            service: service.map(|service| &**service),
            account: traits.and_then(|traits| traits.account.as_deref()),
        }
    }

    /// The names of which `ISTIO_MUTUAL` wants one, where it is TLS that proves who the endpoint is: the policy's, else those that
    /// resources say of the service and the endpoint (S47). None: whoever the mesh has given a certificate will do.
    fn names<'t>(&self, tls: &'t ClientTls, mesh: &Mesh) -> Cow<'t, [StringMatch]> {
        let Some(service) = self.service.filter(|_| tls.subject_alt_names.is_empty()) else {
            return Cow::Borrowed(&tls.subject_alt_names);
        };
        let of_account = self.account.into_iter().flat_map(|account| {
            let of = move |domain| Identity::new(domain, Arc::clone(&service.name.namespace), account);
            mesh.trust_domains().map(move |domain| of(domain).to_string().into())
        });
        let said = service.subject_alt_names.iter().cloned().chain(of_account);
        said.map(StringMatch::Exact).collect()
    }
}

/// Settings for handshakes, by the mesh's own certificate of a connection's pod, or with the Secret that a policy may name for pods of this
/// node.
fn ready(worker: &Worker, live: &Live, tls: &ClientTls, layers: &Layers<'_>) -> Result<Ready, SetupError> {
    let (snapshot, inside) = (worker.snapshot(), layers.inside_tls());
    if tls.mode == ClientTlsMode::IstioMutual {
        let unknown = || SetupError::NoOwnCertificate("the pod is not in the snapshot".to_owned());
        let own = own_identity(&snapshot, live).ok_or_else(unknown)?;
        let names = layers.server.names(tls, snapshot.mesh());
        let config = worker.shared().certificates.client_of_workload(&own, &names);
        let config = config.map_err(|error| SetupError::NoOwnCertificate(error.to_string()))?;
        // Counted ones are far below any address; one that is used again is of the same pod and policy.
        return Ok(Ready { id: Arc::as_ptr(&config) as u64, config: inside.asked_by(&config) });
    }
    let credential = tls::credential(&snapshot, &worker.settings().node, tls);
    worker.shared().origination.ready(tls, inside, credential)
}

/// Who a connection's pod is.
fn own_identity(snapshot: &Snapshot, live: &Live) -> Option<Identity> {
    snapshot.workload(live.pod.workload).map(|own| own.identity())
}

/// Waits for the certificate of a connection's pod, if it is only being fetched.
async fn own_certificate(worker: &Worker, live: &Live, deadline: Instant) {
    let Some(own) = own_identity(&worker.snapshot(), live) else { return };
    // Whoever uses it says why there is none.
    worker.shared().certificates.wait_for(&own, deadline).await.ok();
}

/// Lays what a policy wants over a transport, until `deadline`.
///
/// # Errors
/// Something cannot be had. The transport is closed then.
pub(crate) async fn lay(
    worker: &Rc<Worker>,
    live: &Rc<Live>,
    transport: Transport,
    layers: Option<&Layers<'_>>,
    (limit, deadline): (Duration, Instant),
) -> Result<UpstreamIo, LayerError> {
    let raw = match transport {
        Transport::Tcp(stream) => Raw::Tcp(stream),
        Transport::Tunnel(stream) => Raw::Tunnel(TunnelIo::new(stream, live)),
        Transport::Layered(io) => return Ok(*io),
    };
    let Some(layers) = layers else { return Ok(UpstreamIo::new(worker, live, Base::Raw(raw))) };
    let laid = timeout_at(deadline, lay_over(worker, live, raw, layers, deadline));
    let tls = layers.tls().is_some();
    laid.await.unwrap_or(Err(LayerError::TimedOut { limit_ms: limit.as_millis(), tls }))
}

async fn lay_over(
    worker: &Rc<Worker>,
    live: &Rc<Live>,
    mut raw: Raw,
    layers: &Layers<'_>,
    deadline: Instant,
) -> Result<UpstreamIo, LayerError> {
    if let Some(version) = layers.policy.proxy_protocol {
        let dialled = layers.dialled.unwrap_or(layers.client);
        let header = proxy_protocol::header(version, layers.client, dialled);
        raw.write_all(&header).await.map_err(LayerError::Io)?;
        raw.flush().await.map_err(LayerError::Io)?;
    }
    let base = match (layers.tls(), layers.server.proved) {
        (None, _) => Base::Raw(raw),
        (Some(tls), Some(proved)) if tls.mode == ClientTlsMode::IstioMutual => {
            is_named(tls, proved)?;
            Base::Raw(raw)
        }
        (Some(tls), _) => {
            if tls.mode == ClientTlsMode::IstioMutual {
                own_certificate(worker, live, deadline).await;
            }
            let ready = ready(worker, live, tls, layers)?;
            let name = server_name(tls, layers.host)?;
            let connector = TlsConnector::from(ready.config);
            let tls = Box::pin(connector.connect(name, raw)).await.map_err(LayerError::of_handshake)?;
            Base::Tls(Box::new(tls))
        }
    };
    let mut io = UpstreamIo::new(worker, live, base);
    if let Some(tunnel) = &layers.policy.tunnel {
        let opened = connect::open(&mut io, tunnel).await?;
        io = io.through(opened);
    }
    Ok(io)
}

/// Carries the bytes of a connection over what lies between, and says why it ended.
///
/// Cancel safety: dropping the future closes both sides.
pub(crate) async fn carry(live: &Live, mut app: Stream, mut io: UpstreamIo) -> CloseReason {
    let outcome = {
        let mut copy = pin!(copy_bidirectional(&mut app, &mut io));
        poll_fn(|cx| match live.meter.poll_stopped(cx) {
            Some(reason) => Poll::Ready(Err(reason)),
            None => copy.as_mut().poll(cx).map(Ok),
        })
        .await
    };
    let reason = match outcome {
        Ok(Ok(_)) => CloseReason::Finished,
        Ok(Err(_)) if app.is_hung_up() => CloseReason::ClientReset,
        Ok(Err(_)) => CloseReason::UpstreamReset,
        Err(stopped) => stopped,
    };
    if reason.resets() {
        app.reset();
        io.reset();
    }
    reason
}
