//! The mesh in a real cluster: running pods join it, what operators apply holds, agents come and go, and nothing is left of it.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use mesh_tests::cluster::shop::{self, STRICT};
use mesh_tests::cluster::{Cluster, ClusterPod, Mesh};
use mesh_tests::web::messages::{Ask, Script, Told};
use mesh_tests::web::{HTTP_PORT, WebLoad};
use mesh_tests::{TestResult, eventually, require_cluster, test_name};
use serde_json::Value;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// As many controllers as by default.
const TWO: &str = "controller.replicas=2";

/// The tests' image under another name, to be upgraded to.
const NEXT: &str = "localhost/nodemesh:next";

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
    uninstall_is_killed(&cluster, &mesh)?;
    assert!(mesh.remains()?.iter().any(|left| left.starts_with("node ")), "it was killed too late");
    mesh.meshctl(&["uninstall", "--purge"])?;
    assert_eq!(mesh.remains()?, Vec::<String>::new());
    let told = stranger()?;
    assert_eq!(told.status, 200, "{told:?}");
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web-v1"])?;
    Ok(cluster.rolled_out("shop", "deployment/web-v1")?)
}

/// Begins to take the mesh out, and is killed when the DaemonSet of agents is gone: who comes next cannot ask it what the nodes need.
fn uninstall_is_killed(cluster: &Cluster, mesh: &Mesh<'_>) -> TestResult {
    let mut run = mesh.command(&["uninstall"])?.spawn()?;
    let agents =
        ["get", "daemonset", "-n", "nodemesh-system", "nodemesh-agent", "-o", "name", "--ignore-not-found"];
    let gone = eventually(
        LIMIT,
        || cluster.kubectl().run(&agents),
        |found| found.as_ref().is_ok_and(|found| found.trim().is_empty()),
    );
    run.kill()?;
    run.wait()?;
    gone??;
    Ok(())
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
    is_judged(cluster, "web")?;

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

/// Waits until the leading controller has said of a VirtualService that it is used.
fn is_judged(cluster: &Cluster, name: &str) -> TestResult {
    let path = r#"jsonpath={.status.conditions[?(@.type=="Reconciled")].status}"#;
    let status = || cluster.kubectl().run(&["get", "virtualservice", "-n", "shop", name, "-o", path]);
    eventually(LIMIT, status, |status| status.as_ref().is_ok_and(|status| status == "True"))??;
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
    let mesh = Mesh::install_with(&cluster, &[TWO])?;
    agents_are_rolled(&cluster)?;
    kubectl.apply(shop::SPACES)?;
    mesh.enrol("shop")?;
    kubectl.apply(STRICT)?;
    shop::open(&cluster)?;
    mesh.all_enrolled("shop")?;
    let web = shop::address(&cluster, "web")?;
    let client = cluster.pod("shop", "client");
    is_served(&client, web)?;

    // A server that lets in nobody else answers each of them: not one first packet was plain. A job ends by itself.
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

    // An agent that is killed comes back by itself, and what was enrolled is served as before.
    let load = client.load_by(cluster.node("a")?, &shop::mix(web, "web"))?;
    load.go_on(50, LIMIT)?;
    for agent in parts(&cluster, "agent")? {
        let before = restarts(&cluster)?;
        kill(&cluster, &agent)?;
        eventually(LIMIT, || restarts(&cluster), |now| now.as_ref().is_ok_and(|now| *now > before))??;
        cluster.rolled_out("nodemesh-system", "daemonset/nodemesh-agent")?;
    }
    served_without_failure(&load)?;

    everything_is_upgraded(&cluster, &mesh, &load)?;
    the_api_server_dies_and_comes_back(&cluster, &load, web)?;
    the_leader_dies(&cluster, &load)?;
    drop(load);
    nobody_leads(&cluster, &mesh, web)
}

/// An upgrade replaces controllers and agents; each agent takes the listening sockets of the one before it, and nobody notices.
fn everything_is_upgraded(cluster: &Cluster, mesh: &Mesh<'_>, load: &WebLoad) -> TestResult {
    for node in cluster.nodes() {
        node.run(&["ctr", "--namespace=k8s.io", "images", "tag", "localhost/nodemesh:dev", NEXT])?;
    }
    let before = load.report();
    mesh.upgrade_with(&[TWO, &format!("image={NEXT}")])?;
    for (kind, part, count) in [("daemonset", "agent", 2), ("deployment", "controller", 2)] {
        cluster.rolled_out("nodemesh-system", &format!("{kind}/nodemesh-{part}"))?;
        let images: Vec<Value> =
            parts(cluster, part)?.iter().map(|pod| pod["spec"]["containers"][0]["image"].clone()).collect();
        assert_eq!(images, vec![NEXT; count], "{part}");
    }
    assert_eq!(restarts(cluster)?, 0);
    let after = load.go_on(200, LIMIT)?;
    println!("upgraded: {} good", after.ok() - before.ok());
    assert_eq!(after.failed, before.failed, "failed since the mesh was upgraded");
    Ok(())
}

/// Nobody notices, and what is made afterwards counts.
fn the_api_server_dies_and_comes_back(cluster: &Cluster, load: &WebLoad, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let before = load.report();
    cluster.stop_api_server();
    load.go_on(200, LIMIT)?;
    cluster.start_api_server()?;

    kubectl.apply(&shop::newcomer("late"))?;
    runs(cluster, "late")?;
    let late = cluster.pod("shop", "late");
    is_served(&late, web)?;
    kubectl.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: not-late, namespace: shop}, spec: {action: DENY, \
         rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/late]}}]}]}}",
    )?;
    let refused = |told: &anyhow::Result<Told>| told.as_ref().is_ok_and(|told| told.status != 200);
    eventually(LIMIT, || late.get(web, "web", "/"), refused)??;
    let after = load.go_on(100, LIMIT)?;
    assert_eq!(after.failed, before.failed, "failed since the API server was killed");
    Ok(())
}

