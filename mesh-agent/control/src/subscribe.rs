//! The agent's side of the link: what the controller says becomes the same snapshots that a directory of manifests gives,
//! and requests for certificates go the other way.
//!
//! One thread with a runtime of its own keeps the link: it connects, again after each failure, resumes with what it has, and
//! publishes each whole state.
//!
//! Invariants:
//! - Losing the controller changes nothing: the last state stays in force, and is on disk for the next start.
//! - A state is published as a whole or not at all.
//! - Until the controller was heard, the source has an error: nothing is taken away on the word of an old file.

mod backoff;
pub mod channel;
pub mod credentials;
pub mod disk;
pub mod issuer;
mod saver;
pub mod status;
pub mod store;
pub mod stream;
pub mod visit;

use std::{
    path::PathBuf,
    sync::{Arc, mpsc::sync_channel},
    thread,
    time::Duration,
};

use mesh_core::{identity::Identity, snapshot::Snapshot};
use mesh_identity::{
    bundle::TrustMaterial,
    clock::{Clock, SystemClock},
};
use rustls::pki_types::ServerName;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tonic::transport::Channel;
use zeroize::Zeroizing;

use self::{
    backoff::Backoff,
    channel::{ConnectError, ControllerUrl},
    credentials::{CredentialError, Credentials, NODE_CERTIFICATE_TTL, ServiceAccountFiles, random},
    disk::SnapshotFile,
    issuer::RemoteIssuer,
    saver::Saver,
    status::LinkStatus,
    store::Store,
    stream::{Stream, StreamError},
};
use crate::{
    link::SESSION_OLD,
    problem::Level,
    status::{SourceStatus, of_file},
};

/// How long a certificate of the node may take to be issued.
const ISSUE_WITHIN: Duration = Duration::from_secs(10);
/// How long the controller may take to open a stream.
const OPEN_WITHIN: Duration = Duration::from_secs(20);

/// How to reach a controller, and as whom.
#[derive(Debug)]
pub struct SubscribeOptions {
    /// Where it is.
    pub controller: ControllerUrl,
    /// Who it is.
    pub identity: Identity,
    /// What its certificate is judged by at first.
    pub roots: TrustMaterial,
    /// Name of this node.
    pub node: String,
    /// The node's token; needed whenever it has no valid certificate, so after each start.
    pub token: Option<Zeroizing<String>>,
    /// Folder for the last state.
    pub state_dir: PathBuf,
}

/// How a node whose agent runs in a pod reaches its controller.
#[derive(Clone, Debug)]
pub struct ServiceAccountOptions {
    /// Where it is.
    pub controller: ControllerUrl,
    /// The DNS name in its certificate, if not the URL's host.
    pub server_name: Option<String>,
    /// Name of this node. What the controller takes for it is what the API server says.
    pub node: String,
    /// The projected token, audience [`crate::kubernetes::tokens::AUDIENCE`].
    pub token_file: PathBuf,
    /// The roots that the controller publishes as a ConfigMap, PEM.
    pub root_file: PathBuf,
    /// Folder for the last state.
    pub state_dir: PathBuf,
}

/// Why a link cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Name, token or roots.
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    /// What the controller's certificate is to be judged by.
    #[error("{0:?} is no name that a certificate can have")]
    ServerName(String),
    /// No thread.
    #[error("cannot start the thread of the controller link")]
    Thread(#[source] std::io::Error),
    /// The thread ended.
    #[error("the thread of the controller link ended; this is a defect of the agent")]
    Defect,
}

/// A link to a controller. The thread behind it ends when every receiver of snapshots is gone.
#[derive(Clone, Debug)]
pub struct Subscription {
    /// Each whole state.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// The controller's source, and what is wrong with the link.
    pub sources: watch::Receiver<Arc<SourceStatus>>,
    /// State of the link.
    pub link: watch::Receiver<Arc<LinkStatus>>,
    /// Certificates for the pods of this node.
    pub issuer: Arc<RemoteIssuer>,
}

/// Starts the link. Blocks until there is a first state: the one saved on disk, else the controller's, however long that
/// takes.
///
/// # Errors
/// Only what waiting would not mend.
pub fn start(options: SubscribeOptions) -> Result<Subscription, StartError> {
    start_with(options, Arc::new(SystemClock), true)
}

