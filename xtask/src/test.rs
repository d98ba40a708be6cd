//! Owns `cargo xtask test`: the tiers, their order, time-outs and the report at the end.
//!
//! Invariants: every tier ends with one line saying what it did or why it did not run; with
//! `MESH_TESTS_REQUIRE=1` a tier that cannot run is a failure; the last line is `N passed, N failed`.

mod report;
mod tier;

use std::{
    env,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};

use crate::{
    cluster::{self, kubernetes},
    libtest::Tally,
    process::{self, Ended},
    setup::{self, Need},
    suites::{self, Built, Place, Suite},
    tidy, vm,
    workspace::Workspace,
};
use report::{Outcome, Report};
use tier::{Tier, own_kernel_lacks};

/// Everything together must end before a CI job of ninety minutes is cut off without a report. It is meant to take less than
/// sixty; the rest is for slow machines.
const TOTAL: Duration = Duration::from_mins(84);

/// Arguments of `cargo xtask test`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask test                          every tier this machine can run
  cargo xtask test --tier unit              one tier (repeat --tier for more)
  cargo xtask test --tier netns reconnect   tests of a tier whose name holds `reconnect`
  cargo xtask test --list                   tiers, whether they can run, and every test

Environment: MESH_TESTS_REQUIRE=1 makes a tier that cannot run a failure.")]
pub(crate) struct TestArguments {
    /// Run this tier only.
    #[arg(long = "tier", value_name = "NAME")]
    tiers: Vec<Tier>,
    /// Print tiers and tests instead of running them.
    #[arg(long)]
    list: bool,
    /// Run only tests whose name contains this.
    filter: Option<String>,
}

/// `cargo xtask test`. An error, after the report, if anything failed.
pub(crate) fn run(workspace: &Workspace, arguments: &TestArguments) -> anyhow::Result<()> {
    let chosen = |tier: &Tier| {
        if arguments.tiers.is_empty() { tier.is_default() } else { arguments.tiers.contains(tier) }
    };
    let tiers: Vec<Tier> = Tier::value_variants().iter().copied().filter(chosen).collect();
    if arguments.list {
        return list(workspace, &tiers, arguments.filter.as_deref());
    }
    let required = env::var_os("MESH_TESTS_REQUIRE").is_some_and(|value| value == "1");
    let mut report = Report::default();
    let end = Instant::now() + TOTAL;
    let filter = arguments.filter.as_deref();
    let mut build = Build::default();
    for tier in tiers {
        // First, since it may install things and fetch a kernel: that is no part of the tier's time.
        let unavailable = tier.unavailable(workspace);
        if unavailable.is_none() && tier != Tier::Tidy {
            build.run_once(workspace, &mut report);
        }
        heading(&tier.name());
        let begun = Instant::now();
        let deadline = end.min(begun + tier.time_limit());
        let outcome = match unavailable {
            Some(why) => Outcome::Skipped(why),
            None => run_tier(workspace, tier, filter, deadline, &build),
        };
        report.add(tier, outcome, begun.elapsed(), required);
    }
    report.print();
    if report.total.failed > 0 {
        // The report is the message; another line after it would hide the count.
        std::process::exit(1);
    }
    Ok(())
}

/// The one build behind all tiers but `tidy`, made when the first of them needs it.
#[derive(Default)]
struct Build {
    tried: bool,
    built: Option<Built>,
}

impl Build {
    fn run_once(&mut self, workspace: &Workspace, report: &mut Report) {
        if self.tried {
            return;
        }
        self.tried = true;
        heading("build");
        let begun = Instant::now();
        let built = setup::ensure(workspace, &[Need::Ebpf]).and_then(|()| suites::build(workspace));
        if let Err(error) = &built {
            println!("error: {error:#}");
        }
        report.add_build(built.is_ok(), begun.elapsed());
        self.built = built.ok();
    }
}

