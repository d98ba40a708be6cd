//! DestinationRule: subsets of a destination, and how its endpoints are chosen and spoken to.
//!
//! Policies are read block by block as they are written: which block of which level counts (S40) is compilation's business, as
//! is what the mesh's defaults put in for fields that are not given.

mod balancing;
mod policy;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_core::{
    route::cluster::{
        self, Algorithm, ClientTls, ConnectTunnel, Distribution, OutlierDetection, ProxyProtocol,
        RetryBudget, Warmup,
    },
    snapshot::Name,
};
use serde_json::Value;

use super::{
    Labels, fields,
    host::{self, RuleHost},
    metadata::{self, Scope},
    parts::{self, ExportTo},
};
use crate::problem::Problems;

pub(super) use self::{
    balancing::locality,
    policy::{connection_pool, keepalive, outlier_detection},
};

/// What is said about a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DestinationRule {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known: the oldest of several for one host comes first (S38).
    pub created: Option<i64>,
    /// The destination.
    pub host: RuleHost,
    /// Who sees it; `None`: as the mesh says.
    pub export_to: Option<ExportTo>,
    /// Only for clients of its namespace with these labels; empty for all clients.
    pub selector: Labels,
    /// What holds for every subset; `None` when nothing is said.
    pub policy: Option<TrafficPolicy>,
    /// Subsets; names are unique.
    pub subsets: Vec<Subset>,
}

/// Some of a destination's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subset {
    /// Name.
    pub name: Arc<str>,
    /// Labels that endpoints' workloads must have; with none it is all of them.
    pub labels: Labels,
    /// What holds for it on top of the rule's; `None` when nothing is said.
    pub policy: Option<TrafficPolicy>,
}

/// A policy with exceptions for ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrafficPolicy {
    /// What holds for every port that has no entry of its own.
    pub settings: Settings,
    /// `portLevelSettings`. An entry replaces balancing, pool, outlier detection and TLS as a whole, those it does not give too (S40).
    pub ports: BTreeMap<u16, Settings>,
}

/// The blocks of a policy, `None` where nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Choice of an endpoint.
    pub balancing: Option<LoadBalancer>,
    /// Limits.
    pub pool: Option<ConnectionPool>,
    /// Ejection of endpoints that fail.
    pub outlier: Option<OutlierDetection>,
    /// TLS towards the endpoint. Obeyed even if it is DISABLE (S46).
    pub tls: Option<ClientTls>,
    /// Connections are tunnelled; never per port.
    pub tunnel: Option<ConnectTunnel>,
    /// Connections begin with a PROXY protocol header; never per port.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// Limit of retries; never per port.
    pub retry_budget: Option<RetryBudget>,
}

/// Choice of an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadBalancer {
    /// Which of those that are left.
    pub algorithm: Algorithm,
    /// Which are left, by locality; `None`: as the service or the mesh says (S48).
    pub locality: Option<LocalityLb>,
    /// New endpoints get their share by and by.
    pub warmup: Option<Warmup>,
}

/// Preference for near endpoints (S48, S49).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalityLb {
    /// `false` turns all of it off, also what wider settings say.
    pub enabled: bool,
    /// Shares; with these the rest has no effect.
    pub distribute: Vec<Distribution>,
    /// Regions and the region that stands in for each.
    pub failover: Vec<(Arc<str>, Arc<str>)>,
    /// Labels (`key` or `key=value`) whose agreement makes priorities.
    pub failover_priority: Vec<(Arc<str>, Option<Arc<str>>)>,
    /// Zones get what their endpoints can take, if there are at least so many (`zoneAwareLbSetting`).
    pub zone_aware: Option<u32>,
}

impl LocalityLb {
    /// What it means for a destination; failover without outlier detection has no effect unless it is forced.
    pub fn locality(&self) -> cluster::Locality {
        if !self.enabled {
            cluster::Locality::Anywhere
        } else if let Some(min_size) = self.zone_aware {
            cluster::Locality::ZoneAware {
                regions: self.failover.clone(),
                labels: self.failover_priority.clone(),
                min_size,
            }
        } else if !self.distribute.is_empty() {
            cluster::Locality::Distribute(self.distribute.clone())
        } else {
            cluster::Locality::Failover {
                regions: self.failover.clone(),
                labels: self.failover_priority.clone(),
                forced: false,
            }
        }
    }
}

