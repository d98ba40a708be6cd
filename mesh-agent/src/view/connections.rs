//! Owns the shape of `meshctl connections`.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Live connections of this node's pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsView {
    /// The connections, oldest first.
    pub connections: Vec<ConnectionView>,
    /// How many more there are than the answer holds.
    pub left_off: u64,
}

/// How a connection travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// From socket to socket; the agent never sees a byte.
    Direct,
    /// Through the agent.
    Proxy,
}

impl Path {
    /// The word used in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Proxy => "proxy",
        }
    }
}

/// What protects a connection's bytes, and what proves its peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Security {
    /// TLS with certificates of both sides.
    MutualTls,
    /// Both pods are on this node: nothing is on a wire, and the kernel says which pods they are.
    Kernel,
    /// Nothing.
    None,
}

impl Security {
    /// The word used in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Kernel => "kernel",
            Self::None => "none",
        }
    }
}

/// One live connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConnectionView {
    /// How it travels.
    pub path: Path,
    /// `outbound` for a connection opened by a local pod, `inbound` for one captured on arrival.
    pub direction: String,
    /// `namespace/name` of the client pod, if it is known.
    pub source: Option<String>,
    /// Client address.
    pub source_addr: SocketAddr,
    /// `namespace/name` of the server pod, if it is known.
    pub destination: Option<String>,
    /// Server address; absent while the agent has not connected to one.
    pub destination_addr: Option<SocketAddr>,
    /// What the app dialled.
    pub dialled: Option<SocketAddr>,
    /// `namespace/name` of the service that was dialled.
    pub service: Option<String>,
    /// What protects it.
    pub security: Security,
    /// SPIFFE identity of the other side as far as it is proved: of an inbound connection the client's, of an outbound
    /// one the server's.
    pub peer: Option<String>,
    /// Seconds since it was opened.
    pub age_s: f64,
    /// Bytes from client to server so far; of a Direct connection, those the server has acknowledged.
    pub bytes_tx: Option<u64>,
    /// Bytes from server to client so far.
    pub bytes_rx: Option<u64>,
}
