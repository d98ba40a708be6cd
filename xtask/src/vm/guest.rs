//! Owns running a guest under qemu and reading its verdict from the serial port.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use crate::{
    libtest::Tally,
    process::{self, Ended, capture},
    suites::Suite,
    workspace::Workspace,
};

/// Enough for the largest netns test and the root file system, which is in memory too.
const MEMORY: &str = "3G";
const PROCESSORS: &str = "2";
/// A guest reaches its first line in a second under KVM; some machines offer a KVM on which guests hang.
const KVM_PROBE: Duration = Duration::from_secs(20);
/// How much of a guest's console is shown when it does not end by itself.
const CONSOLE_LINES: usize = 60;

/// The files a guest is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guest<'a> {
    /// Where the console log goes.
    pub(super) folder: &'a Path,
    pub(super) kernel: &'a Path,
    pub(super) initramfs: &'a Path,
}

impl Guest<'_> {
    /// Archive of what failed tests left; empty if nothing was left.
    fn artefacts(&self) -> PathBuf {
        self.folder.join("artefacts.tar.gz")
    }
}

/// How qemu runs a guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    /// Emulation: 10 to 20 times slower.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Tcg => "emulation (TCG)",
        })
    }
}

/// KVM if a guest comes up under it, found out once for each boot of this machine.
pub(super) fn accelerator(workspace: &Workspace, guest: &Guest<'_>) -> anyhow::Result<Accelerator> {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(Accelerator::Tcg);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let note = workspace.target.join("vm/kvm-works");
    let known = fs::read_to_string(&note).unwrap_or_default();
    match known.strip_prefix(boot.trim()).map(str::trim) {
        Some("yes") => return Ok(Accelerator::Kvm),
        Some("no") => return Ok(Accelerator::Tcg),
        Some(_) | None => {}
    }
    println!("probing KVM, for at most {} s", KVM_PROBE.as_secs());
    let mut up = false;
    let mut probe = command(guest, Accelerator::Kvm, "nodemesh.probe");
    let ended = process::stream(&mut probe, Instant::now() + KVM_PROBE, |line| {
        up |= line.starts_with("nodemesh-guest: up")
    })?;
    let works = up && ended.success();
    let answer = if works { "yes" } else { "no" };
    fs::write(&note, format!("{} {answer}\n", boot.trim())).context("note whether KVM works")?;
    Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
}

/// Boots of a guest that dies before its first test: emulation sends a kernel astray now and then.
const BOOTS_MAX: u32 = 2;

/// Boots the guest, streams what the tests print, and adds it up. A guest that dies at a test is a failed test.
pub(super) fn run(
    guest: &Guest<'_>,
    accelerator: Accelerator,
    suites: &[&Suite],
    deadline: Instant,
) -> anyhow::Result<Tally> {
    for left in (0..BOOTS_MAX).rev() {
        let mut reading = Reading { suites, total: Tally::default(), current: None, next: 0, is_down: false };
        let ended =
            process::stream(&mut command(guest, accelerator, ""), deadline, |line| reading.read(line))?;
        if !reading.is_down {
            print_console(guest);
        }
        if let Ended::Exited(status) = ended
            && reading.next == 0
            && reading.current.is_none()
        {
            println!("the guest never came to its tests; qemu ended with {status}; boots left: {left}");
            continue;
        }
        unpack_artefacts(guest)?;
        return Ok(reading.finish(ended));
    }
    bail!("the guest never came to its tests, {BOOTS_MAX} times")
}

fn command(guest: &Guest<'_>, accelerator: Accelerator, more: &str) -> Command {
    let mut qemu = process::command("qemu-system-x86_64");
    let (accel, cpu) = match accelerator {
        Accelerator::Kvm => ("kvm", "host"),
        // Multi-threaded, with room for the translated code of the tests. A plain processor: vector units are slow
        // to emulate. Without CMPXCHG16B: qemu 7.2 returns with broken flags from it now and then, which the
        // kernel's allocator answers with a double fault. Newer kernels (7.2) make socket storage with an
        // allocator that needs that instruction or a debugged slab: hence `slab_debug` below, with red zones, the
        // cheapest kind.
        Accelerator::Tcg => ("tcg,thread=multi,tb-size=512", "Nehalem,cx16=off,rdrand=on"),
    };
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-accel", accel, "-cpu", cpu, "-smp", PROCESSORS, "-m", MEMORY])
        .arg("-kernel")
        .arg(guest.kernel)
        .arg("-initrd")
        .arg(guest.initramfs)
        // A panic ends the guest at once.
        .args([
            "-append",
            &format!("console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off slab_debug=Z {more}"),
        ])
        .arg("-serial")
        .arg(format!("file:{}", guest.folder.join("console.log").display()))
        .args(["-chardev", "stdio,id=tests,signal=off", "-serial", "chardev:tests"])
        .arg("-serial")
        .arg(format!("file:{}", guest.artefacts().display()));
    qemu
}

