//! ServiceEntry: services that Kubernetes does not know.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use mesh_core::snapshot::{Name, Protocol, ServicePort};
use serde_json::Value;

use super::{
    ExportTo, Labels,
    fields::{self, Object},
    host,
    metadata::{self, Scope},
    parts,
    workload_entry::{self, EndpointAddress, WorkloadEndpoint, is_port_name},
};
use crate::problem::Problems;

/// Most hosts, addresses, ports; most endpoints.
const ITEMS_MAX: usize = 256;
const ENDPOINTS_MAX: usize = 4096;
/// Label by which an entry wants no address of its own.
const AUTO_ALLOCATE: &str = "networking.istio.io/enable-autoallocate-ip";

/// A service that Kubernetes does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntry {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known: the oldest of several with one host counts (S57).
    pub created: Option<i64>,
    /// Host names (lower case, without trailing dot), `*.example.com` among them; never empty.
    pub hosts: Vec<Arc<str>>,
    /// Addresses that lead to it.
    pub addresses: Vec<IpNet>,
    /// Ports.
    pub ports: Vec<ServiceEntryPort>,
    /// `MESH_INTERNAL`.
    pub internal: bool,
    /// Where its endpoints come from.
    pub resolution: Resolution,
    /// Endpoints, as they are written.
    pub endpoints: Vec<WorkloadEndpoint>,
    /// Selects pods and WorkloadEntries of its namespace; `None`: `endpoints` count.
    pub selector: Option<Labels>,
    /// Who sees it; `None`: as the mesh says.
    pub export_to: Option<ExportTo>,
    /// Names of which the server's certificate must have one; none: as the mesh does by itself.
    pub subject_alt_names: Vec<Arc<str>>,
    /// Whether it may be given an address of its own (B4).
    pub auto_allocate: bool,
    /// Addresses that Istio has given its hosts (`status.addresses`).
    pub allocated: Vec<(Arc<str>, IpAddr)>,
}

/// A port of a ServiceEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceEntryPort {
    /// Name.
    pub name: Arc<str>,
    /// Number that is dialled.
    pub number: u16,
    /// What is spoken there.
    pub protocol: PortProtocol,
    /// Number of the endpoints' port; `None`: the same.
    pub target: Option<u16>,
}

/// Where the endpoints of a ServiceEntry come from (S50).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resolution {
    /// Connections go where they were dialled.
    #[default]
    None,
    /// From `endpoints` or the selector.
    Static,
    /// All that DNS says of the endpoints' names or, without endpoints, of the first host.
    Dns,
    /// The first that DNS says, for each new connection.
    DnsRoundRobin,
    /// What DNS says of the request's host or SNI; hosts are wildcards.
    DynamicDns,
}

impl Resolution {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Static => "STATIC",
            Self::Dns => "DNS",
            Self::DnsRoundRobin => "DNS_ROUND_ROBIN",
            Self::DynamicDns => "DYNAMIC_DNS",
        }
    }
}

/// What is spoken at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortProtocol {
    /// Not said: found out by looking.
    Unknown,
    /// HTTP/1.1.
    Http,
    /// HTTP/2 in plaintext.
    Http2,
    /// gRPC.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// HTTP in TLS, told by its SNI alone.
    Https,
    /// TLS, told by its SNI alone.
    Tls,
    /// Bytes.
    Tcp,
    /// Bytes of the Mongo protocol.
    Mongo,
    /// Bytes of the MySQL protocol.
    Mysql,
    /// Bytes of the Redis protocol.
    Redis,
    /// Datagrams.
    Udp,
    /// Tunnels of the mesh.
    Hbone,
}

impl ServiceEntryPort {
    /// As a port of the services that its entry makes, without endpoints.
    pub(crate) fn of_service(&self) -> ServicePort {
        ServicePort {
            name: Arc::clone(&self.name),
            port: self.number,
            protocol: if self.protocol == PortProtocol::Udp { Protocol::Udp } else { Protocol::Tcp },
            app_protocol: self.protocol.app_protocol().map(Into::into),
            endpoints: Vec::new(),
        }
    }
}

impl PortProtocol {
    const WORDS: [(&str, Self); 12] = [
        ("http", Self::Http),
        ("http2", Self::Http2),
        ("grpc", Self::Grpc),
        ("grpc-web", Self::GrpcWeb),
        ("https", Self::Https),
        ("tls", Self::Tls),
        ("tcp", Self::Tcp),
        ("mongo", Self::Mongo),
        ("mysql", Self::Mysql),
        ("redis", Self::Redis),
        ("udp", Self::Udp),
        ("hbone", Self::Hbone),
    ];

