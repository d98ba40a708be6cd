//! Owns `meshctl verify`: whether the mesh in a cluster is whole, node by node, and what to do where it is not.
//!
//! Invariants: every judgement is a pure function of what was read, and what is wrong comes with what to do about it.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    api::{
        admissionregistration::v1::ValidatingWebhookConfiguration,
        apps::v1::{DaemonSet, Deployment},
        core::v1::{ConfigMap, Node},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, ResourceExt,
    core::{Selector, SelectorExt as _},
};

use super::{
    InstallError,
    apply::complaint,
    finding::{self, Finding},
    objects::{self, AGENT, CONTROLLER, MESH, ROOTS, ROOTS_KEY},
    ready::{Progress, of_deployment},
    uninstall::cleaner::CLEANUP,
};
use crate::{
    ctl::{
        Output,
        cluster::{AgentPod, Cluster, ClusterError, Doing, list},
    },
    view::{Phase, PodState, StatusView, paths},
};

/// Longest wait for an agent's answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// So many pods of a node are named.
const NAMED_MAX: usize = 3;

/// Options of `verify`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct VerifyArgs {
    /// Only nodes with this label selector.
    #[arg(long, value_name = "SELECTOR", default_value = "")]
    pub nodes: String,
}

/// Checks everything. Whether nothing is wrong.
pub(super) async fn verify(cluster: &Cluster, args: &VerifyArgs, out: Output) -> Result<bool, InstallError> {
    let sets = cluster.own::<DaemonSet>();
    let Some(set) = sets.get_opt(AGENT).await.doing(|| format!("get DaemonSet {AGENT}"))? else {
        return Err(InstallError::NoMesh { namespace: cluster.mesh.clone() });
    };
    let mut findings = vec![controller(cluster).await?];
    findings.extend(definitions(&cluster.definitions().await?));
    findings.push(roots(cluster).await?);
    findings.extend(cleanup(cluster).await?);
    findings.push(webhook(cluster).await?);
    findings.extend(nodes(cluster, &set, &args.nodes).await?);
    Ok(finding::show(&findings, out)?)
}

async fn controller(cluster: &Cluster) -> Result<Finding, ClusterError> {
    let found = cluster.own::<Deployment>().get_opt(CONTROLLER).await;
    let found = found.doing(|| format!("get Deployment {CONTROLLER}"))?;
    Ok(of_controller(found.as_ref().map(of_deployment), &cluster.mesh))
}

fn of_controller(progress: Option<Progress>, mesh: &str) -> Finding {
    let Some(progress) = progress else {
        let message = format!("Deployment {mesh}/{CONTROLLER} is not there");
        return Finding::error("controller", message, "meshctl upgrade makes it");
    };
    let Progress { wanted, available, .. } = progress;
    if wanted == 0 {
        let advice = format!("kubectl -n {mesh} scale deploy/{CONTROLLER} --replicas=2");
        return Finding::error("controller", "is scaled down to no replicas", advice);
    }
    let have = format!("{available} of {wanted} replicas ready");
    let advice = format!("kubectl -n {mesh} logs deploy/{CONTROLLER}");
    match (progress.done(), available) {
        (true, _) => Finding::good("controller", have),
        (false, 0) => Finding::error("controller", have, advice),
        (false, _) if available < wanted => Finding::warning("controller", have, advice),
        (false, _) => {
            let advice = format!("kubectl -n {mesh} rollout status deploy/{CONTROLLER}");
            Finding::warning("controller", format!("{have}, not all of the newest form"), advice)
        }
    }
}

/// Definitions of kinds: established, and of a version that the mesh reads.
pub(super) fn definitions(found: &[CustomResourceDefinition]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut good = 0;
    for wanted in mesh_control::crd::all() {
        let name = wanted.name_any();
        let subject = format!("definition {name}");
        let Some(found) = found.iter().find(|found| found.name_any() == name) else {
            let advice = "meshctl upgrade makes it";
            findings.push(Finding::warning(subject, "is not there: this kind cannot be used", advice));
            continue;
        };
        let known: Vec<&str> = wanted.spec.versions.iter().map(|version| version.name.as_str()).collect();
        let served: Vec<&str> = found
            .spec
            .versions
            .iter()
            .filter(|version| version.served)
            .map(|version| version.name.as_str())
            .collect();
        if let Some(complaint) = complaint(found) {
            findings.push(Finding::error(subject, complaint, format!("kubectl describe crd {name}")));
        } else if !served.iter().any(|version| known.contains(version)) {
            findings.push(Finding::error(
                subject,
                format!("serves {}, the mesh reads {}", served.join(", "), known.join(", ")),
                "use definitions of a version that the mesh knows",
            ));
        } else {
            good += 1;
        }
    }
    findings.insert(0, Finding::good("definitions", format!("{good} kinds are served")));
    findings
}

