//! References between Istio's kinds, and hosts that two of them claim.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use mesh_core::snapshot::Name;

use super::{
    Findings, Report, selectors,
    world::{Known, World, selects, text_of},
};
use crate::{
    index::Origin,
    resource::{
        DestinationRule, ExportTo, Key, Kind, Labels, RuleHost, ServiceEntry, Sidecar, VirtualService,
        is_within,
        virtual_service::{Destination, HttpAction, MESH_GATEWAY},
    },
};

/// A VirtualService: destinations, subsets, ports, delegates, gateways, hosts.
pub(super) fn virtual_service(service: &VirtualService, report: &mut Report<'_, '_>) {
    let world = report.world();
    for gateway in service.gateways.iter().filter(|gateway| &***gateway != MESH_GATEWAY) {
        let (namespace, name) = gateway.split_once('/').unwrap_or((&service.name.namespace, gateway));
        if !report.has_unread("Gateway", &Name::new(namespace, name)) {
            report.error("spec.gateways", format!("has {gateway}, and there is no such Gateway"));
        }
    }
    for (at, rule) in service.http.iter().enumerate() {
        match &rule.action {
            HttpAction::Route(destinations) => {
                for (to, destination) in destinations.iter().enumerate() {
                    let field = format!("{}.route[{to}].destination", rule.field);
                    self::destination(&destination.destination, &field, report);
                }
            }
            HttpAction::Delegate(name) => delegate(world, name, &format!("spec.http[{at}].delegate"), report),
            HttpAction::Redirect(_) | HttpAction::Respond(_) => {}
        }
        for mirror in &rule.mirrors {
            destination(&mirror.destination, &format!("{}.mirror", rule.field), report);
        }
    }
    for rule in service.tls.iter().chain(&service.tcp) {
        for (to, destination) in rule.destinations.iter().enumerate() {
            let field = format!("{}.route[{to}].destination", rule.field);
            self::destination(&destination.destination, &field, report);
        }
    }
    if !service.is_for_mesh() {
        return;
    }
    for (at, host) in service.hosts.iter().enumerate() {
        let full = host.full(&world.domain);
        let known = if host.is_wildcard() { world.is_any_within(&full) } else { is_known(world, &full) };
        if !known {
            let hint = hint(world, &full);
            let message =
                format!("is {full}, which no Service or ServiceEntry has{hint}: it counts on port 80 alone");
            report.warning(&format!("spec.hosts[{at}]"), message);
        }
    }
}

fn is_known(world: &World<'_>, host: &str) -> bool {
    host.parse::<IpAddr>().is_ok() || world.find(host).is_some()
}

/// `reviews.prod` is taken as it is (S1), which is seldom meant.
fn hint(world: &World<'_>, host: &str) -> String {
    let meant = match host.split('.').collect::<Vec<_>>()[..] {
        [name, namespace] | [name, namespace, "svc"] => world.service_host(&Name::new(namespace, name)),
        _ => return String::new(),
    };
    match world.service_of(&meant) {
        Some(_) => format!(" (a name with a dot is taken as it is; there is a Service {meant})"),
        None => String::new(),
    }
}

fn destination(destination: &Destination, field: &str, report: &mut Report<'_, '_>) {
    destination_or(destination, field, "requests are answered with 503", report);
}

/// What is wrong with a destination, and what comes of it.
fn destination_or(destination: &Destination, field: &str, outcome: &str, report: &mut Report<'_, '_>) {
    let world = report.world();
    let host = destination.host.full(&world.domain);
    if host.parse::<IpAddr>().is_ok() {
        return;
    }
    let Some(known) = world.find(&host) else {
        let hint = hint(world, &host);
        let message = format!("is {host}, which no Service or ServiceEntry has{hint}; {outcome}");
        report.error(&format!("{field}.host"), message);
        return;
    };
    if let Some(port) = destination.port
        && !known.has_port(port)
    {
        let message =
            format!("is {port}, which is no port of {host}; its ports: {}; {outcome}", known.ports());
        report.error(&format!("{field}.port.number"), message);
    }
    let Some(subset) = &destination.subset else { return };
    let covers = |rule: &DestinationRule| is_within(&host, &rule.host.full(&world.domain));
    let has_subset = world
        .rules
        .iter()
        .any(|(_, rule)| covers(rule) && rule.subsets.iter().any(|known| known.name == *subset));
    if !has_subset {
        let message = format!("is {subset}, which no DestinationRule for {host} has; {outcome}");
        report.error(&format!("{field}.subset"), message);
    }
}

fn delegate(world: &World<'_>, name: &Name, field: &str, report: &mut Report<'_, '_>) {
    let found = world.virtual_services.iter().find(|(_, service)| service.name == *name);
    match found {
        None => report
            .error(field, format!("is VirtualService {name}, which does not exist; the rule is left out")),
        Some((_, service)) if !service.is_delegate() => {
            report.error(
                field,
                format!("is VirtualService {name}, which has hosts of its own; the rule is left out"),
            );
        }
        Some((_, service))
            if service.http.iter().any(|rule| matches!(rule.action, HttpAction::Delegate(_))) =>
        {
            report.error(
                field,
                format!("is VirtualService {name}, which delegates itself; only one level is allowed"),
            );
        }
        Some(_) => {}
    }
}