/// Limits. What is `None` has not been given, or is 0 where 0 stands for the default (S43).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionPool {
    /// Connections.
    pub max_connections: Option<u32>,
    /// Limit of a connection attempt; else the mesh's.
    pub connect_timeout: Option<Duration>,
    /// TCP keep-alive: probes, idle time, interval; else the mesh's.
    pub keepalive: Option<(Option<u32>, Option<Duration>, Option<Duration>)>,
    /// `tcp.idleTimeout`: a TCP connection without traffic is closed after this; zero: never.
    pub tcp_idle_timeout: Option<Duration>,
    /// `http.idleTimeout`: for HTTP it beats the one of TCP.
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
    pub http2_keepalive: Option<cluster::Http2Keepalive>,
    /// HTTP/1.1 clients are served by HTTP/2 upstream; else the mesh's.
    pub h2_upgrade: Option<bool>,
    /// The client's own protocol is used upstream.
    pub use_client_protocol: bool,
}

impl DestinationRule {
    /// The Secrets that it names, with the field of each.
    pub fn credentials(&self) -> Vec<(String, Arc<str>)> {
        let mut all = Vec::new();
        let mut add = |field: String, settings: &Settings| {
            let tls = settings.tls.as_ref();
            let tls = tls.filter(|tls| {
                matches!(tls.mode, cluster::ClientTlsMode::Simple | cluster::ClientTlsMode::Mutual)
            });
            if let Some(name) = tls.and_then(|tls| tls.credential_name.clone()) {
                all.push((format!("{field}.tls.credentialName"), name));
            }
        };
        let of_subset = |(at, subset): (usize, &'_ Subset)| {
            Some((format!("spec.subsets[{at}].trafficPolicy"), subset.policy.clone()?))
        };
        let own = self.policy.iter().map(|policy| ("spec.trafficPolicy".to_owned(), policy.clone()));
        for (field, policy) in own.chain(self.subsets.iter().enumerate().filter_map(of_subset)) {
            add(field.clone(), &policy.settings);
            for (port, settings) in &policy.ports {
                add(format!("{field}.portLevelSettings[{port}]"), settings);
            }
        }
        all
    }
}

/// Reads a DestinationRule.
pub(crate) fn read(value: &Value, problems: &mut Problems) -> DestinationRule {
    let (meta, mut spec) = fields::document(value, problems);
    let name = metadata::name(&meta, Scope::Namespaced, problems);
    let host = match spec.text("host", problems) {
        None => {
            if spec.get("host").is_none_or(|node| node.value.as_str() == Some("")) {
                problems.error(spec.at("host"), "is missing, wanted the host of a service");
            }
            None
        }
        Some(text) => match host::check_pattern(text) {
            Err(wanted) if text.parse::<std::net::IpAddr>().is_err() => {
                problems.error(spec.at("host"), format!("is {text:?}, wanted {wanted}"));
                None
            }
            _ => Some(RuleHost::new(text, &name.namespace)),
        },
    };
    let export_to = parts::export_to(&mut spec, "exportTo", problems);
    let selector = parts::selector(&mut spec, "workloadSelector", "matchLabels", problems);
    if let Some(to) = &export_to
        && spec.has("workloadSelector")
        && !is_own_alone(to, &name.namespace)
    {
        let wanted =
            "wanted \".\" or nothing: a rule with a workloadSelector is for workloads of its own namespace";
        problems
            .error(spec.at("exportTo"), format!("is for others than namespace {}, {wanted}", name.namespace));
    }
    let policy = policy::read(&mut spec, problems);
    let subsets = subsets(&mut spec, problems);
    spec.finish(problems);
    let host = host.unwrap_or_else(|| RuleHost::new("", &name.namespace));
    DestinationRule { created: metadata::created(&meta), name, host, export_to, selector, policy, subsets }
}

fn is_own_alone(to: &ExportTo, own: &str) -> bool {
    let is_own = to.own || to.namespaces.contains(own);
    is_own && !to.everyone && to.namespaces.iter().all(|namespace| &**namespace == own)
}

fn subsets(spec: &mut fields::Object<'_>, problems: &mut Problems) -> Vec<Subset> {
    let mut subsets: Vec<Subset> = Vec::new();
    for mut object in spec.objects("subsets", problems) {
        let name = object.shared("name", problems).unwrap_or_default();
        if name.is_empty() {
            problems.error(object.at("name"), "is missing");
        } else if !metadata::is_label(&name.to_ascii_lowercase()) {
            let wanted = "wanted letters, digits and '-', at most 63";
            problems.error(object.at("name"), format!("is {name:?}, {wanted}"));
        } else if subsets.iter().any(|subset| subset.name == name) {
            problems.error(object.at("name"), format!("is {name:?}, which is there already"));
        }
        let labels = parts::labels(&mut object, "labels", problems);
        let policy = policy::read(&mut object, problems);
        object.finish(problems);
        subsets.push(Subset { name, labels, policy });
    }
    subsets
}

#[cfg(test)]
mod tests;
