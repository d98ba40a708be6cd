//! AuthorizationPolicies: our own exact form, and Istio's.
//!
//! Istio's form says most policies exactly. For the others a resource carries both: our agents read the exact rules, foreign
//! clients the stricter ones of [`super::foreign`].
//!
//! Invariant: what a newer server says and this version does not know makes a rule void (ALLOW) or wider (DENY).

use std::sync::Arc;

use ipnet::IpNet;
use mesh_core::{
    policy::{Action, AuthorizationPolicy, Match, Rule, Scope, ServiceAccountMatch, StringMatch},
    snapshot::{Mesh, Name},
};
use prost::Message as _;

use super::{
    foreign,
    value::{self, Located, Problem, each, text},
};
use crate::proto::{
    nodemesh,
    security::{self, Authorization, string_match::MatchType},
};

/// A decoded Authorization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Policy {
    /// One that our agents enforce.
    Own(Arc<AuthorizationPolicy>),
    /// One that says to foreign clients what ours know otherwise.
    ForeignOnly,
}

/// xDS name of a policy.
pub(super) fn resource_name(name: &Name) -> String {
    name.to_string()
}

/// Encodes a policy for all kinds of clients.
pub(super) fn encode(policy: &AuthorizationPolicy, mesh: &Mesh) -> Authorization {
    let foreign = foreign::rules(policy, mesh);
    let facts = foreign.as_ref().map(|_| nodemesh::PolicyFacts {
        foreign_only: false,
        exact: Some(nodemesh::Rules { rules: policy.rules.iter().map(exact_rule_value).collect() }),
    });
    Authorization {
        name: policy.name.name.to_string(),
        namespace: policy.name.namespace.to_string(),
        scope: match policy.scope {
            Scope::Mesh => security::Scope::Global,
            Scope::Namespace => security::Scope::Namespace,
            Scope::Selector => security::Scope::WorkloadSelector,
        }
        .into(),
        action: match policy.action {
            Action::Allow => security::Action::Allow,
            Action::Deny => security::Action::Deny,
        }
        .into(),
        rules: foreign.unwrap_or_else(|| policy.rules.iter().map(rule_value).collect()),
        dry_run: policy.dry_run,
        nodemesh: facts,
    }
}

/// Decodes an Authorization.
pub(super) fn decode(name: &str, body: &[u8]) -> Result<Policy, Located> {
    let message = Authorization::decode(body).map_err(|e| Located::at("message", Problem::Malformed(e)))?;
    let exact = match &message.nodemesh {
        Some(facts) if facts.foreign_only => return Ok(Policy::ForeignOnly),
        Some(facts) => facts.exact.as_ref(),
        None => None,
    };
    let scope = match security::Scope::try_from(message.scope) {
        Ok(security::Scope::Global) => Scope::Mesh,
        Ok(security::Scope::Namespace) => Scope::Namespace,
        Ok(security::Scope::WorkloadSelector) => Scope::Selector,
        Err(_) => return Err(Located::at("scope", Problem::Unknown(message.scope))),
    };
    let action = match security::Action::try_from(message.action) {
        Ok(security::Action::Allow) => Action::Allow,
        Ok(security::Action::Deny) => Action::Deny,
        Err(_) => return Err(Located::at("action", Problem::Unknown(message.action))),
    };
    let mut rules = match exact {
        Some(exact) => decode_exact(exact)?,
        None => decode_rules(&message.rules)?,
    };
    // The decoder skips fields it does not know; one of them may be a condition.
    if message.encoded_len() != body.len() {
        make_uncertain(&mut rules);
    }
    let name = match (message.namespace.as_str(), message.name.as_str()) {
        (_, "") => name_of(name)?,
        (namespace, own) => {
            Name { namespace: value::text_at("namespace", namespace)?, name: value::text_at("name", own)? }
        }
    };
    Ok(Policy::Own(Arc::new(AuthorizationPolicy { name, scope, action, dry_run: message.dry_run, rules })))
}

