//! Every command of `docs/` is run here, as it is written there, by a shell on the desk of somebody who administrates a cluster: first all
//! about Helm, then all about `meshctl`, until nothing is left of either.
//!
//! What the documents call things is what they are called here: nodes `worker-1` and `worker-2`, pod `shop/cart`, service `reviews`.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use mesh_tests::cluster::{Binaries, Cluster, Mesh};
use mesh_tests::docs;
use mesh_tests::{TestResult, eventually, programs, require_cluster, test_name};
use serde_json::Value;

const TREE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// The tag of the tests' image, and those by which documents and the chart's defaults call it.
const BUILT: &str = "localhost/nodemesh:dev";
const NAMES: [&str; 3] = [
    "docker.io/library/nodemesh:0.1.0",
    "registry.example/nodemesh:0.1.0",
    "registry.example/nodemesh:0.2.0",
];

/// What becomes of a command, or happens between commands.
enum Step {
    /// It is run.
    Run(&'static str),
    /// It is run on a node.
    OnNode(&'static str),
    /// The text only names it, without what it needs: it must exist, which its help shows.
    Named(&'static str),
    /// The first has placeholders; the second is run.
    Instead(&'static str, &'static str),
    /// What has to be so now, or is prepared for what follows.
    Check(fn(&Desk<'_>) -> anyhow::Result<()>),
}

use Step::{Check, Instead, Named, OnNode, Run};

const STRICT: &str = "kubectl apply -f - <<END
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: shop}
spec: {mtls: {mode: STRICT}}
END";

/// All commands of all documents, in an order that makes sense.
const STEPS: &[Step] = &[
    Run("meshctl precheck"),
    Run("meshctl precheck --nodes"),
    Check(|desk| desk.nodes_are_looked_at()),
    OnNode("meshctl precheck --host"),
    // Helm.
    Run("kubectl create namespace nodemesh-system"),
    Run(
        "kubectl label namespace nodemesh-system pod-security.kubernetes.io/enforce=privileged nodemesh.dev/mesh=disabled",
    ),
    Run("helm install nodemesh deploy/helm/nodemesh --namespace nodemesh-system --wait"),
    Run("meshctl verify"),
    Check(|desk| desk.is_whole()),
    Run("meshctl manifest crds | kubectl apply --server-side -f -"),
    Run("helm upgrade nodemesh deploy/helm/nodemesh --namespace nodemesh-system -f values.yaml"),
    Check(|desk| desk.is_whole()),
    Run("helm uninstall nodemesh --namespace nodemesh-system --wait"),
    Run("meshctl uninstall --image registry.example/nodemesh:0.2.0"),
    Run("kubectl delete namespace nodemesh-system"),
    Check(|desk| desk.nothing_is_left()),
    // The command line.
    Run("meshctl install -f values.yaml --dry-run"),
    Check(|desk| desk.nothing_is_left()),
    Run("meshctl install"),
    Check(|desk| desk.is_whole()),
    Run("meshctl install --profile demo --set image=registry.example/nodemesh:0.1.0"),
    Check(|desk| desk.is_whole()),
    Run("meshctl manifest generate"),
    Run("meshctl manifest crds"),
    // Opting in.
    Run("kubectl label namespace shop istio.io/dataplane-mode=ambient"),
    Check(|desk| desk.enrolled(&["batch-7", "cart"])),
    Run("kubectl label namespace shop nodemesh.dev/mesh=enabled"),
    Run("kubectl label pod -n shop batch-7 nodemesh.dev/mesh=disabled"),
    Run("kubectl label namespace shop istio.io/dataplane-mode-"),
    Check(|desk| desk.enrolled(&["cart"])),
    Run(STRICT),
    Check(|desk| desk.route()),
    // Questions.
    Run("meshctl status"),
    Run("meshctl status -o wide"),
    Run("meshctl status --node worker-1"),
    Run("meshctl explain --from shop/cart --to reviews:9080"),
    Run(
        "meshctl explain --from shop/cart --to reviews:9080 --method GET --path /reviews/0 --header 'end-user: jason'",
    ),
    Run("meshctl connections"),
    Run("meshctl connections --node worker-1"),
    Run("meshctl top --once"),
    Run("meshctl profile --seconds 10"),
    Run("meshctl proxy-config routes shop/cart --host reviews"),
    Run("meshctl proxy-config clusters shop/cart --host reviews"),
    Run("meshctl proxy-config endpoints shop/cart --host reviews"),
    Run("meshctl proxy-config listeners shop/cart"),
    Run("meshctl certificates"),
    Run("meshctl analyze --live"),
    Run("meshctl validate --live"),
    Run("meshctl validate route.yaml"),
    Check(|desk| desk.forms_are_alike()),
    Instead(
        "meshctl explain --from POD --to HOST:PORT",
        "meshctl explain --from shop/cart --to reviews:9080",
    ),
    Instead(
        "meshctl policy test -f DIR --from POD --to POD:PORT",
        "meshctl policy test -f manifests --from shop/cart --to shop/reviews-1:9080",
    ),
    Named("meshctl explain"),
    Named("meshctl proxy-config"),
    Named("meshctl proxy-config clusters"),
    Named("meshctl upgrade"),
    Run("source <(meshctl completion bash)"),
    Run("meshctl completion zsh > ~/.zfunc/_meshctl"),
    Run("meshctl completion fish > ~/.config/fish/completions/meshctl.fish"),
    Run("meshctl bug-report --file mesh.tar.gz"),
    // What Kubernetes knows.
    Run("kubectl -n nodemesh-system logs daemonset/nodemesh-agent --tail=100"),
    Run("kubectl -n nodemesh-system logs daemonset/nodemesh-agent --all-containers --tail=100"),
    Run("kubectl -n nodemesh-system logs deployment/nodemesh-controller --tail=100"),
    Run("kubectl -n nodemesh-system describe pods -l app.kubernetes.io/name=nodemesh-agent"),
    Run("kubectl -n nodemesh-system get configmap nodemesh-ca-root-cert"),
    Run("kubectl -n nodemesh-system get deployment nodemesh-controller"),
    Run("kubectl -n nodemesh-system get endpointslices -l kubernetes.io/service-name=nodemesh-controller"),
    Run("kubectl describe pod -n shop cart"),
    Run("kubectl get events -n shop --field-selector reason=FailedCreatePodSandBox"),
    Run("kubectl get namespace shop --show-labels"),
    Run("kubectl get peerauthentication,authorizationpolicy -A"),
    Run("kubectl get endpointslices -n shop -l kubernetes.io/service-name=reviews"),
    Run("kubectl get networkpolicy -A"),
    Run("kubectl get poddisruptionbudget -A"),
    Run("kubectl get virtualservice -n shop reviews -o yaml"),
    Run("kubectl auth can-i --list --as=system:serviceaccount:nodemesh-system:nodemesh-agent"),
    Run("kubectl apply --dry-run=server -f route.yaml"),
    // Work on the cluster.
    Run("kubectl drain worker-2 --ignore-daemonsets --delete-emptydir-data"),
    Run("kubectl uncordon worker-2"),
    Run("kubectl delete validatingwebhookconfiguration nodemesh"),
    Run("meshctl upgrade -f values.yaml --set image=registry.example/nodemesh:0.2.0"),
    Check(|desk| desk.is_whole()),
    Check(|desk| desk.serves()),
    // All of it goes again.
    Check(|desk| desk.sh("kubectl delete peerauthentication,virtualservice -n shop --all").map(drop)),
    Run("meshctl uninstall"),
    Check(|desk| desk.nothing_is_left()),
    Run("meshctl uninstall --skip-nodes"),
    OnNode("mesh-agent cni uninstall"),
    OnNode("mesh-agent cleanup --node \"$(hostname)\" --purge"),
    OnNode("mesh-agent cleanup --purge"),
    Check(|desk| desk.nothing_is_left()),
];

impl Step {
    /// As the documents have it.
    fn written(&self) -> Option<&'static str> {
        match self {
            Run(text) | OnNode(text) | Named(text) | Instead(text, _) => Some(text),
            Check(_) => None,
        }
    }
}

#[test]
fn every_command_of_the_documents_is_run_here_and_no_other() -> TestResult {
    let known: BTreeSet<&str> = STEPS.iter().filter_map(Step::written).collect();
    let mut unheard = known.clone();
    let mut unknown = Vec::new();
    for entry in fs::read_dir(Path::new(TREE).join("docs"))? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        for command in docs::commands(&fs::read_to_string(&path)?) {
            unheard.remove(&*command.text);
            if !known.contains(&*command.text) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                unknown.push(format!("docs/{name}:{}: {}", command.line, command.text));
            }
        }
    }
    assert!(unknown.is_empty(), "give these a step in tests/tests/cluster_docs.rs:\n{}", unknown.join("\n"));
    assert!(unheard.is_empty(), "no document has these any more: {unheard:#?}");
    Ok(())
}

#[test]
fn the_commands_of_the_documents_do_what_they_say() -> TestResult {
    require_cluster!();
    let cluster = Cluster::start(test_name!(), &["worker-1", "worker-2"])?;
    let desk = Desk::laid(&cluster)?;
    for step in STEPS {
        let begun = std::time::Instant::now();
        let done = match step {
            Run(command) | Instead(_, command) => desk.sh(command).map(drop),
            Named(command) => desk.sh(&format!("{command} --help")).map(drop),
            OnNode(command) => desk.on_node(command),
            Check(check) => check(&desk),
        };
        let what = step.written().unwrap_or("(check)");
        done.with_context(|| format!("after {what}"))?;
        println!("{:6.1} s  {}", begun.elapsed().as_secs_f32(), what.lines().next().unwrap_or_default());
    }
    Ok(())
}

/// Where an administrator sits: a folder with the files that documents speak of, and the programs on the path.
struct Desk<'c> {
    cluster: &'c Cluster,
    mesh: Mesh<'c>,
    folder: PathBuf,
    path: String,
}

