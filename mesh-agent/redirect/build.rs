//! Owns the eBPF object that this crate embeds: builds `mesh-ebpf` and hands over its path.
//!
//! The path is in the compile-time variable `MESH_EBPF_OBJECT`.

// One truth for `cargo build` and `cargo xtask`; this script uses a part of it.
#[path = "../../xtask/src/ebpf.rs"]
mod ebpf;

use std::{env, error::Error, path::PathBuf};

/// What the object depends on, below the workspace root.
const INPUTS: [&str; 6] = [
    "mesh-ebpf/src",
    "mesh-ebpf/Cargo.toml",
    "mesh-ebpf/Cargo.lock",
    "mesh-common/src",
    "mesh-common/Cargo.toml",
    // mesh-common inherits package fields and dependency versions from it.
    "Cargo.toml",
];

fn main() {
    if let Err(error) = build() {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(next) = cause {
            message = format!("{message}: {next}");
            cause = next.source();
        }
        // This fails the build by itself. A failing exit status would bury the line under the script's raw output.
        println!("cargo::error={message}");
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let root = manifest_dir.join("../..").canonicalize()?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);

    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", root.join("xtask/src/ebpf.rs").display());
    for input in INPUTS {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }

    let toolchain = ebpf::find(&root)?;
    println!("cargo::rerun-if-changed={}", toolchain.linker.display());
    let object = ebpf::build(&root, &toolchain, &out_dir.join("mesh-ebpf"))?;
    println!("cargo::rustc-env=MESH_EBPF_OBJECT={}", object.display());
    Ok(())
}
