//! Owns finding the pods whose processes run already: by the folders that the kubelet gives them in the cgroup tree.
//!
//! Invariants:
//! - A namespace is opened while its process is held by a pidfd, and then kept open: a number that is used again never
//!   hands over somebody else's namespace.
//! - The node's own namespace is nobody's: pods on the host network are left out.
//! - Names of folders are the kubelet's word, with either cgroup driver; what is in them is read, never written.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    netns::{Netns, NetnsError},
    precheck::{self, PrecheckError},
};

/// Folders looked into in one scan; a node has at most some hundred pods with a few containers each.
const FOLDERS_MAX: usize = 20_000;
/// Processes of one pod that are tried before it is left for the next scan.
const PROCESSES_MAX: usize = 64;
/// Levels below the root at which a pod's folder can be: `kubelet.slice/kubelet-kubepods.slice/…/pod`.
const DEPTH_MAX: usize = 5;

/// A pod found by its processes.
#[derive(Clone, Debug)]
pub struct RunningPod {
    /// Process it was found by, which is still there as of the last scan.
    pub pid: i32,
    /// Its namespace, open.
    pub netns: Arc<Netns>,
}

/// Looks for pods again and again; what it found stays open as long as the pod has processes.
#[derive(Debug)]
pub struct RunningPods {
    root: PathBuf,
    found: BTreeMap<Arc<str>, RunningPod>,
}

impl RunningPods {
    /// Looks below a cgroup-v2 folder, the agent's root; below the whole tree when there is none.
    ///
    /// # Errors
    /// There is no such tree.
    pub fn new(cgroup_root: Option<&Path>) -> Result<Self, PrecheckError> {
        let root = cgroup_root.map_or_else(precheck::mount_of_cgroup2, |root| Ok(root.to_owned()))?;
        Ok(Self { root, found: BTreeMap::new() })
    }

    /// Looks once. Blocking: reads a few small files for each pod.
    pub fn scan(&mut self) -> &BTreeMap<Arc<str>, RunningPod> {
        let mut before = std::mem::take(&mut self.found);
        let mut taken: HashSet<i32> = HashSet::new();
        for (uid, folder) in pod_folders(&self.root) {
            let known = before.remove(&uid);
            if let Some(pod) = look(&folder, known, &taken) {
                taken.insert(pod.pid);
                self.found.insert(uid, pod);
            }
        }
        &self.found
    }
}

/// The namespace of a pod's processes: the one known, while any of them is in it, else that of the first.
fn look(folder: &Path, known: Option<RunningPod>, taken: &HashSet<i32>) -> Option<RunningPod> {
    let pids = processes(folder);
    if let Some(known) = known {
        let inside = |pid: &i32| inode_of(*pid) == Some(known.netns.inode()) && !taken.contains(pid);
        let still = pids.iter().find(|pid| **pid == known.pid && inside(pid));
        if let Some(pid) = still.or_else(|| pids.iter().find(|pid| inside(pid))) {
            return Some(RunningPod { pid: *pid, ..known });
        }
    }
    for pid in pids.into_iter().filter(|pid| !taken.contains(pid)) {
        match Netns::of_process(pid) {
            Ok(netns) => return Some(RunningPod { pid, netns: Arc::new(netns) }),
            Err(NetnsError::HostNetwork { .. }) => return None,
            // It has ended since, most often.
            Err(error) => tracing::debug!(pid, error = %crate::report(&error), "look at a pod's process"),
        }
    }
    None
}

fn inode_of(pid: i32) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(format!("/proc/{pid}/ns/net")).map(|meta| meta.ino()).ok()
}

/// Processes of a pod, those of its containers before those of groups that containers made themselves.
fn processes(folder: &Path) -> Vec<i32> {
    let mut pids = Vec::new();
    let mut queue = VecDeque::from([folder.to_owned()]);
    let mut seen = 0;
    while let Some(folder) = queue.pop_front() {
        seen += 1;
        if pids.len() >= PROCESSES_MAX || seen > PROCESSES_MAX {
            break;
        }
        let procs = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        // 0 is a process that this pid namespace does not show.
        let here = procs.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0);
        pids.extend(here.take(PROCESSES_MAX - pids.len()));
        queue.extend(folders(&folder).into_iter().map(|(_, path)| path));
    }
    pids
}