async fn roots(cluster: &Cluster) -> Result<Finding, ClusterError> {
    let api = cluster.own::<ConfigMap>();
    let found = api.get_opt(ROOTS).await.doing(|| format!("get ConfigMap {ROOTS}"))?;
    Ok(of_roots(found.as_ref(), &cluster.mesh))
}

fn of_roots(found: Option<&ConfigMap>, mesh: &str) -> Finding {
    let text = found.and_then(|found| found.data.as_ref()).and_then(|data| data.get(ROOTS_KEY));
    match text.is_some_and(|text| !text.trim().is_empty()) {
        true => Finding::good("roots", format!("published in ConfigMap {ROOTS}")),
        false => Finding::error(
            "roots",
            format!("ConfigMap {mesh}/{ROOTS} has no {ROOTS_KEY}"),
            format!("kubectl -n {mesh} logs deploy/{CONTROLLER}"),
        ),
    }
}

/// What cleans nodes of a mesh that goes, beside one that is here.
async fn cleanup(cluster: &Cluster) -> Result<Option<Finding>, ClusterError> {
    let sets = cluster.own::<DaemonSet>();
    let there = sets.get_opt(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?;
    Ok(there.map(|_| of_cleanup()))
}

fn of_cleanup() -> Finding {
    Finding::warning(
        "uninstallation",
        format!(
            "DaemonSet {CLEANUP} is left of one that was not finished: it cleans nodes that lose their agent"
        ),
        "meshctl uninstall goes on with it, meshctl install takes it away",
    )
}

async fn webhook(cluster: &Cluster) -> Result<Finding, ClusterError> {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(cluster.client.clone());
    let found = api.get_opt(MESH).await.doing(|| format!("get webhook {MESH}"))?;
    Ok(of_webhook(found.as_ref(), &cluster.mesh))
}

fn of_webhook(found: Option<&ValidatingWebhookConfiguration>, mesh: &str) -> Finding {
    let Some(found) = found else {
        // By webhook.enabled=false it is meant so, and nothing in the cluster tells that from a webhook that somebody deleted.
        return Finding::good("webhook", "there is none: only statuses say what is wrong with resources");
    };
    let webhooks = found.webhooks.as_deref().unwrap_or_default();
    if webhooks.is_empty() {
        let message = format!("ValidatingWebhookConfiguration {MESH} is empty: wrong resources are accepted");
        return Finding::warning("webhook", message, "meshctl upgrade makes it whole");
    }
    let trusted = webhooks
        .iter()
        .all(|webhook| webhook.client_config.ca_bundle.as_ref().is_some_and(|bundle| !bundle.0.is_empty()));
    match trusted {
        true => Finding::good("webhook", "has the controller's certificate"),
        false => Finding::warning(
            "webhook",
            "has no certificate yet: resources of the mesh are refused while failurePolicy is Fail",
            format!("kubectl -n {mesh} logs deploy/{CONTROLLER}"),
        ),
    }
}

async fn nodes(cluster: &Cluster, set: &DaemonSet, selector: &str) -> Result<Vec<Finding>, ClusterError> {
    let api: Api<Node> = Api::all(cluster.client.clone());
    let nodes = list(&api, selector).await.doing(|| "list nodes".to_owned())?;
    let agents: BTreeMap<String, AgentPod> =
        cluster.agents().await?.into_iter().map(|agent| (agent.node.clone(), agent)).collect();
    let spec = set.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
    let image = spec.and_then(|spec| spec.containers.first()).and_then(|container| container.image.clone());
    let wanted = objects::nodes_of(set).unwrap_or_default();
    let mut findings = Vec::new();
    for node in nodes {
        let subject = format!("node {}", node.name_any());
        match agent_of(&node, &wanted, &agents, &cluster.mesh) {
            Ok(agent) => {
                findings.extend(ask(cluster, agent, &subject).await);
                findings.extend(of_image(&subject, &agent.image, image.as_deref()));
            }
            Err(finding) => findings.push(finding),
        }
    }
    Ok(findings)
}

/// The agent of a node, or why none there can be asked.
fn agent_of<'a>(
    node: &Node,
    wanted: &Selector,
    agents: &'a BTreeMap<String, AgentPod>,
    mesh: &str,
) -> Result<&'a AgentPod, Finding> {
    let name = node.name_any();
    let subject = format!("node {name}");
    if !wanted.matches(node.labels()) {
        return Err(Finding::warning(
            subject,
            "is not to have an agent: its pods are not in the mesh",
            "values agent.nodeSelector and agent.nodeExpressions leave it out",
        ));
    }
    let Some(agent) = agents.get(&name) else {
        let advice = format!("kubectl -n {mesh} describe daemonset {AGENT}");
        return Err(Finding::error(subject, "has no agent", advice));
    };
    match &agent.reason {
        None => Ok(agent),
        Some(reason) => {
            let advice = format!("kubectl -n {mesh} logs {}", agent.name);
            Err(Finding::error(subject, format!("agent {}: {reason}", agent.name), advice))
        }
    }
}

