//! Owns entering pod network namespaces.
//!
//! Invariants:
//! - A thread that runs anything but a closure of this module is in the agent's own namespace.
//! - No closure awaits: they are synchronous, and short.
//! - If the way back fails, the process aborts: a worker left in a pod's namespace would open one tenant's
//!   sockets in another's network.
//!
//! Two ways in: [`Netns::on_own_thread`] for set-up (the thread is thrown away, so there is no way back to
//! fail), and [`Netns::enter`] for sockets on the hot path, on the calling thread. Making and tagging a socket
//! takes 3.4 µs that way (a bare socket: 2 µs), against 8.3 µs through a helper thread that is already awake, and
//! tens of µs when it is not (`tests/kernel/sockets.rs` measures and insists on it).

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::MetadataExt as _,
    },
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use crate::sys;

/// Why a pod's namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The file cannot be opened.
    #[error("open network namespace {path}")]
    Open {
        /// What was tried.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// It is something else.
    #[error("{path} is not a network namespace")]
    NotANamespace {
        /// What was given.
        path: PathBuf,
    },
    /// The pod shares the agent's namespace: enrolling it would enrol the whole node.
    #[error("{path} is the node's own network namespace")]
    HostNetwork {
        /// What was given.
        path: PathBuf,
    },
    /// `setns` or a call inside failed.
    #[error("look into network namespace {path}")]
    Enter {
        /// Which.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    cookie: u64,
    inode: u64,
}

impl Netns {
    /// Opens a namespace by its file, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let opened = |source| NetnsError::Open { path: path.to_owned(), source };
        let file = File::open(path).map_err(opened)?;
        let inode = file.metadata().map_err(opened)?.ino();
        if !sys::is_netns(file.as_fd()) {
            return Err(NetnsError::NotANamespace { path: path.to_owned() });
        }
        let home = home().map_err(opened)?;
        if home.metadata().map_err(opened)?.ino() == inode {
            return Err(NetnsError::HostNetwork { path: path.to_owned() });
        }
        let cookie = own_thread(file.as_fd(), own_cookie)
            .map_err(|source| NetnsError::Enter { path: path.to_owned(), source })?;
        Ok(Self { file, path: path.to_owned(), cookie, inode })
    }

    /// Opens the namespace of a process. The process is held by a pidfd meanwhile, so that a recycled number
    /// cannot hand over somebody else's namespace.
    pub fn of_process(pid: i32) -> Result<Self, NetnsError> {
        let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let process =
            sys::pidfd_open(pid).map_err(|source| NetnsError::Open { path: path.clone(), source })?;
        let netns = Self::open(&path)?;
        if sys::pidfd_alive(process.as_fd()) {
            return Ok(netns);
        }
        Err(NetnsError::Open { path, source: io::Error::from(io::ErrorKind::NotFound) })
    }

    /// The kernel's cookie of the namespace: never reused while the kernel runs. The pod's "incarnation".
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Inode number, as link infos report it.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// What it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` inside, on a fresh thread that is thrown away.
    pub fn on_own_thread<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        own_thread(self.file.as_fd(), || Ok(work()))
    }

    /// Runs `work` inside, on this thread, and returns to the agent's namespace.
    ///
    /// Blocking: never longer than `work`. Aborts the process when the return fails.
    pub(crate) fn enter<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let home = home()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let _back = WayBack(home.as_fd());
        Ok(work())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Returns the thread on drop, also when `work` panics.
struct WayBack<'a>(BorrowedFd<'a>);

impl Drop for WayBack<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot leave a pod's network namespace; aborting");
            std::process::abort();
        }
    }
}

/// The agent's own namespace, opened once. By process, not by thread: all threads but the ones in here agree.
fn home() -> io::Result<&'static File> {
    static HOME: OnceLock<File> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home);
    }
    let home = File::open("/proc/self/ns/net")?;
    Ok(HOME.get_or_init(|| home))
}

/// The cookie of the agent's own namespace.
pub(crate) fn home_cookie() -> io::Result<u64> {
    own_cookie()
}

fn own_cookie() -> io::Result<u64> {
    // Any socket will do; a Unix one needs no protocol stack.
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    sys::netns_cookie(socket.as_fd())
}

fn own_thread<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let worker = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            work()
        })?;
        worker.join().map_err(|_| io::Error::other("the thread in the namespace panicked"))?
    })
}
