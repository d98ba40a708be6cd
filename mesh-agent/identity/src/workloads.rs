//! The certificates of this node's workloads: wanted, fetched, renewed, dropped.
//!
//! [`Certificates`] answers the data path at once from memory; [`Renewer`] is the one task that talks to the issuer, on the
//! control runtime. An issuer that is away costs nothing until certificates end: they are replaced at half their life.
//!
//! Invariants: a configuration is handed out only while its certificate is valid; a key lives as long as its identity is
//! wanted or a connection uses it; the renewer has at most [`Options::concurrency`] requests under way.

mod renew;
#[cfg(test)]
mod tests;
mod view;

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use mesh_core::{identity::Identity, route::matching::StringMatch};
use rustls::{ClientConfig, ServerConfig};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

pub use self::{renew::Renewer, view::CertificateView};
use crate::{
    bundle::{Trust, TrustDomains, TrustMaterial},
    clock::{Clock, SystemClock},
    issuer::{IssueError, Issuer},
    key::KeyAlgorithm,
    schedule::{Priority, Schedule},
    svid::{Svid, fingerprint},
    tls::{TlsContext, TlsError},
    verify::Expect,
};

/// Most client configurations that are kept per source; on overflow all of that source are built anew.
pub const CLIENT_CONFIGS_MAX: usize = 1024;

/// How certificates are obtained.
#[derive(Clone, Debug)]
pub struct Options {
    /// Kind of keys.
    pub algorithm: KeyAlgorithm,
    /// Life asked for.
    pub ttl: Duration,
    /// Most requests under way.
    pub concurrency: usize,
    /// Longest a request may take.
    pub attempt_timeout: Duration,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
    /// The trust domains of the mesh at the start; [`Trust::set_domains`] follows changes.
    pub domains: TrustDomains,
}

impl Options {
    /// P-256, a day, eight at a time, ten seconds each, the machine's clock.
    pub fn new(domains: TrustDomains) -> Self {
        Self {
            algorithm: KeyAlgorithm::EcdsaP256,
            ttl: Duration::from_secs(86_400),
            concurrency: 8,
            attempt_timeout: Duration::from_secs(10),
            clock: Arc::new(SystemClock),
            domains,
        }
    }
}

/// Why there is no TLS configuration right now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// The identity is not among those wanted: it is of no workload on this node.
    #[error("the identity is of no workload on this node")]
    NotWanted,
    /// The first certificate is being fetched.
    #[error("the certificate is being fetched")]
    Pending,
    /// The first certificate could not be fetched so far; tried again with back-off.
    #[error("no certificate yet: {0}")]
    Failed(IssueError),
    /// The certificate ended and could not be replaced.
    #[error("the certificate has expired")]
    Expired,
}

impl NotReady {
    /// The reason as a stable label.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::NotWanted => "certificate_not_wanted",
            Self::Pending => "certificate_pending",
            Self::Failed(_) => "certificate_failed",
            Self::Expired => "certificate_expired",
        }
    }
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CertificateCounters {
    /// First certificates obtained.
    pub obtained: u64,
    /// Certificates replaced before or after their end.
    pub renewed: u64,
    /// Attempts that the issuer refused.
    pub refused: u64,
    /// Attempts that failed otherwise.
    pub failed: u64,
    /// Identities that are wanted.
    pub wanted: u64,
    /// Identities with a certificate that is valid now.
    pub valid: u64,
}

#[derive(Debug, Default)]
struct Counts {
    obtained: AtomicU64,
    renewed: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
}

/// A certificate in use, with the configurations made of it.
#[derive(Debug)]
struct Slot {
    svid: Svid,
    renew_at: SystemTime,
    server: Arc<ServerConfig>,
    clients: Mutex<HashMap<Box<[Identity]>, Arc<ClientConfig>>>,
    /// Towards servers that are no agents.
    others: Mutex<HashMap<Box<[StringMatch]>, Arc<ClientConfig>>>,
}

/// What is known about one identity.
#[derive(Clone, Debug, Default)]
struct State {
    slot: Option<Arc<Slot>>,
    /// The last attempt's error, gone with the next success.
    error: Option<IssueError>,
    /// When the next attempt after a failure is due.
    retry_at: Option<SystemTime>,
}

type Entries = HashMap<Identity, Arc<watch::Sender<State>>>;

