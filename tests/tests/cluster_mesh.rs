//! The mesh in a real cluster: running pods join it, what operators apply holds, agents come and go, and nothing is left of it.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use mesh_tests::cluster::{Cluster, Mesh};
use mesh_tests::web::messages::{Ask, Mix, MixReport, Script, Told};
use mesh_tests::{TestResult, eventually, require_cluster, test_name};
use serde_json::Value;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

const SPACES: &str = r"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
";

/// Pods that serve HTTP and say their version, probed in every way; and a service of them.
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

const SERVICE: &str = r"
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
";

/// A pod on node a that tests run programs in.
fn client(namespace: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: {namespace}, labels: {{app: client}}}}
spec:
  nodeName: a
  terminationGracePeriodSeconds: 0
  containers:
  - name: app
    image: localhost/apps:test
    imagePullPolicy: Never
    command: [/pod-tool, web, '{{"name": "client", "failing": false}}']
---
"#
    )
}

/// The namespaces with two versions of the server and a client in each.
fn open_shop(cluster: &Cluster) -> TestResult {
    let mut objects = SPACES.to_owned() + SERVICE;
    for part in [web("v1", 2), web("v2", 2), client("shop"), client("outside")] {
        objects.push_str(&part);
    }
    cluster.kubectl().apply(&objects)?;
    for version in ["v1", "v2"] {
        rolled_out(cluster, "shop", &format!("deployment/web-{version}"))?;
    }
    for namespace in ["shop", "outside"] {
        cluster.kubectl().run(&[
            "wait",
            "pod/client",
            "-n",
            namespace,
            "--for=condition=Ready",
            "--timeout=120s",
        ])?;
    }
    Ok(())
}

fn rolled_out(cluster: &Cluster, namespace: &str, what: &str) -> TestResult {
    cluster.kubectl().run(&["rollout", "status", "-n", namespace, what, "--timeout=180s"])?;
    Ok(())
}

fn address(cluster: &Cluster, service: &str) -> anyhow::Result<SocketAddr> {
    let service = cluster.kubectl().json(&["get", "service", "-n", "shop", service])?;
    let ip = service["spec"]["clusterIP"].as_str().context("no clusterIP")?;
    Ok(SocketAddr::new(ip.parse()?, 80))
}

/// One request from a client pod.
fn ask(cluster: &Cluster, namespace: &str, to: SocketAddr, ask: Ask) -> anyhow::Result<Told> {
    let script = serde_json::to_string(&Script { to, http2: false, requests: vec![ask] })?;
    let exec = ["exec", "-n", namespace, "client", "--", "/pod-tool", "ask", &script];
    let answer = cluster.kubectl().run(&exec)?;
    let told: Vec<Told> = serde_json::from_str(&answer)?;
    told.into_iter().next().ok_or_else(|| anyhow!("no answer: {answer}"))
}

/// Clients of the service in the shop's client pod, of all kinds.
struct Load {
    child: Child,
    stdin: Option<ChildStdin>,
    latest: Arc<Mutex<MixReport>>,
}

