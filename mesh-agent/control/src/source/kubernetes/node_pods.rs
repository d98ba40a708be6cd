//! Owns a node's own view of its pods: those that the API server has scheduled on it, and which namespaces are opted in.
//!
//! The controller says the same a little later, and policy with it. This is for the moment in which a pod's network is made: the
//! agent knows whether it is meshed from where the kubelet knows that it is to start.
//!
//! Invariants:
//! - Nothing is said before both kinds were listed; an API server that is away takes nothing away.
//! - Whether a pod is meshed is decided as the compiler does it.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    sync::Arc,
};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1;
use kube::{
    Api, Client,
    api::ObjectMeta,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use mesh_core::{
    local::Declared,
    snapshot::{Name, Workload},
};
use tokio::sync::watch;

use super::Listed;
use crate::{
    problem::Problems,
    resource::{metadata, pod},
};

/// Annotation of a static pod's image at the API server: the uid that the runtime knows it by.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// The pods of a node as the API server has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodePods {
    /// By namespace and name.
    pub pods: BTreeMap<Name, Declared>,
    /// Namespaces whose pods are meshed unless they say otherwise.
    pub namespaces: BTreeSet<String>,
}

/// A pod before its namespace is known.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    runtime_uid: Arc<str>,
    pod: pod::Pod,
}

/// What is listed and watched so far.
#[derive(Debug, Default)]
struct View {
    pods: Listed<Name, Seen>,
    /// Whether it is opted in, by name.
    namespaces: Listed<String, bool>,
}

/// Follows the pods of `node` until nobody wants to know; never ends by itself before that.
pub async fn follow(client: Client, node: &str, out: watch::Sender<Arc<NodePods>>) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let mut pods = pin!(watcher(Api::<v1::Pod>::all(client.clone()), config).default_backoff());
    let namespaces = Api::<PartialObjectMeta<v1::Namespace>>::all(client);
    let mut namespaces = pin!(watcher(namespaces, watcher::Config::default()).default_backoff());
    let mut view = View::default();
    loop {
        tokio::select! {
            Some(event) = pods.next() => {
                if let Some(event) = heard("pods", event) {
                    view.pods.take(event, |pod| (name_of(&pod.metadata), Some(read_pod(&pod))));
                }
            }
            Some(event) = namespaces.next() => {
                if let Some(event) = heard("namespaces", event) {
                    view.namespaces.take(event, |namespace| {
                        let name = namespace.metadata.name.clone().unwrap_or_default();
                        (name, Some(read_namespace(&namespace)))
                    });
                }
            }
            () = out.closed() => return,
        }
        if view.pods.is_complete && view.namespaces.is_complete {
            let now = view.node_pods();
            out.send_if_modified(|current| {
                let changed = **current != now;
                if changed {
                    *current = Arc::new(now);
                }
                changed
            });
        }
    }
}

fn heard<T>(what: &'static str, event: Result<Event<T>, watcher::Error>) -> Option<Event<T>> {
    match event {
        Ok(event) => Some(event),
        Err(error) => {
            tracing::warn!(what, %error, "watch the node's own objects of the API server; trying again");
            None
        }
    }
}

fn name_of(meta: &ObjectMeta) -> Name {
    Name::new(meta.namespace.as_deref().unwrap_or_default(), meta.name.as_deref().unwrap_or_default())
}

/// What a pod asks of the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Nothing: it did not ask, or has ended.
    None,
    /// To be in it.
    Mesh,
    /// To be in it, which it cannot be, for this reason.
    Refused(Arc<str>),
}

/// What a pod asks of the mesh, by its labels and those of its namespace: decided as for the pods of a node.
pub fn wish(object: &v1::Pod, namespace: &ObjectMeta) -> Wish {
    let pod = read_pod(object).pod;
    if pod.workload.terminated {
        return Wish::None;
    }
    let opted_in = metadata::opt_in(namespace, &mut Problems::default()).unwrap_or(false);
    match pod.membership(opted_in) {
        (_, Some(why)) => Wish::Refused(why),
        (true, None) => Wish::Mesh,
        (false, None) => Wish::None,
    }
}

fn read_pod(object: &v1::Pod) -> Seen {
    // What is wrong with it the controller reports.
    let pod = pod::read(object, &mut Problems::default());
    let mirrored = object.metadata.annotations.as_ref().and_then(|all| all.get(MIRROR));
    let runtime_uid = mirrored.or(object.metadata.uid.as_ref()).map_or("", String::as_str);
    Seen { runtime_uid: runtime_uid.into(), pod }
}

fn read_namespace(object: &PartialObjectMeta<v1::Namespace>) -> bool {
    metadata::opt_in(&object.metadata, &mut Problems::default()).unwrap_or(false)
}

