//! Owns the command line of `mesh-agent`.
//!
//! Invariant: a flag, its environment variable and the documentation use the same words; every option has a
//! value before the node starts, so nothing reads the environment later.

use std::{
    fmt::Display,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, Subcommand, ValueEnum};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::core::Selector;
use mesh_control::{
    kubernetes::names::NAMESPACE,
    link::{DEFAULT_LISTEN, RUN_DIR},
    subscribe::channel::ControllerUrl,
};
use mesh_identity::KeyAlgorithm;
use serde_json::{Map, Value};

use crate::{cni::install::Unenrolled, ctl::DEFAULT_ADMIN_SOCKET};

/// Where an agent or controller keeps what must outlive it.
const STATE_DIR: &str = "/var/lib/nodemesh";
/// Where the CNI plugin asks.
pub(crate) const DEFAULT_CNI_SOCKET: &str = "/run/nodemesh/cni.sock";
/// Where the roots of the mesh are mounted in an agent's pod.
const ROOT_CERT: &str = "/var/run/secrets/nodemesh/root-cert.pem";
/// Where container runtimes look for plugins.
const CNI_BIN_DIR: &str = "/opt/cni/bin";
/// Where container runtimes look for configurations.
pub(crate) const CNI_CONF_DIR: &str = "/etc/cni/net.d";

/// The Nodemesh agent: a service mesh without sidecars, one agent per node.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "mesh-agent",
    version,
    propagate_version = true,
    after_help = "Examples:\n  \
        mesh-agent node --config /etc/nodemesh\n  \
        mesh-agent cleanup --node \"$(hostname)\"\n\n\
        Ask a running agent with meshctl."
)]
pub struct Args {
    /// What to be.
    #[command(subcommand)]
    pub command: Command,
}

/// Roles of the program.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Serve this node: redirect the sockets of its meshed pods and carry their traffic.
    #[command(after_help = "Examples:\n  \
        mesh-agent node --config /etc/nodemesh\n  \
        mesh-agent node --config ./mesh --node n1 --cgroup-root /sys/fs/cgroup/n1 \\\n      \
        --admin-socket /run/nodemesh/n1.sock --metrics 127.0.0.1:15021\n  \
        mesh-agent node --controller https://127.0.0.1:15012\n  \
        mesh-agent node --kubernetes --node \"$NODE_NAME\"\n\n\
        Prints \"ready\" on standard output, and answers GET /readyz, when every desired pod is enrolled or\n\
        reported. On SIGTERM it accepts nothing new, lets connections end (--drain), and leaves its pins, so\n\
        that direct connections live on and the next agent takes over. `mesh-agent cleanup` removes them.")]
    Node(Box<NodeArgs>),
    /// Tell agents of other nodes what to serve, and issue their certificates.
    #[command(after_help = "Examples:\n  \
        mesh-agent controller --config /etc/nodemesh --listen 10.0.0.1:15012\n  \
        mesh-agent node --controller https://10.0.0.1:15012 --node n1\n  \
        mesh-agent controller --kubernetes\n\n\
        Agents of the same host find what they need below --run-dir. For another host:\n  \
        mesh-agent controller root > root.pem\n  \
        mesh-agent controller token --node n2 > n2.token\n  \
        mesh-agent node --controller https://10.0.0.1:15012 --node n2 --controller-ca root.pem --token-file n2.token\n\n\
        Prints \"ready\" on standard output, and answers GET /readyz, when agents can come. GET /sessions lists them, at a loopback address only.\n\
        Losing the controller changes nothing for running traffic.")]
    Controller(Box<ControllerArgs>),
    /// Detach and unpin everything an agent left in the kernel for a node. The agent must not be running.
    #[command(after_help = "Examples:\n  \
        mesh-agent cleanup --node n1\n  \
        mesh-agent cleanup --node n1 --cgroup-root /sys/fs/cgroup/n1\n  \
        mesh-agent cleanup --node n1 --purge")]
    Cleanup(CleanupArgs),
    /// Say whether the agent of this very container serves the node: a start-up probe.
    #[command(hide = true)]
    Started(StartedArgs),
    /// Do nothing until told to end: what stays of a pod whose work is done.
    #[command(hide = true)]
    Pause,
    /// Act on the certificate authority in a folder, beside the agents that use it.
    #[command(subcommand)]
    Ca(CaCommand),
    /// Be the CNI plugin, or put it on the node and take it away.
    #[command(after_help = "Examples:\n  \
        CNI_COMMAND=VERSION mesh-agent cni </dev/null\n  \
        mesh-agent cni install --cni-conf-dir /etc/cni/net.d\n  \
        mesh-agent cni uninstall\n\n\
        Without a command it is the plugin itself, as under the name nodemesh-cni: the container runtime calls it.\n\
        `mesh-agent node --kubernetes` installs it and keeps it in place.")]
    Cni(CniArgs),
}

