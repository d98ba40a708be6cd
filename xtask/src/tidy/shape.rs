//! Owns the rules for a single Rust file: its name, size, module doc, and where `unsafe` may stand.

use super::{File, Findings, Tree, code};

/// A file this long wants to be two; it is only reported.
const LINES_SOFT: usize = 400;
/// A file this long fails.
const LINES_HARD: usize = 800;
/// Names that say nothing about what is inside and so attract everything.
pub(super) const NAMES: [&str; 6] =
    ["common.rs", "helpers.rs", "manager.rs", "mod.rs", "types.rs", "util.rs"];
/// Folders whose Rust files are data for tests.
const DATA: [&str; 2] = ["/data/", "/fixtures/"];
/// Where `unsafe` may stand: kernel access, shared layouts, and programs that imitate odd applications.
const UNSAFE: [&str; 5] = ["mesh-agent/redirect/", "mesh-common/", "mesh-ebpf/", "tests/", "benches/"];

pub(super) fn check(tree: &Tree, found: &mut Findings) {
    for file in tree.rust().filter(|file| !DATA.iter().any(|data| file.path.contains(data))) {
        check_name(file, found);
        check_size(file, found);
        check_doc(file, found);
        check_unsafe(file, found);
    }
}

fn check_name(file: &File, found: &mut Findings) {
    let name = file.path.rsplit('/').next().unwrap_or_default();
    if NAMES.contains(&name) {
        found.fail(&file.path, format!("name the file for what it owns, not `{name}`"));
    }
}

fn check_size(file: &File, found: &mut Findings) {
    let lines = file.text.lines().count();
    if lines > LINES_HARD {
        found.fail(&file.path, format!("has {lines} lines, more than {LINES_HARD}: split it"));
    } else if lines > LINES_SOFT {
        found.warn(&file.path, format!("has {lines} lines, more than {LINES_SOFT}"));
    }
}

/// The doc may follow inner attributes (`#![no_std]`) and plain comments, nothing else.
fn check_doc(file: &File, found: &mut Findings) {
    let mut lines = file.text.lines().map(str::trim);
    let first = lines.find(|line| {
        let skipped =
            line.is_empty() || line.starts_with("#!") || (line.starts_with("//") && !line.starts_with("//!"));
        !skipped
    });
    match first.and_then(|line| line.strip_prefix("//!")) {
        None => found.fail(&file.path, "lacks a module doc: begin with `//!` and say what the file owns"),
        Some(doc) if doc.trim().is_empty() => found.fail(&file.path, "begins with an empty module doc"),
        Some(_) => {}
    }
}

fn check_unsafe(file: &File, found: &mut Findings) {
    let allowed = UNSAFE.iter().any(|folder| file.path.starts_with(folder));
    if !allowed && code::has_word(&code::only_code(&file.text), "unsafe") {
        found.fail(&file.path, format!("`unsafe` is allowed in {} only", UNSAFE.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(path: &str, text: &str) -> Findings {
        let mut found = Findings::default();
        check(&Tree::of(&[(path, text)]), &mut found);
        found
    }

    #[track_caller]
    fn check_one(path: &str, text: &str, holds: bool) {
        let found = judged(path, text);
        assert_eq!(found.holds(), holds, "{path}: {:?}", found.failures);
    }

    #[test]
    fn names_that_say_nothing_fail() {
        for name in NAMES {
            check_one(&format!("x/src/{name}"), "//! Doc.\n", false);
        }
        check_one("x/src/utility.rs", "//! Doc.\n", true);
    }

    #[test]
    fn long_files_warn_and_very_long_files_fail() {
        let lines = |count: usize| format!("//! Doc.\n{}", "\n".repeat(count - 1));
        assert_eq!(judged("x/a.rs", &lines(LINES_SOFT)), Findings::default());
        assert_eq!(judged("x/a.rs", &lines(LINES_SOFT + 1)).warnings.len(), 1);
        check_one("x/a.rs", &lines(LINES_HARD), true);
        check_one("x/a.rs", &lines(LINES_HARD + 1), false);
    }

    #[test]
    fn every_file_says_what_it_owns() {
        check_one("x/a.rs", "fn f() {}\n", false);
        check_one("x/a.rs", "//!\nfn f() {}\n", false);
        check_one("x/a.rs", "use a;\n//! Late.\n", false);
        check_one("x/a.rs", "#![no_std]\n\n// Licence.\n//! Doc.\n", true);
        check_one("x/tests/data/sample.rs", "fn f() {}\n", true);
    }

    #[test]
    fn unsafe_code_has_its_places() {
        check_one("mesh-agent/proxy/src/a.rs", "//! Doc.\nfn f() { unsafe { g() } }\n", false);
        check_one(
            "mesh-agent/proxy/src/a.rs",
            "//! Doc, not unsafe.\nconst UNSAFE: &str = \"unsafe\";\n",
            true,
        );
        check_one("mesh-agent/redirect/src/a.rs", "//! Doc.\nfn f() { unsafe { g() } }\n", true);
    }
}
