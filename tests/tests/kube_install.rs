//! `meshctl install` and the Helm chart against a real API server: what they make is accepted, the same, and goes again.
//!
//! There are no nodes and no controllers here, so nothing becomes ready and a namespace is ended by the test itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::anyhow;
use mesh_tests::cluster::{ApiServer, Binaries};
use mesh_tests::{TestResult, eventually, programs, require_api_server, test_name};
use serde_json::{Value, json};

const NAMESPACE: &str = "nodemesh-system";
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/helm/nodemesh");

/// Values that differ from the defaults in every form that a value has.
const VALUES: &str = r#"
image: registry.example:5000/mesh@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
imagePullPolicy: Always
imagePullSecrets: [{name: registry}]
clusterDomain: example.internal
rootNamespace: mesh-root
listenAddress: "[::]"
meshConfig:
  trustDomain: prod.example
  outboundTrafficPolicy: {mode: REGISTRY_ONLY}
  defaultConfig: {concurrency: 2}
logging: {level: "info,mesh_proxy=debug", format: json}
controller:
  replicas: 3
  readSecrets: true
  resources: {requests: {cpu: "1"}, limits: null}
  nodeSelector: null
  tolerations: [{key: a, operator: Equal, value: b, effect: NoExecute, tolerationSeconds: 30}]
  priorityClassName: ""
  podAnnotations: {prometheus.io/scrape: "true"}
  env: {MESH_LOG: trace, A: "1"}
agent:
  nodeSelector: {kubernetes.io/os: null, pool: mesh, disk: ""}
  nodeExpressions: [{key: pool, operator: Exists}, {key: zone, operator: In, values: [a, b]}]
  tolerations: []
  podAnnotations: {a: b}
  env: {MESH_WORKERS: 2, B: true}
  cgroupRoot: /sys/fs/cgroup/unified/$(NODE_NAME)
  proberCgroup: /sys/fs/cgroup/kubelet
  drain: 5s
  terminationGracePeriodSeconds: 10
  maxSurge: 5
cni: {binDir: /var/lib/cni/bin, confDir: /etc/other/net.d, unenrolled: allow}
webhook: {failurePolicy: Ignore, timeoutSeconds: 2}
"#;

type Made = BTreeMap<(String, String, String), Value>;

fn meshctl(kubeconfig: Option<&Path>, args: &[&str]) -> Result<Output, anyhow::Error> {
    let mut command = Command::new(programs::meshctl()?);
    command.env_remove("KUBECONFIG").env_remove("MESH_ADMIN_SOCKET");
    if let Some(kubeconfig) = kubeconfig {
        command.arg("--kubeconfig").arg(kubeconfig);
    }
    Ok(command.args(args).output()?)
}