impl View {
    fn node_pods(&self) -> NodePods {
        let declared = |(name, seen): (&Name, &Seen)| {
            let opted_in = self.namespaces.now.get(&*name.namespace).copied().unwrap_or(false);
            let (meshed, skipped) = seen.pod.membership(opted_in);
            let workload = Workload { meshed, skipped, ..seen.pod.workload.clone() };
            let runtime_uid = Arc::clone(&seen.runtime_uid);
            (name.clone(), Declared { runtime_uid, workload: Arc::new(workload) })
        };
        NodePods {
            pods: self.pods.now.iter().map(declared).collect(),
            namespaces: self
                .namespaces
                .now
                .iter()
                .filter(|(_, on)| **on)
                .map(|(name, _)| name.clone())
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(name: &str, more: serde_json::Value) -> v1::Pod {
        let mut pod = json!({
            "metadata": {"namespace": "shop", "name": name, "uid": format!("uid-{name}")},
            "spec": {"nodeName": "n1", "containers": [{"name": "app"}]},
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            let at = key.rsplit_once('/').map_or("", |(parent, _)| parent);
            let last = key.rsplit('/').next().unwrap();
            pod.pointer_mut(at).unwrap()[last] = value.clone();
        }
        serde_json::from_value(pod).unwrap()
    }

    fn view(namespace_opted_in: bool, pods: &[v1::Pod]) -> NodePods {
        let pods = pods.iter().map(|pod| (name_of(&pod.metadata), read_pod(pod))).collect();
        let mut view = View::default();
        view.pods.now = pods;
        view.namespaces.now = BTreeMap::from([("shop".to_owned(), namespace_opted_in)]);
        view.node_pods()
    }

    fn of(pods: &NodePods, name: &str) -> (bool, Option<String>) {
        let workload = &pods.pods[&Name::new("shop", name)].workload;
        (workload.meshed, workload.skipped.as_deref().map(str::to_owned))
    }

    #[test]
    fn a_pods_own_label_wins_over_its_namespaces() {
        let labelled =
            |value: &str| pod("own", json!({"/metadata/labels": {"istio.io/dataplane-mode": value}}));
        let plain = pod("plain", json!({}));
        assert_eq!(of(&view(true, std::slice::from_ref(&plain)), "plain"), (true, None));
        assert_eq!(of(&view(false, &[plain]), "plain"), (false, None));
        assert_eq!(of(&view(true, &[labelled("none")]), "own"), (false, None));
        assert_eq!(of(&view(false, &[labelled("ambient")]), "own"), (true, None));
    }

    #[test]
    fn pods_that_cannot_be_meshed_are_skipped_with_a_reason() {
        let host = pod("host", json!({"/spec/hostNetwork": true}));
        let sidecar = pod("sidecar", json!({"/spec/containers": [{"name": "app"}, {"name": "istio-proxy"}]}));
        let native = pod(
            "native",
            json!({"/spec/initContainers": [{"name": "linkerd-proxy", "restartPolicy": "Always"}]}),
        );
        // Over before the app begins.
        let once = pod("once", json!({"/spec/initContainers": [{"name": "linkerd-proxy"}]}));
        let envoy = json!([{"name": "app"}, {"name": "envoy"}]);
        let own = pod("own", json!({"/spec/containers": envoy}));
        let marked = json!({"/spec/containers": envoy, "/metadata/labels": {"osm-proxy-uuid": "1"}});
        let pods = view(true, &[host.clone(), sidecar, native, once, own, pod("osm", marked)]);
        for (name, wanted) in [
            ("host", Some("it runs on the host network")),
            ("sidecar", Some("it has a sidecar of Istio (container istio-proxy)")),
            ("native", Some("it has a sidecar of Linkerd (container linkerd-proxy)")),
            ("once", None),
            ("own", None),
            ("osm", Some("it has a sidecar of Open Service Mesh (container envoy)")),
        ] {
            assert_eq!(of(&pods, name), (wanted.is_none(), wanted.map(str::to_owned)), "{name}");
        }
        assert_eq!(of(&view(false, &[host]), "host"), (false, None), "it did not ask");
    }

    #[test]
    fn a_static_pod_is_known_by_the_runtimes_uid() {
        let mirror = pod("static", json!({"/metadata/annotations": {(MIRROR): "hash"}}));
        let pods = view(true, &[mirror, pod("plain", json!({}))]);
        let uid = |name: &str| pods.pods[&Name::new("shop", name)].runtime_uid.to_string();
        assert_eq!((uid("static"), uid("plain")), ("hash".to_owned(), "uid-plain".to_owned()));
    }
}
