//! Owns the roots as every namespace has them: a ConfigMap each, kept right by the leader.
//!
//! That of the mesh's own namespace is also the memory of controllers: the journal of a rotation lies in a folder that ends with its pod, and
//! a controller that forgot an old root would end every connection to whoever still has a certificate of it.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

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
use mesh_identity::{
    Bundle, Ca, TrustDomains, TrustMaterial, ca::KnownRoot, clock::unix_seconds, svid::fingerprint,
};
use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, sleep_until};

use super::names::{ROOTS, ROOTS_KEY, apply, is_absent, metadata};
use crate::{
    link::files::{certificates, pem},
    source::kubernetes::Listed,
};

/// Pause before a namespace that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Annotation of the ConfigMap of the mesh's own namespace: until when roots that sign no more stay trusted, as a JSON object of SHA-256
/// fingerprints and seconds since 1970. Without it every new controller would begin to count anew.
const RETIRED: &str = "nodemesh.dev/retired-roots";

/// What a ConfigMap says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Content {
    /// PEM.
    roots: String,
    /// Value of [`RETIRED`]; empty for none.
    retired: String,
}

impl Content {
    fn of(map: ConfigMap) -> Self {
        let take = |from: Option<BTreeMap<String, String>>, key| from.and_then(|mut from| from.remove(key));
        Self {
            roots: take(map.data, ROOTS_KEY).unwrap_or_default(),
            retired: take(map.metadata.annotations, RETIRED).unwrap_or_default(),
        }
    }

    /// What a controller without a journal is to be told. What does not parse, or is no root that agents would take, is left out, with a
    /// warning: one bad entry would have them refuse all.
    fn known(&self) -> Vec<KnownRoot> {
        let retired: BTreeMap<String, u64> = match self.retired.as_str() {
            "" => BTreeMap::new(),
            text => serde_json::from_str(text).unwrap_or_else(|error| {
                tracing::warn!(%error, "annotation {RETIRED} of ConfigMap {ROOTS} is unreadable");
                BTreeMap::new()
            }),
        };
        let found = certificates(self.roots.as_bytes()).unwrap_or_else(|error| {
            tracing::warn!(%error, "ConfigMap {ROOTS} of the mesh's own namespace holds no roots");
            Vec::new()
        });
        let is_root = |certificate: &CertificateDer<'static>| {
            let material = TrustMaterial { roots: vec![certificate.clone()], ..TrustMaterial::default() };
            let usable = Bundle::new(TrustDomains::new(""), material);
            usable
                .inspect_err(|error| tracing::warn!(%error, "ConfigMap {ROOTS} holds what is no root"))
                .is_ok()
        };
        let known = |certificate: CertificateDer<'static>| {
            let until = retired.get(&fingerprint(&certificate));
            let until = until.and_then(|at| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(*at)));
            KnownRoot { certificate, until }
        };
        found.into_iter().filter(is_root).map(known).collect()
    }
}

/// What all ConfigMaps should say.
#[derive(Debug)]
struct Wanted {
    /// The mesh's own namespace, whose ConfigMap says more.
    own: String,
    content: Content,
}

impl Wanted {
    fn new(own: &str, trust: &TrustMaterial, retired: &[KnownRoot]) -> Self {
        let until = |root: &KnownRoot| Some((fingerprint(&root.certificate), unix_seconds(root.until?)));
        let retired: BTreeMap<String, u64> = retired.iter().filter_map(until).collect();
        let text = serde_json::json!(retired).to_string();
        let content = Content {
            roots: trust.roots.iter().map(|root| pem(root)).collect(),
            retired: if retired.is_empty() { String::new() } else { text },
        };
        Self { own: own.to_owned(), content }
    }

    fn of(&self, namespace: &str) -> Content {
        let mut content = self.content.clone();
        if namespace != self.own {
            content.retired.clear();
        }
        content
    }
}

/// What the cluster has.
#[derive(Debug, Default)]
struct Known {
    namespaces: Listed<String, ()>,
    /// By namespace.
    published: Listed<String, Content>,
}

impl Known {
    /// The namespaces whose ConfigMap is not as it should be.
    fn wrong<'a>(&'a self, wanted: &'a Wanted) -> impl Iterator<Item = &'a String> {
        let is_known = self.namespaces.is_complete && self.published.is_complete;
        let is_right = move |namespace: &String| {
            self.published.now.get(namespace).is_some_and(|has| {
                has.roots == wanted.content.roots && (*namespace != wanted.own || *has == wanted.content)
            })
        };
        self.namespaces.now.keys().filter(move |namespace| is_known && !is_right(namespace))
    }
}

/// The roots that controllers before this one published; none if there was no such controller.
///
/// # Errors
/// The API server.
pub async fn known(client: Client, namespace: &str) -> Result<Vec<KnownRoot>, kube::Error> {
    let maps: Api<ConfigMap> = Api::namespaced(client, namespace);
    let found = maps.get_opt(ROOTS).await?;
    Ok(found.map(|map| Content::of(map).known()).unwrap_or_default())
}

