//! Owns taking a node out of the kernel, for good.

use std::{fs, io, path::Path};

use crate::{
    folders::{self, Folders},
    links,
};

/// Takes everything of a node out of the kernel: links (detached whoever holds them), then maps, then folders.
///
/// Returns whether there was anything. Established connections live on; pods are simply no longer meshed.
pub fn cleanup(bpffs: &Path, node: &str) -> bool {
    let folders = Folders::new(bpffs, node);
    let versions = folders::entries(folders.node());
    let found = !versions.is_empty();
    for version in versions {
        remove_version(&version);
    }
    remove_folder(folders.node());
    // That of all nodes goes with the last one.
    if let Some(all) = folders.node().parent() {
        drop(fs::remove_dir(all));
    }
    found
}

/// Removes the pins of one ABI version.
pub(crate) fn remove_version(version: &Path) {
    let pins = folders::entries(&version.join("links"));
    // Outbound redirection ends first, so that no new connect is sent to something that is going away; arrivals
    // go last.
    let (arrivals, hooks): (Vec<_>, Vec<_>) =
        pins.into_iter().partition(|pin| folders::arrival_pod(pin).is_some());
    for pin in hooks.iter().chain(&arrivals) {
        links::remove(pin);
    }
    for map in folders::entries(&version.join("maps")) {
        if let Err(error) = fs::remove_file(&map) {
            tracing::warn!(map = %map.display(), %error, "pin not removed");
        }
    }
    for folder in [&version.join("links"), &version.join("maps"), version] {
        remove_folder(folder);
    }
}

fn remove_folder(folder: &Path) {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(folder = %folder.display(), %error, "pin folder not removed");
        }
        _ => {}
    }
}
