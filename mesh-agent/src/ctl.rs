//! Owns `meshctl`: asks a running agent over its admin socket, or the agents of a cluster through its API server, and prints the answer;
//! puts the mesh into clusters and takes it out.
//!
//! Invariants:
//! - Exit status 0 when the question was answered, 1 when it could not be, 2 for wrong usage; `policy test`, `validate` and
//!   `analyze` have their own: 1 is "denied" or "something is wrong", 2 also that there is no answer.
//! - With `-o json` or `-o yaml`, standard output holds one document (one each for every reading of a live `top`) and nothing else.
//!
//! Not here: any decision; every answer comes from the agent or, for questions about manifests, from what an agent is made of.

mod bug_report;
mod certificates;
mod cli;
mod client;
mod cluster;
mod complete;
mod connections;
mod explain;
mod figures;
mod fleet;
mod install;
mod live;
mod policy;
mod profile;
mod proxy_config;
mod status;
mod table;
mod top;
mod validate;

use std::{
    env,
    io::{self, Write},
    path::Path,
    process::ExitCode,
    time::Duration,
};

pub use bug_report::BugReportArgs;
pub use cli::{Args, Command, DEFAULT_ADMIN_SOCKET, ExplainArgs, Output, ProfileArgs, Shell, TopArgs};
use client::{AdminSocket, AskError, Client};
pub use cluster::ClusterArgs;
pub use complete::complete;
use fleet::Fleet;
pub use install::{
    InstallArgs, ManifestCommand, PrecheckArgs, Profile, UninstallArgs, ValuesArgs, VerifyArgs,
};
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
    let (out, of) = (args.output, &args.cluster);
    let answered = match &args.command {
        Command::Policy(policy_args) => return Ok(policy::run(policy_args, out)),
        Command::Validate(validate_args) => return Ok(validate::validate(validate_args, of, out)),
        Command::Analyze(analyze_args) => return Ok(validate::analyze(analyze_args, of, out)),
        Command::Install(install_args) => return Ok(install::install(install_args, of, out, false)),
        Command::Upgrade(install_args) => return Ok(install::install(install_args, of, out, true)),
        Command::Uninstall(uninstall_args) => return Ok(install::uninstall(uninstall_args, of, out)),
        Command::Verify(verify_args) => return Ok(install::verify(verify_args, of, out)),
        Command::Precheck(precheck_args) => return Ok(install::precheck(precheck_args, of, out)),
        Command::Manifest { command } => return Ok(install::manifest(command, of, out)),
        Command::BugReport(report_args) => return Ok(bug_report::run(report_args, of, out)),
        Command::Completion { shell } => {
            complete::script(*shell).map(|()| true).map_err(|source| CtlError::Print { source })
        }
        Command::Ask { target, within } => raw(args.socket(), target, Duration::from_secs((*within).into())),
        _ if args.is_about_a_cluster() => in_cluster(args, Fleet::find(args).map_err(AskError::from)?),
        _ => on_host(args, &Client::new(args.socket())).map(|()| true),
    };
    answered.map(|all| if all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Args {
    fn socket(&self) -> &Path {
        self.admin_socket.as_deref().unwrap_or(Path::new(DEFAULT_ADMIN_SOCKET))
    }

    /// Whether agents of a cluster are asked: when the user says so, or there is none on this host and there is a kubeconfig.
    fn is_about_a_cluster(&self) -> bool {
        if self.admin_socket.is_some() {
            return false;
        }
        if self.cluster.context.is_some() || self.cluster.kubeconfig.is_some() {
            return true;
        }
        let kubeconfig = || {
            env::var_os("KUBECONFIG").is_some_and(|paths| !paths.is_empty())
                || env::home_dir().is_some_and(|home| home.join(".kube/config").is_file())
        };
        !Path::new(DEFAULT_ADMIN_SOCKET).exists() && kubeconfig()
    }
}

/// Prints what the agent of this host answers to one path. Whether it is an answer and no refusal.
fn raw(socket: &Path, target: &str, within: Duration) -> Result<bool, CtlError> {
    let (status, body) = AdminSocket::new(socket).get(target, within)?;
    io::stdout().lock().write_all(&body).map_err(|source| CtlError::Print { source })?;
    Ok(status.is_success())
}

/// Asks the agent of this host, or of one node of a cluster.
fn on_host(args: &Args, client: &Client) -> Result<(), CtlError> {
    let out = args.output;
    match &args.command {
        Command::Status => {
            let view: StatusView = client.ask(paths::STATUS, &[], ANSWER_WITHIN)?;
            print(out, &view, status::render)
        }
        Command::Certificates => {
            let view: CertificatesView = client.ask(paths::CERTIFICATES, &[], ANSWER_WITHIN)?;
            print(out, &view, |view| certificates::render(view, out.is_wide()))
        }
        Command::Connections => {
            let view: ConnectionsView = client.ask(paths::CONNECTIONS, &[], ANSWER_WITHIN)?;
            print(out, &view, |view| connections::render(view, out.is_wide()))
        }
        Command::Top(top_args) => {
            top::run(|| Ok(vec![client.ask(paths::EDGES, &[], ANSWER_WITHIN)?]), top_args, out)
        }
        Command::Profile(profile_args) => {
            let (query, within) = profile_question(profile_args);
            let view: ProfileView = client.ask(paths::PROFILE, &[(query.0, &query.1)], within)?;
            print(out, &view, profile::render)
        }
        Command::Explain(explain_args) => explained(client, explain_args, &explain_args.from, out),
        Command::ProxyConfig { command } => proxy_config::run(client, command, None, out),
        // Answered before.
        _ => Ok(()),
    }
}

/// Asks the agents of a cluster: the one of a pod's node where the question is about a pod, else all. Whether all answered.
fn in_cluster(args: &Args, fleet: Fleet) -> Result<bool, CtlError> {
    let out = args.output;
    match &args.command {
        Command::Status => fleet.status(paths::STATUS, ANSWER_WITHIN, out),
        Command::Certificates => {
            let text = |view: &_| certificates::render(view, out.is_wide());
            fleet.show::<CertificatesView>(paths::CERTIFICATES, &[], ANSWER_WITHIN, out, text)
        }
        Command::Connections => {
            let text = |view: &_| connections::render(view, out.is_wide());
            fleet.show::<ConnectionsView>(paths::CONNECTIONS, &[], ANSWER_WITHIN, out, text)
        }
        Command::Top(top_args) => {
            let read = || Ok(fleet.all(paths::EDGES, &[], ANSWER_WITHIN));
            top::run(read, top_args, out).map(|()| true)
        }
        Command::Profile(profile_args) => {
            let (query, within) = profile_question(profile_args);
            fleet.show::<ProfileView>(paths::PROFILE, &[query], within, out, profile::render)
        }
        Command::Explain(explain_args) => {
            let (client, from) = fleet.client(Some(&explain_args.from)).map_err(AskError::from)?;
            let from = from.unwrap_or_else(|| explain_args.from.clone());
            explained(&client, explain_args, &from, out).map(|()| true)
        }
        Command::ProxyConfig { command } => {
            let (client, pod) = fleet.client(command.pod()).map_err(AskError::from)?;
            proxy_config::run(&client, command, pod, out).map(|()| true)
        }
        // Answered before.
        _ => Ok(true),
    }
}

fn profile_question(args: &ProfileArgs) -> ((&'static str, String), Duration) {
    (("seconds", args.seconds.to_string()), ANSWER_WITHIN + Duration::from_secs(args.seconds.into()))
}

fn explained(client: &Client, args: &ExplainArgs, from: &str, out: Output) -> Result<(), CtlError> {
    let mut query = vec![("from", from), ("to", args.to.as_str())];
    let parts = [("method", &args.method), ("path", &args.path), ("sni", &args.sni)];
    query.extend(parts.into_iter().filter_map(|(key, value)| Some((key, value.as_deref()?))));
    query.extend(args.headers.iter().map(|header| ("header", header.as_str())));
    let view: ExplainView = client.ask(paths::EXPLAIN, &query, ANSWER_WITHIN)?;
    print(out, &view, explain::render)
}

/// Prints a view as text or JSON.
fn print<T: serde::Serialize>(out: Output, view: &T, text: impl Fn(&T) -> String) -> Result<(), CtlError> {
    let printed = match out {
        Output::Text | Output::Wide => text(view),
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
