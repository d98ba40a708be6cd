//! Services.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use k8s_openapi::{api::core::v1, apimachinery::pkg::util::intstr::IntOrString};
use mesh_core::{
    route::defaults::Distribution,
    snapshot::{self, Protocol, ServicePort},
};

use super::{
    ExportTo, Labels,
    metadata::{self, Scope},
    parts,
};
use crate::problem::Problems;

/// A service before its endpoints are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Everything the service itself says; its ports have no endpoints yet.
    pub service: snapshot::Service,
    /// Where the endpoints listen: one for each of `service.ports`.
    pub targets: Vec<TargetPort>,
    /// Selects pods; empty when endpoints come from slices alone.
    pub selector: Labels,
    /// Who sees it, if it says so.
    pub export_to: Option<ExportTo>,
    /// Seconds since 1970, if known.
    pub created: Option<i64>,
}

const EXPORT_TO: &str = "networking.istio.io/exportTo";
const DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// The port of the pods behind a service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By the name of a container port.
    Named(Arc<str>),
}

/// Kubernetes' default of `sessionAffinityConfig.clientIP.timeoutSeconds`: three hours.
const AFFINITY_DEFAULT: Duration = Duration::from_secs(3 * 60 * 60);
/// Kubernetes' largest: a day.
const AFFINITY_MAX_S: i32 = 24 * 60 * 60;

/// Reads a service.
pub(crate) fn read(object: &v1::Service, problems: &mut Problems) -> Service {
    let name = metadata::name(&object.metadata, Scope::Namespaced, problems);
    if !name.name.is_empty() && !metadata::is_label(&name.name) {
        let found = &name.name;
        problems.error(
            "metadata.name",
            format!("is {found:?}, wanted lower-case letters, digits and '-', at most 63"),
        );
    }
    if object.spec.is_none() {
        problems.error("spec", "is missing");
    }
    let spec = object.spec.clone().unwrap_or_default();
    let mut service = snapshot::Service {
        affinity: affinity(&spec, problems),
        publish_not_ready: spec.publish_not_ready_addresses == Some(true),
        ..snapshot::Service::named(name)
    };
    match spec.type_.as_deref() {
        None | Some("" | "ClusterIP" | "NodePort" | "LoadBalancer") => {
            (service.vips, service.headless) = cluster_ips(&spec, problems);
            service.external_ips = external_ips(&spec, object.status.as_ref(), &service.vips, problems);
        }
        Some("ExternalName") => service.external_name = external_name(&spec, problems),
        Some(other) => problems.error(
            "spec.type",
            format!("is {other:?}, wanted \"ClusterIP\", \"NodePort\", \"LoadBalancer\" or \"ExternalName\""),
        ),
    }
    let targets = ports(&spec, &mut service, problems);
    let annotation = |key: &str| object.metadata.annotations.as_ref()?.get(key).map(String::as_str);
    let export_to = annotation(EXPORT_TO)
        .and_then(|text| parts::export_to_text(text, &format!("metadata.annotations.{EXPORT_TO}"), problems));
    // The annotation is for clusters whose API does not know the field.
    service.distribution = match annotation(DISTRIBUTION) {
        Some(text) => distribution(text, &format!("metadata.annotations.{DISTRIBUTION}"), problems),
        None => spec
            .traffic_distribution
            .as_deref()
            .and_then(|text| distribution(text, "spec.trafficDistribution", problems)),
    };
    Service {
        service,
        export_to,
        targets,
        selector: metadata::shared(spec.selector.iter().flatten()),
        created: metadata::created(&object.metadata),
    }
}

/// Which endpoints are preferred (B9).
pub(super) fn distribution(text: &str, field: &str, problems: &mut Problems) -> Option<Distribution> {
    match text {
        "PreferClose" | "PreferSameZone" => Some(Distribution::SameZone),
        "PreferSameNode" => Some(Distribution::SameNode),
        "" | "Any" => None,
        other => {
            // Kubernetes lets others have their own words.
            let message = format!(
                "is {other:?}, wanted \"PreferSameZone\", \"PreferSameNode\" or \"PreferClose\"; it has no effect"
            );
            problems.warning(field, message);
            None
        }
    }
}

/// `clusterIPs`, or `clusterIP` alone, and whether the service is headless.
fn cluster_ips(spec: &v1::ServiceSpec, problems: &mut Problems) -> (Vec<IpAddr>, bool) {
    let mut texts: Vec<(String, &str)> = Vec::new();
    if let Some(ip) = &spec.cluster_ip {
        texts.push(("spec.clusterIP".to_owned(), ip));
    }
    for (index, ip) in spec.cluster_ips.iter().flatten().enumerate() {
        texts.push((format!("spec.clusterIPs[{index}]"), ip));
    }
    let headless = texts.iter().any(|(_, text)| *text == "None");
    let mut addrs: Vec<IpAddr> = Vec::new();
    for (field, text) in texts.into_iter().filter(|(_, text)| !matches!(*text, "" | "None")) {
        if headless {
            problems.error(field, format!("is {text:?}, but the service is headless (\"None\") elsewhere"));
        } else if let Some(addr) = virtual_address(text, &field, problems)
            && !addrs.contains(&addr)
        {
            if addrs.iter().any(|known| known.is_ipv4() == addr.is_ipv4()) {
                problems.error(field, format!("is {text:?}, wanted at most one address per family"));
            }
            addrs.push(addr);
        }
    }
    (addrs, headless)
}

fn virtual_address(text: &str, field: &str, problems: &mut Problems) -> Option<IpAddr> {
    let addr = metadata::address(text, field, problems)?;
    if addr.is_loopback() || addr.is_unspecified() || addr.is_multicast() {
        problems.error(field, format!("is {text:?}, wanted an address others can dial"));
        return None;
    }
    Some(addr)
}

