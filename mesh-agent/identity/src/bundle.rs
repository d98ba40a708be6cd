//! What this node trusts: roots per trust domain, revocations, and the set of trust domains itself.
//!
//! [`TrustMaterial`] is what an issuer publishes, [`Bundle`] the form that verifiers use, [`Trust`] the place that holds
//! the current one. Verifiers read it at each handshake, so a new root counts from the next handshake on.
//!
//! Invariant: a [`Bundle`] has at least one root, except before the first update, when it trusts nobody. An update with anything malformed in it is refused as a whole and the last good
//! bundle stays. Revocation lists that are past their `nextUpdate` are still used, with a warning: what they revoke stays
//! revoked, and a list that nobody renewed does not stop the mesh (as in Istio).

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor};
use tokio::sync::watch;
use webpki::{CertRevocationList, OwnedCertRevocationList};
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    revocation_list::CertificateRevocationList,
};

use crate::clock::system_time;

/// Most roots of one trust domain.
pub const ROOTS_MAX: usize = 64;
/// Most revocation lists.
pub const CRLS_MAX: usize = 64;
/// Longest revocation list, in bytes of DER.
pub const CRL_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Roots and revocations as their publisher says them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustMaterial {
    /// Roots of the local trust domain and its aliases; during a rotation the old and the new one.
    pub roots: Vec<CertificateDer<'static>>,
    /// Roots of other trust domains, which are thereby trusted as peers.
    pub federated: BTreeMap<Arc<str>, Vec<CertificateDer<'static>>>,
    /// Certificate revocation lists, of roots or intermediates.
    pub crls: Vec<CertificateRevocationListDer<'static>>,
}

/// Trust domains that are this mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustDomains {
    /// The one that certificates are issued in.
    pub local: Arc<str>,
    /// Others whose certificates count as well, for example a former name.
    pub aliases: Vec<Arc<str>>,
}

impl TrustDomains {
    /// A trust domain without aliases.
    pub fn new(local: impl Into<Arc<str>>) -> Self {
        Self { local: local.into(), aliases: Vec::new() }
    }

    /// Whether the mesh is called so, by its name or an alias.
    pub fn contains(&self, trust_domain: &str) -> bool {
        *self.local == *trust_domain || self.aliases.iter().any(|alias| **alias == *trust_domain)
    }
}

/// Why trust material is not used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// Nothing to trust.
    #[error("has no root certificate")]
    NoRoots,
    /// More than [`ROOTS_MAX`] or [`CRLS_MAX`].
    #[error("has more than {0} {1}")]
    TooMany(usize, &'static str),
    /// A root that is no CA certificate.
    #[error("root {0} is not a usable CA certificate: {1}")]
    Root(usize, String),
    /// A revocation list that does not parse.
    #[error("revocation list {0} is malformed: {1}")]
    Crl(usize, String),
}

/// Trust material in the form that verifiers use.
pub struct Bundle {
    domains: TrustDomains,
    material: TrustMaterial,
    anchors: Vec<TrustAnchor<'static>>,
    federated: BTreeMap<Arc<str>, Vec<TrustAnchor<'static>>>,
    /// Revocation lists in layers: a layer has at most one list of each issuer, for the library looks at one only.
    crls: Vec<Vec<CertRevocationList<'static>>>,
    /// When the first of the revocation lists goes stale.
    crls_fresh_until: Option<SystemTime>,
}

impl Bundle {
    /// Compiles trust material.
    ///
    /// # Errors
    /// No root, or anything malformed.
    pub fn new(domains: TrustDomains, material: TrustMaterial) -> Result<Self, BundleError> {
        if material.roots.is_empty() {
            return Err(BundleError::NoRoots);
        }
        if material.crls.len() > CRLS_MAX {
            return Err(BundleError::TooMany(CRLS_MAX, "revocation lists"));
        }
        let anchors = anchors_of(&material.roots)?;
        let federated = material
            .federated
            .iter()
            .map(|(domain, roots)| Ok((Arc::clone(domain), anchors_of(roots)?)))
            .collect::<Result<_, BundleError>>()?;
        let mut crls: Vec<Vec<CertRevocationList<'static>>> = Vec::new();
        let mut lists_of: BTreeMap<Vec<u8>, usize> = BTreeMap::new();
        let mut crls_fresh_until: Option<SystemTime> = None;
        for (index, der) in material.crls.iter().enumerate() {
            let malformed = |error: &dyn fmt::Display| BundleError::Crl(index, error.to_string());
            if der.len() > CRL_BYTES_MAX {
                return Err(malformed(&"too long"));
            }
            let crl = OwnedCertRevocationList::from_der(der).map_err(|error| malformed(&error))?;
            let (_, list) = CertificateRevocationList::from_der(der).map_err(|error| malformed(&error))?;
            let layer = lists_of.entry(list.issuer().as_raw().to_vec()).or_default();
            if crls.len() <= *layer {
                crls.push(Vec::new());
            }
            if let Some(lists) = crls.get_mut(*layer) {
                lists.push(CertRevocationList::from(crl));
            }
            *layer += 1;
            if let Some(next) = list.next_update() {
                let next = system_time(next.timestamp());
                crls_fresh_until = Some(crls_fresh_until.map_or(next, |first| first.min(next)));
            }
        }
        Ok(Self { domains, material, anchors, federated, crls, crls_fresh_until })
    }

