//! Owns `cargo xtask dist`: static programs, a container image of them, and what it was made of.
//!
//! Invariant: the same commit with the same toolchain gives the same image digest, in whatever folder it is built.

mod sbom;

use std::{collections::BTreeMap, env, ffi::OsStr, fs, path::PathBuf, process::Command};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::{
    cluster::images,
    image::{Content, Image, libraries_of},
    process,
    setup::{self, Need},
    suites::{self, Built},
    workspace::Workspace,
};

/// What the image holds, by name.
const PROGRAMS: [&str; 2] = ["mesh-agent", "meshctl"];

/// Whom the programs run as if nobody says otherwise: not root. The agent's DaemonSet says otherwise.
const USER: &str = "65532:65532";

/// Where the list of components is in the image.
const SBOM: &str = "sbom.cdx.json";

/// Arguments of `cargo xtask dist`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask dist                          release programs and image in target/dist
  cargo xtask dist --profile dev            the same from a debug build, with the libraries it needs: quick, for tests
  cargo xtask dist --name registry.example/nodemesh:0.1.0 -o json

The archive is an OCI image layout: `ctr -n k8s.io images import`, `docker load`, `podman load` and
`skopeo copy oci-archive:FILE docker://…` read it. SOURCE_DATE_EPOCH overrides the time in it, which is the commit's.")]
pub(crate) struct DistArguments {
    /// What is built.
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
    /// What the image is called once loaded.
    #[arg(long, value_name = "NAME", default_value = "localhost/nodemesh:dev")]
    name: String,
    /// Where everything goes; `target/dist` if not said.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// How the result is told.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Profile {
    /// Optimised and static.
    Release,
    /// As tests run it.
    Dev,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

/// What was made.
#[derive(Debug, Serialize)]
struct Made {
    /// Of the image's manifest, as registries know it.
    digest: String,
    /// What the image is called once loaded.
    name: String,
    image: PathBuf,
    sbom: PathBuf,
    programs: Vec<PathBuf>,
}

/// `cargo xtask dist`.
pub(crate) fn run(workspace: &Workspace, arguments: &DistArguments) -> anyhow::Result<()> {
    setup::ensure(workspace, &[Need::Ebpf])?;
    let out = arguments.out.clone().unwrap_or_else(|| workspace.target.join("dist"));
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let built = match arguments.profile {
        Profile::Release => build_static(workspace)?,
        Profile::Dev => suites::build_programs(workspace, &["mesh-agent"])?,
    };
    let sbom = sbom::of_programs(workspace)?;
    let mut programs = Vec::new();
    for name in PROGRAMS {
        let from = built.programs.get(name).with_context(|| format!("{name} was not built"))?;
        if arguments.profile == Profile::Release {
            ensure!(libraries_of(from)?.is_empty(), "{name} is not static");
        }
        let to = out.join(name);
        fs::copy(from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        programs.push((name, to));
    }
    let image = image(workspace, &arguments.name, &programs, &sbom)?;
    let archive = out.join("nodemesh.tar");
    let sbom_path = out.join(SBOM);
    fs::write(&sbom_path, sbom).with_context(|| format!("write {}", sbom_path.display()))?;
    let made = Made {
        digest: image.write(&archive)?,
        name: arguments.name.clone(),
        image: archive,
        sbom: sbom_path,
        programs: programs.into_iter().map(|(_, path)| path).collect(),
    };
    match arguments.output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&made).context("write JSON")?),
        Output::Text => {
            println!("image     {} ({})", made.image.display(), made.name);
            println!("digest    {}", made.digest);
            println!("contents  {}", made.sbom.display());
            for program in &made.programs {
                println!("program   {}", program.display());
            }
        }
    }
    Ok(())
}

/// The image of these programs, with the list of what they are made of.
fn image(
    workspace: &Workspace,
    name: &str,
    programs: &[(&str, PathBuf)],
    sbom: &str,
) -> anyhow::Result<Image> {
    let mut image = images::of_programs(name, programs)?;
    // Both are called by name: neither is what an image of the other would be for.
    image.entrypoint = vec!["/mesh-agent".to_owned()];
    image.user = USER.to_owned();
    image.labels = labels(workspace);
    image.time = time(workspace)?;
    image.files.insert(SBOM.to_owned(), Content::Text(sbom.to_owned()));
    Ok(image)
}

/// Release programs that need no library, without a trace of where they were built.
fn build_static(workspace: &Workspace) -> anyhow::Result<Built> {
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let moves = moved(workspace)?;
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(moves.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())));
    let c_flags: Vec<String> =
        moves.iter().map(|(from, to)| format!("-ffile-prefix-map={}={to}", from.display())).collect();
    let mut cargo = suites::cargo(workspace);
    // With a target of its own, the flags leave build scripts alone, and the debug build's cache too.
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        .env(format!("CFLAGS_{}", target.replace('-', "_")), c_flags.join(" "))
        .args(["build", "--release", "--locked", "--target", &target, "--package", "mesh-agent", "--bins"])
        // Names for backtraces stay; the rest of debug information is twice as large as the programs.
        .args(["--config", "profile.release.strip=\"debuginfo\""])
        .arg("--message-format=json-render-diagnostics");
    suites::finish(workspace, cargo, "mesh-agent does not build as a static program")
}

/// Folders whose names must not get into programs, and what stands for them.
fn moved(workspace: &Workspace) -> anyhow::Result<Vec<(PathBuf, &'static str)>> {
    let home = || env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(|| home().join(".cargo"), PathBuf::from);
    let rustc = process::capture(Command::new("rustc").args(["--print", "sysroot"])).context("ask rustc")?;
    let sysroot = PathBuf::from(String::from_utf8_lossy(&rustc).trim());
    // The last that fits wins, so the widest comes first.
    Ok(vec![
        (cargo_home, "/cargo"),
        (sysroot, "/rust"),
        (workspace.root.clone(), "/nodemesh"),
        (workspace.target.clone(), "/target"),
    ])
}

fn labels(workspace: &Workspace) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::from([
        ("title", "nodemesh".to_owned()),
        ("description", "Nodemesh: a service mesh without sidecars".to_owned()),
        ("licenses", "Apache-2.0".to_owned()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
    ]);
    // Of an archive without history nobody knows.
    if let Some(revision) = git(workspace, &["rev-parse", "HEAD"]) {
        labels.insert("revision", revision);
    }
    labels.into_iter().map(|(name, value)| (format!("org.opencontainers.image.{name}"), value)).collect()
}

/// `SOURCE_DATE_EPOCH`, else the time of the commit, else 0.
fn time(workspace: &Workspace) -> anyhow::Result<u64> {
    match env::var("SOURCE_DATE_EPOCH") {
        Ok(given) => given.trim().parse().context("SOURCE_DATE_EPOCH must be seconds since 1970"),
        Err(_) => {
            let commit = git(workspace, &["log", "-1", "--format=%ct"]);
            Ok(commit.and_then(|seconds| seconds.parse().ok()).unwrap_or(0))
        }
    }
}

fn git(workspace: &Workspace, arguments: &[impl AsRef<OsStr>]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(&workspace.root).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests;