    /// As an `appProtocol` of a Kubernetes port; `None` when it is found out by looking.
    pub fn app_protocol(self) -> Option<&'static str> {
        Self::WORDS.iter().find(|(_, known)| *known == self).map(|(word, _)| *word)
    }

    /// Whether requests name their host.
    pub const fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }

    /// Whether connections name their host in TLS.
    pub const fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }
}

/// Reads a ServiceEntry.
pub(crate) fn read(value: &Value, problems: &mut Problems) -> ServiceEntry {
    let (meta, mut spec) = fields::document(value, problems);
    let name = metadata::name(&meta, Scope::Namespaced, problems);
    let label = meta.labels.as_ref().and_then(|labels| labels.get(AUTO_ALLOCATE)).map(String::as_str);
    let resolution = spec.word("resolution", &RESOLUTIONS, problems).unwrap_or_default();
    let internal = spec
        .word("location", &[("MESH_EXTERNAL", false), ("MESH_INTERNAL", true)], problems)
        .unwrap_or_default();
    let selected = spec.has("workloadSelector");
    let labels = parts::selector(&mut spec, "workloadSelector", "labels", problems);
    let entry = ServiceEntry {
        name,
        created: metadata::created(&meta),
        hosts: hosts(&mut spec, problems),
        addresses: addresses(&mut spec, resolution, problems),
        ports: ports(&mut spec, problems),
        internal,
        resolution,
        endpoints: endpoints(&mut spec, problems),
        selector: selected.then_some(labels),
        export_to: parts::export_to(&mut spec, "exportTo", problems),
        subject_alt_names: spec
            .texts("subjectAltNames", problems)
            .into_iter()
            .map(|(_, text)| text.into())
            .collect(),
        auto_allocate: label != Some("false"),
        allocated: allocated(value),
    };
    spec.finish(problems);
    check(&entry, problems);
    entry
}

const RESOLUTIONS: [(&str, Resolution); 5] = [
    ("NONE", Resolution::None),
    ("STATIC", Resolution::Static),
    ("DNS", Resolution::Dns),
    ("DNS_ROUND_ROBIN", Resolution::DnsRoundRobin),
    ("DYNAMIC_DNS", Resolution::DynamicDns),
];

fn at_most(count: usize, max: usize, field: String, problems: &mut Problems) {
    if count > max {
        problems.error(field, format!("has {count} items, wanted at most {max}"));
    }
}

fn hosts(spec: &mut Object<'_>, problems: &mut Problems) -> Vec<Arc<str>> {
    let texts = spec.texts("hosts", problems);
    at_most(texts.len(), ITEMS_MAX, spec.at("hosts"), problems);
    if texts.is_empty() {
        problems.error(spec.at("hosts"), "is empty, wanted at least one host");
    }
    let mut hosts: Vec<Arc<str>> = Vec::with_capacity(texts.len());
    for (path, text) in texts {
        let host: Arc<str> = text.trim_end_matches('.').to_ascii_lowercase().into();
        if text == "*" {
            problems.error(path, "is \"*\", wanted a host name or *.example.com: not every host there is");
        } else if let Err(wanted) = host::check_pattern(text) {
            problems.error(path, format!("is {text:?}, wanted {wanted}"));
        } else if hosts.contains(&host) {
            problems.warning(path, format!("is {text:?} once more"));
        } else {
            if !host.contains('.') {
                let message = format!("is {text:?}, a name without a dot, which is taken as it is");
                problems.warning(path, message);
            }
            hosts.push(host);
        }
    }
    hosts
}

fn addresses(spec: &mut Object<'_>, resolution: Resolution, problems: &mut Problems) -> Vec<IpNet> {
    let texts = spec.texts("addresses", problems);
    at_most(texts.len(), ITEMS_MAX, spec.at("addresses"), problems);
    let mut nets = Vec::with_capacity(texts.len());
    for (path, text) in texts {
        let Some(net) = parts::net(text) else {
            let wanted = "wanted an address such as 10.0.0.1 or a network such as 10.0.0.0/8 or fd00::/64";
            problems.error(path, format!("is {text:?}, {wanted}"));
            continue;
        };
        let wide = !matches!(resolution, Resolution::None | Resolution::Static);
        if text.contains('/') && wide {
            let message = format!(
                "is {text:?}, a network, wanted addresses with resolution {}: networks go with NONE and STATIC",
                resolution.as_str()
            );
            problems.error(path, message);
        } else if !nets.contains(&net) {
            nets.push(net);
        }
    }
    nets
}

