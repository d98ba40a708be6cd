//! The few `bpf(2)` commands that tests need: reading what an agent has pinned and what is loaded, and loading a foreign program.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::libc;

const MAP_LOOKUP_ELEM: u32 = 1;
const MAP_GET_NEXT_KEY: u32 = 4;
const PROG_LOAD: u32 = 5;
const OBJ_GET: u32 = 7;
const PROG_ATTACH: u32 = 8;
const PROG_DETACH: u32 = 9;
const PROG_GET_NEXT_ID: u32 = 11;
const PROG_GET_FD_BY_ID: u32 = 13;
const MAP_GET_FD_BY_ID: u32 = 14;
const OBJ_GET_INFO_BY_FD: u32 = 15;
const LINK_CREATE: u32 = 28;

/// The size of the kernel's `union bpf_attr` that we hand over: enough for each command used here.
const ATTR_WORDS: usize = 16;

/// The size of the buffer for `struct bpf_*_info`: larger than any known one; the kernel fills what it has.
const INFO_WORDS: usize = 64;

/// Maps of one program that are asked for: more than any of the agent's has.
const PROGRAM_MAPS_MAX: usize = 256;

/// Words of `union bpf_attr`, little ends first as on every machine this runs on.
#[derive(Debug)]
struct Attr([u64; ATTR_WORDS]);

impl Attr {
    fn new(words: &[u64]) -> Self {
        let mut attr = [0; ATTR_WORDS];
        attr[..words.len()].copy_from_slice(words);
        Self(attr)
    }
}

/// Two neighbouring 32-bit fields.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    u32::try_from(fd.as_raw_fd()).unwrap_or(u32::MAX)
}

fn address<T: ?Sized>(value: &T) -> u64 {
    std::ptr::from_ref(value).cast::<u8>() as u64
}

#[expect(unsafe_code, reason = "bpf(2) has no wrapper in the C library")]
fn bpf(command: u32, attr: &mut Attr) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes at most the bytes of `attr`; every address in it was made by the
    // callers in this module from buffers that outlive the call and are as long as the command needs.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.0.as_mut_ptr(), size_of_val(&attr.0)) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(unsafe_code, reason = "a raw descriptor becomes an owned one")]
fn bpf_fd(command: u32, attr: &mut Attr) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the command returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Open a pinned map, program or link.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    bpf_fd(OBJ_GET, &mut Attr::new(&[address(path.as_bytes_with_nul())]))
}

fn info(object: BorrowedFd<'_>) -> io::Result<[u32; 2 * INFO_WORDS]> {
    let info = Box::new([0_u32; 2 * INFO_WORDS]);
    let length = u32::try_from(size_of_val(&*info)).unwrap_or(0);
    bpf(OBJ_GET_INFO_BY_FD, &mut Attr::new(&[pair(raw(object), length), address(&*info)]))?;
    Ok(*info)
}

/// What the kernel says of a map.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapInfo {
    pub(crate) id: u32,
    pub(crate) key_size: usize,
    pub(crate) value_size: usize,
}

/// Ask for a map's id and sizes.
pub(crate) fn map_info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let info = info(map)?;
    Ok(MapInfo { id: info[1], key_size: info[2] as usize, value_size: info[3] as usize })
}

/// Ask for a link's id and that of its program.
pub(crate) fn link_info(link: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    let info = info(link)?;
    Ok((info[1], info[2]))
}

/// The first loaded program's id after `id`, whoever loaded it; `None` at the end.
pub(crate) fn next_program(id: u32) -> io::Result<Option<u32>> {
    let mut attr = Attr::new(&[pair(id, 0)]);
    let found = present(bpf(PROG_GET_NEXT_ID, &mut attr))?;
    Ok(found.then_some((attr.0[0] >> 32) as u32))
}

/// A loaded program; `None` when there is none of this id.
pub(crate) fn program_by_id(id: u32) -> io::Result<Option<OwnedFd>> {
    by_id(PROG_GET_FD_BY_ID, id)
}

/// A map that somebody holds; `None` when there is none of this id.
pub(crate) fn map_by_id(id: u32) -> io::Result<Option<OwnedFd>> {
    by_id(MAP_GET_FD_BY_ID, id)
}

