//! What else Kubernetes does with pods and services, in the mesh: pods with names of their own, aliases, ports of nodes, probes of every
//! kind over both families, rules in a pod's own network, and nodes that are drained.
//!
//! Node b says its IPv6 address first, so the pods on it have IPv6 as `status.podIP`, and that is where its kubelet probes them.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Context as _;
use mesh_tests::cluster::shop::{self, STRICT};
use mesh_tests::cluster::{Cluster, ClusterNode, ClusterPod, FirstFamily, Mesh, NodeOptions};
use mesh_tests::web::messages::{Ask, Told};
use mesh_tests::web::{HTTP_PORT, ask_once};
use mesh_tests::{Place, TestResult, eventually, require_cluster, test_name};
use serde_json::Value;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// A node's port of the service `web`, behind which are pods of all nodes.
const WEB_PORT: u16 = 30080;
/// A node's port of the service `here`, behind which is one pod on node a and to which clients come with their own address.
const HERE_PORT: u16 = 30081;

/// The container of every server; answers say the value of `$(NAME)`.
const CONTAINER: &str = r#"
      - name: app
        image: localhost/apps:test
        imagePullPolicy: Never
        command: [/pod-tool, web, '{"name": "$(NAME)", "failing": false}']
        ports: [{name: http, containerPort: 8080}, {name: grpc, containerPort: 50051}]
        lifecycle: {preStop: {sleep: {seconds: 3}}}
        readinessProbe: {grpc: {port: 50051}, periodSeconds: 1, failureThreshold: 2}
        livenessProbe: {tcpSocket: {port: http}, periodSeconds: 2}
        startupProbe: {httpGet: {path: /started, port: 8080}, periodSeconds: 1, failureThreshold: 30}
"#;

/// One pod on each node wherever that is possible.
const SPREAD: &str = "[{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: APP}}}]";

/// Services and pods of the shop besides its client.
fn objects() -> String {
    let workload = |kind: &str, app: &str, more: &str, pod: &str, name: &str| {
        let spread = SPREAD.replace("APP", app);
        format!(
            "
apiVersion: apps/v1
kind: {kind}
metadata: {{name: {app}, namespace: shop}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  {more}
  template:
    metadata: {{labels: {{app: {app}}}}}
    spec:
      terminationGracePeriodSeconds: 10
      topologySpreadConstraints: {spread}
      {pod}
      containers:{CONTAINER}
        env: [{{name: NAME, valueFrom: {{fieldRef: {{fieldPath: {name}}}}}}}]
---
"
        )
    };
    let service = |name: &str, app: &str, more: &str| {
        format!(
            "
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec: {{ipFamilyPolicy: RequireDualStack, selector: {{app: {app}}}, {more}}}
---
"
        )
    };
    let port = |node_port: u16| {
        format!("type: NodePort, ports: [{{name: http, port: 80, targetPort: http, nodePort: {node_port}}}]")
    };
    [
        workload(
            "Deployment",
            "web",
            "replicas: 4\n  strategy: {rollingUpdate: {maxSurge: 4, maxUnavailable: 0}}",
            "",
            "spec.nodeName",
        ),
        workload(
            "Deployment",
            "here",
            "replicas: 1",
            "nodeSelector: {kubernetes.io/hostname: a}",
            "spec.nodeName",
        ),
        workload(
            "StatefulSet",
            "db",
            "replicas: 2\n  serviceName: db\n  podManagementPolicy: Parallel",
            "",
            "metadata.name",
        ),
        service("web", "web", &port(WEB_PORT)),
        service("here", "here", &format!("externalTrafficPolicy: Local, {}", port(HERE_PORT))),
        service("db", "db", "clusterIP: None, ports: [{name: http, port: 8080}]"),
        "
apiVersion: v1
kind: Service
metadata: {name: alias, namespace: shop}
spec: {type: ExternalName, externalName: web.shop.svc.cluster.local}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: web, namespace: shop}
spec: {minAvailable: 3, selector: {matchLabels: {app: web}}}
---
"
        .to_owned(),
    ]
    .concat()
}

/// A running pod.
#[derive(Debug, Clone)]
struct Running {
    name: String,
    uid: String,
    node: String,
    /// The first is the pod's `status.podIP`.
    ips: Vec<IpAddr>,
}

impl Running {
    /// Its servers' HTTP port by IPv4.
    fn http(&self) -> anyhow::Result<SocketAddr> {
        let ip = self.ips.iter().find(|ip| ip.is_ipv4()).context("no IPv4")?;
        Ok(SocketAddr::new(*ip, HTTP_PORT))
    }
}

