//! What is wrong with a document, and where: shown to the user by `meshctl status` and `meshctl validate`.

use std::{fmt, path::PathBuf};

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The document is not used; the last good state of its file is.
    Error,
    /// The document is used, and probably does not do what its author meant.
    Warning,
}

/// A problem within one document.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    /// How bad.
    pub level: Level,
    /// Path of the field, e.g. `spec.ports[0].port`; empty when the document as a whole is meant.
    pub field: String,
    /// What was found and what is wanted.
    pub message: String,
}

/// A problem with its place in the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct SourceError {
    /// File.
    pub file: PathBuf,
    /// Which document of the file, counted from 1 over documents with content; `None` for the file as a whole.
    pub document: Option<usize>,
    /// `kind`, if known.
    pub kind: Option<String>,
    /// `metadata.namespace`, if the kind has one.
    pub namespace: Option<String>,
    /// `metadata.name`, if known.
    pub name: Option<String>,
    /// How bad.
    pub level: Level,
    /// Path of the field; empty when the document or file as a whole is meant.
    pub field: String,
    /// What was found and what is wanted.
    pub message: String,
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(document) = self.document {
            write!(f, ", document {document}")?;
        }
        if let Some(kind) = &self.kind {
            write!(f, ", {kind}")?;
        }
        match (&self.namespace, &self.name) {
            (Some(namespace), Some(name)) => write!(f, " {namespace}/{name}")?,
            (None, Some(name)) => write!(f, " {name}")?,
            (_, None) => {}
        }
        if !self.field.is_empty() {
            write!(f, ", {}", self.field)?;
        }
        write!(f, ": {}", self.message)
    }
}

/// A problem in the words of a message of its own: its field, unless the whole is meant, and what is wrong.
pub(crate) fn said(field: &str, message: &str) -> String {
    if field.is_empty() { message.to_owned() } else { format!("{field}: {message}") }
}

/// As many problems in one text as fit into so many bytes, and how many more there are.
pub(crate) fn joined(problems: &[String], bytes_max: usize) -> String {
    let mut text = String::new();
    for (index, one) in problems.iter().enumerate() {
        if index > 0 && text.len() + one.len() > bytes_max {
            text.push_str(&format!("; and {} more", problems.len() - index));
            break;
        }
        if index > 0 {
            text.push_str("; ");
        }
        let room = bytes_max.saturating_sub(text.len());
        text.push_str(one.get(..one.floor_char_boundary(room)).unwrap_or_default());
    }
    text
}

/// Collects the problems of one document while it is read.
#[derive(Debug, Default)]
pub struct Problems {
    found: Vec<Problem>,
}

impl Problems {
    /// Adds an error.
    pub fn error(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.found.push(Problem { level: Level::Error, field: field.into(), message: message.into() });
    }

    /// Adds a warning.
    pub fn warning(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.found.push(Problem { level: Level::Warning, field: field.into(), message: message.into() });
    }

    /// Whether an error is among them.
    pub fn has_errors(&self) -> bool {
        self.found.iter().any(|p| p.level == Level::Error)
    }

    /// All of them, in the order found.
    pub fn into_vec(self) -> Vec<Problem> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reads_from_the_file_down_to_the_reason() {
        let mut error = SourceError {
            file: "mesh/web.yaml".into(),
            document: Some(2),
            kind: Some("Service".into()),
            namespace: Some("default".into()),
            name: Some("web".into()),
            level: Level::Error,
            field: "spec.ports[0].port".into(),
            message: "is 0, wanted a number from 1 to 65535".into(),
        };
        assert_eq!(
            error.to_string(),
            "mesh/web.yaml, document 2, Service default/web, spec.ports[0].port: is 0, wanted a number from 1 to 65535"
        );
        (error.document, error.kind, error.namespace, error.name) = (None, None, None, None);
        error.field = String::new();
        error.message = "cannot be read".into();
        assert_eq!(error.to_string(), "mesh/web.yaml: cannot be read");
    }
    #[test]
    fn many_problems_are_told_in_bounded_length_with_how_many_are_left_out() {
        let many: Vec<String> =
            (0..100).map(|i| said("spec.x", &format!("{i}: {}", "é".repeat(100)))).collect();
        let text = joined(&many, 1000);
        assert!(text.starts_with("spec.x: 0: é") && text.ends_with("; and 96 more"), "{text}");
        assert!(text.len() <= 1030, "{}", text.len());
        assert!(joined(&[said("", &"é".repeat(5000))], 1001).len() <= 1001);
    }
}
