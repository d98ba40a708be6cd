//! Owns the roots as every namespace has them: a ConfigMap each, kept right by the leader.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::{
    Api, Client,
    api::Patch,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, watcher},
    },
};
use mesh_identity::TrustMaterial;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::names::{ROOTS, ROOTS_KEY, apply, is_absent, metadata};
use crate::{link::files::pem, source::kubernetes::Listed};

/// Pause before a namespace that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What the cluster has.
#[derive(Debug, Default)]
struct Known {
    namespaces: Listed<String, ()>,
    /// Roots by namespace.
    published: Listed<String, String>,
}

impl Known {
    /// The namespaces whose ConfigMap is not as it should be.
    fn wrong<'a>(&'a self, roots: &'a str) -> impl Iterator<Item = &'a String> {
        let is_known = self.namespaces.is_complete && self.published.is_complete;
        let is_right =
            move |namespace: &String| self.published.now.get(namespace).is_some_and(|has| has == roots);
        self.namespaces.now.keys().filter(move |namespace| is_known && !is_right(namespace))
    }
}

/// Keeps the roots of all namespaces right, for ever. For the leader alone.
pub async fn publish(client: Client, mut trust: watch::Receiver<Arc<TrustMaterial>>) {
    let all: Api<PartialObjectMeta<Namespace>> = Api::all(client.clone());
    let mut namespaces = pin!(watcher(all, watcher::Config::default()).default_backoff());
    let config = watcher::Config::default().fields(&format!("metadata.name={ROOTS}"));
    let mut published = pin!(watcher(Api::<ConfigMap>::all(client.clone()), config).default_backoff());
    let mut known = Known::default();
    let mut not_before: BTreeMap<String, Instant> = BTreeMap::new();
    loop {
        let roots: String = trust.borrow_and_update().roots.iter().map(|root| pem(root)).collect();
        let now = Instant::now();
        not_before.retain(|_, at| now < *at);
        let next = known.wrong(&roots).find(|namespace| !not_before.contains_key(*namespace)).cloned();
        if let Some(namespace) = next {
            match write(&client, &namespace, &roots).await {
                Ok(()) => {
                    tracing::debug!(namespace, "published the roots");
                    // The watch says the same, later.
                    known.published.now.insert(namespace, roots);
                }
                Err(error) => {
                    if !is_absent(&error) {
                        tracing::warn!(namespace, %error, "publish the roots");
                    }
                    not_before.insert(namespace, Instant::now() + RETRY);
                }
            }
            continue;
        }
        let retry = async {
            match not_before.values().min() {
                Some(at) => sleep_until(*at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = namespaces.next() => match event {
                Some(Ok(event)) => known.namespaces.take(event, |namespace| {
                    let metadata = namespace.metadata;
                    // Nothing can be made in one that goes.
                    (metadata.name.unwrap_or_default(), metadata.deletion_timestamp.is_none().then_some(()))
                }),
                Some(Err(error)) => tracing::debug!(%error, "watch namespaces"),
                None => return,
            },
            event = published.next() => match event {
                Some(Ok(event)) => known.published.take(event, |map| {
                    let roots = map.data.and_then(|mut data| data.remove(ROOTS_KEY));
                    (map.metadata.namespace.unwrap_or_default(), Some(roots.unwrap_or_default()))
                }),
                Some(Err(error)) => tracing::debug!(%error, "watch the published roots"),
                None => return,
            },
            changed = trust.changed() => if changed.is_err() { return },
            () = retry => {}
        }
    }
}

async fn write(client: &Client, namespace: &str, roots: &str) -> Result<(), kube::Error> {
    let map = ConfigMap {
        metadata: metadata(ROOTS, Some(namespace)),
        data: Some([(ROOTS_KEY.to_owned(), roots.to_owned())].into()),
        ..ConfigMap::default()
    };
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    maps.patch(ROOTS, &apply(), &Patch::Apply(&map)).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;

    use super::*;

    fn of((key, value): (&str, &str)) -> (String, Option<String>) {
        (key.to_owned(), (!value.is_empty()).then(|| value.to_owned()))
    }

    #[test]
    fn only_namespaces_whose_roots_are_not_right_are_written_and_none_before_all_is_known() {
        let mut known = Known::default();
        for namespace in ["a", "b", "c"] {
            known.namespaces.take(Event::InitApply(namespace), |name| (name.to_owned(), Some(())));
        }
        known.published.take(Event::InitApply(("a", "old")), of);
        known.published.take(Event::InitApply(("b", "new")), of);
        assert_eq!(known.wrong("new").next(), None);
        known.namespaces.take(Event::InitDone::<&str>, |name| (name.to_owned(), Some(())));
        known.published.take(Event::InitDone, of);
        assert_eq!(known.wrong("new").collect::<Vec<_>>(), ["a", "c"]);
        known.published.take(Event::Delete(("b", "new")), of);
        known.namespaces.take(Event::Delete("c"), |name| (name.to_owned(), Some(())));
        assert_eq!(known.wrong("new").collect::<Vec<_>>(), ["a", "b"]);
        // A watch that expired begins again with a list.
        known.published.take(Event::Init, of);
        known.published.take(Event::InitApply(("a", "new")), of);
        known.published.take(Event::InitDone, of);
        assert_eq!(known.wrong("new").collect::<Vec<_>>(), ["b"]);
    }
}
