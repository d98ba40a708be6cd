//! Owns the files of the link: the controller's join secret, and what it leaves for agents of its own host.
//!
//! Invariant: secrets are readable by their owner alone, from the moment the file exists; a file is replaced as a whole.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use mesh_core::identity::Identity;
use mesh_identity::bundle::ROOTS_MAX;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use zeroize::Zeroizing;

use super::token::{JoinSecret, TokenError};

/// Why a file of the link is not there.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read or written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// File or folder.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Its contents are no secret.
    #[error("{}", path.display())]
    Secret {
        /// File.
        path: PathBuf,
        /// Why not.
        source: TokenError,
    },
    /// Its contents are no identity.
    #[error("{} does not hold the identity of a controller", path.display())]
    Identity {
        /// File.
        path: PathBuf,
    },
    /// No certificate, a malformed one, or too many.
    #[error("wanted 1 to {ROOTS_MAX} certificates as PEM")]
    Certificates,
}

/// The join secret in `folder`; made there if there is none. Blocking.
///
/// # Errors
/// The file cannot be used.
pub fn join_secret(folder: &Path) -> Result<JoinSecret, FileError> {
    let path = folder.join("join-secret");
    let secret_error = |source| FileError::Secret { path: path.clone(), source };
    make_folder(folder)?;
    loop {
        match fs::read_to_string(&path).map(Zeroizing::new) {
            Ok(text) => return JoinSecret::parse(&text).map_err(secret_error),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(FileError::Io { doing: "read", path, source }),
        }
        let secret = JoinSecret::generate().map_err(secret_error)?;
        // Whoever is first wins, so that a controller and `controller token` beside it agree.
        match write_with(&path, secret.to_text().as_bytes(), |new| {
            let linked = fs::hard_link(new, &path);
            fs::remove_file(new).ok();
            linked
        }) {
            Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
}

/// What a controller leaves for agents of its host, by the port it listens at.
#[derive(Clone, Debug)]
pub struct RunFolder {
    folder: PathBuf,
}

impl RunFolder {
    /// The folder of the controller that listens at `port`.
    pub fn new(run_dir: &Path, port: u16) -> Self {
        Self { folder: run_dir.join(format!("controller-{port}")) }
    }

    /// The controller's roots, PEM.
    pub fn roots(&self) -> PathBuf {
        self.folder.join("root-cert.pem")
    }

    /// The join secret.
    pub fn secret(&self) -> PathBuf {
        self.folder.join("join-secret")
    }

    /// Writes the secret and who the controller is. Blocking.
    ///
    /// # Errors
    /// A file or folder cannot be written.
    pub fn write(&self, secret: &JoinSecret, identity: &Identity) -> Result<(), FileError> {
        make_folder(&self.folder)?;
        replace(&self.secret(), secret.to_text().as_bytes())?;
        replace(&self.folder.join("identity"), identity.to_string().as_bytes())
    }

    /// Writes the roots. Blocking.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_roots(&self, roots: &[CertificateDer<'_>]) -> Result<(), FileError> {
        let text: String = roots.iter().map(|root| pem(root)).collect();
        replace(&self.roots(), text.as_bytes())
    }

    /// Who the controller said it is; `None` if it said nothing.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn read_identity(&self) -> Result<Option<Identity>, FileError> {
        let path = self.folder.join("identity");
        match fs::read_to_string(&path) {
            Ok(text) => Identity::parse(text.trim()).map(Some).map_err(|_| FileError::Identity { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(FileError::Io { doing: "read", path, source }),
        }
    }
}

/// The certificates in a PEM file.
///
/// # Errors
/// [`FileError::Certificates`].
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).take(ROOTS_MAX + 1).collect();
    match found {
        Ok(found) if (1..=ROOTS_MAX).contains(&found.len()) => Ok(found),
        _ => Err(FileError::Certificates),
    }
}

/// A certificate as PEM.
pub fn pem(der: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let text = STANDARD.encode(der);
    let mut out = String::with_capacity(text.len() + text.len() / 64 + 64);
    out.push_str("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        out.push_str(line);
        out.push('\n');
        rest = after;
    }
    out.push_str("-----END CERTIFICATE-----\n");
    out
}

fn make_folder(folder: &Path) -> Result<(), FileError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|source| FileError::Io { doing: "make the folder", path: folder.to_owned(), source })
}

fn replace(path: &Path, contents: &[u8]) -> Result<(), FileError> {
    write_with(path, contents, |new| fs::rename(new, path))
}

/// Writes beside `path`, then has `place` put it there.
fn write_with(
    path: &Path,
    contents: &[u8],
    place: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), FileError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = path.with_file_name(name);
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| file.write_all(contents).and_then(|()| file.sync_all()))
        .and_then(|()| place(&new));
    written.map_err(|source| FileError::Io { doing: "write", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("nodemesh-files-{}-{name}", std::process::id()));
            fs::remove_dir_all(&path).ok();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).ok();
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_join_secret_is_made_once_and_only_its_owner_can_read_it() {
        let folder = Folder::new("secret");
        let first = join_secret(&folder.0).unwrap();
        let again = join_secret(&folder.0).unwrap();
        assert_eq!(first.token("n1"), again.token("n1"));
        assert_eq!((mode(&folder.0.join("join-secret")), mode(&folder.0)), (0o600, 0o700));
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn an_emptied_join_secret_is_not_replaced_silently() {
        let folder = Folder::new("emptied");
        join_secret(&folder.0).unwrap();
        fs::write(folder.0.join("join-secret"), "").unwrap();
        assert!(matches!(join_secret(&folder.0), Err(FileError::Secret { .. })));
    }

    #[test]
    fn agents_of_the_host_find_what_the_controller_left() {
        let folder = Folder::new("run");
        let run = RunFolder::new(&folder.0, 15012);
        assert_eq!(run.read_identity().unwrap(), None);
        let secret = JoinSecret::generate().unwrap();
        let identity = Identity::new("cluster.local", "istio-system", "nodemesh-controller");
        run.write(&secret, &identity).unwrap();
        run.write_roots(&[CertificateDer::from(b"root".to_vec())]).unwrap();
        assert_eq!(run.read_identity().unwrap(), Some(identity));
        assert_eq!(certificates(&fs::read(run.roots()).unwrap()).unwrap()[0].as_ref(), b"root");
        let text = fs::read_to_string(run.secret()).unwrap();
        assert_eq!(JoinSecret::parse(&text).unwrap().token("n1"), secret.token("n1"));
        assert_eq!(mode(&run.secret()), 0o600);
    }

    #[test]
    fn a_file_without_certificates_holds_no_roots() {
        for bad in [&b""[..], b"x", b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
            assert!(certificates(bad).is_err());
        }
        assert!(certificates(pem(b"x").repeat(ROOTS_MAX + 1).as_bytes()).is_err());
    }
}
