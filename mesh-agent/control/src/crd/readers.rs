//! Holds definitions and readers together, field by field: what one names and the other does not know is an error either way.
//!
//! A definition that lacks a field has the API server take it away before a reader sees it; a reader that lacks one leaves what a user
//! wrote, and the API server accepted, without effect.

use std::{cell::RefCell, collections::BTreeSet};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use serde::{
    Deserialize, Deserializer,
    de::{
        IntoDeserializer, Visitor,
        value::{Error, MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};
use serde_json::{Map, Value, json};

use super::all;
use crate::{
    resource::{self, Kind, asked, authorization_wire, gateway_wire},
    source::document::{Known, Rules, parse},
};

/// Key of the entries of maps in documents that are made up here.
const KEY: &str = "KEY";

/// A field, an item of a list, or an entry of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    Item,
    Entry,
}

/// The schemas right below one.
fn below(schema: &JSONSchemaProps) -> Vec<(Step, &JSONSchemaProps)> {
    if schema.x_kubernetes_preserve_unknown_fields == Some(true) {
        return Vec::new();
    }
    let mut found: Vec<_> = schema
        .properties
        .iter()
        .flatten()
        .map(|(name, schema)| (Step::Field(name.clone()), schema))
        .collect();
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &schema.items {
        found.push((Step::Item, item));
    }
    if let Some(JSONSchemaPropsOrBool::Schema(entry)) = &schema.additional_properties {
        found.push((Step::Entry, entry));
    }
    found
}

/// Every way down from a schema.
fn ways(schema: &JSONSchemaProps) -> Vec<Vec<Step>> {
    let mut ways = Vec::new();
    for (step, schema) in below(schema) {
        ways.push(vec![step.clone()]);
        ways.extend(self::ways(schema).into_iter().map(|rest| [vec![step.clone()], rest].concat()));
    }
    ways
}

/// A value with everything that the schema has, so far as it fits together.
fn whole(schema: &JSONSchemaProps) -> Value {
    if let Some(word) = schema.enum_.iter().flatten().next() {
        return word.0.clone();
    }
    let mut fields = Map::new();
    match schema.type_.as_deref() {
        Some("string") if schema.pattern.is_some() => json!("1s"),
        Some("string") => json!("x"),
        Some("boolean") => json!(true),
        Some("integer" | "number") => json!(schema.minimum.map_or(1, |least| (least as i64).max(1))),
        Some("array") => below(schema).into_iter().map(|(_, item)| whole(item)).collect(),
        _ => {
            for (step, schema) in below(schema) {
                let name = if let Step::Field(name) = step { name } else { KEY.to_owned() };
                fields.insert(name, whole(schema));
            }
            Value::Object(fields)
        }
    }
}

/// A value with what is at the end of one way, and on the way only what must be there.
fn only(schema: &JSONSchemaProps, way: &[Step]) -> Value {
    let Some((first, rest)) = way.split_first() else { return whole(schema) };
    let next = below(schema).into_iter().find(|(step, _)| step == first);
    let value = next.map(|(_, schema)| only(schema, rest)).unwrap_or_default();
    let name = match first {
        Step::Item => return json!([value]),
        Step::Entry => KEY,
        Step::Field(name) => name,
    };
    let needed = schema.required.as_deref().unwrap_or_default();
    let properties = schema.properties.iter().flatten().filter(|(name, _)| needed.contains(name));
    let mut fields: Map<String, Value> =
        properties.map(|(name, schema)| (name.clone(), whole(schema))).collect();
    fields.insert(name.to_owned(), value);
    Value::Object(fields)
}

/// As paths of fields are compared: the way, without what tells items and entries apart, and with the name that a field has in camelCase.
fn shown(way: &[Step]) -> String {
    let mut text = "spec".to_owned();
    for step in way {
        match step {
            Step::Item => text.push_str("[]"),
            Step::Entry => text.push_str(".*"),
            Step::Field(name) => {
                text.push('.');
                text.push_str(&camel(name));
            }
        }
    }
    text
}

/// The same of a path that a reader asked for.
fn generic(path: &str) -> String {
    path.replace("[0]", "[]").replace(&format!(".{KEY}"), ".*")
}

/// `mirror_percent` as `mirrorPercent`: some names are written both ways by users, and readers know.
fn camel(name: &str) -> String {
    let mut words = name.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |text, word| {
        let (head, tail) = word.split_at(word.len().min(1));
        text + &head.to_ascii_uppercase() + tail
    })
}

