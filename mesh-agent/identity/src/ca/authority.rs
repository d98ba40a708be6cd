//! A certificate that signs, its key, and the chain from it to the roots: self-signed or plugged in.
//!
//! Invariant: an [`Authority`] has been tried: a leaf it signed was verified exactly as peers verify it. So a plugged-in key that
//! does not fit its certificate, a chain with a hole or a root that is none never gets to issue anything.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyIdMethod, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, string::Ia5String,
};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::{
    bundle::{Bundle, BundleError, TrustDomains, TrustMaterial},
    clock::{system_time, unix_seconds},
    key::{KeyAlgorithm, KeyError, PrivateKey},
    peer::PeerRefusal,
    svid::{CHAIN_MAX, hex},
    verify::{Side, verify_chain},
};

/// How long a self-signed root lives.
pub const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);
/// How far in the past a certificate begins, for peers whose clocks are behind.
pub const BACKDATE: Duration = Duration::from_secs(120);

/// Files of a plugged-in CA, as Istio's `cacerts` secret has them: PEM each.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct PluggedIn {
    /// `ca-cert.pem`: the certificate that signs.
    pub ca_cert: Vec<u8>,
    /// `ca-key.pem`: its private key.
    pub ca_key: zeroize::Zeroizing<Vec<u8>>,
    /// `cert-chain.pem`: from the signing certificate (or the one above) towards the root; may be empty.
    pub cert_chain: Vec<u8>,
    /// `root-cert.pem`: one root or several.
    pub root_cert: Vec<u8>,
    /// `ca-crl.pem`: revocation lists; may be empty.
    pub crl: Vec<u8>,
}

impl PluggedIn {
    /// A new self-signed root of [`ROOT_LIFE`], for whoever keeps it elsewhere than in a folder.
    ///
    /// # Errors
    /// No key, or no random numbers.
    pub fn self_signed(
        trust_domain: &str,
        algorithm: KeyAlgorithm,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let (key, pem) = PrivateKey::generate_pem(algorithm).map_err(AuthorityError::Key)?;
        let root = Authority::make_root(trust_domain, &key, now, ROOT_LIFE)?.into_bytes();
        let ca_key = pem.as_bytes().to_vec().into();
        Ok(Self { ca_cert: root.clone(), ca_key, root_cert: root, ..Self::default() })
    }
}

impl std::fmt::Debug for PluggedIn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PluggedIn").field("ca_cert", &self.ca_cert.len()).finish_non_exhaustive()
    }
}

