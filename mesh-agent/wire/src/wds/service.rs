//! Services: Istio's form for foreign clients, our facts inside for our agents.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use mesh_core::{
    id::ServiceId,
    route::{defaults::Distribution, scope::Audience},
    snapshot::{
        DnsEndpoint, DnsResolution, Mesh, Name, Protocol, Resolution, Service, ServicePort, Snapshot, Traits,
    },
};

use super::{
    policy,
    value::{self, Located, Problem, each, text_at},
};
use crate::proto::{
    nodemesh,
    workload::{
        self,
        load_balancing::{self, Scope},
    },
};

/// Most ports of one service.
const PORTS_MAX: usize = 4096;
/// Most labels of one endpoint.
const LABELS_MAX: usize = 4096;

/// A decoded service, without endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    /// Its ports have no endpoints yet.
    pub(super) service: Service,
    /// Services that keep what this one claims as well.
    pub(super) yields_to: BTreeSet<Name>,
    /// Target ports where a workload names none, by port (foreign servers only).
    pub(super) targets: Vec<(u16, u16)>,
}

/// xDS name of a service.
pub(super) fn resource_name(service: &Service, mesh: &Mesh) -> String {
    format!("{}/{}", service.name.namespace, service.host(&mesh.cluster_domain))
}

/// Encodes a service; also the other names it can be asked for.
pub(super) fn encode(service: &Service, snapshot: &Snapshot) -> (workload::Service, Vec<String>) {
    let mesh = snapshot.mesh();
    let mut yields_to = BTreeSet::new();
    let mut addresses = Vec::new();
    for addr in service.frontend_addrs() {
        let mut has_any = service.ports.is_empty();
        for port in &service.ports {
            match snapshot.service_at(addr, port.port, port.protocol) {
                Some((owner, _)) if owner.name == service.name => has_any = true,
                Some((owner, _)) => drop(yields_to.insert(owner.name.clone())),
                None => {}
            }
        }
        if has_any && !addresses.contains(&addr) {
            addresses.push(addr);
        }
    }
    if let Some(host) = &service.hostname {
        let before = snapshot.services_declaring(host).iter().take_while(|name| **name != service.name);
        yields_to.extend(before.cloned());
    }
    // Of equal networks the first one's service counts.
    for net in &service.networks {
        let before = snapshot.networks().iter().take_while(|(_, name)| *name != service.name);
        yields_to.extend(before.filter(|(other, _)| other == net).map(|(_, name)| name.clone()));
    }
    let facts = nodemesh::ServiceFacts {
        id: service.id.0,
        vips: service.vips.iter().copied().map(value::address_bytes).collect(),
        external_addresses: service.external_ips.iter().copied().map(value::address_bytes).collect(),
        headless: service.headless,
        external_name: service.external_name.as_deref().map(str::to_owned),
        affinity: service
            .affinity
            .map(|d| nodemesh::Affinity { seconds: d.as_secs(), nanos: d.subsec_nanos() }),
        publish_not_ready: service.publish_not_ready,
        ports: service.ports.iter().map(port_value).collect(),
        yields_to: yields_to.iter().map(value::name_value).collect(),
        hostname: service.hostname.as_deref().map(str::to_owned),
        external: service.external,
        networks: service.networks.iter().map(policy::cidr_value).collect(),
        dialled: service.resolution == Resolution::Dialled,
        by_name: service.resolution == Resolution::ByName,
        dns: match &service.resolution {
            Resolution::Dns(dns) => Some(dns_value(dns)),
            Resolution::Listed | Resolution::Dialled | Resolution::ByName => None,
        },
        audience: audience_value(&service.audience),
        distribution: distribution_value(service.distribution).into(),
    };
    let network_address =
        |addr| workload::NetworkAddress { network: String::new(), address: value::address_bytes(addr) };
    let load_balancing = foreign_balancing(service);
    let tcp = service.ports.iter().filter(|port| port.protocol == Protocol::Tcp && port.port != 0);
    let message = workload::Service {
        name: service.name.name.to_string(),
        namespace: service.name.namespace.to_string(),
        // One that stands for another name must not answer for its own: clients forward what they do not know.
        hostname: match service.external_name {
            Some(_) => String::new(),
            None => service.host(&mesh.cluster_domain).into_owned(),
        },
        addresses: addresses.iter().copied().map(network_address).collect(),
        // Each workload names its own target port.
        ports: tcp.map(|port| workload::Port { service_port: port.port.into(), target_port: 0 }).collect(),
        subject_alt_names: service.subject_alt_names.iter().map(ToString::to_string).collect(),
        load_balancing,
        extensions: vec![value::facts_value("ServiceFacts", &facts)],
        ..Default::default()
    };
    (message, addresses.into_iter().map(|addr| format!("/{addr}")).collect())
}

