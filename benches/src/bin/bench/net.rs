//! Owns `bench net`: every path, several starts, interleaved, one table.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use mesh_benches::load::task::{Answer, Task, Timing};
use mesh_tests::Link;

use crate::agents::{Decisions, MeshNode};
use crate::cost::{Meter, Spent};
use crate::envoy;
use crate::figures::{Figures, Metric, metrics_of, mib, tasks};
use crate::memory;
use crate::paths::{Expected, Lab, Path, Route};
use crate::rows::{self, Column, Row};
use crate::session::Session;

/// More CPUs busy with other things than this during a measurement, and it is repeated.
const NOISY_CPUS: f64 = 0.15;

/// How long the machine is watched before a measurement.
const LOOK: Duration = Duration::from_millis(100);

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
    /// Rounds of each start: in each, every measurement is made once on every path.
    #[arg(long, value_name = "N", default_value_t = 2)]
    rounds: usize,
    /// Milliseconds that count, for each measurement.
    #[arg(long, value_name = "MS", default_value_t = 700)]
    window_ms: u64,
    /// Milliseconds before them.
    #[arg(long, value_name = "MS", default_value_t = 300)]
    warm_up_ms: u64,
    /// Connect pods by host routes instead of a bridge.
    #[arg(long)]
    routed: bool,
    /// How long, over the whole run, to wait for a quiet machine and to repeat what was disturbed.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    patience: u64,
    /// Let the scheduler place load client and server, which are otherwise kept on CPU 0 and CPU 1.
    #[arg(long)]
    unpinned: bool,
    /// Leave out the memory of an agent with 0 and 100 pods, and of idle tunnelled connections.
    #[arg(long)]
    no_memory: bool,
    /// An Envoy to compare with, as a pair of sidecars with mutual TLS. [default: `envoy` on PATH, if any]
    #[arg(long, value_name = "PATH")]
    peer_envoy: Option<PathBuf>,
}

/// Run it; fails when a path could not be measured, not when a target is missed.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let ms = Duration::from_millis;
    let (starts, rounds, window, warm_up) = if options.quick {
        (2, 1, ms(300), ms(100))
    } else {
        (options.starts, options.rounds, ms(options.window_ms), ms(options.warm_up_ms))
    };
    ensure!(starts > 0 && rounds > 0, "--starts and --rounds must be at least 1");
    let envoy = envoy::find(options.peer_envoy.as_deref())?;
    let mut paths = with_baselines(&options.paths);
    if envoy.is_none() && paths.contains(&Path::EnvoyTcpMtls) {
        eprintln!("no Envoy on PATH and none by --peer-envoy: no peer column");
        paths.retain(|path| *path != Path::EnvoyTcpMtls);
    }
    let link = if options.routed { Link::Routed } else { Link::Bridged };
    let mut runner = Runner {
        tasks: tasks(window, warm_up),
        pinned: !options.unpinned,
        patience: Duration::from_secs(if options.quick { 0 } else { options.patience }),
        figures: Figures::default(),
    };
    let mut failures = Vec::new();
    let mut lab = Lab::build(&paths, link, envoy.as_deref())?;
    for start in 0..starts {
        eprintln!("start {} of {starts}", start + 1);
        lab.restart_proxies()?;
        for (path, error) in runner.start(&lab, start, rounds) {
            failures.push(format!("{} in start {}: {error:#}", path.name(), start + 1));
        }
    }
    drop(lab);
    let mut figures = runner.figures;
    let with_agents = paths.iter().any(|path| path.expected().is_some());
    if with_agents && !options.no_memory {
        let rounds = if options.quick { 1 } else { memory::ROUNDS };
        memory::measure(rounds, &mut figures).context("cannot measure the agent's memory")?;
        if paths.contains(&Path::MtlsRemote) {
            memory::measure_tunnelled(rounds, &mut figures)
                .context("cannot measure the memory of idle tunnelled connections")?;
        }
    }
    let mut columns: Vec<Column> = paths
        .iter()
        .map(|path| Column {
            path: path.name(),
            baseline: path.baseline().map(Path::name),
            peer: path.peer().filter(|peer| paths.contains(peer)).map(Path::name),
        })
        .collect();
    columns.push(Column { path: memory::PATH, baseline: None, peer: None });
    let rows = rows::rows(&figures, &columns);
    rows::print(&rows);
    rows::print_peers(&rows);
    print_notes(
        &figures,
        &format!(
            "{starts} starts of all processes, {rounds} rounds each, {} ms a measurement",
            window.as_millis()
        ),
        options,
    );
    if let Some(path) = &options.json {
        rows::write_json(&rows, path)?;
    }
    print_missed(&rows);
    if failures.is_empty() { Ok(()) } else { bail!("not everything was measured:\n{}", failures.join("\n")) }
}

