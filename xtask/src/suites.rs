//! Owns the one build behind every test tier, and which test program belongs to which tier.
//!
//! One `cargo build` makes the programs and the tests together: separate builds would compile shared
//! dependencies twice, since each set of packages asks for other features.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use serde::Deserialize;

use crate::workspace::Workspace;

/// Where a test program runs. In the order of `cargo xtask test`: cheap first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// Anywhere, as anyone.
    Unit,
    /// On a kernel with our programs loaded, without a mesh around.
    Bpf,
    /// In network namespaces that stand for nodes and pods, about what the kernel does: worth another kernel.
    Netns,
    /// In the same namespaces, about what the agent does on any kernel.
    Agent,
    /// With a real API server, or a whole cluster.
    Cluster,
}

/// Netns test programs about the agent alone: what it decides, proves and says over plain sockets. Every other one runs on
/// all kernels of a default run: under emulation a test takes some ten times as long, and these would find nothing new
/// there. What their worlds need of a kernel (redirection, arrivals, tickets, tunnels between nodes, connections that a
/// policy ends) is tested there by `arrivals`, `connect_shapes`, `crash`, `original_destination`, `policy_changes`, `trust`
/// and others.
const AGENT_SUITES: [&str; 30] = [
    "authorization_policy",
    "balance",
    "bookinfo",
    "certificate_service",
    "cni",
    "config",
    "controller",
    "destination_rule",
    "dns",
    "gateway_api",
    "handover",
    "hbone",
    "hbone_adversary",
    "http_features",
    "http_routing",
    "http_servers",
    "http_smuggling",
    "http_soak",
    "joining",
    "lifecycle",
    "meshctl",
    "peer_authentication",
    "plain",
    "relay",
    "rotation",
    "scale",
    "service_entry",
    "streams",
    "virtual_service",
    "visibility",
];

/// How the names of test programs begin that want a real Kubernetes: `cluster_…` all of it, `kube_…` an API server.
const CLUSTER_PREFIXES: [&str; 2] = ["cluster_", "kube_"];

/// One test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Suite {
    pub(crate) name: String,
    pub(crate) place: Place,
    pub(crate) program: PathBuf,
    /// Folder of its package, where cargo would run it.
    pub(crate) folder: PathBuf,
}

/// The result of the build.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Built {
    pub(crate) suites: Vec<Suite>,
    /// Programs of the tree by name: `mesh-agent`, `meshctl`, …
    pub(crate) programs: BTreeMap<String, PathBuf>,
}

/// Variables by which tests find the programs they drive.
const PROGRAM_VARIABLES: [(&str, &str); 4] = [
    ("mesh-agent", "MESH_AGENT_BIN"),
    ("meshctl", "MESHCTL_BIN"),
    ("pod-tool", "MESH_POD_TOOL_BIN"),
    ("bookinfo", "MESH_BOOKINFO_BIN"),
];

impl Built {
    pub(crate) fn at(&self, place: Place) -> impl Iterator<Item = &Suite> {
        self.suites.iter().filter(move |suite| suite.place == place)
    }

    /// What to set for processes that drive the programs, with `locate` saying where they will be.
    pub(crate) fn variables(
        &self,
        locate: impl Fn(&str, &Path) -> OsString,
    ) -> Vec<(&'static str, OsString)> {
        let known = PROGRAM_VARIABLES.into_iter();
        known
            .filter_map(|(name, variable)| Some((variable, locate(name, self.programs.get(name)?))))
            .collect()
    }
}

/// The programs tests may drive, as far as `folder` has them.
pub(crate) fn programs_in(folder: &Path) -> BTreeMap<String, PathBuf> {
    let paths = PROGRAM_VARIABLES.map(|(name, _)| (name.to_owned(), folder.join(name)));
    paths.into_iter().filter(|(_, path)| path.is_file()).collect()
}

/// Builds everything in the dev profile; compiler messages go to stderr.
pub(crate) fn build(workspace: &Workspace) -> anyhow::Result<Built> {
    let mut cargo = cargo(workspace);
    cargo.args(["build", "--workspace", "--bins", "--tests", "--message-format=json-render-diagnostics"]);
    finish(workspace, cargo, "the workspace does not build")
}

/// Builds the given packages' binaries and one of their test programs in the dev profile.
pub(crate) fn build_tests(workspace: &Workspace, packages: &[&str], test: &str) -> anyhow::Result<Built> {
    let mut cargo = cargo(workspace);
    cargo.args(["build", "--bins", "--test", test, "--message-format=json-render-diagnostics"]);
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    finish(workspace, cargo, &format!("{test} does not build"))
}

/// Builds the given packages' binaries in the release profile.
pub(crate) fn build_release(workspace: &Workspace, packages: &[&str]) -> anyhow::Result<Built> {
    build_binaries(workspace, packages, &["--release"])
}

/// Builds the given packages' binaries to be looked at: optimised, in less time than a release.
pub(crate) fn build_demo(workspace: &Workspace, packages: &[&str]) -> anyhow::Result<Built> {
    build_binaries(workspace, packages, &["--profile", "demo"])
}

