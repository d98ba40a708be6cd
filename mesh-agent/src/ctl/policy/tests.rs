//! Tests of `policy test` over manifests in a temporary folder.

use std::{fs, path::PathBuf};

use clap::Parser;

use super::{
    matrix::{MatrixView, matrix},
    question::ask,
    view::{TestView, render},
    *,
};
use crate::ctl::{Args, Command};

const MESH: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: web, labels: {app: web}}, status: {podIP: 10.0.0.1},
 spec: {nodeName: n1, serviceAccountName: web, containers: [{name: c, image: x, ports: [{containerPort: 8080, name: http}]}]}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: cart}, status: {podIP: 10.0.0.2},
 spec: {nodeName: n1, serviceAccountName: cart}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: far}, status: {podIP: 10.0.1.3},
 spec: {nodeName: n2, serviceAccountName: cart}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: legacy, name: old}, status: {podIP: 10.0.9.9}, spec: {nodeName: n1}}
";

const POLICIES: &str = "
{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {namespace: shop, name: web}, spec: {
 selector: {matchLabels: {app: web}}, rules: [
  {from: [{source: {principals: [cluster.local/ns/bank/sa/teller], ipBlocks: [10.7.0.0/16]}}]},
  {from: [{source: {serviceAccounts: [cart]}}], to: [{operation: {ports: ['8080']}}]}]}}
---
{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {namespace: istio-system, name: ban}, spec: {
 action: DENY, rules: [{from: [{source: {ipBlocks: [10.0.1.0/24]}}]}]}}
---
{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {namespace: shop, name: soon,
 annotations: {istio.io/dry-run: 'true'}}, spec: {action: DENY, rules: [{}]}}
";

