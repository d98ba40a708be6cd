//! Owns the shape of `meshctl status`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Everything about one agent at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusView {
    /// The process.
    pub agent: AgentView,
    /// The kernel and what the agent has in it.
    pub kernel: KernelView,
    /// The configuration in force.
    pub snapshot: SnapshotView,
    /// Identities of the local pods, and where their certificates come from.
    pub identity: IdentityView,
    /// The link to a controller; absent where the agent reads manifests itself.
    pub controller: Option<ControllerView>,
    /// Names whose addresses are endpoints.
    pub names: NamesView,
    /// Settings of policies for TLS that cannot be used, of those that connections wanted.
    #[serde(default)]
    pub unusable_tls: Vec<UnusableTlsView>,
    /// Local pods that are or should be in the mesh, by namespace and name.
    pub pods: Vec<PodView>,
    /// What is wrong with the configuration; the last good version of each file keeps serving.
    pub source_errors: Vec<SourceErrorView>,
    /// The BPF maps with a limit.
    pub maps: Vec<MapView>,
}

/// The agent process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AgentView {
    /// Version of the agent.
    pub version: String,
    /// Node it serves.
    pub node: String,
    /// Process id.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// What it is doing.
    pub phase: Phase,
    /// What readiness still waits for; empty when ready.
    pub waiting_for: Vec<String>,
    /// Threads that carry traffic.
    pub workers: usize,
    /// Nanoseconds since the slowest worker last stamped the heartbeat; absent before the first stamp.
    pub heartbeat_age_ns: Option<u64>,
}

/// Life of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Not every desired pod has been enrolled or reported yet.
    Starting,
    /// Serving.
    Ready,
    /// Told to stop: accepts nothing new.
    Draining,
}

/// The kernel side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KernelView {
    /// `uname -r`.
    pub release: String,
    /// Hash of the kernel ↔ agent contract, sixteen hex digits.
    pub abi: String,
    /// Folder of the pinned maps and links.
    pub pins: String,
    /// The cgroup the programs are attached to.
    pub cgroup_root: String,
    /// Attached programs.
    pub programs: Vec<ProgramView>,
    /// Programs of others on the same hooks.
    pub foreign_programs: Vec<ForeignProgramView>,
}

/// One of our programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramView {
    /// Name of the program.
    pub name: String,
    /// Kernel's id of the program, 0 when unknown.
    pub id: u32,
    /// Whether it is attached.
    pub attached: bool,
    /// Whether the link was taken over from an earlier agent.
    pub adopted: bool,
}

/// A program on one of our hooks that is not ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignProgramView {
    /// Cgroup it is attached to.
    pub cgroup: String,
    /// Hook, by the name of our program there.
    pub hook: String,
    /// Name of the program; may be empty.
    pub name: String,
    /// Kernel's id of the program.
    pub id: u32,
    /// Attached the old exclusive way: nothing can be attached below it.
    pub exclusive: bool,
}

/// The configuration in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotView {
    /// Grows with each change.
    pub version: u64,
    /// Workloads known, on all nodes.
    pub workloads: usize,
    /// Services known.
    pub services: usize,
    /// Where it comes from.
    pub source: String,
}

/// Names whose addresses are endpoints, as DNS has them for this agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamesView {
    /// Names that services have.
    pub needed: usize,
    /// Those with addresses, old ones too.
    pub resolved: usize,
    /// Those that are not asked for, because there are too many.
    pub left_out: usize,
    /// Those that cannot be resolved now; what was known of them stays.
    pub failing: Vec<FailingNameView>,
}

/// A name that cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailingNameView {
    /// The name.
    pub name: String,
    /// Why, e.g. `no_such_name`.
    pub reason: String,
    /// Failures in a row.
    pub attempts: u32,
    /// Addresses that are used all the same, from before.
    pub addresses: Vec<IpAddr>,
}

