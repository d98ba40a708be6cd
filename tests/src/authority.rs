//! Certificate authorities of tests: that of the agents, whose key lies in their `--ca-dir`, and strangers.
//!
//! Made with `rcgen` alone, so that nothing here shares a mistake with the agents' own code. What an authority
//! signs may be wrong on purpose: see [`Leaf`].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

use crate::pod::Pod;

/// The trust domain unless a test says otherwise.
pub const TRUST_DOMAIN: &str = "cluster.local";

/// What can go wrong with certificates of a test.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file of the authority.
    #[error("cannot {doing} {path}")]
    File {
        /// `read` or `write`.
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A PEM file holds no such thing.
    #[error("{path} is no PEM file of certificates")]
    Pem {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: pem::Error,
    },
    /// A certificate, key or list could not be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// A TLS configuration could not be made.
    #[error("cannot configure TLS")]
    Tls(#[from] rustls::Error),
}

/// The SPIFFE identity of a service account in the usual trust domain.
#[must_use]
pub fn spiffe(namespace: &str, service_account: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{service_account}")
}

/// The SPIFFE identity of a pod whose manifest names no service account.
#[must_use]
pub fn spiffe_of(pod: &Pod) -> String {
    spiffe(pod.namespace(), "default")
}

/// Something that signs certificates.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The authority's own certificate, PEM.
    cert_pem: String,
    key_pem: String,
    /// What a leaf is sent with: certificates between it and the root.
    intermediates: Vec<CertificateDer<'static>>,
    root_pem: String,
    roots: Vec<CertificateDer<'static>>,
}

impl Authority {
    /// A root of its own.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn root(name: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let params = ca_params(name);
        let cert = params.self_signed(&key)?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            issuer: Issuer::new(params, key),
            cert_pem: cert.pem(),
            intermediates: Vec::new(),
            root_pem: cert.pem(),
            roots: vec![cert.der().clone()],
        })
    }

    /// An authority below this one.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn intermediate(&self, name: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = ca_params(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.use_authority_key_identifier_extension = true;
        let cert = params.signed_by(&key, &self.issuer)?;
        let mut intermediates = vec![cert.der().clone()];
        intermediates.extend(self.intermediates.iter().cloned());
        Ok(Self {
            key_pem: key.serialize_pem(),
            issuer: Issuer::new(params, key),
            cert_pem: cert.pem(),
            intermediates,
            root_pem: self.root_pem.clone(),
            roots: self.roots.clone(),
        })
    }

    /// The authority of the agents that were given this `--ca-dir`; they must have made or been given it.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn of_agents(ca_dir: &Path) -> Result<Self, AuthorityError> {
        let key_pem = read(&ca_dir.join("ca-key.pem"))?;
        let root_path = ca_dir.join("root-cert.pem");
        let root_pem = read(&root_path)?;
        let own_path = ca_dir.join("ca-cert.pem");
        let plugged_in = own_path.is_file();
        let cert_pem = if plugged_in { read(&own_path)? } else { root_pem.clone() };
        let chain_path = ca_dir.join("cert-chain.pem");
        let intermediates = if chain_path.is_file() {
            certificates(&chain_path, &read(&chain_path)?)?
        } else if plugged_in {
            certificates(&own_path, &cert_pem)?
        } else {
            Vec::new()
        };
        let roots = certificates(&root_path, &root_pem)?;
        let is_root = |cert: &CertificateDer<'_>| roots.contains(cert);
        Ok(Self {
            issuer: Issuer::from_ca_cert_pem(&cert_pem, KeyPair::from_pem(&key_pem)?)?,
            cert_pem,
            key_pem,
            intermediates: intermediates.into_iter().filter(|cert| !is_root(cert)).collect(),
            root_pem,
            roots,
        })
    }

    /// Plug this authority into `ca_dir` as `cacerts` has it, trusting the roots of `also` beside its own.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn plug_in(&self, ca_dir: &Path, also: &[&Self]) -> Result<(), AuthorityError> {
        let made = fs::create_dir_all(ca_dir);
        made.map_err(|source| AuthorityError::File { doing: "make", path: ca_dir.to_path_buf(), source })?;
        let roots: String = [self].iter().chain(also).map(|authority| authority.root_pem.as_str()).collect();
        write(&ca_dir.join("root-cert.pem"), &roots)?;
        let chain = if self.cert_pem == self.root_pem {
            self.cert_pem.clone()
        } else {
            format!("{}{}", self.cert_pem, self.root_pem)
        };
        write(&ca_dir.join("cert-chain.pem"), &chain)?;
        write(&ca_dir.join("ca-cert.pem"), &self.cert_pem)?;
        write(&ca_dir.join("ca-key.pem"), &self.key_pem)
    }

    /// Publish a list of revoked certificates in `ca_dir`.
    ///
    /// # Errors
    /// When it cannot be made or written.
    pub fn revoke(&self, ca_dir: &Path, revoked: &[&Credentials]) -> Result<(), AuthorityError> {
        let now = OffsetDateTime::now_utc();
        let list = CertificateRevocationListParams {
            this_update: now - Duration::minutes(1),
            next_update: now + Duration::days(1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: revoked
                .iter()
                .map(|credentials| RevokedCertParams {
                    serial_number: SerialNumber::from_slice(&credentials.serial),
                    revocation_time: now - Duration::minutes(1),
                    reason_code: None,
                    invalidity_date: None,
                })
                .collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        write(&ca_dir.join("ca-crl.pem"), &list.signed_by(&self.issuer)?.pem()?)
    }

    /// Sign a certificate and its new key.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn issue(&self, leaf: &Leaf) -> Result<Credentials, AuthorityError> {
        let key = KeyPair::generate()?;
        let params = leaf.params()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        let mut chain = vec![cert.der().clone()];
        chain.extend(self.intermediates.iter().cloned());
        Ok(Credentials { chain, key: key.serialize_der(), serial: leaf.serial(), roots: self.roots.clone() })
    }

    /// A certificate that is its own root; whoever holds it still trusts this authority.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn self_signed(&self, leaf: &Leaf) -> Result<Credentials, AuthorityError> {
        let key = KeyPair::generate()?;
        let cert = leaf.params()?.self_signed(&key)?;
        Ok(Credentials {
            chain: vec![cert.der().clone()],
            key: key.serialize_der(),
            serial: leaf.serial(),
            roots: self.roots.clone(),
        })
    }
}