/// Options of `cni`.
#[derive(Clone, Debug, clap::Args)]
pub struct CniArgs {
    /// What to do; nothing: be the plugin.
    #[command(subcommand)]
    pub command: Option<CniCommand>,
}

/// What can be done with the plugin.
#[derive(Clone, Debug, Subcommand)]
pub enum CniCommand {
    /// Put the plugin at the end of the chain in force, once.
    Install(CniPlaces),
    /// Take the plugin out of every chain, then its program, then what the agent left for it.
    Uninstall(CniPlaces),
}

/// Where the plugin is.
#[derive(Clone, Debug, clap::Args)]
pub struct CniPlaces {
    /// Folder of CNI plugins.
    #[arg(long, env = "MESH_CNI_BIN_DIR", value_name = "DIR", default_value = CNI_BIN_DIR)]
    pub cni_bin_dir: PathBuf,
    /// Folder of CNI configurations.
    #[arg(long, env = "MESH_CNI_CONF_DIR", value_name = "DIR", default_value = CNI_CONF_DIR)]
    pub cni_conf_dir: PathBuf,
    /// The agent's socket for the plugin.
    #[arg(long, env = "MESH_CNI_SOCKET", value_name = "PATH", default_value = DEFAULT_CNI_SOCKET)]
    pub cni_socket: PathBuf,
    /// The agent's folder for what must outlive it.
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// What becomes of a pod of the mesh that cannot be enrolled.
    #[arg(long, env = "MESH_CNI_UNENROLLED", value_enum, value_name = "WHAT", default_value_t = Unenrolled::Fail)]
    pub cni_unenrolled: Unenrolled,
}

/// What can be done to an authority.
#[derive(Clone, Debug, Subcommand)]
pub enum CaCommand {
    /// Replace a self-signed root: a new one is announced to everybody, signs after a while, and the old one stays
    /// trusted as long as anything it signed may live. Agents and controllers that use the folder carry it out.
    #[command(after_help = "Examples:\n  \
        mesh-agent ca rotate\n  \
        mesh-agent ca rotate --ca-dir /var/lib/nodemesh/ca --announce 1h")]
    Rotate(RotateArgs),
}

/// Options of `ca rotate`.
#[derive(Clone, Debug, clap::Args)]
pub struct RotateArgs {
    /// Folder of the authority.
    #[arg(long, env = "MESH_CA_DIR", value_name = "DIR", default_value = "/var/lib/nodemesh/ca")]
    pub ca_dir: PathBuf,
    /// How long the new root is only announced: as long as it may take until every agent has heard of it.
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = duration)]
    pub announce: Duration,
    /// Kind of the new root's key: ecdsa-p256, ecdsa-p384, ed25519 or rsa-2048.
    #[arg(long, env = "MESH_KEY_ALGORITHM", value_name = "KIND", default_value = "ecdsa-p256")]
    pub key_algorithm: KeyAlgorithm,
}

