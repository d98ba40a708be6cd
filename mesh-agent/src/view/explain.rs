//! Owns the shape of `meshctl explain`.

use std::net::{IpAddr, SocketAddr};

use mesh_core::{
    identity::Identity,
    mode::Mode,
    policy::{Judgement, Verdict},
    snapshot::Workload,
};
use serde::{Deserialize, Serialize};

/// What would happen to a connection of a local pod, from the code that decides it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExplainView {
    /// `namespace/name` of the client pod.
    pub from: String,
    /// Whether that pod is enrolled; if not, the kernel leaves its sockets alone.
    pub enrolled: bool,
    /// Why that pod has no certificate now, if it has none: what goes by mutual TLS is refused then.
    #[serde(default)]
    pub without_certificate: Option<String>,
    /// `HOST:PORT` as asked.
    pub to: String,
    /// How the host became addresses.
    pub resolution: ResolutionView,
    /// What happens for each address.
    pub addresses: Vec<AddressView>,
    /// What becomes of a request over the connection, if one was asked about.
    #[serde(default)]
    pub request: Option<super::RequestView>,
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
    /// What the agent does with it because nothing that the client sees describes it.
    #[serde(default)]
    pub undescribed: Option<String>,
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
    /// Who both sides are, and what the server's policy says; absent when nothing is policed: the backend is not in
    /// the mesh, or the port is excluded.
    #[serde(default)]
    pub policy: Option<PolicyView>,
    /// What the server's side does with the arrival.
    pub server: Option<ServerView>,
}

/// Identities, transport and policy of one connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyView {
    /// How the bytes travel.
    pub transport: TransportView,
    /// SPIFFE identity of the client as the server's side gets to know it; absent for plaintext.
    pub source_identity: Option<String>,
    /// SPIFFE identity of the server.
    pub destination_identity: String,
    /// Effective mode of the port: `STRICT`, `PERMISSIVE` or `DISABLE`.
    pub mode: String,
    /// `namespace/name` of the PeerAuthentication that decides the mode; absent for the default.
    pub mode_from: Option<String>,
    /// `allow` or `deny`.
    pub verdict: String,
    /// Why: `no_policy`, `policy_allows`, or the reason of the refusal as in metrics.
    pub reason: String,
    /// The same in a sentence.
    pub text: String,
    /// The AuthorizationPolicy that decides, if one does.
    pub decided_by: Option<DecidedByView>,
    /// `namespace/name` of every AuthorizationPolicy that applies to the server.
    pub applying: Vec<String>,
    /// What the dry-run policies among them say.
    pub dry_run: Vec<DryRunView>,
}

impl PolicyView {
    /// Puts a judgement about a connection from `source` to `port` of `dest` into its shape.
    pub fn of(
        source: Option<&Identity>,
        dest: &Workload,
        port: u16,
        transport: TransportView,
        judgement: &Judgement,
    ) -> Self {
        let (verdict, reason) = match judgement.verdict {
            Verdict::Allow if judgement.decided_by.is_some() => ("allow", "policy_allows"),
            Verdict::Allow => ("allow", "no_policy"),
            Verdict::Deny(reason) => ("deny", reason.as_str()),
        };
        let by = judgement.decided_by.as_ref();
        let dry_run = judgement.dry_run.iter().map(|said| DryRunView {
            policy: said.policy.to_string(),
            action: said.action.to_string(),
            rule: said.rule,
            would_deny: said.would_deny(),
        });
        Self {
            transport,
            source_identity: source.map(ToString::to_string),
            destination_identity: dest.identity().to_string(),
            mode: mode_word(dest.modes.of(port)).to_owned(),
            mode_from: dest.mode_sources.of(&dest.modes, port).map(ToString::to_string),
            verdict: verdict.to_owned(),
            reason: reason.to_owned(),
            text: judgement.to_string(),
            decided_by: by.map(|by| DecidedByView { policy: by.policy.to_string(), rule: by.rule }),
            applying: dest.policies.iter().map(ToString::to_string).collect(),
            dry_run: dry_run.collect(),
        }
    }
}

/// A mode as PeerAuthentication writes it.
pub(crate) fn mode_word(mode: Mode) -> &'static str {
    match mode {
        Mode::Disable => "DISABLE",
        Mode::Permissive => "PERMISSIVE",
        Mode::Strict => "STRICT",
    }
}

/// How bytes travel between two pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransportView {
    /// The kernel connects the two sockets; it attests who the client is.
    Direct,
    /// Through the agent on one node; the kernel attests who the client is.
    Kernel,
    /// HBONE between two nodes: mutual TLS.
    MutualTls,
    /// Plaintext: nobody attests who the client is.
    Plaintext,
}

/// The policy that decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedByView {
    /// `namespace/name`.
    pub policy: String,
    /// Index into `spec.rules` of the rule that matches; absent when it decides because none does.
    pub rule: Option<usize>,
}

/// What a dry-run policy says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DryRunView {
    /// `namespace/name`.
    pub policy: String,
    /// `ALLOW` or `DENY`.
    pub action: String,
    /// Index into `spec.rules` of the rule that matches, if one does.
    pub rule: Option<usize>,
    /// Whether it alone, enforced, would refuse the connection.
    pub would_deny: bool,
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
    /// Effective mode of the port, as in [`PolicyView::mode`].
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
    /// `pass`, `capture`, `drop` or `deny`. An arrival by HBONE passes the kernel with reason `hbone`.
    pub outcome: String,
    /// Why, as in metrics.
    pub reason: String,
    /// The same in a sentence.
    pub text: String,
}
