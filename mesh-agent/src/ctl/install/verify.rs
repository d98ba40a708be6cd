//! Owns `meshctl verify`: whether the mesh in a cluster is whole, node by node, and what to do where it is not.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    api::{
        admissionregistration::v1::ValidatingWebhookConfiguration,
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Node},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{Api, ResourceExt, core::SelectorExt as _};

use super::{
    InstallError,
    apply::complaint,
    finding::{self, Finding},
    objects::{self, AGENT, CONTROLLER, MESH, ROOTS, ROOTS_KEY},
    ready,
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
    findings.extend(webhook(cluster).await?);
    findings.extend(nodes(cluster, &set, &args.nodes).await?);
    Ok(finding::show(&findings, out)?)
}

async fn controller(cluster: &Cluster) -> Result<Finding, ClusterError> {
    let (progress, _) = ready::look(cluster).await?;
    let have = format!("{} of {} replicas ready", progress.available, progress.wanted);
    let advice = format!("kubectl -n {} logs deploy/{CONTROLLER}", cluster.mesh);
    Ok(match (progress.done(), progress.available) {
        (true, _) => Finding::good("controller", have),
        (false, 0) => Finding::error("controller", have, advice),
        (false, _) => Finding::warning("controller", have, advice),
    })
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
    let there = found.and_then(|found| found.data).is_some_and(|data| data.contains_key(ROOTS_KEY));
    Ok(match there {
        true => Finding::good("roots", format!("published in ConfigMap {ROOTS}")),
        false => Finding::error(
            "roots",
            format!("ConfigMap {}/{ROOTS} has no {ROOTS_KEY}", cluster.mesh),
            format!("kubectl -n {} logs deploy/{CONTROLLER}", cluster.mesh),
        ),
    })
}

/// What cleans nodes of a mesh that goes, beside one that is here.
async fn cleanup(cluster: &Cluster) -> Result<Option<Finding>, ClusterError> {
    let sets = cluster.own::<DaemonSet>();
    let there = sets.get_opt(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?;
    Ok(there.map(|_| {
        Finding::warning(
            "uninstallation",
            format!("DaemonSet {CLEANUP} is left of one that was not finished: it cleans nodes that lose their agent"),
            "meshctl uninstall goes on with it, meshctl install takes it away",
        )
    }))
}

async fn webhook(cluster: &Cluster) -> Result<Option<Finding>, ClusterError> {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(cluster.client.clone());
    let Some(found) = api.get_opt(MESH).await.doing(|| format!("get webhook {MESH}"))? else {
        return Ok(None);
    };
    let webhooks = found.webhooks.unwrap_or_default();
    let trusted = webhooks.iter().all(|webhook| webhook.client_config.ca_bundle.is_some());
    Ok(Some(match trusted {
        true => Finding::good("webhook", "has the controller's certificate"),
        false => Finding::warning(
            "webhook",
            "has no certificate yet: resources of the mesh are refused while failurePolicy is Fail",
            format!("kubectl -n {} logs deploy/{CONTROLLER}", cluster.mesh),
        ),
    }))
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
        let name = node.name_any();
        let subject = format!("node {name}");
        if !wanted.matches(node.labels()) {
            let advice = "values agent.nodeSelector and agent.nodeExpressions leave it out";
            findings.push(Finding::warning(
                subject,
                "is not to have an agent: its pods are not in the mesh",
                advice,
            ));
            continue;
        }
        let Some(agent) = agents.get(&name) else {
            let advice = format!("kubectl -n {} describe daemonset {AGENT}", cluster.mesh);
            findings.push(Finding::error(subject, "has no agent", advice));
            continue;
        };
        if let Some(reason) = &agent.reason {
            let advice = format!("kubectl -n {} logs {}", cluster.mesh, agent.name);
            findings.push(Finding::error(subject, format!("agent {}: {reason}", agent.name), advice));
            continue;
        }
        findings.extend(ask(cluster, agent, &subject).await);
        if image.as_ref().is_some_and(|image| *image != agent.image) {
            let message =
                format!("its agent runs {}, wanted {}", agent.image, image.clone().unwrap_or_default());
            let advice = "wait for the rollout; values agent.maxSurge say how fast it is";
            findings.push(Finding::warning(format!("node {name}"), message, advice));
        }
    }
    Ok(findings)
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
