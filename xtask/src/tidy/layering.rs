//! Owns which of our crates may use which, and which foreign crates stay in one place.
//!
//! Checked in manifests and, since a manifest can be right for the wrong reason, in the code.

use super::{File, Findings, Tree, code, manifest};

/// What a crate may import of ours.
struct Layer {
    package: &'static str,
    folder: &'static str,
    may_import: &'static [&'static str],
}

/// Arrows go one way; `proxy`, `redirect` and `control` meet only in `mesh-agent`. The longest folder wins.
const LAYERS: [Layer; 13] = [
    Layer { package: "mesh-common", folder: "mesh-common/", may_import: &[] },
    Layer { package: "mesh-ebpf", folder: "mesh-ebpf/", may_import: &["mesh-common"] },
    Layer { package: "mesh-core", folder: "mesh-agent/core/", may_import: &[] },
    Layer { package: "mesh-wire", folder: "mesh-agent/wire/", may_import: &["mesh-core"] },
    Layer {
        package: "mesh-identity",
        folder: "mesh-agent/identity/",
        may_import: &["mesh-core", "mesh-wire"],
    },
    Layer {
        package: "mesh-redirect",
        folder: "mesh-agent/redirect/",
        may_import: &["mesh-common", "mesh-core"],
    },
    Layer {
        package: "mesh-proxy",
        folder: "mesh-agent/proxy/",
        may_import: &["mesh-core", "mesh-wire", "mesh-identity"],
    },
    Layer {
        package: "mesh-control",
        folder: "mesh-agent/control/",
        may_import: &["mesh-core", "mesh-wire", "mesh-identity"],
    },
    Layer {
        package: "mesh-agent",
        folder: "mesh-agent/",
        may_import: &[
            "mesh-common",
            "mesh-core",
            "mesh-wire",
            "mesh-identity",
            "mesh-redirect",
            "mesh-proxy",
            "mesh-control",
        ],
    },
    // The harness drives the programs from outside, as a user does; it may share names and layouts.
    Layer { package: "mesh-tests", folder: "tests/", may_import: &["mesh-common", "mesh-core"] },
    // Its simulated agents are the agent's end of the controller link.
    Layer {
        package: "mesh-benches",
        folder: "benches/",
        may_import: &["mesh-common", "mesh-control", "mesh-core", "mesh-tests", "mesh-wire"],
    },
    Layer {
        package: "mesh-fuzz",
        folder: "fuzz/",
        may_import: &["mesh-core", "mesh-wire", "mesh-identity", "mesh-proxy"],
    },
    Layer { package: "xtask", folder: "xtask/", may_import: &[] },
];

/// A foreign crate that belongs to certain packages only.
struct Confined {
    name: &'static str,
    to: &'static [&'static str],
}

/// Kernel access and Kubernetes stay where they can be replaced.
const CONFINED: [Confined; 4] = [
    // The benches measure a bare program next to ours.
    Confined { name: "aya", to: &["mesh-common", "mesh-redirect", "mesh-benches"] },
    Confined { name: "aya-obj", to: &["mesh-redirect"] },
    // meshctl installs the mesh and asks its agents through the API server; the benches write what kubelets would.
    Confined { name: "kube", to: &["mesh-agent", "mesh-control", "mesh-benches"] },
    Confined { name: "k8s-openapi", to: &["mesh-agent", "mesh-control"] },
];

/// What would make the model impure: I/O, runtimes, kernels, clusters.
const IMPURE: [&str; 8] = ["aya", "hyper", "k8s-openapi", "kube", "nix", "rustls", "socket2", "tokio"];
/// Time is an argument in the model.
const CLOCKS: [&str; 2] = ["Instant::now", "SystemTime::now"];

fn layer_of(path: &str) -> Option<&'static Layer> {
    LAYERS.iter().filter(|layer| path.starts_with(layer.folder)).max_by_key(|layer| layer.folder.len())
}

pub(super) fn check(tree: &Tree, found: &mut Findings) {
    for file in tree.manifests().filter(|file| file.path != "Cargo.toml") {
        match layer_of(&file.path) {
            Some(layer) => check_manifest(layer, file, found),
            None => {
                found.fail(&file.path, "is a package without a layer; add it to xtask/src/tidy/layering.rs")
            }
        }
    }
    for file in tree.rust() {
        if let Some(layer) = layer_of(&file.path) {
            check_code(layer, file, found);
        }
    }
}

fn check_manifest(layer: &Layer, file: &File, found: &mut Findings) {
    if manifest::package_name(file).as_deref() != Some(layer.package) {
        found
            .fail(&file.path, format!("must be package `{}`; see xtask/src/tidy/layering.rs", layer.package));
    }
    for dependency in manifest::dependencies(file) {
        let name = dependency.name.as_str();
        let ours = LAYERS.iter().any(|layer| layer.package == name);
        // Tests of any crate may use the harness: it depends on none of them.
        let harness_in_tests = dependency.dev && name == "mesh-tests";
        if ours && !layer.may_import.contains(&name) && !harness_in_tests {
            found.fail(&file.path, format!("`{}` must not depend on `{name}` (layering)", layer.package));
        }
        if let Some(why) = foreign(layer, name) {
            found.fail(&file.path, why);
        }
    }
}

