//! Owns the tiers: their names, time limits, and what each needs from the machine.

use std::{fs, path::Path, time::Duration};

use clap::ValueEnum;

use crate::{
    cluster::kubernetes,
    setup::{self, Need},
    suites::Place,
    vm::{self, Kernel},
    workspace::Workspace,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Tier {
    /// Formatting, lints, and the rules of the tree.
    Tidy,
    /// Everything that needs nothing.
    Unit,
    /// The eBPF programs on this kernel.
    Bpf,
    /// Nodes and pods as network namespaces on this kernel.
    Netns,
    /// A real Kubernetes: an API server alone, and a cluster of two nodes.
    Cluster,
    /// `bpf`, and of `netns` what depends on the kernel, on Debian's 6.1.
    #[value(name = "vm-6.1")]
    Vm61,
    /// The same on Debian's 6.12 (on demand).
    #[value(name = "vm-6.12")]
    Vm612,
    /// The same on Debian's 7.2.
    #[value(name = "vm-7.2")]
    Vm72,
}

impl Tier {
    pub(super) fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// Part of a run without `--tier`.
    pub(super) fn is_default(self) -> bool {
        self != Self::Vm612
    }

    /// Far above what the tier takes on two cores, so that it only ends a hang.
    pub(super) fn time_limit(self) -> Duration {
        Duration::from_mins(match self {
            Self::Tidy | Self::Netns | Self::Cluster => 20,
            Self::Unit | Self::Bpf => 10,
            Self::Vm61 | Self::Vm612 | Self::Vm72 => 25,
        })
    }

    /// Which test programs the tier runs.
    pub(super) fn places(self) -> &'static [Place] {
        match self {
            Self::Tidy => &[],
            Self::Unit => &[Place::Unit],
            Self::Bpf => &[Place::Bpf],
            Self::Netns => &[Place::Netns, Place::Agent],
            Self::Cluster => &[Place::Cluster],
            Self::Vm61 | Self::Vm612 | Self::Vm72 => &[Place::Bpf, Place::Netns],
        }
    }

    /// The kernel of a tier that runs in a guest.
    pub(super) fn kernel(self) -> Option<Kernel> {
        match self {
            Self::Vm61 => Some(Kernel::V6_1),
            Self::Vm612 => Some(Kernel::V6_12),
            Self::Vm72 => Some(Kernel::V7_2),
            Self::Tidy | Self::Unit | Self::Bpf | Self::Netns | Self::Cluster => None,
        }
    }

    /// Why this machine cannot run the tier. May install what is missing.
    pub(super) fn unavailable(self, workspace: &Workspace) -> Option<String> {
        let needs: &[Need] = match self {
            Self::Tidy => &[Need::Lint],
            Self::Unit => &[],
            Self::Bpf | Self::Netns => &[Need::Netns],
            Self::Cluster => &[Need::Netns, Need::Kubernetes],
            Self::Vm61 | Self::Vm612 | Self::Vm72 => &[Need::Vm, Need::Netns],
        };
        if let Err(error) = setup::ensure(workspace, needs) {
            return Some(format!("{error:#}"));
        }
        // A few tests want these, and skip or fail by themselves.
        let wanted: &[Need] = match self {
            Self::Netns => &[Need::Servers],
            Self::Cluster => &[Need::Shells],
            _ => &[],
        };
        if let Err(error) = setup::ensure(workspace, wanted) {
            eprintln!("setup: {error:#}");
        }
        if self == Self::Cluster {
            let lacks = own_kernel_lacks();
            return lacks.or_else(|| kubernetes::ensure(workspace).err().map(|error| format!("{error:#}")));
        }
        match self.kernel() {
            Some(kernel) => vm::prepare(workspace, kernel).err().map(|error| format!("{error:#}")),
            None if matches!(self, Self::Bpf | Self::Netns) => own_kernel_lacks(),
            None => None,
        }
    }
}

/// Why tests on a real kernel cannot use the one we run on.
pub(super) fn own_kernel_lacks() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root for network namespaces and eBPF".to_owned());
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Some("this kernel has no BTF (/sys/kernel/btf/vmlinux)".to_owned());
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let has_cgroup2 = mounts.lines().any(|line| line.split_whitespace().nth(2) == Some("cgroup2"));
    (!has_cgroup2).then(|| "no cgroup2 is mounted (/proc/mounts)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_run_boots_the_oldest_and_the_newest_kernel() {
        let default: Vec<String> =
            Tier::value_variants().iter().filter(|tier| tier.is_default()).map(|tier| tier.name()).collect();
        assert_eq!(default, ["tidy", "unit", "bpf", "netns", "cluster", "vm-6.1", "vm-7.2"]);
    }
}
