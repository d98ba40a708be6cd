//! Owns `meshctl install`, `upgrade`, `uninstall`, `verify`, `precheck` and `manifest`: the mesh in a cluster, from outside.
//!
//! Invariants:
//! - What is made is a pure function of the values; the chart renders the same.
//! - Only what carries the mesh's labels is changed or deleted. Definitions of kinds that others made are used as they are.
//! - Standard output holds what was done, or one JSON document; progress goes to standard error.

mod apply;
mod finding;
mod manifest;
mod objects;
mod precheck;
mod ready;
mod uninstall;
mod values;
mod verify;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Subcommand;
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1::Namespace};
use kube::ResourceExt;
use serde::Serialize;

use self::{
    apply::{Action, Done},
    manifest::Manifest,
    values::{Values, Wishes},
};
pub(super) use self::{
    manifest::ObjectKind,
    objects::{AGENT, CONTROLLER, named, of_mesh},
};
pub use self::{precheck::PrecheckArgs, uninstall::UninstallArgs, values::Profile, verify::VerifyArgs};
use super::{
    CtlError, Output,
    cluster::{self, Cluster, ClusterArgs, ClusterError},
    print, write_out,
};
use crate::report::report;

/// Which values.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct ValuesArgs {
    /// A set of values for a purpose.
    #[arg(long, value_enum, value_name = "NAME", default_value_t = Profile::Default)]
    pub profile: Profile,
    /// Files with values, as for the chart; later ones win.
    #[arg(short = 'f', long = "values", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Single values, e.g. agent.cgroupRoot=/sys/fs/cgroup; later ones win.
    #[arg(long, value_name = "NAME=VALUE")]
    pub set: Vec<String>,
}

impl ValuesArgs {
    fn wishes(&self) -> Wishes {
        Wishes { profile: self.profile, files: self.files.clone(), set: self.set.clone() }
    }
}

/// Options of `install` and `upgrade`.
#[derive(Clone, Debug, clap::Args)]
pub struct InstallArgs {
    /// What to install.
    #[command(flatten)]
    pub values: ValuesArgs,
    /// Change nothing, only say what would be done. The API server checks what exists already.
    #[arg(long)]
    pub dry_run: bool,
    /// Do not wait until controller and agents are ready.
    #[arg(long)]
    pub no_wait: bool,
    /// Seconds to wait for readiness.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub timeout: u32,
}