/// An agent whose image is not the one that is wanted now.
fn of_image(subject: &str, runs: &str, wanted: Option<&str>) -> Option<Finding> {
    let wanted = wanted.filter(|wanted| *wanted != runs)?;
    let advice = "wait for the rollout; values agent.maxSurge say how fast it is";
    Some(Finding::warning(subject, format!("its agent runs {runs}, wanted {wanted}"), advice))
}

/// What an agent says of itself.
async fn ask(cluster: &Cluster, agent: &AgentPod, subject: &str) -> Vec<Finding> {
    match cluster.ask::<StatusView>(agent, paths::STATUS, &[], ANSWER_WITHIN).await {
        Ok(status) => judge(&status, subject),
        Err(error) => vec![Finding::error(
            subject,
            crate::report::report(&error),
            "you need the right to create pods/exec in the mesh's namespace",
        )],
    }
}

fn judge(status: &StatusView, subject: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let detached: Vec<&str> = status
        .kernel
        .programs
        .iter()
        .filter(|program| !program.attached)
        .map(|program| program.name.as_str())
        .collect();
    if status.agent.phase != Phase::Ready {
        let message = format!("agent is not ready, waits for: {}", status.agent.waiting_for.join("; "));
        findings.push(Finding::error(subject, message, "its log says more"));
    }
    if !detached.is_empty() {
        let message = format!("not attached: {}", detached.join(", "));
        findings.push(Finding::error(
            subject,
            message,
            "restart the agent; `meshctl status` lists programs of others",
        ));
    }
    if let Some(controller) = status.controller.as_ref().filter(|controller| !controller.connected) {
        let reason = controller.reason.clone().unwrap_or_default();
        let message =
            format!("agent has no link to {}: {reason}; its last state is in force", controller.url);
        findings.push(Finding::warning(subject, message, "check the controller, and policies between them"));
    }
    let identity = &status.identity;
    // Without a reason the missing ones are being fetched.
    if let Some(reason) = identity.reason.as_ref().filter(|_| identity.valid < identity.wanted) {
        let message = format!("{} of {} certificates are valid: {reason}", identity.valid, identity.wanted);
        findings.push(Finding::warning(subject, message, "`meshctl certificates` lists them all"));
    }
    let failed: Vec<_> = status.pods.iter().filter(|pod| pod.state == PodState::Failed).collect();
    if !failed.is_empty() {
        let named: Vec<String> = failed
            .iter()
            .take(NAMED_MAX)
            .map(|pod| {
                format!("{}/{}: {}", pod.namespace, pod.name, pod.reason.as_deref().unwrap_or("no reason"))
            })
            .collect();
        let message = format!("{} pods cannot be enrolled, e.g. {}", failed.len(), named.join("; "));
        findings.push(Finding::error(subject, message, "`meshctl status` lists them all"));
    }
    if findings.is_empty() {
        let enrolled = status.pods.iter().filter(|pod| pod.state == PodState::Enrolled).count();
        let message = format!(
            "agent {}, kernel {}, {enrolled} pods in the mesh",
            status.agent.version, status.kernel.release
        );
        findings.push(Finding::good(subject, message));
    }
    findings
}

#[cfg(test)]
mod tests;
