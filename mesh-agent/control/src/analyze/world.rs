//! What resources can refer to: hosts with their ports and endpoints, rules, grants, workloads.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::snapshot::{Name, Protocol, ServicePort};

use crate::{
    compile::MeshSettings,
    index::{Index, Origin},
    resource::{
        DestinationRule, ExportTo, Kind, Labels, Pod, PortProtocol, ReferenceGrant, Resource, Service,
        ServiceEntry, ServiceEntryPort, Sidecar, VirtualService, WorkloadEntry, is_within,
    },
};

/// Most names (`ExternalName`) that lead from one to the next, as the compiler has it.
const ALIASES_MAX: usize = 8;

/// All that can be referred to.
pub(super) struct World<'a> {
    /// Namespace of mesh-wide policies.
    pub(super) root_namespace: &'a str,
    /// DNS suffix of services.
    pub(super) domain: String,
    /// Who sees a ServiceEntry that does not say.
    pub(super) service_export_to: ExportTo,
    /// Who sees a VirtualService that does not say.
    pub(super) virtual_service_export_to: ExportTo,
    /// Kubernetes services by name.
    pub(super) services: BTreeMap<&'a Name, &'a Service>,
    /// ServiceEntries by name.
    pub(super) entries: BTreeMap<&'a Name, &'a ServiceEntry>,
    /// Services by full name, entries by each of their hosts, patterns among them.
    hosts: BTreeMap<Arc<str>, Vec<Known<'a>>>,
    /// Rules with their origins.
    pub(super) rules: Vec<(&'a Origin, &'a DestinationRule)>,
    /// VirtualServices with their origins.
    pub(super) virtual_services: Vec<(&'a Origin, &'a VirtualService)>,
    /// Sidecars with their origins.
    pub(super) sidecars: Vec<(&'a Origin, &'a Sidecar)>,
    /// Grants.
    pub(super) grants: Vec<&'a ReferenceGrant>,
    /// Hosts that routes of the Gateway API are attached to, with their port and who they are.
    pub(super) routed: BTreeMap<Arc<str>, BTreeSet<(Option<u16>, String)>>,
    /// Pods and WorkloadEntries of each namespace, by their labels.
    workloads: BTreeMap<&'a str, Vec<&'a Labels>>,
}

/// What a host stands for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Known<'a> {
    /// A Kubernetes service.
    Service(&'a Service),
    /// A ServiceEntry.
    Entry(&'a ServiceEntry),
}

impl<'w> Known<'w> {
    /// Whether it has a port of this number.
    pub(super) fn has_port(self, number: u16) -> bool {
        match self {
            // What an external name leads to is unknown here.
            Self::Service(service) if service.service.external_name.is_some() => true,
            Self::Service(service) => service.service.ports.iter().any(|port| port.port == number),
            Self::Entry(entry) => entry.ports.iter().any(|port| port.number == number),
        }
    }

    /// Whether it has a port of this number that is not for datagrams.
    pub(super) fn has_stream_port(self, number: u16) -> bool {
        let of_streams = |port: &ServicePort| port.port == number && port.protocol == Protocol::Tcp;
        match self {
            // What an external name leads to is unknown here.
            Self::Service(service)
                if service.service.external_name.is_some() && service.service.ports.is_empty() =>
            {
                true
            }
            _ => self.service_ports().iter().any(of_streams),
        }
    }

    /// Its ports as those of the services that it makes, without endpoints.
    pub(super) fn service_ports(self) -> Cow<'w, [ServicePort]> {
        match self {
            Self::Service(service) => Cow::Borrowed(&service.service.ports),
            Self::Entry(entry) => entry.ports.iter().map(ServiceEntryPort::of_service).collect(),
        }
    }

    /// Whether it has one port for streams and no other.
    pub(super) fn has_only_port(self) -> bool {
        let streams = match self {
            Self::Service(service) => {
                service.service.ports.iter().filter(|port| port.protocol == Protocol::Tcp).count()
            }
            Self::Entry(entry) => {
                entry.ports.iter().filter(|port| port.protocol != PortProtocol::Udp).count()
            }
        };
        streams == 1
    }

    /// Its ports, for messages.
    pub(super) fn ports(self) -> String {
        let numbers: Vec<String> = match self {
            Self::Service(service) => service.service.ports.iter().map(|p| p.port.to_string()).collect(),
            Self::Entry(entry) => entry.ports.iter().map(|p| p.number.to_string()).collect(),
        };
        if numbers.is_empty() { "none".to_owned() } else { numbers.join(", ") }
    }
}

