//! `meshctl uninstall` against a real API server, killed wherever it can be killed: another run goes on, until nothing is left.

mod gate;
mod nodes;

use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use gate::Gate;
use mesh_tests::cluster::{ApiServer, Kubectl};
use mesh_tests::{TestResult, eventually, programs, require_api_server, test_name};
use nodes::Nodes;
use serde_json::Value;

const NAMESPACE: &str = "nodemesh-system";
/// What cleans nodes.
const CLEANUP: &str = "nodemesh-cleanup";
/// How long one run of the program may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);
/// More runs than there are objects would go round in circles.
const RUNS_MAX: usize = 120;

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

/// A program that ends with this value.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> anyhow::Result<Self> {
        Ok(Self(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?))
    }

    /// Whether it has ended, which it must do well.
    fn is_over(&mut self) -> anyhow::Result<bool> {
        let Some(status) = self.0.try_wait()? else { return Ok(false) };
        let mut said = String::new();
        self.0.stderr.take().context("no standard error")?.read_to_string(&mut said)?;
        ensure!(status.success(), "{status}: {said}");
        Ok(true)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn meshctl(kubeconfig: &Path, args: &[&str]) -> anyhow::Result<Command> {
    let mut command = Command::new(programs::meshctl()?);
    command.env_remove("KUBECONFIG").env_remove("MESH_ADMIN_SOCKET");
    command.arg("--kubeconfig").arg(kubeconfig).args(args);
    Ok(command)
}

fn install(api: &ApiServer) -> anyhow::Result<Value> {
    let out = meshctl(&api.kubeconfig(), &["install", "--no-wait", "-o", "json"])?.output()?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// By SIGKILL, in the middle of the last write that it was allowed.
    Killed,
    /// With status 0.
    Done,
}

/// One run that is killed after so many writes, if it makes so many.
fn uninstall(
    gate: &Gate,
    kubeconfig: &Path,
    nodes: &mut Nodes<'_>,
    kubectl: &Kubectl,
    writes: usize,
) -> anyhow::Result<End> {
    gate.allow(writes);
    let mut run = Running::start(meshctl(kubeconfig, &["uninstall", "--timeout", "100"])?)?;
    let step = || -> anyhow::Result<Option<End>> {
        if gate.is_shut() {
            return Ok(Some(End::Killed));
        }
        if run.is_over()? {
            return Ok(Some(End::Done));
        }
        nodes.look()?;
        end_namespace(kubectl)?;
        Ok(None)
    };
    let end = eventually(LIMIT, step, |end| !matches!(end, Ok(None)))??;
    end.context("invariant: this was waited for")
}

/// Ends the mesh's namespace as its controller would, once it is to go.
fn end_namespace(kubectl: &Kubectl) -> anyhow::Result<()> {
    let found = kubectl.json(&["get", "namespaces"])?;
    let ours =
        found["items"].as_array().into_iter().flatten().find(|it| text(it, "/metadata/name") == NAMESPACE);
    let Some(namespace) = ours.filter(|it| it["metadata"]["deletionTimestamp"].is_string()) else {
        return Ok(());
    };
    Ok(kubectl.finalize(namespace.clone())?)
}

#[test]
fn an_uninstallation_that_is_killed_after_each_write_is_gone_on_with_until_nothing_is_left() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let kubectl = api.kubectl();
    let gate = Gate::start(kubectl)?;
    let kubeconfig = gate.kubeconfig(api.directory())?;
    install(&api)?;
    // What the mesh makes while it runs.
    let labels = "labels: {app.kubernetes.io/part-of: nodemesh}";
    kubectl.apply(&format!(
        "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: nodemesh-ca-root-cert, namespace: default, {labels}}}}}\n---\n\
         {{apiVersion: v1, kind: Secret, metadata: {{name: nodemesh-ca, namespace: {NAMESPACE}, {labels}}}}}\n---\n\
         {{apiVersion: coordination.k8s.io/v1, kind: Lease, metadata: {{name: nodemesh, namespace: {NAMESPACE}, {labels}}}, spec: {{}}}}"
    ))?;
    let mut nodes = Nodes::start(kubectl)?;
    let set = |name: &str| kubectl.json(&["get", "daemonset", "-n", NAMESPACE, name, "--ignore-not-found"]);

    // The webhook is gone, what cleans nodes is there and waits. An installation instead of another try puts all as it was.
    assert_eq!(uninstall(&gate, &kubeconfig, &mut nodes, kubectl, 2)?, End::Killed);
    assert_eq!(gate.writes().len(), 2, "{:#?}", gate.writes());
    let waiting = set(CLEANUP)?;
    assert!(
        waiting.pointer("/spec/template/spec/nodeSelector/nodemesh.dev~1cleanup").is_some(),
        "{waiting:#}"
    );
    let again = install(&api)?;
    let deleted =
        again["objects"].as_array().into_iter().flatten().find(|object| object["action"] == "deleted");
    assert_eq!(deleted.map(|object| text(object, "/name")), Some(CLEANUP), "{again:#}");
    assert!(kubectl.run(&["get", "daemonset", "-n", NAMESPACE, CLEANUP]).is_err());

    // One that ran before these agents did says nothing of them.
    assert_eq!(uninstall(&gate, &kubeconfig, &mut nodes, kubectl, 2)?, End::Killed);
    let free = r#"{"spec":{"template":{"spec":{"nodeSelector":{"nodemesh.dev/cleanup":null}}}}}"#;
    kubectl.run(&["patch", "daemonset", CLEANUP, "-n", NAMESPACE, "--type=merge", "-p", free])?;
    let early = text(&set(CLEANUP)?, "/metadata/uid").to_owned();
    eventually(
        LIMIT,
        || nodes.look().and_then(|()| Ok(kubectl.run(&["get", "pods", "-n", NAMESPACE, "-o", "name"])?)),
        |pods| pods.as_ref().is_ok_and(|pods| pods.contains(CLEANUP)),
    )??;
    assert_eq!(nodes.cleaned, None, "there is an agent");

    let before = gate.writes().len();
    let mut runs = 1;
    while uninstall(&gate, &kubeconfig, &mut nodes, kubectl, 1)? == End::Killed {
        assert!(runs < RUNS_MAX, "it does not come to an end: {:#?}", gate.writes());
        runs += 1;
    }
    let writes = gate.writes().split_off(before);
    println!("{runs} runs");
    assert_eq!(runs, writes.len() + 1, "each run but the last wrote once: {writes:#?}");
    assert!(writes.len() > 30, "{writes:#?}");
    // That of before was replaced, so it was deleted twice; nothing else was done twice.
    let once: BTreeSet<&String> = writes.iter().collect();
    assert_eq!(once.len() + 1, writes.len(), "{writes:#?}");
    let last = |what: &str| writes.iter().rposition(|write| write.contains(what)).unwrap_or_default();
    assert_eq!(
        last("namespaces/nodemesh-system/daemonsets/nodemesh-cleanup"),
        writes.len() - 2,
        "{writes:#?}"
    );
    assert!(
        nodes.cleaned.is_some() && nodes.cleaned != Some(early),
        "nodes were not cleaned after the agents went"
    );
    nothing_is_left(&api)?;

    let idle = meshctl(&kubeconfig, &["uninstall"])?.output()?;
    let said = String::from_utf8_lossy(&idle.stderr).into_owned();
    assert!(idle.status.success() && said.starts_with("There is nothing of the mesh"), "{said}");
    Ok(())
}

