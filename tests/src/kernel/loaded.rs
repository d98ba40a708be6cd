//! What a mesh has loaded in the kernel, whoever holds it and whether it is pinned or not.
//!
//! Other agents' programs on the same kernel have the same names. Those of one mesh are told by their maps, which they share with nobody:
//! ids of programs and maps are the kernel's own, and not given to another until the numbers run out.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd as _;

use crate::bpf::{self, ProgramInfo};

/// Programs and maps that belong together, by their ids.
#[derive(Debug, Clone)]
pub struct Loaded {
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
}

impl Loaded {
    /// These programs, all others that share a map with one of them, and the maps of all.
    ///
    /// # Errors
    /// When the kernel does not say, or a program is not there.
    pub fn around(programs: &BTreeSet<u32>) -> io::Result<Self> {
        let all = all()?;
        let of = |programs: &BTreeSet<u32>| -> BTreeSet<u32> {
            let infos = programs.iter().filter_map(|program| all.get(program));
            infos.flat_map(|info| info.maps.iter().copied()).collect()
        };
        if let Some(missing) = programs.iter().find(|program| !all.contains_key(*program)) {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("program {missing} is not loaded")));
        }
        let shared = of(programs);
        let uses = |info: &ProgramInfo| info.maps.iter().any(|map| shared.contains(map));
        let around = all.iter().filter(|(_, info)| uses(info)).map(|(id, _)| *id);
        let programs: BTreeSet<u32> = programs.iter().copied().chain(around).collect();
        Ok(Self { maps: of(&programs), programs })
    }

    /// What of it is there now, and programs that came since and use its maps: a line for each.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn now(&self) -> io::Result<Vec<String>> {
        let mut found = Vec::new();
        for (id, info) in all()? {
            if self.programs.contains(&id) || info.maps.iter().any(|map| self.maps.contains(map)) {
                found.push(format!("program {id} {}", info.name));
            }
        }
        for map in &self.maps {
            if bpf::map_by_id(*map)?.is_some() {
                found.push(format!("map {map}"));
            }
        }
        Ok(found)
    }
}

/// Every program that is loaded, by its id.
fn all() -> io::Result<BTreeMap<u32, ProgramInfo>> {
    let mut found = BTreeMap::new();
    let mut last = 0;
    while let Some(id) = bpf::next_program(last)? {
        last = id;
        // One that has gone meanwhile is not there.
        if let Some(program) = bpf::program_by_id(id)? {
            found.insert(id, bpf::program_info(program.as_fd())?);
        }
    }
    Ok(found)
}
