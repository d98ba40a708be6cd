//! Where the executables under test are.

use std::path::{Path, PathBuf};

/// An executable that the tests need is not there.
#[derive(Debug, thiserror::Error)]
#[error("no executable {name} beside {near} and {variable} is not set: run `cargo build -p {package}`")]
pub struct ProgramMissing {
    name: &'static str,
    package: &'static str,
    variable: &'static str,
    near: String,
}

/// `mesh-agent`, from `MESH_AGENT_BIN` or the directory of the running executable.
///
/// # Errors
/// [`ProgramMissing`] when it has not been built.
pub fn agent() -> Result<PathBuf, ProgramMissing> {
    find("mesh-agent", "mesh-agent", "MESH_AGENT_BIN")
}

/// `meshctl`, from `MESHCTL_BIN` or the directory of the running executable.
///
/// # Errors
/// [`ProgramMissing`] when it has not been built.
pub fn meshctl() -> Result<PathBuf, ProgramMissing> {
    find("meshctl", "mesh-agent", "MESHCTL_BIN")
}

/// `pod-tool`, from `MESH_POD_TOOL_BIN` or the directory of the running executable.
///
/// # Errors
/// [`ProgramMissing`] when it has not been built.
pub fn pod_tool() -> Result<PathBuf, ProgramMissing> {
    find("pod-tool", "mesh-tests", "MESH_POD_TOOL_BIN")
}

/// `bookinfo`, from `MESH_BOOKINFO_BIN` or the directory of the running executable.
///
/// # Errors
/// [`ProgramMissing`] when it has not been built.
pub fn bookinfo() -> Result<PathBuf, ProgramMissing> {
    find("bookinfo", "mesh-tests", "MESH_BOOKINFO_BIN")
}

fn find(
    name: &'static str,
    package: &'static str,
    variable: &'static str,
) -> Result<PathBuf, ProgramMissing> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(PathBuf::from(path));
    }
    let profile = profile_directory();
    let path = profile.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(ProgramMissing { name, package, variable, near: profile.display().to_string() })
}

/// The directory of build results: that of the executable, one up for a test in `deps/`.
pub(crate) fn profile_directory() -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    let directory = exe.parent().unwrap_or(Path::new("."));
    if directory.file_name().is_some_and(|name| name == "deps") {
        directory.parent().unwrap_or(directory).to_path_buf()
    } else {
        directory.to_path_buf()
    }
}
