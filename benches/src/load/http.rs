//! Owns HTTP of the load program: keep-alive connections of a client, and the server that answers them.
//!
//! Each is one thread and one `epoll`: with a thread for each of 32 connections, half of what is measured would be the load
//! program's own switching. Neither is a HTTP implementation: requests and responses are known beforehand, and only what
//! a proxy may change of them (the head's fields) is read.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use hdrhistogram::Histogram;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::task::{Answer, Timing};

/// Bytes of every response's body.
pub const BODY_BYTES: usize = 1024;

/// More than any head with its body; a response that does not fit is a mistake.
const MESSAGE_MAX: usize = 16 * 1024;

const REQUEST: &[u8] = b"GET /load HTTP/1.1\r\nhost: load\r\nuser-agent: load\r\naccept: */*\r\n\r\n";

/// What a client waits at most for something to happen: a path that is quiet for so long is broken.
const QUIET_LIMIT_MS: u16 = 10_000;

const EVENTS: usize = 128;

/// Token of the timer; connections have their index.
const TIMER: u64 = u64::MAX;

/// Token of the server's listener.
const LISTENER: u64 = u64::MAX;

/// Bytes of one message as they come in.
#[derive(Debug)]
struct Incoming {
    bytes: Box<[u8]>,
    filled: usize,
}

impl Incoming {
    fn new() -> Self {
        Self { bytes: vec![0; MESSAGE_MAX].into_boxed_slice(), filled: 0 }
    }

    /// Reads what is there; `false` at the end of the stream, an error when a message is too long.
    fn fill(&mut self, stream: &mut TcpStream) -> io::Result<bool> {
        let free = &mut self.bytes[self.filled..];
        if free.is_empty() {
            return Err(io::Error::other("a message is too long"));
        }
        match stream.read(free) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.filled += count;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Length of the head with its empty line, once it is complete.
    fn head(&self) -> Option<usize> {
        self.bytes[..self.filled].windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4)
    }
}

/// Serves [`BODY_BYTES`] to whoever asks for anything, until killed.
///
/// # Errors
/// When listening or waiting fails. Broken connections are dropped.
pub fn serve(listener: &TcpListener) -> anyhow::Result<()> {
    let mut response = format!(
        "HTTP/1.1 200 OK\r\nserver: load\r\ncontent-type: text/plain\r\ncontent-length: {BODY_BYTES}\r\n\r\n"
    )
    .into_bytes();
    response.resize(response.len() + BODY_BYTES, b'.');
    listener.set_nonblocking(true)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut connections: Vec<Option<(TcpStream, Incoming)>> = Vec::new();
    let mut events = [EpollEvent::empty(); EVENTS];
    loop {
        let count = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            other => other.context("cannot wait for events")?,
        };
        for event in &events[..count] {
            if event.data() == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                    let free = connections.iter().position(Option::is_none).unwrap_or(connections.len());
                    epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, free as u64))?;
                    if free == connections.len() {
                        connections.push(None);
                    }
                    connections[free] = Some((stream, Incoming::new()));
                }
                continue;
            }
            let Some(place) = usize::try_from(event.data()).ok().and_then(|i| connections.get_mut(i)) else {
                continue;
            };
            if let Some((stream, incoming)) = place
                && !answer(stream, incoming, &response)
            {
                *place = None;
            }
        }
    }
}

/// Answers every whole request that is there; `false` when the connection is over.
fn answer(stream: &mut TcpStream, incoming: &mut Incoming, response: &[u8]) -> bool {
    if !matches!(incoming.fill(stream), Ok(true)) {
        return false;
    }
    while let Some(head) = incoming.head() {
        incoming.bytes.copy_within(head..incoming.filled, 0);
        incoming.filled -= head;
        // A client that does not read has no more than one response under way: it always fits the socket's buffer.
        if stream.write_all(response).is_err() {
            return false;
        }
    }
    true
}

/// Requests of so many connections: one after the other as fast as they are answered, or `rate` each second whether or not those
/// before are answered; then the time a request waits for a connection counts.
///
/// # Errors
/// When a connection cannot be made or breaks, or a response is no `200` of the right length.
pub fn requests(
    connect: impl Fn() -> anyhow::Result<TcpStream>,
    connections: usize,
    rate: Option<u32>,
    timing: Timing,
) -> anyhow::Result<Answer> {
    let mut load = Load::open(connect, connections)?;
    match rate {
        None => load.closed_loop(timing),
        Some(rate) => load.open_loop(rate, timing),
    }
}

/// A connection of a client.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    incoming: Incoming,
    /// Since when its request is due; `None`: it is idle.
    due: Option<Instant>,
}

#[derive(Debug)]
struct Load {
    epoll: Epoll,
    connections: Vec<Connection>,
}

/// What a run came to so far.
#[derive(Debug)]
struct Tally {
    times: Histogram<u64>,
    total: u64,
    opens: Instant,
    closes: Instant,
}

impl Tally {
    fn new(timing: Timing) -> anyhow::Result<Self> {
        let start = Instant::now();
        let times = super::client::histogram()?;
        Ok(Self { times, total: 0, opens: start + timing.warm_up(), closes: start + timing.whole() })
    }

    /// A request that was due then is answered now.
    fn answered(&mut self, due: Instant, now: Instant) {
        self.total += 1;
        if now >= self.opens && now < self.closes {
            self.times.saturating_record(super::client::nanos(now - due));
        }
    }

    fn answer(self, timing: Timing) -> Answer {
        Answer::Requests {
            total: self.total,
            failed: 0,
            first_failure: None,
            per_s: self.times.len() as f64 * 1000.0 / f64::from(timing.window_ms.max(1)),
            p50_ns: self.times.value_at_quantile(0.5),
            p99_ns: self.times.value_at_quantile(0.99),
        }
    }
}

