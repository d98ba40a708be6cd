//! A node of the cluster: a machine of its own made of namespaces, with containerd, kubelet and kube-proxy.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use super::api_server::ControlPlane;
use super::binaries::Binaries;
use super::init::{BpfFileSystem, Hierarchy, INIT_GROUP, NodeSpec, Program};
use super::whole::ClusterError;
use crate::cgroup;
use crate::place::Place;
use crate::pod::{ip4_of, ip6_of};
use crate::programs;
use crate::saying::say;
use crate::waiting::eventually;
use crate::world::{Link, Node};

/// How long containerd may take to listen.
const CONTAINERD_LIMIT: Duration = Duration::from_secs(60);

/// Where Debian has the CNI plugins that are not ours.
const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Those of them that a node uses.
const USED_PLUGINS: [&str; 5] = ["ptp", "bridge", "portmap", "host-local", "loopback"];

/// Where containerd listens, on the node.
const SOCKET: &str = "/run/containerd/containerd.sock";

/// Pods of all nodes.
const POD_RANGES: &str = "10.244.0.0/16,fd00:244::/32";

/// Which of its addresses a node of two families says first. It decides which of a pod's is the first too: `status.podIP`, to which
/// the kubelet sends its probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// In what nodes of a cluster differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeOptions {
    /// Which of its addresses comes first.
    pub first: FirstFamily,
    /// How its primary CNI plugin connects its pods.
    pub link: Link,
    /// What it has where the mesh pins its programs.
    pub bpf: BpfFileSystem,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self { first: FirstFamily::V4, link: Link::Routed, bpf: BpfFileSystem::Mounted }
    }
}

/// A running node. Dropping it ends all that runs on it.
#[derive(Debug)]
pub struct ClusterNode {
    name: String,
    host: Place,
    directory: PathBuf,
    group: cgroup::Cgroup,
    child: Mutex<Child>,
}

impl ClusterNode {
    /// Start a node in the namespace and cgroup of `node`; it joins the cluster by itself.
    pub(super) fn start(
        node: &Node,
        options: NodeOptions,
        directory: &Path,
        control: &ControlPlane,
        binaries: &Binaries,
    ) -> Result<Self, ClusterError> {
        let name = node.name().to_owned();
        let file = |path: &Path| {
            let path = path.to_path_buf();
            move |source| ClusterError::File { path, source }
        };
        let root = cgroup::mount_point()?;
        let group = node.cgroup().path().strip_prefix(&root).unwrap_or(node.cgroup().path());
        let spec = NodeSpec {
            name: name.clone(),
            directory: directory.to_path_buf(),
            group: group.display().to_string(),
            hierarchies: Hierarchy::all().map_err(file(Path::new("/proc/mounts")))?,
            bpf: options.bpf,
            programs: programs(node, options.first, directory, binaries)?,
        };
        furnish(node, options.link, directory, control)?;
        let spec_path = directory.join("node.json");
        let text = serde_json::to_vec_pretty(&spec).map_err(|error| io::Error::other(error.to_string()));
        text.and_then(|text| fs::write(&spec_path, text)).map_err(file(&spec_path))?;
        let log = directory.join("logs/init.log");
        let output = fs::File::create(&log).map_err(file(&log))?;
        let mut command = Command::new(programs::pod_tool()?);
        command
            .arg("node")
            .arg(&spec_path)
            // A Ctrl-C at the terminal is for the driver, which ends everything in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(file(&log))?)
            .stderr(output);
        let child = node.host().spawn(command)?;
        Ok(Self {
            name,
            host: node.host().clone(),
            directory: directory.to_path_buf(),
            group: node.cgroup().clone(),
            child: Mutex::new(child),
        })
    }

    /// Its name, in Kubernetes too.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its host network and a cgroup for processes of the host: where a test reaches pods and services from.
    #[must_use]
    pub fn host(&self) -> &Place {
        &self.host
    }

    /// Its private folder: `etc`, `opt` and `lib` (of `/var`) as the node sees them, and `logs`.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Run a program on the node, with its mounts, processes and network, and return what it printed.
    ///
    /// # Errors
    /// When it cannot be started or ends badly.
    pub fn run(&self, command: &[&str]) -> Result<String, ClusterError> {
        let child = self.start_program(command, Stdio::null())?;
        let Output { status, stdout, stderr } =
            child.wait_with_output().map_err(|error| self.failed(command, error.to_string()))?;
        if status.success() {
            return Ok(String::from_utf8_lossy(&stdout).into_owned());
        }
        Err(self.failed(command, format!("{status}: {}", String::from_utf8_lossy(&stderr).trim())))
    }

