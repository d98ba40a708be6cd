//! Owns the tools the tree needs beyond a stable Rust: naming what is missing and installing it.
//!
//! Invariants: nothing is installed that is already there; everything is named before it is installed;
//! without root or without apt nothing is touched and the exact commands are printed instead.
//!
//! Not here: deciding whether an eBPF compiler is usable (see `ebpf.rs`).

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail, ensure};

use crate::{cluster::go, ebpf, workspace::Workspace};

/// What a command is about to do; each needs its own tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Build the eBPF programs.
    Ebpf,
    /// Format and lint checks.
    Lint,
    /// Make network namespaces and links.
    Netns,
    /// Run other people's servers in the pods of tests. Only the programs are used; Debian's package may start nginx as a
    /// service, as it does wherever it is installed.
    Servers,
    /// Build and run Kubernetes. Only the programs are used; Debian's packages may start etcd and containerd as services,
    /// as they do wherever they are installed.
    Kubernetes,
    /// Complete what `meshctl completion` is for.
    Shells,
    /// Boot other kernels.
    Vm,
}

impl Need {
    pub(crate) const ALL: [Self; 7] =
        [Self::Ebpf, Self::Lint, Self::Netns, Self::Servers, Self::Kubernetes, Self::Shells, Self::Vm];
}

/// How a missing tool arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A Debian package.
    Apt(&'static str),
    /// A component of the Rust toolchain in use.
    RustComponent(&'static str),
    /// Whichever of the two routes of `ebpf::find_compiler` this machine can take.
    BpfCompiler,
    /// Built with cargo into the target directory, against LLVM's libraries from Debian.
    BpfLinker,
}

/// One tool, and how to see whether it is there.
struct Tool {
    name: &'static str,
    need: Need,
    source: Source,
    /// `Err` says in a few words what is wrong.
    check: fn(&Workspace) -> Result<(), String>,
}

const TOOLS: [Tool; 20] = [
    Tool {
        name: "a C compiler",
        need: Need::Ebpf,
        source: Source::Apt("build-essential"),
        check: |_| on_path("c++"),
    },
    Tool {
        name: "a compiler for BPF",
        need: Need::Ebpf,
        source: Source::BpfCompiler,
        check: |_| ebpf::find_compiler().map(drop),
    },
    Tool {
        name: "bpf-linker",
        need: Need::Ebpf,
        source: Source::BpfLinker,
        check: |workspace| ebpf::find_linker(&workspace.root).map(drop),
    },
    Tool {
        name: "rustfmt",
        need: Need::Lint,
        source: Source::RustComponent("rustfmt"),
        check: |_| cargo_has("fmt"),
    },
    Tool {
        name: "clippy",
        need: Need::Lint,
        source: Source::RustComponent("clippy"),
        check: |_| cargo_has("clippy"),
    },
    Tool {
        name: "nginx",
        need: Need::Servers,
        source: Source::Apt("nginx-light"),
        check: |_| on_path("nginx"),
    },
    Tool { name: "ip", need: Need::Netns, source: Source::Apt("iproute2"), check: |_| on_path("ip") },
    Tool { name: "nft", need: Need::Netns, source: Source::Apt("nftables"), check: |_| on_path("nft") },
    Tool {
        name: "Go",
        need: Need::Kubernetes,
        source: Source::Apt("golang-go"),
        check: |_| go::installed().map(drop).ok_or_else(|| "no `go` runs".to_owned()),
    },
    Tool {
        name: "etcd",
        need: Need::Kubernetes,
        source: Source::Apt("etcd-server"),
        check: |_| on_path("etcd"),
    },
    Tool {
        name: "containerd",
        need: Need::Kubernetes,
        source: Source::Apt("containerd"),
        check: |_| on_path("containerd"),
    },
    Tool { name: "runc", need: Need::Kubernetes, source: Source::Apt("runc"), check: |_| on_path("runc") },
    Tool {
        name: "the CNI plugins",
        need: Need::Kubernetes,
        source: Source::Apt("containernetworking-plugins"),
        check: |_| {
            let plugin = Path::new(CNI_PLUGINS).join("ptp");
            if plugin.is_file() { Ok(()) } else { Err(format!("there is no {}", plugin.display())) }
        },
    },
    Tool { name: "zsh", need: Need::Shells, source: Source::Apt("zsh"), check: |_| on_path("zsh") },
    Tool { name: "fish", need: Need::Shells, source: Source::Apt("fish"), check: |_| on_path("fish") },
    Tool {
        name: "qemu-system-x86_64",
        need: Need::Vm,
        source: Source::Apt("qemu-system-x86"),
        check: |_| on_path("qemu-system-x86_64"),
    },
    Tool {
        name: "busybox",
        need: Need::Vm,
        source: Source::Apt("busybox-static"),
        check: |_| on_path("busybox"),
    },
    Tool { name: "cpio", need: Need::Vm, source: Source::Apt("cpio"), check: |_| on_path("cpio") },
    Tool { name: "depmod", need: Need::Vm, source: Source::Apt("kmod"), check: |_| on_path("depmod") },
    Tool { name: "xz", need: Need::Vm, source: Source::Apt("xz-utils"), check: |_| on_path("xz") },
];

/// Where Debian puts CNI plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Debian's packages for the second compiler route.
const DEBIAN_COMPILER: [&str; 2] = ["rustc-web", "rust-web-src"];
/// The nightly this tree was built with; named by date, since a later one may outrun bpf-linker's LLVM.
const NIGHTLY: &str = "nightly-2026-05-20";

/// `cargo xtask setup`: everything, for every command.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    for tool in &TOOLS {
        match (tool.check)(workspace) {
            Ok(()) => eprintln!("setup: {} is there", tool.name),
            Err(why) => eprintln!("setup: {} is missing: {why}", tool.name),
        }
    }
    ensure(workspace, &Need::ALL)?;
    let toolchain = ebpf::find(&workspace.root)?;
    println!("ready: {} ({})", toolchain.compiler.version, toolchain.compiler.origin);
    Ok(())
}