/// What names a node in the kernel.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeIdentity {
    /// Name of the node, as in `spec.nodeName` of its pods. [default: the host name]
    #[arg(long, env = "MESH_NODE", value_name = "NAME")]
    pub node: Option<String>,
    /// cgroup v2 directory that holds the node's pods. [default: the cgroup2 mount]
    #[arg(long, env = "MESH_CGROUP_ROOT", value_name = "DIR")]
    pub cgroup_root: Option<PathBuf>,
    /// Where the BPF file system is, or is to be mounted.
    #[arg(long, env = "MESH_BPFFS", value_name = "DIR", default_value = "/sys/fs/bpf")]
    pub bpffs: PathBuf,
    /// Folder for what must outlive the process; also holds the lock that keeps a second agent of this node out.
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
}

/// What identities are made of, and where the authority behind them is kept.
#[derive(Clone, Debug, clap::Args)]
pub struct TrustArgs {
    /// Folder of the certificate authority. A plugged-in one is used (`ca-cert.pem`, `ca-key.pem`, `root-cert.pem`,
    /// `cert-chain.pem`, `ca-crl.pem`), otherwise a self-signed root is made there once and kept.
    #[arg(long, env = "MESH_CA_DIR", value_name = "DIR", default_value = "/var/lib/nodemesh/ca")]
    pub ca_dir: PathBuf,
    /// Trust domain of identities, unless the mesh configuration names another.
    #[arg(long, env = "MESH_TRUST_DOMAIN", value_name = "DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Namespace of mesh-wide policies and, without Kubernetes, of the mesh configuration. [default: istio-system; with Kubernetes
    /// the controller's own]
    #[arg(long, env = "MESH_ROOT_NAMESPACE", value_name = "NAMESPACE")]
    pub root_namespace: Option<String>,
    /// Kind of the keys that are made from now on, workloads' and a root's: ecdsa-p256, ecdsa-p384, ed25519 or rsa-2048. Keys
    /// that are there stay.
    #[arg(long, env = "MESH_KEY_ALGORITHM", value_name = "KIND", default_value = "ecdsa-p256")]
    pub key_algorithm: KeyAlgorithm,
}

impl TrustArgs {
    /// Namespace of mesh-wide policies where the configuration is a directory.
    pub fn root_namespace(&self) -> &str {
        self.root_namespace.as_deref().unwrap_or("istio-system")
    }
}

