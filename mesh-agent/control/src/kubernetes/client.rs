//! Owns how the API server is reached, and as whom.

pub use kube::Client;
use kube::{
    Config,
    config::{InClusterError, KubeConfigOptions, KubeconfigError},
};

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The process runs in a pod whose service account cannot be used.
    #[error("the service account of this pod cannot be used")]
    InCluster(#[source] InClusterError),
    /// No kubeconfig, or one that cannot be used.
    #[error("no API server is known: this is no pod, and KUBECONFIG (or ~/.kube/config) cannot be used")]
    Kubeconfig(#[source] KubeconfigError),
    /// Its certificates, keys or tokens.
    #[error("cannot make a client of the API server")]
    Client(#[source] kube::Error),
}

/// Where the API server is: in a pod what its service account says, else what the kubeconfig says. `context` names one of the
/// kubeconfig's, and so rules the pod's own out.
///
/// # Errors
/// [`ClientError::InCluster`] and [`ClientError::Kubeconfig`].
pub async fn config(context: Option<&str>) -> Result<Config, ClientError> {
    let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    if in_pod && context.is_none() {
        return Config::incluster().map_err(ClientError::InCluster);
    }
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    Config::from_kubeconfig(&options).await.map_err(ClientError::Kubeconfig)
}

/// A client of the API server; clones share its connections, which live in the runtime that this is called in.
///
/// # Errors
/// There is no way to an API server. Whether it answers shows at the first request.
pub async fn connect() -> Result<Client, ClientError> {
    Client::try_from(config(None).await?).map_err(ClientError::Client)
}
