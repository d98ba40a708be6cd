//! A real `mesh-agent node` process of a node: start, readiness, ends of both kinds, `meshctl`, metrics.

mod http;
mod questions;

pub(crate) use questions::get_at;

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::controller::ControllerSeat;
use crate::netns::NetNsError;
use crate::place::{Place, StartError};
use crate::programs::{self, ProgramMissing};
use crate::waiting::limit;

/// How long an agent may take to be ready.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// Where an agent's metrics and readiness are, in its node's namespace.
const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 15020);

/// What can go wrong with an agent or a question to it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// An executable has not been built.
    #[error(transparent)]
    Missing(#[from] ProgramMissing),
    /// The process could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// It ended before it was ready.
    #[error("the agent ended ({status}) before it was ready; its log ends:\n{log}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// The last lines of its log.
        log: String,
    },
    /// It did not say `ready`.
    #[error("the agent was not ready within {waited:?}; its log ends:\n{log}")]
    NotReady {
        /// How long we waited.
        waited: Duration,
        /// The last lines of its log.
        log: String,
    },
    /// It did not end in time.
    #[error("the agent did not end within {0:?} of SIGTERM")]
    StillRunning(Duration),
    /// `meshctl` failed.
    #[error("meshctl {args}: {message}")]
    Meshctl {
        /// Its arguments.
        args: String,
        /// Its standard error, or what was wrong with its output.
        message: String,
    },
    /// A pipe, log or socket failed.
    #[error("cannot {doing}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Pods are not enrolled.
    #[error("pods are not enrolled within {waited:?}: {pods}")]
    NotEnrolled {
        /// How long we waited.
        waited: Duration,
        /// Each missing pod with its state and reason.
        pods: String,
    },
    /// The node's namespace cannot be entered.
    #[error(transparent)]
    Namespace(#[from] NetNsError),
}

/// What an agent of a node is started with.
#[derive(Debug)]
pub(crate) struct AgentSeat {
    /// The node's namespace and the cgroup for agents.
    pub(crate) place: Place,
    pub(crate) node_name: String,
    pub(crate) cgroup_root: PathBuf,
    pub(crate) prober_cgroup: PathBuf,
    pub(crate) config: PathBuf,
    /// Shared by all agents of the world.
    pub(crate) ca_dir: PathBuf,
    /// For the state directory and the admin socket.
    pub(crate) directory: PathBuf,
    pub(crate) logs: PathBuf,
}

/// An agent to be started.
#[derive(Debug)]
pub struct AgentBuilder<'a> {
    seat: &'a AgentSeat,
    register: &'a Mutex<Vec<Agent>>,
    program: Option<PathBuf>,
    args: Vec<String>,
    ca_dir: Option<PathBuf>,
    controller: Option<(String, PathBuf)>,
    env: Vec<(String, String)>,
    admin: String,
    metrics: SocketAddr,
    apart: bool,
}

impl<'a> AgentBuilder<'a> {
    pub(crate) fn new(seat: &'a AgentSeat, register: &'a Mutex<Vec<Agent>>) -> Self {
        let admin = "admin.sock".to_owned();
        Self {
            seat,
            register,
            program: None,
            args: Vec::new(),
            ca_dir: None,
            controller: None,
            env: Vec::new(),
            admin,
            metrics: METRICS,
            apart: false,
        }
    }

    /// More arguments after the usual ones.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Another certificate authority than that of the world.
    #[must_use]
    pub fn ca_dir(mut self, ca_dir: &Path) -> Self {
        self.ca_dir = Some(ca_dir.to_path_buf());
        self
    }

    /// Manifests and certificates from a controller instead of its own folders.
    #[must_use]
    pub fn controller(mut self, seat: &ControllerSeat) -> Self {
        self.controller = Some((seat.url(), seat.run_dir()));
        self
    }

    /// An environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Another executable than [`programs::agent`].
    #[must_use]
    pub fn program(mut self, program: PathBuf) -> Self {
        self.program = Some(program);
        self
    }

    /// In a process group of its own: a Ctrl-C at the terminal does not reach it.
    #[must_use]
    pub fn apart_from_the_terminal(mut self) -> Self {
        self.apart = true;
        self
    }

    /// Another admin socket and metrics port than the node's usual ones, to run beside another agent.
    #[must_use]
    pub fn beside_another(mut self) -> Self {
        self.admin = "admin-2.sock".to_owned();
        self.metrics.set_port(METRICS.port() + 100);
        self
    }

    /// Start it and wait until it is ready.
    ///
    /// # Errors
    /// When it cannot be started, ends, or is not ready in time.
    pub fn start(self) -> Result<Agent, AgentError> {
        let agent = self.launch()?;
        agent.wait_ready()?;
        Ok(agent)
    }