/// Options of `node`.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// Where the configuration comes from.
    #[command(flatten)]
    pub source: SourceArgs,
    /// Be a pod of a DaemonSet: take the configuration from the cluster's controller, hear of the node's own pods from the API
    /// server, keep the CNI plugin in place. The other options have defaults for that.
    #[arg(long, env = "MESH_KUBERNETES")]
    pub kubernetes: bool,
    /// Take the node over from the agent that serves it, with its listening sockets, for an upgrade without a refused connection. That
    /// one ends when its connections have. With --kubernetes always.
    #[arg(long, env = "MESH_TAKE_OVER")]
    pub take_over: bool,
    /// How to trust a controller.
    #[command(flatten)]
    pub link: LinkArgs,
    /// Which node this is.
    #[command(flatten)]
    pub identity: NodeIdentity,
    /// What its identities are.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// How its pods are found.
    #[command(flatten)]
    pub pods: PodArgs,
    /// Unix socket that meshctl talks to.
    #[arg(long, env = "MESH_ADMIN_SOCKET", value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET)]
    pub admin_socket: PathBuf,
    /// Address of GET /metrics, /readyz and /healthz.
    #[arg(long, env = "MESH_METRICS", value_name = "ADDR", default_value = "127.0.0.1:15020")]
    pub metrics: SocketAddr,
    /// Threads that carry traffic. [default: the number of CPUs]
    #[arg(long, env = "MESH_WORKERS", value_name = "N")]
    pub workers: Option<NonZeroUsize>,
    /// Life of workloads' certificates; they are replaced at half of it.
    #[arg(long, env = "MESH_CERTIFICATE_TTL", value_name = "DURATION", default_value = "24h", value_parser = duration)]
    pub certificate_ttl: Duration,
    /// How long connections may live on after SIGTERM, e.g. 500ms, 10s, 2m.
    #[arg(long, env = "MESH_DRAIN", value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub drain: Duration,
    /// Resolver for names the mesh does not know, used when a pod's own one is not known. May be repeated.
    #[arg(long, env = "MESH_DNS_UPSTREAM", value_name = "IP[:PORT]", value_delimiter = ',', value_parser = resolver)]
    pub dns_upstream: Vec<SocketAddr>,
    /// Exact cgroup of the kubelet, whose probes reach declared probe ports unhindered. [default: none; with --kubernetes that of
    /// the process `kubelet`]
    #[arg(long, env = "MESH_PROBER_CGROUP", value_name = "DIR")]
    pub prober_cgroup: Option<PathBuf>,
    /// Time for an upstream connect, retries included.
    #[arg(long, env = "MESH_CONNECT_TIMEOUT", value_name = "DURATION", default_value = "10s", value_parser = duration)]
    pub connect_timeout: Duration,
    /// Proxied connections without a byte in either direction for this long end.
    #[arg(long, env = "MESH_IDLE_TIMEOUT", value_name = "DURATION", default_value = "1h", value_parser = duration)]
    pub idle_timeout: Duration,
    /// Move bulk flows with splice(2) instead of copying them.
    #[arg(long, env = "MESH_SPLICE", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub splice: bool,
    /// Folder of the certificates and keys that DestinationRules name for TLS. No file outside of it is read.
    #[arg(long, env = "MESH_TLS_FILES", value_name = "DIR", default_value = mesh_proxy::TLS_FILES)]
    pub tls_files: PathBuf,
    /// Let the kernel connect pods of this node to each other directly once the agent has admitted the pair. Without
    /// it every connection goes through the agent, which sees its bytes as they pass.
    #[arg(long, env = "MESH_DIRECT", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub direct: bool,
    /// Log what the kernel programs decide, at debug level. Costs time on every connect.
    #[arg(long, env = "MESH_KERNEL_LOG")]
    pub kernel_log: bool,
    /// DNS suffix of services.
    #[arg(long, env = "MESH_CLUSTER_DOMAIN", value_name = "DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// What to log: a level, or levels by target as in `info,mesh_proxy=debug`.
    #[arg(long, env = "MESH_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// Form of the log, which goes to standard error.
    #[arg(long, env = "MESH_LOG_FORMAT", value_enum, value_name = "FORM", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// How local pods are found, besides by the annotation `nodemesh.dev/netns`.
#[derive(Clone, Debug, clap::Args)]
pub struct PodArgs {
    /// Unix socket that the CNI plugin asks at. With it, pods are found by what the container runtime says and by the
    /// kubelet's folders below the cgroup root.
    #[arg(long, env = "MESH_CNI_SOCKET", value_name = "PATH")]
    pub cni_socket: Option<PathBuf>,
    /// Folder of CNI configurations. With it, the plugin is put at the end of the chain in force and kept there.
    #[arg(long, env = "MESH_CNI_CONF_DIR", value_name = "DIR", requires = "cni_socket")]
    pub cni_conf_dir: Option<PathBuf>,
    /// Folder of CNI plugins.
    #[arg(long, env = "MESH_CNI_BIN_DIR", value_name = "DIR", default_value = CNI_BIN_DIR)]
    pub cni_bin_dir: PathBuf,
    /// What becomes of a pod of the mesh that cannot be enrolled when its network is made.
    #[arg(long, env = "MESH_CNI_UNENROLLED", value_enum, value_name = "WHAT", default_value_t = Unenrolled::Fail)]
    pub cni_unenrolled: Unenrolled,
}

