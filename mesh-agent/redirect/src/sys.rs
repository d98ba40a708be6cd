//! Owns every raw system call of the crate: `bpf(2)` where aya has no public wrapper, and a few calls on sockets and processes.
//!
//! Invariants:
//! - The only module with `unsafe` (with its child); each wrapper is total: any argument either works or gives an `io::Error`.
//! - Every descriptor that comes out of here is owned and close-on-exec.
//!
//! Not here: what the calls are for (`map.rs`, `links.rs`, `arrival.rs`).

mod handles;
mod programs;

use std::{
    ffi::CString,
    io,
    mem::{self, MaybeUninit},
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd, bpf_link_info, bpf_map_info, bpf_prog_info};
use nix::libc;

pub use self::programs::Refused;
pub(crate) use self::{
    handles::{
        DESCRIPTORS_MAX, is_netns, netns_cookie, pidfd_alive, pidfd_open, receive_with_descriptors, tcp_info,
    },
    programs::{create_read_only_data, load_sk_lookup},
};

/// `BPF_ANY`: create or replace.
pub(crate) const ANY: u64 = 0;
/// `BPF_NOEXIST`: only create.
pub(crate) const NOEXIST: u64 = 1;

fn zeroed_attr() -> bpf_attr {
    // SAFETY: `bpf_attr` is a union of structs of integers, for which all bits zero is a value. The whole
    // union is zeroed, as the kernel demands of the bytes behind the used part.
    unsafe { mem::zeroed() }
}

fn bpf(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes at most `size_of::<bpf_attr>()` bytes of `attr`; every pointer
    // inside was made from a live reference by the caller in this module.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, cmd as libc::c_long, &raw mut *attr, size_of::<bpf_attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

fn bpf_fd(cmd: bpf_cmd, attr: &mut bpf_attr) -> io::Result<OwnedFd> {
    let fd = bpf(cmd, attr)?;
    // SAFETY: the command returned a new descriptor that nobody else owns; bpf(2) sets close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as u64
}

fn path_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Opens a pinned map, program or link.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = path_string(path)?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut attr)
}

/// Pins a map, program or link.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path_string(path)?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    attr.__bindgen_anon_4.bpf_fd = raw(fd);
    bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Looks a key up; `None` when absent. `V` must be as large as what the kernel writes for this map.
pub(crate) fn map_lookup<K: aya::Pod, V: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<Option<V>> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = address(key);
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
    match bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        // SAFETY: the kernel has written the whole value, and `Pod` values are valid for any bits.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Looks up one value per possible CPU. `V`'s size must be a multiple of 8, the kernel's stride.
