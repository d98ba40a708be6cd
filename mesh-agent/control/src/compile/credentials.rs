//! Secrets that DestinationRules name: which there are, and the nodes that get them.
//!
//! Invariants:
//! - A Secret is of the rule's own namespace, and goes only to nodes with pods that the rule selects.
//! - A rule without `workloadSelector` gets none: in Istio only gateways would read it.
//! - What is in a Secret is in no message.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use mesh_core::snapshot::{Credential, Material, Name, Snapshot, Workload};

use crate::{
    index::{Index, located},
    problem::{Level, SourceError},
    resource::{DestinationRule, Key, Kind, Resource},
};

/// What a Secret with authorities alone is called beside the one with the certificate.
const ROOTS_SUFFIX: &str = "-cacert";

/// Secrets for nodes.
#[derive(Debug, Default)]
pub(super) struct Credentials {
    pub(super) all: Vec<Arc<Credential>>,
    /// The Secrets that have to be known for it.
    pub(super) wanted: BTreeSet<Name>,
}

/// A Secret that a rule names.
fn secret_of(rule: &DestinationRule, name: &Arc<str>) -> Name {
    Name::new(Arc::clone(&rule.name.namespace), Arc::clone(name))
}

/// Finds them; those that did not change keep their allocation. `is_read`: Secrets are looked at at all.
pub(super) fn of(
    index: &Index,
    workloads: &[Arc<Workload>],
    before: &Snapshot,
    is_read: bool,
    problems: &mut Vec<SourceError>,
) -> Credentials {
    let mut found = Credentials::default();
    let mut all = BTreeMap::new();
    for (origin, resource) in index.each(Kind::DestinationRule) {
        let Resource::DestinationRule(rule) = resource else { continue };
        let key = Key { kind: Kind::DestinationRule, name: rule.name.clone() };
        for (field, name) in rule.credentials() {
            let mut warn = |message: String| {
                problems.push(located(&key, origin, Level::Warning, &field, message));
            };
            if rule.selector.is_empty() {
                warn(format!(
                    "is {name}, a Secret that only gateways read for a rule without workloadSelector; every connection of a workload by this rule is refused"
                ));
                continue;
            }
            let secret = secret_of(rule, &name);
            let content = material(index, &secret, is_read);
            if let Err(why) = &content {
                warn(format!("is {name}: {why}; every connection by this rule is refused"));
            }
            found.wanted.insert(roots_of(&secret));
            found.wanted.insert(secret.clone());
            let selects = |workload: &Workload| {
                rule.selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
            };
            let of_rule = workloads.iter().filter(|workload| {
                workload.meshed
                    && !workload.terminated
                    && !workload.node.is_empty()
                    && workload.name.namespace == rule.name.namespace
                    && selects(workload)
            });
            for workload in of_rule {
                let node = Arc::clone(&workload.node);
                all.entry((Arc::clone(&node), secret.clone())).or_insert_with(|| {
                    let now = Credential { node, name: secret.clone(), content: content.clone() };
                    super::reuse(before.credential(&now.node, &now.name), now)
                });
            }
        }
    }
    found.all = all.into_values().collect();
    found
}

fn roots_of(secret: &Name) -> Name {
    Name::new(Arc::clone(&secret.namespace), format!("{}{ROOTS_SUFFIX}", secret.name))
}

fn material(index: &Index, secret: &Name, is_read: bool) -> Result<Material, Arc<str>> {
    if !is_read {
        return Err("Secrets are not read; wanted the value controller.readSecrets=true of the chart".into());
    }
    let find = |name: Name| match index.get(&Key { kind: Kind::Secret, name }) {
        Some(Resource::Secret(secret)) => Some(&secret.material),
        _ => None,
    };
    let own = find(secret.clone());
    let roots = find(roots_of(secret)).and_then(|material| material.roots.clone());
    if own.is_none() && roots.is_none() {
        return Err(format!("there is no Secret {secret}").into());
    }
    let mut material = own.cloned().unwrap_or_default();
    material.roots = material.roots.or(roots);
    if material == Material::default() {
        return Err(
            format!("Secret {secret} has none of tls.crt, tls.key, ca.crt, cert, key and cacert").into()
        );
    }
    Ok(material)
}
