//! Owns `cargo xtask test`: the tiers, their order, time-outs and the report at the end.
//!
//! Invariants: every tier ends with one line saying what it did or why it did not run; with
//! `MESH_TESTS_REQUIRE=1` a tier that cannot run is a failure; the last line is `N passed, N failed`.

use std::{
    env,
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail};
use clap::{Args, ValueEnum};

use crate::{
    libtest::Tally,
    process::{self, Ended},
    setup::{self, Need},
    suites::{self, Built, Place, Suite},
    tidy,
    vm::{self, Kernel},
    workspace::Workspace,
};

/// Everything together must end before a CI job of an hour is cut off without a report.
const TOTAL: Duration = Duration::from_mins(56);

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

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tier {
    /// Formatting, lints, and the rules of the tree.
    Tidy,
    /// Everything that needs nothing.
    Unit,
    /// The eBPF programs on this kernel.
    Bpf,
    /// Nodes and pods as network namespaces on this kernel.
    Netns,
    /// `bpf` and `netns` on Debian's 6.1.
    #[value(name = "vm-6.1")]
    Vm61,
    /// `bpf` and `netns` on Debian's 6.12 (on demand).
    #[value(name = "vm-6.12")]
    Vm612,
    /// `bpf` and `netns` on Debian's 7.2.
    #[value(name = "vm-7.2")]
    Vm72,
}

/// What became of a tier.
enum Outcome {
    Ran(Tally),
    Skipped(String),
}

impl Tier {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Part of a run without `--tier`.
    fn is_default(self) -> bool {
        self != Self::Vm612
    }

    /// Far above what the tier takes on two cores, so that it only ends a hang.
    fn time_limit(self) -> Duration {
        Duration::from_mins(match self {
            Self::Tidy => 15,
            Self::Unit | Self::Bpf => 5,
            Self::Netns => 12,
            Self::Vm61 | Self::Vm612 | Self::Vm72 => 18,
        })
    }

    fn kernel(self) -> Option<Kernel> {
        match self {
            Self::Vm61 => Some(Kernel::V6_1),
            Self::Vm612 => Some(Kernel::V6_12),
            Self::Vm72 => Some(Kernel::V7_2),
            Self::Tidy | Self::Unit | Self::Bpf | Self::Netns => None,
        }
    }

    /// Why this machine cannot run the tier. May install what is missing.
    fn unavailable(self, workspace: &Workspace) -> Option<String> {
        let needs: &[Need] = match self {
            Self::Tidy => &[Need::Lint],
            Self::Unit => &[],
            Self::Bpf | Self::Netns => &[Need::Netns],
            Self::Vm61 | Self::Vm612 | Self::Vm72 => &[Need::Vm, Need::Netns],
        };
        if let Err(error) = setup::ensure(workspace, needs) {
            return Some(format!("{error:#}"));
        }
        match self.kernel() {
            Some(kernel) => vm::prepare(workspace, kernel).err().map(|error| format!("{error:#}")),
            None if matches!(self, Self::Bpf | Self::Netns) => own_kernel_lacks(),
            None => None,
        }
    }
}