/// Another one takes its place, and nobody notices.
fn the_leader_dies(cluster: &Cluster, load: &WebLoad) -> TestResult {
    let leader = || -> anyhow::Result<(String, Value)> {
        let lease = ["get", "lease", "-n", "nodemesh-system", "nodemesh-controller", "-o"];
        let holder = cluster.kubectl().run(&[&lease[..], &["jsonpath={.spec.holderIdentity}"]].concat())?;
        let mut pods = parts(cluster, "controller")?.into_iter();
        // Each start of a controller is somebody else, so that none takes up what the one before it left.
        let is_it = |pod: &Value| {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            holder.strip_prefix(name).is_some_and(|rest| rest.starts_with('_'))
        };
        let pod = pods.find(is_it).with_context(|| format!("{holder:?} is no pod"))?;
        Ok((holder, pod))
    };
    let before = load.report();
    let (first, pod) = eventually(LIMIT, leader, Result::is_ok)??;
    kill(cluster, &pod)?;
    let another = |now: &anyhow::Result<(String, Value)>| now.as_ref().is_ok_and(|(now, _)| *now != first);
    let (second, _) = eventually(LIMIT, leader, another)??;
    println!("{first} led, now {second} does");
    cluster.kubectl().apply(
        "{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: v1, namespace: shop}, spec: {hosts: [web-v1], \
         http: [{route: [{destination: {host: web-v1}}]}]}}",
    )?;
    is_judged(cluster, "v1")?;
    let after = load.go_on(100, LIMIT)?;
    assert_eq!(after.failed, before.failed, "failed since the leader was killed");
    Ok(())
}

