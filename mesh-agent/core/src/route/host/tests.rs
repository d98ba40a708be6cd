//! Tests of authorities and of the names of services.

use super::*;
use crate::{
    route::{
        HostPort, Routes,
        http::{Action, HttpTable},
        scope::Scoped,
    },
    snapshot::{Name, Parts, ServicePort, Snapshot},
};

#[test]
fn authorities_fall_into_host_and_port() {
    let cases = [
        ("web", "web", None),
        ("web:80", "web", Some(80)),
        ("web:", "web", None),
        ("web.a.svc.cluster.local.:8080", "web.a.svc.cluster.local.", Some(8080)),
        ("10.0.0.1:80", "10.0.0.1", Some(80)),
        ("[fd00::1]", "[fd00::1]", None),
        ("[fd00::1]:80", "[fd00::1]", Some(80)),
        // No authorities, but never a panic and never a port by accident.
        ("fd00::1", "fd00::1", None),
        ("web:99999", "web:99999", None),
        ("web:+80", "web:+80", None),
        ("web:http", "web:http", None),
        ("[fd00::1", "[fd00::1", None),
        ("[fd00::1]x", "[fd00::1]x", None),
        ("[]:1", "[]", Some(1)),
        (":80", "", Some(80)),
        ("é:1", "é", Some(1)),
        ("", "", None),
    ];
    for (text, host, port) in cases {
        assert_eq!(Authority::parse(text), Authority { host, port }, "{text}");
    }
}

#[test]
fn s5_names_are_lower_case_and_have_no_trailing_dot() {
    assert_eq!(Authority::parse("Web.Example.:80").name(), "web.example");
    assert!(matches!(Authority::parse("web.example.").name(), Cow::Borrowed("web.example")));
    assert_eq!(Authority::parse("[FD00::1]:80").ip(), Some("fd00::1".parse().unwrap()));
    assert_eq!(Authority::parse("web").ip(), None);
}

fn snapshot(routed: &[&str]) -> Snapshot {
    let service = |namespace: &str, name: &str, vip: &str| {
        let port = ServicePort {
            name: "http".into(),
            port: 80,
            protocol: Protocol::Tcp,
            app_protocol: None,
            endpoints: Vec::new(),
        };
        Arc::new(Service {
            vips: vec![vip.parse().unwrap()],
            ports: vec![port],
            ..Service::named(Name::new(namespace, name))
        })
    };
    let table = Arc::new(HttpTable::new(Vec::new(), Action::Passthrough));
    let entry =
        |host: &&str| (HostPort { host: (*host).into(), port: 80 }, Scoped::everywhere(Arc::clone(&table)));
    let routes = Routes { http: routed.iter().map(entry).collect(), ..Routes::default() };
    let alias = |name: &str, target: &str| {
        let external_name = Some(target.into());
        Arc::new(Service { external_name, ..Service::named(Name::new("a", name)) })
    };
    let services = vec![
        alias("other", "Web.b.svc.cluster.local."),
        alias("outside", "example.com"),
        alias("loop", "loop.a.svc.cluster.local"),
        service("a", "web", "10.96.0.1"),
        service("b", "web", "10.96.0.2"),
        service("b", "api", "fd00::2"),
    ];
    Snapshot::new(1, Parts { services, routes: Arc::new(routes), ..Parts::default() })
}

#[test]
fn s7_every_alias_of_a_service_means_its_full_name() {
    let snapshot = snapshot(&[]);
    let cases = [
        ("web", Some("web.a.svc.cluster.local")),
        ("WEB:80", Some("web.a.svc.cluster.local")),
        ("web:8080", Some("web.a.svc.cluster.local")),
        ("web.b", Some("web.b.svc.cluster.local")),
        ("web.b.svc", Some("web.b.svc.cluster.local")),
        ("web.b.svc.cluster.local", Some("web.b.svc.cluster.local")),
        ("web.b.svc.cluster.local.:80", Some("web.b.svc.cluster.local")),
        ("10.96.0.2", Some("web.b.svc.cluster.local")),
        ("10.96.0.2:80", Some("web.b.svc.cluster.local")),
        ("[fd00::2]:80", Some("api.b.svc.cluster.local")),
        // Of another namespace, of nobody, or longer than any alias.
        ("api", None),
        ("web.c", None),
        ("web.b.pod", None),
        ("web.b.svc.cluster", None),
        ("x.web.b.svc.cluster.local", None),
        ("10.96.0.9", None),
        ("8.8.8.8", None),
        ("", None),
    ];
    for (authority, expected) in cases {
        let resolved = resolve(&snapshot.sight_from("a"), authority, 80);
        match expected {
            Some(host) => {
                assert_eq!(resolved.host, host, "{authority}");
                assert_eq!(Some(resolved.service.unwrap()), snapshot.sight_from("").service_by_host(host));
            }
            None => {
                assert_eq!(resolved.host, Authority::parse(authority).name(), "{authority}");
                assert_eq!(resolved.service, None, "{authority}");
            }
        }
    }
}

#[test]
fn s7_a_known_full_name_is_never_taken_for_an_alias() {
    let snapshot = snapshot(&["web.b"]);
    let resolved = resolve(&snapshot.sight_from("a"), "web.b", 80);
    assert_eq!((resolved.host.as_ref(), resolved.service), ("web.b", None));
    // At another port it is an alias as before.
    assert_eq!(resolve(&snapshot.sight_from("a"), "web.b", 81).host, "web.b.svc.cluster.local");
}

#[test]
fn b2_a_service_that_is_another_name_means_what_it_stands_for() {
    let snapshot = snapshot(&[]);
    for authority in ["other", "other.a", "other.a.svc.cluster.local"] {
        let resolved = resolve(&snapshot.sight_from("a"), authority, 80);
        assert_eq!(resolved.host, "web.b.svc.cluster.local", "{authority}");
        assert_eq!(resolved.service, snapshot.service_named("b", "web"));
    }
    let outside = resolve(&snapshot.sight_from("a"), "outside", 80);
    assert_eq!((outside.host.as_ref(), outside.service), ("example.com", None));
    assert_eq!(resolve(&snapshot.sight_from("a"), "loop", 80).host, "loop.a.svc.cluster.local");
}