fn by_id(command: u32, id: u32) -> io::Result<Option<OwnedFd>> {
    match bpf_fd(command, &mut Attr::new(&[pair(id, 0)])) {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What the kernel says of a program.
#[derive(Debug, Clone)]
pub(crate) struct ProgramInfo {
    pub(crate) name: String,
    /// Ids of the maps that it uses.
    pub(crate) maps: Vec<u32>,
}

/// Ask for a program's name and maps.
pub(crate) fn program_info(program: BorrowedFd<'_>) -> io::Result<ProgramInfo> {
    // Of `struct bpf_prog_info`: `nr_map_ids`, `map_ids` of two words, and `name` of four.
    const COUNT: usize = 13;
    const NAME: usize = 16;
    let mut maps = vec![0_u32; PROGRAM_MAPS_MAX];
    let mut info = Box::new([0_u32; 2 * INFO_WORDS]);
    let to = maps.as_mut_ptr() as u64;
    info[COUNT] = u32::try_from(maps.len()).map_err(io::Error::other)?;
    info[COUNT + 1] = to as u32;
    info[COUNT + 2] = (to >> 32) as u32;
    let length = u32::try_from(size_of_val(&*info)).map_err(io::Error::other)?;
    let into = info.as_mut_ptr() as u64;
    bpf(OBJ_GET_INFO_BY_FD, &mut Attr::new(&[pair(raw(program), length), into]))?;
    maps.truncate(info[COUNT] as usize);
    let name = info[NAME..NAME + 4].iter().flat_map(|word| word.to_ne_bytes());
    let name: Vec<u8> = name.take_while(|byte| *byte != 0).collect();
    Ok(ProgramInfo { name: String::from_utf8_lossy(&name).into_owned(), maps })
}

/// Look a key up; `value` must be as long as what the kernel writes. `false`: absent.
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let out = value.as_mut_ptr() as u64;
    let mut attr = Attr::new(&[pair(raw(map), 0), address(key), out]);
    present(bpf(MAP_LOOKUP_ELEM, &mut attr))
}

/// The key after `key`, or the first; `false` at the end.
pub(crate) fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let out = next.as_mut_ptr() as u64;
    let mut attr = Attr::new(&[pair(raw(map), 0), key.map_or(0, address), out]);
    present(bpf(MAP_GET_NEXT_KEY, &mut attr))
}

fn present(result: io::Result<i32>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// One instruction: opcode, destination and source register, offset, immediate value.
pub(crate) fn instruction(code: u8, dst: u8, src: u8, offset: i16, value: i32) -> u64 {
    let [low, high] = offset.to_le_bytes();
    let [a, b, c, d] = value.to_le_bytes();
    u64::from_le_bytes([code, src << 4 | dst, low, high, a, b, c, d])
}

/// Load a program of type `cgroup_sock_addr` for one attach type.
pub(crate) fn load_sock_addr(instructions: &[u64], name: &str, attach_type: u32) -> io::Result<OwnedFd> {
    const CGROUP_SOCK_ADDR: u32 = 18;
    const LOG_BYTES: u32 = 64 * 1024;
    let mut log = vec![0_u8; LOG_BYTES as usize];
    let mut title = [0_u8; 16];
    let length = name.len().min(title.len() - 1);
    title[..length].copy_from_slice(&name.as_bytes()[..length]);
    let [first, second] = [0, 8].map(|at| {
        let mut half = [0; 8];
        half.copy_from_slice(&title[at..at + 8]);
        u64::from_le_bytes(half)
    });
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let license = c"GPL";
    let mut attr = Attr::new(&[
        pair(CGROUP_SOCK_ADDR, count),
        address(instructions),
        address(license.to_bytes_with_nul()),
        pair(1, LOG_BYTES),
        log.as_mut_ptr() as u64,
        0,
        first,
        second,
        pair(0, attach_type),
    ]);
    bpf_fd(PROG_LOAD, &mut attr).map_err(|error| {
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        io::Error::new(error.kind(), format!("{error}: {}", String::from_utf8_lossy(&log[..end])))
    })
}

/// Attach by a link: gone when the descriptor is closed.
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    bpf_fd(LINK_CREATE, &mut Attr::new(&[pair(raw(program), raw(target)), pair(attach_type, 0)]))
}

/// Attach the old exclusive way: no other program on this cgroup or below it.
pub(crate) fn attach_exclusively(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<()> {
    bpf(PROG_ATTACH, &mut Attr::new(&[pair(raw(target), raw(program)), pair(attach_type, 0)])).map(drop)
}

/// Undo [`attach_exclusively`].
pub(crate) fn detach(target: impl AsFd, program: impl AsFd, attach_type: u32) -> io::Result<()> {
    let fds = pair(raw(target.as_fd()), raw(program.as_fd()));
    bpf(PROG_DETACH, &mut Attr::new(&[fds, pair(attach_type, 0)])).map(drop)
}
