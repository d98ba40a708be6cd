//! `meshctl precheck` against a real API server: of a cluster in which nothing is right it names each thing, and what to do about it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::Context as _;
use mesh_tests::cluster::ApiServer;
use mesh_tests::{TestResult, programs, require_agent, require_api_server, test_name};
use serde_json::{Value, json};

fn precheck(kubeconfig: &Path) -> anyhow::Result<Output> {
    let mut command = Command::new(programs::meshctl()?);
    command.env_remove("KUBECONFIG").env_remove("MESH_NAMESPACE").arg("--kubeconfig").arg(kubeconfig);
    Ok(command.args(["precheck", "-o", "json"]).output()?)
}

/// What it found, and whether it ended well.
fn found(kubeconfig: &Path) -> anyhow::Result<(Vec<Value>, bool)> {
    let out = precheck(kubeconfig)?;
    let rows = serde_json::from_slice(&out.stdout)
        .with_context(|| String::from_utf8_lossy(&out.stderr).into_owned())?;
    Ok((rows, out.status.success()))
}

fn namespace(name: &str) -> String {
    format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}}}}}\n---\n")
}

fn daemon_set(namespace: &str, name: &str) -> String {
    format!(
        "{{apiVersion: apps/v1, kind: DaemonSet, metadata: {{name: {name}, namespace: {namespace}}}, \
         spec: {{selector: {{matchLabels: {{app: x}}}}, template: {{metadata: {{labels: {{app: x}}}}, \
         spec: {{containers: [{{name: x, image: none}}]}}}}}}}}\n---\n"
    )
}

/// Other meshes, one way or another, and another installation of this one.
fn others() -> String {
    let sets = [
        ("istio-system", "ztunnel"),
        ("linkerd-cni", "linkerd-cni"),
        ("kmesh-system", "kmesh"),
        ("cilium", "cilium"),
        ("mesh-two", "nodemesh-agent"),
        ("kube-system", "kube-proxy"),
    ];
    let mut all = String::new();
    for (space, name) in sets {
        if space != "kube-system" {
            all += &namespace(space);
        }
        all += &daemon_set(space, name);
    }
    all + "{apiVersion: v1, kind: ConfigMap, metadata: {name: cilium-config, namespace: cilium}, \
           data: {bpf-lb-sock: 'true', cni-exclusive: 'true'}}\n---\n\
           {apiVersion: admissionregistration.k8s.io/v1, kind: MutatingWebhookConfiguration, \
           metadata: {name: istio-sidecar-injector-1-24}}\n---\n\
           {apiVersion: v1, kind: Node, metadata: {name: old}}\n---\n\
           {apiVersion: v1, kind: Node, metadata: {name: new}}\n"
}

#[test]
fn each_thing_that_is_in_the_way_is_named_with_what_to_do() -> TestResult {
    require_api_server!();
    require_agent!();
    let api = ApiServer::start(test_name!())?;
    let (clean, good) = found(&api.kubeconfig())?;
    // Of nodes, which are not there, nothing is known.
    let remarks: Vec<&Value> = clean.iter().filter(|row| row["grade"] != "good").collect();
    assert!(good && remarks.len() == 1 && remarks[0]["subject"] == "BTF, cgroup v2", "{clean:#?}");

    api.kubectl().apply(&others())?;
    let info = r#"{"status": {"nodeInfo": {"kernelVersion": "5.10.0", "operatingSystem": "linux"}}}"#;
    api.kubectl().run(&["patch", "node", "old", "--subresource=status", "--type=merge", "-p", info])?;
    api.kubectl().apply(&old_definition()?)?;
    api.kubectl().run(&["wait", "crd", "--all", "--for=condition=Established"])?;

    let (rows, good) = found(&api.kubeconfig())?;
    assert!(!good, "{rows:#?}");
    let wanted = [
        ("Kubernetes", "good", "v1.", ""),
        ("node old", "error", "kernel 5.10.0, wanted", "agent.nodeSelector"),
        ("node new", "warning", "says nothing of itself yet", "kubelet"),
        ("Istio", "warning", "DaemonSet istio-system/ztunnel redirects pods", "one mesh only"),
        ("Linkerd", "warning", "DaemonSet linkerd-cni/linkerd-cni redirects pods", "one mesh only"),
        ("Kmesh", "warning", "DaemonSet kmesh-system/kmesh redirects pods", "one mesh only"),
        ("Nodemesh", "error", "DaemonSet mesh-two/nodemesh-agent", "--mesh-namespace"),
        ("Istio", "warning", "istio-sidecar-injector-1-24 puts sidecars", "label for injection"),
        ("Cilium", "error", "socket load balancer", "socketLB.hostNamespaceOnly=true"),
        ("Cilium", "error", "every other plugin", "cni.exclusive=false"),
        (
            "definition sidecars.networking.istio.io",
            "error",
            "serves v1alpha1, the mesh reads v1,",
            "a version that the mesh knows",
        ),
        ("rights", "good", "you may install", ""),
    ];
    let text = |row: &Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
    for (subject, grade, message, advice) in wanted {
        let is_it = |row: &&Value| {
            row["subject"] == subject
                && row["grade"] == grade
                && text(row, "message").contains(message)
                && text(row, "advice").contains(advice)
        };
        assert_eq!(
            rows.iter().filter(is_it).count(),
            1,
            "{subject} {grade} {message:?} {advice:?}: {rows:#?}"
        );
    }
    // And nothing else is complained of.
    let bad = wanted.iter().filter(|(_, grade, ..)| *grade != "good").count() + 1;
    assert_eq!(rows.iter().filter(|row| row["grade"] != "good").count(), bad, "{rows:#?}");
    for row in rows.iter().filter(|row| row["grade"] == "error") {
        assert_ne!(row["advice"], "", "{row}");
    }
    Ok(())
}