/// Installs what the given needs lack. Silent, and without any network access, if nothing is missing.
pub(crate) fn ensure(workspace: &Workspace, needs: &[Need]) -> anyhow::Result<()> {
    let missing = missing(workspace, needs);
    if missing.is_empty() {
        return Ok(());
    }
    let mut plan = Plan::default();
    for (tool, _) in &missing {
        plan.add(tool);
    }
    for (tool, why) in &missing {
        eprintln!("setup: {} is needed: {why}", tool.name);
    }
    let lacks_rustup = plan.needs_rustup() && on_path("rustup").is_err();
    if (!plan.apt.is_empty() && !can_use_apt()) || lacks_rustup {
        bail!("{}", plan.by_hand());
    }
    plan.execute(workspace)?;
    let still: Vec<String> =
        self::missing(workspace, needs).iter().map(|(t, why)| format!("{} ({why})", t.name)).collect();
    ensure!(still.is_empty(), "still missing after the installation: {}", still.join(", "));
    eprintln!("setup: done");
    Ok(())
}

fn missing(workspace: &Workspace, needs: &[Need]) -> Vec<(&'static Tool, String)> {
    let wanted = TOOLS.iter().filter(|tool| needs.contains(&tool.need));
    wanted.filter_map(|tool| (tool.check)(workspace).err().map(|why| (tool, why))).collect()
}

/// What will be installed, in the order it is done.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    apt: Vec<&'static str>,
    components: Vec<&'static str>,
    /// An installed rustup nightly that only lacks the library sources.
    rust_src_for: Option<String>,
    /// No other way: a whole nightly through rustup.
    nightly: bool,
    linker: bool,
}

