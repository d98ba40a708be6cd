//! ServiceEntries become services: one for each host, called by namespace and host.
//!
//! Invariants:
//! - What a host is depends on the resources alone. An address that was given away stays with its host as long as its entry does not
//!   change, unless one that is older, or of equal age and comes first by name, wants the very same one.
//! - A Kubernetes service keeps its name: an entry of that host only adds to it (S53).
//!
//! Not here: which of several namespaces' services of one host a client means (`mesh_core::snapshot`).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use mesh_core::{
    id::{ServiceId, WorkloadId, hash},
    snapshot::{self, DnsEndpoint, DnsResolution, Endpoint, Mesh, Name, Resolution, ServicePort, Traits},
};

use super::endpoints::Sources;
use crate::{
    index::{Index, Origin, located},
    problem::{Level, SourceError},
    resource::{
        EndpointAddress, Key, Kind, Resolution as ServiceEntryResolution, Resource, ServiceEntry,
        ServiceEntryPort, WorkloadEndpoint, WorkloadEntry,
    },
};

/// Addresses are given from 240.240.0.0/16, but for those that end with 0 or 255 (B4).
const V4_NETWORK: [u8; 2] = [240, 240];
const V4_ADDRESSES: u64 = 256 * 254;
/// And from 2001:2::/48, by the same number.
const V6_NETWORK: [u16; 3] = [0x2001, 2, 0];

/// What the hosts of one ServiceEntry are to the mesh.
type Fates = BTreeMap<Arc<str>, Fate>;

/// What a host of a ServiceEntry is to the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// A service of its own, with addresses if it was given any.
    Own(Vec<IpAddr>),
    /// Another name for this Kubernetes service, which it adds to.
    Kubernetes(Name),
    /// What an older entry of the namespace is already.
    Taken(Name),
}

/// What is to be known of all ServiceEntries before a namespace is compiled.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Entries {
    fates: BTreeMap<Name, Fates>,
    /// Names that servers may show, by the Kubernetes service that entries say them of.
    subject_alt_names: BTreeMap<Name, Vec<Arc<str>>>,
}

impl Entries {
    /// Of everything in the index.
    pub(super) fn of(index: &Index, mesh: &Mesh) -> Self {
        let mut all: Vec<&ServiceEntry> = index.service_entries_of_all().map(|(_, entry)| entry).collect();
        // The order of all resources of Istio's (S6).
        all.sort_by_key(|entry| (entry.created, &entry.name.name, &entry.name.namespace));
        let mut entries = Self::default();
        let mut owners: BTreeMap<(&str, &str), &Name> = BTreeMap::new();
        // What is written down somewhere is nobody else's.
        let mut taken: HashSet<IpAddr> = HashSet::new();
        for entry in &all {
            taken.extend(entry.addresses.iter().map(ipnet::IpNet::addr));
            taken.extend(entry.allocated.iter().map(|(_, addr)| *addr));
        }
        for entry in all {
            let mut fates = Fates::new();
            for host in &entry.hosts {
                let fate = if let Some(name) = kubernetes(index, mesh, &entry.name.namespace, host) {
                    let names = entries.subject_alt_names.entry(name.clone()).or_default();
                    names.extend(entry.subject_alt_names.iter().cloned());
                    Fate::Kubernetes(name)
                } else if let Some(owner) = owners.get(&(&*entry.name.namespace, &**host)) {
                    Fate::Taken((*owner).clone())
                } else {
                    owners.insert((&entry.name.namespace, host), &entry.name);
                    Fate::Own(addresses(entry, host, &mut taken))
                };
                fates.insert(Arc::clone(host), fate);
            }
            entries.fates.insert(entry.name.clone(), fates);
        }
        entries.subject_alt_names.retain(|_, names| !names.is_empty());
        entries
    }