/// Namespace and name out of an xDS name.
fn name_of(resource: &str) -> Result<Name, Located> {
    let (namespace, name) = resource.split_once('/').ok_or_else(|| Located::at("name", Problem::Missing))?;
    Ok(Name { namespace: value::text_at("name", namespace)?, name: value::text_at("name", name)? })
}

/// Conditions may be missing: no ALLOW rule is certain, every DENY rule may hold.
fn make_uncertain(rules: &mut [Rule]) {
    for rule in rules {
        if rule.clauses.iter().all(Vec::is_empty) {
            rule.clauses.push(vec![Match::default()]);
        }
        rule.clauses.iter_mut().flatten().for_each(|m| m.l7 = true);
    }
}

/// Istio's form of a rule that it can say exactly.
pub(super) fn rule_value(rule: &Rule) -> security::Rule {
    let clause =
        |matches: &Vec<Match>| security::Clause { matches: matches.iter().map(match_value).collect() };
    security::Rule { clauses: rule.clauses.iter().map(clause).collect() }
}

/// Istio's form of a match, as far as it has the fields.
pub(super) fn match_value(m: &Match) -> security::Match {
    let texts = |list: &[StringMatch]| list.iter().map(text_value).collect();
    let nets = |list: &[IpNet]| list.iter().map(net_value).collect();
    let ports = |list: &[u16]| list.iter().map(|port| u32::from(*port)).collect();
    let accounts = |list: &[ServiceAccountMatch]| {
        let account = |a: &ServiceAccountMatch| security::ServiceAccountMatch {
            namespace: a.namespace.to_string(),
            service_account: a.name.to_string(),
        };
        list.iter().map(account).collect()
    };
    security::Match {
        namespaces: texts(&m.namespaces),
        not_namespaces: texts(&m.not_namespaces),
        principals: texts(&m.principals),
        not_principals: texts(&m.not_principals),
        source_ips: nets(&m.source_ips),
        not_source_ips: nets(&m.not_source_ips),
        destination_ips: nets(&m.destination_ips),
        not_destination_ips: nets(&m.not_destination_ips),
        destination_ports: ports(&m.destination_ports),
        not_destination_ports: ports(&m.not_destination_ports),
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
    }
}

fn text_value(text: &StringMatch) -> security::StringMatch {
    let match_type = match text {
        StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
        StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
        StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
        StringMatch::Present => MatchType::Presence(()),
    };
    security::StringMatch { match_type: Some(match_type) }
}

fn net_value(net: &IpNet) -> security::Address {
    security::Address { address: value::address_bytes(net.addr()), length: net.prefix_len().into() }
}

fn decode_rules(rules: &[security::Rule]) -> Result<Vec<Rule>, Located> {
    decode_tree(rules, |rule| rule.clauses.as_slice(), |clause| clause.matches.as_slice(), decode_match)
}

/// Rules of clauses of matches, in either form.
fn decode_tree<R, C, M>(
    rules: &[R],
    clauses: impl Fn(&R) -> &[C],
    matches: impl Fn(&C) -> &[M],
    decode: impl Fn(&M) -> Result<Match, Located>,
) -> Result<Vec<Rule>, Located> {
    let decode_clause = |clause: &C| -> Result<Vec<Match>, Located> {
        let list = value::bounded("matches", matches(clause))?;
        let at = |index: usize| format!("matches[{index}]");
        list.iter().enumerate().map(|(index, m)| decode(m).map_err(|e| e.within(at(index)))).collect()
    };
    let decode_rule = |rule: &R| -> Result<Rule, Located> {
        let list = value::bounded("clauses", clauses(rule))?;
        let at = |index: usize| format!("clauses[{index}]");
        let clauses = list.iter().enumerate().map(|(i, c)| decode_clause(c).map_err(|e| e.within(at(i))));
        Ok(Rule { clauses: clauses.collect::<Result<_, _>>()? })
    };
    let list = value::bounded("rules", rules)?;
    list.iter()
        .enumerate()
        .map(|(index, rule)| decode_rule(rule).map_err(|e| e.within(format_args!("rules[{index}]"))))
        .collect()
}

