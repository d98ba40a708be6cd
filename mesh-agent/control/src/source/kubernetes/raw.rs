//! Owns an object as it came from the API server, of any kind: beside its metadata it is JSON.
//!
//! kube's `DynamicObject` is the same, but is read twice on the way: its fields are flattened. Of a large cluster that is what a start
//! takes longest for.

use std::{borrow::Cow, fmt};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Resource,
    api::{ApiResource, DynamicObject},
    core::{DynamicResourceScope, PartialObjectMeta},
};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::{Map, Value};

/// The field that every object has.
const METADATA: &str = "metadata";

/// Any object.
#[derive(Clone, Debug, Default)]
pub(super) struct RawObject {
    metadata: ObjectMeta,
    /// All fields but the metadata.
    fields: Map<String, Value>,
}

/// What can be read as a document.
pub(super) trait IntoValue {
    /// The object as JSON.
    fn into_value(self) -> Value;
}

impl IntoValue for RawObject {
    fn into_value(self) -> Value {
        let Self { mut metadata, mut fields } = self;
        // Often larger than the rest, and of no use.
        metadata.managed_fields = None;
        // What was read from JSON can be written as JSON.
        fields.insert(METADATA.to_owned(), serde_json::to_value(metadata).unwrap_or_default());
        Value::Object(fields)
    }
}

impl IntoValue for PartialObjectMeta<DynamicObject> {
    fn into_value(self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = RawObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawObject, A::Error> {
                let mut object = RawObject::default();
                while let Some(key) = map.next_key::<String>()? {
                    if key == METADATA {
                        object.metadata = map.next_value()?;
                    } else {
                        object.fields.insert(key, map.next_value()?);
                    }
                }
                Ok(object)
            }
        }

        deserializer.deserialize_map(Fields)
    }
}

impl Resource for RawObject {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(kind: &ApiResource) -> Cow<'_, str> {
        kind.kind.as_str().into()
    }

    fn group(kind: &ApiResource) -> Cow<'_, str> {
        kind.group.as_str().into()
    }

    fn version(kind: &ApiResource) -> Cow<'_, str> {
        kind.version.as_str().into()
    }

    fn api_version(kind: &ApiResource) -> Cow<'_, str> {
        kind.api_version.as_str().into()
    }

    fn plural(kind: &ApiResource) -> Cow<'_, str> {
        kind.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_is_what_came_but_for_who_manages_its_fields() {
        let came = json!({
            "spec": {"nodeName": "n1", "list": [1, null]},
            "metadata": {"name": "a", "namespace": "shop", "labels": {"app": "a"},
                "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}]},
            "status": {"phase": "Running"},
        });
        let object: RawObject = serde_json::from_str(&came.to_string()).unwrap();
        assert_eq!(object.meta().name.as_deref(), Some("a"));
        let mut wanted = came;
        wanted["metadata"].as_object_mut().unwrap().remove("managedFields");
        assert_eq!(object.into_value(), wanted);
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in ["[]", "3", r#"{"metadata": 3}"#, r#"{"metadata": {"name": "#] {
            assert!(serde_json::from_str::<RawObject>(text).is_err(), "{text}");
        }
    }
}