    /// Start it without waiting.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn launch(self) -> Result<Agent, AgentError> {
        let program = self.program.map_or_else(programs::agent, Ok)?;
        let seat = self.seat;
        let admin_socket = seat.directory.join(self.admin);
        let mut register = lock(self.register);
        let log = seat.logs.join(format!("{}-{}.log", seat.place.name(), register.len()));
        let io = |doing| move |source| AgentError::Io { doing, source };
        let open = || OpenOptions::new().create(true).append(true).open(&log);
        let mut command = Command::new(program);
        command.arg("node");
        match &self.controller {
            Some((url, run_dir)) => command.args(["--controller", url, "--run-dir"]).arg(run_dir),
            None => command.arg("--config").arg(&seat.config),
        };
        command
            .args(["--node", &seat.node_name])
            .arg("--cgroup-root")
            .arg(&seat.cgroup_root)
            .arg("--ca-dir")
            .arg(self.ca_dir.as_deref().unwrap_or(&seat.ca_dir))
            .arg("--state-dir")
            .arg(seat.directory.join("state"))
            .arg("--admin-socket")
            .arg(&admin_socket)
            .args(["--metrics", &self.metrics.to_string()])
            .arg("--prober-cgroup")
            .arg(&seat.prober_cgroup)
            .args(self.args)
            .envs(self.env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(open().map_err(io("open the agent's log"))?);
        if self.apart {
            command.process_group(0);
        }
        let mut child = seat.place.spawn(command)?;
        let ready = Arc::new(AtomicBool::new(false));
        if let Some(stdout) = child.stdout.take() {
            let log = open().map_err(io("open the agent's log"))?;
            let ready = Arc::clone(&ready);
            std::thread::spawn(move || follow(stdout, log, &ready));
        }
        let agent = Agent {
            inner: Arc::new(AgentInner {
                pid: child.id(),
                child: Mutex::new(child),
                ready,
                place: seat.place.clone(),
                admin_socket,
                metrics: self.metrics,
                log,
            }),
        };
        register.push(agent.clone());
        Ok(agent)
    }
}

/// A running (or dead) agent. Cheap to clone; its world ends it.
#[derive(Debug, Clone)]
pub struct Agent {
    inner: Arc<AgentInner>,
}

#[derive(Debug)]
struct AgentInner {
    pid: u32,
    child: Mutex<Child>,
    ready: Arc<AtomicBool>,
    place: Place,
    admin_socket: PathBuf,
    metrics: SocketAddr,
    log: PathBuf,
}

impl Agent {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.inner.pid
    }

    /// Its log: standard error and standard output.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.inner.log
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.inner.log).unwrap_or_default()
    }

    /// Its admin socket.
    #[must_use]
    pub fn admin_socket(&self) -> &Path {
        &self.inner.admin_socket
    }

    /// Whether the process is still there.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(lock(&self.inner.child).try_wait(), Ok(None))
    }

    /// Wait for the line `ready`.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub fn wait_ready(&self) -> Result<(), AgentError> {
        let waited = limit(READY_LIMIT);
        let deadline = Instant::now() + waited;
        while !self.inner.ready.load(Ordering::Acquire) {
            let ended = lock(&self.inner.child).try_wait();
            if let Some(status) = ended.map_err(|source| AgentError::Io { doing: "wait for it", source })? {
                return Err(AgentError::Ended { status, log: self.log_end() });
            }
            if Instant::now() > deadline {
                return Err(AgentError::NotReady { waited, log: self.log_end() });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// SIGKILL, and wait until it is gone.
    pub fn kill9(&self) {
        let mut child = lock(&self.inner.child);
        // Already ended is what was asked for.
        drop(child.kill());
        drop(child.wait());
    }

    /// SIGTERM: the agent drains. Returns at once.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn begin_drain(&self) -> Result<(), AgentError> {
        let pid = Pid::from_raw(i32::try_from(self.inner.pid).unwrap_or(i32::MAX));
        kill(pid, Signal::SIGTERM)
            .map_err(|errno| AgentError::Io { doing: "send SIGTERM", source: errno.into() })
    }

    /// SIGTERM, then wait for its end.
    ///
    /// # Errors
    /// [`AgentError::StillRunning`] when it has not ended `within` (scaled).
    pub fn terminate(&self, within: Duration) -> Result<ExitStatus, AgentError> {
        self.begin_drain()?;
        self.ended(within)
    }

    /// Wait for its end.
    ///
    /// # Errors
    /// [`AgentError::StillRunning`] when it has not ended `within` (scaled).
    pub fn ended(&self, within: Duration) -> Result<ExitStatus, AgentError> {
        let waited = limit(within);
        let deadline = Instant::now() + waited;
        loop {
            let ended = lock(&self.inner.child).try_wait();
            if let Some(status) = ended.map_err(|source| AgentError::Io { doing: "wait for it", source })? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(AgentError::StillRunning(waited));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn log_end(&self) -> String {
        const LINES: usize = 30;
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }
}

impl Drop for AgentInner {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Already dead is fine; the wait is what leaves no zombie.
        drop(child.kill());
        drop(child.wait());
    }
}

/// Copy standard output to the log and notice the ready line.
fn follow(stdout: ChildStdout, mut log: File, ready: &AtomicBool) {
    for line in BufReader::new(stdout).lines() {
        let Ok(line) = line else { break };
        if line.trim() == "ready" {
            ready.store(true, Ordering::Release);
        }
        if writeln!(log, "[stdout] {line}").is_err() {
            break;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
