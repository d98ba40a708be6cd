//! Owns taking the mesh out of a cluster, so that nothing of it is left: not on nodes, not in the API.
//!
//! Order: the webhook, so that nothing is refused; the agents; what they left on their nodes (programs, pins, CNI entries), by a pod on
//! each node that ends them; the controller; what the mesh made later (roots, lease, trust bundles); the definitions of kinds; the namespace.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        admissionregistration::v1::ValidatingWebhookConfiguration,
        apps::v1::{DaemonSet, Deployment},
        coordination::v1::Lease,
        core::v1::{ConfigMap, Container, Namespace, Pod, Secret},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, ListParams, Patch, PatchParams},
};

use super::{
    InstallError, ObjectKind, Report, apply,
    apply::{Action, Done},
    made_kinds,
    objects::{self, AGENT, INSTALLED, MANAGER, named, of_mesh},
    ready::{self, Progress},
    values::{Values, Wishes},
};
use crate::ctl::{
    CtlError, Output,
    cluster::{Cluster, ClusterError, Doing, defined, list, why_not_ready},
    print, write_out,
};

/// Name of the pods that clean up nodes.
const CLEANUP: &str = "nodemesh-cleanup";
/// Pause between looks.
const PAUSE: Duration = Duration::from_millis(300);

/// Options of `uninstall`.
#[derive(Clone, Debug, clap::Args)]
pub struct UninstallArgs {
    /// Also delete definitions of kinds that still have resources, with these resources. Only definitions that the mesh made.
    #[arg(long)]
    pub purge: bool,
    /// Seconds to wait until agents and namespace are gone and nodes are clean.
    #[arg(long, value_name = "SECONDS", default_value_t = 180, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub timeout: u32,
    /// Leave the nodes alone: for a cluster whose nodes are gone or cannot start pods.
    #[arg(long)]
    pub skip_nodes: bool,
    /// The mesh's image, to clean nodes with when the agents' DaemonSet is gone already, as after `helm uninstall`. With it nodes are
    /// cleaned by the defaults of all other values.
    #[arg(long, value_name = "IMAGE", conflicts_with = "skip_nodes")]
    pub image: Option<String>,
}

/// Takes the mesh out. Whether all of it is gone.
pub(super) async fn uninstall(
    cluster: &Cluster,
    args: &UninstallArgs,
    out: Output,
) -> Result<bool, InstallError> {
    let end = Instant::now() + Duration::from_secs(args.timeout.into());
    let mut gone = Gone { cluster, out, report: Report::default() };
    gone.kind(ObjectKind::of::<ValidatingWebhookConfiguration>(), None).await?;
    let mut agents =
        cluster.own::<DaemonSet>().get_opt(AGENT).await.doing(|| format!("get DaemonSet {AGENT}"))?;
    if let (None, Some(image)) = (&agents, &args.image) {
        let wishes = Wishes { set: vec![format!("image={image}")], ..Wishes::default() };
        agents = Some(objects::agents(&Values::read(&wishes)?, &cluster.mesh));
    }
    gone.kind(ObjectKind::of::<DaemonSet>(), Some(&cluster.mesh)).await?;
    pods_gone(cluster, AGENT, end).await?;
    if !args.skip_nodes {
        clean_nodes(cluster, agents.as_ref(), end).await?;
    }
    gone.kind(ObjectKind::of::<Deployment>(), Some(&cluster.mesh)).await?;
    // A controller that still runs would make its objects again.
    pods_gone(cluster, super::CONTROLLER, end).await?;
    for kind in made_kinds() {
        // Trust bundles are in all namespaces.
        let everywhere = !kind.namespaced || kind == ObjectKind::of::<ConfigMap>();
        gone.kind(kind, (!everywhere).then_some(cluster.mesh.as_str())).await?;
    }
    for kind in [ObjectKind::of::<Lease>(), ObjectKind::of::<Secret>()] {
        gone.kind(kind, Some(&cluster.mesh)).await?;
    }
    let all = gone.definitions(args.purge).await?;
    gone.namespace(end).await?;
    if gone.report.objects.is_empty() && out.is_text() {
        eprintln!("There is nothing of the mesh in this cluster.");
    }
    if !out.is_text() {
        print(out, &gone.report, |_| String::new())?;
    }
    Ok(all)
}

