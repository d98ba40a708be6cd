//! Builders of Kubernetes and Istio resources: the fields that tests vary, ordinary values for the rest.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::pod::Pod;

/// Set `value` at a JSON pointer, making objects on the way.
pub(super) fn set(resource: &mut Value, pointer: &str, value: Value) {
    let mut at = resource;
    for step in pointer.split('/').skip(1) {
        if !at.is_object() {
            *at = Value::Object(Map::new());
        }
        let name = step.replace("~1", "/");
        at = &mut at[name];
    }
    *at = value;
}

/// Append `value` to the array at a JSON pointer.
pub(super) fn push(resource: &mut Value, pointer: &str, value: Value) {
    match resource.pointer_mut(pointer) {
        Some(Value::Array(items)) => items.push(value),
        _ => set(resource, pointer, Value::Array(vec![value])),
    }
}

/// A name as one step of a JSON pointer.
pub(super) fn step(name: &str) -> String {
    name.replace('/', "~1")
}

macro_rules! resource {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $name(Value);

        impl From<$name> for Value {
            fn from(manifest: $name) -> Self {
                manifest.0
            }
        }

        impl $name {
            /// Add a label.
            #[must_use]
            pub fn label(mut self, name: &str, value: &str) -> Self {
                let pointer = format!("/metadata/labels/{}", $crate::manifests::resources::step(name));
                $crate::manifests::resources::set(&mut self.0, &pointer, value.into());
                self
            }

            /// Add an annotation.
            #[must_use]
            pub fn annotation(mut self, name: &str, value: &str) -> Self {
                let pointer = format!("/metadata/annotations/{}", $crate::manifests::resources::step(name));
                $crate::manifests::resources::set(&mut self.0, &pointer, value.into());
                self
            }

            /// Set any other field by its JSON pointer (`/` in a name is `~1`).
            #[must_use]
            pub fn with(mut self, pointer: &str, value: impl Into<Value>) -> Self {
                $crate::manifests::resources::set(&mut self.0, pointer, value.into());
                self
            }
        }
    };
}

pub(super) use resource;

resource! {
    /// A Namespace.
    NamespaceManifest
}
resource! {
    /// A ServiceAccount.
    ServiceAccountManifest
}
resource! {
    /// A Pod, made from a [`Pod`] of the world.
    PodManifest
}
resource! {
    /// A Service.
    ServiceManifest
}
resource! {
    /// An EndpointSlice.
    EndpointSliceManifest
}
resource! {
    /// An Istio PeerAuthentication.
    PeerAuthenticationManifest
}

impl NamespaceManifest {
    /// A namespace outside the mesh.
    #[must_use]
    pub fn plain(name: &str) -> Self {
        Self(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
    }

    /// A namespace whose pods are meshed.
    #[must_use]
    pub fn meshed(name: &str) -> Self {
        Self::plain(name).label("nodemesh.dev/mesh", "enabled")
    }
}

impl ServiceAccountManifest {
    /// A service account.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": namespace},
        }))
    }
}

impl PodManifest {
    /// A running, ready pod at the addresses of `pod`; label `app` is its name.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        Self(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": pod.name(),
                "namespace": pod.namespace(),
                "uid": pod.uid(),
                "labels": {"app": pod.name()},
                "annotations": {"nodemesh.dev/netns": pod.netns().path().to_string_lossy()},
            },
            "spec": {
                "nodeName": pod.node_name(),
                "serviceAccountName": "default",
                "containers": [{"name": "app", "image": "none"}],
            },
            "status": {
                "phase": "Running",
                "hostIP": pod.node_ip4().to_string(),
                "podIP": pod.ip4().to_string(),
                "podIPs": [{"ip": pod.ip4().to_string()}, {"ip": pod.ip6().to_string()}],
                "conditions": [
                    {"type": "ContainersReady", "status": "True"},
                    {"type": "Ready", "status": "True"},
                ],
            },
        }))
    }

    /// Its service account.
    #[must_use]
    pub fn service_account(self, name: &str) -> Self {
        self.with("/spec/serviceAccountName", name)
    }

    /// Not ready: services leave it out.
    #[must_use]
    pub fn not_ready(self) -> Self {
        self.with(
            "/status/conditions",
            json!([
                {"type": "ContainersReady", "status": "False"},
                {"type": "Ready", "status": "False"},
            ]),
        )
    }

    /// A named TCP container port.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16) -> Self {
        let entry = json!({"name": name, "containerPort": port, "protocol": "TCP"});
        match self.0.pointer_mut("/spec/containers/0") {
            Some(container) => push(container, "/ports", entry),
            None => set(&mut self.0, "/spec/containers", json!([{"name": "app", "ports": [entry]}])),
        }
        self
    }

    /// A TCP readiness probe on `port`.
    #[must_use]
    pub fn tcp_probe(mut self, port: u16) -> Self {
        if let Some(container) = self.0.pointer_mut("/spec/containers/0") {
            set(container, "/readinessProbe", json!({"tcpSocket": {"port": port}}));
        }
        self
    }
}

