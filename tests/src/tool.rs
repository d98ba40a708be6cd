//! Driving a `pod-tool` process: requests to sockets inside a pod, from any thread of the test.

mod server;
mod socket;

use std::collections::HashMap;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use crate::place::{Place, StartError};
use crate::programs::{self, ProgramMissing};
use crate::protocol::{
    Answer, Call, CallFailure, Dial, DnsAnswer, DnsBy, DnsQuery, How, HttpAnswer, Load, Open, Reply, Request,
};
use crate::waiting::limit;

pub use server::{Server, ServerOptions};
pub use socket::{Capture, Connection, Datagrams, RunningLoad};

/// No request may take longer; each has a shorter time-out of its own in the tool.
const ANSWER_LIMIT: Duration = Duration::from_secs(100);

/// How long a request waits inside the tool unless the caller says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a request to a tool can end with.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The executable has not been built.
    #[error(transparent)]
    Missing(#[from] ProgramMissing),
    /// The process could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A system call inside the pod failed: what most tests look at.
    #[error("{place}: {doing}: {text}")]
    Socket {
        /// Where.
        place: String,
        /// What the tool was doing, such as `connect`.
        doing: String,
        /// The error's text.
        text: String,
        /// The error number, if there was one.
        errno: Option<Errno>,
    },
    /// The process has ended or never answered.
    #[error("pod-tool of {place} {how}")]
    Gone {
        /// Where.
        place: String,
        /// What happened to it.
        how: &'static str,
    },
    /// Something that no version of the tool should say.
    #[error("pod-tool of {place} answered {answer}")]
    Protocol {
        /// Where.
        place: String,
        /// What it said.
        answer: String,
    },
}

impl ToolError {
    /// The error number of the failed system call, if it was one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Socket { errno, .. } => *errno,
            _ => None,
        }
    }
}

/// A `pod-tool` process. Cheap to clone; ends with its last clone or with its pod.
#[derive(Debug, Clone)]
pub struct PodTool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    place: String,
    stdin: Mutex<ChildStdin>,
    child: Mutex<Child>,
    waiting: Arc<Mutex<Waiting>>,
    next: AtomicU64,
}

/// Callers by the id of their request; `None` once the tool has ended.
type Waiting = Option<HashMap<u64, SyncSender<Result<Reply, CallFailure>>>>;

impl PodTool {
    pub(crate) fn start(place: &Place) -> Result<Self, ToolError> {
        let program = programs::pod_tool()?;
        let mut command = Command::new(program);
        command.arg("serve").stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Ok(log) = place.log_file() {
            command.stderr(log);
        }
        Self::of(place.name(), place.spawn(command)?)
    }

