//! What a requester asks of the CA, and why it may be refused.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{csr::CsrError, peer::Principal};

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
