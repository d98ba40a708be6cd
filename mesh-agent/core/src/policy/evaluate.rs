//! What one policy says about one connection.
//!
//! Fields that cannot be decided here (L7, or an address nobody knows) are neither true nor false: ALLOW needs a certain
//! yes, DENY takes a maybe. So what is not known never grants anything.

use std::{borrow::Borrow, net::IpAddr};

use ipnet::IpNet;

use super::{
    matchers::{StringMatch, principal_matches, trust_domain_matches},
    model::{Action, AuthorizationPolicy, Match, Rule, ServiceAccountMatch},
};
use crate::{identity::Identity, snapshot::Mesh};

/// A connection as policies see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    pub(super) mesh: &'a Mesh,
    /// `None` for a peer without one.
    pub(super) identity: Option<&'a Identity>,
    /// `None` if nobody knows.
    pub(super) source: Option<IpAddr>,
    pub(super) destination: IpAddr,
    pub(super) port: u16,
}

/// Three-valued truth, ordered: "and" is the minimum, "or" the maximum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    No,
    Maybe,
    Yes,
}

impl Truth {
    fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
            Self::Yes => Self::No,
        }
    }
}

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// The first rule of `policy` that matches, by its place.
pub(super) fn matching_rule(policy: &AuthorizationPolicy, subject: &Subject<'_>) -> Option<usize> {
    policy.rules.iter().position(|rule| match policy.action {
        // Void as a whole, also where another match of the same clause would do: S85, S86.
        Action::Allow => !rule.needs_requests() && rule_holds(rule, subject) == Truth::Yes,
        Action::Deny => rule_holds(rule, subject) >= Truth::Maybe,
    })
}

fn rule_holds(rule: &Rule, subject: &Subject<'_>) -> Truth {
    all(&rule.clauses, |clause| match clause.as_slice() {
        [] => Truth::Yes,
        matches => any(matches, |m| match_holds(m, subject)),
    })
}

fn match_holds(m: &Match, subject: &Subject<'_>) -> Truth {
    if m.is_empty() {
        return Truth::No;
    }
    let identity = |holds: &dyn Fn(&Identity) -> bool| Truth::from(subject.identity.is_some_and(holds));
    let principal = |p: &StringMatch| identity(&|peer| principal_matches(p, peer, subject.mesh));
    let namespace = |n: &StringMatch| identity(&|peer| n.matches_glob(&peer.namespace));
    let account = |a: &ServiceAccountMatch| {
        identity(&|peer| a.namespace == peer.namespace && a.name == peer.service_account)
    };
    let domain = |d: &StringMatch| identity(&|peer| trust_domain_matches(d, peer, subject.mesh));
    let source = |net: &IpNet| match subject.source {
        Some(addr) => Truth::from(contains(net, addr)),
        None => Truth::Maybe,
    };
    let destination = |net: &IpNet| Truth::from(contains(net, subject.destination));
    let port = |port: &u16| Truth::from(*port == subject.port);
    let fields = [
        field(&m.principals, principal),
        field_not(&m.not_principals, principal),
        field(&m.namespaces, namespace),
        field_not(&m.not_namespaces, namespace),
        field(&m.service_accounts, account),
        field_not(&m.not_service_accounts, account),
        field(&m.trust_domains, domain),
        field_not(&m.not_trust_domains, domain),
        field(&m.source_ips, source),
        field_not(&m.not_source_ips, source),
        field(&m.destination_ips, destination),
        field_not(&m.not_destination_ips, destination),
        field(&m.destination_ports, port),
        field_not(&m.not_destination_ports, port),
        if m.l7 { Truth::Maybe } else { Truth::Yes },
    ];
    all(&fields, |truth| *truth)
}

/// A field that is not given holds.
fn field<T>(values: &[T], holds: impl Fn(&T) -> Truth) -> Truth {
    if values.is_empty() { Truth::Yes } else { any(values, holds) }
}

fn field_not<T>(values: &[T], holds: impl Fn(&T) -> Truth) -> Truth {
    if values.is_empty() { Truth::Yes } else { any(values, holds).not() }
}

fn any<T>(values: &[T], holds: impl Fn(&T) -> Truth) -> Truth {
    values.iter().map(holds).max().unwrap_or(Truth::No)
}

fn all<T>(values: &[T], holds: impl Fn(&T) -> Truth) -> Truth {
    values.iter().map(holds).min().unwrap_or(Truth::Yes)
}

/// Whether an address lies in a network; an IPv4 address that is written as IPv6 is IPv4.
fn contains(net: impl Borrow<IpNet>, addr: IpAddr) -> bool {
    net.borrow().contains(&addr.to_canonical())
}