/// The pods of an app of the shop that are to stay and have addresses.
fn pods(cluster: &Cluster, app: &str) -> anyhow::Result<Vec<Running>> {
    let list = cluster.kubectl().json(&["get", "pods", "-n", "shop", "-l", &format!("app={app}")])?;
    let list = list["items"].as_array().cloned().unwrap_or_default();
    let running = |pod: &Value| {
        let ips = pod["status"]["podIPs"].as_array()?;
        Some(Running {
            name: pod["metadata"]["name"].as_str()?.to_owned(),
            uid: pod["metadata"]["uid"].as_str()?.to_owned(),
            node: pod["spec"]["nodeName"].as_str()?.to_owned(),
            ips: ips.iter().filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect(),
        })
    };
    let staying = list.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    Ok(staying.filter_map(running).collect())
}

fn pod_on(cluster: &Cluster, app: &str, node: &str) -> anyhow::Result<Running> {
    let found = pods(cluster, app)?.into_iter().find(|pod| pod.node == node);
    found.with_context(|| format!("no pod of {app} is on node {node}"))
}

/// Who answered; an error when nobody did.
fn answered(told: &Told) -> anyhow::Result<String> {
    anyhow::ensure!(told.status == 200, "{told:?}");
    Ok(told.seen()?.server)
}

/// One GET from a host, as it is answered.
fn from_host(host: &Place, to: SocketAddr) -> anyhow::Result<Told> {
    ask_once(host, to, false, Ask::get("web", "/")).map_err(|error| anyhow::anyhow!("{error:?}"))
}

fn is_served(told: &anyhow::Result<Told>) -> bool {
    told.as_ref().is_ok_and(|told| told.status == 200)
}

fn is_refused(told: &anyhow::Result<Told>) -> bool {
    told.as_ref().is_ok_and(|told| told.status != 200)
}

#[test]
fn what_kubernetes_does_with_pods_and_services_holds_in_the_mesh() -> TestResult {
    require_cluster!();
    let v6_first = NodeOptions { first: FirstFamily::V6, ..NodeOptions::default() };
    let cluster = Cluster::start_of(test_name!(), &[("a", NodeOptions::default()), ("b", v6_first)])?;
    let kubectl = cluster.kubectl();
    // As many controllers as by default: while the only one moves, nobody tells agents which pods went.
    let mesh = Mesh::install_with(&cluster, &["listenAddress=[::]", "controller.replicas=2"])?;
    kubectl.apply(shop::SPACES)?;
    mesh.enrol("shop")?;
    kubectl.apply(&[shop::client("shop"), shop::client("outside"), objects()].concat())?;
    for what in ["deployment/web", "deployment/here", "statefulset/db"] {
        cluster.rolled_out("shop", what)?;
    }
    shop::clients_run(&cluster)?;
    mesh.all_enrolled("shop")?;
    let visitor = cluster.world().outsider("visitor")?;

    ports_of_nodes_work(&cluster, &visitor)?;
    names_lead_where_they_should(&cluster)?;

    kubectl.apply(STRICT)?;
    plaintext_is_refused_everywhere(&cluster, &visitor)?;
    names_lead_where_they_should(&cluster)?;
    probes_pass(&cluster)?;
    a_pod_of_a_stateful_set_keeps_its_name(&cluster)?;
    rules_in_the_networks_of_pods_hold(&cluster)?;
    a_node_is_drained_without_a_failed_request(&cluster)
}

/// Where a node's port is, by both families.
fn node_port(node: &ClusterNode, port: u16) -> [SocketAddr; 2] {
    [node.host().at4(port), node.host().at6(port)]
}

/// From a host on the wire, from another node's host and from a meshed pod; and the client's address is kept where it was asked for.
fn ports_of_nodes_work(cluster: &Cluster, visitor: &Place) -> TestResult {
    let (a, b) = (cluster.node("a")?, cluster.node("b")?);
    for to in [node_port(a, WEB_PORT), node_port(b, WEB_PORT)].concat() {
        for host in [visitor, a.host()] {
            eventually(LIMIT, || from_host(host, to), is_served)??;
        }
        let told = cluster.pod("shop", "client").get(to, "web", "/")?;
        answered(&told).with_context(|| format!("a meshed pod at {to}"))?;
    }
    for to in node_port(a, HERE_PORT) {
        let seen = eventually(LIMIT, || from_host(visitor, to), is_served)??.seen()?;
        let peer = seen.peer.context("no peer")?.ip().to_canonical();
        let own = if to.is_ipv4() { IpAddr::V4(visitor.ip4()) } else { IpAddr::V6(visitor.ip6()) };
        assert_eq!((seen.server.as_str(), peer), ("a", own));
    }
    // Its pod is on the other node, and only a node's own pods are behind such a port.
    for to in node_port(b, HERE_PORT) {
        let tried = visitor.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(1)))?;
        assert!(tried.is_err(), "{to} answers");
    }
    Ok(())
}