/// Follows the guest's output line by line.
struct Reading<'a> {
    suites: &'a [&'a Suite],
    total: Tally,
    /// The suite that runs now, and what it has reported.
    current: Option<(usize, Tally)>,
    /// The first suite that has not begun.
    next: usize,
    /// The guest said that it ends.
    is_down: bool,
}

impl Reading<'_> {
    fn read(&mut self, line: &str) {
        let Some(event) = line.trim().strip_prefix("nodemesh-guest: ") else {
            if let Some((_, tally)) = &mut self.current {
                tally.read(line);
            }
            return;
        };
        let mut words = event.split_whitespace();
        match (words.next(), words.next().and_then(|word| word.parse::<usize>().ok())) {
            (Some("begin"), Some(number)) => {
                self.next = number + 1;
                self.current = Some((number, Tally::default()));
                println!("\n{}", self.name(number));
            }
            (Some("end"), Some(_)) => {
                let status = words.next().unwrap_or("?");
                self.settle(status == "0", &format!("exit status {status}"));
            }
            (Some("down"), _) => self.is_down = true,
            _ => {}
        }
    }

    fn settle(&mut self, ended_well: bool, why: &str) {
        if let Some((number, mut tally)) = self.current.take() {
            tally.settle(&self.name(number), ended_well, why);
            self.total.add(tally);
        }
    }

    fn name(&self, number: usize) -> String {
        self.suites.get(number).map(|suite| suite.name.clone()).unwrap_or_default()
    }

    /// Suites that did not get to run, or to end, count as failures.
    fn finish(mut self, ended: Ended) -> Tally {
        let why = match ended {
            Ended::TimedOut => "the guest ran into its deadline",
            Ended::Exited(_) => "the guest died",
        };
        self.settle(false, why);
        for suite in self.suites.iter().skip(self.next) {
            self.total.count(&format!("{}: did not run, {why}", suite.name), false);
        }
        self.total
    }
}

fn unpack_artefacts(guest: &Guest<'_>) -> anyhow::Result<()> {
    let archive = guest.artefacts();
    let target = guest.folder.join("test-artifacts");
    if archive.metadata().is_ok_and(|meta| meta.len() > 0) {
        fs::create_dir_all(&target).with_context(|| format!("create {}", target.display()))?;
        let mut tar = Command::new("tar");
        // An archive cut off at the guest's bound is still worth reading.
        let unpacked = capture(tar.args(["-x", "-z", "-f"]).arg(&archive).arg("-C").arg(&target));
        println!("what failed tests left: {}", target.display());
        if let Err(error) = unpacked {
            println!("(incomplete: {error:#})");
        }
    }
    Ok(())
}

fn print_console(guest: &Guest<'_>) {
    let log = guest.folder.join("console.log");
    let bytes = fs::read(&log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    println!("the end of the guest's console ({}):", log.display());
    for line in lines.iter().skip(lines.len().saturating_sub(CONSOLE_LINES)) {
        println!("| {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suites::Place;

    fn suite(name: &str) -> Suite {
        Suite { name: name.into(), place: Place::Netns, program: "/p".into(), folder: "/f".into() }
    }

    fn read(lines: &[&str], ended: Ended) -> Tally {
        let suites = [suite("first"), suite("second")];
        let suites: Vec<&Suite> = suites.iter().collect();
        let mut reading =
            Reading { suites: &suites, total: Tally::default(), current: None, next: 0, is_down: false };
        lines.iter().for_each(|line| reading.read(line));
        reading.finish(ended)
    }

    const OK: &str = "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";

    fn exited() -> Ended {
        Ended::Exited(std::process::ExitStatus::default())
    }

    #[test]
    fn results_are_added_over_suites() {
        let lines = [
            "nodemesh-guest: up, Linux 6.1",
            "nodemesh-guest: begin 0",
            OK,
            "nodemesh-guest: end 0 0",
            "nodemesh-guest: begin 1",
            OK,
            "nodemesh-guest: end 1 0",
            "nodemesh-guest: down",
        ];
        let tally = read(&lines, exited());
        assert_eq!((tally.passed, tally.failed), (4, 0));
    }

    #[test]
    fn a_guest_that_dies_fails_the_running_suite_and_those_after_it() {
        let tally = read(&["nodemesh-guest: begin 0", "test a ... ok"], exited());
        assert_eq!((tally.passed, tally.failed), (0, 2));
        assert_eq!(tally.failures, ["first: the guest died", "second: did not run, the guest died"]);
    }

    #[test]
    fn a_deadline_is_named() {
        let lines = ["nodemesh-guest: begin 0", OK, "nodemesh-guest: end 0 0"];
        let tally = read(&lines, Ended::TimedOut);
        assert_eq!((tally.passed, tally.failed), (2, 1));
        assert!(tally.failures.first().unwrap().contains("deadline"), "{:?}", tally.failures);
    }

    #[test]
    fn a_suite_that_exits_badly_fails_even_with_a_clean_result() {
        let lines = ["nodemesh-guest: begin 1", OK, "nodemesh-guest: end 1 134"];
        let tally = read(&lines, exited());
        assert_eq!((tally.passed, tally.failed), (2, 1));
    }
}
