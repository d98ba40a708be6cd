//! What foreign clients are told where Istio's form cannot say what we mean: always something stricter.
//!
//! An ALLOW rule that cannot be said is left out; of a DENY rule the part that cannot be said is, so that it refuses more.
//! Modes of PeerAuthentication, which foreign clients do not know, become DENY policies (S70).

use std::{borrow::Cow, sync::Arc};

use mesh_core::{
    id,
    mode::{Mode, PortModes},
    policy::{Action, AuthorizationPolicy, Match, Rule, StringMatch},
    snapshot::{Mesh, Name},
};

use super::policy;
use crate::proto::{
    nodemesh,
    security::{self, Authorization},
};

/// What names of policies for foreign clients begin with; no Kubernetes name has `_`.
const MODES_PREFIX: &str = "nodemesh_modes_";
/// More ports than this are hashed for the name.
const PORTS_IN_NAME_MAX: usize = 8;
/// The trust domain that stands for the mesh's own whatever that is called.
const LOCAL_TRUST_DOMAIN: &str = "cluster.local";

/// The rules for foreign clients, if the policy's own cannot be said exactly.
pub(super) fn rules(policy: &AuthorizationPolicy, mesh: &Mesh) -> Option<Vec<security::Rule>> {
    let own: Vec<Option<Rule>> = policy
        .rules
        .iter()
        .map(|rule| match policy.action {
            Action::Allow => allow(rule, mesh),
            Action::Deny => Some(deny(rule, mesh)),
        })
        .collect();
    let exact = own.iter().zip(&policy.rules).all(|(foreign, rule)| foreign.as_ref() == Some(rule));
    (!exact).then(|| own.iter().flatten().map(policy::rule_value).collect())
}

/// `None` if the rule cannot be said without allowing more.
fn allow(rule: &Rule, mesh: &Mesh) -> Option<Rule> {
    let said = |m: &Match| {
        let (said, is_all) = say(m, mesh);
        is_all.then_some(said)
    };
    let clauses =
        rule.clauses.iter().map(|clause| clause.iter().map(said).collect()).collect::<Option<_>>()?;
    Some(Rule { clauses })
}

/// The rule without what cannot be said.
fn deny(rule: &Rule, mesh: &Mesh) -> Rule {
    let clause = |matches: &Vec<Match>| {
        let mut said = Vec::with_capacity(matches.len());
        for m in matches {
            let (part, is_all) = say(m, mesh);
            // An empty match never holds; what is left of this one always does, and so does its clause.
            if !is_all && part.is_empty() {
                return Vec::new();
            }
            said.push(part);
        }
        said
    };
    Rule { clauses: rule.clauses.iter().map(clause).collect() }
}

/// The match as far as it can be said, and whether that is all of it. What is left holds whenever the match does.
fn say(m: &Match, mesh: &Mesh) -> (Match, bool) {
    let mut said = Match {
        principals: aliased(&m.principals, mesh),
        not_principals: aliased(&m.not_principals, mesh),
        trust_domains: Vec::new(),
        not_trust_domains: Vec::new(),
        l7: false,
        ..m.clone()
    };
    let mut is_all = !m.l7;
    // Clients take an inner `*` literally.
    if said.namespaces.iter().any(has_inner_star) {
        said.namespaces.clear();
        is_all = false;
    }
    if said.not_namespaces.iter().any(has_inner_star) {
        said.not_namespaces.retain(|text| !has_inner_star(text));
        is_all = false;
    }
    // A trust domain is what a principal begins with.
    if let Some(prefixes) = domain_prefixes(&m.trust_domains, mesh).filter(|_| m.principals.is_empty()) {
        said.principals = prefixes;
    } else {
        is_all &= m.trust_domains.is_empty();
    }
    if let Some(prefixes) = domain_prefixes(&m.not_trust_domains, mesh) {
        said.not_principals.extend(prefixes);
    } else {
        is_all = false;
    }
    (said, is_all)
}

