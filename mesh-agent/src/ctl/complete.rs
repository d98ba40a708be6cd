//! Owns completion in shells: of commands and options, and of names of pods and nodes in the cluster that is asked.
//!
//! The script that `meshctl completion` prints calls `meshctl` itself with `COMPLETE` set, on each press of the key; what takes too long
//! or fails completes nothing.

use std::{env, ffi::OsStr, io, time::Duration};

use clap::CommandFactory;
use clap_complete::{
    CompleteEnv, Shell,
    engine::CompletionCandidate,
    env::{Bash, EnvCompleter, Fish, Zsh},
};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::{Api, ResourceExt, api::ListParams};

use super::{
    Args,
    cluster::{Cluster, ClusterArgs, ClusterError, Doing, runtime},
};

/// A key press waits no longer for names.
const WITHIN: Duration = Duration::from_secs(2);
/// Most names offered.
const NAMES_MAX: u32 = 500;

/// Answers a shell that asks for completions, and ends; otherwise does nothing.
pub fn complete() {
    CompleteEnv::with_factory(Args::command).complete();
}

/// Prints the script for a shell.
pub(super) fn script(shell: Shell) -> io::Result<()> {
    let completer: &dyn EnvCompleter = match shell {
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
        _ => &Bash,
    };
    completer.write_registration("COMPLETE", "meshctl", "meshctl", "meshctl", &mut io::stdout().lock())
}

/// What the command line so far says about the cluster.
fn so_far() -> ClusterArgs {
    let args: Vec<String> = env::args().collect();
    let value = |names: &[&str]| {
        let of = |(at, arg): (usize, &String)| {
            names.iter().find_map(|name| match arg.strip_prefix(name) {
                // Bash has taken `--name=value` apart.
                Some("") if args.get(at + 1).is_some_and(|next| next == "=") => args.get(at + 2).cloned(),
                Some("") => args.get(at + 1).cloned(),
                Some(rest) => rest.strip_prefix('=').map(ToOwned::to_owned),
                None => None,
            })
        };
        args.iter().enumerate().find_map(of)
    };
    ClusterArgs {
        context: value(&["--context"]),
        kubeconfig: value(&["--kubeconfig"]).map(Into::into),
        namespace: value(&["--namespace", "-n"]),
        ..ClusterArgs::default()
    }
}

fn names(
    current: &OsStr,
    list: impl AsyncFnOnce(Cluster) -> Result<Vec<String>, ClusterError>,
) -> Vec<CompletionCandidate> {
    let found = runtime().and_then(|runtime| {
        runtime.block_on(async {
            let listed = async { list(Cluster::connect(&so_far()).await?).await };
            tokio::time::timeout(WITHIN, listed).await.unwrap_or_else(|_| Ok(Vec::new()))
        })
    });
    let current = current.to_string_lossy();
    let fits = |name: &String| name.starts_with(&*current);
    found.unwrap_or_default().into_iter().filter(fits).map(CompletionCandidate::new).collect()
}

/// Names of pods: of the namespace, or with their namespace once a slash is there.
pub(super) fn pods(current: &OsStr) -> Vec<CompletionCandidate> {
    let typed = current.to_string_lossy().into_owned();
    names(current, async |cluster| {
        let params = ListParams::default().limit(NAMES_MAX);
        let (namespace, prefix) = match typed.split_once('/') {
            Some((namespace, _)) => (namespace.to_owned(), format!("{namespace}/")),
            None => (cluster.namespace.clone(), String::new()),
        };
        let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &namespace);
        let found = api.list_metadata(&params).await.doing(|| "list pods".to_owned())?;
        let mut names: Vec<String> =
            found.items.iter().map(|pod| format!("{prefix}{}", pod.name_any())).collect();
        if prefix.is_empty() {
            let api: Api<Namespace> = Api::all(cluster.client);
            let found = api.list_metadata(&params).await.doing(|| "list namespaces".to_owned())?;
            names.extend(found.items.iter().map(|namespace| format!("{}/", namespace.name_any())));
        }
        Ok(names)
    })
}

/// Names of namespaces.
pub(super) fn namespaces(current: &OsStr) -> Vec<CompletionCandidate> {
    names(current, async |cluster| {
        let api: Api<Namespace> = Api::all(cluster.client);
        let found = api.list_metadata(&ListParams::default().limit(NAMES_MAX)).await;
        let found = found.doing(|| "list namespaces".to_owned())?;
        Ok(found.items.iter().map(|namespace| namespace.name_any()).collect())
    })
}

/// Names of nodes.
pub(super) fn nodes(current: &OsStr) -> Vec<CompletionCandidate> {
    names(current, async |cluster| {
        let api: Api<Node> = Api::all(cluster.client);
        let found = api.list_metadata(&ListParams::default().limit(NAMES_MAX)).await;
        Ok(found.doing(|| "list nodes".to_owned())?.items.iter().map(|node| node.name_any()).collect())
    })
}
