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
        crd("networking.istio.io", "v1", "Sidecar", "sidecars"),
        crd("networking.istio.io", "v1", "WorkloadEntry", "workloadentries"),
        crd("security.istio.io", "v1", "AuthorizationPolicy", "authorizationpolicies"),
        crd("security.istio.io", "v1", "PeerAuthentication", "peerauthentications"),
        crd("gateway.networking.k8s.io", "v1", "HTTPRoute", "httproutes"),
        crd("gateway.networking.k8s.io", "v1", "GRPCRoute", "grpcroutes"),
        crd("gateway.networking.k8s.io", "v1alpha3", "TLSRoute", "tlsroutes"),
        crd("gateway.networking.k8s.io", "v1alpha2", "TCPRoute", "tcproutes"),
        crd("gateway.networking.k8s.io", "v1beta1", "ReferenceGrant", "referencegrants"),
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

/// More pods of the till's namespace and account, which no kubelet has started, by name and node; with their nodes.
pub(crate) fn pods_on(pods: &[(&str, &str)]) -> String {
    documents(pods.iter().flat_map(|(name, on)| [node(on), pod("shop", name, "till", on)]))
}

/// The till with a few rules.
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

/// The till with something of every kind that the mesh reads, each of which counts: no two are about the same service where only one
/// of them could.
pub(crate) fn every_kind() -> String {
    let of = |api_version: &str, kind: &str, name: &str, spec: Value| json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": "shop"}, "spec": spec});
    let (istio, gateway) = ("networking.istio.io/v1", "gateway.networking.k8s.io");
    let service = |namespace: &str, name: &str, port: &str, number: u16| {
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"ports": [{"name": port, "port": number}]}})
    };
    let parent = |name: &str| json!([{"group": "", "kind": "Service", "name": name}]);
    let to_till = json!([{"name": "till", "port": 80}]);
    let rules = [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "data"}}),
        service("shop", "desk", "http", 80),
        service("shop", "calls", "grpc", 90),
        service("shop", "sealed", "tls", 443),
        service("shop", "bytes", "tcp", 9000),
        service("shop", "borrowed", "http", 80),
        service("data", "ledger", "http", 80),
        service("shop", "sliced", "http", 80),
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "sliced", "namespace": "shop", "labels": {"kubernetes.io/service-name": "sliced"}},
            "endpoints": [{"addresses": ["192.0.2.7"], "conditions": {"ready": true}}],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}]}),
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "nodemesh", "namespace": NAMESPACE},
            "data": {"mesh": "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"}}),
        of("security.istio.io/v1", "PeerAuthentication", "till", json!({"mtls": {"mode": "STRICT"}})),
        of(
            "security.istio.io/v1",
            "AuthorizationPolicy",
            "till",
            json!({"action": "ALLOW", "rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]}),
        ),
        json!({"apiVersion": istio, "kind": "VirtualService", "metadata": {"name": "till", "namespace": "shop"},
            "spec": {"hosts": ["desk"], "http": [{"route": [{"destination": {"host": "till"}}]}]}}),
        of(
            istio,
            "DestinationRule",
            "till",
            json!({"host": "desk", "trafficPolicy": {"connectionPool": {"tcp": {"maxConnections": 7}}}}),
        ),
        of(istio, "Sidecar", "shop", json!({"egress": [{"hosts": ["./*", "data/*"]}]})),
        of(
            istio,
            "ServiceEntry",
            "api",
            json!({"hosts": ["api.example.com"], "resolution": "STATIC",
                "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "endpoints": [{"address": "192.0.2.1"}]}),
        ),
        of(istio, "WorkloadEntry", "old", json!({"address": "192.0.2.9", "labels": {"app": "till"}})),
        route_object("till", to_till.clone()),
        of(
            &format!("{gateway}/v1"),
            "HTTPRoute",
            "borrowed",
            json!({"parentRefs": parent("borrowed"),
                "rules": [{"backendRefs": [{"name": "ledger", "namespace": "data", "port": 80}]}]}),
        ),
        json!({"apiVersion": format!("{gateway}/v1beta1"), "kind": "ReferenceGrant",
            "metadata": {"name": "shop", "namespace": "data"},
            "spec": {"from": [{"group": gateway, "kind": "HTTPRoute", "namespace": "shop"}],
                "to": [{"group": "", "kind": "Service"}]}}),
        of(
            &format!("{gateway}/v1"),
            "GRPCRoute",
            "calls",
            json!({"parentRefs": parent("calls"),
                "rules": [{"matches": [{"method": {"service": "shop.Till"}}], "backendRefs": to_till}]}),
        ),
        of(
            &format!("{gateway}/v1alpha3"),
            "TLSRoute",
            "sealed",
            json!({"parentRefs": parent("sealed"), "hostnames": ["a.example.com"],
                "rules": [{"backendRefs": to_till}]}),
        ),
        of(
            &format!("{gateway}/v1alpha2"),
            "TCPRoute",
            "bytes",
            json!({"parentRefs": parent("bytes"), "rules": [{"backendRefs": to_till}]}),
        ),
    ];
    let with_secret = outside("bank") + &secret("shop", "bank", "roots");
    documents(till().into_iter().chain(rules)) + &with_secret
}

/// The agents of some nodes.
pub(crate) fn agents(nodes: &[&str]) -> String {
    let agent = |name: &&str| {
        let mut pod = pod(NAMESPACE, &format!("agent-{name}"), "nodemesh-agent", name);
        pod["metadata"]["labels"]["app.kubernetes.io/name"] = "nodemesh-agent".into();
        [node(name), pod]
    };
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
