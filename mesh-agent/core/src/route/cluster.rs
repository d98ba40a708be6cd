//! Destinations and what is said about them: which endpoints, how one is chosen, and how it is spoken to.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    route::{Origin, http::Millionths, matching::StringMatch},
    snapshot::Name,
};

/// A port of a service, or of a subset of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct ClusterKey {
    /// The service.
    pub service: Name,
    /// Its port.
    pub port: u16,
    /// A subset of a DestinationRule.
    pub subset: Option<Arc<str>>,
}

/// A destination.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cluster {
    /// The DestinationRule, if one says something.
    pub origin: Option<Arc<Origin>>,
    /// Labels that endpoints' workloads must have; those of the subset.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// How they are chosen and spoken to.
    pub policy: TrafficPolicy,
}

/// How endpoints are chosen and spoken to. The default is Istio's.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TrafficPolicy {
    /// Choice of an endpoint.
    pub balancing: Balancing,
    /// Limits.
    pub pool: ConnectionPool,
    /// Ejection of endpoints that fail.
    pub outlier: Option<OutlierDetection>,
    /// TLS towards the endpoint; `None`: as the mesh does by itself.
    pub tls: Option<ClientTls>,
    /// Connections are tunnelled through the endpoint.
    pub tunnel: Option<ConnectTunnel>,
    /// Connections begin with a PROXY protocol header.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Retries are limited to a share of what is active.
    pub retry_budget: Option<RetryBudget>,
}

/// Choice of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Balancing {
    /// Which of the endpoints that are left.
    pub algorithm: Algorithm,
    /// Which endpoints are left.
    pub locality: Locality,
    /// New endpoints get their share by and by.
    pub warmup: Option<Warmup>,
}

/// Which of several endpoints.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// The better of two by outstanding requests; weights count.
    #[default]
    LeastRequest,
    /// In turn; weights count.
    RoundRobin,
    /// Any; weights count.
    Random,
    /// The address that was dialled.
    Passthrough,
    /// Always the same for the same key.
    ConsistentHash {
        /// What is hashed; of several the first that the request has.
        key: HashKey,
        /// How.
        table: HashTable,
    },
}

/// What is hashed. A request without it is balanced at random.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashKey {
    /// A header, lower case.
    Header(Arc<str>),
    /// A cookie; with a time to live one is made when it is missing.
    Cookie {
        /// Name.
        name: Arc<str>,
        /// Path of a cookie that is made.
        path: Option<Arc<str>>,
        /// Age of a cookie that is made; zero: of the session.
        ttl: Option<Duration>,
        /// Further attributes of a cookie that is made.
        attributes: Vec<(Arc<str>, Arc<str>)>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter.
    Query(Arc<str>),
}

/// How a hash leads to an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashTable {
    /// A ring with at least so many points.
    Ring(u64),
    /// A maglev table of so many entries, a prime.
    Maglev(u64),
}

/// Which endpoints are left, by where they are (C6–C9, S48, S49).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// All, wherever they are.
    #[default]
    Anywhere,
    /// By shares; localities that are not named get nothing. The first entry whose `from` covers the client counts.
    Distribute(Vec<Distribution>),
    /// The best non-empty priority class.
    Failover {
        /// Farther regions in the order of preference: region to region.
        regions: Vec<(Arc<str>, Arc<str>)>,
        /// Labels (`key` or `key=value`) whose agreement makes classes.
        labels: Vec<(Arc<str>, Option<Arc<str>>)>,
        /// Also without outlier detection (`trafficDistribution`).
        forced: bool,
    },
    /// The client's region, in which zones get what their endpoints can take; other regions when it has nothing left (C9).
    ZoneAware {
        /// Farther regions in the order of preference: region to region.
        regions: Vec<(Arc<str>, Arc<str>)>,
        /// Labels (`key` or `key=value`) whose agreement makes classes.
        labels: Vec<(Arc<str>, Option<Arc<str>>)>,
        /// With fewer endpoints in the region, zones play no part.
        min_size: u32,
    },
}

/// Shares of localities for clients of one.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Distribution {
    /// `region/zone/subzone`, the last part may be `*`.
    pub from: Arc<str>,
    /// Localities in the same form with their weights, summing to 100.
    pub to: Vec<(Arc<str>, u32)>,
}

/// New endpoints get their share by and by.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Warmup {
    /// Until the full share.
    pub duration: Duration,
    /// Share at the start, in per cent.
    pub minimum_percent: f64,
    /// 1 is linear; more is slower at first.
    pub aggression: f64,
}

// The numbers come from resources that were validated: never NaN.
impl Eq for Warmup {}

