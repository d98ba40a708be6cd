//! The parts of requests and replies: sockets, servers, DNS, captures, loads.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::SocketId;

/// The transport of a client socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// `SOCK_STREAM`.
    Tcp,
    /// `SOCK_DGRAM`.
    Udp,
}

/// The address family of a client socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`, which also dials IPv4-mapped addresses.
    V6,
}

/// How to make a client socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// TCP or UDP.
    pub transport: Transport,
    /// Address family.
    pub family: Family,
    /// Bind before connect.
    pub bind: Option<SocketAddr>,
    /// `IP_BIND_ADDRESS_NO_PORT`: the port is chosen at connect.
    pub bind_no_port: bool,
    /// `SO_REUSEADDR` before bind.
    pub reuse_address: bool,
    /// `SO_BINDTODEVICE`.
    pub device: Option<String>,
    /// `SO_MARK`.
    pub mark: Option<u32>,
}

impl Open {
    /// A plain TCP socket that can dial `to`.
    #[must_use]
    pub fn tcp_to(to: SocketAddr) -> Self {
        Self::new(Transport::Tcp, to)
    }

    /// A plain UDP socket that can dial `to`.
    #[must_use]
    pub fn udp_to(to: SocketAddr) -> Self {
        Self::new(Transport::Udp, to)
    }

    fn new(transport: Transport, to: SocketAddr) -> Self {
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        Self {
            transport,
            family,
            bind: None,
            bind_no_port: false,
            reuse_address: false,
            device: None,
            mark: None,
        }
    }

    /// Bind to `address` first (port 0: the kernel's choice).
    #[must_use]
    pub fn bound_to(mut self, address: SocketAddr) -> Self {
        self.bind = Some(address);
        self
    }

    /// Bind late: `IP_BIND_ADDRESS_NO_PORT`.
    #[must_use]
    pub fn with_late_port(mut self) -> Self {
        self.bind_no_port = true;
        self
    }

    /// `SO_REUSEADDR`, so that one port may serve several connections.
    #[must_use]
    pub fn sharing_its_address(mut self) -> Self {
        self.reuse_address = true;
        self
    }

    /// `SO_BINDTODEVICE`.
    #[must_use]
    pub fn on_device(mut self, device: &str) -> Self {
        self.device = Some(device.to_owned());
        self
    }

    /// `SO_MARK`.
    #[must_use]
    pub fn marked(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }
}

/// How to connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// A blocking `connect`.
    Blocking,
    /// A non-blocking `connect`, then poll for writability and `SO_ERROR`.
    NonBlocking,
    /// `IORING_OP_CONNECT`.
    IoUring,
    /// No `connect`: `sendto` with `MSG_FASTOPEN` and this first text.
    FastOpenMessage(String),
    /// `TCP_FASTOPEN_CONNECT`, `connect`, then send this first text.
    FastOpenConnect(String),
}

/// Connect a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// Which.
    pub socket: SocketId,
    /// Where to.
    pub to: SocketAddr,
    /// By which calls.
    pub how: How,
    /// Give up (`ETIMEDOUT`) after this time.
    pub timeout_ms: u64,
}

/// Both ends of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    /// `getsockname`.
    pub local: Option<SocketAddr>,
    /// `getpeername`; `None` when not connected.
    pub peer: Option<SocketAddr>,
}

/// What a server does with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Serve {
    /// Answer every line with one line: an [`Identity`] to `who`, else the line itself.
    Lines,
    /// Speak first: one [`Identity`] line, then as `Lines`.
    Greet,
    /// Speak first: one [`Identity`] line, then close.
    GreetAndClose,
    /// Echo bytes.
    Echo,
    /// Read to the end, then send the number of bytes read as one line and close.
    Sink,
    /// Send this many bytes of the stream with seed 1, then close.
    Source {
        /// Bytes.
        bytes: u64,
    },
    /// Accept and never read.
    Stall,
    /// Accept and reset.
    Reset,
    /// HTTP/1.1 with keep-alive: every GET gets 200 and an [`Identity`] as JSON.
    Http,
}

