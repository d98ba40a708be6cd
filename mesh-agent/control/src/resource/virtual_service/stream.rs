//! Rules of a VirtualService for TLS and TCP.

use std::sync::Arc;

use super::{ClientMatch, RuleScope, StreamDestination, StreamMatch, StreamRoute};
use crate::{
    problem::Problems,
    resource::{
        fields::{Node, Object},
        host, parts,
    },
};

/// Which list of rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proto {
    /// `spec.tls`.
    Tls,
    /// `spec.tcp`.
    Tcp,
}

/// Reads the rules of one protocol.
pub(super) fn read(
    spec: &mut Object<'_>,
    proto: Proto,
    scope: &RuleScope<'_>,
    problems: &mut Problems,
) -> Vec<StreamRoute> {
    let name = if proto == Proto::Tls { "tls" } else { "tcp" };
    let rules = spec.list(name, problems);
    rules.iter().filter_map(|node| rule(node, proto, scope, problems)).collect()
}

fn rule(
    node: &Node<'_>,
    proto: Proto,
    scope: &RuleScope<'_>,
    problems: &mut Problems,
) -> Option<StreamRoute> {
    let mut rule = node.object(problems)?;
    let matches: Vec<StreamMatch> = rule
        .objects("match", problems)
        .into_iter()
        .map(|object| one_match(object, proto, scope, problems))
        .collect();
    if proto == Proto::Tls && !rule.has("match") {
        problems.error(rule.at("match"), "is missing, wanted at least one match with sniHosts");
    }
    let mut destinations = Vec::new();
    let listed = rule.objects("route", problems);
    if listed.is_empty() {
        problems.error(rule.at("route"), "is missing, wanted at least one destination");
    }
    for mut object in listed {
        let destination = match object.object("destination", problems) {
            Some(mut inner) => {
                let read = super::destination(&mut inner, &scope.name.namespace, problems);
                inner.finish(problems);
                read
            }
            None => {
                if !object.has("destination") {
                    problems.error(object.at("destination"), "is missing");
                }
                None
            }
        };
        let weight = super::weight(&mut object, problems);
        object.finish(problems);
        destinations.extend(destination.map(|destination| StreamDestination { destination, weight }));
    }
    let weights: Vec<u32> = destinations.iter().map(|destination| destination.weight).collect();
    super::check_weights(&rule.at("route"), &weights, problems);
    rule.finish(problems);
    Some(StreamRoute { field: Arc::from(&*node.path), matches, destinations })
}

fn one_match(
    mut object: Object<'_>,
    proto: Proto,
    scope: &RuleScope<'_>,
    problems: &mut Problems,
) -> StreamMatch {
    let sni = match proto {
        Proto::Tls => sni_hosts(&mut object, scope, problems),
        Proto::Tcp => Vec::new(),
    };
    let subnets = parts::nets(&mut object, "destinationSubnets", problems);
    let ClientMatch { port, source_labels, source_namespace, gateways } =
        super::client(&mut object, scope, problems);
    if proto == Proto::Tcp {
        object.no_effect(&["sourceSubnet"], "is not supported, by Istio either; it has no effect", problems);
    }
    object.finish(problems);
    StreamMatch { sni, subnets, port, source_labels, source_namespace, gateways }
}

/// Reads `sniHosts`; each must be covered by a host of the VirtualService (D18).
fn sni_hosts(object: &mut Object<'_>, scope: &RuleScope<'_>, problems: &mut Problems) -> Vec<Arc<str>> {
    let texts = object.texts("sniHosts", problems);
    if texts.is_empty() && !object.has("sniHosts") {
        problems.error(object.at("sniHosts"), "is missing, wanted at least one server name");
    }
    let mut hosts: Vec<Arc<str>> = Vec::new();
    for (path, text) in texts {
        if let Err(wanted) = host::check_pattern(text) {
            problems.error(path, format!("is {text:?}, wanted {wanted}"));
            continue;
        }
        let sni = text.to_ascii_lowercase();
        let covers = |of: &host::RuleHost| match of {
            host::RuleHost::Full(of) => host::is_within(&sni, of),
            // By its short name, or by the full one whatever the cluster's domain is.
            host::RuleHost::Short { name, namespace } => {
                *sni == **name || sni.starts_with(&format!("{name}.{namespace}.svc."))
            }
        };
        if !scope.hosts.iter().any(covers) {
            let message = format!("is {text:?}, which no host of spec.hosts covers");
            problems.error(path, message);
        }
        hosts.push(sni.into());
    }
    hosts
}