/// Keeps the roots of all namespaces right, for ever; `own` is the mesh's. For the leader alone.
pub async fn publish(client: Client, own: String, ca: Arc<Ca>) {
    let mut trust = ca.trust();
    let all: Api<PartialObjectMeta<Namespace>> = Api::all(client.clone());
    let mut namespaces = pin!(watcher(all, watcher::Config::default()).default_backoff());
    let config = watcher::Config::default().fields(&format!("metadata.name={ROOTS}"));
    let mut published = pin!(watcher(Api::<ConfigMap>::all(client.clone()), config).default_backoff());
    let mut known = Known::default();
    let mut not_before: BTreeMap<String, Instant> = BTreeMap::new();
    loop {
        let wanted = Wanted::new(&own, &trust.borrow_and_update(), &ca.retired());
        let now = Instant::now();
        not_before.retain(|_, at| now < *at);
        let next = known.wrong(&wanted).find(|namespace| !not_before.contains_key(*namespace)).cloned();
        if let Some(namespace) = next {
            let content = wanted.of(&namespace);
            match write(&client, &namespace, &content).await {
                Ok(()) => {
                    tracing::debug!(namespace, "published the roots");
                    // The watch says the same, later.
                    known.published.now.insert(namespace, content);
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
                    (map.metadata.namespace.clone().unwrap_or_default(), Some(Content::of(map)))
                }),
                Some(Err(error)) => tracing::debug!(%error, "watch the published roots"),
                None => return,
            },
            changed = trust.changed() => if changed.is_err() { return },
            () = retry => {}
        }
    }
}

async fn write(client: &Client, namespace: &str, content: &Content) -> Result<(), kube::Error> {
    let retired = Some(&content.retired).filter(|retired| !retired.is_empty());
    let mut metadata = metadata(ROOTS, Some(namespace));
    metadata.annotations = retired.map(|retired| [(RETIRED.to_owned(), retired.clone())].into());
    let map = ConfigMap {
        metadata,
        data: Some([(ROOTS_KEY.to_owned(), content.roots.clone())].into()),
        ..ConfigMap::default()
    };
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    maps.patch(ROOTS, &apply(), &Patch::Apply(&map)).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use kube::runtime::watcher::Event;
    use mesh_identity::{KeyAlgorithm, ca::PluggedIn};

    use super::*;

    fn content(roots: &str, retired: &str) -> Content {
        Content { roots: roots.to_owned(), retired: retired.to_owned() }
    }

    fn of((key, value): (&str, &str)) -> (String, Option<Content>) {
        (key.to_owned(), (!value.is_empty()).then(|| content(value, "")))
    }

    #[test]
    fn only_namespaces_whose_roots_are_not_right_are_written_and_none_before_all_is_known() {
        let mut known = Known::default();
        for namespace in ["a", "b", "c"] {
            known.namespaces.take(Event::InitApply(namespace), |name| (name.to_owned(), Some(())));
        }
        known.published.take(Event::InitApply(("a", "old")), of);
        known.published.take(Event::InitApply(("b", "new")), of);
        let new = Wanted { own: "z".to_owned(), content: content("new", "") };
        assert_eq!(known.wrong(&new).next(), None);
        known.namespaces.take(Event::InitDone::<&str>, |name| (name.to_owned(), Some(())));
        known.published.take(Event::InitDone, of);
        assert_eq!(known.wrong(&new).collect::<Vec<_>>(), ["a", "c"]);
        known.published.take(Event::Delete(("b", "new")), of);
        known.namespaces.take(Event::Delete("c"), |name| (name.to_owned(), Some(())));
        assert_eq!(known.wrong(&new).collect::<Vec<_>>(), ["a", "b"]);
        // A watch that expired begins again with a list.
        known.published.take(Event::Init, of);
        known.published.take(Event::InitApply(("a", "new")), of);
        known.published.take(Event::InitDone, of);
        assert_eq!(known.wrong(&new).collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn the_meshs_own_namespace_also_says_until_when_roots_are_trusted() {
        let mut known = Known::default();
        for namespace in ["a", "own"] {
            known.namespaces.take(Event::InitApply(namespace), |name| (name.to_owned(), Some(())));
            known.published.take(Event::InitApply((namespace, "roots")), of);
        }
        known.namespaces.take(Event::InitDone::<&str>, |name| (name.to_owned(), Some(())));
        known.published.take(Event::InitDone, of);
        let wanted = Wanted { own: "own".to_owned(), content: content("roots", "{}") };
        assert_eq!(known.wrong(&wanted).collect::<Vec<_>>(), ["own"]);
        assert_eq!((wanted.of("a"), wanted.of("own")), (content("roots", ""), content("roots", "{}")));
    }

    #[test]
    fn what_one_controller_publishes_the_next_one_knows_and_nothing_that_is_no_root() {
        let root = || {
            let made =
                PluggedIn::self_signed("cluster.local", KeyAlgorithm::default(), SystemTime::now()).unwrap();
            certificates(&made.root_cert).unwrap().remove(0)
        };
        let (signs, old) = (root(), root());
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
        let retired = KnownRoot { certificate: old.clone(), until: Some(until) };
        let trust = TrustMaterial { roots: vec![signs.clone(), old.clone()], ..TrustMaterial::default() };
        let own = Wanted::new("own", &trust, std::slice::from_ref(&retired)).of("own");
        let in_use = KnownRoot { certificate: signs.clone(), until: None };
        assert_eq!(own.known(), [in_use.clone(), retired]);
        // As whoever came before this annotation left it, or somebody broke it.
        let counted_anew = KnownRoot { certificate: old, until: None };
        assert_eq!(content(&own.roots, "").known(), [in_use.clone(), counted_anew.clone()]);
        assert_eq!(content(&own.roots, "soon").known(), [in_use.clone(), counted_anew]);
        assert_eq!(content("rubbish", "").known(), []);
        assert_eq!(content(&(pem(&signs) + &pem(b"no certificate")), "").known(), [in_use]);
        let plain = Wanted::new("own", &trust, &[]).of("own");
        assert_eq!(plain.retired, "");
    }
}
