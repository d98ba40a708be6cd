//! Completion of names in bash, zsh and fish, as a press of the key asks for it: by the script that `meshctl completion` prints, put
//! where the documents put it, from a real API server and from one that does not answer.

use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::cluster::ApiServer;
use mesh_tests::{TestResult, eventually, programs, require_api_server, require_shells, test_name};

/// How long a shell may take on a busy machine; one that waits for a server that does not answer would take for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// Completes the last of its arguments and prints one name a line.
const BASH: &str = r#"
source <(meshctl completion bash)
registered=$(complete -p meshctl)
function=${registered##*-F }
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
"${function%% *}" meshctl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
if [ ${#COMPREPLY[@]} -gt 0 ]; then printf '%s\n' "${COMPREPLY[@]}"; fi
"#;

/// The same of a line, at the first press of the key. Completion in zsh is its line editor's, which needs a terminal: a second shell gets
/// one, and there what is added to the completions is written down on its way. Control characters tell when that shell is ready, that it
/// is to complete, and that it has.
const ZSH: &str = r#"
zmodload zsh/zpty || exit
mkdir -p ~/.zfunc
meshctl completion zsh > ~/.zfunc/_meshctl
export OFFERED=$(mktemp)
zpty shell zsh -f -i
zpty -w shell 'PROMPT=
fpath=(~/.zfunc $fpath)
autoload -Uz compinit; compinit -D -u
compadd() {
  if (( ! ${argv[(I)-[OAD]]} )); then
    local -a fitting; local at=${argv[(I)-S]} suffix=
    (( at )) && suffix=$argv[at+1]
    builtin compadd -O fitting "$@"
    (( $#fitting )) && print -rl -- ${^fitting}$suffix >> $OFFERED
  fi
  builtin compadd "$@"
}
offer() { _main_complete "$@" }
zle -C offer complete-word offer
press() { zle offer; print -n "\x02" }
zle -N press
bindkey "^T" press
print -n "\x01"'
zpty -r shell seen $'*\x01*'
zpty -w -n shell "$1"$'\x14'
zpty -r shell seen $'*\x02*'
zpty -d shell
cat $OFFERED; rm $OFFERED
"#;

/// The same of a line, where the shell has a word for it.
const FISH: &str = r#"
mkdir -p ~/.config/fish/completions
meshctl completion fish > ~/.config/fish/completions/meshctl.fish
complete -C "$argv[1]"
"#;

#[derive(Clone, Copy, Debug)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

impl Shell {
    /// Has it complete the last of these words after `meshctl`.
    fn command(self, words: &[&str]) -> Command {
        let line = format!("meshctl {}", words.join(" "));
        let mut command = Command::new(format!("{self:?}").to_lowercase());
        match self {
            Self::Bash => {
                // Bash takes words apart at an equals sign.
                let words = words.iter().flat_map(|word| match word.split_once('=') {
                    Some((name, value)) => vec![name, "=", value],
                    None => vec![*word],
                });
                command.args(["--norc", "-c", BASH, "bash", "meshctl"]).args(words)
            }
            Self::Zsh => command.args(["-f", "-c", ZSH, "zsh", &line]),
            Self::Fish => command.args(["-c", FISH, &line]),
        };
        command
    }
}

/// Pods of two namespaces; that they never run is nothing to completion.
fn objects() -> String {
    let mut objects = String::new();
    for namespace in ["shop", "tills", "cards"] {
        objects += &format!("{{apiVersion: v1, kind: Namespace, metadata: {{name: {namespace}}}}}\n---\n");
        objects += &format!(
            "{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: default, namespace: {namespace}}}}}\n---\n"
        );
    }
    for (namespace, name) in
        [("shop", "cart"), ("shop", "catalogue"), ("shop", "reviews"), ("tills", "till-0")]
    {
        objects += &format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: {namespace}}}, \
             spec: {{containers: [{{name: app, image: none}}]}}}}\n---\n"
        );
    }
    for node in ["worker-1", "worker-2", "other"] {
        objects += &format!("{{apiVersion: v1, kind: Node, metadata: {{name: {node}}}}}\n---\n");
    }
    objects
}