    /// Start a program as [`ClusterNode::run`] does, with pipes for what it prints.
    pub(super) fn start_program(&self, command: &[&str], stdin: Stdio) -> Result<Child, ClusterError> {
        let init = self.init().ok_or_else(|| self.failed(command, "the node does not run".to_owned()))?;
        let mut enter = Command::new("nsenter");
        enter.args(["--target", &init.to_string(), "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--"]);
        enter.args(command).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(self.host.spawn(enter)?)
    }

    fn failed(&self, command: &[&str], message: String) -> ClusterError {
        ClusterError::OnNode { node: self.name.clone(), command: command.join(" "), message }
    }

    /// Run a program of the node in the network namespace of one of its pods, by the pod's `metadata.uid`.
    ///
    /// # Errors
    /// When no process of such a pod is there, or as [`ClusterNode::run`].
    pub fn run_in_network_of(&self, uid: &str, command: &[&str]) -> Result<String, ClusterError> {
        // The kubelet names a pod's groups after it.
        let find = format!("grep -l 'pod{uid}' /proc/[0-9]*/cgroup | head -n 1 | cut -d / -f 3");
        let process = self.run(&["sh", "-c", &find])?;
        let target = format!("--target={}", process.trim());
        self.run(&[&["nsenter", &target, "--net", "--"], command].concat())
    }

    /// SIGKILL to the processes of this name of one of its pods, by the pod's `metadata.uid`; the kubelet starts their container again.
    ///
    /// # Errors
    /// When there are none, or as [`ClusterNode::run`].
    pub fn kill_in_pod(&self, uid: &str, program: &str) -> Result<(), ClusterError> {
        let kill = format!(
            "found=1; for group in $(grep -l 'pod{uid}' /proc/[0-9]*/cgroup); do process=${{group%/cgroup}}; \
             grep -qx {program} $process/comm && kill -9 ${{process#/proc/}} && found=0; done; exit $found"
        );
        self.run(&["sh", "-c", &kill]).map(drop)
    }

    /// Put the images of a docker or OCI archive into the node's containerd.
    ///
    /// # Errors
    /// When containerd does not come up or refuses it.
    pub fn import(&self, archive: &Path) -> Result<(), ClusterError> {
        eventually(CONTAINERD_LIMIT, || self.run(&["ctr", "version"]), Result::is_ok).map_err(
            |source| ClusterError::NotYet { what: format!("containerd of {}", self.name), source },
        )??;
        let archive = archive.to_string_lossy();
        self.run(&["ctr", "--namespace=k8s.io", "images", "import", "--no-unpack=false", &archive]).map(drop)
    }

    /// SIGKILL to a program of the node (`kubelet`, `containerd`, `kube-proxy`); it is started again after a second.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self, program: &str) -> Result<(), ClusterError> {
        Ok(cgroup::Cgroup::at(self.group.path().join(program)).kill()?)
    }

    /// An error if the node has ended.
    pub(super) fn check(&self) -> Result<(), ClusterError> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        match child.try_wait() {
            Ok(None) => Ok(()),
            ended => Err(ClusterError::OnNode {
                node: self.name.clone(),
                command: "pod-tool node".to_owned(),
                message: format!(
                    "{ended:?}: {}",
                    super::daemon::log_end(&self.directory.join("logs/init.log"))
                ),
            }),
        }
    }

    /// The machine's id of the node's first process.
    fn init(&self) -> Option<i32> {
        cgroup::Cgroup::at(self.group.path().join(INIT_GROUP)).processes().first().copied()
    }

    /// End everything that runs on the node.
    pub(super) fn end(&self) {
        if let Err(error) = self.group.kill() {
            say(&format!("{:#}", anyhow::Error::new(error)));
        }
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Already ended is what was asked for.
        drop(child.kill());
        drop(child.wait());
    }
}

impl Drop for ClusterNode {
    fn drop(&mut self) {
        self.end();
    }
}

fn programs(
    node: &Node,
    first: FirstFamily,
    directory: &Path,
    binaries: &Binaries,
) -> Result<Vec<Program>, ClusterError> {
    let name = node.name();
    let (ip4, ip6) = (node.host().ip4(), node.host().ip6());
    let addresses = match first {
        FirstFamily::V4 => format!("--node-ip={ip4},{ip6}"),
        FirstFamily::V6 => format!("--node-ip={ip6},{ip4}"),
    };
    let program = |name: &str, path: PathBuf, arguments: &[&str], ready: Option<&str>| Program {
        name: name.to_owned(),
        command: std::iter::once(path.display().to_string())
            .chain(arguments.iter().map(|argument| (*argument).to_owned()))
            .collect(),
        log: directory.join(format!("logs/{name}.log")),
        ready: ready.map(PathBuf::from),
    };
    let this = format!("--hostname-override={name}");
    Ok(vec![
        program(
            "containerd",
            binaries.system("containerd")?,
            &["--config=/etc/containerd/nodemesh.toml"],
            Some(SOCKET),
        ),
        program(
            "kubelet",
            binaries.program("kubelet")?,
            &[
                "--config=/etc/kubernetes/kubelet.yaml",
                "--kubeconfig=/etc/kubernetes/kubelet.conf",
                &this,
                &addresses,
            ],
            None,
        ),
        program(
            "kube-proxy",
            binaries.program("kube-proxy")?,
            &[
                "--kubeconfig=/etc/kubernetes/kube-proxy.conf",
                "--proxy-mode=nftables",
                &format!("--cluster-cidr={POD_RANGES}"),
                // The machine's own limits are none of a node's business.
                "--conntrack-max-per-core=0",
                "--conntrack-tcp-timeout-established=0s",
                "--conntrack-tcp-timeout-close-wait=0s",
                &this,
            ],
            None,
        ),
    ])
}

