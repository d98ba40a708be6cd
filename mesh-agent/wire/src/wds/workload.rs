//! Workloads: Istio's form for foreign clients, our facts inside for our agents; and what only a pod's node needs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use mesh_core::{
    balance::locality,
    id::WorkloadId,
    mode::{Mode, ModeSources, PortModes},
    policy::Scope,
    snapshot::{Endpoint, Mesh, Name, PodSettings, Protocol, Snapshot, Tunnel, Workload},
};

use super::{
    CLUSTER,
    endpoints::{Entry, Place},
    foreign, policy, service,
    value::{self, Located, Problem, each, text_at},
};
use crate::{
    hbone::canonical,
    proto::{
        nodemesh::{self, Owner},
        workload::{self, NetworkMode, TunnelProtocol, WorkloadStatus, WorkloadType},
    },
};

/// Trust domain that may be left out.
const TRUST_DOMAIN_IMPLIED: &str = "cluster.local";
/// Service account that may be left out.
const ACCOUNT_IMPLIED: &str = "default";

/// A decoded workload, before what other resources say about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    /// `None` when it is only an address that services have.
    pub(super) pod: Option<Pod>,
    /// Where it serves which services.
    pub(super) endpoints: Vec<Serving>,
}

/// A pod without the fields that policies and its node decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pod {
    /// Its `policies` are those named by the resource; its `policy_hash` is not computed.
    pub(super) workload: Workload,
    /// The named policies are all; else those of wider scope apply as well.
    pub(super) policies_are_all: bool,
}

/// One endpoint and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Serving {
    pub(super) service: ServiceRef,
    pub(super) port: PortRef,
    /// Its port is 0 when the service says the target.
    pub(super) endpoint: Endpoint,
}

/// A service as an endpoint names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum ServiceRef {
    /// By name: ours.
    Name(Name),
    /// By xDS name: istiod's.
    Resource(Arc<str>),
}

/// A service's port as an endpoint names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PortRef {
    /// Ours.
    Exact { name: Arc<str>, port: u16, protocol: Protocol },
    /// Istiod's: the number of a TCP port.
    Number(u16),
}

/// xDS name of a pod.
pub(super) fn resource_name(name: &Name) -> String {
    format!("{CLUSTER}//Pod/{}/{}", name.namespace, name.name)
}

/// xDS name of endpoints that are no known workload's.
pub(super) fn endpoint_resource_name(place: Place) -> String {
    match place {
        Place::Workload(id) => format!("{CLUSTER}//Endpoint/{id:?}"),
        Place::Address(addr) => format!("{CLUSTER}//Endpoint/{addr}"),
    }
}