/// The certificates of this node's workloads. Shared by all workers.
pub struct Certificates {
    options: Options,
    context: TlsContext,
    issuer: Arc<dyn Issuer>,
    entries: RwLock<Entries>,
    /// Locked after `entries`, where both are.
    schedule: Mutex<Schedule>,
    wake: Notify,
    counts: Counts,
}

impl Certificates {
    /// The certificates and the task that fetches them, which the caller runs on its control runtime and ends by dropping it.
    pub fn new(options: Options, issuer: Arc<dyn Issuer>) -> (Arc<Self>, Renewer) {
        let trust = Arc::new(Trust::empty(options.domains.clone()));
        let context = TlsContext { trust, clock: Arc::clone(&options.clock) };
        let certificates = Arc::new(Self {
            options,
            context,
            issuer,
            entries: RwLock::default(),
            schedule: Mutex::default(),
            wake: Notify::new(),
            counts: Counts::default(),
        });
        // What the issuer says at the start counts at once, before the task first runs.
        certificates.follow_trust();
        let renewer = Renewer::new(Arc::clone(&certificates));
        (certificates, renewer)
    }

    /// What is trusted; the one instance behind every configuration handed out here.
    pub fn trust(&self) -> &Arc<Trust> {
        &self.context.trust
    }

    /// What configurations are made with, for connections that are not between workloads.
    pub fn context(&self) -> &TlsContext {
        &self.context
    }

    /// Says whose certificates are wanted: the identities of the pods on this node. Replaces what was wanted before; keys of others
    /// are dropped, connections that use them live on.
    pub fn want(&self, identities: impl IntoIterator<Item = Identity>) {
        let wanted: HashSet<Identity> = identities.into_iter().collect();
        let now = self.now();
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let mut schedule = self.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        entries.retain(|identity, _| {
            let keep = wanted.contains(identity);
            if !keep {
                schedule.remove(identity);
            }
            keep
        });
        for identity in wanted {
            schedule.add(&identity, now);
            entries.entry(identity).or_insert_with(|| Arc::new(watch::Sender::new(State::default())));
        }
        drop((schedule, entries));
        self.wake.notify_one();
    }

    /// The configuration by which `source` dials a server that must be one of `expected`. The same object as long as the
    /// certificate is the same, so whoever pools connections can compare pointers.
    ///
    /// # Errors
    /// There is no valid certificate at this moment; it has been asked for with priority, see [`Self::wait_for`].
    pub fn client_config(
        &self,
        source: &Identity,
        expected: &[Identity],
    ) -> Result<Arc<ClientConfig>, NotReady> {
        let slot = self.slot(source)?;
        let mut clients = slot.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(expected) {
            return Ok(Arc::clone(config));
        }
        let config = self.context.client(Some(&slot.svid), expected).map_err(|error| unusable(&error))?;
        let config = Arc::new(config);
        if clients.len() >= CLIENT_CONFIGS_MAX {
            clients.clear();
        }
        clients.insert(expected.into(), Arc::clone(&config));
        Ok(config)
    }

    /// The configuration by which `source` dials a server that is no agent's and has a certificate of the mesh, see
    /// [`TlsContext::client_of_workload`]. The same object as long as the certificate is the same.
    ///
    /// # Errors
    /// As [`Self::client_config`].
    pub fn client_of_workload(
        &self,
        source: &Identity,
        names: &[StringMatch],
    ) -> Result<Arc<ClientConfig>, NotReady> {
        let slot = self.slot(source)?;
        let mut others = slot.others.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = others.get(names) {
            return Ok(Arc::clone(config));
        }
        let config = self.context.client_of_workload(&slot.svid, names).map_err(|error| unusable(&error))?;
        let config = Arc::new(config);
        if others.len() >= CLIENT_CONFIGS_MAX {
            others.clear();
        }
        others.insert(names.into(), Arc::clone(&config));
        Ok(config)
    }

    /// The configuration by which `destination` accepts connections of any workload of a trusted domain.
    ///
    /// # Errors
    /// As [`Self::client_config`].
    pub fn server_config(&self, destination: &Identity) -> Result<Arc<ServerConfig>, NotReady> {
        Ok(Arc::clone(&self.slot(destination)?.server))
    }

