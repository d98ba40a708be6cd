//! Owns typed access to the pinned maps: shared by reference, one system call per operation.
//!
//! Invariants:
//! - A handle's key and value sizes equal the kernel's; checked when the pin is opened.
//! - Every method takes `&self`: the kernel does the locking, so workers and the control thread share handles.
//!
//! Not here: which values to write (`tables.rs`, `enrol.rs`), the programs' side (`mesh-ebpf`).

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use aya::Pod;
use aya_obj::generated::bpf_map_type;
use nix::libc;

use crate::sys;

/// Entries asked for in one step of a walk. Larger than any hash bucket in practice; doubled when not.
const BATCH: u32 = 4096;
/// A bucket larger than this is a broken hash, not a reason to take more memory.
const BATCH_MAX: u32 = 1 << 20;

/// A failed operation on a map.
#[derive(Debug, thiserror::Error)]
#[error("{operation} map {map}")]
pub struct MapError {
    /// Name of the map ([`mesh_common::maps`]).
    pub map: &'static str,
    /// What was tried.
    pub operation: &'static str,
    /// Why it failed.
    pub source: io::Error,
}

impl MapError {
    /// Whether the map has no room (as opposed to a broken call).
    pub fn is_full(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM))
    }
}

/// Why a pinned map cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenMapError {
    /// The pin is missing or not a map.
    #[error("open pinned map {name}")]
    Open {
        /// Name.
        name: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// Something else is pinned under the name.
    #[error(
        "pinned map {name} has keys of {key} and values of {value} bytes; {want_key} and {want_value} are wanted"
    )]
    Shape {
        /// Name.
        name: &'static str,
        /// Key size found.
        key: u32,
        /// Value size found.
        value: u32,
        /// Key size of this build.
        want_key: usize,
        /// Value size of this build.
        want_value: usize,
    },
}

