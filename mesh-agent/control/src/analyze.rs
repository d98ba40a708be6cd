//! What is wrong between resources, each of which is good by itself: references to what is not there, permissions that are
//! missing, hosts that two resources claim, selectors that select nothing.
//!
//! Pure: an index in, problems out; `meshctl analyze` prints them. What is an error has, in a mesh that runs these resources, an effect
//! that nobody wants (requests answered with 404, 500 or 503, or a resource that loses to another); the rest is a warning.
//!
//! Not here: what one resource may hold ([`crate::resource`]), and what wins at run time ([`crate::compile`]).

mod gateway_api;
mod istio;
mod selectors;
mod world;

use mesh_core::snapshot::Name;

use self::world::World;
use crate::{
    compile::MeshSettings,
    index::{Index, Origin, located},
    problem::{Level, SourceError},
    resource::{Key, Kind, Resource},
};

/// Looks at all resources of `index` together, and returns what is wrong, sorted. `has_unread` says whether an object of a kind that
/// the mesh does not read (`Gateway`) is among the documents.
pub fn analyze(
    index: &Index,
    settings: &MeshSettings,
    has_unread: &dyn Fn(&str, &Name) -> bool,
) -> Vec<SourceError> {
    let world = World::of(index, settings);
    let mut findings = Findings { world: &world, has_unread, found: Vec::new() };
    for (origin, resource) in index.all() {
        let mut report = Report { key: resource.key(), origin, findings: &mut findings };
        match resource {
            Resource::VirtualService(service) => istio::virtual_service(service, &mut report),
            Resource::DestinationRule(rule) => istio::destination_rule(rule, &mut report),
            Resource::Sidecar(sidecar) => istio::sidecar(sidecar, &mut report),
            Resource::ServiceEntry(entry) => istio::service_entry(entry, &mut report),
            Resource::WorkloadEntry(entry) => selectors::workload_entry(entry, &mut report),
            Resource::AuthorizationPolicy(policy) => {
                selectors::policy(&policy.name, &policy.selector, "spec.selector.matchLabels", &mut report);
            }
            Resource::PeerAuthentication(policy) => {
                selectors::policy(&policy.name, &policy.selector, "spec.selector.matchLabels", &mut report);
            }
            Resource::HttpRoute(route) => gateway_api::http_route(route, &mut report),
            Resource::GrpcRoute(route) => gateway_api::grpc_route(route, &mut report),
            Resource::TlsRoute(route) | Resource::TcpRoute(route) => {
                gateway_api::stream_route(route, &mut report);
            }
            Resource::Namespace(_)
            | Resource::ServiceAccount(_)
            | Resource::Pod(_)
            | Resource::Service(_)
            | Resource::EndpointSlice(_)
            | Resource::MeshConfig(_)
            | Resource::ReferenceGrant(_)
            | Resource::Node(_)
            | Resource::Secret(_) => {}
        }
    }
    istio::conflicts(&mut findings);
    let mut found = findings.found;
    found.sort();
    found.dedup();
    found
}

/// What VirtualServices, DestinationRules and the egress proxies of Sidecars refer to and is not there, sorted: what a controller tells their
/// users, beside what it finds when it compiles. Workloads are left out: that a Deployment has no pods for a moment is no news.
pub(crate) fn references(index: &Index, settings: &MeshSettings) -> Vec<SourceError> {
    let rules = || {
        let kinds = [Kind::VirtualService, Kind::DestinationRule, Kind::Sidecar];
        kinds.into_iter().flat_map(|kind| index.each(kind)).filter(|(_, resource)| match resource {
            Resource::Sidecar(sidecar) => sidecar.egress_proxy.is_some(),
            _ => true,
        })
    };
    if rules().next().is_none() {
        return Vec::new();
    }
    let world = World::without_workloads(index, settings);
    // Gateways are not read, and are for others to judge.
    let mut findings = Findings { world: &world, has_unread: &|_, _| true, found: Vec::new() };
    for (origin, resource) in rules() {
        let mut report = Report { key: resource.key(), origin, findings: &mut findings };
        match resource {
            Resource::VirtualService(service) => istio::virtual_service(service, &mut report),
            Resource::DestinationRule(rule) => istio::destination_rule(rule, &mut report),
            Resource::Sidecar(sidecar) => istio::egress_proxy(sidecar, &mut report),
            _ => {}
        }
    }
    let mut found = findings.found;
    found.sort();
    found.dedup();
    found
}

/// What has been found.
struct Findings<'a> {
    world: &'a World<'a>,
    has_unread: &'a dyn Fn(&str, &Name) -> bool,
    found: Vec<SourceError>,
}

/// Notes problems of one resource.
struct Report<'a, 'f> {
    key: Key,
    origin: &'a Origin,
    findings: &'f mut Findings<'a>,
}

impl<'a> Report<'a, '_> {
    fn world(&self) -> &'a World<'a> {
        self.findings.world
    }

    fn has_unread(&self, kind: &str, name: &Name) -> bool {
        (self.findings.has_unread)(kind, name)
    }

    fn error(&mut self, field: &str, message: String) {
        self.findings.found.push(located(&self.key, self.origin, Level::Error, field, message));
    }

    fn warning(&mut self, field: &str, message: String) {
        self.findings.found.push(located(&self.key, self.origin, Level::Warning, field, message));
    }
}

#[cfg(test)]
mod tests;
