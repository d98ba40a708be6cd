//! Owns the mount of the BPF file system.

use std::{fs, io, path::Path};

use nix::mount::MsFlags;

/// Mounts the BPF file system unless it is there.
pub(crate) fn mount(path: &Path) -> io::Result<()> {
    const MAGIC: nix::sys::statfs::FsType = nix::sys::statfs::BPF_FS_MAGIC;
    fs::create_dir_all(path)?;
    let kind = nix::sys::statfs::statfs(path).map_err(io::Error::from)?;
    if kind.filesystem_type() == MAGIC {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
        .map_err(io::Error::from)
}
