//! Questions to a running agent: `meshctl`, the admin socket, metrics, the state of pods.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{Agent, AgentError, http};
use crate::place::Place;
use crate::pod::Pod;
use crate::programs;
use crate::waiting::limit;

/// How long an agent that is ready may take to enrol a pod.
const ENROL_LIMIT: Duration = Duration::from_secs(10);

/// How long `meshctl` may take.
const MESHCTL_LIMIT: Duration = Duration::from_secs(10);

/// How long the metrics endpoint may take.
const HTTP_LIMIT: Duration = Duration::from_secs(5);

impl Agent {
    /// Wait until `meshctl status` shows these pods as enrolled.
    ///
    /// # Errors
    /// [`AgentError::NotEnrolled`] with the reasons that the agent gives.
    pub fn wait_enrolled<'p>(&self, pods: impl IntoIterator<Item = &'p Pod>) -> Result<(), AgentError> {
        let wanted: Vec<&Pod> = pods.into_iter().collect();
        let waited = limit(ENROL_LIMIT);
        let deadline = Instant::now() + waited;
        loop {
            let status = self.meshctl(&["status"])?;
            let missing: Vec<String> = wanted
                .iter()
                .map(|pod| (pod, pod_row(&status, pod)))
                .filter(|(_, row)| row.is_none_or(|row| row["state"] != "enrolled"))
                .map(|(pod, row)| format!("{}: {}", pod.name(), row.unwrap_or(&Value::Null)))
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(AgentError::NotEnrolled { waited, pods: missing.join("; ") });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The row of a pod in `meshctl status`, or null.
    ///
    /// # Errors
    /// As [`Agent::meshctl`].
    pub fn pod_status(&self, pod: &Pod) -> Result<Value, AgentError> {
        let status = self.meshctl(&["status"])?;
        Ok(pod_row(&status, pod).cloned().unwrap_or(Value::Null))
    }

    /// `meshctl --admin-socket … ARGS -o json`, parsed.
    ///
    /// # Errors
    /// When it fails, hangs or prints something else than JSON.
    pub fn meshctl(&self, args: &[&str]) -> Result<Value, AgentError> {
        let program = programs::meshctl()?;
        let failed = |message: String| AgentError::Meshctl { args: args.join(" "), message };
        let mut command = Command::new(program);
        command
            .arg("--admin-socket")
            .arg(&self.inner.admin_socket)
            .args(args)
            .args(["-o", "json"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().map_err(|source| AgentError::Io { doing: "start meshctl", source })?;
        let output = finish(child, limit(MESHCTL_LIMIT)).map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(failed(format!("{}: {}", output.status, stderr.trim())));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| {
            failed(format!("no JSON ({error}): {}", String::from_utf8_lossy(&output.stdout)))
        })
    }

    /// GET a path of the metrics address, such as `/metrics` or `/readyz`: status and body.
    ///
    /// # Errors
    /// When it cannot be reached or answers no HTTP.
    pub fn http(&self, path: &str) -> Result<(u16, String), AgentError> {
        get_at(&self.inner.place, self.inner.metrics, path)
    }

    /// The sum of all samples of `/metrics` whose line contains every one of `parts`, such as a name and
    /// `reason="fail_closed"`.
    ///
    /// # Errors
    /// As [`Agent::http`].
    pub fn metric(&self, parts: &[&str]) -> Result<f64, AgentError> {
        let (_, text) = self.http("/metrics")?;
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let matching = samples.filter(|line| parts.iter().all(|part| line.contains(part)));
        Ok(matching.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// GET a path of the admin socket, such as `/edges`: quicker than `meshctl`, whose `top` measures for a
    /// second.
    ///
    /// # Errors
    /// When it cannot be reached, refuses or answers something else than JSON.
    pub fn admin(&self, path: &str) -> Result<Value, AgentError> {
        let io = |source| AgentError::Io { doing: "ask the admin socket", source };
        let asked = UnixStream::connect(&self.inner.admin_socket).and_then(|stream| {
            stream.set_read_timeout(Some(limit(HTTP_LIMIT)))?;
            http::get(stream, path)
        });
        match asked.map_err(io)? {
            (200, body) => serde_json::from_str(&body).map_err(|error| io(error.into())),
            (status, body) => Err(io(io::Error::other(format!("{path}: {status} {body}")))),
        }
    }
}

/// GET a path of a metrics address in a place: status and body.
pub(crate) fn get_at(place: &Place, metrics: SocketAddr, path: &str) -> Result<(u16, String), AgentError> {
    let asked = place.run(|| {
        let within = limit(HTTP_LIMIT);
        let stream = TcpStream::connect_timeout(&metrics, within)?;
        stream.set_read_timeout(Some(within))?;
        http::get(stream, path)
    })?;
    asked.map_err(|source| AgentError::Io { doing: "read the metrics address", source })
}

fn pod_row<'s>(status: &'s Value, pod: &Pod) -> Option<&'s Value> {
    let rows = status["pods"].as_array()?;
    rows.iter().find(|row| row["name"] == pod.name() && row["namespace"] == pod.namespace())
}

/// Collect a child's output; kill it when it takes longer than `within`.
fn finish(child: Child, within: Duration) -> io::Result<Output> {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let (sender, receiver) = std::sync::mpsc::channel();
    let collector = std::thread::spawn(move || {
        // The receiver has given up if this fails, and the child has been killed.
        drop(sender.send(child.wait_with_output()));
    });
    let output = receiver.recv_timeout(within).unwrap_or_else(|_| {
        // Not reaped yet: the collector waits for it, so the pid is still its own.
        let told = kill(pid, Signal::SIGKILL).map_or_else(|errno| errno.desc(), |()| "killed");
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {within:?}, {told}")))
    });
    drop(collector.join());
    output
}