/// The paths asked for and those they are compared with, a peer's among them, each once, in table order.
fn with_baselines(asked: &[Path]) -> Vec<Path> {
    let compared = |other: &Path, path| other.baseline() == Some(path) || other.peer() == Some(path);
    Path::ALL
        .into_iter()
        .filter(|path| asked.contains(path) || asked.iter().any(|other| compared(other, *path)))
        .collect()
}

/// Measures paths and keeps the figures.
#[derive(Debug)]
struct Runner {
    tasks: [Task; 5],
    pinned: bool,
    /// What is left of it.
    patience: Duration,
    figures: Figures,
}

/// A path with its load processes, during one start.
#[derive(Debug)]
struct Running<'a> {
    route: &'a Route,
    session: Session,
    meter: Meter,
    agents: Vec<&'a MeshNode>,
    failed: Option<anyhow::Error>,
}

impl Runner {
    /// One start: fresh load processes on every path, then every measurement on one path after the other, so
    /// that what is compared was measured within seconds. Returns the paths that failed.
    fn start(&mut self, lab: &Lab, start: usize, rounds: usize) -> Vec<(Path, anyhow::Error)> {
        let mut failures = Vec::new();
        let mut running = Vec::new();
        for route in lab.routes() {
            match Running::start(lab, route, self.pinned) {
                Ok(path) => running.push(path),
                Err(error) => failures.push((route.path, error)),
            }
        }
        for round in 0..rounds {
            for task in self.tasks.clone() {
                // Another order each time: what wears off or builds up must not always fall on one path.
                let first = (start + round) % running.len().max(1);
                let (tail, head) = running.split_at_mut(first);
                for path in head.iter_mut().chain(tail).filter(|path| path.failed.is_none()) {
                    if let Err(error) = self.measure(path, &task) {
                        path.failed = Some(error);
                    }
                }
            }
        }
        for mut path in running {
            let name = path.route.path;
            match path.failed.take().map_or_else(|| path.rss(), Err) {
                Ok(Some(rss)) => self.figures.push(name.name(), Metric::Rss, mib(rss)),
                Ok(None) => {}
                Err(error) => failures.push((name, error)),
            }
        }
        for (path, error) in &failures {
            eprintln!("{}: {error:#}", path.name());
        }
        failures
    }

    fn measure(&mut self, path: &mut Running<'_>, task: &Task) -> anyhow::Result<()> {
        let before = path.decisions()?;
        let (answer, spent) = self.undisturbed(&mut path.session, task, &path.meter)?;
        path.went_as_expected(before)?;
        if let Answer::Requests { failed: failed @ 1.., first_failure, .. } = &answer {
            bail!("{failed} requests failed, the first: {}", first_failure.as_deref().unwrap_or("?"));
        }
        self.figures.note_foreign(&spent);
        for (metric, value) in metrics_of(task, &answer, &spent) {
            self.figures.push(path.route.path.name(), metric, value);
        }
        Ok(())
    }

