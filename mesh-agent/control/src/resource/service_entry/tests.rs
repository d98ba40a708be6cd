//! Tables of what users write in ServiceEntries and WorkloadEntries, right and wrong (S50 to S57).

use super::*;
use crate::{
    problem::Level,
    resource::{Resource, WorkloadEntry},
    source::document::{Known, Parsed, Rules, parse},
};

fn parsed(kind: &str, meta: &str, spec: &str, rest: &str) -> Parsed {
    let text = format!(
        "{{apiVersion: networking.istio.io/v1, kind: {kind}, metadata: {{name: e, namespace: shop{meta}}}, spec: {{{spec}}}{rest}}}"
    );
    parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new())
}

fn said(parsed: &Parsed) -> Vec<String> {
    let level = |level| if level == Level::Error { "E" } else { "W" };
    parsed.problems.iter().map(|p| format!("{} {}", level(p.level), p.field)).collect()
}

fn entry(spec: &str) -> ServiceEntry {
    let parsed = parsed("ServiceEntry", "", spec, "");
    assert_eq!(said(&parsed), Vec::<String>::new(), "{spec}: {:?}", parsed.problems);
    match &*parsed.resources[0].1 {
        Resource::ServiceEntry(entry) => (**entry).clone(),
        other => panic!("{other:?}"),
    }
}

/// Each has exactly these problems.
fn table(rows: &[(&str, &[&str])]) {
    for (spec, wanted) in rows {
        let parsed = parsed("ServiceEntry", "", spec, "");
        assert_eq!(said(&parsed), *wanted, "{spec}: {:?}", parsed.problems);
        let good = !wanted.iter().any(|w| w.starts_with('E'));
        assert_eq!(parsed.resources.len(), usize::from(good), "{spec}");
    }
}

const HTTPS: &str = "ports: [{number: 443, name: https, protocol: TLS}]";
const TCP: &str = "ports: [{number: 5432, name: sql, protocol: TCP}]";

