//! Owns the file an agent starts from when the controller is away: the resources it had last.
//!
//! ```text
//! magic (8) | length of the body (8, big endian) | SHA-256 of the body (32) | body
//! body: records of kind, name, version, contents; each a length (4, big endian) and bytes
//! ```
//!
//! Invariants:
//! - The file is replaced as a whole, after its contents reached the disk: a crash leaves the old or the new one.
//! - A file that is not exactly what was written is not used at all; the mesh then starts without, and closed where it must.
//! - The folder is the agent's alone (0700), for the contents decide who may talk to whom.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use bytes::Bytes;

use super::store::Held;
use crate::link::Kind;

/// Says what the file is and, in its last byte, which layout.
const MAGIC: [u8; 8] = *b"NMSNAP\0\x01";
const HEADER_LEN: usize = MAGIC.len() + 8 + SHA256_OUTPUT_LEN;
/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Why there is nothing to start from.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The file cannot be read or written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// File or folder.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Not a snapshot of this layout.
    #[error("{} is not a snapshot of this version of the agent", path.display())]
    Layout {
        /// File.
        path: PathBuf,
    },
    /// The contents are not what was written.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// File.
        path: PathBuf,
    },
}

/// Where the last resources are kept.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    folder: PathBuf,
}

impl SnapshotFile {
    /// The file of a node below the agent's state directory.
    pub fn new(state_dir: &Path, node: &str) -> Self {
        Self { folder: state_dir.join(node.replace('/', "%2f")) }
    }

    /// Where it is.
    pub fn path(&self) -> PathBuf {
        self.folder.join("snapshot")
    }

    /// What was saved last; `None` if nothing ever was.
    ///
    /// # Errors
    /// The file cannot be read, or not trusted.
    pub fn load(&self) -> Result<Option<Vec<Held>>, DiskError> {
        let path = self.path();
        let io = |source| DiskError::Io { doing: "read", path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
        };
        let mut bytes = Vec::new();
        file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(DiskError::Damaged { path });
        }
        decode(bytes.into()).map(Some).map_err(|refusal| match refusal {
            Unreadable::Layout => DiskError::Layout { path },
            Unreadable::Damaged => DiskError::Damaged { path },
        })
    }

    /// Replaces the file. Blocking.
    ///
    /// # Errors
    /// A folder or file could not be written; what was there is there still.
    pub fn save(&self, resources: &[Held]) -> Result<(), DiskError> {
        let (path, new) = (self.path(), self.folder.join("snapshot.new"));
        let io = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| DiskError::Io { doing, path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(io("make the folder", &self.folder))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .map_err(io("write", &new))?;
        file.write_all(&encode(resources)).map_err(io("write", &new))?;
        file.sync_all().map_err(io("write", &new))?;
        fs::rename(&new, &path).map_err(io("replace", &path))?;
        // The rename itself is only safe once the folder is.
        File::open(&self.folder).and_then(|folder| folder.sync_all()).map_err(io("sync", &self.folder))
    }
}

fn encode(resources: &[Held]) -> Vec<u8> {
    let body_len = resources
        .iter()
        .map(|held| 16 + held.kind.type_url().len() + held.name.len() + held.version.len() + held.body.len())
        .sum::<usize>();
    let mut bytes = Vec::with_capacity(HEADER_LEN + body_len);
    bytes.resize(HEADER_LEN, 0);
    for held in resources {
        for field in
            [held.kind.type_url().as_bytes(), held.name.as_bytes(), held.version.as_bytes(), &held.body]
        {
            // A field comes from a response of at most a few MiB.
            let len = u32::try_from(field.len()).unwrap_or(u32::MAX);
            bytes.extend_from_slice(&len.to_be_bytes());
            bytes.extend_from_slice(field);
        }
    }
    let sum = digest(&SHA256, &bytes[HEADER_LEN..]);
    let len = (bytes.len() - HEADER_LEN) as u64;
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&len.to_be_bytes());
    bytes[16..HEADER_LEN].copy_from_slice(sum.as_ref());
    bytes
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unreadable {
    Layout,
    Damaged,
}

