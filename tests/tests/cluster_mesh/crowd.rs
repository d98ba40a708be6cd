//! Many pods at once whose first act is to connect.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Instant;

use mesh_tests::TestResult;
use mesh_tests::cluster::Cluster;
use mesh_tests::web::messages::{Ask, Script, Told};

/// A server that lets in nobody else answers each of them: not one first packet was plain. A job ends by itself.
pub(crate) fn a_crowd_connects(cluster: &Cluster, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let crowd: usize =
        std::env::var("MESH_TESTS_CROWD").ok().and_then(|crowd| crowd.parse().ok()).unwrap_or(200);
    let begun = Instant::now();
    kubectl.apply(&job(web, crowd)?)?;
    kubectl.run(&["wait", "job/first", "-n", "shop", "--for=condition=Complete", "--timeout=900s"])?;
    println!("{crowd} pods have connected after {:?}", begun.elapsed());
    let logs = ["logs", "-n", "shop", "-l", "app=first", "--tail=-1", "--max-log-requests=300"];
    let logs = kubectl.run(&logs)?;
    let told: Vec<Told> = logs
        .lines()
        .map(|line| Ok(serde_json::from_str::<Vec<Told>>(line)?))
        .collect::<anyhow::Result<Vec<_>>>()?
        .concat();
    let failed: Vec<&Told> = told.iter().filter(|told| told.status != 200).collect();
    assert!(failed.is_empty() && told.len() == crowd, "{} of {crowd}: {failed:?}", told.len());
    Ok(())
}

/// Pods that connect before they do anything else, all at once.
fn job(to: SocketAddr, count: usize) -> anyhow::Result<String> {
    let script = serde_json::to_string(&Script { to, http2: false, requests: vec![Ask::get("web", "/")] })?;
    let mut text = String::new();
    write!(
        text,
        r#"
apiVersion: batch/v1
kind: Job
metadata: {{name: first, namespace: shop}}
spec:
  parallelism: {count}
  completions: {count}
  backoffLimit: 0
  template:
    metadata: {{labels: {{app: first}}}}
    spec:
      restartPolicy: Never
      containers:
      - name: app
        image: localhost/apps:test
        imagePullPolicy: Never
        command: [/pod-tool, ask, {}]
"#,
        serde_json::to_string(&script)?
    )?;
    Ok(text)
}
