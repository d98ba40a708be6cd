//! The socket by which a running cluster is told what to do: one order a connection, one answer.

use std::fmt::Display;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

/// The socket, in the cluster's folder.
const SOCKET: &str = "control.sock";

/// The answer when all went well.
const DONE: &str = "done";

/// How long an order may take to arrive once its connection is there.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a running cluster can be told.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Put an archive's images on every node.
    Load(PathBuf),
    /// End.
    Down,
}

/// The cluster's end of the socket.
#[derive(Debug)]
pub(crate) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

/// Listens in `folder`, unless a running cluster does.
pub(crate) fn listen(folder: &Path) -> anyhow::Result<Control> {
    let path = folder.join(SOCKET);
    if UnixStream::connect(&path).is_ok() {
        bail!("a cluster runs already: `cargo xtask cluster down` ends it");
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("remove {}", path.display()));
        }
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    listener.set_nonblocking(true).context("set up the control socket")?;
    Ok(Control { listener, path })
}

impl Control {
    /// An order, if there is one. Whoever sends nonsense is told so.
    pub(crate) fn next(&self) -> Option<(Order, Answer)> {
        let (stream, _) = self.listener.accept().ok()?;
        let answer = Answer { stream };
        match answer.read() {
            Ok(order) => Some((order, answer)),
            Err(error) => {
                answer.give(Err::<(), _>(error));
                None
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

/// To whom an order's outcome is told.
#[derive(Debug)]
pub(crate) struct Answer {
    stream: UnixStream,
}

impl Answer {
    fn read(&self) -> anyhow::Result<Order> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new(&self.stream).read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Tells it; whoever does not wait for it does not matter.
    pub(crate) fn give<E: Into<anyhow::Error>>(mut self, outcome: Result<(), E>) {
        let text = match outcome {
            Ok(()) => DONE.to_owned(),
            Err(error) => one_line(&format!("{:#}", error.into())),
        };
        drop(writeln!(self.stream, "{text}"));
    }
}

fn one_line(text: &impl Display) -> String {
    text.to_string().replace('\n', " ")
}

/// Gives an order to the cluster of `folder` and waits for its outcome.
pub(crate) fn ask(folder: &Path, order: &Order) -> anyhow::Result<()> {
    let path = folder.join(SOCKET);
    let mut stream =
        UnixStream::connect(&path).context("no cluster runs: `cargo xtask cluster up` starts one")?;
    writeln!(stream, "{}", serde_json::to_string(order)?)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("the cluster does not answer")?;
    match answer.trim() {
        DONE => Ok(()),
        "" => bail!("the cluster ended before it answered"),
        other => bail!("{other}"),
    }
}