/// Its JSON; it has to end well.
fn answer(kubeconfig: Option<&Path>, args: &[&str]) -> Result<Value, anyhow::Error> {
    let out = meshctl(kubeconfig, args)?;
    if !out.status.success() {
        // Checks say on standard output what they found.
        let said = [out.stderr, out.stdout].map(|said| String::from_utf8_lossy(&said).into_owned());
        return Err(anyhow!("meshctl {args:?}: {}", said.concat()));
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

/// Objects by kind, namespace and name. The namespace itself is left out: Helm makes it by itself.
fn by_name(objects: Vec<Value>) -> Result<Made, anyhow::Error> {
    let mut made = Made::new();
    for mut object in objects {
        if object.is_null() || text(&object, "/kind") == "Namespace" {
            continue;
        }
        // A text that is YAML again is compared by what it means.
        if text(&object, "/kind") == "ConfigMap" {
            let meant: Value = serde_saphyr::from_str(text(&object, "/data/mesh"))?;
            object["data"]["mesh"] = meant;
        }
        let key =
            ["/kind", "/metadata/namespace", "/metadata/name"].map(|path| text(&object, path).to_owned());
        let key = (key[0].clone(), key[1].clone(), key[2].clone());
        assert!(made.insert(key.clone(), object).is_none(), "{key:?} is there twice");
    }
    Ok(made)
}

fn by_helm(args: &[&str]) -> Result<Made, anyhow::Error> {
    let out = Binaries::find()?
        .command("helm")?
        .args(["template", "nodemesh", CHART, "--namespace", NAMESPACE])
        .args(args)
        .output()?;
    if !out.status.success() {
        return Err(anyhow!("helm: {}", String::from_utf8_lossy(&out.stderr)));
    }
    let text = String::from_utf8(out.stdout)?;
    let documents = format!("\n{text}");
    let parse = |text: &str| {
        Ok::<Value, anyhow::Error>(serde_saphyr::from_str::<Option<Value>>(text)?.unwrap_or_default())
    };
    by_name(documents.split("\n---").map(parse).collect::<Result<_, _>>()?)
}

fn by_meshctl(args: &[&str]) -> Result<Made, anyhow::Error> {
    let all = [&["manifest", "generate", "--skip-crds", "-o", "json"], args].concat();
    by_name(answer(None, &all)?.as_array().cloned().unwrap_or_default())
}

#[test]
fn chart_and_command_line_make_the_same_objects() -> TestResult {
    require_api_server!();
    let folder = std::env::temp_dir().join(format!("mesh-kube-install-{}", std::process::id()));
    fs::create_dir_all(&folder)?;
    let file = folder.join("values.yaml");
    fs::write(&file, VALUES)?;
    let file = file.display().to_string();
    let profile = |name: &str| format!("{CHART}/profiles/{name}.yaml");
    let (minimal, demo) = (profile("minimal"), profile("demo"));
    let cases: [(&[&str], &[&str]); 6] = [
        (&[], &[]),
        (&["-f", &minimal], &["--profile", "minimal"]),
        (&["-f", &demo], &["--profile", "demo"]),
        (&["-f", &file], &["-f", &file]),
        (&["--set", "webhook.enabled=false"], &["--set", "webhook.enabled=false"]),
        (
            &["-f", &demo, "-f", &file, "--set", "controller.replicas=7"],
            &["--profile", "demo", "-f", &file, "--set", "controller.replicas=7"],
        ),
    ];
    for (helm, ours) in cases {
        let (helm, made) = (by_helm(helm)?, by_meshctl(ours)?);
        assert!(made.len() >= 13, "{ours:?}: {}", made.len());
        let names = |made: &Made| made.keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(names(&helm), names(&made), "{ours:?}");
        for (key, object) in &made {
            assert_eq!(&helm[key], object, "{ours:?}: {key:?}");
        }
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}

#[test]
fn chart_and_command_line_refuse_an_agent_that_is_killed_while_it_drains() -> TestResult {
    require_api_server!();
    for (set, wanted) in [
        (["agent.drain=36s", "controller.replicas=1"], "agent.terminationGracePeriodSeconds, which is 40"),
        (["agent.drain=5m", "agent.terminationGracePeriodSeconds=300"], "which is 300"),
        (["agent.drain=soon", "controller.replicas=1"], "drain"),
    ] {
        let args: Vec<&str> = set.iter().flat_map(|set| ["--set", *set]).collect();
        for made in [by_helm(&args), by_meshctl(&args)] {
            let said = made.map(|made| made.len()).map_err(|error| error.to_string());
            assert!(said.as_ref().is_err_and(|said| said.contains(wanted)), "{set:?}: {said:?}");
        }
    }
    let longest = ["--set", "agent.drain=5m", "--set", "agent.terminationGracePeriodSeconds=305"];
    assert_eq!(by_helm(&longest)?.len(), by_meshctl(&longest)?.len());
    Ok(())
}

fn actions(report: &Value) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    for object in report["objects"].as_array().into_iter().flatten() {
        *count.entry(text(object, "/action").to_owned()).or_default() += 1;
    }
    count
}

/// Ends a namespace as its controller would.
fn finalize(api: &ApiServer, name: &str) -> TestResult {
    let namespace = api.kubectl().json(&["get", "namespace", name])?;
    assert!(namespace["metadata"]["deletionTimestamp"].is_string(), "{namespace}");
    Ok(api.kubectl().finalize(namespace)?)
}

#[test]
fn an_installation_is_accepted_repeated_changed_and_taken_out_again() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let config = api.kubeconfig();
    let install =
        |args: &[&str]| answer(Some(&config), &[&["install", "--no-wait", "-o", "json"], args].concat());

    let planned = install(&["--dry-run"])?;
    assert_eq!(actions(&planned).keys().collect::<Vec<_>>(), ["created"], "{planned:#}");
    assert!(api.kubectl().run(&["get", "namespace", NAMESPACE]).is_err(), "a dry run makes nothing");

    let first = install(&[])?;
    assert_eq!(actions(&first), actions(&planned), "{first:#}");
    let second = install(&[])?;
    assert_eq!(actions(&second).keys().collect::<Vec<_>>(), ["unchanged"], "{second:#}");

    the_definitions_are_whole(&api)?;
    the_rights_are_small(&api)?;

    let mended = install(&[])?;
    assert_eq!(actions(&mended)["created"], 1, "the webhook, which the checks took away: {mended:#}");
    let without = install(&["--set", "webhook.enabled=false", "--set", "controller.replicas=1"])?;
    assert_eq!((actions(&without)["deleted"], actions(&without)["configured"]), (1, 1), "{without:#}");
    assert!(api.kubectl().run(&["get", "validatingwebhookconfiguration", "nodemesh"]).is_err());

    // What the mesh makes while it runs.
    api.kubectl().apply(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: nodemesh-ca-root-cert, namespace: default, \
         labels: {app.kubernetes.io/part-of: nodemesh}}}",
    )?;
    let gone = meshctl(Some(&config), &["uninstall", "--skip-nodes", "--timeout", "15"])?;
    let said = String::from_utf8_lossy(&gone.stderr).into_owned();
    assert!(said.contains("namespace nodemesh-system is still terminating"), "nobody ends it here: {said}");
    finalize(&api, NAMESPACE)?;
    let again = meshctl(Some(&config), &["uninstall", "--skip-nodes"])?;
    assert!(again.status.success() && again.stdout.is_empty(), "{again:?}");
    nothing_is_left(&api)
}