/// A definition by somebody else, of a version that the mesh does not read.
fn old_definition() -> anyhow::Result<String> {
    let out = Command::new(programs::meshctl()?)
        .env_remove("KUBECONFIG")
        .args(["manifest", "crds", "-o", "json"])
        .output()?;
    let all: Vec<Value> = serde_json::from_slice(&out.stdout)?;
    let is_sidecar = |one: &Value| one["metadata"]["name"] == "sidecars.networking.istio.io";
    let mut old = all.into_iter().find(is_sidecar).context("no Sidecar")?;
    let mut version = old["spec"]["versions"][0].take();
    version["name"] = json!("v1alpha1");
    old["spec"]["versions"] = json!([version]);
    old["metadata"] = json!({"name": "sidecars.networking.istio.io"});
    Ok(old.to_string())
}

#[test]
fn rights_that_are_missing_are_named() -> TestResult {
    require_api_server!();
    require_agent!();
    let api = ApiServer::start(test_name!())?;
    api.kubectl().apply(
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: reader, namespace: default}}\n---\n\
         {apiVersion: v1, kind: ServiceAccount, metadata: {name: nobody, namespace: default}}\n---\n\
         {apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: reader}, \
         rules: [{apiGroups: ['*'], resources: ['*'], verbs: [get, list]}]}\n---\n\
         {apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRoleBinding, metadata: {name: reader}, \
         roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: reader}, \
         subjects: [{kind: ServiceAccount, name: reader, namespace: default}]}\n",
    )?;
    let (rows, good) = found(&kubeconfig_of(&api, "reader")?)?;
    let rights = rows.iter().find(|row| row["subject"] == "rights").context("nothing is said of rights")?;
    let said = rights["message"].as_str().unwrap_or_default();
    assert!(!good && rights["grade"] == "error", "{rows:#?}");
    for wanted in
        ["create daemonsets", "patch clusterroles", "delete namespaces", "create customresourcedefinitions"]
    {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    assert!(!said.contains("get ") && !said.contains("list "), "those it has: {said}");
    assert_eq!(rights["advice"], "install as a cluster administrator");

    // Who may not even look is told what could not be looked at.
    let out = precheck(&kubeconfig_of(&api, "nobody")?)?;
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("list nodes") && said.contains("forbidden"), "{said}");
    Ok(())
}

/// A kubeconfig by which a service account asks.
fn kubeconfig_of(api: &ApiServer, account: &str) -> anyhow::Result<PathBuf> {
    let token = api.kubectl().run(&["create", "token", "-n", "default", account])?;
    let known = fs::read_to_string(api.kubeconfig())?;
    let admin = known.lines().find(|line| line.trim_start().starts_with("token:")).context("no token")?;
    let path = api.directory().join(account);
    fs::write(&path, known.replace(admin.trim_start(), &format!("token: {}", token.trim())))?;
    Ok(path)
}
