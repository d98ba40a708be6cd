//! Owns `cargo xtask tidy`: the rules of the tree that no compiler checks.
//!
//! The rules are pure functions over a [`Tree`] held in memory, one file per theme. They also run as a unit
//! test, so that a plain `cargo test` is close to what CI does.

mod code;
mod documents;
mod layering;
mod manifest;
mod shape;

use std::{fs, io, path::Path};

use anyhow::{Context, ensure};

use crate::workspace::Workspace;

/// Folders that hold results or the work of others.
const NOT_OURS: [&str; 4] = ["target", ".git", "node_modules", "results"];
/// Endings of the files that rules look at.
const LOOKED_AT: [&str; 3] = [".rs", ".toml", ".md"];

/// A text file; the path is relative to the root, with `/`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct File {
    path: String,
    text: String,
}

/// All files that rules look at, sorted by path, and the names of every other file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tree {
    files: Vec<File>,
    /// Every file and folder, for rules that only ask whether something exists.
    paths: Vec<String>,
}

/// What the rules found, each line `path: what is wrong and what to do`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    failures: Vec<String>,
    warnings: Vec<String>,
}

impl Findings {
    fn fail(&mut self, path: &str, what: impl AsRef<str>) {
        self.failures.push(format!("{path}: {}", what.as_ref()));
    }

    fn warn(&mut self, path: &str, what: impl AsRef<str>) {
        self.warnings.push(format!("{path}: {}", what.as_ref()));
    }

    /// No failure; warnings are allowed.
    pub(crate) fn holds(&self) -> bool {
        self.failures.is_empty()
    }

    /// Prints warnings, then failures.
    pub(crate) fn print(&self) {
        self.warnings.iter().for_each(|line| println!("tidy: warning: {line}"));
        self.failures.iter().for_each(|line| println!("tidy: error: {line}"));
        println!("tidy: {} errors, {} warnings", self.failures.len(), self.warnings.len());
    }
}

/// `cargo xtask tidy`.
pub(crate) fn run(workspace: &Workspace) -> anyhow::Result<()> {
    let found = check(workspace)?;
    found.print();
    ensure!(found.holds(), "the tree breaks its own rules");
    Ok(())
}

/// Applies every rule to the work tree.
pub(crate) fn check(workspace: &Workspace) -> anyhow::Result<Findings> {
    let mut tree = Tree::default();
    read_folder(&workspace.root, &workspace.root, &mut tree).context("read the work tree")?;
    tree.files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(judge(&tree))
}

fn judge(tree: &Tree) -> Findings {
    let mut found = Findings::default();
    layering::check(tree, &mut found);
    manifest::check(tree, &mut found);
    shape::check(tree, &mut found);
    documents::check(tree, &mut found);
    found
}

fn read_folder(root: &Path, folder: &Path, tree: &mut Tree) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if NOT_OURS.iter().any(|&skipped| name == skipped) {
            continue;
        }
        let path = entry.path();
        let Some(relative) = path.strip_prefix(root).ok().and_then(Path::to_str).map(str::to_owned) else {
            continue;
        };
        tree.paths.push(relative.clone());
        if entry.file_type()?.is_dir() {
            read_folder(root, &path, tree)?;
        } else if LOOKED_AT.iter().any(|ending| relative.ends_with(ending)) {
            tree.files.push(File { path: relative, text: fs::read_to_string(&path)? });
        }
    }
    Ok(())
}

impl Tree {
    fn rust(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| file.path.ends_with(".rs"))
    }

    fn manifests(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| file.path == "Cargo.toml" || file.path.ends_with("/Cargo.toml"))
    }

    fn exists(&self, path: &str) -> bool {
        self.paths.iter().any(|known| known == path)
    }

    #[cfg(test)]
    fn of(files: &[(&str, &str)]) -> Self {
        let files: Vec<File> =
            files.iter().map(|&(path, text)| File { path: path.into(), text: text.into() }).collect();
        Self { paths: files.iter().map(|file| file.path.clone()).collect(), files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_keeps_its_own_rules() {
        let found = check(&Workspace::here()).unwrap();
        assert!(found.holds(), "{}", found.failures.join("\n"));
    }
}
