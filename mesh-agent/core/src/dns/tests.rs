//! Tables of questions and answers.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::snapshot::{Name, Parts};

fn endpoint(addr: &str, ready: bool, hostname: Option<&str>) -> Endpoint {
    Endpoint {
        addr: addr.parse().unwrap(),
        port: 8080,
        workload: None,
        ready,
        hostname: hostname.map(Into::into),
        traits: None,
    }
}

fn port(name: &str, port: u16, protocol: Protocol, endpoints: &[Endpoint]) -> ServicePort {
    ServicePort { name: name.into(), port, protocol, app_protocol: None, endpoints: endpoints.to_vec() }
}

fn external(name: &str, target: &str) -> Service {
    Service { external_name: Some(target.into()), ..Service::named(Name::new("default", name)) }
}

fn world() -> Snapshot {
    let db_endpoints = [
        endpoint("10.0.0.1", true, Some("db-0")),
        endpoint("10.0.0.2", false, Some("db-1")),
        endpoint("fd00::1", true, Some("db-0")),
        endpoint("10.0.0.9", true, None),
    ];
    let services = vec![
        Service {
            vips: vec!["10.96.0.1".parse().unwrap(), "fd96::1".parse().unwrap()],
            external_ips: vec!["192.0.2.1".parse().unwrap()],
            ports: vec![
                port("http", 80, Protocol::Tcp, &[endpoint("10.0.0.5", true, None)]),
                port("quic", 80, Protocol::Udp, &[]),
            ],
            ..Service::named(Name::new("default", "web"))
        },
        Service {
            headless: true,
            ports: vec![port("sql", 5432, Protocol::Tcp, &db_endpoints)],
            ..Service::named(Name::new("data", "db"))
        },
        Service {
            headless: true,
            publish_not_ready: true,
            ports: vec![port("", 0, Protocol::Tcp, &[endpoint("10.0.0.7", false, None)])],
            ..Service::named(Name::new("data", "peers"))
        },
        Service {
            headless: true,
            ports: vec![port("", 80, Protocol::Tcp, &[endpoint("10.0.0.8", false, None)])],
            ..Service::named(Name::new("data", "starting"))
        },
        Service { vips: vec!["10.96.0.2".parse().unwrap()], ..Service::named(Name::new("com", "github")) },
        external("docs", "Docs.Example.COM."),
        external("alias", "web.default.svc.cluster.local"),
        external("loop", "loop.default.svc.cluster.local"),
    ];
    Snapshot::new(1, Parts { services: services.into_iter().map(Arc::new).collect(), ..Parts::default() })
}

fn ask(qname: &str, qtype: QType) -> DnsAnswer {
    let world = world();
    answer(&world, &world.sight_from("default"), qname, qtype)
}

/// The answer as text: `name data` per record, or the kind of nothing.
fn text(answer: DnsAnswer) -> Vec<String> {
    let line = |r: Record| match r.data {
        RecordData::A(addr) => format!("{} {addr}", r.name),
        RecordData::Aaaa(addr) => format!("{} {addr}", r.name),
        RecordData::Cname(target) => format!("{} -> {target}", r.name),
        RecordData::Srv { port, target, .. } => format!("{} {target}:{port}", r.name),
    };
    match answer {
        DnsAnswer::Answer { records, additional } => records
            .into_iter()
            .map(line)
            .chain(additional.into_iter().map(|r| format!("+ {}", line(r))))
            .collect(),
        DnsAnswer::Alias { records, target } => {
            records.into_iter().map(line).chain([format!("ask {target}")]).collect()
        }
        other => vec![format!("{other:?}")],
    }
}

