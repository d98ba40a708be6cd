//! Owns `cargo xtask build-ebpf`: the eBPF programs alone, with path and size of the object.

use anyhow::Context;

use crate::{ebpf, setup, workspace::Workspace};

/// Installs the toolchain if needed, builds, prints the object.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    setup::ensure(workspace, &[setup::Need::Ebpf])?;
    let toolchain = ebpf::find(&workspace.root)?;
    eprintln!("compiler: {} ({})", toolchain.compiler.version, toolchain.compiler.origin);
    eprintln!("linker:   {}", toolchain.linker.display());
    let object = ebpf::build(&workspace.root, &toolchain, &workspace.target.join("ebpf"))?;
    let size = object.metadata().with_context(|| format!("read {}", object.display()))?.len();
    println!("{} {size} bytes", object.display());
    Ok(())
}
