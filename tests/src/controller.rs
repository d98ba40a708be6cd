//! A real `mesh-agent controller` process, on a host of its own on the wire.

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::agent::AgentError;
use crate::place::Place;
use crate::programs;
use crate::verdict::Failure;
use crate::waiting::limit;
use crate::world::World;

/// Where it listens.
const PORT: u16 = 15012;

const READY_LIMIT: Duration = Duration::from_secs(20);

/// A controller of a world's manifests. It ends with the value; [`Controller::start`] again for one that takes over.
#[derive(Debug)]
pub struct Controller {
    place: Place,
    directory: PathBuf,
    config: PathBuf,
    ca_dir: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl Controller {
    /// A host for a controller on the wire of `world`, and a controller on it that is ready.
    ///
    /// # Errors
    /// When it cannot be started or is not ready in time.
    pub fn start(world: &World) -> Result<Self, Failure> {
        let mut controller = Self {
            place: world.outsider("controller")?,
            directory: world.directory().join("controller"),
            config: world.manifests().directory().to_path_buf(),
            ca_dir: world.ca_dir(),
            log: world.logs().join("controller.log"),
            child: None,
        };
        controller.resume()?;
        Ok(controller)
    }

    /// Where agents find it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.address())
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.place.at4(PORT)
    }

    /// Its host.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Where it leaves what agents of its host need.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.directory
    }

    /// The token by which a node of this name proves itself.
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

    /// SIGKILL.
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Already ended is what was asked for.
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Start it (again) and wait until it is ready.
    ///
    /// # Errors
    /// When it cannot be started or is not ready in time.
    pub fn resume(&mut self) -> Result<(), Failure> {
        self.kill9();
        let io = |doing| move |source| AgentError::Io { doing, source };
        let open = || OpenOptions::new().create(true).append(true).open(&self.log);
        let mut command = Command::new(programs::agent()?);
        command
            .args(["controller", "--listen", &self.address().to_string(), "--metrics", "127.0.0.1:15014"])
            .arg("--config")
            .arg(&self.config)
            .arg("--ca-dir")
            .arg(&self.ca_dir)
            .arg("--state-dir")
            .arg(self.directory.join("state"))
            .arg("--run-dir")
            .arg(&self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(open().map_err(io("open the controller's log"))?);
        let mut child = self.place.spawn(command)?;
        let ready = Arc::new(AtomicBool::new(false));
        if let Some(stdout) = child.stdout.take() {
            let (mut log, ready) = (open().map_err(io("open the controller's log"))?, Arc::clone(&ready));
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    ready.fetch_or(line.trim() == "ready", Ordering::AcqRel);
                    if writeln!(log, "[stdout] {line}").is_err() {
                        break;
                    }
                }
            });
        }
        self.child = Some(child);
        let deadline = Instant::now() + limit(READY_LIMIT);
        while !ready.load(Ordering::Acquire) {
            let ended = self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            if ended || Instant::now() > deadline {
                let log = std::fs::read_to_string(&self.log).unwrap_or_default();
                return Err(anyhow::anyhow!("the controller is not ready (ended: {ended}):\n{log}").into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.kill9();
    }
}
