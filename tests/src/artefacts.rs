//! What a failed test leaves for its reader: logs, `meshctl` dumps, sockets, addresses and manifests.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::programs::profile_directory;
use crate::saying::say;
use crate::world::World;

/// The `meshctl` views that are saved.
const VIEWS: [&[&str]; 4] =
    [&["status"], &["connections"], &["top", "--once"], &["profile", "--seconds", "1"]];

/// `MESH_TEST_ARTIFACTS`, or `target/test-artifacts`.
#[must_use]
pub fn directory() -> PathBuf {
    if let Some(path) = std::env::var_os("MESH_TEST_ARTIFACTS") {
        return PathBuf::from(path);
    }
    let profile = profile_directory();
    profile.parent().unwrap_or(&profile).join("test-artifacts")
}

/// Save everything that could explain why the test of `world` failed.
pub(crate) fn save(world: &World) {
    let target = directory().join(world.test_name().replace("::", "."));
    let saved = fs::remove_dir_all(&target)
        .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
        .and_then(|()| fs::create_dir_all(&target))
        .and_then(|()| collect(world, &target));
    match saved {
        Ok(()) => say(&format!("artefacts of the failed test: {}", target.display())),
        Err(error) => say(&format!("cannot save artefacts in {}: {error}", target.display())),
    }
}

fn collect(world: &World, target: &Path) -> io::Result<()> {
    // Views first: they tell the state at the moment of failure.
    for node in world.nodes() {
        for (number, agent) in node.agents().iter().enumerate() {
            for view in VIEWS {
                let text = match agent.meshctl(view) {
                    Ok(value) => format!("{value:#}\n"),
                    Err(error) => format!("{:#}\n", anyhow::Error::new(error)),
                };
                fs::write(target.join(format!("{}-agent{number}-{}.json", node.name(), view[0])), text)?;
            }
        }
    }
    for node in world.nodes() {
        for (number, agent) in node.agents().iter().enumerate() {
            let text = agent.http("/metrics").map(|(_, text)| text).unwrap_or_else(|error| error.to_string());
            fs::write(target.join(format!("{}-agent{number}.metrics", node.name())), text)?;
        }
    }
    for place in world.places() {
        fs::write(target.join(format!("{}.sockets", place.name())), place.sockets())?;
        let network = place.run(|| {
            [["addr"], ["route"]]
                .iter()
                .map(|what| ip_show(what, "-4") + &ip_show(what, "-6"))
                .collect::<String>()
        });
        fs::write(target.join(format!("{}.network", place.name())), network.unwrap_or_default())?;
    }
    copy_tree(&world.logs(), &target.join("logs"))?;
    copy_tree(world.manifests().directory(), &target.join("manifests"))
}

fn ip_show(what: &[&str], family: &str) -> String {
    Command::new("ip")
        .arg(family)
        .args(what)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

/// Copy a directory and all in it.
///
/// # Errors
/// When a file cannot be read or written.
pub fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &to.join(entry.file_name()))?;
        } else {
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}
