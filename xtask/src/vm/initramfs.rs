//! Owns the guest's root file system: busybox, the tests, the libraries they load, and the kernel's modules.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    io::Write as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};

use super::{LEFT_OUT_TESTS, Selection, kernel::KernelFiles, run_folder::RunFolder};
use crate::{
    process::{capture, shown},
    setup::find_program,
    suites::{Built, Place, Suite},
};

/// What the harness, the agent and the tests use; built-in ones and ones a kernel does not have are left out.
const MODULES: [&str; 24] = [
    "veth",
    "bridge",
    "dummy",
    "tun",
    "macvlan",
    "ipvlan",
    "sch_ingress",
    "sch_fq",
    "sch_fq_codel",
    "sch_netem",
    "sch_tbf",
    "cls_bpf",
    "act_mirred",
    "nf_tables",
    "nf_conntrack",
    "nft_ct",
    "nft_chain_nat",
    "nft_reject_inet",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "unix_diag",
    "tls",
    "virtio_rng",
];

/// Real programs preferred to busybox's; those the host lacks are left out.
const PROGRAMS: [&str; 6] = ["ip", "ss", "tc", "bridge", "nft", "bpftool"];

/// Builds the root file system and packs it.
pub(super) fn make(
    run: &RunFolder,
    kernel: &KernelFiles,
    built: &Built,
    suites: &[&Suite],
    selection: &Selection<'_>,
) -> anyhow::Result<()> {
    let root = Root::empty(run.root())?;
    for below in ["dev", "proc", "sys", "tmp", "run", "root", "var", "etc", "usr/sbin", "usr/bin"] {
        root.folder(below)?;
    }
    symlink("/run", root.at("var/run")).context("link /var/run")?;
    root.text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n")?;
    root.text("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
    root.text("etc/nsswitch.conf", "hosts: files dns\n")?;
    // Empty: tests bind their pods' own over it.
    root.text("etc/resolv.conf", "")?;
    root.script("init", include_str!("init.sh"))?;

    let busybox = find_program("busybox").context("find busybox")?;
    root.program(&busybox, "bin/busybox")?;
    // Debian's busybox shell prefers its own `ip` to the real one, whatever PATH says.
    let shell = find_program("sh").context("find a shell")?;
    root.program(&shell, "bin/sh")?;
    for name in PROGRAMS {
        if let Some(path) = find_program(name) {
            root.program(&path, &format!("sbin/{name}"))?;
        }
    }
    copy_modules(&root, kernel)?;

    for (name, path) in &built.programs {
        root.program(path, &format!("programs/{name}"))?;
    }
    let mut folders = BTreeSet::new();
    for (number, suite) in suites.iter().enumerate() {
        root.program(&suite.program, &guest_path(number))?;
        if folders.insert(&suite.folder) {
            copy_data(&root, &suite.folder)?;
        }
    }
    root.text("run-tests.sh", &script(built, suites, selection))?;
    pack(&root, &run.initramfs())
}

/// A suite's place below the guest's root.
fn guest_path(number: usize) -> String {
    format!("tests/{number}")
}

/// The guest's work, each program between two lines that the host looks for.
fn script(built: &Built, suites: &[&Suite], selection: &Selection<'_>) -> String {
    let mut script = String::from("export MESH_TESTS_VM=1 MESH_TESTS_REQUIRE=1\n");
    for (variable, path) in built.variables(|name, _| OsString::from(format!("/programs/{name}"))) {
        script += &format!("export {variable}={}\n", path.display());
    }
    let skipped = if selection.keeps_all() { &[][..] } else { &LEFT_OUT_TESTS };
    let skipped = skipped.iter().flat_map(|&name| ["--skip", name]);
    let extra = selection.extra.iter().map(String::as_str);
    let arguments: Vec<String> =
        selection.filter.into_iter().chain(skipped).chain(extra).map(quoted).collect();
    for (number, suite) in suites.iter().enumerate() {
        // Programs attached to one cgroup root see each other's sockets; elsewhere two use both processors.
        let threads = if suite.place == Place::Bpf { 1 } else { 2 };
        script += &format!(
            "echo 'nodemesh-guest: begin {number}'\ncd {} && CARGO_MANIFEST_DIR=$PWD RUST_TEST_THREADS={threads} /{} {}\necho \"nodemesh-guest: end {number} $?\"\n",
            quoted(&suite.folder.to_string_lossy()),
            guest_path(number),
            arguments.join(" "),
        );
    }
    script
}

/// Quoted for the shell.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A folder that will be the guest's `/`.
struct Root(PathBuf);

impl Root {
    fn empty(path: PathBuf) -> anyhow::Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }

    /// A path of the guest, absolute or not, on the host.
    fn at(&self, guest: impl AsRef<Path>) -> PathBuf {
        let guest = guest.as_ref();
        self.0.join(guest.strip_prefix("/").unwrap_or(guest))
    }

    fn folder(&self, guest: impl AsRef<Path>) -> anyhow::Result<()> {
        let path = self.at(guest);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))
    }

    fn parent_of(&self, guest: &Path) -> anyhow::Result<()> {
        guest.parent().map_or(Ok(()), |parent| self.folder(parent))
    }

    fn text(&self, guest: &str, text: &str) -> anyhow::Result<()> {
        self.parent_of(Path::new(guest))?;
        fs::write(self.at(guest), text).with_context(|| format!("write the guest's {guest}"))
    }

    fn script(&self, guest: &str, text: &str) -> anyhow::Result<()> {
        self.text(guest, text)?;
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(self.at(guest), executable).with_context(|| format!("make {guest} executable"))
    }

    fn copy(&self, host: &Path, guest: &Path) -> anyhow::Result<()> {
        self.parent_of(guest)?;
        fs::copy(host, self.at(guest)).with_context(|| format!("copy {} into the guest", host.display()))?;
        Ok(())
    }

    /// Copies a program without its debug information, and the libraries it loads.
    fn program(&self, host: &Path, guest: &str) -> anyhow::Result<()> {
        self.parent_of(Path::new(guest))?;
        capture(Command::new("strip").args(["--strip-debug", "-o"]).arg(self.at(guest)).arg(host))?;
        // Fails for a static program, which then needs nothing.
        let Ok(loaded) = capture(Command::new("ldd").arg(host)) else { return Ok(()) };
        for library in libraries(&String::from_utf8_lossy(&loaded)) {
            if !self.at(library).exists() {
                self.copy(Path::new(library), Path::new(library))?;
            }
        }
        Ok(())
    }
}

