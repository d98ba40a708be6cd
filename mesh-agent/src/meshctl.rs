//! Owns the entry point of `meshctl`.

use std::process::ExitCode;

use clap::Parser;
use mesh_agent::ctl;

fn main() -> ExitCode {
    ctl::complete();
    ctl::run(&ctl::Args::parse())
}
