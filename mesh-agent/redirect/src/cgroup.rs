//! Owns the cgroup the hooks hang on and the agent's own place below it.
//!
//! Invariant: before the agent makes a socket, it is in a group below the root; `sock_ops` follows the group a
//! socket was created in, so sockets made elsewhere would go unseen.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Name of the group the agent joins below the root.
pub const AGENT_GROUP: &str = "nodemesh-agent";

/// Why the cgroup root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The folder does not exist or is no cgroup.
    #[error("{path} is not a cgroup-v2 group: give --cgroup-root a folder of the cgroup2 mount")]
    NotAGroup {
        /// What was given.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The agent's own group could not be made or joined.
    #[error("join cgroup {path}: the agent must run below its cgroup root, else its sockets go unseen")]
    Join {
        /// The group.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The kernel did not put us where we asked.
    #[error("the agent is in cgroup {found} instead of one below {root}")]
    Elsewhere {
        /// What `/proc/self/cgroup` says.
        found: String,
        /// The root.
        root: PathBuf,
    },
}

/// The group the programs are attached to.
#[derive(Debug)]
pub(crate) struct CgroupRoot {
    pub(crate) path: PathBuf,
    pub(crate) dir: File,
    /// The kernel's id of the group.
    pub(crate) id: u64,
    mount: PathBuf,
}

impl CgroupRoot {
    /// Opens the root; by default the whole tree.
    pub(crate) fn open(mount: &Path, root: Option<&Path>) -> Result<Self, CgroupError> {
        let path = root.unwrap_or(mount);
        let failed = |source| CgroupError::NotAGroup { path: path.to_owned(), source };
        let path = fs::canonicalize(path).map_err(failed)?;
        // The top of the tree has no cgroup.events; every group has cgroup.procs, and v1 groups lack
        // cgroup.controllers.
        fs::metadata(path.join("cgroup.controllers")).map_err(failed)?;
        let dir = File::open(&path).map_err(failed)?;
        let id = dir.metadata().map_err(failed)?.ino();
        Ok(Self { path, dir, id, mount: mount.to_owned() })
    }

    /// Moves this process below the root unless it is there already.
    pub(crate) fn join(&self) -> Result<(), CgroupError> {
        if self.is_below(&own_group()) {
            return Ok(());
        }
        let path = self.path.join(AGENT_GROUP);
        let failed = |source| CgroupError::Join { path: path.clone(), source };
        fs::create_dir_all(&path).map_err(failed)?;
        // "0" is the writing process.
        File::options()
            .write(true)
            .open(path.join("cgroup.procs"))
            .and_then(|mut procs| procs.write_all(b"0"))
            .map_err(failed)?;
        let found = own_group();
        if self.is_below(&found) {
            return Ok(());
        }
        Err(CgroupError::Elsewhere { found, root: self.path.clone() })
    }

    /// Whether a group, as `/proc/self/cgroup` names it, is strictly below the root.
    fn is_below(&self, group: &str) -> bool {
        let absolute = self.mount.join(group.trim_start_matches('/'));
        absolute != self.path && absolute.starts_with(&self.path)
    }

    /// The root and its ancestors up to the mount point, nearest first.
    pub(crate) fn lineage(&self) -> Vec<PathBuf> {
        let ancestors = self.path.ancestors();
        ancestors.take_while(|path| path.starts_with(&self.mount)).map(Path::to_owned).collect()
    }
}

/// The kernel's id of a group, as programs see it: the inode number of its folder.
pub(crate) fn group_id(path: &Path) -> Result<u64, CgroupError> {
    let failed = |source| CgroupError::NotAGroup { path: path.to_owned(), source };
    fs::metadata(path.join("cgroup.controllers")).map_err(failed)?;
    fs::metadata(path).map(|meta| meta.ino()).map_err(failed)
}

/// Own group within the v2 tree; empty when there is none.
fn own_group() -> String {
    v2_group(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default()).to_owned()
}

/// The group within the v2 tree by the text of `/proc/PID/cgroup`; empty when there is none.
pub(crate) fn v2_group(text: &str) -> &str {
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or_default()
}
