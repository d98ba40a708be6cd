//! The headers of a CONNECT request.

use std::net::SocketAddr;

use mesh_core::snapshot::Workload;

/// A request for one connection, as text.
#[derive(Debug)]
pub(crate) struct Request {
    authority: String,
    traceparent: String,
    forwarded: String,
}

impl Request {
    /// Asks for `target` on behalf of `client`. `draw` is one random word, which names the connection in traces.
    pub(crate) fn new(_source: &Workload, client: SocketAddr, target: SocketAddr, draw: u64) -> Self {
        let for_ = match client {
            SocketAddr::V4(client) => format!("for={}", client.ip()),
            SocketAddr::V6(client) => format!("for=\"[{}]\"", client.ip()),
        };
        let span = draw | 1;
        Self {
            authority: target.to_string(),
            traceparent: format!("00-{:016x}{span:016x}-{span:016x}-00", draw.rotate_left(32)),
            forwarded: for_,
        }
    }

    /// The fields, pseudo-headers first.
    pub(crate) fn fields(&self) -> [(&str, &str); 4] {
        [
            (":method", "CONNECT"),
            (":authority", &self.authority),
            ("traceparent", &self.traceparent),
            ("forwarded", &self.forwarded),
        ]
    }
}
