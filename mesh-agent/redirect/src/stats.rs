//! Owns reading what the programs count: counters, histograms, edges, events and their own run time.
//!
//! Invariant: readers never reset what another reader looks at.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::Arc,
};

use aya::maps::{Map, MapData, RingBuf};
use mesh_common::{
    event::{EVENT_CLOSE, EVENT_DENY, EVENT_FAIL, EVENT_OPEN, Event, SWITCH_CONNECTION_EVENTS},
    stats::{
        EdgeKey, EdgeVal, HIST_BUCKETS, HIST_LEN, Hist, Hook, OUTCOMES_MAX, Outcome, REASONS_MAX, Reason,
    },
};

use crate::{
    map::MapError,
    maps::Maps,
    node::{Node, lock, program_id},
    sys,
};

/// One counter that is not zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Where.
    pub hook: Hook,
    /// What.
    pub outcome: Outcome,
    /// Why.
    pub reason: Reason,
    /// How often, over all CPUs.
    pub count: u64,
}

/// One histogram; bucket `i` counts values `v` with floor(log2(v)) = `i`, and 0 in bucket 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// What it measures.
    pub hist: Hist,
    /// Counts, over all CPUs.
    pub buckets: Vec<u64>,
}

impl Histogram {
    /// Values counted.
    pub fn total(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Upper bound of the bucket the quantile `q` (0 to 1) falls into; `None` without values.
    pub fn quantile(&self, q: f64) -> Option<u64> {
        let total = self.total();
        let rank = (q * total as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        (total > 0).then(|| 2_u64.checked_pow(bucket as u32 + 1).map_or(u64::MAX, |bound| bound - 1))
    }
}

/// Run time of one program since statistics were last turned on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramRuns {
    /// Name; instances of `arrival` are summed.
    pub name: String,
    /// Instances summed.
    pub instances: u32,
    /// Runs measured.
    pub runs: u64,
    /// Nanoseconds spent in them.
    pub run_time_ns: u64,
}

/// Run-time statistics are on while this lives; they cost about 20 ns a call.
#[derive(Debug)]
pub struct RunStats {
    _on: OwnedFd,
}

impl RunStats {
    /// Turns them on, for all programs of the kernel.
    pub fn enable() -> std::io::Result<Self> {
        sys::enable_run_stats().map(|on| Self { _on: on })
    }
}

/// Reads the maps the programs count in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Stats {
    maps: Arc<Maps>,
}

impl Stats {
    /// Over the node's maps.
    pub fn new(maps: &Arc<Maps>) -> Self {
        Self { maps: Arc::clone(maps) }
    }

    /// All counters that are not zero, in the order of the array.
    pub fn counters(&self) -> Result<Vec<Counter>, MapError> {
        let mut counters = Vec::new();
        self.maps.counters.each(|index, values| {
            let count = values.iter().sum();
            if count > 0
                && let Some(counter) = counter_at(*index, count)
            {
                counters.push(counter);
            }
        })?;
        Ok(counters)
    }

    /// One counter.
    pub fn counter(&self, hook: Hook, outcome: Outcome, reason: Reason) -> Result<u64, MapError> {
        let index = mesh_common::stats::counter_index(hook, outcome, reason);
        Ok(self.maps.counters.get(&index)?.unwrap_or_default().iter().sum())
    }

    /// All histograms.
    pub fn histograms(&self) -> Result<Vec<Histogram>, MapError> {
        let mut all = vec![0_u64; HIST_LEN as usize];
        self.maps.hists.each(|index, values| {
            if let Some(slot) = all.get_mut(*index as usize) {
                *slot = values.iter().sum();
            }
        })?;
        let histograms = Hist::ALL.iter().zip(all.chunks(HIST_BUCKETS as usize));
        Ok(histograms.map(|(hist, buckets)| Histogram { hist: *hist, buckets: buckets.to_vec() }).collect())
    }

    /// All edges, each summed over the CPUs. The kernel drops the longest unused ones for new ones.
    pub fn edges(&self) -> Result<Vec<(EdgeKey, EdgeVal)>, MapError> {
        let mut edges = Vec::new();
        self.maps.edges.each(|key, values| edges.push((*key, sum(values))))?;
        Ok(edges)
    }

    /// Whether openings, closings and failures of connections are reported to the event ring. They cost each
    /// connection a few hundred nanoseconds, so only while somebody reads them. Refusals always are.
    pub fn report_connections(&self, report: bool) -> Result<(), MapError> {
        self.maps.switches.put(&0, &if report { SWITCH_CONNECTION_EVENTS } else { 0 })
    }
}

fn counter_at(index: u32, count: u64) -> Option<Counter> {
    let hook = Hook::from_index((index / (OUTCOMES_MAX * REASONS_MAX)) as u8)?;
    let outcome = Outcome::from_index((index / REASONS_MAX % OUTCOMES_MAX) as u8)?;
    let reason = Reason::from_index((index % REASONS_MAX) as u8)?;
    Some(Counter { hook, outcome, reason, count })
}