/// What the reader of a kind asks for, in a document.
fn asked_for(kind: Kind, document: &Value) -> BTreeSet<String> {
    let typed = |read: fn(Recorder<'_>) -> Result<(), Error>| {
        let asked = RefCell::default();
        let recorder = Recorder { path: String::new(), value: document, asked: &asked };
        read(recorder).unwrap_or_else(|error| panic!("{kind} {document}: {error}"));
        asked.into_inner()
    };
    match kind {
        Kind::PeerAuthentication => typed(|by| resource::wire::PeerAuthentication::deserialize(by).map(drop)),
        Kind::AuthorizationPolicy => {
            typed(|by| authorization_wire::AuthorizationPolicy::deserialize(by).map(drop))
        }
        Kind::HttpRoute => typed(|by| gateway_wire::HttpRoute::deserialize(by).map(drop)),
        Kind::GrpcRoute => typed(|by| gateway_wire::GrpcRoute::deserialize(by).map(drop)),
        Kind::TlsRoute => typed(|by| gateway_wire::TlsRoute::deserialize(by).map(drop)),
        Kind::TcpRoute => typed(|by| gateway_wire::TcpRoute::deserialize(by).map(drop)),
        Kind::ReferenceGrant => typed(|by| gateway_wire::ReferenceGrant::deserialize(by).map(drop)),
        _ => asked::during(|| {
            parse("a.json".as_ref(), &document.to_string(), &Rules::default(), &Known::new());
        }),
    }
}

#[test]
fn definitions_name_the_fields_that_readers_ask_for_and_no_others() {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for kind in Kind::ALL {
        let Some(definition) = all()
            .into_iter()
            .find(|one| one.spec.group == kind.group() && one.spec.names.kind == kind.as_str())
        else {
            continue;
        };
        let schema = definition.spec.versions[0].schema.clone().unwrap().open_api_v3_schema.unwrap();
        let schema = &schema.properties.unwrap()["spec"];
        let ways = ways(schema);
        let named: BTreeSet<String> = ways
            .iter()
            .filter(|way| matches!(way.last(), Some(Step::Field(_))))
            .map(|way| shown(way))
            .collect();
        // Fields that exclude each other are not all asked for where all are there, so each is alone once.
        let specs = ways.iter().map(|way| only(schema, way)).chain([whole(schema)]);
        let asked: BTreeSet<String> = specs
            .flat_map(|spec| {
                let version = &definition.spec.versions[0].name;
                let document = json!({"apiVersion": format!("{}/{version}", kind.group()), "kind": kind.as_str(),
                    "metadata": {"name": "a", "namespace": "shop"}, "spec": spec});
                asked_for(*kind, &document)
            })
            .filter(|path| path.starts_with("spec."))
            .map(|path| generic(&path))
            .collect();
        assert!(asked.len() > 2, "{kind}: {asked:?}");
        let missed = named.difference(&asked);
        wrong.extend(missed.map(|path| format!("{kind} {path}: no reader asks for it")));
        wrong.extend(asked.difference(&named).map(|path| format!("{kind} {path}: the definition lacks it")));
        checked += named.len();
    }
    assert_eq!(wrong, Vec::<String>::new());
    assert!(checked > 300, "{checked}");
}

/// A document that remembers which fields its reader's types have.
struct Recorder<'a> {
    path: String,
    value: &'a Value,
    asked: &'a RefCell<BTreeSet<String>>,
}

impl<'a> Recorder<'a> {
    fn inner(&self, path: String, value: &'a Value) -> Self {
        Self { path, value, asked: self.asked }
    }

    fn at(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }
}

impl IntoDeserializer<'_, Error> for Recorder<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Recorder<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match number.as_i64() {
                Some(number) => visitor.visit_i64(number),
                None => visitor.visit_f64(number.as_f64().unwrap_or_default()),
            },
            Value::String(text) => visitor.visit_str(text),
            Value::Array(items) => {
                let item = |(at, value)| self.inner(format!("{}[{at}]", self.path), value);
                visitor.visit_seq(SeqDeserializer::new(items.iter().enumerate().map(item)))
            }
            Value::Object(fields) => {
                let entry = |(name, value): (&String, _)| (name.clone(), self.inner(self.at(name), value));
                visitor.visit_map(MapDeserializer::new(fields.iter().map(entry)))
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.value.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.asked.borrow_mut().extend(fields.iter().map(|field| self.at(field)));
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct seq tuple
        tuple_struct map enum identifier ignored_any
    }
}
