//! Owns the shape of `meshctl explain`.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

/// What would happen to a connection of a local pod, from the code that decides it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainView {
    /// `namespace/name` of the client pod.
    pub from: String,
    /// Whether that pod is enrolled; if not, the kernel leaves its sockets alone.
    pub enrolled: bool,
    /// `HOST:PORT` as asked.
    pub to: String,
    /// How the host became addresses.
    pub resolution: ResolutionView,
    /// What happens for each address.
    pub addresses: Vec<AddressView>,
}

/// How a host became addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolutionView {
    /// By which way.
    pub kind: ResolutionKind,
    /// The full name that answered, when there was one.
    pub name: Option<String>,
    /// The addresses.
    pub addrs: Vec<IpAddr>,
    /// What is worth knowing, e.g. that the pod's own resolver would be asked.
    pub note: Option<String>,
}

/// Ways from a host to addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResolutionKind {
    /// The host was an address.
    Literal,
    /// The mesh's DNS answers.
    Mesh,
    /// The mesh's DNS knows the name, and that it has no address.
    NoData,
    /// The mesh's DNS says that there is no such name.
    NxDomain,
    /// The pod's own resolver is asked; its answer is not known here.
    Forward,
}

/// What happens for one address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AddressView {
    /// The address and port dialled.
    pub dialled: SocketAddr,
    /// `namespace/name` of the service behind it.
    pub service: Option<String>,
    /// Decisions of the connect hook: one per backend it can draw, or a single one.
    pub decisions: Vec<HookView>,
    /// How many more slots there are than decisions shown.
    pub slots_left_off: u32,
}

/// One decision of the connect hook.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HookView {
    /// The hook.
    pub hook: String,
    /// `bypass`, `direct`, `proxy` or `deny`.
    pub outcome: String,
    /// Why, as in metrics.
    pub reason: String,
    /// The same in a sentence.
    pub text: String,
    /// Whether the kernel writes a ticket for this connection.
    pub ticket: bool,
    /// The in-pod port the connect is sent to, when the outcome is `proxy`.
    pub outbound_port: Option<u16>,
    /// The backend drawn.
    pub backend: Option<BackendView>,
    /// The cached verdict about this client and backend, if any.
    pub verdict: Option<VerdictView>,
    /// What the server's side does with the arrival.
    pub server: Option<ServerView>,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendView {
    /// Address and port.
    pub addr: SocketAddr,
    /// `namespace/name` of the pod, if it is one.
    pub workload: Option<String>,
    /// Node of the pod.
    pub node: Option<String>,
    /// Slot it has in the kernel's table, when a service was dialled.
    pub slot: Option<u32>,
    /// Part of the mesh.
    pub meshed: bool,
    /// Enrolled on this node.
    pub local: bool,
    /// Takes plaintext by policy (mode DISABLE).
    pub plain: bool,
}

/// A cached verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerdictView {
    /// `allow` or `deny`.
    pub action: String,
    /// The policy generation it was made for.
    pub policy_gen: u64,
    /// The policy generation in force.
    pub current_gen: Option<u64>,
    /// Whether the hook honours it: the generations are equal.
    pub valid: bool,
}

/// What the server's side does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerView {
    /// Effective mode of the port: `STRICT`, `PERMISSIVE` or `DISABLE`.
    pub mode: String,
    /// Whether the port refuses plaintext while the agent is down.
    pub fail_closed: bool,
    /// Whether the port is excluded from capture.
    pub excluded: bool,
    /// What this connection gets.
    pub arrival: ArrivalView,
    /// What the same connection would get with the agent down.
    pub agent_down: ArrivalView,
}

/// What one arrival gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalView {
    /// `pass`, `capture`, `drop` or `deny`.
    pub outcome: String,
    /// Why, as in metrics.
    pub reason: String,
    /// The same in a sentence.
    pub text: String,
}
