//! The eBPF programs of Nodemesh: one file per hook, entry points here.
//!
//! Invariants:
//! - An entry point only calls its hook's `run`; what a hook decides is in `mesh_common::decide`.
//! - Context fields are read and written by the inline-assembly accessors of `ctx.rs` alone.
//! - Every outcome of a meshed pod's connection bumps exactly one counter.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod account;
mod arrival;
mod connect;
mod count;
mod ctx;
mod datagram;
mod maps;
mod peername;
mod tables;
mod tcp_events;

use aya_ebpf::{
    macros::{cgroup_sock_addr, sk_lookup, sock_ops},
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};

/// TCP and UDP connects over IPv4.
#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect::run::<false>(&ctx)
}

/// TCP and UDP connects over IPv6 and of dual-stack sockets.
#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    connect::run::<true>(&ctx)
}

/// Datagrams of unconnected IPv4 sockets.
#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg::<false>(&ctx)
}

/// Datagrams of unconnected IPv6 and dual-stack sockets.
#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    datagram::sendmsg::<true>(&ctx)
}

/// Source addresses of datagrams received over IPv4.
#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg::<false>(&ctx)
}

/// Source addresses of datagrams received by IPv6 and dual-stack sockets.
#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    datagram::recvmsg::<true>(&ctx)
}

/// `getpeername` and `accept` over IPv4.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    peername::run::<false>(&ctx)
}

/// `getpeername` and `accept` of IPv6 and dual-stack sockets.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    peername::run::<true>(&ctx)
}

/// The life of TCP connections: tickets and original destinations, latency, edges, events.
#[sock_ops]
pub fn tcp_events(ctx: SockOpsContext) -> u32 {
    tcp_events::run(&ctx)
}

/// Arrivals at one pod; one instance per pod, attached to its namespace.
#[sk_lookup]
pub fn arrival(ctx: SkLookupContext) -> u32 {
    arrival::run(&ctx)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No path panics: the verifier would reject a program in which this loop is reachable.
    loop {}
}

/// The helpers used need a GPL-compatible licence; the crate is MIT or GPL-2.0.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