/// [`start`] with another time of day, and without waiting for the first state unless told to `wait`.
///
/// # Errors
/// As [`start`].
pub fn start_with(
    options: SubscribeOptions,
    clock: Arc<dyn Clock>,
    wait: bool,
) -> Result<Subscription, StartError> {
    let SubscribeOptions { controller, identity, roots, node, token, state_dir } = options;
    let credentials = Credentials::new(&node, token, identity, roots.clone(), Arc::clone(&clock))?;
    let place = Place { controller, node, state_dir };
    start_as(credentials, place, roots, clock, wait)
}

/// Starts a link over which the node proves itself by its pod's service account: the token is read for each call, the roots for each
/// connection. Blocks until there is a first state, as [`start`].
///
/// # Errors
/// Only what waiting would not mend; files that are not there yet are waited for.
pub fn start_by_service_account(options: ServiceAccountOptions) -> Result<Subscription, StartError> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let credentials = of_service_account(&options, Arc::clone(&clock))?;
    let ServiceAccountOptions { controller, node, state_dir, .. } = options;
    let place = Place { controller, node, state_dir };
    start_as(credentials, place, TrustMaterial::default(), clock, true)
}

fn of_service_account(
    options: &ServiceAccountOptions,
    clock: Arc<dyn Clock>,
) -> Result<Credentials, StartError> {
    let ServiceAccountOptions { controller, server_name, node, token_file, root_file, .. } = options;
    let name = server_name.clone().unwrap_or_else(|| controller.host().to_owned());
    let server_name = ServerName::try_from(name.clone()).map_err(|_| StartError::ServerName(name))?;
    let files = ServiceAccountFiles { token: token_file.clone(), roots: root_file.clone(), server_name };
    Ok(Credentials::of_service_account(node, files, clock)?)
}

/// Where the controller is, and where the node is.
struct Place {
    controller: ControllerUrl,
    node: String,
    state_dir: PathBuf,
}

fn start_as(
    credentials: Credentials,
    place: Place,
    roots: TrustMaterial,
    clock: Arc<dyn Clock>,
    wait: bool,
) -> Result<Subscription, StartError> {
    let Place { controller, node, state_dir } = place;
    let credentials = Arc::new(credentials);
    let file = SnapshotFile::new(&state_dir, &node);
    let (channel_tx, channel) = watch::channel(None);
    let (trust_tx, trust) = watch::channel(Arc::new(roots.clone()));
    let (snapshots_tx, mut snapshots) = watch::channel(Arc::default());
    let (sources_tx, sources) = watch::channel(Arc::new(unheard(&controller, None)));
    let status = LinkStatus { controller: controller.to_string(), ..LinkStatus::default() };
    let (status_tx, link) = watch::channel(Arc::new(status));
    let issuer = Arc::new(RemoteIssuer::new(channel, trust, Arc::clone(&credentials)));
    let mut keeper = Keeper {
        controller,
        credentials,
        clock,
        store: Store::default(),
        saver: Saver::new(file.clone()),
        file,
        roots,
        backoff: Backoff::default(),
        channel: channel_tx,
        trust: trust_tx,
        snapshots: snapshots_tx,
        sources: sources_tx,
        status: status_tx,
    };
    keeper.start_from_disk();
    let (first_tx, first) = sync_channel(1);
    thread::Builder::new()
        .name("controller-link".to_owned())
        .spawn(move || keeper.run(&first_tx))
        .map_err(StartError::Thread)?;
    if wait && snapshots.borrow_and_update().version() == 0 {
        tracing::info!("no state on disk; waiting for the controller");
        first.recv().map_err(|_| StartError::Defect)?;
    }
    Ok(Subscription { snapshots, sources, link, issuer })
}

