//! Pods.
//!
//! Invariant: no annotation keeps a pod from being read. Nobody refuses a pod for one, and a pod that the controller does not know is one
//! that nobody can call; so what cannot be read is a warning, and counts as not said, or as the stricter of what could be meant.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use k8s_openapi::{
    api::core::v1::{self, Container, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use mesh_core::{
    id::WorkloadId,
    snapshot::{PodSettings, Protocol, Workload},
};

use super::{
    injected::{self, Injected},
    metadata::{self, Scope},
};
use crate::problem::Problems;

/// A pod before policy and its namespace are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Everything the pod itself says. `meshed`, `modes`, `policy_hash`, `sidecar` and what the node says of `place` are filled in by the
    /// compiler.
    pub workload: Workload,
    /// Whether it is in the mesh, if it says so itself.
    pub opt_in: Option<bool>,
    /// Shares its node's network, and so can never be enrolled.
    pub host_network: bool,
    /// Another mesh's proxy in it.
    pub sidecar: Option<Injected>,
    /// `nodemesh.dev/tunnel: none`: other nodes reach it in plaintext only, as its modes allow.
    pub tunnel_off: bool,
    /// Addresses behind services; also those of a host-network pod.
    pub addrs: Vec<IpAddr>,
    /// Declared ports, for named target ports.
    pub ports: Vec<ContainerPort>,
    /// `spec.hostname` and `spec.subdomain`: its name below a headless service of that name.
    pub hostname: Option<(Arc<str>, Arc<str>)>,
}

/// A declared port of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Name.
    pub name: Arc<str>,
    /// Number.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
}

/// Where the network namespace is, in file mode.
const NETNS: &str = "nodemesh.dev/netns";
const FAIL_CLOSED: &str = "nodemesh.dev/fail-closed";
const TUNNEL: &str = "nodemesh.dev/tunnel";
const DNS_CAPTURE: &str = "nodemesh.dev/dns-capture";
const DNS_CAPTURE_ISTIO: &str = "ambient.istio.io/dns-capture";
const EXCLUDE_INBOUND_PORTS: [&str; 2] =
    ["nodemesh.dev/exclude-inbound-ports", "traffic.sidecar.istio.io/excludeInboundPorts"];
const EXCLUDE_OUTBOUND_PORTS: [&str; 2] =
    ["nodemesh.dev/exclude-outbound-ports", "traffic.sidecar.istio.io/excludeOutboundPorts"];
const EXCLUDE_OUTBOUND_CIDRS: [&str; 2] =
    ["nodemesh.dev/exclude-outbound-cidrs", "traffic.sidecar.istio.io/excludeOutboundIPRanges"];

/// Reads a pod.
pub(crate) fn read(object: &v1::Pod, problems: &mut Problems) -> Pod {
    let name = metadata::name(&object.metadata, Scope::Namespaced, problems);
    if object.spec.is_none() {
        problems.error("spec", "is missing");
    }
    let spec = object.spec.clone().unwrap_or_default();
    let host_network = spec.host_network == Some(true);
    let addrs = addresses(object.status.as_ref(), problems);
    let (ports, probe_ports) = container_ports(&spec, problems);
    let annotation = |key: &str| object.metadata.annotations.as_ref()?.get(key).map(String::as_str);

    let netns = annotation(NETNS).filter(|path| {
        let is_absolute = path.starts_with('/');
        if !is_absolute {
            let message = format!("is {path:?}, wanted an absolute path; it has no effect");
            problems.warning(annotation_field(NETNS), message);
        }
        is_absolute
    });
    let opt_in = metadata::opt_in(&object.metadata, problems);
    let mut named_ports = BTreeMap::new();
    for port in ports.iter().filter(|port| !port.name.is_empty()) {
        named_ports.entry(Arc::clone(&port.name)).or_insert(port.port);
    }
    let uid = object.metadata.uid.as_deref().unwrap_or_default();
    let account =
        spec.service_account_name.as_deref().or(spec.service_account.as_deref()).unwrap_or_default();
    // It becomes part of an identity.
    if !account.is_empty() && !metadata::is_subdomain(account) {
        problems.error(
            "spec.serviceAccountName",
            format!("is {account:?}, wanted lower-case letters, digits, '-' and '.', at most 253"),
        );
    }
    let labels = metadata::labels(&object.metadata);
    let workload = Workload {
        id: WorkloadId::of_pod(&name.namespace, &name.name, uid),
        service_account: if account.is_empty() { "default" } else { account }.into(),
        node: spec.node_name.as_deref().unwrap_or_default().into(),
        // The node's address belongs to no pod.
        addrs: if host_network { Vec::new() } else { addrs.clone() },
        ready: is_ready(object),
        terminated: is_terminated(object),
        netns: netns.map(Arc::from),
        place: super::node::place_of_pod(&labels),
        labels,
        named_ports,
        settings: settings(&annotation, problems),
        probe_ports,
        ..Workload::named(name)
    };
    let hostname = match (spec.hostname.as_deref(), spec.subdomain.as_deref()) {
        (Some(host), Some(subdomain)) if !host.is_empty() => Some((host.into(), subdomain.into())),
        _ => None,
    };
    let tunnel_off = match annotation(TUNNEL) {
        None | Some("hbone") => false,
        Some("none") => true,
        Some(other) => {
            let wanted = "wanted \"hbone\" or \"none\"; it has no effect";
            problems.warning(annotation_field(TUNNEL), format!("is {other:?}, {wanted}"));
            false
        }
    };
    let is_marked = |key: &str| {
        let texts = [&object.metadata.labels, &object.metadata.annotations];
        texts.into_iter().flatten().any(|texts| texts.contains_key(key))
    };
    let sidecar = injected::find(long_lived(&spec).map(|(_, container)| container.name.as_str()), is_marked);
    Pod { workload, opt_in, host_network, sidecar, tunnel_off, addrs, ports, hostname }
}

