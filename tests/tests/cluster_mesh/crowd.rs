//! Many pods at once whose first act is to connect: all are answered, and nothing of theirs crosses the wire in the clear.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::Context as _;
use mesh_tests::cluster::{Cluster, ClusterNode};
use mesh_tests::web::messages::{Ask, Script, Told};
use mesh_tests::{TestResult, eventually};

use crate::scene::{LIMIT, ip_of, web_on};

/// A server that lets in nobody else answers each of them, and nodes see nothing between them but tunnels. A job ends by itself.
pub(crate) fn a_crowd_connects(cluster: &Cluster, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let stranger = ip_of(cluster, "outside", "client")?;
    let wires: Vec<Wire<'_>> =
        cluster.nodes().iter().map(|node| Wire::watched(node, stranger)).collect::<Result<_, _>>()?;
    // A pod outside of the mesh is refused, but what it sent for that was plain: it shows that such packets are counted, both ways.
    let told = cluster.pod("outside", "client").get(web_on(cluster, "b")?, "web", "/")?;
    assert_ne!(told.status, 200, "{told:?}");
    for wire in &wires {
        eventually(LIMIT, || wire.packets("strange"), |seen| seen.as_ref().is_ok_and(|seen| *seen > 0))??;
    }

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
    for wire in &wires {
        let (plain, tunnelled) = (wire.packets("plain")?, wire.packets("tunnelled")?);
        println!(
            "node {}: {plain} plain packets came in by the wire, {tunnelled} tunnelled",
            wire.node.name()
        );
        assert_eq!(plain, 0, "somebody besides {stranger} sent, or was answered, in the clear");
        assert!(tunnelled > 0, "nobody of the crowd was on the other node");
    }
    Ok(())
}

/// Counters of what a node gets over the wire from servers and from clients of servers: in the clear by a pod outside of the mesh
/// (`strange`), by anybody else (`plain`), and in tunnels of the mesh (`tunnelled`).
struct Wire<'c> {
    node: &'c ClusterNode,
}

impl<'c> Wire<'c> {
    fn watched(node: &'c ClusterNode, stranger: IpAddr) -> anyhow::Result<Self> {
        let family = if stranger.is_ipv4() { "ip" } else { "ip6" };
        let counters: String = ["strange", "plain", "tunnelled"]
            .map(|name| format!("counter {name} {{\n packets 0 bytes 0\n}}\n"))
            .concat();
        // Before anything on the node can drop, translate or redirect a packet. `uplink` is a node's end of the wire.
        let table = format!(
            "table inet wire {{
                {counters}
                chain arrived {{
                    type filter hook prerouting priority -300;
                    iifname != \"uplink\" accept
                    {family} saddr {stranger} tcp dport 8080 counter name \"strange\" accept
                    {family} daddr {stranger} tcp sport 8080 counter name \"strange\" accept
                    tcp dport 8080 counter name \"plain\"
                    tcp sport 8080 counter name \"plain\"
                    tcp dport 15008 counter name \"tunnelled\"
                    tcp sport 15008 counter name \"tunnelled\"
                }}
            }}"
        );
        node.run(&["nft", &table])?;
        Ok(Self { node })
    }

    fn packets(&self, counter: &str) -> anyhow::Result<u64> {
        let listed = self.node.run(&["nft", "list", "counter", "inet", "wire", counter])?;
        let count = listed.split_whitespace().skip_while(|word| *word != "packets").nth(1);
        let count = count.and_then(|count| count.parse().ok());
        count.with_context(|| format!("no count of {counter} in {listed:?}"))
    }
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
