//! Owns the mount of the BPF file system.

use std::{fs, io, path::Path};

use nix::mount::MsFlags;

/// Whether a folder is in a BPF file system.
pub(crate) fn is_bpffs(path: &Path) -> bool {
    let kind = nix::sys::statfs::statfs(path).map(|stat| stat.filesystem_type());
    kind == Ok(nix::sys::statfs::BPF_FS_MAGIC)
}

/// Mounts the BPF file system unless it is there.
pub(crate) fn mount(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    if is_bpffs(path) {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(io::Error::from)
}
