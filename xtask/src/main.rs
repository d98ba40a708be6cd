//! Owns the developer commands of Nodemesh: one file per subcommand.
//!
//! Run as `cargo xtask <command>`. Not here: anything the product needs at run time.

mod build_ebpf;
mod ebpf;
mod setup;
mod workspace;

use clap::{Parser, Subcommand};

use workspace::Workspace;

/// Developer commands of Nodemesh.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing: eBPF toolchain, iproute2, qemu, …
    Setup,
    /// Build the eBPF programs alone and print the object's path and size.
    BuildEbpf,
}

fn main() -> anyhow::Result<()> {
    let workspace = Workspace::here();
    match Arguments::parse().command {
        Task::Setup => setup::run(&workspace),
        Task::BuildEbpf => build_ebpf::run(&workspace),
    }
}