/// Builds the given packages' binaries in the dev profile.
pub(crate) fn build_programs(workspace: &Workspace, packages: &[&str]) -> anyhow::Result<Built> {
    build_binaries(workspace, packages, &[])
}

fn build_binaries(workspace: &Workspace, packages: &[&str], profile: &[&str]) -> anyhow::Result<Built> {
    let mut cargo = cargo(workspace);
    cargo.args(["build", "--bins", "--message-format=json-render-diagnostics"]).args(profile);
    cargo.args(packages.iter().flat_map(|package| ["--package", package]));
    finish(workspace, cargo, &format!("{} does not build", packages.join(", ")))
}

/// Runs a build that prints its messages as JSON, and returns what it made. `failure` says what a failure means.
pub(crate) fn finish(workspace: &Workspace, mut cargo: Command, failure: &str) -> anyhow::Result<Built> {
    let output = cargo.stderr(Stdio::inherit()).output().context("start cargo")?;
    ensure!(output.status.success(), "{failure}");
    parse(workspace, &String::from_utf8(output.stdout).context("read cargo's messages")?)
}

/// The cargo that runs us, in the workspace root.
pub(crate) fn cargo(workspace: &Workspace) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(&workspace.root).stdin(Stdio::null());
    cargo
}

/// The part of cargo's JSON messages we use.
#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

fn parse(workspace: &Workspace, messages: &str) -> anyhow::Result<Built> {
    let mut built = Built::default();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message = serde_json::from_str(line).context("parse a message of cargo")?;
        let Message {
            manifest_path: Some(manifest),
            target: Some(target),
            profile: Some(profile),
            executable: Some(program),
            reason,
        } = message
        else {
            continue;
        };
        if reason != "compiler-artifact" || target.kind.iter().any(|kind| kind == "custom-build") {
            continue;
        }
        if !profile.test {
            built.programs.insert(target.name, program);
            continue;
        }
        let folder = manifest.parent().unwrap_or(&workspace.root).to_path_buf();
        let place = place(workspace.relative(&folder), &target.kind, &target.name);
        let package = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Two packages may have programs of one name; unit tests of a library carry the package's alone.
        let name = if target.kind.iter().any(|kind| kind == "lib") {
            package
        } else {
            format!("{package}/{}", target.name)
        };
        built.suites.push(Suite { name, place, program, folder });
    }
    built.suites.sort_by(|a, b| (a.place, &a.name).cmp(&(b.place, &b.name)));
    Ok(built)
}

/// Integration tests of the kernel side and of the harness need a kernel; all else is a unit test.
fn place(package: &Path, kind: &[String], name: &str) -> Place {
    if !kind.iter().any(|kind| kind == "test") {
        return Place::Unit;
    }
    match package.to_str() {
        Some("mesh-agent/redirect") => Place::Bpf,
        Some("tests") if CLUSTER_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) => Place::Cluster,
        Some("tests") if AGENT_SUITES.contains(&name) => Place::Agent,
        Some("tests") => Place::Netns,
        _ => Place::Unit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace() -> Workspace {
        Workspace { root: "/w".into(), target: "/w/target".into() }
    }

    fn artifact(folder: &str, kind: &str, name: &str, test: bool) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","manifest_path":"/w/{folder}/Cargo.toml","target":{{"kind":["{kind}"],"name":"{name}"}},"profile":{{"test":{test}}},"executable":"/w/target/{name}"}}"#
        )
    }

    #[test]
    fn test_programs_are_sorted_into_places_by_package_and_kind() {
        let messages = [
            artifact("tests", "test", "connect", true),
            artifact("tests", "test", "dns", true),
            artifact("tests", "test", "kube_source", true),
            artifact("mesh-agent/redirect", "test", "hooks", true),
            artifact("mesh-agent/redirect", "lib", "mesh_redirect", true),
            artifact("mesh-agent/proxy", "test", "copy", true),
            artifact("mesh-agent", "bin", "mesh-agent", false),
            artifact("mesh-agent/redirect", "custom-build", "build-script-build", false),
        ];
        let built = parse(&workspace(), &messages.join("\n")).unwrap();
        let names = |place| built.at(place).map(|suite| suite.name.as_str()).collect::<Vec<_>>();
        assert_eq!(names(Place::Unit), ["proxy/copy", "redirect"]);
        assert_eq!(names(Place::Bpf), ["redirect/hooks"]);
        assert_eq!(names(Place::Netns), ["tests/connect"]);
        assert_eq!(names(Place::Agent), ["tests/dns"]);
        assert_eq!(names(Place::Cluster), ["tests/kube_source"]);
        assert_eq!(built.programs.keys().collect::<Vec<_>>(), ["mesh-agent"]);
    }

    #[test]
    fn programs_are_announced_under_their_variables() {
        let built = parse(&workspace(), &artifact("mesh-agent", "bin", "meshctl", false)).unwrap();
        assert_eq!(built.variables(|_, path| path.into()), [("MESHCTL_BIN", "/w/target/meshctl".into())]);
    }
}