/// Only meshed clients are left: whoever comes through a node's port or straight to a pod is nobody.
fn plaintext_is_refused_everywhere(cluster: &Cluster, visitor: &Place) -> TestResult {
    let (a, b) = (cluster.node("a")?, cluster.node("b")?);
    let ports = [node_port(a, WEB_PORT), node_port(b, WEB_PORT), node_port(a, HERE_PORT)].concat();
    for to in ports {
        // A node's own processes too: only its kubelet's probes pass.
        for host in [visitor, a.host(), b.host()] {
            eventually(LIMIT, || from_host(host, to), is_refused)??;
        }
    }
    for pod in pods(cluster, "db")? {
        let told = cluster.pod("outside", "client").get(pod.http()?, "db", "/")?;
        assert_ne!(told.status, 200, "{pod:?}: {told:?}");
    }
    Ok(())
}

/// Each pod of a StatefulSet by its own name, and a service by its other one.
fn names_lead_where_they_should(cluster: &Cluster) -> TestResult {
    let client = cluster.pod("shop", "client");
    let db = pods(cluster, "db")?;
    assert_eq!(db.len(), 2);
    for pod in &db {
        is_reached_by_name(&client, pod)?;
    }
    let mut all = client.resolve("db.shop.svc.cluster.local")?;
    all.sort();
    let mut wanted: Vec<IpAddr> = db.iter().flat_map(|pod| pod.ips.clone()).collect();
    wanted.sort();
    assert_eq!(all, wanted);

    let web = client.resolve("web")?;
    let mut alias = client.resolve("alias")?;
    assert_eq!(alias.len(), 2, "{alias:?}");
    alias.retain(|ip| !web.contains(ip));
    assert!(alias.is_empty(), "{alias:?} is not of {web:?}");
    for ip in web {
        let told = client.get(SocketAddr::new(ip, 80), "alias", "/")?;
        assert!(["a", "b"].contains(&answered(&told)?.as_str()), "{told:?}");
    }
    Ok(())
}

/// Its name leads to all of its addresses and no other, and they lead to it.
fn is_reached_by_name(client: &ClusterPod, pod: &Running) -> TestResult {
    let name = format!("{}.db", pod.name);
    let resolve = || {
        let mut found = client.resolve(&name)?;
        found.sort();
        Ok::<_, anyhow::Error>(found)
    };
    let mut wanted = pod.ips.clone();
    wanted.sort();
    let found = eventually(LIMIT, resolve, |found| found.as_ref().is_ok_and(|found| *found == wanted))??;
    for ip in found {
        let told = client.get(SocketAddr::new(ip, HTTP_PORT), &name, "/")?;
        assert_eq!(answered(&told)?, pod.name, "{ip}");
    }
    Ok(())
}

/// All pods stay ready though only the mesh gets in; those of one node are probed by IPv4, those of the other by IPv6.
fn probes_pass(cluster: &Cluster) -> TestResult {
    let kubectl = cluster.kubectl();
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web"])?;
    cluster.rolled_out("shop", "deployment/web")?;
    let web = pods(cluster, "web")?;
    let first = |node: &str| -> Vec<bool> {
        web.iter().filter(|pod| pod.node == node).map(|pod| pod.ips[0].is_ipv6()).collect()
    };
    let (a, b) = (first("a"), first("b"));
    assert!(!a.is_empty() && a.iter().all(|v6| !v6), "{web:?}");
    assert!(!b.is_empty() && b.iter().all(|v6| *v6), "{web:?}");
    let path = "jsonpath={.items[*].status.containerStatuses[0].restartCount}";
    let restarts = kubectl.run(&["get", "pods", "-n", "shop", "-o", path])?;
    assert!(restarts.split_whitespace().all(|count| count == "0"), "{restarts}");
    Ok(())
}

fn a_pod_of_a_stateful_set_keeps_its_name(cluster: &Cluster) -> TestResult {
    let before = pods(cluster, "db")?.into_iter().find(|pod| pod.name == "db-0").context("no db-0")?;
    cluster.kubectl().run(&["delete", "pod", "-n", "shop", "db-0", "--grace-period=1"])?;
    cluster.rolled_out("shop", "statefulset/db")?;
    let after = pods(cluster, "db")?.into_iter().find(|pod| pod.name == "db-0").context("no db-0")?;
    assert_ne!(before.uid, after.uid);
    assert_ne!(before.ips, after.ips);
    is_reached_by_name(&cluster.pod("shop", "client"), &after)
}

