//! Owns `meshctl validate` and `meshctl analyze`: what is wrong with manifests, or with what is in a cluster, without an agent.
//!
//! Invariants:
//! - The answers come from the parser, index and compiler of `mesh-control`, as in an agent.
//! - Standard output holds the rows and nothing else: a table, or with `-o json` one list of objects with the fields file, document, kind,
//!   namespace, name, level, field, message. How much was looked at goes to standard error.
//! - Exit status 0 no errors, 1 errors, 2 wrong usage or something that cannot be read.

use std::{collections::BTreeMap, fmt::Write as _, io::ErrorKind, path::PathBuf, process::ExitCode};

use mesh_control::{
    analyze as between,
    compile::MeshSettings,
    offline::{self, LoadError},
    problem::{Level, SourceError},
    source::document::Rules,
};

use super::{
    CtlError, Output,
    cluster::{ClusterArgs, ClusterError},
    live, print,
    table::{Align, Table},
};
use crate::report::report;

/// Exit status when something is wrong.
const WRONG: u8 = 1;
/// Exit status when there is no answer.
const NO_ANSWER: u8 = 2;
/// Kinds that are not read by the mesh are named up to so many.
const IGNORED_MAX: usize = 8;

/// Options of `validate`.
#[derive(Clone, Debug, clap::Args)]
pub struct ValidateArgs {
    /// Manifests: files, or folders with all below them; `-` is standard input.
    #[arg(value_name = "FILE|DIR", required_unless_present = "live")]
    pub files: Vec<PathBuf>,
    /// What is in the cluster instead.
    #[arg(long, conflicts_with = "files")]
    pub live: bool,
    /// Namespace of mesh-wide policies and, of files, of the MeshConfig; a cluster's is where its mesh is installed.
    #[arg(long, value_name = "NAME", default_value = "istio-system")]
    pub root_namespace: String,
}

/// Options of `analyze`.
#[derive(Clone, Debug, clap::Args)]
pub struct AnalyzeArgs {
    /// Manifests: files, or folders with all below them; `-` is standard input.
    #[arg(value_name = "FILE|DIR", required_unless_present = "live")]
    pub files: Vec<PathBuf>,
    /// What is in the cluster instead.
    #[arg(long, conflicts_with = "files")]
    pub live: bool,
    /// Namespace of mesh-wide policies and, of files, of the MeshConfig; a cluster's is where its mesh is installed.
    #[arg(long, value_name = "NAME", default_value = "istio-system")]
    pub root_namespace: String,
    /// DNS suffix of services.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub cluster_domain: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum ValidateError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    #[error(transparent)]
    Print(#[from] CtlError),
}

/// What was found, and in how much.
#[derive(Debug)]
struct Answer {
    rows: Vec<SourceError>,
    files: usize,
    resources: usize,
    ignored: BTreeMap<String, usize>,
}

/// Answers `validate`; errors go to standard error.
pub(super) fn validate(args: &ValidateArgs, of: &ClusterArgs, out: Output) -> ExitCode {
    finish(validated(args, of).and_then(|answer| show(&answer, out)))
}

/// Answers `analyze`; errors go to standard error.
pub(super) fn analyze(args: &AnalyzeArgs, of: &ClusterArgs, out: Output) -> ExitCode {
    finish(analyzed(args, of).and_then(|answer| show(&answer, out)))
}

fn finish(answered: Result<bool, ValidateError>) -> ExitCode {
    match answered {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(WRONG),
        // Whoever reads our output has seen enough.
        Err(ValidateError::Print(CtlError::Print { source })) if source.kind() == ErrorKind::BrokenPipe => {
            ExitCode::from(WRONG)
        }
        Err(error) => {
            eprintln!("meshctl: {}", report(&error));
            ExitCode::from(NO_ANSWER)
        }
    }
}

/// As the controller of a cluster reads what is there.
fn rules_of(of: &ClusterArgs, root_namespace: &str) -> Rules {
    Rules { root_namespace: root_namespace.to_owned(), mesh_config: live::mesh_config(of) }
}

fn validated(args: &ValidateArgs, of: &ClusterArgs) -> Result<Answer, ValidateError> {
    let found = match args.live {
        true => offline::validate_texts(live::texts(of)?, &rules_of(of, &args.root_namespace)),
        false => offline::validate(&args.files, &args.root_namespace)?,
    };
    Ok(Answer {
        rows: found.problems,
        files: found.files,
        resources: found.resources,
        ignored: found.ignored,
    })
}

fn analyzed(args: &AnalyzeArgs, of: &ClusterArgs) -> Result<Answer, ValidateError> {
    let settings = MeshSettings {
        root_namespace: args.root_namespace.clone(),
        cluster_domain: args.cluster_domain.clone(),
        ..MeshSettings::default()
    };
    let loaded = match args.live {
        true => {
            let rules = rules_of(of, &args.root_namespace);
            offline::load_texts(live::texts(of)?, settings.clone(), &rules)
        }
        false => offline::load(&args.files, settings.clone())?,
    };
    let found = between::analyze(loaded.index(), &settings, &|kind, name| loaded.has_unread(kind, name));
    let resources = loaded.index().len();
    let mut rows = [loaded.errors, loaded.warnings, found].concat();
    rows.sort();
    rows.dedup();
    Ok(Answer { rows, files: loaded.files, resources, ignored: loaded.ignored })
}

/// Prints an answer; whether no error is in it.
fn show(answer: &Answer, out: Output) -> Result<bool, ValidateError> {
    print(out, &answer.rows, |rows| render(rows))?;
    eprintln!("{}", summary(answer));
    Ok(count(&answer.rows, Level::Error) == 0)
}

fn count(rows: &[SourceError], level: Level) -> usize {
    rows.iter().filter(|row| row.level == level).count()
}

fn render(rows: &[SourceError]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let columns = ["FILE", "DOCUMENT", "KIND", "NAMESPACE", "NAME", "LEVEL", "FIELD", "MESSAGE"];
    let columns = columns.map(|name| (name, if name == "DOCUMENT" { Align::Right } else { Align::Left }));
    let mut table = Table::new(&columns);
    for row in rows {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let level = match row.level {
            Level::Error => "error",
            Level::Warning => "warning",
        };
        table.row([
            row.file.display().to_string(),
            row.document.map(|document| document.to_string()).unwrap_or_default(),
            text(&row.kind),
            text(&row.namespace),
            text(&row.name),
            level.to_owned(),
            row.field.clone(),
            row.message.clone(),
        ]);
    }
    table.render()
}

fn summary(answer: &Answer) -> String {
    let number = |count: usize, one: &str| format!("{count} {one}{}", if count == 1 { "" } else { "s" });
    let mut text = format!(
        "{}, {}: {}, {}",
        number(answer.files, "file"),
        number(answer.resources, "resource"),
        number(count(&answer.rows, Level::Error), "error"),
        number(count(&answer.rows, Level::Warning), "warning"),
    );
    let ignored: usize = answer.ignored.values().sum();
    if ignored > 0 {
        let mut named: Vec<String> =
            answer.ignored.iter().take(IGNORED_MAX).map(|(kind, count)| format!("{kind} {count}")).collect();
        if answer.ignored.len() > IGNORED_MAX {
            named.push("…".to_owned());
        }
        // Writing to a String cannot fail.
        let _ignored = write!(text, "; not read by the mesh: {ignored} ({})", named.join(", "));
    }
    text
}

#[cfg(test)]
mod tests;
