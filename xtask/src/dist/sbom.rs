//! Owns the list of what the programs are made of, as CycloneDX has it: from Cargo's own resolution, so that it cannot be
//! out of date. Without times and serial numbers, so that it is the same for the same lock file.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{process, suites, workspace::Workspace};

/// The package whose programs are shipped.
const PACKAGE: &str = "mesh-agent";

/// The part of `cargo metadata` that is used.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for packages of this tree.
    source: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    /// `None` for what gets into the program; `dev` and `build` do not.
    kind: Option<String>,
}

/// The list for the image's programs.
pub(super) fn of_programs(workspace: &Workspace) -> anyhow::Result<String> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut cargo = suites::cargo(workspace);
    cargo.args(["metadata", "--format-version=1", "--locked", "--filter-platform", &target]);
    let metadata: Metadata =
        serde_json::from_slice(&process::capture(&mut cargo)?).context("read cargo's metadata")?;
    let list = list(&metadata)?;
    Ok(format!("{list:#}\n"))
}

fn list(metadata: &Metadata) -> anyhow::Result<Value> {
    let packages: BTreeMap<&str, &Package> =
        metadata.packages.iter().map(|package| (package.id.as_str(), package)).collect();
    let nodes: BTreeMap<&str, &Node> =
        metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let root = metadata.packages.iter().find(|package| package.name == PACKAGE && package.source.is_none());
    let root = root.context("the tree has no package mesh-agent")?;
    let mut found = BTreeSet::new();
    let mut left = vec![root.id.as_str()];
    while let Some(id) = left.pop() {
        if !found.insert(id) {
            continue;
        }
        let dependencies = nodes.get(id).map(|node| node.deps.as_slice()).unwrap_or_default();
        let shipped = |dependency: &&Dependency| dependency.dep_kinds.iter().any(|kind| kind.kind.is_none());
        left.extend(dependencies.iter().filter(shipped).map(|dependency| dependency.pkg.as_str()));
    }
    let mut components: Vec<(String, Value)> = found
        .iter()
        .filter(|id| **id != root.id)
        .filter_map(|id| packages.get(id))
        .map(|package| (reference(package), component(package, "library")))
        .collect();
    components.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": { "component": component(root, "application") },
        "components": components.into_iter().map(|(_, component)| component).collect::<Vec<_>>(),
    }))
}

/// The package URL, by which advisories are looked up.
fn reference(package: &Package) -> String {
    format!("pkg:cargo/{}@{}", package.name, package.version)
}

fn component(package: &Package, kind: &str) -> Value {
    let mut component = json!({
        "type": kind,
        "bom-ref": reference(package),
        "name": package.name,
        "version": package.version,
        "purl": reference(package),
    });
    if let Some(license) = &package.license {
        // An old way to write it.
        component["licenses"] = json!([{ "expression": license.replace('/', " OR ") }]);
    }
    component
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_shipped_is_listed_each_once_and_in_order() -> anyhow::Result<()> {
        let package = |name: &str, source: Value| json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0", "source": source});
        let depends = |on: &str, kind: Value| json!({"pkg": on, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [package("mesh-agent", Value::Null), package("zeta", json!("r")), package("alpha", json!("r")),
                         package("for-tests", json!("r")), package("for-builds", json!("r"))],
            "resolve": {"nodes": [
                {"id": "mesh-agent", "deps": [depends("zeta", Value::Null), depends("for-tests", json!("dev"))]},
                {"id": "zeta", "deps": [depends("alpha", Value::Null), depends("for-builds", json!("build"))]},
                {"id": "alpha", "deps": [depends("zeta", Value::Null)]},
            ]},
        });
        let list = list(&serde_json::from_value(metadata)?)?;
        let names: Vec<&str> = list["components"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|one| one["name"].as_str())
            .collect();
        assert_eq!(names, ["alpha", "zeta"]);
        assert_eq!(list["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(list["metadata"]["component"]["purl"], "pkg:cargo/mesh-agent@1.0.0");
        Ok(())
    }

    #[test]
    fn the_list_of_this_tree_names_the_runtime_and_not_the_test_harness() -> anyhow::Result<()> {
        let list = of_programs(&Workspace::here())?;
        assert!(list.contains("pkg:cargo/tokio@") && list.contains("pkg:cargo/mesh-core@"), "{list}");
        assert!(!list.contains("pkg:cargo/proptest@") && !list.contains("pkg:cargo/mesh-tests@"));
        Ok(())
    }
}
