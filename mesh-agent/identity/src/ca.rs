//! The certificate authority of a mesh: a root of its own, made once and kept, or a plugged-in one.
//!
//! Its folder holds `root-cert.pem` and `ca-key.pem`; with `ca-cert.pem` (and `cert-chain.pem`, `ca-crl.pem`) beside them it
//! is a plugged-in CA in the layout of Istio's `cacerts`. The folder is looked at each second: changed files take effect without a restart,
//! and only if what they would issue verifies. Several processes may share a folder.
//!
//! Invariants: a certificate is signed only for a request that proves its key, with a key never certified before, for an identity the
//! caller of [`Ca::sign`] says the requester may have. Whatever signs is trusted everywhere before it signs, and as long as what it signed lives.

mod authority;
mod replay;
mod rotation;
mod sign;
mod store;
#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, atomic::Ordering},
    time::{Duration, SystemTime},
};

use mesh_core::identity::Identity;
use rcgen::SubjectPublicKeyInfo;
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use self::{
    authority::{Authority, Names, SharedAuthority, certificates, union},
    replay::Replays,
    rotation::{Announced, Journal},
    sign::Counts,
    store::{CA_CERT, CA_CRL, CA_KEY, CERT_CHAIN, Locked, NEXT_KEY, ROOT_CERT, Signature, Store},
};
pub use self::{
    authority::{AuthorityError, BACKDATE, PluggedIn, ROOT_LIFE},
    replay::KEYS_MAX,
    sign::{CaCounters, Refusal, SignRequest},
    store::StoreError,
};
use crate::{
    bundle::TrustMaterial,
    clock::{Clock, SystemClock, unix_seconds},
    csr::Csr,
    issuer::Issued,
    key::{KeyAlgorithm, KeyError, PrivateKey},
    peer::Principal,
};

/// How often the folder is looked at.
pub const POLL: Duration = Duration::from_secs(1);

/// How a CA behaves.
#[derive(Clone, Debug)]
pub struct CaOptions {
    /// Where it keeps its files.
    pub folder: PathBuf,
    /// The trust domain it issues for.
    pub trust_domain: Arc<str>,
    /// Life of a certificate for which nobody asked a life.
    pub default_ttl: Duration,
    /// Longest life.
    pub max_ttl: Duration,
    /// Kind of key of a self-signed root.
    pub algorithm: KeyAlgorithm,
    /// Life of a self-signed root.
    pub root_life: Duration,
    /// A self-signed root is rotated when less than this is left of its life.
    pub rotate_before: Duration,
    /// How long a new root is trusted before it signs: as long as it may take until every agent has heard of it.
    pub announce: Duration,
    /// How long an old root stays trusted: as long as what it signed may live.
    pub retire: Duration,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
}

impl CaOptions {
    /// A day by default, 90 days at most, a P-256 root of ten years that is replaced in its last year, announced for ten minutes.
    pub fn new(folder: impl Into<PathBuf>, trust_domain: impl Into<Arc<str>>) -> Self {
        let days = |days: u64| Duration::from_secs(days * 86_400);
        Self {
            folder: folder.into(),
            trust_domain: trust_domain.into(),
            default_ttl: days(1),
            max_ttl: days(90),
            algorithm: KeyAlgorithm::EcdsaP256,
            root_life: ROOT_LIFE,
            rotate_before: days(365),
            announce: Duration::from_secs(600),
            retire: days(90),
            clock: Arc::new(SystemClock),
        }
    }
}