/// The folders of pods below a cgroup, by uid.
fn pod_folders(root: &Path) -> HashMap<Arc<str>, PathBuf> {
    let mut found = HashMap::new();
    let mut queue = VecDeque::from([(root.to_owned(), 0)]);
    let mut seen = 0;
    while let Some((folder, depth)) = queue.pop_front() {
        for (name, path) in folders(&folder) {
            seen += 1;
            if seen > FOLDERS_MAX {
                tracing::warn!(root = %root.display(), "too many cgroups; some pods are not looked for");
                return found;
            }
            if let Some(uid) = pod_uid(&name) {
                found.insert(uid.into(), path);
            } else if depth + 1 < DEPTH_MAX && (depth > 0 || leads_to_pods(&name)) {
                queue.push_back((path, depth + 1));
            }
        }
    }
    found
}

fn folders(parent: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries
        .filter(is_folder)
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect()
}

/// Whether a folder at the top is the kubelet's tree of pods, or holds it.
fn leads_to_pods(name: &str) -> bool {
    name.contains("kubepods") || name == "kubelet" || name == "kubelet.slice"
}

/// The uid of a pod in the name of its folder: `podUID` (cgroupfs), `…-podUID.slice` with `_` for `-` (systemd). Of a static
/// pod that is a hash.
fn pod_uid(folder: &str) -> Option<String> {
    let uid = match folder.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => folder.strip_prefix("pod")?.to_owned(),
    };
    let plain = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
    ((32..=64).contains(&uid.len()) && uid.bytes().all(plain)).then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0a1b2c3d-0000-4000-8000-00000000000f";
    const SLICE: &str = "0a1b2c3d_0000_4000_8000_00000000000f";
    const HASH: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn both_cgroup_drivers_and_static_pods_are_understood() {
        for (folder, uid) in [
            (format!("pod{UID}"), UID),
            (format!("kubepods-burstable-pod{SLICE}.slice"), UID),
            (format!("kubelet-kubepods-pod{SLICE}.slice"), UID),
            (format!("pod{HASH}"), HASH),
            (format!("kubepods-pod{HASH}.slice"), HASH),
        ] {
            assert_eq!(pod_uid(&folder).as_deref(), Some(uid), "{folder}");
        }
        for folder in [
            "kubepods",
            "kubepods.slice",
            "kubepods-besteffort.slice",
            "besteffort",
            "pod",
            "podinfo",
            "pods.slice",
            "user-podman.slice",
            &format!("crio-{HASH}.scope"),
            &format!("pod{UID}/x"),
            &format!("pod{UID}{UID}"),
        ] {
            assert_eq!(pod_uid(folder), None, "{folder}");
        }
    }

    fn tree(name: &str, folders: &[&str]) -> PathBuf {
        let root = std::env::temp_dir().join(format!("nodemesh-running-{}-{name}", std::process::id()));
        for folder in folders {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        root
    }

    #[test]
    fn pods_are_found_at_every_depth_where_a_kubelet_puts_them_and_nowhere_else() {
        let uid = |n: u8| format!("0a1b2c3d-0000-4000-8000-{n:012x}");
        let slice = |n: u8| uid(n).replace('-', "_");
        let root = tree(
            "depth",
            &[
                &format!("kubepods/pod{}/c1", uid(1)),
                &format!("kubepods/besteffort/pod{}/c1", uid(2)),
                &format!(
                    "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{}.slice/x.scope",
                    slice(3)
                ),
                &format!(
                    "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{}.slice",
                    slice(4)
                ),
                &format!("system.slice/whatever/pod{}", uid(5)),
            ],
        );
        let found = pod_folders(&root);
        let mut uids: Vec<&str> = found.keys().map(|uid| &**uid).collect();
        uids.sort_unstable();
        assert_eq!(uids, [uid(1), uid(2), uid(3), uid(4)]);
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn processes_on_the_host_network_are_no_pod_of_ours() {
        let root = tree("host", &[&format!("kubepods/pod{UID}/c1")]);
        let procs = root.join(format!("kubepods/pod{UID}/c1/cgroup.procs"));
        fs::write(procs, format!("0\n{}\n", std::process::id())).unwrap();
        assert!(RunningPods::new(Some(&root)).unwrap().scan().is_empty());
        fs::remove_dir_all(root).unwrap();
    }
}
