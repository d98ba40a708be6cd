//! Owns `bench net` and `bench http`: every path, several starts, interleaved, one table.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mesh_tests::Link;

use crate::envoy;
use crate::figures::{Figures, http_tasks, net_tasks};
use crate::memory;
use crate::paths::{Lab, Path, Traffic};
use crate::rows::{self, Column, Row};
use crate::runner::{NOISY_CPUS, Runner};

/// Options of `bench net` and `bench http`.
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
    /// Only these paths, and what they are compared with. [default: all of the bench]
    #[arg(long, value_enum, value_delimiter = ',')]
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
pub(crate) fn run(traffic: Traffic, options: &Options) -> anyhow::Result<()> {
    let ms = Duration::from_millis;
    let (starts, rounds, window, warm_up) = if options.quick {
        (2, 1, ms(300), ms(100))
    } else {
        (options.starts, options.rounds, ms(options.window_ms), ms(options.warm_up_ms))
    };
    ensure!(starts > 0 && rounds > 0, "--starts and --rounds must be at least 1");
    let envoy = envoy::find(options.peer_envoy.as_deref())?;
    let mut paths = with_baselines(traffic, &options.paths)?;
    if envoy.is_none() && paths.iter().any(|path| path.is_peer()) {
        eprintln!("no Envoy on PATH and none by --peer-envoy: no peer column");
        paths.retain(|path| !path.is_peer());
    }
    let link = if options.routed { Link::Routed } else { Link::Bridged };
    let mut runner = Runner {
        tasks: match traffic {
            Traffic::Tcp => net_tasks(window, warm_up),
            Traffic::Http => http_tasks(window, warm_up),
        },
        pinned: !options.unpinned,
        patience: Duration::from_secs(if options.quick { 0 } else { options.patience }),
        figures: Figures::default(),
    };
    let mut failures = Vec::new();
    let mut lab = Lab::build(traffic, &paths, link, envoy.as_deref())?;
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
    if traffic == Traffic::Tcp && with_agents && !options.no_memory {
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

/// The paths asked for (none: all) and those they are compared with, a peer's among them, each once, in table order.
fn with_baselines(traffic: Traffic, asked: &[Path]) -> anyhow::Result<Vec<Path>> {
    let all = Path::all(traffic);
    if let Some(other) = asked.iter().find(|path| !all.contains(path)) {
        let names: Vec<_> = all.iter().map(|path| path.name()).collect();
        bail!("--paths: {} is not a path of this bench, which has {}", other.name(), names.join(", "));
    }
    let compared = |other: &Path, path| other.baseline() == Some(path) || other.peer() == Some(path);
    let is_wanted =
        |path| asked.is_empty() || asked.contains(&path) || asked.iter().any(|other| compared(other, path));
    Ok(all.iter().copied().filter(|path| is_wanted(*path)).collect())
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
        let net = |asked: &[Path]| with_baselines(Traffic::Tcp, asked).unwrap();
        assert_eq!(net(&[Path::ProxyRemote]), [Path::NoneRemote, Path::ProxyRemote]);
        assert_eq!(net(&[Path::Direct, Path::None]), [Path::None, Path::Direct]);
        assert_eq!(net(&[Path::MtlsRemote]), [Path::NoneRemote, Path::MtlsRemote, Path::EnvoyTcpMtls]);
        assert_eq!(net(&[]), Path::all(Traffic::Tcp));
    }

    #[test]
    fn a_path_of_another_bench_is_an_error_that_names_those_there_are() {
        let error = with_baselines(Traffic::Http, &[Path::Direct]).unwrap_err().to_string();
        assert!(error.contains("direct") && error.contains("http-remote"), "{error}");
    }
}