/// Settings for TLS towards a destination that cannot be used as the node's files are now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnusableTlsView {
    /// The DestinationRule, and where it is written.
    pub origin: String,
    /// Why, with the file's path.
    pub reason: String,
    /// What was read before is in use; else connections are refused.
    pub before_in_use: bool,
}

/// Identities and certificates; `meshctl certificates` has each of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityView {
    /// Trust domain that identities are of.
    pub trust_domain: String,
    /// Trust domains whose identities count as the mesh's own.
    pub trust_domain_aliases: Vec<String>,
    /// Where certificates come from: the folder of the CA in this process, or the controller's URL.
    pub issuer: String,
    /// Identities of the local pods.
    pub wanted: u64,
    /// Those with a certificate that is valid now.
    pub valid: u64,
    /// Why the last attempt failed for an identity that has none; absent when all have one or are being fetched.
    pub reason: Option<String>,
}

/// The link to a controller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ControllerView {
    /// Its URL.
    pub url: String,
    /// Whether there is a stream now. Without one the last state stays in force.
    pub connected: bool,
    /// Seconds since it is so.
    pub since_s: Option<f64>,
    /// Seconds since the controller was heard.
    pub last_contact_s: Option<f64>,
    /// Why the last attempt or stream ended, or what else is amiss.
    pub reason: Option<String>,
    /// Failed attempts since there was a stream.
    pub attempts: u32,
    /// The controller's number of the state in force; absent while that is the one saved on disk.
    pub generation: Option<u64>,
    /// Resources that were refused since the start.
    pub refused_resources: u64,
    /// Seconds until the node's own certificate ends.
    pub certificate_expires_in_s: Option<f64>,
}

/// One local pod.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PodView {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Workload id.
    pub workload_id: String,
    /// Addresses.
    pub addrs: Vec<IpAddr>,
    /// Where its network namespace was found.
    pub netns: Option<String>,
    /// Enrolment.
    pub state: PodState,
    /// Local pod id while enrolled.
    pub pod_id: Option<u32>,
    /// Cookie of its network namespace while enrolled.
    pub netns_cookie: Option<u64>,
    /// Why it is not enrolled, or what is amiss although it is.
    pub reason: Option<String>,
    /// Failed attempts since the last success.
    pub attempts: u32,
    /// Seconds until the next attempt.
    pub retry_in_s: Option<f64>,
}

/// Enrolment of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodState {
    /// In the mesh.
    Enrolled,
    /// About to be.
    Pending,
    /// Tried, refused; see the reason. Tried again with growing pauses.
    Failed,
    /// Asked for the mesh but cannot be in it; see the reason.
    Skipped,
}

impl PodState {
    /// All states, in the order they are printed.
    pub const ALL: [Self; 4] = [Self::Enrolled, Self::Pending, Self::Failed, Self::Skipped];

    /// The word used in JSON and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enrolled => "enrolled",
            Self::Pending => "pending",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// One thing that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceErrorView {
    /// File, as found below the directory.
    pub file: String,
    /// Document within the file, from 1; absent when the file could not be read.
    pub document: Option<usize>,
    /// Kind of the resource, if it was readable.
    pub kind: Option<String>,
    /// Namespace, if the kind has one and it was readable.
    pub namespace: Option<String>,
    /// Name, if it was readable.
    pub name: Option<String>,
    /// `error`: the last good state of the file is used. `warning`: the document is used as it is.
    pub level: String,
    /// Path of the offending field; empty when the document or file as a whole is meant.
    pub field: String,
    /// What was found and what is wanted.
    pub message: String,
}

/// Fill of one map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapView {
    /// Name.
    pub name: String,
    /// Entries in use.
    pub entries: u64,
    /// Limit.
    pub max_entries: u64,
    /// Old entries make room for new ones, so that it is never full.
    pub evicts: bool,
    /// Entries of the configuration that found no room; they are tried again.
    pub refused: u64,
}