const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {selector: {app: reviews}, ports: [{name: http, port: 9080, targetPort: 8080}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: reviews, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: reviews}}
  template:
    metadata: {labels: {app: reviews}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: app
        image: localhost/apps:test
        imagePullPolicy: Never
        command: [/pod-tool, web, '{"name": "reviews", "failing": false}']
        readinessProbe: {httpGet: {path: /ready, port: 8080}, periodSeconds: 1}
---
"#;

/// A pod without an owner.
fn alone(name: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop, labels: {{app: {name}}}}}
spec:
  nodeName: worker-1
  terminationGracePeriodSeconds: 0
  containers:
  - name: app
    image: localhost/apps:test
    imagePullPolicy: Never
    command: [/pod-tool, web, '{{"name": "{name}", "failing": false}}']
---
"#
    )
}

const ROUTE: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: reviews}}]}]}
";

/// What `meshctl policy test` is asked about.
const MANIFESTS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {nodemesh.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop}
spec: {nodeName: worker-1}
status: {podIP: 10.244.1.2}
---
apiVersion: v1
kind: Pod
metadata: {name: reviews-1, namespace: shop}
spec: {nodeName: worker-2}
status: {podIP: 10.244.2.2}
";

/// The same with zeros.
fn without_numbers(value: Value) -> Value {
    match value {
        Value::Number(_) => Value::from(0),
        Value::Array(items) => items.into_iter().map(without_numbers).collect(),
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (name, without_numbers(value))).collect()
        }
        other => other,
    }
}