/// Where a node's configuration comes from: one of these.
#[derive(Clone, Debug, clap::Args)]
#[group(multiple = false)]
pub struct SourceArgs {
    /// Directory of manifests (`*.yaml`, `*.yml`, `*.json`, subfolders too); it is watched.
    #[arg(
        long,
        env = "MESH_CONFIG",
        value_name = "DIR",
        required_unless_present_any = ["controller", "kubernetes"],
        conflicts_with = "kubernetes"
    )]
    pub config: Option<PathBuf>,
    /// Controller that has the manifests and issues certificates, e.g. https://10.0.0.1:15012.
    #[arg(long, env = "MESH_CONTROLLER", value_name = "URL", value_parser = ControllerUrl::parse)]
    pub controller: Option<ControllerUrl>,
}

/// What a node and a controller need to trust each other.
#[derive(Clone, Debug, clap::Args)]
pub struct LinkArgs {
    /// File with the roots of the controller, PEM. [default: what a controller on this host left below --run-dir]
    #[arg(long, env = "MESH_CONTROLLER_CA", value_name = "FILE")]
    pub controller_ca: Option<PathBuf>,
    /// File with the node's token. [default: made with the secret that a controller on this host left below --run-dir; with
    /// --kubernetes the pod's own for the audience nodemesh.dev]
    #[arg(long, env = "MESH_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// With --kubernetes: file with the mesh's roots, PEM, read again for each connection.
    #[arg(long, env = "MESH_ROOT_CERT", value_name = "FILE", requires = "kubernetes", default_value = ROOT_CERT)]
    pub root_cert: PathBuf,
    /// Folder below which a controller leaves what agents of the same host need.
    #[arg(long, env = "MESH_RUN_DIR", value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
}

/// Options of `controller`.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ControllerArgs {
    /// Something to do instead of serving.
    #[command(subcommand)]
    pub command: Option<ControllerCommand>,
    /// Directory of manifests (`*.yaml`, `*.yml`, `*.json`, subfolders too); it is watched.
    #[arg(
        long,
        env = "MESH_CONFIG",
        value_name = "DIR",
        required_unless_present = "kubernetes",
        conflicts_with = "kubernetes"
    )]
    pub config: Option<PathBuf>,
    /// Serve the cluster of this pod, else that of KUBECONFIG.
    #[arg(long, env = "MESH_KUBERNETES")]
    pub kubernetes: bool,
    /// Read the Secrets that DestinationRules with a workloadSelector name (`credentialName`), for the nodes of those workloads. Of a
    /// directory they are read in any case.
    #[arg(long, env = "MESH_READ_SECRETS", requires = "kubernetes")]
    pub read_secrets: bool,
    /// Which nodes have an agent, by their labels: a LabelSelector of Kubernetes as JSON. Pods of other nodes are not in the mesh,
    /// whatever their labels say. Without it every node has one.
    #[arg(long, env = "MESH_AGENT_NODES", value_name = "SELECTOR", default_value = "{}", hide_default_value = true, value_parser = nodes)]
    pub agent_nodes: Selector,
    /// Namespace of the mesh's own objects in the cluster.
    #[arg(long, env = "MESH_NAMESPACE", value_name = "NAMESPACE", default_value = NAMESPACE, requires = "kubernetes")]
    pub namespace: String,
    /// Address that the API server asks the admission webhook at.
    #[arg(
        long,
        env = "MESH_WEBHOOK_LISTEN",
        value_name = "ADDR",
        default_value = "0.0.0.0:15017",
        requires = "kubernetes"
    )]
    pub webhook_listen: SocketAddr,
    /// Address that agents come to. With Kubernetes the default is every address of the pod.
    #[arg(
        long,
        env = "MESH_LISTEN",
        value_name = "ADDR",
        default_value = DEFAULT_LISTEN,
        default_value_if("kubernetes", "true", "0.0.0.0:15012")
    )]
    pub listen: SocketAddr,
    /// Folder for what must outlive the process.
    #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// Folder below which agents of this host find what they need.
    #[arg(long, env = "MESH_RUN_DIR", value_name = "DIR", default_value = RUN_DIR)]
    pub run_dir: PathBuf,
    /// What identities are.
    #[command(flatten)]
    pub trust: TrustArgs,
    /// Address of GET /metrics, /readyz and /healthz, and, at a loopback address only, of /sessions and /resources.
    #[arg(
        long,
        env = "MESH_METRICS",
        value_name = "ADDR",
        default_value = "127.0.0.1:15014",
        default_value_if("kubernetes", "true", "0.0.0.0:15014")
    )]
    pub metrics: SocketAddr,
    /// Life of the controller's own certificate, the admission webhook's too. For tests of its renewal.
    #[arg(long, env = "MESH_OWN_CERTIFICATE_TTL", hide = true, value_name = "DURATION", default_value = "24h", value_parser = duration)]
    pub own_certificate_ttl: Duration,
    /// DNS suffix of services.
    #[arg(long, env = "MESH_CLUSTER_DOMAIN", value_name = "DOMAIN", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// What to log: a level, or levels by target as in `info,mesh_control=debug`.
    #[arg(long, env = "MESH_LOG", value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// Form of the log, which goes to standard error.
    #[arg(long, env = "MESH_LOG_FORMAT", value_enum, value_name = "FORM", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// What `controller` does besides serving.