#[test]
fn names_get_the_answers_of_this_table() {
    use QType::{A, Aaaa, Cname, Other, Ptr, Srv};
    let full = "web.default.svc.cluster.local";
    let db = "db.data.svc.cluster.local";
    let table: &[(&str, QType, &[&str])] = &[
        // A service by its full name, both families; external addresses stay out.
        (full, A, &["web.default.svc.cluster.local 10.96.0.1"]),
        (full, Aaaa, &["web.default.svc.cluster.local fd96::1"]),
        ("WEB.Default.svc.Cluster.Local.", A, &["web.default.svc.cluster.local 10.96.0.1"]),
        (full, Other, &["NoData"]),
        (full, Cname, &["NoData"]),
        // Short forms, relative to the client's namespace.
        ("web", A, &["web 10.96.0.1"]),
        ("web.default", A, &["web.default 10.96.0.1"]),
        ("web.default.svc", A, &["web.default.svc 10.96.0.1"]),
        ("db", A, &["Forward"]),
        ("db.data", A, &["db.data 10.0.0.1", "db.data 10.0.0.9"]),
        ("github.com", A, &["github.com 10.96.0.2"]),
        ("api.github.com", A, &["Forward"]),
        ("db-0.db.data", A, &["Forward"]),
        // Only one family.
        ("github.com.svc.cluster.local", Aaaa, &["NoData"]),
        // Headless: ready endpoints, host names, dashed addresses.
        (db, A, &["db.data.svc.cluster.local 10.0.0.1", "db.data.svc.cluster.local 10.0.0.9"]),
        (db, Aaaa, &["db.data.svc.cluster.local fd00::1"]),
        ("db-0.db.data.svc.cluster.local", A, &["db-0.db.data.svc.cluster.local 10.0.0.1"]),
        ("db-0.db.data.svc.cluster.local", Aaaa, &["db-0.db.data.svc.cluster.local fd00::1"]),
        ("DB-0.db.data.svc.cluster.local", A, &["db-0.db.data.svc.cluster.local 10.0.0.1"]),
        ("10-0-0-9.db.data.svc.cluster.local", A, &["10-0-0-9.db.data.svc.cluster.local 10.0.0.9"]),
        ("10-0-0-9.db.data.svc.cluster.local", Aaaa, &["NoData"]),
        ("fd00--1.db.data.svc.cluster.local", Aaaa, &["fd00--1.db.data.svc.cluster.local fd00::1"]),
        ("db-1.db.data.svc.cluster.local", A, &["NxDomain"]),
        ("db-7.db.data.svc.cluster.local", A, &["NxDomain"]),
        ("a.b.c.db.data.svc.cluster.local", A, &["NxDomain"]),
        // Readiness.
        ("starting.data.svc.cluster.local", A, &["NxDomain"]),
        ("peers.data.svc.cluster.local", A, &["peers.data.svc.cluster.local 10.0.0.7"]),
        ("peers.data.svc.cluster.local", Srv, &["NoData"]),
        // Unknown names are another server's business.
        ("nope.default.svc.cluster.local", A, &["Forward"]),
        ("web.nope.svc.cluster.local", A, &["Forward"]),
        ("default.svc.cluster.local", A, &["Forward"]),
        ("svc.cluster.local", A, &["Forward"]),
        ("cluster.local", A, &["Forward"]),
        ("example.com", A, &["Forward"]),
        ("example.com.default.svc.cluster.local", A, &["Forward"]),
        ("1.0.96.10.in-addr.arpa", Ptr, &["Forward"]),
        ("", A, &["Forward"]),
        (".", A, &["Forward"]),
        ("..svc.cluster.local", A, &["Forward"]),
        // ExternalName.
        (
            "docs.default.svc.cluster.local",
            A,
            &["docs.default.svc.cluster.local -> docs.example.com", "ask docs.example.com"],
        ),
        ("docs", Aaaa, &["docs -> docs.example.com", "ask docs.example.com"]),
        ("docs.default.svc.cluster.local", Cname, &["docs.default.svc.cluster.local -> docs.example.com"]),
        ("x.docs.default.svc.cluster.local", A, &["NxDomain"]),
        (
            "alias.default.svc.cluster.local",
            A,
            &[
                "alias.default.svc.cluster.local -> web.default.svc.cluster.local",
                "web.default.svc.cluster.local 10.96.0.1",
            ],
        ),
        (
            "alias.default.svc.cluster.local",
            Other,
            &["alias.default.svc.cluster.local -> web.default.svc.cluster.local"],
        ),
        // Ports.
        (
            "_http._tcp.web.default.svc.cluster.local",
            Srv,
            &[
                "_http._tcp.web.default.svc.cluster.local web.default.svc.cluster.local:80",
                "+ web.default.svc.cluster.local 10.96.0.1",
                "+ web.default.svc.cluster.local fd96::1",
            ],
        ),
        ("_http._udp.web.default.svc.cluster.local", Srv, &["NxDomain"]),
        ("_http._tcp.web.default.svc.cluster.local", A, &["NoData"]),
        ("http.tcp.web.default.svc.cluster.local", Srv, &["NxDomain"]),
        (
            "_sql._tcp.db.data.svc.cluster.local",
            Srv,
            &[
                "_sql._tcp.db.data.svc.cluster.local 10-0-0-9.db.data.svc.cluster.local:8080",
                "_sql._tcp.db.data.svc.cluster.local db-0.db.data.svc.cluster.local:8080",
                "+ 10-0-0-9.db.data.svc.cluster.local 10.0.0.9",
                "+ db-0.db.data.svc.cluster.local 10.0.0.1",
                "+ db-0.db.data.svc.cluster.local fd00::1",
            ],
        ),
        ("github.com", Srv, &["NoData"]),
    ];
    for (qname, qtype, wanted) in table {
        assert_eq!(text(ask(qname, *qtype)), *wanted, "{qname} {qtype:?}");
    }
}