/// What a shell offers for the last of these words, and what appears on the screen besides.
fn completed(shell: Shell, kubeconfig: &Path, words: &[&str]) -> anyhow::Result<(Vec<String>, String)> {
    let meshctl = programs::meshctl()?;
    let folder = meshctl.parent().context("no folder")?.display();
    let mut asked = shell
        .command(words)
        .env("PATH", format!("{folder}:{}", std::env::var("PATH")?))
        .env("KUBECONFIG", kubeconfig)
        // Nothing of the user's own, and a terminal that can do nothing.
        .env("HOME", kubeconfig.parent().context("no folder")?)
        .env("TERM", "dumb")
        .env_remove("XDG_CONFIG_HOME")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let ended = eventually(LIMIT, || asked.try_wait(), |ended| !matches!(ended, Ok(None)));
    if ended.is_err() {
        drop(asked.kill());
    }
    let ended = ended??.context("it runs")?;
    let (mut offered, mut shown) = (String::new(), String::new());
    asked.stdout.take().context("no pipe")?.read_to_string(&mut offered)?;
    asked.stderr.take().context("no pipe")?.read_to_string(&mut shown)?;
    ensure!(ended.success(), "{shell:?} {words:?}: {ended}: {offered}{shown}");
    // Fish says what each is for.
    let name = |line: &str| line.split('\t').next().unwrap_or_default().to_owned();
    let mut offered: Vec<String> = offered.lines().map(name).collect();
    offered.sort();
    Ok((offered, shown))
}

#[test]
fn shells_complete_names_from_the_cluster_and_show_nothing_where_there_are_none_to_be_had() -> TestResult {
    require_api_server!();
    require_shells!();
    let api = ApiServer::start(test_name!())?;
    api.kubectl().apply(&objects())?;
    for shell in SHELLS {
        names_are_offered(&api, shell)?;
        nothing_is_shown_without_a_cluster(&api, shell)?;
    }
    Ok(())
}

fn names_are_offered(api: &ApiServer, shell: Shell) -> TestResult {
    for (words, wanted) in [
        (&["explain", "--from", "shop/ca"][..], &["shop/cart", "shop/catalogue"][..]),
        (&["explain", "--from", "tills/"], &["tills/till-0"]),
        (&["-n", "shop", "explain", "--from", "ca"], &["cards/", "cart", "catalogue"]),
        (&["explain", "--namespace=shop", "--from", "rev"], &["reviews"]),
        (&["proxy-config", "routes", "shop/c"], &["shop/cart", "shop/catalogue"]),
        (&["explain", "--from", "t"], &["tills/"]),
        (&["explain", "--from", "nowhere/"], &[]),
        (&["status", "--node", "worker-"], &["worker-1", "worker-2"]),
        (&["status", "-n", "ti"], &["tills"]),
        // Words of ours, by their full names.
        (&["p"], &["policy", "precheck", "profile", "proxy-config"]),
        (&["pc", "cl"], &["clusters"]),
        (&["completion", ""], &["bash", "fish", "zsh"]),
    ] {
        let (mut offered, shown) = completed(shell, &api.kubeconfig(), words)?;
        // Options are offered where there is no word yet.
        offered.retain(|name| !name.starts_with('-'));
        let wanted: Vec<String> = wanted.iter().map(ToString::to_string).collect();
        assert_eq!((offered, shown.as_str()), (wanted, ""), "{shell:?} {words:?}");
    }
    Ok(())
}

fn nothing_is_shown_without_a_cluster(api: &ApiServer, shell: Shell) -> TestResult {
    let folder = api.directory();
    let known = fs::read_to_string(api.kubeconfig())?;
    let kubeconfig = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).map(|()| path)
    };
    let at = |port: u16| known.replace(api.url(), &format!("https://127.0.0.1:{port}"));
    // Connections come to be, and nobody ever says a word on them.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let token = known.lines().find(|line| line.trim_start().starts_with("token:")).context("no token")?;
    for (what, kubeconfig) in [
        ("silent", kubeconfig("silent", at(silent.local_addr()?.port()))?),
        ("closed", kubeconfig("closed", at(closed))?),
        ("stranger", kubeconfig("stranger", known.replace(token, &token.replace(": ", ": x")))?),
        ("broken", kubeconfig("broken", "nonsense".to_owned())?),
        ("absent", folder.join("absent")),
    ] {
        for words in
            [&["explain", "--from", "ca"][..], &["explain", "--from", "shop/"], &["status", "--node", ""]]
        {
            let (offered, shown) = completed(shell, &kubeconfig, words)?;
            assert_eq!((offered, shown.as_str()), (Vec::new(), ""), "{shell:?} {what}: {words:?}");
        }
        // What needs no cluster is completed all the same.
        let (offered, shown) = completed(shell, &kubeconfig, &["expl"])?;
        assert_eq!((offered, shown.as_str()), (vec!["explain".to_owned()], ""), "{shell:?} {what}");
    }
    Ok(())
}
