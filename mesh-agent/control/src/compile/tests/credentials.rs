//! Secrets that DestinationRules name: who gets them, and what users are told where nobody does.

use mesh_core::snapshot::Material;

use super::*;

fn pod_on(node: &str, name: &str, app: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: a, labels: {{app: {app}, istio.io/dataplane-mode: ambient}}}}, spec: {{nodeName: {node}}}}}\n"
    )
}

fn rule(selector: &str) -> String {
    format!(
        "---\n{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: out, namespace: a}}, spec: {{host: api.a.svc.cluster.local, {selector}trafficPolicy: {{tls: {{mode: MUTUAL, credentialName: client}}}}}}}}\n"
    )
}

fn secret(namespace: &str, name: &str, data: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Secret, metadata: {{name: {name}, namespace: {namespace}}}, stringData: {{{data}}}}}\n"
    )
}

const SELECTOR: &str = "workloadSelector: {matchLabels: {app: web}}, ";
const API: &str = "---\n{apiVersion: v1, kind: Service, metadata: {name: api, namespace: a}, spec: {clusterIP: None, ports: [{port: 443}]}}\n";

fn pods() -> String {
    [pod_on("n1", "web", "web"), pod_on("n2", "other", "other"), pod_on("n3", "web3", "web")].concat()
}

/// The nodes that get the Secret, and what is in it.
fn sent(snapshot: &Snapshot) -> Vec<(String, Result<Material, String>)> {
    let of = snapshot.credentials();
    of.map(|c| (c.node.to_string(), c.content.clone().map_err(|why| why.to_string()))).collect()
}

fn material(parts: [Option<&str>; 3]) -> Material {
    let [certificate, key, roots] = parts.map(|part| part.map(|text| Arc::from(text.as_bytes())));
    Material { certificate, key, roots }
}

fn told(compiled: &Compiled) -> Vec<String> {
    let of_rule =
        compiled.problems.iter().filter(|problem| problem.kind.as_deref() == Some("DestinationRule"));
    of_rule.map(|problem| format!("{}: {}", problem.field, problem.message)).collect()
}

#[test]
fn a_secret_goes_to_the_nodes_of_selected_pods_and_is_the_rules_own_namespaces() {
    for (data, extra, wanted) in [
        ("tls.crt: c, tls.key: k, ca.crt: r", String::new(), [Some("c"), Some("k"), Some("r")]),
        ("cert: c, key: k, cacert: r, other: x", String::new(), [Some("c"), Some("k"), Some("r")]),
        (
            "tls.crt: c, tls.key: k",
            secret("a", "client-cacert", "ca.crt: r"),
            [Some("c"), Some("k"), Some("r")],
        ),
    ] {
        let text = [pods(), API.to_owned(), rule(SELECTOR), secret("a", "client", data), extra].concat();
        let compiled = compile(&text);
        assert_eq!(told(&compiled), [""; 0]);
        for snapshot in [(*compiled.snapshot).clone(), over_the_link(&compiled.snapshot)] {
            let nodes: Vec<_> = ["n1", "n3"].map(|node| (node.to_owned(), Ok(material(wanted)))).into();
            assert_eq!(sent(&snapshot), nodes, "{data}");
            let clusters = snapshot.routes().clusters.values();
            let named =
                clusters.flat_map(|scoped| scoped.by_namespace.values()).flat_map(|own| &own.selected);
            let mut named =
                named.filter_map(|(_, cluster)| cluster.policy.tls.as_ref()?.credential_name.clone());
            assert_eq!(named.next().as_deref(), Some("a/client"));
        }
    }
}

#[test]
fn where_there_is_no_secret_connections_are_refused_and_the_rule_says_why() {
    let of = |rule: String, more: String| compile(&[pods(), API.to_owned(), rule, more].concat());
    let missing = of(rule(SELECTOR), secret("b", "client", "tls.crt: c, tls.key: k, ca.crt: r"));
    let why = "there is no Secret a/client";
    assert_eq!(sent(&missing.snapshot)[0], ("n1".to_owned(), Err(why.to_owned())));
    let field = "spec.trafficPolicy.tls.credentialName";
    assert_eq!(
        told(&missing),
        [format!("{field}: is client: {why}; every connection by this rule is refused")]
    );
    assert!(missing.secrets.contains(&Name::new("a", "client")));

    let bare = of(rule(""), secret("a", "client", "tls.crt: c, tls.key: k, ca.crt: r"));
    assert_eq!(sent(&bare.snapshot), []);
    assert!(bare.secrets.is_empty());
    let [said] = &told(&bare)[..] else { panic!("{:?}", told(&bare)) };
    assert!(said.contains("only gateways read") && said.contains("refused"), "{said}");

    let mut index = index_of(&[("a.yaml", &[pods(), API.to_owned(), rule(SELECTOR)].concat())]);
    let settings = MeshSettings { read_secrets: false, ..MeshSettings::default() };
    let unread = Compiler::new(settings).compile(&mut index);
    assert!(told(&unread)[0].contains("controller.readSecrets=true"), "{:?}", told(&unread));
    assert!(sent(&unread.snapshot).iter().all(|(_, content)| content.is_err()));
}

#[test]
fn a_secret_that_changes_is_another_for_its_nodes_and_one_that_goes_is_gone() {
    let base = [pods(), API.to_owned(), rule(SELECTOR)].concat();
    let mut index = index_of(&[("a.yaml", &base), ("s.yaml", &secret("a", "client", "ca.crt: one"))]);
    let mut compiler = Compiler::new(MeshSettings::default());
    let roots = |compiled: &Compiled| {
        sent(&compiled.snapshot)[0].1.clone().map(|m| String::from_utf8_lossy(&m.roots.unwrap()).into_owned())
    };
    assert_eq!(roots(&compiler.compile(&mut index)), Ok("one".to_owned()));
    put(&mut index, "s.yaml", &secret("a", "client", "ca.crt: two"));
    let second = compiler.compile(&mut index);
    assert_eq!(roots(&second), Ok("two".to_owned()));
    let again = compiler.compile(&mut index);
    assert!(Arc::ptr_eq(&second.snapshot, &again.snapshot), "nothing changed");
    put(&mut index, "s.yaml", "");
    assert!(roots(&compiler.compile(&mut index)).is_err());
    put(&mut index, "a.yaml", &pods());
    assert_eq!(sent(&compiler.compile(&mut index).snapshot), []);
}
