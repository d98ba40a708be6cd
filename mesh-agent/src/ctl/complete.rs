//! Owns completion in shells: of commands and options, and of names of pods and nodes in the cluster that is asked.
//!
//! The script that `meshctl completion` prints calls `meshctl` itself with `COMPLETE` set, on each press of the key; what takes too long
//! or fails completes nothing.

use std::{
    env,
    ffi::OsStr,
    io::{self, Write as _},
    time::Duration,
};

use clap::{Command, CommandFactory};
use clap_complete::{
    CompleteEnv,
    engine::CompletionCandidate,
    env::{Bash, EnvCompleter, Fish, Zsh},
};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use kube::{Api, ResourceExt, api::ListParams};

use super::{
    Args, Shell,
    cluster::{Cluster, ClusterArgs, ClusterError, Doing, runtime},
};

/// A key press waits no longer for names.
const WITHIN: Duration = Duration::from_secs(2);
/// Most names offered.
const NAMES_MAX: u32 = 500;

/// What zsh reads from a file when it first needs a function, it takes for that function's body: the script as it comes would define
/// everything at the first press of the key, and complete nothing until the second.
const ZSH_AUTOLOADED: &str = r#"
if [[ $funcstack[1] == _meshctl ]]; then
    _clap_dynamic_completer_meshctl "$@"
fi
"#;

/// Answers a shell that asks for completions, and ends; otherwise does nothing.
pub fn complete() {
    CompleteEnv::with_factory(|| by_full_names(Args::command())).complete();
}

/// The same commands, to be completed by their full names. Of a name and its visible aliases the engine offers one, the first in the alphabet:
/// `pc`, and never `proxy-config`. Hidden ones are understood all the same, and completed where nothing else fits.
fn by_full_names(command: Command) -> Command {
    let aliases: Vec<String> = command.get_all_aliases().map(ToOwned::to_owned).collect();
    command.alias(None::<&'static str>).aliases(aliases).mut_subcommands(by_full_names)
}

/// Prints the script for a shell.
pub(super) fn script(shell: Shell) -> io::Result<()> {
    let completer: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let mut out = io::stdout().lock();
    completer.write_registration("COMPLETE", "meshctl", "meshctl", "meshctl", &mut out)?;
    match shell {
        Shell::Zsh => out.write_all(ZSH_AUTOLOADED.as_bytes()),
        Shell::Bash | Shell::Fish => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    /// What is offered for the last of these words, without options.
    fn offered(words: &[&str]) -> Vec<String> {
        let line: Vec<OsString> = ["meshctl"].iter().chain(words).map(OsString::from).collect();
        let mut command = by_full_names(Args::command());
        let found = clap_complete::engine::complete(&mut command, line, words.len(), None).unwrap();
        let names = found.iter().map(|candidate| candidate.get_value().to_string_lossy().into_owned());
        names.filter(|name| !name.starts_with('-')).collect()
    }

    #[test]
    fn every_command_is_offered_by_its_full_name_and_short_ones_are_understood() {
        fn check(command: &Command, path: &mut Vec<String>) {
            // Others would complete names from a cluster.
            if !command.has_subcommands() {
                return;
            }
            let mut words: Vec<&str> = path.iter().map(String::as_str).collect();
            words.push("");
            let offered = offered(&words);
            for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set()) {
                let name = inner.get_name();
                assert!(offered.iter().any(|offered| offered == name), "{path:?} {name}: {offered:?}");
                for alias in inner.get_all_aliases() {
                    assert!(offered.iter().all(|offered| offered != alias), "{path:?} {alias}: {offered:?}");
                }
                path.push(name.to_owned());
                check(inner, path);
                path.pop();
            }
        }
        check(&Args::command(), &mut Vec::new());
        let mut found = offered(&["p"]);
        found.sort();
        assert_eq!(found, ["policy", "precheck", "profile", "proxy-config"]);
        assert_eq!(offered(&["pc", "rou"]), ["routes"]);
        assert_eq!(offered(&["pc"]), ["pc"]);
    }
}
