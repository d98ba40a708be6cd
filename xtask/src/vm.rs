//! Owns `cargo xtask vm`: the same test programs on other kernels, in guests without disk or network.
//!
//! Invariants: no guest outlives its deadline or this program; the guest's verdict is read from what the test
//! programs print, never from how qemu ends. What is downloaded once is kept below `target/vm/<kernel>/`.
//!
//! Not here: which tests exist (see `suites.rs`).

mod guest;
mod initramfs;
mod kernel;
mod run_folder;

use std::{
    fmt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};

use crate::{
    libtest::Tally,
    setup::{self, Need},
    suites::{self, Built, Place, Suite},
    workspace::Workspace,
};
use run_folder::RunFolder;

/// Arguments of `cargo xtask vm`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask vm --kernel 6.1                         bpf and netns tests on the oldest kernel of the range
  cargo xtask vm --kernel 7.2 --tier bpf sk_lookup    some of them
  cargo xtask vm --kernel 6.12 reconnect -- --nocapture --test-threads=1

The guest's own console is in target/vm/KERNEL/latest/console.log.")]
pub(crate) struct VmArguments {
    /// The kernel line; the newest Debian cloud kernel of that line is used.
    #[arg(long, value_name = "VERSION")]
    kernel: Kernel,
    /// Run the tests of this tier only: unit, bpf or netns.
    #[arg(long = "tier", value_name = "NAME")]
    tiers: Vec<GuestTier>,
    /// Also run what says nothing about a kernel: see the line about what was left out.
    #[arg(long)]
    all: bool,
    /// Run this test program alone, without building the workspace.
    #[arg(long, value_name = "PATH", conflicts_with = "tiers")]
    program: Option<PathBuf>,
    /// End the guest after so many minutes.
    #[arg(long, value_name = "MINUTES", default_value_t = 25)]
    minutes: u64,
    /// Run only tests whose name contains this.
    filter: Option<String>,
    /// Further arguments for the test programs.
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// A kernel line of the support range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// The floor of the support range.
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    #[value(name = "7.2")]
    V7_2,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7_2 => "7.2",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GuestTier {
    Unit,
    Bpf,
    Netns,
}

impl GuestTier {
    fn places(self) -> &'static [Place] {
        match self {
            Self::Unit => &[Place::Unit],
            Self::Bpf => &[Place::Bpf],
            Self::Netns => &[Place::Netns, Place::Agent],
        }
    }
}

/// Programs left out of a guest unless asked for: each costs minutes under emulation. What they find does not depend on the kernel, or
/// is found by those that stay, which load every program and redirect, hand over and refuse connections: for a release, or
/// after a change of a hook, all of them are run (`--all`).
const LEFT_OUT: [(&str, &str); 12] = [
    ("tests/plain", "tests the harness"),
    ("tests/config", "reads manifests"),
    ("tests/scale", "is about volume"),
    ("tests/bare_host", "is about mounts, and needs programs that guests lack"),
    ("tests/addresses_shown", "its hooks are loaded and called by redirect/kernel"),
    ("tests/adversary", "its refusals are decided by code that is the same on all kernels"),
    ("tests/crash", "takes four minutes"),
    ("tests/datagrams", "its hooks are loaded and called by redirect/kernel"),
    ("tests/neighbours", "takes minutes"),
    ("tests/policy_changes", "takes minutes"),
    ("tests/trust", "takes minutes"),
    ("tests/untouched", "its hooks are those of connect_shapes"),
];

/// Tests left out for the same reasons, by a part of their names.
const LEFT_OUT_TESTS: [&str; 3] = ["a_hundred_pods", "ten_thousand_services", "slots_do_not_fit"];

/// Which tests a guest runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Selection<'a> {
    pub(crate) places: &'a [Place],
    /// Part of a test's name.
    pub(crate) filter: Option<&'a str>,
    /// Nothing is left out.
    pub(crate) all: bool,
    /// More arguments for every test program.
    pub(crate) extra: &'a [String],
}

