//! Which AuthorizationPolicies reach which workloads, and what a change of one recomputes.

use mesh_core::policy::{Action, Attempt, Peer, Scope, admit};

use super::*;

fn authorization(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{namespace: {namespace}, name: {name}}}, spec: {spec}}}\n"
    )
}

fn pod_in(namespace: &str, name: &str, addr: &str, labels: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Pod, metadata: {{namespace: {namespace}, name: {name}, labels: {{{labels}}}}}, \
         spec: {{serviceAccountName: {name}}}, status: {{podIP: {addr}}}}}\n"
    )
}

fn mesh_config(mesh: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: istio-system}}, data: {{mesh: '{mesh}'}}}}\n"
    )
}

fn names(workload: &Workload) -> Vec<String> {
    workload.policies.iter().map(ToString::to_string).collect()
}

const ALL: &str = "rules: [{}]";

#[test]
fn the_root_namespaces_and_its_own_policies_apply_together() {
    let selecting = |app: &str| format!("{{selector: {{matchLabels: {{app: {app}}}}}, {ALL}}}");
    let everyone = format!("{{{ALL}}}");
    let target = format!("{{targetRefs: [{{kind: Gateway, name: g}}], {ALL}}}");
    let text = [
        pod_in("shop", "web", "10.0.0.1", "app: web"),
        pod_in("shop", "db", "10.0.0.2", "app: db"),
        pod_in("bank", "web", "10.0.0.3", "app: web"),
        pod_in("istio-system", "web", "10.0.0.4", "app: web"),
        authorization("istio-system", "mesh", &everyone),
        authorization("istio-system", "mesh-web", &selecting("web")),
        authorization("shop", "wide", &everyone),
        authorization("shop", "db", &selecting("db")),
        authorization("bank", "db", &selecting("db")),
        authorization("bank", "gateway", &target),
        authorization("bank", "audit", &format!("{{action: AUDIT, {ALL}}}")),
    ]
    .concat();
    let snapshot = compile(&text).snapshot;
    let of = |namespace: &str, name: &str| {
        let found = snapshot.workloads().find(|w| w.name == Name::new(namespace, name));
        names(found.unwrap())
    };
    let (mesh, mesh_web) = ("istio-system/mesh", "istio-system/mesh-web");
    assert_eq!(of("shop", "web"), [mesh, mesh_web, "shop/wide"]);
    assert_eq!(of("shop", "db"), [mesh, "shop/db", "shop/wide"]);
    assert_eq!(of("bank", "web"), [mesh, mesh_web]);
    assert_eq!(of("istio-system", "web"), [mesh, mesh_web], "each once");
    let scopes: Vec<_> = snapshot.policies().map(|p| (p.name.to_string(), p.scope)).collect();
    assert_eq!(
        scopes,
        [
            ("bank/db".into(), Scope::Selector),
            ("istio-system/mesh".into(), Scope::Mesh),
            ("istio-system/mesh-web".into(), Scope::Selector),
            ("shop/db".into(), Scope::Selector),
            ("shop/wide".into(), Scope::Namespace),
        ]
    );
}

#[test]
fn a_policy_recomputes_its_namespace_and_moves_the_hash_of_those_it_reaches() {
    let mut index = index_of(&[(
        "a.yaml",
        &[
            pod_in("shop", "web", "10.0.0.1", "app: web"),
            pod_in("shop", "db", "10.0.0.2", "app: db"),
            pod_in("bank", "till", "10.0.0.3", "app: till"),
        ]
        .concat(),
    )]);
    let mut compiler = Compiler::new(MeshSettings::default());
    let first = compiler.compile(&mut index).snapshot;

    let web = "selector: {matchLabels: {app: web}}";
    let allow = |port: u16| {
        authorization(
            "shop",
            "p",
            &format!("{{{web}, rules: [{{to: [{{operation: {{ports: ['{port}']}}}}]}}]}}"),
        )
    };
    put(&mut index, "p.yaml", &allow(80));
    let second = compiler.compile(&mut index).snapshot;
    assert!(Arc::ptr_eq(workload(&first, "db"), workload(&second, "db")), "not selected");
    assert!(Arc::ptr_eq(workload(&first, "till"), workload(&second, "till")), "another namespace");
    assert_eq!(names(workload(&second, "web")), ["shop/p"]);
    assert_ne!(workload(&first, "web").policy_hash, workload(&second, "web").policy_hash);

    put(&mut index, "p.yaml", &allow(81));
    let third = compiler.compile(&mut index).snapshot;
    assert_ne!(workload(&second, "web").policy_hash, workload(&third, "web").policy_hash);

    // A dry run is reported on and moves nothing.
    let dry = allow(82).replace("name: p}", "name: p, annotations: {istio.io/dry-run: 'true'}}");
    put(&mut index, "p.yaml", &dry);
    let fourth = compiler.compile(&mut index).snapshot;
    assert_eq!(names(workload(&fourth, "web")), ["shop/p"]);
    assert_eq!(workload(&first, "web").policy_hash, workload(&fourth, "web").policy_hash);

    index.replace(Path::new("p.yaml"), Vec::new());
    let last = compiler.compile(&mut index).snapshot;
    assert!(last.policies().next().is_none() && names(workload(&last, "web")).is_empty());

    put(&mut index, "m.yaml", &authorization("istio-system", "m", &format!("{{action: DENY, {ALL}}}")));
    let meshwide = compiler.compile(&mut index).snapshot;
    assert!(meshwide.workloads().all(|w| names(w) == ["istio-system/m"]));
}

