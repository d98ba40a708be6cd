//! Sidecar: what workloads see of the mesh. It limits visibility; it is no firewall (S65).

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{
    route::scope::{EgressHost, EgressListener, OutboundPolicy},
    snapshot::Name,
};
use serde_json::Value;

use super::{
    Labels,
    destination_rule::{ConnectionPool, connection_pool},
    fields::{self, Object},
    host,
    metadata::{self, Scope},
    parts,
    virtual_service::{self, Destination},
};
use crate::problem::Problems;

/// What workloads see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// Name.
    pub name: Name,
    /// Seconds since 1970, if known: the oldest of several counts (S64).
    pub created: Option<i64>,
    /// Selects workloads of the namespace; empty for all of them, and in the root namespace of all namespaces without a Sidecar.
    pub selector: Labels,
    /// What is visible at which ports; `None`: everything, which is not the same as an empty list of hosts.
    pub egress: Option<Vec<EgressListener>>,
    /// What happens to destinations that nothing describes; `None`: as the mesh says.
    pub outbound: Option<OutboundPolicy>,
    /// Where such destinations are reached through.
    pub egress_proxy: Option<Destination>,
    /// Limits of the server's side (S45).
    pub inbound_pool: Option<ConnectionPool>,
    /// The same of ports, in place of that of all.
    pub inbound_ports: BTreeMap<u16, ConnectionPool>,
}

/// Reads a Sidecar. `root_namespace` is where mesh-wide ones live.
pub(crate) fn read(value: &Value, root_namespace: &str, problems: &mut Problems) -> Sidecar {
    let (meta, mut spec) = fields::document(value, problems);
    let name = metadata::name(&meta, Scope::Namespaced, problems);
    let selector = parts::selector(&mut spec, "workloadSelector", "labels", problems);
    if !selector.is_empty() && &*name.namespace == root_namespace {
        let message =
            format!("is there in the root namespace {root_namespace}, wanted a Sidecar without selector");
        problems.error(spec.at("workloadSelector"), message);
    }
    let egress = egress(&mut spec, &name.namespace, problems);
    let (outbound, egress_proxy) = outbound_of_workloads(&mut spec, &name.namespace, problems);
    let inbound_pool = connection_pool(&mut spec, "inboundConnectionPool", problems);
    if let Some(pool) = &inbound_pool {
        check_pool(pool, &spec.at("inboundConnectionPool"), problems);
    }
    let (ingress, inbound_ports) = ingress(&mut spec, problems);
    if ingress != 0 {
        let message = "is for what a sidecar listens on; there are none here, pods keep their own ports: only connectionPool counts";
        problems.warning(spec.at("ingress"), message);
    }
    let says = egress.is_some() || outbound.is_some() || inbound_pool.is_some() || ingress != 0;
    if !says {
        problems.warning("spec", "says nothing: its workloads see the whole mesh");
    }
    spec.finish(problems);
    Sidecar {
        created: metadata::created(&meta),
        name,
        selector,
        egress,
        outbound,
        egress_proxy,
        inbound_pool,
        inbound_ports,
    }
}

fn egress(
    spec: &mut Object<'_>,
    namespace: &Arc<str>,
    problems: &mut Problems,
) -> Option<Vec<EgressListener>> {
    let listed = spec.objects("egress", problems);
    if listed.is_empty() {
        return None;
    }
    let last = listed.len() - 1;
    let mut listeners: Vec<EgressListener> = Vec::new();
    for (at, mut object) in listed.into_iter().enumerate() {
        let given = object.has("port");
        let port = listener_port(&mut object, problems);
        if !given && at != last {
            let message = "has no port and is not the last, wanted the listener for the rest at the end";
            problems.error(object.path.as_str(), message);
        }
        if port.is_some() && listeners.iter().any(|other| other.port == port) {
            problems.error(object.at("port"), "is there already, wanted one listener for each port");
        }
        let bind = object.text("bind", problems);
        if bind.is_some() && !given {
            problems.error(object.at("bind"), "is there without port, wanted both or none");
        }
        let modes = [("DEFAULT", ()), ("IPTABLES", ()), ("NONE", ())];
        object.word("captureMode", &modes, problems);
        let why = "is for what a sidecar listens on; there are none here and it has no effect";
        object.no_effect(&["bind", "captureMode"], why, problems);
        let hosts = hosts(&mut object, namespace, problems);
        object.finish(problems);
        listeners.push(EgressListener { port, hosts });
    }
    Some(listeners)
}

/// Reads `port` of a listener.
fn listener_port(object: &mut Object<'_>, problems: &mut Problems) -> Option<u16> {
    let mut port = object.object("port", problems)?;
    let number = port.port("number", problems);
    if !port.has("number") {
        problems.error(port.at("number"), "is missing, wanted a number from 1 to 65535");
    }
    // They name what the listener would speak; here the service's own ports say so.
    for name in ["protocol", "name"] {
        port.text(name, problems);
    }
    port.no_effect(&["targetPort"], "has no effect", problems);
    port.finish(problems);
    number
}

