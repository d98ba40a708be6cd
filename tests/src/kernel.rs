//! What a node's agent has in the kernel: counters, map entries and the identities of pinned maps and links.
//!
//! Read from the pins, so it works just as well while no agent runs.

mod loaded;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh_common::maps;
use mesh_common::stats::{COUNTERS_LEN, Hook, Outcome, Reason, counter_index};

pub use self::loaded::Loaded;
use crate::pod::Pod;
use crate::tool::Connection;
use crate::verdict::Failure;
use crate::waiting::eventually;
use crate::{bpf, clean};

/// How long it may take until an agent has cached a verdict.
const DIRECT_LIMIT: Duration = Duration::from_secs(5);

/// A pin could not be found or read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {path}")]
pub struct KernelError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Key and value of a map's entry, as the kernel holds them.
pub type Entry = (Vec<u8>, Vec<u8>);

/// The pins of one node.
#[derive(Debug, Clone)]
pub struct Kernel {
    node: String,
}

impl Kernel {
    pub(crate) fn of(node: &str) -> Self {
        Self { node: node.to_owned() }
    }

    /// The folder of the node's pins (of whatever ABI version: there is one at a time).
    ///
    /// # Errors
    /// When nothing is pinned.
    pub fn folder(&self) -> Result<PathBuf, KernelError> {
        let nodes: Vec<PathBuf> = clean::pin_directories().iter().map(|root| root.join(&self.node)).collect();
        let versions = nodes.iter().flat_map(|node| entries(node));
        versions.last().ok_or_else(|| KernelError {
            doing: "find a folder below",
            path: nodes.first().cloned().unwrap_or_default(),
            source: io::ErrorKind::NotFound.into(),
        })
    }

    /// The hooks' counters.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn counters(&self) -> Result<Counters, KernelError> {
        let (map, path) = self.map(maps::COUNTERS)?;
        let failed = |source| KernelError { doing: "read", path: path.clone(), source };
        let mut values = vec![0_u8; 8 * possible_cpus().map_err(failed)?];
        let mut counts = BTreeMap::new();
        for hook in Hook::ALL {
            for outcome in Outcome::ALL {
                for reason in Reason::ALL {
                    let index = counter_index(*hook, *outcome, *reason);
                    debug_assert!(index < COUNTERS_LEN);
                    bpf::lookup(map.as_fd(), &index.to_le_bytes(), &mut values).map_err(failed)?;
                    let count: u64 = values.chunks_exact(8).map(word).sum();
                    if count > 0 {
                        counts.insert(Decision(hook.as_str(), outcome.as_str(), reason.as_str()), count);
                    }
                }
            }
        }
        Ok(Counters { counts })
    }

    /// The entries of a hash map, as bytes of key and value. Entries that come or go meanwhile may be missed.
    ///
    /// # Errors
    /// When the map cannot be read.
    pub fn entries(&self, name: &str) -> Result<Vec<Entry>, KernelError> {
        let (map, path) = self.map(name)?;
        let failed = |source| KernelError { doing: "read", path: path.clone(), source };
        let info = bpf::map_info(map.as_fd()).map_err(failed)?;
        let mut found = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        let mut next = vec![0; info.key_size];
        while bpf::next_key(map.as_fd(), key.as_deref(), &mut next).map_err(failed)? {
            let mut value = vec![0; info.value_size];
            if bpf::lookup(map.as_fd(), &next, &mut value).map_err(failed)? {
                found.push((next.clone(), value));
            }
            key = Some(next.clone());
        }
        Ok(found)
    }

    /// The ids of the pinned maps, by name.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn map_ids(&self) -> Result<BTreeMap<String, u32>, KernelError> {
        self.pins("maps", |pin| bpf::map_info(pin.as_fd()).map(|info| info.id))
    }

    /// The ids of the pinned links, by name.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn link_ids(&self) -> Result<BTreeMap<String, u32>, KernelError> {
        self.pins("links", |pin| bpf::link_info(pin.as_fd()).map(|(link, _)| link))
    }

    /// The ids of the programs behind the pinned links, by the links' names.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn program_ids(&self) -> Result<BTreeMap<String, u32>, KernelError> {
        self.pins("links", |pin| bpf::link_info(pin.as_fd()).map(|(_, program)| program))
    }

    /// Dial `to` from `client`, a pod of this node, until a connection goes past the agent by a verdict, and
    /// return that connection. Nothing else may dial on the node meanwhile.
    ///
    /// # Errors
    /// When a connect fails, or none goes Direct in time.
    pub fn dial_directly(&self, client: &Pod, to: SocketAddr) -> Result<Connection, Failure> {
        let dial = || -> anyhow::Result<(Connection, Counters)> {
            let before = self.counters()?;
            let connection = client.tool()?.connect(to)?;
            connection.who()?;
            Ok((connection, self.counters()?.since(&before)))
        };
        let is_direct = |outcome: &anyhow::Result<(Connection, Counters)>| {
            outcome.as_ref().is_ok_and(|(_, counted)| counted.count("direct", "verdict_allow") > 0)
        };
        let (connection, _) = eventually(DIRECT_LIMIT, dial, is_direct)??;
        Ok(connection)
    }

    fn pins(
        &self,
        part: &str,
        id: impl Fn(&OwnedFd) -> io::Result<u32>,
    ) -> Result<BTreeMap<String, u32>, KernelError> {
        let mut ids = BTreeMap::new();
        for path in entries(&self.folder()?.join(part)) {
            let found = bpf::open_pin(&path).and_then(|pin| id(&pin));
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            ids.insert(name, found.map_err(|source| KernelError { doing: "open pin", path, source })?);
        }
        Ok(ids)
    }

    fn map(&self, name: &str) -> Result<(OwnedFd, PathBuf), KernelError> {
        let path = self.folder()?.join("maps").join(name);
        match bpf::open_pin(&path) {
            Ok(map) => Ok((map, path)),
            Err(source) => Err(KernelError { doing: "open pin", path, source }),
        }
    }
}

