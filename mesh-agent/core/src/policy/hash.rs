//! Hashes of what evaluation reads: they move a workload's policy generation, which voids cached verdicts.
//!
//! Invariants:
//! - Equal hashes mean equal verdicts for every peer and port; stable across restarts and versions of a policy's text.
//! - Nothing else moves them: neither names nor dry-run policies, whose verdicts count for nothing.

use std::fmt::Display;

use super::{
    matchers::StringMatch,
    model::{AuthorizationPolicy, Match, ServiceAccountMatch},
};
use crate::{
    id::hash,
    mode::{Mode, PortModes},
    snapshot::Mesh,
};

/// Hash of everything [`super::admit`] reads of a workload.
///
/// `contents` are the [`content_hash`]es of the policies that apply, in the order of the policies' names. Overrides of
/// modes that equal the default change nothing and do not count.
pub fn policy_hash(modes: &PortModes, mesh: &Mesh, contents: &[u64]) -> u64 {
    let mut parts = Parts::default();
    parts.list("modes", [mode(modes.default)]);
    let overrides = modes.ports.iter().filter(|(_, m)| **m != modes.default);
    parts.list("ports", overrides.map(|(port, m)| format!("{port}={}", mode(*m))));
    parts.list("domains", mesh.trust_domains());
    parts.list("policies", contents);
    parts.hash()
}

/// Hash of what a policy's evaluation reads; `None` for one that is not enforced.
pub fn content_hash(policy: &AuthorizationPolicy) -> Option<u64> {
    if policy.dry_run {
        return None;
    }
    let mut parts = Parts::default();
    parts.list("action", [policy.action]);
    for rule in &policy.rules {
        parts.list("rule", [rule.clauses.len()]);
        for clause in &rule.clauses {
            parts.list("clause", [clause.len()]);
            for m in clause {
                parts.of_match(m);
            }
        }
    }
    Some(parts.hash())
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Disable => "disable",
        Mode::Permissive => "permissive",
        Mode::Strict => "strict",
    }
}

/// A value with its form: the same text can be written in two of them by hand.
fn text(value: &StringMatch) -> String {
    match value {
        StringMatch::Exact(text) => format!("={text}"),
        StringMatch::Prefix(text) => format!("^{text}"),
        StringMatch::Suffix(text) => format!("${text}"),
        StringMatch::Present => "*".to_owned(),
    }
}

/// The texts that are hashed. Every list says how long it is, so no two structures give the same texts.
#[derive(Default)]
struct Parts(Vec<String>);

impl Parts {
    fn list(&mut self, tag: &str, values: impl IntoIterator<Item = impl Display>) {
        let tag_at = self.0.len();
        self.0.push(String::new());
        self.0.extend(values.into_iter().map(|value| value.to_string()));
        let len = self.0.len() - tag_at - 1;
        if let Some(slot) = self.0.get_mut(tag_at) {
            *slot = format!("{tag}:{len}");
        }
    }

    fn of_match(&mut self, m: &Match) {
        // Named one by one, so that a new field cannot be forgotten.
        let Match {
            principals,
            not_principals,
            namespaces,
            not_namespaces,
            service_accounts,
            not_service_accounts,
            trust_domains,
            not_trust_domains,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
            l7,
        } = m;
        self.list("principals", principals.iter().map(text));
        self.list("not_principals", not_principals.iter().map(text));
        self.list("namespaces", namespaces.iter().map(text));
        self.list("not_namespaces", not_namespaces.iter().map(text));
        let account = |a: &ServiceAccountMatch| format!("{}/{}", a.namespace, a.name);
        self.list("service_accounts", service_accounts.iter().map(account));
        self.list("not_service_accounts", not_service_accounts.iter().map(account));
        self.list("trust_domains", trust_domains.iter().map(text));
        self.list("not_trust_domains", not_trust_domains.iter().map(text));
        self.list("source_ips", source_ips);
        self.list("not_source_ips", not_source_ips);
        self.list("destination_ips", destination_ips);
        self.list("not_destination_ips", not_destination_ips);
        self.list("destination_ports", destination_ports);
        self.list("not_destination_ports", not_destination_ports);
        self.list("l7", [l7]);
    }

    fn hash(&self) -> u64 {
        hash(&self.0.iter().map(String::as_str).collect::<Vec<_>>())
    }
}
