//! Owns `cargo xtask fuzz`: the targets of `fuzz/` under cargo-fuzz, from generated seeds.
//!
//! The same bodies run as property tests in the unit tier; this is for looking longer. Needs a rustup nightly.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail, ensure};

use crate::{ebpf::TOOLS_DIR, workspace::Workspace};

/// The targets, as `fuzz/Cargo.toml` has them.
const TARGETS: [&str; 5] = ["baggage", "csr", "h2_frames", "hbone_headers", "xds"];
/// Longest input that is tried, in bytes.
const INPUT_BYTES_MAX: u32 = 8192;
/// A single input that takes longer than this, in seconds, is a finding.
const INPUT_SECONDS_MAX: u32 = 10;

/// Options of `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct FuzzArguments {
    /// Only this target; else all, one after the other.
    #[arg(value_parser = TARGETS)]
    target: Option<String>,
    /// How long each target runs.
    #[arg(long = "for", value_name = "SECONDS", default_value_t = 60)]
    seconds: u32,
}

/// Runs targets; the first finding ends it.
pub(crate) fn run(workspace: &Workspace, arguments: &FuzzArguments) -> anyhow::Result<()> {
    let fuzzer = Fuzzer::prepare(workspace)?;
    fuzzer.write_seeds()?;
    let chosen =
        TARGETS.into_iter().filter(|name| arguments.target.as_deref().is_none_or(|only| only == *name));
    for target in chosen {
        fuzzer.run(target, arguments.seconds)?;
    }
    Ok(())
}

/// cargo-fuzz, the compiler it needs, and where results go.
struct Fuzzer {
    program: PathBuf,
    toolchain: String,
    root: PathBuf,
    target: PathBuf,
}

impl Fuzzer {
    fn prepare(workspace: &Workspace) -> anyhow::Result<Self> {
        let tools = workspace.root.join(TOOLS_DIR);
        let program = tools.join("bin/cargo-fuzz");
        if !program.is_file() {
            eprintln!("fuzz: cargo install cargo-fuzz --locked --root {}", tools.display());
            let mut install = Command::new("cargo");
            install.args(["install", "cargo-fuzz", "--locked", "--root"]).arg(&tools);
            ensure!(install.status().context("start cargo")?.success(), "cargo-fuzz does not build");
        }
        let toolchain = nightly()?;
        Ok(Self { program, toolchain, root: workspace.root.clone(), target: workspace.target.join("fuzz") })
    }

    /// Found inputs stay here from run to run.
    fn corpus(&self) -> PathBuf {
        self.target.join("corpus")
    }

    fn write_seeds(&self) -> anyhow::Result<()> {
        let mut seeds = self.command("cargo", &self.root.join("fuzz"));
        // The bodies and seeds of the targets exist under this flag alone.
        seeds.env("RUSTFLAGS", "--cfg fuzzing").args(["run", "--quiet", "--bin", "seeds", "--"]);
        seeds.arg(self.corpus()).env("CARGO_TARGET_DIR", self.target.join("seeds"));
        ensure!(seeds.status().context("start cargo")?.success(), "the seeds are not written");
        Ok(())
    }

    fn run(&self, target: &str, seconds: u32) -> anyhow::Result<()> {
        eprintln!("fuzz: {target} for {seconds} s");
        let artifacts = self.target.join("artifacts").join(target);
        std::fs::create_dir_all(&artifacts).with_context(|| format!("make {}", artifacts.display()))?;
        let mut prefix = OsString::from("-artifact_prefix=");
        prefix.push(artifacts.join(""));
        let mut fuzz = self.command(&self.program, &self.root);
        fuzz.args(["run", "--fuzz-dir", "fuzz", target])
            .arg(self.corpus().join(target))
            .arg("--")
            .arg(prefix);
        fuzz.args([
            format!("-max_total_time={seconds}"),
            format!("-max_len={INPUT_BYTES_MAX}"),
            format!("-timeout={INPUT_SECONDS_MAX}"),
            "-print_final_stats=1".to_owned(),
        ]);
        let status = fuzz.status().context("start cargo-fuzz")?;
        ensure!(status.success(), "{target}: {status}; inputs are in {}", artifacts.display());
        Ok(())
    }

    /// A command that uses the nightly and a target directory apart from that of ordinary builds.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>, folder: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(folder).stdin(Stdio::null()).env("RUSTUP_TOOLCHAIN", &self.toolchain);
        // `cargo xtask` runs under a toolchain of its own, which a proxy would prefer to the variable above.
        command.env_remove("CARGO").env_remove("RUSTC").env_remove("RUSTFLAGS");
        command.env("CARGO_TARGET_DIR", self.target.join("build"));
        command
    }
}

/// The first nightly that rustup has.
fn nightly() -> anyhow::Result<String> {
    let listed = Command::new("rustup").args(["toolchain", "list"]).output().context("start rustup")?;
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let mut names = listed.lines().filter_map(|line| line.split_whitespace().next());
    match names.find(|name| name.starts_with("nightly")) {
        Some(name) => Ok(name.to_owned()),
        None => bail!("fuzzing needs a nightly: rustup toolchain install nightly --profile minimal"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_a_program_of_the_fuzz_package() {
        let root = Workspace::here().root;
        let manifest = std::fs::read_to_string(root.join("fuzz/Cargo.toml")).unwrap();
        for target in TARGETS {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target}");
            assert!(root.join(format!("fuzz/fuzz_targets/{target}.rs")).is_file(), "{target}");
        }
        assert_eq!(manifest.matches("path = \"fuzz_targets/").count(), TARGETS.len());
    }
}