impl<'c> Desk<'c> {
    fn laid(cluster: &'c Cluster) -> anyhow::Result<Self> {
        let mesh = Mesh::to_be(cluster)?;
        for node in cluster.nodes() {
            for name in NAMES {
                node.run(&["ctr", "--namespace=k8s.io", "images", "tag", BUILT, name])?;
            }
        }
        let folder = cluster.world().directory().join("desk");
        for part in ["bin", "home/.zfunc", "home/.config/fish/completions", "manifests"] {
            fs::create_dir_all(folder.join(part))?;
        }
        let binaries = Binaries::find()?;
        let found = [
            ("meshctl", programs::meshctl()?),
            ("mesh-agent", programs::agent()?),
            ("kubectl", binaries.program("kubectl")?),
            ("helm", binaries.program("helm")?),
        ];
        for (name, program) in found {
            symlink(program, folder.join("bin").join(name))?;
        }
        symlink(Path::new(TREE).join("deploy"), folder.join("deploy"))?;
        fs::write(folder.join("values.yaml"), "logging: {level: \"info,mesh_proxy=debug\"}\n")?;
        fs::write(folder.join("route.yaml"), ROUTE)?;
        fs::write(folder.join("manifests/shop.yaml"), MANIFESTS)?;
        cluster.kubectl().apply(&[OBJECTS, &alone("cart"), &alone("batch-7")].concat())?;
        cluster.rolled_out("shop", "deployment/reviews")?;
        let path = format!("{}:{}", folder.join("bin").display(), std::env::var("PATH")?);
        Ok(Self { cluster, mesh, folder, path })
    }

    /// What a command printed.
    fn sh(&self, command: &str) -> anyhow::Result<String> {
        let home = self.folder.join("home");
        let out = Command::new("bash")
            .args(["-euo", "pipefail", "-c", command])
            .current_dir(&self.folder)
            .env("PATH", &self.path)
            .env("HOME", &home)
            .env("KUBECONFIG", self.cluster.kubeconfig())
            .env("KUBECACHEDIR", home.join("cache"))
            .output()?;
        let [said, complained] = [&out.stdout, &out.stderr].map(|said| String::from_utf8_lossy(said));
        if !out.status.success() {
            bail!("{command}: {}\n{said}{complained}", out.status);
        }
        Ok(said.into_owned())
    }

