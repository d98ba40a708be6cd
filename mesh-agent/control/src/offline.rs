//! Files and folders read once, without an agent: for questions about a configuration before it is used.
//!
//! The same parser, index and compiler as for a running agent, so the answers are the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::snapshot::{Name, Snapshot};

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
    /// Kinds found that the mesh does not read, as `apiVersion/kind`, with how many there are.
    pub ignored: BTreeMap<String, usize>,
    /// Number of files.
    pub files: usize,
    unread: BTreeSet<(String, Name)>,
    index: Index,
}

impl Loaded {
    /// Whether there is an object of a kind of the mesh's groups that the mesh does not read, e.g. a `Gateway`.
    pub fn has_unread(&self, kind: &str, name: &Name) -> bool {
        self.unread.contains(&(kind.to_owned(), name.clone()))
    }

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
    let rules = Rules::new(&settings.root_namespace);
    Ok(load_texts(texts(paths)?, settings, &rules))
}

/// As [`load`], for texts that are no files; each comes with the name it has in messages. `rules` say where the MeshConfig is, and have the
/// root namespace of `settings`.
pub fn load_texts(texts: Vec<(PathBuf, String)>, settings: MeshSettings, rules: &Rules) -> Loaded {
    let World { mut index, problems, ignored, unread, files } = read_all(texts, rules);
    let compiled = Compiler::new(settings).compile(&mut index);
    let (mut errors, mut warnings): (Vec<_>, Vec<_>) =
        problems.into_iter().partition(|problem| problem.level == Level::Error);
    warnings.extend(compiled.problems);
    errors.sort();
    warnings.sort();
    Loaded { snapshot: compiled.snapshot, errors, warnings, ignored, files, unread, index }
}

/// What is wrong with documents, each by itself.
#[derive(Debug)]
pub struct Validated {
    /// Errors and warnings, by file, document and field.
    pub problems: Vec<SourceError>,
    /// Number of files.
    pub files: usize,
    /// Number of resources that can be used.
    pub resources: usize,
    /// Kinds found that the mesh does not read, as `apiVersion/kind`, with how many there are.
    pub ignored: BTreeMap<String, usize>,
}

/// Checks files, and folders with all below them; `-` is standard input. `root_namespace` is where mesh-wide policies live.
///
/// # Errors
/// As [`load`].
pub fn validate(paths: &[PathBuf], root_namespace: &str) -> Result<Validated, LoadError> {
    Ok(validate_texts(texts(paths)?, &Rules::new(root_namespace)))
}

/// As [`validate`], for texts that are no files; each comes with the name it has in messages.
pub fn validate_texts(texts: Vec<(PathBuf, String)>, rules: &Rules) -> Validated {
    let World { index, mut problems, ignored, files, unread: _ } = read_all(texts, rules);
    problems.sort();
    problems.dedup();
    Validated { problems, files, resources: index.len(), ignored }
}

/// Everything that files hold.
struct World {
    index: Index,
    problems: Vec<SourceError>,
    ignored: BTreeMap<String, usize>,
    unread: BTreeSet<(String, Name)>,
    files: usize,
}

fn texts(paths: &[PathBuf]) -> Result<Vec<(PathBuf, String)>, LoadError> {
    let text = |file: PathBuf| match read(&file) {
        Ok(text) => Ok((file, text)),
        Err(source) => Err(LoadError::Read { path: file, source }),
    };
    files(paths)?.into_iter().map(text).collect()
}

fn read_all(texts: Vec<(PathBuf, String)>, rules: &Rules) -> World {
    let mut world = World {
        index: Index::default(),
        problems: Vec::new(),
        ignored: BTreeMap::new(),
        unread: BTreeSet::new(),
        files: texts.len(),
    };
    for (file, text) in texts {
        let parsed = document::parse(&file, &text, rules, &Known::new());
        world.problems.extend(parsed.problems);
        world.unread.extend(parsed.unread);
        for (kind, count) in parsed.ignored {
            *world.ignored.entry(kind).or_default() += count;
        }
        world.index.replace_placed(&file, parsed.resources, &parsed.lines);
    }
    world.problems.extend(world.index.duplicates());
    world
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
