//! etcd and kube-apiserver: alone on free loopback ports, or as part of a whole cluster.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::binaries::{Binaries, BinariesMissing};
use super::daemon::{Daemon, DaemonError, Seat, log_end};
use super::etcd;
use super::kubectl::{Kubectl, KubectlError};
use super::papers::{ADMIN, Identity, Papers, Ways};
use crate::cgroup::{Cgroup, CgroupError};
use crate::clean::{self, CGROUP_PREFIX, SHORT_PREFIX};
use crate::saying::say;
use crate::waiting::{NeverHappened, eventually};
use crate::{artefacts, verdict, world};

/// How long the server may take to be ready: 3 s on an idle machine.
const READY_LIMIT: Duration = Duration::from_secs(90);

/// What an API server without nodes tells others its address is: one of the ranges for documentation, since a
/// loopback address is refused and nobody uses it.
const ADVERTISED: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// Parts of the control plane that have names of their own.
const COMPONENTS: [&str; 3] = ["kube-controller-manager", "kube-scheduler", "kube-proxy"];

/// The ranges of services, both families.
pub(crate) const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:96::/112";

/// Who issues the tokens of service accounts.
const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";

/// An API server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ApiServerError {
    /// A program is not there.
    #[error(transparent)]
    Missing(#[from] BinariesMissing),
    /// A process could not be started or ended.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// Its cgroup could not be made.
    #[error("cannot make a cgroup for the API server")]
    Cgroup(#[from] CgroupError),
    /// A file of its folder.
    #[error("cannot make {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No port could be had.
    #[error("cannot find a free port")]
    Port(#[source] io::Error),
    /// A certificate could not be made.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// It runs, but does not answer.
    #[error("the API server does not become ready; its log ends:\n{log}")]
    NotReady {
        /// The last lines of its log.
        log: String,
        /// What it said last.
        source: NeverHappened,
    },
    /// etcd keeps its history.
    #[error("etcd does not forget")]
    Compact(#[source] io::Error),
    /// A question to it failed.
    #[error(transparent)]
    Kubectl(#[from] KubectlError),
}

/// etcd and kube-apiserver in a private folder: nodes, controllers and schedulers there are none, so objects
/// stay as they were written. Dropping it ends both and removes the folder.
#[derive(Debug)]
pub struct ApiServer {
    control: ControlPlane,
    lodging: Lodging,
    test: String,
}

impl ApiServer {
    /// Start both on free loopback ports and wait until the server is ready.
    ///
    /// # Errors
    /// When a program is missing, cannot be started, ends, or is not ready in time.
    pub fn start(test: &str) -> Result<Self, ApiServerError> {
        verdict::reset();
        let lodging = Lodging::take()?;
        let seat = Seat { cgroup: lodging.cgroup.clone(), place: None, logs: lodging.directory.join("logs") };
        let site = Site {
            binaries: Binaries::find()?,
            address: Ipv4Addr::LOCALHOST,
            advertised: ADVERTISED,
            relayed: None,
            ports: free_ports()?,
            nodes: Vec::new(),
            seat,
            directory: lodging.directory.clone(),
        };
        Ok(Self { control: ControlPlane::start(site)?, lodging, test: test.to_owned() })
    }

    /// `https://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.control.url
    }

    /// The administrator's kubeconfig: group `system:masters`, by token.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.control.papers.kubeconfig(ADMIN)
    }

    /// The certificate of the authority that signed the server's, PEM.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.control.papers.path("ca.crt")
    }

    /// kubectl as the administrator.
    #[must_use]
    pub fn kubectl(&self) -> &Kubectl {
        &self.control.kubectl
    }

    /// A token of a service account for one audience, as a projected volume would hold it.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn token(&self, namespace: &str, account: &str, audience: &str) -> Result<String, ApiServerError> {
        let audience = format!("--audience={audience}");
        let token = self.kubectl().run(&["create", "token", "-n", namespace, account, &audience])?;
        Ok(token.trim().to_owned())
    }

    /// SIGKILL to the server; etcd keeps what was written.
    pub fn stop(&self) {
        self.control.stop_server();
    }

    /// Start the server again on the same port after [`ApiServer::stop`], and wait until it is ready.
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn start_again(&self) -> Result<(), ApiServerError> {
        self.control.start_server()
    }

    /// Have etcd forget every state but the newest.
    ///
    /// # Errors
    /// When etcd does not.
    pub fn compact(&self) -> Result<(), ApiServerError> {
        etcd::compact(self.control.site.ports.etcd).map_err(ApiServerError::Compact)
    }

    /// Its private folder, for files of the test; removed with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.lodging.directory
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if verdict::failed() {
            save_logs(&self.test, &self.lodging.directory.join("logs"));
        }
    }
}