/// What of the manifests.
#[derive(Clone, Debug, Subcommand)]
pub enum ManifestCommand {
    /// Print every object that `install` would make, as YAML. Needs no cluster.
    #[command(after_help = "Examples:\n  meshctl manifest generate > nodemesh.yaml\n  \
        meshctl manifest generate --profile demo --set logging.level=debug -o json | jq '.[].kind'")]
    Generate {
        /// What to install.
        #[command(flatten)]
        values: ValuesArgs,
        /// Leave out the definitions of Istio's and the Gateway API's kinds.
        #[arg(long)]
        skip_crds: bool,
    },
    /// Print the definitions of Istio's and the Gateway API's kinds, as they are made where there are none.
    #[command(
        after_help = "Examples:\n  meshctl manifest crds > crds.yaml\n  meshctl manifest crds -o json | jq -r '.[].metadata.name'"
    )]
    Crds,
}

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub(super) enum InstallError {
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Values(#[from] values::ValuesError),
    #[error(transparent)]
    Objects(#[from] objects::ObjectError),
    #[error(transparent)]
    Print(#[from] CtlError),
    #[error("{object} belongs to Helm release {release:?}; use `helm upgrade` and `helm uninstall` for it")]
    Helm { object: String, release: String },
    #[error("there is no mesh in namespace {namespace}; `meshctl install` makes one")]
    NoMesh { namespace: String },
}

/// What was done.
#[derive(Debug, Default, Serialize)]
struct Report {
    dry_run: bool,
    objects: Vec<Done>,
}

/// Ends a command: 0 done, 1 not.
fn finish(done: Result<bool, InstallError>) -> ExitCode {
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("meshctl: {}", report(&error));
            ExitCode::FAILURE
        }
    }
}

/// Answers `install`; with `upgrade`, there has to be a mesh already.
pub(super) fn install(args: &InstallArgs, of: &ClusterArgs, out: Output, upgrade: bool) -> ExitCode {
    finish(cluster::run(of, async |cluster| installed(&cluster, args, out, upgrade).await))
}

/// Answers `uninstall`.
pub(super) fn uninstall(args: &UninstallArgs, of: &ClusterArgs, out: Output) -> ExitCode {
    finish(cluster::run(of, async |cluster| uninstall::uninstall(&cluster, args, out).await))
}

/// Answers `verify`.
pub(super) fn verify(args: &VerifyArgs, of: &ClusterArgs, out: Output) -> ExitCode {
    finish(cluster::run(of, async |cluster| verify::verify(&cluster, args, out).await))
}

/// Answers `precheck`.
pub(super) fn precheck(args: &PrecheckArgs, of: &ClusterArgs, out: Output) -> ExitCode {
    finish(precheck::precheck(args, of, out))
}

/// Answers `manifest`.
pub(super) fn manifest(command: &ManifestCommand, of: &ClusterArgs, out: Output) -> ExitCode {
    let made = || -> Result<Vec<Manifest>, InstallError> {
        let mut all = match command {
            ManifestCommand::Crds => return Ok(objects::definitions()?),
            ManifestCommand::Generate { skip_crds: true, .. } => Vec::new(),
            ManifestCommand::Generate { .. } => objects::definitions()?,
        };
        if let ManifestCommand::Generate { values, .. } = command {
            all.extend(objects::all(&Values::read(&values.wishes())?, &of.mesh_namespace)?);
        }
        Ok(all)
    };
    finish(made().and_then(|all| show(&all, out)).map(|()| true))
}

/// Prints manifests: documents of YAML, or one list as JSON.
fn show(all: &[Manifest], out: Output) -> Result<(), InstallError> {
    if out == Output::Json {
        let objects: Vec<_> = all.iter().map(|manifest| &manifest.object).collect();
        return Ok(print(out, &objects, |_| String::new())?);
    }
    for manifest in all {
        write_out(&format!("---\n{}", super::yaml(&manifest.object)?))?;
    }
    Ok(())
}

async fn installed(
    cluster: &Cluster,
    args: &InstallArgs,
    out: Output,
    upgrade: bool,
) -> Result<bool, InstallError> {
    let values = Values::read(&args.values.wishes())?;
    let wanted = objects::all(&values, &cluster.mesh)?;
    let definitions = objects::definitions()?;
    not_of_helm(cluster, &wanted, upgrade).await?;
    let mut report = Report { dry_run: args.dry_run, objects: Vec::new() };
    let mut note = |done: Done| {
        if out.is_text() {
            write_out(&format!("{}\n", done.line()))?;
        }
        report.objects.push(done);
        Ok::<(), CtlError>(())
    };
    // The webhook last: before its controller is there it would only refuse.
    let (webhook, rest): (Vec<_>, Vec<_>) =
        wanted.iter().partition(|manifest| manifest.kind.kind == "ValidatingWebhookConfiguration");
    let mut ours = Vec::new();
    // Somebody has begun to take the mesh out. What cleans nodes would undo what the agents do.
    if !args.dry_run
        && uninstall::cleaner::delete(cluster, Instant::now() + Duration::from_secs(args.timeout.into()))
            .await?
    {
        let kind = ObjectKind::of::<DaemonSet>();
        note(Done::new(kind, Some(&cluster.mesh), uninstall::cleaner::CLEANUP, Action::Deleted))?;
    }
    for manifest in &definitions {
        let done = apply::apply_definition(cluster, manifest, args.dry_run).await?;
        if done.action != Action::Kept {
            ours.push(manifest.name.clone());
        }
        note(done)?;
    }
    if !args.dry_run {
        apply::definitions_served(cluster, &ours).await?;
    }
    for manifest in rest.into_iter().chain(webhook) {
        note(match manifest.kind == ObjectKind::of::<Namespace>() {
            true => apply::apply_namespace(cluster, manifest, args.dry_run).await?,
            false => apply::apply(cluster, manifest, args.dry_run).await?,
        })?;
    }
    for done in apply::prune(cluster, &made_kinds(), &wanted, args.dry_run).await? {
        note(done)?;
    }
    if !args.dry_run && !args.no_wait {
        ready::wait(cluster, Duration::from_secs(args.timeout.into())).await?;
    }
    if !out.is_text() {
        print(out, &report, |_| String::new())?;
    } else if !args.dry_run && !args.no_wait {
        eprintln!(
            "The mesh is ready. Take a namespace into it: kubectl label namespace NAME istio.io/dataplane-mode=ambient"
        );
    }
    Ok(true)
}

/// Refuses to touch what Helm installed, and to upgrade what is not there.
async fn not_of_helm(cluster: &Cluster, wanted: &[Manifest], upgrade: bool) -> Result<(), InstallError> {
    let Some(manifest) =
        wanted.iter().find(|manifest| manifest.name == CONTROLLER && manifest.kind.kind == "Deployment")
    else {
        return Ok(());
    };
    let api = cluster.api(manifest.kind, manifest.namespace.as_deref());
    let found = api.get_opt(&manifest.name).await;
    let found = cluster::Doing::doing(found, || format!("get {manifest}"))?;
    match found {
        Some(found) => match found.annotations().get("meta.helm.sh/release-name") {
            Some(release) => {
                Err(InstallError::Helm { object: manifest.to_string(), release: release.clone() })
            }
            None => Ok(()),
        },
        None if upgrade => Err(InstallError::NoMesh { namespace: cluster.mesh.clone() }),
        None => Ok(()),
    }
}

/// Every kind of object that this or an earlier version makes, in the order in which they are to go. Definitions are not among them.
fn made_kinds() -> Vec<ObjectKind> {
    use k8s_openapi::api::{
        admissionregistration::v1::ValidatingWebhookConfiguration,
        apps::v1::{DaemonSet, Deployment},
        core::v1::{ConfigMap, Service, ServiceAccount},
        policy::v1::PodDisruptionBudget,
        rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
    };
    vec![
        ObjectKind::of::<ValidatingWebhookConfiguration>(),
        ObjectKind::of::<DaemonSet>(),
        ObjectKind::of::<Deployment>(),
        ObjectKind::of::<PodDisruptionBudget>(),
        ObjectKind::of::<Service>(),
        ObjectKind::of::<ConfigMap>(),
        ObjectKind::of::<RoleBinding>(),
        ObjectKind::of::<Role>(),
        ObjectKind::of::<ClusterRoleBinding>(),
        ObjectKind::of::<ClusterRole>(),
        ObjectKind::of::<ServiceAccount>(),
    ]
}
