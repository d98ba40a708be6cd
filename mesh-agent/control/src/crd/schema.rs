//! Owns how schemas are written down: one word for each form that fields have.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool, ValidationRule,
};

/// A duration as protobuf writes it, and as Go does.
const DURATION: &str =
    r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)(h|m|s|ms|us|ns)(([0-9]+(\.[0-9]*)?|\.[0-9]+)(h|m|s|ms|us|ns))*$";
/// A duration as the Gateway API writes it.
const GATEWAY_DURATION: &str = "^([0-9]{1,5}(h|m|s|ms)){1,4}$";

/// The schema of one value.
#[derive(Clone, Debug)]
pub(super) struct Schema(JSONSchemaProps);

fn of(kind: &str) -> Schema {
    Schema(JSONSchemaProps { type_: Some(kind.to_owned()), ..Default::default() })
}

/// Text.
pub(super) fn text() -> Schema {
    of("string")
}

/// One of some words.
pub(super) fn word(words: &[&str]) -> Schema {
    let mut schema = text();
    schema.0.enum_ = Some(words.iter().map(|word| JSON(serde_json::Value::from(*word))).collect());
    schema
}

/// True or false.
pub(super) fn truth() -> Schema {
    of("boolean")
}

/// A whole number.
pub(super) fn whole(least: i64, most: i64) -> Schema {
    let mut schema = of("integer");
    schema.0.format = Some("int64".to_owned());
    schema.0.minimum = Some(least as f64);
    schema.0.maximum = Some(most as f64);
    schema
}

/// A whole number that is not negative.
pub(super) fn count() -> Schema {
    whole(0, i64::from(u32::MAX))
}

/// The number of a port.
pub(super) fn port() -> Schema {
    whole(1, 65_535)
}

/// A number.
pub(super) fn number() -> Schema {
    of("number")
}

/// A duration of an Istio kind.
pub(super) fn duration() -> Schema {
    text().pattern(DURATION)
}

/// A duration of a Gateway API kind.
pub(super) fn gateway_duration() -> Schema {
    text().pattern(GATEWAY_DURATION)
}

/// A list.
pub(super) fn list(item: Schema) -> Schema {
    let mut schema = of("array");
    schema.0.items = Some(JSONSchemaPropsOrArray::Schema(Box::new(item.0)));
    schema
}

/// A list of texts.
pub(super) fn texts() -> Schema {
    list(text())
}

/// A map from texts.
pub(super) fn map(value: Schema) -> Schema {
    let mut schema = of("object");
    schema.0.additional_properties = Some(JSONSchemaPropsOrBool::Schema(Box::new(value.0)));
    schema
}

/// A map from texts to texts.
pub(super) fn labels() -> Schema {
    map(text())
}

/// An object with these fields.
pub(super) fn object<'a>(fields: impl IntoIterator<Item = (&'a str, Schema)>) -> Schema {
    let mut schema = of("object");
    let fields: std::collections::BTreeMap<String, JSONSchemaProps> =
        fields.into_iter().map(|(name, schema)| (name.to_owned(), schema.0)).collect();
    schema.0.properties = (!fields.is_empty()).then_some(fields);
    schema
}

/// Anything that is an object: kept, not looked at.
pub(super) fn anything() -> Schema {
    of("object").any_more(true)
}

impl Schema {
    /// Whether fields that are not named are kept.
    pub(super) fn any_more(mut self, kept: bool) -> Self {
        self.0.x_kubernetes_preserve_unknown_fields = kept.then_some(true);
        self
    }

    /// Fields that must be there.
    pub(super) fn required(mut self, names: &[&str]) -> Self {
        self.0.required = Some(names.iter().map(ToString::to_string).collect());
        self
    }

    /// The regular expression of a text.
    pub(super) fn pattern(mut self, pattern: &str) -> Self {
        self.0.pattern = Some(pattern.to_owned());
        self
    }

    /// Most items of a list, or most characters of a text. API servers refuse CEL rules whose cost has no bound.
    pub(super) fn at_most(mut self, most: i64) -> Self {
        if self.0.type_.as_deref() == Some("array") {
            self.0.max_items = Some(most);
        } else {
            self.0.max_length = Some(most);
        }
        self
    }

    /// Fewest items of a list, or fewest characters of a text.
    pub(super) fn at_least(mut self, least: i64) -> Self {
        if self.0.type_.as_deref() == Some("array") {
            self.0.min_items = Some(least);
        } else {
            self.0.min_length = Some(least);
        }
        self
    }

    /// A CEL rule that must hold.
    pub(super) fn rule(mut self, rule: &str, message: &str) -> Self {
        let rule =
            ValidationRule { rule: rule.to_owned(), message: Some(message.to_owned()), ..Default::default() };
        self.0.x_kubernetes_validations.get_or_insert_default().push(rule);
        self
    }

    /// At most one of these fields is there, wherever in a document: structural, since the cost of CEL rules is multiplied by
    /// what all lists around them may hold.
    pub(super) fn exclusive(mut self, names: &[&str]) -> Self {
        let pairs = names.iter().enumerate().flat_map(|(at, one)| {
            names[at + 1..].iter().map(|other| JSONSchemaProps {
                required: Some(vec![(*one).to_owned(), (*other).to_owned()]),
                ..Default::default()
            })
        });
        let not = JSONSchemaProps { any_of: Some(pairs.collect()), ..Default::default() };
        self.0
            .all_of
            .get_or_insert_default()
            .push(JSONSchemaProps { not: Some(Box::new(not)), ..Default::default() });
        self
    }

    /// At most one of these fields is there; in no list or map, see [`Self::exclusive`].
    pub(super) fn at_most_one(self, names: &[&str]) -> Self {
        let count: Vec<String> = names.iter().map(|name| format!("(has(self.{name}) ? 1 : 0)")).collect();
        self.rule(&format!("{} <= 1", count.join(" + ")), &format!("at most one of {}", names.join(", ")))
    }

    /// What it says.
    pub(super) fn finish(self) -> JSONSchemaProps {
        self.0
    }
}
