//! Owns the way to a cluster: which one, and what an API server answers, in words.
//!
//! Invariants:
//! - Everything is done with the user's own kubeconfig and rights.
//! - An error names what was asked for and what the API server said.

mod pods;

use std::{fmt, io, path::PathBuf};

use k8s_openapi::{
    NamespaceResourceScope, apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, ObjectList},
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::runtime::{Builder, Runtime};

pub(super) use self::pods::{AgentPod, is_ready, why_not_ready};
use super::install::ObjectKind;

/// Objects of a list are fetched in pieces of so many.
const PAGE: u32 = 500;
/// Pieces of a list that are fetched at most.
const PAGES_MAX: usize = 2000;

/// Which cluster, and where in it.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Cluster")]
pub struct ClusterArgs {
    /// Context of the kubeconfig; asks the agents of that cluster instead of the one of this host.
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// The kubeconfig. [default: KUBECONFIG, or ~/.kube/config]
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of pods that are named without one.
    #[arg(short, long, global = true, value_name = "NAME", add = clap_complete::ArgValueCompleter::new(super::complete::namespaces))]
    pub namespace: Option<String>,
    /// Only the agent of this node.
    #[arg(long, global = true, value_name = "NAME", add = clap_complete::ArgValueCompleter::new(super::complete::nodes))]
    pub node: Option<String>,
    /// Namespace of the mesh itself.
    #[arg(
        long,
        global = true,
        env = "MESH_NAMESPACE",
        value_name = "NAME",
        default_value = mesh_control::kubernetes::names::NAMESPACE
    )]
    pub mesh_namespace: String,
}

/// Why a cluster gave no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClusterError {
    #[error("start a runtime")]
    Runtime {
        #[source]
        source: io::Error,
    },
    #[error("find a cluster; name one with --context, --kubeconfig or KUBECONFIG")]
    Config {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{doing}")]
    Api {
        doing: String,
        #[source]
        source: Reason,
    },
    #[error("{0}")]
    Said(String),
}

/// What an API server said, without the structure around it.
#[derive(Debug)]
pub(super) struct Reason(String);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Reason {}

impl Reason {
    pub(super) fn of(error: kube::Error) -> Self {
        Self(match error {
            kube::Error::Api(status) if !status.message.is_empty() => status.message,
            kube::Error::Api(status) => format!("{} {}", status.code, status.reason),
            other => other.to_string(),
        })
    }
}

/// Adds to an error what was being done.
pub(super) trait Doing<T> {
    /// Says what was being done.
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, ClusterError>;
}

impl<T> Doing<T> for Result<T, kube::Error> {
    fn doing(self, doing: impl FnOnce() -> String) -> Result<T, ClusterError> {
        self.map_err(|error| ClusterError::Api { doing: doing(), source: Reason::of(error) })
    }
}

/// A cluster.
#[derive(Clone)]
pub(super) struct Cluster {
    pub(super) client: Client,
    /// Namespace of the mesh.
    pub(super) mesh: String,
    /// Namespace of pods that are named without one.
    pub(super) namespace: String,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("mesh", &self.mesh)
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

/// Runs what a command does with a cluster, on this thread.
pub(super) fn run<F, T, E>(args: &ClusterArgs, command: F) -> Result<T, E>
where
    F: AsyncFnOnce(Cluster) -> Result<T, E>,
    E: From<ClusterError>,
{
    let runtime = runtime()?;
    runtime.block_on(async { command(Cluster::connect(args).await?).await })
}

/// A runtime for questions to a cluster.
pub(super) fn runtime() -> Result<Runtime, ClusterError> {
    Builder::new_current_thread().enable_all().build().map_err(|source| ClusterError::Runtime { source })
}

impl Cluster {
    /// Reads the kubeconfig. Nothing is sent yet.
    pub(super) async fn connect(args: &ClusterArgs) -> Result<Self, ClusterError> {
        let options = KubeConfigOptions { context: args.context.clone(), ..Default::default() };
        let file = match (&args.kubeconfig, &args.context) {
            (Some(path), _) => Some(Kubeconfig::read_from(path).map_err(unusable)?),
            (None, Some(_)) => Some(Kubeconfig::read().map_err(unusable)?),
            (None, None) => None,
        };
        let config = match file {
            Some(file) => {
                has_context(&file, args.context.as_deref())?;
                Config::from_custom_kubeconfig(file, &options).await.map_err(unusable)?
            }
            None => Config::infer().await.map_err(unusable)?,
        };
        let namespace = args.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(unusable)?;
        Ok(Self { client, mesh: args.mesh_namespace.clone(), namespace })
    }