#[test]
fn a_short_question_for_ports_gets_full_targets() {
    let lines = text(ask("web.default", QType::Srv));
    assert_eq!(lines[0], "web.default web.default.svc.cluster.local:80");
}

#[test]
fn aliases_in_a_circle_end() {
    let DnsAnswer::Answer { records, .. } = ask("loop.default.svc.cluster.local", QType::A) else {
        panic!("an answer");
    };
    assert_eq!(records.len(), ALIAS_DEPTH_MAX);
}

#[test]
fn an_empty_snapshot_forwards_everything() {
    for qname in ["web", "web.default.svc.cluster.local", "", "svc", "a.svc."] {
        let empty = Snapshot::default();
        assert_eq!(answer(&empty, &empty.sight_from("default"), qname, QType::A), DnsAnswer::Forward);
    }
}

proptest! {
    #[test]
    fn any_text_is_answered_with_records_of_the_type_asked(
        qname in "([a-z_äß*0-9-]{0,4}\\.){0,6}(web|db|docs)?\\.?(default|data)?\\.?(svc)?\\.?(cluster.local)?\\.?",
        six in any::<bool>(),
    ) {
        let qtype = if six { QType::Aaaa } else { QType::A };
        if let DnsAnswer::Answer { records, .. } = ask(&qname, qtype) {
            prop_assert!(!records.is_empty());
            for record in records {
                let fits = match record.data {
                    RecordData::A(_) => !six,
                    RecordData::Aaaa(_) => six,
                    RecordData::Cname(_) => true,
                    RecordData::Srv { .. } => false,
                };
                prop_assert!(fits);
            }
        }
    }
}

/// A service of a host that Kubernetes does not know.
fn declared(namespace: &str, host: &str, vips: &[&str], endpoints: &[Endpoint]) -> Service {
    Service {
        hostname: Some(host.into()),
        vips: vips.iter().map(|vip| vip.parse().unwrap()).collect(),
        ports: vec![port("http", 80, Protocol::Tcp, endpoints)],
        ..Service::named(Name::new(namespace, host))
    }
}

#[test]
fn declared_hosts_lead_to_the_addresses_that_the_mesh_has_for_them() {
    let v4 = [endpoint("192.0.2.1", true, None)];
    let services = [
        declared("a", "api.x", &["240.240.0.1", "2001:2::1"], &v4),
        declared("b", "api.x", &["240.240.0.2"], &v4),
        declared("a", "nothing.yet", &["240.240.0.3", "2001:2::3"], &[]),
        declared("a", "elsewhere.x", &[], &v4),
        declared("a", "*.wild.x", &["10.9.9.9"], &v4),
        Service { external_name: Some("api.x".into()), ..Service::named(Name::new("a", "alias")) },
    ];
    let services = services.map(Arc::new).to_vec();
    let snapshot = Snapshot::new(1, Parts { services, ..Parts::default() });
    let ask = |namespace, name, qtype| match answer(&snapshot, &snapshot.sight_from(namespace), name, qtype) {
        DnsAnswer::Answer { records, .. } => {
            let data = records.into_iter().map(|record| match record.data {
                RecordData::A(addr) => addr.to_string(),
                RecordData::Aaaa(addr) => addr.to_string(),
                RecordData::Cname(target) => target,
                RecordData::Srv { .. } => "srv".to_owned(),
            });
            data.collect::<Vec<_>>().join(" ")
        }
        other => format!("{other:?}"),
    };
    use QType::{A, Aaaa, Other};
    assert_eq!(ask("a", "api.x", A), "240.240.0.1");
    assert_eq!(ask("a", "API.x.", A), "240.240.0.1");
    assert_eq!(ask("a", "api.x", Aaaa), "NoData", "no endpoint takes IPv6");
    assert_eq!(ask("b", "api.x", A), "240.240.0.2", "its own namespace's");
    assert_eq!(ask("a", "nothing.yet", Aaaa), "2001:2::3");
    assert_eq!(ask("a", "api.x", Other), "Forward", "others know the rest about it");
    assert_eq!(ask("a", "elsewhere.x", A), "Forward");
    assert_eq!(ask("a", "www.wild.x", A), "10.9.9.9");
    assert_eq!(ask("a", "wild.x", A), "Forward");
    assert_eq!(ask("a", "alias.a.svc.cluster.local", A), "api.x 240.240.0.1");
}
