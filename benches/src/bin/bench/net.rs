//! Owns `bench net`: every path, several starts, interleaved, one table.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mesh_benches::load::task::{Answer, Task, Timing};
use mesh_tests::Link;

use crate::cost::Meter;
use crate::figures::{Figures, Metric, metrics_of, mib, tasks};
use crate::memory;
use crate::paths::{Expected, Lab, Path, Route};
use crate::rows::{self, Row};
use crate::session::Session;

/// More CPUs busy with other things than this, and the figures are called noisy.
const NOISY_CPUS: f64 = 0.25;

/// Options of `bench net`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Write the rows here, as a JSON array.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often to start all processes anew.
    #[arg(long, value_name = "N", default_value_t = 5)]
    starts: usize,
    /// Two starts with short windows: shows that everything runs, proves nothing.
    #[arg(long)]
    quick: bool,
    /// Only these paths.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Path::ALL)]
    paths: Vec<Path>,
    /// Milliseconds that count, for each measurement.
    #[arg(long, value_name = "MS", default_value_t = 1500)]
    window_ms: u64,
    /// Milliseconds before them.
    #[arg(long, value_name = "MS", default_value_t = 400)]
    warm_up_ms: u64,
    /// Connect pods by host routes instead of a bridge.
    #[arg(long)]
    routed: bool,
    /// Leave out the memory of an agent with 0 and 100 pods.
    #[arg(long)]
    no_memory: bool,
}

/// Run it; fails when a path could not be measured, not when a target is missed.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let (starts, window, warm_up) = if options.quick {
        (2, Duration::from_millis(400), Duration::from_millis(100))
    } else {
        (options.starts, Duration::from_millis(options.window_ms), Duration::from_millis(options.warm_up_ms))
    };
    ensure!(starts > 0, "--starts must be at least 1");
    let paths = with_baselines(&options.paths);
    let link = if options.routed { Link::Routed } else { Link::Bridged };
    let mut figures = Figures::default();
    let mut failures = Vec::new();
    let mut lab = Lab::build(&paths, link)?;
    for start in 0..starts {
        eprintln!("start {} of {starts}", start + 1);
        lab.restart_agents()?;
        // Another order each time: what warms up or wears out over a start must not fall on one path.
        let order = (0..paths.len()).map(|i| (i + start) % paths.len());
        for route in order.filter_map(|i| lab.routes().get(i)) {
            if let Err(error) = measure(&lab, route, &tasks(window, warm_up), &mut figures) {
                eprintln!("{}: {error:#}", route.path.name());
                failures.push(format!("{} in start {}: {error:#}", route.path.name(), start + 1));
            }
        }
    }
    drop(lab);
    let with_agents = paths.iter().any(|path| path.expected().is_some());
    if with_agents && !options.no_memory {
        let rounds = if options.quick { 1 } else { memory::ROUNDS };
        memory::measure(rounds, &mut figures).context("cannot measure the agent's memory")?;
    }
    let mut columns: Vec<_> =
        paths.iter().map(|path| (path.name(), path.baseline().map(Path::name))).collect();
    columns.push((memory::PATH, None));
    let rows = rows::rows(&figures, &columns);
    rows::print(&rows);
    print_notes(&figures, link, starts, window);
    if let Some(path) = &options.json {
        rows::write_json(&rows, path)?;
    }
    print_missed(&rows);
    if failures.is_empty() { Ok(()) } else { bail!("not everything was measured:\n{}", failures.join("\n")) }
}

/// The paths asked for and those they are compared with, each once, in table order.
fn with_baselines(asked: &[Path]) -> Vec<Path> {
    Path::ALL
        .into_iter()
        .filter(|path| asked.contains(path) || asked.iter().any(|other| other.baseline() == Some(*path)))
        .collect()
}

/// One start of one path: all tasks on fresh load processes.
fn measure(lab: &Lab, route: &Route, tasks: &[Task], figures: &mut Figures) -> anyhow::Result<()> {
    let mut session = Session::start(&route.client, &route.server, route.to)?;
    // The first connections of a pair go through the agent, which fills the verdict cache.
    let settle = Timing { warm_up_ms: 0, window_ms: 100 };
    session.perform(&Task::Requests { connections: 1, timing: settle })?;
    let agents = lab.agents_of(route);
    let before = agents.first().map(|agent| agent.decisions()).transpose()?;
    let meter = Meter::of(lab.cgroups_of(route)?)?;
    let name = route.path.name();
    for task in tasks {
        let reading = meter.read()?;
        let answer = session.perform(task)?;
        let spent = meter.since(reading)?;
        if let Answer::Requests { failed: failed @ 1.., first_failure, .. } = &answer {
            bail!("{failed} requests failed, the first: {}", first_failure.as_deref().unwrap_or("?"));
        }
        figures.note_foreign(&spent);
        for (metric, value) in metrics_of(task, &answer, &spent) {
            figures.push(name, metric, value);
        }
    }
    let rss = agents.iter().map(|agent| agent.rss()).collect::<anyhow::Result<Vec<u64>>>()?;
    if let Some(largest) = rss.into_iter().max() {
        figures.push(name, Metric::Rss, mib(largest));
    }
    if let (Some(agent), Some(before), Some(expected)) = (agents.first(), before, route.path.expected()) {
        let seen = agent.decisions()?.since(before);
        let taken = match expected {
            Expected::Direct => seen.direct > 0 && seen.proxy == 0,
            Expected::Proxy => seen.proxy > 0 && seen.direct == 0,
        };
        ensure!(taken && seen.other == 0, "connections did not go {expected:?}: the hooks counted {seen:?}");
    }
    Ok(())
}

fn print_notes(figures: &Figures, link: Link, starts: usize, window: Duration) {
    println!(
        "\n{starts} starts of all processes, {} ms a measurement, pods {}; value is the median, range is min-max.",
        window.as_millis(),
        if link == Link::Bridged { "on one bridge per node" } else { "behind host routes" },
    );
    println!(
        "ratio = value / baseline of this run: `none` for paths on one node, `none-remote` for paths over two.\n\
         CPU is that of client, server and agents, from their cgroups; rss is an agent's right after the load,\n\
         the larger of two."
    );
    if let (Some(median), Some((_, max))) = (figures.foreign().median(), figures.foreign().range()) {
        println!("CPUs busy with other things meanwhile: median {median:.2}, at most {max:.2}.");
        if median > NOISY_CPUS {
            println!("The machine was NOT quiet: do not trust these figures.");
        }
    }
}

fn print_missed(rows: &[Row]) {
    let missed: Vec<_> = rows.iter().filter(|row| row.met == Some(false)).collect();
    let promised = rows.iter().filter(|row| row.met.is_some()).count();
    println!("{} of {promised} targets met.", promised - missed.len());
    for row in missed {
        println!("missed: {} {} (wanted {})", row.path, row.metric, row.target.as_deref().unwrap_or("?"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_brings_its_baseline_along() {
        assert_eq!(with_baselines(&[Path::ProxyRemote]), [Path::NoneRemote, Path::ProxyRemote]);
        assert_eq!(with_baselines(&[Path::Direct, Path::None]), [Path::None, Path::Direct]);
    }
}