impl Plan {
    fn add(&mut self, tool: &Tool) {
        match tool.source {
            Source::Apt(package) => self.apt.push(package),
            Source::RustComponent(component) => self.components.push(component),
            Source::BpfCompiler => match compiler_route() {
                CompilerRoute::AddRustSrc(nightly) => self.rust_src_for = Some(nightly),
                CompilerRoute::Debian => self.apt.extend(DEBIAN_COMPILER),
                CompilerRoute::Nightly => self.nightly = true,
            },
            Source::BpfLinker => {
                if !llvm_prefix().join("include/llvm-c/Core.h").is_file() {
                    self.apt.push("llvm-22-dev");
                }
                self.linker = true;
            }
        }
    }

    /// The commands, for someone who has to type them.
    fn commands(&self) -> Vec<String> {
        let mut commands = Vec::new();
        if !self.apt.is_empty() {
            commands.push("apt-get update".to_owned());
            commands.push(format!("apt-get install --no-install-recommends {}", self.apt.join(" ")));
        }
        if !self.components.is_empty() {
            commands.push(format!("rustup component add {}", self.components.join(" ")));
        }
        if let Some(nightly) = &self.rust_src_for {
            commands.push(format!("rustup component add rust-src --toolchain {nightly}"));
        }
        if self.nightly {
            commands
                .push(format!("rustup toolchain install {NIGHTLY} --profile minimal --component rust-src"));
        }
        if self.linker {
            commands.push(format!(
                "LLVM_PREFIX={} cargo {} --root {}",
                llvm_prefix().display(),
                linker_arguments().join(" "),
                ebpf::TOOLS_DIR
            ));
        }
        commands
    }

    fn needs_rustup(&self) -> bool {
        self.nightly || self.rust_src_for.is_some() || !self.components.is_empty()
    }

    fn by_hand(&self) -> String {
        let intro = "this needs root on Debian, and rustup for Rust's own parts. As root run this, or install the \
                     same with your system's means:";
        let lines = self.commands().into_iter().map(|command| format!("\n    {command}"));
        lines.fold(intro.to_owned(), |text, line| text + &line)
    }

    fn execute(&self, workspace: &Workspace) -> anyhow::Result<()> {
        for command in self.commands() {
            eprintln!("setup: will run `{command}`");
        }
        if !self.apt.is_empty() {
            run_step(apt().arg("update"))?;
            let install =
                run_step(apt().args(["install", "--yes", "--no-install-recommends"]).args(&self.apt));
            install.with_context(|| format!("install the Debian packages {}", self.apt.join(", ")))?;
        }
        if !self.components.is_empty() {
            run_step(Command::new("rustup").args(["component", "add"]).args(&self.components))?;
        }
        if let Some(nightly) = &self.rust_src_for {
            let add = run_step(Command::new("rustup").args([
                "component",
                "add",
                "rust-src",
                "--toolchain",
                nightly,
            ]));
            if let Err(error) = add {
                if !can_use_apt() {
                    return Err(error);
                }
                eprintln!("setup: {error:#}; installing {} instead", DEBIAN_COMPILER.join(" and "));
                run_step(apt().arg("update"))?;
                run_step(apt().args(["install", "--yes", "--no-install-recommends"]).args(DEBIAN_COMPILER))?;
            }
        }
        if self.nightly {
            let arguments =
                ["toolchain", "install", NIGHTLY, "--profile", "minimal", "--component", "rust-src"];
            run_step(Command::new("rustup").args(arguments))?;
        }
        if self.linker {
            build_linker(workspace)?;
        }
        Ok(())
    }
}

/// The cheapest way to a compiler for BPF on this machine.
#[derive(Debug, PartialEq, Eq)]
enum CompilerRoute {
    AddRustSrc(String),
    Debian,
    Nightly,
}

fn compiler_route() -> CompilerRoute {
    let listed = Command::new("rustup").args(["toolchain", "list"]).stderr(Stdio::null()).output();
    let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let nightly = listed.as_deref().ok().and_then(first_nightly);
    match nightly {
        Some(nightly) => CompilerRoute::AddRustSrc(nightly),
        // Debian's packages come from the mirror the machine already trusts; rustup's download is the last resort.
        None if listed.is_err() || can_use_apt() => CompilerRoute::Debian,
        None => CompilerRoute::Nightly,
    }
}

