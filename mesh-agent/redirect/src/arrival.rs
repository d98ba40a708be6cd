//! Owns the `arrival` program instances: one per pod, alike but for the pod id in their read-only data.
//!
//! The object is parsed and relocated once, by aya's own parser; an instance is the finished instructions with
//! the descriptor of its own read-only data in place. So enrolling a pod costs one map and one program load, not
//! a parse of the object and of the kernel's type information.

use std::{
    collections::{HashMap, HashSet},
    ffi::CString,
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd},
};

use aya_obj::{Object, generated::bpf_insn};
use mesh_common::maps::POD_ID_GLOBAL;

use crate::sys::{self, Refused};

/// Name of the program in the object.
pub(crate) const PROGRAM: &str = "arrival";

/// Why the template could not be made: a fault of the build, not of the machine.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The object does not parse.
    #[error("parse the eBPF object")]
    Parse {
        /// Cause.
        source: aya_obj::ParseError,
    },
    /// Relocation failed.
    #[error("relocate the eBPF object")]
    Relocate {
        /// Cause.
        source: aya_obj::relocation::EbpfRelocationError,
    },
    /// The object lacks something.
    #[error("the eBPF object has no {0}")]
    Missing(&'static str),
    /// A map of the object is neither pinned nor loaded.
    #[error("map {0} of the eBPF object is not loaded")]
    Map(String),
}

/// Why an instance could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// No read-only data.
    #[error("make the read-only data of the arrival program")]
    Data {
        /// Cause.
        source: io::Error,
    },
    /// The verifier or the kernel refused.
    #[error("load the arrival program")]
    Load {
        /// Cause.
        source: Refused,
    },
}

/// The relocated program.
pub(crate) struct Template {
    instructions: Vec<bpf_insn>,
    license: CString,
    /// Where the descriptor of the read-only data goes.
    data_sites: Vec<usize>,
    data: Vec<u8>,
    pod_id_at: usize,
    /// Maps that are only referenced by descriptor number in `instructions` stay open as long as those.
    _held: Vec<OwnedFd>,
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("instructions", &self.instructions.len()).finish_non_exhaustive()
    }
}

impl Template {
    /// Relocates the object. `map` gives the descriptor of a map by its name.
    pub(crate) fn new<'a>(
        object: &[u8],
        globals: &HashMap<&str, (&[u8], bool)>,
        map: impl Fn(&str) -> Option<BorrowedFd<'a>>,
    ) -> Result<Self, TemplateError> {
        let parse = |source| TemplateError::Parse { source };
        let mut object = Object::parse(object).map_err(parse)?;
        object.patch_map_data(globals.clone()).map_err(parse)?;
        let (section, pod_id_at) = locate_pod_id(&mut object)?;

        // The section with the pod id has no map yet; no descriptor is negative, so this marks its sites.
        const MARK: RawFd = -1;
        let mut held = Vec::new();
        let mut maps: Vec<(String, RawFd, aya_obj::Map)> = Vec::new();
        for (name, definition) in object.maps.drain() {
            let fd = if name == section {
                MARK
            } else {
                let found = map(&name).ok_or_else(|| TemplateError::Map(name.clone()))?;
                let found = found.try_clone_to_owned().map_err(|_| TemplateError::Map(name.clone()))?;
                let fd = found.as_raw_fd();
                held.push(found);
                fd
            };
            maps.push((name, fd, definition));
        }
        let data = maps
            .iter()
            .find(|(name, ..)| *name == section)
            .map(|(_, _, definition)| definition.data().to_vec())
            .ok_or(TemplateError::Missing("read-only data"))?;
        let text: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        let relocate = |source| TemplateError::Relocate { source };
        object
            .relocate_maps(maps.iter().map(|(name, fd, map)| (name.as_str(), *fd, map)), &text)
            .map_err(relocate)?;
        object.relocate_calls(&text).map_err(relocate)?;
        object.sanitize_functions(aya::features());

        let program = object.programs.get(PROGRAM).ok_or(TemplateError::Missing("program arrival"))?;
        let function =
            object.functions.get(&program.function_key()).ok_or(TemplateError::Missing("program arrival"))?;
        let instructions = function.instructions.clone();
        let data_sites: Vec<usize> =
            instructions.iter().enumerate().filter(|(_, i)| refers_to(i, MARK)).map(|(at, _)| at).collect();
        if data_sites.is_empty() {
            return Err(TemplateError::Missing("use of the pod id in program arrival"));
        }
        Ok(Self { instructions, license: program.license.clone(), data_sites, data, pod_id_at, _held: held })
    }

    /// Loads the instance of one pod.
    pub(crate) fn load(&self, pod: u32) -> Result<OwnedFd, InstanceError> {
        let mut data = self.data.clone();
        data[self.pod_id_at..self.pod_id_at + 4].copy_from_slice(&pod.to_ne_bytes());
        let data = sys::create_read_only_data(&data).map_err(|source| InstanceError::Data { source })?;
        let mut instructions = self.instructions.clone();
        for &site in &self.data_sites {
            instructions[site].imm = data.as_fd().as_raw_fd();
        }
        // The program holds the map from now on; our descriptor closes here.
        sys::load_sk_lookup(PROGRAM, &instructions, &self.license)
            .map_err(|source| InstanceError::Load { source })
    }
}

/// Whether an instruction loads a map (or a value in it) by this descriptor.
fn refers_to(instruction: &bpf_insn, fd: RawFd) -> bool {
    /// `BPF_LD | BPF_IMM | BPF_DW`.
    const LOAD_IMM64: u8 = 0x18;
    const MAP_FD: u8 = 1;
    const MAP_VALUE: u8 = 2;
    instruction.code == LOAD_IMM64
        && matches!(instruction.src_reg(), MAP_FD | MAP_VALUE)
        && instruction.imm == fd
}

/// Finds the section and offset of the pod id: the four bytes that differ between two values of it.
fn locate_pod_id(object: &mut Object) -> Result<(String, usize), TemplateError> {
    let mut with = |value: u32| {
        let bytes = value.to_ne_bytes();
        object
            .patch_map_data(HashMap::from([(POD_ID_GLOBAL, (bytes.as_slice(), true))]))
            .map_err(|source| TemplateError::Parse { source })?;
        let data = object.maps.iter().map(|(name, map)| (name.clone(), map.data().to_vec()));
        Ok(data.collect::<HashMap<_, _>>())
    };
    let ones = with(u32::MAX)?;
    let zeros = with(0)?;
    for (name, data) in &zeros {
        let differs = data.iter().zip(&ones[name]).position(|(zero, one)| zero != one);
        if let Some(at) = differs {
            return Ok((name.clone(), at));
        }
    }
    Err(TemplateError::Missing("global POD_ID"))
}
