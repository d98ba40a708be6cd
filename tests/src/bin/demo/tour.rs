//! `cargo xtask demo --tour`: the tasks of Istio's documentation, one after the other.

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use mesh_tests::bookinfo::tour::{Finding, Pace, STEPS, Step, Tour};
use mesh_tests::bookinfo::{App, AppOptions};
use mesh_tests::{World, clean};

use mesh_tests::signals::stop_signals;

/// Goes through all steps, or through one; exit status 1 when something was not as documented.
pub(crate) fn main(step: Option<&str>) -> ExitCode {
    match run(step) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(step: Option<&str>) -> anyhow::Result<bool> {
    if let Some(missing) = mesh_tests::require::missing() {
        bail!("cannot run here: {missing}");
    }
    let steps: Vec<&Step> = STEPS.iter().filter(|known| step.is_none_or(|name| known.name == name)).collect();
    if steps.is_empty() {
        let names: Vec<&str> = STEPS.iter().map(|step| step.name).collect();
        bail!("there is no step {}; the steps are {}", step.unwrap_or_default(), names.join(", "));
    }
    // Before any thread starts, so that all of them leave these signals to the waiting one.
    let stop = stop_signals()?;
    for remains in clean::leftovers(false) {
        eprintln!("removed {remains} of an earlier run");
    }
    say("two nodes, fourteen pods, a controller and two agents are coming up …")?;
    let world = World::with_nodes("demo", &["a", "b"]).context("cannot make the nodes")?;
    let app = App::start(&world, AppOptions { visits: 0, httpbin: true })?;
    let tour = Tour::new(&app, Pace::DOCUMENTED)?;
    let mut missed = 0;
    for (number, step) in (1..).zip(&steps) {
        if let Ok(signal) = stop.try_recv() {
            bail!("{signal}: cleaning up");
        }
        say(&format!("\n{number}. {} ({})", step.title, step.name))?;
        say(&format!("   apply {}", step.manifests.join(" ")))?;
        let began = Instant::now();
        let findings = tour.take(step)?;
        for Finding { expected, measured, holds } in &findings {
            say(&format!(
                "   {} {expected}\n        measured {measured}",
                if *holds { "ok  " } else { "MISS" }
            ))?;
        }
        missed += findings.iter().filter(|finding| !finding.holds).count();
        say(&format!("   {:.1} s", began.elapsed().as_secs_f64()))?;
    }
    if missed > 0 {
        app.save_logs();
    }
    let outcome =
        if missed == 0 { "all as documented".to_owned() } else { format!("{missed} not as documented") };
    say(&format!("\n{} steps: {outcome}", steps.len()))?;
    Ok(missed == 0)
}

fn say(line: &str) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")
}
