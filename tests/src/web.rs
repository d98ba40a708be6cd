//! Real web servers and clients in pods: nginx, HTTP/1.1 and HTTP/2 by hyper, gRPC by tonic, WebSocket by tungstenite.
//!
//! The programs are `pod-tool web`, `ask`, `call`, `chat` and `web-load`; each gets its task as one argument of JSON and answers with
//! lines of JSON.

mod load;
pub mod messages;
mod nginx;
mod scene;

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::place::Place;
use crate::programs;
use crate::verdict::Failure;
use crate::waiting::limit;

use messages::{Ask, Call, Called, Chat, Script, Serving, Told};

pub use load::WebLoad;
pub use nginx::{Nginx, nginx_missing};
pub use scene::WebScene;

/// The line with which a server says that it listens.
pub const LISTENING: &str = "listening";
/// Where [`WebServer`] serves HTTP/1.1 and HTTP/2 without TLS.
pub const HTTP_PORT: u16 = 8080;
/// Where it echoes WebSocket messages.
pub const WEBSOCKET_PORT: u16 = 8081;
/// Where it serves gRPC.
pub const GRPC_PORT: u16 = 50051;

/// No task takes longer.
const TASK_LIMIT: Duration = Duration::from_secs(60);

/// The servers of one pod; they end when this is dropped.
#[derive(Debug)]
pub struct WebServer(Ended);

impl WebServer {
    /// Start them in a pod; answers say `name`.
    ///
    /// # Errors
    /// When they cannot listen.
    pub fn start(pod: &Place, name: &str) -> Result<Self, Failure> {
        Self::serving(pod, &Serving { name: name.to_owned(), failing: false })
    }

    /// The same with more to say about how.
    ///
    /// # Errors
    /// When they cannot listen.
    pub fn serving(pod: &Place, serving: &Serving) -> Result<Self, Failure> {
        let mut child = start(pod, "web", serving)?;
        let Some(stdout) = child.stdout.take() else { return Err(anyhow::anyhow!("no pipe").into()) };
        let ended = Ended(child);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != LISTENING {
            return Err(anyhow::anyhow!("the web server of {} said {line:?}", pod.name()).into());
        }
        Ok(Self(ended))
    }

    /// Whether the process is gone.
    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.0.0.try_wait(), Ok(None))
    }

    /// SIGTERM: no more connections are accepted, requests are finished, then the process ends. Returns at once.
    pub fn stop_in_order(&self) {
        // One that has ended already is what was asked for.
        nix::sys::signal::kill(self.0.pid(), nix::sys::signal::Signal::SIGTERM).ok();
    }
}

/// Send requests from a pod and return what was answered, in order.
///
/// # Errors
/// When the program fails; a request that fails is no error but a [`Told`] that says so.
pub fn ask(pod: &Place, script: &Script) -> Result<Vec<Told>, Failure> {
    run(pod, "ask", script)
}

/// Send one request.
///
/// # Errors
/// As [`ask`].
pub fn ask_once(pod: &Place, to: std::net::SocketAddr, http2: bool, request: Ask) -> Result<Told, Failure> {
    let script = Script { to, http2, requests: vec![request] };
    let told = ask(pod, &script)?.pop();
    told.ok_or_else(|| anyhow::anyhow!("no answer").into())
}

/// Make a gRPC call from a pod.
///
/// # Errors
/// When the program fails; a status that is not OK is no error.
pub fn call(pod: &Place, call: &Call) -> Result<Called, Failure> {
    run(pod, "call", call)
}

/// Say things over a WebSocket, and return what was said back.
///
/// # Errors
/// When the handshake or the program fails.
pub fn chat(pod: &Place, chat: &Chat) -> Result<Vec<String>, Failure> {
    run(pod, "chat", chat)
}

fn start(pod: &Place, what: &str, task: &impl Serialize) -> Result<Child, Failure> {
    let mut command = Command::new(programs::pod_tool()?);
    command.arg(what).arg(serde_json::to_string(task)?).stdin(Stdio::piped()).stdout(Stdio::piped());
    if let Ok(log) = pod.log_file() {
        command.stderr(log);
    }
    Ok(pod.spawn(command)?)
}

fn run<T: DeserializeOwned>(pod: &Place, what: &str, task: &impl Serialize) -> Result<T, Failure> {
    let mut child = start(pod, what, task)?;
    let stdout = child.stdout.take();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    // A task that hangs is ended, so that the test fails where it hangs.
    let guard = std::thread::spawn(move || {
        if is_done.recv_timeout(limit(TASK_LIMIT)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).ok();
        }
    });
    let mut text = String::new();
    let read = stdout.map(|stdout| std::io::Read::read_to_string(&mut BufReader::new(stdout), &mut text));
    drop(done);
    guard.join().ok();
    let status = child.wait()?;
    read.transpose()?;
    if !status.success() {
        return Err(anyhow::anyhow!("pod-tool {what} in {} ended with {status}: {text}", pod.name()).into());
    }
    Ok(serde_json::from_str(&text)?)
}

/// A process that ends when this is dropped.
#[derive(Debug)]
struct Ended(Child);

impl Ended {
    fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap_or(i32::MAX))
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // Already dead is fine; the wait is what leaves no zombie.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
