//! What tests against an API server share: the server, controllers of it, and their questions.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use mesh_tests::authority::{Authority, Leaf, spiffe};
use mesh_tests::cluster::{ApiServer, Kubectl};
use mesh_tests::{Credentials, Failure, TestResult, limit, programs};
use serde_json::Value;

use crate::objects;
use crate::relay::Relay;

/// What a controller publishes: kind, name and version of each resource.
pub(crate) type Published = Vec<(String, String, String)>;

/// The mesh's own namespace.
pub(crate) const NAMESPACE: &str = "nodemesh-system";
/// How long a controller may take to be ready.
const READY: Duration = Duration::from_secs(30);

/// An API server with the mesh's own namespace.
pub(crate) struct Scene {
    api: ApiServer,
}

impl Scene {
    pub(crate) fn open(test: &str) -> Result<Self, Failure> {
        let api = ApiServer::start(test)?;
        api.kubectl().apply(&objects::namespace(NAMESPACE))?;
        Ok(Self { api })
    }

    pub(crate) fn kubectl(&self) -> &Kubectl {
        self.api.kubectl()
    }

    pub(crate) fn restart_api_server(&self) -> TestResult {
        self.api.stop();
        self.api.start_again()?;
        Ok(())
    }

    /// Has etcd forget all that was, and the API server begin without a memory of changes of its own: whoever asks for what
    /// came after some time ago is told that this is too long ago.
    pub(crate) fn forget_history(&self) -> TestResult {
        self.api.stop();
        self.api.compact()?;
        self.api.start_again()?;
        Ok(())
    }

    /// Where the API server listens.
    pub(crate) fn api_server(&self) -> Result<SocketAddr, Failure> {
        Ok(self.api.url().trim_start_matches("https://").parse()?)
    }

    /// A controller of the cluster.
    pub(crate) fn controller(&self, name: &str, args: &[&str]) -> Result<ControllerProcess, Failure> {
        self.controller_with(name, args, &self.api.kubeconfig())
    }

    /// A controller that comes to the API server by a relay.
    pub(crate) fn controller_by(
        &self,
        relay: &Relay,
        name: &str,
        args: &[&str],
    ) -> Result<ControllerProcess, Failure> {
        let direct = fs::read_to_string(self.api.kubeconfig())?;
        let kubeconfig = self.api.directory().join(format!("{name}.kubeconfig"));
        fs::write(&kubeconfig, direct.replace(self.api.url(), &format!("https://{}", relay.addr())))?;
        self.controller_with(name, args, &kubeconfig)
    }

    fn controller_with(
        &self,
        name: &str,
        args: &[&str],
        kubeconfig: &Path,
    ) -> Result<ControllerProcess, Failure> {
        let ports = Ports::free()?;
        let mut command = self.command(name, &ports)?;
        command
            .arg("--kubernetes")
            // Also at the address of a service, see `ServiceAddress`.
            .args(["--webhook-listen", &format!("0.0.0.0:{}", ports.webhook)])
            .args(args)
            .env("KUBECONFIG", kubeconfig);
        ControllerProcess::start(command, ports, self.log_of(name))
    }

    /// A controller of a directory.
    pub(crate) fn controller_of(&self, folder: &Path, name: &str) -> Result<ControllerProcess, Failure> {
        let ports = Ports::free()?;
        let mut command = self.command(name, &ports)?;
        command.arg("--config").arg(folder).args(["--root-namespace", NAMESPACE]);
        command.arg("--run-dir").arg(self.api.directory().join("run"));
        ControllerProcess::start(command, ports, self.log_of(name))
    }

    fn log_of(&self, name: &str) -> PathBuf {
        self.api.directory().join(format!("controller-{name}")).join("log")
    }

