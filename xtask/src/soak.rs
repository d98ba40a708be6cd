//! Owns `cargo xtask soak`: the netns test `http_soak`, for as long as one wants.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context, ensure};
use clap::Args;

use crate::{
    setup::{self, Need},
    suites,
    workspace::Workspace,
};

/// The test program.
const SUITE: &str = "http_soak";

/// Arguments of `cargo xtask soak`.
#[derive(Debug, Args)]
#[command(
    after_help = "Needs root. Prints memory of both agents and requests over time; exit status 1 if a request failed or memory
grew. The netns tier runs the same for 20 seconds."
)]
pub(crate) struct SoakArguments {
    /// How long.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1440))]
    minutes: u64,
}

/// Installs, builds, and becomes the test program.
pub(crate) fn run(workspace: &Workspace, arguments: &SoakArguments) -> anyhow::Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "the soak makes network namespaces: run it as root");
    setup::ensure(workspace, &[Need::Ebpf, Need::Netns])?;
    let built = suites::build_tests(workspace, &["mesh-agent", "mesh-tests"], SUITE)?;
    let suite = built.suites.iter().find(|suite| suite.name.ends_with(SUITE));
    let program = &suite.with_context(|| format!("package mesh-tests has no test `{SUITE}`"))?.program;
    let mut soak = Command::new(program);
    soak.envs(built.variables(|_, path| path.into()));
    soak.env("MESH_SOAK_SECONDS", (arguments.minutes * 60).to_string()).env("MESH_TESTS_REQUIRE", "1");
    soak.args(["--nocapture", "--test-threads=1"]);
    Err(soak.exec()).with_context(|| format!("start {}", program.display()))
}
