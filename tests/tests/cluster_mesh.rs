//! The mesh in a real cluster: running pods join it, what operators apply holds, agents come and go, and nothing is left of it.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use mesh_tests::cluster::shop::{self, STRICT};
use mesh_tests::cluster::{Cluster, Mesh};
use mesh_tests::web::WebLoad;
use mesh_tests::web::messages::{Ask, Script, Told};
use mesh_tests::{TestResult, eventually, require_cluster, test_name};
use serde_json::Value;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn running_pods_join_and_what_is_applied_holds_and_nothing_is_left() -> TestResult {
    require_cluster!();
    let cluster = Cluster::start(test_name!(), &["a", "b"])?;
    let kubectl = cluster.kubectl();
    shop::open(&cluster)?;
    let web = shop::address(&cluster, "web")?;
    let (client, outsider) = (cluster.pod("shop", "client"), cluster.pod("outside", "client"));
    let mesh = Mesh::install(&cluster)?;
    assert!(mesh.remains()?.len() > 20, "this would find nothing");
    let verified = mesh.meshctl(&["verify"])?;
    assert!(verified.contains("0 errors, 0 warnings"), "{verified}");

    // A running namespace joins, and no connection notices.
    let load = client.load(&shop::mix(web, "web"))?;
    load.go_on(100, LIMIT)?;
    assert_eq!(mesh.enrolled("shop")?, Vec::<String>::new());
    mesh.enrol("shop")?;
    println!("enrolled after {:?}", mesh.all_enrolled("shop")?);
    let seen = load.go_on(300, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");

    // Only the mesh gets in.
    let stranger = || outsider.get(web, "web", "/");
    assert_eq!(stranger()?.status, 200);
    kubectl.apply(STRICT)?;
    eventually(LIMIT, stranger, |told| told.as_ref().is_ok_and(|told| told.status == 0))??;
    let seen = load.go_on(300, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    let own = client.get(web, "web", "/")?;
    assert_eq!(own.status, 200, "{own:?}");

    // New pods become ready though only the mesh gets in: probes do; and the old ones go without a failed request.
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web-v1"])?;
    cluster.rolled_out("shop", "deployment/web-v1")?;
    let seen = load.go_on(300, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    mesh.all_enrolled("shop")?;

    what_is_applied_holds(&cluster, &mesh, web)?;
    let seen = load.go_on(100, LIMIT)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    drop(load);
    tokens_open_nothing_else(&cluster)?;

    // All of it goes again.
    kubectl.run(&["delete", "peerauthentication", "-n", "shop", "--all"])?;
    kubectl.run(&["delete", "virtualservice", "-n", "shop", "--all"])?;
    mesh.meshctl(&["uninstall", "--purge"])?;
    assert_eq!(mesh.remains()?, Vec::<String>::new());
    let told = stranger()?;
    assert_eq!(told.status, 200, "{told:?}");
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web-v1"])?;
    Ok(cluster.rolled_out("shop", "deployment/web-v1")?)
}

/// A split, a policy and a broken resource.
fn what_is_applied_holds(cluster: &Cluster, mesh: &Mesh<'_>, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let split = |v1: u8, v2: u8| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: web, namespace: shop}}, spec: {{hosts: [web], \
             http: [{{route: [{{destination: {{host: web-v1}}, weight: {v1}}}, {{destination: {{host: web-v2}}, weight: {v2}}}]}}]}}}}"
        )
    };
    let client = cluster.pod("shop", "client");
    let versions = || -> anyhow::Result<(usize, usize)> {
        let script = Script { to: web, http2: false, requests: vec![Ask::get("web", "/"); 60] };
        let told = client.ask(&script)?;
        ensure!(told.iter().all(|told| told.status == 200), "{told:?}");
        let v2 = told.iter().filter(|told| told.seen().is_ok_and(|seen| seen.server == "v2")).count();
        Ok((told.len() - v2, v2))
    };
    kubectl.apply(&split(0, 100))?;
    eventually(LIMIT, versions, |seen| seen.as_ref().is_ok_and(|seen| *seen == (0, 60)))??;
    kubectl.apply(&split(90, 10))?;
    eventually(LIMIT, versions, |seen| seen.as_ref().is_ok_and(|(v1, v2)| v1 > v2 && *v2 > 0))??;
    let path = r#"jsonpath={.status.conditions[?(@.type=="Reconciled")].status}"#;
    let status = || kubectl.run(&["get", "virtualservice", "-n", "shop", "web", "-o", path]);
    eventually(LIMIT, status, |status| status.as_ref().is_ok_and(|status| status == "True"))??;

    // The other namespace joins too, and is let in until a policy says otherwise.
    mesh.enrol("outside")?;
    let neighbour = || cluster.pod("outside", "client").get(web, "web", "/");
    let let_in = |told: &anyhow::Result<Told>| told.as_ref().is_ok_and(|told| told.status == 200);
    eventually(LIMIT, neighbour, let_in)??;
    kubectl.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: not-you, namespace: shop}, spec: {action: DENY, \
         rules: [{from: [{source: {namespaces: [outside]}}]}]}}",
    )?;
    eventually(LIMIT, neighbour, |told| !let_in(told))??;
    kubectl.run(&["delete", "authorizationpolicy", "-n", "shop", "not-you"])?;
    eventually(LIMIT, neighbour, let_in)??;

    let broken = split(90, 10).replace("weight: 90", "weight: 90, weigth: 1");
    let refused = kubectl.apply(&broken).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("weigth"), "{refused}");
    let broken = split(90, 10).replace("host: web-v1", "host: ''");
    let refused = kubectl.apply(&broken).err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("spec.http[0].route[0].destination.host"), "{refused}");
    Ok(())
}

