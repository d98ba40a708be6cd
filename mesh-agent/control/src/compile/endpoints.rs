//! Endpoints of services: from slices where a service has any, else from the pods its selector selects; and the WorkloadEntries that it
//! selects.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use mesh_core::{
    id::WorkloadId,
    snapshot::{self, Endpoint, ServicePort},
};

use crate::{
    index::{Index, Origin, located},
    problem::{Level, SourceError},
    resource::{EndpointAddress, EndpointSlice, Key, Kind, Labels, Pod, Service, TargetPort, WorkloadEntry},
};

/// Where the endpoints of one namespace's services come from.
pub(super) struct Sources<'a> {
    slices: HashMap<&'a str, Vec<&'a EndpointSlice>>,
    /// Pods that can serve.
    serving: Vec<&'a Pod>,
    /// The same by each of their labels, once somebody selects.
    by_label: OnceCell<HashMap<(&'a str, &'a str), Vec<&'a Pod>>>,
    by_name: HashMap<&'a str, &'a Pod>,
    by_addr: HashMap<IpAddr, WorkloadId>,
    workload_entries: Vec<&'a WorkloadEntry>,
}

impl<'a> Sources<'a> {
    pub(super) fn of(index: &'a Index, namespace: &str, pods: &[&'a Pod]) -> Self {
        let mut sources = Self {
            slices: HashMap::new(),
            serving: pods.iter().filter(|pod| !pod.workload.terminated).copied().collect(),
            by_label: OnceCell::new(),
            by_name: HashMap::new(),
            by_addr: HashMap::new(),
            workload_entries: index.workload_entries(namespace).collect(),
        };
        for slice in index.endpoint_slices(namespace) {
            if let Some(service) = &slice.service {
                sources.slices.entry(service).or_default().push(slice);
            }
        }
        for pod in &sources.serving {
            sources.by_name.insert(&pod.workload.name.name, pod);
            for addr in &pod.workload.addrs {
                sources.by_addr.insert(*addr, pod.workload.id);
            }
        }
        sources
    }

    /// The service with its endpoints.
    pub(super) fn fill(
        &self,
        declared: &Service,
        origin: &Origin,
        problems: &mut Vec<SourceError>,
    ) -> snapshot::Service {
        let mut service = declared.service.clone();
        let name = Arc::clone(&service.name.name);
        if let Some(slices) = self.slices.get(&*name) {
            for (port, target) in service.ports.iter_mut().zip(&declared.targets) {
                let sliced = slices.iter().flat_map(|slice| self.of_slice(slice, port, target));
                port.endpoints = unique(sliced.chain(self.of_workload_entries(declared, port, target)));
            }
            return service;
        }
        if declared.selector.is_empty() || service.external_name.is_some() {
            return service;
        }
        let pods = self.select(&declared.selector);
        for (index, (port, target)) in service.ports.iter_mut().zip(&declared.targets).enumerate() {
            let found = pods.iter().filter_map(|pod| Some((pod, number(pod, port, target)?)));
            let found = found.flat_map(|(pod, number)| from_pod(pod, number, &name));
            port.endpoints = unique(found.chain(self.of_workload_entries(declared, port, target)));
            if let TargetPort::Named(target) = target
                && port.endpoints.is_empty()
                && !pods.is_empty()
            {
                let key = Key { kind: Kind::Service, name: declared.service.name.clone() };
                let field = format!("spec.ports[{index}].targetPort");
                let message = format!(
                    "is {target:?}, which no {:?} port of the selected pods is called",
                    port.protocol
                );
                problems.push(located(&key, origin, Level::Warning, &field, message));
            }
        }
        service
    }

    /// The pods with all of these labels.
    fn select(&self, selector: &Labels) -> Vec<&'a Pod> {
        let by_label = self.by_label.get_or_init(|| {
            let mut by_label: HashMap<_, Vec<_>> = HashMap::new();
            for pod in &self.serving {
                for (key, value) in &pod.workload.labels {
                    by_label.entry((&**key, &**value)).or_default().push(*pod);
                }
            }
            by_label
        });
        // The rarest label first: the others are only compared on what it leaves.
        let rarest = selector
            .iter()
            .map(|(key, value)| by_label.get(&(&**key, &**value)).map_or(&[][..], Vec::as_slice))
            .min_by_key(|pods| pods.len());
        let matches =
            |pod: &&Pod| selector.iter().all(|(key, value)| pod.workload.labels.get(key) == Some(value));
        rarest.unwrap_or_default().iter().copied().filter(matches).collect()
    }

    /// The WorkloadEntries with all of these labels, by name.
    pub(super) fn workload_entries(&self, selector: &Labels) -> Vec<&'a WorkloadEntry> {
        let matches = |entry: &&&WorkloadEntry| {
            selector.iter().all(|(key, value)| entry.endpoint.labels.get(key) == Some(value))
        };
        self.workload_entries.iter().filter(matches).copied().collect()
    }

    /// The pods with all of these labels, at a port.
    pub(super) fn pods_at(&self, selector: &Labels, port: u16) -> Vec<Endpoint> {
        self.select(selector).into_iter().flat_map(|pod| from_pod(pod, port, "")).collect()
    }

    /// The pod of the namespace that has an address.
    pub(super) fn pod_at(&self, addr: IpAddr) -> Option<WorkloadId> {
        self.by_addr.get(&addr).copied()
    }

    /// The WorkloadEntries that a service selects (S56), as far as they have addresses.
    fn of_workload_entries(
        &self,
        declared: &Service,
        port: &ServicePort,
        target: &TargetPort,
    ) -> Vec<Endpoint> {
        if declared.selector.is_empty() || self.workload_entries.is_empty() {
            return Vec::new();
        }
        let of = |entry: &WorkloadEntry| {
            let EndpointAddress::Ip(addr) = entry.endpoint.address else { return None };
            let named = |name: &str| entry.endpoint.ports.get(name).copied();
            let number = match target {
                TargetPort::Number(number) => named(&port.name).unwrap_or(*number),
                TargetPort::Named(name) => named(&port.name).or_else(|| named(name)).unwrap_or(port.port),
            };
            let workload = self.pod_at(addr);
            Some(Endpoint {
                addr,
                port: number,
                workload,
                ready: entry.healthy != Some(false),
                hostname: None,
                traits: super::entries::traits(&entry.endpoint, workload),
            })
        };
        self.workload_entries(&declared.selector).into_iter().filter_map(of).collect()
    }

    fn of_slice<'s>(
        &'s self,
        slice: &'s EndpointSlice,
        port: &ServicePort,
        target: &TargetPort,
    ) -> impl Iterator<Item = Endpoint> + 's {
        let own = match target {
            TargetPort::Number(number) => *number,
            TargetPort::Named(_) => port.port,
        };
        let numbers: Vec<u16> = match &slice.ports {
            // A headless service without ports answers DNS with every address.
            _ if port.port == 0 => vec![0],
            None => vec![own],
            Some(ports) => ports
                .iter()
                .filter(|p| p.name == port.name && p.protocol == port.protocol)
                .map(|p| p.port.unwrap_or(own))
                .collect(),
        };
        numbers.into_iter().flat_map(move |number| {
            slice.endpoints.iter().map(move |endpoint| {
                let named =
                    endpoint.pod.as_ref().and_then(|pod| self.by_name.get(&**pod)).map(|pod| pod.workload.id);
                Endpoint {
                    addr: endpoint.addr,
                    port: number,
                    workload: named.or_else(|| self.by_addr.get(&endpoint.addr).copied()),
                    ready: endpoint.ready,
                    hostname: endpoint.hostname.clone(),
                    traits: None,
                }
            })
        })
    }
}

