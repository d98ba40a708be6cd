//! Owns the entry point of `mesh-agent`: the allocator, the arguments, and the exit status.

use std::process::ExitCode;

use clap::Parser;
use mesh_agent::{
    authority,
    cli::{Args, CniArgs, Command},
    cni, controller, node,
};

/// Less fragmentation than the system's allocator under many short connections.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    if cni::is_called(std::env::args_os().next().as_deref()) {
        return cni::run();
    }
    let outcome = match Args::parse().command {
        Command::Node(args) => node::run(&args),
        Command::Controller(args) => controller::run(&args),
        Command::Cleanup(args) => node::cleanup(&args),
        Command::Started(args) => node::started(&args),
        Command::Pause => node::pause(),
        Command::Ca(command) => authority::run(&command),
        Command::Cni(CniArgs { command: None }) => return cni::run(),
        Command::Cni(CniArgs { command: Some(command) }) => cni::install::run(&command),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