/// Fills the folders that become the node's own.
fn furnish(node: &Node, link: Link, directory: &Path, control: &ControlPlane) -> Result<(), ClusterError> {
    let made = |path: PathBuf| {
        fs::create_dir_all(&path).map(|()| path.clone()).map_err(|source| ClusterError::File { path, source })
    };
    for part in ["logs", "log/pods", "log/containers", "lib/kubelet", "lib/containerd", "lib/cni"] {
        made(directory.join(part))?;
    }
    let plugins = made(directory.join("opt/cni/bin"))?;
    for plugin in USED_PLUGINS {
        copy(&Path::new(CNI_PLUGINS).join(plugin), &plugins.join(plugin))?;
    }
    let network = made(directory.join("etc/cni/net.d"))?;
    write(&network.join(format!("10-{}.conflist", network_name(link))), &network_of(node.index(), link))?;
    let containerd = made(directory.join("etc/containerd"))?;
    write(&containerd.join("nodemesh.toml"), include_str!("../../cluster/containerd.toml"))?;
    let kubernetes = made(directory.join("etc/kubernetes"))?;
    write(&kubernetes.join("kubelet.yaml"), include_str!("../../cluster/kubelet.yaml"))?;
    // Nobody answers for names outside the cluster.
    write(&kubernetes.join("resolv.conf"), "search .\n")?;
    copy(&control.papers.path("ca.crt"), &kubernetes.join("ca.crt"))?;
    copy(&control.papers.kubeconfig(node.name()), &kubernetes.join("kubelet.conf"))?;
    copy(&control.papers.kubeconfig("kube-proxy"), &kubernetes.join("kube-proxy.conf"))
}

/// What the network of a node's pods is called.
fn network_name(link: Link) -> &'static str {
    match link {
        Link::Routed => "routed",
        Link::Bridged => "bridged",
    }
}

/// Addresses of the node's own range, and a cable per pod: each with a route, or all on one bridge, with a second plugin in the chain.
fn network_of(node: u8, link: Link) -> String {
    let ranges = json!([
        [{ "subnet": format!("{}/24", ip4_of(node, 0)) }],
        [{ "subnet": format!("{}/64", ip6_of(node, 0)) }],
    ]);
    let everywhere = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
    let ipam =
        json!({ "type": "host-local", "ranges": ranges, "routes": everywhere, "dataDir": "/var/lib/cni" });
    let plugins = match link {
        Link::Routed => json!([{ "type": "ptp", "ipMasq": false, "ipam": ipam }]),
        Link::Bridged => json!([
            // A pod may be the endpoint of a service that it calls itself.
            { "type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipMasq": false, "ipam": ipam },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ]),
    };
    let network = json!({ "cniVersion": "0.4.0", "name": network_name(link), "plugins": plugins });
    format!("{network:#}\n")
}

fn write(path: &Path, text: &str) -> Result<(), ClusterError> {
    fs::write(path, text).map_err(|source| ClusterError::File { path: path.to_path_buf(), source })
}

fn copy(from: &Path, to: &Path) -> Result<(), ClusterError> {
    fs::copy(from, to).map(drop).map_err(|source| ClusterError::File { path: from.to_path_buf(), source })
}

/// Lines for the node: processes of its host find a way to services, which kube-proxy turns into one to a pod. Without any
/// way, a connect fails before kube-proxy is asked.
pub(super) fn service_lines(ip4: Ipv4Addr, ip6: Ipv6Addr) -> Vec<String> {
    vec![
        // Nobody is at its other end: what kube-proxy does not take ends there.
        "link add services type bridge mcast_snooping 0".to_owned(),
        "link set services up".to_owned(),
        format!("route add 10.96.0.0/16 dev services src {ip4}"),
        format!("route add fd00:96::/112 dev services src {ip6}"),
    ]
}