/// Why tests on a real kernel cannot use the one we run on.
fn own_kernel_lacks() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root for network namespaces and eBPF".to_owned());
    }
    if !std::path::Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Some("this kernel has no BTF (/sys/kernel/btf/vmlinux)".to_owned());
    }
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let has_cgroup2 = mounts.lines().any(|line| line.split_whitespace().nth(2) == Some("cgroup2"));
    (!has_cgroup2).then(|| "no cgroup2 is mounted (/proc/mounts)".to_owned())
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
    // Made when a tier first needs it; a build that failed is not tried again.
    let mut build = None;
    for tier in tiers {
        heading(&tier.name());
        let begun = Instant::now();
        let deadline = end.min(begun + tier.time_limit());
        let outcome = match run_tier(workspace, tier, filter, deadline, &mut build) {
            Ok(outcome) => outcome,
            Err(error) => {
                eprintln!("{}: {error:#}", tier.name());
                let mut tally = Tally::default();
                tally.count(&format!("{error:#}"), false);
                Outcome::Ran(tally)
            }
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

fn run_tier(
    workspace: &Workspace,
    tier: Tier,
    filter: Option<&str>,
    deadline: Instant,
    build: &mut Option<Result<Built, String>>,
) -> anyhow::Result<Outcome> {
    if let Some(why) = tier.unavailable(workspace) {
        return Ok(Outcome::Skipped(why));
    }
    if tier == Tier::Tidy {
        return match filter {
            Some(_) => Ok(Outcome::Skipped("a filter selects tests by name".to_owned())),
            None => tidy_tier(workspace, deadline).map(Outcome::Ran),
        };
    }
    let build_once = || {
        setup::ensure(workspace, &[Need::Ebpf])?;
        suites::build(workspace)
    };
    let built =
        build.get_or_insert_with(|| build_once().map_err(|error: anyhow::Error| format!("{error:#}")));
    let built = built.as_ref().map_err(|why| anyhow!("{why}"))?;
    let tally = match tier.kernel() {
        Some(kernel) => {
            let places = [Place::Bpf, Place::Netns];
            vm::run_tests(
                workspace,
                kernel,
                built,
                &vm::Selection { places: &places, filter, extra: &[] },
                deadline,
            )?
        }
        None => run_here(built, tier, filter, deadline)?,
    };
    Ok(Outcome::Ran(tally))
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
fn run_here(built: &Built, tier: Tier, filter: Option<&str>, deadline: Instant) -> anyhow::Result<Tally> {
    let place = match tier {
        Tier::Bpf => Place::Bpf,
        Tier::Netns => Place::Netns,
        Tier::Unit => Place::Unit,
        Tier::Tidy | Tier::Vm61 | Tier::Vm612 | Tier::Vm72 => bail!("invariant: not a tier of this kernel"),
    };
    let variables = built.variables(|_, path| path.into());
    let mut total = Tally::default();
    for suite in built.at(place) {
        let mut command = program(suite, filter);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        // Programs attached to one cgroup root see each other's sockets.
        if place == Place::Bpf {
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
            Tier::Bpf | Tier::Netns => own_kernel_lacks(),
            Tier::Tidy | Tier::Unit | Tier::Vm61 | Tier::Vm612 | Tier::Vm72 => None,
        };
        let state = lacks.map(|why| format!(" Cannot run here: {why}.")).unwrap_or_default();
        println!("{:8} {}{state}", tier.name(), about.unwrap_or_default());
    }
    setup::ensure(workspace, &[Need::Ebpf])?;
    let built = suites::build(workspace)?;
    for tier in tiers {
        let places: &[Place] = match tier {
            Tier::Tidy => &[],
            Tier::Unit => &[Place::Unit],
            Tier::Bpf => &[Place::Bpf],
            Tier::Netns => &[Place::Netns],
            Tier::Vm61 | Tier::Vm612 | Tier::Vm72 => &[Place::Bpf, Place::Netns],
        };
        for suite in places.iter().flat_map(|&place| built.at(place)) {
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

/// One line for each tier, collected while they run.
#[derive(Default)]
struct Report {
    lines: Vec<String>,
    total: Tally,
}

impl Report {
    fn add(&mut self, tier: Tier, outcome: Outcome, took: Duration, required: bool) {
        let name = tier.name();
        let seconds = took.as_secs_f64();
        match outcome {
            Outcome::Ran(tally) => {
                let verdict = if tally.failed == 0 { "ok" } else { "FAILED" };
                let mut line =
                    format!("{name:8} {verdict:6} {} passed, {} failed", tally.passed, tally.failed);
                for (count, what) in [(tally.ignored, "ignored"), (tally.skipped, "skipped themselves")] {
                    if count > 0 {
                        line += &format!(", {count} {what}");
                    }
                }
                self.lines.push(format!("{line}, {seconds:.0} s"));
                self.lines.extend(tally.failures.iter().map(|failure| format!("         failed: {failure}")));
                self.total.add(tally);
            }
            Outcome::Skipped(why) if required => {
                self.lines.push(format!("{name:8} FAILED could not run (MESH_TESTS_REQUIRE=1): {why}"));
                self.total.count(&name, false);
            }
            Outcome::Skipped(why) => self.lines.push(format!("{name:8} skipped: {why}")),
        }
    }

    fn print(&self) {
        heading("summary");
        self.lines.iter().for_each(|line| println!("{line}"));
        println!("{} passed, {} failed", self.total.passed, self.total.failed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(passed: u64, failed: u64) -> Outcome {
        let mut tally = Tally::default();
        (tally.passed, tally.failed) = (passed, failed);
        Outcome::Ran(tally)
    }

    #[test]
    fn a_tier_that_cannot_run_fails_only_when_required() {
        let mut report = Report::default();
        report.add(Tier::Netns, Outcome::Skipped("no root".into()), Duration::ZERO, false);
        assert_eq!(report.total.failed, 0);
        report.add(Tier::Bpf, Outcome::Skipped("no root".into()), Duration::ZERO, true);
        assert_eq!(report.total.failed, 1);
        assert!(report.lines.iter().all(|line| line.contains("no root")));
    }

    #[test]
    fn the_total_is_the_sum_of_the_tiers() {
        let mut report = Report::default();
        report.add(Tier::Unit, ran(3, 1), Duration::ZERO, false);
        report.add(Tier::Netns, ran(4, 0), Duration::ZERO, false);
        assert_eq!((report.total.passed, report.total.failed), (7, 1));
    }

    #[test]
    fn the_default_run_boots_the_oldest_and_the_newest_kernel() {
        let default: Vec<String> =
            Tier::value_variants().iter().filter(|tier| tier.is_default()).map(|tier| tier.name()).collect();
        assert_eq!(default, ["tidy", "unit", "bpf", "netns", "vm-6.1", "vm-7.2"]);
    }
}
