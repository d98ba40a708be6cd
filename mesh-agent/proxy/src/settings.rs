//! Limits and time-outs of the data path, with where each number comes from.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

/// Where files of policies are unless something else is said.
pub const TLS_FILES: &str = "/etc/nodemesh/tls";

/// Settings of a [`crate::Proxy`]; fixed for its life.
#[derive(Clone, Debug)]
pub struct Settings {
    /// This node's name, to tell local endpoints from others.
    pub node: Arc<str>,
    /// Worker threads, each with an event loop of its own. Default: one per core.
    pub workers: NonZeroUsize,
    /// Time for an upstream connect. Default: Istio's `connectTimeout`, 10 s.
    pub connect_timeout: Duration,
    /// Time for one connect while another endpoint is left to try. Default 3 s: one lost SYN and its retry.
    pub attempt_timeout: Duration,
    /// Endpoints tried before a connection is given up. Default 3.
    pub attempts_max: u32,
    /// A connection without a byte in either direction for this long ends. Default: Istio's, 1 h.
    pub idle_timeout: Duration,
    /// Time for a client's first bytes at ports that are declared to be TLS, where rules go by the name it asks for; then it
    /// asks for none. Default 15 s.
    pub hello_timeout: Duration,
    /// After one side reset, how long bytes it had sent may wait for the other side to take them. Default 5 s.
    pub reset_linger: Duration,
    /// Proxied connections at once, each of which needs two descriptors. Default: from RLIMIT_NOFILE.
    pub connections_max: usize,
    /// Proxied connections of one pod at once. Default: half of `connections_max`.
    pub pod_connections_max: usize,
    /// Bytes a worker holds for receivers that do not take them, before it reads in small pieces only.
    /// Default 16 MiB: 64 stalled bulk flows.
    pub held_bytes_max: usize,
    /// Move bulk flows with `splice(2)` instead of copying.
    pub splice: bool,
    /// Folder that the files of DestinationRules' `tls` are in; others are not read. Default `/etc/nodemesh/tls`.
    pub tls_files: PathBuf,
    /// The DNS proxy.
    pub dns: DnsSettings,
    /// Tunnels between nodes.
    pub hbone: HboneSettings,
    /// Requests of clients.
    pub http: HttpSettings,
}

/// Settings for clients' HTTP.
#[derive(Clone, Debug)]
pub struct HttpSettings {
    /// Time for the first byte at ports without a declared protocol; then it is not HTTP. Default 1 s: servers that speak
    /// first are that much slower there.
    pub sniff_timeout: Duration,
    /// Time for a request's head from its first byte. Default 60 s, as nginx gives.
    pub head_timeout: Duration,
    /// How long bytes of a response may wait for the client to take them. Default 5 min, as Envoy gives.
    pub stall_timeout: Duration,
    /// Streams of one HTTP/2 connection at once. Default 256.
    pub streams_max: u32,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            sniff_timeout: Duration::from_secs(1),
            head_timeout: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(300),
            streams_max: 256,
        }
    }
}

/// Settings of tunnels between nodes.
#[derive(Clone, Debug)]
pub struct HboneSettings {
    /// Port on which pods of other nodes take tunnels. Default 15008, as everywhere.
    pub port: u16,
    /// Time for a TLS handshake, the wait for a certificate included. Default 10 s, as ztunnel gives.
    pub handshake_timeout: Duration,
    /// Inbound TLS handshakes at once, of all pods. Default 4096: each costs about 20 KiB while it lasts.
    pub handshakes_max: usize,
    /// The same for one pod. Default 1024.
    pub pod_handshakes_max: usize,
    /// Tunnels of one worker from one pod to another while the sockets of those there are keep streams waiting.
    /// Default 4.
    pub tunnels_max: usize,
    /// The same when those there are carry as many streams as they may. Default 64.
    pub full_tunnels_max: usize,
    /// Streams of one tunnel at once, announced to peers. Default 1024.
    pub streams_max: u32,
    /// Bytes in flight on one stream that its app has not read. Default 512 KiB.
    pub stream_window: u32,
    /// The same over all streams of a tunnel. Default 16 MiB.
    pub tunnel_window: u32,
    /// A tunnel that carries no stream for this long is closed by the client. Default 5 min, as ztunnel does.
    pub idle_timeout: Duration,
    /// The same by the server, in case the client is gone. Default 15 min.
    pub server_idle_timeout: Duration,
}

impl Default for HboneSettings {
    fn default() -> Self {
        Self {
            port: 15008,
            handshake_timeout: Duration::from_secs(10),
            handshakes_max: 4096,
            pod_handshakes_max: 1024,
            tunnels_max: 4,
            full_tunnels_max: 64,
            streams_max: 1024,
            stream_window: 512 << 10,
            tunnel_window: 16 << 20,
            idle_timeout: Duration::from_secs(300),
            server_idle_timeout: Duration::from_secs(900),
        }
    }
}

/// Settings of the DNS proxy.
#[derive(Clone, Debug)]
pub struct DnsSettings {
    /// Servers that the agent itself asks for names that clients call servers by; none: those of the node. Default none.
    pub upstream: Vec<SocketAddr>,
    /// Time-to-live of our own answers. Default 30 s, as CoreDNS gives.
    pub ttl: Duration,
    /// Time for a forwarded query. Default 5 s, the resolver library's own time-out.
    pub forward_timeout: Duration,
    /// Forwarded queries of one pod in flight; more are dropped and counted. Default 256.
    pub in_flight_max: usize,
    /// DNS connections over TCP of one pod at once. Default 64.
    pub tcp_connections_max: usize,
    /// A DNS connection over TCP without a query for this long ends. Default 10 s (RFC 7766 wants seconds).
    pub tcp_idle_timeout: Duration,
}

impl Settings {
    /// The defaults for a node.
    pub fn new(node: impl Into<Arc<str>>) -> Self {
        let connections_max = connections_for(descriptors_max());
        Self {
            node: node.into(),
            workers: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            connect_timeout: Duration::from_secs(10),
            attempt_timeout: Duration::from_secs(3),
            attempts_max: 3,
            idle_timeout: Duration::from_secs(3600),
            hello_timeout: Duration::from_secs(15),
            reset_linger: Duration::from_secs(5),
            connections_max,
            pod_connections_max: connections_max / 2,
            held_bytes_max: 16 << 20,
            splice: true,
            tls_files: TLS_FILES.into(),
            dns: DnsSettings::default(),
            hbone: HboneSettings::default(),
            http: HttpSettings::default(),
        }
    }
}

impl Default for DnsSettings {
    fn default() -> Self {
        Self {
            upstream: Vec::new(),
            ttl: Duration::from_secs(30),
            forward_timeout: Duration::from_secs(5),
            in_flight_max: 256,
            tcp_connections_max: 64,
            tcp_idle_timeout: Duration::from_secs(10),
        }
    }
}

/// Two descriptors a connection; the rest is for listeners (8 a pod), kernel objects and pipes.
fn connections_for(descriptors_max: u64) -> usize {
    let reserve = (descriptors_max / 4).clamp(64, 8192);
    usize::try_from(descriptors_max.saturating_sub(reserve) / 2).unwrap_or(usize::MAX).clamp(16, 1_000_000)
}

fn descriptors_max() -> u64 {
    nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_left_for_listeners() {
        assert_eq!(connections_for(1024), 384);
        assert_eq!(connections_for(1_048_576), 520_192);
        assert_eq!(connections_for(u64::MAX), 1_000_000);
        assert_eq!(connections_for(0), 16);
    }
}
