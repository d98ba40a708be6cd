//! Owns the shapes of `meshctl proxy-config`: what requests of a pod are routed by, where they may go, and how that is doing.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The resource and rule that something is from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginView {
    /// Kind, e.g. `VirtualService`.
    pub kind: String,
    /// `namespace/name`.
    pub name: String,
    /// Place in the resource, e.g. `spec.http[0]`.
    pub field: String,
    /// File and line, as far as the source has them.
    pub place: Option<String>,
}

/// Rules by host and port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutesView {
    /// `namespace/name` of the pod whose view it is; absent: everybody's.
    pub pod: Option<String>,
    /// The tables, by host and port.
    pub tables: Vec<RouteTableView>,
}

/// The rules of one host and port for some clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteTableView {
    /// Host name or wildcard.
    pub host: String,
    /// Port that clients dial.
    pub port: u16,
    /// `http`, `tls` or `tcp`.
    pub protocol: String,
    /// For whom, when the view is everybody's: `all`, `namespace shop`, `shop app=cart`.
    pub clients: Option<String>,
    /// In the order in which they are tried.
    pub rules: Vec<RouteRuleView>,
    /// What is done when none matches.
    pub unmatched: String,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouteRuleView {
    /// Its name in logs.
    pub name: Option<String>,
    /// Where it is from.
    pub origin: OriginView,
    /// Any of these; none is every request or connection.
    pub matches: Vec<String>,
    /// What is done, in words.
    pub action: String,
    /// Where to, when it forwards.
    pub backends: Vec<ShareView>,
    /// Limit over all tries in milliseconds; absent is none.
    pub timeout_ms: Option<u64>,
    /// How tries are repeated; absent is never.
    pub retries: Option<RetriesView>,
    /// Injected delay and abort, in words.
    pub fault: Vec<String>,
    /// Where copies go, in words.
    pub mirrors: Vec<String>,
    /// Rewrites and header changes, in words.
    pub changes: Vec<String>,
    /// It has cross-origin rules.
    pub cors: bool,
}

/// One of several destinations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ShareView {
    /// Per cent of the requests.
    pub percent: f64,
    /// `outbound|PORT|SUBSET|HOST`, as Envoy's clusters are called.
    pub cluster: String,
    /// What the share is answered with when the destination is none.
    pub broken_status: Option<u16>,
}

/// How tries are repeated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetriesView {
    /// Tries after the first.
    pub attempts: u32,
    /// Conditions, as Envoy writes them.
    pub on: Vec<String>,
    /// Limit of each try in milliseconds; absent: only the rule's.
    pub per_try_timeout_ms: Option<u64>,
}

/// Destinations.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClustersView {
    /// `namespace/name` of the pod whose view it is; absent: everybody's.
    pub pod: Option<String>,
    /// By host, port and subset.
    pub clusters: Vec<ClusterView>,
}

/// A port of a service, or a subset of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClusterView {
    /// `outbound|PORT|SUBSET|HOST`.
    pub name: String,
    /// Full name of the service.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The subset, if it is one.
    pub subset: Option<String>,
    /// For whom, when the view is everybody's.
    pub clients: Option<String>,
    /// What is spoken: `http`, `http2`, `grpc`, `tls`, `tcp`, or `auto` when nobody says it.
    pub protocol: String,
    /// How an endpoint is chosen, e.g. `LEAST_REQUEST`.
    pub balancing: String,
    /// Limits of the connection pool that are set, e.g. `maxConnections=1`.
    pub limits: Vec<String>,
    /// Outlier detection in words; absent is off.
    pub outlier: Option<String>,
    /// TLS towards the endpoints: a mode of DestinationRule, or `mesh` when the mesh decides.
    pub tls: String,
    /// Why files or Secrets for it cannot be used as they are now; absent: they can, or no connection wanted them yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_problem: Option<String>,
    /// The DestinationRule; absent: defaults.
    pub origin: Option<OriginView>,
    /// What requests of the pod have in use there now; absent without a pod, or when nothing was sent.
    pub in_use: Option<InUseView>,
}

/// What is in use at a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InUseView {
    /// Connections.
    pub connections: u32,
    /// Requests that wait for a connection.
    pub pending: u32,
    /// Requests.
    pub requests: u32,
    /// Retries.
    pub retries: u32,
}

/// Endpoints by destination.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EndpointsView {
    /// `namespace/name` of the pod whose view it is; absent: everybody's.
    pub pod: Option<String>,
    /// By destination and address.
    pub endpoints: Vec<EndpointView>,
}

/// An endpoint of a destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointView {
    /// Address and port.
    pub addr: SocketAddr,
    /// `namespace/name` of its pod.
    pub workload: Option<String>,
    /// Its node.
    pub node: Option<String>,
    /// `region/zone/subzone`, as far as it is known.
    pub locality: Option<String>,
    /// Weight among its siblings.
    pub weight: u32,
    /// Priority class, 0 is used first; absent: it gets nothing by locality.
    pub priority: Option<u32>,
    /// `HEALTHY`, `UNHEALTHY` (not ready) or `EJECTED`.
    pub status: String,
    /// `OK`, or `FAILED` while it is ejected.
    pub outlier_check: String,
    /// It stays ejected for so long.
    pub ejected_for_ms: Option<u64>,
    /// Consecutive failures that this pod's requests saw.
    pub failures: u32,
    /// Requests outstanding from this pod.
    pub active_requests: u32,
    /// `outbound|PORT|SUBSET|HOST`.
    pub cluster: String,
}

/// What takes a pod's connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenersView {
    /// `namespace/name` of the pod whose view it is; absent: everybody's.
    pub pod: Option<String>,
    /// Whether that pod is enrolled.
    pub enrolled: bool,
    /// The agent's listeners in the pod.
    pub in_pod: Vec<InPodListenerView>,
    /// What the kernel does with connects to service ports.
    pub services: Vec<ServicePortView>,
}

/// A listener of the agent in a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InPodListenerView {
    /// Port.
    pub port: u16,
    /// What it takes.
    pub purpose: String,
}

/// What the kernel does with connects to a port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePortView {
    /// Address that apps dial.
    pub addr: IpAddr,
    /// Port that apps dial.
    pub port: u16,
    /// Full name of the service.
    pub host: String,
    /// What is spoken, as in [`ClusterView::protocol`].
    pub protocol: String,
    /// `direct`: the kernel chooses the backend, the agent sees only what needs it (other nodes, no verdict yet); `proxy`: the agent takes
    /// every connection and relays bytes; `http`: and looks at requests; `refuse`: no endpoint is ready; `absent`: not in the kernel's tables.
    pub decision: String,
    /// Backends in the kernel's table.
    pub backends: u32,
}