/// Why a CA cannot be opened, reloaded or rotated.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Its folder.
    #[error("the CA's folder cannot be used")]
    Store(#[from] StoreError),
    /// Its certificates or key.
    #[error("the CA's files cannot be used")]
    Authority(#[from] AuthorityError),
    /// A root without its key; nothing is overwritten.
    #[error("{} has {ROOT_CERT} but no {CA_KEY}", .0.display())]
    NoKey(PathBuf),
    /// No key could be made.
    #[error("no key for a root")]
    Key(#[from] KeyError),
    /// A plugged-in CA is rotated by whoever plugs it in.
    #[error("a plugged-in CA is rotated by replacing its files")]
    PluggedIn,
}

/// What signs and what is trusted.
#[derive(Debug)]
struct Active {
    authority: SharedAuthority,
    /// What signs next, once its roots have been known long enough; this process only.
    pending: Option<(SharedAuthority, SystemTime)>,
    /// Announced and retired roots.
    others: Vec<CertificateDer<'static>>,
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

/// What a look at the folder found.
struct Loaded {
    authority: Authority,
    others: Vec<CertificateDer<'static>>,
    switched: bool,
}

/// What reloading remembers.
#[derive(Debug, Default)]
struct Reload {
    signature: Signature,
    /// Files from elsewhere (a Secret), which take precedence over the folder's.
    plugged: Option<PluggedIn>,
    /// When something in the journal is due.
    due: Option<SystemTime>,
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
        let mut reload = Reload { plugged, ..Reload::default() };
        let loaded = load(&store, &options, &options.trust_domain, &mut reload)?;
        let active = Active { authority: Arc::new(loaded.authority), pending: None, others: loaded.others };
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

    /// Issues for another trust domain from now on.
    pub fn set_trust_domain(&self, trust_domain: impl Into<Arc<str>>) {
        *self.trust_domain.write().unwrap_or_else(PoisonError::into_inner) = trust_domain.into();
    }

    /// What happened so far.
    pub fn counters(&self) -> CaCounters {
        self.counts.snapshot()
    }

    /// Signs a request, if `allowed` says that the requester may have a certificate for that principal. Each outcome is counted and logged.
    ///
    /// # Errors
    /// Why not.
    pub fn sign(
        &self,
        request: &SignRequest<'_>,
        allowed: &dyn Fn(&Principal) -> bool,
    ) -> Result<Issued, Refusal> {
        let signed = self.decide_and_sign(request, allowed);
        if let Err(refusal) = &signed {
            self.counts.refuse(*refusal);
            let subject = request.subject.map(ToString::to_string).unwrap_or_default();
            tracing::warn!(
                reason = refusal.as_str(),
                requester = request.requester,
                subject,
                "certificate refused"
            );
        }
        signed
    }

    fn decide_and_sign(
        &self,
        request: &SignRequest<'_>,
        allowed: &dyn Fn(&Principal) -> bool,
    ) -> Result<Issued, Refusal> {
        let csr = Csr::parse(request.csr)?;
        let subject = subject_of(request, &csr)?;
        let ttl = request.ttl.unwrap_or(self.options.default_ttl);
        if ttl < Duration::from_secs(1) || ttl > self.options.max_ttl {
            return Err(Refusal::Ttl);
        }
        let local = Arc::clone(&self.trust_domain.read().unwrap_or_else(PoisonError::into_inner));
        if *subject.trust_domain() != local {
            return Err(Refusal::TrustDomain);
        }
        if !allowed(&subject) {
            return Err(Refusal::NotHosted);
        }
        let key = SubjectPublicKeyInfo::from_der(csr.public_key()).map_err(|_| Refusal::Key)?;
        let is_fresh = csr.public_key() != self.active().authority.public_key()
            && self.replays.lock().unwrap_or_else(PoisonError::into_inner).insert(csr.public_key());
        if !is_fresh {
            return Err(Refusal::ReplayedKey);
        }
        let names = Names { uri: subject.to_string(), dns: &[] };
        let encipherment = rcgen::PublicKeyData::algorithm(&key) == &rcgen::PKCS_RSA_SHA256;
        self.issue(&key, encipherment, &names, ttl, request.requester)
    }

    /// Issues a certificate for a key of this very process: the controller's own, which also has DNS names for clients that
    /// know it by those.
    ///
    /// # Errors
    /// Only [`Refusal::CaExpired`] and [`Refusal::Internal`].
    pub fn issue_own(
        &self,
        key: &PrivateKey,
        identity: &Identity,
        dns: &[String],
        ttl: Duration,
    ) -> Result<Issued, Refusal> {
        let names = Names { uri: identity.to_string(), dns };
        self.issue(key, key.is_rsa(), &names, ttl, "controller")
            .inspect_err(|refusal| self.counts.refuse(*refusal))
    }

    fn issue(
        &self,
        key: &impl rcgen::PublicKeyData,
        encipherment: bool,
        names: &Names<'_>,
        ttl: Duration,
        requester: &str,
    ) -> Result<Issued, Refusal> {
        let now = self.options.clock.now();
        let active = self.active();
        if active.authority.not_after <= now {
            return Err(Refusal::CaExpired);
        }
        let signed = active.authority.sign(key, encipherment, names, now, ttl).map_err(|error| {
            tracing::error!(%error, "the CA could not sign");
            Refusal::Internal
        })?;
        self.counts.issued.fetch_add(1, Ordering::Relaxed);
        tracing::info!(
            subject = names.uri,
            requester,
            serial = signed.serial,
            not_after = unix_seconds(signed.not_after),
            "certificate issued"
        );
        Ok(Issued { chain: signed.chain, roots: active.trust().roots })
    }

    /// Begins a rotation of a self-signed root: a new one is announced now and signs after `announce` (the options', if
    /// `None`). Whichever process looks at the folder then does the switch, so this also works from a command beside a running agent.
    /// A rotation that is under way already goes on as it is. Blocks for file operations.
    ///
    /// # Errors
    /// The folder, or a plugged-in CA.
    pub fn rotate(&self, announce: Option<Duration>) -> Result<(), CaError> {
        let mut reload = self.lock_reload();
        {
            let folder = self.store.lock()?;
            if reload.plugged.is_some() || folder.read(CA_CERT)?.is_some() {
                return Err(CaError::PluggedIn);
            }
            let mut journal = Journal::read(&folder)?;
            if journal.announced.is_none() && journal.switching.is_none() {
                self::announce(&folder, &mut journal, &self.options, &self.domain(), announce)?;
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
        let active = Active { authority: current, pending, others: loaded.others };
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

/// For whom a request is: what the requester says beside it, and the request's own URI, must not differ.
fn subject_of(request: &SignRequest<'_>, csr: &Csr) -> Result<Principal, Refusal> {
    let wished = match csr.uris() {
        [] => None,
        [uri] => Some(Principal::parse(uri).map_err(|_| Refusal::NoIdentity)?),
        _ => return Err(Refusal::NoIdentity),
    };
    match (request.subject, wished) {
        (Some(subject), Some(wished)) if *subject != wished => Err(Refusal::IdentityMismatch),
        (Some(subject), _) => Ok(subject.clone()),
        (None, Some(wished)) => Ok(wished),
        (None, None) => Err(Refusal::NoIdentity),
    }
}

/// Makes a root and announces it. The key is stored first: a key without an announcement is nothing.
fn announce(
    folder: &Locked<'_>,
    journal: &mut Journal,
    options: &CaOptions,
    trust_domain: &str,
    announce: Option<Duration>,
) -> Result<(), CaError> {
    let now = options.clock.now();
    let (key, pem) = PrivateKey::generate_pem(options.algorithm)?;
    let root = Authority::make_root(trust_domain, &key, now, options.root_life)?;
    folder.write(NEXT_KEY, pem.as_bytes())?;
    let switch_at = unix_seconds(now + announce.unwrap_or(options.announce));
    journal.announced = Some(Announced { root, switch_at });
    journal.write(folder)?;
    tracing::info!(switch_at, "a new root is announced");
    Ok(())
}

/// Looks at the folder, does what is due in it, and makes an authority of it.
fn load(
    store: &Store,
    options: &CaOptions,
    trust_domain: &str,
    reload: &mut Reload,
) -> Result<Loaded, CaError> {
    let now = options.clock.now();
    let folder = store.lock()?;
    let mut journal = Journal::read(&folder)?;
    let (mut switched, mut changed, mut rotate_at) = (false, false, None);
    let plugged = match &reload.plugged {
        Some(plugged) => Some(plugged.clone()),
        None => plugged_in_of(&folder)?,
    };
    let authority = match plugged {
        Some(plugged) => {
            changed = journal.abandon();
            Authority::plugged_in(&plugged, now)?
        }
        None => {
            switched = journal.advance(&folder, now)?;
            let authority = self_signed(&folder, options, trust_domain)?;
            // Never more than half its life, or each root would at once be followed by the next.
            let ahead = options.rotate_before.min(options.root_life / 2);
            let at = authority.not_after.checked_sub(ahead).unwrap_or(now);
            if journal.announced.is_none() && at <= now {
                announce(&folder, &mut journal, options, trust_domain, None)?;
            }
            rotate_at = journal.announced.is_none().then_some(at);
            authority
        }
    };
    let roots = authority.roots.iter().map(|root| pem_of(root)).collect();
    if journal.note(roots, now, options.retire) || changed {
        journal.write(&folder)?;
    }
    let announced = journal.announced.iter().map(|next| (&next.root, next.switch_at));
    let retired = journal.retired.iter().map(|old| (&old.root, old.until));
    let due = announced.clone().chain(retired.clone()).map(|(_, at)| at).min();
    let mut others = Vec::new();
    for (pem, _) in announced.chain(retired) {
        others.extend(certificates(ROOT_CERT, pem.as_bytes())?);
    }
    let due = due.map(|at| SystemTime::UNIX_EPOCH + Duration::from_secs(at));
    reload.due = due.into_iter().chain(rotate_at).min();
    reload.signature = store.signature();
    Ok(Loaded { authority, others, switched })
}

/// The self-signed root of the folder; made, if there is none.
fn self_signed(folder: &Locked<'_>, options: &CaOptions, trust_domain: &str) -> Result<Authority, CaError> {
    let now = options.clock.now();
    let (root, key) = match (folder.read(ROOT_CERT)?, folder.read(CA_KEY)?) {
        (Some(root), Some(key)) => (root, key),
        (Some(_), None) => return Err(CaError::NoKey(options.folder.clone())),
        // The key is stored first, so a key alone is where somebody died.
        (None, key) => {
            let key = match key {
                Some(key) => key,
                None => {
                    let (_, pem) = PrivateKey::generate_pem(options.algorithm)?;
                    folder.write(CA_KEY, pem.as_bytes())?;
                    zeroize::Zeroizing::new(pem.as_bytes().to_vec())
                }
            };
            let root =
                Authority::make_root(trust_domain, &PrivateKey::from_pem(&key)?, now, options.root_life)?;
            folder.write(ROOT_CERT, root.as_bytes())?;
            tracing::info!(folder = %options.folder.display(), "made a root certificate");
            (zeroize::Zeroizing::new(root.into_bytes()), key)
        }
    };
    let mut authority = Authority::self_signed(&root, &key, now)?;
    if let Some(crl) = folder.read(CA_CRL)? {
        authority = authority.with_crls(&crl, now)?;
    }
    Ok(authority)
}

/// The plugged-in CA of the folder, if it has one.
fn plugged_in_of(folder: &Locked<'_>) -> Result<Option<PluggedIn>, CaError> {
    let Some(ca_cert) = folder.read(CA_CERT)? else { return Ok(None) };
    let read = |name| folder.read(name).map(Option::unwrap_or_default);
    Ok(Some(PluggedIn {
        ca_cert: ca_cert.to_vec(),
        ca_key: read(CA_KEY)?,
        cert_chain: read(CERT_CHAIN)?.to_vec(),
        root_cert: read(ROOT_CERT)?.to_vec(),
        crl: read(CA_CRL)?.to_vec(),
    }))
}

/// A certificate as PEM.
fn pem_of(der: &CertificateDer<'_>) -> String {
    crate::key::pem("CERTIFICATE", der).to_string()
}