/// Keep the logs of a failed test's control plane where its reader looks.
pub(crate) fn save_logs(test: &str, logs: &Path) {
    let target = artefacts::directory().join(test.replace("::", "."));
    match artefacts::copy_tree(logs, &target.join("logs")) {
        Ok(()) => say(&format!("artefacts of the failed test: {}", target.display())),
        Err(error) => say(&format!("cannot save artefacts in {}: {error}", target.display())),
    }
}

/// A cgroup and a folder of a server alone, under the names that `pod-tool clean` knows.
#[derive(Debug)]
struct Lodging {
    directory: PathBuf,
    cgroup: Cgroup,
}

impl Lodging {
    fn take() -> Result<Self, ApiServerError> {
        let suffix = world::next_suffix();
        // In memory where there is such a folder: etcd waits for the disk at every write.
        let directory = clean::scratch_root().join(format!("{SHORT_PREFIX}{suffix}"));
        let logs = directory.join("logs");
        fs::create_dir_all(&logs).map_err(|source| ApiServerError::File { path: logs, source })?;
        let cgroup = Cgroup::create_top(&format!("{CGROUP_PREFIX}{suffix}"))?;
        Ok(Self { directory, cgroup })
    }
}

impl Drop for Lodging {
    fn drop(&mut self) {
        if let Err(error) = self.cgroup.remove() {
            say(&format!("{:#}", anyhow::Error::new(error)));
        }
        if std::env::var_os("MESH_TESTS_KEEP").is_none() {
            clean::remove_directory(&self.directory);
        }
    }
}

/// The ports of etcd (clients, peers) and of the server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) etcd: u16,
    pub(crate) etcd_peers: u16,
    pub(crate) server: u16,
}

/// Where and how a control plane is to run.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) binaries: Binaries,
    /// Where the server listens.
    pub(crate) address: Ipv4Addr,
    /// What it says its address is.
    pub(crate) advertised: Ipv4Addr,
    /// Where on this machine's loopback it is reached if `address` is in another network.
    pub(crate) relayed: Option<SocketAddr>,
    pub(crate) ports: Ports,
    /// Nodes that will join.
    pub(crate) nodes: Vec<String>,
    pub(crate) seat: Seat,
    /// For data, papers and logs.
    pub(crate) directory: PathBuf,
}

/// etcd and the server, wherever they run.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    site: Site,
    /// By which tests reach the server.
    pub(crate) url: String,
    pub(crate) papers: Papers,
    server: Mutex<Option<Daemon>>,
    etcd: Daemon,
    pub(crate) kubectl: Kubectl,
}

impl ControlPlane {
    pub(crate) fn start(site: Site) -> Result<Self, ApiServerError> {
        let mut identities = COMPONENTS.map(Identity::component).to_vec();
        identities.extend(site.nodes.iter().map(|node| Identity::node(node)));
        // A server for itself advertises what nobody can use.
        let reached = if site.relayed.is_some() { site.advertised } else { site.address };
        let inside = format!("https://{reached}:{}", site.ports.server);
        let outside = site.relayed.map_or_else(|| inside.clone(), |at| format!("https://{at}"));
        let ways = Ways { inside, outside, addresses: vec![IpAddr::V4(reached)] };
        let papers = Papers::write(site.directory.join("papers"), &ways, &identities)?;
        let etcd = site.seat.start("etcd", etcd_command(&site)?)?;
        let kubectl = Kubectl::new(site.binaries.program("kubectl")?, papers.kubeconfig(ADMIN));
        let started = Self { site, url: ways.outside, papers, server: Mutex::new(None), etcd, kubectl };
        started.start_server()?;
        Ok(started)
    }

