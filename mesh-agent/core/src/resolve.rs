//! Names whose addresses are endpoints: which are asked for, when again, and what services make of the answers.
//!
//! Invariants:
//! - A failure takes nothing away: the last good addresses of a name stay until DNS says others.
//! - Nobody is asked more often than each [`TTL_MIN`], and after failures less and less often.
//! - Names and addresses are bounded; what is over is counted, never half-done.
//!
//! Not here: asking (`mesh-proxy`), and who publishes the world that comes of it (`mesh-agent`).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use crate::snapshot::{Endpoint, Resolution, Service};

/// Most names that one agent resolves.
pub const NAMES_MAX: usize = 4096;
/// Most addresses of one name and family: what fits into a reply of 1232 bytes, and as many again.
pub const ADDRESSES_MAX: usize = 128;
/// Answers are good for at least this long, whatever DNS says.
pub const TTL_MIN: Duration = Duration::from_secs(1);
/// And for at most this long.
pub const TTL_MAX: Duration = Duration::from_secs(60 * 60);
/// Wait after the first failure; it doubles with each, up to the mesh's refresh time.
const BACKOFF_MIN: Duration = Duration::from_secs(1);

/// Why a name has no new addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Failure {
    /// There is no such name.
    NoSuchName,
    /// It has no address of either family.
    NoAddress,
    /// No server answered in time.
    TimedOut,
    /// No server could be reached.
    Unreachable,
    /// The servers could not say.
    ServerFailure,
    /// What came was no answer.
    BadReply,
    /// No server is known.
    NoServer,
    /// It is no name that DNS can be asked for.
    BadName,
}

impl Failure {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::NoSuchName,
        Self::NoAddress,
        Self::TimedOut,
        Self::Unreachable,
        Self::ServerFailure,
        Self::BadReply,
        Self::NoServer,
        Self::BadName,
    ];

    /// As metrics and people have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NoSuchName => "no_such_name",
            Self::NoAddress => "no_address",
            Self::TimedOut => "timed_out",
            Self::Unreachable => "unreachable",
            Self::ServerFailure => "server_failure",
            Self::BadReply => "bad_reply",
            Self::NoServer => "no_server",
            Self::BadName => "bad_name",
        }
    }
}

/// What DNS said of a name in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// The addresses, in its order; none: it has none of this family.
    pub addrs: Vec<IpAddr>,
    /// How long they are good for; zero: DNS does not say.
    pub ttl: Duration,
}

/// What came of asking for a name, by family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// IPv4.
    pub v4: Result<Said, Failure>,
    /// IPv6.
    pub v6: Result<Said, Failure>,
}

/// One name, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameState {
    /// The name.
    pub name: Arc<str>,
    /// Its last good addresses.
    pub addrs: Vec<IpAddr>,
    /// Why the last attempts failed, and how many in a row; `None` after a success and before the first answer.
    pub failing: Option<(Failure, u32)>,
}

#[derive(Clone, Debug, Default)]
struct Known {
    v4: Vec<IpAddr>,
    v6: Vec<IpAddr>,
    /// When to ask again; `None` while somebody asks.
    due: Option<Duration>,
    failing: Option<(Failure, u32)>,
}

impl Known {
    fn addrs(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.v4.iter().chain(&self.v6).copied()
    }
}

/// The names that services need.
#[derive(Clone, Debug, Default)]
pub struct Names {
    known: BTreeMap<Arc<str>, Known>,
    left_out: usize,
}

impl Names {
    /// Takes over which names are needed from now on. `now` is a monotonic time.
    pub fn need(&mut self, names: &BTreeSet<Arc<str>>, now: Duration) {
        self.known.retain(|name, _| names.contains(name));
        self.left_out = 0;
        for name in names {
            if self.known.contains_key(name) {
                continue;
            }
            if self.known.len() >= NAMES_MAX {
                self.left_out += 1;
                continue;
            }
            self.known.insert(Arc::clone(name), Known { due: Some(now), ..Known::default() });
        }
    }