fn has_inner_star(text: &StringMatch) -> bool {
    match text {
        StringMatch::Exact(text) | StringMatch::Prefix(text) | StringMatch::Suffix(text) => {
            text.contains('*')
        }
        StringMatch::Present => false,
    }
}

/// Principals with those of the mesh's own trust domain repeated for every name it goes by (S88).
fn aliased(principals: &[StringMatch], mesh: &Mesh) -> Vec<StringMatch> {
    let mut all = Vec::with_capacity(principals.len());
    for principal in principals {
        let (text, make): (_, fn(Arc<str>) -> StringMatch) = match principal {
            StringMatch::Exact(text) => (text, StringMatch::Exact),
            StringMatch::Prefix(text) => (text, StringMatch::Prefix),
            StringMatch::Suffix(_) | StringMatch::Present => {
                all.push(principal.clone());
                continue;
            }
        };
        match text.split_once('/') {
            Some((domain, path)) if is_own(domain, mesh) && text.split('/').count() == 5 => {
                all.extend(mesh.trust_domains().map(|own| make(format!("{own}/{path}").into())));
            }
            _ => all.push(principal.clone()),
        }
    }
    all
}

fn is_own(domain: &str, mesh: &Mesh) -> bool {
    domain == LOCAL_TRUST_DOMAIN || mesh.is_own_trust_domain(domain)
}

/// Trust domains as beginnings of principals; `None` if one has a wildcard.
fn domain_prefixes(domains: &[StringMatch], mesh: &Mesh) -> Option<Vec<StringMatch>> {
    let mut prefixes = Vec::with_capacity(domains.len());
    for domain in domains {
        let StringMatch::Exact(domain) = domain else { return None };
        if domain.contains('*') {
            return None;
        }
        let names: Vec<Cow<'_, str>> = if mesh.is_own_trust_domain(domain) {
            mesh.trust_domains().map(Cow::Borrowed).collect()
        } else {
            vec![Cow::Borrowed(domain)]
        };
        prefixes.extend(names.iter().map(|name| StringMatch::Prefix(format!("{name}/").into())));
    }
    Some(prefixes)
}

/// The policy that says a workload's modes to foreign clients; `None` when they refuse nothing.
pub(super) fn of_modes(modes: &PortModes, mesh: &Mesh) -> Option<(Name, Authorization)> {
    let strict = |mode: &Mode| *mode == Mode::Strict;
    let default_is_strict = strict(&modes.default);
    let others = modes.ports.iter().filter(|(_, mode)| strict(mode) != default_is_strict);
    let others: Vec<u16> = others.map(|(port, _)| *port).collect();
    let mut unauthenticated = Match { not_principals: vec![StringMatch::Present], ..Match::default() };
    match (default_is_strict, others.is_empty()) {
        (false, true) => return None,
        (false, false) => unauthenticated.destination_ports.clone_from(&others),
        (true, _) => unauthenticated.not_destination_ports.clone_from(&others),
    }
    let kind = if default_is_strict { "strict" } else { "ports" };
    let mut ports: String = others.iter().map(|port| format!("_{port}")).collect();
    if others.len() > PORTS_IN_NAME_MAX {
        ports = format!("_{:016x}", id::hash(&[&ports]));
    }
    let name = Name::new(Arc::clone(&mesh.root_namespace), format!("{MODES_PREFIX}{kind}{ports}"));
    let authorization = Authorization {
        name: name.name.to_string(),
        namespace: name.namespace.to_string(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Deny.into(),
        rules: vec![policy::rule_value(&Rule { clauses: vec![vec![unauthenticated]] })],
        dry_run: false,
        nodemesh: Some(nodemesh::PolicyFacts { foreign_only: true, exact: None }),
    };
    Some((name, authorization))
}

/// Whether a policy of this name is one of [`of_modes`].
pub(super) fn is_of_modes(name: &Name) -> bool {
    name.name.starts_with(MODES_PREFIX)
}
