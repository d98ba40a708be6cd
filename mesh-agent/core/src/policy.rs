//! Policy evaluation: may this peer talk to this port of this workload?
//!
//! Order: the port's mutual TLS mode, then DENY policies, then ALLOW policies (S74). Dry-run policies are evaluated beside
//! them and decide nothing (S89).
//!
//! Invariants:
//! - [`admit`] is the only place that answers; the kernel only caches its answers or follows
//!   [`fail_closed_inbound`], which comes from the same inputs.
//! - Everything evaluation reads of a workload is covered by [`policy_hash`].
//! - What is not known grants nothing: an unknown workload, policy or peer is refused.

mod evaluate;
mod hash;
mod judgement;
mod matchers;
mod model;

use std::{borrow::Cow, net::IpAddr, sync::Arc};

pub use self::{
    hash::{content_hash, policy_hash},
    judgement::{DecidedBy, DenyReason, DryRun, Judgement, Verdict},
    matchers::StringMatch,
    model::{Action, AuthorizationPolicy, Match, Rule, Scope, ServiceAccountMatch},
};
use crate::{
    id::WorkloadId,
    identity::Identity,
    mode::Mode,
    snapshot::{Name, Snapshot, Tunnel, Workload},
};

/// Who is on the other side of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A meshed pod of this node; the kernel says which one (socket → network namespace → pod).
    Kernel(WorkloadId),
    /// Proved by a certificate that was verified.
    Tls(Arc<Identity>),
    /// Nothing is proved: plaintext from anywhere.
    Unauthenticated,
}

/// A connection to be judged.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    /// Who asks.
    pub peer: &'a Peer,
    /// The address it comes from: of kernel and HBONE peers the client pod's own. `None` if nobody knows; then
    /// rules about it do not let anybody in, and keep out.
    pub source: Option<IpAddr>,
    /// The workload's own address that is dialled.
    pub destination: IpAddr,
    /// The workload's own port, not the service's.
    pub port: u16,
}

/// Judges a connection to `dest`.
pub fn admit(snapshot: &Snapshot, attempt: &Attempt<'_>, dest: &Workload) -> Judgement {
    let identity = match attempt.peer {
        Peer::Unauthenticated if dest.modes.of(attempt.port) == Mode::Strict => {
            return Judgement::deny(DenyReason::StrictPlaintext);
        }
        Peer::Unauthenticated => None,
        Peer::Tls(identity) if !snapshot.mesh().is_own_trust_domain(&identity.trust_domain) => {
            return Judgement::deny(DenyReason::PeerTrustDomain);
        }
        Peer::Tls(identity) => Some(Cow::Borrowed(&**identity)),
        Peer::Kernel(id) => match snapshot.workload(*id) {
            Some(workload) => Some(Cow::Owned(workload.identity())),
            None if !is_policed(snapshot, dest) => None,
            None => return Judgement::deny(DenyReason::UnknownPeer),
        },
    };
    let subject = evaluate::Subject {
        mesh: snapshot.mesh(),
        identity: identity.as_deref(),
        source: attempt.source,
        destination: attempt.destination,
        port: attempt.port,
    };
    judge(snapshot, &subject, &dest.policies)
}

/// What the policies of these names say.
fn judge(snapshot: &Snapshot, subject: &evaluate::Subject<'_>, names: &[Name]) -> Judgement {
    let (mut denied, mut allowed, mut unknown) = (None, None, None);
    let mut allowing: Vec<&Name> = Vec::new();
    let mut dry_run = Vec::new();
    for name in names {
        let Some(policy) = snapshot.policy(name) else {
            unknown = unknown.or(Some(name));
            continue;
        };
        let decided = |rule| DecidedBy { policy: name.clone(), rule: Some(rule) };
        match policy.action {
            action if policy.dry_run => {
                let rule = evaluate::matching_rule(policy, subject);
                dry_run.push(DryRun { policy: name.clone(), action, rule });
            }
            // The first one that matches is named; further ones change nothing.
            Action::Deny if denied.is_none() => {
                denied = evaluate::matching_rule(policy, subject).map(decided);
            }
            Action::Allow => {
                allowing.push(name);
                if allowed.is_none() {
                    allowed = evaluate::matching_rule(policy, subject).map(decided);
                }
            }
            Action::Deny => {}
        }
    }
    let (verdict, decided_by) = if let Some(name) = unknown {
        let by = DecidedBy { policy: name.clone(), rule: None };
        (Verdict::Deny(DenyReason::UnknownPolicy), Some(by))
    } else if denied.is_some() {
        (Verdict::Deny(DenyReason::PolicyDenied), denied)
    } else if allowed.is_some() || allowing.is_empty() {
        (Verdict::Allow, allowed)
    } else {
        let only = match allowing.as_slice() {
            [only] => Some(DecidedBy { policy: (*only).clone(), rule: None }),
            _ => None,
        };
        (Verdict::Deny(DenyReason::NoPolicyAllows), only)
    };
    Judgement { verdict, decided_by, dry_run }
}

/// [`admit`] for a destination by id; one that the snapshot does not know is refused.
pub fn admit_in(snapshot: &Snapshot, attempt: &Attempt<'_>, dest: WorkloadId) -> Judgement {
    match snapshot.workload(dest) {
        Some(dest) => admit(snapshot, attempt, dest),
        None => Judgement::deny(DenyReason::UnknownWorkload),
    }
}

/// Whether plaintext arrivals at this port are dropped while the agent is down.
///
/// True wherever a live agent might refuse an unauthenticated peer: the mode is STRICT, or an AuthorizationPolicy is
/// enforced.
pub fn fail_closed_inbound(snapshot: &Snapshot, dest: &Workload, port: u16) -> bool {
    dest.modes.of(port) == Mode::Strict || is_policed(snapshot, dest)
}

/// [`fail_closed_inbound`] for ports without a mode of their own.
pub fn fail_closed_inbound_default(snapshot: &Snapshot, dest: &Workload) -> bool {
    dest.modes.default == Mode::Strict || is_policed(snapshot, dest)
}

/// Whether an AuthorizationPolicy is enforced on a workload.
pub fn is_policed(snapshot: &Snapshot, dest: &Workload) -> bool {
    dest.policies.iter().any(|name| snapshot.policy(name).is_none_or(|policy| !policy.dry_run))
}

/// How a client reaches a workload of another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP to its port.
    Plaintext,
    /// HTTP/2 CONNECT over mutual TLS; there is no way back to plaintext.
    Hbone,
}

/// How a client of another node reaches `port` of `dest`; on the same node nothing is encrypted.
pub fn transport(dest: &Workload, port: u16) -> Transport {
    match dest.tunnel {
        Tunnel::Hbone if dest.meshed && dest.modes.of(port) != Mode::Disable => Transport::Hbone,
        Tunnel::Hbone | Tunnel::None => Transport::Plaintext,
    }
}

#[cfg(test)]
mod tests;