/// What somebody can do who has stolen an agent's token.
fn tokens_open_nothing_else(cluster: &Cluster) -> TestResult {
    let may = |verb: &str, what: &str| {
        let account = "--as=system:serviceaccount:nodemesh-system:nodemesh-agent";
        let answer = cluster.kubectl().run(&["auth", "can-i", verb, what, "-A", account]);
        answer.is_ok_and(|answer| answer.trim() == "yes")
    };
    assert!(may("list", "pods"));
    for (verb, what) in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("get", "configmaps"),
        ("create", "pods"),
        ("patch", "pods"),
        ("patch", "nodes"),
        ("create", "serviceaccounts/token"),
        ("create", "tokenreviews"),
    ] {
        assert!(!may(verb, what), "an agent's token may {verb} {what}");
    }
    Ok(())
}

#[test]
fn pods_whose_first_act_is_to_connect_are_meshed_and_agents_come_and_go() -> TestResult {
    require_cluster!();
    let cluster = Cluster::start(test_name!(), &["a", "b"])?;
    let kubectl = cluster.kubectl();
    let mesh = Mesh::install(&cluster)?;
    agents_are_rolled(&cluster)?;
    kubectl.apply(shop::SPACES)?;
    mesh.enrol("shop")?;
    kubectl.apply(STRICT)?;
    shop::open(&cluster)?;
    mesh.all_enrolled("shop")?;
    let web = shop::address(&cluster, "web")?;
    let client = cluster.pod("shop", "client");
    eventually(
        LIMIT,
        || client.get(web, "web", "/"),
        |told| told.as_ref().is_ok_and(|told| told.status == 200),
    )??;

    // A server that lets in nobody else answers each of them: not one first packet was plain. A job ends by itself.
    let crowd: usize =
        std::env::var("MESH_TESTS_CROWD").ok().and_then(|crowd| crowd.parse().ok()).unwrap_or(24);
    kubectl.apply(&job(web, crowd)?)?;
    kubectl.run(&["wait", "job/first", "-n", "shop", "--for=condition=Complete", "--timeout=400s"])?;
    let logs = ["logs", "-n", "shop", "-l", "app=first", "--tail=-1", "--max-log-requests=300"];
    let logs = kubectl.run(&logs)?;
    let told: Vec<Told> = logs
        .lines()
        .map(|line| Ok(serde_json::from_str::<Vec<Told>>(line)?))
        .collect::<anyhow::Result<Vec<_>>>()?
        .concat();
    let failed: Vec<&Told> = told.iter().filter(|told| told.status != 200).collect();
    assert!(failed.is_empty() && told.len() == crowd, "{} of {crowd}: {failed:?}", told.len());

    // An agent that is killed comes back by itself, and what was enrolled is served as before.
    let load = client.load(&shop::mix(web, "web"))?;
    load.go_on(50, LIMIT)?;
    for node in cluster.nodes() {
        let before = restarts(&cluster)?;
        node.run(&[
            "sh",
            "-c",
            "for c in /proc/[0-9]*/comm; do grep -qx mesh-agent $c && p=${c#/proc/} && \
                    grep -q cni-socket /proc/${p%/comm}/cmdline && kill -9 ${p%/comm}; done; true",
        ])?;
        eventually(LIMIT, || restarts(&cluster), |now| now.as_ref().is_ok_and(|now| *now > before))??;
        cluster.rolled_out("nodemesh-system", "daemonset/nodemesh-agent")?;
    }
    served_without_failure(&load)?;

    // A roll-out of agents: each takes the listening sockets of the one before it, and nobody notices.
    let before = load.report();
    agents_are_rolled(&cluster)?;
    let after = load.go_on(200, LIMIT)?;
    println!("rolled: {} good", after.ok() - before.ok());
    assert_eq!(after.failed, before.failed, "failed since the agents were rolled");

    // Without a controller, pods of known namespaces still start and are served.
    kubectl.run(&["scale", "-n", "nodemesh-system", "deployment/nodemesh-controller", "--replicas=0"])?;
    let controllers = [
        "get",
        "pods",
        "-n",
        "nodemesh-system",
        "-l",
        "app.kubernetes.io/name=nodemesh-controller",
        "-o",
        "name",
    ];
    eventually(
        LIMIT,
        || kubectl.run(&controllers),
        |left| left.as_ref().is_ok_and(|left| left.trim().is_empty()),
    )??;
    kubectl.run(&["delete", "pod", "-n", "shop", "client", "--wait"])?;
    drop(load);
    kubectl.apply(&shop::client("shop"))?;
    kubectl.run(&["wait", "pod/client", "-n", "shop", "--for=condition=Ready", "--timeout=120s"])?;
    let told = eventually(
        LIMIT,
        || client.get(web, "web", "/"),
        |told| told.as_ref().is_ok_and(|told| told.status == 200),
    )??;
    assert_eq!(told.status, 200);
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

/// Replaces all agents; none of the new ones had to be started twice, on nodes with connections and without.
fn agents_are_rolled(cluster: &Cluster) -> TestResult {
    cluster.kubectl().run(&["rollout", "restart", "-n", "nodemesh-system", "daemonset/nodemesh-agent"])?;
    cluster.rolled_out("nodemesh-system", "daemonset/nodemesh-agent")?;
    assert_eq!(restarts(cluster)?, 0);
    Ok(())
}

/// How often containers of agents were started again, of those that are to stay.
fn restarts(cluster: &Cluster) -> anyhow::Result<u64> {
    let selector = "app.kubernetes.io/name=nodemesh-agent";
    let pods = cluster.kubectl().json(&["get", "pods", "-n", "nodemesh-system", "-l", selector])?;
    let pods = pods["items"].as_array().into_iter().flatten();
    let staying = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    Ok(staying
        .filter_map(|pod| pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64))
        .sum())
}

/// Waits for a while without a failed request.
fn served_without_failure(load: &WebLoad) -> TestResult {
    let quiet = || {
        let before = load.report().failures();
        load.go_on(200, LIMIT).map(|now| now.failures() - before)
    };
    eventually(LIMIT, quiet, |failed| failed.as_ref().is_ok_and(|failed| *failed == 0))??;
    Ok(())
}