/// Hook, outcome and reason, by their names in metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Decision(&'static str, &'static str, &'static str);

/// The hooks' counters at one moment, or what they counted between two.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Counters {
    counts: BTreeMap<Decision, u64>,
}

impl Counters {
    /// How often any hook did `outcome` because of `reason`.
    #[must_use]
    pub fn count(&self, outcome: &str, reason: &str) -> u64 {
        self.sum(|Decision(_, o, r)| *o == outcome && *r == reason)
    }

    /// How often `hook` did `outcome` because of `reason`.
    #[must_use]
    pub fn count_at(&self, hook: &str, outcome: &str, reason: &str) -> u64 {
        self.sum(|Decision(h, o, r)| *h == hook && *o == outcome && *r == reason)
    }

    /// How often any hook did `outcome`.
    #[must_use]
    pub fn outcome(&self, outcome: &str) -> u64 {
        self.sum(|Decision(_, o, _)| *o == outcome)
    }

    /// What was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let earlier = |decision: &Decision| before.counts.get(decision).copied().unwrap_or(0);
        let grown = |(decision, count): (&Decision, &u64)| {
            let more = count.saturating_sub(earlier(decision));
            (more > 0).then_some((*decision, more))
        };
        Self { counts: self.counts.iter().filter_map(grown).collect() }
    }

    fn sum(&self, wanted: impl Fn(&Decision) -> bool) -> u64 {
        self.counts.iter().filter(|(decision, _)| wanted(decision)).map(|(_, count)| count).sum()
    }
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.counts.iter().map(|(Decision(h, o, r), count)| (format!("{h}/{o}/{r}"), count));
        f.debug_map().entries(lines).finish()
    }
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// Per-CPU maps hold one value for every CPU that could ever be there.
fn possible_cpus() -> io::Result<usize> {
    let ranges = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = ranges.trim().rsplit([',', '-']).next().and_then(|last| last.parse::<usize>().ok());
    last.map(|last| last + 1).ok_or_else(|| io::Error::other(format!("{ranges:?} is no list of CPUs")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(counts: &[(&'static str, &'static str, &'static str, u64)]) -> Counters {
        Counters { counts: counts.iter().map(|(h, o, r, count)| (Decision(h, o, r), *count)).collect() }
    }

    #[test]
    fn differences_hold_only_what_has_grown() {
        let before = counters(&[("connect4", "direct", "verdict_allow", 3), ("connect4", "deny", "l7", 1)]);
        let after = counters(&[
            ("connect4", "direct", "verdict_allow", 5),
            ("connect6", "direct", "verdict_allow", 1),
            ("connect4", "deny", "l7", 1),
        ]);
        let grown = after.since(&before);
        assert_eq!(grown.count("direct", "verdict_allow"), 3);
        assert_eq!(grown.count_at("connect6", "direct", "verdict_allow"), 1);
        assert_eq!(grown.outcome("deny"), 0);
    }

    #[test]
    fn words_are_little_endian() {
        assert_eq!(word(&[1, 2, 0, 0, 0, 0, 0, 0]), 0x201);
    }
}
