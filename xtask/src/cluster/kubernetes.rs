//! Owns Kubernetes' programs: built by Go from the modules that `tests/cluster/go.mod` pins, once for each version.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::Context;

use super::go;
use crate::{process, workspace::Workspace};

/// Packages to build; a program is called like the last part of its package.
const PACKAGES: [&str; 9] = [
    "k8s.io/kubernetes/cmd/kube-apiserver",
    "k8s.io/kubernetes/cmd/kube-controller-manager",
    "k8s.io/kubernetes/cmd/kube-proxy",
    "k8s.io/kubernetes/cmd/kube-scheduler",
    "k8s.io/kubernetes/cmd/kubectl",
    "k8s.io/kubernetes/cmd/kubelet",
    "helm.sh/helm/v4/cmd/helm",
    "./coredns",
    "./pause",
];

/// Files the programs are built from, besides the modules that go.mod pins.
const SOURCES: [&str; 4] = ["go.mod", "go.sum", "coredns/main.go", "pause/main.go"];

/// By which tests find the programs.
pub(crate) const VARIABLE: &str = "MESH_KUBERNETES_BIN";

/// Holds what the programs were built from.
const STAMP: &str = "built-from";

/// The folder of the programs, if they are all there and built from what the tree has now.
pub(crate) fn built(workspace: &Workspace) -> Option<PathBuf> {
    let sources = sources(workspace).ok()?;
    let folder = folder(workspace, &sources).ok()?;
    let stamp = fs::read_to_string(folder.join(STAMP)).ok()?;
    let whole = PACKAGES.iter().all(|package| folder.join(program(package)).is_file());
    (whole && stamp == sources).then_some(folder)
}

/// The folder of the programs, after building them if need be.
pub(crate) fn ensure(workspace: &Workspace) -> anyhow::Result<PathBuf> {
    if let Some(folder) = built(workspace) {
        return Ok(folder);
    }
    let sources = sources(workspace)?;
    let folder = folder(workspace, &sources)?;
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let lock = fs::File::create(folder.join("lock")).context("create a lock")?;
    lock.lock().context("wait for another run that builds Kubernetes")?;
    if let Some(folder) = built(workspace) {
        return Ok(folder);
    }
    let version = version(&sources)?;
    eprintln!("cluster: building Kubernetes {version}, once: some six minutes on two cores");
    let begun = Instant::now();
    let module = module(workspace);
    let fresh = folder.join("new");
    fs::create_dir_all(&fresh).with_context(|| format!("create {}", fresh.display()))?;
    let mut build = Command::new(go::find(&module)?);
    build
        .current_dir(&module)
        // The environment's own flags could change what is built.
        .env_remove("GOFLAGS")
        .envs([("CGO_ENABLED", "0"), ("GOTOOLCHAIN", "local"), ("GOWORK", "off")])
        .args(["build", "-trimpath", "-buildvcs=false", "-ldflags", &linker_flags(version), "-o"])
        .arg(&fresh)
        .args(PACKAGES);
    process::run(&mut build).context("build Kubernetes")?;
    for package in PACKAGES {
        let name = program(package);
        // A program that runs keeps its old file.
        fs::rename(fresh.join(name), folder.join(name)).with_context(|| format!("keep {name}"))?;
    }
    fs::remove_dir_all(&fresh).with_context(|| format!("remove {}", fresh.display()))?;
    // Last, so that an interrupted build is never taken for a whole one.
    fs::write(folder.join(STAMP), sources).context("note what was built")?;
    eprintln!("cluster: built in {:.0} s", begun.elapsed().as_secs_f64());
    Ok(folder)
}

fn module(workspace: &Workspace) -> PathBuf {
    workspace.root.join("tests/cluster")
}

fn folder(workspace: &Workspace, sources: &str) -> anyhow::Result<PathBuf> {
    Ok(workspace.target.join("kubernetes").join(version(sources)?))
}

fn sources(workspace: &Workspace) -> anyhow::Result<String> {
    let module = module(workspace);
    let read = |name: &&str| {
        let path = module.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    SOURCES.iter().map(read).collect()
}

/// Kubernetes' version without the `v`.
fn version(go_mod: &str) -> anyhow::Result<&str> {
    let version = go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        (words.next() == Some("k8s.io/kubernetes")).then(|| words.next()?.strip_prefix('v')).flatten()
    });
    version.context("go.mod does not require k8s.io/kubernetes")
}

/// kubectl and the checks of version skew read these; Go alone leaves them empty.
fn linker_flags(version: &str) -> String {
    let mut numbers = version.split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let variables = [
        ("gitVersion", format!("v{version}")),
        ("gitMajor", major.to_owned()),
        ("gitMinor", minor.to_owned()),
    ];
    variables.iter().fold("-s -w".to_owned(), |flags, (name, value)| {
        flags + &format!(" -X k8s.io/component-base/version.{name}={value}")
    })
}

fn program(package: &str) -> &str {
    Path::new(package).file_name().and_then(|name| name.to_str()).unwrap_or(package)
}

/// Checks that nothing here is out of step with the module.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_is_a_tool_of_the_module_or_beside_it() -> anyhow::Result<()> {
        let workspace = Workspace::here();
        let sources = sources(&workspace)?;
        for package in PACKAGES {
            let known = match package.strip_prefix("./") {
                Some(folder) => module(&workspace).join(folder).join("main.go").is_file(),
                None => sources.lines().any(|line| line.trim() == package),
            };
            assert!(known, "{package} is not in tests/cluster");
        }
        Ok(())
    }

    #[test]
    fn the_version_is_read_and_told_to_the_linker() {
        let version = version("require (\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n").unwrap();
        assert_eq!(version, "1.36.3");
        let flags = linker_flags(version);
        assert!(
            flags.ends_with("version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"),
            "{flags}"
        );
        assert!(super::version("k8s.io/kubernetes-x v1.2.3").is_err());
    }
}