/// The services that have a network which another has too.
pub(super) fn sharing_networks(snapshot: &Snapshot) -> BTreeSet<Name> {
    let mut by_network: HashMap<IpNet, Vec<&Name>> = HashMap::new();
    for (net, name) in snapshot.networks() {
        by_network.entry(*net).or_default().push(name);
    }
    by_network.into_values().filter(|names| names.len() > 1).flatten().cloned().collect()
}

fn dns_value(dns: &DnsResolution) -> nodemesh::DnsResolution {
    let name = |name: &DnsEndpoint| nodemesh::DnsEndpoint {
        host: name.host.to_string(),
        ports: name.ports.iter().map(|port| u32::from(*port)).collect(),
        traits: name.traits.as_deref().map(traits_value),
    };
    nodemesh::DnsResolution { one_at_a_time: dns.one_at_a_time, names: dns.names.iter().map(name).collect() }
}

fn decode_dns(dns: &nodemesh::DnsResolution) -> Result<DnsResolution, Located> {
    let name = |name: &nodemesh::DnsEndpoint| {
        if name.ports.len() > PORTS_MAX {
            return Err(Problem::TooMany(name.ports.len()));
        }
        Ok(DnsEndpoint {
            host: value::text(&name.host)?,
            ports: name.ports.iter().map(|port| value::port(*port)).collect::<Result<_, _>>()?,
            traits: traits(name.traits.as_ref())?,
        })
    };
    Ok(DnsResolution { one_at_a_time: dns.one_at_a_time, names: each("dns.names", &dns.names, name)? })
}

/// What is said of an endpoint, encoded.
pub(super) fn traits_value(traits: &Traits) -> nodemesh::Traits {
    nodemesh::Traits {
        labels: traits.labels.iter().map(|(key, text)| (key.to_string(), text.to_string())).collect(),
        locality: traits.locality.as_deref().map(str::to_owned),
        weight: traits.weight,
        network: traits.network.as_deref().map(str::to_owned),
        account: traits.account.as_deref().map(str::to_owned),
    }
}

/// What is said of an endpoint.
pub(super) fn traits(message: Option<&nodemesh::Traits>) -> Result<Option<Arc<Traits>>, Problem> {
    let Some(message) = message else { return Ok(None) };
    if message.labels.len() > LABELS_MAX {
        return Err(Problem::TooMany(message.labels.len()));
    }
    let labels = message.labels.iter().map(|(key, text)| Ok((value::text(key)?, value::text(text)?)));
    Ok(Some(Arc::new(Traits {
        labels: labels.collect::<Result<_, Problem>>()?,
        locality: message.locality.as_deref().map(value::text).transpose()?,
        weight: message.weight,
        network: message.network.as_deref().map(value::text).transpose()?,
        account: message.account.as_deref().map(value::text).transpose()?,
    })))
}

