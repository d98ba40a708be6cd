//! Owns `cargo xtask demo`: from nothing to a running mesh in one command.
//!
//! Not here: the demo itself, which is the program `demo` of package `mesh-tests`.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context, bail, ensure};
use clap::Args;

use crate::{
    setup::{self, Need},
    suites,
    workspace::Workspace,
};

/// Arguments of `cargo xtask demo`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask demo              until Ctrl-C
  cargo xtask demo --for 60     one minute; exit status 0 if all traffic checks held

Needs root: it makes network namespaces and loads eBPF programs.")]
pub(crate) struct DemoArguments {
    /// End by itself after so many seconds.
    #[arg(long = "for", value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Part of a later version.
    #[arg(long, hide = true)]
    cluster: bool,
    /// Part of a later version.
    #[arg(long, hide = true)]
    tour: bool,
}

/// Installs, builds, and becomes the demo.
pub(crate) fn run(workspace: &Workspace, arguments: &DemoArguments) -> anyhow::Result<()> {
    for (asked, flag, what) in [
        (arguments.cluster, "--cluster", "a demo on a real Kubernetes"),
        (arguments.tour, "--tour", "the guided tour"),
    ] {
        if asked {
            bail!(
                "{flag} is not available yet: {what} comes with a later version; run `cargo xtask demo` without it"
            );
        }
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the demo makes network namespaces and loads eBPF programs: run it as root"
    );
    setup::ensure(workspace, &[Need::Ebpf, Need::Netns])?;
    let built = suites::build_release(workspace, &["mesh-agent", "mesh-tests"])?;
    let program = built.programs.get("demo").context("package mesh-tests has no program `demo`")?;
    let mut demo = Command::new(program);
    demo.envs(built.variables(|_, path| path.into()));
    if let Some(seconds) = arguments.seconds {
        demo.args(["--for", &seconds.to_string()]);
    }
    // Becoming the demo leaves Ctrl-C and the exit status to it alone.
    Err(demo.exec()).with_context(|| format!("start {}", program.display()))
}