fn ports(spec: &mut Object<'_>, problems: &mut Problems) -> Vec<ServiceEntryPort> {
    let at_ports = spec.at("ports");
    let objects = spec.objects("ports", problems);
    at_most(objects.len(), ITEMS_MAX, at_ports.clone(), problems);
    if objects.is_empty() {
        problems.warning(at_ports, "is empty: nothing can be reached by this entry");
    }
    let mut ports: Vec<ServiceEntryPort> = Vec::with_capacity(objects.len());
    for mut object in objects {
        let (at_number, at_name) = (object.at("number"), object.at("name"));
        let written = object.has("number");
        let number = object.port("number", problems);
        if !written {
            problems.error(at_number.as_str(), "is missing, wanted a number from 1 to 65535");
        }
        let name = object.text("name", problems).unwrap_or_default();
        if name.is_empty() {
            problems.error(at_name.as_str(), "is missing");
        } else if !is_port_name(name) {
            let wanted = "wanted letters, digits and '-', at most 63";
            problems.error(at_name.as_str(), format!("is {name:?}, {wanted}"));
        }
        let protocol = protocol(&mut object, problems);
        let target = object.port("targetPort", problems);
        object.finish(problems);
        let Some(number) = number else { continue };
        if ports.iter().any(|known| known.number == number) {
            problems.error(at_number, format!("is {number}, which another port has already"));
        }
        if !name.is_empty() && ports.iter().any(|known| *known.name == *name) {
            problems.error(at_name, format!("is {name:?}, which another port has already"));
        }
        ports.push(ServiceEntryPort { name: name.into(), number, protocol, target });
    }
    ports
}

fn protocol(object: &mut Object<'_>, problems: &mut Problems) -> PortProtocol {
    let at = object.at("protocol");
    let Some(text) = object.text("protocol", problems) else { return PortProtocol::Unknown };
    let lower = text.to_ascii_lowercase();
    let found = PortProtocol::WORDS.iter().find(|(word, _)| *word == lower);
    if found.is_none() {
        let wanted = "wanted HTTP, HTTP2, GRPC, GRPC-WEB, HTTPS, TLS, TCP, MONGO, MYSQL, REDIS or UDP";
        problems.error(at, format!("is {text:?}, {wanted}"));
    }
    found.map_or(PortProtocol::Unknown, |(_, protocol)| *protocol)
}

fn endpoints(spec: &mut Object<'_>, problems: &mut Problems) -> Vec<WorkloadEndpoint> {
    let objects = spec.objects("endpoints", problems);
    at_most(objects.len(), ENDPOINTS_MAX, spec.at("endpoints"), problems);
    let read = |mut object: Object<'_>| {
        let endpoint = workload_entry::endpoint(&mut object, problems);
        object.finish(problems);
        endpoint
    };
    objects.into_iter().map(read).collect()
}

