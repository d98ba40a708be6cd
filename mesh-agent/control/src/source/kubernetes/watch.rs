//! Owns one kind: its objects are listed by pages, then watched; an expired watch is followed by a new list, and what is not in that
//! list is gone.

use std::{collections::HashSet, fmt::Debug, pin::pin, sync::Arc};

use futures_util::StreamExt as _;
use kube::{
    Api, Client, Resource,
    api::{ApiResource, DynamicObject},
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use mesh_core::snapshot::Name;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use super::{
    Change,
    crds::{Served, comes_with_crd},
    object::{api_resource, is_metadata_enough, key_of, read},
    raw::{IntoValue, RawObject},
};
use crate::{
    resource::{Key, Kind},
    source::document::Rules,
};

/// Follows a kind until nobody takes its changes.
pub(super) async fn run(
    kind: Kind,
    client: Client,
    rules: Arc<Rules>,
    mut served: watch::Receiver<Served>,
    changes: mpsc::Sender<Change>,
) {
    let mut follower =
        Follower { kind, rules, changes, held: HashSet::new(), is_listed: false, trouble: None };
    if !comes_with_crd(kind) {
        let resource = api_resource(kind, kind.api_versions().first().unwrap_or(&"v1"));
        let ended = follower.follow(&client, &resource).await;
        tracing::debug!(%kind, ?ended, "no longer watched");
        return;
    }
    loop {
        let resource = match served.wait_for(Option::is_some).await {
            Ok(now) => now.as_ref().and_then(|now| now.get(&kind).cloned()),
            Err(_gone) => return,
        };
        let other = async {
            // Other kinds come and go too.
            loop {
                if served.changed().await.is_err() {
                    return;
                }
                let now = served.borrow_and_update().as_ref().and_then(|now| now.get(&kind).cloned());
                if now != resource {
                    return;
                }
            }
        };
        match &resource {
            Some(resource) => {
                tokio::select! {
                    ended = follower.follow(&client, resource) => if ended.is_err() { return },
                    () = other => {}
                }
            }
            None => {
                if follower.none().await.is_err() {
                    return;
                }
                other.await;
            }
        }
    }
}

/// Follows one object of a kind by its name, until nobody takes its changes.
pub(super) async fn run_one(
    kind: Kind,
    name: &Name,
    client: Client,
    rules: Arc<Rules>,
    changes: mpsc::Sender<Change>,
) {
    let mut follower =
        Follower { kind, rules, changes, held: HashSet::new(), is_listed: false, trouble: None };
    let resource = api_resource(kind, kind.api_versions().first().unwrap_or(&"v1"));
    let api: Api<RawObject> = Api::namespaced_with(client, &name.namespace, &resource);
    let config = watcher::Config::default().fields(&format!("metadata.name={}", name.name));
    let ended = follower.follow_stream(api, config, &resource).await;
    tracing::debug!(%kind, %name, ?ended, "no longer watched");
}

/// Nobody takes changes any more.
#[derive(Debug)]
struct Unheard;

struct Follower {
    kind: Kind,
    rules: Arc<Rules>,
    changes: mpsc::Sender<Change>,
    /// The objects that were said to exist.
    held: HashSet<Key>,
    is_listed: bool,
    trouble: Option<String>,
}

impl Follower {
    /// Watches until nobody takes changes.
    async fn follow(&mut self, client: &Client, resource: &ApiResource) -> Result<(), Unheard> {
        let mut config = watcher::Config::default();
        if is_metadata_enough(self.kind) {
            let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(client.clone(), resource);
            return self.follow_stream(api, config, resource).await;
        }
        let api: Api<RawObject> = if self.kind == Kind::ConfigMap {
            let name = &self.rules.mesh_config;
            config = config.fields(&format!("metadata.name={}", name.name));
            Api::namespaced_with(client.clone(), &name.namespace, resource)
        } else {
            Api::all_with(client.clone(), resource)
        };
        self.follow_stream(api, config, resource).await
    }

    async fn follow_stream<T>(
        &mut self,
        api: Api<T>,
        config: watcher::Config,
        resource: &ApiResource,
    ) -> Result<(), Unheard>
    where
        T: Resource + Clone + Debug + IntoValue + DeserializeOwned + Send + 'static,
    {
        let mut events = pin!(watcher(api, config).default_backoff());
        let mut seen = HashSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => seen.clear(),
                Ok(Event::InitApply(object)) => {
                    if let Some(key) = self.put(object, resource).await? {
                        seen.insert(key);
                    }
                }
                Ok(Event::InitDone) => {
                    self.well().await?;
                    self.keep_only(&std::mem::take(&mut seen)).await?;
                    self.listed().await?;
                }
                Ok(Event::Apply(object)) => {
                    self.well().await?;
                    self.put(object, resource).await?;
                }
                Ok(Event::Delete(object)) => {
                    let value = serde_json::to_value(object.meta()).unwrap_or_default();
                    self.gone(key_of(self.kind, &value)).await?;
                }
                Err(error) => self.unwell(&error).await?,
            }
        }
        Ok(())
    }

    /// The cluster does not have the kind (any more).
    async fn none(&mut self) -> Result<(), Unheard> {
        self.well().await?;
        self.keep_only(&HashSet::new()).await?;
        self.listed().await
    }

    /// Objects that are not among these are gone.
    async fn keep_only(&mut self, listed: &HashSet<Key>) -> Result<(), Unheard> {
        let gone: Vec<Key> = self.held.difference(listed).cloned().collect();
        for key in gone {
            self.gone(key).await?;
        }
        Ok(())
    }

    async fn gone(&mut self, key: Key) -> Result<(), Unheard> {
        self.send(Change::Gone(key.clone())).await?;
        // Only now: this may be interrupted, and is done again then.
        self.held.remove(&key);
        Ok(())
    }

    /// Passes an object on. `None` for one that is not the mesh's business.
    async fn put(&mut self, object: impl IntoValue, resource: &ApiResource) -> Result<Option<Key>, Unheard> {
        let Some(object) = read(self.kind, &resource.api_version, object.into_value(), &self.rules) else {
            return Ok(None);
        };
        let key = object.key.clone();
        self.held.insert(key.clone());
        self.send(Change::Put(Box::new(object))).await?;
        Ok(Some(key))
    }

    async fn listed(&mut self) -> Result<(), Unheard> {
        if !std::mem::replace(&mut self.is_listed, true) {
            self.send(Change::Listed(self.kind)).await?;
        }
        Ok(())
    }

    async fn well(&mut self) -> Result<(), Unheard> {
        if self.trouble.take().is_some() {
            tracing::info!(kind = %self.kind, "the API server is read again");
            self.send(Change::Trouble(self.kind, None)).await?;
        }
        Ok(())
    }

    async fn unwell(&mut self, error: &watcher::Error) -> Result<(), Unheard> {
        if let watcher::Error::WatchError(status) = error
            && status.code == 410
        {
            // Expired: a list follows at once. Nothing is lost, and nothing is wrong.
            tracing::debug!(kind = %self.kind, "the watch has expired");
            return Ok(());
        }
        let what = error.to_string();
        if self.trouble.as_ref() != Some(&what) {
            tracing::warn!(kind = %self.kind, error = what, "watch objects of the API server; trying again");
            self.trouble = Some(what.clone());
            self.send(Change::Trouble(self.kind, Some(what))).await?;
        }
        Ok(())
    }

    async fn send(&self, change: Change) -> Result<(), Unheard> {
        self.changes.send(change).await.map_err(|_| Unheard)
    }
}