/// Encodes a pod with the endpoints it carries; also the other names it can be asked for.
pub(super) fn encode(
    pod: &Workload,
    entries: &[Entry<'_>],
    snapshot: &Snapshot,
) -> (workload::Workload, Vec<String>) {
    let mesh = snapshot.mesh();
    let own = |addr: &&IpAddr| snapshot.workload_at(**addr).is_some_and(|owner| owner.id == pod.id);
    let mut addresses: Vec<IpAddr> = pod.addrs.iter().filter(own).copied().collect();
    addresses.sort_unstable();
    addresses.dedup();
    let is_on_host_network = pod.addrs.is_empty() && !pod.terminated;
    let aliases = addresses.iter().map(|addr| format!("/{addr}")).collect();
    if is_on_host_network {
        addresses.extend(entries.iter().map(|entry| entry.endpoint.addr).collect::<BTreeSet<_>>());
    }
    let (named, policies) = named_policies(pod, snapshot);
    let mut authorization_policies: Vec<String> = named.into_iter().map(policy::resource_name).collect();
    if let Some((name, _)) = foreign::of_modes(&pod.modes, mesh).filter(|_| pod.meshed) {
        authorization_policies.push(policy::resource_name(&name));
    }
    let facts = nodemesh::WorkloadFacts {
        id: pod.id.0,
        endpoint_only: false,
        addresses: pod.addrs.iter().copied().map(value::address_bytes).collect(),
        meshed: pod.meshed,
        ready: pod.ready,
        terminated: pod.terminated,
        hbone: pod.tunnel == Tunnel::Hbone,
        labels: texts_value(&pod.labels),
        modes: Some(modes_value(&pod.modes, &pod.mode_sources)),
        endpoints: endpoints_value(Place::Workload(pod.id), pod.addrs.first().copied(), entries),
        policies,
    };
    let is_ready = pod.ready && !pod.terminated;
    let canonical = canonical::Canonical::of(pod);
    let message = workload::Workload {
        uid: resource_name(&pod.name),
        name: pod.name.name.to_string(),
        namespace: pod.name.namespace.to_string(),
        services: foreign_services(entries, &addresses, is_ready, mesh),
        addresses: addresses.into_iter().map(value::address_bytes).collect(),
        tunnel_protocol: match pod.tunnel {
            Tunnel::Hbone if pod.meshed => TunnelProtocol::Hbone,
            Tunnel::Hbone | Tunnel::None => TunnelProtocol::None,
        }
        .into(),
        trust_domain: unless(TRUST_DOMAIN_IMPLIED, &pod.trust_domain),
        service_account: unless(ACCOUNT_IMPLIED, &pod.service_account),
        node: pod.node.to_string(),
        network: pod.place.network.to_string(),
        locality: locality_value(&pod.place),
        canonical_name: canonical.service.to_owned(),
        canonical_revision: canonical.revision.to_owned(),
        workload_type: WorkloadType::Pod.into(),
        workload_name: pod.name.name.to_string(),
        authorization_policies,
        status: if is_ready { WorkloadStatus::Healthy } else { WorkloadStatus::Unhealthy }.into(),
        cluster_id: CLUSTER.to_owned(),
        network_mode: if is_on_host_network { NetworkMode::HostNetwork } else { NetworkMode::Standard }
            .into(),
        extensions: vec![value::facts_value("WorkloadFacts", &facts)],
        ..Default::default()
    };
    (message, aliases)
}

/// Encodes endpoints that are no known workload's; `None` without any.
pub(super) fn encode_endpoints(
    place: Place,
    entries: &[Entry<'_>],
    mesh: &Mesh,
) -> Option<(workload::Workload, Vec<String>)> {
    let first = entries.first()?;
    let addresses: Vec<IpAddr> =
        entries.iter().map(|entry| entry.endpoint.addr).collect::<BTreeSet<_>>().into_iter().collect();
    let facts = nodemesh::WorkloadFacts {
        endpoint_only: true,
        endpoints: endpoints_value(place, None, entries),
        ..Default::default()
    };
    let uid = endpoint_resource_name(place);
    let aliases = match place {
        Place::Address(addr) => vec![format!("/{addr}")],
        // Its address may be another's.
        Place::Workload(_) => Vec::new(),
    };
    let message = workload::Workload {
        name: uid.clone(),
        uid,
        namespace: first.service.name.namespace.to_string(),
        services: foreign_services(entries, &addresses, true, mesh),
        addresses: addresses.into_iter().map(value::address_bytes).collect(),
        status: WorkloadStatus::Healthy.into(),
        cluster_id: CLUSTER.to_owned(),
        extensions: vec![value::facts_value("WorkloadFacts", &facts)],
        ..Default::default()
    };
    Some((message, aliases))
}

/// The policies to name: those with selectors, or all if scopes do not say which apply.
fn named_policies<'a>(
    pod: &'a Workload,
    snapshot: &Snapshot,
) -> (Vec<&'a Name>, Option<nodemesh::PolicyNames>) {
    let is_wide = |name: &&Name| snapshot.policy(name).is_some_and(|p| p.scope != Scope::Selector);
    let selected: Vec<&Name> = pod.policies.iter().filter(|name| !is_wide(name)).collect();
    let wide = snapshot.policies().filter(|policy| match policy.scope {
        Scope::Mesh => true,
        Scope::Namespace => policy.name.namespace == pod.name.namespace,
        Scope::Selector => false,
    });
    let implied: BTreeSet<&Name> = selected.iter().copied().chain(wide.map(|policy| &policy.name)).collect();
    if implied.into_iter().eq(&pod.policies) {
        return (selected, None);
    }
    let names = pod.policies.iter().map(value::name_value).collect();
    (selected, Some(nodemesh::PolicyNames { names }))
}

/// Istio's map of services: TCP ports of endpoints at these addresses, as far as the workload's readiness is theirs.
fn foreign_services(
    entries: &[Entry<'_>],
    addresses: &[IpAddr],
    is_ready: bool,
    mesh: &Mesh,
) -> BTreeMap<String, workload::PortList> {
    let mut services: BTreeMap<String, workload::PortList> = BTreeMap::new();
    for Entry { service, port, endpoint } in entries {
        let is_told = port.protocol == Protocol::Tcp
            && port.port != 0
            && service.external_name.is_none()
            && addresses.contains(&endpoint.addr)
            && (endpoint.ready || !is_ready);
        if is_told {
            let ports = &mut services.entry(service::resource_name(service, mesh)).or_default().ports;
            let told = workload::Port { service_port: port.port.into(), target_port: endpoint.port.into() };
            if !ports.contains(&told) {
                ports.push(told);
            }
        }
    }
    services
}

fn endpoints_value(
    place: Place,
    first: Option<IpAddr>,
    entries: &[Entry<'_>],
) -> Vec<nodemesh::ServiceEndpoints> {
    let mut services: Vec<nodemesh::ServiceEndpoints> = Vec::new();
    for Entry { service, port, endpoint } in entries {
        let (owner, owner_id) = match endpoint.workload {
            None => (Owner::Nobody, 0),
            Some(id) if place == Place::Workload(id) && first.is_some() => (Owner::This, 0),
            Some(id) => (Owner::Other, id.0),
        };
        let value = nodemesh::Endpoint {
            port_name: port.name.to_string(),
            port: port.port.into(),
            protocol: value::protocol_value(port.protocol),
            target_port: endpoint.port.into(),
            address: match first {
                Some(first) if first == endpoint.addr => Vec::new(),
                _ => value::address_bytes(endpoint.addr),
            },
            not_ready: !endpoint.ready,
            hostname: endpoint.hostname.as_deref().map(str::to_owned),
            owner: owner.into(),
            owner_id,
            traits: endpoint.traits.as_deref().map(service::traits_value),
        };
        let name = value::name_value(&service.name);
        match services.last_mut() {
            Some(last) if last.service.as_ref() == Some(&name) => last.endpoints.push(value),
            _ => services.push(nodemesh::ServiceEndpoints { service: Some(name), endpoints: vec![value] }),
        }
    }
    services
}

fn unless(implied: &str, text: &str) -> String {
    if text == implied { String::new() } else { text.to_owned() }
}

fn or(implied: &str, text: &str) -> String {
    if text.is_empty() { implied.to_owned() } else { text.to_owned() }
}

fn texts_value(texts: &BTreeMap<Arc<str>, Arc<str>>) -> BTreeMap<String, String> {
    texts.iter().map(|(key, text)| (key.to_string(), text.to_string())).collect()
}

fn mode_value(mode: Mode) -> i32 {
    match mode {
        Mode::Permissive => nodemesh::Mode::Permissive,
        Mode::Strict => nodemesh::Mode::Strict,
        Mode::Disable => nodemesh::Mode::Disable,
    }
    .into()
}

/// A mode; one that is not known here is the strictest.
fn mode(value: i32) -> Mode {
    match nodemesh::Mode::try_from(value) {
        Ok(nodemesh::Mode::Permissive) => Mode::Permissive,
        Ok(nodemesh::Mode::Disable) => Mode::Disable,
        Ok(nodemesh::Mode::Strict) | Err(_) => Mode::Strict,
    }
}

fn modes_value(modes: &PortModes, sources: &ModeSources) -> nodemesh::Modes {
    nodemesh::Modes {
        default: mode_value(modes.default),
        ports: modes.ports.iter().map(|(port, mode)| (u32::from(*port), mode_value(*mode))).collect(),
        default_source: sources.default.as_ref().map(value::name_value),
        ports_source: sources.ports.as_ref().map(value::name_value),
    }
}

fn decode_modes(modes: &nodemesh::Modes) -> Result<(PortModes, ModeSources), Located> {
    let ports: Vec<(&u32, &i32)> = modes.ports.iter().collect();
    let ports = each("modes.ports", &ports, |(port, value)| Ok((value::port(**port)?, mode(**value))))?;
    let source = |field: &str, name: &Option<nodemesh::Name>| {
        name.as_ref().map(value::name).transpose().map_err(|problem| Located::at(field, problem))
    };
    let sources = ModeSources {
        default: source("modes.default_source", &modes.default_source)?,
        ports: source("modes.ports_source", &modes.ports_source)?,
    };
    Ok((PortModes { default: mode(modes.default), ports }, sources))
}

/// Decodes a workload, ours or a foreign server's.
pub(super) fn decode(message: &workload::Workload) -> Result<Decoded, Located> {
    match value::facts::<nodemesh::WorkloadFacts>(&message.extensions)? {
        Some(facts) if facts.endpoint_only => {
            let endpoints = decode_endpoints(&facts, None).map_err(|e| e.within("facts"))?;
            Ok(Decoded { pod: None, endpoints })
        }
        Some(facts) => decode_facts(message, &facts),
        None => decode_foreign(message).map_err(|e| e.within("workload")),
    }
}

/// What Istio's fields say in both cases.
fn base(message: &workload::Workload) -> Result<Workload, Located> {
    let name =
        Name { namespace: text_at("namespace", &message.namespace)?, name: text_at("name", &message.name)? };
    Ok(Workload {
        trust_domain: text_at("trust_domain", &or(TRUST_DOMAIN_IMPLIED, &message.trust_domain))?,
        service_account: text_at("service_account", &or(ACCOUNT_IMPLIED, &message.service_account))?,
        node: text_at("node", &message.node)?,
        place: place(message)?,
        policies: selected_policies(message)?,
        policy_hash: 0,
        ..Workload::named(name)
    })
}

fn locality_value(place: &locality::Place) -> Option<workload::Locality> {
    let locality = workload::Locality {
        region: place.region.to_string(),
        zone: place.zone.to_string(),
        subzone: place.subzone.to_string(),
    };
    (locality != workload::Locality::default()).then_some(locality)
}

fn place(message: &workload::Workload) -> Result<locality::Place, Located> {
    let locality = message.locality.clone().unwrap_or_default();
    Ok(locality::Place {
        region: text_at("locality.region", &locality.region)?,
        zone: text_at("locality.zone", &locality.zone)?,
        subzone: text_at("locality.subzone", &locality.subzone)?,
        node: text_at("node", &message.node)?,
        network: text_at("network", &message.network)?,
    })
}

fn selected_policies(message: &workload::Workload) -> Result<Vec<Name>, Located> {
    let mut names: Vec<Name> = each("authorization_policies", &message.authorization_policies, |full| {
        let (namespace, name) = full.split_once('/').ok_or(Problem::Missing)?;
        Ok(Name { namespace: value::text(namespace)?, name: value::text(name)? })
    })?;
    names.retain(|name| !foreign::is_of_modes(name));
    Ok(names)
}

fn decode_facts(message: &workload::Workload, facts: &nodemesh::WorkloadFacts) -> Result<Decoded, Located> {
    let base = base(message).map_err(|e| e.within("workload"))?;
    let named = match &facts.policies {
        Some(all) => Some(each("policies", &all.names, value::name).map_err(|e| e.within("facts"))?),
        None => None,
    };
    let policies_are_all = named.is_some();
    let decode = || -> Result<Decoded, Located> {
        let (modes, mode_sources) = match &facts.modes {
            Some(modes) => decode_modes(modes)?,
            None => return Err(Located::at("modes", Problem::Missing)),
        };
        let labels: Vec<_> = facts.labels.iter().collect();
        let workload = Workload {
            id: WorkloadId(facts.id),
            addrs: each("addresses", &facts.addresses, |bytes| value::address(bytes))?,
            meshed: facts.meshed,
            ready: facts.ready,
            terminated: facts.terminated,
            labels: each("labels", &labels, |(key, text)| Ok((value::text(key)?, value::text(text)?)))?,
            modes,
            mode_sources,
            policies: named.unwrap_or_else(|| base.policies.clone()),
            tunnel: if facts.hbone { Tunnel::Hbone } else { Tunnel::None },
            ..base
        };
        let endpoints = decode_endpoints(facts, Some(&workload))?;
        Ok(Decoded { pod: Some(Pod { workload, policies_are_all }), endpoints })
    };
    decode().map_err(|e| e.within("facts"))
}

fn decode_endpoints(
    facts: &nodemesh::WorkloadFacts,
    pod: Option<&Workload>,
) -> Result<Vec<Serving>, Located> {
    let first = pod.and_then(|pod| pod.addrs.first().copied());
    let mut found = Vec::new();
    for (index, group) in value::bounded("endpoints", &facts.endpoints)?.iter().enumerate() {
        let at = |field: &str| format!("endpoints[{index}].{field}");
        let service = group.service.as_ref().ok_or(Problem::Missing).and_then(value::name);
        let service = ServiceRef::Name(service.map_err(|problem| Located::at(at("service"), problem))?);
        let decode = |endpoint: &nodemesh::Endpoint| -> Result<Serving, Problem> {
            let workload = match Owner::try_from(endpoint.owner) {
                Ok(Owner::This) => Some(pod.ok_or(Problem::Missing)?.id),
                Ok(Owner::Nobody) => None,
                Ok(Owner::Other) => Some(WorkloadId(endpoint.owner_id)),
                Err(_) => return Err(Problem::Unknown(endpoint.owner)),
            };
            let addr = match endpoint.address.as_slice() {
                [] => first.ok_or(Problem::Missing)?,
                bytes => value::address(bytes)?,
            };
            Ok(Serving {
                service: service.clone(),
                port: PortRef::Exact {
                    name: value::text(&endpoint.port_name)?,
                    port: value::port(endpoint.port)?,
                    protocol: value::protocol(endpoint.protocol)?,
                },
                endpoint: Endpoint {
                    addr,
                    port: value::port(endpoint.target_port)?,
                    workload,
                    ready: !endpoint.not_ready,
                    hostname: endpoint.hostname.as_deref().map(value::text).transpose()?,
                    traits: service::traits(endpoint.traits.as_ref())?,
                },
            })
        };
        found.extend(each::<_, _, Vec<_>>(&at("endpoints"), &group.endpoints, decode)?);
    }
    Ok(found)
}

/// A workload as istiod says it: in the mesh if it is reached by HBONE; what refuses plaintext are its policies.
fn decode_foreign(message: &workload::Workload) -> Result<Decoded, Located> {
    let base = base(message)?;
    let tunnel = match TunnelProtocol::try_from(message.tunnel_protocol) {
        Ok(TunnelProtocol::Hbone) => Tunnel::Hbone,
        Ok(TunnelProtocol::None) => Tunnel::None,
        // Plaintext instead of a tunnel that is not known here would be a way down.
        Err(_) => return Err(Located::at("tunnel_protocol", Problem::Unknown(message.tunnel_protocol))),
    };
    let is_on_host_network = message.network_mode == i32::from(NetworkMode::HostNetwork);
    let ready = message.status == i32::from(WorkloadStatus::Healthy);
    let addresses: Vec<IpAddr> = each("addresses", &message.addresses, |bytes| value::address(bytes))?;
    let id = WorkloadId::of_pod(&message.namespace, &message.name, &message.uid);
    let mut endpoints = Vec::new();
    for (resource, ports) in &message.services {
        let service = ServiceRef::Resource(text_at("services", resource)?);
        for port in value::bounded("services", &ports.ports)? {
            let at = |problem| Located::at(format_args!("services[{resource}]"), problem);
            let number = value::port(port.service_port).map_err(at)?;
            let target = value::port(port.target_port).map_err(at)?;
            endpoints.extend(addresses.iter().map(|addr| Serving {
                service: service.clone(),
                port: PortRef::Number(number),
                endpoint: Endpoint {
                    addr: *addr,
                    port: target,
                    workload: Some(id),
                    ready,
                    hostname: None,
                    traits: None,
                },
            }));
        }
        value::bounded("services", &endpoints)?;
    }
    let workload = Workload {
        id,
        addrs: if is_on_host_network { Vec::new() } else { addresses },
        meshed: tunnel == Tunnel::Hbone,
        ready,
        tunnel,
        ..base
    };
    Ok(Decoded { pod: Some(Pod { workload, policies_are_all: false }), endpoints })
}

/// What only the pod's node needs, if there is anything.
pub(super) fn encode_node_pod(pod: &Workload) -> Option<nodemesh::NodePod> {
    let nothing = Workload::named(pod.name.clone());
    let is_nothing = pod.netns.is_none()
        && pod.skipped.is_none()
        && pod.settings == nothing.settings
        && pod.probe_ports.is_empty()
        && pod.sidecar.is_none()
        && pod.named_ports.is_empty();
    let ports = |list: &BTreeSet<u16>| list.iter().map(|port| u32::from(*port)).collect();
    (!is_nothing).then(|| nodemesh::NodePod {
        namespace: pod.name.namespace.to_string(),
        name: pod.name.name.to_string(),
        netns: pod.netns.as_deref().map(str::to_owned),
        skipped: pod.skipped.as_deref().map(str::to_owned),
        settings: Some(nodemesh::PodSettings {
            outbound_fail_closed: pod.settings.outbound_fail_closed,
            exclude_inbound_ports: ports(&pod.settings.exclude_inbound_ports),
            exclude_outbound_ports: ports(&pod.settings.exclude_outbound_ports),
            exclude_outbound_cidrs: pod
                .settings
                .exclude_outbound_cidrs
                .iter()
                .map(policy::cidr_value)
                .collect(),
            dns_capture_off: pod.settings.dns_capture_off,
        }),
        probe_ports: ports(&pod.probe_ports),
        named_ports: pod
            .named_ports
            .iter()
            .map(|(name, port)| (name.to_string(), u32::from(*port)))
            .collect(),
        sidecar: pod.sidecar.as_ref().map(value::name_value),
    })
}

/// What a pod's node knows besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct NodePod {
    netns: Option<Arc<str>>,
    skipped: Option<Arc<str>>,
    settings: PodSettings,
    probe_ports: BTreeSet<u16>,
    named_ports: BTreeMap<Arc<str>, u16>,
    sidecar: Option<Name>,
}

impl NodePod {
    /// Decodes it.
    pub(super) fn decode(message: &nodemesh::NodePod) -> Result<Self, Located> {
        let optional =
            |field: &str, text: &Option<String>| text.as_deref().map(|text| text_at(field, text)).transpose();
        let settings = match &message.settings {
            None => PodSettings::default(),
            Some(s) => PodSettings {
                outbound_fail_closed: s.outbound_fail_closed,
                exclude_inbound_ports: value::ports(
                    "settings.exclude_inbound_ports",
                    &s.exclude_inbound_ports,
                )?,
                exclude_outbound_ports: value::ports(
                    "settings.exclude_outbound_ports",
                    &s.exclude_outbound_ports,
                )?,
                exclude_outbound_cidrs: each(
                    "settings.exclude_outbound_cidrs",
                    &s.exclude_outbound_cidrs,
                    |cidr| value::cidr(&cidr.address, cidr.length),
                )?,
                dns_capture_off: s.dns_capture_off,
            },
        };
        let named: Vec<_> = message.named_ports.iter().collect();
        Ok(Self {
            netns: optional("netns", &message.netns)?,
            skipped: optional("skipped", &message.skipped)?,
            settings,
            probe_ports: value::ports("probe_ports", &message.probe_ports)?,
            named_ports: each("named_ports", &named, |(name, port)| {
                Ok((value::text(name)?, value::port(**port)?))
            })?,
            sidecar: message
                .sidecar
                .as_ref()
                .map(value::name)
                .transpose()
                .map_err(|problem| Located::at("sidecar", problem))?,
        })
    }

    /// Adds it to a workload.
    pub(super) fn apply(&self, workload: &mut Workload) {
        workload.netns.clone_from(&self.netns);
        workload.skipped.clone_from(&self.skipped);
        workload.settings.clone_from(&self.settings);
        workload.probe_ports.clone_from(&self.probe_ports);
        workload.named_ports.clone_from(&self.named_ports);
        workload.sidecar.clone_from(&self.sidecar);
    }
}