#[test]
fn helm_does_not_install_over_an_uninstall_that_has_not_ended() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let helm = || {
        Ok::<_, anyhow::Error>(
            Binaries::find()?
                .command("helm")?
                .args([
                    "install",
                    "nodemesh",
                    CHART,
                    "--namespace",
                    NAMESPACE,
                    "--dry-run=server",
                    "--kubeconfig",
                ])
                .arg(api.kubeconfig())
                .output()?,
        )
    };
    api.kubectl().apply(&format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}}}}}"))?;
    let clean = helm()?;
    assert!(clean.status.success(), "{}", String::from_utf8_lossy(&clean.stderr));
    let labels = "{app.kubernetes.io/name: nodemesh-cleanup}";
    api.kubectl().apply(&format!(
        "{{apiVersion: apps/v1, kind: DaemonSet, metadata: {{name: nodemesh-cleanup, namespace: {NAMESPACE}}}, \
         spec: {{selector: {{matchLabels: {labels}}}, template: {{metadata: {{labels: {labels}}}, \
         spec: {{containers: [{{name: cleanup, image: none}}]}}}}}}}}"
    ))?;
    let refused = helm()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("meshctl uninstall"), "{said}");
    Ok(())
}

/// What the webhook keeps from being written while nobody answers it, and what it does not.
#[test]
fn while_no_controller_answers_only_what_the_mesh_reads_is_refused_and_not_in_the_clusters_own_namespaces()
-> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let config = api.kubeconfig();
    answer(Some(&config), &["install", "--no-wait", "-o", "json"])?;
    let kubectl = api.kubectl();
    kubectl.run(&["wait", "crd", "--all", "--for=condition=Established"])?;
    let object = |group: &str, kind: &str, namespace: &str, spec: &str| {
        format!(
            "{{apiVersion: {group}/v1, kind: {kind}, metadata: {{name: a, namespace: {namespace}}}, spec: {spec}}}"
        )
    };
    let rule = |namespace: &str| object("networking.istio.io", "VirtualService", namespace, "{hosts: [web]}");
    let route = |parent: &str| {
        let spec = format!("{{parentRefs: [{parent}], rules: [{{backendRefs: [{{name: web, port: 80}}]}}]}}");
        object("gateway.networking.k8s.io", "HTTPRoute", "default", &spec)
    };
    let dry = |manifest: &str| kubectl.feed(&["create", "--dry-run=server", "-f", "-"], manifest);
    // The API server takes a moment to ask.
    eventually(Duration::from_secs(60), || dry(&rule("default")), Result::is_err)?.err();

    let gateway = "{name: edge}";
    let service = "{group: \"\", kind: Service, name: web}";
    for refused in [
        rule("default"),
        object("security.istio.io", "PeerAuthentication", "default", "{mtls: {mode: STRICT}}"),
        route(service),
        route(&format!("{gateway}, {service}")),
        // Who meant the mesh and forgot the group is to be told.
        route("{kind: Service, name: web}"),
    ] {
        let said = dry(&refused).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(said.contains("validate.nodemesh.dev"), "{refused}: {said}");
    }
    for free in [
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: a, namespace: kube-system}}".to_owned(),
        rule("kube-system"),
        rule("kube-public"),
        rule(NAMESPACE),
        route(gateway),
        object(
            "gateway.networking.k8s.io",
            "Gateway",
            "default",
            "{gatewayClassName: other, listeners: [{name: web, port: 80, protocol: HTTP}]}",
        ),
        object("telemetry.istio.io", "Telemetry", "default", "{}"),
    ] {
        dry(&free).map_err(|error| anyhow!("{free}: {error}"))?;
    }
    // What is there can go, whoever answers.
    kubectl.apply(&rule("kube-system"))?;
    kubectl.run(&["delete", "virtualservice", "-n", "kube-system", "a"])?;

    answer(Some(&config), &["install", "--no-wait", "-o", "json", "--set", "webhook.failurePolicy=Ignore"])?;
    eventually(Duration::from_secs(60), || dry(&rule("default")), Result::is_ok)??;
    Ok(())
}

