//! Owns reading our `Cargo.toml` files, and the rule that versions live in the workspace table alone.
//!
//! Our manifests hold one dependency a line, so a line reader is enough; one that is not is a finding.

use super::{File, Findings, Tree};

/// Its own workspace, with its own pins.
const EBPF: &str = "mesh-ebpf/Cargo.toml";

/// One entry of a dependency table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Dependency {
    pub(super) name: String,
    /// From `[dev-dependencies]`.
    pub(super) dev: bool,
    /// Everything after the name.
    spec: String,
}

/// The package's name, if the manifest has one.
pub(super) fn package_name(manifest: &File) -> Option<String> {
    let lines = section_lines(&manifest.text);
    let mut names = lines.filter(|&(section, _)| section == "package");
    names.find_map(|(_, line)| line.strip_prefix("name = \"")?.strip_suffix('"').map(str::to_owned))
}

/// All dependencies of a package, build dependencies and those of one platform included.
pub(super) fn dependencies(manifest: &File) -> Vec<Dependency> {
    let mut found = Vec::new();
    for (section, line) in section_lines(&manifest.text) {
        // `[dependencies]`, `[target.'cfg(…)'.dependencies]`, but not the workspace's own table.
        let is_table = section.ends_with("dependencies") && section != "workspace.dependencies";
        let Some((key, spec)) = line.split_once('=').filter(|_| is_table) else { continue };
        // `name = { … }` or `name.workspace = true`.
        let (name, spec) = match key.trim().split_once('.') {
            Some((name, field)) => (name, format!("{field} = {}", spec.trim())),
            None => (key.trim(), spec.trim().to_owned()),
        };
        found.push(Dependency { name: name.to_owned(), dev: section.ends_with("dev-dependencies"), spec });
    }
    found
}

/// Lines that set something, with the section they stand in.
fn section_lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut section = "";
    text.lines().map(str::trim).filter_map(move |line| {
        if let Some(header) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            section = header;
            return None;
        }
        (!line.is_empty() && !line.starts_with('#')).then_some((section, line))
    })
}

pub(super) fn check(tree: &Tree, found: &mut Findings) {
    for manifest in tree.manifests().filter(|manifest| manifest.path != "Cargo.toml") {
        for dependency in dependencies(manifest) {
            let Dependency { name, spec, .. } = &dependency;
            if manifest.path == EBPF {
                let pinned = spec.starts_with("\"=") || spec.contains("path =");
                if !pinned {
                    found.fail(EBPF, format!("pin `{name}` with `=`: the eBPF toolchain moves as one"));
                }
            } else if !spec.contains("workspace = true") {
                let what =
                    format!("`{name}` must say `workspace = true`; its version belongs in the root manifest");
                found.fail(&manifest.path, what);
            }
        }
        let inherits_lints =
            section_lines(&manifest.text).any(|entry| entry == ("lints", "workspace = true"));
        if manifest.path != EBPF && !inherits_lints {
            found.fail(&manifest.path, "lacks `[lints] workspace = true`");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(path: &str, text: &str) -> Vec<String> {
        let mut found = Findings::default();
        check(&Tree::of(&[(path, text)]), &mut found);
        found.failures
    }

    const LINTS: &str = "[lints]\nworkspace = true\n";

    #[test]
    fn a_version_outside_the_workspace_table_fails() {
        let bad = format!(
            "{LINTS}[dependencies]\na.workspace = true\nb = \"1\"\n[dev-dependencies]\nc = {{ version = \"2\" }}"
        );
        let found = failures("x/Cargo.toml", &bad);
        assert_eq!(found.len(), 2, "{found:?}");
        let good = format!(
            "{LINTS}[dependencies]\na.workspace = true\nb = {{ workspace = true, features = [\"x\"] }}"
        );
        assert_eq!(failures("x/Cargo.toml", &good), Vec::<String>::new());
    }

    #[test]
    fn a_package_without_the_shared_lints_fails() {
        assert_eq!(failures("x/Cargo.toml", "[package]\nname = \"x\"").len(), 1);
    }

    #[test]
    fn the_ebpf_crate_pins_exactly() {
        assert_eq!(
            failures(EBPF, "[dependencies]\naya-ebpf = \"=0.2.1\"\nmesh-common = { path = \"..\" }").len(),
            0
        );
        assert_eq!(failures(EBPF, "[dependencies]\naya-ebpf = \"0.2.1\"").len(), 1);
    }

    #[test]
    fn dependency_tables_of_one_platform_count() {
        let file = File {
            path: "x/Cargo.toml".into(),
            text: "[target.'cfg(unix)'.dependencies]\nnix = \"1\"".into(),
        };
        assert_eq!(dependencies(&file).first().map(|d| d.name.clone()).as_deref(), Some("nix"));
    }
}
