//! Cgroup-v2 groups of a test: making them, ending what runs in them, removing them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::waiting::limit;

/// How long the processes of a killed group get to vanish.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What can go wrong with a test's cgroups.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The machine has no cgroup-v2 hierarchy.
    #[error("no cgroup2 mount in /proc/mounts")]
    NotMounted,
    /// A file of the hierarchy could not be read or written.
    #[error("cannot {doing} {path}")]
    File {
        /// The verb: what was tried.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Processes outlived a kill.
    #[error("processes are still in {path} {waited:?} after they were killed")]
    StillPopulated {
        /// The group.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
}

/// The mount point of the cgroup-v2 hierarchy (on a hybrid v1+v2 host it is not `/sys/fs/cgroup`).
///
/// # Errors
/// [`CgroupError::NotMounted`] when there is none.
pub fn mount_point() -> Result<PathBuf, CgroupError> {
    let path = PathBuf::from("/proc/mounts");
    let mounts =
        fs::read_to_string(&path).map_err(|source| CgroupError::File { doing: "read", path, source })?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(target))
        })
        .next()
        .ok_or(CgroupError::NotMounted)
}

/// One group. Removal is explicit ([`Cgroup::remove`]): parents outlive children by construction.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Make a group directly below the mount point.
    ///
    /// # Errors
    /// When there is no cgroup2 mount or the group cannot be made.
    pub fn create_top(name: &str) -> Result<Self, CgroupError> {
        Self::create(mount_point()?.join(name))
    }

    /// Make (or find) the group `name` below this one.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn child(&self, name: &str) -> Result<Self, CgroupError> {
        Self::create(self.path.join(name))
    }

    /// An existing group.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    fn create(path: PathBuf) -> Result<Self, CgroupError> {
        fs::create_dir_all(&path).map_err(|source| CgroupError::File {
            doing: "create",
            path: path.clone(),
            source,
        })?;
        Ok(Self { path })
    }

    /// Its directory in the hierarchy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Processes in this very group (not below it).
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        fs::read_to_string(self.path.join("cgroup.procs"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect()
    }

    /// Kill everything in the group and below, and wait until it is gone.
    ///
    /// # Errors
    /// When the kernel refuses, or processes remain (uninterruptible sleep).
    pub fn kill(&self) -> Result<(), CgroupError> {
        let kill = self.path.join("cgroup.kill");
        fs::write(&kill, "1").map_err(|source| CgroupError::File { doing: "write", path: kill, source })?;
        let allowed = limit(KILL_LIMIT);
        let deadline = Instant::now() + allowed;
        while self.is_populated() {
            if Instant::now() > deadline {
                return Err(CgroupError::StillPopulated { path: self.path.clone(), waited: allowed });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Kill what is in the group, then remove it and every group below it.
    ///
    /// # Errors
    /// As [`Cgroup::kill`]; a group that is already gone is no error.
    pub fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        remove_tree(&self.path)
    }

    fn is_populated(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events"))
            .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
    }
}

/// Remove groups bottom-up: rmdir refuses a group that still has children. None there is no error.
pub(crate) fn remove_tree(path: &Path) -> Result<(), CgroupError> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listed => {
            listed.map_err(|source| CgroupError::File { doing: "list", path: path.to_path_buf(), source })?
        }
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    // A killed process leaves its group a moment after `populated` turned 0: EBUSY until then.
    let deadline = Instant::now() + limit(KILL_LIMIT);
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(source) => {
                return Err(CgroupError::File { doing: "remove", path: path.to_path_buf(), source });
            }
        }
    }
}
