//! Objects of the tests, as manifests.

use serde_json::{Value, json};

use crate::scene::NAMESPACE;

fn documents(objects: impl IntoIterator<Item = Value>) -> String {
    objects.into_iter().map(|object| format!("---\n{object}\n")).collect()
}

pub(crate) fn namespace(name: &str) -> String {
    documents([json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})])
}

/// CRDs that let everything through: what a controller makes of it is the question.
pub(crate) fn crds() -> String {
    let crd = |group: &str, version: &str, kind: &str, plural: &str| {
        let annotations = match group {
            // The API server wants this of names below k8s.io.
            "gateway.networking.k8s.io" => json!({"api-approved.kubernetes.io": "unapproved, for a test"}),
            _ => json!({}),
        };
        json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "metadata": {"name": format!("{plural}.{group}"), "annotations": annotations},
            "spec": {
                "group": group, "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase(), "listKind": format!("{kind}List")},
                "versions": [{
                    "name": version, "served": true, "storage": true, "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
                }],
            },
        })
    };
    documents([
        crd("networking.istio.io", "v1", "VirtualService", "virtualservices"),
        crd("networking.istio.io", "v1", "ServiceEntry", "serviceentries"),
        crd("networking.istio.io", "v1", "DestinationRule", "destinationrules"),
        crd("security.istio.io", "v1", "AuthorizationPolicy", "authorizationpolicies"),
        crd("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes"),
    ])
}

fn service_object(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]}})
}

pub(crate) fn service(name: &str) -> String {
    documents([service_object(name)])
}

fn route_object(name: &str, backends: Value) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": {"name": name, "namespace": "shop"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "till"}], "rules": [{"backendRefs": backends}]}})
}

/// A route of the till.
pub(crate) fn route(name: &str, backends: Value) -> String {
    documents([route_object(name, backends)])
}

fn split_object(weight: Value) -> Value {
    json!({"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "till", "namespace": "shop"},
        "spec": {"hosts": ["till"], "http": [{"route": [
            {"destination": {"host": "till"}, "weight": 90},
            {"destination": {"host": "other"}, "weight": weight}]}]}})
}

/// 90 to the till, the rest elsewhere.
pub(crate) fn split(weight: Value) -> String {
    documents([split_object(weight)])
}

/// A rule for what the till sends, with a Secret.
pub(crate) fn outside(secret: &str) -> String {
    documents([json!({"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "outside", "namespace": "shop"},
        "spec": {"host": "till", "workloadSelector": {"matchLabels": {"app": "till"}},
            "trafficPolicy": {"tls": {"mode": "SIMPLE", "credentialName": secret}}}})])
}

/// A Secret with authorities.
pub(crate) fn secret(namespace: &str, name: &str, roots: &str) -> String {
    documents([
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace},
        "stringData": {"ca.crt": roots}}),
    ])
}

fn pod(namespace: &str, name: &str, account: &str, node: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": account}},
        "spec": {"nodeName": node, "serviceAccountName": account,
            "containers": [{"name": "app", "image": "none", "ports": [{"name": "http", "containerPort": 8080}]}]}})
}

fn account(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
}

fn node(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "z1"}}})
}

/// A meshed pod on n1 behind a service.
fn till() -> Vec<Value> {
    vec![
        json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}}),
        node("n1"),
        account("shop", "till"),
        pod("shop", "till-0", "till", "n1"),
        service_object("till"),
    ]
}

/// The till alone.
pub(crate) fn till_only() -> String {
    documents(till())
}

/// The till with a resource of each kind of [`crds`].
pub(crate) fn shop() -> String {
    let rules = [
        json!({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "till", "namespace": "shop"},
            "spec": {"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]}}),
        split_object(json!(10)),
        route_object("till", json!([{"name": "till", "port": 80}])),
        json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "api", "namespace": "shop"},
            "spec": {"hosts": ["api.example.com"], "resolution": "STATIC",
                "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "endpoints": [{"address": "192.0.2.1"}]}}),
    ];
    documents(till().into_iter().chain(rules))
}

/// The agents of some nodes.
pub(crate) fn agents(nodes: &[&str]) -> String {
    let agent = |name: &&str| [node(name), pod(NAMESPACE, &format!("agent-{name}"), "nodemesh-agent", name)];
    documents([account(NAMESPACE, "nodemesh-agent")].into_iter().chain(nodes.iter().flat_map(agent)))
}

/// The webhook's configuration, and its service at an address that is this machine's.
pub(crate) fn webhook(addr: &str, port: u16) -> String {
    let rules = json!([{"apiGroups": ["networking.istio.io", "security.istio.io", "gateway.networking.k8s.io"],
        "apiVersions": ["*"], "operations": ["CREATE", "UPDATE"], "resources": ["*"]}]);
    documents([
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "nodemesh-controller", "namespace": NAMESPACE},
            "spec": {"clusterIP": addr, "ports": [{"name": "webhook", "port": port}]}}),
        // The API server asks an endpoint itself.
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "nodemesh-controller", "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": "nodemesh-controller"}},
            "endpoints": [{"addresses": [addr], "conditions": {"ready": true}}],
            "ports": [{"name": "webhook", "port": port, "protocol": "TCP"}]}),
        json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "nodemesh"},
            "webhooks": [{"name": "validate.nodemesh.dev", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                "failurePolicy": "Fail", "timeoutSeconds": 5, "rules": rules,
                "clientConfig": {"service": {"namespace": NAMESPACE, "name": "nodemesh-controller", "path": "/validate", "port": port}}}]}),
    ])
}
