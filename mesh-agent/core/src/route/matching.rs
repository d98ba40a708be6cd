//! Patterns of routes and what a request must look like to be matched by them.

use std::{collections::BTreeMap, sync::Arc};

use regex::Regex;

/// A compiled RE2-like pattern that matches whole texts.
#[derive(Clone, Debug)]
pub struct FullRegex {
    pattern: Arc<str>,
    compiled: Regex,
}

/// Size limit of a compiled pattern: some 1 MiB, far above what a sensible route needs.
const COMPILED_MAX: usize = 1 << 20;

impl FullRegex {
    /// Compiles a pattern; it is anchored at both ends.
    ///
    /// # Errors
    /// When it is no regular expression of RE2's syntax, or is too large once compiled.
    pub fn new(pattern: &str) -> Result<Self, regex::Error> {
        // As written first: `a)(b` must not become valid by being put into a group.
        regex::RegexBuilder::new(pattern).size_limit(COMPILED_MAX).build()?;
        let compiled =
            regex::RegexBuilder::new(&format!("^(?:{pattern})$")).size_limit(COMPILED_MAX).build()?;
        Ok(Self { pattern: pattern.into(), compiled })
    }

    /// As it was written.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Whether the whole text matches.
    pub fn is_match(&self, text: &str) -> bool {
        self.compiled.is_match(text)
    }
}

impl PartialEq for FullRegex {
    fn eq(&self, other: &Self) -> bool {
        self.pattern == other.pattern
    }
}

impl Eq for FullRegex {}

impl std::hash::Hash for FullRegex {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.pattern.hash(state);
    }
}

impl serde::Serialize for FullRegex {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.pattern)
    }
}

impl<'de> serde::Deserialize<'de> for FullRegex {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pattern = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Self::new(&pattern).map_err(serde::de::Error::custom)
    }
}

/// A pattern for a text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StringMatch {
    /// There at all, whatever it is.
    Present,
    /// The very text.
    Exact(Arc<str>),
    /// Begins with it.
    Prefix(Arc<str>),
    /// The whole text matches.
    Regex(FullRegex),
}

/// A pattern for the path of a request, without its query.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// The very path.
    Exact {
        /// The path.
        path: Arc<str>,
        /// Letters of either case match.
        ignore_case: bool,
    },
    /// Begins with these characters: `/foo` matches `/foobar` (VirtualService, S13).
    Prefix {
        /// The first characters.
        prefix: Arc<str>,
        /// Letters of either case match.
        ignore_case: bool,
    },
    /// Begins with these segments: `/foo` matches `/foo` and `/foo/bar`, not `/foobar` (Gateway API, S118). Without trailing slash, `/` is "".
    Segments(Arc<str>),
    /// The whole path matches.
    Regex(FullRegex),
}

/// One condition on a header; names are lower case.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HeaderMatch {
    /// Name, lower case.
    pub name: Arc<str>,
    /// What its value must be. Several headers of the name are one value, joined by `,`.
    pub value: StringMatch,
    /// From `withoutHeaders`: must *not* match; a missing header then counts as an empty one, unless only presence is asked (S14).
    pub inverted: bool,
}

/// One condition on a query parameter; its first occurrence counts.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct QueryMatch {
    /// Name, as it stands in the query.
    pub name: Arc<str>,
    /// What its value must be.
    pub value: StringMatch,
}

/// All conditions hold; one without any holds for every request.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HttpMatch {
    /// Name of the match, for the route's name in logs.
    pub name: Option<Arc<str>>,
    /// The path.
    pub path: Option<PathMatch>,
    /// The method.
    pub method: Option<StringMatch>,
    /// `http` or `https`, as the client used it.
    pub scheme: Option<StringMatch>,
    /// The authority, as the client sent it.
    pub authority: Option<StringMatch>,
    /// Headers.
    pub headers: Vec<HeaderMatch>,
    /// Query parameters.
    pub query: Vec<QueryMatch>,
    /// Labels that the client's pod must have.
    pub source_labels: BTreeMap<Arc<str>, Arc<str>>,
    /// Namespace that the client's pod must be in.
    pub source_namespace: Option<Arc<str>>,
}
