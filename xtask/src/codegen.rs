//! Owns `cargo xtask codegen`: Rust for the protobuf files of `mesh-agent/wire/proto`.
//!
//! The result is checked in, so that a build needs neither a protobuf compiler nor this command; a unit test here
//! fails when it is not what the protobuf files say. Each protobuf package becomes one flat module.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use prost_types::FileDescriptorSet;

use crate::workspace::Workspace;

/// Protobuf package, its module below `mesh_wire::proto`, and what it is, for the module's doc.
const PACKAGES: [(&str, &str, &str); 7] = [
    ("envoy.config.core.v3", "node", "who speaks on an xDS stream"),
    ("envoy.service.discovery.v3", "discovery", "the xDS transport, with its client"),
    ("google.rpc", "rpc", "the error that a refusal carries"),
    ("istio.security", "security", "authorization policies, as ztunnel reads them"),
    ("istio.v1.auth", "ca", "the certificate authority, with its client and server"),
    ("istio.workload", "workload", "workloads and services, as ztunnel reads them"),
    ("nodemesh.v1", "nodemesh", "what our controller tells our agents beyond Istio's types"),
];

/// Servers that say a message in a form of their own, which is the same on the wire: package, module, the message, its form.
const SERVERS: [(&str, &str, &str, &str); 1] = [(
    "envoy.service.discovery.v3",
    "discovery_server",
    "DeltaDiscoveryResponse",
    "crate::encoded::EncodedDeltaResponse",
)];

/// Where the protobuf files are, below the root.
const PROTO: &str = "mesh-agent/wire/proto";
/// Where the Rust goes, below the root.
const GENERATED: &str = "mesh-agent/wire/src/generated";

/// One generated file.
#[derive(Debug, PartialEq, Eq)]
struct Generated {
    name: String,
    text: String,
}

/// Options of `cargo xtask codegen`.
#[derive(Debug, clap::Args)]
pub(crate) struct CodegenArguments {
    /// Write nothing; fail when the checked-in code is not what the protobuf files say.
    #[arg(long)]
    check: bool,
}

/// Generates, then writes what differs (or, to check, reports it).
pub(crate) fn run(workspace: &Workspace, arguments: &CodegenArguments) -> anyhow::Result<()> {
    let stale = stale(workspace)?;
    let folder = workspace.root.join(GENERATED);
    if arguments.check {
        let names: Vec<&str> = stale.iter().map(|file| file.name.as_str()).collect();
        ensure!(stale.is_empty(), "not what {PROTO} says: {}; run `cargo xtask codegen`", names.join(", "));
        return Ok(());
    }
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    for file in &stale {
        let path = folder.join(&file.name);
        fs::write(&path, &file.text).with_context(|| format!("write {}", path.display()))?;
        println!("codegen: wrote {GENERATED}/{}", file.name);
    }
    println!("codegen: {} of {} files changed", stale.len(), PACKAGES.len() + SERVERS.len());
    Ok(())
}

/// Files whose checked-in text is another, or missing.
fn stale(workspace: &Workspace) -> anyhow::Result<Vec<Generated>> {
    let folder = workspace.root.join(GENERATED);
    let mut files = generate(workspace)?;
    files.retain(|file| fs::read_to_string(folder.join(&file.name)).ok().as_ref() != Some(&file.text));
    Ok(files)
}

fn generate(workspace: &Workspace) -> anyhow::Result<Vec<Generated>> {
    let proto = workspace.root.join(PROTO);
    let mut sources = Vec::new();
    find_sources(&proto, &mut sources).with_context(|| format!("read {}", proto.display()))?;
    sources.sort();
    let mut compiler = protox::Compiler::new([&proto]).context("start the protobuf compiler")?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(&sources).with_context(|| format!("compile {PROTO}"))?;
    let descriptors = compiler.file_descriptor_set();

    let scratch = Scratch::make(&workspace.target)?;
    let mut files = Vec::new();
    for (package, module, what) in PACKAGES {
        let has_own_server = SERVERS.iter().any(|(of, ..)| *of == package);
        let mut builder = builder(&scratch).build_server(!has_own_server);
        // Other packages are named, not generated: that is what makes the modules flat.
        for (other, other_module, _) in PACKAGES.iter().filter(|(other, ..)| *other != package) {
            builder = builder.extern_path(format!(".{other}"), format!("crate::proto::{other_module}"));
        }
        files.push(generate_package(&scratch, builder, &descriptors, package, (module, what))?);
    }
    for (package, module, message, form) in SERVERS {
        let mut builder =
            builder(&scratch).build_client(false).extern_path(format!(".{package}.{message}"), form);
        for (named, named_module, _) in PACKAGES {
            builder = builder.extern_path(format!(".{named}"), format!("crate::proto::{named_module}"));
        }
        files.push(generate_package(&scratch, builder, &descriptors, package, (module, "its servers"))?);
    }
    Ok(files)
}

/// What all modules are generated with.
fn builder(scratch: &Scratch) -> tonic_prost_build::Builder {
    tonic_prost_build::configure()
        .out_dir(&scratch.0)
        .btree_map(".")
        .codec_path("crate::codec::BoundedCodec")
        .emit_rerun_if_changed(false)
        // `Client::connect` would use the default TLS; callers bring their own channel.
        .build_transport(false)
}

fn generate_package(
    scratch: &Scratch,
    builder: tonic_prost_build::Builder,
    descriptors: &FileDescriptorSet,
    package: &str,
    (module, what): (&str, &str),
) -> anyhow::Result<Generated> {
    builder
        .compile_fds_with_config(descriptors.clone(), tonic_prost_build::Config::new())
        .with_context(|| format!("generate code for {package}"))?;
    let path = scratch.0.join(format!("{package}.rs"));
    let code = fs::read_to_string(&path).with_context(|| format!("no code for package {package}"))?;
    let text = format!(
        "//! Generated by `cargo xtask codegen` from package `{package}`: {what}. Edit the protobuf file.\n\n{code}"
    );
    Ok(Generated { name: format!("{module}.rs"), text })
}

fn find_sources(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            find_sources(&path, found)?;
        } else if path.extension().is_some_and(|ending| ending == "proto") {
            found.push(path);
        }
    }
    Ok(())
}

/// A folder of this process alone, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn make(target: &Path) -> anyhow::Result<Self> {
        let path = target.join(format!("codegen-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is in the target directory and harms nobody.
        drop(fs::remove_dir_all(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_code_is_what_the_protobuf_files_say() {
        let names: Vec<String> =
            stale(&Workspace::here()).unwrap().into_iter().map(|file| file.name).collect();
        assert!(names.is_empty(), "run `cargo xtask codegen`: {names:?}");
    }
}