/// The number a target port has in a pod.
fn number(pod: &Pod, port: &ServicePort, target: &TargetPort) -> Option<u16> {
    match target {
        TargetPort::Number(number) => Some(*number),
        TargetPort::Named(name) => {
            pod.ports.iter().find(|p| p.name == *name && p.protocol == port.protocol).map(|p| p.port)
        }
    }
}

fn from_pod<'a>(pod: &'a Pod, port: u16, service: &str) -> impl Iterator<Item = Endpoint> + 'a {
    let hostname =
        pod.hostname.as_ref().filter(|(_, subdomain)| **subdomain == *service).map(|(host, _)| host);
    pod.addrs.iter().map(move |addr| Endpoint {
        addr: *addr,
        port,
        workload: Some(pod.workload.id),
        ready: pod.workload.ready,
        hostname: hostname.cloned(),
        traits: None,
    })
}

/// Sorted, each address and port once; a ready one is preferred.
pub(super) fn unique(endpoints: impl Iterator<Item = Endpoint>) -> Vec<Endpoint> {
    let mut by_place: BTreeMap<(IpAddr, u16), Endpoint> = BTreeMap::new();
    for endpoint in endpoints {
        let better = by_place
            .get(&(endpoint.addr, endpoint.port))
            .is_none_or(|known| (endpoint.ready, &endpoint.workload) > (known.ready, &known.workload));
        if better {
            by_place.insert((endpoint.addr, endpoint.port), endpoint);
        }
    }
    by_place.into_values().collect()
}