/// A folder of manifests that goes away with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let dir = std::env::temp_dir().join(format!("nodemesh-policy-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for (file, text) in files {
            fs::write(dir.join(file), text).unwrap();
        }
        Self(dir)
    }

    fn args(&self, line: &str) -> PolicyTestArgs {
        let dir = self.0.to_str().unwrap();
        let words = ["meshctl", "policy", "test", "-f", dir].into_iter().chain(line.split_whitespace());
        match Args::try_parse_from(words).unwrap().command {
            Command::Policy(PolicyArgs { command: PolicyCommand::Test(test) }) => test,
            other => panic!("{other:?}"),
        }
    }

    fn loaded(&self) -> Loaded {
        let loaded = offline::load(std::slice::from_ref(&self.0), MeshSettings::default()).unwrap();
        assert_eq!(loaded.errors, []);
        loaded
    }

    fn ask(&self, line: &str) -> TestView {
        ask(&self.loaded(), &self.args(line)).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    fn refused(&self, line: &str) -> String {
        ask(&self.loaded(), &self.args(line)).expect_err(line).to_string()
    }

    fn matrix(&self, line: &str) -> MatrixView {
        matrix(&self.loaded(), &self.args(line)).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn mesh(name: &str) -> Folder {
    Folder::new(name, &[("mesh.yaml", MESH), ("policies.yaml", POLICIES)])
}

fn rows(view: &MatrixView) -> Vec<String> {
    let policy = |p: &Option<String>, rule: Option<usize>| match (p, rule) {
        (Some(policy), Some(rule)) => format!(" {policy}#{rule}"),
        (Some(policy), None) => format!(" {policy}"),
        (None, _) => String::new(),
    };
    view.rows
        .iter()
        .map(|r| format!("{} {}:{} {}{}", r.from, r.to, r.port, r.verdict, policy(&r.policy, r.rule)))
        .collect()
}

#[test]
fn verdict_reason_policy_rule_and_place_for_every_kind_of_client() {
    let folder = mesh("kinds");
    let web = "shop/web";
    let table = [
        ("--from cart --to web:8080", "kernel", "allow", "policy_allows", Some((web, Some(1)))),
        ("--from shop/cart --to web:http", "kernel", "allow", "policy_allows", Some((web, Some(1)))),
        ("--from cart --to web:9090", "kernel", "deny", "no_policy_allows", Some((web, None))),
        ("--from cart --plaintext --to web:8080", "plaintext", "deny", "no_policy_allows", Some((web, None))),
        (
            "--from far --to web:8080",
            "mutual_tls",
            "deny",
            "policy_denied",
            Some(("istio-system/ban", Some(0))),
        ),
        ("--from old --to web:8080", "plaintext", "deny", "no_policy_allows", Some((web, None))),
        ("--from cart --to far:80", "mutual_tls", "allow", "no_policy", None),
        (
            "--principal spiffe://cluster.local/ns/bank/sa/teller --from-ip 10.7.1.1 --to web:1",
            "mutual_tls",
            "allow",
            "policy_allows",
            Some((web, Some(0))),
        ),
        (
            "--principal cluster.local/ns/bank/sa/teller --from-ip 10.8.1.1 --to web:1",
            "mutual_tls",
            "deny",
            "no_policy_allows",
            Some((web, None)),
        ),
        ("--principal else/ns/a/sa/b --to web:1", "mutual_tls", "deny", "peer_trust_domain", None),
        (
            "--from-ip 10.0.1.9 --to cart:1",
            "plaintext",
            "deny",
            "policy_denied",
            Some(("istio-system/ban", Some(0))),
        ),
        ("--from-ip 192.0.2.1 --to cart:1", "plaintext", "allow", "no_policy", None),
    ];
    for (line, transport, verdict, reason, by) in table {
        let view = folder.ask(line);
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["transport"], transport, "{line}");
        assert_eq!(
            (json["verdict"].as_str(), json["reason"].as_str()),
            (Some(verdict), Some(reason)),
            "{line}"
        );
        let found = view.policy.decided_by.as_ref().map(|by| (by.policy.as_str(), by.rule));
        assert_eq!(found, by, "{line}");
        let place = by.map(|(policy, _)| (folder.0.join("policies.yaml"), if policy == web { 1 } else { 2 }));
        assert_eq!(view.file.clone().zip(view.document), place, "{line}");
        assert!(answer(&folder.args(line), Output::Json).unwrap() == (verdict == "allow"));
    }
}

#[test]
fn strict_is_placed_where_its_peer_authentication_is() {
    let strict = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {namespace: shop, name: s}, \
                  spec: {mtls: {mode: STRICT}}}";
    let folder = Folder::new("strict", &[("mesh.yaml", MESH), ("strict.yaml", strict)]);
    let view = folder.ask("--from-ip 192.0.2.1 --to web:8080");
    assert_eq!(
        (&*view.policy.reason, view.policy.mode_from.as_deref()),
        ("strict_plaintext", Some("shop/s"))
    );
    assert_eq!(view.file, Some(folder.0.join("strict.yaml")));
    assert_eq!(folder.ask("--from far --to web:8080").policy.verdict, "allow");
}

#[test]
fn the_text_says_all_of_it() {
    let folder = mesh("text");
    let text = render(&folder.ask("--from cart --to web:8080"));
    let file = folder.0.join("policies.yaml");
    let file = file.display();
    assert_eq!(
        text,
        format!(
            "ALLOW:      AuthorizationPolicy shop/web, rule 1 allows it (policy_allows)\n\
             policy:     shop/web, spec.rules[1]\n\
             file:       {file}, document 1\n\
             client:     shop/cart (spiffe://cluster.local/ns/shop/sa/cart, 10.0.0.2)\n\
             server:     shop/web:8080 (spiffe://cluster.local/ns/shop/sa/web, 10.0.0.1)\n\
             transport:  same node; the kernel attests the client\n\
             mode:       PERMISSIVE, the default\n\
             applies:    istio-system/ban ({file}, document 2)\n\
             applies:    shop/soon ({file}, document 3)\n\
             applies:    shop/web ({file}, document 1)\n\
             dry run:    DENY shop/soon would deny: spec.rules[0] matches\n"
        )
    );
}