#[test]
fn the_mesh_config_names_every_workloads_trust_domain() {
    let mut index = index_of(&[(
        "a.yaml",
        &[
            pod_in("shop", "web", "10.0.0.1", "app: web"),
            authorization(
                "shop",
                "p",
                "{rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]}]}",
            ),
        ]
        .concat(),
    )]);
    let settings = MeshSettings { trust_domain: "flag".to_owned(), ..MeshSettings::default() };
    let mut compiler = Compiler::new(settings);
    let first = compiler.compile(&mut index).snapshot;
    assert_eq!(workload(&first, "web").identity().to_string(), "spiffe://flag/ns/shop/sa/web");

    put(&mut index, "m.yaml", &mesh_config("{trustDomain: prod, trustDomainAliases: [old]}"));
    let second = compiler.compile(&mut index).snapshot;
    let web = workload(&second, "web");
    assert_eq!(web.identity().to_string(), "spiffe://prod/ns/shop/sa/web");
    assert_ne!(web.policy_hash, workload(&first, "web").policy_hash);
    assert_eq!(second.mesh().trust_domains().collect::<Vec<_>>(), ["prod", "old"]);
    for domain in ["prod", "old"] {
        let identity = mesh_core::identity::Identity::new(domain, "shop", "web");
        let peer = Peer::Tls(Arc::new(identity));
        let to = web.addrs[0];
        let attempt = Attempt { peer: &peer, source: None, destination: to, port: 80 };
        assert!(admit(&second, &attempt, web).is_allow(), "{domain}");
    }

    index.replace(Path::new("m.yaml"), Vec::new());
    assert_eq!(*compiler.compile(&mut index).snapshot.mesh().trust_domain, *"flag");
}

#[test]
fn a_custom_policy_denies_what_it_would_ask_about() {
    let custom = "{action: CUSTOM, provider: {name: x}, rules: [{to: [{operation: {ports: ['80']}}]}]}";
    let text = [pod_in("shop", "web", "10.0.0.1", "app: web"), authorization("shop", "p", custom)].concat();
    let snapshot = compile(&text).snapshot;
    let web = workload(&snapshot, "web");
    assert!(snapshot.policies().all(|p| p.action == Action::Deny));
    let allowed = |port| {
        let attempt = Attempt { peer: &Peer::Unauthenticated, source: None, destination: web.addrs[0], port };
        admit(&snapshot, &attempt, web).is_allow()
    };
    assert!(!allowed(80) && allowed(81));
}

#[test]
fn the_sources_of_modes_are_named() {
    let text = [
        pod_in("shop", "web", "10.0.0.1", "app: web"),
        pod_in("shop", "db", "10.0.0.2", "app: db"),
        pod_in("bank", "till", "10.0.0.3", ""),
        policy("istio-system", "mesh", "{mtls: {mode: STRICT}}"),
        policy("shop", "wide", "{mtls: {mode: PERMISSIVE}}"),
        policy("shop", "web", "{selector: {matchLabels: {app: web}}, portLevelMtls: {80: {mode: DISABLE}}}"),
    ]
    .concat();
    let snapshot = compile(&text).snapshot;
    let source = |name: &str, port| {
        let workload = workload(&snapshot, name);
        workload.mode_sources.of(&workload.modes, port).map(ToString::to_string)
    };
    assert_eq!(source("web", 80).as_deref(), Some("shop/web"));
    assert_eq!(source("web", 81).as_deref(), Some("shop/wide"));
    assert_eq!(source("db", 80).as_deref(), Some("shop/wide"));
    assert_eq!(source("till", 80).as_deref(), Some("istio-system/mesh"));
    let bare = compile(&pod_in("shop", "web", "10.0.0.1", "")).snapshot;
    assert_eq!(workload(&bare, "web").mode_sources, mesh_core::mode::ModeSources::default());
}
