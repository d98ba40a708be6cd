//! Owns what both ends of the link between controller and agents agree on: kinds of resources, the words of a commit, how
//! a node proves its name, and the limits of the connection.
//!
//! The link is delta xDS. Istio's kinds serve any client that speaks WDS; ours serve our agents, which take a new state
//! as a whole: they apply what they received when the controller says that a generation is complete ([`commit_text`]).

pub mod files;
pub mod token;

use std::time::Duration;

use mesh_wire::wds;

/// What a controller says of a session that it ends for its age alone.
pub const SESSION_OLD: &str = "this session is old; come again";

/// The name that asks for all resources of a kind.
pub const WILDCARD: &str = "*";
/// Largest message of the link, in bytes. A response is cut far below it; a single service with very many endpoints is not.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;
/// A connection without traffic is asked for a sign of life this often.
pub const KEEPALIVE_EACH: Duration = Duration::from_secs(10);
/// Without an answer for this long the connection is over.
pub const KEEPALIVE_WITHIN: Duration = Duration::from_secs(10);
/// What a commit begins with, in `system_version_info`.
const COMMIT: &str = "commit:";
/// Folder below which a controller leaves what nodes of the same host need to trust it and to be trusted.
pub const RUN_DIR: &str = "/run/nodemesh";
/// Service account in a controller's identity.
pub const CONTROLLER_ACCOUNT: &str = "nodemesh-controller";
/// Where a controller listens unless told otherwise; the port istiod serves xDS at.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:15012";

/// Names of the kinds that have one resource, by place; empty for the others.
pub const SINGLE_NAMES: [&str; Kind::ALL.len()] = ["", "", "mesh", "trust", "source", "", "", ""];

/// A kind of resource, in the order they are sent: what restricts comes before what it restricts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Authorization policies (WDS).
    Authorization,
    /// Workloads and services (WDS).
    Address,
    /// Facts of the whole mesh; one resource.
    Mesh,
    /// Roots and revocations; one resource.
    Trust,
    /// State of the controller's source; one resource.
    Source,
    /// What connections and requests are routed by; one resource for each entry of each table.
    Route,
    /// Secrets that DestinationRules name, for one node's pods. An agent keeps them in memory only.
    Credential,
    /// What only a pod's own node needs to know.
    NodePod,
}

impl Kind {
    /// All of them, in order.
    pub const ALL: [Self; 8] = [
        Self::Authorization,
        Self::Address,
        Self::Mesh,
        Self::Trust,
        Self::Source,
        Self::Route,
        Self::Credential,
        Self::NodePod,
    ];
    /// The one our agents ask for last.
    pub const LAST: Self = Self::NodePod;

    /// The kind as xDS names it.
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Authorization => wds::Kind::Authorization.type_url(),
            Self::Address => wds::Kind::Address.type_url(),
            Self::Mesh => wds::Kind::Mesh.type_url(),
            Self::Trust => "type.googleapis.com/nodemesh.v1.Trust",
            Self::Source => "type.googleapis.com/nodemesh.v1.Source",
            Self::Route => wds::Kind::Route.type_url(),
            Self::Credential => wds::Kind::Credential.type_url(),
            Self::NodePod => wds::Kind::NodePod.type_url(),
        }
    }

    /// The kind of a type URL, if it is one of ours.
    pub fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    /// The kind as a metric label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Authorization => "authorization",
            Self::Address => "address",
            Self::Mesh => "mesh",
            Self::Trust => "trust",
            Self::Source => "source",
            Self::Route => "route",
            Self::Credential => "credential",
            Self::NodePod => "node_pod",
        }
    }

    /// Place in [`Self::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Only our agents know this kind.
    pub const fn is_ours(self) -> bool {
        !matches!(self, Self::Authorization | Self::Address)
    }

    /// Agents before this one do not know the kind.
    pub const fn is_new(self) -> bool {
        matches!(self, Self::Route | Self::Credential)
    }

    /// Nothing of this kind is written to disk by who receives it.
    pub const fn is_secret(self) -> bool {
        matches!(self, Self::Credential)
    }
}

impl From<wds::Kind> for Kind {
    fn from(kind: wds::Kind) -> Self {
        match kind {
            wds::Kind::Authorization => Self::Authorization,
            wds::Kind::Address => Self::Address,
            wds::Kind::Mesh => Self::Mesh,
            wds::Kind::Route => Self::Route,
            wds::Kind::Credential => Self::Credential,
            wds::Kind::NodePod => Self::NodePod,
        }
    }
}

/// The `system_version_info` of the last response of a generation.
pub fn commit_text(generation: u64) -> String {
    format!("{COMMIT}{generation}")
}

/// The generation that a response completes, if it completes one.
pub fn commit_of(system_version_info: &str) -> Option<u64> {
    system_version_info.strip_prefix(COMMIT)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_found_by_its_type_and_place() {
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!((Kind::of(kind.type_url()), kind.index()), (Some(kind), index));
        }
        assert_eq!(Kind::of("type.googleapis.com/istio.workload.Workload"), None);
        assert!(Kind::LAST.is_ours() && Kind::ALL.last() == Some(&Kind::LAST));
    }

    #[test]
    fn only_a_commit_reads_as_one() {
        assert_eq!(commit_of(&commit_text(17)), Some(17));
        for text in ["", "17", "commit:", "commit:x", "commit:-1"] {
            assert_eq!(commit_of(text), None, "{text}");
        }
    }
}
