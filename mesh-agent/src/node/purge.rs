//! Owns emptying the state folder of a node that leaves the mesh.
//!
//! Invariants:
//! - What is mounted below the folder is no part of it, and stays.
//! - The lock goes last, while it is held: an agent that starts meanwhile waits for it, and finds an empty folder.
//! - A folder that another agent of this host uses is left as it is.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use super::lock::NodeLock;

/// Names in the path of a folder that cannot be for agents alone: the root, and what lies in it.
const TOO_WIDE: usize = 2;

/// Why the folder is not empty.
#[derive(Debug, thiserror::Error)]
pub(super) enum PurgeError {
    #[error("{path} is no folder for the state of agents alone; it is not emptied")]
    TooWide { path: PathBuf },
    #[error(
        "an agent that holds {lock} has its state in the same folder; stop it first, or clean up without --purge"
    )]
    InUse { lock: PathBuf },
    #[error("remove {path}")]
    Remove {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Removes everything in a state folder, whose lock is held. What was left, because something is mounted there.
pub(super) fn purge(state_dir: &Path, lock: &NodeLock) -> Result<Vec<PathBuf>, PurgeError> {
    // Mounts are known by the names that they really have.
    let folder = fs::canonicalize(state_dir).map_err(at(state_dir))?;
    if folder.iter().count() <= TOO_WIDE {
        return Err(PurgeError::TooWide { path: folder });
    }
    let own = lock.path().file_name().map(|name| folder.join(name)).unwrap_or_default();
    for path in entries(&folder)? {
        if path != own && path.extension().is_some_and(|end| end == "lock") && is_locked(&path) {
            return Err(PurgeError::InUse { lock: path });
        }
    }
    let device = fs::metadata(&folder).map_err(at(&folder))?.dev();
    let mut purge = Purge { device, mounts: mounts(), keep: own.clone(), left: Vec::new() };
    purge.empty(&folder)?;
    remove(&own, fs::remove_file(&own))?;
    Ok(purge.left)
}

struct Purge {
    device: u64,
    mounts: BTreeSet<PathBuf>,
    keep: PathBuf,
    left: Vec<PathBuf>,
}

impl Purge {
    /// Removes what is in a folder. Whether it is empty now.
    fn empty(&mut self, folder: &Path) -> Result<bool, PurgeError> {
        let mut empty = true;
        for path in entries(folder)? {
            let Some(found) = metadata(&path)? else { continue };
            if path == self.keep {
                empty = false;
            } else if found.dev() != self.device || self.mounts.contains(&path) {
                empty = false;
                self.left.push(path);
            } else if !found.is_dir() {
                remove(&path, fs::remove_file(&path))?;
            } else if self.empty(&path)? {
                remove(&path, fs::remove_dir(&path))?;
            } else {
                empty = false;
            }
        }
        Ok(empty)
    }
}

/// What is in a folder; nothing, if it is gone.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, PurgeError> {
    let listed = fs::read_dir(folder).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    unless_gone(listed).map(Option::unwrap_or_default).map_err(at(folder))
}

/// Of the path itself, wherever it points to; nothing, if it is gone.
fn metadata(path: &Path) -> Result<Option<Metadata>, PurgeError> {
    unless_gone(fs::symlink_metadata(path)).map_err(at(path))
}

/// How the removal of something ended; gone already is well.
fn remove(path: &Path, removed: io::Result<()>) -> Result<(), PurgeError> {
    unless_gone(removed).map(|_| ()).map_err(at(path))
}

fn unless_gone<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> PurgeError {
    let path = path.to_owned();
    move |source| PurgeError::Remove { path: path.clone(), source }
}

/// Whether a process holds it.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err()
}

/// Where something is mounted for this process: a bind mount of the same device is not told by the device.
fn mounts() -> BTreeSet<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::symlink, time::Duration};

    use super::*;
    use crate::node::lock::Predecessor;

    fn folder(test: &str) -> PathBuf {
        std::env::temp_dir().join(format!("mesh-agent-{test}-{}", std::process::id()))
    }

    #[test]
    fn a_state_folder_is_emptied_and_what_it_points_to_or_is_mounted_in_it_stays() {
        let (dir, elsewhere) = (folder("purge"), folder("purge-elsewhere"));
        fs::create_dir_all(dir.join("n1/deep")).unwrap();
        fs::create_dir_all(dir.join("cgroup2/pods")).unwrap();
        fs::create_dir_all(&elsewhere).unwrap();
        for file in [dir.join("n1/deep/state"), dir.join("cni-pods.json"), elsewhere.join("mine")] {
            fs::write(file, "x").unwrap();
        }
        symlink(&elsewhere, dir.join("n1/link")).unwrap();
        let lock = NodeLock::acquire(&dir, "n1", Duration::ZERO, Predecessor::Wait).unwrap();
        let at = fs::canonicalize(&dir).unwrap();
        let mut purge = Purge {
            device: fs::metadata(&dir).unwrap().dev(),
            mounts: [at.join("cgroup2")].into(),
            keep: at.join("n1.lock"),
            left: Vec::new(),
        };
        assert!(!purge.empty(&at).unwrap());
        assert_eq!(purge.left, [at.join("cgroup2")]);
        assert!(dir.join("cgroup2/pods").exists() && dir.join("n1.lock").exists());
        // Nothing is mounted there in truth.
        assert_eq!(super::purge(&dir, &lock).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(entries(&dir).unwrap(), Vec::<PathBuf>::new());
        assert!(elsewhere.join("mine").exists(), "a link is removed, not followed");
        fs::remove_dir_all(&dir).unwrap();
        fs::remove_dir_all(&elsewhere).unwrap();
    }

    #[test]
    fn a_folder_that_another_agent_uses_or_that_is_everybodys_is_left_alone() {
        let dir = folder("purge-shared");
        let lock = NodeLock::acquire(&dir, "n1", Duration::ZERO, Predecessor::Wait).unwrap();
        let mut other = NodeLock::acquire(&dir, "n2", Duration::ZERO, Predecessor::Wait).unwrap();
        fs::write(dir.join("cni-pods.json"), "{}").unwrap();
        let error = purge(&dir, &lock).unwrap_err().to_string();
        assert!(error.contains("n2.lock") && dir.join("cni-pods.json").exists(), "{error}");
        other.release();
        purge(&dir, &lock).unwrap();
        assert_eq!(entries(&dir).unwrap(), Vec::<PathBuf>::new());
        assert!(matches!(purge(Path::new("/var"), &lock), Err(PurgeError::TooWide { .. })));
        fs::remove_dir_all(&dir).unwrap();
    }
}
