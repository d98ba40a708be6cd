//! AuthorizationPolicy as evaluation needs it: rules of clauses of matches.
//!
//! A rule holds if all of its clauses do, a clause if one of its matches does, a match if all of its fields do. `from`
//! and `to` of a manifest become one clause each, every `when` another: the form Istio's WDS sends as well, so both
//! sources give the same model and nothing is lost on the way.
//!
//! Not here: how texts match ([`super::matchers`]), what a policy says about a connection ([`super::evaluate`]).

use std::{fmt, sync::Arc};

use ipnet::IpNet;

use super::matchers::StringMatch;
use crate::snapshot::Name;

/// One AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AuthorizationPolicy {
    /// Namespace and name.
    pub name: Name,
    /// Which workloads it was written for. Whom it reaches is in [`crate::snapshot::Workload::policies`].
    pub scope: Scope,
    /// What happens to what its rules match.
    pub action: Action,
    /// Evaluated and reported, never enforced (`istio.io/dry-run`).
    pub dry_run: bool,
    /// Rules in the order of the manifest; it matches if one of them does. None: it never matches.
    pub rules: Vec<Rule>,
}

/// Which workloads a policy was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// All of the mesh: in the root namespace, without a selector.
    Mesh,
    /// All of its namespace.
    Namespace,
    /// Those its selector names: of its namespace or, in the root namespace, of the mesh.
    Selector,
}

/// What happens to what a policy's rules match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    /// Goes on; and what no ALLOW policy of a workload matches is refused.
    Allow,
    /// Is refused, whatever ALLOW policies say.
    Deny,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
        })
    }
}

/// One rule: holds if every clause does, so without clauses always.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rule {
    /// Clauses; each is a list of matches of which one has to hold, and an empty list always holds.
    pub clauses: Vec<Vec<Match>>,
}

/// One match: holds if every field that is given does. One without any field never holds.
///
/// A field holds if one of its values does; a `not_` field if none does.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Match {
    /// Peer identities without `spiffe://`; trust-domain aliases count (S88).
    pub principals: Vec<StringMatch>,
    /// Peer identities that must not be.
    pub not_principals: Vec<StringMatch>,
    /// Namespaces of the peer; `*` stands for any run of characters, anywhere.
    pub namespaces: Vec<StringMatch>,
    /// Namespaces the peer must not be of.
    pub not_namespaces: Vec<StringMatch>,
    /// Service accounts of the peer.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// Service accounts the peer must not have.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// Trust domains of the peer; `*` as in `namespaces`, aliases count.
    pub trust_domains: Vec<StringMatch>,
    /// Trust domains the peer must not be of.
    pub not_trust_domains: Vec<StringMatch>,
    /// Where the connection comes from (S79).
    pub source_ips: Vec<IpNet>,
    /// Where it must not come from.
    pub not_source_ips: Vec<IpNet>,
    /// The workload's own address that is dialled.
    pub destination_ips: Vec<IpNet>,
    /// The workload's own address that must not be dialled.
    pub not_destination_ips: Vec<IpNet>,
    /// The workload's own port, not the service's (S83).
    pub destination_ports: Vec<u16>,
    /// The workload's own port that must not be dialled.
    pub not_destination_ports: Vec<u16>,
    /// The match has fields besides that only the request can decide, or that are not known here. Such a field makes
    /// an ALLOW rule void and counts as true in a DENY rule (S85, S86, and closed where Istio is open).
    pub l7: bool,
}

/// A service account; no wildcards.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct ServiceAccountMatch {
    /// Namespace; a manifest that leaves it out means the policy's own.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl AuthorizationPolicy {
    /// A policy that its manifest names and nothing more: ALLOW without rules, so everybody is refused.
    pub fn named(name: Name) -> Self {
        Self { name, scope: Scope::Namespace, action: Action::Allow, dry_run: false, rules: Vec::new() }
    }

    /// Whether a rule has fields that only the request can decide.
    pub fn needs_requests(&self) -> bool {
        self.rules.iter().any(Rule::needs_requests)
    }
}

impl Rule {
    /// Whether a match has fields that only the request can decide.
    pub fn needs_requests(&self) -> bool {
        self.clauses.iter().flatten().any(|m| m.l7)
    }
}

impl Match {
    /// Whether no field is given; then it never holds (S87).
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
