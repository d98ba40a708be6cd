//! Owns what two agents of one node tell each other when the second takes the node over from the first.
//!
//! The first one listens at a socket in the state folder. The second one connects and asks; the first one stops changing the node,
//! lets go of the lock, sends its listening sockets and goes on accepting. When the second one serves them all it says so, and the
//! first one lets go of its own descriptors: at no moment does nobody accept, and what waits in a queue stays there.
//!
//! Frames have eight bytes. The ask: `NMH`, a version, the first half of the hash of the kernel tables' layouts. Answers: `NMH`, a
//! version, what it is, zero, a number. The last word is one byte.
//!
//! Invariants:
//! - Only root is answered; what is sent is bounded in size and time, and what is not understood is refused.
//! - Until the last word the first agent can take the node back: it does so when the second one's end closes.
//! - Either end's process may die at any moment; the kernel closes what was on its way.

use std::{
    io::{self, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use mesh_common::abi;
use mesh_redirect::{SOCKETS_PER_MESSAGE, receive_sockets, send_sockets};
use tokio::{
    io::AsyncReadExt as _,
    net::{UnixListener, UnixStream},
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::socket::{self, SocketFile};
use crate::report::report;

/// Of the frames. An agent answers its own only.
const VERSION: u8 = 1;
const MAGIC: [u8; 3] = *b"NMH";
const FRAME: usize = 8;
/// The last word: all pods are served.
const SERVED: u8 = b'S';

/// An answer: the other agent's tables are laid out otherwise, or its frames are.
const REFUSED: u8 = 0;
/// An answer: so many sockets come with it.
const SOCKETS: u8 = 1;
/// An answer: those were all, so many.
const END: u8 = 2;

/// The agent that is asked finishes its pass over the node first.
const ANSWER_WITHIN: Duration = Duration::from_secs(12);
/// An ask comes at once.
const ASK_WITHIN: Duration = Duration::from_secs(1);
/// Sending to a process that does not read is given up.
const SEND_WITHIN: Duration = Duration::from_secs(5);
/// More than a node has by far: 250 pods have 2000.
const SOCKETS_MAX: usize = 65_536;
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Hand-overs of this process, by how they went.
#[derive(Debug, Default)]
pub(super) struct HandOvers {
    taken: AtomicU64,
    without_sockets: AtomicU64,
    given: AtomicU64,
    taken_back: AtomicU64,
    refused: AtomicU64,
}

impl HandOvers {
    /// This agent took the node over, with its listening sockets or without.
    pub(super) fn count_taken(&self, with_sockets: bool) {
        let counter = if with_sockets { &self.taken } else { &self.without_sockets };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Another agent has taken it over.
    pub(super) fn count_given(&self) {
        self.given.fetch_add(1, Ordering::Relaxed);
    }

    /// Another agent was to, and did not.
    pub(super) fn count_taken_back(&self) {
        self.taken_back.fetch_add(1, Ordering::Relaxed);
    }

    fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// By outcome.
    pub(super) fn counts(&self) -> [(&'static str, u64); 5] {
        [
            ("taken", &self.taken),
            ("taken_without_sockets", &self.without_sockets),
            ("given", &self.given),
            ("taken_back", &self.taken_back),
            ("refused", &self.refused),
        ]
        .map(|(outcome, counter)| (outcome, counter.load(Ordering::Relaxed)))
    }
}

/// Where an agent of the node is asked.
fn path(state_dir: &Path, node: &str) -> PathBuf {
    state_dir.join(format!("{}.handover", node.replace('/', "%2f")))
}

/// Half of the layouts' hash: enough to tell versions apart, and fits.
fn layouts() -> [u8; 4] {
    let [a, b, c, d, ..] = abi::VERSION.to_le_bytes();
    [a, b, c, d]
}

fn asking() -> [u8; FRAME] {
    let ([m0, m1, m2], [a, b, c, d]) = (MAGIC, layouts());
    [m0, m1, m2, VERSION, a, b, c, d]
}

fn answering(what: u8, number: u16) -> [u8; FRAME] {
    let ([m0, m1, m2], [low, high]) = (MAGIC, number.to_le_bytes());
    [m0, m1, m2, VERSION, what, 0, low, high]
}

/// Why the listening sockets of the agent before this one were not had.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    #[error("nobody is asked at {path}: the agent that serves the node may be of an earlier version")]
    Nobody {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the agent that serves the node ended the conversation, or took longer than {ANSWER_WITHIN:?}")]
    Cut(#[source] io::Error),
    #[error(
        "the agent that serves the node is of a version that lays its tables or this conversation out otherwise"
    )]
    Refused,
    #[error("the agent that serves the node says what nobody understands")]
    Unreadable,
}

/// The node, as the agent before this one gave it away. Closed without [`TakenOver::served`], it goes back there.
#[derive(Debug)]
pub(super) struct TakenOver {
    stream: StdStream,
    sockets: Vec<OwnedFd>,
}

impl TakenOver {
    /// Asks the agent that serves the node. Blocking. Afterwards the node's lock is free.
    pub(super) fn ask(state_dir: &Path, node: &str) -> Result<Self, AskError> {
        let path = path(state_dir, node);
        let mut stream = StdStream::connect(&path).map_err(|source| AskError::Nobody { path, source })?;
        let give_up = Instant::now() + ANSWER_WITHIN;
        stream.set_write_timeout(Some(SEND_WITHIN)).map_err(AskError::Cut)?;
        stream.write_all(&asking()).map_err(AskError::Cut)?;
        let mut sockets = Vec::new();
        loop {
            let left = give_up.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            stream.set_read_timeout(Some(left)).map_err(AskError::Cut)?;
            let mut frame = [0; FRAME];
            let (read, mut received) = receive_sockets(&stream, &mut frame).map_err(AskError::Cut)?;
            if read == 0 {
                return Err(AskError::Cut(io::ErrorKind::UnexpectedEof.into()));
            }
            match Answer::read(frame.get(..read).unwrap_or_default())? {
                Answer::Sockets(number) if number == received.len() && sockets.len() < SOCKETS_MAX => {
                    sockets.append(&mut received);
                }
                Answer::End(total) if total == sockets.len() % (usize::from(u16::MAX) + 1) => {
                    return Ok(Self { stream, sockets });
                }
                Answer::Sockets(_) | Answer::End(_) => return Err(AskError::Unreadable),
            }
        }
    }

    /// The listening sockets, once.
    pub(super) fn take_sockets(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.sockets)
    }

    /// Says that this agent serves the node now; the other one cannot take it back any more. It sees by the stream that this process
    /// lives, so the stream is to be kept.
    pub(super) fn served(&mut self) -> io::Result<()> {
        self.stream.write_all(&[SERVED])
    }
}

/// What an agent answers.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Sockets(usize),
    End(usize),
}

impl Answer {
    fn read(frame: &[u8]) -> Result<Self, AskError> {
        let [m0, m1, m2, version, what, 0, low, high] = *frame else { return Err(AskError::Unreadable) };
        if [m0, m1, m2] != MAGIC {
            return Err(AskError::Unreadable);
        }
        let number = usize::from(u16::from_le_bytes([low, high]));
        match what {
            _ if version != VERSION => Err(AskError::Refused),
            REFUSED => Err(AskError::Refused),
            SOCKETS => Ok(Self::Sockets(number)),
            END => Ok(Self::End(number)),
            _ => Err(AskError::Unreadable),
        }
    }
}

/// Where a successor asks this agent.
#[derive(Debug)]
pub(super) struct Door {
    listener: UnixListener,
    _file: SocketFile,
}

impl Door {
    /// Opens it. Without it a successor makes sockets of its own, which is worth a warning and no more.
    pub(super) async fn open(state_dir: &Path, node: &str) -> Option<Self> {
        let path = path(state_dir, node);
        match socket::bind(&path, Duration::ZERO).await {
            Ok((listener, file)) => Some(Self { listener, _file: file }),
            Err(error) => {
                tracing::warn!(
                    error = %report(&error),
                    "the next agent of this node will not be able to take this one's listening sockets over"
                );
                None
            }
        }
    }

    /// The next agent that asks and can be answered. Cancel safe: one that is being heard is hung up on.
    pub(super) async fn successor(&self, counts: &HandOvers) -> Successor {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => match hear(stream).await {
                    Ok(successor) => return successor,
                    Err(error) => {
                        counts.count_refused();
                        tracing::warn!(%error, "somebody asks for this node and is refused");
                    }
                },
                Err(error) => {
                    tracing::warn!(%error, "accept the next agent of this node");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn hear(mut stream: UnixStream) -> io::Result<Successor> {
    let peer = stream.peer_cred()?;
    if peer.uid() != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("it is user {}", peer.uid())));
    }
    let mut frame = [0; FRAME];
    timeout(ASK_WITHIN, stream.read_exact(&mut frame)).await??;
    if frame != asking() {
        let stream = stream.into_std()?;
        send_sockets(&stream, &answering(REFUSED, 0), &[])?;
        let why = "its frames, or the layouts of its kernel tables, are of another version";
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    Ok(Successor { stream })
}

/// What the other agent said last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LastWord {
    /// It serves all pods.
    Served,
    /// Its end is closed: it has ended, or gave up.
    Gone,
}

/// An agent that is about to take the node over.
#[derive(Debug)]
pub(super) struct Successor {
    stream: UnixStream,
}

impl Successor {
    /// Sends the listening sockets. The lock must be free by now.
    pub(super) async fn give(self, sockets: Vec<OwnedFd>) -> io::Result<Self> {
        let stream = self.stream.into_std()?;
        let sent = spawn_blocking(move || {
            stream.set_nonblocking(false)?;
            stream.set_write_timeout(Some(SEND_WITHIN))?;
            for part in sockets.chunks(SOCKETS_PER_MESSAGE) {
                let number = u16::try_from(part.len()).unwrap_or(u16::MAX);
                let descriptors: Vec<_> = part.iter().map(|socket| socket.as_fd()).collect();
                send_sockets(&stream, &answering(SOCKETS, number), &descriptors)?;
            }
            // Only a check, so the low half of a larger number will do.
            let total = u16::try_from(sockets.len() & usize::from(u16::MAX)).unwrap_or(u16::MAX);
            send_sockets(&stream, &answering(END, total), &[])?;
            stream.set_nonblocking(true)?;
            Ok::<_, io::Error>(stream)
        });
        let stream = sent.await.map_err(io::Error::other)??;
        Ok(Self { stream: UnixStream::from_std(stream)? })
    }

    /// Waits for the other agent's word, or its end. Cancel safe.
    pub(super) async fn last_word(&mut self) -> LastWord {
        let mut word = [0];
        match self.stream.read(&mut word).await {
            Ok(1) if word == [SERVED] => LastWord::Served,
            Ok(_) | Err(_) => LastWord::Gone,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, net::TcpListener, os::fd::AsRawFd as _};

    use super::*;

    fn folder(test: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("mesh-agent-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn listeners(count: usize) -> Vec<OwnedFd> {
        let one = TcpListener::bind("127.0.0.1:0").unwrap();
        (0..count).map(|_| one.try_clone().unwrap().into()).collect()
    }

    #[tokio::test]
    async fn sockets_arrive_in_whatever_number_and_both_ends_hear_of_each_other() {
        let dir = folder("handover");
        let door = Door::open(&dir, "a/b").await.unwrap();
        for count in [0, 1, SOCKETS_PER_MESSAGE + 5] {
            let asked = dir.clone();
            let asking = spawn_blocking(move || TakenOver::ask(&asked, "a/b"));
            let successor = door.successor(&HandOvers::default()).await;
            let mut successor = successor.give(listeners(count)).await.unwrap();
            let mut taken = asking.await.unwrap().unwrap();
            let sockets = taken.take_sockets();
            assert_eq!(sockets.len(), count);
            assert!(
                sockets
                    .iter()
                    .all(|socket| TcpListener::from(socket.try_clone().unwrap()).local_addr().is_ok())
            );
            if count == 0 {
                drop(taken);
            } else {
                taken.served().unwrap();
                assert_eq!(successor.last_word().await, LastWord::Served);
                drop(taken);
            }
            assert_eq!(successor.last_word().await, LastWord::Gone);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[tokio::test]
    async fn another_version_and_nobody_are_told_apart_and_given_nothing() {
        let dir = folder("handover-versions");
        let nobody = TakenOver::ask(&dir, "n").unwrap_err();
        assert!(matches!(nobody, AskError::Nobody { .. }), "{nobody}");
        let door = Door::open(&dir, "n").await.unwrap();
        let counts = HandOvers::default();
        let mut other = asking();
        other[3] = VERSION + 1;
        let mut stream = StdStream::connect(path(&dir, "n")).unwrap();
        stream.write_all(&other).unwrap();
        let heard = timeout(Duration::from_millis(300), door.successor(&counts)).await;
        assert!(heard.is_err(), "it was taken for a successor");
        assert_eq!(counts.counts().last(), Some(&("refused", 1)));
        let mut frame = [0; FRAME];
        stream.read_exact(&mut frame).unwrap();
        assert!(matches!(Answer::read(&frame), Err(AskError::Refused)));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        assert_eq!(Answer::read(&answering(SOCKETS, 7)).unwrap(), Answer::Sockets(7));
        assert_eq!(Answer::read(&answering(END, 300)).unwrap(), Answer::End(300));
        let mut newer = answering(SOCKETS, 7);
        newer[3] = VERSION + 1;
        assert!(matches!(Answer::read(&newer), Err(AskError::Refused)));
        for broken in [&answering(9, 0)[..], &answering(END, 0)[..7], b"XYZ\x01\x02\0\0\0", b""] {
            assert!(matches!(Answer::read(broken), Err(AskError::Unreadable)), "{broken:?}");
        }
    }

    #[test]
    fn descriptors_that_were_received_are_closed_in_programs_started_later() {
        let (one, other) = StdStream::pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        send_sockets(&one, b"x", &[listener.as_fd()]).unwrap();
        let (_, received) = receive_sockets(&other, &mut [0; 1]).unwrap();
        let flags = nix::fcntl::fcntl(&received[0], nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert!(flags & nix::libc::FD_CLOEXEC != 0, "{}", received[0].as_raw_fd());
    }
}
