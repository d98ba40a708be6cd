//! What the harness and `pod-tool` say to each other: one JSON document a line, requests by id.

mod parts;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

pub use parts::*;

/// Names a socket, server or load of one `pod-tool` process.
pub type SocketId = u64;

/// One request, answered by the [`Answer`] of the same id; requests of one tool run concurrently.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the caller.
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// The end of one [`Call`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// That of the call.
    pub id: u64,
    /// How it ended.
    pub outcome: Result<Reply, CallFailure>,
}

/// A system call in the tool failed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CallFailure {
    /// The error number, when the kernel gave one.
    pub errno: Option<i32>,
    /// What the tool was doing, such as `connect`.
    pub doing: String,
    /// The error's text.
    pub text: String,
}

/// What a tool can be asked to do with sockets of its pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Make a client socket. Answer: [`Reply::Opened`].
    Open(Open),
    /// Connect a socket, once more if it was connected or refused before. Answer: [`Reply::Names`].
    Dial(Dial),
    /// `getsockname` and `getpeername`. Answer: [`Reply::Names`].
    Names {
        /// A client socket.
        socket: SocketId,
    },
    /// Send all of a text. Answer: [`Reply::Done`].
    Send {
        /// A connected socket.
        socket: SocketId,
        /// What to send.
        text: String,
    },
    /// Receive once. Answer: [`Reply::Text`], empty at the end of the stream.
    Recv {
        /// A connected socket.
        socket: SocketId,
        /// At most so many bytes.
        max: usize,
        /// Give up after this time.
        timeout_ms: u64,
    },
    /// Receive up to and including a line feed. Answer: [`Reply::Text`].
    RecvLine {
        /// A connected socket.
        socket: SocketId,
        /// Give up after this time.
        timeout_ms: u64,
    },
    /// Send the deterministic byte stream of a seed. Answer: [`Reply::Count`].
    SendBulk {
        /// A connected socket.
        socket: SocketId,
        /// How many bytes.
        bytes: u64,
        /// Which stream, see [`pattern`].
        seed: u8,
    },
    /// Receive and compare with the stream of a seed. Answer: [`Reply::Count`]; a wrong byte is a failure.
    RecvBulk {
        /// A connected socket.
        socket: SocketId,
        /// How many bytes.
        bytes: u64,
        /// Which stream, see [`pattern`].
        seed: u8,
        /// Give up after this time without a byte.
        timeout_ms: u64,
    },
    /// Half-close: no more sends. Answer: [`Reply::Done`].
    ShutdownWrite {
        /// A connected socket.
        socket: SocketId,
    },
    /// Close with a reset. Answer: [`Reply::Done`].
    Reset {
        /// A connected socket.
        socket: SocketId,
    },
    /// Close a client socket, a server or a load. Answer: [`Reply::Done`].
    Close {
        /// What to close.
        socket: SocketId,
    },
    /// Send one datagram. Answer: [`Reply::Done`].
    SendTo {
        /// A UDP socket.
        socket: SocketId,
        /// `None`: the connected peer.
        to: Option<SocketAddr>,
        /// The payload.
        text: String,
    },
    /// Receive one datagram. Answer: [`Reply::Datagram`].
    RecvFrom {
        /// A UDP socket.
        socket: SocketId,
        /// Give up after this time.
        timeout_ms: u64,
    },
    /// Start a TCP server. Answer: [`Reply::Opened`].
    ListenTcp(ListenTcp),
    /// Start a UDP server that answers each datagram with an [`Identity`]. Answer: [`Reply::Opened`].
    ListenUdp {
        /// Where to listen.
        on: SocketAddr,
        /// The server's name in its answers.
        name: String,
    },
    /// Whom a server has accepted so far (its newest 10 000). Answer: [`Reply::Accepted`].
    Accepted {
        /// A server.
        socket: SocketId,
    },
    /// One DNS query. Answer: [`Reply::Dns`].
    Dns(DnsQuery),
    /// Resolve by the C library with the pod's own resolv.conf. Answer: [`Reply::Addresses`].
    GetAddrInfo {
        /// The host name.
        host: String,
    },
    /// One HTTP/1.1 GET on a connection of its own. Answer: [`Reply::Http`].
    HttpGet {
        /// Where to connect.
        to: SocketAddr,
        /// The Host header.
        host: String,
        /// The path.
        path: String,
        /// Give up after this time.
        timeout_ms: u64,
    },
    /// Send one TCP SYN with a source address of our choice by a raw socket. Answer: [`Reply::Done`].
    ForgeSyn {
        /// The address and port to claim.
        from: SocketAddr,
        /// Where to send it; of the same family.
        to: SocketAddr,
    },
    /// Count TCP packets that arrive at the pod's interfaces. Answer: [`Reply::Opened`].
    Capture,
    /// What a capture has seen (its newest 10 000). Answer: [`Reply::Packets`].
    Captured {
        /// A capture.
        socket: SocketId,
    },
    /// Start a load. Answer: [`Reply::Opened`].
    StartLoad(Load),
    /// What a load has done so far. Answer: [`Reply::Load`].
    LoadReport {
        /// A load.
        socket: SocketId,
    },
    /// End a load and tell what it has done. Answer: [`Reply::Load`].
    StopLoad {
        /// A load.
        socket: SocketId,
    },
}

/// A successful end of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Nothing to tell.
    Done,
    /// A socket, server, capture or load was made.
    Opened {
        /// Its name from now on.
        socket: SocketId,
        /// Its own address, once it has one.
        local: Option<SocketAddr>,
    },
    /// Both ends of a socket, as the kernel shows them to the application.
    Names(Names),
    /// Received text.
    Text {
        /// Bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// How many bytes were moved.
    Count {
        /// Bytes.
        bytes: u64,
    },
    /// A datagram.
    Datagram {
        /// Its payload.
        text: String,
        /// Its source, as `recvfrom` shows it.
        from: SocketAddr,
    },
    /// Whom a server accepted.
    Accepted {
        /// Oldest first.
        connections: Vec<Identity>,
    },
    /// A DNS answer.
    Dns(DnsAnswer),
    /// Addresses of a name.
    Addresses {
        /// In the order of the C library.
        addresses: Vec<IpAddr>,
    },
    /// An HTTP answer.
    Http(HttpAnswer),
    /// Captured TCP packets.
    Packets {
        /// Oldest first.
        packets: Vec<Packet>,
    },
    /// The state of a load.
    Load(LoadReport),
}
