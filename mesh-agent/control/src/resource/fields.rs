//! Reads documents that follow protobuf's JSON conventions, as Istio's kinds do: field by field, with every problem located.
//!
//! Names of fields are accepted in camelCase and in snake_case; `null` is a field that is not there; what no reader asked for
//! is warned about, as an API server would prune it. A value of the wrong type is a problem of its own and hides no other.
//!
//! Not here: what fields of one kind mean, and forms that several kinds share ([`super::parts`]).

use std::{borrow::Cow, ops::RangeInclusive, sync::Arc, time::Duration};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Map, Value};

use crate::problem::Problems;

/// A value and where it is.
#[derive(Clone, Debug)]
pub(crate) struct Node<'a> {
    /// Path of the field, e.g. `spec.http[0].match[1]`.
    pub(crate) path: String,
    /// What is there.
    pub(crate) value: &'a Value,
}

impl<'a> Node<'a> {
    /// A whole document.
    pub(crate) fn root(value: &'a Value) -> Self {
        Self { path: String::new(), value }
    }

    /// Path of a field of this value.
    pub(crate) fn at(&self, field: &str) -> String {
        join(&self.path, field)
    }

    /// Its fields. `None`, and a problem noted, when it has none because it is something else.
    pub(crate) fn object(&self, problems: &mut Problems) -> Option<Object<'a>> {
        match self.value {
            Value::Object(map) => Some(Object { path: self.path.clone(), map: Some(map), known: Vec::new() }),
            _ => self.wrong("an object", problems),
        }
    }

    /// Its text, which may be empty.
    pub(crate) fn text(&self, problems: &mut Problems) -> Option<&'a str> {
        match self.value {
            Value::String(text) => Some(text),
            _ => self.wrong("text", problems),
        }
    }

    /// Its truth value.
    pub(crate) fn bool(&self, problems: &mut Problems) -> Option<bool> {
        match self.value {
            Value::Bool(value) => Some(*value),
            _ => self.wrong("true or false", problems),
        }
    }

    /// Its whole number, within `range`.
    pub(crate) fn number(&self, range: RangeInclusive<i64>, problems: &mut Problems) -> Option<i64> {
        let number = self.value.as_i64().or_else(|| self.value.as_f64().and_then(whole));
        match number {
            Some(number) if range.contains(&number) => Some(number),
            _ => {
                let (low, high) = range.into_inner();
                let wanted = if high == i64::MAX {
                    format!("a whole number of at least {low}")
                } else {
                    format!("a whole number from {low} to {high}")
                };
                match self.value {
                    Value::Number(found) => {
                        problems.error(self.path.as_str(), format!("is {found}, wanted {wanted}"));
                        None
                    }
                    _ => self.wrong(&wanted, problems),
                }
            }
        }
    }

    /// Its number, within `range`.
    pub(crate) fn float(&self, range: RangeInclusive<f64>, problems: &mut Problems) -> Option<f64> {
        let wanted = || format!("a number from {} to {}", range.start(), range.end());
        match self.value.as_f64() {
            Some(number) if range.contains(&number) => Some(number),
            Some(number) => {
                problems.error(self.path.as_str(), format!("is {number}, wanted {}", wanted()));
                None
            }
            None => self.wrong(&wanted(), problems),
        }
    }

    /// Its duration, written as in `1h30m`, `0.5s` or `10ms`; negative ones are refused.
    pub(crate) fn duration(&self, problems: &mut Problems) -> Option<Duration> {
        const WANTED: &str = "a duration such as 10s, 0.5s, 100ms or 1h";
        let Value::String(text) = self.value else { return self.wrong(WANTED, problems) };
        let read = duration(text);
        if read.is_none() {
            problems.error(self.path.as_str(), format!("is {text:?}, wanted {WANTED}"));
        }
        read
    }

    /// Its items; `null` items are kept.
    pub(crate) fn items(&self, problems: &mut Problems) -> Vec<Self> {
        let Value::Array(items) = self.value else {
            return self.wrong("a list", problems).unwrap_or_default();
        };
        let item = |(at, value)| Node { path: format!("{}[{at}]", self.path), value };
        items.iter().enumerate().map(item).collect()
    }

    /// Its entries by key; `null` values are kept.
    pub(crate) fn entries(&self, problems: &mut Problems) -> Vec<(&'a str, Self)> {
        let Value::Object(map) = self.value else {
            return self.wrong("an object", problems).unwrap_or_default();
        };
        map.iter().map(|(key, value)| (key.as_str(), Node { path: self.at(key), value })).collect()
    }

    /// Notes that this is something else than what is wanted.
    pub(crate) fn wrong<T>(&self, wanted: &str, problems: &mut Problems) -> Option<T> {
        let found = match self.value {
            Value::Null => Cow::Borrowed("empty"),
            Value::Bool(value) => Cow::Owned(value.to_string()),
            Value::Number(number) => Cow::Owned(number.to_string()),
            Value::String(text) => Cow::Owned(format!("{text:?}")),
            Value::Array(_) => Cow::Borrowed("a list"),
            Value::Object(_) => Cow::Borrowed("an object"),
        };
        problems.error(self.path.as_str(), format!("is {found}, wanted {wanted}"));
        None
    }
}