impl Load {
    fn start(cluster: &Cluster) -> anyhow::Result<Self> {
        let mix = Mix {
            http: address(cluster, "web")?,
            host: "web".to_owned(),
            keep_alive: 2,
            short: 3,
            http2: 1,
            tcp: None,
            pause_ms: 20,
        };
        let mix = serde_json::to_string(&mix)?;
        let mut command = cluster.kubectl().command(&[
            "exec",
            "-i",
            "-n",
            "shop",
            "client",
            "--",
            "/pod-tool",
            "web-load",
            &mix,
        ]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("invariant: piped")?;
        let latest = Arc::new(Mutex::new(MixReport::default()));
        let write = Arc::clone(&latest);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let Ok(report) = serde_json::from_str(&line) else { return };
                *write.lock().unwrap_or_else(PoisonError::into_inner) = report;
            }
        });
        Ok(Self { stdin: child.stdin.take(), child, latest })
    }

    fn report(&self) -> MixReport {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for so many more good answers; what failed meanwhile is in the report.
    fn go_on(&self, more: u64) -> anyhow::Result<MixReport> {
        let before = self.report().ok();
        Ok(eventually(LIMIT, || self.report(), |now| now.ok() >= before + more)?)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        drop(self.stdin.take());
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn running(cluster: &Cluster, namespace: &str) -> anyhow::Result<usize> {
    let pods = cluster.kubectl().json(&["get", "pods", "-n", namespace])?;
    Ok(pods["items"].as_array().map_or(0, Vec::len))
}

/// Waits until all pods of the shop are in the mesh; how long that took.
fn all_enrolled(cluster: &Cluster, mesh: &Mesh<'_>) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let look = || Ok::<_, anyhow::Error>((mesh.enrolled("shop")?.len(), running(cluster, "shop")?));
    eventually(LIMIT, look, |seen| seen.as_ref().is_ok_and(|(is, want)| is == want))??;
    Ok(began.elapsed())
}

const STRICT: &str = r"
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
";

#[test]
fn running_pods_join_and_what_is_applied_holds_and_nothing_is_left() -> TestResult {
    require_cluster!();
    let cluster = Cluster::start(test_name!(), &["a", "b"])?;
    let kubectl = cluster.kubectl();
    open_shop(&cluster)?;
    let mesh = Mesh::install(&cluster)?;
    let verified = mesh.meshctl(&["verify"])?;
    assert!(verified.contains("0 errors, 0 warnings"), "{verified}");

    // A running namespace joins, and no connection notices.
    let load = Load::start(&cluster)?;
    load.go_on(100)?;
    assert_eq!(mesh.enrolled("shop")?, Vec::<String>::new());
    mesh.enrol("shop")?;
    println!("enrolled after {:?}", all_enrolled(&cluster, &mesh)?);
    let seen = load.go_on(300)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");

    // Only the mesh gets in.
    let web = address(&cluster, "web")?;
    let stranger = || ask(&cluster, "outside", web, Ask::get("web", "/"));
    assert_eq!(stranger()?.status, 200);
    kubectl.apply(STRICT)?;
    eventually(LIMIT, stranger, |told| told.as_ref().is_ok_and(|told| told.status == 0))??;
    let seen = load.go_on(300)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    let own = ask(&cluster, "shop", web, Ask::get("web", "/"))?;
    assert_eq!(own.status, 200, "{own:?}");

    // New pods become ready though only the mesh gets in: probes do; and the old ones go without a failed request.
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web-v1"])?;
    rolled_out(&cluster, "shop", "deployment/web-v1")?;
    let seen = load.go_on(300)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    all_enrolled(&cluster, &mesh)?;

    what_is_applied_holds(&cluster, &mesh, web)?;
    let seen = load.go_on(100)?;
    assert_eq!(seen.failures(), 0, "{seen:?}");
    drop(load);
    tokens_open_nothing_else(&cluster)?;

    // All of it goes again.
    kubectl.run(&["delete", "peerauthentication", "-n", "shop", "--all"])?;
    kubectl.run(&["delete", "virtualservice", "-n", "shop", "--all"])?;
    mesh.meshctl(&["uninstall", "--purge"])?;
    nothing_is_left(&cluster)?;
    let told = ask(&cluster, "outside", web, Ask::get("web", "/"))?;
    assert_eq!(told.status, 200, "{told:?}");
    kubectl.run(&["rollout", "restart", "-n", "shop", "deployment/web-v1"])?;
    rolled_out(&cluster, "shop", "deployment/web-v1")
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
    let versions = || -> anyhow::Result<(usize, usize)> {
        let script = Script { to: web, http2: false, requests: vec![Ask::get("web", "/"); 60] };
        let script = serde_json::to_string(&script)?;
        let answer = kubectl.run(&["exec", "-n", "shop", "client", "--", "/pod-tool", "ask", &script])?;
        let told: Vec<Told> = serde_json::from_str(&answer)?;
        ensure!(told.iter().all(|told| told.status == 200), "{answer}");
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
    let neighbour = || ask(cluster, "outside", web, Ask::get("web", "/"));
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

/// Neither in the cluster nor on its nodes.
fn nothing_is_left(cluster: &Cluster) -> TestResult {
    let kinds = "crd,clusterrole,clusterrolebinding,validatingwebhookconfiguration,namespace";
    let of_ours = ["get", kinds, "-l", "app.kubernetes.io/part-of=nodemesh", "-o", "name"];
    let left = cluster.kubectl().run(&of_ours)?;
    assert_eq!(left.trim(), "");
    for node in cluster.nodes() {
        let chains = node.run(&["sh", "-c", "cat /etc/cni/net.d/*; ls /opt/cni/bin"])?;
        assert!(!chains.contains("nodemesh"), "{}: {chains}", node.name());
        let pins = node.run(&["ls", "/sys/fs/bpf"])?;
        assert!(!pins.contains("nodemesh"), "{}: {pins}", node.name());
        let sockets = node.run(&["sh", "-c", "ls /run/nodemesh 2>/dev/null || true"])?;
        assert!(!sockets.contains("sock"), "{}: {sockets}", node.name());
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
    kubectl.apply(SPACES)?;
    mesh.enrol("shop")?;
    kubectl.apply(STRICT)?;
    open_shop(&cluster)?;
    all_enrolled(&cluster, &mesh)?;
    let web = address(&cluster, "web")?;
    eventually(
        LIMIT,
        || ask(&cluster, "shop", web, Ask::get("web", "/")),
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
    let load = Load::start(&cluster)?;
    load.go_on(50)?;
    for node in cluster.nodes() {
        let before = restarts(&cluster)?;
        node.run(&[
            "sh",
            "-c",
            "for c in /proc/[0-9]*/comm; do grep -qx mesh-agent $c && p=${c#/proc/} && \
                    grep -q cni-socket /proc/${p%/comm}/cmdline && kill -9 ${p%/comm}; done; true",
        ])?;
        eventually(LIMIT, || restarts(&cluster), |now| now.as_ref().is_ok_and(|now| *now > before))??;
        rolled_out(&cluster, "nodemesh-system", "daemonset/nodemesh-agent")?;
    }
    served_without_failure(&load)?;

    // A roll-out of agents: each takes over from the one before it.
    let before = load.report();
    agents_are_rolled(&cluster)?;
    let after = load.report();
    println!(
        "rolled: {} of {} failed: {:?}",
        after.failures() - before.failures(),
        after.ok() - before.ok(),
        after.failed
    );
    served_without_failure(&load)?;

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
    kubectl.apply(&client("shop"))?;
    kubectl.run(&["wait", "pod/client", "-n", "shop", "--for=condition=Ready", "--timeout=120s"])?;
    let told = eventually(
        LIMIT,
        || ask(&cluster, "shop", web, Ask::get("web", "/")),
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
    rolled_out(cluster, "nodemesh-system", "daemonset/nodemesh-agent")?;
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
fn served_without_failure(load: &Load) -> TestResult {
    let quiet = || {
        let before = load.report().failures();
        load.go_on(200).map(|now| now.failures() - before)
    };
    eventually(LIMIT, quiet, |failed| failed.as_ref().is_ok_and(|failed| *failed == 0))??;
    Ok(())
}
