//! Owns the controller's server: its own certificate, the services behind one address, and its end.
//!
//! Invariants:
//! - The server shows a certificate of the current root, renewed at half life and whenever the roots change.
//! - What is published is complete before the first client is answered.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use mesh_core::{identity::Identity, snapshot::Snapshot};
use mesh_identity::{
    bundle::{BundleError, Trust, TrustDomains, TrustMaterial},
    ca::{Ca, Refusal},
    clock::Clock,
    key::{KeyAlgorithm, KeyError, PrivateKey},
    peer::Principal,
    svid::{Svid, SvidError},
    tls::{TlsContext, TlsError},
    verify::Expect,
};
use mesh_wire::proto::{
    ca::istio_certificate_service_server::IstioCertificateServiceServer,
    discovery_server::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer,
};
use rustls::ServerConfig;
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{sleep, timeout},
};
use tonic::transport::Server;

use super::{
    ads::{Ads, Publication, session_age},
    auth::NodeProof,
    certificates::Certificates,
    feed::Feed,
    hosted::Hosted,
    listener,
    metrics::PublishMetrics,
};
use crate::{
    link::{CONTROLLER_ACCOUNT, KEEPALIVE_EACH, KEEPALIVE_WITHIN, MESSAGE_BYTES_MAX},
    status::SourceStatus,
};

/// Life of the controller's own certificate, unless told otherwise.
pub const OWN_TTL: Duration = Duration::from_secs(24 * 3600);
/// Pause after the own certificate could not be renewed.
const RENEW_PAUSE: Duration = Duration::from_secs(5);
/// Calls at once on one connection.
const CALLS_MAX: usize = 256;
/// Largest request for a certificate, its metadata included.
const CSR_MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Streams are given this long to end.
const CLOSE_WITHIN: Duration = Duration::from_secs(3);

/// What the server serves.
#[derive(Debug)]
pub struct ServerParts {
    /// Already bound.
    pub listener: TcpListener,
    /// The authority.
    pub ca: Arc<Ca>,
    /// What nodes' tokens are proved by.
    pub proof: NodeProof,
    /// Namespace that the controller runs in: a part of its identity and of its names.
    pub namespace: String,
    /// DNS suffix of services.
    pub cluster_domain: String,
    /// Life of the server's own certificate, which is renewed when half of it is over; [`OWN_TTL`] but for tests of that.
    pub own_ttl: Duration,
    /// How long streams of clients live, about; `None` but for tests of that: as long as fits how nodes prove themselves.
    pub session_age: Option<Duration>,
    /// The world.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Where it comes from and what is wrong with it.
    pub sources: watch::Receiver<Arc<SourceStatus>>,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// Counters.
    pub metrics: PublishMetrics,
}

