//! Owns the agents' pods: which there are, and how one is asked something.
//!
//! Agents listen on a unix socket only. The user's right to `pods/exec` in the mesh's namespace is the right to ask them: `meshctl` runs
//! in the agent's container and hands the question on. No port is opened for that, on no address.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::AttachParams};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{Cluster, ClusterError, Doing, list};
use crate::{
    ctl::{
        DEFAULT_ADMIN_SOCKET,
        client::target,
        install::{AGENT, named},
    },
    view::ErrorView,
};

/// The way through the API server may take so much longer than the answer itself.
const GRACE: Duration = Duration::from_secs(10);
/// Largest answer taken from a pod.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Largest complaint taken from a pod.
const COMPLAINT_BYTES_MAX: u64 = 64 << 10;

/// An agent's pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::ctl) struct AgentPod {
    /// Name of the pod.
    pub(in crate::ctl) name: String,
    /// Its node.
    pub(in crate::ctl) node: String,
    /// Whether it is ready.
    pub(in crate::ctl) ready: bool,
    /// Image it runs.
    pub(in crate::ctl) image: String,
    /// Why it is not ready, as far as its status says.
    pub(in crate::ctl) reason: Option<String>,
}

/// What a program in a pod printed.
#[derive(Clone, Debug, Default)]
pub(in crate::ctl) struct Said {
    pub(in crate::ctl) out: Vec<u8>,
    pub(in crate::ctl) err: String,
    /// Whether it ended with status 0.
    pub(in crate::ctl) good: bool,
}

impl Cluster {
    /// Pods with these labels in the mesh's namespace.
    pub(in crate::ctl) async fn pods(&self, labels: &str) -> Result<Vec<Pod>, ClusterError> {
        list(&self.own(), labels).await.doing(|| format!("list pods in {}", self.mesh))
    }

    /// The agents' pods, by node.
    pub(in crate::ctl) async fn agents(&self) -> Result<Vec<AgentPod>, ClusterError> {
        let pods = self.pods(&named(AGENT)).await?;
        let mut agents: Vec<AgentPod> = pods.iter().filter_map(agent).collect();
        agents.sort_by(|a, b| (&a.node, &a.name).cmp(&(&b.node, &b.name)));
        Ok(agents)
    }

    /// The agent of a pod's node. `pod` is `NAMESPACE/NAME`, or `NAME` in this command's namespace.
    pub(in crate::ctl) async fn agent_of(&self, pod: &str) -> Result<(AgentPod, String), ClusterError> {
        let (namespace, name) = pod.split_once('/').unwrap_or((&self.namespace, pod));
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let found = api.get(name).await.doing(|| format!("get pod {namespace}/{name}"))?;
        let full = format!("{namespace}/{name}");
        let node = found.spec.and_then(|spec| spec.node_name);
        let Some(node) = node else {
            return Err(ClusterError::Said(format!("pod {full} is on no node yet")));
        };
        let agents = self.agents().await?;
        match agents.into_iter().find(|agent| agent.node == node) {
            Some(agent) => Ok((agent, full)),
            None => Err(ClusterError::Said(format!(
                "no agent on node {node}, where pod {full} is; `meshctl verify` says what to do"
            ))),
        }
    }

    /// Asks an agent one question of its admin socket.
    pub(in crate::ctl) async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        agent: &AgentPod,
        path: &str,
        query: &[(&str, &str)],
        within: Duration,
    ) -> Result<T, ClusterError> {
        let target = target(path, query);
        let seconds = within.as_secs().max(1).to_string();
        let command =
            ["/meshctl", "--admin-socket", DEFAULT_ADMIN_SOCKET, "ask", "--within", &seconds, "--", &target];
        let said = self.exec(agent, &command, within + GRACE).await?;
        if said.good {
            return serde_json::from_slice(&said.out).map_err(|error| {
                ClusterError::Said(format!(
                    "the agent of node {} answers in a form this meshctl ({}) does not know ({error}); use the \
                     meshctl of the agent's version",
                    agent.node,
                    env!("CARGO_PKG_VERSION")
                ))
            });
        }
        let refused = serde_json::from_slice::<ErrorView>(&said.out).map(|view| view.error);
        Err(ClusterError::Said(refused.unwrap_or_else(|_| format!("node {}: {}", agent.node, said.err))))
    }

    /// Runs a program in an agent's container and waits for its end.
    pub(in crate::ctl) async fn exec(
        &self,
        agent: &AgentPod,
        command: &[&str],
        within: Duration,
    ) -> Result<Said, ClusterError> {
        let late = || {
            ClusterError::Said(format!(
                "{} on node {} did not answer within {within:?}",
                agent.name, agent.node
            ))
        };
        tokio::time::timeout(within, self.exec_now(agent, command)).await.map_err(|_| late())?
    }

    async fn exec_now(&self, agent: &AgentPod, command: &[&str]) -> Result<Said, ClusterError> {
        let api = self.own::<Pod>();
        let params = AttachParams::default().container("agent").stdin(false).stdout(true).stderr(true);
        let doing = || format!("run meshctl in pod {} of node {}", agent.name, agent.node);
        let mut process = api.exec(&agent.name, command.to_vec(), &params).await.doing(doing)?;
        let (out, err) = tokio::join!(
            read(process.stdout(), ANSWER_BYTES_MAX),
            read(process.stderr(), COMPLAINT_BYTES_MAX)
        );
        let good = match process.take_status() {
            Some(status) => status.await.and_then(|status| status.status).as_deref() == Some("Success"),
            None => false,
        };
        Ok(Said { out, err: String::from_utf8_lossy(&err).trim().to_owned(), good })
    }
}

async fn read(from: Option<impl AsyncRead + Unpin>, most: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(from) = from {
        // A stream that breaks is seen in the status.
        let _ignored = from.take(most).read_to_end(&mut bytes).await;
    }
    bytes
}

fn agent(pod: &Pod) -> Option<AgentPod> {
    let spec = pod.spec.as_ref()?;
    let ready = is_ready(pod);
    Some(AgentPod {
        name: pod.metadata.name.clone()?,
        node: spec.node_name.clone()?,
        ready,
        image: spec.containers.first().and_then(|container| container.image.clone()).unwrap_or_default(),
        reason: (!ready).then(|| why_not_ready(pod)),
    })
}

/// Whether a pod is ready, by its own account.
pub(in crate::ctl) fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Why a pod is not ready, in the words of its status.
pub(in crate::ctl) fn why_not_ready(pod: &Pod) -> String {
    let Some(status) = &pod.status else { return "has no status yet".to_owned() };
    let containers =
        status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
    for container in containers {
        let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
        let last = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
        if let Some(waiting) = waiting {
            let reason = waiting.reason.clone().unwrap_or_default();
            let message = match (&waiting.message, last) {
                (_, Some(last)) => format!(", ended before with status {}", last.exit_code),
                (Some(message), None) => format!(": {message}"),
                (None, None) => String::new(),
            };
            return format!("container {} waits: {reason}{message}", container.name);
        }
        let running = container.state.as_ref().is_some_and(|state| state.running.is_some());
        if running && !container.ready {
            return format!(
                "container {} runs and is not ready; its log says what it waits for",
                container.name
            );
        }
    }
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let unmet = conditions.iter().find(|condition| condition.status != "True" && condition.message.is_some());
    match unmet {
        Some(condition) => format!(
            "{}: {}",
            condition.reason.as_deref().unwrap_or(&condition.type_),
            condition.message.as_deref().unwrap_or_default()
        ),
        None => format!("is {}", status.phase.as_deref().unwrap_or("Pending")),
    }
}
