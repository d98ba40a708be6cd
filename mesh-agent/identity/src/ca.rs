//! The certificate authority of a mesh: a root of its own, made once and kept, or a plugged-in one.
//!
//! Its folder holds `root-cert.pem` and `ca-key.pem`; with `ca-cert.pem` (and `cert-chain.pem`, `ca-crl.pem`) beside them it
//! is a plugged-in CA in the layout of Istio's `cacerts`. The folder is looked at each second: changed files take effect without a restart,
//! and only if what they would issue verifies. Several processes may share a folder.
//!
//! Invariants: a certificate is signed only for a request that proves its key, with a key never certified before, for an identity the
//! caller of [`Ca::sign`] says the requester may have. Whatever signs is trusted everywhere before it signs, and as long as what it signed lives.

mod authority;
mod load;
mod options;
mod replay;
mod rotation;
mod sign;
mod store;
#[cfg(test)]
mod tests;

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::Ordering},
    time::{Duration, SystemTime},
};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use self::{
    authority::{Authority, SharedAuthority, union},
    load::{Loaded, Reload, announce, load},
    replay::Replays,
    rotation::Journal,
    sign::Counts,
    store::{CA_CERT, Store},
};
pub use self::{
    authority::{AuthorityError, BACKDATE, PluggedIn, ROOT_LIFE},
    options::{CaError, CaOptions, KnownRoot},
    replay::KEYS_MAX,
    sign::{CaCounters, Refusal, SignRequest},
    store::StoreError,
};
use crate::bundle::TrustMaterial;

/// How often the folder is looked at.
pub const POLL: Duration = Duration::from_secs(1);

/// What signs and what is trusted.
#[derive(Debug)]
struct Active {
    authority: SharedAuthority,
    /// What signs next, once its roots have been known long enough; this process only.
    pending: Option<(SharedAuthority, SystemTime)>,
    /// Announced and retired roots.
    others: Vec<CertificateDer<'static>>,
    /// Those that are retired, and until when.
    retired: Vec<KnownRoot>,
}

impl Active {
    fn trust(&self) -> TrustMaterial {
        let pending = self.pending.iter().flat_map(|(authority, _)| &authority.roots);
        let crls = self.pending.as_ref().map_or(&self.authority.crls, |(authority, _)| &authority.crls);
        TrustMaterial {
            roots: union(self.authority.roots.iter().chain(pending).chain(&self.others)),
            crls: crls.clone(),
            ..TrustMaterial::default()
        }
    }
}

/// A certificate authority. Shared.
#[derive(Debug)]
pub struct Ca {
    options: CaOptions,
    trust_domain: RwLock<Arc<str>>,
    store: Store,
    active: RwLock<Arc<Active>>,
    trust: watch::Sender<Arc<TrustMaterial>>,
    reload: Mutex<Reload>,
    replays: Mutex<Replays>,
    counts: Counts,
}

impl Ca {
    /// Opens the CA of a folder; makes a self-signed root if there is none. Blocks for file operations.
    ///
    /// # Errors
    /// The folder cannot be used, or what is in it is no CA whose certificates verify.
    pub fn open(options: CaOptions) -> Result<Self, CaError> {
        Self::open_with(options, None)
    }

