//! Owns CPU accounting: what the cgroups of a path used, and what the whole machine did meanwhile.
//!
//! This kernel charges softirq work (all of the network stack's receiving half) to the task it interrupts, so
//! the cgroups of client, server and agents hold nearly everything. What runs in ksoftirqd or interrupts the
//! idle task is missing there; the machine's own count is the cross-check.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// Reads the CPU time of a set of cgroups.
#[derive(Debug)]
pub(crate) struct Meter {
    groups: Vec<PathBuf>,
    tick: Duration,
}

/// One reading.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    at: Instant,
    groups: Duration,
    machine: Duration,
}

/// What happened between two readings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spent {
    /// CPU seconds of the path's cgroups.
    pub(crate) groups_s: f64,
    /// Busy CPU seconds of the machine.
    pub(crate) machine_s: f64,
    /// Length of the interval in seconds.
    pub(crate) wall_s: f64,
}

impl Meter {
    /// A meter of these cgroups, everything below them included.
    pub(crate) fn of<'a>(groups: impl IntoIterator<Item = &'a Path>) -> anyhow::Result<Self> {
        let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
        let tick = Duration::from_secs(1) / u32::try_from(ticks).context("an odd clock tick")?;
        Ok(Self { groups: groups.into_iter().map(Path::to_path_buf).collect(), tick })
    }

    /// Read it now.
    pub(crate) fn read(&self) -> anyhow::Result<Reading> {
        let groups = self.groups.iter().map(|group| usage(group)).sum::<anyhow::Result<Duration>>()?;
        let stat = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        let busy_ticks = busy(&stat).context("/proc/stat has no cpu line")?;
        let machine = self.tick * u32::try_from(busy_ticks).context("the machine is up for too long")?;
        Ok(Reading { at: Instant::now(), groups, machine })
    }

    /// What happened since `before`.
    pub(crate) fn since(&self, before: Reading) -> anyhow::Result<Spent> {
        let now = self.read()?;
        Ok(Spent {
            groups_s: now.groups.saturating_sub(before.groups).as_secs_f64(),
            machine_s: now.machine.saturating_sub(before.machine).as_secs_f64(),
            wall_s: (now.at - before.at).as_secs_f64(),
        })
    }
}

impl Spent {
    /// CPUs that others than the path kept busy: what makes a figure noisy. Includes ksoftirqd's part of the
    /// path's own work.
    pub(crate) fn foreign_cpus(&self) -> f64 {
        ((self.machine_s - self.groups_s) / self.wall_s.max(1e-9)).max(0.0)
    }
}

fn usage(group: &Path) -> anyhow::Result<Duration> {
    let path = group.join("cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let us = text.lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
    Ok(Duration::from_micros(us.with_context(|| format!("no usage_usec in {}", path.display()))?))
}

/// Busy ticks of the line `cpu  user nice system idle iowait irq softirq steal …`. Stolen time is not ours.
fn busy(stat: &str) -> Option<u64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, ..] = fields[..] else { return None };
    Some(user + nice + system + irq + softirq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_waiting_and_stolen_time_is_not_busy() {
        assert_eq!(busy("cpu  1 2 4 100 200 8 16 400 0 0\ncpu0 9 9 9 9 9 9 9 9 9 9\n"), Some(31));
        assert_eq!(busy("intr 5\n"), None);
    }

    #[test]
    fn foreign_load_is_what_the_groups_did_not_do() {
        let spent = Spent { groups_s: 1.5, machine_s: 2.5, wall_s: 2.0 };
        assert!((spent.foreign_cpus() - 0.5).abs() < 1e-9);
        let quiet = Spent { groups_s: 1.6, machine_s: 1.5, wall_s: 2.0 };
        assert!(quiet.foreign_cpus().abs() < 1e-9);
    }
}