    fn on_node(&self, command: &str) -> anyhow::Result<()> {
        let command = format!("export PATH='{}'; {command}", self.path);
        self.cluster.node("worker-1")?.run(&["bash", "-euo", "pipefail", "-c", &command])?;
        Ok(())
    }

    /// Everything runs, and nothing is to be said about it.
    fn is_whole(&self) -> anyhow::Result<()> {
        for what in ["daemonset/nodemesh-agent", "deployment/nodemesh-controller"] {
            self.cluster.rolled_out("nodemesh-system", what)?;
        }
        let clean = |said: &anyhow::Result<String>| {
            said.as_ref().is_ok_and(|said| said.contains("0 errors, 0 warnings"))
        };
        eventually(LIMIT, || self.sh("meshctl verify"), clean)??;
        Ok(())
    }

    fn nodes_are_looked_at(&self) -> anyhow::Result<()> {
        let said = self.sh("meshctl precheck --nodes -o json")?;
        let rows: Vec<Value> = serde_json::from_str(&said)?;
        for node in ["worker-1", "worker-2"] {
            let good = format!("host {node}");
            let row =
                rows.iter().find(|row| row["subject"] == good.as_str()).with_context(|| said.clone())?;
            let all = ["kernel", "BTF", "cgroup v2", "bpffs"];
            let told = row["message"].as_str().unwrap_or_default();
            ensure!(row["grade"] == "good" && all.iter().all(|what| told.contains(what)), "{row}");
        }
        let left = self.sh("kubectl get pods -o name")?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    }

    fn nothing_is_left(&self) -> anyhow::Result<()> {
        let remains = self.mesh.remains()?;
        ensure!(remains.is_empty(), "{remains:#?}");
        Ok(())
    }

    /// What agents say is the same as JSON and as YAML, of the cluster that a context names.
    fn forms_are_alike(&self) -> anyhow::Result<()> {
        for question in [
            "status",
            "certificates",
            "verify",
            "proxy-config routes shop/cart --host reviews",
            "proxy-config listeners shop/cart",
            "explain --from shop/cart --to reviews:9080",
        ] {
            let ask = |form: &str| self.sh(&format!("meshctl --context nodemesh-test {question} -o {form}"));
            // Numbers are of the moment, and so may be what there is for a moment.
            let both = || -> anyhow::Result<[Value; 2]> {
                let (json, yaml) = (ask("json")?, ask("yaml")?);
                let yaml: Value = serde_saphyr::from_str(&yaml).with_context(|| yaml.clone())?;
                Ok([serde_json::from_str(&json)?, yaml].map(without_numbers))
            };
            let alike =
                |both: &anyhow::Result<[Value; 2]>| both.as_ref().is_ok_and(|[json, yaml]| json == yaml);
            let [json, _] = eventually(LIMIT, both, alike).with_context(|| question)??;
            ensure!(json.as_array().is_none_or(|rows| !rows.is_empty()), "{question}: {json}");
        }
        Ok(())
    }

    /// Of the pods without an owner, these are in the mesh.
    fn enrolled(&self, wanted: &[&str]) -> anyhow::Result<()> {
        let look = || {
            let mut enrolled = self.mesh.enrolled("shop")?;
            enrolled.retain(|name| !name.starts_with("reviews"));
            enrolled.sort();
            Ok::<_, anyhow::Error>(enrolled)
        };
        eventually(LIMIT, look, |enrolled| enrolled.as_ref().is_ok_and(|enrolled| enrolled == wanted))??;
        Ok(())
    }

    /// Something to ask about.
    fn route(&self) -> anyhow::Result<()> {
        self.sh("kubectl apply -f route.yaml")?;
        self.serves()
    }

    fn serves(&self) -> anyhow::Result<()> {
        let service = self.cluster.kubectl().json(&["get", "service", "-n", "shop", "reviews"])?;
        let ip = service["spec"]["clusterIP"].as_str().context("no clusterIP")?.parse()?;
        let to = std::net::SocketAddr::new(ip, 9080);
        let ask = || self.cluster.pod("shop", "cart").get(to, "reviews", "/reviews/0");
        eventually(LIMIT, ask, |told| told.as_ref().is_ok_and(|told| told.status == 200))??;
        Ok(())
    }
}