impl Pod {
    /// Whether it is in the mesh, in a namespace that is opted in or not; and why not, if it asks to be and cannot.
    pub(crate) fn membership(&self, namespace_opted_in: bool) -> (bool, Option<Arc<str>>) {
        if !self.opt_in.unwrap_or(namespace_opted_in) {
            return (false, None);
        }
        let obstacle: Option<Arc<str>> = match &self.sidecar {
            _ if self.host_network => Some("it runs on the host network".into()),
            Some(sidecar) => Some(format!("it has {sidecar}").into()),
            None => None,
        };
        (obstacle.is_none(), obstacle)
    }
}

fn annotation_field(key: &str) -> String {
    format!("metadata.annotations.{key}")
}

/// `status.podIPs`, or `podIP` alone: the first of each family.
fn addresses(status: Option<&v1::PodStatus>, problems: &mut Problems) -> Vec<IpAddr> {
    let Some(status) = status else { return Vec::new() };
    let mut texts: Vec<(String, &str)> = Vec::new();
    if let Some(ip) = &status.pod_ip {
        texts.push(("status.podIP".to_owned(), ip));
    }
    for (index, ip) in status.pod_ips.iter().flatten().enumerate() {
        texts.push((format!("status.podIPs[{index}].ip"), &ip.ip));
    }
    let mut addrs: Vec<IpAddr> = Vec::new();
    for (field, text) in texts {
        // An API server sends an empty podIP while there is none.
        if text.is_empty() {
            continue;
        }
        let Some(addr) = metadata::address(text, &field, problems) else { continue };
        if addr.is_loopback() || addr.is_unspecified() || addr.is_multicast() {
            problems.error(field, format!("is {text:?}, wanted an address others can reach"));
            continue;
        }
        match addrs.iter().find(|known| known.is_ipv4() == addr.is_ipv4()) {
            None => addrs.push(addr),
            Some(known) if *known == addr => {}
            Some(known) => {
                problems.error(
                    field,
                    format!("is {text:?}, but {known} is there already: one address per family"),
                );
            }
        }
    }
    addrs
}

/// Containers that live as long as the pod: sidecars among the init containers too.
fn long_lived(spec: &v1::PodSpec) -> impl Iterator<Item = (String, &Container)> {
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .enumerate()
        .filter(|(_, c)| c.restart_policy.as_deref() == Some("Always"))
        .map(|(index, c)| (format!("spec.initContainers[{index}]"), c));
    let containers =
        spec.containers.iter().enumerate().map(|(index, c)| (format!("spec.containers[{index}]"), c));
    containers.chain(sidecars)
}

fn container_ports(spec: &v1::PodSpec, problems: &mut Problems) -> (Vec<ContainerPort>, BTreeSet<u16>) {
    let mut ports: Vec<ContainerPort> = Vec::new();
    let mut probe_ports = BTreeSet::new();
    for (path, container) in long_lived(spec) {
        let first_own = ports.len();
        for (index, declared) in container.ports.iter().flatten().enumerate() {
            let field = |part: &str| format!("{path}.ports[{index}].{part}");
            let name = declared.name.as_deref().unwrap_or_default();
            if !name.is_empty() && !metadata::is_port_name(name) {
                problems.error(
                    field("name"),
                    format!(
                        "is {name:?}, wanted at most 15 lower-case letters, digits and '-', with a letter"
                    ),
                );
            }
            let number = metadata::port(declared.container_port, &field("containerPort"), problems);
            let protocol = metadata::protocol(declared.protocol.as_deref(), &field("protocol"), problems);
            if let (Some(port), Some(protocol)) = (number, protocol) {
                ports.push(ContainerPort { name: name.into(), port, protocol });
            }
        }
        let own = &ports[first_own..];
        let probes = [
            ("livenessProbe", &container.liveness_probe),
            ("readinessProbe", &container.readiness_probe),
            ("startupProbe", &container.startup_probe),
        ];
        for (kind, probe) in probes.into_iter().filter_map(|(kind, probe)| Some((kind, probe.as_ref()?))) {
            probe_ports.extend(probe_port(probe, &format!("{path}.{kind}"), own, problems));
        }
    }
    (ports, probe_ports)
}

