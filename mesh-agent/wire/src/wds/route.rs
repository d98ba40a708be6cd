//! Routes as resources: one for each entry of each table, as JSON of the model itself.
//!
//! The model is large, its two ends are of one make and foreign clients never see it, so it has no protobuf form of its own.
//! [`FORM`] tells versions apart.
//!
//! Invariants:
//! - Equal entries have equal bytes, whatever allocations they share.
//! - What decodes keeps the model's promises: a rule that forwards has somewhere to forward to.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use mesh_core::{
    route::{
        HostPort, Routes,
        cluster::{Cluster, ClusterKey},
        defaults::MeshDefaults,
        http::{Action, HttpTable, WeightedBackend},
        scope::{InNamespace, Labels, Scoped, SidecarScope},
        stream::StreamTable,
    },
    snapshot::Name,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::value::{Located, Problem};
use crate::proto::nodemesh;

/// Version of the entries' form; another is refused. It grows when an agent of the version before would misread one.
pub(super) const FORM: u32 = 1;
/// How much of a JSON error is repeated.
const ERROR_CHARS_SHOWN: usize = 300;

/// One entry of one of the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Of [`Routes::http`].
    Http(HostPort, Scoped<HttpTable>),
    /// Of [`Routes::streams`].
    Stream(HostPort, Scoped<StreamTable>),
    /// Of [`Routes::clusters`].
    Cluster(ClusterKey, Scoped<Cluster>),
    /// Of [`Routes::sidecars`].
    Sidecar(Name, Arc<SidecarScope>),
}

/// An entry as it is written.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Written {
    Http { at: HostPort, tables: WrittenScoped<HttpTable> },
    Stream { at: HostPort, tables: WrittenScoped<StreamTable> },
    Cluster { at: ClusterKey, clusters: WrittenScoped<Cluster> },
    Sidecar { at: Name, scope: Arc<SidecarScope> },
}

/// [`Scoped`] with every value once: many namespaces see the same.
#[derive(Serialize, Deserialize)]
struct WrittenScoped<T> {
    values: Vec<Arc<T>>,
    default: Option<usize>,
    by_namespace: BTreeMap<Arc<str>, WrittenNamespace>,
}

#[derive(Serialize, Deserialize)]
struct WrittenNamespace {
    selected: Vec<(Labels, usize)>,
    all: Option<usize>,
}

impl<T: Eq> WrittenScoped<T> {
    fn of(scoped: &Scoped<T>) -> Self {
        let mut values: Vec<Arc<T>> = Vec::new();
        let mut place = |value: &Arc<T>| match values.iter().position(|known| known == value) {
            Some(at) => at,
            None => {
                values.push(Arc::clone(value));
                values.len() - 1
            }
        };
        let default = scoped.default.as_ref().map(&mut place);
        let by_namespace = scoped
            .by_namespace
            .iter()
            .map(|(namespace, own)| {
                let selected = own.selected.iter().map(|(labels, v)| (labels.clone(), place(v))).collect();
                let all = own.all.as_ref().map(&mut place);
                (Arc::clone(namespace), WrittenNamespace { selected, all })
            })
            .collect();
        Self { values, default, by_namespace }
    }

    fn read(self) -> Result<Scoped<T>, Located> {
        let value = |at: usize| {
            let missing = || Located::at(format_args!("entry.values[{at}]"), Problem::Missing);
            self.values.get(at).cloned().ok_or_else(missing)
        };
        let mut by_namespace = BTreeMap::new();
        for (namespace, own) in self.by_namespace {
            let mut selected = Vec::with_capacity(own.selected.len());
            for (labels, at) in own.selected {
                selected.push((labels, value(at)?));
            }
            by_namespace.insert(namespace, InNamespace { selected, all: own.all.map(&value).transpose()? });
        }
        Ok(Scoped { default: self.default.map(&value).transpose()?, by_namespace })
    }
}

impl Entry {
    /// The xDS name.
    fn name(&self) -> String {
        match self {
            Self::Http(at, _) => http_name(at),
            Self::Stream(at, _) => stream_name(at),
            Self::Cluster(at, _) => cluster_name(at),
            Self::Sidecar(at, _) => sidecar_name(at),
        }
    }

    /// Every value that a rule may forward to.
    fn forwards(&self) -> Vec<&[WeightedBackend]> {
        // A value that several namespaces share is looked at once.
        let mut seen = HashSet::new();
        match self {
            Self::Http(_, tables) => tables
                .values()
                .filter(|table| seen.insert(Arc::as_ptr(table)))
                .flat_map(|table| table.rules.iter().map(|rule| &rule.action).chain([&table.unmatched]))
                .filter_map(Action::backends)
                .collect(),
            Self::Stream(_, tables) => tables
                .values()
                .flat_map(|table| table.tls.iter().chain(&table.tcp))
                .map(|rule| &*rule.backends)
                .collect(),
            Self::Cluster(..) | Self::Sidecar(..) => Vec::new(),
        }
    }
}