    /// As [`Self::open`], with a plugged-in CA from elsewhere (a Secret); the folder then keeps only the journal of roots.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with(options: CaOptions, plugged: Option<PluggedIn>) -> Result<Self, CaError> {
        let store = Store::open(&options.folder)?;
        let known = options.known.clone();
        let mut reload = Reload { plugged, known, ..Reload::default() };
        let loaded = load(&store, &options, &options.trust_domain, &mut reload)?;
        let active = Active {
            authority: Arc::new(loaded.authority),
            pending: None,
            others: loaded.others,
            retired: loaded.retired,
        };
        Ok(Self {
            trust_domain: RwLock::new(Arc::clone(&options.trust_domain)),
            trust: watch::Sender::new(Arc::new(active.trust())),
            active: RwLock::new(Arc::new(active)),
            store,
            options,
            reload: Mutex::new(reload),
            replays: Mutex::new(Replays::new(KEYS_MAX)),
            counts: Counts::default(),
        })
    }

    /// The CA's folder.
    pub fn folder(&self) -> &Path {
        &self.options.folder
    }

    /// Roots and revocations, as everybody in the mesh should have them.
    pub fn trust(&self) -> watch::Receiver<Arc<TrustMaterial>> {
        self.trust.subscribe()
    }

    /// Roots that are trusted only for the sake of what they signed, and until when: what a CA with another folder has to be told
    /// ([`CaOptions::known`]) to trust them no longer than this one.
    pub fn retired(&self) -> Vec<KnownRoot> {
        self.active().retired.clone()
    }

    /// Issues for another trust domain from now on.
    pub fn set_trust_domain(&self, trust_domain: impl Into<Arc<str>>) {
        *self.trust_domain.write().unwrap_or_else(PoisonError::into_inner) = trust_domain.into();
    }

    /// What happened so far.
    pub fn counters(&self) -> CaCounters {
        self.counts.snapshot()
    }

    /// Begins a rotation of a self-signed root: a new one is announced now and signs after `after` (the options' `announce`, if
    /// `None`). Whichever process looks at the folder then does the switch, so this also works from a command beside a running agent.
    /// A rotation that is under way already goes on as it is. Blocks for file operations.
    ///
    /// # Errors
    /// The folder, or a plugged-in CA.
    pub fn rotate(&self, after: Option<Duration>) -> Result<(), CaError> {
        let mut reload = self.lock_reload();
        {
            let folder = self.store.lock()?;
            if reload.plugged.is_some() || folder.read(CA_CERT)?.is_some() {
                return Err(CaError::PluggedIn);
            }
            let mut journal = Journal::read(&folder)?;
            if journal.announced.is_none() && journal.switching.is_none() {
                announce(&folder, &mut journal, &self.options, &self.domain(), after)?;
            }
        }
        self.look(&mut reload)
    }

    /// Takes a plugged-in CA from elsewhere over (or, with `None`, goes back to the folder's). The new one signs once its roots
    /// have been announced. Blocks for file operations.
    ///
    /// # Errors
    /// What it would issue does not verify; the previous CA goes on.
    pub fn replace(&self, plugged: Option<PluggedIn>) -> Result<(), CaError> {
        let mut reload = self.lock_reload();
        let previous = std::mem::replace(&mut reload.plugged, plugged);
        self.look(&mut reload).inspect_err(|_| reload.plugged = previous)
    }

    /// Looks whether anything changed or is due, and does it. Blocks for file operations.
    ///
    /// # Errors
    /// The files are no usable CA; the previous one goes on.
    pub fn refresh(&self) -> Result<(), CaError> {
        let mut reload = self.lock_reload();
        let now = self.options.clock.now();
        let pending_due = self.active().pending.as_ref().is_some_and(|(_, at)| *at <= now);
        if !pending_due
            && reload.due.is_none_or(|due| now < due)
            && self.store.signature() == reload.signature
        {
            return Ok(());
        }
        self.look(&mut reload)
    }

    /// Calls [`Self::refresh`] each [`POLL`] until dropped; what fails is logged and counted.
    pub async fn run(self: Arc<Self>) {
        loop {
            tokio::time::sleep(POLL).await;
            let ca = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || ca.refresh()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    let cause =
                        std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    tracing::warn!(%error, cause, "the CA goes on as it was");
                }
                Err(error) => tracing::error!(%error, "looking at the CA's folder failed"),
            }
        }
    }

    fn look(&self, reload: &mut Reload) -> Result<(), CaError> {
        let loaded = match load(&self.store, &self.options, &self.domain(), reload) {
            Ok(loaded) => loaded,
            Err(error) => {
                self.counts.reload_failures.fetch_add(1, Ordering::Relaxed);
                // Not again before something changes, or a while has passed.
                reload.signature = self.store.signature();
                reload.due = Some(self.options.clock.now() + Duration::from_secs(30));
                return Err(error);
            }
        };
        if loaded.switched {
            self.counts.root_switches.fetch_add(1, Ordering::Relaxed);
            tracing::info!("the CA signs with its new root from now on");
        }
        self.adopt(loaded);
        Ok(())
    }

    /// Makes what was loaded the active CA: at once, if everybody could know its roots already.
    fn adopt(&self, loaded: Loaded) {
        let now = self.options.clock.now();
        let before = self.active();
        let authority = Arc::new(loaded.authority);
        let is_same = |other: &Authority| {
            other.certificate() == authority.certificate() && other.public_key() == authority.public_key()
        };
        let known = before.trust().roots;
        let at_once = loaded.switched || is_same(&before.authority) || before.authority.not_after <= now;
        let (current, pending) = if at_once {
            (authority, None)
        } else if let Some((next, at)) = before.pending.as_ref().filter(|(next, _)| is_same(next)) {
            if *at <= now {
                (authority, None)
            } else {
                (Arc::clone(&before.authority), Some((Arc::clone(next), *at)))
            }
        } else if authority.roots.iter().all(|root| known.contains(root)) {
            (authority, None)
        } else {
            let at = now + self.options.announce;
            tracing::info!(announce_s = self.options.announce.as_secs(), "a new CA is announced");
            (Arc::clone(&before.authority), Some((authority, at)))
        };
        if current.certificate() != before.authority.certificate() {
            self.counts.reloads.fetch_add(1, Ordering::Relaxed);
        }
        let active = Active { authority: current, pending, others: loaded.others, retired: loaded.retired };
        let trust = active.trust();
        *self.active.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(active);
        self.trust.send_if_modified(|published| {
            let changed = **published != trust;
            if changed {
                *published = Arc::new(trust);
            }
            changed
        });
    }

    fn active(&self) -> Arc<Active> {
        Arc::clone(&self.active.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn domain(&self) -> Arc<str> {
        Arc::clone(&self.trust_domain.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn lock_reload(&self) -> MutexGuard<'_, Reload> {
        self.reload.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
