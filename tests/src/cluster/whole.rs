//! A whole cluster: a control plane and two nodes or more on one wire.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::api_server::{ApiServerError, ControlPlane, Ports, SERVICE_RANGES, Site, save_logs};
use super::binaries::{Binaries, BinariesMissing};
use super::daemon::{Daemon, DaemonError, Seat};
use super::init::Hierarchy;
use super::kubectl::{Kubectl, KubectlError};
use super::node::{ClusterNode, NodeOptions, service_lines};
use super::relay::Relay;
use crate::cgroup::{CgroupError, mount_point};
use crate::netns::NetNsError;
use crate::place::StartError;
use crate::programs::ProgramMissing;
use crate::saying::say;
use crate::verdict;
use crate::waiting::{NeverHappened, eventually};
use crate::world::{World, WorldError};

/// The ports of the control plane, in its own namespace.
const PORTS: Ports = Ports { etcd: 2379, etcd_peers: 2380, server: 6443 };

/// How long nodes may take to be ready: 7 s on an idle machine.
const NODES_LIMIT: Duration = Duration::from_secs(120);

/// How long the name server may take to be ready.
const NAME_SERVER_LIMIT: Duration = Duration::from_secs(120);

/// Images that every cluster has, as files `NAME.tar` of the folder `MESH_CLUSTER_IMAGES`.
const IMAGES: [&str; 3] = ["pause", "coredns", "apps"];

