//! References of the Gateway API's routes.

use std::sync::Arc;

use super::{Report, world::Known};
use crate::resource::{
    BackendKind, BackendRef, GrpcRoute, HttpRoute, ParentKind, ParentRef, RouteBackend, RouteMirror,
    StreamRoute, Unattached, attached,
};

/// An HTTPRoute.
pub(super) fn http_route(route: &HttpRoute, report: &mut Report<'_, '_>) {
    parents(&route.parents, report);
    for (at, rule) in route.rules.iter().enumerate() {
        let field = format!("spec.rules[{at}]");
        backends(&rule.backends, &route.parents, &field, report);
        mirrors(&rule.mirrors, &route.parents, &field, report);
    }
}

/// A GRPCRoute.
pub(super) fn grpc_route(route: &GrpcRoute, report: &mut Report<'_, '_>) {
    parents(&route.parents, report);
    for (at, rule) in route.rules.iter().enumerate() {
        let field = format!("spec.rules[{at}]");
        backends(&rule.backends, &route.parents, &field, report);
        mirrors(&rule.mirrors, &route.parents, &field, report);
    }
}

/// A TLSRoute or TCPRoute.
pub(super) fn stream_route(route: &StreamRoute, report: &mut Report<'_, '_>) {
    parents(&route.parents, report);
    for (at, rule) in route.rules.iter().enumerate() {
        backends(&rule.backends, &route.parents, &format!("spec.rules[{at}]"), report);
    }
}

fn parents(parents: &[ParentRef], report: &mut Report<'_, '_>) {
    let world = report.world();
    for (at, parent) in parents.iter().enumerate() {
        let field = format!("spec.parentRefs[{at}]");
        let found = match parent.kind {
            ParentKind::Service => world.services.get(&parent.name).map(|service| Known::Service(service)),
            ParentKind::ServiceEntry => world.entries.get(&parent.name).map(|entry| Known::Entry(entry)),
            ParentKind::Gateway => {
                if !report.has_unread("Gateway", &parent.name) {
                    report.error(&field, format!("is Gateway {}, which does not exist", parent.name));
                }
                continue;
            }
            ParentKind::Other(_) => continue,
        };
        let kind = if parent.kind == ParentKind::Service { "Service" } else { "ServiceEntry" };
        let Some(known) = found else {
            report.error(&field, format!("is {kind} {}, which does not exist", parent.name));
            continue;
        };
        if let Some(meant) = world.stands_for(known) {
            let message =
                format!("is {kind} {}, which is another name of {meant}: wanted that one", parent.name);
            report.error(&field, message);
            continue;
        }
        if let Known::Entry(entry) = known
            && entry.hosts.iter().all(|host| world.service_of(host).is_some())
        {
            let message = format!("is ServiceEntry {}, which has no host but those of Services", parent.name);
            report.error(&field, message);
            continue;
        }
        match attached(report.key.kind, parent, known.service_ports().iter()) {
            Ok(_) => {}
            Err(Unattached::NoNumber(port)) => {
                let message = format!(
                    "is {port}, which is no port of {kind} {}; its ports: {}",
                    parent.name,
                    known.ports()
                );
                report.error(&format!("{field}.port"), message);
            }
            Err(Unattached::NoName(section)) => {
                let message =
                    format!("is {section:?}, which is the name of no port of {kind} {}", parent.name);
                report.error(&format!("{field}.sectionName"), message);
            }
            Err(why) => {
                let message =
                    format!("is {kind} {}, which {why}; the route has no effect there", parent.name);
                report.error(&field, message);
            }
        }
    }
}

fn backends(backends: &[RouteBackend], parents: &[ParentRef], field: &str, report: &mut Report<'_, '_>) {
    for (at, backend) in backends.iter().enumerate() {
        self::backend(&backend.backend, parents, &format!("{field}.backendRefs[{at}]"), report);
    }
}

fn mirrors(mirrors: &[RouteMirror], parents: &[ParentRef], field: &str, report: &mut Report<'_, '_>) {
    for mirror in mirrors {
        backend(&mirror.backend, parents, &format!("{field}.filters"), report);
    }
}

/// Conditions of S116: `RefNotPermitted` before `BackendNotFound`, so that a grant is asked for first. What is in the namespace of the
/// services that the route is attached to needs none: its clients reach that anyway.
fn backend(backend: &BackendRef, parents: &[ParentRef], field: &str, report: &mut Report<'_, '_>) {
    let world = report.world();
    let own = Arc::clone(&report.key.name.namespace);
    let kind = report.key.kind.as_str();
    let name = &backend.name;
    let of_parents =
        !parents.is_empty() && parents.iter().all(|parent| parent.name.namespace == name.namespace);
    if name.namespace != own
        && !of_parents
        && !world.grants.iter().any(|grant| grant.allows(kind, &own, backend))
    {
        let (_, to) = backend.group_kind();
        let message = format!(
            "is {to} {name} of another namespace, and no ReferenceGrant in {} lets {kind}s of {own} refer to it \
             (RefNotPermitted); requests are answered with 500",
            name.namespace
        );
        report.error(field, message);
        return;
    }
    let found = match backend.kind {
        BackendKind::Service => world.services.get(name).map(|service| Known::Service(service)),
        BackendKind::ServiceEntry => world.entries.get(name).map(|entry| Known::Entry(entry)),
        // As the compiler has it: a wildcard makes no service of each host that it covers.
        BackendKind::Hostname => world.named(&name.name),
        // Said when it was read.
        BackendKind::Other(_) => return,
    };
    let (_, to) = backend.group_kind();
    let Some(known) = found else {
        let message =
            format!("is {to} {name}, which does not exist (BackendNotFound); requests are answered with 500");
        report.error(field, message);
        return;
    };
    // Of another name of a service, its ports count.
    let known = world.target(known);
    let Some(port) = backend.port.filter(|port| !known.has_stream_port(*port)) else { return };
    let message = if known.service_ports().iter().any(|of_datagrams| of_datagrams.port == port) {
        format!(
            "is {port}, which is UDP at {to} {name} (UnsupportedProtocol); requests are answered with 500"
        )
    } else {
        format!(
            "is {port}, which is no port of {to} {name}; its ports: {}; requests are answered with 500",
            known.ports()
        )
    };
    report.error(&format!("{field}.port"), message);
}
