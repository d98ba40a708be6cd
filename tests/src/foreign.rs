//! Programs of somebody else on the cgroup hooks that an agent uses.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use crate::bpf::{self, instruction};
use crate::cgroup::Cgroup;
use crate::saying::say;

/// `BPF_CGROUP_INET4_CONNECT`.
const INET4_CONNECT: u32 = 10;

/// Where `struct bpf_sock_addr` holds the destination port.
const USER_PORT: i16 = 24;

const LOAD_WORD: u8 = 0x61;
const STORE_WORD: u8 = 0x63;
const MOVE: u8 = 0xb7;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;

/// A `cgroup/connect4` program that is not ours.
#[derive(Debug)]
pub struct ForeignProgram {
    program: OwnedFd,
}

/// A foreign program on a cgroup; off again when dropped.
#[derive(Debug)]
pub struct ForeignAttachment {
    _link: Option<OwnedFd>,
    exclusive: Option<(File, ForeignProgram)>,
}

impl ForeignProgram {
    /// Lets every connect pass.
    ///
    /// # Errors
    /// When the kernel refuses to load it.
    pub fn passing(name: &str) -> io::Result<Self> {
        Self::load(name, &[instruction(MOVE, 0, 0, 0, 1), instruction(EXIT, 0, 0, 0, 0)])
    }

    /// Sends connects for port `from` to port `to` of the same address.
    ///
    /// # Errors
    /// When the kernel refuses to load it.
    pub fn moving_port(name: &str, from: u16, to: u16) -> io::Result<Self> {
        Self::load(
            name,
            &[
                instruction(LOAD_WORD, 2, 1, USER_PORT, 0),
                instruction(JUMP_UNLESS_EQUAL, 2, 0, 2, i32::from(from.to_be())),
                instruction(MOVE, 2, 0, 0, i32::from(to.to_be())),
                instruction(STORE_WORD, 1, 2, USER_PORT, 0),
                instruction(MOVE, 0, 0, 0, 1),
                instruction(EXIT, 0, 0, 0, 0),
            ],
        )
    }

    /// Refuses connects to `port` with `EPERM`.
    ///
    /// # Errors
    /// When the kernel refuses to load it.
    pub fn refusing_port(name: &str, port: u16) -> io::Result<Self> {
        Self::load(
            name,
            &[
                instruction(LOAD_WORD, 2, 1, USER_PORT, 0),
                instruction(MOVE, 0, 0, 0, 0),
                instruction(JUMP_IF_EQUAL, 2, 0, 1, i32::from(port.to_be())),
                instruction(MOVE, 0, 0, 0, 1),
                instruction(EXIT, 0, 0, 0, 0),
            ],
        )
    }

    fn load(name: &str, instructions: &[u64]) -> io::Result<Self> {
        Ok(Self { program: bpf::load_sock_addr(instructions, name, INET4_CONNECT)? })
    }

    /// Attach it by a link, beside whatever is there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(self, cgroup: &Cgroup) -> io::Result<ForeignAttachment> {
        let target = File::open(cgroup.path())?;
        let link = bpf::link_create(self.program.as_fd(), target.as_fd(), INET4_CONNECT)?;
        Ok(ForeignAttachment { _link: Some(link), exclusive: None })
    }

    /// Attach it the old exclusive way, which keeps every other program off this cgroup and those below.
    ///
    /// # Errors
    /// When the kernel refuses, such as when another program is there.
    pub fn attach_exclusively(self, cgroup: &Cgroup) -> io::Result<ForeignAttachment> {
        let target = File::open(cgroup.path())?;
        bpf::attach_exclusively(self.program.as_fd(), target.as_fd(), INET4_CONNECT)?;
        Ok(ForeignAttachment { _link: None, exclusive: Some((target, self)) })
    }
}

impl Drop for ForeignAttachment {
    fn drop(&mut self) {
        if let Some((target, foreign)) = self.exclusive.take()
            && let Err(error) = bpf::detach(&target, &foreign.program, INET4_CONNECT)
        {
            say(&format!("cannot detach a foreign program: {error}"));
        }
    }
}
