//! Owns which of the kinds that come with CRDs the cluster has, and in which version each is read.
//!
//! CRDs are watched only to know when to look; what is true is what discovery says. It is also asked now and then without a reason, for
//! a cluster whose CRDs we may not watch.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    time::Duration,
};

use futures_util::StreamExt as _;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    api::ApiResource,
    core::PartialObjectMeta,
    discovery,
    error::DiscoveryError,
    runtime::{WatchStreamExt as _, watcher},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{kubernetes::names::is_absent, resource::Kind};

/// How long after an event discovery may still say what was true before.
const SETTLE: Duration = Duration::from_secs(30);
/// How often it is asked meanwhile, and while it fails.
const ASK_EACH: Duration = Duration::from_millis(500);
/// How often it is asked without a reason.
const ASK_ALWAYS: Duration = Duration::from_secs(60);

/// The kinds that come with CRDs, as the cluster has them; `None` until that is known.
pub(super) type Served = Option<BTreeMap<Kind, ApiResource>>;

/// Whether a kind exists only where its CRD does.
pub(super) fn comes_with_crd(kind: Kind) -> bool {
    kind.group().contains('.') && !kind.group().ends_with("k8s.io")
        || kind.group() == crate::resource::GATEWAY_GROUP
}

/// Follows what the cluster has, until nobody listens.
pub(super) fn follow(client: Client) -> watch::Receiver<Served> {
    let (served, receiver) = watch::channel(None);
    tokio::spawn(async move {
        tokio::select! {
            () = run(client, &served) => {}
            () = served.closed() => {}
        }
    });
    receiver
}

async fn run(client: Client, served: &watch::Sender<Served>) {
    let crds: Api<PartialObjectMeta<CustomResourceDefinition>> = Api::all(client.clone());
    let mut events = pin!(watcher(crds, watcher::Config::default()).default_backoff());
    let groups: BTreeSet<&str> =
        Kind::ALL.iter().filter(|kind| comes_with_crd(**kind)).map(|kind| kind.group()).collect();
    let mut unsettled_until = Instant::now();
    loop {
        let asked = ask(&client, &groups).await;
        let failed = asked.is_err();
        match asked {
            Ok(now) => {
                served.send_if_modified(|current| {
                    let changed = current.as_ref() != Some(&now);
                    if changed {
                        *current = Some(now);
                    }
                    changed
                });
            }
            Err(error) => tracing::warn!(%error, "ask the API server which kinds it has"),
        }
        let unsettled = failed || Instant::now() < unsettled_until;
        let ask_at = sleep_until(Instant::now() + if unsettled { ASK_EACH } else { ASK_ALWAYS });
        tokio::pin!(ask_at);
        loop {
            tokio::select! {
                () = &mut ask_at => break,
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        let (watcher::Event::Apply(crd) | watcher::Event::Delete(crd) | watcher::Event::InitApply(crd)) = event else {
                            continue;
                        };
                        let name = crd.metadata.name.unwrap_or_default();
                        if name.split_once('.').is_some_and(|(_, group)| groups.contains(group)) {
                            unsettled_until = Instant::now() + SETTLE;
                            // Many come at once; none of them is served at once.
                            ask_at.as_mut().reset(Instant::now() + ASK_EACH / 5);
                        }
                    }
                    Some(Err(error)) => tracing::debug!(%error, "watch CustomResourceDefinitions"),
                    // The watcher never ends.
                    None => break,
                },
            }
        }
    }
}

/// What discovery says of the kinds we read.
async fn ask(client: &Client, groups: &BTreeSet<&str>) -> Result<BTreeMap<Kind, ApiResource>, kube::Error> {
    let mut served = BTreeMap::new();
    for group in groups {
        let found = match discovery::group(client, group).await {
            Ok(found) => found,
            Err(kube::Error::Discovery(DiscoveryError::MissingApiGroup(_))) => continue,
            // The group went between two questions.
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(error),
        };
        for kind in Kind::ALL.iter().filter(|kind| kind.group() == *group) {
            // Ours first: the server may prefer a version that we do not know.
            let versions = kind.api_versions().iter().filter_map(|version| version.rsplit_once('/'));
            let resource = versions
                .flat_map(|(_, version)| found.versioned_resources(version))
                .find(|(resource, _)| resource.kind == kind.as_str());
            served.extend(resource.map(|(resource, _)| (*kind, resource)));
        }
    }
    Ok(served)
}