    fn command(&self, name: &str, ports: &Ports) -> Result<Command, Failure> {
        let state = self.api.directory().join(format!("controller-{name}"));
        fs::create_dir_all(&state)?;
        let log = fs::File::create(self.log_of(name))?;
        let mut command = Command::new(programs::agent()?);
        command
            .arg("controller")
            .args(["--listen", &loopback(ports.xds).to_string()])
            // As in a cluster; what is only for its own pod it has to tell by who asks.
            .args(["--metrics", &format!("0.0.0.0:{}", ports.metrics)])
            .arg("--state-dir")
            .arg(&state)
            .arg("--ca-dir")
            .arg(state.join("ca"))
            .env_remove("KUBERNETES_SERVICE_HOST")
            // A Ctrl-C at the terminal is for the driver, which ends everything in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log);
        Ok(command)
    }

    /// A folder with all objects of these kinds, a file for each.
    pub(crate) fn dump(&self, kinds: &[&str]) -> Result<PathBuf, Failure> {
        let folder = self.api.directory().join("manifests");
        fs::create_dir_all(&folder)?;
        for kind in kinds {
            let mut list = self.kubectl().json(&["get", kind, "-A"])?;
            let of_mesh = |item: &&mut Value| {
                item["kind"] == "ConfigMap"
                    && item["metadata"]["namespace"] == NAMESPACE
                    && item["metadata"]["name"] == "nodemesh"
            };
            // In files the settings of the mesh are where Istio has them.
            for settings in list["items"].as_array_mut().into_iter().flatten().filter(of_mesh) {
                settings["metadata"]["name"] = "istio".into();
            }
            fs::write(folder.join(format!("{kind}.json")), list.to_string())?;
        }
        Ok(folder)
    }

    /// Says what a kubelet would: that a pod runs and has an address.
    pub(crate) fn set_running(&self, namespace: &str, pod: &str, addr: &str) -> TestResult {
        let status = serde_json::json!({"status": {"phase": "Running", "podIP": addr, "podIPs": [{"ip": addr}],
            "conditions": [{"type": "Ready", "status": "True"}]}});
        let patch = ["patch", "pod", "-n", namespace, pod, "--subresource=status", "--type=merge", "-p"];
        self.kubectl().run(&[&patch[..], &[&status.to_string()]].concat())?;
        Ok(())
    }

    /// What the mesh's servers are judged by.
    pub(crate) fn trust(&self) -> Result<Credentials, Failure> {
        let folder = self.api.directory().join("authority");
        fs::create_dir_all(&folder)?;
        for key in ["root-cert.pem", "ca-cert.pem", "ca-key.pem"] {
            let template = format!("go-template={{{{index .data \"{key}\" | base64decode}}}}");
            let text =
                self.kubectl().run(&["get", "secret", "-n", NAMESPACE, "nodemesh-ca", "-o", &template])?;
            fs::write(folder.join(key), text)?;
        }
        Ok(Authority::of_agents(&folder)?.issue(&Leaf::of(spiffe("shop", "nobody")))?)
    }

    /// Makes an authority the mesh's, as its administrator does, or puts it in the place of the one before.
    pub(crate) fn plug_in(&self, authority: &Authority) -> TestResult {
        let folder = self.api.directory().join("cacerts");
        authority.plug_in(&folder, &[])?;
        let from = format!("--from-file={}", folder.display());
        let dry = [
            "create",
            "secret",
            "generic",
            "cacerts",
            "-n",
            NAMESPACE,
            &from,
            "--dry-run=client",
            "-o",
            "yaml",
        ];
        let manifest = self.kubectl().run(&dry)?;
        self.kubectl().apply(&manifest)?;
        Ok(())
    }

    /// A token as the agent's pod on a node has it.
    pub(crate) fn agent_token(&self, node: &str, audience: &str) -> Result<String, Failure> {
        let (audience, pod) = (format!("--audience={audience}"), format!("--bound-object-name=agent-{node}"));
        let args = [
            "create",
            "token",
            "-n",
            NAMESPACE,
            "nodemesh-agent",
            &audience,
            "--bound-object-kind=Pod",
            &pod,
        ];
        Ok(self.kubectl().run(&args)?.trim().to_owned())
    }