    /// Namespaces in which something is another than in `other`.
    pub(super) fn differing(&self, other: &Self) -> BTreeSet<Arc<str>> {
        fn keys<'a, V: PartialEq>(
            one: &'a BTreeMap<Name, V>,
            other: &'a BTreeMap<Name, V>,
        ) -> impl Iterator<Item = &'a Name> {
            let of = |a: &'a BTreeMap<Name, V>, b: &'a BTreeMap<Name, V>| {
                a.iter().filter(|(name, value)| b.get(*name) != Some(*value)).map(|(name, _)| name)
            };
            of(one, other).chain(of(other, one))
        }
        keys(&self.fates, &other.fates)
            .chain(keys(&self.subject_alt_names, &other.subject_alt_names))
            .map(|name| Arc::clone(&name.namespace))
            .collect()
    }

    /// Names that servers of a Kubernetes service may show.
    pub(super) fn subject_alt_names(&self, service: &Name) -> &[Arc<str>] {
        self.subject_alt_names.get(service).map_or(&[], Vec::as_slice)
    }

    /// The services that an entry makes, and what is wrong with it between resources.
    pub(super) fn services(
        &self,
        entry: &ServiceEntry,
        origin: &Origin,
        sources: &Sources<'_>,
        problems: &mut Vec<SourceError>,
    ) -> Vec<snapshot::Service> {
        let key = Key { kind: Kind::ServiceEntry, name: entry.name.clone() };
        let mut warn = |field: String, message: String| {
            problems.push(located(&key, origin, Level::Warning, &field, message));
        };
        let mut services = Vec::new();
        for (at, host) in entry.hosts.iter().enumerate() {
            match self.fates.get(&entry.name).and_then(|fates| fates.get(host)) {
                Some(Fate::Own(vips)) => services.push(service(entry, host, vips, sources)),
                Some(Fate::Kubernetes(name)) => warn(
                    format!("spec.hosts[{at}]"),
                    format!(
                        "is {host}, which Service {name} has: of this entry only spec.subjectAltNames count for it"
                    ),
                ),
                Some(Fate::Taken(name)) => warn(
                    format!("spec.hosts[{at}]"),
                    format!("is {host}, which ServiceEntry {name} has already; that one keeps it"),
                ),
                None => {}
            }
        }
        for (at, net) in entry.addresses.iter().enumerate().filter(|(_, net)| !is_single(net)) {
            let message = format!("is {net}, a network: DNS does not answer with it");
            warn(format!("spec.addresses[{at}]"), message);
        }
        for workload in selected(entry, sources) {
            let is_resolved = is_dns(entry.resolution);
            match &workload.endpoint.address {
                EndpointAddress::Name(text) if !is_resolved => warn(
                    "spec.workloadSelector".to_owned(),
                    format!(
                        "selects WorkloadEntry {}, which is {text:?}: names go with resolution DNS",
                        workload.name
                    ),
                ),
                _ => {}
            }
        }
        services
    }
}

/// The Kubernetes service that has a host, by its full name or by the short one that services of a namespace are called by.
fn kubernetes(index: &Index, mesh: &Mesh, own_namespace: &str, host: &str) -> Option<Name> {
    let full = host.strip_suffix(&*mesh.cluster_domain).and_then(|rest| rest.strip_suffix(".svc."));
    let name = match full.and_then(|rest| rest.split_once('.')) {
        Some((name, namespace)) => Name::new(namespace, name),
        None if !host.contains('.') => Name::new(own_namespace, host),
        None => return None,
    };
    let key = Key { kind: Kind::Service, name };
    index.origin(&key).is_some().then_some(key.name)
}

/// The addresses that lead to a host: those that are written, those that Istio has given it, else one of each family of our own (B4).
fn addresses(entry: &ServiceEntry, host: &Arc<str>, taken: &mut HashSet<IpAddr>) -> Vec<IpAddr> {
    let mut vips: Vec<IpAddr> =
        entry.addresses.iter().filter(|net| is_single(net)).map(ipnet::IpNet::addr).collect();
    vips.dedup();
    let keeps_dialled =
        matches!(entry.resolution, ServiceEntryResolution::None | ServiceEntryResolution::DynamicDns);
    if !entry.addresses.is_empty() || keeps_dialled || host.starts_with('*') || !entry.auto_allocate {
        return vips;
    }
    // One of no host is for all of them, as Istio's first version had it.
    let given = entry.allocated.iter().filter(|(of, _)| of.is_empty() || of == host).map(|(_, addr)| *addr);
    vips.extend(given);
    if vips.is_empty() {
        vips = allocate(&entry.name.namespace, host, taken);
    }
    vips
}

/// The first free addresses of a host, beginning at a place that depends on its name alone.
fn allocate(namespace: &str, host: &str, taken: &mut HashSet<IpAddr>) -> Vec<IpAddr> {
    let first = hash(&["vip", namespace, host]) % V4_ADDRESSES;
    for step in 0..V4_ADDRESSES {
        let number = (first + step) % V4_ADDRESSES;
        // In range: the number is below 256 × 254.
        let (third, fourth) = ((number / 254) as u8, (number % 254 + 1) as u8);
        let v4 = IpAddr::V4(Ipv4Addr::new(V4_NETWORK[0], V4_NETWORK[1], third, fourth));
        let [a, b, c] = V6_NETWORK;
        let v6 = IpAddr::V6(Ipv6Addr::new(a, b, c, 0, 0, 0, u16::from(third), u16::from(fourth)));
        if !taken.contains(&v4) && !taken.contains(&v6) {
            taken.extend([v4, v6]);
            return vec![v4, v6];
        }
    }
    Vec::new()
}

fn is_single(net: &ipnet::IpNet) -> bool {
    net.prefix_len() == net.max_prefix_len()
}

const fn is_dns(resolution: ServiceEntryResolution) -> bool {
    matches!(resolution, ServiceEntryResolution::Dns | ServiceEntryResolution::DnsRoundRobin)
}

