//! Owns what the source knows: the index, what is wrong with each object, and what has not been listed yet.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use mesh_core::snapshot::{Name, Snapshot};

use super::{
    Change,
    object::{Judged, Object, Told},
    verdict::{Around, Beside, judge},
};
use crate::{
    analyze,
    compile::{Compiler, MeshSettings},
    index::{API_SERVER, Index},
    problem::{Level, SourceError},
    resource::{Key, Kind, Owner},
    status::{SourceStatus, of_file},
};

/// Whether what becomes of routes and rules may depend on resources of this kind.
fn is_referred_to(kind: Kind) -> bool {
    // Rules themselves are judged, and their changes seen by that.
    matches!(kind, Kind::Service | Kind::ServiceEntry | Kind::ReferenceGrant)
}

/// A state to publish.
pub(super) struct State {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) status: SourceStatus,
    /// Absent when nothing of it changed.
    pub(super) judged: Option<Judged>,
    /// The Secrets that are to be followed.
    pub(super) secrets: BTreeSet<Name>,
}

/// The cluster as it is known.
pub(super) struct World {
    settings: MeshSettings,
    index: Index,
    compiler: Compiler,
    unlisted: BTreeSet<Kind>,
    trouble: BTreeMap<Kind, String>,
    problems: BTreeMap<Key, Vec<SourceError>>,
    /// Objects whose last good state is in force in the place of what they are.
    kept_back: BTreeSet<Key>,
    told: BTreeMap<Key, Told>,
    told_changed: bool,
    between: Arc<[SourceError]>,
}

impl World {
    pub(super) fn new(mesh: MeshSettings) -> Self {
        Self {
            settings: mesh.clone(),
            index: Index::default(),
            compiler: Compiler::new(mesh),
            // Secrets are never listed as a whole.
            unlisted: Kind::ALL.iter().copied().filter(|kind| *kind != Kind::Secret).collect(),
            trouble: BTreeMap::new(),
            problems: BTreeMap::new(),
            kept_back: BTreeSet::new(),
            told: BTreeMap::new(),
            told_changed: true,
            between: Arc::default(),
        }
    }

    /// Whether every kind was listed.
    pub(super) fn is_listed(&self) -> bool {
        self.unlisted.is_empty()
    }

    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Put(object) => self.put(*object),
            Change::Gone(key) => {
                self.told_changed |= is_referred_to(key.kind);
                self.problems.remove(&key);
                self.kept_back.remove(&key);
                self.told_changed |= self.told.remove(&key).is_some();
                self.index.put_object(key, 0, None);
            }
            Change::Listed(kind) => {
                self.unlisted.remove(&kind);
            }
            Change::Trouble(kind, Some(what)) => {
                self.trouble.insert(kind, what);
            }
            Change::Trouble(kind, None) => {
                self.trouble.remove(&kind);
            }
        }
    }

    fn put(&mut self, object: Object) {
        let Object { key, generation, resource, owner, problems, told } = object;
        if let Some(told) = told
            && self.told.get(&key) != Some(&told)
        {
            self.told.insert(key.clone(), told);
            self.told_changed = true;
        }
        if problems.is_empty() {
            self.problems.remove(&key);
        } else {
            self.problems.insert(key.clone(), problems);
        }
        if resource.is_some() || owner != Owner::Mesh {
            self.told_changed |= is_referred_to(key.kind);
            self.kept_back.remove(&key);
            self.index.put_object(key, generation, resource);
        } else {
            self.kept_back.insert(key);
        }
    }

    pub(super) fn compile(&mut self) -> State {
        let compiled = self.compiler.compile(&mut self.index);
        if *self.between != *compiled.problems {
            self.between = compiled.problems.clone().into();
            self.told_changed = true;
        }
        let mut status = SourceStatus {
            source: PathBuf::from(API_SERVER),
            version: compiled.snapshot.version(),
            resources: self.index.len(),
            by_kind: self.index.count_by_kind(),
            files_kept_back: self.kept_back.iter().map(|key| PathBuf::from(key.to_string())).collect(),
            ..SourceStatus::default()
        };
        let trouble = self.trouble.iter().map(|(kind, what)| {
            let message = format!("{kind}s cannot be read: {what}; what was known of them stays in force");
            of_file(API_SERVER.as_ref(), Level::Error, message)
        });
        let own = self.problems.values().flatten().cloned();
        status.set_problems(trouble.chain(own).chain(compiled.problems).collect());
        let judged = std::mem::take(&mut self.told_changed).then(|| self.judged(&compiled.snapshot));
        State { snapshot: compiled.snapshot, status, judged, secrets: compiled.secrets }
    }

    /// What became of everything that users are told about.
    fn judged(&self, snapshot: &Snapshot) -> Judged {
        fn of(error: &SourceError) -> [Option<&str>; 3] {
            [error.kind.as_deref(), error.namespace.as_deref(), error.name.as_deref()]
        }
        let references = analyze::references(&self.index, &self.settings);
        let mut beside: BTreeMap<[Option<&str>; 3], Beside<'_>> = BTreeMap::new();
        for error in &*self.between {
            beside.entry(of(error)).or_default().compiled.push(error);
        }
        for error in &references {
            beside.entry(of(error)).or_default().missing.push(error);
        }
        let around = Around { index: &self.index, snapshot, services: self.compiler.registry() };
        let objects = self.told.iter().map(|(key, told)| {
            let name = [Some(key.kind.as_str()), Some(&*key.name.namespace), Some(&*key.name.name)];
            let verdict = judge(key, &told.problems, beside.get(&name), &around);
            (key.clone(), (told.clone(), verdict))
        });
        Judged { objects: objects.collect() }
    }
}