/// The paths in the output of `ldd`.
fn libraries(ldd: &str) -> impl Iterator<Item = &str> {
    ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
}

/// Files beside the tests, at the same path: tests may read samples at run time.
fn copy_data(root: &Root, folder: &Path) -> anyhow::Result<()> {
    root.folder(folder)?;
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            // Another package, with its own tests.
            if !path.join("Cargo.toml").exists() {
                copy_data(root, &path)?;
            }
        } else if path.extension().is_none_or(|extension| extension != "rs") {
            root.copy(&path, &path)?;
        }
    }
    Ok(())
}

/// Puts the modules into `/modules`, unpacked and numbered so that each comes after those it needs.
fn copy_modules(root: &Root, kernel: &KernelFiles) -> anyhow::Result<()> {
    let list = fs::read_to_string(kernel.modules.join("modules.dep")).context("read modules.dep")?;
    root.folder("modules")?;
    for (number, path) in load_order(&list, &MODULES).into_iter().enumerate() {
        let packed = kernel.modules.join(path);
        let guest = root.at(format!("modules/{number:03}-{}.ko", module_name(path)));
        let unpacker = match packed.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => "xz",
            Some("zst") => "zstd",
            _ => "cat",
        };
        let mut unpack = Command::new(unpacker);
        if unpacker != "cat" {
            unpack.args(["--decompress", "--stdout"]);
        }
        fs::write(&guest, capture(unpack.arg(&packed))?)
            .with_context(|| format!("write {}", guest.display()))?;
    }
    Ok(())
}

/// Module files to load for `wanted`, dependencies first, each once. A line of `list` is `module: those it needs`,
/// the last of which must be loaded first.
fn load_order<'a>(list: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let lines = list.lines().filter_map(|line| line.split_once(':'));
    let needs: BTreeMap<String, (&str, &str)> =
        lines.map(|(path, needs)| (module_name(path), (path, needs))).collect();
    let mut order = Vec::new();
    for (path, needed) in wanted.iter().filter_map(|&name| needs.get(name)) {
        for module in needed.split_whitespace().rev().chain([*path]) {
            if !order.contains(&module) {
                order.push(module);
            }
        }
    }
    order
}

/// `kernel/net/sched/sch-ingress.ko.xz` is `sch_ingress`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}

/// Packs the root uncompressed: unpacking costs more under emulation than reading.
fn pack(root: &Root, target: &Path) -> anyhow::Result<()> {
    let names = capture(Command::new("find").args([".", "-print0"]).current_dir(&root.0))?;
    let archive = fs::File::create(target).with_context(|| format!("create {}", target.display()))?;
    let mut cpio = Command::new("cpio");
    cpio.args(["--quiet", "--null", "--create", "--format=newc", "--owner=0:0"]).current_dir(&root.0);
    let mut packing = cpio.stdin(Stdio::piped()).stdout(archive).spawn().context("start cpio")?;
    let mut stdin = packing.stdin.take().context("invariant: stdin is piped")?;
    stdin.write_all(&names).context("name the files to cpio")?;
    drop(stdin);
    let status = packing.wait().context("wait for cpio")?;
    ensure!(status.success(), "`{}` failed with {status}", shown(&cpio));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_only_once() {
        let list = "kernel/net/bridge/bridge.ko: kernel/net/802/stp.ko kernel/net/llc/llc.ko\n\
                    kernel/net/802/stp.ko: kernel/net/llc/llc.ko\n\
                    kernel/net/llc/llc.ko:\n\
                    kernel/drivers/net/veth.ko.xz:\n";
        let order = load_order(list, &["bridge", "stp", "veth", "not_here"]);
        let names: Vec<String> = order.into_iter().map(module_name).collect();
        assert_eq!(names, ["llc", "stp", "bridge", "veth"]);
    }

    #[test]
    fn libraries_are_read_from_ldd() {
        let ldd = "\tlinux-vdso.so.1 (0x0)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x1)\n\t/lib64/ld-linux-x86-64.so.2 (0x2)\n";
        assert_eq!(
            libraries(ldd).collect::<Vec<_>>(),
            ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
    }

    #[test]
    fn words_survive_the_guests_shell() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