impl<'a> World<'a> {
    /// Collects everything once.
    pub(super) fn of(index: &'a Index, settings: &'a MeshSettings) -> Self {
        let mut world = Self::without_workloads(index, settings);
        world.add_each(index, &[Kind::Pod, Kind::WorkloadEntry]);
        world
    }

    /// The same, as if there were no workloads: of most of what a cluster has nothing is looked at.
    pub(super) fn without_workloads(index: &'a Index, settings: &'a MeshSettings) -> Self {
        let routing = index.mesh_config().map(|config| &config.routing);
        let or_everyone = |to: Option<&ExportTo>| to.cloned().unwrap_or_else(ExportTo::everyone);
        let mut world = Self {
            service_export_to: or_everyone(routing.and_then(|r| r.service_export_to.as_ref())),
            virtual_service_export_to: or_everyone(
                routing.and_then(|r| r.virtual_service_export_to.as_ref()),
            ),
            root_namespace: &settings.root_namespace,
            domain: settings.cluster_domain.to_ascii_lowercase(),
            services: BTreeMap::new(),
            entries: BTreeMap::new(),
            hosts: BTreeMap::new(),
            rules: Vec::new(),
            virtual_services: Vec::new(),
            sidecars: Vec::new(),
            grants: Vec::new(),
            routed: BTreeMap::new(),
            workloads: BTreeMap::new(),
        };
        // Of a service and an entry with one host the service is known.
        world.add_each(index, &[Kind::Service, Kind::ServiceEntry, Kind::DestinationRule]);
        world.add_each(index, &[Kind::VirtualService, Kind::Sidecar, Kind::ReferenceGrant]);
        for (_, resource) in [Kind::HttpRoute, Kind::GrpcRoute].into_iter().flat_map(|kind| index.each(kind))
        {
            world.add_route(resource);
        }
        world
    }

    fn add_each(&mut self, index: &'a Index, kinds: &[Kind]) {
        for (origin, resource) in kinds.iter().flat_map(|kind| index.each(*kind)) {
            self.add(origin, resource);
        }
    }

    fn add(&mut self, origin: &'a Origin, resource: &'a Resource) {
        match resource {
            Resource::Service(service) => {
                let host = self.service_host(&service.service.name);
                self.services.insert(&service.service.name, service);
                self.hosts.entry(host).or_default().push(Known::Service(service));
            }
            Resource::ServiceEntry(entry) => {
                self.entries.insert(&entry.name, entry);
                for host in &entry.hosts {
                    self.hosts.entry(Arc::clone(host)).or_default().push(Known::Entry(entry));
                }
            }
            Resource::Pod(pod) => {
                let Pod { workload, .. } = &**pod;
                self.workloads.entry(&workload.name.namespace).or_default().push(&workload.labels);
            }
            Resource::WorkloadEntry(entry) => {
                let WorkloadEntry { name, endpoint, .. } = &**entry;
                self.workloads.entry(&name.namespace).or_default().push(&endpoint.labels);
            }
            Resource::DestinationRule(rule) => self.rules.push((origin, rule)),
            Resource::VirtualService(service) => self.virtual_services.push((origin, service)),
            Resource::Sidecar(sidecar) => self.sidecars.push((origin, sidecar)),
            Resource::ReferenceGrant(grant) => self.grants.push(grant),
            _ => {}
        }
    }