/// An administrator made the namespace, and put the company's authority into it.
#[test]
fn a_namespace_that_was_there_before_stays_with_what_others_put_into_it() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let kubectl = api.kubectl();
    kubectl.apply(&format!(
        "{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}, labels: {{team: platform}}}}}}\n---\n\
         {{apiVersion: v1, kind: Secret, metadata: {{name: cacerts, namespace: {NAMESPACE}}}, stringData: {{ca-key.pem: x}}}}"
    ))?;
    let namespace = || kubectl.json(&["get", "namespace", NAMESPACE]);
    let first = install(&api)?;
    let of_namespace = |report: &Value| {
        let found =
            report["objects"].as_array().into_iter().flatten().find(|object| object["kind"] == "Namespace");
        found.cloned().unwrap_or_default()
    };
    assert_eq!(of_namespace(&first)["note"], "it was there before", "{first:#}");
    let labels = namespace()?["metadata"]["labels"].clone();
    assert_eq!(text(&labels, "/pod-security.kubernetes.io~1enforce"), "privileged", "{labels}");
    let second = install(&api)?;
    assert_eq!(of_namespace(&second)["action"], "unchanged", "{second:#}");

    let run = || -> anyhow::Result<(bool, String)> {
        let out = meshctl(&api.kubeconfig(), &["uninstall", "--skip-nodes", "--timeout", "60"])?.output()?;
        Ok((out.status.success(), String::from_utf8([out.stdout, out.stderr].concat())?))
    };
    let (done, said) = run()?;
    let wanted = format!("Namespace {NAMESPACE} kept (it was there before)");
    assert!(done && said.contains(&wanted), "{said}");
    let left = namespace()?;
    assert!(left["metadata"]["deletionTimestamp"].is_null(), "{left:#}");
    let labels = left["metadata"]["labels"].as_object().cloned().unwrap_or_default();
    assert_eq!(labels.keys().collect::<Vec<_>>(), ["kubernetes.io/metadata.name", "team"]);
    kubectl.run(&["get", "secret", "-n", NAMESPACE, "cacerts"])?;
    nothing_is_left(&api)?;
    let (done, said) = run()?;
    assert!(done && said.starts_with("There is nothing of the mesh"), "{said}");
    Ok(())
}

fn nothing_is_left(api: &ApiServer) -> TestResult {
    assert_eq!(api.kubectl().objects_of_the_mesh()?, Vec::<String>::new());
    Ok(())
}

/// Definitions whose resources take their time, as those do that somebody else has to let go of.
#[test]
fn definitions_that_are_going_already_are_waited_for() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    let kubectl = api.kubectl();
    install(&api)?;
    kubectl.run(&["delete", "validatingwebhookconfiguration", "nodemesh"])?;
    kubectl.run(&["wait", "crd", "--all", "--for=condition=Established"])?;
    let held = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: held, namespace: default, \
                finalizers: [example.com/hold]}, spec: {}}";
    eventually(LIMIT, || kubectl.apply(held), Result::is_ok)??;
    let name = "peerauthentications.security.istio.io";
    kubectl.run(&["delete", "crd", name, "--wait=false"])?;

    let uninstall =
        |timeout: &str| meshctl(&api.kubeconfig(), &["uninstall", "--skip-nodes", "--timeout", timeout]);
    let wanted = format!("definition {name} is still terminating");
    let said = || Ok::<_, anyhow::Error>(String::from_utf8(uninstall("1")?.output()?.stderr)?);
    eventually(LIMIT, said, |said| said.as_ref().is_ok_and(|said| said.contains(&wanted)))??;
    let let_go = r#"{"metadata":{"finalizers":null}}"#;
    kubectl.run(&["patch", "peerauthentication", "-n", "default", "held", "--type=merge", "-p", let_go])?;
    let mut run = Running::start(uninstall("100")?)?;
    let step = || end_namespace(kubectl).and_then(|()| run.is_over());
    eventually(LIMIT, step, |over| !matches!(over, Ok(false)))??;
    nothing_is_left(&api)
}