fn first_nightly(rustup_list: &str) -> Option<String> {
    let names = rustup_list.lines().filter_map(|line| line.split_whitespace().next());
    names.into_iter().find(|name| name.starts_with("nightly")).map(str::to_owned)
}

fn build_linker(workspace: &Workspace) -> anyhow::Result<()> {
    let mut install = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for outer in ["CARGO_TARGET_DIR", "CARGO_ENCODED_RUSTFLAGS", "RUSTFLAGS", "RUSTC_WRAPPER"] {
        install.env_remove(outer);
    }
    install.env("LLVM_PREFIX", llvm_prefix()).args(linker_arguments());
    install.arg("--root").arg(workspace.root.join(ebpf::TOOLS_DIR));
    // An old build that no longer runs (a changed libLLVM, say) is still recorded as installed.
    install.arg("--force");
    run_step(&mut install).context("build bpf-linker")
}

fn linker_arguments() -> [&'static str; 8] {
    let version = ebpf::BPF_LINKER_VERSION;
    [
        "install",
        "bpf-linker",
        "--version",
        version,
        "--no-default-features",
        "--features",
        "llvm-22",
        "--locked",
    ]
}

fn llvm_prefix() -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{}", ebpf::LLVM_MAJOR))
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    // Another apt on the machine (an unattended upgrade) is waited for, not failed on.
    apt.env("DEBIAN_FRONTEND", "noninteractive").args(["-q", "-o", "DPkg::Lock::Timeout=120"]);
    apt
}

fn can_use_apt() -> bool {
    nix::unistd::geteuid().is_root() && on_path("apt-get").is_ok()
}

/// Runs one installation step with its output on stderr: stdout belongs to the command's own result.
fn run_step(command: &mut Command) -> anyhow::Result<()> {
    let shown = format!("{command:?}");
    eprintln!("setup: {}", shown.replace('"', ""));
    let status = command.stdin(Stdio::null()).stdout(std::io::stderr()).status();
    let status = status.with_context(|| format!("start {shown}"))?;
    ensure!(status.success(), "{shown} failed with {status}");
    Ok(())
}

fn cargo_has(subcommand: &str) -> Result<(), String> {
    let probe = Command::new("cargo")
        .args([subcommand, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match probe {
        Ok(status) if status.success() => Ok(()),
        Ok(_) | Err(_) => Err(format!("`cargo {subcommand}` does not run")),
    }
}

fn on_path(program: &str) -> Result<(), String> {
    find_program(program).map(drop).ok_or_else(|| format!("`{program}` is not installed"))
}

/// Looks on `PATH` and in the system directories that a plain user's `PATH` may lack.
pub(crate) fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    let folders = env::split_paths(&path).chain(system);
    folders.map(|folder| folder.join(program)).find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dated_nightly_counts_as_one() {
        let list = "stable-x86_64-unknown-linux-gnu (active, default)\nnightly-2026-05-20-x86_64-unknown-linux-gnu\n";
        assert_eq!(first_nightly(list).as_deref(), Some("nightly-2026-05-20-x86_64-unknown-linux-gnu"));
        assert_eq!(first_nightly("stable-x86_64-unknown-linux-gnu (default)"), None);
    }

    #[test]
    fn the_advice_holds_every_command_to_type() {
        let plan = Plan { apt: vec!["iproute2", "cpio"], nightly: true, linker: true, ..Plan::default() };
        let text = plan.by_hand();
        for wanted in
            ["apt-get install --no-install-recommends iproute2 cpio", NIGHTLY, "cargo install bpf-linker"]
        {
            assert!(text.contains(wanted), "{wanted} is not in {text}");
        }
    }

    #[test]
    fn every_need_has_a_tool() {
        for need in Need::ALL {
            assert!(TOOLS.iter().any(|tool| tool.need == need), "{need:?}");
        }
    }

    #[test]
    fn programs_are_found_by_name() {
        assert!(find_program("sh").is_some());
        assert_eq!(find_program("surely-not-a-program"), None);
    }
}
