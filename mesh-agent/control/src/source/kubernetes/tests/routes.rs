//! Tests of what becomes of routes of the Gateway API: what their parents say, and whose they are.

use mesh_core::{
    route::{
        HostPort,
        http::{Action, Backend, WeightedBackend},
    },
    snapshot::{Name, Snapshot},
};
use serde_json::{Value, json};

use super::{put, shop, world_of};
use crate::{
    problem::Level,
    resource::{Key, Kind},
    source::kubernetes::{Verdict, world::State},
};

fn verdict(state: &State, kind: Kind) -> Verdict {
    let key = Key { kind, name: Name::new("shop", "web") };
    state.judged.as_ref().unwrap().objects[&key].1.clone()
}

fn service(name: &str, spec: Value) -> Value {
    let (namespace, name) = name.split_once('/').unwrap();
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace}, "spec": spec})
}

/// A route of some kind called web, with one rule.
fn route(kind: Kind, parent: &Value, backend: &Value) -> Value {
    json!({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind.as_str(),
        "metadata": {"name": "web", "namespace": "shop", "uid": "uid-r", "generation": 1, "resourceVersion": "1"},
        "spec": {"parentRefs": [parent], "rules": [{"backendRefs": [backend]}]}})
}

fn parent(name: &str, more: Value) -> Value {
    let mut reference = json!({"group": "", "kind": "Service", "name": name});
    reference.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    reference
}

fn entry(name: &str) -> Value {
    json!({"group": "networking.istio.io", "kind": "ServiceEntry", "name": name})
}

/// The shop, beside services of every protocol and with other names.
fn street() -> Vec<Value> {
    let mut objects = shop();
    objects.remove(6);
    let port = |name: &str, number: u16| json!({"name": name, "port": number});
    objects.extend([
        service("data/db", json!({"clusterIP": "10.96.0.2", "ports": [port("sql", 5432)]})),
        service(
            "shop/mixed",
            json!({"clusterIP": "10.96.0.3", "ports": [port("http", 80), port("https", 443), port("any", 90),
                port("tcp-x", 91), {"name": "ws", "port": 92, "appProtocol": "kubernetes.io/wss"}, port("db", 3306),
                {"name": "dns", "port": 53, "protocol": "UDP"}]}),
        ),
        service("shop/bare", json!({"clusterIP": "None"})),
        service("shop/alias", json!({"type": "ExternalName", "externalName": "web.shop.svc.cluster.local"})),
        service("shop/out", json!({"type": "ExternalName", "externalName": "www.example.com"})),
        service("shop/out80", json!({"type": "ExternalName", "externalName": "www.example.com", "ports": [port("http", 80)]})),
        json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "again", "namespace": "shop"},
            "spec": {"hosts": ["web.shop.svc.cluster.local"], "resolution": "STATIC",
                "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}], "endpoints": [{"address": "192.0.2.1"}]}}),
        json!({"apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry", "metadata": {"name": "wide", "namespace": "shop"},
            "spec": {"hosts": ["*.example.com"], "ports": [{"number": 443, "name": "tls", "protocol": "TLS"}]}}),
    ]);
    objects
}

fn judged(kind: Kind, parent: &Value, backend: &Value) -> State {
    let mut objects = street();
    objects.push(route(kind, parent, backend));
    world_of(&objects).compile()
}