/// Why there is no stream, or none any more.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the controller does not answer")]
    Silent,
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Credentials(#[from] CredentialError),
    #[error("get the node's certificate")]
    Certificate(#[from] mesh_identity::issuer::IssueError),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Keeps the link.
struct Keeper {
    controller: ControllerUrl,
    credentials: Arc<Credentials>,
    clock: Arc<dyn Clock>,
    store: Store,
    file: SnapshotFile,
    saver: Saver,
    /// What the controller is judged by until it was heard.
    roots: TrustMaterial,
    backoff: Backoff,
    channel: watch::Sender<Option<Channel>>,
    trust: watch::Sender<Arc<TrustMaterial>>,
    snapshots: watch::Sender<Arc<Snapshot>>,
    sources: watch::Sender<Arc<SourceStatus>>,
    status: watch::Sender<Arc<LinkStatus>>,
}

impl Keeper {
    /// Puts the saved state in force, if there is one that can be trusted.
    fn start_from_disk(&mut self) {
        let path = self.file.path();
        match self.file.load() {
            Ok(None) => {}
            Ok(Some(held)) => {
                for error in self.store.load(held) {
                    tracing::warn!(path = %path.display(), %error, "a saved resource cannot be used");
                }
                self.publish(None);
                let snapshot = self.snapshots.borrow();
                tracing::info!(path = %path.display(), workloads = snapshot.workloads().count(), "starting from the saved state");
            }
            Err(error) => {
                let cause = report(&error);
                tracing::warn!(error = %cause, "the saved state is not used; starting without");
                self.sources.send_replace(Arc::new(unheard(&self.controller, Some(&cause))));
            }
        }
    }

    fn run(mut self, first: &std::sync::mpsc::SyncSender<()>) {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                tracing::error!(%error, "start the event loop of the controller link");
                return;
            }
        };
        runtime.block_on(async {
            let gone = self.snapshots.clone();
            let renewal = keep_certificate(
                Arc::clone(&self.credentials),
                self.channel.subscribe(),
                self.status.clone(),
            );
            tokio::select! {
                () = gone.closed() => {}
                () = self.keep(first) => {}
                () = renewal => {}
            }
            self.saver.finish().await;
        });
    }

    /// Connects again and again, for ever.
    async fn keep(&mut self, first: &std::sync::mpsc::SyncSender<()>) {
        loop {
            let ended = self.attend(first).await;
            self.channel.send_replace(None);
            let error = report(&ended);
            let now = self.clock.now();
            let was_connected = self.status.borrow().connected;
            self.status.send_modify(|status| Arc::make_mut(status).failed(now, error.clone()));
            let wait = self.backoff.next(random());
            if was_connected && error.contains(SESSION_OLD) {
                tracing::info!(controller = %self.controller, "the session was old; coming again");
            } else if was_connected {
                tracing::warn!(controller = %self.controller, error, "lost the controller; the last state stays in force");
            } else {
                let attempts = self.status.borrow().attempts;
                tracing::warn!(controller = %self.controller, error, attempts, ?wait, "cannot reach the controller");
            }
            sleep(wait).await;
        }
    }

    /// One connection from beginning to end.
    async fn attend(&mut self, first: &std::sync::mpsc::SyncSender<()>) -> LinkError {
        match self.attend_until_error(first).await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    async fn attend_until_error(
        &mut self,
        first: &std::sync::mpsc::SyncSender<()>,
    ) -> Result<std::convert::Infallible, LinkError> {
        let credentials = &self.credentials;
        let connect = async || -> Result<Channel, LinkError> {
            let (tls, name) = (credentials.client_config()?, credentials.server_name());
            Ok(channel::connect(&self.controller, tls, name).await?)
        };
        if credentials.wants_certificate() && credentials.certificate().is_none() {
            // With the token, over a connection that proves the controller's identity alone.
            renew(connect().await?, credentials, &self.status).await?;
        }
        let channel = connect().await?;
        let opening = Stream::open(channel.clone(), &self.credentials, &self.store);
        let mut stream = timeout(OPEN_WITHIN, opening).await.map_err(|_late| LinkError::Silent)??;
        self.channel.send_replace(Some(channel));
        self.heard();
        tracing::info!(controller = %self.controller, "connected to the controller");
        loop {
            tokio::select! {
                received = stream.next(&mut self.store) => {
                    let received = received?;
                    self.heard();
                    if received.refused > 0 {
                        let refused = received.refused as u64;
                        self.status.send_modify(|status| Arc::make_mut(status).refused_resources += refused);
                        tracing::warn!(refused, "refused resources of the controller; what was there before stays");
                    }
                    if let Some(generation) = received.commit {
                        self.backoff.reset();
                        self.publish(Some(generation));
                        // Nobody waits any more after the first.
                        first.try_send(()).ok();
                    }
                }
                () = self.saver.due() => self.saver.save(|| self.store.held(), &self.status),
            }
        }
    }

    fn heard(&self) {
        let now = self.clock.now();
        self.status.send_modify(|status| Arc::make_mut(status).connected(now));
    }

    /// Puts what the store holds in force. `generation` is absent for the saved state.
    fn publish(&mut self, generation: Option<u64>) {
        let before = self.snapshots.borrow().version();
        let state = self.store.state(before + 1);
        if let Some(mut material) = state.trust {
            if generation.is_none() {
                // The saved roots may be older than those the operator gave, or the other way round.
                let known: Vec<_> =
                    self.roots.roots.iter().filter(|root| !material.roots.contains(root)).cloned().collect();
                material.roots.extend(known);
            }
            match self.credentials.set_trust(material.clone()) {
                Ok(_) => {
                    self.trust.send_if_modified(|current| {
                        let changed = **current != material;
                        if changed {
                            *current = Arc::new(material);
                        }
                        changed
                    });
                }
                Err(error) => tracing::error!(error = %report(&error), "the controller's roots are not used"),
            }
        }
        let mut source = state.source.unwrap_or_default();
        source.source = PathBuf::from(format!("{} ({})", self.controller, source.source.display()));
        source.version = before + 1;
        if generation.is_none() {
            source.errors.extend(unheard(&self.controller, None).errors);
        }
        let changed = generation.is_none() || !state.snapshot.same_world(&self.snapshots.borrow());
        // The first state is published even if it is empty: "nothing configured" is an answer.
        if changed || before == 0 {
            tracing::info!(version = state.snapshot.version(), generation, "configuration published");
            self.snapshots.send_replace(Arc::new(state.snapshot));
        } else {
            source.version = before;
        }
        self.sources.send_if_modified(|current| {
            let changed = **current != source;
            if changed {
                source.log_since(current);
                *current = Arc::new(source);
            }
            changed
        });
        if generation.is_some() {
            self.status.send_modify(|status| Arc::make_mut(status).generation = generation);
            self.saver.soon();
        }
    }
}

/// Renews the node's certificate whenever it is due and there is a connection, for ever.
async fn keep_certificate(
    credentials: Arc<Credentials>,
    mut channel: watch::Receiver<Option<Channel>>,
    status: watch::Sender<Arc<LinkStatus>>,
) {
    if !credentials.wants_certificate() {
        return std::future::pending().await;
    }
    let mut backoff = Backoff::default();
    loop {
        // The sender lives as long as this future.
        let Ok(Some(over)) = channel.wait_for(Option::is_some).await.map(|channel| channel.clone()) else {
            return std::future::pending().await;
        };
        sleep(credentials.renewal_in()).await;
        match renew(over, &credentials, &status).await {
            Ok(()) => backoff.reset(),
            Err(error) => {
                tracing::warn!(error = %report(&error), "renew the node's certificate");
                sleep(backoff.next(random())).await;
            }
        }
    }
}

/// Gets the node a certificate.
async fn renew(
    channel: Channel,
    credentials: &Credentials,
    status: &watch::Sender<Arc<LinkStatus>>,
) -> Result<(), LinkError> {
    let (key, csr) = credentials.request()?;
    let name = credentials.principal().to_string();
    let asked = issuer::request(channel, credentials, csr, &name, NODE_CERTIFICATE_TTL);
    let issued = timeout(ISSUE_WITHIN, asked).await.map_err(|_late| LinkError::Silent)??;
    let svid = credentials.install(&key, &issued)?;
    let expires = svid.validity().not_after;
    status.send_modify(|status| Arc::make_mut(status).certificate_expires = Some(expires));
    tracing::info!(serial = svid.serial(), "the node has a certificate");
    Ok(())
}

/// The source while the controller was not heard: an error, so that nothing is taken away.
fn unheard(controller: &ControllerUrl, cause: Option<&str>) -> SourceStatus {
    let at = PathBuf::from(controller.to_string());
    let message = match cause {
        None => {
            "the controller was not heard yet; what is in force is the state saved on disk, if any".to_owned()
        }
        Some(cause) => format!("the controller was not heard yet, and {cause}; nothing is in force"),
    };
    SourceStatus { errors: vec![of_file(&at, Level::Error, message)], source: at, ..SourceStatus::default() }
}

/// An error with its causes.
fn report(error: &dyn std::error::Error) -> String {
    let mut out = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        // Libraries repeat their causes.
        if !out.contains(&text) {
            out.push_str(": ");
            out.push_str(&text);
        }
        next = cause.source();
    }
    out
}