    /// A token of a service account, bound to no pod.
    pub(crate) fn token(&self, namespace: &str, account: &str, audience: &str) -> Result<String, Failure> {
        Ok(self.api.token(namespace, account, audience)?)
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// An address of the service range on the loopback interface, as kube-proxy would have it on a node: the API server calls a webhook by
/// its service's address, and by the name that its certificate is for. Gone when dropped.
pub(crate) struct ServiceAddress(&'static str);

impl ServiceAddress {
    pub(crate) fn take(addr: &'static str) -> Result<Self, Failure> {
        let taken = Self(addr);
        // One that a killed test left behind is as good.
        match taken.ip("replace")? {
            true => Ok(taken),
            false => Err(anyhow::anyhow!("cannot put {addr} on the loopback interface").into()),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        self.0
    }

    fn ip(&self, verb: &str) -> Result<bool, Failure> {
        let addr = format!("{}/32", self.0);
        Ok(Command::new("ip").args(["address", verb, &addr, "dev", "lo"]).status()?.success())
    }
}

impl Drop for ServiceAddress {
    fn drop(&mut self) {
        drop(self.ip("delete"));
    }
}

/// Ports of a controller.
struct Ports {
    xds: u16,
    metrics: u16,
    webhook: u16,
}

impl Ports {
    /// Three that nobody has.
    fn free() -> Result<Self, Failure> {
        let held =
            [(); 3].map(|()| TcpListener::bind(loopback(0)).and_then(|l| Ok((l.local_addr()?.port(), l))));
        let [xds, metrics, webhook] = held;
        let (xds, metrics, webhook) = (xds?, metrics?, webhook?);
        Ok(Self { xds: xds.0, metrics: metrics.0, webhook: webhook.0 })
    }
}

/// A running controller. Dropping it kills it.
pub(crate) struct ControllerProcess {
    child: Mutex<Child>,
    ports: Ports,
    log: PathBuf,
}

impl ControllerProcess {
    fn start(mut command: Command, ports: Ports, log: PathBuf) -> Result<Self, Failure> {
        let mut child = command.spawn()?;
        let stdout = child.stdout.take();
        let process = Self { child: Mutex::new(child), ports, log };
        let (said, ready) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = stdout.into_iter().flat_map(|out| BufReader::new(out).lines().map_while(Result::ok));
            lines.filter(|line| line.trim() == "ready").for_each(|_| said.send(()).unwrap_or_default());
        });
        match ready.recv_timeout(limit(READY)) {
            Ok(()) => Ok(process),
            Err(error) => Err(anyhow::anyhow!("a controller is not ready: {error}").into()),
        }
    }

    pub(crate) fn xds(&self) -> SocketAddr {
        loopback(self.ports.xds)
    }

    pub(crate) fn webhook_port(&self) -> u16 {
        self.ports.webhook
    }

    pub(crate) fn kill(&self) {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // Already ended is what was asked for.
        drop(child.kill());
        drop(child.wait());
    }

    fn get(&self, path: &str) -> Result<String, Failure> {
        self.get_at(Ipv4Addr::LOCALHOST, path)
    }

    /// As somebody at that address of this machine gets it.
    pub(crate) fn get_at(&self, addr: Ipv4Addr, path: &str) -> Result<String, Failure> {
        let addr = SocketAddr::from((addr, self.ports.metrics));
        let mut stream = TcpStream::connect_timeout(&addr, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        match answer.split_once("\r\n\r\n") {
            Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
            _ => Err(anyhow::anyhow!("GET {path}: {answer}").into()),
        }
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.get("/readyz").is_ok()
    }

    /// What it publishes: kind, name and version.
    pub(crate) fn resources(&self) -> Result<Published, Failure> {
        let list: Vec<Value> = serde_json::from_str(&self.get("/resources")?)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let of = |entry: &Value| (text(&entry["kind"]), text(&entry["name"]), text(&entry["version"]));
        Ok(list.iter().map(of).collect())
    }

    /// How often something was refused for a reason.
    pub(crate) fn counted(&self, reason: &str) -> Result<f64, Failure> {
        let wanted = format!("reason=\"{reason}\"");
        let metrics = self.get("/metrics")?;
        let samples =
            metrics.lines().filter(|line| line.contains("_refused_total") && line.contains(&wanted));
        Ok(samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }
}

impl Drop for ControllerProcess {
    fn drop(&mut self) {
        self.kill();
    }
}