/// A DestinationRule: its host, and subsets that nothing is in.
pub(super) fn destination_rule(rule: &DestinationRule, report: &mut Report<'_, '_>) {
    let world = report.world();
    let host = rule.host.full(&world.domain);
    let known = if rule.host.is_wildcard() { world.is_any_within(&host) } else { is_known(world, &host) };
    if !known {
        let hint = hint(world, &host);
        report.warning("spec.host", format!("is {host}, which no Service or ServiceEntry has{hint}"));
    }
    selectors::policy(&rule.name, &rule.selector, "spec.workloadSelector.matchLabels", report);
    let Some(known) = world.find(&host).filter(|_| !rule.host.is_wildcard()) else { return };
    for (at, subset) in rule.subsets.iter().enumerate().filter(|(_, subset)| !subset.labels.is_empty()) {
        if has_endpoint(world, known, &subset.labels) == Some(false) {
            let message = format!(
                "is {}, which no endpoint of {host} has; requests to the subset are answered with 503",
                text_of(&subset.labels)
            );
            report.warning(&format!("spec.subsets[{at}].labels"), message);
        }
    }
}

/// Whether a subset has an endpoint; `None` when that cannot be known from files.
fn has_endpoint(world: &World<'_>, known: Known<'_>, labels: &Labels) -> Option<bool> {
    let among = |namespace: &str, selector: &Labels| {
        let workloads = world.workloads(namespace);
        let all: Vec<&&Labels> = workloads.iter().filter(|workload| selects(selector, workload)).collect();
        // Without any workload they are somewhere else, e.g. made by a Deployment.
        (!all.is_empty()).then(|| all.iter().any(|workload| selects(labels, workload)))
    };
    match known {
        Known::Service(service) if service.selector.is_empty() => None,
        Known::Service(service) => among(&service.service.name.namespace, &service.selector),
        Known::Entry(entry) => match &entry.selector {
            Some(selector) => among(&entry.name.namespace, selector),
            None if entry.endpoints.is_empty() => None,
            None => Some(entry.endpoints.iter().any(|endpoint| selects(labels, &endpoint.labels))),
        },
    }
}

/// A ServiceEntry: what it selects, and who has its hosts already.
pub(super) fn service_entry(entry: &ServiceEntry, report: &mut Report<'_, '_>) {
    let world = report.world();
    if let Some(selector) = entry.selector.as_ref().filter(|selector| !selector.is_empty()) {
        let workloads = world.workloads(&entry.name.namespace);
        if !workloads.is_empty() && !workloads.iter().any(|labels| selects(selector, labels)) {
            let message = format!(
                "is {}, which no workload of namespace {} has",
                text_of(selector),
                entry.name.namespace
            );
            report.warning("spec.workloadSelector.labels", message);
        }
    }
    for (at, host) in entry.hosts.iter().enumerate() {
        let field = format!("spec.hosts[{at}]");
        if let Some(service) = world.service_of(host) {
            let name = &service.service.name;
            let message =
                format!("is {host}, which is Service {name}: of this entry only subjectAltNames counts");
            report.warning(&field, message);
        }
        let age =
            |entry: &ServiceEntry| (entry.created, entry.name.name.clone(), entry.name.namespace.clone());
        let older = world
            .entries_of(host)
            .filter(|other| other.name != entry.name && sees_both(entry, other, &world.service_export_to))
            .filter(|other| age(other) < age(entry))
            .min_by_key(|other| age(other));
        if let Some(older) = older {
            let message = format!(
                "is {host}, which ServiceEntry {} has too; clients outside both namespaces get the older one, which that is",
                older.name
            );
            report.warning(&field, message);
        }
    }
}

/// Whether some namespace sees both; `mesh` is for those that do not say who does.
fn sees_both(left: &ServiceEntry, right: &ServiceEntry, mesh: &ExportTo) -> bool {
    let of = |entry: &'_ ServiceEntry| entry.export_to.clone().unwrap_or_else(|| mesh.clone());
    meet((&of(left), &left.name.namespace), (&of(right), &right.name.namespace))
}