/// Removes the webhook, which nobody answers here, and waits until the API server does not ask it any more.
fn remove_webhook(api: &ApiServer) -> TestResult {
    let kubectl = api.kubectl();
    kubectl.run(&["delete", "validatingwebhookconfiguration", "nodemesh"])?;
    let object = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: a, namespace: default}, spec: {}}";
    let create = || kubectl.feed(&["create", "--dry-run=server", "-f", "-"], object);
    eventually(Duration::from_secs(60), create, Result::is_ok)??;
    Ok(())
}

/// API servers say in conditions what they do not like about a definition, and serve it all the same.
fn the_definitions_are_whole(api: &ApiServer) -> TestResult {
    api.kubectl().run(&["wait", "crd", "--all", "--for=condition=Established"])?;
    let all = api.kubectl().json(&["get", "crd"])?;
    let all = all["items"].as_array().cloned().unwrap_or_default();
    assert!(all.len() >= 15, "{}", all.len());
    for definition in &all {
        let name = text(definition, "/metadata/name");
        for condition in definition["status"]["conditions"].as_array().into_iter().flatten() {
            let (kind, status) = (text(condition, "/type"), text(condition, "/status"));
            let wanted = if kind == "NonStructuralSchema" { "False" } else { "True" };
            // Ours are not the approved ones, and say so.
            if kind != "KubernetesAPIApprovalPolicyConformant" {
                assert_eq!(status, wanted, "{name}: {condition}");
            }
        }
    }
    // As users write them, and as a typing error is answered.
    remove_webhook(api)?;
    for version in ["v1", "v1beta1", "v1alpha3"] {
        api.kubectl().apply(&format!(
            "{{apiVersion: networking.istio.io/{version}, kind: VirtualService, metadata: {{name: {version}, namespace: default}}, \
             spec: {{hosts: [web], http: [{{timeout: 1.5s, route: [{{destination: {{host: web}}, weight: 100}}]}}]}}}}"
        ))?;
    }
    let listed = api.kubectl().run(&["get", "virtualservices", "-n", "default"])?;
    assert!(listed.contains("HOSTS") && listed.contains("v1alpha3"), "{listed}");
    for (wrong, wanted) in [
        ("{hosts: [web], http: [{rout: []}]}", "rout"),
        ("{hosts: [web], http: [{timeout: soon}]}", "timeout"),
        ("{hosts: [web], http: [{match: [{uri: {exact: /a, prefix: /b}}]}]}", "uri"),
    ] {
        let manifest = format!(
            "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: wrong, namespace: default}}, spec: {wrong}}}"
        );
        let refused = api.kubectl().apply(&manifest).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(refused.contains(wanted), "{wrong}: {refused}");
    }
    api.kubectl().run(&["delete", "virtualservices", "-n", "default", "--all"])?;
    Ok(())
}

