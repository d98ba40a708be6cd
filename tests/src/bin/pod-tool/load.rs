//! Steady loads: many attempts at a given rate, counted by outcome.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_tests::protocol::{Exchange, Identity, Load, LoadReport};
use nix::errno::Errno;

use crate::objects::lock;

/// Latencies are kept up to this many; later ones overwrite the oldest.
const SAMPLES: usize = 200_000;

/// A load that runs, or has run.
#[derive(Debug)]
pub(crate) struct LoadRun {
    started: Instant,
    ends: Option<Instant>,
    stopped: AtomicBool,
    connects: AtomicU64,
    tally: Mutex<Tally>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Tally {
    ok: u64,
    failed: BTreeMap<String, u64>,
    answered_by: BTreeMap<String, u64>,
    samples_us: Vec<u32>,
    max_us: u32,
    last_ok: Option<Instant>,
    longest_gap: Duration,
    ended: Option<Instant>,
}

/// Why an attempt failed: the call and its error.
struct Refusal {
    call: &'static str,
    error: io::Error,
}

pub(crate) fn start(load: Load) -> Arc<LoadRun> {
    let started = Instant::now();
    let ends = (load.duration_ms > 0).then(|| started + Duration::from_millis(load.duration_ms));
    let run = Arc::new(LoadRun {
        started,
        ends,
        stopped: AtomicBool::new(false),
        connects: AtomicU64::new(0),
        tally: Mutex::default(),
        workers: Mutex::default(),
    });
    let load = Arc::new(load);
    for number in 0..load.workers.max(1) {
        let (run_of_worker, load) = (Arc::clone(&run), Arc::clone(&load));
        let worker = std::thread::spawn(move || work(&run_of_worker, &load, u64::from(number)));
        lock(&run.workers).push(worker);
    }
    run
}

impl LoadRun {
    pub(crate) fn report(&self) -> LoadReport {
        let tally = lock(&self.tally);
        let mut samples = tally.samples_us.clone();
        samples.sort_unstable();
        let quantile = |per_cent: usize| {
            let last = samples.len().saturating_sub(1);
            samples.get(last * per_cent / 100).map_or(0, |us| u64::from(*us))
        };
        let until = tally.ended.unwrap_or_else(Instant::now);
        let open_gap = until.saturating_duration_since(tally.last_ok.unwrap_or(self.started));
        LoadReport {
            ok: tally.ok,
            failed: tally.failed.clone(),
            answered_by: tally.answered_by.clone(),
            connects: self.connects.load(Ordering::Relaxed),
            p50_us: quantile(50),
            p99_us: quantile(99),
            max_us: u64::from(tally.max_us),
            longest_gap_ms: milliseconds(tally.longest_gap.max(open_gap)),
            elapsed_ms: milliseconds(until.saturating_duration_since(self.started)),
        }
    }

    /// Let running attempts end, then report.
    pub(crate) fn stop(&self) -> LoadReport {
        self.stopped.store(true, Ordering::Release);
        lock(&self.tally).ended.get_or_insert_with(Instant::now);
        for worker in std::mem::take(&mut *lock(&self.workers)) {
            if worker.join().is_err() {
                eprintln!("pod-tool: a load worker panicked");
            }
        }
        self.report()
    }

    fn is_over(&self) -> bool {
        let now = Instant::now();
        if self.ends.is_some_and(|ends| now >= ends) {
            lock(&self.tally).ended.get_or_insert(now);
            return true;
        }
        self.stopped.load(Ordering::Acquire)
    }

    fn note_ok(&self, server: Option<String>, began: Instant) {
        let now = Instant::now();
        let us = u32::try_from(now.duration_since(began).as_micros()).unwrap_or(u32::MAX);
        let mut tally = lock(&self.tally);
        let gap = now.saturating_duration_since(tally.last_ok.unwrap_or(self.started));
        tally.longest_gap = tally.longest_gap.max(gap);
        tally.last_ok = Some(now);
        tally.max_us = tally.max_us.max(us);
        if tally.samples_us.len() < SAMPLES {
            tally.samples_us.push(us);
        } else {
            let at = usize::try_from(tally.ok).unwrap_or(0) % SAMPLES;
            tally.samples_us[at] = us;
        }
        tally.ok += 1;
        if let Some(server) = server {
            *tally.answered_by.entry(server).or_default() += 1;
        }
    }

    fn note_failure(&self, refusal: &Refusal) {
        let error = match refusal.error.raw_os_error() {
            Some(code) => format!("{:?}", Errno::from_raw(code)),
            None => refusal.error.to_string(),
        };
        *lock(&self.tally).failed.entry(format!("{}: {error}", refusal.call)).or_default() += 1;
    }
}

fn work(run: &LoadRun, load: &Load, number: u64) {
    let workers = u64::from(load.workers.max(1));
    let mut kept = None;
    let mut turn = number;
    while !run.is_over() {
        if load.per_second > 0 {
            let due = Duration::from_nanos(turn.saturating_mul(1_000_000_000) / u64::from(load.per_second));
            let due = run.started + due;
            // In short steps, so that a stop does not wait for a slow rate.
            while Instant::now() < due && !run.is_over() {
                let left = due.saturating_duration_since(Instant::now());
                std::thread::sleep(left.min(Duration::from_millis(50)));
            }
            if run.is_over() {
                break;
            }
        }
        let index = usize::try_from(turn).unwrap_or(0) % load.targets.len().max(1);
        let Some(target) = load.targets.get(index) else { break };
        let began = Instant::now();
        match attempt(run, load, *target, &mut kept) {
            Ok(server) => run.note_ok(server, began),
            Err(refusal) => {
                run.note_failure(&refusal);
                kept = None;
            }
        }
        turn += workers;
    }
}

fn attempt(
    run: &LoadRun,
    load: &Load,
    target: SocketAddr,
    kept: &mut Option<TcpStream>,
) -> Result<Option<String>, Refusal> {
    let timeout = Duration::from_millis(load.timeout_ms.max(1));
    let connect = || {
        run.connects.fetch_add(1, Ordering::Relaxed);
        open(target, timeout).map_err(|error| Refusal { call: "connect", error })
    };
    match load.exchange {
        Exchange::ConnectOnly => connect().map(|_| None),
        Exchange::ConnectAndAsk => ask(&mut connect()?).map(Some),
        Exchange::KeepOpen => {
            let stream = match kept {
                Some(stream) => stream,
                None => kept.insert(connect()?),
            };
            ask(stream).map(Some)
        }
    }
}

fn open(target: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn ask(stream: &mut TcpStream) -> Result<String, Refusal> {
    stream.write_all(b"who\n").map_err(|error| Refusal { call: "send", error })?;
    let mut line = String::new();
    // Nothing is lost with the buffer: the server only speaks when asked.
    BufReader::with_capacity(512, &*stream)
        .read_line(&mut line)
        .map_err(|error| Refusal { call: "recv", error })?;
    if line.is_empty() {
        return Err(Refusal { call: "recv", error: io::Error::other("closed without an answer") });
    }
    let identity: Identity = serde_json::from_str(&line)
        .map_err(|error| Refusal { call: "parse", error: io::Error::other(error) })?;
    Ok(identity.server)
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
