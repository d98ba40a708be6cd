//! What a requester asks of the CA, why it may be refused, and the signing itself.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use mesh_core::identity::Identity;
use rcgen::SubjectPublicKeyInfo;

use super::{Ca, authority::Names};
use crate::{
    clock::unix_seconds,
    csr::{Csr, CsrError},
    issuer::Issued,
    key::PrivateKey,
    peer::Principal,
};

/// A request for a certificate.
#[derive(Clone, Copy, Debug)]
pub struct SignRequest<'a> {
    /// The PKCS#10 request, PEM or DER, as received.
    pub csr: &'a [u8],
    /// For whom, if the requester says so outside of the request; otherwise the request's only URI.
    pub subject: Option<&'a Principal>,
    /// How long it shall live; the CA's default, if `None`.
    pub ttl: Option<Duration>,
    /// Who asks, already authenticated: a node's name. For the log.
    pub requester: &'a str,
}

/// Why the CA refuses a request. The set is closed: [`Self::as_str`] is a metric label.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum Refusal {
    /// Not a request, or too long.
    #[error("the request is malformed or too long")]
    Malformed,
    /// A key that is not accepted.
    #[error("the request's key is of a kind that is not accepted")]
    Key,
    /// No proof of possession.
    #[error("the request is not signed by its own key")]
    BadSignature,
    /// Nobody to certify: none or several URIs, or not SPIFFE.
    #[error("the request names no identity, or several")]
    NoIdentity,
    /// The request's URI is not the identity asked for beside it.
    #[error("the request names another identity than the one asked for")]
    IdentityMismatch,
    /// Another trust domain than the CA's.
    #[error("the identity is not of this CA's trust domain")]
    TrustDomain,
    /// The requester does not host that identity.
    #[error("the requester does not host the identity")]
    NotHosted,
    /// The key was certified before.
    #[error("the request's key was certified before")]
    ReplayedKey,
    /// Longer than the CA gives, or nothing at all.
    #[error("the requested life is zero or too long")]
    Ttl,
    /// The CA's own certificate has ended.
    #[error("the CA's certificate has expired")]
    CaExpired,
    /// The CA failed.
    #[error("the CA could not sign")]
    Internal,
}

impl Refusal {
    /// Every reason, for metrics that exist before their first event.
    pub const ALL: [Self; 11] = [
        Self::Malformed,
        Self::Key,
        Self::BadSignature,
        Self::NoIdentity,
        Self::IdentityMismatch,
        Self::TrustDomain,
        Self::NotHosted,
        Self::ReplayedKey,
        Self::Ttl,
        Self::CaExpired,
        Self::Internal,
    ];

    /// The reason as a stable label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Key => "key",
            Self::BadSignature => "bad_signature",
            Self::NoIdentity => "no_identity",
            Self::IdentityMismatch => "identity_mismatch",
            Self::TrustDomain => "trust_domain",
            Self::NotHosted => "not_hosted",
            Self::ReplayedKey => "replayed_key",
            Self::Ttl => "ttl",
            Self::CaExpired => "ca_expired",
            Self::Internal => "internal",
        }
    }

    /// Whether the CA is at fault, so that asking again later makes sense.
    pub const fn is_ours(self) -> bool {
        matches!(self, Self::CaExpired | Self::Internal)
    }
}

impl From<CsrError> for Refusal {
    fn from(error: CsrError) -> Self {
        match error {
            CsrError::TooLong | CsrError::Malformed => Self::Malformed,
            CsrError::Key => Self::Key,
            CsrError::Signature => Self::BadSignature,
        }
    }
}

/// What the CA did so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaCounters {
    /// Certificates signed.
    pub issued: u64,
    /// Requests refused, by reason; reasons that never occurred are absent.
    pub refused: BTreeMap<Refusal, u64>,
    /// Reloads of the CA's files that took effect.
    pub reloads: u64,
    /// Reloads that were refused; the previous CA went on.
    pub reload_failures: u64,
    /// Rotations of the root: times that signing went over to a new root.
    pub root_switches: u64,
}

/// The counters themselves.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) issued: AtomicU64,
    pub(crate) reloads: AtomicU64,
    pub(crate) reload_failures: AtomicU64,
    pub(crate) root_switches: AtomicU64,
    refused: Mutex<BTreeMap<Refusal, u64>>,
}

impl Counts {
    pub(crate) fn refuse(&self, refusal: Refusal) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        *refused.entry(refusal).or_default() += 1;
    }

    pub(crate) fn snapshot(&self) -> CaCounters {
        CaCounters {
            issued: self.issued.load(Ordering::Relaxed),
            refused: self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            reloads: self.reloads.load(Ordering::Relaxed),
            reload_failures: self.reload_failures.load(Ordering::Relaxed),
            root_switches: self.root_switches.load(Ordering::Relaxed),
        }
    }
}

impl Ca {
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
