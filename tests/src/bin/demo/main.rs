//! `cargo xtask demo`: two nodes, a dozen pods of Bookinfo, a real controller and two real agents, steady traffic, a live
//! view.

mod checks;
mod cluster;
mod tour;
mod view;

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser;
use mesh_tests::bookinfo::{App, AppOptions};
use mesh_tests::signals::stop_signals;
use mesh_tests::{World, clean};

use checks::Checks;
use view::View;

/// How often the view is refreshed.
const REFRESH: Duration = Duration::from_secs(1);

/// How long running requests get to end before the totals are judged.
const SETTLE: Duration = Duration::from_millis(500);

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask demo",
    about = "Two nodes and a Bookinfo-shaped application in network namespaces, meshed by a real controller and two real agents"
)]
struct Arguments {
    /// End by itself after so many seconds; exit status 0 if all traffic checks held.
    #[arg(long = "for", value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Visits of the product page per second, over all visitors.
    #[arg(long, default_value_t = 40)]
    visits: u32,
    /// On a real Kubernetes of two nodes instead.
    #[arg(long, conflicts_with = "tour")]
    cluster: bool,
    /// Go through the tasks of Istio's documentation, say what came of each, and end; exit status 0 if all went as documented.
    #[arg(long, conflicts_with = "seconds")]
    tour: bool,
    /// Only this step of the tour.
    #[arg(long, value_name = "NAME", requires = "tour")]
    step: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.tour {
        return tour::main(arguments.step.as_deref());
    }
    if arguments.cluster {
        return cluster::main(arguments.seconds, arguments.visits);
    }
    match run(&arguments) {
        Ok(checks) => {
            drop(writeln!(io::stdout(), "{checks}"));
            // Without `--for` the demo ends by Ctrl-C, which is no failure in itself.
            if checks.hold() || arguments.seconds.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<Checks> {
    if let Some(missing) = mesh_tests::require::missing() {
        anyhow::bail!("cannot run here: {missing}");
    }
    let stop = stop_signals()?;
    for remains in clean::leftovers(false) {
        eprintln!("removed {remains} of an earlier run");
    }
    let world = World::with_nodes("demo", &["a", "b"]).context("cannot make the nodes")?;
    let app = App::start(&world, AppOptions { visits: arguments.visits, httpbin: false })?;
    let mut view = View::new(&app, io::stdout().is_terminal());
    let ends = arguments.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    while ends.is_none_or(|ends| Instant::now() < ends) {
        match stop.recv_timeout(REFRESH) {
            Ok(signal) => {
                // The terminal may be what went away.
                drop(writeln!(io::stdout(), "\n{signal}: cleaning up"));
                break;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the signal thread has ended"),
        }
        app.check_processes()?;
        view.refresh(&app)?;
    }
    app.end_visits(SETTLE)?;
    let checks = Checks::of(&app)?;
    if !checks.hold() {
        app.save_logs();
    }
    Ok(checks)
}