/// Why a package may not use a foreign crate.
fn foreign(layer: &Layer, name: &str) -> Option<String> {
    if layer.package == "mesh-core" && IMPURE.contains(&name) {
        return Some(format!("`mesh-core` is pure and must not use `{name}`"));
    }
    let confined = CONFINED.iter().find(|confined| confined.name == name)?;
    (!confined.to.contains(&layer.package))
        .then(|| format!("`{name}` belongs to {} only, not to `{}`", confined.to.join(", "), layer.package))
}

fn check_code(layer: &Layer, file: &File, found: &mut Findings) {
    let code = code::only_code(&file.text);
    let uses = |package: &str| code::names_crate(&code, &package.replace('-', "_"));
    // Integration tests and test modules may use the harness, as in the manifest.
    for other in &LAYERS {
        let itself = other.package == layer.package;
        let allowed = itself || layer.may_import.contains(&other.package) || other.package == "mesh-tests";
        if !allowed && uses(other.package) {
            found
                .fail(&file.path, format!("`{}` must not use `{}` (layering)", layer.package, other.package));
        }
    }
    for name in CONFINED.iter().map(|confined| confined.name).chain(IMPURE) {
        // A name may be in both lists.
        let said = found.failures.len();
        if uses(name)
            && let Some(why) = foreign(layer, name)
        {
            found.fail(&file.path, why);
        }
        found.failures.truncate(said + 1);
    }
    if layer.package == "mesh-core" {
        for clock in CLOCKS {
            if code::has_word(&code, clock) {
                found.fail(&file.path, format!("`{clock}`: time is an argument in `mesh-core`"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(path: &str, text: &str) -> Vec<String> {
        let mut found = Findings::default();
        check(&Tree::of(&[(path, text)]), &mut found);
        found.failures.sort();
        found.failures.dedup();
        found.failures
    }

    fn manifest(package: &str, dependency: &str) -> String {
        format!("[package]\nname = \"{package}\"\n[dependencies]\n{dependency}.workspace = true\n")
    }

    #[track_caller]
    fn check_code_line(path: &str, line: &str, allowed: bool) {
        let found = failures(path, line);
        assert_eq!(found.is_empty(), allowed, "{path}: {line}: {found:?}");
    }

    #[test]
    fn siblings_never_meet_in_manifests() {
        let siblings = ["proxy", "redirect", "control"];
        for one in siblings {
            for other in siblings.into_iter().filter(|&other| other != one) {
                let text = manifest(&format!("mesh-{one}"), &format!("mesh-{other}"));
                assert_eq!(
                    failures(&format!("mesh-agent/{one}/Cargo.toml"), &text).len(),
                    1,
                    "{one} → {other}"
                );
            }
        }
        assert_eq!(
            failures("mesh-agent/Cargo.toml", &manifest("mesh-agent", "mesh-proxy")),
            Vec::<String>::new()
        );
    }

    #[test]
    fn siblings_never_meet_in_code() {
        check_code_line("mesh-agent/proxy/src/tcp.rs", "use mesh_redirect::Node;", false);
        check_code_line("mesh-agent/proxy/src/tcp.rs", "let x = mesh_control::index();", false);
        check_code_line("mesh-agent/proxy/src/tcp.rs", "// as in mesh_redirect::Node", true);
        check_code_line("mesh-agent/proxy/src/tcp.rs", "use mesh_core::id;", true);
        check_code_line("mesh-agent/src/node.rs", "use {mesh_redirect::Node, mesh_proxy::Proxy};", true);
    }

    #[test]
    fn the_model_is_pure() {
        assert_eq!(failures("mesh-agent/core/Cargo.toml", &manifest("mesh-core", "tokio")).len(), 1);
        check_code_line("mesh-agent/core/src/plan.rs", "tokio::spawn(x);", false);
        check_code_line("mesh-agent/core/src/plan.rs", "let now = std::time::Instant::now();", false);
        check_code_line("mesh-agent/core/src/plan.rs", "fn plan(now: std::time::Instant) {}", true);
    }

    #[test]
    fn the_kernel_library_stays_with_the_kernel_side() {
        assert_eq!(failures("mesh-agent/proxy/Cargo.toml", &manifest("mesh-proxy", "aya")).len(), 1);
        check_code_line("mesh-agent/src/node.rs", "use aya::maps::HashMap;", false);
        check_code_line("mesh-agent/redirect/src/node.rs", "use aya::maps::HashMap;", true);
    }

    #[test]
    fn crates_to_come_have_their_place() {
        let text = manifest("mesh-wire", "mesh-identity");
        assert_eq!(failures("mesh-agent/wire/Cargo.toml", &text).len(), 1);
        assert_eq!(
            failures("mesh-agent/identity/Cargo.toml", &manifest("mesh-identity", "mesh-wire")).len(),
            0
        );
    }

    #[test]
    fn tests_may_use_the_harness() {
        let text = "[package]\nname = \"mesh-redirect\"\n[dev-dependencies]\nmesh-tests.workspace = true\n";
        assert_eq!(failures("mesh-agent/redirect/Cargo.toml", text), Vec::<String>::new());
        assert_eq!(
            failures("mesh-agent/redirect/Cargo.toml", &manifest("mesh-redirect", "mesh-tests")).len(),
            1
        );
    }

    #[test]
    fn an_unknown_package_fails() {
        assert_eq!(failures("mesh-other/Cargo.toml", "[package]\nname = \"mesh-other\"").len(), 1);
    }
}