fn the_rights_are_small(api: &ApiServer) -> TestResult {
    let may = |account: &str, verb: &str, what: &str, namespace: &str| {
        let user = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
        // It ends badly to say no.
        api.kubectl().run(&["auth", "can-i", verb, what, "-n", namespace, &user]).is_ok()
    };
    for (account, verb, what, namespace, wanted) in [
        ("nodemesh-agent", "list", "pods", "shop", true),
        ("nodemesh-agent", "get", "secrets", NAMESPACE, false),
        ("nodemesh-agent", "get", "secrets", "shop", false),
        ("nodemesh-agent", "create", "pods/exec", "shop", false),
        ("nodemesh-agent", "create", "serviceaccounts/token", "shop", false),
        ("nodemesh-agent", "patch", "pods", "shop", false),
        ("nodemesh-controller", "get", "secrets", NAMESPACE, true),
        ("nodemesh-controller", "get", "secrets", "shop", false),
        ("nodemesh-controller", "patch", "configmaps/nodemesh-ca-root-cert", "shop", true),
        ("nodemesh-controller", "patch", "configmaps/other", "shop", false),
        ("nodemesh-controller", "create", "tokenreviews.authentication.k8s.io", "shop", true),
        ("nodemesh-controller", "patch", "virtualservices.networking.istio.io/status", "shop", true),
        ("nodemesh-controller", "patch", "virtualservices.networking.istio.io", "shop", false),
        ("nodemesh-controller", "patch", "validatingwebhookconfigurations/other", "shop", false),
        ("nodemesh-controller", "list", "configmaps", NAMESPACE, true),
        ("nodemesh-controller", "list", "configmaps", "shop", false),
        ("nodemesh-controller", "get", "configmaps/other", "shop", false),
        ("nodemesh-controller", "list", "nodes", "shop", true),
        ("nodemesh-controller", "list", "httproutes.gateway.networking.k8s.io", "shop", true),
        ("nodemesh-controller", "list", "gateways.gateway.networking.k8s.io", "shop", false),
        ("nodemesh-controller", "list", "telemetries.telemetry.istio.io", "shop", false),
        ("nodemesh-controller", "list", "requestauthentications.security.istio.io", "shop", false),
        ("nodemesh-agent", "list", "nodes", "shop", false),
    ] {
        // A name is its own argument.
        let found = match what
            .split_once('/')
            .filter(|(kind, _)| ["configmaps", "validatingwebhookconfigurations"].contains(kind))
        {
            Some(_) => may(account, verb, what, namespace),
            None => match what.split_once('/') {
                Some((kind, sub)) => {
                    let user = format!("--as=system:serviceaccount:{NAMESPACE}:{account}");
                    let sub = format!("--subresource={sub}");
                    api.kubectl().run(&["auth", "can-i", verb, kind, &sub, "-n", namespace, &user]).is_ok()
                }
                None => may(account, verb, what, namespace),
            },
        };
        assert_eq!(found, wanted, "{account} {verb} {what} in {namespace}");
    }
    // As it watches and writes the roots in all namespaces.
    let controller = format!("--as=system:serviceaccount:{NAMESPACE}:nodemesh-controller");
    let all = ["get", "configmaps", "-A", &controller];
    let roots = ["--field-selector", "metadata.name=nodemesh-ca-root-cert"];
    api.kubectl().run(&[&all[..], &roots].concat())?;
    assert!(api.kubectl().run(&all).is_err(), "all ConfigMaps can be read");
    let apply = ["apply", "--server-side", "--dry-run=server", &controller, "-f", "-"];
    let map = |name: &str| {
        format!("{{apiVersion: v1, kind: ConfigMap, metadata: {{name: {name}, namespace: default}}}}")
    };
    api.kubectl().feed(&apply, &map("nodemesh-ca-root-cert"))?;
    assert!(api.kubectl().feed(&apply, &map("other")).is_err());
    Ok(())
}

