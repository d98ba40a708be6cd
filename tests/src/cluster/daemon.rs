//! A long-lived program of the cluster: in a cgroup of its own, with a log, and gone when its value is.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};

use crate::cgroup::{Cgroup, CgroupError};
use crate::place::{Place, StartError};
use crate::saying::say;

/// Bytes of a log that an error shows.
const LOG_END: usize = 4 << 10;

/// A program could not be started, or did not stay.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Its cgroup.
    #[error("cannot make the cgroup of {program}")]
    Cgroup {
        /// Which.
        program: String,
        /// Why not.
        source: CgroupError,
    },
    /// The process.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// The process, in a place.
    #[error(transparent)]
    StartInPlace(#[from] StartError),
    /// It ended by itself.
    #[error("{program} ended ({status}); its log ends:\n{log}")]
    Ended {
        /// Which.
        program: String,
        /// How.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
}

/// Where daemons run: a parent for their cgroups, and a network if it is not the machine's own.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    pub(crate) cgroup: Cgroup,
    /// Its namespace is entered; its cgroup is not used.
    pub(crate) place: Option<Place>,
    pub(crate) logs: PathBuf,
}

impl Seat {
    /// Start `command` under the name `program`, with its output at the end of `logs/PROGRAM.log`.
    pub(crate) fn start(&self, program: &str, mut command: Command) -> Result<Daemon, DaemonError> {
        let failed = |source| DaemonError::Start { program: program.to_owned(), source };
        let cgroup = self
            .cgroup
            .child(program)
            .map_err(|source| DaemonError::Cgroup { program: program.to_owned(), source })?;
        let log = self.logs.join(format!("{program}.log"));
        let output = OpenOptions::new().create(true).append(true).open(&log).map_err(failed)?;
        // A Ctrl-C at the terminal is for the driver, which ends everything in order.
        command.process_group(0).stdin(Stdio::null());
        command.stdout(output.try_clone().map_err(failed)?).stderr(output);
        let child = match &self.place {
            Some(place) => place.in_group(cgroup.clone()).spawn(command)?,
            None => join_on_start(&mut command, &cgroup).and_then(|()| command.spawn()).map_err(failed)?,
        };
        Ok(Daemon { program: program.to_owned(), child: Mutex::new(child), cgroup, log })
    }
}

/// A running program. Dropping it kills it and all it has started.
#[derive(Debug)]
pub(crate) struct Daemon {
    program: String,
    child: Mutex<Child>,
    cgroup: Cgroup,
    log: PathBuf,
}

impl Daemon {
    /// An error if it has ended.
    pub(crate) fn check(&self) -> Result<(), DaemonError> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        match child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => {
                Err(DaemonError::Ended { program: self.program.clone(), status, log: log_end(&self.log) })
            }
            Err(source) => Err(DaemonError::Start { program: self.program.clone(), source }),
        }
    }

    /// SIGKILL to it and all it has started, and wait until they are gone.
    pub(crate) fn kill(&self) {
        if let Err(error) = self.cgroup.remove() {
            say(&format!("{:#}", anyhow::Error::new(error)));
        }
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Already ended is what was asked for.
        drop(child.kill());
        drop(child.wait());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

fn join_on_start(command: &mut Command, cgroup: &Cgroup) -> io::Result<()> {
    let procs = OpenOptions::new().write(true).open(cgroup.path().join("cgroup.procs"))?;
    let join = move || (&procs).write_all(b"0");
    #[expect(unsafe_code, reason = "a process must be in its cgroup before it can start others")]
    // SAFETY: between fork and exec the closure only writes to a file opened before the fork; it neither
    // allocates nor takes locks.
    unsafe {
        command.pre_exec(join);
    }
    Ok(())
}

/// The last lines of a log.
pub(crate) fn log_end(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let mut start = text.len().saturating_sub(LOG_END);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or_default().to_owned()
}
