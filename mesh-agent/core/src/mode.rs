//! Mutual TLS modes of a workload's ports.

use std::collections::BTreeMap;

use crate::snapshot::Name;

/// What plaintext gets at a port (PeerAuthentication's words).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    /// Plaintext only; peers do not use mTLS towards this port.
    Disable,
    /// Both.
    #[default]
    Permissive,
    /// Only peers with an identity: mTLS, or attested by the kernel on the same node.
    Strict,
}

/// Effective modes of one workload.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PortModes {
    /// For ports without an entry of their own.
    pub default: Mode,
    /// Overrides by the workload's own (target) port.
    pub ports: BTreeMap<u16, Mode>,
}

impl PortModes {
    /// The mode of one port.
    pub fn of(&self, port: u16) -> Mode {
        self.ports.get(&port).copied().unwrap_or(self.default)
    }
}

/// Which PeerAuthentications a workload's modes come from; for people, no decision reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ModeSources {
    /// Of the default; `None` when no policy says anything, so it is PERMISSIVE.
    pub default: Option<Name>,
    /// Of all overrides: only a policy that selects the workload has any.
    pub ports: Option<Name>,
}

impl ModeSources {
    /// The PeerAuthentication that decides the mode of one port.
    pub fn of(&self, modes: &PortModes, port: u16) -> Option<&Name> {
        if modes.ports.contains_key(&port) { self.ports.as_ref() } else { self.default.as_ref() }
    }
}
