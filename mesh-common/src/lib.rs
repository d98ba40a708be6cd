//! The contract between the eBPF programs (`mesh-ebpf`) and the agent (`mesh-redirect`).
//!
//! Owns every key, value, map name, port and number that both sides must agree on, and the pure
//! decisions ([`decide`]) that the programs take and that `meshctl explain` repeats.
//!
//! Invariants:
//! - No shared struct has implicit padding; all are plain integers, so any bit pattern is valid.
//! - A change of any layout changes [`abi::VERSION`], hence the folder the maps are pinned under.
//!
//! Not here: map definitions (`mesh-ebpf`), loading and pinning (`mesh-redirect`).
#![no_std]
#![deny(missing_docs)]

#[macro_use]
mod layout;

pub mod abi;
pub mod addr;
pub mod decide;
pub mod event;
pub mod limits;
pub mod maps;
pub mod pod;
pub mod ports;
pub mod service;
pub mod sock;
pub mod stats;
pub mod ticket;
pub mod verdict;

pub use addr::Addr;