fn hosts(object: &mut Object<'_>, own: &Arc<str>, problems: &mut Problems) -> Vec<EgressHost> {
    let texts = object.texts("hosts", problems);
    if texts.is_empty() && object.get("hosts").is_none_or(|node| node.value.is_array()) {
        problems.error(object.at("hosts"), "is missing, wanted at least one NAMESPACE/HOST");
    }
    let mut hosts = Vec::new();
    for (path, text) in texts {
        let Some((namespace, host)) = text.split_once('/') else {
            problems
                .error(path, format!("is {text:?}, wanted NAMESPACE/HOST such as ./* or prod/*.example.com"));
            continue;
        };
        if let Err(wanted) = host::check_pattern(host) {
            problems.error(path, format!("is {text:?}, wanted after the slash {wanted}"));
            continue;
        }
        // `~/*` is nothing at all; `~ns/host` takes away.
        if namespace == "~" {
            if host != "*" {
                problems.warning(path, format!("is {text:?}, which is nothing, as ~/* is"));
            }
            continue;
        }
        let (excluded, namespace) = match namespace.strip_prefix('~') {
            Some(rest) => (true, rest),
            None => (false, namespace),
        };
        let namespace: Option<Arc<str>> = match namespace {
            "*" => None,
            "." => Some(Arc::clone(own)),
            name if metadata::is_label(name) => Some(name.into()),
            name => {
                problems
                    .error(path, format!("is {text:?}, wanted a namespace, '.' or '*' instead of {name:?}"));
                continue;
            }
        };
        hosts.push(EgressHost { excluded, namespace, host: host.to_ascii_lowercase().into() });
    }
    hosts
}

/// Reads the `outboundTrafficPolicy` of the mesh; without a mode it means `unset`.
pub(super) fn outbound(
    spec: &mut Object<'_>,
    unset: OutboundPolicy,
    problems: &mut Problems,
) -> Option<OutboundPolicy> {
    let mut policy = spec.object("outboundTrafficPolicy", problems)?;
    let mode = outbound_mode(&mut policy, unset, problems);
    policy.finish(problems);
    Some(mode)
}

/// Reads `outboundTrafficPolicy` with its `egressProxy` (S68).
fn outbound_of_workloads(
    spec: &mut Object<'_>,
    namespace: &Arc<str>,
    problems: &mut Problems,
) -> (Option<OutboundPolicy>, Option<Destination>) {
    let Some(mut policy) = spec.object("outboundTrafficPolicy", problems) else { return (None, None) };
    let mode = outbound_mode(&mut policy, OutboundPolicy::RegistryOnly, problems);
    let proxy = policy.object("egressProxy", problems).and_then(|mut object| {
        let proxy = virtual_service::destination(&mut object, namespace, problems);
        object.finish(problems);
        proxy
    });
    if policy.has("egressProxy") && mode == OutboundPolicy::RegistryOnly {
        problems.error(policy.at("egressProxy"), "is there beside mode REGISTRY_ONLY, wanted ALLOW_ANY");
    }
    policy.finish(problems);
    (Some(mode), proxy)
}

fn outbound_mode(policy: &mut Object<'_>, unset: OutboundPolicy, problems: &mut Problems) -> OutboundPolicy {
    let modes = [("REGISTRY_ONLY", OutboundPolicy::RegistryOnly), ("ALLOW_ANY", OutboundPolicy::AllowAny)];
    let mode = policy.word("mode", &modes, problems);
    if !policy.has("mode") {
        let word = if unset == OutboundPolicy::AllowAny { "ALLOW_ANY" } else { "REGISTRY_ONLY" };
        problems.warning(policy.at("mode"), format!("is missing, which means {word}"));
    }
    mode.unwrap_or(unset)
}

/// What nothing can be done about on the server's side. Nothing is repeated there, so that `maxRetries` is kept; apps are spoken to in the
/// protocol of their clients in any case, as `useClientProtocol` wants it.
fn check_pool(pool: &ConnectionPool, path: &str, problems: &mut Problems) {
    let fields = [
        ("h2UpgradePolicy", pool.h2_upgrade == Some(true)),
        ("http2KeepAlive", pool.http2_keepalive.is_some()),
    ];
    for (field, _) in fields.into_iter().filter(|(_, given)| *given) {
        let message = "has no effect on the server's side; wanted a DestinationRule for clients";
        problems.warning(format!("{path}.http.{field}"), message);
    }
}

/// Reads `ingress`: how many entries there are, and the limits of their ports. All else has no effect here.
fn ingress(spec: &mut Object<'_>, problems: &mut Problems) -> (usize, BTreeMap<u16, ConnectionPool>) {
    let mut pools = BTreeMap::new();
    let listed = spec.objects("ingress", problems);
    let count = listed.len();
    let mut ports = Vec::new();
    for mut object in listed {
        let given = object.has("port");
        let port = listener_port(&mut object, problems);
        if !given {
            problems.error(object.at("port"), "is missing, wanted the port of a listener");
        }
        if port.is_some() && ports.contains(&port) {
            problems.error(object.at("port"), "is there already, wanted one listener for each port");
        }
        ports.push(port);
        for name in ["bind", "captureMode", "defaultEndpoint"] {
            object.text(name, problems);
        }
        object.get("tls");
        let pool = connection_pool(&mut object, "connectionPool", problems);
        if let (Some(port), Some(pool)) = (port, pool) {
            check_pool(&pool, &object.at("connectionPool"), problems);
            pools.insert(port, pool);
        }
        object.finish(problems);
    }
    (count, pools)
}

#[cfg(test)]
mod tests;
