//! The manifest files below a directory, and what is cheap to know of each.
//!
//! Hidden names are left out, which is how editors' temporary files and the versioned folders of a mounted ConfigMap
//! are named. Symbolic links are followed, each folder once.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Folders below folders: more is a mistake such as a link to `/`.
const DEPTH_MAX: usize = 32;
/// Files of one source: more is a mistake too.
const FILES_MAX: usize = 100_000;
/// A file changed within this time before it was read may change again without looking different: time stamps of
/// file systems are coarse.
const RACY: Duration = Duration::from_secs(1);

/// Changes whenever the contents do, except shortly after a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    inode: (u64, u64),
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether it can be trusted to differ after another change.
    pub(super) fn is_settled(&self, now: SystemTime) -> bool {
        let age =
            now.duration_since(UNIX_EPOCH + Duration::from_secs(u64::try_from(self.changed.0).unwrap_or(0)));
        age.is_ok_and(|age| age > RACY + Duration::from_secs(1))
    }
}

/// What a look at a directory found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub(crate) files: BTreeMap<PathBuf, Fingerprint>,
    /// Files and folders that could not be looked at. What was known below them is not gone.
    pub(crate) failed: BTreeMap<PathBuf, io::Error>,
}

/// Looks at everything below `root`. Only a `root` that cannot be listed is an error.
pub(crate) fn scan(root: &Path) -> io::Result<Scan> {
    let mut scan = Scan::default();
    let mut seen = BTreeSet::new();
    let mut folders = vec![(root.to_owned(), 0)];
    let mut first = Some(fs::read_dir(root)?);
    while let Some((folder, depth)) = folders.pop() {
        let listed = match first.take() {
            Some(listed) => Ok(listed),
            None => fs::read_dir(&folder),
        };
        let entries = listed.and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
        match entries {
            Ok(entries) => {
                for entry in entries {
                    look(&entry.path(), depth, &mut scan, &mut seen, &mut folders);
                }
            }
            Err(error) => {
                scan.failed.insert(folder, error);
            }
        }
    }
    Ok(scan)
}

fn look(
    path: &Path,
    depth: usize,
    scan: &mut Scan,
    seen: &mut BTreeSet<(u64, u64)>,
    folders: &mut Vec<(PathBuf, usize)>,
) {
    if path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b".")) {
        return;
    }
    // A name that vanished meanwhile, or a link to nowhere, is an absent file; everything else is worth a word.
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => {
            if is_manifest(path) {
                scan.failed.insert(path.to_owned(), error);
            }
            return;
        }
    };
    let inode = (meta.dev(), meta.ino());
    if meta.is_dir() {
        if !seen.insert(inode) {
        } else if depth >= DEPTH_MAX {
            scan.failed
                .insert(path.to_owned(), io::Error::other(format!("more than {DEPTH_MAX} folders deep")));
        } else {
            folders.push((path.to_owned(), depth + 1));
        }
    } else if meta.is_file() && is_manifest(path) {
        if scan.files.len() >= FILES_MAX {
            scan.failed.insert(path.to_owned(), io::Error::other(format!("more than {FILES_MAX} files")));
            return;
        }
        let fingerprint = Fingerprint {
            inode,
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        };
        scan.files.insert(path.to_owned(), fingerprint);
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|extension| matches!(extension, "yaml" | "yml" | "json"))
}
