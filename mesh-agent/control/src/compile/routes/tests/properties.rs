//! What holds for any resources, in whatever order they come.

use std::sync::Arc;

use mesh_core::route::Routes;
use proptest::{collection::vec, prelude::*, sample::select};

use super::{GATEWAY, ISTIO, aged, document, over_the_link, put, service};
use crate::{
    compile::{Compiled, Compiler, MeshSettings},
    index::Index,
};

/// A file with one resource, or one that is gone.
#[derive(Clone, Debug)]
struct Edit {
    file: u8,
    text: Option<String>,
}

fn namespace() -> impl Strategy<Value = &'static str> {
    select(vec!["shop", "team", "else", "istio-system"])
}

fn host() -> impl Strategy<Value = &'static str> {
    select(vec![
        "web.shop.svc.cluster.local",
        "cart.shop.svc.cluster.local",
        "'*.shop.svc.cluster.local'",
        "out.example.com",
        "web",
    ])
}

fn export() -> impl Strategy<Value = &'static str> {
    select(vec!["'*'", ".", "team", "'~'", "shop, else"])
}

fn any_service() -> impl Strategy<Value = String> {
    let ports = select(vec![&["http:80"][..], &["http:80", "http-b:81"], &["tcp:90"]]);
    let own = (select(vec!["shop/web", "shop/cart", "team/web"]), ports)
        .prop_map(|(name, ports)| service(name, ports));
    // Another name of one, and a name outside.
    let alias = select(vec!["web.shop.svc.cluster.local", "out.example.com"]).prop_map(|target| {
        document("v1", "Service", "team/alias", &format!("type: ExternalName, externalName: {target}"))
    });
    let entry = select(vec!["out.example.com", "web.shop.svc.cluster.local"]).prop_map(|host| {
        let spec = format!(
            "hosts: [{host}], resolution: STATIC, ports: [{{number: 80, name: http, protocol: HTTP}}], endpoints: [{{address: 192.0.2.1}}]"
        );
        document(ISTIO, "ServiceEntry", "shop/outside", &spec)
    });
    prop_oneof![4 => own, 1 => alias, 1 => entry]
}

fn any_route(name: u8) -> impl Strategy<Value = String> {
    let vs = (namespace(), host(), export(), host(), 0..3_u8).prop_map(move |(ns, host, export, to, age)| {
        let spec = format!(
            "hosts: [{host}], exportTo: [{export}], http: [{{match: [{{uri: {{prefix: /a}}}}], directResponse: {{status: 299}}}}, {{route: [{{destination: {{host: {}}}}}]}}]",
            if to.starts_with('\'') { "web" } else { to }
        );
        aged(ISTIO, "VirtualService", &format!("{ns}/r{name}"), Some(age), &spec)
    });
    let dr = (namespace(), host(), export(), 1..9_u32, 0..3_u8).prop_map(move |(ns, host, export, max, age)| {
        let spec = format!(
            "host: {host}, exportTo: [{export}], trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: {max}}}}}}}, subsets: [{{name: v{max}, labels: {{v: v}}}}]"
        );
        aged(ISTIO, "DestinationRule", &format!("{ns}/r{name}"), Some(age), &spec)
    });
    let parent = select(vec![
        "group: '', kind: Service, name: web, namespace: shop",
        "group: networking.istio.io, kind: ServiceEntry, name: outside, namespace: shop",
    ]);
    let route = (namespace(), parent, select(vec!["web", "cart"]), 0..3_u8).prop_map(move |(ns, parent, backend, age)| {
        let spec = format!(
            "parentRefs: [{{{parent}}}], rules: [{{backendRefs: [{{name: {backend}, namespace: shop, port: 80}}]}}]"
        );
        aged(GATEWAY, "HTTPRoute", &format!("{ns}/r{name}"), Some(age), &spec)
    });
    let grant = namespace().prop_map(move |ns| {
        let spec = format!(
            "from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: {ns}}}], to: [{{group: '', kind: Service}}]"
        );
        document("gateway.networking.k8s.io/v1beta1", "ReferenceGrant", &format!("shop/r{name}"), &spec)
    });
    // Half of a VirtualService, and one that has such a half.
    let delegate = (200..210_u16).prop_map(move |status| {
        let spec =
            format!("http: [{{match: [{{uri: {{prefix: /a/b}}}}], directResponse: {{status: {status}}}}}]");
        aged(ISTIO, "VirtualService", "shop/half", None, &spec)
    });
    let root = (host(), 0..3_u8).prop_map(move |(host, age)| {
        let spec = format!("hosts: [{host}], http: [{{match: [{{uri: {{prefix: /a}}}}], delegate: {{name: half, namespace: shop}}}}]");
        aged(ISTIO, "VirtualService", &format!("shop/r{name}"), Some(age), &spec)
    });
    prop_oneof![3 => vs, 2 => dr, 2 => route, 1 => grant, 1 => delegate, 1 => root]
}

fn edit() -> impl Strategy<Value = Edit> {
    (0..8_u8).prop_flat_map(|file| {
        let text = if file < 3 { any_service().boxed() } else { any_route(file).boxed() };
        prop::option::weighted(0.8, text).prop_map(move |text| Edit { file, text })
    })
}

fn apply(index: &mut Index, edit: &Edit) {
    put(index, &format!("f{}.yaml", edit.file), edit.text.as_deref().unwrap_or_default());
}

fn compiled(edits: &[Edit]) -> Compiled {
    let mut index = Index::default();
    edits.iter().for_each(|edit| apply(&mut index, edit));
    Compiler::new(MeshSettings::default()).compile(&mut index)
}