    pub(crate) fn stop_server(&self) {
        drop(self.server.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    pub(crate) fn start_server(&self) -> Result<(), ApiServerError> {
        let daemon = self.site.seat.start("kube-apiserver", server_command(&self.site, &self.papers)?)?;
        let seen = eventually(READY_LIMIT, || self.look(&daemon), |seen| *seen != State::Starting);
        let log = || log_end(&self.site.seat.logs.join("kube-apiserver.log"));
        seen.map_err(|source| ApiServerError::NotReady { log: log(), source })?;
        // Says why if it has ended.
        daemon.check()?;
        self.etcd.check()?;
        *self.server.lock().unwrap_or_else(PoisonError::into_inner) = Some(daemon);
        Ok(())
    }

    fn look(&self, server: &Daemon) -> State {
        if server.check().and(self.etcd.check()).is_err() {
            return State::Over;
        }
        // The namespaces that every server makes by itself come a moment after it calls itself ready.
        let served = self.kubectl.run(&["get", "--raw=/readyz"]);
        let served = served.and_then(|_| self.kubectl.run(&["get", "namespace", "default", "kube-system"]));
        if served.is_ok() { State::Ready } else { State::Starting }
    }
}

/// How far a server has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Starting,
    Ready,
    /// It, or etcd, has ended.
    Over,
}

fn etcd_command(site: &Site) -> Result<Command, ApiServerError> {
    let (clients, peers) = (site.ports.etcd, site.ports.etcd_peers);
    let mut command = Command::new(site.binaries.system("etcd")?);
    command
        .arg("--data-dir")
        .arg(site.directory.join("etcd"))
        .args(["--name", "only", "--listen-client-urls", &format!("http://127.0.0.1:{clients}")])
        .args(["--advertise-client-urls", &format!("http://127.0.0.1:{clients}")])
        .args(["--listen-peer-urls", &format!("http://127.0.0.1:{peers}")])
        .args(["--initial-advertise-peer-urls", &format!("http://127.0.0.1:{peers}")])
        .args(["--initial-cluster", &format!("only=http://127.0.0.1:{peers}")])
        // Nobody pulls the plug on this machine, and its disk is nothing that tests or benches are about: a program's death loses
        // nothing that was written.
        .arg("--unsafe-no-fsync")
        .args(["--log-level", "warn", "--logger", "zap"]);
    Ok(command)
}

fn server_command(site: &Site, papers: &Papers) -> Result<Command, ApiServerError> {
    let mut command = site.binaries.command("kube-apiserver")?;
    let files = [
        ("--tls-cert-file", "server.crt"),
        ("--tls-private-key-file", "server.key"),
        ("--client-ca-file", "ca.crt"),
        ("--token-auth-file", "tokens.csv"),
        ("--service-account-key-file", "service-account.pub"),
        ("--service-account-signing-key-file", "service-account.key"),
        ("--kubelet-client-certificate", "kubelet-client.crt"),
        ("--kubelet-client-key", "kubelet-client.key"),
    ];
    for (option, file) in files {
        command.arg(option).arg(papers.path(file));
    }
    command
        // Fewer garbage collections: they take their time from what is tested or measured on the same few CPUs.
        .env("GOGC", "400")
        .args(["--etcd-servers", &format!("http://127.0.0.1:{}", site.ports.etcd)])
        .args(["--bind-address", &site.address.to_string()])
        .args(["--secure-port", &site.ports.server.to_string()])
        .args(["--advertise-address", &site.advertised.to_string()])
        .args(["--service-cluster-ip-range", SERVICE_RANGES])
        .args(["--service-account-issuer", ISSUER, "--authorization-mode", "Node,RBAC"])
        // Node names are no host names; and webhooks are called at their pods, since no kube-proxy runs here.
        .args(["--kubelet-preferred-address-types", "InternalIP", "--enable-aggregator-routing=true"])
        .args(["--allow-privileged=true", "--profiling=false"]);
    Ok(command)
}

/// Three ports that are free now. Whoever takes one of them first makes the start fail, loudly.
fn free_ports() -> Result<Ports, ApiServerError> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(ApiServerError::Port);
    let port =
        |listener: &TcpListener| listener.local_addr().map(|at| at.port()).map_err(ApiServerError::Port);
    // All at once, or the same port might be given out twice.
    let (etcd, etcd_peers, server) = (bind()?, bind()?, bind()?);
    Ok(Ports { etcd: port(&etcd)?, etcd_peers: port(&etcd_peers)?, server: port(&server)? })
}
