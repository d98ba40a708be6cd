//! A small shop in a cluster: a service `web` of two versions on both nodes, and a client in each of two namespaces, `shop`, which
//! tests mesh, and `outside`, which they do not.

use std::net::SocketAddr;

use anyhow::Context as _;

use super::Cluster;
use crate::web::messages::Mix;

/// The two namespaces.
pub const SPACES: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
";

/// Only the mesh gets into the shop.
pub const STRICT: &str = r"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

/// All versions as one service.
const SERVICE: &str = r"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
";

/// Pods that serve HTTP and say their version, probed by HTTP, TCP and a program; and a service of them.
fn web(version: &str, replicas: u8) -> String {
    format!(
        r#"
apiVersion: apps/v1
kind: Deployment
metadata: {{name: web-{version}, namespace: shop}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: web, version: {version}}}}}
  template:
    metadata: {{labels: {{app: web, version: {version}}}}}
    spec:
      terminationGracePeriodSeconds: 10
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector: {{matchLabels: {{app: web, version: {version}}}}}
      containers:
      - name: app
        image: localhost/apps:test
        imagePullPolicy: Never
        command: [/pod-tool, web, '{{"name": "{version}", "failing": false}}']
        ports: [{{name: http, containerPort: 8080}}]
        lifecycle: {{preStop: {{sleep: {{seconds: 3}}}}}}
        readinessProbe: {{httpGet: {{path: /ready, port: http}}, periodSeconds: 1, failureThreshold: 2}}
        livenessProbe: {{tcpSocket: {{port: 8080}}, periodSeconds: 2}}
        startupProbe: {{exec: {{command: [/pod-tool, resolve, localhost]}}, periodSeconds: 1, failureThreshold: 30}}
---
apiVersion: v1
kind: Service
metadata: {{name: web-{version}, namespace: shop}}
spec:
  selector: {{app: web, version: {version}}}
  ports: [{{name: http, port: 80, targetPort: 8080}}]
---
"#
    )
}

/// A pod on node a that tests run programs in.
#[must_use]
pub fn client(namespace: &str) -> String {
    pod("client", namespace, "default", "a")
}

/// The same in the shop under another name, as a service account of that name, which comes with it.
#[must_use]
pub fn newcomer(name: &str) -> String {
    let account =
        format!("{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}, namespace: shop}}}}\n---");
    account + &pod(name, "shop", name, "a")
}

/// A pod on a node, to be connected to by its own address.
#[must_use]
pub fn server(name: &str, namespace: &str, node: &str) -> String {
    pod(name, namespace, "default", node)
}

fn pod(name: &str, namespace: &str, account: &str, node: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}
spec:
  nodeName: {node}
  serviceAccountName: {account}
  terminationGracePeriodSeconds: 0
  containers:
  - name: app
    image: localhost/apps:test
    imagePullPolicy: Never
    command: [/pod-tool, web, '{{"name": "{name}", "failing": false}}']
---
"#
    )
}

/// Apply all of it, two pods of each version, and wait until it runs.
///
/// # Errors
/// When something is refused or does not become ready.
pub fn open(cluster: &Cluster) -> anyhow::Result<()> {
    let mut objects = SPACES.to_owned() + SERVICE;
    for part in [web("v1", 2), web("v2", 2), client("shop"), client("outside")] {
        objects.push_str(&part);
    }
    cluster.kubectl().apply(&objects)?;
    for version in ["v1", "v2"] {
        cluster.rolled_out("shop", &format!("deployment/web-{version}"))?;
    }
    clients_run(cluster)
}

/// Wait for the clients of both namespaces.
///
/// # Errors
/// When one does not become ready.
pub fn clients_run(cluster: &Cluster) -> anyhow::Result<()> {
    for namespace in ["shop", "outside"] {
        let wait = ["wait", "pod/client", "-n", namespace, "--for=condition=Ready", "--timeout=120s"];
        cluster.kubectl().run(&wait)?;
    }
    Ok(())
}

/// Port 80 of a service of the shop.
///
/// # Errors
/// When it has no address.
pub fn address(cluster: &Cluster, service: &str) -> anyhow::Result<SocketAddr> {
    let service = cluster.kubectl().json(&["get", "service", "-n", "shop", service])?;
    let ip = service["spec"]["clusterIP"].as_str().context("no clusterIP")?;
    Ok(SocketAddr::new(ip.parse()?, 80))
}

/// Clients of a service of all kinds: those that keep connections, those that do not, and HTTP/2.
#[must_use]
pub fn mix(http: SocketAddr, host: &str) -> Mix {
    Mix { http, host: host.to_owned(), keep_alive: 2, short: 3, http2: 1, tcp: None, pause_ms: 20 }
}
