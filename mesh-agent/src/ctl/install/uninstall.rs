//! Owns taking the mesh out of a cluster, so that nothing of it is left: not on nodes, not in the API.
//!
//! Order: the webhook, so that nothing is refused; the agents; what they left on their nodes (programs, pins, CNI entries), by a pod on
//! each node that ends them; the controller; what the mesh made later (roots, lease, trust bundles); the definitions of kinds; those pods;
//! the namespace.
//!
//! Invariant: killed at any moment, it is simply run again. Each write to the API server brings it further, and none is repeated: a run
//! that gets no further than one write still helps.

pub(super) mod cleaner;

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::{
        admissionregistration::v1::ValidatingWebhookConfiguration,
        apps::v1::{DaemonSet, Deployment},
        coordination::v1::Lease,
        core::v1::{ConfigMap, Namespace, Secret},
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, ResourceExt,
    api::{DynamicObject, ListParams},
};

use self::cleaner::CLEANUP;
use super::{
    InstallError, ObjectKind, Report, apply,
    apply::{Action, Done},
    made_kinds,
    objects::{AGENT, INSTALLED, named, of_mesh},
};
use crate::ctl::{
    CtlError, Output,
    cluster::{Cluster, ClusterError, Doing, defined, list},
    print, write_out,
};

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
    let cleans = !args.skip_nodes && cleaner::have(cluster, args.image.as_deref(), end).await?;
    gone.kind(ObjectKind::of::<DaemonSet>(), Some(&cluster.mesh)).await?;
    pods_gone(cluster, AGENT, end).await?;
    if cleans {
        cleaner::clean_nodes(cluster, end).await?;
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
    if !cleans && !args.skip_nodes && !gone.report.objects.is_empty() {
        eprintln!(
            "There is no DaemonSet {AGENT} to clean nodes with. If Helm deleted it, --image IMAGE cleans them."
        );
    }
    let all = gone.definitions(args.purge, end).await?;
    // What says that nodes are clean goes after everything by which another try would know that the mesh was here.
    if cleaner::delete(cluster, end).await? {
        let kind = ObjectKind::of::<DaemonSet>();
        gone.note(Done::new(kind, Some(&cluster.mesh), CLEANUP, Action::Deleted))?;
    }
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
            // It goes last, so that another try goes on from it. And what is going already needs no push.
            if name == CLEANUP || object.metadata.deletion_timestamp.is_some() {
                continue;
            }
            apply::delete(self.cluster, kind, namespace.as_deref(), &name).await?;
            self.note(Done::new(kind, namespace.as_deref(), &name, Action::Deleted))?;
        }
        Ok(())
    }

    /// Deletes definitions that are ours and lets go of those that are not any more, those with resources only if `purge`, and waits until they are gone. Whether all are.
    async fn definitions(&mut self, purge: bool, end: Instant) -> Result<bool, InstallError> {
        let kind = ObjectKind::of::<CustomResourceDefinition>();
        let api: Api<CustomResourceDefinition> = Api::all(self.cluster.client.clone());
        let ours = list(&api, &format!("{INSTALLED}=true")).await.doing(|| "list definitions".to_owned())?;
        let (mut all, mut going) = (true, Vec::new());
        for definition in ours {
            let name = definition.name_any();
            if definition.metadata.deletion_timestamp.is_some() {
                going.push(name);
                continue;
            }
            let mut done = Done::new(kind, None, &name, Action::Deleted);
            if !apply::is_ours(&definition) {
                apply::release_definition(self.cluster, &definition).await?;
                done.action = Action::Kept;
                done.note = Some("somebody else has applied theirs".to_owned());
            } else if !purge && let Some(plural) = self.in_use(&definition).await? {
                all = false;
                done.action = Action::Kept;
                done.note = Some(format!("there are still {plural}; --purge deletes them too"));
            } else {
                apply::delete(self.cluster, kind, None, &name).await?;
                going.push(name);
            }
            self.note(done)?;
        }
        for name in going {
            definition_gone(&api, &name, end).await?;
        }
        Ok(all)
    }

    /// What a definition defines, if there are any.
    async fn in_use(&self, definition: &CustomResourceDefinition) -> Result<Option<String>, ClusterError> {
        let Some(version) = definition.spec.versions.iter().find(|version| version.storage) else {
            return Ok(None);
        };
        let resource = defined(definition, &version.name);
        let of: Api<DynamicObject> = Api::all_with(self.cluster.client.clone(), &resource);
        match of.list(&ListParams::default().limit(1)).await {
            Ok(first) => Ok((!first.items.is_empty()).then_some(resource.plural)),
            // Not served yet, or not any more.
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(None),
            Err(error) => Err(error).doing(|| format!("list {}", resource.plural)),
        }
    }

    /// Deletes the namespace if it is ours, and waits until it is gone. One that was there before keeps what others put into it.
    async fn namespace(&mut self, end: Instant) -> Result<(), InstallError> {
        let api: Api<Namespace> = Api::all(self.cluster.client.clone());
        let name = self.cluster.mesh.clone();
        let Some(found) = api.get_opt(&name).await.doing(|| format!("get namespace {name}"))? else {
            return Ok(());
        };
        let kind = ObjectKind::of::<Namespace>();
        if !found.labels().contains_key(INSTALLED) {
            if apply::release_namespace(self.cluster, &found).await? {
                let note = Some(apply::WAS_THERE.to_owned());
                self.note(Done { note, ..Done::new(kind, None, &name, Action::Kept) })?;
            }
            return Ok(());
        }
        if found.metadata.deletion_timestamp.is_none() {
            apply::delete(self.cluster, kind, None, &name).await?;
        }
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

/// Waits until a definition is gone that is to go: first the API server deletes its resources.
async fn definition_gone(
    api: &Api<CustomResourceDefinition>,
    name: &str,
    end: Instant,
) -> Result<(), ClusterError> {
    loop {
        let found = api.get_opt(name).await.doing(|| format!("get CustomResourceDefinition {name}"))?;
        // One that is not going is another, made meanwhile.
        let Some(found) = found.filter(|found| found.metadata.deletion_timestamp.is_some()) else {
            return Ok(());
        };
        if Instant::now() >= end {
            let why = apply::complaint(&found).unwrap_or_else(|| "it does not say why".to_owned());
            return Err(ClusterError::Said(format!("definition {name} is still terminating; {why}")));
        }
        tokio::time::sleep(PAUSE).await;
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