    /// Up to `limit` names to ask for now. None of them is due again before its answer was [taken](Self::take) in.
    pub fn due(&mut self, now: Duration, limit: usize) -> Vec<Arc<str>> {
        let due = self.known.iter_mut().filter(|(_, known)| known.due.is_some_and(|due| due <= now));
        let take = |(name, known): (&Arc<str>, &mut Known)| {
            known.due = None;
            Arc::clone(name)
        };
        due.take(limit).map(take).collect()
    }

    /// When the next name is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.known.values().filter_map(|known| known.due).min()
    }

    /// Takes in what came of asking; whether the addresses are others than before.
    ///
    /// `refresh` is how long answers without a time are good for, and the longest wait after failures.
    pub fn take(&mut self, name: &str, answer: Answer, now: Duration, refresh: Duration) -> bool {
        // Nobody needs it any more.
        let Some(known) = self.known.get_mut(name) else { return false };
        let found = |said: &Result<Said, Failure>| said.as_ref().is_ok_and(|said| !said.addrs.is_empty());
        if !found(&answer.v4) && !found(&answer.v6) {
            let failure = match (&answer.v4, &answer.v6) {
                (Err(failure), _) | (_, Err(failure)) => *failure,
                (Ok(_), Ok(_)) => Failure::NoAddress,
            };
            let count = known.failing.map_or(0, |(_, count)| count).saturating_add(1);
            known.failing = Some((failure, count));
            let longest = refresh.max(BACKOFF_MIN);
            known.due = Some(now + BACKOFF_MIN.saturating_mul(1 << (count - 1).min(16)).min(longest));
            return false;
        }
        let ttl = |said: &Result<Said, Failure>| {
            let said = said.as_ref().ok().filter(|said| !said.addrs.is_empty())?;
            Some(if said.ttl.is_zero() { refresh } else { said.ttl })
        };
        let ttl = [ttl(&answer.v4), ttl(&answer.v6)].into_iter().flatten().min().unwrap_or(refresh);
        // Of a family that could not be asked for what was known stays.
        let mut changed = false;
        for (own, said) in [(&mut known.v4, answer.v4), (&mut known.v6, answer.v6)] {
            if let Ok(mut said) = said {
                let mut seen = BTreeSet::new();
                said.addrs.retain(|addr| seen.insert(*addr));
                said.addrs.truncate(ADDRESSES_MAX);
                changed |= *own != said.addrs;
                *own = said.addrs;
            }
        }
        known.failing = None;
        known.due = Some(now + ttl.clamp(TTL_MIN, TTL_MAX));
        changed
    }

    /// Why a name's last attempts failed, and how many in a row.
    pub fn failing(&self, name: &str) -> Option<(Failure, u32)> {
        self.known.get(name)?.failing
    }

    /// All names, in order.
    pub fn states(&self) -> impl Iterator<Item = NameState> + '_ {
        self.known.iter().map(|(name, known)| NameState {
            name: Arc::clone(name),
            addrs: known.addrs().collect(),
            failing: known.failing,
        })
    }

    /// Names that are needed and not asked for, because there are too many.
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// The service with what DNS says added to its endpoints; `None` if it asks nothing of DNS.
    pub fn fill(&self, service: &Service) -> Option<Service> {
        let Resolution::Dns(dns) = &service.resolution else { return None };
        let mut filled = service.clone();
        for (at, port) in filled.ports.iter_mut().enumerate() {
            for name in &dns.names {
                let (Some(known), Some(target)) = (self.known.get(&name.host), name.ports.get(at)) else {
                    continue;
                };
                let many = if dns.one_at_a_time { 1 } else { usize::MAX };
                let addrs = known.v4.iter().take(many).chain(known.v6.iter().take(many));
                port.endpoints.extend(addrs.map(|addr| Endpoint {
                    addr: *addr,
                    port: *target,
                    workload: None,
                    ready: true,
                    hostname: None,
                    traits: name.traits.clone(),
                }));
            }
            // Stable: of equal places the one that a resource lists comes first, and stays.
            port.endpoints.sort_by_key(|endpoint| (endpoint.addr, endpoint.port));
            port.endpoints.dedup_by_key(|endpoint| (endpoint.addr, endpoint.port));
        }
        Some(filled)
    }
}

#[cfg(test)]
mod tests;