#[derive(Clone, Debug, Subcommand)]
pub enum ControllerCommand {
    /// Print the token with which a node proves its name.
    #[command(after_help = "Examples:\n  mesh-agent controller token --node n2 > n2.token")]
    Token {
        /// Name of the node, as in `spec.nodeName` of its pods.
        #[arg(long, env = "MESH_NODE", value_name = "NAME")]
        node: String,
        /// Folder of the controller's state.
        #[arg(long, env = "MESH_STATE_DIR", value_name = "DIR", default_value = STATE_DIR)]
        state_dir: PathBuf,
    },
    /// Print the roots that agents trust, as PEM.
    #[command(after_help = "Examples:\n  mesh-agent controller root > root.pem")]
    Root {
        /// What identities are.
        #[command(flatten)]
        trust: TrustArgs,
    },
}

/// Options of `cleanup`.
#[derive(Clone, Debug, clap::Args)]
pub struct CleanupArgs {
    /// Which node to clean up after.
    #[command(flatten)]
    pub identity: NodeIdentity,
    /// Also empty the state folder, whatever is in it: no agent of this host is to start from it again.
    #[arg(long)]
    pub purge: bool,
}

/// Options of `started`: those of the agent that is asked about.
#[derive(Clone, Debug, clap::Args)]
pub struct StartedArgs {
    /// Name of the node.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: String,
    /// The agent's state folder.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    pub state_dir: PathBuf,
    /// The agent's address of GET /healthz.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:15020")]
    pub metrics: SocketAddr,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line for people.
    Text,
    /// A JSON object a line.
    Json,
}

/// `500ms`, `10s`, `2m`, `1h`, or seconds without a unit.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let wanted = || format!("{text:?} is not a duration such as 500ms, 10s or 2m");
    let number: u64 = number.parse().map_err(|_| wanted())?;
    let unit_ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(wanted()),
    };
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(wanted)
}

/// A LabelSelector as JSON.
fn nodes(text: &str) -> Result<Selector, String> {
    let wanted = |why: &dyn Display| {
        format!(
            "{why}; wanted a LabelSelector such as {{\"matchLabels\":{{\"kubernetes.io/os\":\"linux\"}}}}"
        )
    };
    let fields: Map<String, Value> = serde_json::from_str(text).map_err(|error| wanted(&error))?;
    // One that is spelled wrongly would select every node.
    if let Some(other) =
        fields.keys().find(|key| !["matchLabels", "matchExpressions"].contains(&key.as_str()))
    {
        return Err(wanted(&format!("{other} is no field of it")));
    }
    let selector: LabelSelector =
        serde_json::from_value(Value::Object(fields)).map_err(|error| wanted(&error))?;
    Selector::try_from(selector).map_err(|error| wanted(&error))
}