/// A table of rules in the network of a pod, gone with its value.
struct Rules<'c> {
    node: &'c ClusterNode,
    uid: String,
}

impl<'c> Rules<'c> {
    fn add(cluster: &'c Cluster, pod: &Running, hook: &str, rule: &str) -> anyhow::Result<Self> {
        let node = cluster.node(&pod.node)?;
        let rules = Self { node, uid: pod.uid.clone() };
        let table =
            format!("table inet rules {{ chain rules {{ type filter hook {hook} priority 0; {rule}; }}; }}");
        node.run_in_network_of(&pod.uid, &["nft", &table])?;
        Ok(rules)
    }

    /// As the kernel has them, with what their counters counted.
    fn listed(&self) -> anyhow::Result<String> {
        Ok(self.node.run_in_network_of(&self.uid, &["nft", "list", "table", "inet", "rules"])?)
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        // A pod that is gone has taken them along.
        drop(self.node.run_in_network_of(&self.uid, &["nft", "delete", "table", "inet", "rules"]));
    }
}

/// What somebody else drops or refuses in the network of a pod stays dropped and refused: packets of the mesh have the addresses and
/// ports that rules are about, and sockets of the mesh are in the pods' own networks.
fn rules_in_the_networks_of_pods_hold(cluster: &Cluster) -> TestResult {
    let (near, far) = (pod_on(cluster, "db", "a")?, pod_on(cluster, "db", "b")?);
    let (own, other) = (pod_on(cluster, "client", "a")?, pod_on(cluster, "web", "a")?);
    let client = cluster.pod("shop", "client");
    let to = |pod: &Running| pod.http().and_then(|to| client.get(to, "db", "/"));
    let both_serve = || -> TestResult {
        for pod in [&near, &far] {
            eventually(LIMIT, || to(pod), is_served)??;
        }
        Ok(())
    };
    both_serve()?;

    // At the server, by port: also what comes through a tunnel.
    let rules = Rules::add(cluster, &far, "input", "tcp dport 8080 counter drop")?;
    assert!(is_refused(&to(&far)), "a drop is passed by");
    let listed = rules.listed()?;
    assert!(!listed.contains("packets 0 "), "nothing was dropped: {listed}");
    assert!(is_served(&to(&near)));
    drop(rules);
    both_serve()?;

    // At the server, by the client's address: the other clients of the node are not meant.
    let ip = own.http()?.ip();
    let rule = format!("ip saddr {ip} tcp dport 8080 counter reject with tcp reset");
    let rules = Rules::add(cluster, &near, "input", &rule)?;
    assert!(is_refused(&to(&near)), "a refusal by address is passed by: {}", rules.listed()?);
    let told = cluster.pod("shop", &other.name).get(near.http()?, "db", "/")?;
    assert_eq!(answered(&told)?, near.name);
    drop(rules);

    // At the client, by the server's address: also the tunnel that is open already.
    let ip = far.http()?.ip();
    let rules = Rules::add(cluster, &own, "output", &format!("ip daddr {ip} reject with tcp reset"))?;
    assert!(is_refused(&to(&far)), "a refusal on the way out is passed by: {}", rules.listed()?);
    assert!(is_served(&to(&near)));
    drop(rules);
    both_serve()
}

/// `kubectl drain` moves everything that is on a node, name server and controller included, and the node comes back.
fn a_node_is_drained_without_a_failed_request(cluster: &Cluster) -> TestResult {
    let kubectl = cluster.kubectl();
    let load = cluster.pod("shop", "client").load(&shop::mix(shop::address(cluster, "web")?, "web"))?;
    load.go_on(100, LIMIT)?;
    kubectl.run(&[
        "drain",
        "b",
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--force",
        "--timeout=180s",
    ])?;
    for what in ["deployment/web", "statefulset/db"] {
        cluster.rolled_out("shop", what)?;
    }
    for app in ["web", "db", "here"] {
        assert!(pods(cluster, app)?.iter().all(|pod| pod.node == "a"), "{app}");
    }
    let failed = load.go_on(100, LIMIT)?.failed;
    assert!(failed.is_empty(), "while b was drained: {failed:?}");
    kubectl.run(&["uncordon", "b"])?;
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web"])?;
    cluster.rolled_out("shop", "deployment/web")?;
    pod_on(cluster, "web", "b")?;
    let failed = load.go_on(200, LIMIT)?.failed;
    assert!(failed.is_empty(), "{failed:?}");
    names_lead_where_they_should(cluster)
}
