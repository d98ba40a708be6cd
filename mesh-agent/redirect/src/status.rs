//! Owns the report on the node's state in the kernel.
//!
//! Invariant: read from the kernel at the moment of the question, so that it shows what is, not what was done.

use std::{fs::File, os::fd::AsFd as _, path::PathBuf};

use aya::Pod;

use crate::{
    cgroup::CgroupRoot,
    map::{KernelMap, MapError},
    node::{CGROUP_PROGRAMS, Node, lock, program_id},
    sys::{self, LinkTarget},
};

/// A map this full is warned about.
const WARN_PERCENT: u64 = 80;
/// Flags of `BPF_PROG_QUERY`: several programs may share the hook.
const ALLOW_MULTI: u32 = 1 << 1;

/// State of one of our programs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ProgramStatus {
    /// Name.
    pub name: String,
    /// The kernel's id.
    pub id: u32,
    /// The kernel's id of the link; 0 without one.
    pub link_id: u32,
    /// On its hook right now, running this very program.
    pub attached: bool,
    /// The link was taken over from an earlier agent.
    pub adopted: bool,
}

/// A program of somebody else on one of our hooks.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ForeignProgram {
    /// Cgroup it is attached to: ours or one above.
    pub cgroup: PathBuf,
    /// Hook, by the name of our program there.
    pub hook: &'static str,
    /// The kernel's id.
    pub id: u32,
    /// Name; may be empty.
    pub name: String,
    /// Attached the old exclusive way: no link can be made below it.
    pub exclusive: bool,
}

/// Fill of one map.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MapFill {
    /// Name.
    pub name: &'static str,
    /// Entries.
    pub entries: u32,
    /// Room.
    pub max_entries: u32,
    /// Old entries make room for new ones.
    pub evicts: bool,
}

impl MapFill {
    /// Whether it is time to worry: 80 % full, and it cannot make room by itself.
    pub fn is_nearly_full(&self) -> bool {
        !self.evicts && u64::from(self.entries) * 100 >= u64::from(self.max_entries) * WARN_PERCENT
    }
}

/// The whole report.
#[derive(Clone, Debug, serde::Serialize)]
pub struct NodeStatus {
    /// Name of the node.
    pub node: String,
    /// ABI version of the pins.
    pub abi: String,
    /// Folder of the pins.
    pub pins: PathBuf,
    /// Cgroup the programs are attached to.
    pub cgroup_root: PathBuf,
    /// Our programs.
    pub programs: Vec<ProgramStatus>,
    /// Programs of others on the same hooks, on our cgroup and above.
    pub foreign: Vec<ForeignProgram>,
    /// Fill of every map that can fill up.
    pub maps: Vec<MapFill>,
    /// Pods whose arrivals are guarded.
    pub guarded_pods: usize,
}

impl Node {
    /// Reads the state. Counts map entries, so it takes milliseconds on a large node; not for hot paths.
    pub fn status(&self) -> Result<NodeStatus, MapError> {
        let ours = self.program_ids();
        let foreign = CGROUP_PROGRAMS
            .iter()
            .flat_map(|(_, attach_type)| foreign_on(&self.root, *attach_type as u32, &ours))
            .collect();
        Ok(NodeStatus {
            node: self.options.node.clone(),
            abi: format!("{:016x}", mesh_common::abi::VERSION),
            pins: self.folders.version().to_owned(),
            cgroup_root: self.root.path.clone(),
            programs: self.program_status(),
            foreign,
            maps: self.map_fill()?,
            guarded_pods: lock(&self.pods).len(),
        })
    }

    fn program_status(&self) -> Vec<ProgramStatus> {
        let hooks = CGROUP_PROGRAMS.iter().zip(&self.programs);
        hooks
            .map(|((_, attach_type), program)| {
                let id = program_id(program.program.as_fd());
                let link = sys::link_info(program.link.as_fd()).ok();
                let here = LinkTarget::Cgroup { id: self.root.id, attach_type: *attach_type as u32 };
                ProgramStatus {
                    name: program.name.to_owned(),
                    id,
                    link_id: link.map_or(0, |link| link.id),
                    attached: link.is_some_and(|link| link.kind == here && link.program_id == id),
                    adopted: program.adopted,
                }
            })
            .collect()
    }

    /// Fill levels of all maps with a limit that traffic or configuration can reach.
    pub fn map_fill(&self) -> Result<Vec<MapFill>, MapError> {
        let m = &self.maps;
        Ok(vec![
            fill(&m.pods)?,
            fill(&m.inbound)?,
            fill(&m.port_cfgs)?,
            fill(&m.probes)?,
            fill(&m.excluded)?,
            fill(&m.services)?,
            fill(&m.backends)?,
            fill(&m.backend_index)?,
            fill(&m.workloads)?,
            fill(&m.affinity)?,
            fill(&m.verdicts)?,
            fill(&m.policy_gen)?,
            fill(&m.tickets)?,
            fill(&m.tickets_used)?,
            fill(&m.orig_dst)?,
            fill(&m.client_addr)?,
            fill(&m.dns_orig)?,
            fill(&m.udp_peers)?,
        ])
    }
}

fn fill<K: Pod, V: Pod>(map: &KernelMap<K, V>) -> Result<MapFill, MapError> {
    Ok(MapFill {
        name: map.name(),
        entries: map.count()?,
        max_entries: map.max_entries(),
        evicts: map.evicts(),
    })
}

/// Programs on a hook of the root and its ancestors that are not among `ours`.
pub(crate) fn foreign_on(root: &CgroupRoot, attach_type: u32, ours: &[u32]) -> Vec<ForeignProgram> {
    let hook = CGROUP_PROGRAMS.iter().find(|(_, t)| *t as u32 == attach_type).map_or("", |(name, _)| name);
    let mut foreign = Vec::new();
    for cgroup in root.lineage() {
        let Ok(dir) = File::open(&cgroup) else { continue };
        let Ok((ids, flags)) = sys::cgroup_programs(dir.as_fd(), attach_type) else { continue };
        for id in ids.into_iter().filter(|id| !ours.contains(id)) {
            let info = sys::program_by_id(id).and_then(|program| sys::program_info(program.as_fd()));
            let name = info.map(|info| kernel_name(&info.name)).unwrap_or_default();
            foreign.push(ForeignProgram {
                cgroup: cgroup.clone(),
                hook,
                id,
                name,
                exclusive: flags & ALLOW_MULTI == 0,
            });
        }
    }
    foreign
}

fn kernel_name(name: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = name.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_maps_that_cannot_make_room_are_worried_about() {
        let fill = |entries, evicts| MapFill { name: "X", entries, max_entries: 1000, evicts };
        assert!(!fill(799, false).is_nearly_full());
        assert!(fill(800, false).is_nearly_full());
        assert!(!fill(1000, true).is_nearly_full());
    }
}