impl ServiceManifest {
    /// A ClusterIP service without address, port or selector yet.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"type": "ClusterIP"},
        }))
    }

    /// Add a virtual address; the first is `clusterIP`, all are `clusterIPs`.
    #[must_use]
    pub fn cluster_ip(mut self, address: impl Into<IpAddr>) -> Self {
        let address = address.into();
        if self.0.pointer("/spec/clusterIP").is_none() {
            set(&mut self.0, "/spec/clusterIP", address.to_string().into());
        }
        push(&mut self.0, "/spec/clusterIPs", address.to_string().into());
        push(&mut self.0, "/spec/ipFamilies", if address.is_ipv4() { "IPv4" } else { "IPv6" }.into());
        self
    }

    /// No virtual address: its name resolves to the pods.
    #[must_use]
    pub fn headless(self) -> Self {
        self.with("/spec/clusterIP", "None").with("/spec/clusterIPs", json!(["None"]))
    }

    /// An alias of an outside name.
    #[must_use]
    pub fn external_name(self, host: &str) -> Self {
        self.with("/spec/type", "ExternalName").with("/spec/externalName", host)
    }

    /// Add a TCP port; `target` is a number or the name of a container port.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16, target: impl Into<Value>) -> Self {
        let target = target.into();
        push(
            &mut self.0,
            "/spec/ports",
            json!({"name": name, "port": port, "targetPort": target, "protocol": "TCP"}),
        );
        self
    }

    /// Add a UDP port.
    #[must_use]
    pub fn udp_port(mut self, name: &str, port: u16, target: impl Into<Value>) -> Self {
        let target = target.into();
        push(
            &mut self.0,
            "/spec/ports",
            json!({"name": name, "port": port, "targetPort": target, "protocol": "UDP"}),
        );
        self
    }

    /// Select pods by one more label.
    #[must_use]
    pub fn selector(self, label: &str, value: &str) -> Self {
        let pointer = format!("/spec/selector/{}", step(label));
        self.with(&pointer, value)
    }

    /// `sessionAffinity: ClientIP`.
    #[must_use]
    pub fn session_affinity(self, seconds: u32) -> Self {
        self.with("/spec/sessionAffinity", "ClientIP")
            .with("/spec/sessionAffinityConfig/clientIP/timeoutSeconds", seconds)
    }
}

impl EndpointSliceManifest {
    /// A slice of `service`; the address type is that of the endpoints added.
    #[must_use]
    pub fn new(namespace: &str, name: &str, service: &str) -> Self {
        Self(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": "IPv4", "endpoints": [], "ports": [],
        }))
    }

    /// Add a TCP port.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16) -> Self {
        push(&mut self.0, "/ports", json!({"name": name, "port": port, "protocol": "TCP"}));
        self
    }

    /// Add an endpoint.
    #[must_use]
    pub fn endpoint(mut self, address: impl Into<IpAddr>, ready: bool) -> Self {
        let address = address.into();
        set(&mut self.0, "/addressType", if address.is_ipv4() { "IPv4" } else { "IPv6" }.into());
        push(
            &mut self.0,
            "/endpoints",
            json!({"addresses": [address.to_string()], "conditions": {"ready": ready}}),
        );
        self
    }
}

/// A mode of PeerAuthentication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtlsMode {
    /// Only authenticated peers.
    Strict,
    /// Both.
    Permissive,
    /// Plaintext only.
    Disable,
    /// As the next wider policy says.
    Unset,
}

impl MtlsMode {
    fn text(self) -> &'static str {
        match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
            Self::Unset => "UNSET",
        }
    }
}

impl PeerAuthenticationManifest {
    /// For a namespace, or for the mesh when the namespace is `istio-system`.
    #[must_use]
    pub fn new(namespace: &str, name: &str, mode: MtlsMode) -> Self {
        Self(json!({
            "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"mtls": {"mode": mode.text()}},
        }))
    }

    /// Only for workloads with this label.
    #[must_use]
    pub fn selector(self, label: &str, value: &str) -> Self {
        let pointer = format!("/spec/selector/matchLabels/{}", step(label));
        self.with(&pointer, value)
    }

    /// Another mode for one workload port.
    #[must_use]
    pub fn port(self, port: u16, mode: MtlsMode) -> Self {
        let pointer = format!("/spec/portLevelMtls/{port}/mode");
        self.with(&pointer, mode.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_lists_both_families() {
        let service: Value = ServiceManifest::new("shop", "web")
            .cluster_ip([10, 96, 0, 1])
            .cluster_ip([0xfd00, 0x96, 0, 0, 0, 0, 0, 1])
            .port("http", 80, 8080)
            .selector("app.kubernetes.io/name", "web")
            .into();
        assert_eq!(service["spec"]["clusterIP"], "10.96.0.1");
        assert_eq!(service["spec"]["clusterIPs"], json!(["10.96.0.1", "fd00:96::1"]));
        assert_eq!(service["spec"]["selector"]["app.kubernetes.io/name"], "web");
        assert_eq!(service["spec"]["ports"][0]["targetPort"], 8080);
    }
}
