//! References of a route: parents, backends, host names, and the parts of names they are made of.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use mesh_core::snapshot::Name;

use super::{BackendKind, BackendRef, GROUP, ISTIO_GROUP, ParentKind, ParentRef, wire};
use crate::{
    problem::Problems,
    resource::metadata::{self, Scope, is_label, is_subdomain},
};

/// Most parents of a route.
const PARENTS_MAX: usize = 32;
/// Most host names of a route.
const HOSTNAMES_MAX: usize = 16;
/// Most backends of a rule.
pub(super) const BACKENDS_MAX: usize = 16;
/// Most rules of a route.
const RULES_MAX: usize = 16;
/// Largest weight of a backend.
const WEIGHT_MAX: i64 = 1_000_000;

/// More items than the API allows.
pub(super) fn at_most(count: usize, max: usize, field: &str, problems: &mut Problems) {
    if count > max {
        problems.error(field, format!("has {count} items, wanted at most {max}"));
    }
}

/// `spec.parentRefs`.
fn parents(refs: Option<&Vec<wire::ParentRef>>, namespace: &str, problems: &mut Problems) -> Vec<ParentRef> {
    let refs = refs.map(Vec::as_slice).unwrap_or_default();
    at_most(refs.len(), PARENTS_MAX, "spec.parentRefs", problems);
    if refs.is_empty() {
        problems.warning(
            "spec.parentRefs",
            "is empty: the route is attached to nothing, and has no effect; a mesh route names a Service",
        );
    }
    let mut parents: Vec<ParentRef> = Vec::with_capacity(refs.len());
    for (at, reference) in refs.iter().enumerate() {
        let field = format!("spec.parentRefs[{at}]");
        let Some(parent) = parent(reference, namespace, &field, problems) else { continue };
        let same = |other: &&ParentRef| other.kind == parent.kind && other.name == parent.name;
        for other in parents.iter().filter(same) {
            let qualified = |p: &ParentRef| p.port.is_some() || p.section.is_some();
            if (&other.port, &other.section) == (&parent.port, &parent.section) {
                problems.error(field.as_str(), format!("is {} once more", parent.name));
            } else if !qualified(other) || !qualified(&parent) {
                let message = format!(
                    "is {} once more, wanted a sectionName or a port in each of several references to one parent",
                    parent.name
                );
                problems.error(field.as_str(), message);
            }
        }
        parents.push(parent);
    }
    parents
}

fn parent(
    reference: &wire::ParentRef,
    namespace: &str,
    field: &str,
    problems: &mut Problems,
) -> Option<ParentRef> {
    let group = reference.group.as_deref().unwrap_or(GROUP);
    let kind_name = match reference.kind.as_deref() {
        Some("") => {
            problems.error(format!("{field}.kind"), "is empty, wanted a kind, e.g. Service");
            return None;
        }
        kind => kind.unwrap_or("Gateway"),
    };
    let kind = match (group, kind_name) {
        ("" | "core", "Service") => ParentKind::Service,
        (ISTIO_GROUP, "ServiceEntry") => ParentKind::ServiceEntry,
        (GROUP, "Gateway") => ParentKind::Gateway,
        _ => ParentKind::Other(format!("{group}/{kind_name}").into()),
    };
    match &kind {
        ParentKind::Service | ParentKind::ServiceEntry => {}
        ParentKind::Gateway => {
            problems.warning(field, "is a Gateway, which the mesh does not have yet; the route has no effect there");
        }
        // A common slip: the default group is the Gateway API's own.
        ParentKind::Other(_) if kind_name == "Service" => problems.error(
            format!("{field}.group"),
            format!("is {group:?}, wanted \"\" (group: \"\") for a Service"),
        ),
        ParentKind::Other(other) => problems.warning(
            field,
            format!("is a {other}, wanted a Service (group: \"\") or a ServiceEntry; the route has no effect there"),
        ),
    }
    let name = object_name(reference.name.as_deref(), &format!("{field}.name"), problems)?;
    let namespace = namespace_of(reference.namespace.as_deref(), namespace, field, problems);
    let port = reference.port.and_then(|port| self::port(port, &format!("{field}.port"), problems));
    let section = reference.section_name.as_deref().filter(|section| !section.is_empty());
    if let Some(section) = section.filter(|section| !is_subdomain(section)) {
        problems.error(format!("{field}.sectionName"), format!("is {section:?}, wanted {NAME_WANTED}"));
    }
    Some(ParentRef { kind, name: Name::new(namespace, name), port, section: section.map(Into::into) })
}