struct Gone<'a> {
    cluster: &'a Cluster,
    out: Output,
    report: Report,
}

impl Gone<'_> {
    fn note(&mut self, done: Done) -> Result<(), CtlError> {
        if self.out.is_text() {
            write_out(&format!("{}\n", done.line()))?;
        }
        self.report.objects.push(done);
        Ok(())
    }

    /// Deletes every object of a kind that is the mesh's.
    async fn kind(&mut self, kind: ObjectKind, namespace: Option<&str>) -> Result<(), InstallError> {
        for object in self.cluster.list(kind, namespace, &of_mesh()).await? {
            let (namespace, name) = (object.namespace(), object.name_any());
            // It goes when nodes are clean, so that another try can wait for it.
            if name == CLEANUP {
                continue;
            }
            apply::delete(self.cluster, kind, namespace.as_deref(), &name).await?;
            self.note(Done::new(kind, namespace.as_deref(), &name, Action::Deleted))?;
        }
        Ok(())
    }

    /// Deletes definitions that are ours; those with resources only if `purge`. Whether all are gone.
    async fn definitions(&mut self, purge: bool) -> Result<bool, InstallError> {
        let kind = ObjectKind::of::<CustomResourceDefinition>();
        let api: Api<CustomResourceDefinition> = Api::all(self.cluster.client.clone());
        let ours = list(&api, &format!("{INSTALLED}=true")).await.doing(|| "list definitions".to_owned())?;
        let mut all = true;
        for definition in ours {
            let name = definition.name_any();
            let Some(version) = definition.spec.versions.iter().find(|version| version.storage) else {
                continue;
            };
            let resource = defined(&definition, &version.name);
            let of: Api<DynamicObject> = Api::all_with(self.cluster.client.clone(), &resource);
            let first = of
                .list(&ListParams::default().limit(1))
                .await
                .doing(|| format!("list {}", resource.plural))?;
            let mut done = Done::new(kind, None, &name, Action::Deleted);
            if !first.items.is_empty() && !purge {
                all = false;
                done.action = Action::Kept;
                done.note = Some(format!("there are still {}; --purge deletes them too", resource.plural));
            } else {
                apply::delete(self.cluster, kind, None, &name).await?;
            }
            self.note(done)?;
        }
        Ok(all)
    }

    /// Deletes the namespace if it is ours, and waits until it is gone.
    async fn namespace(&mut self, end: Instant) -> Result<(), InstallError> {
        let api: Api<Namespace> = Api::all(self.cluster.client.clone());
        let name = self.cluster.mesh.clone();
        let Some(found) = api.get_opt(&name).await.doing(|| format!("get namespace {name}"))? else {
            return Ok(());
        };
        if !found.labels().contains_key(INSTALLED) {
            return Ok(());
        }
        let kind = ObjectKind::of::<Namespace>();
        apply::delete(self.cluster, kind, None, &name).await?;
        while api.get_opt(&name).await.doing(|| format!("get namespace {name}"))?.is_some() {
            if Instant::now() >= end {
                let message = format!(
                    "namespace {name} is still terminating; `kubectl get namespace {name} -o yaml` says why"
                );
                return Err(ClusterError::Said(message).into());
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(self.note(Done::new(kind, None, &name, Action::Deleted))?)
    }
}

/// Waits until no pod of a name is left.
async fn pods_gone(cluster: &Cluster, name: &str, end: Instant) -> Result<(), ClusterError> {
    loop {
        let left = cluster.pods(&named(name)).await?;
        // A pod that was never given to a node, or whose node is gone, ends with its owner or with the namespace.
        let on_nodes: Vec<String> = left
            .iter()
            .filter(|pod| pod.status.as_ref().is_some_and(|status| status.start_time.is_some()))
            .map(|pod| pod.name_any())
            .collect();
        if on_nodes.is_empty() {
            return Ok(());
        }
        if Instant::now() >= end {
            let names = on_nodes.join(", ");
            return Err(ClusterError::Said(format!(
                "still there: {names}; if their nodes are gone for good, use --skip-nodes after deleting these pods"
            )));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Ends what agents left on their nodes: a pod on each runs the agent's own clean-up, twice being the same as once. Without `agents` it
/// goes on with what an earlier try began.
async fn clean_nodes(
    cluster: &Cluster,
    agents: Option<&DaemonSet>,
    end: Instant,
) -> Result<(), InstallError> {
    let api = cluster.own::<DaemonSet>();
    if let Some(set) = agents.and_then(cleanup) {
        let params = PatchParams::apply(MANAGER).force();
        api.patch(CLEANUP, &params, &Patch::Apply(&set))
            .await
            .doing(|| format!("apply DaemonSet {CLEANUP}"))?;
    } else if api.get_opt(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?.is_none() {
        eprintln!(
            "There is no DaemonSet {AGENT} to clean nodes with. If Helm deleted it, --image IMAGE cleans them."
        );
        return Ok(());
    }
    nodes_clean(cluster, end).await?;
    apply::delete(cluster, ObjectKind::of::<DaemonSet>(), Some(&cluster.mesh), CLEANUP).await?;
    Ok(pods_gone(cluster, CLEANUP, end).await?)
}

async fn nodes_clean(cluster: &Cluster, end: Instant) -> Result<(), ClusterError> {
    let sets = cluster.own::<DaemonSet>();
    let mut said = usize::MAX;
    loop {
        let set = sets.get(CLEANUP).await.doing(|| format!("get DaemonSet {CLEANUP}"))?;
        let Progress { wanted, seen, .. } = ready::of_daemon_set(&set);
        let wanted = usize::try_from(wanted).unwrap_or_default();
        let found = cluster.pods(&named(CLEANUP)).await?;
        let clean = found.iter().filter(|pod| is_clean(pod)).count();
        if clean != said {
            eprintln!("clean: {clean}/{wanted} nodes");
            said = clean;
        }
        if seen && clean >= wanted {
            return Ok(());
        }
        if Instant::now() >= end {
            let left: Vec<String> = found
                .iter()
                .filter(|pod| !is_clean(pod))
                .map(|pod| {
                    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
                    format!("\n  node {node}: {}", why_not_ready(pod))
                })
                .collect();
            return Err(ClusterError::Said(format!(
                "{clean} of {wanted} nodes are clean; run it again, or leave them with --skip-nodes{}",
                left.concat()
            )));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether a clean-up pod has done its work: all of it is in init containers.
fn is_clean(pod: &Pod) -> bool {
    let Some(statuses) = pod.status.as_ref().and_then(|status| status.init_container_statuses.as_deref())
    else {
        return false;
    };
    let wanted = pod.spec.as_ref().and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default().len();
    let done = |status: &k8s_openapi::api::core::v1::ContainerStatus| {
        let state = status.state.as_ref().and_then(|state| state.terminated.as_ref());
        state.is_some_and(|state| state.exit_code == 0)
    };
    statuses.len() == wanted && statuses.iter().all(done)
}

/// The DaemonSet that cleans up, made of the agents': the same image, folders and rights.
fn cleanup(agents: &DaemonSet) -> Option<DaemonSet> {
    let mut spec = agents.spec.clone()?;
    let pod = spec.template.spec.as_mut()?;
    let agent = pod.containers.first()?.clone();
    let args = agent.args.clone().unwrap_or_default();
    let given = |names: &[&str]| -> Vec<String> {
        let of = |arg: &&String| names.iter().any(|name| arg.starts_with(&format!("--{name}=")));
        args.iter().filter(of).cloned().collect()
    };
    let volumes: Vec<String> = ["token", "roots"].map(ToOwned::to_owned).into();
    // Account, trust and tokens may be gone already, and nobody asks the API server.
    pod.service_account_name = None;
    pod.automount_service_account_token = Some(false);
    pod.volumes = pod
        .volumes
        .take()
        .map(|all| all.into_iter().filter(|volume| !volumes.contains(&volume.name)).collect());
    let base = Container {
        ports: None,
        startup_probe: None,
        readiness_probe: None,
        liveness_probe: None,
        volume_mounts: agent
            .volume_mounts
            .clone()
            .map(|all| all.into_iter().filter(|mount| !volumes.contains(&mount.name)).collect()),
        ..agent
    };
    let step = |name: &str, command: &[&str], args: Vec<String>| Container {
        name: name.to_owned(),
        args: Some(command.iter().map(ToString::to_string).chain(args).collect()),
        ..base.clone()
    };
    let cni = step(
        "cni",
        &["cni", "uninstall"],
        given(&["cni-socket", "cni-bin-dir", "cni-conf-dir", "state-dir"]),
    );
    let kernel = step("kernel", &["cleanup"], given(&["node", "cgroup-root", "state-dir"]));
    // A DaemonSet wants a container that stays; doing it once more is as good as anything until the set is deleted.
    pod.containers = vec![Container { name: "again".to_owned(), ..kernel.clone() }];
    pod.init_containers = Some(vec![cni, kernel]);
    pod.termination_grace_period_seconds = Some(0);
    let name = [("app.kubernetes.io/name".to_owned(), CLEANUP.to_owned())];
    spec.selector.match_labels = Some(name.clone().into());
    let meta = spec.template.metadata.get_or_insert_default();
    meta.labels = Some(labels(meta.labels.take(), &name));
    let mut set = DaemonSet { spec: Some(spec), ..Default::default() };
    set.metadata.name = Some(CLEANUP.to_owned());
    set.metadata.namespace = agents.metadata.namespace.clone();
    set.metadata.labels = Some(labels(agents.metadata.labels.clone(), &name));
    Some(set)
}

fn labels(of: Option<BTreeMap<String, String>>, over: &[(String, String)]) -> BTreeMap<String, String> {
    of.unwrap_or_default().into_iter().chain(over.iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_cleaned_with_the_agents_own_image_and_folders_and_without_its_identity() {
        let values = Values::read(&Wishes {
            set: vec!["image=mesh:x".into(), "agent.cgroupRoot=/sys/fs/cgroup/$(NODE_NAME)".into()],
            ..Wishes::default()
        })
        .unwrap();
        let set = cleanup(&objects::agents(&values, "nodemesh-system")).unwrap();
        let spec = set.spec.unwrap();
        let pod = spec.template.spec.unwrap();
        let steps = pod.init_containers.unwrap();
        let args: Vec<Vec<String>> = steps.iter().map(|step| step.args.clone().unwrap()).collect();
        assert_eq!(
            args[0],
            [
                "cni",
                "uninstall",
                "--state-dir=/var/lib/nodemesh",
                "--cni-socket=/run/nodemesh/cni.sock",
                "--cni-bin-dir=/opt/cni/bin",
                "--cni-conf-dir=/etc/cni/net.d"
            ]
        );
        assert_eq!(
            args[1],
            [
                "cleanup",
                "--node=$(NODE_NAME)",
                "--cgroup-root=/sys/fs/cgroup/$(NODE_NAME)",
                "--state-dir=/var/lib/nodemesh"
            ]
        );
        assert!(steps.iter().all(|step| step.image.as_deref() == Some("mesh:x")));
        let volumes: Vec<String> = pod.volumes.unwrap().into_iter().map(|volume| volume.name).collect();
        assert!(!volumes.iter().any(|name| name == "roots" || name == "token"), "{volumes:?}");
        assert_eq!((pod.service_account_name, pod.automount_service_account_token), (None, Some(false)));
        let labels = spec.template.metadata.unwrap().labels.unwrap();
        assert_eq!(labels["app.kubernetes.io/name"], CLEANUP, "not counted as an agent");
        assert_eq!(spec.selector.match_labels.unwrap()["app.kubernetes.io/name"], CLEANUP);
    }
}