fn probe_port(probe: &Probe, path: &str, own: &[ContainerPort], problems: &mut Problems) -> Option<u16> {
    let named = |port: &IntOrString, field: String, problems: &mut Problems| match port {
        IntOrString::Int(number) => metadata::port(*number, &field, problems),
        IntOrString::String(name) => {
            let number = name.parse().ok().filter(|number| *number != 0);
            let found = number.or_else(|| own.iter().find(|p| *p.name == **name).map(|p| p.port));
            if found.is_none() {
                problems.warning(field, format!("is {name:?}, which no port of this container is called"));
            }
            found
        }
    };
    // A probe of another host leaves the pod; it needs no way in.
    if let Some(http) =
        probe.http_get.as_ref().filter(|http| http.host.as_deref().unwrap_or_default().is_empty())
    {
        return named(&http.port, format!("{path}.httpGet.port"), problems);
    }
    if let Some(tcp) =
        probe.tcp_socket.as_ref().filter(|tcp| tcp.host.as_deref().unwrap_or_default().is_empty())
    {
        return named(&tcp.port, format!("{path}.tcpSocket.port"), problems);
    }
    metadata::port(probe.grpc.as_ref()?.port, &format!("{path}.grpc.port"), problems)
}

/// Whether nothing of it runs any more. One that is being deleted still does, for as long as its grace period: it finishes what is under
/// way, calls others, and is called by those who have not heard of it; all of that as the pod that it was.
fn is_terminated(object: &v1::Pod) -> bool {
    let phase = object.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The Ready condition; without conditions (hand-written manifests) a pod is ready once it runs. One that is being deleted is not, as for
/// Kubernetes' own endpoints.
fn is_ready(object: &v1::Pod) -> bool {
    if object.metadata.deletion_timestamp.is_some() {
        return false;
    }
    let Some(status) = &object.status else { return true };
    match status.conditions.as_deref().unwrap_or_default() {
        [] => matches!(status.phase.as_deref(), None | Some("" | "Running")),
        conditions => conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True"),
    }
}

fn settings<'a>(annotation: &impl Fn(&str) -> Option<&'a str>, problems: &mut Problems) -> PodSettings {
    let first = |keys: [&'static str; 2]| {
        keys.into_iter().find_map(|key| Some((annotation_field(key), annotation(key)?)))
    };
    let mut ports = |keys| {
        first(keys).map_or_else(BTreeSet::new, |(field, text)| metadata::port_list(text, &field, problems))
    };
    let exclude_inbound_ports = ports(EXCLUDE_INBOUND_PORTS);
    let exclude_outbound_ports = ports(EXCLUDE_OUTBOUND_PORTS);
    let exclude_outbound_cidrs =
        first(EXCLUDE_OUTBOUND_CIDRS).map_or_else(Vec::new, |(field, text)| networks(text, &field, problems));
    let outbound_fail_closed = match annotation(FAIL_CLOSED) {
        None | Some("" | "none") => false,
        Some("outbound") => true,
        Some(other) => {
            // Whoever writes it wants more protection than others have.
            problems.warning(
                annotation_field(FAIL_CLOSED),
                format!("is {other:?}, wanted \"outbound\" or \"none\"; it counts as \"outbound\""),
            );
            true
        }
    };
    let capture = [DNS_CAPTURE, DNS_CAPTURE_ISTIO].into_iter().find_map(|key| Some((key, annotation(key)?)));
    let dns_capture_off = match capture {
        None | Some((_, "true")) => false,
        Some((_, "false")) => true,
        Some((key, other)) => {
            let wanted = "wanted \"true\" or \"false\"; it has no effect";
            problems.warning(annotation_field(key), format!("is {other:?}, {wanted}"));
            false
        }
    };
    PodSettings {
        outbound_fail_closed,
        exclude_inbound_ports,
        exclude_outbound_ports,
        exclude_outbound_cidrs,
        dns_capture_off,
    }
}

fn networks(text: &str, field: &str, problems: &mut Problems) -> Vec<IpNet> {
    let mut networks = BTreeSet::new();
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let network = item.parse::<IpNet>().or_else(|_| item.parse::<IpAddr>().map(IpNet::from));
        match network {
            Ok(network) => {
                networks.insert(network.trunc());
            }
            Err(_) => problems.warning(
                field,
                format!(
                    "holds {item:?}, which has no effect: wanted networks like 10.0.0.0/8 with commas between"
                ),
            ),
        }
    }
    networks.into_iter().collect()
}