#[test]
fn what_the_manifests_do_not_say_is_noted() {
    let folder = mesh("notes");
    let notes = |line: &str| folder.ask(line).notes.join("\n");
    assert_eq!(notes("--from cart --to web:8080"), "");
    assert!(
        notes("--from old --to web:8080")
            .contains("legacy/old is not in the mesh, so it connects in plaintext")
    );
    assert!(notes("--from cart --to old:80").contains("legacy/old is not in the mesh: judged as if it were"));
    assert!(notes("--principal cluster.local/ns/a/sa/b --to web:80").contains("--from-ip"));
    // Bare pods without a word about the mesh are judged as if all of them were in it.
    let bare = MESH.replace(", labels: {istio.io/dataplane-mode: ambient}", "");
    let folder = Folder::new("bare", &[("mesh.yaml", &bare), ("policies.yaml", POLICIES)]);
    let view = folder.ask("--from cart --to web:8080");
    assert_eq!((&*view.policy.verdict, view.policy.transport), ("allow", crate::view::TransportView::Kernel));
}

#[test]
fn an_excluded_port_is_policed_by_nobody() {
    let excluded = MESH.replace(
        "name: web, labels",
        "name: web, annotations: {nodemesh.dev/exclude-inbound-ports: '9090'}, labels",
    );
    let folder = Folder::new("excluded", &[("mesh.yaml", &excluded), ("policies.yaml", POLICIES)]);
    let view = folder.ask("--from-ip 192.0.2.1 --to web:9090");
    assert_eq!((&*view.policy.verdict, &*view.policy.reason), ("allow", "excluded_port"));
    assert_eq!((view.policy.decided_by, view.file), (None, None));
}

#[test]
fn questions_without_an_answer_say_what_is_wanted() {
    let folder = mesh("wrong");
    assert_eq!(
        folder.refused("--from nobody --to web:80"),
        "the manifests have no pod nobody; they have legacy/old, shop/cart, shop/far, shop/web"
    );
    assert_eq!(
        folder.refused("--from cart --to web:htpp"),
        "shop/web has no port \"htpp\"; want a number from 1 to 65535 or one of its names: http"
    );
    assert!(folder.refused("--from cart --to web:0").contains("want a number from 1 to 65535"));
    let twice = MESH.replace("namespace: legacy, name: old", "namespace: legacy, name: web");
    let folder = Folder::new("twice", &[("mesh.yaml", &twice)]);
    assert_eq!(
        folder.refused("--from cart --to web:80"),
        "there are several pods web; want NAMESPACE/NAME: legacy/web, shop/web"
    );
    let broken = Folder::new("broken", &[("mesh.yaml", MESH), ("bad.yaml", "kind: Pod\napiVersion: v1\n")]);
    let error = answer(&broken.args("--from cart --to web:80"), Output::Text).unwrap_err();
    assert!(matches!(error, PolicyError::Invalid { count: 2 }), "{error}");
}

#[test]
fn wrong_usage_is_status_2() {
    for line in [
        "",
        "-f x",
        "-f x --to web:80",
        "-f x --from a",
        "-f x --from a --to web",
        "-f x --from a --to :80",
        "-f x --from a --principal td/ns/a/sa/b --to web:80",
        "-f x --from a --from-ip 10.0.0.1 --to web:80",
        "-f x --principal td/ns/a/sa/b --plaintext --to web:80",
        "-f x --principal nonsense --to web:80",
        "-f x --matrix --plaintext",
        "--from a --to web:80",
    ] {
        let words = "meshctl policy test".split(' ').chain(line.split_whitespace());
        assert_eq!(Args::try_parse_from(words).expect_err(line).exit_code(), 2, "{line}");
    }
}

#[test]
fn the_matrix_asks_every_client_about_every_known_port() {
    let folder = mesh("matrix");
    let all = folder.matrix("--matrix");
    // web's port is declared and in a policy; cart and far have none.
    assert_eq!(
        rows(&all),
        [
            "legacy/old shop/web:8080 deny shop/web",
            "shop/cart shop/web:8080 allow shop/web#1",
            "shop/far shop/web:8080 deny istio-system/ban#0",
            // Whoever's address is not known may be the one that is banned.
            "(plaintext) shop/web:8080 deny istio-system/ban#0",
        ]
    );
    let narrowed = folder.matrix("--matrix --from cart --to far:443");
    assert_eq!(rows(&narrowed), ["shop/cart shop/far:443 allow"]);
    assert!(answer(&folder.args("--matrix"), Output::Text).unwrap(), "a matrix is no refusal");
}
