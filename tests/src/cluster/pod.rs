//! A running pod of a cluster, as the place in which a test runs programs: by `kubectl exec`, as an operator would.

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Stdio};

use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Cluster, ClusterNode, Kubectl, KubectlError};
use crate::tool::PodTool;
use crate::web::WebLoad;
use crate::web::messages::{Ask, Mix, Script, Told};

/// A pod whose image holds `/pod-tool`. It is only a name: whether such a pod runs shows when it is asked.
#[derive(Debug, Clone)]
pub struct ClusterPod {
    kubectl: Kubectl,
    namespace: String,
    name: String,
}

impl Cluster {
    /// The pod of this name.
    #[must_use]
    pub fn pod(&self, namespace: &str, name: &str) -> ClusterPod {
        ClusterPod { kubectl: self.kubectl().clone(), namespace: namespace.to_owned(), name: name.to_owned() }
    }

    /// Wait until a Deployment, DaemonSet or StatefulSet is as it is wanted.
    ///
    /// # Errors
    /// When it is not within three minutes.
    pub fn rolled_out(&self, namespace: &str, what: &str) -> Result<(), KubectlError> {
        let wait = ["rollout", "status", "-n", namespace, what, "--timeout=180s"];
        self.kubectl().run(&wait).map(drop)
    }
}

impl ClusterPod {
    /// Send requests from it and return what was answered, in order.
    ///
    /// # Errors
    /// When the program fails; a request that fails is no error but a [`Told`] that says so.
    pub fn ask(&self, script: &Script) -> anyhow::Result<Vec<Told>> {
        self.task("ask", script)
    }

    /// Send one GET by HTTP/1.1.
    ///
    /// # Errors
    /// As [`ClusterPod::ask`].
    pub fn get(&self, to: SocketAddr, host: &str, path: &str) -> anyhow::Result<Told> {
        let script = Script { to, http2: false, requests: vec![Ask::get(host, path)] };
        self.ask(&script)?.pop().context("no answer")
    }

    /// The addresses that the C library finds in it for a name.
    ///
    /// # Errors
    /// When there are none.
    pub fn resolve(&self, name: &str) -> anyhow::Result<Vec<IpAddr>> {
        let text = self.kubectl.run(&self.exec(&["resolve", name]))?;
        text.lines().map(|line| line.parse().with_context(|| format!("{line:?} is no address"))).collect()
    }

    /// A load of requests from it that runs beside the test.
    ///
    /// # Errors
    /// When kubectl cannot be started.
    pub fn load(&self, mix: &Mix) -> anyhow::Result<WebLoad> {
        let mix = serde_json::to_string(mix)?;
        let mut exec = self.exec(&["web-load", &mix]);
        exec.insert(1, "-i");
        let mut command = self.kubectl.command(&exec);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        Ok(WebLoad::of(child))
    }

    /// The same, started by the container runtime of the pod's node: it goes on while there is no API server.
    ///
    /// # Errors
    /// When the pod has no container, or the node does not run.
    pub fn load_by(&self, node: &ClusterNode, mix: &Mix) -> anyhow::Result<WebLoad> {
        let mix = serde_json::to_string(mix)?;
        Ok(WebLoad::of(self.start_by(node, "load", &["web-load", &mix])?))
    }

    /// Plain sockets in it, held by a program that the container runtime of the pod's node starts; one at a time.
    ///
    /// # Errors
    /// As [`ClusterPod::load_by`].
    pub fn tool(&self, node: &ClusterNode) -> anyhow::Result<PodTool> {
        Ok(PodTool::of(&self.name, self.start_by(node, "tool", &["serve"])?)?)
    }

    /// Starts `/pod-tool` in its container by the node's containerd, which knows the process by the name `id`.
    fn start_by(&self, node: &ClusterNode, id: &str, arguments: &[&str]) -> anyhow::Result<Child> {
        let path = "jsonpath={.status.containerStatuses[0].containerID}";
        let container = self.kubectl.run(&["get", "pod", "-n", &self.namespace, &self.name, "-o", path])?;
        let container = container.trim();
        let container =
            container.strip_prefix("containerd://").with_context(|| format!("container {container:?}"))?;
        let exec = ["ctr", "--namespace=k8s.io", "tasks", "exec", "--exec-id", id, container, "/pod-tool"];
        Ok(node.start_program(&[&exec[..], arguments].concat(), Stdio::piped())?)
    }

    fn task<T: DeserializeOwned>(&self, what: &str, task: &impl Serialize) -> anyhow::Result<T> {
        let task = serde_json::to_string(task)?;
        let answer = self.kubectl.run(&self.exec(&[what, &task]))?;
        serde_json::from_str(&answer).with_context(|| format!("{what} in {} said {answer:?}", self.name))
    }

    fn exec<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let mut exec = vec!["exec", "-n", &self.namespace, &self.name, "--", "/pod-tool"];
        exec.extend(arguments);
        exec
    }
}