/// Why there is no authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file is not PEM of certificates or revocation lists.
    #[error("{file} is not PEM of the expected kind")]
    Pem {
        /// Which of the files.
        file: &'static str,
        /// What is wrong with it.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// A file without a certificate.
    #[error("{0} holds no certificate")]
    Empty(&'static str),
    /// The key cannot be used or made.
    #[error("ca-key.pem: the CA's key cannot be used")]
    Key(#[source] KeyError),
    /// The key belongs to another certificate.
    #[error("ca-key.pem is not the key of the CA's certificate")]
    KeyMismatch,
    /// The signing certificate is not one of a CA.
    #[error("ca-cert.pem is not a usable CA certificate")]
    NotCa,
    /// Roots or revocation lists cannot be used.
    #[error("the CA's trust material cannot be used")]
    Bundle(#[source] BundleError),
    /// What it would issue is refused by peers.
    #[error("peers would refuse what this CA issues")]
    Untrusted(#[source] PeerRefusal),
    /// The library could not make a certificate.
    #[error("cannot make a certificate")]
    Make(#[source] rcgen::Error),
    /// No randomness.
    #[error("no random numbers")]
    Random,
}

/// Names of a certificate to be made.
#[derive(Clone, Debug)]
pub(crate) struct Names<'a> {
    pub(crate) uri: String,
    pub(crate) dns: &'a [String],
}

/// Something that can sign certificates.
#[derive(Debug)]
pub(crate) struct Authority {
    certificate: CertificateDer<'static>,
    key: PrivateKey,
    /// What a leaf's chain has behind the leaf: from the signing certificate up, without roots.
    intermediates: Vec<CertificateDer<'static>>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    pub(crate) crls: Vec<CertificateRevocationListDer<'static>>,
    pub(crate) not_before: SystemTime,
    /// The earliest end of anything above a leaf.
    pub(crate) not_after: SystemTime,
}

impl Authority {
    /// Makes the certificate of a new self-signed root, in PEM.
    pub(crate) fn make_root(
        trust_domain: &str,
        key: &PrivateKey,
        now: SystemTime,
        life: Duration,
    ) -> Result<String, AuthorityError> {
        let serial = random_serial()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        // Two roots never share a subject: a revocation list of one would be looked at for the other's certificates.
        let distinct = hex(serial.get(..4).unwrap_or(&serial));
        params.distinguished_name.push(DnType::CommonName, format!("Nodemesh root {distinct}"));
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.key_identifier_method = KeyIdMethod::Sha256;
        (params.not_before, params.not_after) = (offset(now - BACKDATE), offset(now + life));
        let root = params.self_signed(key).map_err(AuthorityError::Make)?;
        Ok(crate::key::pem("CERTIFICATE", root.der()).to_string())
    }

    /// A root that signs leaves itself.
    pub(crate) fn self_signed(root: &[u8], key: &[u8], now: SystemTime) -> Result<Self, AuthorityError> {
        let files = PluggedIn {
            ca_cert: root.to_vec(),
            ca_key: zeroize::Zeroizing::new(key.to_vec()),
            root_cert: root.to_vec(),
            ..PluggedIn::default()
        };
        Self::plugged_in(&files, now)
    }

    /// A CA somebody else made.
    pub(crate) fn plugged_in(files: &PluggedIn, now: SystemTime) -> Result<Self, AuthorityError> {
        let certificate = certificates("ca-cert.pem", &files.ca_cert)?
            .into_iter()
            .next()
            .ok_or(AuthorityError::Empty("ca-cert.pem"))?;
        let roots = certificates("root-cert.pem", &files.root_cert)?;
        if roots.is_empty() {
            return Err(AuthorityError::Empty("root-cert.pem"));
        }
        let key = PrivateKey::from_pem(&files.ca_key).map_err(AuthorityError::Key)?;
        let mut intermediates = vec![certificate.clone()];
        intermediates.extend(certificates("cert-chain.pem", &files.cert_chain)?);
        let mut seen = std::collections::HashSet::new();
        intermediates.retain(|der| !roots.contains(der) && seen.insert(der.clone()));
        if intermediates.len() >= CHAIN_MAX {
            return Err(AuthorityError::NotCa);
        }
        let crls = revocation_lists(&files.crl)?;

        let (mut not_before, mut not_after) = (SystemTime::UNIX_EPOCH, system_time(i64::MAX / 4));
        {
            let parsed = parse(&certificate)?;
            if !parsed.is_ca() {
                return Err(AuthorityError::NotCa);
            }
            if parsed.public_key().raw != key.public_key() {
                return Err(AuthorityError::KeyMismatch);
            }
        }
        for der in intermediates.iter().chain([&certificate]) {
            let validity = parse(der)?.validity().clone();
            not_before = not_before.max(system_time(validity.not_before.timestamp()));
            not_after = not_after.min(system_time(validity.not_after.timestamp()));
        }
        let authority = Self { certificate, key, intermediates, roots, crls, not_before, not_after };
        authority.try_out(now)?;
        Ok(authority)
    }

    /// The same with revocation lists (PEM), tried again.
    pub(crate) fn with_crls(mut self, crl: &[u8], now: SystemTime) -> Result<Self, AuthorityError> {
        self.crls = revocation_lists(crl)?;
        self.try_out(now)?;
        Ok(self)
    }

    /// The certificate that signs.
    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The public half of the signing key.
    pub(crate) fn public_key(&self) -> &[u8] {
        self.key.public_key()
    }

    /// Signs a certificate for a workload, node or controller. Returns leaf and intermediates, the serial in hexadecimal, and the
    /// end of its life, which is never after that of a certificate above it.
    pub(crate) fn sign(
        &self,
        public_key: &impl PublicKeyData,
        encipherment: bool,
        names: &Names<'_>,
        now: SystemTime,
        ttl: Duration,
    ) -> Result<Signed, AuthorityError> {
        let serial = random_serial()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        let ia5 = |text: &str| Ia5String::try_from(text).map_err(AuthorityError::Make);
        params.subject_alt_names = vec![SanType::URI(ia5(&names.uri)?)];
        for name in names.dns {
            params.subject_alt_names.push(SanType::DnsName(ia5(name)?));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if encipherment {
            params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        }
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.key_identifier_method = KeyIdMethod::Sha256;
        let not_after = (now + ttl).min(self.not_after);
        params.not_before = offset((now - BACKDATE).max(self.not_before));
        params.not_after = offset(not_after);
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &self.key).map_err(AuthorityError::Make)?;
        let leaf = params.signed_by(public_key, &issuer).map_err(AuthorityError::Make)?;
        let mut chain = vec![leaf.der().clone()];
        chain.extend(self.intermediates.iter().cloned());
        Ok(Signed { chain, serial: hex(&serial), not_after })
    }

    /// Signs a leaf and verifies it as peers would.
    fn try_out(&self, now: SystemTime) -> Result<(), AuthorityError> {
        const DOMAIN: &str = "trial.invalid";
        let material =
            TrustMaterial { roots: self.roots.clone(), crls: self.crls.clone(), ..TrustMaterial::default() };
        let bundle = Bundle::new(TrustDomains::new(DOMAIN), material).map_err(AuthorityError::Bundle)?;
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).map_err(AuthorityError::Key)?;
        let names = Names { uri: format!("spiffe://{DOMAIN}/ns/trial/sa/trial"), dns: &[] };
        let signed = self.sign(&key, false, &names, now, Duration::from_secs(60))?;
        for side in [Side::Client, Side::Server] {
            verify_chain(&bundle, DOMAIN, &signed.chain, side, now).map_err(AuthorityError::Untrusted)?;
        }
        Ok(())
    }
}

/// What [`Authority::sign`] made.
#[derive(Debug)]
pub(crate) struct Signed {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    pub(crate) serial: String,
    pub(crate) not_after: SystemTime,
}

/// Certificates of a PEM file, in its order.
pub(crate) fn certificates(
    file: &'static str,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| AuthorityError::Pem { file, source })
}

fn revocation_lists(pem: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, AuthorityError> {
    CertificateRevocationListDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| AuthorityError::Pem { file: "ca-crl.pem", source })
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, AuthorityError> {
    X509Certificate::from_der(der).map(|(_, parsed)| parsed).map_err(|_| AuthorityError::NotCa)
}

/// A random number of 16 bytes. Its first byte needs neither a sign byte nor loses a zero, so that every reader and log line
/// shows the same 32 digits.
fn random_serial() -> Result<[u8; 16], AuthorityError> {
    let mut serial = [0; 16];
    SystemRandom::new().fill(&mut serial).map_err(|_| AuthorityError::Random)?;
    serial[0] = serial[0] & 0x3f | 0x40;
    Ok(serial)
}

/// Whole seconds, as certificates have them.
fn offset(time: SystemTime) -> OffsetDateTime {
    let seconds = i64::try_from(unix_seconds(time)).unwrap_or(i64::MAX);
    OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// The roots, without repetition, in order.
pub(crate) fn union<'a>(
    lists: impl IntoIterator<Item = &'a CertificateDer<'static>>,
) -> Vec<CertificateDer<'static>> {
    let mut roots: Vec<CertificateDer<'static>> = Vec::new();
    for root in lists {
        if !roots.contains(root) {
            roots.push(root.clone());
        }
    }
    roots
}

/// Shared by whoever signs right now.
pub(crate) type SharedAuthority = Arc<Authority>;