/// What fields must be to each other (S51, S52).
fn check(entry: &ServiceEntry, problems: &mut Problems) {
    let resolution = entry.resolution.as_str();
    if entry.selector.is_some() {
        if !entry.endpoints.is_empty() {
            problems
                .error("spec.workloadSelector", "is there beside spec.endpoints, wanted at most one of them");
        }
        if !entry.internal {
            problems.warning(
                "spec.workloadSelector",
                "selects workloads of the mesh, wanted location MESH_INTERNAL; they are reached without mutual TLS",
            );
        }
    }
    for (at, host) in entry.hosts.iter().enumerate().filter(|(_, host)| !host.starts_with('*')) {
        if entry.resolution == Resolution::DynamicDns {
            let message =
                format!("is {host:?}, wanted a wildcard such as *.example.com with resolution DYNAMIC_DNS");
            problems.error(format!("spec.hosts[{at}]"), message);
        }
    }
    match entry.resolution {
        Resolution::None => {
            if !entry.endpoints.is_empty() {
                problems.error(
                    "spec.endpoints",
                    "is there with resolution NONE, which goes where the client dialled; wanted STATIC or DNS",
                );
            }
            if entry.selector.is_some() {
                problems.warning(
                    "spec.workloadSelector",
                    "has no effect with resolution NONE, which goes where the client dialled; wanted STATIC",
                );
            }
            nothing_to_be_told_by(entry, problems);
        }
        Resolution::Static => {
            if entry.endpoints.is_empty() && entry.selector.is_none() {
                problems.warning(
                    "spec.endpoints",
                    "is empty, and there is no workloadSelector: nothing can be reached by this entry",
                );
            }
            for (at, endpoint) in entry.endpoints.iter().enumerate() {
                if let EndpointAddress::Name(name) = &endpoint.address {
                    problems.error(
                        format!("spec.endpoints[{at}].address"),
                        format!("is {name:?}, wanted an address with resolution STATIC; names go with DNS"),
                    );
                }
            }
        }
        Resolution::Dns | Resolution::DnsRoundRobin => {
            // A selector brings endpoints as much as a list does.
            if entry.endpoints.is_empty() && entry.selector.is_none() {
                for (at, host) in entry.hosts.iter().enumerate().filter(|(_, host)| host.starts_with('*')) {
                    let message = format!(
                        "is {host:?}, which cannot be resolved, wanted spec.endpoints or a full name with resolution {resolution}"
                    );
                    problems.error(format!("spec.hosts[{at}]"), message);
                }
            }
            if entry.resolution == Resolution::DnsRoundRobin && entry.endpoints.len() > 1 {
                let message = format!(
                    "has {} items, wanted at most one with resolution {resolution}",
                    entry.endpoints.len()
                );
                problems.error("spec.endpoints", message);
            }
            for (at, endpoint) in entry.endpoints.iter().enumerate() {
                if matches!(endpoint.address, EndpointAddress::Unix(_)) {
                    let message =
                        format!("is a unix socket, wanted a name or an address with resolution {resolution}");
                    problems.error(format!("spec.endpoints[{at}].address"), message);
                }
            }
        }
        Resolution::DynamicDns => {
            if entry.internal {
                problems.error(
                    "spec.location",
                    "is MESH_INTERNAL, wanted MESH_EXTERNAL with resolution DYNAMIC_DNS",
                );
            }
            if !entry.endpoints.is_empty() {
                problems.warning("spec.endpoints", "has no effect with resolution DYNAMIC_DNS");
            }
        }
    }
    endpoint_ports(entry, problems);
    several_hosts(entry, problems);
}

/// Without addresses and without names in its protocol nothing tells a port's connections from others (S52).
fn nothing_to_be_told_by(entry: &ServiceEntry, problems: &mut Problems) {
    let is_nameless = |protocol: PortProtocol| {
        matches!(
            protocol,
            PortProtocol::Tcp | PortProtocol::Mongo | PortProtocol::Mysql | PortProtocol::Redis
        )
    };
    for (at, port) in entry.ports.iter().enumerate() {
        if entry.addresses.is_empty() && is_nameless(port.protocol) {
            let message = "is of a protocol without host names, and there are no addresses: nothing tells its connections from others, \
                           so that they are as if this port were not here";
            problems.warning(format!("spec.ports[{at}]"), message.to_owned());
        }
    }
}

fn endpoint_ports(entry: &ServiceEntry, problems: &mut Problems) {
    for (at, endpoint) in entry.endpoints.iter().enumerate() {
        for name in endpoint.ports.keys() {
            if !entry.ports.iter().any(|port| port.name == *name) {
                let message = format!("is for port {name:?}, wanted one of the names in spec.ports");
                problems.error(format!("spec.endpoints[{at}].ports.{name}"), message);
            }
        }
    }
}

/// Of several hosts nothing tells which is meant when neither requests nor TLS name it.
fn several_hosts(entry: &ServiceEntry, problems: &mut Problems) {
    if entry.hosts.len() < 2 || entry.resolution == Resolution::None {
        return;
    }
    for (at, port) in entry.ports.iter().enumerate() {
        if !port.protocol.is_http() && !port.protocol.is_tls() {
            problems.error(
                format!("spec.ports[{at}].protocol"),
                "does not name hosts, wanted HTTP, HTTP2, GRPC, HTTPS or TLS where there are several of them",
            );
        }
    }
}

/// `status.addresses`: what is not an address is left out, it is nobody's mistake here.
fn allocated(value: &Value) -> Vec<(Arc<str>, IpAddr)> {
    let list = value.get("status").and_then(|status| status.get("addresses")).and_then(Value::as_array);
    let read = |item: &Value| {
        let addr = item.get("value")?.as_str()?.parse::<IpAddr>().ok()?;
        Some((item.get("host").and_then(Value::as_str).unwrap_or_default().into(), addr))
    };
    list.into_iter().flatten().filter_map(read).collect()
}

#[cfg(test)]
mod tests;
