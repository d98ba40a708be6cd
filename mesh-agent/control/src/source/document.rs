//! From the text of a manifest file to checked resources, with every problem located.
//!
//! Pure: text in, resources and problems out. Shared by the file source and by offline validation.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    path::Path,
    sync::Arc,
};

use k8s_openapi::api::{core::v1, discovery};
use mesh_core::snapshot::Name;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use super::lines::Lines;
use crate::{
    problem::{Level, Problem, Problems, SourceError},
    resource::{self, Kind, Resource, Scope, gateway_wire},
};

/// Largest file that is read: some 50 000 services.
pub const FILE_BYTES_MAX: u64 = 64 << 20;

/// What is said of a field that a kind does not have.
pub(crate) const UNKNOWN_FIELD: &str = "is not a field of this kind; it has no effect";

/// Groups all of whose kinds are the mesh's business: one that is not read is worth a warning.
const MESH_GROUPS: [&str; 6] = [
    "extensions.istio.io",
    "gateway.networking.k8s.io",
    "gateway.networking.x-k8s.io",
    "networking.istio.io",
    "security.istio.io",
    "telemetry.istio.io",
];

/// What a file holds.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// Good resources with the number of their document, in order.
    pub resources: Vec<(usize, Arc<Resource>)>,
    /// Where the parts of rules stand, by the number of their document.
    pub lines: BTreeMap<usize, Placed>,
    /// Errors and warnings, in order.
    pub problems: Vec<SourceError>,
    /// Documents without a word to say about them, to be known again when the rest of the file changes.
    pub known: Known,
    /// Kinds the mesh does not read, as `apiVersion/kind`, with how many there are.
    pub ignored: BTreeMap<String, usize>,
    /// Those of them that belong to the mesh's own groups, as kind, namespace and name: others may refer to them.
    pub unread: Vec<(String, Name)>,
}

impl Parsed {
    /// How much there is to say beyond the resources.
    fn remarks(&self) -> usize {
        self.problems.len() + self.ignored.values().sum::<usize>()
    }

    /// Whether a document could not be used.
    pub fn has_errors(&self) -> bool {
        self.problems.iter().any(|p| p.level == Level::Error)
    }
}

/// The lines of a document, and where in its file it begins.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Placed {
    /// Line of the file that the document begins at, from 1.
    pub first_line: u64,
    /// Lines within it.
    pub lines: Arc<Lines>,
}

/// What a document without remarks held.
#[derive(Clone, Debug)]
pub struct KnownDocument {
    resources: Vec<Arc<Resource>>,
    lines: Option<Arc<Lines>>,
}

/// Documents by the hash of their text.
pub type Known = HashMap<u64, KnownDocument>;

/// Settings of the mesh that checking depends on.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Namespace of mesh-wide policies.
    pub root_namespace: String,
    /// The ConfigMap that holds the settings of the mesh.
    pub mesh_config: Name,
}

impl Rules {
    /// Mesh-wide policies in `root_namespace`, and the settings in Istio's ConfigMap there.
    pub fn new(root_namespace: &str) -> Self {
        let mesh_config = Name::new(root_namespace, resource::CONFIG_MAP);
        Self { root_namespace: root_namespace.to_owned(), mesh_config }
    }
}

impl Default for Rules {
    fn default() -> Self {
        Self::new("istio-system")
    }
}