#[test]
fn an_entry_is_read_as_it_is_written() {
    let read = entry(
        "hosts: [API.example.com., www.example.com], addresses: [10.1.0.0/16, 10.2.0.1], location: MESH_INTERNAL,
         ports: [{number: 80, name: web, protocol: http, targetPort: 8080}, {number: 443, name: tls, protocol: HTTPS}],
         resolution: STATIC, exportTo: ['.'], subjectAltNames: [spiffe://a/b],
         endpoints: [{address: 10.2.0.1, ports: {web: 8081}, labels: {version: v1}, locality: eu/a/b, weight: 3,
         serviceAccount: api, network: n2}, {address: 'fd00::1'}]",
    );
    assert_eq!(read.hosts, ["api.example.com".into(), "www.example.com".into()]);
    let addresses: Vec<String> = read.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.1.0.0/16", "10.2.0.1/32"]);
    assert!(read.internal && read.selector.is_none() && read.auto_allocate);
    assert_eq!(read.resolution, Resolution::Static);
    assert_eq!((read.ports[0].protocol, read.ports[0].target), (PortProtocol::Http, Some(8080)));
    assert_eq!(read.ports[1].protocol.app_protocol(), Some("https"));
    let export = read.export_to.unwrap();
    assert!(export.includes("shop", "shop") && !export.includes("bank", "shop"));
    let endpoint = &read.endpoints[0];
    assert_eq!(endpoint.address, EndpointAddress::Ip("10.2.0.1".parse().unwrap()));
    assert_eq!((endpoint.ports.get("web"), endpoint.weight), (Some(&8081), 3));
    assert_eq!(
        (endpoint.locality.as_deref(), endpoint.service_account.as_deref()),
        (Some("eu/a/b"), Some("api"))
    );
    assert_eq!(read.endpoints[1].weight, 1, "a weight that is not given");
}

#[test]
fn the_defaults_are_istios() {
    let read = entry(&format!("hosts: [a.example.com], {HTTPS}"));
    assert_eq!((read.resolution, read.internal), (Resolution::None, false));
    assert_eq!(read.export_to, None);
    let spec = "hosts: [a.example.com], ports: [{number: 1, name: a}]";
    assert_eq!(entry(spec).ports[0].protocol.app_protocol(), None, "looked at");
    let label = ", labels: {networking.istio.io/enable-autoallocate-ip: 'false'}";
    let status = ", status: {addresses: [{value: 240.240.0.1, host: a.example.com}, {value: x}]}";
    let parsed = parsed("ServiceEntry", label, spec, status);
    assert_eq!(parsed.problems, []);
    let Resource::ServiceEntry(read) = &*parsed.resources[0].1 else { panic!("{parsed:?}") };
    assert!(!read.auto_allocate);
    assert_eq!(read.allocated, [("a.example.com".into(), "240.240.0.1".parse().unwrap())]);
}

#[test]
fn older_versions_and_snake_case_are_read_alike() {
    let text = "{apiVersion: networking.istio.io/v1alpha3, kind: ServiceEntry, metadata: {name: e}, \
                spec: {hosts: [a.example.com], export_to: ['*'], ports: [{number: 1, name: a, protocol: TLS, target_port: 2}]}}";
    let parsed = parse("a.yaml".as_ref(), text, &Rules::default(), &Known::new());
    assert_eq!(parsed.problems, []);
    let Resource::ServiceEntry(read) = &*parsed.resources[0].1 else { panic!("{parsed:?}") };
    assert_eq!(read.ports[0].target, Some(2));
}

#[test]
fn hosts_are_names_and_never_everything() {
    table(&[
        (HTTPS, &["E spec.hosts"]),
        (&format!("hosts: [], {HTTPS}"), &["E spec.hosts"]),
        (&format!("hosts: ['*'], {HTTPS}"), &["E spec.hosts[0]"]),
        (&format!("hosts: ['*.example.com'], {HTTPS}"), &[]),
        (&format!("hosts: ['a.*.com', b.com], {HTTPS}"), &["E spec.hosts[0]"]),
        (&format!("hosts: ['a b', b.com], {HTTPS}"), &["E spec.hosts[0]"]),
        (&format!("hosts: [a.com, A.com], {HTTPS}"), &["W spec.hosts[1]"]),
        (&format!("hosts: [legacy], {HTTPS}"), &["W spec.hosts[0]"]),
        (&format!("hosts: a.com, {HTTPS}"), &["E spec.hosts", "E spec.hosts"]),
    ]);
}

#[test]
fn ports_are_unique_by_number_and_name() {
    let with = |ports: &str| format!("hosts: [a.com], ports: [{ports}]");
    table(&[
        ("hosts: [a.com]", &["W spec.ports"]),
        (&with("{name: a}"), &["E spec.ports[0].number"]),
        (&with("{number: 0, name: a}"), &["E spec.ports[0].number"]),
        (&with("{number: 65536, name: a}"), &["E spec.ports[0].number"]),
        (&with("{number: 1}"), &["E spec.ports[0].name"]),
        (&with("{number: 1, name: a_b}"), &["E spec.ports[0].name"]),
        (&with("{number: 1, name: a}, {number: 1, name: b}"), &["E spec.ports[1].number"]),
        (&with("{number: 1, name: a}, {number: 2, name: a}"), &["E spec.ports[1].name"]),
        (&with("{number: 1, name: a, protocol: SPDY}"), &["E spec.ports[0].protocol"]),
        (&with("{number: 1, name: a, targetPort: 70000}"), &["E spec.ports[0].targetPort"]),
        (&with("{number: 1, name: a, protcol: TCP}"), &["W spec.ports[0].protcol"]),
    ]);
}

#[test]
fn endpoints_are_what_the_resolution_takes() {
    let with =
        |resolution: &str, rest: &str| format!("hosts: [a.com], {HTTPS}, resolution: {resolution}{rest}");
    let one = ", endpoints: [{address: 10.0.0.1}]";
    let name = ", endpoints: [{address: b.com}]";
    let unix = ", endpoints: [{address: 'unix:///run/x'}]";
    let two = ", endpoints: [{address: b.com}, {address: c.com}]";
    table(&[
        (&with("NONE", one), &["E spec.endpoints"]),
        (&with("STATIC", one), &[]),
        (&with("STATIC", ""), &["W spec.endpoints"]),
        (&with("STATIC", name), &["E spec.endpoints[0].address"]),
        (&with("STATIC", unix), &["W spec.endpoints[0].address"]),
        (&with("DNS", one), &[]),
        (&with("DNS", name), &[]),
        (&with("DNS", ""), &[]),
        (&with("DNS", two), &[]),
        (&with("DNS", unix), &["W spec.endpoints[0].address", "E spec.endpoints[0].address"]),
        (&with("DNS_ROUND_ROBIN", name), &[]),
        (&with("DNS_ROUND_ROBIN", two), &["E spec.endpoints"]),
        (&with("DYNAMIC_DNS", ""), &["E spec.hosts[0]"]),
        (&with("RANDOM", ""), &["E spec.resolution"]),
    ]);
    let wild = |resolution: &str, rest: &str| with(resolution, rest).replace("a.com", "'*.a.com'");
    table(&[
        (&wild("DNS", ""), &["E spec.hosts[0]"]),
        (&wild("DNS_ROUND_ROBIN", ""), &["E spec.hosts[0]"]),
        (&wild("DNS", name), &[]),
        (&wild("STATIC", one), &[]),
        (&wild("DYNAMIC_DNS", ""), &[]),
        (&wild("DYNAMIC_DNS", ", location: MESH_INTERNAL"), &["E spec.location"]),
        (&wild("DYNAMIC_DNS", one), &["W spec.endpoints"]),
    ]);
}

#[test]
fn networks_go_with_none_and_static() {
    let with = |resolution: &str, address: &str| {
        format!(
            "hosts: [a.com], {TCP}, addresses: ['{address}'], resolution: {resolution}{}",
            if resolution == "STATIC" { ", endpoints: [{address: 10.0.0.1}]" } else { "" }
        )
    };
    table(&[
        (&with("NONE", "10.0.0.0/8"), &[]),
        (&with("STATIC", "10.0.0.0/8"), &[]),
        (&with("DNS", "10.0.0.0/8"), &["E spec.addresses[0]"]),
        (&with("DNS", "10.0.0.1"), &[]),
        (&with("NONE", "10.0.0"), &["E spec.addresses[0]", "W spec.ports[0]"]),
    ]);
}

#[test]
fn a_selector_stands_alone_and_is_for_the_mesh() {
    let selector = "workloadSelector: {labels: {app: a}}";
    let with = |rest: &str| format!("hosts: [a.com], {TCP}, {selector}, {rest}");
    table(&[
        (&with("location: MESH_INTERNAL, resolution: STATIC"), &[]),
        (&with("resolution: STATIC"), &["W spec.workloadSelector"]),
        (&with("location: MESH_INTERNAL"), &["W spec.workloadSelector", "W spec.ports[0]"]),
        (
            &with("location: MESH_INTERNAL, resolution: STATIC, endpoints: [{address: 10.0.0.1}]"),
            &["E spec.workloadSelector"],
        ),
    ]);
    let read = entry(&with("location: MESH_INTERNAL, resolution: STATIC"));
    assert_eq!(read.selector.unwrap().get("app").map(|v| &**v), Some("a"));
}

#[test]
fn several_hosts_want_protocols_that_name_them() {
    let with = |protocol: &str, rest: &str| {
        format!("hosts: [a.com, b.com], ports: [{{number: 1, name: a, protocol: {protocol}}}]{rest}")
    };
    for protocol in ["HTTP", "HTTP2", "GRPC", "HTTPS", "TLS"] {
        table(&[(&with(protocol, ", resolution: DNS"), &[])]);
    }
    for protocol in ["TCP", "MONGO", "''"] {
        table(&[
            (&with(protocol, ", resolution: DNS"), &["E spec.ports[0].protocol"]),
            (&with(protocol, ", resolution: NONE, addresses: [10.0.0.1]"), &[]),
        ]);
    }
}

#[test]
fn s52_a_port_that_takes_everything_is_warned_about() {
    table(&[
        (&format!("hosts: ['*.a.com'], {TCP}"), &["W spec.ports[0]"]),
        (&format!("hosts: ['*.a.com'], {TCP}, addresses: [10.0.0.1]"), &[]),
        (&format!("hosts: ['*.a.com'], {HTTPS}"), &[]),
    ]);
}

#[test]
fn endpoints_are_checked_as_workload_entries_are() {
    let with =
        |endpoint: &str| format!("hosts: [a.com], {TCP}, resolution: DNS, endpoints: [{{{endpoint}}}]");
    table(&[
        (&with("address: '*.b.com'"), &["E spec.endpoints[0].address"]),
        (&with(""), &["E spec.endpoints[0].address"]),
        (&with("network: n2"), &["W spec.endpoints[0].network"]),
        (&with("address: b.com, ports: {sql: 70000}"), &["E spec.endpoints[0].ports.sql"]),
        (&with("address: b.com, ports: {web: 80}"), &["E spec.endpoints[0].ports.web"]),
        (&with("address: b.com, weight: -1"), &["E spec.endpoints[0].weight"]),
        (&with("address: b.com, locality: eu//b"), &["E spec.endpoints[0].locality"]),
        (&with("address: b.com, labels: {'a b': c}"), &["E spec.endpoints[0].labels.a b"]),
    ]);
}

fn workload(meta: &str, spec: &str, rest: &str) -> (Vec<String>, Option<WorkloadEntry>) {
    let parsed = parsed("WorkloadEntry", meta, spec, rest);
    let read = parsed.resources.first().map(|(_, resource)| match &**resource {
        Resource::WorkloadEntry(entry) => (**entry).clone(),
        other => panic!("{other:?}"),
    });
    (said(&parsed), read)
}

#[test]
fn a_workload_has_the_labels_of_both_places_and_its_health() {
    let meta = ", labels: {app: a, version: v0}";
    let status = |text: &str| format!(", status: {{conditions: [{{type: Healthy, status: '{text}'}}]}}");
    let (said, read) = workload(meta, "address: 10.0.0.1, labels: {version: v1}", &status("False"));
    let read = read.unwrap();
    assert_eq!((said, read.healthy), (Vec::new(), Some(false)));
    let labels: Vec<_> = read.endpoint.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    assert_eq!(labels, ["app=a", "version=v1"], "those of the spec win");
    let health = |text: &str| workload("", "address: 10.0.0.1", &status(text)).1.unwrap().healthy;
    assert_eq!((health("True"), health("Unknown")), (Some(true), None));
    assert_eq!(workload("", "", "").0, ["E spec.address"]);
    assert_eq!(workload("", "address: 'unix://run/x'", "").0, ["E spec.address"]);
    assert_eq!(
        workload("", "address: 'unix:///run/x', ports: {a: 1}", "").0,
        ["W spec.address", "E spec.ports"]
    );
    assert_eq!(workload("", "address: 10.0.0.1, wieght: 1", "").0, ["W spec.wieght"]);
    let name = workload("", "address: VM.example.com.", "").1.unwrap().endpoint.address;
    assert_eq!(name, EndpointAddress::Name("vm.example.com".into()));
}
