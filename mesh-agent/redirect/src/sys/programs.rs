//! Raw calls that make a program and its read-only data.

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd as _, OwnedFd},
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd, bpf_insn, bpf_map_type, bpf_prog_type};
use nix::libc;

use super::{ANY, address, bpf, bpf_fd, map_update_bytes, raw, zeroed_attr};

/// Room for a verifier log; the interesting lines are the last ones, and the kernel keeps those.
const VERIFIER_LOG_BYTES: usize = 256 * 1024;

/// Makes a frozen one-entry array that programs can only read: the home of read-only globals.
pub(crate) fn create_read_only_data(data: &[u8]) -> io::Result<OwnedFd> {
    const F_RDONLY_PROG: u32 = 1 << 7;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_1.map_type = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    attr.__bindgen_anon_1.key_size = 4;
    attr.__bindgen_anon_1.value_size = data.len() as u32;
    attr.__bindgen_anon_1.max_entries = 1;
    attr.__bindgen_anon_1.map_flags = F_RDONLY_PROG;
    let map = bpf_fd(bpf_cmd::BPF_MAP_CREATE, &mut attr)?;
    let fd = map.as_fd();
    // The kernel reads `value_size` bytes, which is the length of `data`.
    map_update_bytes(fd, address(&0_u32), address(data), ANY)?;
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_2.map_fd = raw(fd);
    bpf(bpf_cmd::BPF_MAP_FREEZE, &mut attr)?;
    Ok(map)
}

/// A program the kernel refused, with what the verifier said.
#[derive(Debug, thiserror::Error)]
#[error("the kernel refused the program; the verifier said: {log}")]
pub struct Refused {
    /// End of the verifier's log; empty when the program never got that far.
    pub log: String,
    /// The error of the system call.
    pub source: io::Error,
}

/// Loads an sk_lookup program. The log is only made after a refusal: it costs more than the check itself.
pub(crate) fn load_sk_lookup(
    name: &str,
    instructions: &[bpf_insn],
    license: &CString,
) -> Result<OwnedFd, Refused> {
    let mut attr = zeroed_attr();
    attr.__bindgen_anon_3.prog_type = bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP as u32;
    attr.__bindgen_anon_3.expected_attach_type = bpf_attach_type::BPF_SK_LOOKUP as u32;
    attr.__bindgen_anon_3.insns = address(instructions);
    attr.__bindgen_anon_3.insn_cnt = instructions.len() as u32;
    attr.__bindgen_anon_3.license = license.as_ptr() as u64;
    let mut kernel_name = [0; 16];
    for (to, from) in kernel_name.iter_mut().take(15).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    attr.__bindgen_anon_3.prog_name = kernel_name;
    let source = match bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => return Ok(fd),
        Err(source) => source,
    };
    let mut log = vec![0_u8; VERIFIER_LOG_BYTES];
    attr.__bindgen_anon_3.log_level = 1;
    attr.__bindgen_anon_3.log_size = log.len() as u32;
    attr.__bindgen_anon_3.log_buf = log.as_mut_ptr() as u64;
    match bpf_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr) {
        Ok(fd) => Ok(fd),
        Err(_) => {
            let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
            let tail = &log[end.saturating_sub(4096)..end];
            Err(Refused { log: String::from_utf8_lossy(tail).into_owned(), source })
        }
    }
}
