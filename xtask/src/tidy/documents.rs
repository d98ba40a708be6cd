//! Owns the rule that documents name files which exist.

use super::{Findings, Tree, shape};

/// Documents that walk a reader through the tree.
const DOCUMENTS: [&str; 3] = ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"];
/// Folders that exist only after a build.
const BUILT: [&str; 1] = ["target/"];

pub(super) fn check(tree: &Tree, found: &mut Findings) {
    for document in tree.files.iter().filter(|file| DOCUMENTS.contains(&file.path.as_str())) {
        for quoted in quoted(&document.text) {
            if let Some(why) = missing(tree, quoted) {
                found.fail(&document.path, format!("`{quoted}` {why}"));
            }
        }
    }
}

/// Everything between single back-ticks, outside fenced blocks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines()
        .filter(move |line| {
            let fence = line.trim_start().starts_with("```");
            fenced ^= fence;
            !fenced && !fence
        })
        .flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Why a quoted text that names a file of ours is wrong; `None` if it is right or names no file.
fn missing(tree: &Tree, quoted: &str) -> Option<&'static str> {
    let plain = |c: char| c.is_alphanumeric() || "/._-".contains(c);
    if !quoted.chars().all(plain)
        || quoted.starts_with(['/', '-'])
        || BUILT.iter().any(|b| quoted.starts_with(b))
    {
        return None;
    }
    let path = quoted.trim_end_matches('/');
    let is_rust = path.ends_with(".rs");
    match path.split_once('/') {
        // Named to forbid them.
        None if shape::NAMES.contains(&path) => None,
        // A bare file name: somewhere in the tree.
        None if is_rust => {
            let somewhere = tree.paths.iter().any(|known| known.rsplit('/').next() == Some(path));
            (!somewhere).then_some("is no file of the tree")
        }
        None => None,
        Some((top, _)) if tree.exists(top) => (!tree.exists(path)).then_some("does not exist"),
        Some(_) if is_rust => Some("must be named from the root of the tree"),
        // A hook, a map, a crate feature: not a file of ours.
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_text(text: &str, holds: bool) {
        let mut tree = Tree::of(&[("ARCHITECTURE.md", text), ("mesh-agent/core/src/plan.rs", "//! Doc.")]);
        tree.paths.extend(["mesh-agent", "mesh-agent/core", "mesh-agent/core/src"].map(str::to_owned));
        let mut found = Findings::default();
        check(&tree, &mut found);
        assert_eq!(found.holds(), holds, "{text}: {:?}", found.failures);
    }

    #[test]
    fn named_files_must_exist() {
        check_text("see `mesh-agent/core/src/plan.rs` and `mesh-agent/core/`", true);
        check_text("see `mesh-agent/core/src/gone.rs`", false);
        check_text("see `mesh-agent/gone/`", false);
        check_text("see `plan.rs`", true);
        check_text("see `gone.rs`", false);
        check_text("see `core/src/plan.rs`", false);
        check_text("never `mod.rs`", true);
    }

    #[test]
    fn other_quoted_words_are_left_alone() {
        check_text("`cgroup/connect4`, `/sys/fs/bpf`, `meshctl top`, `POD`, `target/vm`, `a::b`", true);
        check_text("```\n`mesh-agent/gone.rs`\n```\n", true);
    }
}