const NAME_WANTED: &str = "lower-case letters, digits, '-' and '.', at most 253";

/// A name of an object; `None`, with a problem, when there is none.
pub(super) fn object_name<'a>(
    name: Option<&'a str>,
    field: &str,
    problems: &mut Problems,
) -> Option<&'a str> {
    match name {
        None | Some("") => {
            problems.error(field, "is missing");
            None
        }
        Some(name) if !is_subdomain(name) => {
            problems.error(field, format!("is {name:?}, wanted {NAME_WANTED}"));
            None
        }
        Some(name) => Some(name),
    }
}

/// The namespace of a reference: its own, else the route's.
fn namespace_of<'a>(given: Option<&'a str>, own: &'a str, field: &str, problems: &mut Problems) -> &'a str {
    match given {
        None | Some("") => own,
        Some(namespace) => {
            if !is_label(namespace) {
                let wanted = "wanted lower-case letters, digits and '-', at most 63";
                problems.error(format!("{field}.namespace"), format!("is {namespace:?}, {wanted}"));
            }
            namespace
        }
    }
}

/// A port number.
pub(super) fn port(number: i64, field: &str, problems: &mut Problems) -> Option<u16> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    if port.is_none() {
        problems.error(field, format!("is {number}, wanted a number from 1 to 65535"));
    }
    port
}

/// What a backend reference names, and its weight.
pub(super) fn backend(
    reference: &wire::PlainBackendRef,
    namespace: &str,
    field: &str,
    problems: &mut Problems,
) -> Option<(BackendRef, u32)> {
    let weight = match reference.weight {
        None => 1,
        Some(weight @ 0..=WEIGHT_MAX) => u32::try_from(weight).unwrap_or(1),
        Some(weight) => {
            problems.error(
                format!("{field}.weight"),
                format!("is {weight}, wanted a number from 0 to {WEIGHT_MAX}"),
            );
            return None;
        }
    };
    let object = wire::ObjectRef {
        group: reference.group.clone(),
        kind: reference.kind.clone(),
        namespace: reference.namespace.clone(),
        name: reference.name.clone(),
        port: reference.port,
    };
    Some((object_ref(&object, namespace, field, problems)?, weight))
}

/// What a reference without weight names.
pub(super) fn object_ref(
    reference: &wire::ObjectRef,
    namespace: &str,
    field: &str,
    problems: &mut Problems,
) -> Option<BackendRef> {
    let group = reference.group.as_deref().unwrap_or_default();
    let kind_name = match reference.kind.as_deref() {
        Some("") => {
            problems.error(format!("{field}.kind"), "is empty, wanted a kind, e.g. Service");
            return None;
        }
        kind => kind.unwrap_or("Service"),
    };
    let kind = match (group, kind_name) {
        ("" | "core", "Service") => BackendKind::Service,
        (ISTIO_GROUP, "ServiceEntry") => BackendKind::ServiceEntry,
        (ISTIO_GROUP, "Hostname") => BackendKind::Hostname,
        _ => BackendKind::Other(format!("{group}/{kind_name}").into()),
    };
    if let BackendKind::Other(other) = &kind {
        let message = format!(
            "is a {}, wanted a Service, or a ServiceEntry or Hostname of {ISTIO_GROUP}; its share of the requests is answered with 500",
            other.trim_start_matches('/')
        );
        problems.warning(format!("{field}.kind"), message);
    }
    let at_name = format!("{field}.name");
    let name = object_name(reference.name.as_deref(), &at_name, problems)?;
    let namespace = namespace_of(reference.namespace.as_deref(), namespace, field, problems);
    let port = match reference.port {
        Some(port) => Some(self::port(port, &format!("{field}.port"), problems)?),
        None if kind == BackendKind::Service => {
            problems.error(format!("{field}.port"), "is missing, wanted a port of the Service");
            return None;
        }
        None => None,
    };
    Some(BackendRef { kind, name: Name::new(namespace, name), port })
}

