//! WorkloadEntry: a workload that is no pod, by itself or as an endpoint of a ServiceEntry.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_core::snapshot::Name;
use serde_json::Value;

use super::{
    Labels,
    fields::{self, Object},
    host,
    metadata::{self, Scope},
    parts,
};
use crate::problem::Problems;

/// How addresses of unix sockets begin.
const UNIX: &str = "unix://";
/// Longest name of a port.
const PORT_NAME_MAX: usize = 63;

/// A workload that is no pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known.
    pub created: Option<i64>,
    /// What it is; its labels are those of the metadata too, and are selected like a pod's.
    pub endpoint: WorkloadEndpoint,
    /// What its status says of its health, if anything: an unhealthy one gets nothing.
    pub healthy: Option<bool>,
}

/// An endpoint that is no pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEndpoint {
    /// Where it is.
    pub address: EndpointAddress,
    /// Its own ports by the name of the service's port; they win over the service's target port (S54).
    pub ports: BTreeMap<Arc<str>, u16>,
    /// Labels.
    pub labels: Labels,
    /// Network, if not the mesh's own.
    pub network: Option<Arc<str>>,
    /// `region/zone/subzone`.
    pub locality: Option<Arc<str>>,
    /// Share among its siblings, at least 1.
    pub weight: u32,
    /// Service account of its identity, of the same namespace; `None`: it is not in the mesh.
    pub service_account: Option<Arc<str>>,
}

/// Where an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointAddress {
    /// At this address.
    Ip(IpAddr),
    /// Wherever this name (lower case) leads.
    Name(Arc<str>),
    /// At a unix socket, which the mesh does not dial: it is no endpoint.
    Unix(Arc<str>),
    /// Behind the gateway of its network, which the mesh does not have: it is no endpoint.
    Gateway,
}

/// Reads a WorkloadEntry.
pub(crate) fn read(value: &Value, problems: &mut Problems) -> WorkloadEntry {
    let (meta, mut spec) = fields::document(value, problems);
    let name = metadata::name(&meta, Scope::Namespaced, problems);
    let mut endpoint = endpoint(&mut spec, problems);
    spec.finish(problems);
    for (key, value) in metadata::labels(&meta) {
        endpoint.labels.entry(key).or_insert(value);
    }
    WorkloadEntry { name, created: metadata::created(&meta), endpoint, healthy: healthy(value) }
}

/// Reads the fields of a WorkloadEntry, wherever they stand.
pub(super) fn endpoint(object: &mut Object<'_>, problems: &mut Problems) -> WorkloadEndpoint {
    let network = object.shared("network", problems);
    let at_address = object.at("address");
    let address = match object.text("address", problems) {
        Some(text) => address(text, &at_address, problems),
        None => {
            if network.is_none() {
                problems.error(at_address, "is missing, wanted an address, a host name, or a network");
            } else {
                problems.warning(
                    object.at("network"),
                    "is there without an address: the endpoint is behind that network's gateway, which the mesh \
                     does not have yet; it gets nothing",
                );
            }
            EndpointAddress::Gateway
        }
    };
    let ports = ports(object, problems);
    if matches!(address, EndpointAddress::Unix(_)) && !ports.is_empty() {
        problems.error(object.at("ports"), "is there with a unix socket, which has no ports");
    }
    let at_locality = object.at("locality");
    let locality = object.text("locality", problems);
    if locality.is_some_and(|locality| locality.split('/').any(str::is_empty)) {
        let found = locality.unwrap_or_default();
        problems
            .error(at_locality, format!("is {found:?}, wanted region/zone/subzone, or the first of them"));
    }
    WorkloadEndpoint {
        address,
        ports,
        labels: parts::labels(object, "labels", problems),
        network,
        locality: locality.map(Into::into),
        // 0 is what protobuf has for nothing.
        weight: object.count("weight", problems).unwrap_or_default().max(1),
        service_account: object.shared("serviceAccount", problems),
    }
}

fn address(text: &str, field: &str, problems: &mut Problems) -> EndpointAddress {
    if let Some(path) = text.strip_prefix(UNIX) {
        if !path.starts_with(['/', '@']) || path.ends_with('/') {
            problems.error(field, format!("is {text:?}, wanted the absolute path of a unix socket"));
        } else {
            problems
                .warning(field, "is a unix socket, which the mesh does not dial; the endpoint gets nothing");
        }
        return EndpointAddress::Unix(text.into());
    }
    if let Ok(addr) = text.parse::<IpAddr>() {
        return EndpointAddress::Ip(addr.to_canonical());
    }
    if text.contains('*') || host::check_name(text).is_err() {
        let wanted = "wanted an IPv4 or IPv6 address, or a host name without '*'";
        problems.error(field, format!("is {text:?}, {wanted}"));
    }
    EndpointAddress::Name(text.trim_end_matches('.').to_ascii_lowercase().into())
}

fn ports(object: &mut Object<'_>, problems: &mut Problems) -> BTreeMap<Arc<str>, u16> {
    let mut ports = BTreeMap::new();
    for (name, node) in object.entries("ports", problems) {
        if !is_port_name(name) {
            let wanted = "wanted letters, digits and '-', at most 63";
            problems.error(node.path.as_str(), format!("is for port {name:?}, {wanted}"));
        }
        if let Some(port) = node.number(1..=65535, problems) {
            ports.insert(name.into(), u16::try_from(port).unwrap_or_default());
        }
    }
    ports
}

/// A name of a port as Istio has it.
pub(super) fn is_port_name(text: &str) -> bool {
    (1..=PORT_NAME_MAX).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// `status.conditions` of type `Healthy`.
fn healthy(value: &Value) -> Option<bool> {
    let conditions = value.get("status")?.get("conditions")?.as_array()?;
    let of_health = |condition: &&Value| condition.get("type").and_then(Value::as_str) == Some("Healthy");
    match conditions.iter().find(of_health)?.get("status")?.as_str()? {
        "True" => Some(true),
        "False" => Some(false),
        _ => None,
    }
}
