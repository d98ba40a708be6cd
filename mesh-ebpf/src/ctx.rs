//! Typed access to program contexts.
//!
//! Invariant: every load and store is one instruction at a constant offset from the context pointer, which
//! is all the verifier accepts. LLVM fuses neighbouring accesses, and merges the IPv4 and IPv6 branches into a
//! computed pointer, even when they are volatile; inline assembly is the cure (seen on LLVM 22).

use core::{arch::asm, ffi::c_void, mem::offset_of};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops},
    programs::{SkLookupContext, SockAddrContext, SockOpsContext},
};
use mesh_common::Addr;

macro_rules! load {
    ($ctx:expr, $width:literal, $offset:expr) => {{
        let value: u64;
        // SAFETY: a load at a constant offset inside the context; the verifier checks it again.
        unsafe {
            asm!(
                concat!("{value} = *(", $width, " *)({ctx} + {offset})"),
                value = lateout(reg) value,
                ctx = in(reg) $ctx,
                offset = const $offset,
                options(nostack),
            );
        }
        value
    }};
}

macro_rules! store {
    ($ctx:expr, $offset:expr, $value:expr) => {{
        let value: u64 = $value as u64;
        // SAFETY: a store at a constant offset inside the context; the verifier checks it again.
        unsafe {
            asm!(
                "*(u32 *)({ctx} + {offset}) = {value}",
                value = in(reg) value,
                ctx = in(reg) $ctx,
                offset = const $offset,
                options(nostack),
            );
        }
    }};
}

/// Context of the cgroup socket-address hooks.
#[derive(Clone, Copy)]
pub struct SockAddr(*mut bpf_sock_addr);

impl SockAddr {
    #[inline(always)]
    pub fn new(ctx: &SockAddrContext) -> Self {
        Self(ctx.sock_addr)
    }

    /// Destination (connect, sendmsg), source (recvmsg) or peer (getpeername).
    #[inline(always)]
    pub fn addr<const V6: bool>(&self) -> Addr {
        if V6 {
            Addr::v6([
                load!(self.0, "u32", offset_of!(bpf_sock_addr, user_ip6)) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_addr, user_ip6) + 4) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_addr, user_ip6) + 8) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_addr, user_ip6) + 12) as u32,
            ])
        } else {
            Addr::v4(load!(self.0, "u32", offset_of!(bpf_sock_addr, user_ip4)) as u32)
        }
    }

    /// Port of [`Self::addr`], host order.
    #[inline(always)]
    pub fn port(&self) -> u16 {
        u16::from_be(load!(self.0, "u32", offset_of!(bpf_sock_addr, user_port)) as u16)
    }

    /// Rewrites address and port. Refuses (false) an IPv6 address in an IPv4 hook.
    #[inline(always)]
    pub fn rewrite<const V6: bool>(&self, addr: &Addr, port: u16) -> bool {
        if V6 {
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6), addr.words[0]);
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 4, addr.words[1]);
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 8, addr.words[2]);
            store!(self.0, offset_of!(bpf_sock_addr, user_ip6) + 12, addr.words[3]);
        } else {
            if !addr.is_v4() {
                return false;
            }
            store!(self.0, offset_of!(bpf_sock_addr, user_ip4), addr.words[3]);
        }
        store!(self.0, offset_of!(bpf_sock_addr, user_port), port.to_be());
        true
    }

    /// IP protocol of the socket.
    #[inline(always)]
    pub fn protocol(&self) -> u16 {
        load!(self.0, "u32", offset_of!(bpf_sock_addr, protocol)) as u16
    }

    /// The socket.
    #[inline(always)]
    pub fn sk(&self) -> *mut bpf_sock {
        load!(self.0, "u64", offset_of!(bpf_sock_addr, __bindgen_anon_1)) as *mut bpf_sock
    }

    /// For helpers that take the context.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut c_void {
        self.0.cast()
    }
}

/// The local port of a socket, host order; 0 while unbound.
#[inline(always)]
pub fn local_port(sk: *mut bpf_sock) -> u16 {
    load!(sk, "u32", offset_of!(bpf_sock, src_port)) as u16
}

/// The TCP state of a socket returned by a lookup helper.
#[inline(always)]
pub fn tcp_state(sk: *mut bpf_sock) -> u32 {
    load!(sk, "u32", offset_of!(bpf_sock, state)) as u32
}

/// Context of sock_ops.
#[derive(Clone, Copy)]
pub struct SockOps(*mut bpf_sock_ops);

impl SockOps {
    #[inline(always)]
    pub fn new(ctx: &SockOpsContext) -> Self {
        Self(ctx.ops)
    }

    #[inline(always)]
    pub fn op(&self) -> u32 {
        load!(self.0, "u32", offset_of!(bpf_sock_ops, op)) as u32
    }

    /// Second argument of the operation; the new state in a state change.
    #[inline(always)]
    pub fn arg1(&self) -> u32 {
        load!(self.0, "u32", offset_of!(bpf_sock_ops, __bindgen_anon_1) + 4) as u32
    }

    #[inline(always)]
    pub fn cb_flags(&self) -> u32 {
        load!(self.0, "u32", offset_of!(bpf_sock_ops, bpf_sock_ops_cb_flags)) as u32
    }