    /// One that is running: a process with pipes that ends in `pod-tool serve`, however far away.
    pub(crate) fn of(place: &str, mut child: Child) -> Result<Self, ToolError> {
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(ToolError::Gone { place: place.to_owned(), how: "has no pipes" });
        };
        let waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let readers = Arc::clone(&waiting);
        std::thread::spawn(move || distribute(stdout, &readers));
        Ok(Self {
            shared: Arc::new(Shared {
                place: place.to_owned(),
                stdin: Mutex::new(stdin),
                child: Mutex::new(child),
                waiting,
                next: AtomicU64::new(1),
            }),
        })
    }

    /// Its process id in the test's own pid namespace.
    #[must_use]
    pub fn pid(&self) -> u32 {
        lock(&self.shared.child).id()
    }

    /// Whether it still answers.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        lock(&self.shared.waiting).is_some()
    }

    /// Do one request and wait for its end.
    ///
    /// # Errors
    /// [`ToolError::Socket`] when a system call in the pod failed.
    pub fn call(&self, request: Request) -> Result<Reply, ToolError> {
        let gone = |how| ToolError::Gone { place: self.shared.place.clone(), how };
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = sync_channel(1);
        match lock(&self.shared.waiting).as_mut() {
            Some(waiting) => waiting.insert(id, sender),
            None => return Err(gone("has ended")),
        };
        let mut line = serde_json::to_string(&Call { id, request }).map_err(|error| ToolError::Protocol {
            place: self.shared.place.clone(),
            answer: error.to_string(),
        })?;
        line.push('\n');
        lock(&self.shared.stdin).write_all(line.as_bytes()).map_err(|_| gone("reads no more"))?;
        match receiver.recv_timeout(limit(ANSWER_LIMIT)) {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(CallFailure { errno, doing, text })) => Err(ToolError::Socket {
                place: self.shared.place.clone(),
                doing,
                text,
                errno: errno.map(Errno::from_raw),
            }),
            Err(RecvTimeoutError::Timeout) => Err(gone("did not answer in time")),
            Err(RecvTimeoutError::Disconnected) => Err(gone("ended during a request")),
        }
    }

    /// Connect by a plain blocking TCP socket.
    ///
    /// # Errors
    /// The errno of `connect`.
    pub fn connect(&self, to: SocketAddr) -> Result<Connection, ToolError> {
        self.connect_as(Open::tcp_to(to), How::Blocking, to)
    }

    /// Connect by a TCP socket made and dialled in a particular way.
    ///
    /// # Errors
    /// The errno of whatever call failed.
    pub fn connect_as(&self, open: Open, how: How, to: SocketAddr) -> Result<Connection, ToolError> {
        let connection = self.open(open)?;
        connection.dial(to, how)?;
        Ok(connection)
    }

    /// A TCP socket that is not connected yet.
    ///
    /// # Errors
    /// The errno of `socket`, a socket option or `bind`.
    pub fn open(&self, open: Open) -> Result<Connection, ToolError> {
        Ok(Connection::new(self.clone(), self.opened(Request::Open(open))?.0))
    }

    /// A UDP socket.
    ///
    /// # Errors
    /// The errno of `socket`, a socket option or `bind`.
    pub fn open_udp(&self, open: Open) -> Result<Datagrams, ToolError> {
        Ok(Datagrams::new(self.clone(), self.opened(Request::Open(open))?.0))
    }

    /// Connect, ask `who`, close: the identity of the server that answers at `to`.
    ///
    /// # Errors
    /// The errno of whatever call failed.
    pub fn who(&self, to: SocketAddr) -> Result<crate::protocol::Identity, ToolError> {
        self.connect(to)?.who()
    }

    /// Start a TCP server; options from [`ServerOptions::named`].
    ///
    /// # Errors
    /// The errno of `bind` or `listen`.
    pub fn serve(&self, on: SocketAddr, options: ServerOptions) -> Result<Server, ToolError> {
        let (socket, local) = self.opened(Request::ListenTcp(options.listen_on(on)))?;
        Ok(Server::new(self.clone(), socket, local.unwrap_or(on)))
    }

    /// Start a UDP server that answers each datagram with its identity.
    ///
    /// # Errors
    /// The errno of `bind`.
    pub fn serve_udp(&self, on: SocketAddr, name: &str) -> Result<Server, ToolError> {
        let (socket, local) = self.opened(Request::ListenUdp { on, name: name.to_owned() })?;
        Ok(Server::new(self.clone(), socket, local.unwrap_or(on)))
    }

    /// One DNS query for the full `name`.
    ///
    /// # Errors
    /// The errno of the failed call; a time-out is `ETIMEDOUT` or `EAGAIN`.
    pub fn dns(&self, server: SocketAddr, name: &str, kind: &str, by: DnsBy) -> Result<DnsAnswer, ToolError> {
        let request = Request::Dns(DnsQuery {
            server,
            name: name.to_owned(),
            kind: kind.to_owned(),
            by,
            timeout_ms: default_timeout_ms(),
        });
        match self.call(request)? {
            Reply::Dns(answer) => Ok(answer),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Resolve `host` by the C library with the pod's own resolv.conf.
    ///
    /// # Errors
    /// When the name does not resolve.
    pub fn getaddrinfo(&self, host: &str) -> Result<Vec<IpAddr>, ToolError> {
        match self.call(Request::GetAddrInfo { host: host.to_owned() })? {
            Reply::Addresses { addresses } => Ok(addresses),
            other => Err(self.unexpected(&other)),
        }
    }

    /// One HTTP/1.1 GET on a connection of its own.
    ///
    /// # Errors
    /// The errno of the failed call.
    pub fn http_get(&self, to: SocketAddr, host: &str, path: &str) -> Result<HttpAnswer, ToolError> {
        let request = Request::HttpGet {
            to,
            host: host.to_owned(),
            path: path.to_owned(),
            timeout_ms: default_timeout_ms(),
        };
        match self.call(request)? {
            Reply::Http(answer) => Ok(answer),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Send one TCP SYN that claims to come from `from`.
    ///
    /// # Errors
    /// The errno of the raw socket's calls.
    pub fn forge_syn(&self, from: SocketAddr, to: SocketAddr) -> Result<(), ToolError> {
        self.done(Request::ForgeSyn { from, to })
    }

    /// Start to record the TCP packets of the pod's interfaces.
    ///
    /// # Errors
    /// The errno of the packet socket's calls.
    pub fn capture(&self) -> Result<Capture, ToolError> {
        Ok(Capture::new(self.clone(), self.opened(Request::Capture)?.0))
    }

    /// Start a load that runs beside other requests.
    ///
    /// # Errors
    /// When the tool has ended.
    pub fn start_load(&self, load: Load) -> Result<RunningLoad, ToolError> {
        Ok(RunningLoad::new(self.clone(), self.opened(Request::StartLoad(load))?.0))
    }

    fn dial(&self, dial: Dial) -> Result<crate::protocol::Names, ToolError> {
        match self.call(Request::Dial(dial))? {
            Reply::Names(names) => Ok(names),
            other => Err(self.unexpected(&other)),
        }
    }

    fn opened(&self, request: Request) -> Result<(u64, Option<SocketAddr>), ToolError> {
        match self.call(request)? {
            Reply::Opened { socket, local } => Ok((socket, local)),
            other => Err(self.unexpected(&other)),
        }
    }

    fn done(&self, request: Request) -> Result<(), ToolError> {
        match self.call(request)? {
            Reply::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn unexpected(&self, reply: &Reply) -> ToolError {
        ToolError::Protocol { place: self.shared.place.clone(), answer: format!("{reply:?}") }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Already dead is fine; the wait is what leaves no zombie.
        drop(child.kill());
        drop(child.wait());
    }
}

/// Hand each answer to its caller until the tool ends.
fn distribute(stdout: ChildStdout, waiting: &Mutex<Waiting>) {
    for line in BufReader::new(stdout).lines() {
        let answer = line.and_then(|line| serde_json::from_str::<Answer>(&line).map_err(io::Error::from));
        let Ok(Answer { id, outcome }) = answer else { break };
        let caller = lock(waiting).as_mut().and_then(|waiting| waiting.remove(&id));
        if let Some(caller) = caller {
            // A caller that gave up is no longer interested.
            drop(caller.send(outcome));
        }
    }
    *lock(waiting) = None;
}

fn default_timeout_ms() -> u64 {
    milliseconds(limit(DEFAULT_TIMEOUT))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
