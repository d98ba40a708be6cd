//! What nodes and Kubernetes' controllers would do here, where there are none: one node, on which pods of the two DaemonSets run.

use mesh_tests::cluster::Kubectl;
use serde_json::{Value, json};

use super::{CLEANUP, NAMESPACE, text};

/// The node's name.
const NODE: &str = "n1";

/// Its controllers; what they do is done by [`Nodes::look`].
#[derive(Debug)]
pub(crate) struct Nodes<'a> {
    kubectl: &'a Kubectl,
    /// Of the DaemonSet whose pod ran after the agents were gone.
    pub(crate) cleaned: Option<String>,
}

impl<'a> Nodes<'a> {
    /// With an agent on the node.
    pub(crate) fn start(kubectl: &'a Kubectl) -> anyhow::Result<Self> {
        // Pods need an account, and nobody makes that of a namespace here.
        kubectl.run(&["create", "serviceaccount", "default", "-n", NAMESPACE])?;
        let nodes = Self { kubectl, cleaned: None };
        nodes.run_pod(&kubectl.json(&["get", "daemonset", "-n", NAMESPACE, "nodemesh-agent"])?)?;
        Ok(nodes)
    }

    /// Does what is to be done now.
    pub(crate) fn look(&mut self) -> anyhow::Result<()> {
        let list = self.kubectl.json(&["get", "daemonsets,pods", "-n", NAMESPACE])?;
        let items: Vec<Value> = list["items"].as_array().cloned().unwrap_or_default();
        let (sets, pods): (Vec<_>, Vec<_>) =
            items.into_iter().partition(|item| text(item, "/kind") == "DaemonSet");
        for pod in &pods {
            let owner = text(pod, "/metadata/labels/owner");
            if !sets.iter().any(|set| text(set, "/metadata/uid") == owner) {
                let name = text(pod, "/metadata/name");
                self.kubectl.run(&["delete", "pod", "-n", NAMESPACE, name, "--force", "--grace-period=0"])?;
                // One thing at a time, as it is in a cluster.
                return Ok(());
            }
        }
        let agents = pods.iter().any(|pod| text(pod, "/metadata/labels/app.kubernetes.io~1name") != CLEANUP);
        let Some(set) = sets.iter().find(|set| text(set, "/metadata/name") == CLEANUP) else {
            return Ok(());
        };
        let uid = text(set, "/metadata/uid");
        let waits = set.pointer("/spec/template/spec/nodeSelector/nodemesh.dev~1cleanup").is_some();
        let runs = pods.iter().any(|pod| text(pod, "/metadata/labels/owner") == uid);
        if !waits && !runs {
            self.run_pod(set)?;
            if !agents {
                self.cleaned = Some(uid.to_owned());
            }
        }
        let generation = &set["metadata"]["generation"];
        let wanted = usize::from(!waits);
        if set["status"]["observedGeneration"] != *generation
            || set["status"]["desiredNumberScheduled"] != wanted
        {
            let status = json!({"status": {"observedGeneration": generation, "desiredNumberScheduled": wanted,
                "currentNumberScheduled": wanted, "numberMisscheduled": 0, "numberReady": wanted}});
            self.set_status("daemonset", CLEANUP, &status)?;
        }
        Ok(())
    }

    /// A pod of a DaemonSet that runs, and whose init containers have ended well.
    fn run_pod(&self, set: &Value) -> anyhow::Result<()> {
        let (name, uid) = (text(set, "/metadata/name"), text(set, "/metadata/uid"));
        let pod_name = format!("{name}-{}", &uid[..8]);
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": set["spec"]["template"]["metadata"],
            "spec": set["spec"]["template"]["spec"]});
        pod["metadata"]["name"] = json!(pod_name);
        pod["metadata"]["namespace"] = json!(NAMESPACE);
        pod["metadata"]["labels"]["owner"] = json!(uid);
        pod["spec"]["nodeName"] = json!(NODE);
        self.kubectl.feed(&["create", "-f", "-"], &pod.to_string())?;
        let ended = |container: &Value| {
            let state = json!({"terminated": {"exitCode": 0, "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:00:01Z"}});
            json!({"name": container["name"], "image": "x", "imageID": "x", "ready": true, "restartCount": 0, "state": state})
        };
        let init: Vec<Value> =
            pod["spec"]["initContainers"].as_array().into_iter().flatten().map(ended).collect();
        let status = json!({"status": {"phase": "Running", "startTime": "2026-01-01T00:00:00Z", "initContainerStatuses": init}});
        self.set_status("pod", &pod_name, &status)
    }

    fn set_status(&self, kind: &str, name: &str, status: &Value) -> anyhow::Result<()> {
        let patch = ["patch", kind, name, "-n", NAMESPACE, "--subresource=status", "--type=merge", "-p"];
        match self.kubectl.run(&[&patch[..], &[&status.to_string()]].concat()) {
            // Deleted meanwhile.
            Err(error) if !error.to_string().contains("NotFound") => Err(error.into()),
            _ => Ok(()),
        }
    }
}
