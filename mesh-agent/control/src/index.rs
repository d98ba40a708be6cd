//! All good resources, by kind, namespace and name, with where each came from.
//!
//! Invariants:
//! - Of several resources with one key the first by origin counts; the others wait, and are reported.
//! - Whatever changes the outcome of compilation is in the set of changes.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    path::{Path, PathBuf},
    sync::Arc,
};

use mesh_core::snapshot::Name;

use crate::{
    problem::{Level, SourceError},
    resource::{
        AuthorizationPolicy, EndpointSlice, Key, Kind, MeshConfig, Namespace, Node, PeerAuthentication, Pod,
        Resource, Service, ServiceEntry, Sidecar, WorkloadEntry,
    },
    source::document::Placed,
};

/// What problems of objects of an API server are said to be in.
pub(crate) const API_SERVER: &str = "kubernetes";

/// Where a resource came from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    /// File.
    pub file: Arc<Path>,
    /// Document within the file, from 1.
    pub document: usize,
    /// Lines of its parts, where a source has them.
    pub placed: Option<Placed>,
    /// `metadata.generation` of an object of an API server, which has no lines. It counts what users change, not who writes the status.
    pub generation: Option<i64>,
}

impl Origin {
    /// A part of the resource as people find it: `routes.yaml:31`, or its document where no line is known.
    pub fn place(&self, field: &str) -> String {
        if let Some(generation) = self.generation {
            return format!("{}, generation {generation}", self.file.display());
        }
        let line = self.placed.as_ref().and_then(|placed| Some(placed.first_line + placed.lines.at(field)?));
        match line {
            Some(line) => format!("{}:{line}", self.file.display()),
            None => format!("{}, document {}", self.file.display(), self.document),
        }
    }
}

/// The store.
#[derive(Debug, Default)]
pub struct Index {
    /// Candidates by key, never empty, sorted by origin: the first counts.
    resources: BTreeMap<Key, Vec<(Origin, Arc<Resource>)>>,
    by_file: BTreeMap<Arc<Path>, BTreeSet<Key>>,
    /// Keys with more than one candidate.
    contested: BTreeSet<Key>,
    /// Keys whose first candidate changed since the last [`Index::take_changes`].
    changes: BTreeSet<Key>,
}

impl Index {
    /// Puts what `file` holds now in the place of what it held.
    ///
    /// Of two resources with one key within the file the first counts here too.
    pub fn replace(&mut self, file: &Path, resources: Vec<(usize, Arc<Resource>)>) {
        self.replace_placed(file, resources, &BTreeMap::new());
    }

    /// The same, with the lines of documents.
    pub fn replace_placed(
        &mut self,
        file: &Path,
        resources: Vec<(usize, Arc<Resource>)>,
        lines: &BTreeMap<usize, Placed>,
    ) {
        let file: Arc<Path> = match self.by_file.get_key_value(file) {
            Some((known, _)) => Arc::clone(known),
            None => file.into(),
        };
        let mut held = self.by_file.remove(&file).unwrap_or_default();
        let mut holds: BTreeMap<Key, Vec<(Origin, Arc<Resource>)>> = BTreeMap::new();
        for (document, resource) in resources {
            let placed = lines.get(&document).cloned();
            let origin = Origin { file: Arc::clone(&file), document, placed, generation: None };
            holds.entry(resource.key()).or_default().push((origin, resource));
        }
        let keys: BTreeSet<Key> = holds.keys().cloned().collect();
        held.retain(|key| !keys.contains(key));
        for key in held {
            self.put(key, &file, Vec::new());
        }
        for (key, mut candidates) in holds {
            candidates.sort_by_key(|(origin, _)| origin.document);
            self.put(key, &file, candidates);
        }
        if !keys.is_empty() {
            self.by_file.insert(file, keys);
        }
    }

    /// Puts an object of an API server in the place of the one it was, or takes it away. The work does not grow with the index.
    pub fn put_object(&mut self, key: Key, generation: i64, resource: Option<Arc<Resource>>) {
        let path = match &*key.name.namespace {
            "" => format!("{}/{}", key.kind, key.name.name),
            namespace => format!("{}/{namespace}/{}", key.kind, key.name.name),
        };
        let file: Arc<Path> = Path::new(&path).into();
        let origin =
            Origin { file: Arc::clone(&file), document: 1, placed: None, generation: Some(generation) };
        self.put(key, &file, resource.into_iter().map(|resource| (origin.clone(), resource)).collect());
    }

    /// Replaces the candidates that come from `file`.
    fn put(&mut self, key: Key, file: &Path, candidates: Vec<(Origin, Arc<Resource>)>) {
        let all = self.resources.entry(key.clone()).or_default();
        // Tables of routes say which document each rule is from: for those kinds a move is a change.
        let has_place = key.kind.is_of_routes();
        let first = |all: &[(Origin, Arc<Resource>)]| {
            all.first().map(|(origin, resource)| (has_place.then(|| origin.clone()), Arc::clone(resource)))
        };
        let before = first(all);
        all.retain(|(origin, _)| &*origin.file != file);
        all.extend(candidates);
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        if all.len() > 1 {
            self.contested.insert(key.clone());
        } else {
            self.contested.remove(&key);
        }
        let changed = before != first(all);
        if all.is_empty() {
            self.resources.remove(&key);
        }
        if changed {
            self.changes.insert(key);
        }
    }

