//! The mesh in a cluster, installed as an operator would.

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

use super::{Cluster, image};
use crate::kernel::Loaded;
use crate::programs;
use crate::saying::say;
use crate::waiting::eventually;

/// The archive of the image to be tested in the place of the debug build's, such as that of `cargo xtask dist`.
const IMAGE_VARIABLE: &str = "MESH_TESTS_IMAGE";

/// What that image is called on the nodes; suites give it further names.
const IMAGE: &str = "localhost/nodemesh:dev";

/// The folder of the tree, from which people name files.
const TREE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// What an installation in a test cluster differs in: the image is on the nodes already, and logs say why something failed.
const SETTINGS: [&str; 3] = [
    "image=localhost/nodemesh:dev",
    "imagePullPolicy=Never",
    "logging.level=info,mesh_proxy=debug,mesh_agent=debug",
];

/// The label by which a namespace joins the mesh.
const LABEL: &str = "nodemesh.dev/mesh";

/// How long pods may take to join on a busy machine.
const ENROLMENT_LIMIT: Duration = Duration::from_secs(120);

/// Where the mesh's image is: what the environment names, else the debug build.
fn archive() -> anyhow::Result<PathBuf> {
    let Some(named) = env::var_os(IMAGE_VARIABLE).filter(|path| !path.is_empty()) else {
        return Ok(image("nodemesh")?);
    };
    // Tests run in the folder of their package.
    let path = Path::new(TREE).join(named);
    ensure!(path.is_file(), "{IMAGE_VARIABLE} names {}, which is no file", path.display());
    say(&format!("the mesh's image is {}", path.display()));
    Ok(path)
}

/// Which pods of a namespace are in the mesh, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Enrolment {
    /// Those of which an agent says so.
    pub enrolled: Vec<String>,
    /// All others that Kubernetes knows.
    pub missing: Vec<String>,
}

impl Enrolment {
    /// Whether there are pods, and all of them are in.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty() && !self.enrolled.is_empty()
    }
}

/// The mesh of a cluster.
#[derive(Debug)]
pub struct Mesh<'c> {
    cluster: &'c Cluster,
}

impl<'c> Mesh<'c> {
    /// `meshctl install` of what this tree builds; returns when controller and agents are ready.
    ///
    /// # Errors
    /// When it fails; what it said is in the error.
    pub fn install(cluster: &'c Cluster) -> anyhow::Result<Self> {
        Self::install_with(cluster, &[])
    }

    /// The same with more settings, as `--set` takes them.
    ///
    /// # Errors
    /// As [`Mesh::install`].
    pub fn install_with(cluster: &'c Cluster, settings: &[&str]) -> anyhow::Result<Self> {
        let mesh = Self::to_be(cluster)?;
        mesh.put("install", settings)?;
        Ok(mesh)
    }

    /// `meshctl upgrade`; the settings are all those besides the ones of every installation here, which they may overrule.
    ///
    /// # Errors
    /// As [`Mesh::install`].
    pub fn upgrade_with(&self, settings: &[&str]) -> anyhow::Result<()> {
        self.put("upgrade", settings)
    }

    fn put(&self, command: &str, settings: &[&str]) -> anyhow::Result<()> {
        let mut arguments = vec![command, "--profile=minimal"];
        arguments.extend(SETTINGS.iter().chain(settings).flat_map(|setting| ["--set", setting]));
        self.meshctl(&arguments).map(drop)
    }

    /// A mesh that somebody else installs: its image is on the nodes.
    ///
    /// # Errors
    /// When a node does not take the image, or has it under another name than suites know.
    pub fn to_be(cluster: &'c Cluster) -> anyhow::Result<Self> {
        let archive = archive()?;
        let shown = archive.display();
        cluster.load(&archive).with_context(|| format!("load the mesh's image {shown}"))?;
        for node in cluster.nodes() {
            let names = node.run(&["ctr", "--namespace=k8s.io", "images", "list", "--quiet"])?;
            // Pods of an image that is not there would hang until somebody gives up, without a word why.
            ensure!(names.lines().any(|name| name == IMAGE), "{shown} holds no image {IMAGE}, but:\n{names}");
        }
        Ok(Self { cluster })
    }

