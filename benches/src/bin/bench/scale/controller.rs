//! Owns the controller under measurement: the real program, and what the kernel and its own metrics say of it.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use mesh_tests::programs;
use serde::Deserialize;

/// How long it may take to read the cluster.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// An answer that takes longer is none.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A running controller. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Controller {
    child: Child,
    started: Instant,
    ready: Instant,
    xds: SocketAddr,
    metrics: SocketAddr,
}

/// Memory of a process, in MiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Resident now.
    pub(super) now: f64,
    /// Resident at most, since it started.
    pub(super) peak: f64,
}

/// A published resource.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Published {
    pub(super) kind: String,
    pub(super) name: String,
    pub(super) version: String,
    pub(super) nodes: Option<Vec<String>>,
}

impl Controller {
    /// Starts one for the cluster of this kubeconfig and waits until agents can come.
    pub(super) fn start(kubeconfig: &Path, folder: &Path, name: &str) -> anyhow::Result<Self> {
        let state = folder.join(name);
        fs::create_dir_all(&state).with_context(|| format!("create {}", state.display()))?;
        let log: PathBuf = state.join("log");
        let file = fs::File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let [xds, metrics, webhook] = free_ports()?;
        let mut command = Command::new(programs::agent()?);
        command
            .args(["controller", "--kubernetes", "--listen", &xds.to_string()])
            .args(["--metrics", &metrics.to_string(), "--webhook-listen", &webhook.to_string()])
            .arg("--state-dir")
            .arg(&state)
            .arg("--ca-dir")
            .arg(state.join("ca"))
            .env("KUBECONFIG", kubeconfig)
            .env_remove("KUBERNETES_SERVICE_HOST")
            // A Ctrl-C at the terminal is for the driver, which ends everything in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(file);
        let started = Instant::now();
        let mut child = command.spawn().context("start the controller")?;
        let stdout = child.stdout.take().context("invariant: the output is piped")?;
        let mut controller = Self { child, started, ready: started, xds, metrics };
        let (said, ready) = mpsc::channel();
        thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            // Whoever waited may have given up.
            lines.filter(|line| line.trim() == "ready").for_each(|_| said.send(()).unwrap_or_default());
        });
        ready.recv_timeout(READY_LIMIT).with_context(|| {
            format!("the controller is not ready: {}", fs::read_to_string(&log).unwrap_or_default())
        })?;
        controller.ready = Instant::now();
        Ok(controller)
    }

    /// Where agents come to.
    pub(super) fn xds(&self) -> SocketAddr {
        self.xds
    }

    /// Its process.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// When it was started.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// How long it took until agents could come.
    pub(super) fn ready_after(&self) -> Duration {
        self.ready - self.started
    }

    /// CPU time it has used.
    pub(super) fn cpu(&self) -> anyhow::Result<Duration> {
        cpu_of(&self.id().to_string())
    }

    /// Its memory.
    pub(super) fn memory(&self) -> anyhow::Result<Memory> {
        let path = format!("/proc/{}/status", self.id());
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let of = |field: &str| -> anyhow::Result<f64> {
            let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
            Ok(kib.with_context(|| format!("{path} has no {field}"))? / 1024.0)
        };
        Ok(Memory { now: of("VmRSS")?, peak: of("VmHWM")? })
    }

    /// Encoded size of all responses it has sent.
    pub(super) fn bytes_sent(&self) -> anyhow::Result<u64> {
        self.counted("mesh_xds_sent_bytes_total")
    }

    /// Responses it has sent.
    pub(super) fn responses_sent(&self) -> anyhow::Result<u64> {
        self.counted("mesh_xds_pushes_total")
    }

    /// Newest state that it publishes.
    pub(super) fn generation(&self) -> anyhow::Result<u64> {
        self.counted("mesh_xds_generation")
    }

    /// What it publishes.
    pub(super) fn published(&self) -> anyhow::Result<Vec<Published>> {
        serde_json::from_str(&self.get("/resources")?).context("read /resources")
    }

    /// The sum of a metric over its labels.
    fn counted(&self, metric: &str) -> anyhow::Result<u64> {
        let text = self.get("/metrics")?;
        let samples = text
            .lines()
            .filter(|line| line.strip_prefix(metric).is_some_and(|rest| rest.starts_with(['{', ' '])));
        samples
            .map(|line| {
                line.rsplit(' ').next().unwrap_or_default().parse::<u64>().map_err(anyhow::Error::from)
            })
            .sum::<anyhow::Result<u64>>()
            .with_context(|| format!("read {metric}"))
    }

    fn get(&self, path: &str) -> anyhow::Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.metrics, ANSWER_LIMIT)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("read {path}"))?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
            _ => anyhow::bail!("GET {path}: {}", answer.lines().next().unwrap_or_default()),
        }
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        // Already ended is what was asked for.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// CPU time that a process has used; `self` is this one.
pub(super) fn cpu_of(process: &str) -> anyhow::Result<Duration> {
    let path = format!("/proc/{process}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
    let used = ticks_of(&text).with_context(|| format!("{path} has no times"))?;
    Ok(Duration::from_secs_f64(used as f64 / ticks as f64))
}

/// User and system time; the name before them may hold anything.
fn ticks_of(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Three loopback ports that nobody has.
fn free_ports() -> anyhow::Result<[SocketAddr; 3]> {
    // All at once, or the same port might be given out twice.
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("find a free port");
    let held = [bind()?, bind()?, bind()?];
    let [a, b, c] = held.each_ref().map(TcpListener::local_addr);
    Ok([a?, b?, c?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_a_name_with_spaces_and_brackets() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 50 25 0 0 20 0 1 0 9 9 9";
        assert_eq!(ticks_of(stat), Some(75));
        assert_eq!(ticks_of("7 (a"), None);
    }
}