/// Reads all documents of a file. JSON is YAML here, except that a `.json` file is one document.
///
/// `known` is [`Parsed::known`] of an earlier reading with the same rules: unchanged documents are taken from there.
pub fn parse(file: &Path, text: &str, rules: &Rules, known: &Known) -> Parsed {
    let mut parsed = Parsed::default();
    let json = file.extension().is_some_and(|extension| extension == "json");
    let documents = if json { vec![Document { first_line: 1, text: text.into() }] } else { split(text) };
    for (document, number) in documents.iter().zip(1..) {
        let hash = hash_of(&document.text);
        let placed =
            |lines: &Arc<Lines>| Placed { first_line: document.first_line, lines: Arc::clone(lines) };
        if let Some(known) = known.get(&hash) {
            parsed.resources.extend(known.resources.iter().map(|resource| (number, Arc::clone(resource))));
            parsed.lines.extend(known.lines.as_ref().map(|lines| (number, placed(lines))));
            parsed.known.insert(hash, known.clone());
            continue;
        }
        let before = (parsed.resources.len(), parsed.remarks());
        let value = if json { from_json(&document.text) } else { from_yaml(document) };
        match value {
            // A document of comments, or one that a template left empty.
            Ok(Value::Null) => {}
            Ok(value) => {
                let unknown = UnknownFields::Warn;
                Reader { file, number, rules, unknown, parsed: &mut parsed }.object(value, "");
            }
            Err(message) => parsed.problems.push(SourceError {
                file: file.to_owned(),
                document: Some(number),
                kind: None,
                namespace: None,
                name: None,
                level: Level::Error,
                field: String::new(),
                message,
            }),
        }
        let found = &parsed.resources[before.0..];
        // Rules are named by their lines; of a list of resources only the document is known.
        let has_rules = matches!(found, [(_, one)] if one.key().kind.is_of_routes());
        let lines = if has_rules { Lines::of(&document.text).map(Arc::new) } else { None };
        parsed.lines.extend(lines.as_ref().map(|lines| (number, placed(lines))));
        if !found.is_empty() && parsed.remarks() == before.1 {
            let resources = found.iter().map(|(_, resource)| Arc::clone(resource)).collect();
            parsed.known.insert(hash, KnownDocument { resources, lines });
        }
    }
    parsed
}

/// Whether fields that a kind does not have are looked for: that takes as long as everything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnknownFields {
    /// Each is warned of.
    Warn,
    /// They are none of our business.
    Ignore,
}

/// Reads one object that an API server holds. `file` is what problems are said to be in.
pub(crate) fn read_object(file: &Path, object: Value, rules: &Rules, unknown: UnknownFields) -> Parsed {
    let mut parsed = Parsed::default();
    Reader { file, number: 1, rules, unknown, parsed: &mut parsed }.object(object, "");
    parsed
}

/// Hash of a text; never 0.
pub(super) fn hash_of(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish().max(1)
}

/// One document of a stream.
struct Document<'a> {
    /// Line its text starts at, from 1.
    first_line: u64,
    text: Cow<'a, str>,
}

/// Splits a stream at its `---` lines, so that one broken document does not hide the others.
///
/// A line of `---` at the start of a line is a document marker everywhere in YAML, inside block text too.
fn split(text: &str) -> Vec<Document<'_>> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = Vec::new();
    let (mut start, mut first_line) = (0, 1);
    let mut at = 0;
    for (line, number) in text.split_inclusive('\n').zip(1_u64..) {
        let rest =
            line.strip_prefix("---").filter(|r| r.is_empty() || r.starts_with([' ', '\t', '\r', '\n']));
        if rest.is_some() {
            documents.push(Document { first_line, text: text[start..at].into() });
            // What follows the marker on its line belongs to the new document; its columns stay true.
            (start, first_line) = (at + 3, number);
        }
        at += line.len();
    }
    documents.push(Document { first_line, text: text[start..].into() });
    let content = |line: &str| {
        let line = line.trim();
        !(line.is_empty() || line.starts_with('#') || line.starts_with("%YAML ") || line == "...")
    };
    documents.retain(|document| document.text.lines().any(content));
    documents
}

fn from_yaml(document: &Document<'_>) -> Result<Value, String> {
    // The text is in memory and bounded by FILE_BYTES_MAX; counting limits would only get in the way of large lists.
    // Alias limits stay: a few bytes of aliases can stand for gigabytes.
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 20_000_000,
            max_nodes: 10_000_000,
        },
    };
    serde_saphyr::from_str_with_options(&document.text, options).map_err(|error| {
        let plain = error.without_snippet();
        // Positions within the document are turned into lines of the file.
        let line = plain
            .location()
            .map(|place| (document.first_line + place.line().saturating_sub(1), place.column()));
        let message = plain.to_string();
        let message = message.lines().next().unwrap_or_default();
        let what = message
            .split_once(": ")
            .filter(|(at, _)| at.starts_with("error: line"))
            .map_or(message, |(_, w)| w);
        match line {
            Some((line, column)) => format!("is no valid YAML at line {line}, column {column}: {what}"),
            None => format!("is no valid YAML: {what}"),
        }
    })
}

