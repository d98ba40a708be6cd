//! The headers of a CONNECT request.

use std::net::SocketAddr;

use mesh_core::snapshot::Workload;
use mesh_wire::{
    CLUSTER,
    hbone::{self, baggage::Baggage, forwarded::Forwarded, traceparent::Traceparent},
};

/// A request for one connection, as text.
#[derive(Debug)]
pub(crate) struct Request {
    authority: String,
    baggage: String,
    forwarded: String,
    traceparent: String,
}

impl Request {
    /// Asks for `target` on behalf of `client`, an address of `source`. `draw` is one random word, which names the
    /// connection in traces.
    pub(crate) fn new(source: &Workload, client: SocketAddr, target: SocketAddr, draw: u64) -> Self {
        let trace_id = u128::from(draw.rotate_left(32)) << 64 | u128::from(draw);
        Self {
            authority: target.to_string(),
            baggage: Baggage::of(source, CLUSTER).to_string(),
            forwarded: Forwarded::new(client, None).to_string(),
            traceparent: Traceparent::new(trace_id, draw, false).to_string(),
        }
    }

    /// The fields, pseudo-headers first.
    pub(crate) fn fields(&self) -> [(&str, &str); 5] {
        [
            (":method", "CONNECT"),
            (":authority", &self.authority),
            (hbone::BAGGAGE, &self.baggage),
            (hbone::FORWARDED, &self.forwarded),
            (hbone::TRACEPARENT, &self.traceparent),
        ]
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::Name;

    use super::*;

    #[test]
    fn a_request_says_what_ztunnel_says() {
        let cart = Workload::named(Name::new("shop", "cart-1"));
        let request =
            Request::new(&cart, "10.0.0.1:4000".parse().unwrap(), "[fd00::2]:80".parse().unwrap(), 7);
        assert_eq!(
            request.fields(),
            [
                (":method", "CONNECT"),
                (":authority", "[fd00::2]:80"),
                (
                    "baggage",
                    "k8s.cluster.name=Kubernetes,k8s.namespace.name=shop,k8s.pod.name=cart-1,\
                     service.name=cart-1,service.version=latest"
                ),
                ("forwarded", "for=\"10.0.0.1:4000\""),
                ("traceparent", "00-00000007000000000000000000000007-0000000000000007-00"),
            ]
        );
    }
}
