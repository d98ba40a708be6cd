//! Owns the writes to the API server, as the administrator.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use http::{Method, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;
use tokio::time::timeout;

/// Writes under way at once while the cluster is laid out.
const PARALLEL: usize = 24;
/// An answer that takes longer is none.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// A client of the API server. Cheap to clone.
#[derive(Clone)]
pub(super) struct Api {
    client: Client,
}

impl Api {
    /// A client by the only context of this kubeconfig.
    pub(super) async fn connect(kubeconfig: &Path) -> anyhow::Result<Self> {
        let file = Kubeconfig::read_from(kubeconfig).context("read the administrator's kubeconfig")?;
        let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        // These count while a connection rests, too, and would end one that a write is about to use.
        config.read_timeout = None;
        config.write_timeout = None;
        Ok(Self { client: Client::try_from(config)? })
    }

    /// Reads the object at a path.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path, "application/json", None).await
    }

    /// Makes an object in a collection.
    pub(super) async fn create(&self, collection: &str, object: &Value) -> anyhow::Result<Value> {
        self.call(Method::POST, collection, "application/json", Some(object)).await
    }

    /// Makes many, several at once.
    pub(super) async fn create_all(
        &self,
        objects: impl IntoIterator<Item = (String, Value)>,
    ) -> anyhow::Result<()> {
        let writes = stream::iter(objects)
            .map(|(collection, object)| async move { self.create(&collection, &object).await.map(drop) });
        writes.buffer_unordered(PARALLEL).try_collect().await
    }

    /// Puts an object in the place of the one at a path.
    pub(super) async fn replace(&self, path: &str, object: &Value) -> anyhow::Result<()> {
        self.call(Method::PUT, path, "application/json", Some(object)).await.map(drop)
    }

    /// Patches as a kubelet patches the status of a pod.
    pub(super) async fn patch(&self, path: &str, patch: &Value) -> anyhow::Result<()> {
        self.call(Method::PATCH, path, "application/strategic-merge-patch+json", Some(patch)).await.map(drop)
    }

    /// Removes an object at once, as a kubelet does when a pod has ended.
    pub(super) async fn delete(&self, path: &str) -> anyhow::Result<()> {
        self.call(Method::DELETE, &format!("{path}?gracePeriodSeconds=0"), "application/json", None)
            .await
            .map(drop)
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        content: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let what = format!("{method} {path}");
        let body = body.map(Value::to_string).unwrap_or_default().into_bytes();
        let request =
            Request::builder().method(method).uri(path).header("content-type", content).body(body)?;
        let answer = timeout(ANSWER_LIMIT, self.client.request::<Value>(request)).await;
        answer.with_context(|| format!("{what}: no answer"))?.with_context(|| what)
    }
}