    /// Waits until `identity` has a valid certificate.
    ///
    /// # Errors
    /// At the deadline: why there is still none. At once, if the identity is not (or no longer) wanted.
    pub async fn wait_for(&self, identity: &Identity, deadline: Instant) -> Result<(), NotReady> {
        let Some(mut state) = self.entry(identity).map(|entry| entry.subscribe()) else {
            return Err(NotReady::NotWanted);
        };
        loop {
            state.mark_unchanged();
            match self.slot(identity) {
                Ok(_) => return Ok(()),
                Err(NotReady::NotWanted) => return Err(NotReady::NotWanted),
                Err(why) => match tokio::time::timeout_at(deadline, state.changed()).await {
                    Ok(Ok(())) => {}
                    // Its sender is gone: no longer wanted.
                    Ok(Err(_)) => return Err(NotReady::NotWanted),
                    Err(_) => return Err(self.slot(identity).err().unwrap_or(why)),
                },
            }
        }
    }

    /// What `meshctl certificates` shows, by identity.
    pub fn views(&self) -> Vec<CertificateView> {
        let now = self.now();
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let bundle = self.context.trust.current();
        let mut views: Vec<CertificateView> = entries
            .iter()
            .map(|(identity, entry)| CertificateView::new(identity, &entry.borrow(), &bundle, now))
            .collect();
        views.sort_by(|a, b| a.identity.cmp(&b.identity));
        views
    }

    /// SHA-256 fingerprints of the roots that are trusted now.
    pub fn roots(&self) -> Vec<String> {
        let bundle = self.context.trust.current();
        bundle.material().roots.iter().map(|der| fingerprint(der)).collect()
    }

    /// Counters and gauges.
    pub fn counters(&self) -> CertificateCounters {
        let now = self.now();
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let valid = entries.values().filter(|entry| {
            entry.borrow().slot.as_ref().is_some_and(|slot| slot.svid.validity().contains(now))
        });
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        CertificateCounters {
            obtained: load(&self.counts.obtained),
            renewed: load(&self.counts.renewed),
            refused: load(&self.counts.refused),
            failed: load(&self.counts.failed),
            wanted: entries.len() as u64,
            valid: valid.count() as u64,
        }
    }

    fn now(&self) -> SystemTime {
        self.options.clock.now()
    }

    fn entry(&self, identity: &Identity) -> Option<Arc<watch::Sender<State>>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner).get(identity).map(Arc::clone)
    }

    /// Why an identity has no valid certificate, if it has none. Nothing is asked for.
    pub fn missing(&self, identity: &Identity) -> Option<NotReady> {
        self.held(identity, self.now()).err()
    }

    /// The valid certificate of an identity.
    fn held(&self, identity: &Identity, now: SystemTime) -> Result<Arc<Slot>, NotReady> {
        let state = self.entry(identity).ok_or(NotReady::NotWanted)?;
        let state = state.borrow();
        match (&state.slot, &state.error) {
            (Some(slot), _) if slot.svid.validity().contains(now) => Ok(Arc::clone(slot)),
            (Some(_), _) => Err(NotReady::Expired),
            (None, Some(error)) => Err(NotReady::Failed(error.clone())),
            (None, None) => Err(NotReady::Pending),
        }
    }

    /// The valid certificate of an identity; asks for one with priority if there is none.
    fn slot(&self, identity: &Identity) -> Result<Arc<Slot>, NotReady> {
        let now = self.now();
        let why = match self.held(identity, now) {
            Err(NotReady::NotWanted) => return Err(NotReady::NotWanted),
            Err(why) => why,
            held => return held,
        };
        let mut schedule = self.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        if schedule.hurry(identity, Priority::OnDemand, now) {
            self.wake.notify_one();
        }
        Err(why)
    }

    /// Takes over what the issuer trusts now.
    fn follow_trust(&self) {
        let material = Arc::clone(&self.issuer.trust().borrow());
        if material.roots.is_empty() {
            return;
        }
        if let Err(error) = self.context.trust.set_material(TrustMaterial::clone(&material)) {
            tracing::warn!(%error, "the issuer's trust material is refused; the last good one stays");
        }
    }

    /// A slot around a new certificate.
    fn make_slot(&self, svid: Svid, renew_at: SystemTime) -> Result<Slot, TlsError> {
        let server = Arc::new(self.context.server(&svid, Expect::AnyWorkload)?);
        Ok(Slot { svid, renew_at, server, clients: Mutex::default(), others: Mutex::default() })
    }
}

fn unusable(error: &TlsError) -> NotReady {
    NotReady::Failed(IssueError::Unusable(error.to_string()))
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates").field("issuer", &self.issuer).finish_non_exhaustive()
    }
}