fn http_name(at: &HostPort) -> String {
    format!("http/{}:{}", at.host, at.port)
}

fn stream_name(at: &HostPort) -> String {
    format!("stream/{}:{}", at.host, at.port)
}

fn cluster_name(at: &ClusterKey) -> String {
    let subset = at.subset.as_deref().unwrap_or_default();
    format!("cluster/{}/{}/{subset}", at.service, at.port)
}

fn sidecar_name(at: &Name) -> String {
    format!("sidecar/{at}")
}

fn message(written: &impl Serialize) -> nodemesh::Route {
    // Numbers, texts and maps with text as keys can all be written.
    let entry = serde_json::to_vec(written).unwrap_or_default();
    nodemesh::Route { form: FORM, entry }
}

/// Encodes what holds where no entry says more; nothing, if that is what holds without being said.
pub(super) fn encode_defaults(defaults: &MeshDefaults) -> Option<nodemesh::Route> {
    (*defaults != MeshDefaults::default()).then(|| message(defaults))
}

/// Decodes what holds where no entry says more.
pub(super) fn decode_defaults(message: &nodemesh::Route) -> Result<Arc<MeshDefaults>, Located> {
    read(message).map(Arc::new)
}

fn read<T: DeserializeOwned>(message: &nodemesh::Route) -> Result<T, Located> {
    if message.form != FORM {
        return Err(Located::at("form", Problem::Form(message.form)));
    }
    serde_json::from_slice(&message.entry).map_err(|error| {
        let text = error.to_string().chars().take(ERROR_CHARS_SHOWN).collect();
        Located::at("entry", Problem::Json(text))
    })
}

/// Tells, by name, which entries of `new` are others than those of `old`, and which are gone.
pub(super) fn each_change(old: &Routes, new: &Routes, mut edit: impl FnMut(String, Option<nodemesh::Route>)) {
    compare(&old.http, &new.http, http_name, &mut edit, |at, tables| {
        message(&Written::Http { at: at.clone(), tables: WrittenScoped::of(tables) })
    });
    compare(&old.streams, &new.streams, stream_name, &mut edit, |at, tables| {
        message(&Written::Stream { at: at.clone(), tables: WrittenScoped::of(tables) })
    });
    compare(&old.clusters, &new.clusters, cluster_name, &mut edit, |at, clusters| {
        message(&Written::Cluster { at: at.clone(), clusters: WrittenScoped::of(clusters) })
    });
    compare(&old.sidecars, &new.sidecars, sidecar_name, &mut edit, |at, scope| {
        message(&Written::Sidecar { at: at.clone(), scope: Arc::clone(scope) })
    });
}

fn compare<K: Ord, V: PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    name: impl Fn(&K) -> String,
    edit: &mut impl FnMut(String, Option<nodemesh::Route>),
    message: impl Fn(&K, &V) -> nodemesh::Route,
) {
    for key in old.keys().filter(|key| !new.contains_key(key)) {
        edit(name(key), None);
    }
    // Values share their allocations from one snapshot to the next, and are then equal at a glance.
    for (key, value) in new.iter().filter(|(key, value)| old.get(key) != Some(value)) {
        edit(name(key), Some(message(key, value)));
    }
}

/// Decodes an entry.
pub(super) fn decode(name: &str, message: &nodemesh::Route) -> Result<Entry, Located> {
    let entry = match read(message)? {
        Written::Http { at, tables } => Entry::Http(at, tables.read()?),
        Written::Stream { at, tables } => Entry::Stream(at, tables.read()?),
        Written::Cluster { at, clusters } => Entry::Cluster(at, clusters.read()?),
        Written::Sidecar { at, scope } => Entry::Sidecar(at, scope),
    };
    if entry.name() != name {
        let name = name.chars().take(ERROR_CHARS_SHOWN).collect();
        return Err(Located::at("name", Problem::Name(name)));
    }
    let leads_nowhere = |backends: &[WeightedBackend]| {
        backends.is_empty() || backends.iter().any(|backend| backend.weight == 0)
    };
    if entry.forwards().into_iter().any(leads_nowhere) {
        return Err(Located::at("entry.backends", Problem::Missing));
    }
    Ok(entry)
}

/// The tables with all these entries.
pub(super) fn all(entries: &BTreeMap<Arc<str>, Entry>) -> Routes {
    let mut routes = Routes::default();
    for entry in entries.values() {
        match entry.clone() {
            Entry::Http(at, tables) => drop(routes.http.insert(at, tables)),
            Entry::Stream(at, tables) => drop(routes.streams.insert(at, tables)),
            Entry::Cluster(at, clusters) => drop(routes.clusters.insert(at, clusters)),
            Entry::Sidecar(at, scope) => drop(routes.sidecars.insert(at, scope)),
        }
    }
    routes
}