/// What Istio's own clients are told of the choice of an endpoint.
fn foreign_balancing(service: &Service) -> Option<workload::LoadBalancing> {
    let near = [Scope::Network, Scope::Region, Scope::Zone];
    let nearer = [Scope::Subzone, Scope::Node];
    let preference: Vec<Scope> = match service.distribution {
        None => Vec::new(),
        Some(Distribution::SameZone) => near.to_vec(),
        Some(Distribution::SameNode) => near.into_iter().chain(nearer).collect(),
    };
    let mode = if preference.is_empty() {
        load_balancing::Mode::UnspecifiedMode
    } else {
        load_balancing::Mode::Failover
    };
    let mut balancing = workload::LoadBalancing {
        routing_preference: preference.into_iter().map(Into::into).collect(),
        mode: mode.into(),
        ..Default::default()
    };
    if service.publish_not_ready {
        balancing.health_policy = load_balancing::HealthPolicy::AllowAll.into();
    }
    (balancing != workload::LoadBalancing::default()).then_some(balancing)
}

/// What a foreign server says of the choice of an endpoint, as far as it is a preference for near ones.
fn distribution_of_foreign(message: &workload::Service) -> Option<Distribution> {
    let balancing = message.load_balancing.as_ref()?;
    let prefers = |scope: Scope| balancing.routing_preference.contains(&scope.into());
    if balancing.mode != i32::from(load_balancing::Mode::Failover) {
        return None;
    }
    match (prefers(Scope::Node), prefers(Scope::Zone)) {
        (true, _) => Some(Distribution::SameNode),
        (false, true) => Some(Distribution::SameZone),
        (false, false) => None,
    }
}

fn audience_value(audience: &Audience) -> Option<nodemesh::Audience> {
    match audience {
        Audience::Everyone => None,
        Audience::Only(names) => {
            Some(nodemesh::Audience { namespaces: names.iter().map(|name| name.to_string()).collect() })
        }
    }
}

fn distribution_value(distribution: Option<Distribution>) -> nodemesh::Distribution {
    match distribution {
        None => nodemesh::Distribution::Any,
        Some(Distribution::SameZone) => nodemesh::Distribution::SameZone,
        Some(Distribution::SameNode) => nodemesh::Distribution::SameNode,
    }
}

fn distribution(value: i32) -> Option<Distribution> {
    match nodemesh::Distribution::try_from(value) {
        Ok(nodemesh::Distribution::SameZone) => Some(Distribution::SameZone),
        Ok(nodemesh::Distribution::SameNode) => Some(Distribution::SameNode),
        // A word that is not known here is no preference.
        Ok(nodemesh::Distribution::Any) | Err(_) => None,
    }
}

fn port_value(port: &ServicePort) -> nodemesh::ServicePort {
    nodemesh::ServicePort {
        name: port.name.to_string(),
        port: port.port.into(),
        protocol: value::protocol_value(port.protocol),
        app_protocol: port.app_protocol.as_deref().map(str::to_owned),
    }
}

/// Decodes a service, ours or a foreign server's.
pub(super) fn decode(message: &workload::Service) -> Result<Decoded, Located> {
    let namespace = text_at("service.namespace", &message.namespace)?;
    match value::facts::<nodemesh::ServiceFacts>(&message.extensions)? {
        Some(facts) => {
            let name = Name { namespace, name: text_at("service.name", &message.name)? };
            let mut decoded = decode_facts(name, &facts).map_err(|e| e.within("facts"))?;
            decoded.service.subject_alt_names =
                each("service.subject_alt_names", &message.subject_alt_names, |text| value::text(text))?;
            Ok(decoded)
        }
        None => decode_foreign(namespace, message).map_err(|e| e.within("service")),
    }
}

