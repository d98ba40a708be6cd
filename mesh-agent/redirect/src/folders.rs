//! Owns where things are pinned: `<bpffs>/nodemesh/<node>/v<ABI>/{maps,links}`.
//!
//! Invariants:
//! - Two nodes, or two ABI versions of one node, never share a folder.
//! - A path component never holds a dot: bpffs refuses those.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use mesh_common::abi;

/// Prefix of the pins of `arrival` links; the local pod id follows.
pub(crate) const ARRIVAL_PREFIX: &str = "arrival-";

/// The pin folders of one node.
#[derive(Clone, Debug)]
pub(crate) struct Folders {
    node: PathBuf,
    version: PathBuf,
}

impl Folders {
    /// Paths only; nothing is created.
    pub(crate) fn new(bpffs: &Path, node: &str) -> Self {
        let node = bpffs.join("nodemesh").join(component(node));
        let version = node.join(format!("v{:016x}", abi::VERSION));
        Self { node, version }
    }

    /// Makes the folders of this version.
    pub(crate) fn create(&self) -> io::Result<()> {
        let make = || fs::create_dir_all(self.maps()).and_then(|()| fs::create_dir_all(self.links()));
        make().or_else(|error| match error.kind() {
            // The folder of all nodes went with the last one, at this moment.
            io::ErrorKind::NotFound => make(),
            _ => Err(error),
        })
    }

    /// The folder of all versions of the node.
    pub(crate) fn node(&self) -> &Path {
        &self.node
    }

    /// The folder of this ABI version.
    pub(crate) fn version(&self) -> &Path {
        &self.version
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.version.join("maps")
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.version.join("links")
    }

    /// Pin of a cgroup program's link.
    pub(crate) fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Pin of a pod's `arrival` link.
    pub(crate) fn arrival(&self, pod: u32) -> PathBuf {
        self.links().join(format!("{ARRIVAL_PREFIX}{pod}"))
    }

    /// Folders that other ABI versions left behind.
    pub(crate) fn other_versions(&self) -> Vec<PathBuf> {
        entries(&self.node).into_iter().filter(|path| *path != self.version).collect()
    }
}

/// The pins or folders in a folder; none when it does not exist.
pub(crate) fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|all| all.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// Local pod id in the name of an `arrival` pin.
pub(crate) fn arrival_pod(path: &Path) -> Option<u32> {
    path.file_name()?.to_str()?.strip_prefix(ARRIVAL_PREFIX)?.parse().ok()
}

/// A node name as one path component: everything but letters, digits and dashes becomes `%xx`, so different
/// names stay different.
fn component(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02x}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_one_component_without_dots_and_stays_unique() {
        assert_eq!(component("node-1"), "node-1");
        assert_eq!(component("a.b"), "a%2eb");
        assert_eq!(component("../x"), "%2e%2e%2fx");
        assert_ne!(component("a.b"), component("a_b"));
        assert_ne!(component("a.b"), component("a%2eb"));
    }

    #[test]
    fn an_arrival_pin_names_its_pod() {
        let folders = Folders::new(Path::new("/sys/fs/bpf"), "n");
        assert_eq!(arrival_pod(&folders.arrival(17)), Some(17));
        assert_eq!(arrival_pod(&folders.link("connect4")), None);
    }
}
