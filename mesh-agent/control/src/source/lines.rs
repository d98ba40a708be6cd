//! Which line of its document each part of a resource begins at, so that a rule can be named by the line it was written at.
//!
//! Lines are relative to the document: they stay true when a document moves within its file.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;

/// Parts that are remembered per document; what lies beyond is named by what it is in.
const PARTS_MAX: usize = 20_000;
/// Deepest part that is remembered: `spec.http[0].match[1]` is the fifth level.
const DEPTH_MAX: usize = 6;

/// Lines of the maps and lists of one document by their field paths (`spec.http[0]`), from 0 for the document's first line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lines(BTreeMap<Arc<str>, u64>);

impl Lines {
    /// The lines of a document; `None` when it cannot be read.
    pub(super) fn of(text: &str) -> Option<Self> {
        let document: Spanned<Part> = serde_saphyr::from_str(text).ok()?;
        let mut lines = Self::default();
        lines.take("", &document, 0);
        Some(lines)
    }

    fn take(&mut self, path: &str, part: &Spanned<Part>, depth: usize) {
        if matches!(part.value, Part::Other) || depth > DEPTH_MAX || self.0.len() >= PARTS_MAX {
            return;
        }
        // A position that is not known is line 0.
        if let Some(line) = part.referenced.line().checked_sub(1) {
            self.0.insert(path.into(), line);
        }
        match &part.value {
            Part::Map(fields) => {
                for (name, field) in fields {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    self.take(&path, field, depth + 1);
                }
            }
            Part::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    self.take(&format!("{path}[{index}]"), item, depth + 1);
                }
            }
            Part::Other => {}
        }
    }

    /// The line of a part, or of the nearest part that it lies in.
    pub(crate) fn at(&self, field: &str) -> Option<u64> {
        let mut path = field;
        loop {
            if let Some(line) = self.0.get(path) {
                return Some(*line);
            }
            if path.is_empty() {
                return None;
            }
            // The last step is `.name` or `[index]`.
            path = path.rfind(['.', '[']).and_then(|end| path.get(..end)).unwrap_or_default();
        }
    }
}

/// A value as far as its lines matter.
#[derive(Debug)]
enum Part {
    Map(Vec<(String, Spanned<Part>)>),
    List(Vec<Spanned<Part>>),
    Other,
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Parts;

        impl<'de> Visitor<'de> for Parts {
            type Value = Part;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Part, A::Error> {
                let mut fields = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    fields.push((name, map.next_value()?));
                }
                Ok(Part::Map(fields))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Part, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Part::List(items))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_i128<E>(self, _: i128) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_u128<E>(self, _: u128) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_str<E>(self, _: &str) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_bytes<E>(self, _: &[u8]) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_none<E>(self) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_unit<E>(self) -> Result<Part, E> {
                Ok(Part::Other)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Part, D::Error> {
                Part::deserialize(deserializer)
            }

            fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Part, D::Error> {
                IgnoredAny::deserialize(deserializer).map(|_| Part::Other)
            }
        }

        deserializer.deserialize_any(Parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_at_their_lines_and_parts_of_them_nearby() {
        let lines = Lines::of(
            "# a comment
kind: VirtualService
metadata: {name: web}
spec:
  hosts: [web]
  http:
  - name: first
    match:
    - uri: {prefix: /a}
    - uri:
        prefix: /b
    route: [{destination: {host: web}}]

  -
    route: []
",
        )
        .unwrap();
        for (field, line) in [
            ("", 1),
            ("spec", 4),
            ("spec.http", 6),
            ("spec.http[0]", 6),
            ("spec.http[0].match[0]", 8),
            ("spec.http[0].match[1]", 9),
            ("spec.http[0].route[0].destination.host", 11),
            ("spec.http[1]", 14),
            ("spec.http[7].timeout", 6),
            ("status.x", 1),
        ] {
            assert_eq!(lines.at(field), Some(line), "{field}");
        }
        assert_eq!(
            Lines::of("{kind: VirtualService, spec: {http: [{}, {}]}}").unwrap().at("spec.http[1]"),
            Some(0)
        );
        assert_eq!(Lines::of("a: [").map(|lines| lines.0.len()), None);
    }
}
