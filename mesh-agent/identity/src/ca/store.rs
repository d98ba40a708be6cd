//! The CA's folder: one lock, atomic writes, and files that are either the old or the new ones.
//!
//! `lock` is held (flock) by whoever reads or changes the folder, so several agents of one host can share it. A file is replaced by
//! writing beside it, fsync, rename, fsync of the folder. Keys are 0600, the folder is 0700 if we make it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// Longest file that is read, in bytes; a revocation list is the longest.
const FILE_BYTES_MAX: u64 = 32 * 1024 * 1024;

/// The active root, or the plugged-in roots.
pub(crate) const ROOT_CERT: &str = "root-cert.pem";
/// The key that signs.
pub(crate) const CA_KEY: &str = "ca-key.pem";
/// The plugged-in certificate that signs; its presence is what makes a CA plugged in.
pub(crate) const CA_CERT: &str = "ca-cert.pem";
/// The plugged-in chain.
pub(crate) const CERT_CHAIN: &str = "cert-chain.pem";
/// Revocation lists.
pub(crate) const CA_CRL: &str = "ca-crl.pem";
/// The key of an announced root.
pub(crate) const NEXT_KEY: &str = "next-key.pem";
/// Where a rotation stands.
pub(crate) const JOURNAL: &str = "rotation.json";

const LOCK: &str = "lock";
const WATCHED: [&str; 7] = [ROOT_CERT, CA_KEY, CA_CERT, CERT_CHAIN, CA_CRL, NEXT_KEY, JOURNAL];

/// Something with a file of the folder failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct StoreError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// What identifies the content of a file without reading it: inode, size, times of change.
type Stamp = Option<(u64, u64, i64, i64)>;

/// [`Stamp`]s of all files; differs after any change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Signature([Stamp; WATCHED.len()]);

/// The folder.
#[derive(Debug)]
pub(crate) struct Store {
    folder: PathBuf,
    /// Mutations left until one fails as if the process had died there.
    #[cfg(test)]
    pub(crate) fuse: std::sync::atomic::AtomicU32,
}

/// The folder, locked.
#[derive(Debug)]
pub(crate) struct Locked<'a> {
    store: &'a Store,
    /// The lock goes when this is closed.
    _lock: File,
}

impl Store {
    /// Opens the folder, makes it if it is missing.
    pub(crate) fn open(folder: &Path) -> Result<Self, StoreError> {
        let store = Self {
            folder: folder.to_owned(),
            #[cfg(test)]
            fuse: std::sync::atomic::AtomicU32::new(u32::MAX),
        };
        DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|source| StoreError {
            action: "create",
            path: folder.to_owned(),
            source,
        })?;
        Ok(store)
    }

    /// Waits for the lock. Holders keep it for a few file operations only.
    pub(crate) fn lock(&self) -> Result<Locked<'_>, StoreError> {
        let path = self.folder.join(LOCK);
        let lock = || {
            let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        let lock = lock().map_err(|source| StoreError { action: "lock", path: path.clone(), source })?;
        Ok(Locked { store: self, _lock: lock })
    }

    /// What the files are now; needs no lock.
    pub(crate) fn signature(&self) -> Signature {
        let stamp = |name: &str| {
            let meta = fs::metadata(self.folder.join(name)).ok()?;
            Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
        };
        Signature(WATCHED.map(stamp))
    }

    #[cfg(test)]
    fn burn(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering;
        match self.fuse.load(Ordering::Relaxed) {
            0 => Err(io::Error::other("the process died here")),
            u32::MAX => Ok(()),
            left => {
                self.fuse.store(left - 1, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "tests make it fail")]
    fn burn(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.folder)?.sync_all()
    }
}

impl Locked<'_> {
    /// A file's content, or `None` if it does not exist.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, StoreError> {
        let read = |path: &Path| -> io::Result<Option<Zeroizing<Vec<u8>>>> {
            let file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            let size = file.metadata()?.len();
            if size > FILE_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too long"));
            }
            // With the capacity of the whole file, so that no copy of a key is left behind by growing.
            let capacity = usize::try_from(size).unwrap_or(0) + 1;
            let mut content = Zeroizing::new(Vec::with_capacity(capacity));
            file.take(FILE_BYTES_MAX).read_to_end(&mut content)?;
            Ok(Some(content))
        };
        self.attempt("read", name, |path| read(path))
    }

    /// Whether others than the owner may read a file.
    pub(crate) fn is_readable_by_others(&self, name: &str) -> bool {
        fs::metadata(self.store.folder.join(name)).is_ok_and(|meta| meta.mode() & 0o077 != 0)
    }

    /// Puts a file in place, or replaces it, durably and at once.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        let beside = self.store.folder.join(format!(".{name}.new"));
        self.attempt("write", name, |path| {
            self.store.burn()?;
            match fs::remove_file(&beside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&beside)?;
            file.write_all(content)?;
            file.sync_all()?;
            self.store.burn()?;
            fs::rename(&beside, path)?;
            self.store.sync()
        })
    }

    /// Renames a file over another; nothing happens if it does not exist.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), StoreError> {
        let from = self.store.folder.join(from);
        self.attempt("replace", to, |path| {
            self.store.burn()?;
            match fs::rename(&from, path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => self.store.sync(),
            }
        })
    }

    fn attempt<T>(
        &self,
        action: &'static str,
        name: &str,
        run: impl FnOnce(&Path) -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let path = self.store.folder.join(name);
        run(&path).map_err(|source| StoreError { action, path, source })
    }
}
