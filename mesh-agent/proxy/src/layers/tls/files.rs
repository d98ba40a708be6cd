//! PEM files that a policy names, on this node, and the roots of the system.
//!
//! Invariants:
//! - No file outside of one folder is opened, whatever a policy says: not by `..`, not by a link, not by one that is made meanwhile.
//! - A file is read whole and at most [`FILE_MAX`] bytes of it; what was read together with its stamp is never older than that.
//! - Errors name the file.

use std::{
    fs::{File, Metadata},
    io::{self, Read},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::SystemTime,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject},
};
use webpki::{CertRevocationList, OwnedCertRevocationList};

/// Bytes of a file.
const FILE_MAX: u64 = 1 << 20;

/// Why settings for TLS cannot be used.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum SetupError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's verdict.
        #[source]
        source: Arc<io::Error>,
    },
    /// A file that policies must not name.
    #[error("{path} is not in {folder}, where files for TLS have to be (--tls-files)")]
    Outside {
        /// The file.
        path: PathBuf,
        /// The folder.
        folder: PathBuf,
    },
    /// A file without what it should have.
    #[error("{path} has no {wanted} in PEM")]
    Content {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        wanted: &'static str,
    },
    /// The system has no roots.
    #[error("the system has no trusted roots, and caCertificates names none")]
    NoRoots,
    /// A Secret that is out of reach.
    #[error("credentialName {0}: only gateways read Secrets for a DestinationRule without workloadSelector")]
    Secret(Arc<str>),
    /// A Secret that is not there, or of no use.
    #[error("Secret {name}: {why}")]
    Credential {
        /// Namespace and name.
        name: Arc<str>,
        /// Why.
        why: Arc<str>,
    },
    /// Nobody to trust.
    #[error("the Secret has no ca.crt or cacert, and there is none with the suffix -cacert that has")]
    NoSecretRoots,
    /// `MUTUAL` without a certificate of ours.
    #[error("there is no client certificate")]
    NoCertificate,
    /// Certificate and key do not fit, or are of an algorithm that cannot be used.
    #[error("cannot use certificate and key: {0}")]
    Unusable(rustls::Error),
    /// `ISTIO_MUTUAL` without a certificate of the mesh.
    #[error("there is no certificate of the mesh for ISTIO_MUTUAL: {0}")]
    NoOwnCertificate(String),
    /// `ISTIO_MUTUAL` for somebody else.
    #[error("the endpoint is {0}, which subjectAltNames does not name")]
    OtherIdentity(String),
    /// No name to check the server's certificate for.
    #[error("{0:?} is no name of a server; sni is not set")]
    Name(String),
}

/// The folder that policies' files are in.
#[derive(Clone, Debug)]
pub(super) struct Folder(pub(super) PathBuf);

/// What tells a changed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    path: String,
    seen: Option<(SystemTime, u64, u64)>,
}

impl Folder {
    /// A file as it is now.
    pub(super) fn stamp(&self, path: &str) -> Stamp {
        let data = self.open(Path::new(path)).ok().map(|(_, data)| data);
        let seen = data.and_then(|data| Some((data.modified().ok()?, data.len(), data.ino())));
        Stamp { path: path.to_owned(), seen }
    }

    /// Whether a file is another one by now.
    pub(super) fn is_old(&self, stamp: &Stamp) -> bool {
        *stamp != self.stamp(&stamp.path)
    }

    /// Opens a file by its path, or by its path below the folder.
    fn open(&self, path: &Path) -> Result<(File, Metadata), SetupError> {
        let failed = |source: io::Error| SetupError::Read { path: path.into(), source: Arc::new(source) };
        let Self(folder) = self;
        let below = match path.strip_prefix(folder) {
            Ok(below) => below,
            Err(_) if path.is_relative() => path,
            Err(_) => return Err(self.outside(path)),
        };
        let root = File::open(folder).map_err(failed)?;
        // One that waits for a writer would hold the worker up.
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let file = match openat2(&root, below, how) {
            Ok(file) => File::from(file),
            Err(Errno::EXDEV | Errno::ELOOP) => return Err(self.outside(path)),
            Err(error) => return Err(failed(error.into())),
        };
        let data = file.metadata().map_err(failed)?;
        if !data.is_file() {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        Ok((file, data))
    }

    fn outside(&self, path: &Path) -> SetupError {
        SetupError::Outside { path: path.into(), folder: self.0.clone() }
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, SetupError> {
        let failed = |source: io::Error| SetupError::Read { path: path.into(), source: Arc::new(source) };
        let (file, _) = self.open(path)?;
        let mut bytes = Vec::new();
        file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > FILE_MAX {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        Ok(bytes)
    }

    /// The certificates of a file.
    pub(super) fn certificates(&self, path: &str) -> Result<Vec<CertificateDer<'static>>, SetupError> {
        let path = Path::new(path);
        certificates(path, &self.read(path)?)
    }

    /// The key of a file.
    pub(super) fn key(&self, path: &str) -> Result<PrivateKeyDer<'static>, SetupError> {
        let path = Path::new(path);
        key(path, &self.read(path)?)
    }

    /// The authorities of a file.
    pub(super) fn roots(&self, path: &str) -> Result<Arc<RootCertStore>, SetupError> {
        let path = Path::new(path);
        roots(path, &self.read(path)?)
    }

    /// The revocation lists of a file.
    pub(super) fn revocations(&self, path: &str) -> Result<Vec<CertRevocationList<'static>>, SetupError> {
        let path = Path::new(path);
        revocations(path, &self.read(path)?)
    }
}

/// The revocation lists in PEM that is from `place`: all of them, or it is of no use.
fn revocations(place: &Path, pem: &[u8]) -> Result<Vec<CertRevocationList<'static>>, SetupError> {
    let unusable = || SetupError::Content { path: place.into(), wanted: "usable revocation list" };
    let mut all = Vec::new();
    for der in CertificateRevocationListDer::pem_slice_iter(pem) {
        let list = OwnedCertRevocationList::from_der(&der.map_err(|_| unusable())?);
        all.push(CertRevocationList::Owned(list.map_err(|_| unusable())?));
    }
    if all.is_empty() { Err(unusable()) } else { Ok(all) }
}

/// The certificates in PEM that is from `place`.
pub(super) fn certificates(place: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, SetupError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    all.ok()
        .filter(|all| !all.is_empty())
        .ok_or_else(|| SetupError::Content { path: place.into(), wanted: "certificate" })
}

/// The key in PEM that is from `place`.
pub(super) fn key(place: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, SetupError> {
    PrivateKeyDer::from_pem_slice(pem)
        .map_err(|_| SetupError::Content { path: place.into(), wanted: "private key" })
}

/// The authorities in PEM that is from `place`.
pub(super) fn roots(place: &Path, pem: &[u8]) -> Result<Arc<RootCertStore>, SetupError> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates(place, pem)?);
    if added == 0 {
        return Err(SetupError::Content { path: place.into(), wanted: "certificate of an authority" });
    }
    Ok(Arc::new(roots))
}

/// The authorities that the node's system trusts, as of the first time that they are asked for.
pub(super) fn system_roots() -> Result<Arc<RootCertStore>, SetupError> {
    static ROOTS: LazyLock<Arc<RootCertStore>> = LazyLock::new(|| {
        let loaded = rustls_native_certs::load_native_certs();
        for error in &loaded.errors {
            tracing::warn!(%error, "a root of the system cannot be read");
        }
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(loaded.certs);
        Arc::new(roots)
    });
    if ROOTS.is_empty() { Err(SetupError::NoRoots) } else { Ok(Arc::clone(&ROOTS)) }
}
