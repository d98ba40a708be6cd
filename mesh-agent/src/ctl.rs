//! Owns `meshctl`: asks a running agent over its admin socket and prints the answer.
//!
//! Invariants:
//! - Exit status 0 when the question was answered, 1 when it could not be, 2 for wrong usage; `policy test`, `validate` and
//!   `analyze` have their own: 1 is "denied" or "something is wrong", 2 also that there is no answer.
//! - With `-o json` or `-o yaml`, standard output holds one document (one each for every reading of a live `top`) and nothing else.
//!
//! Not here: any decision; every answer comes from the agent or, for questions about manifests, from what an agent is made of.

mod certificates;
mod cli;
mod client;
mod connections;
mod explain;
mod figures;
mod policy;
mod profile;
mod proxy_config;
mod status;
mod table;
mod top;
mod validate;

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

pub use cli::{Args, Command, DEFAULT_ADMIN_SOCKET, ExplainArgs, Output, ProfileArgs, TopArgs};
use client::{AskError, Client};
pub use policy::{PolicyArgs, PolicyCommand, PolicyTestArgs};
pub use proxy_config::{
    ClustersArgs, EndpointsArgs, ListenersArgs, ProxyConfigCommand, RoutesArgs, SeenArgs,
};
pub use validate::{AnalyzeArgs, ValidateArgs};

use crate::{
    report::report,
    view::{CertificatesView, ConnectionsView, ExplainView, ProfileView, StatusView, paths},
};

/// Longest wait for an answer that the agent gives at once.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Why `meshctl` ended with status 1.
#[derive(Debug, thiserror::Error)]
enum CtlError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error("write the answer")]
    Print {
        #[source]
        source: io::Error,
    },
    #[error("encode the answer as JSON")]
    Encode {
        #[source]
        source: serde_json::Error,
    },
    #[error("encode the answer as YAML")]
    EncodeYaml {
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Runs one command; errors go to standard error.
pub fn run(args: &Args) -> ExitCode {
    match answer(args) {
        Ok(status) => status,
        // Whoever reads our output has seen enough (`meshctl top | head`).
        Err(CtlError::Print { source }) if source.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meshctl: {}", report(&error));
            ExitCode::FAILURE
        }
    }
}

fn answer(args: &Args) -> Result<ExitCode, CtlError> {
    let client = Client::new(&args.admin_socket);
    let out = args.output;
    let answered: Result<(), CtlError> = match &args.command {
        Command::Status => {
            let view: StatusView = client.ask(paths::STATUS, &[], ANSWER_WITHIN)?;
            print(out, &view, status::render)
        }
        Command::Certificates => {
            let view: CertificatesView = client.ask(paths::CERTIFICATES, &[], ANSWER_WITHIN)?;
            print(out, &view, certificates::render)
        }
        Command::Connections => {
            let view: ConnectionsView = client.ask(paths::CONNECTIONS, &[], ANSWER_WITHIN)?;
            print(out, &view, connections::render)
        }
        Command::Top(top) => top::run(&client, top, out),
        Command::Profile(profile_args) => {
            let seconds = profile_args.seconds.to_string();
            let within = ANSWER_WITHIN + Duration::from_secs(profile_args.seconds.into());
            let view: ProfileView = client.ask(paths::PROFILE, &[("seconds", &seconds)], within)?;
            print(out, &view, profile::render)
        }
        Command::Explain(explain_args) => {
            let mut query = vec![("from", explain_args.from.as_str()), ("to", explain_args.to.as_str())];
            let parts =
                [("method", &explain_args.method), ("path", &explain_args.path), ("sni", &explain_args.sni)];
            query.extend(parts.into_iter().filter_map(|(key, value)| Some((key, value.as_deref()?))));
            query.extend(explain_args.headers.iter().map(|header| ("header", header.as_str())));
            let view: ExplainView = client.ask(paths::EXPLAIN, &query, ANSWER_WITHIN)?;
            print(out, &view, explain::render)
        }
        Command::ProxyConfig { command } => proxy_config::run(&client, command, out),
        Command::Policy(policy_args) => return Ok(policy::run(policy_args, out)),
        Command::Validate(validate_args) => return Ok(validate::validate(validate_args, out)),
        Command::Analyze(analyze_args) => return Ok(validate::analyze(analyze_args, out)),
    };
    answered.map(|()| ExitCode::SUCCESS)
}

/// Prints a view as text or JSON.
fn print<T: serde::Serialize>(out: Output, view: &T, text: impl Fn(&T) -> String) -> Result<(), CtlError> {
    let printed = match out {
        Output::Text => text(view),
        Output::Json => {
            let mut json =
                serde_json::to_string_pretty(view).map_err(|source| CtlError::Encode { source })?;
            json.push('\n');
            json
        }
        Output::Yaml => yaml(view)?,
    };
    write_out(&printed)
}

/// A view as one YAML document.
fn yaml<T: serde::Serialize>(view: &T) -> Result<String, CtlError> {
    // By way of JSON, so that both say the same.
    let value = serde_json::to_value(view).map_err(|source| CtlError::Encode { source })?;
    serde_saphyr::to_string(&value).map_err(|source| CtlError::EncodeYaml { source: Box::new(source) })
}

fn write_out(text: &str) -> Result<(), CtlError> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(|source| CtlError::Print { source })
}
