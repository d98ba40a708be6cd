//! How a CA behaves, and why there may be none.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::CertificateDer;

use super::{
    authority::{AuthorityError, ROOT_LIFE},
    store::{CA_KEY, ROOT_CERT, StoreError},
};
use crate::{
    clock::{Clock, SystemClock},
    key::{KeyAlgorithm, KeyError},
};

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
    /// Roots of which a folder without a journal is told, by whoever remembers them elsewhere. Those that the CA does not use are
    /// retired: what they signed may still be about.
    pub known: Vec<KnownRoot>,
    /// The time of day.
    pub clock: Arc<dyn Clock>,
}

/// A root that is or was trusted, as it is remembered outside the CA's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownRoot {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Until when it stays trusted; `None` if it was in use.
    pub until: Option<SystemTime>,
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
            known: Vec::new(),
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