    /// Trusts nobody: before an issuer first said its roots.
    fn empty(domains: TrustDomains) -> Self {
        Self {
            domains,
            material: TrustMaterial::default(),
            anchors: Vec::new(),
            federated: BTreeMap::new(),
            crls: Vec::new(),
            crls_fresh_until: None,
        }
    }

    /// The trust domains that are this mesh.
    pub fn domains(&self) -> &TrustDomains {
        &self.domains
    }

    /// What the bundle was made of.
    pub fn material(&self) -> &TrustMaterial {
        &self.material
    }

    /// The roots for certificates of a trust domain, or `None` if it is not trusted at all.
    pub(crate) fn anchors(&self, trust_domain: &str) -> Option<&[TrustAnchor<'static>]> {
        if self.domains.contains(trust_domain) {
            Some(&self.anchors)
        } else {
            self.federated.get(trust_domain).map(Vec::as_slice)
        }
    }

    /// The revocation lists, in layers with at most one of each issuer.
    pub(crate) fn crls(&self) -> &[Vec<CertRevocationList<'static>>] {
        &self.crls
    }

    /// How long ago the first revocation list went stale, if one has.
    pub fn crls_stale_for(&self, now: SystemTime) -> Option<Duration> {
        self.crls_fresh_until.and_then(|until| now.duration_since(until).ok()).filter(|age| !age.is_zero())
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bundle")
            .field("domains", &self.domains)
            .field("roots", &self.anchors.len())
            .field("federated", &self.federated.keys())
            .field("crls", &self.material.crls.len())
            .finish_non_exhaustive()
    }
}

fn anchors_of(roots: &[CertificateDer<'static>]) -> Result<Vec<TrustAnchor<'static>>, BundleError> {
    if roots.len() > ROOTS_MAX {
        return Err(BundleError::TooMany(ROOTS_MAX, "roots"));
    }
    let anchor = |(index, der): (usize, &CertificateDer<'static>)| {
        let unusable = |error: &dyn fmt::Display| BundleError::Root(index, error.to_string());
        let (_, parsed) = X509Certificate::from_der(der).map_err(|error| unusable(&error))?;
        if !parsed.is_ca() {
            return Err(unusable(&"not a CA"));
        }
        let anchor = webpki::anchor_from_trusted_cert(der).map_err(|error| unusable(&error))?;
        Ok(anchor.to_owned())
    };
    roots.iter().enumerate().map(anchor).collect()
}

/// The current [`Bundle`]; shared by all verifiers of a process.
#[derive(Debug)]
pub struct Trust {
    current: watch::Sender<Arc<Bundle>>,
}

impl Trust {
    /// Starts with this material.
    ///
    /// # Errors
    /// As [`Bundle::new`].
    pub fn new(domains: TrustDomains, material: TrustMaterial) -> Result<Self, BundleError> {
        Ok(Self { current: watch::Sender::new(Arc::new(Bundle::new(domains, material)?)) })
    }

    /// Starts by trusting nobody, until [`Self::set_material`].
    pub fn empty(domains: TrustDomains) -> Self {
        Self { current: watch::Sender::new(Arc::new(Bundle::empty(domains))) }
    }

    /// The bundle as of now.
    pub fn current(&self) -> Arc<Bundle> {
        Arc::clone(&self.current.borrow())
    }

    /// Follows changes.
    pub fn watch(&self) -> watch::Receiver<Arc<Bundle>> {
        self.current.subscribe()
    }

    /// Replaces roots and revocations; says whether they differ.
    ///
    /// # Errors
    /// As [`Bundle::new`]; the last good bundle stays.
    pub fn set_material(&self, material: TrustMaterial) -> Result<bool, BundleError> {
        let current = self.current();
        self.replace(current.domains.clone(), material)
    }

    /// Replaces the trust domains; says whether they differ.
    pub fn set_domains(&self, domains: TrustDomains) -> bool {
        let current = self.current();
        if current.material.roots.is_empty() {
            return self.current.send_replace(Arc::new(Bundle::empty(domains.clone()))).domains != domains;
        }
        // The material was compiled before, so it compiles again.
        self.replace(domains, current.material.clone()).unwrap_or(false)
    }

    fn replace(&self, domains: TrustDomains, material: TrustMaterial) -> Result<bool, BundleError> {
        let current = self.current();
        if current.domains == domains && current.material == material {
            return Ok(false);
        }
        self.current.send_replace(Arc::new(Bundle::new(domains, material)?));
        Ok(true)
    }
}
