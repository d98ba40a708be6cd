//! Named network namespaces: made without a helper process, entered by a thread of their own.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::saying::say;

/// Where namespaces get their names, as `ip netns` has it.
const DIRECTORY: &str = "/run/netns";

/// What can go wrong with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetNsError {
    /// A system call on the namespace failed.
    #[error("cannot {doing} network namespace {name}")]
    Call {
        /// The verb: what was tried.
        doing: &'static str,
        /// The namespace.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// `ip -batch` refused a line.
    #[error("ip in network namespace {name}: {stderr}\n{script}")]
    Ip {
        /// The namespace.
        name: String,
        /// What `ip` said.
        stderr: String,
        /// What it was given.
        script: String,
    },
}

/// A network namespace with a name under `/run/netns`; the name goes away with the value.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    path: PathBuf,
    file: File,
    removed: AtomicBool,
}

impl NetNs {
    /// Make a namespace: loopback up, addresses usable at once (no duplicate address detection), no
    /// router discovery, no rate limit on ICMP errors (refusals must be immediate).
    ///
    /// # Errors
    /// When a system call fails, most likely for want of root.
    pub fn create(name: &str) -> Result<Self, NetNsError> {
        let failed = |doing| move |source| NetNsError::Call { doing, name: name.to_owned(), source };
        let path = Path::new(DIRECTORY).join(name);
        mount_directory().map_err(failed("name"))?;
        File::create_new(&path).map_err(failed("name"))?;
        // `unshare` changes the calling thread for good, so it is a thread of its own.
        let made = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET)?;
                    set_defaults()?;
                    mount(
                        Some("/proc/thread-self/ns/net"),
                        &path,
                        None::<&str>,
                        MsFlags::MS_BIND,
                        None::<&str>,
                    )?;
                    Ok::<(), io::Error>(())
                })
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the namespace thread panicked")))
        });
        let opened = made.and_then(|()| File::open(&path)).map_err(|source| {
            // Leave no name behind for something that was never made.
            drop(fs::remove_file(&path));
            failed("create")(source)
        })?;
        let ns = Self { name: name.to_owned(), path, file: opened, removed: AtomicBool::new(false) };
        ns.ip(&["link set lo up".to_owned()])?;
        Ok(ns)
    }

    /// Its name under `/run/netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file to enter it by: what the annotation `nodemesh.dev/netns` holds.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Run `work` on a fresh thread inside this namespace and return what it returned.
    ///
    /// Sockets made this way belong to the test process's cgroup, so cgroup programs of an agent do not
    /// see them: use [`crate::Place::tool`] for anything the mesh shall act on.
    ///
    /// # Errors
    /// When the namespace cannot be entered. A panic of `work` is passed on.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetNsError> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
                    .map_err(io::Error::from)
                    .map_err(|source| self.failed("enter", source))?;
                Ok(work())
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Run lines of `ip` (without the leading `ip`) inside the namespace, in one process.
    ///
    /// # Errors
    /// [`NetNsError::Ip`] with the script when a line is refused; earlier lines stay in effect.
    pub fn ip(&self, lines: &[String]) -> Result<(), NetNsError> {
        if lines.is_empty() {
            return Ok(());
        }
        let script = lines.join("\n") + "\n";
        let output = self
            .run(|| {
                let mut child = Command::new("ip")
                    .args(["-batch", "-"])
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .spawn()?;
                if let Some(mut stdin) = child.stdin.take() {
                    stdin.write_all(script.as_bytes())?;
                }
                child.wait_with_output()
            })?
            .map_err(|source| self.failed("run ip in", source))?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(NetNsError::Ip { name: self.name.clone(), stderr, script })
    }

    /// Write a value under `/proc/sys/net`, such as `("ipv4/ip_forward", "1")`.
    ///
    /// # Errors
    /// When the kernel has no such setting or refuses the value.
    pub fn sysctl(&self, setting: &str, value: &str) -> Result<(), NetNsError> {
        self.run(|| write_setting(setting, value))?.map_err(|source| self.failed("configure", source))
    }

    /// Take the name away. The namespace itself ends with its last process, socket or open file.
    pub fn remove(&self) {
        if self.removed.swap(true, Ordering::AcqRel) {
            return;
        }
        remove_name(&self.path);
    }

    fn failed(&self, doing: &'static str, source: io::Error) -> NetNsError {
        NetNsError::Call { doing, name: self.name.clone(), source }
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Makes the place of names a mount of its own, as `ip netns` and container runtimes do. Were it left to them, theirs would come to lie
/// over the names that are there by then, which nobody could remove any more.
fn mount_directory() -> io::Result<()> {
    fs::create_dir_all(DIRECTORY)?;
    // As `ip` does it: of several at a time one mounts.
    let directory =
        Flock::lock(File::open(DIRECTORY)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let none = None::<&str>;
    let shared = || mount(none, DIRECTORY, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none);
    // EINVAL: it is no mount yet.
    if shared() == Err(Errno::EINVAL) {
        mount(Some(DIRECTORY), DIRECTORY, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
        shared()?;
    }
    drop(directory);
    Ok(())
}

/// Unmount and delete a name under `/run/netns`.
pub(crate) fn remove_name(path: &Path) {
    if let Err(error) = umount2(path, MntFlags::MNT_DETACH)
        && error != Errno::EINVAL
    {
        say(&format!("cannot unmount {}: {error}", path.display()));
    }
    if let Err(error) = fs::remove_file(path) {
        say(&format!("cannot remove {}: {error}", path.display()));
    }
}

/// All names under `/run/netns`.
pub(crate) fn names() -> Vec<String> {
    fs::read_dir(DIRECTORY)
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default()
}

/// The path of a name under `/run/netns`.
pub(crate) fn path_of(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

fn set_defaults() -> io::Result<()> {
    for device in ["all", "default"] {
        for (setting, value) in [
            ("accept_dad", "0"),
            ("dad_transmits", "0"),
            ("accept_ra", "0"),
            ("router_solicitations", "0"),
            ("disable_ipv6", "0"),
        ] {
            write_setting(&format!("ipv6/conf/{device}/{setting}"), value)?;
        }
        write_setting(&format!("ipv4/conf/{device}/rp_filter"), "0")?;
    }
    write_setting("ipv4/icmp_ratelimit", "0")?;
    write_setting("ipv6/icmp/ratelimit", "0")
}

fn write_setting(setting: &str, value: &str) -> io::Result<()> {
    // /proc/sys/net shows the namespace of the thread that opens it.
    let path = format!("/proc/sys/net/{setting}");
    fs::write(&path, value).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}
