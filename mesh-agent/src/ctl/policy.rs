//! Owns `meshctl policy test`: what policies in manifests say about a connection, without an agent.
//!
//! Invariants:
//! - The answer comes from the parser and compiler of `mesh-control` and from `mesh_core::policy::admit`, as in an agent.
//! - Exit status 0 allowed, 1 denied, 2 wrong usage or manifests that cannot be used; a matrix is 0.
//! - With `-o json`, standard output holds one JSON document and nothing else.

mod args;
mod matrix;
mod question;
mod view;

use std::{io::ErrorKind, process::ExitCode};

use mesh_control::{
    compile::MeshSettings,
    offline::{self, LoadError, Loaded},
};

pub use self::args::{PolicyArgs, PolicyCommand, PolicyTestArgs};
use self::question::QuestionError;
use super::{CtlError, Output, print};
use crate::report::report;

/// Exit status of a refused connection.
const DENIED: u8 = 1;
/// Exit status when there is no answer.
const NO_ANSWER: u8 = 2;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum PolicyError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("{count} errors in the manifests, so the answer would be about something else")]
    Invalid { count: usize },
    #[error(transparent)]
    Question(#[from] QuestionError),
    #[error(transparent)]
    Print(#[from] CtlError),
}

/// Answers; errors go to standard error.
pub(super) fn run(args: &PolicyArgs, out: Output) -> ExitCode {
    let PolicyCommand::Test(test) = &args.command;
    match answer(test, out) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(DENIED),
        // Whoever reads our output has seen enough.
        Err(PolicyError::Print(CtlError::Print { source })) if source.kind() == ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("meshctl: {}", report(&error));
            ExitCode::from(NO_ANSWER)
        }
    }
}

/// Whether the connection is allowed.
fn answer(args: &PolicyTestArgs, out: Output) -> Result<bool, PolicyError> {
    let settings = MeshSettings {
        root_namespace: args.root_namespace.clone(),
        trust_domain: args.trust_domain.clone(),
        ..MeshSettings::default()
    };
    let loaded = offline::load(&args.files, settings)?;
    if !loaded.errors.is_empty() {
        for error in &loaded.errors {
            eprintln!("{error}");
        }
        return Err(PolicyError::Invalid { count: loaded.errors.len() });
    }
    if out.is_text() {
        for warning in policy_warnings(&loaded) {
            eprintln!("warning: {warning}");
        }
    }
    if args.matrix {
        let view = matrix::matrix(&loaded, args)?;
        print(out, &view, matrix::render)?;
        return Ok(true);
    }
    let view = question::ask(&loaded, args)?;
    print(out, &view, view::render)?;
    Ok(view.policy.verdict == "allow")
}

/// Warnings about what policies are made of; of services and their like there is nothing to say here.
fn policy_warnings(loaded: &Loaded) -> Vec<String> {
    const KINDS: [&str; 3] = ["AuthorizationPolicy", "PeerAuthentication", "ConfigMap"];
    let about_policy = |kind: &Option<String>| kind.as_deref().is_some_and(|kind| KINDS.contains(&kind));
    loaded.warnings.iter().filter(|w| about_policy(&w.kind)).map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests;
