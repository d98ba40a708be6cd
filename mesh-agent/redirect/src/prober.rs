//! Owns finding the kubelet: its probes must reach pods that let in nobody without a certificate, and the kernel knows it by its
//! cgroup.
//!
//! Invariant: only a process of the host counts, never one of a pod that calls itself by that name: it has the host's network, and
//! a cgroup that is not a pod's.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use crate::{
    cgroup::v2_group,
    precheck::{self, PrecheckError},
};

/// Names of the process that is the kubelet, or has it inside: kubelet, k3s, MicroK8s.
const NAMES: [&str; 4] = ["kubelet", "k3s-server", "k3s-agent", "kubelite"];
/// Part of the name of the cgroup in which the kubelet puts pods, with every driver.
const PODS: &str = "kubepods";

/// The kubelet of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubelet {
    /// Its process.
    pub pid: i32,
    /// The folder of its cgroup.
    pub cgroup: PathBuf,
}

impl Kubelet {
    /// Looks through the processes that this one sees. Blocking: reads a small file for each.
    ///
    /// # Errors
    /// There is no cgroup v2.
    pub fn find() -> Result<Option<Self>, PrecheckError> {
        let mount = precheck::mount_of_cgroup2()?;
        let own_network = network(Path::new("/proc/self"));
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut found: Vec<Self> = processes
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let process = entry.path();
                let name = fs::read_to_string(process.join("comm")).ok()?;
                let is_host = || own_network.is_some() && network(&process) == own_network;
                if !NAMES.contains(&name.trim()) || !is_host() {
                    return None;
                }
                let cgroup = cgroup_of(&fs::read_to_string(process.join("cgroup")).ok()?, &mount)?;
                Some(Self { pid, cgroup })
            })
            .collect();
        // The oldest, should there be several.
        found.sort_by_key(|kubelet| kubelet.pid);
        Ok(found.into_iter().next())
    }
}

/// The folder of the group that the text of `/proc/PID/cgroup` names, unless it is a pod's or out of sight.
fn cgroup_of(text: &str, mount: &Path) -> Option<PathBuf> {
    let group = v2_group(text);
    let is_hidden = group.is_empty() || group.starts_with("/..");
    (!is_hidden && !group.contains(PODS)).then(|| mount.join(group.trim_start_matches('/')))
}

fn network(process: &Path) -> Option<u64> {
    fs::metadata(process.join("ns/net")).map(|meta| meta.ino()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_of_the_host_is_found_and_one_of_a_pod_is_not() {
        let of = |text: &str| cgroup_of(text, Path::new("/c"));
        assert_eq!(of("0::/system.slice/kubelet.service\n"), Some("/c/system.slice/kubelet.service".into()));
        assert_eq!(of("4:memory:/k\n0::/kubelet\n"), Some("/c/kubelet".into()));
        assert_eq!(of("0::/\n"), Some("/c/".into()));
        for text in [
            "",
            "1:name=systemd:/kubelet\n",
            "0::/../kubelet\n",
            "0::/kubepods.slice/kubepods-pod1.slice/x\n",
            "0::/kubelet/kubepods/pod1/kubelet\n",
        ] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