impl Load {
    fn open(connect: impl Fn() -> anyhow::Result<TcpStream>, connections: usize) -> anyhow::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let connections = (0..connections.max(1))
            .map(|index| {
                let stream = connect()?;
                stream.set_nonblocking(true)?;
                epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
                Ok(Connection { stream, incoming: Incoming::new(), due: None })
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { epoll, connections })
    }

    fn wait<'e>(&self, events: &'e mut [EpollEvent; EVENTS]) -> anyhow::Result<&'e [EpollEvent]> {
        loop {
            match self.epoll.wait(events, EpollTimeout::from(QUIET_LIMIT_MS)) {
                Err(nix::Error::EINTR) => {}
                Ok(0) => bail!("no answer within {QUIET_LIMIT_MS} ms"),
                other => return Ok(&events[..other.context("cannot wait for answers")?]),
            }
        }
    }

    fn closed_loop(&mut self, timing: Timing) -> anyhow::Result<Answer> {
        let mut tally = Tally::new(timing)?;
        for connection in &mut self.connections {
            connection.ask(Instant::now())?;
        }
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            for event in self.wait(&mut events)? {
                let connection = &mut self.connections[usize::try_from(event.data())?];
                let Some(due) = connection.read()? else { continue };
                let now = Instant::now();
                tally.answered(due, now);
                if now >= tally.closes {
                    return Ok(tally.answer(timing));
                }
                connection.ask(now)?;
            }
        }
    }

    fn open_loop(&mut self, rate: u32, timing: Timing) -> anyhow::Result<Answer> {
        ensure!(rate > 0, "a rate of no requests is none");
        let step = Duration::from_secs(1) / rate;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)?;
        timer.set(Expiration::Interval(TimeSpec::from_duration(step)), TimerSetTimeFlags::empty())?;
        self.epoll.add(timer.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, TIMER))?;
        let mut tally = Tally::new(timing)?;
        let mut next_due = Instant::now() + step;
        let mut idle: Vec<usize> = (0..self.connections.len()).collect();
        let mut waiting: VecDeque<Instant> = VecDeque::new();
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            for event in self.wait(&mut events)? {
                let now = Instant::now();
                if event.data() == TIMER {
                    let mut expired = [0; 8];
                    nix::unistd::read(timer.as_fd(), &mut expired)?;
                    for _ in 0..u64::from_ne_bytes(expired) {
                        waiting.push_back(next_due);
                        next_due += step;
                    }
                } else {
                    let index = usize::try_from(event.data())?;
                    let Some(due) = self.connections[index].read()? else { continue };
                    tally.answered(due, now);
                    idle.push(index);
                }
                if now >= tally.closes {
                    return Ok(tally.answer(timing));
                }
                while let Some(index) = idle.pop_if(|_| !waiting.is_empty()) {
                    if let Some(due) = waiting.pop_front() {
                        self.connections[index].ask(due)?;
                    }
                }
            }
        }
    }
}

impl Connection {
    /// Sends a request that was due then.
    fn ask(&mut self, due: Instant) -> anyhow::Result<()> {
        self.stream.write_all(REQUEST).context("cannot send a request")?;
        self.due = Some(due);
        Ok(())
    }

    /// Reads what is there. Once a response is complete: since when its request was due.
    fn read(&mut self) -> anyhow::Result<Option<Instant>> {
        let open = self.incoming.fill(&mut self.stream).context("a response broke off")?;
        ensure!(open, "the server ended a connection");
        let Some(head) = self.incoming.head() else { return Ok(None) };
        let text = &self.incoming.bytes[..head];
        ensure!(
            text.starts_with(b"HTTP/1.1 200 "),
            "not a good response: {:?}",
            String::from_utf8_lossy(text)
        );
        if self.incoming.filled < head + BODY_BYTES {
            return Ok(None);
        }
        ensure!(
            self.incoming.filled == head + BODY_BYTES && self.due.is_some(),
            "more than one response: {:?}",
            String::from_utf8_lossy(text)
        );
        self.incoming.filled = 0;
        Ok(self.due.take())
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener).unwrap());
        addr
    }

    #[test]
    fn connections_are_kept_and_every_request_is_answered() {
        let addr = server();
        let timing = Timing { warm_up_ms: 20, window_ms: 100 };
        let connect = || Ok(TcpStream::connect(addr)?);
        let answer = requests(connect, 8, None, timing).unwrap();
        let Answer::Requests { total, failed, per_s, p50_ns, p99_ns, .. } = answer else {
            panic!("{answer:?}")
        };
        assert!(total > 8 && failed == 0 && per_s > 0.0 && p50_ns <= p99_ns);
    }

    #[test]
    fn a_rate_is_kept_and_no_more() {
        let addr = server();
        let timing = Timing { warm_up_ms: 100, window_ms: 500 };
        let connect = || Ok(TcpStream::connect(addr)?);
        let Answer::Requests { total, .. } = requests(connect, 4, Some(1000), timing).unwrap() else {
            panic!("another answer")
        };
        // Those due in 600 ms and not one more.
        assert!((1..=600).contains(&total), "{total}");
    }

    #[test]
    fn a_response_that_is_not_200_fails_the_task() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n").unwrap();
            stream
        });
        let timing = Timing { warm_up_ms: 0, window_ms: 1000 };
        let error = requests(|| Ok(TcpStream::connect(addr)?), 1, None, timing).unwrap_err();
        assert!(format!("{error:#}").contains("503"), "{error:#}");
    }
}
