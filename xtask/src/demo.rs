//! Owns `cargo xtask demo`: from nothing to a running mesh in one command.
//!
//! Not here: the demo itself, which is the program `demo` of package `mesh-tests`.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context, ensure};
use clap::Args;

use crate::{
    cluster::{self, kubernetes},
    setup::{self, Need},
    suites,
    workspace::Workspace,
};

/// Arguments of `cargo xtask demo`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask demo              until Ctrl-C
  cargo xtask demo --for 60     one minute; exit status 0 if all traffic checks held
  cargo xtask demo --cluster    the same on a real Kubernetes, with a kubeconfig to play with
  cargo xtask demo --tour       Istio's Bookinfo tasks, one after the other; exit status 0 if all went as documented
  cargo xtask demo --tour --step circuit-breaking

Needs root: it makes network namespaces and loads eBPF programs.")]
pub(crate) struct DemoArguments {
    /// End by itself after so many seconds.
    #[arg(long = "for", value_name = "SECONDS")]
    seconds: Option<u64>,
    /// On a real Kubernetes of two nodes: install the mesh, run Bookinfo in it, print the kubeconfig's path.
    #[arg(long, conflicts_with = "tour")]
    cluster: bool,
    /// Go through Istio's Bookinfo tasks: what is applied, what is expected, what was measured.
    #[arg(long, conflicts_with = "seconds")]
    tour: bool,
    /// Only this step of the tour.
    #[arg(long, value_name = "NAME", requires = "tour")]
    step: Option<String>,
}

/// Installs, builds, and becomes the demo.
pub(crate) fn run(workspace: &Workspace, arguments: &DemoArguments) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the demo makes network namespaces and loads eBPF programs: run it as root"
    );
    let needs: &[Need] = if arguments.cluster {
        &[Need::Ebpf, Need::Netns, Need::Kubernetes]
    } else {
        &[Need::Ebpf, Need::Netns]
    };
    setup::ensure(workspace, needs)?;
    let kubernetes = arguments.cluster.then(|| kubernetes::ensure(workspace)).transpose()?;
    let built = suites::build_demo(workspace, &["mesh-agent", "mesh-tests"])?;
    let program = built.programs.get("demo").context("package mesh-tests has no program `demo`")?;
    let mut demo = Command::new(program);
    match kubernetes {
        Some(kubernetes) => demo.envs(cluster::variables(workspace, kubernetes, &built)?).arg("--cluster"),
        None => demo.envs(built.variables(|_, path| path.into())),
    };
    if let Some(seconds) = arguments.seconds {
        demo.args(["--for", &seconds.to_string()]);
    }
    if arguments.tour {
        demo.arg("--tour");
    }
    if let Some(step) = &arguments.step {
        demo.args(["--step", step]);
    }
    // Becoming the demo leaves Ctrl-C and the exit status to it alone.
    Err(demo.exec()).with_context(|| format!("start {}", program.display()))
}
