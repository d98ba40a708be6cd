//! Owns the developer commands of Nodemesh: one file per subcommand.
//!
//! Run as `cargo xtask <command>`. Not here: anything the product needs at run time.

mod bench;
mod build_ebpf;
mod cluster;
mod codegen;
mod demo;
mod dist;
mod ebpf;
mod fuzz;
mod image;
mod libtest;
mod process;
mod setup;
mod soak;
mod suites;
mod test;
mod tidy;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use workspace::Workspace;

/// Developer commands of Nodemesh. Each installs the tools it needs, after naming them.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
#[command(after_help = "Start here:
  cargo xtask demo     a mesh of two nodes on this machine, with traffic
  cargo xtask test     every test tier this machine can run
  cargo xtask cluster up    a real Kubernetes of two nodes on this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run two nodes and a dozen pods with traffic on this machine.
    Demo(demo::DemoArguments),
    /// Run the test tiers and say what was skipped and why.
    Test(test::TestArguments),
    /// Run the real-kernel tests on another kernel, under qemu.
    Vm(vm::VmArguments),
    /// A real Kubernetes of two nodes on this machine.
    Cluster(cluster::ClusterArguments),
    /// Measure against the same traffic without a mesh.
    Bench(bench::BenchArguments),
    /// Send a mixed load while pods come and go and rules change.
    Soak(soak::SoakArguments),
    /// Fuzz the decoders of what peers send.
    Fuzz(fuzz::FuzzArguments),
    /// Check the rules of the tree: layering, sizes, module docs, names.
    Tidy,
    /// Install what is missing: eBPF toolchain, iproute2, qemu, …
    Setup,
    /// Build static programs and a container image of them, reproducibly.
    Dist(dist::DistArguments),
    /// Generate Rust from the protobuf files; the result is checked in.
    Codegen(codegen::CodegenArguments),
    /// Build the eBPF programs alone and print the object's path and size.
    BuildEbpf,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain in one line; a backtrace of xtask helps nobody who runs it.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let workspace = Workspace::here();
    match Arguments::parse().command {
        Task::Demo(arguments) => demo::run(&workspace, &arguments),
        Task::Test(arguments) => test::run(&workspace, &arguments),
        Task::Vm(arguments) => vm::run(&workspace, &arguments),
        Task::Cluster(arguments) => cluster::run(&workspace, &arguments),
        Task::Bench(arguments) => bench::run(&workspace, &arguments),
        Task::Soak(arguments) => soak::run(&workspace, &arguments),
        Task::Fuzz(arguments) => fuzz::run(&workspace, &arguments),
        Task::Tidy => tidy::run(&workspace),
        Task::Setup => setup::run(&workspace),
        Task::Dist(arguments) => dist::run(&workspace, &arguments),
        Task::Codegen(arguments) => codegen::run(&workspace, &arguments),
        Task::BuildEbpf => build_ebpf::run(&workspace),
    }
}