/// Limits of one destination as seen by one agent (per worker shares are the proxy's business). `None` is no limit.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ConnectionPool {
    /// Connections.
    pub max_connections: Option<u32>,
    /// Limit of a connection attempt, 10 s unless set.
    pub connect_timeout: Duration,
    /// TCP keep-alive: probes, idle time, interval.
    pub keepalive: Option<(Option<u32>, Option<Duration>, Option<Duration>)>,
    /// A connection without traffic is closed after this, 1 h unless set; zero: never.
    pub idle_timeout: Duration,
    /// The same for a connection that carries requests, when none is on it; `None`: as for all.
    #[serde(default)]
    pub http_idle_timeout: Option<Duration>,
    /// A connection is closed after this whatever it does.
    pub max_connection_duration: Option<Duration>,
    /// Requests that wait for a connection.
    pub max_pending: Option<u32>,
    /// Requests at once.
    pub max_requests: Option<u32>,
    /// Requests of one connection.
    pub max_requests_per_connection: Option<u32>,
    /// Retries at once.
    pub max_retries: Option<u32>,
    /// Streams at once of one HTTP/2 connection.
    pub max_concurrent_streams: Option<u32>,
    /// Connections of HTTP/2 that are silent are asked whether they live.
    #[serde(default)]
    pub http2_keepalive: Option<Http2Keepalive>,
    /// HTTP/1.1 clients are served by HTTP/2 upstream, at ports that are declared to be HTTP.
    pub h2_upgrade: bool,
    /// And at all others where HTTP is found: who says that of a destination knows it. What is said of the whole mesh does not mean them.
    #[serde(default)]
    pub h2_upgrade_sniffed: bool,
    /// The client's own protocol is used upstream.
    pub use_client_protocol: bool,
}

impl ConnectionPool {
    /// Whether it limits requests, and not connections alone: then the server's side has to understand them too (S45).
    pub fn limits_requests(&self) -> bool {
        let limits = [
            self.max_pending,
            self.max_requests,
            self.max_requests_per_connection,
            self.max_concurrent_streams,
        ];
        limits.iter().any(Option::is_some)
    }

    /// Whether something of it is counted at the server: connections past the agent would be counted by nobody.
    pub fn is_counted(&self) -> bool {
        self.max_connections.is_some() || self.limits_requests()
    }
}

impl Default for ConnectionPool {
    fn default() -> Self {
        Self {
            max_connections: None,
            connect_timeout: Duration::from_secs(10),
            keepalive: None,
            idle_timeout: Duration::from_secs(3600),
            http_idle_timeout: None,
            max_connection_duration: None,
            max_pending: None,
            max_requests: None,
            max_requests_per_connection: None,
            max_retries: None,
            max_concurrent_streams: None,
            http2_keepalive: None,
            h2_upgrade: false,
            h2_upgrade_sniffed: false,
            use_client_protocol: false,
        }
    }
}

/// PINGs over a connection of HTTP/2 from which nothing arrives, with requests on it or without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Http2Keepalive {
    /// After so much silence one is sent.
    pub interval: Duration,
    /// Without an answer for so long the connection is closed, and with it what is on it.
    pub timeout: Duration,
}

/// Ejection of endpoints that fail (E5, S44).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct OutlierDetection {
    /// Consecutive failures; `None`: off.
    pub consecutive_5xx: Option<u32>,
    /// Consecutive 502, 503, 504 and connection failures; `None`: off.
    pub consecutive_gateway: Option<u32>,
    /// Consecutive failures on our side, when they are told apart; `None`: off.
    pub consecutive_local: Option<u32>,
    /// Failures on our side are counted apart from the endpoint's answers.
    pub split_local: bool,
    /// How often endpoints are looked at.
    pub interval: Duration,
    /// Times the number of ejections so far.
    pub base_ejection: Duration,
    /// Share of the endpoints that may be ejected, in per cent.
    pub max_ejection_percent: u32,
    /// Below this share of healthy ones all are used (panic); 0 is never.
    pub min_health_percent: u32,
    /// Statuses that count as failures instead of 5xx.
    pub error_statuses: Vec<(u16, u16)>,
}

/// TLS towards an endpoint, as a DestinationRule says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ClientTls {
    /// Mode.
    pub mode: ClientTlsMode,
    /// Server name; `None`: the request's host.
    pub sni: Option<Arc<str>>,
    /// Names of which the server's certificate must have one; none: the server name itself.
    pub subject_alt_names: Vec<StringMatch>,
    /// PEM files of client certificate and key.
    pub client_certificate: Option<(Arc<str>, Arc<str>)>,
    /// PEM file of roots; `None`: those of the system.
    pub ca_certificates: Option<Arc<str>>,
    /// PEM file of revocation lists; with one, each certificate of a chain has to be known to a list and not revoked.
    #[serde(default)]
    pub ca_crl: Option<Arc<str>>,
    /// Secret with certificate, key and roots: `NAMESPACE/NAME`, and its bare name where only gateways may read it.
    pub credential_name: Option<Arc<str>>,
    /// Nothing is checked.
    pub insecure_skip_verify: bool,
}

/// Mode of client TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ClientTlsMode {
    /// Plaintext.
    Disable,
    /// Server certificate.
    Simple,
    /// And ours.
    Mutual,
    /// By the mesh's own certificates.
    IstioMutual,
}

/// `CONNECT` (or `POST`) to a proxy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ConnectTunnel {
    /// By POST.
    pub post: bool,
    /// Host to ask for.
    pub host: Arc<str>,
    /// Port to ask for.
    pub port: u16,
}

/// Version of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ProxyProtocol {
    /// Text.
    V1,
    /// Binary.
    V2,
}

/// Retries at once: a share of active and pending requests, and never fewer than a minimum. With an interval, what began within it counts
/// as well, of requests and of retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RetryBudget {
    /// Share.
    pub share: Millionths,
    /// Minimum.
    pub min_concurrency: u32,
    /// How long requests and retries count after they began; zero: while they are active.
    #[serde(default)]
    pub interval: Duration,
}