fn decode(bytes: Bytes) -> Result<Vec<Held>, Unreadable> {
    let magic = bytes.get(..MAGIC.len()).ok_or(Unreadable::Damaged)?;
    if magic != MAGIC {
        return Err(Unreadable::Layout);
    }
    let header = bytes.get(MAGIC.len()..HEADER_LEN).ok_or(Unreadable::Damaged)?;
    let (len, sum) = header.split_at(8);
    let mut body = bytes.slice(HEADER_LEN..);
    if len != (body.len() as u64).to_be_bytes() || sum != digest(&SHA256, &body).as_ref() {
        return Err(Unreadable::Damaged);
    }
    let mut resources = Vec::new();
    while !body.is_empty() {
        let kind = text(&mut body)?;
        let (name, version, contents) = (text(&mut body)?, text(&mut body)?, field(&mut body)?);
        // A kind of a later version of ours, which wrote this file, is not missed: the controller sends all again.
        if let Some(kind) = Kind::of(&kind) {
            resources.push(Held { kind, name, version, body: contents });
        }
    }
    Ok(resources)
}

fn field(body: &mut Bytes) -> Result<Bytes, Unreadable> {
    let len = body.get(..4).and_then(|len| <[u8; 4]>::try_from(len).ok()).ok_or(Unreadable::Damaged)?;
    let len = u32::from_be_bytes(len) as usize;
    if body.len() - 4 < len {
        return Err(Unreadable::Damaged);
    }
    let rest = body.split_off(4 + len);
    Ok(std::mem::replace(body, rest).slice(4..))
}

fn text(body: &mut Bytes) -> Result<Arc<str>, Unreadable> {
    let bytes = field(body)?;
    std::str::from_utf8(&bytes).map(Arc::from).map_err(|_| Unreadable::Damaged)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("nodemesh-disk-{}-{name}", std::process::id()));
            fs::remove_dir_all(&path).ok();
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).ok();
        }
    }

    fn held(name: &str, body: &[u8]) -> Held {
        Held {
            kind: Kind::Address,
            name: name.into(),
            version: "v".into(),
            body: Bytes::copy_from_slice(body),
        }
    }

    #[test]
    fn what_was_saved_is_loaded_and_nobody_else_may_read_it() {
        let folder = Folder::new("round");
        let file = SnapshotFile::new(&folder.0, "n1");
        assert!(file.load().unwrap().is_none(), "never saved");
        let resources = vec![held("a", b"1"), held("b", b"")];
        file.save(&resources).unwrap();
        assert_eq!(file.load().unwrap(), Some(resources));
        file.save(&[]).unwrap();
        assert_eq!(file.load().unwrap(), Some(Vec::new()));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file.path()), mode(&folder.0.join("n1"))), (0o600, 0o700));
    }

    #[test]
    fn a_flipped_bit_anywhere_is_noticed() {
        let folder = Folder::new("flip");
        let file = SnapshotFile::new(&folder.0, "n1");
        file.save(&[held("a", b"contents")]).unwrap();
        let good = fs::read(file.path()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(file.path(), &bad).unwrap();
            assert!(file.load().is_err(), "byte {at}");
        }
        for len in 0..good.len() {
            fs::write(file.path(), &good[..len]).unwrap();
            assert!(file.load().is_err(), "first {len} bytes");
        }
    }

    #[test]
    fn a_file_of_another_layout_is_told_from_a_damaged_one() {
        let folder = Folder::new("layout");
        let file = SnapshotFile::new(&folder.0, "n1");
        file.save(&[]).unwrap();
        let mut bytes = fs::read(file.path()).unwrap();
        bytes[7] = 9;
        fs::write(file.path(), bytes).unwrap();
        assert!(matches!(file.load(), Err(DiskError::Layout { .. })));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(body in proptest::collection::vec(any::<u8>(), 0..256)) {
            // With a right checksum, so that the records themselves are reached.
            let mut bytes = encode(&[]);
            bytes.extend_from_slice(&body);
            bytes[8..16].copy_from_slice(&(body.len() as u64).to_be_bytes());
            bytes[16..HEADER_LEN].copy_from_slice(digest(&SHA256, &body).as_ref());
            let _outcome = decode(bytes.into());
        }
    }
}
