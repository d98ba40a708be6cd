//! How `meshctl` gets to a cluster and in which forms it answers: contexts of a kubeconfig, and YAML beside JSON, at a real API server.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, ensure};
use mesh_tests::cluster::ApiServer;
use mesh_tests::{TestResult, programs, require_agent, require_api_server, test_name};
use serde_json::{Value, json};

/// Without a cluster of the user's own.
fn meshctl(args: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(programs::meshctl()?);
    for variable in ["KUBECONFIG", "MESH_ADMIN_SOCKET", "MESH_NAMESPACE", "KUBERNETES_SERVICE_HOST"] {
        command.env_remove(variable);
    }
    command.args(args);
    Ok(command)
}

/// What a question about a pod wants to see before it looks for the pod; it never runs.
const AGENT: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: nodemesh-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: default, namespace: nodemesh-system}
---
apiVersion: v1
kind: Pod
metadata: {name: nodemesh-agent-1, namespace: nodemesh-system, labels: {app.kubernetes.io/name: nodemesh-agent}}
spec: {nodeName: n1, containers: [{name: agent, image: none}]}
";

fn said(out: &Output) -> String {
    [&out.stdout, &out.stderr].map(|text| String::from_utf8_lossy(text).into_owned()).concat()
}

/// The API server's kubeconfig with two more contexts: of a cluster that does not answer, which is the current one, and of a namespace.
fn contexts(api: &ApiServer, silent: u16) -> anyhow::Result<String> {
    let mut all: Value = serde_saphyr::from_str(&fs::read_to_string(api.kubeconfig())?)?;
    let add = |all: &mut Value, list: &str, entry: Value| -> anyhow::Result<()> {
        all[list].as_array_mut().with_context(|| format!("no {list}"))?.push(entry);
        Ok(())
    };
    let server = format!("https://127.0.0.1:{silent}");
    add(&mut all, "clusters", json!({"name": "away", "cluster": {"server": server}}))?;
    for (name, cluster, namespace) in [("away", "away", "default"), ("till", "nodemesh-test", "till")] {
        let context = json!({"cluster": cluster, "user": "nodemesh-test", "namespace": namespace});
        add(&mut all, "contexts", json!({"name": name, "context": context}))?;
    }
    all["current-context"] = "away".into();
    Ok(all.to_string())
}

#[test]
fn a_context_names_the_cluster_and_one_that_is_not_there_is_refused_with_those_that_are() -> TestResult {
    require_api_server!();
    require_agent!();
    let api = ApiServer::start(test_name!())?;
    // Nobody listens here any more.
    let away = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    api.kubectl().apply(AGENT)?;
    let file = api.directory().join("contexts");
    fs::write(&file, contexts(&api, away)?)?;
    let path = file.display().to_string();
    for by_option in [true, false] {
        let ask = |args: &[&str]| -> anyhow::Result<Output> {
            let mut command = meshctl(args)?;
            let command = match by_option {
                true => command.args(["--kubeconfig", &path]),
                false => command.env("KUBECONFIG", &path),
            };
            Ok(command.output()?)
        };
        let current = ask(&["precheck"])?;
        assert!(!current.status.success(), "the current one answers: {}", said(&current));
        let named = ask(&["precheck", "--context", "nodemesh-test"])?;
        assert!(named.status.success() && said(&named).contains("you may install"), "{}", said(&named));

        let unknown = ask(&["status", "--context", "prod"])?;
        let wanted = "the kubeconfig has no context \"prod\"; it has: nodemesh-test, away, till";
        assert!(!unknown.status.success() && unknown.stdout.is_empty(), "{}", said(&unknown));
        assert!(said(&unknown).contains(wanted), "{}", said(&unknown));

        // Pods without a namespace are of the context's.
        let pod = ask(&["explain", "--from", "cart", "--to", "10.96.0.1:80", "--context", "till"])?;
        assert!(!pod.status.success() && said(&pod).contains("get pod till/cart"), "{}", said(&pod));
    }
    Ok(())
}

/// What a command prints, as JSON and as YAML, where it ends with this status.
fn both(kubeconfig: &Path, args: &[&str], status: i32) -> anyhow::Result<[Value; 2]> {
    let ask = |form: &str| -> anyhow::Result<String> {
        let out = meshctl(args)?.arg("--kubeconfig").arg(kubeconfig).args(["-o", form]).output()?;
        ensure!(out.status.code() == Some(status), "{args:?}: {}: {}", out.status, said(&out));
        Ok(String::from_utf8(out.stdout)?)
    };
    let (json, yaml) = (ask("json")?, ask("yaml")?);
    ensure!(serde_json::from_str::<Value>(&yaml).is_err(), "{args:?}: that is JSON: {yaml}");
    let yaml: Value = serde_saphyr::from_str(&yaml).with_context(|| format!("{args:?}: {yaml}"))?;
    Ok([serde_json::from_str(&json)?, yaml])
}

/// Wrong, in words that YAML could take for something else.
const BROKEN: &str = r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: "yes", namespace: "1e3"}
spec: {hosts: ["~: # x"], http: [{name: "null", timeout: "- 'soon"}]}
"#;

#[test]
fn yaml_says_what_json_says() -> TestResult {
    require_api_server!();
    require_agent!();
    let api = ApiServer::start(test_name!())?;
    let broken = api.directory().join("broken.yaml");
    fs::write(&broken, BROKEN)?;
    let path = broken.display().to_string();
    let cases: [(&[&str], i32); 3] =
        [(&["precheck"], 0), (&["install", "--dry-run"], 0), (&["validate", &path], 1)];
    for (args, status) in cases {
        let [json, yaml] = both(&api.kubeconfig(), args, status)?;
        assert_eq!(json, yaml, "{args:?}");
        let objects = json.get("objects").unwrap_or(&json);
        assert!(objects.as_array().is_some_and(|rows| !rows.is_empty()), "{args:?}: {json}");
    }
    // Objects as kubectl takes them, a document each.
    let generate = |form: &str| -> anyhow::Result<String> {
        let out = meshctl(&["manifest", "generate", "-o", form])?.output()?;
        ensure!(out.status.success(), "{}", said(&out));
        Ok(String::from_utf8(out.stdout)?)
    };
    let list: Vec<Value> = serde_json::from_str(&generate("json")?)?;
    let documents: Vec<Value> = format!("\n{}", generate("yaml")?)
        .split("\n---\n")
        .filter(|text| !text.trim().is_empty())
        .map(serde_saphyr::from_str::<Value>)
        .collect::<Result<_, _>>()?;
    assert!(list.len() > 25, "{}", list.len());
    assert_eq!(list, documents);
    Ok(())
}
