//! Owns `cargo xtask bench`: release builds, then the load program of package `mesh-benches`.

use std::{os::unix::process::CommandExt as _, path::PathBuf, process::Command};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};

use crate::{
    cluster::kubernetes,
    setup::{self, Need},
    suites,
    workspace::Workspace,
};

/// Arguments of `cargo xtask bench`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask bench                            TCP: latency, throughput, connection rate, cost
  cargo xtask bench net --json results.json    the same, also as rows of JSON
  cargo xtask bench http                       HTTP requests that are routed by rules: latency, rate, cost
  cargo xtask bench scale                      a controller of 200 agents, 1 000 services and 10 000 pods, on a real API server
  cargo xtask bench scale -- --agents 20 --services 100 --pods 1000 --for 20 -o json
  cargo xtask bench net -- --quick             options of the bench program (net -- --help)

Needs root. Every figure stands beside the same figure without a mesh from the same run; on a shared
machine only that ratio means something.")]
pub(crate) struct BenchArguments {
    /// What to measure.
    #[arg(default_value = "net")]
    subject: Subject,
    /// Write rows of path, metric, value, unit, baseline, ratio to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Further arguments for the bench program.
    #[arg(last = true)]
    arguments: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Subject {
    /// TCP paths: no mesh, direct, through one agent, through two.
    Net,
    /// HTTP requests that are routed by rules, on one node and across two.
    Http,
    /// The controller of a large cluster: memory, CPU, and how fast a change is everywhere.
    Scale,
}

/// Installs, builds, and becomes the bench program.
pub(crate) fn run(workspace: &Workspace, arguments: &BenchArguments) -> anyhow::Result<()> {
    let subject = match arguments.subject {
        Subject::Net => "net",
        Subject::Http => "http",
        Subject::Scale => "scale",
    };
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the bench makes network namespaces and cgroups: run it as root"
    );
    let needs: &[Need] = match arguments.subject {
        Subject::Net | Subject::Http => &[Need::Ebpf, Need::Netns],
        Subject::Scale => &[Need::Ebpf, Need::Kubernetes],
    };
    setup::ensure(workspace, needs)?;
    let kubernetes = match arguments.subject {
        Subject::Net | Subject::Http => None,
        Subject::Scale => Some((kubernetes::VARIABLE, kubernetes::ensure(workspace)?)),
    };
    let built = suites::build_release(workspace, &["mesh-agent", "mesh-tests", "mesh-benches"])?;
    let name = "bench";
    let program =
        built.programs.get(name).with_context(|| format!("package mesh-benches has no program `{name}`"))?;
    let mut bench = Command::new(program);
    bench.envs(built.variables(|_, path| path.into())).envs(kubernetes).arg(subject);
    if let Some(file) = &arguments.json {
        bench.arg("--json").arg(file);
    }
    Err(bench.args(&arguments.arguments).exec()).with_context(|| format!("start {}", program.display()))
}
