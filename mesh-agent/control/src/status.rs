//! What a source shows of itself: `meshctl status` prints it as it is.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{
    problem::{Level, SourceError},
    resource::Kind,
};

/// Problems listed of each level; the rest is only counted.
pub const PROBLEMS_MAX: usize = 500;

/// State of a source after its last change.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceStatus {
    /// Where resources come from: the directory.
    pub source: PathBuf,
    /// Version of the snapshot published last.
    pub version: u64,
    /// Manifest files found.
    pub files: usize,
    /// Resources in use.
    pub resources: usize,
    /// The same by kind.
    pub by_kind: BTreeMap<Kind, usize>,
    /// Kinds found that the mesh does not read, as `apiVersion/kind`, with how many there are.
    pub ignored: BTreeMap<String, usize>,
    /// Files with errors. In use is their last good state or, of a file that never had one, its good documents.
    pub files_kept_back: Vec<PathBuf>,
    /// What is wrong, by file and document.
    pub errors: Vec<SourceError>,
    /// What is probably not meant, by file and document.
    pub warnings: Vec<SourceError>,
    /// Errors and warnings beyond [`PROBLEMS_MAX`].
    pub problems_omitted: usize,
}

impl SourceStatus {
    /// Sorts problems into errors and warnings, at most [`PROBLEMS_MAX`] of each.
    pub(crate) fn set_problems(&mut self, mut problems: Vec<SourceError>) {
        let place = |p: &SourceError| (p.file.clone(), p.document);
        problems.sort_by(|a, b| place(a).cmp(&place(b)).then_with(|| a.cmp(b)));
        problems.dedup();
        let (mut errors, mut warnings): (Vec<_>, Vec<_>) =
            problems.into_iter().partition(|p| p.level == Level::Error);
        self.problems_omitted =
            errors.len().saturating_sub(PROBLEMS_MAX) + warnings.len().saturating_sub(PROBLEMS_MAX);
        errors.truncate(PROBLEMS_MAX);
        warnings.truncate(PROBLEMS_MAX);
        (self.errors, self.warnings) = (errors, warnings);
    }

    /// Writes to the log what is new since `before`, and what is gone.
    pub(crate) fn log_since(&self, before: &Self) {
        let problems =
            |status: &Self| status.errors.iter().chain(&status.warnings).cloned().collect::<Vec<_>>();
        let (old, new) = (problems(before), problems(self));
        for problem in new.iter().filter(|p| !old.contains(p)) {
            match problem.level {
                Level::Error => tracing::error!("{problem}"),
                Level::Warning => tracing::warn!("{problem}"),
            }
        }
        let gone = old.iter().filter(|p| !new.contains(p)).count();
        if gone > 0 {
            tracing::info!(gone, left = new.len(), "problems of the configuration are gone");
        }
    }
}

/// A problem of a file as a whole.
pub(crate) fn of_file(file: &Path, level: Level, message: String) -> SourceError {
    SourceError {
        file: file.to_owned(),
        document: None,
        kind: None,
        namespace: None,
        name: None,
        level,
        field: String::new(),
        message,
    }
}
