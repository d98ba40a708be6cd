//! Owns how the eBPF toolchain is found and how `mesh-ebpf` is built with it.
//!
//! Standard library only: `mesh-agent/redirect/build.rs` compiles this very file, so `cargo build` and
//! `cargo xtask` can never disagree about what is missing.
//!
//! Not here: installing anything (see `setup.rs`).

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What anyone with an incomplete toolchain has to type.
pub(crate) const SETUP_COMMAND: &str = "cargo xtask setup";
/// The linker version this tree is tested with; it reads bitcode up to [`LLVM_MAJOR`].
pub(crate) const BPF_LINKER_VERSION: &str = "0.13.0";
/// LLVM that bpf-linker is built against. A compiler with a newer LLVM writes bitcode it cannot read.
pub(crate) const LLVM_MAJOR: u32 = 22;
/// Where `cargo xtask setup` puts tools, below the workspace root.
pub(crate) const TOOLS_DIR: &str = "target/tools";

/// Oldest compiler that accepts the crates of the tree (`rust-version` of the workspace).
const RUSTC_MIN: (u32, u32) = (1, 95);
const BPF_TARGET: &str = "bpfel-unknown-none";
const OBJECT_NAME: &str = "mesh-ebpf";

/// A compiler that can build `core` for the BPF target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    /// Where it comes from, for humans: `rustup nightly-…` or `Debian rustc-web`.
    pub(crate) origin: String,
    /// What it says about itself, for example `rustc 1.97.0-nightly`.
    pub(crate) version: String,
    rustc: PathBuf,
    cargo: PathBuf,
    /// A stable compiler: unstable flags need `RUSTC_BOOTSTRAP`.
    bootstrap: bool,
}

/// Everything needed to build the eBPF programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

/// Why the eBPF programs cannot be built on this machine; at least one field is set.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MissingToolchain {
    pub(crate) compiler: Option<String>,
    pub(crate) linker: Option<String>,
}

impl fmt::Display for MissingToolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<&str> =
            [&self.compiler, &self.linker].into_iter().flatten().map(String::as_str).collect();
        write!(
            f,
            "the eBPF toolchain is incomplete: {}. Run `{SETUP_COMMAND}`: it names and installs what is missing",
            parts.join("; ")
        )
    }
}

impl std::error::Error for MissingToolchain {}

/// Finds the compiler and the linker, or says everything that is missing at once.
pub(crate) fn find(root: &Path) -> Result<Toolchain, MissingToolchain> {
    match (find_compiler(), find_linker(root)) {
        (Ok(compiler), Ok(linker)) => Ok(Toolchain { compiler, linker }),
        (compiler, linker) => Err(MissingToolchain { compiler: compiler.err(), linker: linker.err() }),
    }
}

/// Any rustup nightly first, then Debian's `rustc-web`; both need the library sources next to them.
pub(crate) fn find_compiler() -> Result<Compiler, String> {
    let mut rejected = Vec::new();
    for name in rustup_nightlies() {
        let Some(rustc) = stdout_of(Command::new("rustup").args(["which", "rustc", "--toolchain", &name]))
        else {
            continue;
        };
        let rustc = PathBuf::from(rustc);
        let cargo = rustc.with_file_name("cargo");
        match usable(&rustc) {
            Ok(version) => {
                return Ok(Compiler {
                    origin: format!("rustup {name}"),
                    version,
                    rustc,
                    cargo,
                    bootstrap: false,
                });
            }
            Err(why) => rejected.push(format!("rustup {name} {why}")),
        }
    }
    let debian = PathBuf::from("/usr/bin/rustc");
    if debian.is_file() {
        match usable(&debian) {
            Ok(version) => {
                // The cargo that runs us will do: only the compiler has to match its library sources.
                let cargo = env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
                let origin = "Debian rustc-web".to_owned();
                return Ok(Compiler { origin, version, rustc: debian, cargo, bootstrap: true });
            }
            Err(why) => rejected.push(format!("{} {why}", debian.display())),
        }
    }
    if rejected.is_empty() {
        return Err(
            "no compiler for the BPF target (a nightly with rust-src, or Debian's rustc-web)".to_owned()
        );
    }
    Err(format!("no usable compiler for the BPF target ({})", rejected.join(", ")))
}