    /// The files that hold something.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.by_file.keys().map(|file| &**file)
    }

    /// All resources that count with their origins, by kind, namespace and name.
    pub fn all(&self) -> impl Iterator<Item = (&Origin, &Resource)> {
        self.resources
            .values()
            .filter_map(|candidates| candidates.first())
            .map(|(origin, resource)| (origin, &**resource))
    }

    /// Number of resources that count.
    pub fn len(&self) -> usize {
        self.resources.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }

    /// Number of resources that count, by kind.
    pub fn count_by_kind(&self) -> BTreeMap<Kind, usize> {
        let mut counts = BTreeMap::new();
        for key in self.resources.keys() {
            *counts.entry(key.kind).or_default() += 1;
        }
        counts
    }

    /// Keys whose resource appeared, changed or went since the last call.
    pub fn take_changes(&mut self) -> BTreeSet<Key> {
        mem::take(&mut self.changes)
    }

    /// Namespaces that have resources or are declared.
    pub fn namespaces(&self) -> BTreeSet<Arc<str>> {
        self.resources
            .keys()
            .map(|key| match key.kind {
                Kind::Namespace => Arc::clone(&key.name.name),
                _ => Arc::clone(&key.name.namespace),
            })
            .collect()
    }

    /// The resource of a key.
    pub(crate) fn get(&self, key: &Key) -> Option<&Resource> {
        self.resources.get(key)?.first().map(|(_, resource)| &**resource)
    }

    /// Where the resource that counts came from.
    pub fn origin(&self, key: &Key) -> Option<&Origin> {
        self.resources.get(key)?.first().map(|(origin, _)| origin)
    }

    /// A namespace that is declared.
    pub fn namespace(&self, name: &str) -> Option<&Namespace> {
        let key = Key { kind: Kind::Namespace, name: Name::new("", name) };
        match self.get(&key)? {
            Resource::Namespace(namespace) => Some(namespace),
            _ => None,
        }
    }

    /// The pods of a namespace, by name.
    pub fn pods<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a Pod> {
        self.of_kind(Kind::Pod, namespace).filter_map(|(_, resource)| match resource {
            Resource::Pod(pod) => Some(&**pod),
            _ => None,
        })
    }

    /// The services of a namespace with their origins, by name.
    pub fn services<'a>(&'a self, namespace: &str) -> impl Iterator<Item = (&'a Origin, &'a Service)> {
        self.of_kind(Kind::Service, namespace).filter_map(|(origin, resource)| match resource {
            Resource::Service(service) => Some((origin, &**service)),
            _ => None,
        })
    }

    /// The endpoint slices of a namespace, by name.
    pub fn endpoint_slices<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a EndpointSlice> {
        self.of_kind(Kind::EndpointSlice, namespace).filter_map(|(_, resource)| match resource {
            Resource::EndpointSlice(slice) => Some(slice),
            _ => None,
        })
    }

    /// The ServiceEntries of a namespace with their origins, by name.
    pub fn service_entries<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Origin, &'a ServiceEntry)> {
        self.of_kind(Kind::ServiceEntry, namespace).filter_map(|(origin, resource)| match resource {
            Resource::ServiceEntry(entry) => Some((origin, &**entry)),
            _ => None,
        })
    }

    /// The WorkloadEntries of a namespace, by name.
    pub fn workload_entries<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a WorkloadEntry> {
        self.of_kind(Kind::WorkloadEntry, namespace).filter_map(|(_, resource)| match resource {
            Resource::WorkloadEntry(entry) => Some(&**entry),
            _ => None,
        })
    }

    /// The mutual TLS policies of a namespace with their origins, by name.
    pub fn peer_authentications<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Origin, &'a PeerAuthentication)> {
        self.of_kind(Kind::PeerAuthentication, namespace).filter_map(|(origin, resource)| match resource {
            Resource::PeerAuthentication(policy) => Some((origin, policy)),
            _ => None,
        })
    }

    /// The authorization policies of a namespace with their origins, by name.
    pub fn authorization_policies<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Origin, &'a AuthorizationPolicy)> {
        self.of_kind(Kind::AuthorizationPolicy, namespace).filter_map(|(origin, resource)| match resource {
            Resource::AuthorizationPolicy(policy) => Some((origin, policy)),
            _ => None,
        })
    }

    /// A node.
    pub fn node(&self, name: &str) -> Option<&Node> {
        let key = Key { kind: Kind::Node, name: Name::new("", name) };
        match self.get(&key)? {
            Resource::Node(node) => Some(node),
            _ => None,
        }
    }

    /// The Sidecars of a namespace, by name.
    pub fn sidecars<'a>(&'a self, namespace: &str) -> impl Iterator<Item = &'a Sidecar> {
        self.of_kind(Kind::Sidecar, namespace).filter_map(|(_, resource)| match resource {
            Resource::Sidecar(sidecar) => Some(&**sidecar),
            _ => None,
        })
    }

    /// Settings of the mesh: of all ConfigMaps a source reads only that one.
    pub fn mesh_config(&self) -> Option<&MeshConfig> {
        self.each(Kind::ConfigMap).find_map(|(_, resource)| match resource {
            Resource::MeshConfig(config) => Some(config),
            _ => None,
        })
    }

    /// The resources of a kind with their origins, by namespace and name.
    pub(crate) fn each(&self, kind: Kind) -> impl Iterator<Item = (&Origin, &Resource)> {
        let start = Key { kind, name: Name::new("", "") };
        self.resources
            .range(start..)
            .take_while(move |(key, _)| key.kind == kind)
            .filter_map(|(_, candidates)| candidates.first())
            .map(|(origin, resource)| (origin, &**resource))
    }

    fn of_kind<'a>(
        &'a self,
        kind: Kind,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Origin, &'a Resource)> {
        let start = Key { kind, name: Name::new(namespace, "") };
        self.resources
            .range(start..)
            .take_while(move |(key, _)| key.kind == kind && &*key.name.namespace == namespace)
            .filter_map(|(_, candidates)| candidates.first())
            .map(|(origin, resource)| (origin, &**resource))
    }

    /// One error for each resource that does not count because another has its key.
    pub fn duplicates(&self) -> Vec<SourceError> {
        let mut errors = Vec::new();
        for key in &self.contested {
            let Some([(first, _), rest @ ..]) = self.resources.get(key).map(Vec::as_slice) else { continue };
            for (origin, _) in rest {
                let message = format!(
                    "is there already, in {}, document {}; only the first counts",
                    first.file.display(),
                    first.document
                );
                errors.push(located(key, origin, Level::Error, "", message));
            }
        }
        errors
    }
}

