//! The data path: carries the connections and DNS queries of enrolled pods.
//!
//! The kernel's programs send an app's connect to a listener in its own pod ([`kernel::PodListeners`]); a worker
//! accepts it, asks the kernel what was dialled, chooses an endpoint, dials it from the same pod and relays bytes.
//!
//! Invariants:
//! - Knows nothing of BPF: the kernel is behind the two traits of [`kernel`].
//! - One event loop per worker thread; no lock is taken and no other thread is woken per byte.
//! - Every accepted connection ends with exactly one [`CloseReason`].
//! - A destination's policy is enforced in `server::server_stage` and nowhere else.
//! - Everything is bounded: connections, buffers, pipes, DNS queries in flight, metric series, log lines.
#![deny(missing_docs)]

mod buffers;
mod close;
mod connect;
mod connections;
mod destination;
mod dns;
mod hbone;
mod hello;
mod http;
mod inbound;
pub mod kernel;
mod layers;
mod listener;
mod loads;
mod metrics;
mod outbound;
mod proxy;
mod random;
mod reactor;
mod relay;
mod server;
mod settings;
mod stream;
mod streams;
mod target;
mod worker;

pub use close::{CloseReason, Direction, Side};
pub use connections::ConnectionView;
pub use destination::standing::{DestinationUse, EndpointStanding, EndpointUse, Unfit};
pub use dns::lookup::{Lookup, servers_of};
pub use http::preview;
pub use listener::Queued;
pub use metrics::{DirectTraffic, Metrics, Security, TunnelledTraffic};
pub use proxy::{AddPodError, Dependencies, Drained, Proxy, StartError, UnusableTls};
pub use settings::{DnsSettings, HboneSettings, HttpSettings, Settings, TLS_FILES};

#[cfg(test)]
mod tests;

/// Bodies of fuzz targets; each runs as a property test too.
#[cfg(fuzzing)]
pub mod fuzz {
    /// Frames of HTTP/2, as a tunnel's peer sends them. Panics if the layer breaks its promises.
    pub fn h2_frames(input: &[u8]) {
        crate::hbone::fuzz(input);
    }
}
