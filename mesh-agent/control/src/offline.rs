//! Files and folders read once, without an agent: for questions about a configuration before it is used.
//!
//! The same parser, index and compiler as for a running agent, so the answers are the same.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::snapshot::Snapshot;

use crate::{
    compile::{Compiler, MeshSettings},
    index::{Index, Origin},
    problem::{Level, SourceError},
    resource::Key,
    source::{
        directory,
        document::{self, FILE_BYTES_MAX, Known, Rules},
    },
};

/// Why nothing could be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file or folder cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// A folder without manifests.
    #[error("{} holds no manifests (*.yaml, *.yml or *.json)", path.display())]
    Empty {
        /// Which.
        path: PathBuf,
    },
}

/// A configuration that was read once.
#[derive(Debug)]
pub struct Loaded {
    /// The world it describes.
    pub snapshot: Arc<Snapshot>,
    /// Documents that cannot be used, in order; the world is without them.
    pub errors: Vec<SourceError>,
    /// What is probably not meant, in order; between resources also what another of them wins.
    pub warnings: Vec<SourceError>,
    index: Index,
}

impl Loaded {
    /// Where a resource was found.
    pub fn origin(&self, key: &Key) -> Option<&Origin> {
        self.index.origin(key)
    }

    /// The resources themselves.
    pub fn index(&self) -> &Index {
        &self.index
    }
}

/// Reads files, and folders with all below them; `-` is standard input.
///
/// # Errors
/// If one of `paths` cannot be read, or is a folder without manifests. Bad documents are no error: see
/// [`Loaded::errors`].
pub fn load(paths: &[PathBuf], settings: MeshSettings) -> Result<Loaded, LoadError> {
    let rules = Rules { root_namespace: settings.root_namespace.clone() };
    let mut index = Index::default();
    let mut problems = Vec::new();
    for file in files(paths)? {
        let text = read(&file).map_err(|source| LoadError::Read { path: file.clone(), source })?;
        let parsed = document::parse(&file, &text, &rules, &Known::new());
        problems.extend(parsed.problems);
        index.replace(&file, parsed.resources);
    }
    problems.extend(index.duplicates());
    let compiled = Compiler::new(settings).compile(&mut index);
    let (mut errors, mut warnings): (Vec<_>, Vec<_>) =
        problems.into_iter().partition(|problem| problem.level == Level::Error);
    warnings.extend(compiled.problems);
    errors.sort();
    warnings.sort();
    Ok(Loaded { snapshot: compiled.snapshot, errors, warnings, index })
}

/// Every file once, in order.
fn files(paths: &[PathBuf]) -> Result<BTreeSet<PathBuf>, LoadError> {
    let mut files = BTreeSet::new();
    for path in paths {
        if !path.is_dir() {
            files.insert(path.clone());
            continue;
        }
        let failed = |path: &Path, source| LoadError::Read { path: path.to_owned(), source };
        let scan = directory::scan(path).map_err(|source| failed(path, source))?;
        if let Some((path, source)) = scan.failed.into_iter().next() {
            return Err(failed(&path, source));
        }
        if scan.files.is_empty() {
            return Err(LoadError::Empty { path: path.clone() });
        }
        files.extend(scan.files.into_keys());
    }
    Ok(files)
}

fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    if file == Path::new("-") {
        io::stdin().lock().take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    } else {
        fs::File::open(file)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    }
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {} MiB", FILE_BYTES_MAX >> 20)));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use mesh_core::snapshot::Name;

    use super::*;
    use crate::resource::Kind;

    #[test]
    fn files_and_folders_are_one_world_and_every_resource_knows_where_it_is() {
        let dir = std::env::temp_dir().join(format!("nodemesh-offline-{}", std::process::id()));
        let (sub, file) = (dir.join("conf/sub"), dir.join("one.yaml"));
        fs::create_dir_all(&sub).unwrap();
        let policy = |name: &str| {
            format!(
                "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: {name}}}, spec: {{}}}}\n"
            )
        };
        fs::write(&file, [policy("a"), policy("b")].concat()).unwrap();
        fs::write(sub.join("two.yaml"), [policy("c"), policy("b"), "---\nkind: 1\n".into()].concat())
            .unwrap();
        let loaded = load(&[file.clone(), dir.join("conf")], MeshSettings::default()).unwrap();
        assert_eq!(loaded.snapshot.policies().count(), 3);
        let key = Key { kind: Kind::AuthorizationPolicy, name: Name::new("default", "b") };
        let origin = loaded.origin(&key).unwrap();
        assert!(
            origin.file.ends_with("conf/sub/two.yaml") && origin.document == 2,
            "first by path: {origin:?}"
        );
        assert_eq!(
            loaded.errors.len(),
            3,
            "no apiVersion, a kind that is no text, a duplicate: {:?}",
            loaded.errors
        );
        fs::remove_file(sub.join("two.yaml")).unwrap();
        assert!(matches!(load(&[dir.join("conf")], MeshSettings::default()), Err(LoadError::Empty { .. })));
        assert!(matches!(
            load(&[dir.join("nothing.yaml")], MeshSettings::default()),
            Err(LoadError::Read { .. })
        ));
        fs::remove_dir_all(&dir).unwrap();
    }
}