fn external_ips(
    spec: &v1::ServiceSpec,
    status: Option<&v1::ServiceStatus>,
    vips: &[IpAddr],
    problems: &mut Problems,
) -> Vec<IpAddr> {
    let mut addrs = BTreeSet::new();
    for (index, text) in spec.external_ips.iter().flatten().enumerate() {
        addrs.extend(virtual_address(text, &format!("spec.externalIPs[{index}]"), problems));
    }
    let ingress = status.and_then(|s| s.load_balancer.as_ref()).and_then(|lb| lb.ingress.as_ref());
    for (index, point) in ingress.into_iter().flatten().enumerate() {
        // "Proxy" means: let the balancer see the connection. Short-cutting it would skip what it does.
        if point.ip_mode.as_deref() == Some("Proxy") {
            continue;
        }
        if let Some(text) = &point.ip {
            let field = format!("status.loadBalancer.ingress[{index}].ip");
            addrs.extend(virtual_address(text, &field, problems));
        }
    }
    addrs.into_iter().filter(|addr| !vips.contains(addr)).collect()
}

fn external_name(spec: &v1::ServiceSpec, problems: &mut Problems) -> Option<Arc<str>> {
    let text = spec.external_name.as_deref().unwrap_or_default();
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if text.is_empty() {
        problems.error("spec.externalName", "is missing, and type ExternalName needs it");
    } else if name.parse::<IpAddr>().is_ok() {
        problems.error("spec.externalName", format!("is {text:?}, wanted a DNS name, not an address"));
    } else if !metadata::is_subdomain(&name.replace('_', "-")) {
        problems.error("spec.externalName", format!("is {text:?}, wanted a DNS name"));
    }
    Some(name.into())
}

fn affinity(spec: &v1::ServiceSpec, problems: &mut Problems) -> Option<Duration> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            problems.error("spec.sessionAffinity", format!("is {other:?}, wanted \"ClientIP\" or \"None\""));
            return None;
        }
    }
    let config = spec.session_affinity_config.as_ref().and_then(|c| c.client_ip.as_ref());
    let Some(seconds) = config.and_then(|c| c.timeout_seconds) else { return Some(AFFINITY_DEFAULT) };
    match u64::try_from(seconds) {
        Ok(known) if (1..=AFFINITY_MAX_S).contains(&seconds) => Some(Duration::from_secs(known)),
        _ => {
            problems.error(
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                format!("is {seconds}, wanted a number from 1 to {AFFINITY_MAX_S}"),
            );
            None
        }
    }
}

/// Adds the ports to `service` and returns their targets.
fn ports(
    spec: &v1::ServiceSpec,
    service: &mut snapshot::Service,
    problems: &mut Problems,
) -> Vec<TargetPort> {
    let declared = spec.ports.as_deref().unwrap_or_default();
    let mut targets = Vec::new();
    let mut names = BTreeSet::new();
    let mut frontends = BTreeSet::new();
    for (index, port) in declared.iter().enumerate() {
        let field = |part: &str| format!("spec.ports[{index}].{part}");
        let name = port.name.as_deref().unwrap_or_default();
        if name.is_empty() {
            if declared.len() > 1 {
                problems.error(field("name"), "is missing; every port of several needs a name");
            }
        } else if !metadata::is_label(name) {
            problems.error(
                field("name"),
                format!("is {name:?}, wanted lower-case letters, digits and '-', at most 63"),
            );
        } else if !names.insert(name) {
            problems.error(field("name"), format!("is {name:?}, which another port is called already"));
        }
        let number = metadata::port(port.port, &field("port"), problems);
        let protocol = metadata::protocol(port.protocol.as_deref(), &field("protocol"), problems);
        let target = target(port, number, &field("targetPort"), problems);
        let (Some(number), Some(protocol), Some(target)) = (number, protocol, target) else { continue };
        if !frontends.insert((number, protocol)) {
            let text = match protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
            };
            problems.error(field("port"), format!("is {number}/{text}, which another port has already"));
        }
        service.ports.push(ServicePort {
            name: name.into(),
            port: number,
            protocol,
            app_protocol: port.app_protocol.as_deref().map(Into::into),
            endpoints: Vec::new(),
        });
        targets.push(target);
    }
    if declared.is_empty() && service.external_name.is_none() {
        if service.headless {
            // DNS still answers with the pods; port 0 stands for "none in particular".
            let endpoints = Vec::new();
            let protocol = Protocol::Tcp;
            service.ports.push(ServicePort {
                name: "".into(),
                port: 0,
                protocol,
                app_protocol: None,
                endpoints,
            });
            targets.push(TargetPort::Number(0));
        } else {
            problems.error("spec.ports", "is empty; only a headless service can be without ports");
        }
    }
    targets
}

fn target(
    port: &v1::ServicePort,
    own: Option<u16>,
    field: &str,
    problems: &mut Problems,
) -> Option<TargetPort> {
    match &port.target_port {
        None => own.map(TargetPort::Number),
        // An API server that was given none writes none; a typed 0 means the same to Kubernetes.
        Some(IntOrString::Int(0)) => own.map(TargetPort::Number),
        Some(IntOrString::Int(number)) => metadata::port(*number, field, problems).map(TargetPort::Number),
        Some(IntOrString::String(name)) if metadata::is_port_name(name) => {
            Some(TargetPort::Named(name.as_str().into()))
        }
        Some(IntOrString::String(name)) => {
            let hint = if name.parse::<u16>().is_ok() { "; a number is written without quotes" } else { "" };
            problems.error(
                field,
                format!(
                    "is {name:?}, wanted a number or a port name: at most 15 lower-case letters, digits and '-', with a letter{hint}"
                ),
            );
            None
        }
    }
}