/// The WorkloadEntries that an entry selects.
fn selected<'a>(entry: &ServiceEntry, sources: &Sources<'a>) -> Vec<&'a WorkloadEntry> {
    let selector = entry.selector.as_ref().filter(|selector| !selector.is_empty());
    selector.map(|selector| sources.workload_entries(selector)).unwrap_or_default()
}

fn service(
    entry: &ServiceEntry,
    host: &Arc<str>,
    vips: &[IpAddr],
    sources: &Sources<'_>,
) -> snapshot::Service {
    let name = Name::new(Arc::clone(&entry.name.namespace), Arc::clone(host));
    let mut ports: Vec<ServicePort> = entry.ports.iter().map(ServiceEntryPort::of_service).collect();
    let mut names = Vec::new();
    let mut add =
        |ports: &mut Vec<ServicePort>, endpoint: &WorkloadEndpoint, ready: bool| match &endpoint.address {
            EndpointAddress::Ip(addr) => {
                let workload = sources.pod_at(*addr);
                let traits = traits(endpoint, workload);
                for (port, declared) in ports.iter_mut().zip(&entry.ports) {
                    port.endpoints.push(Endpoint {
                        addr: *addr,
                        port: target(endpoint, declared),
                        workload,
                        ready,
                        hostname: None,
                        traits: traits.clone(),
                    });
                }
            }
            EndpointAddress::Name(host) if is_dns(entry.resolution) && ready => names.push(DnsEndpoint {
                host: Arc::clone(host),
                ports: entry.ports.iter().map(|port| target(endpoint, port)).collect(),
                traits: traits(endpoint, None),
            }),
            EndpointAddress::Name(_) | EndpointAddress::Unix(_) | EndpointAddress::Gateway => {}
        };
    let resolution = match entry.resolution {
        ServiceEntryResolution::None => Resolution::Dialled,
        ServiceEntryResolution::DynamicDns => Resolution::ByName,
        resolution => {
            for endpoint in &entry.endpoints {
                add(&mut ports, endpoint, true);
            }
            for workload in selected(entry, sources) {
                add(&mut ports, &workload.endpoint, workload.healthy != Some(false));
            }
            if let Some(selector) = entry.selector.as_ref().filter(|selector| !selector.is_empty()) {
                for (port, declared) in ports.iter_mut().zip(&entry.ports) {
                    port.endpoints
                        .extend(sources.pods_at(selector, declared.target.unwrap_or(declared.number)));
                }
            }
            if !is_dns(resolution) {
                Resolution::Listed
            } else {
                // Without endpoints each host is itself the name to ask for.
                if entry.endpoints.is_empty() && entry.selector.is_none() {
                    names.push(DnsEndpoint {
                        host: Arc::clone(host),
                        ports: entry.ports.iter().map(|port| port.target.unwrap_or(port.number)).collect(),
                        traits: None,
                    });
                }
                let one_at_a_time = resolution == ServiceEntryResolution::DnsRoundRobin;
                Resolution::Dns(DnsResolution { one_at_a_time, names })
            }
        }
    };
    for port in &mut ports {
        port.endpoints = super::endpoints::unique(std::mem::take(&mut port.endpoints).into_iter());
    }
    snapshot::Service {
        id: ServiceId::of_service(&name.namespace, &name.name),
        hostname: Some(Arc::clone(host)),
        external: !entry.internal,
        vips: vips.to_vec(),
        networks: entry.addresses.iter().filter(|net| !is_single(net)).copied().collect(),
        resolution,
        subject_alt_names: entry.subject_alt_names.clone(),
        ports,
        ..snapshot::Service::named(name)
    }
}

/// The port of an endpoint behind a port of the entry (S54).
fn target(endpoint: &WorkloadEndpoint, port: &ServiceEntryPort) -> u16 {
    endpoint.ports.get(&port.name).copied().or(port.target).unwrap_or(port.number)
}

/// What an endpoint says of itself, if it says anything. Who a pod is, is for the pod to say.
pub(super) fn traits(endpoint: &WorkloadEndpoint, pod: Option<WorkloadId>) -> Option<Arc<Traits>> {
    let traits = Traits {
        labels: endpoint.labels.clone(),
        locality: endpoint.locality.clone(),
        // 1 is what everybody has.
        weight: if endpoint.weight == 1 { 0 } else { endpoint.weight },
        network: endpoint.network.clone(),
        account: endpoint.service_account.clone().filter(|_| pod.is_none()),
    };
    (traits != Traits::default()).then(|| Arc::new(traits))
}

impl Index {
    /// The ServiceEntries of all namespaces with their origins.
    fn service_entries_of_all(&self) -> impl Iterator<Item = (&Origin, &ServiceEntry)> {
        self.each(Kind::ServiceEntry).filter_map(|(origin, resource)| match resource {
            Resource::ServiceEntry(entry) => Some((origin, &**entry)),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests;