/// A certificate request for these URIs by a new key, PEM.
///
/// # Errors
/// When it cannot be made.
pub fn request_for(identities: &[&str]) -> Result<String, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let uris = identities.iter().map(|uri| Ok(SanType::URI(Ia5String::try_from(*uri)?)));
    params.subject_alt_names = uris.collect::<Result<_, rcgen::Error>>()?;
    Ok(params.serialize_request(&KeyPair::generate()?)?.pem()?)
}

/// What a certificate says.
///
/// Good unless a method makes it bad.
#[derive(Debug, Clone)]
pub struct Leaf {
    uris: Vec<String>,
    dns: Vec<String>,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    usages: Vec<ExtendedKeyUsagePurpose>,
    serial: u64,
}

impl Leaf {
    /// An ordinary certificate of this identity: valid for an hour, for clients and servers.
    #[must_use]
    pub fn of(identity: impl Into<String>) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            uris: vec![identity.into()],
            dns: Vec::new(),
            not_before: now - Duration::minutes(1),
            not_after: now + Duration::hours(1),
            usages: vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth],
            serial: fresh_serial(),
        }
    }

    /// Valid until an hour ago.
    #[must_use]
    pub fn expired(mut self) -> Self {
        self.not_before -= Duration::hours(3);
        self.not_after -= Duration::hours(2);
        self
    }

    /// Valid in an hour.
    #[must_use]
    pub fn not_yet_valid(mut self) -> Self {
        self.not_before += Duration::hours(2);
        self.not_after += Duration::hours(3);
        self
    }

    /// One more identity, which no certificate may have.
    #[must_use]
    pub fn and_of(mut self, identity: impl Into<String>) -> Self {
        self.uris.push(identity.into());
        self
    }

    /// No identity, only a name.
    #[must_use]
    pub fn nameless(mut self) -> Self {
        self.uris.clear();
        self.dns.push("web.shop.svc".to_owned());
        self
    }

    /// Not for clients.
    #[must_use]
    pub fn for_servers_only(mut self) -> Self {
        self.usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self
    }

    fn serial(&self) -> Vec<u8> {
        self.serial.to_be_bytes().to_vec()
    }

    fn params(&self) -> Result<CertificateParams, AuthorityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = self.not_before;
        params.not_after = self.not_after;
        params.serial_number = Some(SerialNumber::from_slice(&self.serial()));
        let uris = self.uris.iter().map(|uri| Ok(SanType::URI(Ia5String::try_from(uri.as_str())?)));
        let dns = self.dns.iter().map(|name| Ok(SanType::DnsName(Ia5String::try_from(name.as_str())?)));
        params.subject_alt_names = uris.chain(dns).collect::<Result<_, rcgen::Error>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = self.usages.clone();
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }
}

/// A certificate with its chain and key, and the roots its holder trusts.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub(crate) chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
    serial: Vec<u8>,
    pub(crate) roots: Vec<CertificateDer<'static>>,
}

impl Credentials {
    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.clone()).into()
    }

    /// The same certificate in the hand of somebody who trusts this authority too.
    #[must_use]
    pub fn also_trusting(mut self, authority: &Authority) -> Self {
        let new = authority.roots.iter().filter(|root| !self.roots.contains(root)).cloned();
        let new: Vec<_> = new.collect();
        self.roots.extend(new);
        self
    }

    /// The same certificate in the hand of somebody who trusts this authority.
    #[must_use]
    pub fn trusting(mut self, authority: &Authority) -> Self {
        self.roots.clone_from(&authority.roots);
        self
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::minutes(1);
    params.not_after = now + Duration::days(365);
    params.serial_number = Some(SerialNumber::from(fresh_serial()));
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

/// A serial number that no other certificate of this process has; its first bit is clear, as DER wants it.
fn fresh_serial() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0x4e6f_6465_0000_0001);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn certificates(path: &Path, pem: &str) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    parsed.map_err(|source| AuthorityError::Pem { path: path.to_path_buf(), source })
}

fn read(path: &Path) -> Result<String, AuthorityError> {
    fs::read_to_string(path).map_err(|source| AuthorityError::File {
        doing: "read",
        path: path.to_path_buf(),
        source,
    })
}

/// In one rename, so that nobody reads half of it; for the owner alone, as a key must be.
fn write(path: &Path, text: &str) -> Result<(), AuthorityError> {
    use std::os::unix::fs::PermissionsExt as _;
    let unfinished = path.with_extension("new");
    let written = fs::write(&unfinished, text)
        .and_then(|()| fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o600)))
        .and_then(|()| fs::rename(&unfinished, path));
    written.map_err(|source| AuthorityError::File { doing: "write", path: path.to_path_buf(), source })
}
