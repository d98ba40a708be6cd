//! The load program by hand: see `benches/README.md`.

use clap::Parser as _;
use mesh_benches::load;

fn main() -> anyhow::Result<()> {
    load::run(load::Args::parse())
}
