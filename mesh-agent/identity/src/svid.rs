//! A certificate together with its key: what one of our workloads (or this node) shows to peers.
//!
//! Invariant: an [`Svid`]'s leaf names exactly its principal, carries its key's public half, and chains to one of the roots it came
//! with. Whether it is valid *now* is a question of time: [`Svid::validity`].

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{pki_types::CertificateDer, sign::CertifiedKey};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    bundle::{Bundle, BundleError, TrustDomains, TrustMaterial},
    clock::system_time,
    issuer::Issued,
    key::PrivateKey,
    peer::{PeerError, PeerRefusal, Principal, principal_in},
    verify::{Side, verify_chain},
};

/// Most certificates of a chain, the leaf included.
pub const CHAIN_MAX: usize = 10;

/// Why what an issuer returned is not used.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// No certificate at all, or more than [`CHAIN_MAX`].
    #[error("the chain has {0} certificates")]
    Length(usize),
    /// A leaf that does not parse or names nobody.
    #[error("the certificate is unusable")]
    Leaf(#[source] PeerError),
    /// A leaf for someone else.
    #[error("the certificate is for {0}")]
    OtherPrincipal(String),
    /// A leaf for another key.
    #[error("the certificate is for another key")]
    OtherKey,
    /// Roots that are none.
    #[error("the roots are unusable")]
    Roots(#[source] BundleError),
    /// A chain that peers would refuse.
    #[error("peers would refuse the certificate")]
    Chain(#[source] PeerRefusal),
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// From when.
    pub not_before: SystemTime,
    /// Until when, inclusive.
    pub not_after: SystemTime,
}

impl Validity {
    /// Whether `now` lies within.
    pub fn contains(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }
}

/// A certificate with its key.
#[derive(Debug)]
pub struct Svid {
    principal: Principal,
    certified: Arc<CertifiedKey>,
    key_kind: &'static str,
    serial: String,
    validity: Validity,
}

impl Svid {
    /// Joins what an issuer returned with the key it was asked for.
    ///
    /// # Errors
    /// The answer is not for this principal and key, is not valid at `now`, or chains to none of its own roots.
    pub fn new(
        principal: Principal,
        key: &PrivateKey,
        issued: &Issued,
        now: SystemTime,
    ) -> Result<Self, SvidError> {
        let leaf = match issued.chain.first() {
            Some(leaf) if issued.chain.len() <= CHAIN_MAX => leaf,
            _ => return Err(SvidError::Length(issued.chain.len())),
        };
        let Ok(([], parsed)) = X509Certificate::from_der(leaf) else {
            return Err(SvidError::Leaf(PeerError::Malformed));
        };
        let named = principal_in(&parsed).map_err(SvidError::Leaf)?;
        if named != principal {
            return Err(SvidError::OtherPrincipal(named.to_string()));
        }
        if parsed.public_key().raw != key.public_key() {
            return Err(SvidError::OtherKey);
        }
        let validity = Validity {
            not_before: system_time(parsed.validity().not_before.timestamp()),
            not_after: system_time(parsed.validity().not_after.timestamp()),
        };
        // DER puts a zero before a first bit that is set.
        let serial = hex(parsed.raw_serial().strip_prefix(&[0]).unwrap_or(parsed.raw_serial()));
        let material = TrustMaterial { roots: issued.roots.clone(), ..TrustMaterial::default() };
        let domains = TrustDomains::new(Arc::clone(principal.trust_domain()));
        let bundle = Bundle::new(domains, material).map_err(SvidError::Roots)?;
        for side in [Side::Client, Side::Server] {
            verify_chain(&bundle, principal.trust_domain(), &issued.chain, side, now)
                .map_err(SvidError::Chain)?;
        }
        let certified = Arc::new(CertifiedKey::new(issued.chain.clone(), key.signing_key()));
        Ok(Self { principal, certified, key_kind: key.kind(), serial, validity })
    }

    /// Kind of its key, as [`PrivateKey::kind`] says.
    pub fn key_kind(&self) -> &'static str {
        self.key_kind
    }

    /// Whom it is for.
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// The leaf, then intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The serial number in lower-case hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// When it is valid.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// When to replace it, for one that was obtained at `obtained`: in the middle of what was left of its life then, moved by
    /// up to a tenth of that life. `jitter` is uniform in `-1.0..=1.0`.
    pub fn renew_at(&self, obtained: SystemTime, jitter: f64) -> SystemTime {
        let life = self.validity.not_after.duration_since(obtained).unwrap_or(Duration::ZERO);
        obtained + life.mul_f64(0.5 + 0.1 * jitter.clamp(-1.0, 1.0))
    }

    /// Chain and key as rustls presents them.
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }

    /// Whether peers that trust `bundle` would accept it now.
    ///
    /// # Errors
    /// Why they would not: expired, revoked, of a root that was dropped, …
    pub fn check(&self, bundle: &Bundle, now: SystemTime) -> Result<(), PeerRefusal> {
        verify_chain(bundle, self.principal.trust_domain(), self.chain(), Side::Server, now).map(|_| ())
    }
}

/// Bytes in lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// SHA-256 of a certificate, in lower-case hexadecimal.
pub fn fingerprint(certificate: &[u8]) -> String {
    hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate).as_ref())
}
