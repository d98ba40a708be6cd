//! What comes out of evaluation: a verdict, why, and which policy and rule gave it; in words too.

use std::fmt;

use super::model::Action;
use crate::snapshot::Name;

/// What a peer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Goes on.
    Allow,
    /// Refused, counted and logged under this reason.
    Deny(DenyReason),
}

impl Verdict {
    /// Whether the peer may go on.
    pub fn is_allow(self) -> bool {
        self == Self::Allow
    }
}

/// Why a peer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenyReason {
    /// The port's mode is STRICT and the peer proves no identity.
    StrictPlaintext,
    /// The destination is not in the snapshot: nothing is known of its policy, so nothing passes.
    UnknownWorkload,
    /// A DENY policy matches.
    PolicyDenied,
    /// There are ALLOW policies and none of them matches.
    NoPolicyAllows,
    /// The peer's identity is of a trust domain that is neither the mesh's nor an alias.
    PeerTrustDomain,
    /// A policy applies, and the peer that the kernel names is not in the snapshot.
    UnknownPeer,
    /// A policy applies that is not in the snapshot.
    UnknownPolicy,
}

impl DenyReason {
    /// Every reason, in the order of the declaration.
    pub const ALL: [Self; 7] = [
        Self::StrictPlaintext,
        Self::UnknownWorkload,
        Self::PolicyDenied,
        Self::NoPolicyAllows,
        Self::PeerTrustDomain,
        Self::UnknownPeer,
        Self::UnknownPolicy,
    ];

    /// Stable text for metric labels and logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::StrictPlaintext => "strict_plaintext",
            Self::UnknownWorkload => "unknown_workload",
            Self::PolicyDenied => "policy_denied",
            Self::NoPolicyAllows => "no_policy_allows",
            Self::PeerTrustDomain => "peer_trust_domain",
            Self::UnknownPeer => "unknown_peer",
            Self::UnknownPolicy => "unknown_policy",
        }
    }
}

/// A verdict with what led to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// What the peer gets.
    pub verdict: Verdict,
    /// The AuthorizationPolicy that decided; `None` when none did: the mode, or no policy applies, or several ALLOW
    /// policies apply of which none matches.
    pub decided_by: Option<DecidedBy>,
    /// What the dry-run policies of the workload say, by name. Empty if no policy was looked at.
    pub dry_run: Vec<DryRun>,
}

/// The policy that decided.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DecidedBy {
    /// Its name.
    pub policy: Name,
    /// Index of the rule that matched; `None` for the only ALLOW policy, none of whose rules matched.
    pub rule: Option<usize>,
}

/// What a dry-run policy says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DryRun {
    /// Its name.
    pub policy: Name,
    /// What it would do to what it matches.
    pub action: Action,
    /// Index of the rule that matched, if one did.
    pub rule: Option<usize>,
}

impl DryRun {
    /// Whether this policy alone, enforced, would refuse the connection.
    pub fn would_deny(&self) -> bool {
        match self.action {
            Action::Allow => self.rule.is_none(),
            Action::Deny => self.rule.is_some(),
        }
    }
}

impl Judgement {
    pub(super) fn deny(reason: DenyReason) -> Self {
        Self { verdict: Verdict::Deny(reason), decided_by: None, dry_run: Vec::new() }
    }

    /// Whether the peer may go on.
    pub fn is_allow(&self) -> bool {
        self.verdict.is_allow()
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StrictPlaintext => "the port is STRICT and the client proves no identity",
            Self::UnknownWorkload => "nothing is known of the server's policy",
            Self::PolicyDenied => "an AuthorizationPolicy of the server denies it",
            Self::NoPolicyAllows => {
                "the server has AuthorizationPolicies that allow, and none of them allows this"
            }
            Self::PeerTrustDomain => "the client's trust domain is neither the mesh's nor an alias",
            Self::UnknownPeer => {
                "the server has AuthorizationPolicies, and nothing is known of the client's identity"
            }
            Self::UnknownPolicy => "a policy of the server has not arrived yet, so nothing passes",
        })
    }
}

impl fmt::Display for DecidedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthorizationPolicy {}", self.policy)?;
        match self.rule {
            Some(rule) => write!(f, ", rule {rule}"),
            None => Ok(()),
        }
    }
}

/// A sentence.
impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.verdict, &self.decided_by) {
            (Verdict::Allow, Some(by)) => write!(f, "{by} allows it"),
            (Verdict::Allow, None) => f.write_str("no AuthorizationPolicy of the server forbids it"),
            (Verdict::Deny(DenyReason::PolicyDenied), Some(by)) => write!(f, "{by} denies it"),
            (Verdict::Deny(DenyReason::NoPolicyAllows), Some(by)) => {
                write!(f, "{by} is the only one that allows anything, and none of its rules matches")
            }
            (Verdict::Deny(DenyReason::UnknownPolicy), Some(by)) => {
                write!(f, "{by} applies and has not arrived yet, so nothing passes")
            }
            (Verdict::Deny(reason), _) => reason.fmt(f),
        }
    }
}