/// `spec.hostnames`.
fn hostnames(names: Option<&Vec<String>>, problems: &mut Problems) -> Vec<Arc<str>> {
    let names = names.map(Vec::as_slice).unwrap_or_default();
    at_most(names.len(), HOSTNAMES_MAX, "spec.hostnames", problems);
    let mut read: Vec<Arc<str>> = Vec::with_capacity(names.len());
    for (at, name) in names.iter().enumerate() {
        let field = format!("spec.hostnames[{at}]");
        if !is_hostname(name.strip_prefix("*.").unwrap_or(name)) {
            let wanted =
                "wanted a host name in lower case such as www.example.com or *.example.com, no address";
            problems.error(field, format!("is {name:?}, {wanted}"));
        } else if read.iter().any(|known| **known == **name) {
            problems.warning(field, format!("is {name:?} once more"));
        } else {
            read.push(name.as_str().into());
        }
    }
    read
}

/// A host name without wildcard; addresses are none.
pub(super) fn is_hostname(text: &str) -> bool {
    is_subdomain(text) && text.parse::<IpAddr>().is_err()
}

/// `name` of a rule; unique among `known`.
fn rule_name(
    name: Option<&str>,
    known: &mut Vec<Arc<str>>,
    field: &str,
    problems: &mut Problems,
) -> Option<Arc<str>> {
    let name = name?;
    let field = format!("{field}.name");
    if !is_subdomain(name) {
        problems.error(field, format!("is {name:?}, wanted {NAME_WANTED}"));
    } else if known.iter().any(|other| **other == *name) {
        problems.error(field, format!("is {name:?}, which another rule has already"));
    } else {
        known.push(name.into());
    }
    Some(name.into())
}

/// `useDefaultGateways`, which is of no use without gateways.
fn default_gateways(given: Option<&String>, problems: &mut Problems) {
    match given.map(String::as_str) {
        None | Some("" | "None") => {}
        Some("All") => {
            problems.warning("spec.useDefaultGateways", "has no effect: the mesh does not have gateways yet")
        }
        Some(other) => {
            problems.error("spec.useDefaultGateways", format!("is {other:?}, wanted All or None"));
        }
    }
}

/// What routes with host names have in common.
pub(super) struct Head {
    pub(super) name: Name,
    pub(super) created: Option<i64>,
    pub(super) parents: Vec<ParentRef>,
    pub(super) hostnames: Vec<Arc<str>>,
}

/// Name, age, parents and host names of a route.
pub(super) fn head<R>(meta: &ObjectMeta, spec: &wire::Spec<R>, problems: &mut Problems) -> Head {
    let head =
        head_without_hosts(meta, spec.parent_refs.as_ref(), spec.use_default_gateways.as_ref(), problems);
    Head { hostnames: hostnames(spec.hostnames.as_ref(), problems), ..head }
}

/// The same of a route that has no host names.
pub(super) fn head_without_hosts(
    meta: &ObjectMeta,
    refs: Option<&Vec<wire::ParentRef>>,
    gateways: Option<&String>,
    problems: &mut Problems,
) -> Head {
    let name = metadata::name(meta, Scope::Namespaced, problems);
    default_gateways(gateways, problems);
    let parents = parents(refs, &name.namespace, problems);
    Head { created: metadata::created(meta), parents, hostnames: Vec::new(), name }
}

/// Rules with their names, in order. `read` gets the rule, its name and its place.
pub(super) fn rules<W, R>(
    written: &[W],
    name: impl Fn(&W) -> Option<String>,
    problems: &mut Problems,
    mut read: impl FnMut(&W, Option<Arc<str>>, &str, &mut Problems) -> R,
) -> Vec<R> {
    at_most(written.len(), RULES_MAX, "spec.rules", problems);
    let mut names = Vec::new();
    let mut rules = Vec::with_capacity(written.len());
    for (at, rule) in written.iter().enumerate() {
        let field = format!("spec.rules[{at}]");
        let name = rule_name(name(rule).as_deref(), &mut names, &field, problems);
        rules.push(read(rule, name, &field, problems));
    }
    rules
}