/// A cluster could not be made, or something in it failed.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A program is not there.
    #[error(transparent)]
    Missing(#[from] BinariesMissing),
    /// A program of ours is not there.
    #[error(transparent)]
    Unbuilt(#[from] ProgramMissing),
    /// An image is not there.
    #[error("no image {0}: run `cargo xtask cluster prepare`, and set MESH_CLUSTER_IMAGES to what it says")]
    NoImage(PathBuf),
    /// The wire and the nodes' networks.
    #[error(transparent)]
    World(#[from] WorldError),
    /// The network of a node.
    #[error(transparent)]
    Network(#[from] NetNsError),
    /// etcd or the API server.
    #[error(transparent)]
    ApiServer(#[from] ApiServerError),
    /// Another part of the control plane.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// A process on a node could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A cgroup of a node.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A file of the cluster.
    #[error("cannot make {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The way to the API server.
    #[error("cannot listen for the API server")]
    Relay(#[source] io::Error),
    /// A program on a node failed.
    #[error("{command} on {node}: {message}")]
    OnNode {
        /// Which node.
        node: String,
        /// The program and its arguments.
        command: String,
        /// Why not.
        message: String,
    },
    /// Something did not come about.
    #[error("{what} is not ready")]
    NotYet {
        /// What.
        what: String,
        /// What was seen last.
        source: NeverHappened,
    },
    /// No node of that name.
    #[error("the cluster has no node {0}")]
    NoSuchNode(String),
    /// A question to the API server failed.
    #[error(transparent)]
    Kubectl(#[from] KubectlError),
}

/// A real cluster of this machine. Dropping it ends and removes all of it, after saving logs if the test is failing.
#[derive(Debug)]
pub struct Cluster {
    // In the order of their ends.
    nodes: Vec<ClusterNode>,
    controllers: Vec<Daemon>,
    control: ControlPlane,
    _relay: Relay,
    world: World,
}

impl Cluster {
    /// A cluster with nodes of these names, a name server and the images that `cargo xtask` made, once all of it is ready.
    ///
    /// # Errors
    /// When a program is missing or a part does not become ready.
    pub fn start(test: &str, nodes: &[&str]) -> Result<Self, ClusterError> {
        let nodes: Vec<_> = nodes.iter().map(|name| (*name, NodeOptions::default())).collect();
        Self::start_of(test, &nodes)
    }

    /// The same with nodes that differ.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn start_of(test: &str, nodes: &[(&str, NodeOptions)]) -> Result<Self, ClusterError> {
        let wanted = nodes;
        let nodes: Vec<&str> = nodes.iter().map(|(name, _)| *name).collect();
        let binaries = Binaries::find()?;
        let images = IMAGES.map(image);
        let images = images.into_iter().collect::<Result<Vec<_>, _>>()?;
        let world = World::with_nodes(test, &nodes)?;
        let place = world.outsider("control")?;
        let server = SocketAddr::new(IpAddr::V4(place.ip4()), PORTS.server);
        let relay = Relay::start(place.clone(), server).map_err(ClusterError::Relay)?;
        let seat = Seat { cgroup: place.cgroup().clone(), place: Some(place.clone()), logs: world.logs() };
        let site = Site {
            binaries: binaries.clone(),
            address: Ipv4Addr::UNSPECIFIED,
            advertised: place.ip4(),
            relayed: Some(relay.address()),
            ports: PORTS,
            nodes: nodes.iter().map(|name| (*name).to_owned()).collect(),
            seat: seat.clone(),
            directory: world.directory().join("control"),
        };
        let control = ControlPlane::start(site)?;
        let controllers = vec![
            seat.start("kube-controller-manager", controller_manager(&binaries, &control)?)?,
            seat.start("kube-scheduler", scheduler(&binaries, &control)?)?,
        ];
        // From here on the half-made cluster cleans up after itself.
        let mut cluster = Self { nodes: Vec::new(), controllers, control, _relay: relay, world };
        for node in cluster.world.nodes() {
            let host = node.host();
            host.netns().ip(&service_lines(host.ip4(), host.ip6()))?;
            let directory = cluster.world.directory().join(format!("node-{}", node.name()));
            let options = wanted.iter().find(|(name, _)| *name == node.name());
            let options = options.map(|(_, options)| *options).unwrap_or_default();
            let started = ClusterNode::start(node, options, &directory, &cluster.control, &binaries)?;
            cluster.nodes.push(started);
        }
        for image in &images {
            cluster.load(image)?;
        }
        cluster.kubectl().apply(include_str!("../../cluster/name-server.yaml"))?;
        cluster.wait_for_nodes()?;
        let ready = || cluster.available("kube-system", "coredns");
        eventually(NAME_SERVER_LIMIT, ready, |ready| *ready)
            .map_err(|source| ClusterError::NotYet { what: "the name server".to_owned(), source })?;
        Ok(cluster)
    }

    /// kubectl as the administrator, from outside the cluster.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.control.kubectl
    }

    /// The administrator's kubeconfig. It is good on this machine as long as the cluster lives.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        self.control.kubectl.kubeconfig()
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[ClusterNode] {
        &self.nodes
    }

    /// The node of this name.
    ///
    /// # Errors
    /// [`ClusterError::NoSuchNode`].
    pub fn node(&self, name: &str) -> Result<&ClusterNode, ClusterError> {
        let found = self.nodes.iter().find(|node| node.name() == name);
        found.ok_or_else(|| ClusterError::NoSuchNode(name.to_owned()))
    }

    /// Where a node's version 2 control groups are, on the node: an agent's `--cgroup-root`.
    #[must_use]
    pub fn cgroup_root(&self) -> &'static Path {
        let both = Hierarchy::all().is_ok_and(|all| all.iter().any(|hierarchy| hierarchy.options.is_some()));
        Path::new(if both { "/sys/fs/cgroup/unified" } else { "/sys/fs/cgroup" })
    }

    /// The wire, its namespaces and the scratch directory.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Put the images of an archive on every node.
    ///
    /// # Errors
    /// When a node refuses it.
    pub fn load(&self, archive: &Path) -> Result<(), ClusterError> {
        let archive = archive.canonicalize().map_err(|_| ClusterError::NoImage(archive.to_path_buf()))?;
        std::thread::scope(|scope| {
            let imports: Vec<_> =
                self.nodes.iter().map(|node| scope.spawn(|| node.import(&archive))).collect();
            imports
                .into_iter()
                .try_for_each(|import| import.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    /// Stop the API server, as a crash would; etcd keeps what was written.
    pub fn stop_api_server(&self) {
        self.control.stop_server();
    }

    /// Start it again and wait until it is ready.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_api_server(&self) -> Result<(), ClusterError> {
        Ok(self.control.start_server()?)
    }

    fn wait_for_nodes(&self) -> Result<(), ClusterError> {
        let path = r#"jsonpath={.items[*].status.conditions[?(@.type=="Ready")].status}"#;
        let look = || {
            for node in &self.nodes {
                node.check()?;
            }
            for controller in &self.controllers {
                controller.check()?;
            }
            Ok::<_, ClusterError>(self.kubectl().run(&["get", "nodes", "-o", path]))
        };
        let all = |answer: &Result<String, KubectlError>| {
            answer.as_ref().is_ok_and(|text| {
                let ready = text.split_whitespace().filter(|status| *status == "True").count();
                ready == self.nodes.len()
            })
        };
        let seen = eventually(NODES_LIMIT, look, |seen| seen.as_ref().map_or(true, all));
        seen.map_err(|source| ClusterError::NotYet { what: "a node".to_owned(), source })?.map(drop)
    }

    fn available(&self, namespace: &str, deployment: &str) -> bool {
        let path = "jsonpath={.status.availableReplicas}";
        let answer = self.kubectl().run(&["get", "deployment", "-n", namespace, deployment, "-o", path]);
        answer.is_ok_and(|count| !count.trim().is_empty() && count.trim() != "0")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failed = verdict::failed();
        if failed {
            self.save();
        }
        for node in &self.nodes {
            node.end();
        }
        if failed {
            for node in &self.nodes {
                save_logs(
                    &format!("{}/{}", self.world.test_name(), node.name()),
                    &node.directory().join("logs"),
                );
            }
        }
        remove_groups(&self.world);
    }
}

impl Cluster {
    /// What the API server knows at the moment of failure.
    fn save(&self) {
        let folder = self.world.logs();
        let mesh = [
            "logs",
            "-n",
            "nodemesh-system",
            "-l",
            "app.kubernetes.io/part-of=nodemesh",
            "--prefix",
            "--tail=-1",
        ];
        let views: [(&str, &[&str]); 4] = [
            ("mesh", &mesh),
            ("pods", &["get", "pods,nodes", "-A", "-o", "wide"]),
            ("events", &["get", "events", "-A", "--sort-by=.lastTimestamp"]),
            ("described", &["describe", "pods", "-A"]),
        ];
        for (name, arguments) in views {
            let text = self.kubectl().run(arguments).unwrap_or_else(|error| error.to_string());
            if let Err(error) = std::fs::write(folder.join(format!("{name}.txt")), text) {
                say(&format!("cannot save {name}: {error}"));
            }
        }
    }
}

/// Groups of version 1 hierarchies, which the kubelets made below the nodes' own; those of version 2 the world removes.
fn remove_groups(world: &World) {
    let (Ok(root), Ok(hierarchies)) = (mount_point(), Hierarchy::all()) else { return };
    for node in world.nodes() {
        let Ok(group) = node.cgroup().path().strip_prefix(&root) else { continue };
        let Some(top) = group.iter().next() else { continue };
        for hierarchy in hierarchies.iter().filter(|hierarchy| hierarchy.options.is_some()) {
            if let Err(error) = crate::cgroup::remove_tree(&hierarchy.mount_point.join(top)) {
                say(&format!("{:#}", anyhow::Error::new(error)));
            }
        }
    }
}

/// An image that `cargo xtask` has written.
///
/// # Errors
/// [`ClusterError::NoImage`] when it has not.
pub fn image(name: &str) -> Result<PathBuf, ClusterError> {
    let folder = std::env::var_os("MESH_CLUSTER_IMAGES").map(PathBuf::from);
    let folder = folder.unwrap_or_else(|| {
        let profile = crate::programs::profile_directory();
        profile.parent().unwrap_or(&profile).join("images")
    });
    let path = folder.join(format!("{name}.tar"));
    if path.is_file() { Ok(path) } else { Err(ClusterError::NoImage(path)) }
}

fn controller_manager(
    binaries: &Binaries,
    control: &ControlPlane,
) -> Result<std::process::Command, ClusterError> {
    let mut command = binaries.command("kube-controller-manager")?;
    command.arg("--kubeconfig").arg(control.papers.kubeconfig("kube-controller-manager"));
    command.arg("--service-account-private-key-file").arg(control.papers.path("service-account.key"));
    command.arg("--root-ca-file").arg(control.papers.path("ca.crt"));
    command.args(["--leader-elect=false", "--use-service-account-credentials=true", "--profiling=false"]);
    command.args(["--service-cluster-ip-range", SERVICE_RANGES]);
    Ok(command)
}

fn scheduler(binaries: &Binaries, control: &ControlPlane) -> Result<std::process::Command, ClusterError> {
    let mut command = binaries.command("kube-scheduler")?;
    command.arg("--kubeconfig").arg(control.papers.kubeconfig("kube-scheduler"));
    command.args(["--leader-elect=false", "--profiling=false"]);
    Ok(command)
}
