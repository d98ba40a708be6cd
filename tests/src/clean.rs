//! Removing what test processes left behind when they could not clean up themselves (SIGKILL, reboot
//! of the runner): worlds are named after their process, so only those of dead processes are touched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup::{self, Cgroup};
use crate::cluster::init::Hierarchy;
use crate::netns;
use crate::saying::say;

/// Prefix of a world's network namespaces, temporary directory and node names.
pub(crate) const SHORT_PREFIX: &str = "nmt-";

/// Prefix of a world's cgroup.
pub(crate) const CGROUP_PREFIX: &str = "nodemesh-test-";

/// Remove the remains of dead test processes; with `all`, of living ones too. Returns what it removed.
#[must_use]
pub fn leftovers(all: bool) -> Vec<String> {
    let mut removed = Vec::new();
    let dead = |name: &str, prefix: &str| {
        name.strip_prefix(prefix)
            .and_then(|rest| rest.split('-').next())
            .and_then(|pid| pid.parse::<u32>().ok())
            .is_some_and(|pid| all || !Path::new(&format!("/proc/{pid}")).exists())
    };
    if let Ok(root) = cgroup::mount_point() {
        for name in directory_names(&root).filter(|name| dead(name, CGROUP_PREFIX)) {
            match Cgroup::at(root.join(&name)).remove() {
                Ok(()) => removed.push(format!("cgroup {name}")),
                Err(error) => say(&error.to_string()),
            }
        }
    }
    for hierarchy in Hierarchy::all().unwrap_or_default() {
        // Whoever was in them is gone with the groups of version 2.
        let version_1 = hierarchy.options.is_some();
        let root = hierarchy.mount_point;
        for name in directory_names(&root).filter(|name| version_1 && dead(name, CGROUP_PREFIX)) {
            match cgroup::remove_tree(&root.join(&name)) {
                Ok(()) => removed.push(format!("cgroup {}", root.join(name).display())),
                Err(error) => say(&error.to_string()),
            }
        }
    }
    for name in netns::names().into_iter().filter(|name| dead(name, SHORT_PREFIX)) {
        netns::remove_name(&netns::path_of(&name));
        removed.push(format!("network namespace {name}"));
    }
    for root in pin_directories() {
        for name in directory_names(&root).filter(|name| dead(name, SHORT_PREFIX)) {
            if remove_directory(&root.join(&name)) {
                removed.push(format!("pins of {name}"));
            }
        }
    }
    let mut scratch = vec![std::env::temp_dir(), scratch_root()];
    scratch.dedup();
    for root in scratch {
        for name in directory_names(&root).filter(|name| dead(name, SHORT_PREFIX)) {
            if remove_directory(&root.join(&name)) {
                removed.push(format!("directory {name}"));
            }
        }
    }
    removed
}

/// Where scratch directories go whose files are written at every step: in memory if the machine has such a folder.
pub(crate) fn scratch_root() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

/// Remove the pins of one node's agents from every bpffs.
pub(crate) fn remove_pins(node: &str) {
    for root in pin_directories() {
        remove_directory(&root.join(node));
    }
}

/// `nodemesh/` on each bpffs mount.
pub(crate) fn pin_directories() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut directories: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (_, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "bpf").then(|| Path::new(target).join("nodemesh"))
        })
        .collect();
    directories.dedup();
    directories
}

/// Remove a directory and all in it; says whether there was one. A failure is told, not fatal: this runs
/// while dropping.
pub(crate) fn remove_directory(path: &Path) -> bool {
    match fs::remove_dir_all(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            say(&format!("cannot remove {}: {error}", path.display()));
            false
        }
    }
}

fn directory_names(path: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
}
