//! A real `mesh-agent controller` process on the wire: the two-process form, whose agents come by network.

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::agent::AgentError;
use crate::place::Place;
use crate::programs;
use crate::verdict::Failure;
use crate::waiting::limit;
use crate::world::{World, WorldError};

/// Where controllers listen.
const PORT: u16 = 15012;
/// Where their metrics are, in their namespace.
const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15014);
/// How long one may take to be ready, or to end.
const LIMIT: Duration = Duration::from_secs(20);

/// Where a controller runs and what outlives it. Start as many as you like, one at a time.
#[derive(Debug)]
pub struct ControllerSeat {
    place: Place,
    config: PathBuf,
    directory: PathBuf,
    ca_dir: PathBuf,
    log: PathBuf,
}

impl ControllerSeat {
    /// A host on the wire of `world`, for controllers of its manifests and certificate authority.
    ///
    /// # Errors
    /// When the kernel refuses one of its parts.
    pub fn new(world: &World) -> Result<Self, WorldError> {
        Ok(Self {
            place: world.outsider("controller")?,
            config: world.manifests().directory().to_path_buf(),
            directory: world.directory().join("controller"),
            ca_dir: world.ca_dir(),
            log: world.logs().join("controller.log"),
        })
    }

    /// What agents call it by.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.place.ip4())
    }

    /// Below which agents find its roots and how to join.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Where it runs.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.place.at4(PORT)
    }

    /// The token by which a node of this name proves itself, once a controller has been started.
    ///
    /// # Errors
    /// When the program fails.
    pub fn token_of(&self, node: &str) -> Result<String, Failure> {
        let mut command = Command::new(programs::agent()?);
        command
            .args(["controller", "token", "--node", node, "--state-dir"])
            .arg(self.directory.join("state"));
        let output = command.output()?;
        if !output.status.success() {
            return Err(anyhow::anyhow!("no token: {output:?}").into());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Start one and wait until it is ready.
    ///
    /// # Errors
    /// When it cannot be started, ends, or is not ready in time.
    pub fn start(&self, args: &[&str]) -> Result<Controller, AgentError> {
        let io = |doing| move |source| AgentError::Io { doing, source };
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let mut command = Command::new(programs::agent()?);
        command
            .arg("controller")
            .arg("--config")
            .arg(&self.config)
            .args(["--listen", &format!("{}:{PORT}", self.place.ip4())])
            .args(["--metrics", &METRICS.to_string()])
            .arg("--ca-dir")
            .arg(&self.ca_dir)
            .arg("--state-dir")
            .arg(self.directory.join("state"))
            .arg("--run-dir")
            .arg(self.run_dir())
            .args(args)
            // A Ctrl-C at the terminal is for the driver, which ends everything in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.map_err(io("open the controller's log"))?);
        let mut child = self.place.spawn(command)?;
        let ready = Arc::new(AtomicBool::new(false));
        if let Some(stdout) = child.stdout.take() {
            let ready = Arc::clone(&ready);
            std::thread::spawn(move || {
                let lines = BufReader::new(stdout).lines().map_while(Result::ok);
                lines
                    .filter(|line| line.trim() == "ready")
                    .for_each(|_| ready.store(true, Ordering::Release));
            });
        }
        let controller = Controller {
            pid: child.id(),
            child: Mutex::new(child),
            place: self.place.clone(),
            log: self.log.clone(),
        };
        let waited = limit(LIMIT);
        let deadline = Instant::now() + waited;
        while !ready.load(Ordering::Acquire) {
            if let Some(status) = controller.ended()? {
                return Err(AgentError::Ended { status, log: controller.log_text() });
            }
            if Instant::now() > deadline {
                return Err(AgentError::NotReady { waited, log: controller.log_text() });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(controller)
    }
}

/// A running controller. Dropping it kills it.
#[derive(Debug)]
pub struct Controller {
    pid: u32,
    child: Mutex<Child>,
    place: Place,
    log: PathBuf,
}

impl Controller {
    /// Its log.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// GET a path of its metrics address: the status and the body.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn get(&self, path: &str) -> Result<(u16, String), AgentError> {
        crate::agent::get_at(&self.place, METRICS, path)
    }

    /// SIGKILL, and wait until it is gone.
    pub fn kill9(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Already ended is what was asked for.
        drop(child.kill());
        drop(child.wait());
    }

    /// SIGTERM, then wait for its end.
    ///
    /// # Errors
    /// [`AgentError::StillRunning`] when it does not end in time.
    pub fn terminate(&self) -> Result<ExitStatus, AgentError> {
        let pid = Pid::from_raw(i32::try_from(self.pid).unwrap_or(i32::MAX));
        kill(pid, Signal::SIGTERM)
            .map_err(|errno| AgentError::Io { doing: "send SIGTERM", source: errno.into() })?;
        let waited = limit(LIMIT);
        let deadline = Instant::now() + waited;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(AgentError::StillRunning(waited));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn ended(&self) -> Result<Option<ExitStatus>, AgentError> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.try_wait().map_err(|source| AgentError::Io { doing: "wait for it", source })
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.kill9();
    }
}