pub(crate) fn map_lookup_per_cpu<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    cpus: usize,
) -> io::Result<Option<Vec<V>>> {
    const { assert!(size_of::<V>().is_multiple_of(8)) };
    let mut values = Vec::<V>::with_capacity(cpus);
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = address(key);
    attr.__bindgen_anon_2.__bindgen_anon_1.value = values.as_mut_ptr() as u64;
    match bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => {
            // SAFETY: the kernel has written one value per possible CPU, which is the capacity.
            unsafe { values.set_len(cpus) };
            Ok(Some(values))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Inserts or replaces a value.
pub(crate) fn map_update<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    key: &K,
    value: &V,
    flags: u64,
) -> io::Result<()> {
    map_update_bytes(map, address(key), address(value), flags)
}

fn map_update_bytes(map: BorrowedFd<'_>, key: u64, value: u64, flags: u64) -> io::Result<()> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = key;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value;
    attr.__bindgen_anon_2.flags = flags;
    bpf(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Deletes a key; `false` when it was absent.
pub(crate) fn map_delete<K: aya::Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = address(key);
    match bpf(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The key after `key`, or the first one; `None` at the end.
pub(crate) fn map_next_key<K: aya::Pod>(map: BorrowedFd<'_>, key: Option<&K>) -> io::Result<Option<K>> {
    let mut next = MaybeUninit::<K>::uninit();
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = raw(map);
    attr.__bindgen_anon_2.key = key.map_or(0, address);
    attr.__bindgen_anon_2.__bindgen_anon_1.next_key = next.as_mut_ptr() as u64;
    match bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) {
        // SAFETY: the kernel has written the whole key, and `Pod` keys are valid for any bits.
        Ok(_) => Ok(Some(unsafe { next.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where a batched walk stands; opaque to user space.
#[derive(Debug)]
pub(crate) struct BatchCursor {
    // Hash maps need 4 bytes, walks by key need a whole key: 64 holds the largest key of the ABI.
    position: [u8; 64],
    started: bool,
}

impl BatchCursor {
    pub(crate) fn new() -> Self {
        Self { position: [0; 64], started: false }
    }
}

/// One step of a batched walk: fills `keys` and `values` (`per_key` values for each key) and says whether
/// there is more. `ENOSPC` means that `count` is smaller than a hash bucket: nothing was consumed.
pub(crate) fn map_lookup_batch<K: aya::Pod, V: aya::Pod>(
    map: BorrowedFd<'_>,
    cursor: &mut BatchCursor,
    count: u32,
    per_key: usize,
    keys: &mut Vec<K>,
    values: &mut Vec<V>,
) -> io::Result<bool> {
    const { assert!(size_of::<K>() <= 64) };
    keys.clear();
    values.clear();
    keys.reserve(count as usize);
    values.reserve(count as usize * per_key);
    let from = cursor.position;
    let mut attr = zeroed_attr();
    attr.batch.map_fd = raw(map);
    attr.batch.in_batch = if cursor.started { address(&from) } else { 0 };
    attr.batch.out_batch = cursor.position.as_mut_ptr() as u64;
    attr.batch.keys = keys.as_mut_ptr() as u64;
    attr.batch.values = values.as_mut_ptr() as u64;
    attr.batch.count = count;
    let more = match bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
        Ok(_) => true,
        // The last step: the entries are there all the same.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => false,
        Err(error) => {
            cursor.position = from;
            return Err(error);
        }
    };
    cursor.started = true;
    // SAFETY: the kernel sets `count` to the number of entries it has written to both buffers, which have
    // room for the number asked for.
    unsafe {
        let written = attr.batch.count.min(count) as usize;
        keys.set_len(written);
        values.set_len(written * per_key);
    }
    Ok(more)
}

/// What the kernel says of a map.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<bpf_map_info> {
    info(map)
}

/// What the kernel says of a program, run statistics included.
pub(crate) fn program_info(program: BorrowedFd<'_>) -> io::Result<bpf_prog_info> {
    info(program)
}

/// A link as far as this crate cares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkInfo {
    pub(crate) id: u32,
    pub(crate) program_id: u32,
    pub(crate) kind: LinkTarget,
}

/// What a link is attached to; 0 once that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinkTarget {
    Cgroup { id: u64, attach_type: u32 },
    Netns { inode: u32, attach_type: u32 },
    Other,
}

/// Reads a link's target and program.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    const CGROUP: u32 = aya_obj::generated::bpf_link_type::BPF_LINK_TYPE_CGROUP as u32;
    const NETNS: u32 = aya_obj::generated::bpf_link_type::BPF_LINK_TYPE_NETNS as u32;
    let info: bpf_link_info = info(link)?;
    let kind = match info.type_ {
        // SAFETY: the type says which member the kernel has filled; all members are integers.
        CGROUP => unsafe {
            let cgroup = info.__bindgen_anon_1.cgroup;
            LinkTarget::Cgroup { id: cgroup.cgroup_id, attach_type: cgroup.attach_type }
        },
        // SAFETY: as above.
        NETNS => unsafe {
            let netns = info.__bindgen_anon_1.netns;
            LinkTarget::Netns { inode: netns.netns_ino, attach_type: netns.attach_type }
        },
        _ => LinkTarget::Other,
    };
    Ok(LinkInfo { id: info.id, program_id: info.prog_id, kind })
}

/// Marker of the kernel's info structs, which are all integers.
trait Info {}
impl Info for bpf_map_info {}
impl Info for bpf_prog_info {}
impl Info for bpf_link_info {}

fn info<T: Info>(fd: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: the info structs consist of integers and unions of integers: zero is a value.
    let mut info: T = unsafe { mem::zeroed() };
    let mut attr = zeroed_attr();
    attr.info.bpf_fd = raw(fd);
    attr.info.info_len = size_of::<T>() as u32;
    attr.info.info = (&raw mut info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// Opens a program by id; fails when it has been unloaded in the meantime.
pub(crate) fn program_by_id(id: u32) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = id;
    bpf_fd(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)
}

/// Attaches a program to a cgroup or network namespace.
///
/// No flags: links are multi-program by themselves, and the kernel refuses the old flags with `EINVAL`.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    attr.link_create.__bindgen_anon_1.prog_fd = raw(program);
    attr.link_create.__bindgen_anon_2.target_fd = raw(target);
    attr.link_create.attach_type = attach_type as u32;
    bpf_fd(bpf_cmd::BPF_LINK_CREATE, &mut attr)
}

/// Swaps the program of a link, atomically. The caller has checked the attach type: the kernel does not.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed_attr();
    attr.link_update.link_fd = raw(link);
    attr.link_update.__bindgen_anon_1.new_prog_fd = raw(program);
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Detaches a link whoever else still holds it.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed_attr();
    attr.link_detach.link_fd = raw(link);
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr).map(drop)
}

/// Ids of the programs attached to this very cgroup for one attach type (not those of ancestors), and the
/// kernel's attach flags (0 means a legacy exclusive attachment when there is a program).
pub(crate) fn cgroup_programs(cgroup: BorrowedFd<'_>, attach_type: u32) -> io::Result<(Vec<u32>, u32)> {
    // The kernel allows 64 programs per cgroup and type (BPF_CGROUP_MAX_PROGS).
    let mut ids = [0_u32; 64];
    let mut attr = zeroed_attr();
    attr.query.__bindgen_anon_1.target_fd = raw(cgroup);
    attr.query.attach_type = attach_type;
    attr.query.prog_ids = ids.as_mut_ptr() as u64;
    attr.query.__bindgen_anon_2.prog_cnt = ids.len() as u32;
    bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr)?;
    // SAFETY: BPF_PROG_QUERY fills `query`, whose members are integers.
    let (count, flags) = unsafe { (attr.query.__bindgen_anon_2.prog_cnt as usize, attr.query.attach_flags) };
    Ok((ids[..count.min(ids.len())].to_vec(), flags))
}

/// Turns run-time statistics of all programs on for as long as the descriptor lives.
pub(crate) fn enable_run_stats() -> io::Result<OwnedFd> {
    let mut attr = zeroed_attr();
    attr.enable_stats.type_ = aya_obj::generated::bpf_stats_type::BPF_STATS_RUN_TIME as u32;
    bpf_fd(bpf_cmd::BPF_ENABLE_STATS, &mut attr)
}

/// Copies a plain value out of bytes the kernel wrote; `None` when the length differs.
pub(crate) fn read_pod<T: aya::Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: the length was checked, the read is unaligned, and `Pod` values are valid for any bits.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}