/// An object whose fields are asked for by name. What was asked for is known; [`Object::finish`] warns about the rest.
#[derive(Clone, Debug)]
pub(crate) struct Object<'a> {
    /// Path of the object.
    pub(crate) path: String,
    map: Option<&'a Map<String, Value>>,
    known: Vec<&'static str>,
}

impl<'a> Object<'a> {
    /// Path of one of its fields.
    pub(crate) fn at(&self, field: &str) -> String {
        join(&self.path, field)
    }

    /// Whether a field (in camelCase) is there; it counts as known from here on.
    pub(crate) fn has(&mut self, name: &'static str) -> bool {
        self.get(name).is_some()
    }

    /// A field by its name in camelCase, unless it is `null`. The path is as it is written.
    pub(crate) fn get(&mut self, name: &'static str) -> Option<Node<'a>> {
        self.known.push(name);
        #[cfg(test)]
        asked::note(&self.at(name));
        let map = self.map?;
        let found = match map.get_key_value(name) {
            Some(found) => Some(found),
            None => map.get_key_value(&snake(name)),
        };
        let (key, value) = found.filter(|(_, value)| !value.is_null())?;
        Some(Node { path: self.at(key), value })
    }

    /// An object.
    pub(crate) fn object(&mut self, name: &'static str, problems: &mut Problems) -> Option<Self> {
        self.get(name)?.object(problems)
    }

    /// A text that is not empty; an empty one is as good as none.
    pub(crate) fn text(&mut self, name: &'static str, problems: &mut Problems) -> Option<&'a str> {
        self.get(name)?.text(problems).filter(|text| !text.is_empty())
    }

    /// A text that is not empty, shared.
    pub(crate) fn shared(&mut self, name: &'static str, problems: &mut Problems) -> Option<Arc<str>> {
        self.text(name, problems).map(Arc::from)
    }

    /// A truth value.
    pub(crate) fn bool(&mut self, name: &'static str, problems: &mut Problems) -> Option<bool> {
        self.get(name)?.bool(problems)
    }

    /// A whole number within `range`.
    pub(crate) fn number(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
        problems: &mut Problems,
    ) -> Option<i64> {
        self.get(name)?.number(range, problems)
    }

    /// A whole number from 0 to 2³²-1.
    pub(crate) fn count(&mut self, name: &'static str, problems: &mut Problems) -> Option<u32> {
        self.number(name, 0..=i64::from(u32::MAX), problems).and_then(|number| u32::try_from(number).ok())
    }

    /// A port number.
    pub(crate) fn port(&mut self, name: &'static str, problems: &mut Problems) -> Option<u16> {
        self.number(name, 1..=65535, problems).and_then(|number| u16::try_from(number).ok())
    }

    /// A number within `range`.
    pub(crate) fn float(
        &mut self,
        name: &'static str,
        range: RangeInclusive<f64>,
        problems: &mut Problems,
    ) -> Option<f64> {
        self.get(name)?.float(range, problems)
    }

    /// A duration, zero included.
    pub(crate) fn duration(&mut self, name: &'static str, problems: &mut Problems) -> Option<Duration> {
        self.get(name)?.duration(problems)
    }

    /// A duration of at least `least`.
    pub(crate) fn duration_of(
        &mut self,
        name: &'static str,
        least: Duration,
        problems: &mut Problems,
    ) -> Option<Duration> {
        let node = self.get(name)?;
        let read = node.duration(problems)?;
        if read < least {
            let found = node.value.as_str().unwrap_or_default();
            problems.error(node.path, format!("is {found:?}, wanted at least {least:?}"));
            return None;
        }
        Some(read)
    }

    /// The items of a list; none when it is not there.
    pub(crate) fn list(&mut self, name: &'static str, problems: &mut Problems) -> Vec<Node<'a>> {
        self.get(name).map(|node| node.items(problems)).unwrap_or_default()
    }

    /// The items of a list of objects.
    pub(crate) fn objects(&mut self, name: &'static str, problems: &mut Problems) -> Vec<Self> {
        self.list(name, problems).iter().filter_map(|node| node.object(problems)).collect()
    }

    /// The items of a list of texts with their paths; empty ones are problems.
    pub(crate) fn texts(&mut self, name: &'static str, problems: &mut Problems) -> Vec<(String, &'a str)> {
        let mut texts = Vec::new();
        for node in self.list(name, problems) {
            match node.text(problems) {
                Some("") => problems.error(node.path, "is empty, wanted text"),
                Some(text) => texts.push((node.path, text)),
                None => {}
            }
        }
        texts
    }

    /// The entries of a map; none when it is not there.
    pub(crate) fn entries(
        &mut self,
        name: &'static str,
        problems: &mut Problems,
    ) -> Vec<(&'a str, Node<'a>)> {
        self.get(name).map(|node| node.entries(problems)).unwrap_or_default()
    }

    /// One of several words, each with what it means.
    pub(crate) fn word<T: Copy>(
        &mut self,
        name: &'static str,
        words: &[(&str, T)],
        problems: &mut Problems,
    ) -> Option<T> {
        let node = self.get(name)?;
        let found = node.text(problems)?;
        let meant = words.iter().find(|(word, _)| *word == found);
        if meant.is_none() {
            let wanted: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            problems.error(node.path, format!("is {found:?}, wanted {}", any_of(&wanted)));
        }
        meant.map(|(_, meaning)| *meaning)
    }

    /// Checks that of fields that exclude each other at most one is there, and returns which.
    pub(crate) fn one_of(&mut self, names: &[&'static str], problems: &mut Problems) -> Option<&'static str> {
        let given: Vec<&'static str> = names.iter().copied().filter(|name| self.has(name)).collect();
        if let [first, others @ ..] = given.as_slice() {
            for other in others {
                let message = format!("is there beside {first}, wanted at most one of {}", names.join(", "));
                problems.error(self.at(other), message);
            }
        }
        given.first().copied()
    }

    /// Notes that fields have no effect, and why.
    pub(crate) fn no_effect(&mut self, names: &[&'static str], why: &str, problems: &mut Problems) {
        for name in names {
            if let Some(node) = self.get(name) {
                problems.warning(node.path, why);
            }
        }
    }

    /// Warns of fields that nobody asked for, and refuses one that is written twice.
    pub(crate) fn finish(self, problems: &mut Problems) {
        for (key, value) in self.map.into_iter().flatten() {
            let known = self.known.iter().find(|name| **name == key || snake(name) == *key);
            match known {
                None if is_nothing(value) => {}
                None => problems.warning(self.at(key), "is not a field of this kind; it has no effect"),
                Some(name) if *name != key && self.map.is_some_and(|map| map.contains_key(*name)) => {
                    problems.error(self.at(key), format!("is there beside {name}, which is the same field"));
                }
                Some(_) => {}
            }
        }
    }
}

/// Reads the metadata of a document, and its `spec`, empty if it is not there.
pub(crate) fn document<'a>(value: &'a Value, problems: &mut Problems) -> (ObjectMeta, Object<'a>) {
    let root = Node::root(value);
    let meta = value.get("metadata").unwrap_or(&Value::Null);
    let meta = if meta.is_null() { ObjectMeta::default() } else { metadata(meta, problems) };
    let spec = match value.get("spec") {
        None | Some(Value::Null) => None,
        Some(spec) => Node { path: root.at("spec"), value: spec }.object(problems),
    };
    if let Some(fields) = value.as_object() {
        let known = ["apiVersion", "kind", "metadata", "spec", "status"];
        for (key, value) in fields.iter().filter(|(key, _)| !known.contains(&key.as_str())) {
            if !is_nothing(value) {
                problems.warning(key.as_str(), "is not a field of this kind; it has no effect");
            }
        }
    }
    let none = Object { path: "spec".to_owned(), map: None, known: Vec::new() };
    (meta, spec.unwrap_or(none))
}

fn metadata(value: &Value, problems: &mut Problems) -> ObjectMeta {
    match serde_path_to_error::deserialize(value) {
        Ok(meta) => meta,
        Err(error) => {
            let inner = error.path().to_string();
            let field = join("metadata", if inner == "." { "" } else { &inner });
            problems.error(field, error.into_inner().to_string());
            ObjectMeta::default()
        }
    }
}

/// Path of a field of something.
pub(crate) fn join(path: &str, field: &str) -> String {
    match (path, field) {
        ("", one) | (one, "") => one.to_owned(),
        (path, field) => format!("{path}.{field}"),
    }
}

/// Words with commas, and `or` before the last.
pub(crate) fn any_of(words: &[&str]) -> String {
    match words {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [init @ .., last] => format!("{} or {last}", init.join(", ")),
    }
}

/// Parses a duration as Go writes it: numbers with units, without sign; `None` for anything else, and beyond 292 years.
pub(crate) fn duration(text: &str) -> Option<Duration> {
    /// Go counts nanoseconds in an i64.
    const MAX_NANOS: f64 = 9.223_372_036e18;
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut nanos = 0_u128;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.'))?;
        let (number, tail) = rest.split_at(end);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let unit: u64 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60 * 1_000_000_000,
            "h" => 3600 * 1_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') || whole.len() > 19 {
            return None;
        }
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
        nanos += u128::from(whole) * u128::from(unit);
        // Digits beyond a nanosecond of an hour say nothing.
        let (mut scale, mut parts) = (u128::from(unit), 0_u128);
        let mut divisor = 1_u128;
        for digit in fraction.bytes().take(15) {
            divisor *= 10;
            parts = parts * 10 + u128::from(digit - b'0');
        }
        scale *= parts;
        nanos += scale / divisor;
        rest = tail;
    }
    #[expect(clippy::cast_precision_loss, reason = "compared with a limit only")]
    let fits = (nanos as f64) < MAX_NANOS;
    fits.then(|| u64::try_from(nanos).ok().map(Duration::from_nanos)).flatten()
}

/// A number with an integer value, such as `1e3` or `2.0`.
fn whole(number: f64) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "within the range that is exact")]
    let cast = number as i64;
    (number.fract() == 0.0 && number.abs() < 9e15).then_some(cast)
}

/// `httpRoute` as `http_route`.
fn snake(camel: &str) -> String {
    let mut snake = String::with_capacity(camel.len() + 4);
    for c in camel.chars() {
        if c.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(c.to_ascii_lowercase());
    }
    snake
}

/// Whether a value says no more than its absence would.
pub(crate) fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

/// Which fields readers ask for, so that tests can hold definitions against them.
#[cfg(test)]
pub(crate) mod asked {
    use std::{cell::RefCell, collections::BTreeSet};

    thread_local! {
        static ASKED: RefCell<Option<BTreeSet<String>>> = const { RefCell::new(None) };
    }

    /// The paths that are asked for while `read` runs, on this thread.
    pub(crate) fn during(read: impl FnOnce()) -> BTreeSet<String> {
        ASKED.set(Some(BTreeSet::new()));
        read();
        ASKED.take().unwrap_or_default()
    }

    pub(super) fn note(path: &str) {
        ASKED.with_borrow_mut(|asked| asked.as_mut().map(|asked| asked.insert(path.to_owned())));
    }
}