/// Why the server does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener's address.
    #[error("cannot tell the address that is listened at")]
    Address(#[source] io::Error),
    /// The authority's roots.
    #[error("the roots of the certificate authority cannot be used")]
    Trust(#[from] BundleError),
    /// No key.
    #[error("cannot make the controller's key")]
    Key(#[from] KeyError),
    /// The authority did not sign.
    #[error("cannot issue the controller's certificate")]
    Issue(#[from] Refusal),
    /// What it signed is not usable.
    #[error("the controller's certificate cannot be used")]
    Own(#[from] SvidError),
    /// No TLS configuration.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The server ended.
    #[error("the server failed")]
    Server(#[from] tonic::transport::Error),
}

/// A server that is ready to answer.
#[derive(Debug)]
pub struct Controller {
    parts: ServerParts,
    addr: SocketAddr,
    publication: Publication,
    own: Own,
    renew_at: SystemTime,
    feed: Feed,
}

/// The server's own certificate.
#[derive(Debug)]
struct Own {
    ca: Arc<Ca>,
    tls: TlsContext,
    identity: Identity,
    names: Vec<String>,
    ttl: Duration,
    config: watch::Sender<Arc<ServerConfig>>,
}

impl Controller {
    /// Publishes the first state and makes the server's certificate.
    ///
    /// # Errors
    /// The authority cannot be used.
    pub fn new(parts: ServerParts) -> Result<Self, ServeError> {
        let addr = parts.listener.local_addr().map_err(ServeError::Address)?;
        let publication = Publication::new(parts.metrics.clone());
        let mut feed = Feed::default();
        let snapshot = Arc::clone(&parts.snapshots.borrow());
        let material = Arc::clone(&parts.ca.trust().borrow());
        publication.apply(feed.edits(&snapshot, &parts.sources.borrow(), &material));
        let mesh = snapshot.mesh();
        let identity = controller_identity(&mesh.trust_domain, &parts.namespace);
        let domains = TrustDomains {
            local: Arc::clone(&mesh.trust_domain),
            aliases: mesh.trust_domain_aliases.clone(),
        };
        let trust = Arc::new(Trust::new(domains, (*material).clone())?);
        let tls = TlsContext { trust, clock: Arc::clone(&parts.clock) };
        let names = names(&parts.namespace, &parts.cluster_domain);
        let (config, renew_at) = certificate(&parts.ca, &tls, &identity, &names, parts.own_ttl)?;
        let own = Own {
            ca: Arc::clone(&parts.ca),
            tls,
            identity,
            names,
            ttl: parts.own_ttl,
            config: watch::Sender::new(config),
        };
        Ok(Self { parts, addr, publication, own, renew_at, feed })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Who it is to its clients.
    pub fn identity(&self) -> &Identity {
        &self.own.identity
    }

    /// What nodes' tokens are proved by.
    pub fn proof(&self) -> &NodeProof {
        &self.parts.proof
    }

    /// What the server shows to those who connect, newest last: for other servers of this process.
    pub fn tls(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.own.config.subscribe()
    }

    /// What is published, and to whom.
    pub fn publication(&self) -> Publication {
        self.publication.clone()
    }

    /// Serves until `stop`, then ends all streams.
    ///
    /// # Errors
    /// The server failed.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { parts, publication, own, renew_at, feed, .. } = self;
        let hosted = Arc::new(Hosted::new(parts.snapshots.clone()));
        let proof = Arc::new(parts.proof);
        let incoming = listener::accept(parts.listener, own.config.subscribe(), parts.metrics.clone());
        let certificates = Certificates {
            ca: Arc::clone(&parts.ca),
            hosted,
            proof: Arc::clone(&proof),
            metrics: parts.metrics.clone(),
        };
        let session_age = parts.session_age.unwrap_or_else(|| session_age(&proof));
        let ads = Ads { publication: publication.clone(), proof, session_age };
        let mut closing = publication.closing();
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_EACH))
            .http2_keepalive_timeout(Some(KEEPALIVE_WITHIN))
            .concurrency_limit_per_connection(CALLS_MAX)
            .add_service(
                AggregatedDiscoveryServiceServer::new(ads)
                    .max_decoding_message_size(MESSAGE_BYTES_MAX)
                    .max_encoding_message_size(MESSAGE_BYTES_MAX),
            )
            .add_service(
                IstioCertificateServiceServer::new(certificates)
                    .max_decoding_message_size(CSR_MESSAGE_BYTES_MAX),
            )
            .serve_with_incoming_shutdown(incoming, async move {
                // Both outcomes mean that it is time.
                closing.wait_for(|closing| *closing).await.ok();
            });
        tokio::pin!(server);
        tokio::select! {
            ended = &mut server => return Ok(ended?),
            () = follow(feed, &publication, &own, parts.snapshots, parts.sources) => {}
            () = renew(&own, renew_at) => {}
            () = stop => {}
        }
        publication.close();
        if timeout(CLOSE_WITHIN, &mut server).await.is_err() {
            tracing::info!("some clients' connections are still open");
        }
        Ok(())
    }
}

/// Publishes what changes, for ever; ends with the source.
async fn follow(
    mut feed: Feed,
    publication: &Publication,
    own: &Own,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    mut sources: watch::Receiver<Arc<SourceStatus>>,
) {
    let mut trust = own.ca.trust();
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        let source = Arc::clone(&sources.borrow_and_update());
        let material = Arc::clone(&trust.borrow_and_update());
        own.follow(&snapshot, &material);
        let changed = publication.apply(feed.edits(&snapshot, &source, &material));
        if changed > 0 {
            tracing::info!(
                changed,
                generation = publication.generation(),
                version = snapshot.version(),
                "published"
            );
        }
        let alive = tokio::select! {
            changed = snapshots.changed() => changed.is_ok(),
            changed = sources.changed() => changed.is_ok(),
            changed = trust.changed() => changed.is_ok(),
        };
        if !alive {
            tracing::error!("the source of configuration has ended");
            return;
        }
    }
}

impl Own {
    /// Judges clients, and issues, by the mesh as it is now.
    fn follow(&self, snapshot: &Snapshot, material: &TrustMaterial) {
        let mesh = snapshot.mesh();
        self.ca.set_trust_domain(Arc::clone(&mesh.trust_domain));
        self.tls.trust.set_domains(TrustDomains {
            local: Arc::clone(&mesh.trust_domain),
            // Clients that came before a change of the trust domain know the controller by its former name.
            aliases: mesh.trust_domain_aliases.iter().chain([&self.identity.trust_domain]).cloned().collect(),
        });
        if let Err(error) = self.tls.trust.set_material(material.clone()) {
            tracing::error!(%error, "the roots of the certificate authority cannot be used; the former ones are");
        }
    }
}

/// Keeps the server's certificate young, for ever.
async fn renew(own: &Own, mut renew_at: SystemTime) {
    let mut trust = own.ca.trust();
    loop {
        let wait = renew_at.duration_since(own.tls.clock.now()).unwrap_or_default();
        tokio::select! {
            () = sleep(wait) => {}
            changed = trust.changed() => if changed.is_err() {
                return std::future::pending().await;
            },
        }
        match certificate(&own.ca, &own.tls, &own.identity, &own.names, own.ttl) {
            Ok((config, at)) => {
                own.config.send_replace(config);
                renew_at = at;
                tracing::info!("the controller's certificate was renewed");
            }
            Err(error) => {
                tracing::error!(%error, "renew the controller's certificate; the former one is shown");
                sleep(RENEW_PAUSE).await;
            }
        }
    }
}

/// A new certificate of the server, and when to make the next one.
fn certificate(
    ca: &Ca,
    tls: &TlsContext,
    identity: &Identity,
    names: &[String],
    ttl: Duration,
) -> Result<(Arc<ServerConfig>, SystemTime), ServeError> {
    let key = PrivateKey::generate(KeyAlgorithm::default())?;
    let issued = ca.issue_own(&key, identity, names, ttl)?;
    let now = tls.clock.now();
    let svid = Svid::new(Principal::Workload(identity.clone()), &key, &issued, now)?;
    let config = tls.server_or_anonymous(&svid, Expect::WorkloadOrNode)?;
    Ok((Arc::new(config), svid.renew_at(now, 0.0)))
}

/// The names a controller is called by; the first half those that Istio's own clients expect.
fn names(namespace: &str, cluster_domain: &str) -> Vec<String> {
    ["istiod", CONTROLLER_ACCOUNT]
        .iter()
        .flat_map(|service| {
            [
                format!("{service}.{namespace}.svc.{cluster_domain}"),
                format!("{service}.{namespace}.svc"),
                format!("{service}.{namespace}"),
            ]
        })
        .collect()
}

/// Who a controller is.
pub fn controller_identity(trust_domain: &str, namespace: &str) -> Identity {
    Identity::new(trust_domain, namespace, CONTROLLER_ACCOUNT)
}