    /// Do a task on a quiet machine, again when something else ran meanwhile, as long as patience lasts.
    fn undisturbed(
        &mut self,
        session: &mut Session,
        task: &Task,
        meter: &Meter,
    ) -> anyhow::Result<(Answer, Spent)> {
        loop {
            let began = Instant::now();
            while self.patience > began.elapsed() {
                let idle = meter.read()?;
                std::thread::sleep(LOOK);
                if meter.since(idle)?.foreign_cpus() <= NOISY_CPUS {
                    break;
                }
            }
            let waited = began.elapsed();
            let reading = meter.read()?;
            let answer = session.perform(task)?;
            let spent = meter.since(reading)?;
            if spent.foreign_cpus() <= NOISY_CPUS || self.patience.is_zero() {
                self.patience = self.patience.saturating_sub(waited.saturating_sub(LOOK));
                return Ok((answer, spent));
            }
            self.patience = self.patience.saturating_sub(began.elapsed());
        }
    }
}

impl<'a> Running<'a> {
    fn start(lab: &'a Lab, route: &'a Route, pinned: bool) -> anyhow::Result<Self> {
        let mut session = Session::start(&route.client, &route.server, &[route.to], pinned)?;
        // The first connections of a pair go through the agent, which fills the verdict cache.
        let settle = Timing { warm_up_ms: 0, window_ms: 100 };
        session.perform(&Task::Requests { connections: 1, timing: settle })?;
        let meter = Meter::of(lab.cgroups_of(route)?)?;
        Ok(Self { route, session, meter, agents: lab.agents_of(route), failed: None })
    }

    /// What the connect hooks of the client's node decided so far, if there are any.
    fn decisions(&self) -> anyhow::Result<Option<Decisions>> {
        self.agents.first().map(|agent| agent.decisions()).transpose()
    }

    /// Fails unless every connection since `before` took the path it is counted for.
    fn went_as_expected(&self, before: Option<Decisions>) -> anyhow::Result<()> {
        let (Some(now), Some(before), Some(expected)) =
            (self.decisions()?, before, self.route.path.expected())
        else {
            return Ok(());
        };
        let seen = now.since(before);
        let taken = match expected {
            Expected::Direct => seen.direct > 0 && seen.proxy == 0,
            Expected::Proxy => seen.proxy > 0 && seen.direct == 0,
        };
        ensure!(taken && seen.other == 0, "connections did not go {expected:?}: the hooks counted {seen:?}");
        Ok(())
    }

    /// Resident memory of the larger agent or peer's proxy on the way, if there is one.
    fn rss(&self) -> anyhow::Result<Option<u64>> {
        let mut sizes = self.agents.iter().map(|agent| agent.rss()).collect::<anyhow::Result<Vec<u64>>>()?;
        if let Some(envoys) = self.route.envoys() {
            sizes.extend(envoys.rss()?);
        }
        Ok(sizes.into_iter().max())
    }
}

fn print_notes(figures: &Figures, amount: &str, options: &Options) {
    println!(
        "\n{amount}; pods {}, load client and server {}; value is the median, range is min-max.",
        if options.routed { "behind host routes" } else { "on one bridge per node" },
        if options.unpinned { "wherever the scheduler puts them" } else { "on a CPU of their own" },
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
    let behind: Vec<_> = rows
        .iter()
        .filter_map(|row| Some((row, row.peer.as_ref().filter(|peer| peer.met == Some(false))?)))
        .collect();
    let promises = |row: &Row| {
        usize::from(row.met.is_some()) + usize::from(row.peer.as_ref().is_some_and(|peer| peer.met.is_some()))
    };
    let promised: usize = rows.iter().map(promises).sum();
    println!("{} of {promised} targets met.", promised - missed.len() - behind.len());
    for row in missed {
        println!("missed: {} {} (wanted {})", row.path, row.metric, row.target.as_deref().unwrap_or("?"));
    }
    for (row, peer) in behind {
        let wanted = peer.target.as_deref().unwrap_or("?");
        println!("missed: {} {} (wanted {wanted} of {})", row.path, row.metric, peer.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_brings_its_baseline_along() {
        assert_eq!(with_baselines(&[Path::ProxyRemote]), [Path::NoneRemote, Path::ProxyRemote]);
        assert_eq!(with_baselines(&[Path::Direct, Path::None]), [Path::None, Path::Direct]);
        assert_eq!(
            with_baselines(&[Path::MtlsRemote]),
            [Path::NoneRemote, Path::MtlsRemote, Path::EnvoyTcpMtls]
        );
    }
}