    /// Objects of a type in the mesh's namespace.
    pub(super) fn own<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.mesh)
    }

    /// Objects of a kind: in one namespace, or everywhere.
    pub(super) fn api(&self, kind: ObjectKind, namespace: Option<&str>) -> Api<DynamicObject> {
        let resource = resource(kind);
        match namespace.filter(|_| kind.namespaced) {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    /// All definitions of kinds.
    pub(super) async fn definitions(&self) -> Result<Vec<CustomResourceDefinition>, ClusterError> {
        list(&Api::all(self.client.clone()), "").await.doing(|| "list definitions".to_owned())
    }

    /// All objects of a kind with these labels. None when the kind is not known to the API server.
    pub(super) async fn list(
        &self,
        kind: ObjectKind,
        namespace: Option<&str>,
        labels: &str,
    ) -> Result<Vec<DynamicObject>, ClusterError> {
        let api = self.api(kind, namespace);
        match list(&api, labels).await {
            Ok(objects) => Ok(objects),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(Vec::new()),
            Err(error) => Err(error).doing(|| format!("list {}", kind.plural)),
        }
    }
}

fn unusable(error: impl std::error::Error + Send + Sync + 'static) -> ClusterError {
    ClusterError::Config { source: Box::new(error) }
}

/// Refuses a context that a kubeconfig does not have, with those that it has.
fn has_context(file: &Kubeconfig, wanted: Option<&str>) -> Result<(), ClusterError> {
    let known: Vec<&str> = file.contexts.iter().map(|context| context.name.as_str()).collect();
    let Some(wanted) = wanted.filter(|wanted| !known.contains(wanted)) else { return Ok(()) };
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Err(ClusterError::Said(format!("the kubeconfig has no context {wanted:?}; it has: {known}")))
}

/// A kind, as the client names it.
pub(super) fn resource(kind: ObjectKind) -> ApiResource {
    let gvk = GroupVersionKind::gvk(kind.group, kind.version, kind.kind);
    ApiResource::from_gvk_with_plural(&gvk, kind.plural)
}

/// The kind that a definition defines, in one of its versions, as the client names it.
pub(super) fn defined(definition: &CustomResourceDefinition, version: &str) -> ApiResource {
    let spec = &definition.spec;
    let gvk = GroupVersionKind::gvk(&spec.group, version, &spec.names.kind);
    ApiResource::from_gvk_with_plural(&gvk, &spec.names.plural)
}

/// A whole list of what has these labels, piece by piece.
pub(super) async fn list<K>(api: &Api<K>, labels: &str) -> Result<Vec<K>, kube::Error>
where
    K: Clone + fmt::Debug + serde::de::DeserializeOwned,
{
    list_with(api, ListParams::default().labels(labels)).await
}

/// A whole list, piece by piece.
pub(super) async fn list_with<K>(api: &Api<K>, params: ListParams) -> Result<Vec<K>, kube::Error>
where
    K: Clone + fmt::Debug + serde::de::DeserializeOwned,
{
    let mut all = Vec::new();
    let mut params = params.limit(PAGE);
    for _ in 0..PAGES_MAX {
        let ObjectList { items, metadata, .. } = api.list(&params).await?;
        all.extend(items);
        match metadata.continue_ {
            Some(token) if !token.is_empty() => params = params.continue_token(&token),
            _ => break,
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_that_is_not_there_is_refused_with_those_that_are() {
        let file = |names: &[&str]| {
            let contexts: Vec<_> = names.iter().map(|name| serde_json::json!({"name": name})).collect();
            let file = serde_json::json!({"clusters": [], "users": [], "contexts": contexts});
            serde_json::from_value::<Kubeconfig>(file).unwrap()
        };
        let of =
            |names: &[&str], wanted| has_context(&file(names), wanted).map_err(|error| error.to_string());
        assert_eq!(of(&["a", "b"], None), Ok(()));
        assert_eq!(of(&["a", "b"], Some("b")), Ok(()));
        let said = "the kubeconfig has no context \"c\"; it has: a, b";
        assert_eq!(of(&["a", "b"], Some("c")), Err(said.to_owned()));
        assert_eq!(of(&[], Some("c")).unwrap_err(), "the kubeconfig has no context \"c\"; it has: none");
    }
}