/// A map with one value per key.
#[derive(Debug)]
pub struct KernelMap<K, V> {
    fd: OwnedFd,
    name: &'static str,
    max_entries: u32,
    kind: u32,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> KernelMap<K, V> {
    /// Opens `folder/name` and checks its shape.
    pub(crate) fn open(folder: &Path, name: &'static str) -> Result<Self, OpenMapError> {
        let fd = sys::open_pin(&folder.join(name)).map_err(|source| OpenMapError::Open { name, source })?;
        let info = sys::map_info(fd.as_fd()).map_err(|source| OpenMapError::Open { name, source })?;
        let (want_key, want_value) = (size_of::<K>(), size_of::<V>());
        if info.key_size as usize != want_key || info.value_size as usize != want_value {
            let (key, value) = (info.key_size, info.value_size);
            return Err(OpenMapError::Shape { name, key, value, want_key, want_value });
        }
        Ok(Self { fd, name, max_entries: info.max_entries, kind: info.type_, types: PhantomData })
    }

    /// Name as pinned.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Entries the map can hold.
    pub fn max_entries(&self) -> u32 {
        self.max_entries
    }

    /// Whether old entries make room for new ones, so that it is never "full".
    pub(crate) fn evicts(&self) -> bool {
        self.kind == bpf_map_type::BPF_MAP_TYPE_LRU_HASH as u32
            || self.kind == bpf_map_type::BPF_MAP_TYPE_LRU_PERCPU_HASH as u32
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>, MapError> {
        sys::map_lookup(self.fd.as_fd(), key).map_err(|source| self.error("read", source))
    }

    /// Creates or replaces an entry.
    pub fn put(&self, key: &K, value: &V) -> Result<(), MapError> {
        sys::map_update(self.fd.as_fd(), key, value, sys::ANY).map_err(|source| self.error("write", source))
    }

    /// Creates an entry; `false` when there is one already, which stays.
    pub fn put_new(&self, key: &K, value: &V) -> Result<bool, MapError> {
        match sys::map_update(self.fd.as_fd(), key, value, sys::NOEXIST) {
            Ok(()) => Ok(true),
            Err(source) if source.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(source) => Err(self.error("write", source)),
        }
    }

    /// Deletes an entry; `false` when there was none.
    pub fn delete(&self, key: &K) -> Result<bool, MapError> {
        sys::map_delete(self.fd.as_fd(), key).map_err(|source| self.error("delete from", source))
    }

    /// Calls `visit` for every entry. Entries that change meanwhile may be seen or not.
    pub fn each(&self, mut visit: impl FnMut(&K, &V)) -> Result<(), MapError> {
        let walked = walk(self.fd.as_fd(), 1, |keys: &[K], values: &[V]| {
            for (key, value) in keys.iter().zip(values) {
                visit(key, value);
            }
        });
        match walked {
            Err(error) if lacks_batches(&error) => self.each_by_key(visit),
            other => other.map_err(|source| self.error("walk", source)),
        }
    }

    /// For map types without batches on some kernels. Bounded by the map's size: a deleted key restarts the
    /// kernel's walk.
    fn each_by_key(&self, mut visit: impl FnMut(&K, &V)) -> Result<(), MapError> {
        let mut key = None;
        for _ in 0..=self.max_entries {
            let next = sys::map_next_key(self.fd.as_fd(), key.as_ref());
            let Some(next) = next.map_err(|source| self.error("walk", source))? else { break };
            if let Some(value) = self.get(&next)? {
                visit(&next, &value);
            }
            key = Some(next);
        }
        Ok(())
    }

    /// Number of entries, by counting.
    pub fn count(&self) -> Result<u32, MapError> {
        let mut count = 0;
        self.each(|_, _| count += 1)?;
        Ok(count)
    }

    /// Deletes the entries `doomed` names and returns how many went.
    pub fn delete_where(&self, mut doomed: impl FnMut(&K, &V) -> bool) -> Result<u32, MapError> {
        let mut keys = Vec::new();
        self.each(|key, value| {
            if doomed(key, value) {
                keys.push(*key);
            }
        })?;
        let mut gone = 0;
        for key in &keys {
            gone += u32::from(self.delete(key)?);
        }
        Ok(gone)
    }

    fn error(&self, operation: &'static str, source: io::Error) -> MapError {
        MapError { map: self.name, operation, source }
    }
}

impl<K, V> AsFd for KernelMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A map with one value per key and CPU.
#[derive(Debug)]
pub struct PerCpuMap<K, V> {
    inner: KernelMap<K, V>,
    cpus: usize,
}

impl<K: Pod, V: Pod> PerCpuMap<K, V> {
    pub(crate) fn open(folder: &Path, name: &'static str, cpus: usize) -> Result<Self, OpenMapError> {
        Ok(Self { inner: KernelMap::open(folder, name)?, cpus })
    }

    /// The values of a key, one per possible CPU.
    pub fn get(&self, key: &K) -> Result<Option<Vec<V>>, MapError> {
        sys::map_lookup_per_cpu(self.as_fd(), key, self.cpus)
            .map_err(|source| self.inner.error("read", source))
    }

    /// Calls `visit` for every key with its values.
    pub fn each(&self, mut visit: impl FnMut(&K, &[V])) -> Result<(), MapError> {
        let cpus = self.cpus;
        let walked = walk(self.as_fd(), cpus, |keys: &[K], values: &[V]| {
            for (key, values) in keys.iter().zip(values.chunks(cpus)) {
                visit(key, values);
            }
        });
        match walked {
            Err(error) if lacks_batches(&error) => self.each_by_key(visit),
            other => other.map_err(|source| self.inner.error("walk", source)),
        }
    }

    fn each_by_key(&self, mut visit: impl FnMut(&K, &[V])) -> Result<(), MapError> {
        let mut key = None;
        for _ in 0..=self.inner.max_entries {
            let next = sys::map_next_key(self.as_fd(), key.as_ref());
            let Some(next) = next.map_err(|source| self.inner.error("walk", source))? else { break };
            if let Some(values) = self.get(&next)? {
                visit(&next, &values);
            }
            key = Some(next);
        }
        Ok(())
    }
}

impl<K, V> AsFd for PerCpuMap<K, V> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }
}

/// `EINVAL` or the kernel-internal `ENOTSUPP`: this map type has no batched walk here.
fn lacks_batches(error: &io::Error) -> bool {
    const ENOTSUPP: i32 = 524;
    matches!(error.raw_os_error(), Some(libc::EINVAL | ENOTSUPP))
}

fn walk<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    per_key: usize,
    mut visit: impl FnMut(&[K], &[V]),
) -> io::Result<()> {
    let mut cursor = sys::BatchCursor::new();
    let mut batch = BATCH;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    loop {
        match sys::map_lookup_batch(map, &mut cursor, batch, per_key, &mut keys, &mut values) {
            Ok(more) => {
                visit(&keys, &values);
                if !more {
                    return Ok(());
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && batch < BATCH_MAX => batch *= 2,
            Err(error) => return Err(error),
        }
    }
}
