//! Owns the client half: performs tasks and measures them.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use hdrhistogram::Histogram;

use super::http;
use super::task::{Answer, ECHO, REQUEST, RESPONSE, STREAM, StreamHeader, StreamTotals, Task, Timing};

/// A peer that does not answer for so long never will; the task fails instead of hanging.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A path that fails so often is broken; its rate would mean nothing.
const FAILURES_MAX: u64 = 100;

/// Connects of which one time is taken: long enough for the clock, short enough to be undisturbed mostly.
const UDP_BATCH: u64 = 500;

/// Written after the window, so that the receiver's window surely lies within the sender's time.
const MARGIN: Duration = Duration::from_millis(50);

/// Performs tasks against one address, or several in turn.
#[derive(Debug)]
pub struct Client {
    to: Vec<SocketAddr>,
    next: AtomicUsize,
    open: Option<Pushing>,
    held: Vec<TcpStream>,
}

/// The connection of [`Task::Open`].
#[derive(Debug)]
struct Pushing {
    stream: TcpStream,
}

/// Perform the tasks that come on standard input, one JSON line each, and answer each by a line.
///
/// # Errors
/// When a standard stream fails or a line is no task.
pub fn obey(to: Vec<SocketAddr>) -> anyhow::Result<()> {
    let mut client = Client::new(to);
    for line in io::stdin().lock().lines() {
        let line = line.context("cannot read standard input")?;
        let task: Task = serde_json::from_str(&line).with_context(|| format!("not a task: {line}"))?;
        let answer =
            client.perform(&task).unwrap_or_else(|error| Answer::Failed { error: format!("{error:#}") });
        writeln!(io::stdout().lock(), "{}", serde_json::to_string(&answer)?)?;
    }
    Ok(())
}

impl Client {
    /// A client of the server (or services) at `to`, of which there must be one at least.
    #[must_use]
    pub fn new(to: Vec<SocketAddr>) -> Self {
        Self { to, next: AtomicUsize::new(0), open: None, held: Vec::new() }
    }

    /// Do one task.
    ///
    /// # Errors
    /// When a connection cannot be made or breaks. Single failed requests are counted, not errors.
    pub fn perform(&mut self, task: &Task) -> anyhow::Result<Answer> {
        match task {
            Task::Rtt { timing } => self.rtt(*timing),
            Task::Stream { write_bytes, connections, timing } => {
                self.stream(*write_bytes, *connections, *timing)
            }
            Task::Requests { connections, timing } => self.requests(*connections, *timing),
            Task::Http { connections, rate, timing } => {
                http::requests(|| self.connect(), *connections, *rate, *timing)
            }
            Task::Open => {
                let mut stream = self.connect()?;
                stream.write_all(&[ECHO])?;
                expect_byte(&mut stream, ECHO)?;
                self.open = Some(Pushing { stream });
                Ok(Answer::Done)
            }
            Task::Push { bytes, write_bytes } => {
                self.open.as_mut().context("no connection is open")?.push(*bytes, *write_bytes)?;
                Ok(Answer::Done)
            }
            Task::Hold { connections } => {
                for _ in 0..*connections {
                    let mut stream = self.connect()?;
                    stream.write_all(&[ECHO])?;
                    expect_byte(&mut stream, ECHO)?;
                    self.held.push(stream);
                }
                Ok(Answer::Done)
            }
            Task::Close => {
                self.open = None;
                self.held.clear();
                Ok(Answer::Done)
            }
            Task::UdpConnects { count } => udp_connects(&self.to, *count),
        }
    }

