//! Owns the lock that keeps two agents from serving one node at once.
//!
//! Invariants:
//! - Whoever holds it writes the node's kernel tables, listens in its pods and owns its admin socket.
//! - A draining agent lets go of it first, so that its successor need not wait for the last connection.
//! - The kernel releases it when the process ends, however it ends.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Pause between two tries.
const TRY_EACH: Duration = Duration::from_millis(50);

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub(super) enum LockError {
    #[error("make the state directory {path}; name a writable one with --state-dir")]
    Folder {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("open the lock {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "another agent serves node {node} (pid {holder}, lock {path}); stop it first, or give this one another \
         --node and --state-dir"
    )]
    Held { node: String, holder: String, path: PathBuf },
}

/// Tells a serving agent that its successor is here: it drains as at its end, and stays until it is told to stop.
pub(super) const HAND_OVER: Signal = Signal::SIGUSR1;

/// What is done about an agent that serves the node already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Predecessor {
    /// It is left alone; if it is on its way out, its end is waited for.
    Wait,
    /// It is told that its successor is here.
    Relieve,
}

/// The lock, held or let go of.
#[derive(Debug)]
pub(super) struct NodeLock {
    path: PathBuf,
    held: Option<Flock<File>>,
}

impl NodeLock {
    /// Takes the lock, waiting up to `wait` for an agent that is on its way out. Blocking.
    pub(super) fn acquire(
        state_dir: &Path,
        node: &str,
        wait: Duration,
        predecessor: Predecessor,
    ) -> Result<Self, LockError> {
        fs::create_dir_all(state_dir)
            .map_err(|source| LockError::Folder { path: state_dir.to_owned(), source })?;
        let path = path(state_dir, node);
        let give_up = Instant::now() + wait;
        let mut lock = Self { path, held: None };
        let mut told = predecessor == Predecessor::Wait;
        loop {
            if lock.try_again()? {
                return Ok(lock);
            }
            if !told {
                told = lock.relieve_holder();
            }
            if Instant::now() >= give_up {
                let holder = fs::read_to_string(&lock.path).unwrap_or_default();
                let holder = if holder.trim().is_empty() { "unknown" } else { holder.trim() };
                return Err(LockError::Held {
                    node: node.to_owned(),
                    holder: holder.to_owned(),
                    path: lock.path,
                });
            }
            std::thread::sleep(TRY_EACH);
        }
    }

    /// Tells the holder that its successor is here. Whether it could be told: whoever holds the lock lives, and has
    /// written who it is.
    fn relieve_holder(&self) -> bool {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let Ok(pid) = text.trim().parse::<i32>() else { return false };
        if pid <= 1 || u32::try_from(pid) == Ok(std::process::id()) {
            return false;
        }
        match kill(Pid::from_raw(pid), HAND_OVER) {
            Ok(()) => {
                tracing::info!(pid, "told the agent that serves this node to hand over");
                true
            }
            Err(error) => {
                tracing::debug!(pid, %error, "tell the agent that serves this node to hand over");
                false
            }
        }
    }

    /// The file that is locked.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets a successor have it.
    pub(super) fn release(&mut self) {
        self.held = None;
    }

    /// Takes it unless somebody else has it. Whether it is held now.
    pub(super) fn try_again(&mut self) -> Result<bool, LockError> {
        if self.held.is_some() {
            return Ok(true);
        }
        let failed = |source| LockError::Open { path: self.path.clone(), source };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&self.path)
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            // Somebody has taken the node out between opening and locking: nobody else would find this lock.
            Ok(held) if !is_still_at(&held, &self.path) => Ok(false),
            Ok(mut held) => {
                // Only for the message of whoever finds it held.
                if let Err(error) = write_pid(&mut held) {
                    tracing::debug!(%error, "write the pid into the lock");
                }
                self.held = Some(held);
                Ok(true)
            }
            Err((_, Errno::EWOULDBLOCK)) => Ok(false),
            Err((_, errno)) => Err(failed(errno.into())),
        }
    }
}

fn path(state_dir: &Path, node: &str) -> PathBuf {
    state_dir.join(format!("{}.lock", node.replace('/', "%2f")))
}

/// The process that serves the node, or was the last to. It is not asked whether it still does: whoever tried the lock would
/// for a moment keep an agent from it.
pub(super) fn holder(state_dir: &Path, node: &str) -> Option<u32> {
    let text = fs::read_to_string(path(state_dir, node)).ok()?;
    text.trim().parse().ok()
}

fn is_still_at(file: &File, path: &Path) -> bool {
    let inode = |meta: io::Result<fs::Metadata>| meta.ok().map(|meta| (meta.dev(), meta.ino()));
    let held = inode(file.metadata());
    held.is_some() && held == inode(fs::metadata(path))
}

fn write_pid(file: &mut File) -> io::Result<()> {
    let mut old = String::new();
    file.read_to_string(&mut old)?;
    file.rewind()?;
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(test: &str) -> PathBuf {
        std::env::temp_dir().join(format!("mesh-agent-{test}-{}", std::process::id()))
    }

    #[test]
    fn a_second_agent_is_refused_by_name_and_let_in_once_the_first_lets_go() {
        let dir = folder("lock");
        let mut first = NodeLock::acquire(&dir, "n1", Duration::ZERO, Predecessor::Wait).unwrap();
        let error = NodeLock::acquire(&dir, "n1", Duration::from_millis(60), Predecessor::Wait).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("node n1") && text.contains(&std::process::id().to_string()), "{text}");
        assert!(
            NodeLock::acquire(&dir, "n2", Duration::ZERO, Predecessor::Wait).is_ok(),
            "another node is another lock"
        );
        first.release();
        let second = NodeLock::acquire(&dir, "n1", Duration::ZERO, Predecessor::Wait).unwrap();
        assert!(!first.try_again().unwrap());
        drop(second);
        assert!(first.try_again().unwrap());

        // A lock whose file was removed keeps nobody out, so it is none: whoever opens it just then tries again.
        let file = File::open(&first.path).unwrap();
        assert!(is_still_at(&file, &first.path));
        fs::remove_file(&first.path).unwrap();
        assert!(!is_still_at(&file, &first.path));
        fs::write(&first.path, "another").unwrap();
        assert!(!is_still_at(&file, &first.path));
        fs::remove_dir_all(&dir).unwrap();
    }
}
