//! Owns the kernel's view of eBPF programs: run counts and times, and an empty program to compare with.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{CgroupAttachMode, CgroupSockAddr, ProgramInfo, loaded_programs};
use aya::sys::{Stats, enable_stats};
use aya::{Ebpf, EbpfLoader};

/// How often a program ran and for how long, as the kernel counts while statistics are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Runs {
    pub(crate) count: u64,
    pub(crate) time: Duration,
}

impl Runs {
    fn of(info: &ProgramInfo) -> Self {
        Self { count: info.run_count(), time: info.run_time() }
    }

    /// What ran since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self { count: self.count - before.count, time: self.time.saturating_sub(before.time) }
    }

    /// Mean nanoseconds of a run; `None` when there was none.
    pub(crate) fn mean_ns(self) -> Option<f64> {
        (self.count > 0).then(|| self.time.as_nanos() as f64 / self.count as f64)
    }
}

/// Turns the kernel's statistics on until the value is dropped. They cost every run two readings of the clock.
pub(crate) fn statistics() -> anyhow::Result<OwnedFd> {
    enable_stats(Stats::RunTime).context("cannot turn the statistics of eBPF programs on")
}

/// The programs of a node by name of their pinned link, all instances of `arrival` together.
pub(crate) fn of_node(pins: &Path) -> anyhow::Result<BTreeMap<String, Runs>> {
    let links = pins.join("links");
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(&links).with_context(|| format!("cannot list {}", links.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let link = FdLink::from(PinnedLink::from_pin(entry.path())?);
        let kind = name.split('-').next().unwrap_or(&name).to_owned();
        names.insert(link.info()?.program_id(), kind);
    }
    let mut runs: BTreeMap<String, Runs> = BTreeMap::new();
    for program in loaded_programs() {
        // A program of somebody else may go while we look.
        let Ok(program) = program else { continue };
        if let Some(name) = names.get(&program.id()) {
            let sum = runs.entry(name.clone()).or_default();
            let own = Runs::of(&program);
            *sum = Runs { count: sum.count + own.count, time: sum.time + own.time };
        }
    }
    Ok(runs)
}

/// An attached connect4 program that only says yes: what any program on the hook costs at least.
#[derive(Debug)]
pub(crate) struct EmptyConnect {
    object: Ebpf,
}

/// Name of the empty program's symbol.
const EMPTY: &str = "empty";

impl EmptyConnect {
    /// Attach one to a cgroup; it goes with the value.
    pub(crate) fn attach(cgroup: &Path) -> anyhow::Result<Self> {
        let mut object = EbpfLoader::new().load(&empty_object()).context("cannot load the empty program")?;
        let program: &mut CgroupSockAddr =
            object.program_mut(EMPTY).context("the empty program is not there")?.try_into()?;
        program.load()?;
        let target = File::open(cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
        // With links, `Single` means no flags: others may be attached too.
        program.attach(target, CgroupAttachMode::Single)?;
        Ok(Self { object })
    }

    /// Its runs so far.
    pub(crate) fn runs(&self) -> anyhow::Result<Runs> {
        let program = self.object.program(EMPTY).context("the empty program is not there")?;
        Ok(Runs::of(&program.info()?))
    }
}

/// An ELF object with one program, `r0 = 1; exit`, in section `cgroup/connect4`.
fn empty_object() -> Vec<u8> {
    const HEADER: usize = 64;
    const NAMES: &[u8] = b"\0.strtab\0.symtab\0cgroup/connect4\0license\0empty\0";
    const CODE: [u8; 16] = [0xb7, 0, 0, 0, 1, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0];
    const LICENSE: &[u8] = b"GPL\0";
    const TEXT_SECTION: u16 = 3;
    let name = |wanted: &str| -> u32 {
        let wanted = [wanted.as_bytes(), b"\0"].concat();
        let at = NAMES.windows(wanted.len()).position(|window| window == wanted);
        at.and_then(|at| u32::try_from(at).ok()).unwrap_or(0)
    };
    // Symbol 0 is the null symbol; symbol 1 is a global function of the whole section.
    let mut symbols = vec![0; 24];
    symbols.extend(name(EMPTY).to_le_bytes());
    symbols.extend([0x12, 0]);
    symbols.extend(TEXT_SECTION.to_le_bytes());
    symbols.extend(0_u64.to_le_bytes());
    symbols.extend((CODE.len() as u64).to_le_bytes());

    // (name, type, flags, contents, link, info, alignment, entry size)
    type Section<'a> = (u32, u32, u64, &'a [u8], u32, u32, u64, u64);
    let sections: [Section<'_>; 5] = [
        (0, 0, 0, &[], 0, 0, 0, 0),
        (name(".strtab"), 3, 0, NAMES, 0, 0, 1, 0),
        (name(".symtab"), 2, 0, &symbols, 1, 1, 8, 24),
        (name("cgroup/connect4"), 1, 6, &CODE, 0, 0, 8, 0),
        (name("license"), 1, 2, LICENSE, 0, 0, 1, 0),
    ];
    let mut contents = Vec::new();
    let mut headers = Vec::new();
    for (name, kind, flags, bytes, link, info, alignment, entry) in sections {
        while contents.len() % 8 != 0 {
            contents.push(0);
        }
        let offset = if kind == 0 { 0 } else { (HEADER + contents.len()) as u64 };
        headers.extend(name.to_le_bytes());
        headers.extend(kind.to_le_bytes());
        for word in [flags, 0, offset, bytes.len() as u64] {
            headers.extend(word.to_le_bytes());
        }
        headers.extend(link.to_le_bytes());
        headers.extend(info.to_le_bytes());
        headers.extend(alignment.to_le_bytes());
        headers.extend(entry.to_le_bytes());
        contents.extend(bytes);
    }
    while contents.len() % 8 != 0 {
        contents.push(0);
    }
    // Relocatable, for machine 247 (BPF), 64 bit, little endian.
    let mut object = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    object.extend(1_u16.to_le_bytes());
    object.extend(247_u16.to_le_bytes());
    object.extend(1_u32.to_le_bytes());
    object.extend([0; 16]);
    object.extend(((HEADER + contents.len()) as u64).to_le_bytes());
    object.extend(0_u32.to_le_bytes());
    for half in [HEADER as u16, 0, 0, 64, 5, 1] {
        object.extend(half.to_le_bytes());
    }
    object.extend(contents);
    object.extend(headers);
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_empty_object_holds_one_program() {
        let object = EbpfLoader::new().load(&empty_object());
        // Without root the kernel refuses nothing yet: loading is a later step.
        assert_eq!(object.unwrap().programs().map(|(name, _)| name).collect::<Vec<_>>(), [EMPTY]);
    }

    #[test]
    fn a_mean_needs_a_run() {
        assert_eq!(Runs::default().mean_ns(), None);
        let before = Runs { count: 2, time: Duration::from_nanos(100) };
        let now = Runs { count: 6, time: Duration::from_nanos(900) };
        assert_eq!(now.since(before).mean_ns(), Some(200.0));
    }
}
