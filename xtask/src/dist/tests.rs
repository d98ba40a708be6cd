//! The archive as registries and container engines see it: what it says, and that it says it again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read as _,
    path::Path,
    time::{Duration, SystemTime},
};

use serde_json::Value;

use super::*;

#[test]
fn what_stands_for_a_folder_is_the_same_wherever_it_is() -> anyhow::Result<()> {
    let at = |root: &str| Workspace { root: root.into(), target: Path::new(root).join("target") };
    let names = |root: &str| -> anyhow::Result<Vec<&'static str>> {
        Ok(moved(&at(root))?.into_iter().map(|(_, name)| name).collect())
    };
    assert_eq!(names("/a")?, names("/b/c")?);
    Ok(())
}

/// An archive that was read back.
struct Archive {
    digest: String,
    parts: BTreeMap<String, Vec<u8>>,
}

impl Archive {
    /// Writes the image of two small programs in a folder of its own, whose files are so old.
    fn write(folder: &Path, age: Duration, sbom: &str) -> anyhow::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut programs = Vec::new();
        for name in PROGRAMS {
            let path = folder.join(name);
            fs::write(&path, format!("#!/bin/false\n{name}\n"))?;
            File::options().write(true).open(&path)?.set_modified(SystemTime::now() - age)?;
            programs.push((name, path));
        }
        let to = folder.join("nodemesh.tar");
        let digest = image(&Workspace::here(), "localhost/nodemesh:test", &programs, sbom)?.write(&to)?;
        let mut parts = BTreeMap::new();
        for entry in tar::Archive::new(File::open(to)?).entries()? {
            let mut entry = entry?;
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            parts.insert(entry.path()?.display().to_string(), bytes);
        }
        Ok(Self { digest, parts })
    }

    fn blob(&self, digest: &Value) -> anyhow::Result<&[u8]> {
        let hash = digest.as_str().and_then(|digest| digest.strip_prefix("sha256:")).context("no digest")?;
        Ok(self.parts.get(&format!("blobs/sha256/{hash}")).with_context(|| format!("no {hash}"))?)
    }

    fn json(&self, digest: &Value) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(self.blob(digest)?)?)
    }
}

/// Name and version of every package of the lock file.
fn locked(workspace: &Workspace) -> anyhow::Result<BTreeSet<(String, String)>> {
    let text = fs::read_to_string(workspace.root.join("Cargo.lock"))?;
    let value = |package: &str, key: &str| {
        let line = package.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")));
        Some(line?.trim_matches('"').to_owned())
    };
    let packages = text.split("[[package]]").skip(1);
    Ok(packages.filter_map(|package| Some((value(package, "name")?, value(package, "version")?))).collect())
}

#[test]
fn an_image_says_what_it_is_and_holds_nothing_of_where_and_when_it_was_made() -> anyhow::Result<()> {
    let workspace = Workspace::here();
    let sbom = sbom::of_programs(&workspace)?;
    let folder = env::temp_dir().join(format!("nodemesh-dist-{}", std::process::id()));
    let one = Archive::write(&folder.join("one"), Duration::ZERO, &sbom)?;
    let other = Archive::write(&folder.join("some/other"), Duration::from_secs(1_000_000), &sbom)?;
    assert_eq!(one.digest, other.digest);
    assert!(one.parts == other.parts, "not only the digest");

    let index: Value = serde_json::from_slice(&one.parts["index.json"])?;
    let listed = &index["manifests"][0];
    assert_eq!(listed["digest"], one.digest);
    assert_eq!(listed["annotations"]["org.opencontainers.image.ref.name"], "localhost/nodemesh:test");
    let manifest = one.json(&listed["digest"])?;
    let config = one.json(&manifest["config"]["digest"])?;
    let settings = &config["config"];
    assert_eq!(
        (&settings["User"], &settings["Entrypoint"]),
        (&"65532:65532".into(), &serde_json::json!(["/mesh-agent"]))
    );
    let labels = settings["Labels"].as_object().context("no labels")?;
    let label = |name: &str| labels.get(&format!("org.opencontainers.image.{name}")).and_then(Value::as_str);
    for name in ["title", "description", "licenses", "version"] {
        assert!(label(name).is_some_and(|text| !text.is_empty()), "{name}: {labels:?}");
    }
    assert_eq!(label("revision").map(str::to_owned), git(&workspace, &["rev-parse", "HEAD"]));
    assert!(labels.keys().all(|name| name.starts_with("org.opencontainers.image.")), "{labels:?}");

    // One time for everything, which is the commit's; one owner; no names of the machine's accounts.
    let time = time(&workspace)?;
    let mut held = BTreeMap::new();
    let layer = one.blob(&manifest["layers"][0]["digest"])?;
    for entry in tar::Archive::new(layer).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.display().to_string();
        let header = entry.header();
        assert_eq!((header.mtime()?, header.uid()?, header.gid()?), (time, 0, 0), "{path}");
        let accounts = [header.username_bytes(), header.groupname_bytes()]
            .map(|name| name.unwrap_or_default().is_empty());
        assert_eq!(accounts, [true, true], "{path}");
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        held.insert(path, bytes);
    }
    let names: BTreeSet<&str> = held.keys().map(String::as_str).collect();
    assert_eq!(names, BTreeSet::from(["etc/", "etc/nsswitch.conf", "mesh-agent", "meshctl", SBOM, "tmp/"]));

    lists_packages(&workspace, &serde_json::from_slice(&held[SBOM])?)?;
    fs::remove_dir_all(folder)?;
    Ok(())
}

/// The list in the image is of this tree: what it names is locked, and what the agent asks for by name is there.
fn lists_packages(workspace: &Workspace, list: &Value) -> anyhow::Result<()> {
    let components = list["components"].as_array().context("no components")?;
    let text = |component: &Value, key: &str| component[key].as_str().unwrap_or_default().to_owned();
    let listed: BTreeSet<(String, String)> =
        components.iter().map(|one| (text(one, "name"), text(one, "version"))).collect();
    let locked = locked(workspace)?;
    assert_eq!(listed.difference(&locked).collect::<Vec<_>>(), Vec::<&(String, String)>::new());
    let manifest = fs::read_to_string(workspace.root.join("mesh-agent/Cargo.toml"))?;
    let wanted = manifest.split("\n[dependencies]").nth(1).and_then(|text| text.split("\n[").next());
    let wanted: Vec<&str> = wanted
        .context("mesh-agent has no dependencies")?
        .lines()
        .filter_map(|line| {
            line.split(['.', ' ', '=']).next().filter(|name| !name.is_empty() && !name.starts_with('#'))
        })
        .collect();
    assert!(wanted.len() > 10, "{wanted:?}");
    for name in wanted {
        assert!(listed.iter().any(|(listed, _)| listed == name), "{name} is not listed");
    }
    Ok(())
}