fn decode_match(m: &security::Match) -> Result<Match, Located> {
    let mut uncertain = false;
    // Of a list with an entry of an unknown form nothing is known: without it the match is wider, and uncertain.
    let mut texts = |field: &str, list: &[security::StringMatch]| -> Result<Vec<StringMatch>, Located> {
        let decoded: Vec<Option<StringMatch>> = each(field, list, decode_text)?;
        let known: Option<Vec<_>> = decoded.into_iter().collect();
        uncertain |= known.is_none();
        Ok(known.unwrap_or_default())
    };
    let principals = texts("principals", &m.principals)?;
    let not_principals = texts("not_principals", &m.not_principals)?;
    let namespaces = texts("namespaces", &m.namespaces)?;
    let not_namespaces = texts("not_namespaces", &m.not_namespaces)?;
    let nets = |field, list: &[security::Address]| each(field, list, |a| value::cidr(&a.address, a.length));
    let ports = |field, list: &[u32]| each(field, list, |p| value::port(*p));
    let accounts = |field, list: &[security::ServiceAccountMatch]| {
        each(field, list, |a| {
            Ok(ServiceAccountMatch { namespace: text(&a.namespace)?, name: text(&a.service_account)? })
        })
    };
    Ok(Match {
        principals,
        not_principals,
        namespaces,
        not_namespaces,
        service_accounts: accounts("service_accounts", &m.service_accounts)?,
        not_service_accounts: accounts("not_service_accounts", &m.not_service_accounts)?,
        trust_domains: Vec::new(),
        not_trust_domains: Vec::new(),
        source_ips: nets("source_ips", &m.source_ips)?,
        not_source_ips: nets("not_source_ips", &m.not_source_ips)?,
        destination_ips: nets("destination_ips", &m.destination_ips)?,
        not_destination_ips: nets("not_destination_ips", &m.not_destination_ips)?,
        destination_ports: ports("destination_ports", &m.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &m.not_destination_ports)?,
        l7: uncertain,
    })
}

/// `None` for a form that is not known here.
fn decode_text(value: &security::StringMatch) -> Result<Option<StringMatch>, Problem> {
    Ok(match &value.match_type {
        None => None,
        Some(MatchType::Exact(exact)) => Some(StringMatch::Exact(text(exact)?)),
        Some(MatchType::Prefix(prefix)) => Some(StringMatch::Prefix(text(prefix)?)),
        Some(MatchType::Suffix(suffix)) => Some(StringMatch::Suffix(text(suffix)?)),
        Some(MatchType::Presence(())) => Some(StringMatch::Present),
    })
}

fn exact_rule_value(rule: &Rule) -> nodemesh::Rule {
    let clause =
        |matches: &Vec<Match>| nodemesh::Clause { matches: matches.iter().map(exact_match_value).collect() };
    nodemesh::Rule { clauses: rule.clauses.iter().map(clause).collect() }
}

fn exact_match_value(m: &Match) -> nodemesh::Match {
    let texts = |list: &[StringMatch]| list.iter().map(exact_text_value).collect();
    let nets = |list: &[IpNet]| list.iter().map(cidr_value).collect();
    let ports = |list: &[u16]| list.iter().map(|port| u32::from(*port)).collect();
    let accounts = |list: &[ServiceAccountMatch]| {
        let account = |a: &ServiceAccountMatch| nodemesh::Name {
            namespace: a.namespace.to_string(),
            name: a.name.to_string(),
        };
        list.iter().map(account).collect()
    };
    nodemesh::Match {
        principals: texts(&m.principals),
        not_principals: texts(&m.not_principals),
        namespaces: texts(&m.namespaces),
        not_namespaces: texts(&m.not_namespaces),
        service_accounts: accounts(&m.service_accounts),
        not_service_accounts: accounts(&m.not_service_accounts),
        trust_domains: texts(&m.trust_domains),
        not_trust_domains: texts(&m.not_trust_domains),
        source_addresses: nets(&m.source_ips),
        not_source_addresses: nets(&m.not_source_ips),
        destination_addresses: nets(&m.destination_ips),
        not_destination_addresses: nets(&m.not_destination_ips),
        destination_ports: ports(&m.destination_ports),
        not_destination_ports: ports(&m.not_destination_ports),
        l7: m.l7,
    }
}

