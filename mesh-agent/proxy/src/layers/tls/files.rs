//! PEM files that a policy names, on this node, and the roots of the system.
//!
//! Invariants:
//! - A file is read whole and at most [`FILE_MAX`] bytes of it; what was read together with its stamp is never older than that.
//! - Errors name the file.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::SystemTime,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};

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
    /// A Secret.
    #[error("credentialName {0}: Secrets are not read, wanted files")]
    Secret(Arc<str>),
    /// `MUTUAL` without a certificate of ours.
    #[error("there is no client certificate")]
    NoCertificate,
    /// Certificate and key do not fit, or are of an algorithm that cannot be used.
    #[error("cannot use certificate and key: {0}")]
    Unusable(rustls::Error),
    /// No name to check the server's certificate for.
    #[error("{0:?} is no name of a server; sni is not set")]
    Name(String),
}

/// What tells a changed file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    path: PathBuf,
    seen: Option<(SystemTime, u64, u64)>,
}

impl Stamp {
    /// A file as it is now.
    pub(super) fn of(path: &str) -> Self {
        use std::os::unix::fs::MetadataExt;
        let seen = std::fs::metadata(path).ok();
        let seen = seen.and_then(|data| Some((data.modified().ok()?, data.len(), data.ino())));
        Self { path: path.into(), seen }
    }

    /// Whether the file is another one by now.
    pub(super) fn is_old(&self) -> bool {
        *self != self.path.to_str().map_or_else(|| self.clone(), Self::of)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, SetupError> {
    let failed = |source: io::Error| SetupError::Read { path: path.into(), source: Arc::new(source) };
    let file = File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        // A pipe would hold the worker up.
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(failed(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}

/// The certificates of a file.
pub(super) fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, SetupError> {
    let path = Path::new(path);
    let bytes = read(path)?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    all.ok()
        .filter(|all| !all.is_empty())
        .ok_or_else(|| SetupError::Content { path: path.into(), wanted: "certificate" })
}

/// The key of a file.
pub(super) fn key(path: &str) -> Result<PrivateKeyDer<'static>, SetupError> {
    let path = Path::new(path);
    PrivateKeyDer::from_pem_slice(&read(path)?)
        .map_err(|_| SetupError::Content { path: path.into(), wanted: "private key" })
}

/// The authorities of a file.
pub(super) fn roots(path: &str) -> Result<Arc<RootCertStore>, SetupError> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates(path)?);
    if added == 0 {
        return Err(SetupError::Content { path: path.into(), wanted: "certificate of an authority" });
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