/// Without a controller, pods start and are served as far as identities allow that their node knows; what cannot work says why.
fn nobody_leads(cluster: &Cluster, mesh: &Mesh<'_>, web: SocketAddr) -> TestResult {
    let kubectl = cluster.kubectl();
    let scale = |replicas: &str| {
        kubectl.run(&["scale", "-n", "nodemesh-system", "deployment/nodemesh-controller", replicas])
    };
    scale("--replicas=0")?;
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
    kubectl.apply(&[shop::client("shop"), shop::newcomer("stranger")].concat())?;
    for pod in ["client", "stranger"] {
        runs(cluster, pod)?;
    }
    is_served(&cluster.pod("shop", "client"), web)?;

    // To servers of its own node a pod is who the node says it is; to others it would have to prove it.
    let stranger = cluster.pod("shop", "stranger");
    let far = web_on(cluster, "b")?;
    is_served(&stranger, web_on(cluster, "a")?)?;
    let told = stranger.get(far, "web", "/")?;
    assert_ne!(told.status, 200, "{told:?}");
    let why = || -> anyhow::Result<String> {
        let answer = mesh.ask(&["certificates", "--node", "a"])?;
        let rows = answer["certificates"].as_array().context("no certificates")?;
        let is_its = |row: &&Value| row["identity"].as_str().is_some_and(|id| id.ends_with("/sa/stranger"));
        let row = rows.iter().find(is_its).with_context(|| format!("not in {answer}"))?;
        Ok(row["last_error"].as_str().unwrap_or_default().to_owned())
    };
    let is_said = |why: &str| why.contains("the CA is not available");
    eventually(LIMIT, why, |why| why.as_ref().is_ok_and(|why| is_said(why)))??;
    let status = mesh.ask(&["status", "--node", "a"])?;
    assert!(status["identity"]["reason"].as_str().is_some_and(is_said), "{status:#}");
    assert_eq!(status["controller"]["connected"], false, "{status:#}");

    scale("--replicas=1")?;
    is_served(&stranger, far)
}

/// Waits until a pod of the shop is ready.
fn runs(cluster: &Cluster, pod: &str) -> TestResult {
    let pod = format!("pod/{pod}");
    cluster.kubectl().run(&["wait", &pod, "-n", "shop", "--for=condition=Ready", "--timeout=120s"])?;
    Ok(())
}

/// Waits until a server answers a pod.
fn is_served(client: &ClusterPod, to: SocketAddr) -> TestResult {
    let served = |told: &anyhow::Result<Told>| told.as_ref().is_ok_and(|told| told.status == 200);
    eventually(LIMIT, || client.get(to, "web", "/"), served)??;
    Ok(())
}

/// One of the servers on a node.
fn web_on(cluster: &Cluster, node: &str) -> anyhow::Result<SocketAddr> {
    let pods = cluster.kubectl().json(&["get", "pods", "-n", "shop", "-l", "app=web"])?;
    let mut pods = pods["items"].as_array().into_iter().flatten();
    let pod = pods.find(|pod| pod["spec"]["nodeName"] == node).with_context(|| format!("none on {node}"))?;
    let ip = pod["status"]["podIP"].as_str().context("no address")?;
    Ok(SocketAddr::new(ip.parse()?, HTTP_PORT))
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
    let count = |pod: &Value| pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64);
    Ok(parts(cluster, "agent")?.iter().filter_map(count).sum())
}

/// The agents or the controllers that are to stay.
fn parts(cluster: &Cluster, part: &str) -> anyhow::Result<Vec<Value>> {
    let selector = format!("app.kubernetes.io/name=nodemesh-{part}");
    let pods = cluster.kubectl().json(&["get", "pods", "-n", "nodemesh-system", "-l", &selector])?;
    let mut pods = pods["items"].as_array().cloned().unwrap_or_default();
    pods.retain(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    Ok(pods)
}

/// SIGKILL to the program of such a pod.
fn kill(cluster: &Cluster, pod: &Value) -> TestResult {
    let node = pod["spec"]["nodeName"].as_str().context("no node")?;
    let uid = pod["metadata"]["uid"].as_str().context("no uid")?;
    Ok(cluster.node(node)?.kill_in_pod(uid, "mesh-agent")?)
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