    fn connect(&self) -> anyhow::Result<TcpStream> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let to = self.to.get(turn % self.to.len().max(1)).context("no address to connect to")?;
        let stream = TcpStream::connect(to).with_context(|| format!("cannot connect to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(stream)
    }

    fn rtt(&self, timing: Timing) -> anyhow::Result<Answer> {
        let mut stream = self.connect()?;
        let start = Instant::now();
        let (opens, closes) = (start + timing.warm_up(), start + timing.whole());
        let mut times = histogram()?;
        let mut total = 0;
        let mut sent = Instant::now();
        while sent < closes {
            stream.write_all(&[ECHO])?;
            expect_byte(&mut stream, ECHO)?;
            let now = Instant::now();
            total += 1;
            if sent >= opens {
                times.saturating_record(nanos(now - sent));
            }
            sent = now;
        }
        Ok(Answer::Rtt { total, p50_ns: times.value_at_quantile(0.5), p99_ns: times.value_at_quantile(0.99) })
    }

    fn stream(&self, write_bytes: usize, connections: usize, timing: Timing) -> anyhow::Result<Answer> {
        let totals = in_parallel(connections, || self.one_stream(write_bytes, timing))?;
        let bits = |t: &StreamTotals| {
            if t.window_ns == 0 { 0.0 } else { t.window_bytes as f64 * 8e9 / t.window_ns as f64 }
        };
        Ok(Answer::Stream {
            total_bytes: totals.iter().map(|t| t.total_bytes).sum(),
            bits_per_s: totals.iter().map(bits).sum(),
        })
    }

    fn one_stream(&self, write_bytes: usize, timing: Timing) -> anyhow::Result<StreamTotals> {
        let mut stream = self.connect()?;
        stream.write_all(&[STREAM])?;
        let header = StreamHeader { warm_up_ms: timing.warm_up_ms, window_ms: timing.window_ms };
        stream.write_all(&header.to_bytes())?;
        let block = vec![0x5a; write_bytes.max(1)];
        let closes = Instant::now() + timing.whole() + MARGIN;
        while Instant::now() < closes {
            stream.write_all(&block)?;
        }
        stream.shutdown(Shutdown::Write)?;
        let mut totals = [0; StreamTotals::LEN];
        stream.read_exact(&mut totals).context("the receiver did not tell its totals")?;
        Ok(StreamTotals::from_bytes(totals))
    }

    fn requests(&self, connections: usize, timing: Timing) -> anyhow::Result<Answer> {
        let parts = in_parallel(connections, || self.some_requests(timing))?;
        let mut times = histogram()?;
        let (mut total, mut failed, mut first_failure) = (0, 0, None);
        for part in parts {
            times.add(&part.times).context("histograms differ")?;
            total += part.total;
            failed += part.failed;
            first_failure = first_failure.or(part.first_failure);
        }
        Ok(Answer::Requests {
            total,
            failed,
            first_failure,
            per_s: times.len() as f64 * 1000.0 / f64::from(timing.window_ms.max(1)),
            p50_ns: times.value_at_quantile(0.5),
            p99_ns: times.value_at_quantile(0.99),
        })
    }

    fn some_requests(&self, timing: Timing) -> anyhow::Result<Requests> {
        let mut part = Requests { times: histogram()?, total: 0, failed: 0, first_failure: None };
        let start = Instant::now();
        let (opens, closes) = (start + timing.warm_up(), start + timing.whole());
        loop {
            let began = Instant::now();
            if began >= closes {
                return Ok(part);
            }
            match self.one_request() {
                Ok(()) => {
                    part.total += 1;
                    let ended = Instant::now();
                    // What ends in the window counts: a request that straddles an edge counts at one of them.
                    if ended >= opens && ended < closes {
                        part.times.saturating_record(nanos(ended - began));
                    }
                }
                Err(error) => {
                    part.failed += 1;
                    part.first_failure.get_or_insert(format!("{error:#}"));
                    if part.failed >= FAILURES_MAX {
                        bail!("{FAILURES_MAX} requests failed, the first: {:?}", part.first_failure);
                    }
                }
            }
        }
    }

    fn one_request(&self) -> anyhow::Result<()> {
        let mut stream = self.connect()?;
        stream.write_all(&[REQUEST])?;
        expect_byte(&mut stream, RESPONSE)?;
        let after = stream.read(&mut [0]).context("no end of the connection")?;
        ensure!(after == 0, "more than one byte came back");
        Ok(())
    }
}

/// What one thread's requests came to.
struct Requests {
    times: Histogram<u64>,
    total: u64,
    failed: u64,
    first_failure: Option<String>,
}

impl Pushing {
    /// Echoed, so its end proves that every byte went both ways.
    fn push(&mut self, bytes: u64, write_bytes: usize) -> anyhow::Result<()> {
        let mut reader = self.stream.try_clone()?;
        let write_bytes = write_bytes.max(1);
        let writes = bytes.div_ceil(write_bytes as u64);
        let expected = writes * write_bytes as u64;
        std::thread::scope(|scope| {
            let drain = scope.spawn(move || -> anyhow::Result<()> {
                let mut buffer = vec![0; 64 * 1024];
                let mut left = expected;
                while left > 0 {
                    let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                    let length = reader.read(&mut buffer[..want]).context("the echo stopped")?;
                    ensure!(length > 0, "the echo ended {left} bytes early");
                    left -= length as u64;
                }
                Ok(())
            });
            let block = vec![0x5a; write_bytes];
            for _ in 0..writes {
                self.stream.write_all(&block)?;
            }
            drain.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

fn udp_connects(to: &[SocketAddr], count: u64) -> anyhow::Result<Answer> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let mut targets = to.iter().cycle();
    let mut batch = || -> anyhow::Result<u64> {
        let start = Instant::now();
        for _ in 0..UDP_BATCH {
            let target = targets.next().context("no address to connect to")?;
            socket.connect(target).with_context(|| format!("cannot connect to {target} by UDP"))?;
        }
        Ok(nanos(start.elapsed()))
    };
    // Every target once before anything counts.
    for _ in 0..(to.len() as u64).div_ceil(UDP_BATCH) {
        batch()?;
    }
    let mut times = histogram()?;
    for _ in 0..count.div_ceil(UDP_BATCH).max(1) {
        times.saturating_record(batch()?);
    }
    Ok(Answer::UdpConnects { ns_per_connect: times.value_at_quantile(0.5) as f64 / UDP_BATCH as f64 })
}

fn in_parallel<T: Send>(
    threads: usize,
    work: impl Fn() -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(&work)).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn expect_byte(stream: &mut TcpStream, wanted: u8) -> anyhow::Result<()> {
    let mut got = [0];
    stream.read_exact(&mut got).context("no answer")?;
    ensure!(got[0] == wanted, "{:?} came back instead of {:?}", char::from(got[0]), char::from(wanted));
    Ok(())
}

/// 1 ns to 60 s at three significant digits.
pub(super) fn histogram() -> anyhow::Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).context("cannot make a histogram")
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
