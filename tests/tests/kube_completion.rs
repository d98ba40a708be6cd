//! Completion of names in bash, as a press of the key asks for it: by the script that `meshctl completion` prints, from a real API server,
//! and from one that does not answer.

use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use mesh_tests::cluster::ApiServer;
use mesh_tests::{TestResult, eventually, programs, require_api_server, test_name};

/// How long a shell may take on a busy machine; one that waits for a server that does not answer would take for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// Completes the last of its arguments and prints one name a line.
const SHELL: &str = r#"
source <(meshctl completion bash)
registered=$(complete -p meshctl)
function=${registered##*-F }
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
"${function%% *}" meshctl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
if [ ${#COMPREPLY[@]} -gt 0 ]; then printf '%s\n' "${COMPREPLY[@]}"; fi
"#;

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

/// What bash offers for the last of these words, and what appears on the screen besides.
fn completed(kubeconfig: &Path, words: &[&str]) -> anyhow::Result<(Vec<String>, String)> {
    let meshctl = programs::meshctl()?;
    let folder = meshctl.parent().context("no folder")?.display();
    let mut bash = Command::new("bash")
        .args(["--norc", "-c", SHELL, "bash", "meshctl"])
        .args(words)
        .env("PATH", format!("{folder}:{}", std::env::var("PATH")?))
        .env("KUBECONFIG", kubeconfig)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let ended = eventually(LIMIT, || bash.try_wait(), |ended| !matches!(ended, Ok(None)));
    if ended.is_err() {
        drop(bash.kill());
    }
    let ended = ended??.context("it runs")?;
    let (mut offered, mut shown) = (String::new(), String::new());
    bash.stdout.take().context("no pipe")?.read_to_string(&mut offered)?;
    bash.stderr.take().context("no pipe")?.read_to_string(&mut shown)?;
    ensure!(ended.success(), "{words:?}: {ended}: {offered}{shown}");
    Ok((offered.lines().map(str::to_owned).collect(), shown))
}

#[test]
fn bash_completes_names_from_the_cluster_and_shows_nothing_where_there_are_none_to_be_had() -> TestResult {
    require_api_server!();
    let api = ApiServer::start(test_name!())?;
    api.kubectl().apply(&objects())?;
    names_are_offered(&api)?;
    nothing_is_shown_without_a_cluster(&api)
}

fn names_are_offered(api: &ApiServer) -> TestResult {
    for (words, wanted) in [
        (&["explain", "--from", "shop/ca"][..], &["shop/cart", "shop/catalogue"][..]),
        (&["explain", "--from", "tills/"], &["tills/till-0"]),
        (&["-n", "shop", "explain", "--from", "ca"], &["cards/", "cart", "catalogue"]),
        // Bash takes words apart at an equals sign.
        (&["explain", "--namespace", "=", "shop", "--from", "rev"], &["reviews"]),
        (&["proxy-config", "routes", "shop/c"], &["shop/cart", "shop/catalogue"]),
        (&["explain", "--from", "t"], &["tills/"]),
        (&["explain", "--from", "nowhere/"], &[]),
        (&["status", "--node", "worker-"], &["worker-1", "worker-2"]),
        (&["status", "-n", "ti"], &["tills"]),
    ] {
        let (mut offered, shown) = completed(&api.kubeconfig(), words)?;
        offered.sort();
        assert_eq!(
            (offered, shown.as_str()),
            (wanted.iter().map(ToString::to_string).collect(), ""),
            "{words:?}"
        );
    }
    Ok(())
}

fn nothing_is_shown_without_a_cluster(api: &ApiServer) -> TestResult {
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
            let (offered, shown) = completed(&kubeconfig, words)?;
            assert_eq!((offered, shown.as_str()), (Vec::new(), ""), "{what}: {words:?}");
        }
        // What needs no cluster is completed all the same.
        let (offered, shown) = completed(&kubeconfig, &["expl"])?;
        assert_eq!((offered, shown.as_str()), (vec!["explain".to_owned()], ""), "{what}");
    }
    Ok(())
}
