//! The harness's cluster: two nodes that are machines of their own to Kubernetes, and nothing of them afterwards.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use mesh_tests::cluster::Cluster;
use mesh_tests::cluster::init::Hierarchy;
use mesh_tests::web::HTTP_PORT;
use mesh_tests::web::messages::Seen;
use mesh_tests::{TestResult, eventually, require_cluster, test_name};

/// A pod on each node, and a service of both.
const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80, targetPort: 8080}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: app
        image: localhost/apps:test
        imagePullPolicy: Never
        command: [/pod-tool, web, '{"name": "$(NODE)", "failing": false}']
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
"#;

/// How long pods may take to run.
const PODS_LIMIT: Duration = Duration::from_secs(120);

#[test]
fn pods_of_two_nodes_reach_each_other_and_services_and_leave_nothing() -> TestResult {
    require_cluster!();
    assert_eq!(HTTP_PORT, 8080);
    let cluster = Cluster::start(test_name!(), &["a", "b"])?;
    cluster.kubectl().apply(OBJECTS)?;
    let pods =
        eventually(PODS_LIMIT, || pods(&cluster), |pods| pods.as_ref().is_ok_and(|pods| pods.len() == 2))??;
    let service = cluster.kubectl().json(&["get", "service", "-n", "shop", "web"])?;
    let vips: Vec<IpAddr> = service["spec"]["clusterIPs"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|ip| ip.as_str()?.parse().ok())
        .collect();
    assert_eq!(vips.len(), 2, "{service}");

    for from in &pods {
        for to in &pods {
            for ip in &to.ips {
                assert_eq!(ask(&cluster, from, SocketAddr::new(*ip, HTTP_PORT))?.server, to.node, "{ip}");
            }
        }
        for vip in &vips {
            // kube-proxy learns of an endpoint a moment after the API server does.
            let mut seen: Vec<String> = Vec::new();
            eventually(
                Duration::from_secs(30),
                || {
                    seen.extend(ask(&cluster, from, SocketAddr::new(*vip, 80)).map(|seen| seen.server));
                    seen.sort();
                    seen.dedup();
                    seen.clone()
                },
                |seen| *seen == ["a", "b"],
            )?;
        }
        let resolve = || cluster.pod("shop", &from.name).resolve("web.shop");
        let resolved = eventually(Duration::from_secs(30), resolve, Result::is_ok)??;
        for vip in &vips {
            assert!(resolved.contains(vip), "{vip} is not in {resolved:?}");
        }
    }

    // A node is a machine of its own to what runs on it.
    for node in cluster.nodes() {
        assert_eq!(node.run(&["hostname"])?.trim(), node.name());
        let processes = node.run(&["sh", "-c", "cat /proc/[0-9]*/comm"])?;
        let count = |name: &str| processes.lines().filter(|line| *line == name).count();
        assert_eq!((count("kubelet"), count("containerd"), count("kube-proxy")), (1, 1, 1), "{processes}");
        let groups = node.run(&["ls", "/sys/fs/cgroup/unified"])?;
        assert!(groups.lines().any(|line| line == "kubepods"), "{groups}");
        assert!(
            node.host().run(|| std::net::TcpStream::connect((vips[0], 80)).is_ok())?,
            "no service for the host"
        );
    }

    let id = cluster.world().directory().file_name().unwrap_or_default().to_string_lossy().into_owned();
    assert!(!remains(&id).is_empty(), "this would find nothing");
    drop(cluster);
    assert_eq!(remains(&id), Vec::<String>::new());
    Ok(())
}

/// A running pod of the shop.
#[derive(Debug)]
struct Web {
    name: String,
    node: String,
    ips: Vec<IpAddr>,
}

/// Those that are ready.
fn pods(cluster: &Cluster) -> anyhow::Result<Vec<Web>> {
    let list = cluster.kubectl().json(&["get", "pods", "-n", "shop"])?;
    let ready = list["items"].as_array().into_iter().flatten().filter(|pod| {
        let conditions = pod["status"]["conditions"].as_array();
        conditions
            .into_iter()
            .flatten()
            .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
    });
    let web = |pod: &serde_json::Value| {
        let ips = pod["status"]["podIPs"].as_array();
        Some(Web {
            name: pod["metadata"]["name"].as_str()?.to_owned(),
            node: pod["spec"]["nodeName"].as_str()?.to_owned(),
            ips: ips.into_iter().flatten().filter_map(|ip| ip["ip"].as_str()?.parse().ok()).collect(),
        })
    };
    Ok(ready.filter_map(web).collect())
}

fn ask(cluster: &Cluster, from: &Web, to: SocketAddr) -> anyhow::Result<Seen> {
    cluster.pod("shop", &from.name).get(to, "web", "/")?.seen()
}

/// What carries the cluster's name, or belongs to a process of it.
fn remains(id: &str) -> Vec<String> {
    let number = id.trim_start_matches("nmt-");
    let mut found = Vec::new();
    let groups = Hierarchy::all().unwrap_or_default().into_iter().map(|hierarchy| hierarchy.mount_point);
    let folders = groups.chain(["/run/netns", "/tmp", "/dev/shm"].map(PathBuf::from));
    for folder in folders {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(id) || name.ends_with(&format!("nodemesh-test-{number}")) {
                found.push(folder.join(name).display().to_string());
            }
        }
    }
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
        if line.contains(&format!("{id}/")) {
            found.push(line.replace('\0', " "));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    found.extend(mounts.lines().filter(|line| line.contains(id)).map(str::to_owned));
    found
}
