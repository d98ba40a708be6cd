//! Owns the check whether this kernel and this process can carry the mesh, before anything is changed.
//!
//! Invariant: every error says what to do about it.

use std::{fs, io, path::PathBuf};

/// Oldest kernel the programs are verified on (`design.md` §9).
pub const KERNEL_MIN: (u32, u32) = (6, 1);

/// What this machine lacks.
#[derive(Debug, thiserror::Error)]
pub enum PrecheckError {
    /// Too old.
    #[error("kernel {found} is too old: Nodemesh needs Linux {}.{} or newer", KERNEL_MIN.0, KERNEL_MIN.1)]
    Kernel {
        /// What `uname -r` says.
        found: String,
    },
    /// No type information.
    #[error(
        "the kernel has no BTF at /sys/kernel/btf/vmlinux: use a kernel built with CONFIG_DEBUG_INFO_BTF=y"
    )]
    Btf,
    /// No cgroup v2.
    #[error("no cgroup2 file system is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup/unified`)")]
    Cgroup2,
    /// Missing rights.
    #[error("the agent lacks {missing}: run it as root, or grant CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN")]
    Rights {
        /// The missing capabilities.
        missing: String,
    },
    /// A file of procfs could not be read.
    #[error("read {path}: is procfs mounted?")]
    Proc {
        /// Which file.
        path: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// Checks everything; returns the mount point of cgroup v2.
pub(crate) fn check() -> Result<PathBuf, PrecheckError> {
    let release = read("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    if kernel_version(release).is_none_or(|version| version < KERNEL_MIN) {
        return Err(PrecheckError::Kernel { found: release.to_owned() });
    }
    if !fs::exists("/sys/kernel/btf/vmlinux").unwrap_or(false) {
        return Err(PrecheckError::Btf);
    }
    let missing = missing_capabilities(&read("/proc/self/status")?);
    if !missing.is_empty() {
        return Err(PrecheckError::Rights { missing: missing.join(", ") });
    }
    mount_of_cgroup2()
}

/// The mount point of cgroup v2.
pub(crate) fn mount_of_cgroup2() -> Result<PathBuf, PrecheckError> {
    cgroup2_mount(&read("/proc/self/mounts")?).ok_or(PrecheckError::Cgroup2)
}

fn read(path: &'static str) -> Result<String, PrecheckError> {
    fs::read_to_string(path).map_err(|source| PrecheckError::Proc { path, source })
}

/// Major and minor version of what `uname -r` says.
pub fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// Capabilities the agent cannot do without: loading programs, attaching to cgroups and namespaces, `setns`.
fn missing_capabilities(status: &str) -> Vec<&'static str> {
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    const BPF: u32 = 39;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective & (1 << bit) != 0;
    let mut missing = Vec::new();
    if !has(SYS_ADMIN) {
        missing.push("CAP_SYS_ADMIN");
        if !has(BPF) {
            missing.push("CAP_BPF");
        }
    }
    if !has(NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    missing
}

/// Where cgroup v2 is, by the text of `/proc/mounts`. On a hybrid v1+v2 host that is not `/sys/fs/cgroup`.
pub fn cgroup2_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, target, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(target))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_compared_by_number() {
        assert_eq!(kernel_version("6.1.0-13-cloud-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("7.2-rc1"), Some((7, 2)));
        assert!(kernel_version("5.15.0").unwrap() < KERNEL_MIN);
        assert!(kernel_version("6.18.44").unwrap() > KERNEL_MIN);
        assert_eq!(kernel_version("nonsense"), None);
    }

    #[test]
    fn sys_admin_covers_bpf() {
        assert!(missing_capabilities("CapEff:\t000001ffffffffff\n").is_empty());
        assert_eq!(missing_capabilities("CapEff:\t0000000000201000\n"), Vec::<&str>::new());
        assert_eq!(
            missing_capabilities("CapEff:\t0000000000000000\n"),
            ["CAP_SYS_ADMIN", "CAP_BPF", "CAP_NET_ADMIN"]
        );
    }

    #[test]
    fn the_v2_mount_is_found_wherever_it_is() {
        let mounts =
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(cgroup2_mount(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_mount("proc /proc proc rw 0 0\n"), None);
    }
}
