//! Owns questions to several agents of a cluster at once, and how their answers stand side by side.
//!
//! Invariants:
//! - An agent that does not answer is a row of its own and hides no other; then the exit status is 1.
//! - A node without an agent is one too, if it has pods that ask for the mesh.
//! - With one node asked for, the answer has the same form as on that node itself.

mod silent;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{runtime::Runtime, task::JoinSet};

use super::{
    Args, CtlError, Output,
    client::{Client, Remote},
    cluster::{self, AgentPod, Cluster, ClusterError},
    figures, print,
    table::{Align, Table},
};
use crate::{
    report::report,
    view::{PodState, StatusView},
};
use silent::{SilentNode, WaitingPod};

/// Agents asked at the same time.
const AT_ONCE: usize = 16;

/// The agents of a cluster.
#[derive(Debug)]
pub(super) struct Fleet {
    runtime: Runtime,
    cluster: Cluster,
    agents: Vec<AgentPod>,
    /// Whether the user named a node.
    one: bool,
}

/// What one agent answered.
#[derive(Debug, Serialize)]
pub(super) struct OfNode<T> {
    pub(super) node: String,
    #[serde(flatten)]
    pub(super) answer: Answer<T>,
    /// What can be said of its pods without an answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pods: Vec<WaitingPod>,
}

/// An answer, or why there is none.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer<T> {
    Answer(T),
    Error(String),
}

impl Fleet {
    /// Finds the agents: all, or the one of the node that the user named.
    pub(super) fn find(args: &Args) -> Result<Self, ClusterError> {
        let runtime = cluster::runtime()?;
        let (cluster, mut agents) = runtime.block_on(async {
            let cluster = Cluster::connect(&args.cluster).await?;
            let agents = cluster.agents().await?;
            Ok::<_, ClusterError>((cluster, agents))
        })?;
        let mesh = &cluster.mesh;
        if agents.is_empty() {
            return Err(ClusterError::Said(format!(
                "there are no agents in namespace {mesh}; see --mesh-namespace"
            )));
        }
        let node = args.cluster.node.as_deref();
        agents.retain(|agent| node.is_none_or(|node| agent.node == node));
        if agents.is_empty() {
            let node = node.unwrap_or_default();
            return Err(ClusterError::Said(format!(
                "node {node} has no agent; `meshctl verify` says what to do"
            )));
        }
        Ok(Self { runtime, cluster, agents, one: node.is_some() })
    }

    /// The agent of a pod's node, with the pod's full name. Without a pod: one that is ready.
    pub(super) fn client(self, pod: Option<&str>) -> Result<(Client, Option<String>), ClusterError> {
        let (agent, pod) = match pod {
            Some(pod) => {
                let (agent, name) = self.runtime.block_on(self.cluster.agent_of(pod))?;
                (agent, Some(name))
            }
            None => {
                let ready = self.agents.iter().find(|agent| agent.ready).or(self.agents.first());
                let agent =
                    ready.cloned().ok_or_else(|| ClusterError::Said("there is no agent".to_owned()))?;
                if !self.one {
                    eprintln!("asked node {}", agent.node);
                }
                (agent, None)
            }
        };
        let remote = Remote { runtime: self.runtime, cluster: self.cluster, agent };
        Ok((Client::Remote(Box::new(remote)), pod))
    }