fn sum(values: &[EdgeVal]) -> EdgeVal {
    values.iter().fold(EdgeVal::ZERO, |total, value| EdgeVal {
        opened: total.opened + value.opened,
        closed: total.closed + value.closed,
        failed: total.failed + value.failed,
        bytes_tx: total.bytes_tx + value.bytes_tx,
        bytes_rx: total.bytes_rx + value.bytes_rx,
        retrans: total.retrans + value.retrans,
        connect_ns_sum: total.connect_ns_sum + value.connect_ns_sum,
        srtt_us_sum: total.srtt_us_sum + value.srtt_us_sum,
        last_ns: total.last_ns.max(value.last_ns),
    })
}

/// What an event reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// A connection was established.
    Open,
    /// A followed connection ended.
    Close,
    /// A connect or an arrival was refused.
    Deny,
    /// A connect failed.
    Fail,
}

impl EventKind {
    /// Of a record; `None` for kinds this build does not know.
    pub fn of(event: &Event) -> Option<Self> {
        Some(match event.kind {
            EVENT_OPEN => Self::Open,
            EVENT_CLOSE => Self::Close,
            EVENT_DENY => Self::Deny,
            EVENT_FAIL => Self::Fail,
            _ => return None,
        })
    }
}

/// An address and port of a shared struct.
pub fn socket_addr(addr: mesh_common::Addr, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::from(addr), port)
}

/// The event ring. One reader at a time sees each event.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events")
    }
}

/// The ring could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("open the event ring")]
pub struct EventsError {
    /// Cause.
    pub source: Box<aya::maps::MapError>,
}

impl Events {
    /// Opens the ring; readable when its descriptor is.
    pub fn open(maps: &Maps) -> Result<Self, EventsError> {
        let failed = |source| EventsError { source: Box::new(source) };
        let fd = maps.events.try_clone().map_err(|error| failed(aya::maps::MapError::IoError(error)))?;
        let map = Map::RingBuf(MapData::from_fd(fd).map_err(failed)?);
        Ok(Self { ring: RingBuf::try_from(map).map_err(failed)? })
    }

    /// The next event, if one waits. Never blocks.
    pub fn next_event(&mut self) -> Option<Event> {
        // A record of another size is of another build; it is skipped, not misread.
        loop {
            let record = self.ring.next()?;
            if let Some(event) = sys::read_pod::<Event>(&record) {
                return Some(event);
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Node {
    /// Run times of the programs while [`RunStats`] is alive (and of earlier such times).
    pub fn program_runs(&self) -> Vec<ProgramRuns> {
        let mut runs: Vec<ProgramRuns> =
            self.programs.iter().map(|program| runs_of(program.name, program.program.as_fd())).collect();
        let mut arrivals =
            ProgramRuns { name: crate::arrival::PROGRAM.to_owned(), instances: 0, runs: 0, run_time_ns: 0 };
        for enrolled in lock(&self.pods).values() {
            let one = runs_of(crate::arrival::PROGRAM, enrolled.program.as_fd());
            arrivals.instances += 1;
            arrivals.runs += one.runs;
            arrivals.run_time_ns += one.run_time_ns;
        }
        runs.push(arrivals);
        runs
    }

    /// Kernel ids of all programs of this node.
    pub(crate) fn program_ids(&self) -> Vec<u32> {
        let hooks = self.programs.iter().map(|program| program_id(program.program.as_fd()));
        hooks.collect()
    }
}

fn runs_of(name: &str, program: BorrowedFd<'_>) -> ProgramRuns {
    let (runs, run_time_ns) =
        sys::program_info(program).map_or((0, 0), |info| (info.run_cnt, info.run_time_ns));
    ProgramRuns { name: name.to_owned(), instances: 1, runs, run_time_ns }
}

#[cfg(test)]
mod tests {
    use mesh_common::stats::counter_index;

    use super::*;

    #[test]
    fn a_counter_index_leads_back_to_its_parts() {
        for hook in Hook::ALL {
            for outcome in Outcome::ALL {
                for reason in Reason::ALL {
                    let counter = counter_at(counter_index(*hook, *outcome, *reason), 1).unwrap();
                    assert_eq!((counter.hook, counter.outcome, counter.reason), (*hook, *outcome, *reason));
                }
            }
        }
    }

    #[test]
    fn a_quantile_is_the_upper_bound_of_its_bucket() {
        let mut buckets = vec![0; HIST_BUCKETS as usize];
        (buckets[3], buckets[10]) = (90, 10);
        let histogram = Histogram { hist: Hist::ConnectNs, buckets };
        assert_eq!(histogram.quantile(0.5), Some(15));
        assert_eq!(histogram.quantile(0.9), Some(15));
        assert_eq!(histogram.quantile(0.99), Some(2047));
        let empty = Histogram { hist: Hist::ConnectNs, buckets: vec![0; 64] };
        assert_eq!(empty.quantile(0.5), None);
    }
}