    /// Remembers what hosts a route of the Gateway API for HTTP is attached to.
    fn add_route(&mut self, resource: &Resource) {
        let parents = match resource {
            Resource::HttpRoute(route) => &route.parents,
            Resource::GrpcRoute(route) => &route.parents,
            _ => return,
        };
        let who = resource.key().to_string();
        for parent in parents {
            let hosts = match parent.kind {
                crate::resource::ParentKind::Service => vec![self.service_host(&parent.name)],
                crate::resource::ParentKind::ServiceEntry => {
                    self.entries.get(&parent.name).map(|entry| entry.hosts.clone()).unwrap_or_default()
                }
                _ => Vec::new(),
            };
            for host in hosts {
                self.routed.entry(host).or_default().insert((parent.port, who.clone()));
            }
        }
    }

    /// The full name of a Kubernetes service.
    pub(super) fn service_host(&self, name: &Name) -> Arc<str> {
        format!("{}.{}.svc.{}", name.name, name.namespace, self.domain).into()
    }

    /// What has exactly this host (lower case).
    pub(super) fn named(&self, host: &str) -> Option<Known<'a>> {
        self.hosts.get(host.strip_suffix('.').unwrap_or(host))?.first().copied()
    }

    /// What a service that is only another name of one (`ExternalName`) stands for; anything else stands for itself.
    pub(super) fn target(&self, known: Known<'a>) -> Known<'a> {
        let mut at = known;
        for _ in 0..ALIASES_MAX {
            let Known::Service(service) = at else { return at };
            let Some(host) = &service.service.external_name else { return at };
            match self.named(host) {
                Some(next) => at = next,
                None => return known,
            }
        }
        known
    }

    /// The service or entry that something is only another name of, if the mesh has it.
    pub(super) fn stands_for(&self, known: Known<'a>) -> Option<String> {
        match (known, self.target(known)) {
            (Known::Service(alias), Known::Service(of)) if alias.service.name == of.service.name => None,
            (Known::Service(_), Known::Service(of)) => Some(format!("Service {}", of.service.name)),
            (Known::Service(_), Known::Entry(of)) => Some(format!("a host of ServiceEntry {}", of.name)),
            (Known::Entry(_), _) => None,
        }
    }

    /// What a host (lower case) stands for: a service or entry of that name, else one whose pattern covers it.
    pub(super) fn find(&self, host: &str) -> Option<Known<'a>> {
        let host = host.strip_suffix('.').unwrap_or(host);
        if let Some(known) = self.hosts.get(host).and_then(|known| known.first()) {
            return Some(*known);
        }
        let covers = |(pattern, known): (&Arc<str>, &Vec<Known<'a>>)| {
            (pattern.starts_with('*') && is_within(host, pattern)).then(|| known.first().copied()).flatten()
        };
        self.hosts.iter().find_map(covers)
    }

    /// Whether a pattern covers any host.
    pub(super) fn is_any_within(&self, pattern: &str) -> bool {
        self.hosts.keys().any(|host| is_within(host, pattern) || is_within(pattern, host))
    }

    /// All entries for a host.
    pub(super) fn entries_of(&self, host: &str) -> impl Iterator<Item = &'a ServiceEntry> {
        let known = self.hosts.get(host).map(Vec::as_slice).unwrap_or_default();
        known.iter().filter_map(|known| match known {
            Known::Entry(entry) => Some(*entry),
            Known::Service(_) => None,
        })
    }

    /// The Kubernetes service of a host.
    pub(super) fn service_of(&self, host: &str) -> Option<&'a Service> {
        let known = self.hosts.get(host).map(Vec::as_slice).unwrap_or_default();
        known.iter().find_map(|known| match known {
            Known::Service(service) => Some(*service),
            Known::Entry(_) => None,
        })
    }

    /// Labels of the workloads of a namespace.
    pub(super) fn workloads(&self, namespace: &str) -> &[&'a Labels] {
        self.workloads.get(namespace).map(Vec::as_slice).unwrap_or_default()
    }

    /// Labels of the workloads of all namespaces.
    pub(super) fn all_workloads(&self) -> impl Iterator<Item = &'a Labels> {
        self.workloads.values().flatten().copied()
    }
}

/// Whether `labels` has all of `selector`.
pub(super) fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// Labels as they are written in a query.
pub(super) fn text_of(labels: &Labels) -> String {
    let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(",")
}