fn decode_facts(name: Name, facts: &nodemesh::ServiceFacts) -> Result<Decoded, Located> {
    let affinity = match &facts.affinity {
        Some(affinity) if affinity.nanos >= 1_000_000_000 => {
            return Err(Located::at("affinity.nanos", Problem::TooLarge(affinity.nanos as usize)));
        }
        affinity => affinity.as_ref().map(|a| Duration::new(a.seconds, a.nanos)),
    };
    let port = |port: &nodemesh::ServicePort| {
        Ok(ServicePort {
            name: value::text(&port.name)?,
            port: value::port(port.port)?,
            protocol: value::protocol(port.protocol)?,
            app_protocol: port.app_protocol.as_deref().map(value::text).transpose()?,
            endpoints: Vec::new(),
        })
    };
    let service = Service {
        id: ServiceId(facts.id),
        name,
        hostname: facts.hostname.as_deref().map(|host| text_at("hostname", host)).transpose()?,
        external: facts.external,
        vips: each("vips", &facts.vips, |bytes| value::address(bytes))?,
        networks: each("networks", &facts.networks, |net| value::cidr(&net.address, net.length))?,
        resolution: match &facts.dns {
            Some(dns) => Resolution::Dns(decode_dns(dns)?),
            None if facts.dialled => Resolution::Dialled,
            None if facts.by_name => Resolution::ByName,
            None => Resolution::Listed,
        },
        subject_alt_names: Vec::new(),
        external_ips: each("external_addresses", &facts.external_addresses, |bytes| value::address(bytes))?,
        headless: facts.headless,
        external_name: facts
            .external_name
            .as_deref()
            .map(|external| text_at("external_name", external))
            .transpose()?,
        affinity,
        publish_not_ready: facts.publish_not_ready,
        audience: match &facts.audience {
            None => Audience::Everyone,
            Some(only) => Audience::Only(each("audience", &only.namespaces, |name| value::text(name))?),
        },
        distribution: distribution(facts.distribution),
        ports: each("ports", few(&facts.ports)?, port)?,
    };
    let yields_to = each("yields_to", &facts.yields_to, value::name)?;
    Ok(Decoded { service, yields_to, targets: Vec::new() })
}

/// Ports of a service that are not too many: each is compared with each of its endpoints.
fn few<T>(ports: &[T]) -> Result<&[T], Located> {
    if ports.len() > PORTS_MAX {
        return Err(Located::at("ports", Problem::TooMany(ports.len())));
    }
    Ok(ports)
}

/// A service as istiod says it: TCP ports without names; without an address it is headless.
fn decode_foreign(namespace: Arc<str>, message: &workload::Service) -> Result<Decoded, Located> {
    let in_cluster = format!("{}.{}.svc.", message.name, message.namespace);
    // One ServiceEntry may have many hosts: only they tell its services apart.
    let is_own = message.hostname.is_empty() || message.hostname.starts_with(&in_cluster);
    let own_name = if is_own { &message.name } else { &message.hostname };
    let name = Name { namespace, name: text_at("name", own_name)? };
    let vips: Vec<_> = each("addresses", &message.addresses, |a| value::address(&a.address))?;
    let ports: Vec<(u16, u16)> =
        each("ports", &message.ports, |p| Ok((value::port(p.service_port)?, value::port(p.target_port)?)))?;
    let port = |(port, _): &(u16, u16)| ServicePort {
        name: "".into(),
        port: *port,
        protocol: Protocol::Tcp,
        app_protocol: None,
        endpoints: Vec::new(),
    };
    let publish_not_ready = message
        .load_balancing
        .as_ref()
        .is_some_and(|lb| lb.health_policy == i32::from(load_balancing::HealthPolicy::AllowAll));
    let service = Service {
        id: ServiceId::of_service(&name.namespace, &name.name),
        hostname: (!is_own).then(|| Arc::clone(&name.name)),
        subject_alt_names: each("subject_alt_names", &message.subject_alt_names, |text| value::text(text))?,
        headless: vips.is_empty(),
        vips,
        publish_not_ready,
        distribution: distribution_of_foreign(message),
        ports: ports.iter().map(port).collect(),
        ..Service::named(name)
    };
    Ok(Decoded { service, yields_to: BTreeSet::new(), targets: ports })
}
