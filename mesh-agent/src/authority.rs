//! Owns `mesh-agent ca`: what an operator does to an authority whose folder running agents use.

use anyhow::Context as _;
use mesh_identity::{Ca, ca::CaOptions};

use crate::cli::{CaCommand, RotateArgs};

/// Runs one command.
///
/// # Errors
/// The folder holds no authority, or none that can be rotated.
pub fn run(command: &CaCommand) -> anyhow::Result<()> {
    match command {
        CaCommand::Rotate(args) => rotate(args),
    }
}

fn rotate(args: &RotateArgs) -> anyhow::Result<()> {
    let folder = args.ca_dir.display();
    // Opening would make an authority; a mistyped folder must not become one.
    anyhow::ensure!(args.ca_dir.join("root-cert.pem").is_file(), "{folder} holds no certificate authority");
    // The trust domain stands in the name of the new root, where nothing reads it.
    let options = CaOptions::new(&args.ca_dir, "cluster.local");
    let ca = Ca::open(CaOptions { algorithm: args.key_algorithm, ..options })
        .with_context(|| format!("open the certificate authority in {folder}"))?;
    ca.rotate(Some(args.announce)).with_context(|| format!("rotate the root of {folder}"))?;
    println!("a new root is announced; it signs in {} s", args.announce.as_secs());
    Ok(())
}