    /// meshctl with the administrator's kubeconfig: what it printed.
    ///
    /// # Errors
    /// When it cannot be run or ends badly.
    pub fn meshctl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = self.command(arguments)?.output()?;
        if !output.status.success() {
            let said = [&output.stdout, &output.stderr].map(|stream| String::from_utf8_lossy(stream));
            bail!("meshctl {}: {}{}", arguments.join(" "), said[0], said[1]);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same, for a caller who wants to watch it run.
    ///
    /// # Errors
    /// When there is no such program.
    pub fn command(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(programs::meshctl()?);
        command.args(arguments).env("KUBECONFIG", self.cluster.kubeconfig());
        Ok(command)
    }

    /// Its answer as JSON.
    ///
    /// # Errors
    /// As [`Mesh::meshctl`].
    pub fn ask(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.meshctl(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("read {text}"))
    }

    /// Take the running pods of a namespace into the mesh.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn enrol(&self, namespace: &str) -> anyhow::Result<()> {
        let label = format!("{LABEL}=enabled");
        self.cluster.kubectl().run(&["label", "namespace", namespace, &label, "--overwrite"])?;
        Ok(())
    }

    /// Wait until all pods of a namespace that are to stay are in the mesh; how long that took.
    ///
    /// # Errors
    /// When they are not in time.
    pub fn all_enrolled(&self, namespace: &str) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let look = || Ok::<_, anyhow::Error>((self.enrolled(namespace)?.len(), self.running(namespace)?));
        eventually(ENROLMENT_LIMIT, look, |seen| seen.as_ref().is_ok_and(|(is, want)| is == want))??;
        Ok(began.elapsed())
    }

    /// Which pods of a namespace its agents have taken in, and which not.
    ///
    /// # Errors
    /// When an agent or the API server does not answer.
    pub fn enrolment(&self, namespace: &str) -> anyhow::Result<Enrolment> {
        let known = self.enrolled(namespace)?;
        let pods = self.cluster.kubectl().json(&["get", "pods", "-n", namespace])?;
        let pods = pods["items"].as_array().into_iter().flatten();
        let names = pods.filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_owned()));
        let (enrolled, missing) = names.partition(|name| known.contains(name));
        Ok(Enrolment { enrolled, missing })
    }

    fn running(&self, namespace: &str) -> anyhow::Result<usize> {
        let pods = self.cluster.kubectl().json(&["get", "pods", "-n", namespace])?;
        Ok(pods["items"].as_array().map_or(0, Vec::len))
    }

    /// What there still is of the mesh, in the cluster and on its nodes: nothing, after it was uninstalled.
    ///
    /// # Errors
    /// When somebody cannot be asked.
    pub fn remains(&self) -> anyhow::Result<Vec<String>> {
        let mut found = self.cluster.kubectl().objects_of_the_mesh()?;
        let look = "grep -l nodemesh /etc/cni/net.d/*; ls -d /opt/cni/bin/*nodemesh* /sys/fs/bpf/*nodemesh* /run/nodemesh/*sock*; \
                    find /var/lib/nodemesh -mindepth 1; true";
        for node in self.cluster.nodes() {
            let left = node.run(&["sh", "-c", look])?;
            found.extend(left.lines().map(|line| format!("node {}: {line}", node.name())));
        }
        Ok(found)
    }

    /// What the agents of all nodes have loaded in the kernel.
    ///
    /// # Errors
    /// When an agent does not answer, or does not say which programs are its own.
    pub fn loaded(&self) -> anyhow::Result<Loaded> {
        let status = self.ask(&["status"])?;
        let nodes = status.as_array().context("no list of nodes")?;
        let mut programs = BTreeSet::new();
        for node in nodes {
            let found = node.pointer("/answer/kernel/programs").and_then(Value::as_array);
            let ids: Vec<u64> = found.into_iter().flatten().filter_map(|one| one["id"].as_u64()).collect();
            if ids.is_empty() || ids.contains(&0) {
                bail!("programs without an id: {node}");
            }
            programs.extend(ids.into_iter().filter_map(|id| u32::try_from(id).ok()));
        }
        Loaded::around(&programs).context("look at the kernel's programs")
    }

    /// The enrolled pods of a namespace, by name, of all nodes.
    ///
    /// # Errors
    /// When an agent does not answer.
    pub fn enrolled(&self, namespace: &str) -> anyhow::Result<Vec<String>> {
        let status = self.ask(&["status"])?;
        let nodes = status.as_array().context("no list of nodes")?;
        let pods = nodes.iter().filter_map(|node| node.pointer("/answer/pods")?.as_array()).flatten();
        let enrolled = pods.filter(|pod| pod["namespace"] == namespace && pod["state"] == "enrolled");
        Ok(enrolled.filter_map(|pod| Some(pod["name"].as_str()?.to_owned())).collect())
    }
}