impl Selection<'_> {
    /// Whoever names tests wants them wherever they are.
    fn keeps_all(&self) -> bool {
        self.all || self.filter.is_some()
    }
}

/// `cargo xtask vm`.
pub(crate) fn run(workspace: &Workspace, arguments: &VmArguments) -> anyhow::Result<()> {
    setup::ensure(workspace, &[Need::Netns, Need::Vm])?;
    let built = match &arguments.program {
        Some(program) => alone(workspace, program)?,
        None => {
            setup::ensure(workspace, &[Need::Ebpf])?;
            suites::build(workspace)?
        }
    };
    let places: Vec<Place> = match &arguments.tiers[..] {
        [] => vec![Place::Bpf, Place::Netns, Place::Agent],
        tiers => tiers.iter().flat_map(|tier| tier.places()).copied().collect(),
    };
    let filter = arguments.filter.as_deref();
    let selection = Selection { places: &places, filter, all: arguments.all, extra: &arguments.arguments };
    let deadline = Instant::now() + Duration::from_mins(arguments.minutes);
    let tally = run_tests(workspace, arguments.kernel, &built, &selection, deadline)?;
    for failure in &tally.failures {
        println!("failed: {failure}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    ensure!(tally.failed == 0, "tests failed on {}", arguments.kernel);
    Ok(())
}

/// Gets the kernel if it is not in the cache, so that a machine without a mirror can say so beforehand.
pub(crate) fn prepare(workspace: &Workspace, kernel: Kernel) -> anyhow::Result<()> {
    kernel::obtain(kernel, &folder(workspace, kernel)).map(drop)
}

fn folder(workspace: &Workspace, kernel: Kernel) -> PathBuf {
    workspace.target.join("vm").join(kernel.to_string())
}

/// A single program in place of the tree's own.
fn alone(workspace: &Workspace, program: &Path) -> anyhow::Result<Built> {
    let program = program.canonicalize().with_context(|| format!("find {}", program.display()))?;
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let folder = workspace.root.join("tests");
    // Cargo puts test programs into `deps`, beside which the programs they drive stand.
    let programs = program.ancestors().nth(2).map(suites::programs_in).unwrap_or_default();
    Ok(Built { suites: vec![Suite { name, place: Place::Netns, program, folder }], programs })
}

/// Boots `kernel`, runs the selected tests inside and returns what they reported.
pub(crate) fn run_tests(
    workspace: &Workspace,
    kernel: Kernel,
    built: &Built,
    selection: &Selection<'_>,
    deadline: Instant,
) -> anyhow::Result<Tally> {
    let left_out =
        |suite: &Suite| LEFT_OUT.iter().find(|(name, _)| !selection.keeps_all() && *name == suite.name);
    let mut suites: Vec<&Suite> = selection.places.iter().flat_map(|&place| built.at(place)).collect();
    suites.retain(|suite| match left_out(suite) {
        Some((name, why)) => {
            println!("left out: {name} ({why})");
            false
        }
        None => true,
    });
    if !selection.keeps_all() {
        println!("left out: tests named {}", LEFT_OUT_TESTS.join(", "));
    }
    ensure!(!suites.is_empty(), "there is no test program to run in a guest");
    let folder = folder(workspace, kernel);
    let files = kernel::obtain(kernel, &folder)?;
    let run = RunFolder::begin(&folder)?;
    initramfs::make(&run, &files, built, &suites, selection)?;
    let initramfs = run.initramfs();
    let guest = guest::Guest { folder: run.path(), kernel: &files.image, initramfs: &initramfs };
    let accelerator = guest::accelerator(workspace, &guest)?;
    println!("Linux {} under {accelerator}, {} test programs", files.version, suites.len());
    guest::run(&guest, accelerator, &suites, deadline)
}