/// Reasons why the route is not accepted at its parent, and why a reference of it leads nowhere; and both messages.
fn said(kind: Kind, parent: &Value, backend: &Value) -> ([Option<&'static str>; 2], String) {
    let at = verdict(&judged(kind, parent, backend), kind).parents.remove(0);
    let both = [at.not_accepted, at.unresolved];
    let messages: Vec<String> = both.iter().flatten().map(|(_, message)| message.clone()).collect();
    (both.map(|one| one.map(|(reason, _)| reason)), messages.join("; "))
}

fn good() -> Value {
    json!({"name": "web", "port": 80})
}

#[test]
fn s116_a_route_is_accepted_exactly_where_the_compiler_makes_a_table_of_it() {
    let port = |number: u16| parent("mixed", json!({"port": number}));
    let http = [Kind::HttpRoute, Kind::GrpcRoute];
    let streams = [Kind::TlsRoute, Kind::TcpRoute];
    let rows: Vec<(Value, &[Kind], Option<&str>)> = vec![
        (parent("web", json!({})), &http, Some("speaks HTTP at port 80, and")),
        (parent("web", json!({"sectionName": ""})), &http, Some("speaks HTTP at port 80, and")),
        (parent("mixed", json!({})), Kind::ALL, None),
        (port(80), &http, Some("speaks HTTP at port 80, and")),
        (port(443), &streams, Some("speaks TLS at port 443, and")),
        (port(90), Kind::ALL, None),
        (port(91), &streams, Some("speaks TCP at port 91, and")),
        (port(92), &streams, Some("speaks TLS at port 92, and")),
        (port(3306), &streams, Some("speaks TCP at port 3306, and")),
        (port(53), &[], Some("speaks UDP at port 53, and")),
        (port(81), &[], Some("Service shop/mixed has no port 81")),
        (parent("mixed", json!({"sectionName": "grpc"})), &[], Some("has no port called \"grpc\"")),
        (
            parent("mixed", json!({"port": 80, "sectionName": "any"})),
            &[],
            Some("has no port 80 called \"any\""),
        ),
        (parent("bare", json!({})), &[], Some("Service shop/bare has no ports")),
        (parent("gone", json!({})), &[], Some("Service shop/gone does not exist")),
        (parent("alias", json!({})), &[], Some("another name (ExternalName) of Service shop/web")),
        (parent("out", json!({})), &[], Some("Service shop/out has no ports")),
        (parent("out80", json!({})), &http, Some("speaks HTTP at port 80")),
        (entry("api"), &http, Some("speaks HTTP at port 80, and")),
        (entry("wide"), &streams, Some("speaks TLS at port 443, and")),
        (entry("again"), &[], Some("no host but those of Services")),
        (entry("gone"), &[], Some("ServiceEntry shop/gone does not exist")),
    ];
    for kind in http.into_iter().chain(streams) {
        for (parent, accepted_of, why) in &rows {
            let state = judged(kind, parent, &good());
            let at = verdict(&state, kind).parents.remove(0);
            let is_wanted = accepted_of.contains(&kind);
            match &at.not_accepted {
                None => assert!(is_wanted, "{kind} {parent}"),
                Some((reason, message)) => {
                    assert!(!is_wanted && *reason == "NoMatchingParent", "{kind} {parent}: {message}");
                    assert!(message.contains(why.unwrap()), "{kind} {parent}: {message}");
                }
            }
            assert_eq!(tables(&state.snapshot, kind) > 0, is_wanted, "{kind} {parent}");
        }
    }
}

/// How many tables have a rule of a route of this kind.
fn tables(snapshot: &Snapshot, kind: Kind) -> usize {
    let routes = snapshot.routes();
    let is_own = |of: &str| of == kind.as_str();
    let http = routes.http.values().filter_map(|table| table.get("shop", &Default::default()));
    let streams = routes.streams.values().filter_map(|table| table.get("shop", &Default::default()));
    http.filter(|table| table.rules.iter().any(|rule| is_own(&rule.origin.kind))).count()
        + streams
            .filter(|table| table.tls.iter().chain(&table.tcp).any(|rule| is_own(&rule.origin.kind)))
            .count()
}

/// What the compiler made of the route's only backend at port 80 of web.
fn compiled(snapshot: &Snapshot) -> Option<String> {
    let at = HostPort { host: "web.shop.svc.cluster.local".into(), port: 80 };
    let table = snapshot.routes().http.get(&at)?.get("shop", &Default::default())?;
    match &table.rules.first()?.action {
        Action::Forward(backends) => match &backends[..] {
            [WeightedBackend { backend: Backend::Broken { reason, .. }, .. }] => Some(reason.to_string()),
            _ => None,
        },
        other => panic!("{other:?}"),
    }
}

#[test]
fn s116_a_reference_leads_somewhere_exactly_if_the_compiler_makes_a_cluster_of_it() {
    let web = parent("web", json!({}));
    let hostname = |host: &str, port: Option<u16>| {
        let mut named = json!({"group": "networking.istio.io", "kind": "Hostname", "name": host});
        named["port"] = port.into();
        named
    };
    let of_entry = |name: &str, port: Option<u16>| {
        let mut named = entry(name);
        named["port"] = port.into();
        named
    };
    for (backend, wanted, message) in [
        (good(), None, ""),
        (json!({"name": "mixed", "port": 443}), None, ""),
        (json!({"name": "gone", "port": 80}), Some("BackendNotFound"), "Service shop/gone does not exist"),
        (json!({"name": "web", "port": 81}), Some("BackendNotFound"), "Service shop/web has no port 81"),
        (
            json!({"name": "mixed", "port": 53}),
            Some("UnsupportedProtocol"),
            "port 53 of Service shop/mixed is UDP",
        ),
        // The ports of a service are those of its other names.
        (json!({"name": "alias", "port": 80}), None, ""),
        (json!({"name": "alias", "port": 81}), Some("BackendNotFound"), "Service shop/alias has no port 81"),
        (json!({"name": "out", "port": 443}), None, ""),
        (json!({"name": "out80", "port": 443}), Some("BackendNotFound"), "has no port 443"),
        (
            json!({"group": "example.com", "kind": "Bucket", "name": "web"}),
            Some("InvalidKind"),
            "example.com/Bucket",
        ),
        (
            json!({"name": "db", "namespace": "data", "port": 5432}),
            Some("RefNotPermitted"),
            "no ReferenceGrant",
        ),
        // What does not exist is said only to those who may ask.
        (
            json!({"name": "gone", "namespace": "data", "port": 5432}),
            Some("RefNotPermitted"),
            "no ReferenceGrant",
        ),
        (of_entry("api", None), None, ""),
        (of_entry("api", Some(81)), Some("BackendNotFound"), "ServiceEntry shop/api has no port 81"),
        (of_entry("gone", None), Some("BackendNotFound"), "ServiceEntry shop/gone does not exist"),
        (hostname("api.example.com", None), None, ""),
        (
            hostname("api.example.com", Some(81)),
            Some("BackendNotFound"),
            "the host api.example.com has no port 81",
        ),
        (hostname("db.data.svc.cluster.local", Some(5432)), None, ""),
        // Several ports, and the one that is dialled is among them or not.
        (hostname("mixed.shop.svc.cluster.local", None), None, ""),
        (hostname("mixed.shop.svc.cluster.local", Some(53)), Some("UnsupportedProtocol"), "is UDP"),
        (
            hostname("nobody.example.org", Some(80)),
            Some("BackendNotFound"),
            "no service has the host nobody.example.org",
        ),
        // A wildcard makes no service of each host that it covers.
        (
            hostname("www.example.com", Some(443)),
            Some("BackendNotFound"),
            "no service has the host www.example.com",
        ),
    ] {
        let state = judged(Kind::HttpRoute, &web, &backend);
        let ([not_accepted, unresolved], said) = said(Kind::HttpRoute, &web, &backend);
        assert_eq!((not_accepted, unresolved), (None, wanted), "{backend}: {said}");
        assert!(said.contains(message), "{backend}: {said}");
        let compiled = compiled(&state.snapshot);
        assert_eq!(compiled.is_some(), wanted.is_some(), "{backend}: {compiled:?}");
    }
    let at_90 = parent("mixed", json!({"port": 90}));
    let web_by_host = hostname("db.data.svc.cluster.local", None);
    assert_eq!(said(Kind::HttpRoute, &at_90, &web_by_host).0, [None, None], "its only port");
    let mixed = hostname("mixed.shop.svc.cluster.local", None);
    assert_eq!(said(Kind::HttpRoute, &entry("api"), &mixed).0, [None, None], "dialled is 80");
    let consumer = parent("db", json!({"namespace": "data"}));
    let own = json!({"name": "db", "namespace": "data", "port": 5432});
    assert_eq!(said(Kind::HttpRoute, &consumer, &own).0, [None, None]);
    let (reasons, message) = said(Kind::HttpRoute, &consumer, &mixed);
    assert_eq!(reasons, [None, Some("BackendNotFound")], "dialled is 5432: {message}");
}

/// What is said of a route with these rules at its only parent: not accepted, unresolved, partly.
fn of_rules(kind: Kind, rules: Value) -> [Option<String>; 3] {
    let mut objects = street();
    let mut object = route(kind, &parent("web", json!({})), &good());
    object["spec"]["rules"] = rules;
    objects.push(object);
    let at = verdict(&world_of(&objects).compile(), kind).parents.remove(0);
    let text = |one: Option<(&str, String)>| one.map(|(reason, message)| format!("{reason}: {message}"));
    [text(at.not_accepted), text(at.unresolved), at.partial]
}

#[test]
fn s116_of_a_route_nothing_of_which_is_carried_out_nothing_is_accepted() {
    let extension = json!({"type": "ExtensionRef", "extensionRef": {"group": "example.com", "kind": "Limit", "name": "l"}});
    let auth = json!({"type": "ExternalAuth", "externalAuth": {}});
    let with = |filters: Value| json!({"filters": filters, "backendRefs": [good()]});
    let rewrite = json!({"type": "URLRewrite", "urlRewrite": {"hostname": "a.example.com"}});
    let backend = |weight: u32, filters: Value| json!({"name": "web", "port": 80, "weight": weight, "filters": filters});
    let unknown = "InvalidKind: spec.rules[0] refers to a example.com/Limit, which is no kind of filter that the mesh has";
    let at = |field: &str, filter: &str| {
        format!(
            "{field} has {filter}, which the mesh does not carry out there: its requests are answered with 500"
        )
    };
    let http = |rules: Value| of_rules(Kind::HttpRoute, rules);
    let refused = |text: String| Some(format!("UnsupportedValue: {text}"));

    assert_eq!(http(json!([with(json!([]))])), [None, None, None]);
    assert_eq!(
        http(json!([with(json!([auth]))])),
        [refused(at("spec.rules[0]", "ExternalAuth")), None, None]
    );
    assert_eq!(
        http(json!([with(json!([extension])), with(json!([auth]))])),
        [
            refused(at("spec.rules[0]", "ExtensionRef") + "; " + &at("spec.rules[1]", "ExternalAuth")),
            Some(unknown.to_owned()),
            None
        ]
    );
    assert_eq!(
        http(json!([with(json!([])), with(json!([auth]))])),
        [None, None, Some(at("spec.rules[1]", "ExternalAuth"))],
        "the other rule is carried out"
    );
    // A share of a rule is not all of it, unless no other gets anything.
    let shares =
        |weight: u32| json!([{"backendRefs": [backend(weight, json!([])), backend(1, json!([rewrite]))]}]);
    let lost = at("spec.rules[0].backendRefs[1]", "URLRewrite");
    assert_eq!(http(shares(1)), [None, None, Some(lost.clone())]);
    assert_eq!(http(shares(0)), [refused(lost), None, None]);
    let [grpc, unresolved, partial] = of_rules(Kind::GrpcRoute, json!([with(json!([extension]))]));
    assert!(grpc.is_some_and(|text| text.ends_with("answered with UNAVAILABLE")));
    assert_eq!((unresolved.as_deref(), partial), (Some(unknown), None));
}

#[test]
fn s116_what_is_in_force_is_known_by_its_generation() {
    let mut objects = shop();
    let mut world = world_of(&objects);
    let generations = |state: &State| {
        let verdict = verdict(state, Kind::HttpRoute);
        (verdict.is_refused(), verdict.in_force, verdict.good_generation)
    };
    assert_eq!(generations(&world.compile()), (false, true, Some(3)));
    objects[6]["spec"]["rules"][0]["backendRefs"][0]["port"] = json!(70_000);
    for generation in [4, 5] {
        objects[6]["metadata"]["generation"] = json!(generation);
        world.apply(put(&objects[6]));
        assert_eq!(generations(&world.compile()), (true, true, Some(3)));
    }
    let fresh = world_of(&objects).compile();
    assert_eq!(
        generations(&fresh),
        (true, false, None),
        "without a state before there is none to fall back to"
    );
}

#[test]
fn what_is_wrong_with_a_route_of_others_is_theirs_to_say_and_it_takes_the_meshs_out_of_force() {
    let gateway = json!({"name": "edge"});
    let in_force = |state: &State| tables(&state.snapshot, Kind::HttpRoute) > 0;
    let problems = |state: &State| {
        let found = verdict(state, Kind::HttpRoute).problems;
        // Agents and `meshctl status` hear the same.
        let told = state.status.errors.len() + state.status.warnings.len();
        assert_eq!(told, found.len(), "{:?}", state.status);
        found.into_iter().map(|problem| (problem.level, problem.field)).collect::<Vec<_>>()
    };
    // No regular expression of ours, and no filter either.
    let newer = json!([{"matches": [{"path": {"type": "RegularExpression", "value": "^/(?!api).*"}}],
        "filters": [{"type": "OfNextYear"}], "backendRefs": [good()]}]);
    let mut objects = shop();
    let mut world = world_of(&objects);
    assert!(in_force(&world.compile()));
    let mut apply = |parents: Value, rules: &Value| {
        objects[6]["spec"] = json!({"parentRefs": parents, "rules": rules});
        let generation = objects[6]["metadata"]["generation"].as_i64().unwrap() + 1;
        objects[6]["metadata"]["generation"] = json!(generation);
        world.apply(put(&objects[6]));
        world.compile()
    };
    let plain = json!([{"backendRefs": [good()]}]);
    // Beside a Gateway: that this one is for others is nothing wrong.
    let both = apply(json!([gateway, parent("web", json!({}))]), &plain);
    assert_eq!((problems(&both), in_force(&both)), (vec![], true));
    let broken = apply(json!([gateway, parent("web", json!({}))]), &newer);
    let fields = problems(&broken);
    assert!(fields.len() == 2 && fields.iter().all(|(level, _)| *level == Level::Error), "{fields:?}");
    assert!(in_force(&broken), "what it said before");
    let theirs = apply(json!([gateway]), &newer);
    assert_eq!((problems(&theirs), in_force(&theirs)), (vec![], false));
    assert!(theirs.status.files_kept_back.is_empty());
    // Nobody's: said, and no error.
    assert!(in_force(&apply(json!([parent("web", json!({}))]), &plain)));
    let nobodys = apply(json!([]), &newer);
    let fields = problems(&nobodys);
    assert!(fields.len() == 3 && fields.iter().all(|(level, _)| *level == Level::Warning), "{fields:?}");
    assert!(!in_force(&nobodys));
}