/// Our own build of bpf-linker first, then one of the same release line on `PATH`.
pub(crate) fn find_linker(root: &Path) -> Result<PathBuf, String> {
    let ours = root.join(TOOLS_DIR).join("bin/bpf-linker");
    let on_path = env::var_os("PATH").unwrap_or_default();
    let candidates = env::split_paths(&on_path).map(|dir| dir.join("bpf-linker"));
    let mut rejected = String::new();
    for candidate in std::iter::once(ours).chain(candidates) {
        if !candidate.is_file() {
            continue;
        }
        match stdout_of(Command::new(&candidate).arg("--version")) {
            Some(said) if linker_version_fits(&said) => return Ok(candidate),
            Some(said) => rejected = format!(" ({} is {said})", candidate.display()),
            None => rejected = format!(" ({} does not run)", candidate.display()),
        }
    }
    Err(format!("bpf-linker {BPF_LINKER_VERSION} is missing{rejected}"))
}

/// Same minor version: bpf-linker is not yet 1.0, so minors are where it changes.
fn linker_version_fits(said: &str) -> bool {
    let wanted = BPF_LINKER_VERSION.rsplit_once('.').map_or(BPF_LINKER_VERSION, |(line, _)| line);
    said.rsplit(' ')
        .next()
        .is_some_and(|version| version.strip_prefix(wanted).is_some_and(|r| r.starts_with('.')))
}

fn rustup_nightlies() -> Vec<String> {
    let listed = stdout_of(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
    let names = listed.lines().filter_map(|line| line.split_whitespace().next());
    names.filter(|name| name.starts_with("nightly")).map(str::to_owned).collect()
}

/// `Ok(version)` or a phrase that completes "this compiler …".
fn usable(rustc: &Path) -> Result<String, String> {
    let verbose = stdout_of(Command::new(rustc).arg("-vV")).ok_or("does not run")?;
    check_version(&verbose)?;
    let sysroot = stdout_of(Command::new(rustc).args(["--print", "sysroot"])).ok_or("has no sysroot")?;
    let library = Path::new(&sysroot).join("lib/rustlib/src/rust/library");
    if !library.join("core/src/lib.rs").is_file() {
        return Err("lacks the library sources (rust-src)".to_owned());
    }
    Ok(verbose.lines().next().unwrap_or_default().to_owned())
}

/// Judges the output of `rustc -vV`.
fn check_version(verbose: &str) -> Result<(), String> {
    let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let numbers =
        |text: &str| -> Vec<u32> { text.split(['.', '-']).map_while(|part| part.parse().ok()).collect() };
    let release = field("release:").map(numbers).unwrap_or_default();
    let [major, minor, ..] = release[..] else { return Err("does not state its release".to_owned()) };
    if (major, minor) < RUSTC_MIN {
        return Err(format!("is {major}.{minor}, older than {}.{}", RUSTC_MIN.0, RUSTC_MIN.1));
    }
    let llvm = field("LLVM version:").map(numbers).unwrap_or_default().first().copied().unwrap_or_default();
    if llvm > LLVM_MAJOR {
        return Err(format!("uses LLVM {llvm}, newer than bpf-linker's {LLVM_MAJOR}"));
    }
    Ok(())
}

/// Why building the programs failed although the toolchain is there.
#[derive(Debug)]
pub(crate) enum BuildError {
    /// Cargo could not be started.
    Spawn { cargo: PathBuf, source: std::io::Error },
    /// Cargo or the linker reported errors; they have been printed.
    Failed,
    /// Cargo succeeded but left no object.
    NoObject(PathBuf),
    /// What it left is no ELF object as the linker writes them.
    Malformed(PathBuf),
    /// The object could not be read or written.
    File { path: PathBuf, source: std::io::Error },
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Spawn { cargo, .. } => write!(f, "start {}", cargo.display()),
            Self::Failed => f.write_str("the eBPF programs do not compile; see the errors above"),
            Self::NoObject(path) => write!(f, "the build left no eBPF object at {}", path.display()),
            Self::Malformed(path) => write!(f, "{} is not the object of a BPF linker", path.display()),
            Self::File { path, .. } => write!(f, "read or write {}", path.display()),
        }
    }
}

impl std::error::Error for BuildError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Spawn { source, .. } | Self::File { source, .. } => Some(source),
            Self::Failed | Self::NoObject(_) | Self::Malformed(_) => None,
        }
    }
}