/// A Sidecar: hosts that nothing has, and a second one for the same workloads.
pub(super) fn sidecar(sidecar: &Sidecar, report: &mut Report<'_, '_>) {
    let world = report.world();
    let namespace = &sidecar.name.namespace;
    if !sidecar.selector.is_empty() {
        let workloads = world.workloads(namespace);
        if !workloads.is_empty() && !workloads.iter().any(|labels| selects(&sidecar.selector, labels)) {
            let message =
                format!("is {}, which no workload of namespace {namespace} has", text_of(&sidecar.selector));
            report.warning("spec.workloadSelector.labels", message);
        }
    } else {
        let age = |sidecar: &Sidecar| (sidecar.created, sidecar.name.clone());
        let older = world.sidecars.iter().map(|(_, other)| *other).find(|other| {
            other.name.namespace == *namespace && other.selector.is_empty() && age(other) < age(sidecar)
        });
        if let Some(older) = older {
            let message = format!(
                "is for all workloads of namespace {namespace}, as the older Sidecar {} is; that one counts, and this has no effect",
                older.name
            );
            report.error("spec.workloadSelector", message);
        }
    }
    egress_proxy(sidecar, report);
    for listener in sidecar.egress.iter().flatten() {
        for host in &listener.hosts {
            if host.host.starts_with('*') {
                continue;
            }
            if !is_known(world, &host.host) {
                let from = host.namespace.as_deref().unwrap_or("*");
                let message = format!("has {from}/{}, which no Service or ServiceEntry is", host.host);
                report.warning("spec.egress", message);
            }
        }
    }
}

/// What a Sidecar's workloads reach unknown destinations through.
pub(super) fn egress_proxy(sidecar: &Sidecar, report: &mut Report<'_, '_>) {
    let Some(proxy) = &sidecar.egress_proxy else { return };
    let field = "spec.outboundTrafficPolicy.egressProxy";
    let outcome = "nothing is reached through it: connections are reset, requests answered with 503";
    destination_or(proxy, field, outcome, report);
    let world = report.world();
    let host = proxy.host.full(&world.domain);
    if proxy.port.is_none()
        && let Some(known) = world.find(&host)
        && !known.has_only_port()
    {
        let message =
            format!("is missing, and {host} has not one port; its ports: {}; {outcome}", known.ports());
        report.error(&format!("{field}.port"), message);
    }
}

/// Hosts that several VirtualServices, or a VirtualService and a route of the Gateway API, claim for the mesh (S24, S117).
pub(super) fn conflicts(findings: &mut Findings<'_>) {
    let world = findings.world;
    let mut claims: BTreeMap<Arc<str>, Vec<Claim<'_>>> = BTreeMap::new();
    for (origin, service) in world.virtual_services.iter().filter(|(_, service)| service.is_for_mesh()) {
        for (at, host) in service.hosts.iter().enumerate() {
            let claim = Claim { origin, service, at };
            claims.entry(RuleHost::full(host, &world.domain)).or_default().push(claim);
        }
    }
    let seen_by = |service: &VirtualService| {
        service.export_to.clone().unwrap_or_else(|| world.virtual_service_export_to.clone())
    };
    for (host, mut claims) in claims {
        claims.sort_by_key(|claim| claim.age());
        for (at, claim) in claims.iter().enumerate() {
            let mut report = claim.report(findings);
            let field = format!("spec.hosts[{}]", claim.at);
            let older = claims[..at].iter().find(|older| {
                older.service.name != claim.service.name
                    && meet(
                        (&seen_by(older.service), &older.service.name.namespace),
                        (&seen_by(claim.service), &claim.service.name.namespace),
                    )
            });
            if let Some(older) = older {
                let message = format!(
                    "is {host}, which VirtualService {} ({}, document {}) has too; for clients that see both the older one counts, which that is",
                    older.service.name,
                    older.origin.file.display(),
                    older.origin.document
                );
                report.error(&field, message);
            }
            let routes = world.routed.get(&host).into_iter().flatten();
            let routes: Vec<&str> = routes.map(|(_, who)| who.as_str()).collect();
            if !routes.is_empty() && !claim.service.http.is_empty() {
                let message = format!(
                    "is {host}, which {} is attached to as well; give a host to one of the two kinds only",
                    routes.join(", ")
                );
                report.warning(&field, message);
            }
        }
    }
}

/// A VirtualService that has a host.
struct Claim<'a> {
    origin: &'a Origin,
    service: &'a VirtualService,
    /// Which of its hosts.
    at: usize,
}

impl<'a> Claim<'a> {
    /// Order of precedence (S6).
    fn age(&self) -> (Option<i64>, Arc<str>, Arc<str>) {
        let name = &self.service.name;
        (self.service.created, Arc::clone(&name.name), Arc::clone(&name.namespace))
    }

    fn report<'f>(&self, findings: &'f mut Findings<'a>) -> Report<'a, 'f> {
        let key = Key { kind: Kind::VirtualService, name: self.service.name.clone() };
        Report { key, origin: self.origin, findings }
    }
}

/// Whether some namespace sees both of two resources.
fn meet((left, left_own): (&ExportTo, &Arc<str>), (right, right_own): (&ExportTo, &Arc<str>)) -> bool {
    let named = |to: &ExportTo, own: &Arc<str>| {
        let own = to.own.then(|| Arc::clone(own));
        to.namespaces.iter().cloned().chain(own).collect::<Vec<_>>()
    };
    if left.everyone && right.everyone {
        return true;
    }
    // Of two that are limited, and of one, a namespace that one of them names must see the other.
    named(left, left_own).iter().any(|namespace| right.includes(namespace, right_own))
        || named(right, right_own).iter().any(|namespace| left.includes(namespace, left_own))
}
