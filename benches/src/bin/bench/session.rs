//! Owns the load processes of one measurement: a server in one place, a client in another.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context as _, bail};
use mesh_benches::load::task::{Answer, Task};
use mesh_tests::Place;

/// The port of every load server and of every service in front of one.
pub(crate) const PORT: u16 = 7000;

/// The port at which every load server answers HTTP.
pub(crate) const HTTP_PORT: u16 = 7001;

/// How long starting a process may take on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(10);

/// One argument of a process may be 128 KiB long.
const ADDRESSES_PER_ARGUMENT: usize = 1000;

/// How long a task may take beyond its own timing.
const TASK_MARGIN: Duration = Duration::from_secs(30);

/// This very program, even when its file has been replaced by a build meanwhile.
const SELF: &str = "/proc/self/exe";

/// A load server and a load client that talk over one path.
#[derive(Debug)]
pub(crate) struct Session {
    _server: Option<Process>,
    client: Process,
    stdin: ChildStdin,
}

/// A child with lines of output; killed when dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    lines: Receiver<String>,
    place: String,
}

impl Session {
    /// Start both processes; `pinned` keeps the client on CPU 0 and the server on CPU 1. The server listens on
    /// all addresses of its place.
    pub(crate) fn start(
        client: &Place,
        server: &Place,
        to: &[SocketAddr],
        pinned: bool,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(SELF);
        command.args(["load", "server", "--listen", &format!("[::]:{PORT}")]);
        command.args(["--http", &format!("[::]:{HTTP_PORT}")]).stdin(Stdio::null());
        if pinned {
            command.args(["--cpu", "1"]);
        }
        let server = Process::start(server, command)?;
        let first = server.line(START_LIMIT)?;
        if first != "listening" {
            bail!("the load server said {first:?}");
        }
        Self::join(client, to, pinned, Some(server))
    }

    /// Start a client alone, of a server that another session has started or of none.
    pub(crate) fn client_only(client: &Place, to: &[SocketAddr], pinned: bool) -> anyhow::Result<Self> {
        Self::join(client, to, pinned, None)
    }

    fn join(
        client: &Place,
        to: &[SocketAddr],
        pinned: bool,
        server: Option<Process>,
    ) -> anyhow::Result<Self> {
        let to: Vec<String> = to.iter().map(ToString::to_string).collect();
        let mut command = Command::new(SELF);
        command.args(["load", "client"]).stdin(Stdio::piped());
        for part in to.chunks(ADDRESSES_PER_ARGUMENT) {
            command.arg("--to").arg(part.join(","));
        }
        if pinned {
            command.args(["--cpu", "0"]);
        }
        let mut client = Process::start(client, command)?;
        let stdin = client.child.stdin.take().context("the load client has no standard input")?;
        Ok(Self { _server: server, client, stdin })
    }

    /// Have the client do a task.
    pub(crate) fn perform(&mut self, task: &Task) -> anyhow::Result<Answer> {
        let own = match task {
            Task::Rtt { timing }
            | Task::Stream { timing, .. }
            | Task::Requests { timing, .. }
            | Task::Http { timing, .. } => timing.whole(),
            _ => Duration::ZERO,
        };
        writeln!(self.stdin, "{}", serde_json::to_string(task)?).context("the load client is gone")?;
        let line = self.client.line(own + TASK_MARGIN)?;
        match serde_json::from_str(&line).with_context(|| format!("no answer: {line}"))? {
            Answer::Failed { error } => bail!("{} could not do {task:?}: {error}", self.client.place),
            answer => Ok(answer),
        }
    }
}

impl Process {
    fn start(place: &Place, mut command: Command) -> anyhow::Result<Self> {
        command.stdout(Stdio::piped());
        if let Ok(log) = place.log_file() {
            command.stderr(log);
        }
        let mut child = place.spawn(command)?;
        let stdout = child.stdout.take().context("the load program has no standard output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, lines, place: place.name().to_owned() })
    }

    fn line(&self, within: Duration) -> anyhow::Result<String> {
        self.lines.recv_timeout(within).with_context(|| {
            format!("the load program in {} ended or said nothing within {within:?}", self.place)
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already is what was wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