fn nothing_is_left(api: &ApiServer) -> TestResult {
    assert_eq!(api.kubectl().objects_of_the_mesh()?, Vec::<String>::new());
    Ok(())
}

#[test]
fn definitions_of_others_and_resources_of_users_are_left_alone() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let config = api.kubeconfig();
    // Somebody else's definition: an older one, with a field that ours does not have.
    let mut all = answer(None, &["manifest", "crds", "-o", "json"])?;
    let routes = all.as_array_mut().and_then(|all| {
        all.iter_mut()
            .find(|definition| text(definition, "/metadata/name") == "httproutes.gateway.networking.k8s.io")
    });
    let routes = routes.ok_or_else(|| anyhow!("no HTTPRoute"))?;
    routes["metadata"]["labels"] = json!({"owner": "platform"});
    for version in routes["spec"]["versions"].as_array_mut().into_iter().flatten() {
        version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["theirs"] =
            json!({"type": "string"});
    }
    api.kubectl().apply(&routes.to_string())?;
    // A definition counts once the API server has checked its names.
    api.kubectl().run(&[
        "wait",
        "crd/httproutes.gateway.networking.k8s.io",
        "--for=condition=Established",
    ])?;
    let before = api.kubectl().json(&["get", "crd", "httproutes.gateway.networking.k8s.io"])?;

    let precheck = answer(Some(&config), &["precheck", "-o", "json"])?;
    let found = precheck.to_string();
    assert!(found.contains("1 kinds are there and used as they are"), "{found}");

    let report = answer(Some(&config), &["install", "--no-wait", "-o", "json"])?;
    assert_eq!(actions(&report)["kept"], 1, "{report:#}");
    let after = api.kubectl().json(&["get", "crd", "httproutes.gateway.networking.k8s.io"])?;
    assert_eq!(before["spec"], after["spec"]);

    let refused = meshctl(Some(&config), &["upgrade", "--no-wait", "--set", "agent.cgroup=x"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("agent.cgroup"), "{said}");

    // Definitions of their own projects, applied over ours; our labels are still there.
    let grpc = "grpcroutes.gateway.networking.k8s.io";
    let sidecars = "sidecars.networking.istio.io";
    let of_project = "gateway.networking.k8s.io/bundle-version=v1.4.0";
    api.kubectl().run(&["annotate", "crd", grpc, of_project])?;
    api.kubectl().run(&["label", "crd", sidecars, "app=istio-pilot", "chart=istio"])?;
    let before = api.kubectl().json(&["get", "crd", grpc])?;
    let again = answer(Some(&config), &["install", "--no-wait", "-o", "json"])?;
    assert_eq!(actions(&again)["kept"], 3, "{again:#}");
    assert_eq!(before, api.kubectl().json(&["get", "crd", grpc])?, "it was written");

    remove_webhook(&api)?;
    api.kubectl().apply(
        "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: a, namespace: default}, spec: {mtls: {mode: STRICT}}}",
    )?;
    let out = meshctl(Some(&config), &["uninstall", "--skip-nodes", "--timeout", "15"])?;
    let done = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        done.contains("peerauthentications.security.istio.io kept (there are still peerauthentications"),
        "{done}"
    );
    api.kubectl().run(&["get", "peerauthentication", "-n", "default", "a"])?;
    api.kubectl().run(&["get", "crd", "httproutes.gateway.networking.k8s.io"])?;
    finalize(&api, NAMESPACE)?;
    let purged = meshctl(Some(&config), &["uninstall", "--skip-nodes", "--purge"])?;
    assert!(purged.status.success(), "{purged:?}");
    assert!(api.kubectl().run(&["get", "crd", "peerauthentications.security.istio.io"]).is_err());
    for theirs in [grpc, sidecars] {
        let kept = api.kubectl().json(&["get", "crd", theirs])?;
        assert!(!kept["metadata"]["labels"].to_string().contains("nodemesh"), "{kept:#}");
    }
    api.kubectl().run(&["get", "crd", "httproutes.gateway.networking.k8s.io"])?;
    nothing_is_left(&api)
}

