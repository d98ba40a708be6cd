//! Benchmarks of Nodemesh on the real kernel; `benches/README.md` says how to read them.

mod agents;
mod cost;
mod figures;
mod hook;
mod memory;
mod net;
mod paths;
mod programs;
mod rows;
mod session;

use clap::{Parser, Subcommand};
use mesh_benches::load;

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
    Net(net::Options),
    /// What the connect hook costs with ten thousand services, and that packets cost nothing.
    Hook(hook::Options),
    /// The load program itself, as this program starts it in pods.
    #[command(hide = true)]
    Load(load::Args),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().bench {
        Bench::Net(options) => net::run(&options),
        Bench::Hook(options) => hook::run(&options),
        Bench::Load(arguments) => load::run(arguments),
    }
}
