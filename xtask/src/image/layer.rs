//! Owns the tar archives of an image: entries that say nothing about the machine they were written on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use sha2::{Digest as _, Sha256};

use super::{Content, hex};

/// A written layer.
pub(super) struct Layer {
    /// `sha256:…` of its bytes.
    pub(super) digest: String,
    /// Bytes.
    pub(super) size: u64,
}

/// Writes `files` as a layer to `to`.
pub(super) fn write(files: &BTreeMap<String, Content>, time: u64, to: &Path) -> anyhow::Result<Layer> {
    let file = File::create(to).with_context(|| format!("create {}", to.display()))?;
    let hashed = Hashed { inner: io::BufWriter::new(file), hash: Sha256::new(), size: 0 };
    let mut archive = tar::Builder::new(hashed);
    let mut folders = BTreeSet::new();
    for (path, content) in files {
        for parent in parents(path) {
            // Several files may share it; a folder of the image's own has a mode of its own.
            if !files.contains_key(parent) && folders.insert(parent) {
                folder(&mut archive, parent, 0o755, time)?;
            }
        }
        match content {
            Content::Program(from) => copy(&mut archive, path, from, 0o755, time)?,
            Content::Text(words) => text(&mut archive, path, words.as_bytes(), time)?,
            Content::Scratch => folder(&mut archive, path, 0o1777, time)?,
        }
    }
    let mut hashed = archive.into_inner().context("end the layer")?;
    hashed.inner.flush().context("write the layer")?;
    Ok(Layer { digest: format!("sha256:{}", hex(&hashed.hash.finalize())), size: hashed.size })
}

/// `a`, `a/b` for `a/b/c`.
fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').filter_map(|(end, _)| path.get(..end))
}

/// Adds a folder.
pub(super) fn folder(
    archive: &mut tar::Builder<impl Write>,
    path: &str,
    mode: u32,
    time: u64,
) -> anyhow::Result<()> {
    let mut header = header(tar::EntryType::Directory, 0, mode, time);
    archive.append_data(&mut header, format!("{path}/"), io::empty()).with_context(|| format!("add {path}"))
}

/// Adds a file with this content.
pub(super) fn text(
    archive: &mut tar::Builder<impl Write>,
    path: &str,
    content: &[u8],
    time: u64,
) -> anyhow::Result<()> {
    let mut header = header(tar::EntryType::Regular, content.len() as u64, 0o644, time);
    archive.append_data(&mut header, path, content).with_context(|| format!("add {path}"))
}

/// Adds a copy of a file.
pub(super) fn copy(
    archive: &mut tar::Builder<impl Write>,
    path: &str,
    from: &Path,
    mode: u32,
    time: u64,
) -> anyhow::Result<()> {
    let file = File::open(from).with_context(|| format!("open {}", from.display()))?;
    let size = file.metadata().with_context(|| format!("look at {}", from.display()))?.len();
    let mut header = header(tar::EntryType::Regular, size, mode, time);
    archive.append_data(&mut header, path, io::BufReader::new(file)).with_context(|| format!("add {path}"))
}

fn header(kind: tar::EntryType, size: u64, mode: u32, time: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_mtime(time);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Counts and hashes what goes through.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or_default());
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