fn from_json(text: &str) -> Result<Value, String> {
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(text).map_err(|error| format!("is no valid JSON: {error}"))
}

/// Reads the objects of one document.
struct Reader<'a> {
    file: &'a Path,
    number: usize,
    rules: &'a Rules,
    unknown: UnknownFields,
    parsed: &'a mut Parsed,
}

impl Reader<'_> {
    /// Reads one object; `path` is where it is in its document, e.g. `items[3]`.
    fn object(&mut self, value: Value, path: &str) {
        let Value::Object(object) = value else {
            let problem =
                error(path, format!("is {}, wanted an object with apiVersion and kind", kind_of(&value)));
            return self.note(&Map::new(), [problem]);
        };
        let (api_version, kind) = match (text_of(&object, "apiVersion", path), text_of(&object, "kind", path))
        {
            (Ok(api_version), Ok(kind)) => (api_version.to_owned(), kind.to_owned()),
            (api_version, kind) => {
                let problems: Vec<_> = api_version.err().into_iter().chain(kind.err()).collect();
                return self.note(&object, problems);
            }
        };
        if let Some(item_kind) = kind.strip_suffix("List")
            && object.get("items").is_some_and(Value::is_array)
        {
            return self.list(object, &api_version, item_kind, path);
        }
        let group = api_version.rsplit_once('/').map_or("", |(group, _)| group);
        let Some(known) = Kind::ALL.iter().copied().find(|known| known.as_str() == kind) else {
            if MESH_GROUPS.contains(&group) {
                self.unread(&object, group, &kind, path);
            }
            return self.ignore(&api_version, &kind);
        };
        if !known.api_versions().contains(&api_version.as_str()) {
            // Other groups have kinds of the same name (e.g. Knative's Service); they carry a domain.
            if group.contains('.') && group != known.group() {
                return self.ignore(&api_version, &kind);
            }
            let wanted = known.api_versions().join("\" or \"");
            let problem = error(
                &join(path, "apiVersion"),
                format!("is {api_version:?}, wanted \"{wanted}\" for a {kind}"),
            );
            return self.note(&object, [problem]);
        }
        if known == Kind::ConfigMap && !self.is_mesh_config(&object) {
            return self.ignore(&api_version, &kind);
        }
        self.known(known, object, path);
    }

    /// Of all ConfigMaps one is the mesh's; others may hold anything.
    fn is_mesh_config(&self, object: &Map<String, Value>) -> bool {
        let meta =
            |key| object.get("metadata").and_then(|m| m.get(key)).and_then(Value::as_str).unwrap_or_default();
        let wanted = &self.rules.mesh_config;
        meta("name") == &*wanted.name && meta("namespace") == &*wanted.namespace
    }

    /// `kubectl get -o yaml` writes lists; items of a typed list may leave out what the list says.
    fn list(&mut self, mut list: Map<String, Value>, api_version: &str, item_kind: &str, path: &str) {
        let Some(Value::Array(items)) = list.remove("items") else { return };
        for (index, mut item) in items.into_iter().enumerate() {
            if let Value::Object(item) = &mut item
                && !item_kind.is_empty()
            {
                item.entry("apiVersion").or_insert_with(|| api_version.into());
                item.entry("kind").or_insert_with(|| item_kind.into());
            }
            self.object(item, &join(path, &format!("items[{index}]")));
        }
    }

    fn known(&mut self, kind: Kind, object: Map<String, Value>, path: &str) {
        let root = &self.rules.root_namespace;
        let unknown = self.unknown;
        let value = Value::Object(object);
        let mut problems = Problems::default();
        let p = &mut problems;
        let read = match kind {
            Kind::Namespace => typed(&value, unknown, p)
                .map(|o: v1::Namespace| Resource::Namespace(resource::namespace(&o, p))),
            Kind::ServiceAccount => typed(&value, unknown, p)
                .map(|o: v1::ServiceAccount| Resource::ServiceAccount(resource::service_account(&o, p))),
            Kind::Pod => {
                typed(&value, unknown, p).map(|o: v1::Pod| Resource::Pod(Box::new(resource::pod(&o, p))))
            }
            Kind::Service => typed(&value, unknown, p)
                .map(|o: v1::Service| Resource::Service(Box::new(resource::service(&o, p)))),
            Kind::EndpointSlice => typed(&value, unknown, p).map(|o: discovery::v1::EndpointSlice| {
                Resource::EndpointSlice(resource::endpoint_slice(&o, p))
            }),
            Kind::PeerAuthentication => {
                typed(&value, unknown, p).map(|o: resource::wire::PeerAuthentication| {
                    Resource::PeerAuthentication(resource::peer_authentication(&o, root, p))
                })
            }
            Kind::AuthorizationPolicy => {
                typed(&value, unknown, p).map(|o: resource::authorization_wire::AuthorizationPolicy| {
                    Resource::AuthorizationPolicy(resource::authorization_policy(&o, root, p))
                })
            }
            Kind::Secret => typed(&value, unknown, p)
                .map(|o: v1::Secret| Resource::Secret(Box::new(resource::secret(&o, p)))),
            Kind::Node => typed(&value, unknown, p).map(|o: v1::Node| Resource::Node(resource::node(&o, p))),
            Kind::ConfigMap => typed(&value, unknown, p)
                .map(|o: v1::ConfigMap| Resource::MeshConfig(resource::mesh_config(&o, root, p))),
            Kind::VirtualService => {
                Some(Resource::VirtualService(Box::new(resource::virtual_service_of(&value, p))))
            }
            Kind::DestinationRule => {
                Some(Resource::DestinationRule(Box::new(resource::destination_rule_of(&value, p))))
            }
            Kind::Sidecar => Some(Resource::Sidecar(Box::new(resource::sidecar_of(&value, root, p)))),
            Kind::ServiceEntry => Some(Resource::ServiceEntry(Box::new(resource::service_entry(&value, p)))),
            Kind::WorkloadEntry => {
                Some(Resource::WorkloadEntry(Box::new(resource::workload_entry(&value, p))))
            }
            Kind::HttpRoute => typed(&value, unknown, p)
                .map(|o: gateway_wire::HttpRoute| Resource::HttpRoute(Box::new(resource::http_route(&o, p)))),
            Kind::GrpcRoute => typed(&value, unknown, p)
                .map(|o: gateway_wire::GrpcRoute| Resource::GrpcRoute(Box::new(resource::grpc_route(&o, p)))),
            Kind::TlsRoute => typed(&value, unknown, p)
                .map(|o: gateway_wire::TlsRoute| Resource::TlsRoute(Box::new(resource::tls_route(&o, p)))),
            Kind::TcpRoute => typed(&value, unknown, p)
                .map(|o: gateway_wire::TcpRoute| Resource::TcpRoute(Box::new(resource::tcp_route(&o, p)))),
            Kind::ReferenceGrant => typed(&value, unknown, p).map(|o: gateway_wire::ReferenceGrant| {
                Resource::ReferenceGrant(resource::reference_grant(&o, p))
            }),
        };
        if !problems.has_errors()
            && let Some(read) = read
        {
            self.parsed.resources.push((self.number, Arc::new(read)));
        }
        if let Value::Object(object) = &value {
            let located =
                problems.into_vec().into_iter().map(|p| Problem { field: join(path, &p.field), ..p });
            self.note(object, located);
        }
    }

    fn ignore(&mut self, api_version: &str, kind: &str) {
        tracing::debug!(file = %self.file.display(), document = self.number, api_version, kind, "kind not read by the mesh");
        *self.parsed.ignored.entry(format!("{api_version}/{kind}")).or_default() += 1;
    }

    /// Says that a kind of the mesh's own groups has no effect, and remembers that the object is there.
    fn unread(&mut self, object: &Map<String, Value>, group: &str, kind: &str, path: &str) {
        let meta = |key| object.get("metadata").and_then(|m| m.get(key)).and_then(Value::as_str);
        if let Some(name) = meta("name") {
            self.parsed
                .unread
                .push((kind.to_owned(), Name::new(meta("namespace").unwrap_or("default"), name)));
        }
        let alike = Kind::ALL.iter().find(|k| k.group() == group && k.as_str().eq_ignore_ascii_case(kind));
        let message = match alike {
            Some(meant) => format!("is {kind:?}, wanted \"{meant}\"; the resource has no effect"),
            None => format!(
                "is {kind:?}, a kind of {group} that the mesh does not do; the resource has no effect"
            ),
        };
        let field = join(path, "kind");
        self.note(object, [Problem { level: Level::Warning, field, message }]);
    }

    fn note(&mut self, object: &Map<String, Value>, problems: impl IntoIterator<Item = Problem>) {
        let kind = object.get("kind").and_then(Value::as_str);
        let meta =
            |key| object.get("metadata").and_then(|m| m.get(key)).and_then(Value::as_str).map(str::to_owned);
        let scope = if kind == Some(Kind::Namespace.as_str()) { Scope::Cluster } else { Scope::Namespaced };
        let name = meta("name");
        let namespace = match scope {
            Scope::Cluster => None,
            Scope::Namespaced => meta("namespace").or_else(|| name.as_ref().map(|_| "default".to_owned())),
        };
        for problem in problems {
            self.parsed.problems.push(SourceError {
                file: self.file.to_owned(),
                document: Some(self.number),
                kind: kind.map(str::to_owned),
                namespace: namespace.clone(),
                name: name.clone(),
                level: problem.level,
                field: problem.field,
                message: problem.message,
            });
        }
    }
}