/// A problem of one resource.
pub(crate) fn located(key: &Key, origin: &Origin, level: Level, field: &str, message: String) -> SourceError {
    let namespace = &*key.name.namespace;
    let is_object = origin.generation.is_some();
    SourceError {
        file: if is_object { PathBuf::from(API_SERVER) } else { PathBuf::from(&*origin.file) },
        document: (!is_object).then_some(origin.document),
        kind: Some(key.kind.as_str().to_owned()),
        namespace: (!namespace.is_empty()).then(|| namespace.to_owned()),
        name: Some(key.name.name.to_string()),
        level,
        field: field.to_owned(),
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str, opt_in: Option<bool>) -> Arc<Resource> {
        Arc::new(Resource::Namespace(Namespace { name: name.into(), opt_in }))
    }

    fn changed(index: &mut Index) -> Vec<String> {
        index.take_changes().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn replacing_a_file_touches_only_what_differs() {
        let mut index = Index::default();
        index.replace("a".as_ref(), vec![(1, namespace("x", None)), (2, namespace("y", None))]);
        assert_eq!(changed(&mut index), ["Namespace x", "Namespace y"]);
        // x moved to another document, y changed, z is new.
        let now = vec![(1, namespace("z", None)), (2, namespace("y", Some(true))), (3, namespace("x", None))];
        index.replace("a".as_ref(), now);
        assert_eq!(changed(&mut index), ["Namespace y", "Namespace z"]);
        index.replace("a".as_ref(), Vec::new());
        assert_eq!(changed(&mut index), ["Namespace x", "Namespace y", "Namespace z"]);
        assert!(index.is_empty());
        assert_eq!(index.files().count(), 0);
    }

    #[test]
    fn of_two_files_with_one_resource_the_first_by_path_counts_and_the_error_names_both() {
        let mut index = Index::default();
        index.replace("b".as_ref(), vec![(1, namespace("x", Some(false)))]);
        index.replace("a".as_ref(), vec![(3, namespace("x", Some(true)))]);
        assert_eq!(index.namespace("x").unwrap().opt_in, Some(true));
        let errors: Vec<String> = index.duplicates().iter().map(ToString::to_string).collect();
        assert_eq!(
            errors,
            ["b, document 1, Namespace x: is there already, in a, document 3; only the first counts"]
        );

        index.take_changes();
        index.replace("a".as_ref(), Vec::new());
        assert_eq!(index.namespace("x").unwrap().opt_in, Some(false), "the other takes its place");
        assert_eq!(changed(&mut index), ["Namespace x"]);
        assert_eq!(index.duplicates(), []);
    }

    #[test]
    fn a_duplicate_within_one_file_is_an_error_too() {
        let mut index = Index::default();
        index.replace("a".as_ref(), vec![(1, namespace("x", Some(true))), (2, namespace("x", None))]);
        assert_eq!(index.namespace("x").unwrap().opt_in, Some(true));
        assert_eq!(index.duplicates().len(), 1);
        assert_eq!(index.len(), 1);
    }
}