fn run_tier(
    workspace: &Workspace,
    tier: Tier,
    filter: Option<&str>,
    deadline: Instant,
    build: &Build,
) -> Outcome {
    let ran = match (tier, &build.built) {
        (Tier::Tidy, _) if filter.is_some() => {
            return Outcome::NotRun("a filter selects tests by name".to_owned());
        }
        (Tier::Tidy, _) => tidy_tier(workspace, deadline),
        (_, None) => return Outcome::NotRun("the workspace does not build".to_owned()),
        (_, Some(built)) => match tier.kernel() {
            Some(kernel) => {
                let selection = vm::Selection { places: tier.places(), filter, all: false, extra: &[] };
                vm::run_tests(workspace, kernel, built, &selection, deadline)
            }
            None => run_here(workspace, built, tier, filter, deadline),
        },
    };
    Outcome::Ran(ran.unwrap_or_else(|error| {
        let why = format!("{error:#}");
        println!("error: {why}");
        let mut tally = Tally::default();
        tally.count(&why, false);
        tally
    }))
}

/// Formatting, lints and our own rules; each counts as one check.
fn tidy_tier(workspace: &Workspace, deadline: Instant) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    let checks: [(&str, &[&str]); 3] = [
        ("cargo fmt (workspace)", &["fmt", "--all", "--", "--check"]),
        ("cargo fmt (mesh-ebpf)", &["fmt", "--manifest-path", "mesh-ebpf/Cargo.toml", "--", "--check"]),
        ("cargo clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    ];
    let found = tidy::check(workspace)?;
    found.print();
    tally.count("tidy rules", found.holds());
    setup::ensure(workspace, &[Need::Ebpf])?;
    for (name, arguments) in checks {
        let mut command = process::command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let ended = process::stream(command.current_dir(&workspace.root).args(arguments), deadline, |_| {})?;
        println!("{name}: {}", if ended.success() { "ok" } else { "FAILED" });
        tally.count(name, ended.success());
    }
    Ok(tally)
}

/// Runs the tier's test programs one after another on this kernel.
fn run_here(
    workspace: &Workspace,
    built: &Built,
    tier: Tier,
    filter: Option<&str>,
    deadline: Instant,
) -> anyhow::Result<Tally> {
    let mut variables = built.variables(|_, path| path.into());
    if tier == Tier::Cluster {
        variables = cluster::variables(workspace, kubernetes::ensure(workspace)?, built)?;
    }
    let mut total = Tally::default();
    for suite in tier.places().iter().flat_map(|&place| built.at(place)) {
        let mut command = program(suite, filter);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        // Programs attached to one cgroup root see each other's sockets.
        if suite.place == Place::Bpf {
            command.arg("--test-threads=1");
        }
        println!("\n{}", suite.name);
        let mut tally = Tally::default();
        let ended = process::stream(&mut command, deadline, |line| tally.read(line))?;
        let why = match ended {
            Ended::Exited(status) => status.to_string(),
            Ended::TimedOut => format!("killed: the tier ran into its limit of {:?}", tier.time_limit()),
        };
        tally.settle(&suite.name, ended.success(), &why);
        total.add(tally);
    }
    Ok(total)
}

fn program(suite: &Suite, filter: Option<&str>) -> std::process::Command {
    let mut command = process::command(&suite.program);
    command.current_dir(&suite.folder).env("CARGO_MANIFEST_DIR", &suite.folder).args(filter);
    command
}

/// Prints tiers first, then a line `tier, program, test` for each test.
fn list(workspace: &Workspace, tiers: &[Tier], filter: Option<&str>) -> anyhow::Result<()> {
    for tier in Tier::value_variants() {
        let about = tier.to_possible_value().and_then(|value| value.get_help().map(ToString::to_string));
        let lacks = match tier {
            Tier::Bpf | Tier::Netns | Tier::Cluster => own_kernel_lacks(),
            Tier::Tidy | Tier::Unit | Tier::Vm61 | Tier::Vm612 | Tier::Vm72 => None,
        };
        let state = lacks.map(|why| format!(" Cannot run here: {why}.")).unwrap_or_default();
        println!("{:8} {}{state}", tier.name(), about.unwrap_or_default());
    }
    setup::ensure(workspace, &[Need::Ebpf])?;
    let built = suites::build(workspace)?;
    for tier in tiers {
        for suite in tier.places().iter().flat_map(|&place| built.at(place)) {
            let listed = process::capture(program(suite, filter).args(["--list", "--format", "terse"]))?;
            for name in
                String::from_utf8_lossy(&listed).lines().filter_map(|line| line.strip_suffix(": test"))
            {
                println!("{:8} {} {name}", tier.name(), suite.name);
            }
        }
    }
    Ok(())
}

fn heading(text: &str) {
    println!("\n=== {text} ===");
}
