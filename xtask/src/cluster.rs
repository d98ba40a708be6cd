//! Owns `cargo xtask cluster`: a real Kubernetes of two nodes on this machine.
//!
//! Not here: the cluster itself, which is in package `mesh-tests` (`tests/src/cluster`).

pub(crate) mod go;
pub(crate) mod images;
pub(crate) mod kubernetes;

use clap::{Args, Subcommand};

use crate::{
    setup::{self, Need},
    suites,
    workspace::Workspace,
};

/// Arguments of `cargo xtask cluster`.
#[derive(Debug, Args)]
pub(crate) struct ClusterArguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Install and build what a cluster needs, and print where it is, as the tests' variables.
    Prepare,
}

/// `cargo xtask cluster`.
pub(crate) fn run(workspace: &Workspace, arguments: &ClusterArguments) -> anyhow::Result<()> {
    match &arguments.action {
        Action::Prepare => {
            setup::ensure(workspace, &[Need::Ebpf, Need::Kubernetes])?;
            let kubernetes = kubernetes::ensure(workspace)?;
            let built = suites::build_programs(workspace, &["mesh-agent", "mesh-tests"])?;
            let images = images::write(workspace, &kubernetes, &built.programs)?;
            println!("{}={}", kubernetes::VARIABLE, kubernetes.display());
            println!("{}={}", images::VARIABLE, images.display());
            Ok(())
        }
    }
}
