//! Where the endpoints of a service come from, and what resources say of single endpoints.

use std::{collections::BTreeMap, sync::Arc};

/// Where the endpoints of a service come from (S50).
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resolution {
    /// They are those of its ports.
    #[default]
    Listed,
    /// There are none: connections go to the address that was dialled.
    Dialled,
    /// There are none: connections go to what DNS says of the name that the client asks for (`DYNAMIC_DNS`).
    ByName,
    /// Besides those of its ports, what DNS says. Whoever resolves the names puts what it finds into the ports.
    Dns(DnsResolution),
}

/// Names that lead to a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DnsResolution {
    /// One address at a time: new connections go to the first that DNS says.
    pub one_at_a_time: bool,
    /// The names.
    pub names: Vec<DnsEndpoint>,
}

/// A name whose addresses are endpoints.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DnsEndpoint {
    /// The name: lower case, without trailing dot.
    pub host: Arc<str>,
    /// The target of each of the service's ports, in their order.
    pub ports: Vec<u16>,
    /// What is said of the endpoints.
    pub traits: Option<Arc<Traits>>,
}

/// What a resource says of an endpoint itself, whatever workload is there.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Traits {
    /// Labels, for subsets and failover; they count instead of the workload's.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// `region/zone/subzone`, if it is not the workload's.
    pub locality: Option<Arc<str>>,
    /// Share among its siblings; 0 is what nobody said, which counts as 1.
    pub weight: u32,
    /// Network, if not the mesh's own.
    pub network: Option<Arc<str>>,
    /// Service account that it proves, in the namespace of its service, if it is no pod.
    #[serde(default)]
    pub account: Option<Arc<str>>,
}
