//! Definitions say what the readers read, and nothing that an API server would refuse.

use std::collections::BTreeSet;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use serde_json::Value;

use super::*;
use crate::resource::{Kind, good_documents};

fn definition(kind: &str) -> CustomResourceDefinition {
    all().into_iter().find(|definition| definition.spec.names.kind == kind).unwrap()
}

/// The schema of the version that is stored.
fn schema(definition: &CustomResourceDefinition) -> JSONSchemaProps {
    let stored = definition.spec.versions.iter().find(|version| version.storage).unwrap();
    stored.schema.clone().unwrap().open_api_v3_schema.unwrap()
}

/// What an API server would take away, or refuse for its type or its value.
fn lost(value: &Value, schema: &JSONSchemaProps, path: &str, found: &mut Vec<String>) {
    let words: Option<Vec<&Value>> =
        schema.enum_.as_ref().map(|words| words.iter().map(|word| &word.0).collect());
    if words.is_some_and(|words| !words.contains(&value)) {
        found.push(format!("{path}: {value} is none of the words"));
    }
    let of_type = match schema.type_.as_deref() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_i64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        other => panic!("{path}: type {other:?}"),
    };
    if !of_type {
        found.push(format!("{path}: {value} is not {:?}", schema.type_));
    }
    if let (Some(pattern), Some(text)) = (&schema.pattern, value.as_str())
        && !regex_lite(pattern, text)
    {
        found.push(format!("{path}: {text} does not match"));
    }
    match value {
        Value::Object(fields) if schema.x_kubernetes_preserve_unknown_fields != Some(true) => {
            for (name, value) in fields {
                let path = format!("{path}.{name}");
                let known = schema.properties.as_ref().and_then(|known| known.get(name));
                match (known, &schema.additional_properties) {
                    (Some(schema), _) => lost(value, schema, &path, found),
                    (None, Some(JSONSchemaPropsOrBool::Schema(schema))) => lost(value, schema, &path, found),
                    (None, _) => found.push(format!("{path}: is not known")),
                }
            }
        }
        Value::Array(items) => {
            let Some(JSONSchemaPropsOrArray::Schema(schema)) = &schema.items else {
                panic!("{path}: no items")
            };
            for (at, item) in items.iter().enumerate() {
                lost(item, schema, &format!("{path}[{at}]"), found);
            }
        }
        _ => {}
    }
}

/// The patterns here are of durations only.
fn regex_lite(pattern: &str, text: &str) -> bool {
    assert!(pattern.contains("(h|m|s|ms"), "{pattern}");
    text.starts_with(|c: char| c.is_ascii_digit() || c == '.') && text.ends_with(['h', 'm', 's'])
}

#[test]
fn every_kind_of_these_groups_that_the_mesh_reads_has_a_definition_in_every_version() {
    let all = all();
    for kind in Kind::ALL
        .iter()
        .filter(|kind| kind.group().contains("istio.io") || kind.group() == crate::resource::GATEWAY_GROUP)
    {
        let definition =
            all.iter().find(|d| d.spec.names.kind == kind.as_str() && d.spec.group == kind.group());
        assert!(definition.is_some(), "{kind}");
    }
    for definition in &all {
        let name = definition.metadata.name.as_deref().unwrap_or_default();
        assert_eq!(name, format!("{}.{}", definition.spec.names.plural, definition.spec.group));
        assert_eq!(definition.spec.versions.iter().filter(|version| version.storage).count(), 1, "{name}");
    }
    let names: BTreeSet<&str> = all.iter().filter_map(|d| d.metadata.name.as_deref()).collect();
    assert_eq!(names.len(), all.len(), "no definition twice");
}

#[test]
fn nothing_of_a_good_document_is_pruned_or_refused() {
    let mut checked = 0;
    for document in good_documents() {
        let kind = document["kind"].as_str().unwrap();
        if kind == "ConfigMap" {
            continue;
        }
        let definition = definition(kind);
        let mut found = Vec::new();
        // `metadata` is the API server's own.
        lost(&document["spec"], &schema(&definition).properties.unwrap()["spec"], "spec", &mut found);
        assert_eq!(found, Vec::<String>::new(), "{kind}");
        checked += 1;
    }
    assert!(checked >= 7, "{checked}");
}

#[test]
fn a_field_that_no_reader_knows_is_pruned() {
    let document = serde_json::json!({"hosts": ["a"], "http": [{"rout": []}]});
    let mut found = Vec::new();
    lost(&document, &schema(&definition("VirtualService")).properties.unwrap()["spec"], "spec", &mut found);
    assert_eq!(found, ["spec.http[0].rout: is not known"]);
}

#[test]
fn definitions_in_a_group_of_kubernetes_say_that_they_are_not_approved() {
    for definition in all() {
        let said = definition.metadata.annotations.unwrap_or_default().contains_key(APPROVAL);
        assert_eq!(said, definition.spec.group.ends_with(".k8s.io"), "{:?}", definition.metadata.name);
    }
}

/// Schemas of values that CEL rules look into need bounds, and rules must name fields that exist.
#[test]
fn rules_name_fields_that_are_there() {
    fn check(schema: &JSONSchemaProps, path: &str) {
        let fields = schema.properties.clone().unwrap_or_default();
        for rule in schema.x_kubernetes_validations.iter().flatten() {
            for part in rule.rule.split("has(self.").skip(1) {
                let name = part.split([')', '.']).next().unwrap_or_default();
                assert!(fields.contains_key(name), "{path}: {}", rule.rule);
            }
        }
        for (name, schema) in &fields {
            check(schema, &format!("{path}.{name}"));
        }
        if let Some(JSONSchemaPropsOrArray::Schema(schema)) = &schema.items {
            check(schema, &format!("{path}[]"));
        }
        if let Some(JSONSchemaPropsOrBool::Schema(schema)) = &schema.additional_properties {
            check(schema, &format!("{path}.*"));
        }
    }
    for definition in all() {
        check(&schema(&definition), definition.spec.names.kind.as_str());
    }
}
