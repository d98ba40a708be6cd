//! Owns the agents of a run: restarting them, asking the kernel which way connections went, and memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use aya::maps::{Map, MapData, PerCpuArray};
use mesh_common::maps::COUNTERS;
use mesh_common::stats::{Hook, Outcome, Reason, counter_index};
use mesh_tests::{Agent, Node};

/// Where agents of the harness pin their maps.
const PINS: &str = "/sys/fs/bpf/nodemesh";

/// How long an agent may take to end once nothing runs through it.
const END_LIMIT: Duration = Duration::from_secs(20);

/// The place of one agent: it is restarted during a run.
#[derive(Debug)]
pub(crate) struct MeshNode {
    arguments: Vec<&'static str>,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    agent: Agent,
    node_name: String,
}

/// How often the connect hooks decided what, since the maps were made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decisions {
    pub(crate) direct: u64,
    pub(crate) proxy: u64,
    pub(crate) other: u64,
}

impl MeshNode {
    /// An agent with these arguments more than usual; not started.
    pub(crate) fn new(arguments: &[&'static str]) -> Self {
        Self { arguments: arguments.to_vec(), running: None }
    }

    /// End the running agent, if any, and start another.
    pub(crate) fn restart(&mut self, node: &Node) -> anyhow::Result<()> {
        if let Some(running) = self.running.take() {
            running.agent.terminate(END_LIMIT)?;
        }
        let agent = node
            .agent()
            .args(&self.arguments)
            .start()
            .with_context(|| format!("cannot start the agent of {}", node.name()))?;
        self.running = Some(Running { agent, node_name: node.full_name().to_owned() });
        Ok(())
    }

    /// What the connect hooks of this node decided so far.
    pub(crate) fn decisions(&self) -> anyhow::Result<Decisions> {
        decisions(&pins_of(&self.running()?.node_name)?.join("maps").join(COUNTERS))
    }

    /// Resident memory of the process, in bytes.
    pub(crate) fn rss(&self) -> anyhow::Result<u64> {
        rss(self.running()?.agent.pid())
    }

    /// How often the process has allocated so far.
    pub(crate) fn allocations(&self) -> anyhow::Result<f64> {
        Ok(self.running()?.agent.metric(&["mesh_heap_allocations_total "])?)
    }

    /// The running agent.
    pub(crate) fn agent(&self) -> anyhow::Result<&Agent> {
        Ok(&self.running()?.agent)
    }

    fn running(&self) -> anyhow::Result<&Running> {
        self.running.as_ref().context("the agent has not been started")
    }
}

impl Decisions {
    /// What was decided since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            direct: self.direct - before.direct,
            proxy: self.proxy - before.proxy,
            other: self.other - before.other,
        }
    }
}

/// The versioned folder of a node's pins.
pub(crate) fn pins_of(node_name: &str) -> anyhow::Result<PathBuf> {
    let parent = Path::new(PINS).join(node_name);
    let entries = fs::read_dir(&parent).with_context(|| format!("cannot list {}", parent.display()))?;
    let versions: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    match &versions[..] {
        [version] => Ok(version.clone()),
        _ => bail!("{} pinned versions in {}, one expected", versions.len(), parent.display()),
    }
}

fn decisions(pin: &Path) -> anyhow::Result<Decisions> {
    let data = MapData::from_pin(pin).with_context(|| format!("cannot open {}", pin.display()))?;
    let counters: PerCpuArray<MapData, u64> = Map::PerCpuArray(data).try_into()?;
    let count = |outcome: Outcome| -> anyhow::Result<u64> {
        let mut sum = 0;
        for hook in [Hook::Connect4, Hook::Connect6] {
            for reason in Reason::ALL {
                let per_cpu = counters.get(&counter_index(hook, outcome, *reason), 0)?;
                sum += per_cpu.iter().sum::<u64>();
            }
        }
        Ok(sum)
    };
    // Bypass is left out: the agent's own dials count there.
    Ok(Decisions {
        direct: count(Outcome::Direct)?,
        proxy: count(Outcome::Proxy)?,
        other: count(Outcome::Deny)? + count(Outcome::Error)?,
    })
}

/// VmRSS of a process, in bytes.
pub(crate) fn rss(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kib: Option<u64> = text
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
    Ok(kib.with_context(|| format!("no VmRSS in {path}"))? * 1024)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_process_has_resident_memory() {
        assert!(super::rss(std::process::id()).unwrap() > 100 * 1024);
    }
}
