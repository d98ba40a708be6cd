//! Owns finding a Go that is new enough for Kubernetes.
//!
//! Debian's is older than Kubernetes asks for, so an old one is only used to fetch a newer toolchain, which Go publishes as a
//! module like any other (what `GOTOOLCHAIN` does in Go 1.21 and later, done by hand so that every Go can).

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};
use serde::Deserialize;

use crate::{process, setup};

/// The toolchain that is fetched if the machine's own is too old.
const TOOLCHAIN: &str = "go1.26.8";

/// A release of Go, such as 1.26.
type Release = (u32, u32);

/// Whether any Go is installed, however old.
pub(crate) fn installed() -> Option<PathBuf> {
    let usual = ["/usr/local/go/bin/go", "/usr/lib/go/bin/go"].map(PathBuf::from);
    setup::find_program("go").into_iter().chain(usual).find(|go| release_of(go).is_some())
}

/// A Go of at least the release that the module asks for. May fetch one.
pub(super) fn find(module: &Path) -> anyhow::Result<PathBuf> {
    let wanted = wanted(&fs::read_to_string(module.join("go.mod")).context("read go.mod")?)
        .context("go.mod names no release of Go")?;
    let installed = installed().context("Go is not installed")?;
    if release_of(&installed).is_some_and(|release| release >= wanted) {
        return Ok(installed);
    }
    eprintln!("cluster: this machine's Go is older than {}.{}: fetching {TOOLCHAIN}", wanted.0, wanted.1);
    fetch(&installed)
}

/// The release in a line `go 1.26.0` of a `go.mod`.
fn wanted(go_mod: &str) -> Option<Release> {
    release(go_mod.lines().find_map(|line| line.strip_prefix("go "))?)
}

fn release_of(go: &Path) -> Option<Release> {
    let mut command = Command::new(go);
    // In a folder without a go.mod, which an old Go might not even understand.
    command.args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").current_dir("/");
    let said = process::capture(&mut command).ok()?;
    release(String::from_utf8_lossy(&said).trim().strip_prefix("go")?)
}

/// The first two numbers of `1.26.0` or `1.26rc1`.
fn release(text: &str) -> Option<Release> {
    let mut numbers = text.trim().split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What `go mod download -json` says.
#[derive(Deserialize)]
struct Download {
    #[serde(rename = "Dir")]
    dir: PathBuf,
}

fn fetch(go: &Path) -> anyhow::Result<PathBuf> {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let module = format!("golang.org/toolchain@v0.0.1-{TOOLCHAIN}.linux-{arch}");
    let mut download = Command::new(go);
    download.args(["mod", "download", "-json", &module]).current_dir("/").env("GOTOOLCHAIN", "local");
    let said = process::capture(&mut download).with_context(|| format!("fetch {module}"))?;
    let Download { dir } = serde_json::from_slice(&said).context("read what `go mod download` says")?;
    // Modules have no executable files.
    for folder in ["bin".to_owned(), format!("pkg/tool/linux_{arch}")] {
        let folder = dir.join(folder);
        // Newer toolchains bring few tools ready-made.
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .with_context(|| format!("make {} executable", path.display()))?;
        }
    }
    let fetched = dir.join("bin/go");
    ensure!(release_of(&fetched).is_some(), "{} does not run", fetched.display());
    Ok(fetched)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read_as_numbers() {
        assert_eq!(release("1.26.8"), Some((1, 26)));
        assert_eq!(release("1.9rc1"), Some((1, 9)));
        assert!(release("1.9") < release("1.26"));
        assert_eq!(release("devel"), None);
        assert_eq!(wanted("module m\n\ngo 1.26.0\n\ntool (\n)\n"), Some((1, 26)));
    }
}