#[test]
fn an_image_that_no_node_can_have_is_said_while_it_is_waited_for_and_what_to_do() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let config = api.kubeconfig();
    answer(Some(&config), &["install", "--no-wait", "-o", "json"])?;
    // As the DaemonSet's controller and the kubelet would have it.
    let pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "agent-x", "namespace": NAMESPACE, "labels": {"app.kubernetes.io/part-of": "nodemesh"}},
        "spec": {"nodeName": "n1", "serviceAccountName": "nodemesh-agent",
            "containers": [{"name": "agent", "image": "nodemesh:0.1.0"}]}});
    api.kubectl().apply(&pod.to_string())?;
    let waiting = json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}});
    let status =
        json!({"status": {"containerStatuses": [{"name": "agent", "image": "nodemesh:0.1.0", "imageID": "",
        "ready": false, "restartCount": 0, "state": waiting}]}})
        .to_string();
    let patch = ["patch", "pod", "-n", NAMESPACE, "agent-x", "--subresource=status", "--type=merge", "-p"];
    api.kubectl().run(&[&patch[..], &[status.as_str()]].concat())?;

    let out = meshctl(Some(&config), &["install", "--timeout", "15"])?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success(), "{said}");
    let why =
        "pod agent-x cannot have its image nodemesh:0.1.0 on n1 (ImagePullBackOff): push it to a registry";
    let (first, end) = (said.find(why), said.find("not ready after"));
    assert!(first.is_some() && first < end, "{said}");
    assert!(said.rfind(why) > end, "and once more at the end: {said}");
    Ok(())
}

#[test]
fn a_bug_report_holds_states_and_no_secrets() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let config = api.kubeconfig();
    answer(Some(&config), &["install", "--no-wait", "-o", "json"])?;
    api.kubectl().apply(&format!(
        "{{apiVersion: v1, kind: Secret, metadata: {{name: nodemesh-ca, namespace: {NAMESPACE}}}, stringData: {{ca-key.pem: hunter2}}}}"
    ))?;
    let file: PathBuf = api.directory().join("report.tar.gz");
    let path = file.display().to_string();
    let report = answer(Some(&config), &["bug-report", "--file", &path, "-o", "json"])?;
    assert!(report["files"].as_u64().is_some_and(|files| files > 20), "{report}");
    let out = meshctl(Some(&config), &["bug-report", "--file", &path, "-o", "yaml"])?;
    let report: Value = serde_saphyr::from_str(&String::from_utf8(out.stdout)?)?;
    assert_eq!(report["file"], path.as_str());
    assert!(report["files"].as_u64().is_some_and(|files| files > 20), "{report}");
    let out = Command::new("tar").args(["-xzOf", &path]).output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success() && text.contains("nodemesh-controller"), "{text}");
    assert!(!text.contains("hunter2"));
    Ok(())
}
