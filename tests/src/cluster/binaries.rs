//! Where the programs of Kubernetes are: `MESH_KUBERNETES_BIN`, else what `cargo xtask` built last.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::programs::profile_directory;

/// Without these there is no cluster of any kind.
const FIRST: [&str; 2] = ["kube-apiserver", "kubectl"];

/// Programs that come from the system's packages, and where they may be besides `PATH`.
const SYSTEM_FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// A program of the cluster is not there.
#[derive(Debug, thiserror::Error)]
#[error("no {program} in {looked}: run `cargo xtask cluster prepare`")]
pub struct BinariesMissing {
    program: String,
    looked: String,
}

/// The folder of Kubernetes' programs.
#[derive(Debug, Clone)]
pub struct Binaries {
    folder: PathBuf,
}

impl Binaries {
    /// `MESH_KUBERNETES_BIN`, else the folder below `target/kubernetes` that has an API server.
    ///
    /// # Errors
    /// [`BinariesMissing`] when they have not been built.
    pub fn find() -> Result<Self, BinariesMissing> {
        let folder = match std::env::var_os("MESH_KUBERNETES_BIN") {
            Some(folder) => PathBuf::from(folder),
            None => beside_the_executables()?,
        };
        let found = Self { folder };
        for program in FIRST {
            found.program(program)?;
        }
        Ok(found)
    }

    /// One of the programs that were built.
    ///
    /// # Errors
    /// [`BinariesMissing`] when it was not.
    pub fn program(&self, name: &str) -> Result<PathBuf, BinariesMissing> {
        let path = self.folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
        Err(BinariesMissing { program: name.to_owned(), looked: self.folder.display().to_string() })
    }

    /// A program of the system, such as `etcd`.
    ///
    /// # Errors
    /// [`BinariesMissing`] when it is not installed.
    pub fn system(&self, name: &str) -> Result<PathBuf, BinariesMissing> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(SYSTEM_FOLDERS.iter().map(PathBuf::from))
            .map(|folder| folder.join(name))
            .find(|candidate| candidate.is_file())
            .ok_or_else(|| BinariesMissing { program: name.to_owned(), looked: "PATH".to_owned() })
    }

    /// A command of a program that was built.
    ///
    /// # Errors
    /// [`BinariesMissing`] when it was not.
    pub fn command(&self, name: &str) -> Result<Command, BinariesMissing> {
        Ok(Command::new(self.program(name)?))
    }
}

fn beside_the_executables() -> Result<PathBuf, BinariesMissing> {
    let profile = profile_directory();
    let folder = profile.parent().unwrap_or(Path::new(".")).join("kubernetes");
    let versions = std::fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
    versions.filter(|version| version.join("kube-apiserver").is_file()).max().ok_or_else(|| BinariesMissing {
        program: "kube-apiserver".to_owned(),
        looked: folder.display().to_string(),
    })
}
