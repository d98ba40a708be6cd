//! Objects of the cluster as JSON, with what the mesh reads and about as much else as real ones have.

use std::net::Ipv4Addr;

use serde_json::{Value, json};

/// Namespace of the mesh's own objects.
pub(super) const MESH: &str = "nodemesh-system";
/// Service account of the agents.
pub(super) const AGENT: &str = "nodemesh-agent";

/// A pod that serves.
#[derive(Clone, Debug)]
pub(super) struct PodFacts<'a> {
    pub(super) namespace: &'a str,
    pub(super) app: &'a str,
    pub(super) name: &'a str,
    pub(super) node: &'a str,
}

/// One endpoint of a slice.
#[derive(Clone, Debug)]
pub(super) struct EndpointFacts {
    pub(super) pod: String,
    pub(super) node: String,
    pub(super) addr: Ipv4Addr,
    pub(super) ready: bool,
}

pub(super) fn namespace(name: &str, meshed: bool) -> Value {
    let labels = if meshed { json!({"istio.io/dataplane-mode": "ambient"}) } else { json!({}) };
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

pub(super) fn node(name: &str, number: usize) -> Value {
    let zone = format!("r1-{}", char::from(b'a' + (number % 3) as u8));
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {
        "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
        "topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": zone}}})
}

pub(super) fn account(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
}

pub(super) fn service(namespace: &str, app: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service",
        "metadata": {"name": app, "namespace": namespace, "labels": {"app": app}},
        "spec": {"selector": {"app": app},
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]}})
}

pub(super) fn pod(facts: &PodFacts<'_>) -> Value {
    let PodFacts { namespace, app, name, node } = facts;
    let env: Vec<Value> = ["LOG_LEVEL", "DATABASE_HOST", "CACHE_HOST", "REGION", "FEATURES"]
        .map(|name| json!({"name": name, "value": format!("{app}-{}", name.to_lowercase())}))
        .into();
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace,
            "labels": {"app": app, "version": "v1", "pod-template-hash": "5d4f8c7b9"},
            "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "9090"}},
        "spec": {"nodeName": node, "serviceAccountName": app, "automountServiceAccountToken": false,
            "containers": [{"name": "app", "image": format!("registry.example/{app}:1.0.0"), "env": env,
                "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}}}]}})
}

pub(super) fn agent_pod(name: &str, node: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": MESH, "labels": {"app": AGENT}},
        "spec": {"nodeName": node, "serviceAccountName": AGENT, "automountServiceAccountToken": false,
            "hostNetwork": true, "containers": [{"name": "agent", "image": "localhost/nodemesh:dev"}]}})
}

/// The status a kubelet writes when a pod has come up: what came before is of no use to the mesh.
pub(super) fn running(addr: Ipv4Addr) -> Value {
    json!({"status": {"phase": "Running", "podIP": addr, "podIPs": [{"ip": addr}],
        "hostIP": "192.0.2.10", "startTime": "2026-01-01T00:00:00Z", "qosClass": "Burstable",
        "conditions": [condition("Initialized", true), condition("PodScheduled", true),
            condition("ContainersReady", true), condition("Ready", true)],
        "containerStatuses": [{"name": "app", "ready": true, "restartCount": 0, "image": "app", "imageID": "sha256:0",
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]}})
}

/// The patch of a kubelet whose readiness probe has another outcome.
pub(super) fn readiness(ready: bool) -> Value {
    json!({"status": {"conditions": [condition("ContainersReady", ready), condition("Ready", ready)]}})
}

fn condition(kind: &str, is: bool) -> Value {
    json!({"type": kind, "status": if is { "True" } else { "False" },
        "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

/// The slice as the EndpointSlice controller writes it.
pub(super) fn slice(namespace: &str, app: &str, endpoints: &[EndpointFacts]) -> Value {
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| {
            json!({"addresses": [endpoint.addr], "nodeName": endpoint.node,
                "conditions": {"ready": endpoint.ready, "serving": endpoint.ready, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": namespace, "name": endpoint.pod}})
        })
        .collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": app, "namespace": namespace, "labels": {
            "kubernetes.io/service-name": app, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}},
        "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]})
}

/// What binds a token to an agent's pod, as the kubelet asks for it.
pub(super) fn token_request(pod: &str, uid: &str) -> Value {
    json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {
        "audiences": ["nodemesh.dev"], "expirationSeconds": 7200,
        "boundObjectRef": {"kind": "Pod", "apiVersion": "v1", "name": pod, "uid": uid}}})
}