/// An address with a port, or an address alone, which means port 53.
fn resolver(text: &str) -> Result<SocketAddr, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, 53));
    }
    text.parse().map_err(|_| {
        format!("{text:?} is not a resolver such as 10.96.0.10, 10.96.0.10:5353 or [fd00::1]:53")
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_option_has_an_environment_variable() {
        let command = Args::command();
        let roles = ["node", "controller"].map(|role| command.find_subcommand(role).unwrap());
        let of_ours = |a: &&clap::Arg| !["help", "version"].contains(&a.get_id().as_str());
        for arg in roles.into_iter().flat_map(clap::Command::get_arguments).filter(of_ours) {
            let long = arg.get_long().unwrap_or_default();
            let wanted = format!("MESH_{}", long.replace('-', "_").to_uppercase());
            assert_eq!(arg.get_env().and_then(|e| e.to_str()), Some(wanted.as_str()), "--{long}");
        }
    }

    #[test]
    fn a_node_has_one_source_of_configuration() {
        let parse = |args: &[&str]| Args::try_parse_from(["mesh-agent", "node"].iter().chain(args));
        assert!(parse(&["--config", "x"]).is_ok());
        assert!(parse(&["--controller", "https://10.0.0.1"]).is_ok());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--config", "x", "--controller", "https://10.0.0.1"]).is_err());
        assert!(parse(&["--controller", "http://10.0.0.1"]).is_err(), "without TLS");
    }

    #[test]
    fn a_controller_needs_manifests_only_to_serve() {
        let parse = |args: &[&str]| Args::try_parse_from(["mesh-agent", "controller"].iter().chain(args));
        assert!(parse(&["--config", "x", "--listen", "10.0.0.1:15012"]).is_ok());
        assert!(parse(&[]).is_err());
        assert!(parse(&["--kubernetes", "--webhook-listen", "10.0.0.1:15017"]).is_ok());
        assert!(parse(&["--kubernetes", "--config", "x"]).is_err());
        for command in [&["token", "--node", "n1"][..], &["root"]] {
            assert!(parse(command).is_ok(), "{command:?}");
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, ms) in [("500ms", 500), ("10s", 10_000), ("3", 3000), ("2m", 120_000), ("1h", 3_600_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "s", "1.5s", "10 s", "-1s", "99999999999999999999s", "18446744073709551615h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nodes_with_agents_are_told_by_a_selector() {
        let nodes = |text: &str| {
            let args = ["mesh-agent", "controller", "--kubernetes", "--agent-nodes", text];
            Args::try_parse_from(args).map(|args| match args.command {
                Command::Controller(args) => args.agent_nodes.to_string(),
                other => panic!("{other:?}"),
            })
        };
        let expressions = r#"{"matchExpressions":[{"key":"type","operator":"NotIn","values":["virtual"]}],"matchLabels":{"a/b":"c"}}"#;
        assert_eq!(nodes(expressions).unwrap(), "a/b=c,type notin (virtual)");
        assert_eq!(nodes("{}").unwrap(), "");
        for text in [
            "",
            "a=b",
            r#"{"matchLabel":{}}"#,
            r#"{"matchExpressions":[{"key":"a","operator":"Gt","values":["1"]}]}"#,
        ] {
            assert!(nodes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_resolver_without_a_port_is_asked_on_53() {
        assert_eq!(resolver("10.0.0.1").unwrap().to_string(), "10.0.0.1:53");
        assert_eq!(resolver("fd00::1").unwrap().to_string(), "[fd00::1]:53");
        assert_eq!(resolver("[fd00::1]:5353").unwrap().port(), 5353);
        assert!(resolver("dns.example").is_err());
    }

    #[test]
    fn resolvers_may_be_repeated_or_listed() {
        let args = Args::try_parse_from([
            "mesh-agent",
            "node",
            "--config",
            "x",
            "--dns-upstream",
            "10.0.0.1,10.0.0.2:5353",
            "--dns-upstream",
            "::1",
        ])
        .unwrap();
        let Command::Node(node) = args.command else { panic!("{args:?}") };
        assert_eq!(node.dns_upstream.len(), 3);
    }
}