fn exact_text_value(text: &StringMatch) -> nodemesh::Text {
    use nodemesh::text::Form;
    let form = match text {
        StringMatch::Exact(text) => Form::Exact(text.to_string()),
        StringMatch::Prefix(text) => Form::Prefix(text.to_string()),
        StringMatch::Suffix(text) => Form::Suffix(text.to_string()),
        StringMatch::Present => Form::Present(true),
    };
    nodemesh::Text { form: Some(form) }
}

/// A block of addresses in our own form.
pub(super) fn cidr_value(net: &IpNet) -> nodemesh::Cidr {
    nodemesh::Cidr { address: value::address_bytes(net.addr()), length: net.prefix_len().into() }
}

fn decode_exact(rules: &nodemesh::Rules) -> Result<Vec<Rule>, Located> {
    let rules = &rules.rules;
    decode_tree(rules, |rule| rule.clauses.as_slice(), |clause| clause.matches.as_slice(), decode_exact_match)
        .map_err(|e| e.within("nodemesh.exact"))
}

fn decode_exact_match(m: &nodemesh::Match) -> Result<Match, Located> {
    let texts = |field, list: &[nodemesh::Text]| each(field, list, decode_exact_text);
    let nets = |field, list: &[nodemesh::Cidr]| each(field, list, |c| value::cidr(&c.address, c.length));
    let ports = |field, list: &[u32]| each(field, list, |p| value::port(*p));
    let accounts = |field, list: &[nodemesh::Name]| {
        each(field, list, |a| {
            Ok(ServiceAccountMatch { namespace: text(&a.namespace)?, name: text(&a.name)? })
        })
    };
    Ok(Match {
        principals: texts("principals", &m.principals)?,
        not_principals: texts("not_principals", &m.not_principals)?,
        namespaces: texts("namespaces", &m.namespaces)?,
        not_namespaces: texts("not_namespaces", &m.not_namespaces)?,
        service_accounts: accounts("service_accounts", &m.service_accounts)?,
        not_service_accounts: accounts("not_service_accounts", &m.not_service_accounts)?,
        trust_domains: texts("trust_domains", &m.trust_domains)?,
        not_trust_domains: texts("not_trust_domains", &m.not_trust_domains)?,
        source_ips: nets("source_addresses", &m.source_addresses)?,
        not_source_ips: nets("not_source_addresses", &m.not_source_addresses)?,
        destination_ips: nets("destination_addresses", &m.destination_addresses)?,
        not_destination_ips: nets("not_destination_addresses", &m.not_destination_addresses)?,
        destination_ports: ports("destination_ports", &m.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &m.not_destination_ports)?,
        l7: m.l7,
    })
}

fn decode_exact_text(value: &nodemesh::Text) -> Result<StringMatch, Problem> {
    use nodemesh::text::Form;
    match &value.form {
        Some(Form::Exact(exact)) => Ok(StringMatch::Exact(text(exact)?)),
        Some(Form::Prefix(prefix)) => Ok(StringMatch::Prefix(text(prefix)?)),
        Some(Form::Suffix(suffix)) => Ok(StringMatch::Suffix(text(suffix)?)),
        Some(Form::Present(true)) => Ok(StringMatch::Present),
        Some(Form::Present(false)) | None => Err(Problem::Missing),
    }
}
