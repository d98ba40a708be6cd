//! Owns what an agent in a container borrows of its host: the host's view of cgroups, and file systems that must outlive the
//! container.
//!
//! Needs the host's process namespace (`hostPID`), so that process 1 is the host's. Where it is not, or where the agent runs on the
//! host itself, nothing is borrowed; a file system that the host itself lacks is mounted all the same.
//!
//! Invariants:
//! - Called before there are threads, which inherit what the first one is in.
//! - Nothing of the host is changed but a mount that it lacks.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags},
    sched::{CloneFlags, setns, unshare},
};

use crate::bpffs;

/// The host's first process, as seen from a container that shares its process namespace.
pub(crate) const HOST: &str = "/proc/1";

/// Something of the host cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Its view of cgroups.
    #[error("take the host's view of cgroups; the agent needs hostPID, CAP_SYS_ADMIN and CAP_SYS_PTRACE")]
    Cgroups(#[source] io::Error),
    /// A file system it lacks.
    #[error(
        "mount {kind} at {path}; the agent needs CAP_SYS_ADMIN, in a container also hostPID and CAP_SYS_PTRACE"
    )]
    Mount {
        /// Which file system.
        kind: &'static str,
        /// Where.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A mount of the agent's own that does not go.
    #[error("unmount {path}; what still uses it?")]
    Unmount {
        /// Where.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// Has cgroups named as the host names them: a container sees its own group as the root, and could neither tell where it is nor join
/// another group.
///
/// # Errors
/// [`HostError::Cgroups`].
pub fn enter_cgroup_namespace() -> Result<(), HostError> {
    if is_same("ns/cgroup").map_err(HostError::Cgroups)? {
        return Ok(());
    }
    fs::File::open(format!("{HOST}/ns/cgroup"))
        .and_then(|namespace| Ok(setns(namespace, CloneFlags::CLONE_NEWCGROUP)?))
        .map_err(HostError::Cgroups)
}

/// A BPF file system that outlives this container: the one at `path`, else the host's there, which is mounted if need be. Returns
/// where it is for this process.
///
/// # Errors
/// [`HostError::Mount`].
pub fn bpf_file_system(path: &Path) -> Result<PathBuf, HostError> {
    let failed = |source| HostError::Mount { kind: "bpf", path: path.to_owned(), source };
    if bpffs::is_bpffs(path) || is_same("ns/mnt").map_err(failed)? {
        return Ok(path.to_owned());
    }
    let through = PathBuf::from(format!("{HOST}/root{}", path.display()));
    if !bpffs::is_bpffs(&through) {
        in_host_mounts(|| bpffs::mount(path)).map_err(failed)?;
    }
    Ok(through)
}

/// Mounts the cgroup2 tree at `path` for this process, if it sees none. One mount shows what every other does.
///
/// # Errors
/// [`HostError::Mount`].
pub fn cgroup2_file_system(path: &Path) -> Result<(), HostError> {
    if crate::precheck::mount_of_cgroup2().is_ok() {
        return Ok(());
    }
    fs::create_dir_all(path)
        .and_then(|()| {
            let none = None::<&str>;
            Ok(nix::mount::mount(Some("cgroup2"), path, Some("cgroup2"), MsFlags::empty(), none)?)
        })
        .map_err(|source| HostError::Mount { kind: "cgroup2", path: path.to_owned(), source })
}

/// Ends what [`cgroup2_file_system`] mounted at `path`, if that was on the host itself and is still there.
///
/// # Errors
/// [`HostError::Unmount`].
pub fn leave_cgroup2(path: &Path) -> Result<(), HostError> {
    let kind = nix::sys::statfs::statfs(path).map(|stat| stat.filesystem_type());
    if kind != Ok(nix::sys::statfs::CGROUP2_SUPER_MAGIC) {
        return Ok(());
    }
    nix::mount::umount2(path, MntFlags::UMOUNT_NOFOLLOW)
        .map_err(|errno| HostError::Unmount { path: path.to_owned(), source: errno.into() })
}

/// Whether this process has the namespace of the host's first one. Where there is no telling, there is nothing to borrow.
fn is_same(namespace: &str) -> io::Result<bool> {
    let own = fs::metadata(format!("/proc/self/{namespace}"))?.ino();
    Ok(fs::metadata(format!("{HOST}/{namespace}"))?.ino() == own)
}

/// Runs `work` where the host's mounts are, on a thread of its own that is thrown away.
fn in_host_mounts(work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    let mounts = fs::File::open(format!("{HOST}/ns/mnt"))?;
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Threads share their root and working folder; one that changes its mounts may not.
            unshare(CloneFlags::CLONE_FS)?;
            setns(mounts, CloneFlags::CLONE_NEWNS)?;
            work()
        });
        worker.join().map_err(|_| io::Error::other("the thread among the host's mounts panicked"))?
    })
}
