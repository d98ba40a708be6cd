//! Owns the folder of one guest run, so that runs side by side do not touch each other's files.
//!
//! `run-PID` is made beside the kernel; `latest` leads to the newest. The logs of a run stay until the next run
//! of that kernel begins; its root file system goes with the run.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::Context;

/// A folder of this process. Dropping it removes what is large.
#[derive(Debug)]
pub(super) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// Removes folders of runs that have ended and makes ours.
    pub(super) fn begin(kernel_folder: &Path) -> anyhow::Result<Self> {
        let ours = std::process::id();
        for entry in
            fs::read_dir(kernel_folder).with_context(|| format!("read {}", kernel_folder.display()))?
        {
            let path = entry?.path();
            let owner = path.file_name().and_then(|name| owner(name.to_str()?));
            if owner.is_some_and(|pid| pid == ours || !Path::new("/proc").join(pid.to_string()).exists()) {
                fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
            }
        }
        let name = format!("run-{ours}");
        let path = kernel_folder.join(&name);
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        point_latest(kernel_folder, &name).context("link the latest run")?;
        Ok(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where the guest's root file system is put together.
    pub(super) fn root(&self) -> PathBuf {
        self.path.join("root")
    }

    /// The packed root file system.
    pub(super) fn initramfs(&self) -> PathBuf {
        self.path.join("initramfs")
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // Only space is lost if this fails, until the next run.
        let _root = fs::remove_dir_all(self.root());
        let _initramfs = fs::remove_file(self.initramfs());
    }
}

/// The process that made a folder of this name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("run-")?.parse().ok()
}

/// Replaces the link in one step: another run may do the same.
fn point_latest(folder: &Path, name: &str) -> io::Result<()> {
    let fresh = folder.join(format!("latest.{name}"));
    symlink(name, &fresh)?;
    fs::rename(&fresh, folder.join("latest"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_clears_up_after_dead_ones_and_after_itself() {
        let folder = std::env::temp_dir().join(format!("xtask-run-folder-{}", std::process::id()));
        // No process has this number: it is above the kernel's limit.
        let dead = folder.join("run-4194305");
        let alive = folder.join("run-1");
        for path in [&dead, &alive] {
            fs::create_dir_all(path).unwrap();
        }
        let run = RunFolder::begin(&folder).unwrap();
        fs::create_dir(run.root()).unwrap();
        fs::write(run.path().join("console.log"), "boot").unwrap();
        assert!(!dead.exists() && alive.exists());
        drop(run);
        assert!(folder.join("latest/console.log").exists());
        assert!(!folder.join("latest/root").exists());
        fs::remove_dir_all(&folder).unwrap();
    }
}