    #[inline(always)]
    fn is_v6(&self) -> bool {
        load!(self.0, "u32", offset_of!(bpf_sock_ops, family)) as u32 == AF_INET6
    }

    /// Local address. Mapped form also for a mapped AF_INET6 socket.
    #[inline(always)]
    pub fn local(&self) -> Addr {
        if self.is_v6() {
            Addr::v6([
                load!(self.0, "u32", offset_of!(bpf_sock_ops, local_ip6)) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_ops, local_ip6) + 4) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_ops, local_ip6) + 8) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_ops, local_ip6) + 12) as u32,
            ])
        } else {
            Addr::v4(load!(self.0, "u32", offset_of!(bpf_sock_ops, local_ip4)) as u32)
        }
    }

    /// Remote address. Mapped form also for a mapped AF_INET6 socket.
    #[inline(always)]
    pub fn remote(&self) -> Addr {
        if self.is_v6() {
            Addr::v6([
                load!(self.0, "u32", offset_of!(bpf_sock_ops, remote_ip6)) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_ops, remote_ip6) + 4) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_ops, remote_ip6) + 8) as u32,
                load!(self.0, "u32", offset_of!(bpf_sock_ops, remote_ip6) + 12) as u32,
            ])
        } else {
            Addr::v4(load!(self.0, "u32", offset_of!(bpf_sock_ops, remote_ip4)) as u32)
        }
    }

    /// Local port, host order.
    #[inline(always)]
    pub fn local_port(&self) -> u16 {
        load!(self.0, "u32", offset_of!(bpf_sock_ops, local_port)) as u16
    }

    /// Remote port, host order. The kernel keeps it in network order in the upper half.
    #[inline(always)]
    pub fn remote_port(&self) -> u16 {
        u32::from_be(load!(self.0, "u32", offset_of!(bpf_sock_ops, remote_port)) as u32) as u16
    }

    /// Smoothed RTT in microseconds; the kernel keeps eight times that.
    #[inline(always)]
    pub fn srtt_us(&self) -> u32 {
        load!(self.0, "u32", offset_of!(bpf_sock_ops, srtt_us)) as u32 >> 3
    }

    #[inline(always)]
    pub fn total_retrans(&self) -> u32 {
        load!(self.0, "u32", offset_of!(bpf_sock_ops, total_retrans)) as u32
    }

    #[inline(always)]
    pub fn bytes_received(&self) -> u64 {
        load!(self.0, "u64", offset_of!(bpf_sock_ops, bytes_received))
    }

    #[inline(always)]
    pub fn bytes_acked(&self) -> u64 {
        load!(self.0, "u64", offset_of!(bpf_sock_ops, bytes_acked))
    }

    /// The socket; null when the operation has no full socket.
    #[inline(always)]
    pub fn sk(&self) -> *mut bpf_sock {
        load!(self.0, "u64", offset_of!(bpf_sock_ops, __bindgen_anon_2)) as *mut bpf_sock
    }

    /// For helpers that take the context.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut bpf_sock_ops {
        self.0
    }
}

const AF_INET6: u32 = 10;

/// Context of sk_lookup.
#[derive(Clone, Copy)]
pub struct SkLookup(*mut bpf_sk_lookup);

impl SkLookup {
    #[inline(always)]
    pub fn new(ctx: &SkLookupContext) -> Self {
        Self(ctx.as_ptr().cast())
    }

    #[inline(always)]
    fn is_v6(&self) -> bool {
        load!(self.0, "u32", offset_of!(bpf_sk_lookup, family)) as u32 == AF_INET6
    }

    #[inline(always)]
    pub fn protocol(&self) -> u16 {
        load!(self.0, "u32", offset_of!(bpf_sk_lookup, protocol)) as u16
    }

    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        load!(self.0, "u32", offset_of!(bpf_sk_lookup, ingress_ifindex)) as u32
    }

    #[inline(always)]
    pub fn remote(&self) -> Addr {
        if self.is_v6() {
            Addr::v6([
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, remote_ip6)) as u32,
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, remote_ip6) + 4) as u32,
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, remote_ip6) + 8) as u32,
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, remote_ip6) + 12) as u32,
            ])
        } else {
            Addr::v4(load!(self.0, "u32", offset_of!(bpf_sk_lookup, remote_ip4)) as u32)
        }
    }

    #[inline(always)]
    pub fn local(&self) -> Addr {
        if self.is_v6() {
            Addr::v6([
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, local_ip6)) as u32,
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, local_ip6) + 4) as u32,
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, local_ip6) + 8) as u32,
                load!(self.0, "u32", offset_of!(bpf_sk_lookup, local_ip6) + 12) as u32,
            ])
        } else {
            Addr::v4(load!(self.0, "u32", offset_of!(bpf_sk_lookup, local_ip4)) as u32)
        }
    }

    /// Remote port, host order.
    #[inline(always)]
    pub fn remote_port(&self) -> u16 {
        u16::from_be(load!(self.0, "u16", offset_of!(bpf_sk_lookup, remote_port)) as u16)
    }

    /// Local port, host order.
    #[inline(always)]
    pub fn local_port(&self) -> u16 {
        load!(self.0, "u32", offset_of!(bpf_sk_lookup, local_port)) as u16
    }

    /// For helpers that take the context.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut c_void {
        self.0.cast()
    }
}
