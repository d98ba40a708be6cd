//! Bookinfo on the harness's cluster without a mesh: what the mesh must not make worse, and that parts of the cluster can be
//! taken away and come back under it.

use std::time::Duration;

use mesh_tests::cluster::{Bookinfo, Cluster};
use mesh_tests::{TestResult, eventually, require_cluster, test_name};

/// Visits per second on each node.
const VISITS: u32 = 5;

#[test]
fn bookinfo_is_served_while_kubelets_and_the_api_server_come_and_go() -> TestResult {
    require_cluster!();
    let cluster = Cluster::start(test_name!(), &["a", "b"])?;
    let app = Bookinfo::start(&cluster)?;
    app.visit(VISITS)?;
    app.pages(30)?;

    for node in cluster.nodes() {
        let before = kubelet(node)?;
        node.kill("kubelet")?;
        eventually(
            Duration::from_secs(30),
            || kubelet(node),
            |now| now.as_ref().is_ok_and(|now| *now != before),
        )??;
    }
    cluster.stop_api_server();
    assert!(cluster.kubectl().run(&["get", "--raw=/readyz"]).is_err(), "a stopped server answers");
    cluster.start_api_server()?;

    // Logs come from the kubelets by way of the API server: both are back.
    let seen = app.pages(30)?;
    assert!(seen.failed.is_empty(), "{seen:?}");
    assert_eq!(seen.versions.keys().collect::<Vec<_>>(), ["v1", "v2", "v3"]);
    Ok(())
}

/// The node's own number for its kubelet.
fn kubelet(node: &mesh_tests::cluster::ClusterNode) -> anyhow::Result<String> {
    let found = node.run(&["sh", "-c", "grep -lx kubelet /proc/[0-9]*/comm"])?;
    anyhow::ensure!(found.lines().count() == 1, "kubelets: {found:?}");
    Ok(found)
}
