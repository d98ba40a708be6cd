//! Benchmarks of Nodemesh on the real kernel; `benches/README.md` says how to read them.

mod agents;
mod compare;
mod cost;
mod envoy;
mod figures;
mod hook;
mod memory;
mod paths;
mod programs;
mod rows;
mod runner;
mod scale;
mod session;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use mesh_benches::load;

use crate::paths::Traffic;

/// The agents' one: what hundreds of them do in `scale` must not be dearer here than on their nodes.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Benchmarks of Nodemesh: every figure comes with its baseline of the same run.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Arguments {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// What the mesh costs a connection: latency, throughput, rate, CPU and memory by path.
    Net(compare::Options),
    /// What requests cost that are routed by rules: latency, rate, CPU, on one node and across two.
    Http(compare::Options),
    /// What the connect hook costs with ten thousand services, and that packets cost nothing.
    Hook(hook::Options),
    /// What a controller of a large cluster costs, and how fast a change is everywhere.
    Scale(scale::Options),
    /// The load program itself, as this program starts it in pods.
    #[command(hide = true)]
    Load(load::Args),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().bench {
        Bench::Net(options) => compare::run(Traffic::Tcp, &options),
        Bench::Http(options) => compare::run(Traffic::Http, &options),
        Bench::Hook(options) => hook::run(&options),
        Bench::Scale(options) => scale::run(&options),
        Bench::Load(arguments) => load::run(arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain, and never a backtrace: what failed is outside of this program.
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