    /// Asks every agent the same, in the order of their nodes.
    pub(super) fn ask<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &'static str,
        query: &[(&'static str, String)],
        within: Duration,
    ) -> Vec<OfNode<T>> {
        self.runtime.block_on(async {
            let mut answers = Vec::new();
            for agents in self.agents.chunks(AT_ONCE) {
                let mut set = JoinSet::new();
                for agent in agents.iter().cloned() {
                    let (cluster, query) = (self.cluster.clone(), query.to_vec());
                    set.spawn(async move {
                        let query: Vec<(&str, &str)> =
                            query.iter().map(|(key, value)| (*key, value.as_str())).collect();
                        let answer = match (&agent.reason, cluster.ask(&agent, path, &query, within).await) {
                            (_, Ok(answer)) => Answer::Answer(answer),
                            (Some(reason), Err(_)) => Answer::Error(format!("{}: {reason}", agent.name)),
                            (None, Err(error)) => Answer::Error(report(&error)),
                        };
                        OfNode { node: agent.node, answer, pods: Vec::new() }
                    });
                }
                answers.extend(set.join_all().await);
            }
            answers.sort_by(|a: &OfNode<T>, b| a.node.cmp(&b.node));
            answers
        })
    }

    /// The answers of those that answer; who does not is named on standard error.
    pub(super) fn all<T: DeserializeOwned + Send + 'static>(
        &self,
        path: &'static str,
        query: &[(&'static str, String)],
        within: Duration,
    ) -> Vec<T> {
        let good = |answer: OfNode<T>| match answer.answer {
            Answer::Answer(view) => Some(view),
            Answer::Error(error) => {
                eprintln!("node {}: {error}", answer.node);
                None
            }
        };
        self.ask(path, query, within).into_iter().filter_map(good).collect()
    }

    /// Asks every agent and prints their answers one below the other. Whether all answered.
    pub(super) fn show<T: DeserializeOwned + Serialize + Send + 'static>(
        &self,
        path: &'static str,
        query: &[(&'static str, String)],
        within: Duration,
        out: Output,
        text: impl Fn(&T) -> String,
    ) -> Result<bool, CtlError> {
        self.print(self.ask(path, query, within), out, |answers| below_each_other(answers, &text), &text)
    }

    /// Asks every agent for its status and prints one table. Whether all answered.
    pub(super) fn status(&self, path: &'static str, within: Duration, out: Output) -> Result<bool, CtlError> {
        let all_pods = out == Output::Wide;
        let mut answers = self.ask::<StatusView>(path, &[], within);
        if !self.one {
            self.add_silent(&mut answers);
        }
        self.print(answers, out, |answers| statuses(answers, all_pods), super::status::render)
    }

    /// Adds what is known of nodes that did not answer, and of those that nobody can ask.
    fn add_silent<T>(&self, answers: &mut Vec<OfNode<T>>) {
        let answered: BTreeSet<&str> =
            answers.iter().filter(|of| matches!(of.answer, Answer::Answer(_))).map(|of| &*of.node).collect();
        let silent = self.runtime.block_on(silent::nodes(&self.cluster, &self.agents, &answered));
        let silent = silent.unwrap_or_else(|error| {
            // The answers are worth having without it.
            eprintln!("pods of nodes that do not answer are not shown: {}", report(&error));
            Vec::new()
        });
        let mut silent: BTreeMap<String, SilentNode> =
            silent.into_iter().map(|node| (node.node.clone(), node)).collect();
        for of in answers.iter_mut() {
            if let Some(node) = silent.remove(&of.node) {
                of.pods = node.pods;
            }
        }
        let without = silent.into_values().filter(|node| !node.has_agent).map(|node| OfNode {
            node: node.node,
            answer: Answer::Error("the node has no agent".to_owned()),
            pods: node.pods,
        });
        answers.extend(without);
        answers.sort_by(|a, b| a.node.cmp(&b.node));
    }

    fn print<T: Serialize>(
        &self,
        mut answers: Vec<OfNode<T>>,
        out: Output,
        several: impl Fn(&[OfNode<T>]) -> String,
        one: impl Fn(&T) -> String,
    ) -> Result<bool, CtlError> {
        if self.one
            && let Some(only) = answers.pop()
        {
            return match only.answer {
                Answer::Answer(view) => print(out, &view, one).map(|()| true),
                Answer::Error(error) => Err(CtlError::Ask(ClusterError::Said(error).into())),
            };
        }
        print(out, &answers, |answers| several(answers))?;
        Ok(answers.iter().all(|answer| matches!(answer.answer, Answer::Answer(_))))
    }
}

fn below_each_other<T>(answers: &[OfNode<T>], text: impl Fn(&T) -> String) -> String {
    let of_one = |answer: &OfNode<T>| match &answer.answer {
        Answer::Answer(view) => format!("== node {}\n{}\n", answer.node, text(view)),
        Answer::Error(error) => format!("== node {}\nno answer: {error}\n\n", answer.node),
    };
    answers.iter().map(of_one).collect()
}

/// A row for each node, then the pods that want to be in the mesh and are not, or all pods.
fn statuses(answers: &[OfNode<StatusView>], all_pods: bool) -> String {
    let mut nodes = Table::new(&[
        ("NODE", Align::Left),
        ("AGENT", Align::Left),
        ("STATE", Align::Left),
        ("UP", Align::Right),
        ("PODS", Align::Right),
        ("NOT IN MESH", Align::Right),
        ("CERTIFICATES", Align::Right),
        ("CONTROLLER", Align::Left),
        ("KERNEL", Align::Left),
    ]);
    let mut pods = Table::new(&[
        ("POD", Align::Left),
        ("NODE", Align::Left),
        ("STATE", Align::Left),
        ("REASON", Align::Left),
    ]);
    for OfNode { node, answer, pods: waiting } in answers {
        for pod in waiting {
            pods.row([
                format!("{}/{}", pod.namespace, pod.name),
                node.clone(),
                pod.state.to_owned(),
                pod.reason.clone(),
            ]);
        }
        let view = match answer {
            Answer::Answer(view) => view,
            Answer::Error(error) => {
                let none = String::new;
                nodes.row([
                    node.clone(),
                    none(),
                    format!("no answer: {error}"),
                    none(),
                    none(),
                    none(),
                    none(),
                    none(),
                    none(),
                ]);
                continue;
            }
        };
        let enrolled = view.pods.iter().filter(|pod| pod.state == PodState::Enrolled).count();
        let controller = view.controller.as_ref().map(|controller| match controller.connected {
            true => "connected".to_owned(),
            false => format!("away: {}", controller.reason.as_deref().unwrap_or("no reason")),
        });
        nodes.row([
            node.clone(),
            view.agent.version.clone(),
            super::status::phase(view),
            figures::age(view.agent.uptime_s),
            enrolled.to_string(),
            (view.pods.len() - enrolled).to_string(),
            format!("{}/{}", view.identity.valid, view.identity.wanted),
            controller.unwrap_or_default(),
            view.kernel.release.clone(),
        ]);
        for pod in view.pods.iter().filter(|pod| all_pods || pod.state != PodState::Enrolled) {
            pods.row([
                format!("{}/{}", pod.namespace, pod.name),
                node.clone(),
                pod.state.as_str().to_owned(),
                pod.reason.clone().unwrap_or_default(),
            ]);
        }
    }
    let mut text = nodes.render();
    if !pods.is_empty() {
        text.push('\n');
        text.push_str(&pods.render());
    }
    text
}