fn error(field: &str, message: String) -> Problem {
    Problem { level: Level::Error, field: field.to_owned(), message }
}

fn join(path: &str, field: &str) -> String {
    match (path, field) {
        ("", one) | (one, "") => one.to_owned(),
        (path, field) => format!("{path}.{field}"),
    }
}

fn text_of<'a>(object: &'a Map<String, Value>, key: &str, path: &str) -> Result<&'a str, Problem> {
    match object.get(key) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text),
        None | Some(Value::Null | Value::String(_)) => Err(error(&join(path, key), "is missing".to_owned())),
        Some(other) => Err(error(&join(path, key), format!("is {}, wanted text", kind_of(other)))),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "empty",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Reads the typed form, and warns of fields that the type does not have, if that is wanted.
fn typed<T: DeserializeOwned + Serialize>(
    value: &Value,
    unknown: UnknownFields,
    problems: &mut Problems,
) -> Option<T> {
    let typed: T = match serde_path_to_error::deserialize(value) {
        Ok(typed) => typed,
        Err(error) => {
            let field = error.path().to_string();
            let field = if field == "." { String::new() } else { field };
            problems.error(field, error.into_inner().to_string());
            return None;
        }
    };
    if unknown == UnknownFields::Warn
        && let Ok(known) = serde_json::to_value(&typed)
    {
        unknown_fields(value, &known, "", problems);
    }
    Some(typed)
}

/// Fields of `written` that are missing in `known`, which was read from it: the type does not have them.
fn unknown_fields(written: &Value, known: &Value, path: &str, problems: &mut Problems) {
    match (written, known) {
        (Value::Object(written), Value::Object(known)) => {
            for (key, value) in written {
                let path = join(path, key);
                // Our own types leave out apiVersion and kind, which have been checked by then.
                // `status` is somebody else's word.
                let checked = matches!(path.as_str(), "apiVersion" | "kind" | "status");
                match known.get(key) {
                    Some(known) => unknown_fields(value, known, &path, problems),
                    // Empty values may be dropped by a type that has the field.
                    None if checked || resource::is_nothing(value) => {}
                    None => problems.warning(path, UNKNOWN_FIELD),
                }
            }
        }
        (Value::Array(written), Value::Array(known)) => {
            for (index, (written, known)) in written.iter().zip(known).enumerate() {
                unknown_fields(written, known, &format!("{path}[{index}]"), problems);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