/// Builds the programs into `target_dir` and returns the object's path. Compiler output goes to stderr.
///
/// `target_dir` must not be the target directory of a cargo that waits for us: cargo locks it.
pub(crate) fn build(root: &Path, toolchain: &Toolchain, target_dir: &Path) -> Result<PathBuf, BuildError> {
    let compiler = &toolchain.compiler;
    let mut cargo = Command::new(&compiler.cargo);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_outer_build_setting) {
            cargo.env_remove(name);
        }
    }
    let mut linker = std::ffi::OsString::from("-Clinker=");
    linker.push(&toolchain.linker);
    let mut flags = vec![
        // Some kernel types in aya-ebpf depend on the architecture of the kernel that loads the programs.
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH).into(),
        // v3 has 32-bit jumps and ALU; every kernel of the support range runs it.
        "-Ctarget-cpu=v3".into(),
        // BTF is derived from DWARF; the loader needs it for typed maps and for readable verifier logs.
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        linker,
    ];
    // BTF and DWARF name source files; the object is to be the same wherever it is built. The last that fits wins.
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let sysroot = stdout_of(Command::new(&compiler.rustc).args(["--print", "sysroot"])).unwrap_or_default();
    let folders = [
        (cargo_home, "/cargo"),
        (PathBuf::from(sysroot), "/rust"),
        (root.to_owned(), "/nodemesh"),
        (target_dir.to_owned(), "/target"),
    ];
    for (from, to) in folders.iter().filter(|(from, _)| from.is_absolute()) {
        let mut flag = std::ffi::OsString::from("--remap-path-prefix=");
        flag.push(from);
        flag.push("=");
        flag.push(to);
        flags.push(flag);
    }
    cargo
        .current_dir(root.join("mesh-ebpf"))
        .env("RUSTC", &compiler.rustc)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join(std::ffi::OsStr::new("\x1f")))
        .args(["build", "--locked", "--release", "--quiet", "-Z", "build-std=core", "--target", BPF_TARGET])
        .arg("--target-dir")
        .arg(target_dir)
        .stdin(Stdio::null());
    if compiler.bootstrap {
        cargo.env("RUSTC_BOOTSTRAP", "1");
    }
    let status =
        cargo.status().map_err(|source| BuildError::Spawn { cargo: compiler.cargo.clone(), source })?;
    if !status.success() {
        return Err(BuildError::Failed);
    }
    let linked = target_dir.join(BPF_TARGET).join("release").join(OBJECT_NAME);
    if !linked.is_file() {
        return Err(BuildError::NoObject(linked));
    }
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| BuildError::File { path, source }
    };
    let mut object = std::fs::read(&linked).map_err(file(&linked))?;
    if blank_debug_sections(&mut object).is_none() {
        return Err(BuildError::Malformed(linked));
    }
    // Cargo's own output stays what cargo made.
    let kept = target_dir.join(OBJECT_NAME).with_extension("o");
    std::fs::write(&kept, object).map_err(file(&kept))?;
    Ok(kept)
}

/// Fills DWARF with zeros: loaders read BTF, and DWARF has names with a hash of the folder that mesh-common was in. `None` if this is
/// no 64-bit little-endian ELF object.
fn blank_debug_sections(object: &mut [u8]) -> Option<()> {
    const SECTION_HEADER: usize = 64;
    if !object.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let number = |object: &[u8], at: usize, size: usize| -> Option<usize> {
        let bytes = object.get(at..at.checked_add(size)?)?;
        let value = bytes.iter().rev().fold(0_u64, |value, byte| value << 8 | u64::from(*byte));
        usize::try_from(value).ok()
    };
    let (headers, count) = (number(object, 0x28, 8)?, number(object, 0x3c, 2)?);
    let header = |index: usize| headers.checked_add(index.checked_mul(SECTION_HEADER)?);
    let place = |object: &[u8], header: usize| {
        let (start, size) = (number(object, header + 0x18, 8)?, number(object, header + 0x20, 8)?);
        Some(start..start.checked_add(size)?)
    };
    let names = place(object, header(number(object, 0x3e, 2)?)?)?;
    let mut blank = Vec::new();
    for index in 0..count {
        let header = header(index)?;
        let name = object.get(names.start.checked_add(number(object, header, 4)?)?..names.end)?;
        // Not their relocations: loaders read all of those, and there is nothing of a folder in them.
        if name.starts_with(b".debug_") {
            let place = place(object, header)?;
            object.get(place.clone())?;
            blank.push(place);
        }
    }
    for place in blank {
        object.get_mut(place)?.fill(0);
    }
    Some(())
}

/// Variables an outer cargo sets for its own target; they would leak into the nested build.
///
/// Settings of the user's network and registries stay.
fn is_outer_build_setting(name: &str) -> bool {
    const KEPT: [&str; 5] = ["CARGO_HOME", "CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_"];
    const DROPPED: [&str; 12] = [
        "DEBUG",
        "HOST",
        "MAKEFLAGS",
        "NUM_JOBS",
        "OPT_LEVEL",
        "OUT_DIR",
        "PROFILE",
        "RUSTDOC",
        "RUSTDOCFLAGS",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "TARGET",
    ];
    let of_cargo = name.starts_with("CARGO") && !KEPT.iter().any(|kept| name.starts_with(kept));
    of_cargo || name.starts_with("RUSTC") || DROPPED.contains(&name)
}

