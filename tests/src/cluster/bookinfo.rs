//! Bookinfo in a cluster: its manifests, and what its visitors have seen.

use std::time::Duration;

use anyhow::Context as _;

use super::Cluster;
use crate::bookinfo::{NAMESPACE, PORT, TrafficReport};
use crate::waiting::eventually;

/// Namespace, service accounts and services.
const FIXED: &str = include_str!("../../cluster/bookinfo.yaml");

/// `(app, version, what the program is told to be, pods)`.
const DEPLOYMENTS: [(&str, &str, &str, u8); 6] = [
    ("productpage", "v1", "productpage", 2),
    ("details", "v1", "details", 2),
    ("reviews", "v1", "reviews-v1", 2),
    ("reviews", "v2", "reviews-v2", 1),
    ("reviews", "v3", "reviews-v3", 1),
    ("ratings", "v1", "ratings", 2),
];

/// The visitors' app, one pod on each node.
const VISITORS: &str = "visitors";

/// How long everything may take to run.
const LIMIT: Duration = Duration::from_secs(180);

/// The application in a cluster's namespace `bookinfo`.
#[derive(Debug)]
pub struct Bookinfo<'c> {
    cluster: &'c Cluster,
}

impl<'c> Bookinfo<'c> {
    /// Apply it, and wait until every pod is ready. Nobody visits yet.
    ///
    /// # Errors
    /// When a manifest is refused or a pod does not become ready.
    pub fn start(cluster: &'c Cluster) -> anyhow::Result<Self> {
        let deployments: String = DEPLOYMENTS.iter().map(deployment).collect();
        cluster.kubectl().apply(&format!("{FIXED}{deployments}")).context("apply Bookinfo")?;
        let app = Self { cluster };
        for (name, version, ..) in DEPLOYMENTS {
            app.wait_for(&format!("deployment/{name}-{version}"))?;
        }
        Ok(app)
    }

    /// Let visitors come to every node, so many a second on each.
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn visit(&self, per_second: u32) -> anyhow::Result<()> {
        self.cluster.kubectl().apply(&visitors(per_second)).context("apply the visitors")?;
        self.wait_for(&format!("daemonset/{VISITORS}"))
    }

    /// What all visitors have seen together; latencies are those of the slower node.
    ///
    /// # Errors
    /// When a visitor cannot be asked.
    pub fn traffic(&self) -> anyhow::Result<TrafficReport> {
        let kubectl = self.cluster.kubectl();
        let selector = format!("app={VISITORS}");
        let names = kubectl.run(&["get", "pods", "-n", NAMESPACE, "-l", &selector, "-o", "name"])?;
        let mut total = TrafficReport::default();
        for pod in names.lines() {
            let line = kubectl.run(&["logs", "-n", NAMESPACE, pod, "--tail=1"])?;
            // A visitor that has just come has not seen anything.
            let Ok(report) = serde_json::from_str::<TrafficReport>(&line) else { continue };
            total.add(&report);
        }
        Ok(total)
    }

    /// Wait until visitors have seen so many more complete pages, and return all they have seen.
    ///
    /// # Errors
    /// When they do not.
    pub fn pages(&self, more: u64) -> anyhow::Result<TrafficReport> {
        let before = self.traffic()?.ok;
        let enough = |seen: &anyhow::Result<TrafficReport>| {
            seen.as_ref().map_or(true, |report| report.ok >= before + more)
        };
        eventually(LIMIT, || self.traffic(), enough)?
    }

    fn wait_for(&self, what: &str) -> anyhow::Result<()> {
        let within = format!("--timeout={}s", LIMIT.as_secs());
        let status = self.cluster.kubectl().run(&["rollout", "status", "-n", NAMESPACE, what, &within]);
        status.map(drop).with_context(|| format!("{what} does not come up"))
    }
}

fn deployment(row: &(&str, &str, &str, u8)) -> String {
    let (app, version, kind, pods) = row;
    format!(
        r#"
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {app}-{version}
  namespace: {NAMESPACE}
  labels: {{app: {app}, version: {version}}}
spec:
  replicas: {pods}
  selector: {{matchLabels: {{app: {app}, version: {version}}}}}
  template:
    metadata: {{labels: {{app: {app}, version: {version}}}}}
    spec:
      serviceAccountName: bookinfo-{app}
      terminationGracePeriodSeconds: 2
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        labelSelector: {{matchLabels: {{app: {app}, version: {version}}}}}
      containers:
      - name: {app}
        image: localhost/apps:test
        imagePullPolicy: Never
        command: [/bookinfo, serve, {kind}, --pod, $(POD)]
        env: [{{name: POD, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}]
        ports: [{{name: http, containerPort: {PORT}}}]
        readinessProbe: {{tcpSocket: {{port: {PORT}}}, periodSeconds: 1}}
"#
    )
}

fn visitors(per_second: u32) -> String {
    format!(
        r#"
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: {VISITORS}
  namespace: {NAMESPACE}
  labels: {{app: {VISITORS}}}
spec:
  selector: {{matchLabels: {{app: {VISITORS}}}}}
  template:
    metadata: {{labels: {{app: {VISITORS}}}}}
    spec:
      serviceAccountName: bookinfo-visitors
      terminationGracePeriodSeconds: 0
      containers:
      - name: {VISITORS}
        image: localhost/apps:test
        imagePullPolicy: Never
        command: [/bookinfo, visit, --per-second, "{per_second}"]
"#
    )
}