/// A TCP server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenTcp {
    /// Where; `[::]:p` is dual stack unless `only_v6`.
    pub on: SocketAddr,
    /// `IPV6_V6ONLY`.
    pub only_v6: bool,
    /// The length of its accept queue.
    pub backlog: i32,
    /// Accept TCP Fast Open.
    pub fast_open: bool,
    /// The server's name in its answers.
    pub name: String,
    /// What it does.
    pub serve: Serve,
}

/// How a server sees a connection or a datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The server's name.
    pub server: String,
    /// The address `accept` (or `recvfrom`) gave.
    pub accepted_from: SocketAddr,
    /// `getpeername` of the accepted socket; `None` for UDP.
    pub peer: Option<SocketAddr>,
    /// `getsockname` of the socket.
    pub local: SocketAddr,
}

/// A DNS query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsQuery {
    /// The name server.
    pub server: SocketAddr,
    /// The full name; no search domains are tried.
    pub name: String,
    /// `A`, `AAAA`, `SRV`, …
    pub kind: String,
    /// How to reach the server.
    pub by: DnsBy,
    /// Give up after this time.
    pub timeout_ms: u64,
}

/// How to reach a name server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DnsBy {
    /// `connect` and `send`, as glibc does.
    ConnectedUdp,
    /// `sendto` and `recvfrom`, as musl does; an answer from another address is a failure.
    UnconnectedUdp,
    /// A TCP connection.
    Tcp,
}

/// A DNS answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsAnswer {
    /// The response code's text, such as `No Error` or `Non-Existent Domain`.
    pub code: String,
    /// The TC bit.
    pub truncated: bool,
    /// `TYPE data` of each answer record, such as `A 10.96.0.1`.
    pub answers: Vec<String>,
    /// Addresses among the answers.
    pub addresses: Vec<IpAddr>,
}

/// An HTTP answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// A captured TCP packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// Source address and port.
    pub from: SocketAddr,
    /// Destination address and port.
    pub to: SocketAddr,
    /// The TCP flags byte (FIN 1, SYN 2, RST 4, PSH 8, ACK 16).
    pub flags: u8,
    /// Payload bytes.
    pub payload: usize,
    /// It left the pod (else it arrived).
    pub outgoing: bool,
}

/// A steady load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Taken in turn; each server must run [`Serve::Lines`] (or `Greet` is not allowed).
    pub targets: Vec<SocketAddr>,
    /// Attempts per second over all workers; 0: as fast as the workers can.
    pub per_second: u32,
    /// Threads; with [`Exchange::KeepOpen`] also the number of connections.
    pub workers: u32,
    /// End by itself after this time; 0: only by `StopLoad`.
    pub duration_ms: u64,
    /// What one attempt is.
    pub exchange: Exchange,
    /// One attempt fails after this time.
    pub timeout_ms: u64,
}

/// What one attempt of a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exchange {
    /// Connect, one question and answer, close (the client first).
    ConnectAndAsk,
    /// Connect and close.
    ConnectOnly,
    /// One question and answer on a connection that each worker keeps; a failure reconnects.
    KeepOpen,
}

/// What a load has done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReport {
    /// Attempts that ended well.
    pub ok: u64,
    /// Attempts that did not, by `call: error`, such as `connect: ECONNREFUSED`.
    pub failed: BTreeMap<String, u64>,
    /// Good answers by the server's name.
    pub answered_by: BTreeMap<String, u64>,
    /// Connections opened.
    pub connects: u64,
    /// Median latency of good attempts, µs.
    pub p50_us: u64,
    /// 99th percentile, µs.
    pub p99_us: u64,
    /// Longest, µs.
    pub max_us: u64,
    /// The longest time without any good attempt, ms.
    pub longest_gap_ms: u64,
    /// How long it has run, ms.
    pub elapsed_ms: u64,
}

impl LoadReport {
    /// How many attempts failed.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failed.values().sum()
    }
}

/// The byte at `offset` of the stream of `seed`: cheap, and a shifted or swapped block shows.
#[must_use]
pub fn pattern(seed: u8, offset: u64) -> u8 {
    let mixed = offset.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56;
    (mixed as u8) ^ seed ^ (offset as u8)
}

/// Fill `buffer` with the stream of `seed` from `offset` on.
pub fn fill_pattern(buffer: &mut [u8], seed: u8, offset: u64) {
    for (index, byte) in buffer.iter_mut().enumerate() {
        *byte = pattern(seed, offset + index as u64);
    }
}