/// Trimmed stdout of a command that succeeded with some output.
fn stdout_of(command: &mut Command) -> Option<String> {
    // Inside a build or `cargo xtask`, this names the *outer* toolchain; the callee must not follow it.
    let output =
        command.env_remove("RUSTUP_TOOLCHAIN").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verbose(release: &str, llvm: &str) -> String {
        format!("rustc {release} (0123 2026-05-19)\nbinary: rustc\nrelease: {release}\nLLVM version: {llvm}")
    }

    #[test]
    fn a_compiler_must_be_new_enough_for_the_tree_and_old_enough_for_the_linker() {
        assert_eq!(check_version(&verbose("1.97.0-nightly", "22.1.4")), Ok(()));
        assert_eq!(check_version(&verbose("1.96.0", "21.0.0")), Ok(()));
        assert!(check_version(&verbose("1.85.0", "19.1.0")).unwrap_err().contains("older than 1.95"));
        assert!(check_version(&verbose("1.99.0-nightly", "23.0.0")).unwrap_err().contains("LLVM 23"));
        assert!(check_version("nonsense").is_err());
    }

    #[test]
    fn a_linker_of_another_release_line_is_not_ours() {
        assert!(linker_version_fits("bpf-linker 0.13.0"));
        assert!(linker_version_fits("bpf-linker 0.13.7"));
        assert!(!linker_version_fits("bpf-linker 0.9.15"));
        assert!(!linker_version_fits("bpf-linker 0.130.0"));
    }

    #[test]
    fn the_outer_build_does_not_leak_but_the_users_registry_stays() {
        for name in
            ["RUSTC", "RUSTC_WRAPPER", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN"]
        {
            assert!(is_outer_build_setting(name), "{name}");
        }
        for name in ["PATH", "CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_REGISTRIES_X_INDEX", "RUSTUP_HOME"] {
            assert!(!is_outer_build_setting(name), "{name}");
        }
    }

    /// An object of three sections: names, and two with a byte of contents each.
    fn object(first: &str, second: &str) -> Vec<u8> {
        let names = format!("\0{first}\0{second}\0");
        let mut object = b"\x7fELF\x02\x01".to_vec();
        object.resize(64, 0);
        let contents = object.len();
        object.extend(b"12");
        let names_at = object.len();
        object.extend(names.bytes());
        let headers = object.len();
        let sections = [(0, names_at, names.len()), (1, contents, 1), (2 + first.len(), contents + 1, 1)];
        for (name, start, size) in sections {
            let mut header = (name as u32).to_le_bytes().to_vec();
            header.resize(0x18, 0);
            header.extend((start as u64).to_le_bytes());
            header.extend((size as u64).to_le_bytes());
            header.resize(64, 0);
            object.extend(header);
        }
        object[0x28..0x30].copy_from_slice(&(headers as u64).to_le_bytes());
        object[0x3c..0x3e].copy_from_slice(&3_u16.to_le_bytes());
        object
    }

    #[test]
    fn what_only_debuggers_read_is_blank_and_all_else_stays() {
        let mut made = object(".debug_str", ".BTF");
        assert_eq!(blank_debug_sections(&mut made), Some(()));
        assert_eq!(made[64..66], [0, b'2']);
        let mut made = object(".rel.debug_info", ".debug_info");
        assert_eq!(blank_debug_sections(&mut made), Some(()));
        assert_eq!(made[64..66], [b'1', 0]);
    }

    #[test]
    fn what_is_no_object_is_refused_and_not_written_to() {
        let whole = object(".debug_str", ".BTF");
        for mut cut in [b"nothing".to_vec(), whole[..80].to_vec(), whole[..whole.len() - 65].to_vec()] {
            let before = cut.clone();
            assert_eq!(blank_debug_sections(&mut cut), None);
            assert_eq!(cut, before);
        }
    }

    #[test]
    fn the_message_names_every_gap_and_the_one_command() {
        let gaps =
            MissingToolchain { compiler: Some("no compiler".into()), linker: Some("no linker".into()) };
        let text = gaps.to_string();
        for wanted in ["no compiler", "no linker", SETUP_COMMAND] {
            assert!(text.contains(wanted), "{text}");
        }
    }
}