fn routes_of(edits: &[Edit]) -> Arc<Routes> {
    Arc::clone(compiled(edits).snapshot.routes())
}

/// What clients of a namespace see, whoever else sees what: asked as a request asks, for an entry may stand under a
/// wildcard or, when somebody else has one of its own, under the host itself.
fn view(routes: &Routes, client: &str) -> String {
    let labels = Default::default();
    let hosts = ["web.shop", "cart.shop", "other.shop", "web.team", "web.private"];
    let hosts = hosts.map(|name| format!("{name}.svc.cluster.local")).into_iter();
    let hosts = hosts.chain(["out.example.com".to_owned(), "web".to_owned()]);
    let asked = hosts.flat_map(|host| [80, 81, 90].map(|port| (host.clone(), port)));
    let http = asked.map(|(host, port)| {
        let table = routes.http(&host, port).and_then(|table| table.get(client, &labels));
        (host, port, table)
    });
    let clusters =
        routes.clusters.iter().filter_map(|(at, cluster)| Some((at, cluster.get(client, &labels)?)));
    format!("{:#?}\n{:#?}", http.collect::<Vec<_>>(), clusters.collect::<Vec<_>>())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(100) })]

    /// Compiled at every step or once in the end, and whatever was there before: only what is there now counts.
    #[test]
    fn the_outcome_does_not_depend_on_the_order_of_events(edits in vec(edit(), 1..14)) {
        let mut index = Index::default();
        let mut compiler = Compiler::new(MeshSettings::default());
        let mut last = None;
        for edit in &edits {
            apply(&mut index, edit);
            last = Some(compiler.compile(&mut index));
        }
        let last = last.unwrap();
        let mut now: Vec<Edit> = Vec::new();
        for edit in edits.iter().rev() {
            if now.iter().all(|known| known.file != edit.file) {
                now.push(edit.clone());
            }
        }
        let whole = compiled(&now);
        prop_assert_eq!(last.snapshot.routes(), whole.snapshot.routes());
        prop_assert_eq!(&last.problems, &whole.problems);
        now.reverse();
        prop_assert_eq!(last.snapshot.routes(), &routes_of(&now));
        // The controller's agents have the same.
        prop_assert!(over_the_link(&last.snapshot).same_world(&last.snapshot));
    }

    /// What a namespace keeps to itself, others cannot tell from nothing.
    #[test]
    fn a_resource_that_is_not_exported_changes_nothing_for_others(
        edits in vec(edit(), 1..14),
        host in host(),
        age in 0..3_u8,
        kind in 0..2_u8,
    ) {
        let before = routes_of(&edits);
        let text = if kind == 0 {
            let spec = format!("hosts: [{host}], exportTo: [.], http: [{{directResponse: {{status: 298}}}}]");
            aged(ISTIO, "VirtualService", "private/p", Some(age), &spec)
        } else {
            let spec = format!("host: {host}, exportTo: [.], trafficPolicy: {{connectionPool: {{tcp: {{maxConnections: 99}}}}}}");
            aged(ISTIO, "DestinationRule", "private/p", Some(age), &spec)
        };
        let with = [edits, vec![Edit { file: 99, text: Some(text) }]].concat();
        let after = routes_of(&with);
        for client in ["shop", "team", "else", "istio-system", "nobody"] {
            prop_assert_eq!(view(&before, client), view(&after, client), "clients of {}", client);
        }
    }
}

#[test]
fn endpoints_that_come_and_go_cost_nothing_and_a_change_leaves_the_other_tables_as_they_are() {
    let rule = |status: u16, name: &str| {
        aged(
            ISTIO,
            "VirtualService",
            &format!("shop/{name}"),
            Some(1),
            &format!("hosts: [{name}], http: [{{directResponse: {{status: {status}}}}}]"),
        )
    };
    let mut index = Index::default();
    let mut compiler = Compiler::new(MeshSettings::default());
    put(
        &mut index,
        "s.yaml",
        &[service("shop/web", &["http:80"]), service("shop/cart", &["http:80"])].concat(),
    );
    put(&mut index, "a.yaml", &rule(201, "web"));
    put(&mut index, "b.yaml", &rule(201, "cart"));
    let first = compiler.compile(&mut index).snapshot;
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: shop}\nspec: {}\nstatus: {podIP: 10.0.0.1}\n";
    put(&mut index, "p.yaml", pod);
    let second = compiler.compile(&mut index).snapshot;
    assert!(!Arc::ptr_eq(&first, &second), "the pod is there");
    assert!(Arc::ptr_eq(first.routes(), second.routes()));
    put(&mut index, "b.yaml", &rule(202, "cart"));
    let third = compiler.compile(&mut index).snapshot;
    let table = |routes: &Routes, host: &str| {
        Arc::clone(
            routes.http(&format!("{host}.shop.svc.cluster.local"), 80).unwrap().default.as_ref().unwrap(),
        )
    };
    assert!(Arc::ptr_eq(&table(first.routes(), "web"), &table(third.routes(), "web")));
    assert!(!Arc::ptr_eq(&table(first.routes(), "cart"), &table(third.routes(), "cart")));
    // A document that moved within its file is named by its new place.
    put(
        &mut index,
        "b.yaml",
        &["---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n".to_owned(), rule(202, "cart")]
            .concat(),
    );
    let moved = compiler.compile(&mut index).snapshot;
    let rule = &table(moved.routes(), "cart").rules[0];
    assert_eq!(rule.origin.place.as_deref(), Some("b.yaml, document 2"));
}
