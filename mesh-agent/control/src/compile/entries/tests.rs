//! Tests of services that ServiceEntries make: from manifests to the snapshot, on both ways to an agent.

use std::collections::BTreeSet;

use mesh_core::{
    dns::{DnsAnswer, QType, RecordData, answer},
    snapshot::{Service, Snapshot},
};

use super::*;
use crate::compile::{
    Compiled, Compiler, MeshSettings,
    tests::{over_the_link, put},
};

fn compile(documents: &[String]) -> Compiled {
    let mut index = Index::default();
    put(&mut index, "a.yaml", &documents.concat());
    let compiled = Compiler::new(MeshSettings::default()).compile(&mut index);
    assert!(over_the_link(&compiled.snapshot).same_world(&compiled.snapshot), "{documents:?}");
    compiled
}

/// `NAMESPACE/NAME`, perhaps with the second of 2026 that it was created at (`ns/name@3`).
fn entry(name: &str, spec: &str) -> String {
    resource("networking.istio.io/v1", "ServiceEntry", name, "", spec)
}

fn resource(api: &str, kind: &str, name: &str, labels: &str, spec: &str) -> String {
    let (name, second) = name.split_once('@').unwrap_or((name, ""));
    let created = match second {
        "" => String::new(),
        second => format!(", creationTimestamp: \"2026-01-01T00:00:0{second}Z\""),
    };
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "---\napiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}{created}}}\nspec: {{{spec}}}\n"
    )
}

fn workload(name: &str, spec: &str) -> String {
    resource("networking.istio.io/v1", "WorkloadEntry", name, "", spec)
}

fn pod(name: &str, labels: &str, addr: &str) -> String {
    let pod = resource("v1", "Pod", name, labels, "");
    format!("{pod}status: {{podIP: {addr}}}\n")
}

fn service<'a>(snapshot: &'a Snapshot, namespace: &str, host: &str) -> &'a Service {
    snapshot.service(&Name::new(namespace, host)).unwrap_or_else(|| panic!("no {namespace}/{host}"))
}

fn shown(service: &Service, port: usize) -> String {
    let one = |endpoint: &Endpoint| {
        let unready = if endpoint.ready { "" } else { " unready" };
        format!("{}{unready}", endpoint.socket_addr())
    };
    service.ports[port].endpoints.iter().map(one).collect::<Vec<_>>().join(", ")
}

const WEB: &str = "ports: [{name: http, number: 80, protocol: HTTP}]";

#[test]
fn s54_static_endpoints_listen_at_their_own_port_else_the_target_else_the_same() {
    let compiled = compile(&[entry(
        "shop/ext",
        "hosts: [Api.Example.COM], resolution: STATIC, location: MESH_EXTERNAL,
         ports: [{name: http, number: 80, protocol: HTTP, targetPort: 8080}, {name: tls, number: 443, protocol: TLS}],
         endpoints: [{address: 192.0.2.1}, {address: 192.0.2.2, ports: {http: 81, tls: 444}, weight: 3,
                      labels: {v: b}, locality: r/z, network: net}, {address: 'fd00::2'}]",
    )]);
    let service = service(&compiled.snapshot, "shop", "api.example.com");
    assert_eq!(shown(service, 0), "192.0.2.1:8080, 192.0.2.2:81, [fd00::2]:8080");
    assert_eq!(shown(service, 1), "192.0.2.1:443, 192.0.2.2:444, [fd00::2]:443");
    assert_eq!(service.hostname.as_deref(), Some("api.example.com"));
    assert!(service.external && service.resolution == Resolution::Listed);
    let protocols: Vec<_> = service.ports.iter().map(|port| port.app_protocol.as_deref().unwrap()).collect();
    assert_eq!(protocols, ["http", "tls"]);
    let traits = service.ports[0].endpoints[1].traits.as_deref().unwrap();
    assert_eq!(
        (traits.weight, traits.locality.as_deref(), traits.network.as_deref()),
        (3, Some("r/z"), Some("net"))
    );
    assert_eq!(traits.labels.get("v").map(|v| &**v), Some("b"));
    assert!(service.ports[0].endpoints[0].traits.is_none());
    assert!(compiled.problems.is_empty(), "{:?}", compiled.problems);
}

#[test]
fn b4_a_host_without_address_is_given_one_of_each_family_and_keeps_it() {
    let spec = |host: &str| format!("hosts: [{host}], resolution: DNS, {WEB}");
    let alone = compile(&[entry("shop/a", &spec("a.example.com"))]);
    let vips = &service(&alone.snapshot, "shop", "a.example.com").vips;
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = vips[..] else { panic!("{vips:?}") };
    assert_eq!(v4.octets()[..2], [240, 240]);
    assert!(!matches!(v4.octets()[3], 0 | 255));
    assert_eq!(v6.segments()[..3], [0x2001, 2, 0]);

    let many: Vec<String> =
        (0..400).map(|n| entry(&format!("shop/a{n}@5"), &spec(&format!("h{n}.example.com")))).collect();
    let first = entry("shop/a@1", &spec("a.example.com"));
    let crowd = compile(&[many.clone(), vec![first]].concat());
    assert_eq!(service(&crowd.snapshot, "shop", "a.example.com").vips, *vips, "the oldest keeps its address");
    let all: BTreeSet<IpAddr> = crowd.snapshot.services().flat_map(|service| service.vips.clone()).collect();
    assert_eq!(all.len(), 2 * 401, "nobody shares an address");
}

#[test]
fn b4_no_address_is_given_where_one_is_written_or_none_is_wanted() {
    let opted_out = resource(
        "networking.istio.io/v1",
        "ServiceEntry",
        "shop/out",
        "networking.istio.io/enable-autoallocate-ip: 'false'",
        &format!("hosts: [out.x.com], resolution: DNS, {WEB}"),
    );
    let given = entry("shop/given", &format!("hosts: [given.x.com], resolution: DNS, {WEB}"));
    let given = format!("{given}status: {{addresses: [{{value: 240.240.7.7, host: given.x.com}}]}}\n");
    let compiled = compile(&[
        entry(
            "shop/own",
            &format!(
                "hosts: [own.x.com], addresses: [10.9.0.1, 10.8.0.0/16], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}], {WEB}"
            ),
        ),
        entry("shop/none", &format!("hosts: [none.x.com], resolution: NONE, {WEB}")),
        entry(
            "shop/wild",
            &format!("hosts: ['*.w.com'], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}], {WEB}"),
        ),
        opted_out,
        given,
    ]);
    let vips = |host| {
        let vips = &service(&compiled.snapshot, "shop", host).vips;
        vips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(vips("own.x.com"), "10.9.0.1");
    assert_eq!(service(&compiled.snapshot, "shop", "own.x.com").networks[0].to_string(), "10.8.0.0/16");
    assert_eq!((vips("none.x.com"), vips("*.w.com"), vips("out.x.com")), Default::default());
    assert_eq!(vips("given.x.com"), "240.240.7.7");
    let warned: Vec<&str> = compiled.problems.iter().map(|problem| &*problem.field).collect();
    assert_eq!(warned, ["spec.addresses[1]"]);
}

#[test]
fn s51_names_are_left_to_the_agents_and_without_endpoints_each_host_is_its_own_name() {
    let compiled = compile(&[
        entry("shop/a", &format!("hosts: [a.x.com, b.x.com], resolution: DNS, {WEB}")),
        entry("shop/c", "hosts: [c.x.com], resolution: DNS_ROUND_ROBIN, endpoints: [{address: real.x.com, ports: {http: 81}}],
             ports: [{name: http, number: 80, protocol: HTTP}]"),
        entry("shop/d", &format!("hosts: ['*.d.com'], resolution: DNS, endpoints: [{{address: 192.0.2.1}}, {{address: d.x.com}}], {WEB}")),
    ]);
    let dns = |host| match &service(&compiled.snapshot, "shop", host).resolution {
        Resolution::Dns(dns) => dns.clone(),
        other => panic!("{other:?}"),
    };
    for host in ["a.x.com", "b.x.com"] {
        let dns = dns(host);
        assert!(!dns.one_at_a_time);
        assert_eq!((&*dns.names[0].host, &dns.names[0].ports[..]), (host, &[80][..]));
        assert_eq!(dns.names.len(), 1, "{host}");
    }
    let one = dns("c.x.com");
    assert!(one.one_at_a_time);
    assert_eq!((&*one.names[0].host, &one.names[0].ports[..]), ("real.x.com", &[81][..]));
    assert_eq!(&*dns("*.d.com").names[0].host, "d.x.com");
    assert_eq!(shown(service(&compiled.snapshot, "shop", "*.d.com"), 0), "192.0.2.1:80");
}

#[test]
fn hosts_of_one_entry_share_its_addresses_and_others_share_them_where_names_tell_them_apart() {
    let of = |name: &str, hosts: &str, protocol: &str| {
        entry(
            name,
            &format!(
                "hosts: [{hosts}], addresses: [192.0.2.1], resolution: STATIC, endpoints: [{{address: 192.0.2.9}}],
                 ports: [{{name: p, number: 80, protocol: {protocol}}}]"
            ),
        )
    };
    let said = |documents: &[String]| -> Vec<String> {
        let compiled = compile(documents);
        let said = |p: &SourceError| format!("{} {}", p.name.clone().unwrap_or_default(), p.message);
        compiled.problems.iter().map(said).collect()
    };
    let none = Vec::<String>::new();
    for protocol in ["HTTP", "TLS"] {
        let documents = [of("shop/a", "c.x.com, a.x.com, b.x.com", protocol)];
        assert_eq!(said(&documents), none);
        let shared = compile(&documents).snapshot;
        let hosts: Vec<String> =
            shared.sharing("192.0.2.1".parse().unwrap(), 80).map(|(s, _)| s.name.name.to_string()).collect();
        assert_eq!(hosts, ["a.x.com", "b.x.com", "c.x.com"]);
        assert_eq!(said(&[of("shop/a@1", "a.x.com", protocol), of("shop/b@2", "b.x.com", protocol)]), none);
    }
    let keeps = |loser: &str, owner: &str| {
        vec![format!(
            "{loser} holds 192.0.2.1, which service {owner} has on the same port; that one keeps it"
        )]
    };
    assert_eq!(
        said(&[of("shop/a@1", "a.x.com", "TCP"), of("shop/b@2", "b.x.com", "TCP")]),
        keeps("b", "shop/a.x.com")
    );
    assert_eq!(
        said(&[of("shop/a@1", "a.x.com", "HTTP"), of("shop/b@2", "b.x.com", "TLS")]),
        keeps("b", "shop/a.x.com")
    );
    assert_eq!(
        said(&[of("one/a@1", "a.x.com", "HTTP"), of("two/b@2", "b.x.com", "HTTP")]),
        keeps("b", "one/a.x.com")
    );
    let kube =
        resource("v1", "Service", "shop/web", "", "clusterIP: 192.0.2.1, ports: [{name: http, port: 80}]");
    assert_eq!(
        said(&[kube, of("shop/a", "a.x.com, b.x.com", "HTTP")]),
        [keeps("a", "shop/web"), keeps("a", "shop/web")].concat()
    );
}

#[test]
fn s56_a_selector_takes_pods_and_workload_entries_of_its_own_namespace() {
    let sick = workload("shop/vm-3", "address: 192.0.2.3, labels: {app: vm}");
    let sick = format!("{sick}status: {{conditions: [{{type: Healthy, status: 'False'}}]}}\n");
    let compiled = compile(&[
        entry(
            "shop/vms",
            &format!(
                "hosts: [vms.x.com], location: MESH_INTERNAL, resolution: STATIC, workloadSelector: {{labels: {{app: vm}}}}, {WEB}"
            ),
        ),
        workload("shop/vm-1", "address: 192.0.2.1, labels: {app: vm}, ports: {http: 8080}"),
        workload("shop/vm-2", "address: 192.0.2.2, labels: {app: other}"),
        workload("other/vm-4", "address: 192.0.2.4, labels: {app: vm}"),
        sick,
        pod("shop/pod-1", "app: vm", "10.0.0.1"),
        resource(
            "v1",
            "Service",
            "shop/mixed",
            "",
            "clusterIP: 10.96.0.1, selector: {app: vm}, ports: [{name: http, port: 80, targetPort: 9000}]",
        ),
    ]);
    let entry = service(&compiled.snapshot, "shop", "vms.x.com");
    assert_eq!(shown(entry, 0), "10.0.0.1:80, 192.0.2.1:8080, 192.0.2.3:80 unready");
    let mixed = service(&compiled.snapshot, "shop", "mixed");
    assert_eq!(shown(mixed, 0), "10.0.0.1:9000, 192.0.2.1:8080, 192.0.2.3:9000 unready");
    assert!(entry.ports[0].endpoints[0].workload.is_some() && entry.ports[0].endpoints[1].workload.is_none());
}

#[test]
fn s53_a_service_of_kubernetes_keeps_its_name_and_takes_the_names_of_certificates() {
    let compiled = compile(&[
        resource("v1", "Service", "shop/web", "", "clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]"),
        entry(
            "other/web",
            &format!(
                "hosts: [web.shop.svc.cluster.local], resolution: STATIC, subjectAltNames: [spiffe://x/web], endpoints: [{{address: 192.0.2.1}}], {WEB}"
            ),
        ),
    ]);
    let web = service(&compiled.snapshot, "shop", "web");
    assert_eq!(web.subject_alt_names, ["spiffe://x/web".into()]);
    assert_eq!(compiled.snapshot.services().count(), 1);
    assert_eq!(compiled.problems.len(), 1, "{:?}", compiled.problems);
    assert!(compiled.problems[0].message.contains("Service shop/web has"));
}

#[test]
fn s57_of_two_namespaces_the_older_entry_counts_and_within_one_it_is_the_only_one() {
    let spec = |last: u8| {
        format!("hosts: [api.x.com], resolution: STATIC, endpoints: [{{address: 192.0.2.{last}}}], {WEB}")
    };
    let compiled =
        compile(&[entry("a/young@3", &spec(1)), entry("b/old@1", &spec(2)), entry("b/second@2", &spec(3))]);
    let of = |client| shown(compiled.snapshot.sight_from(client).service_by_host("api.x.com").unwrap(), 0);
    assert_eq!(of("a"), "192.0.2.1:80");
    assert_eq!(of("b"), "192.0.2.2:80");
    assert_eq!(of("c"), "192.0.2.2:80");
    let message = &compiled.problems[0].message;
    assert!(message.contains("ServiceEntry b/old has already"), "{message}");
    let ask = |client| match answer(
        &compiled.snapshot,
        &compiled.snapshot.sight_from(client),
        "api.x.com",
        QType::A,
    ) {
        DnsAnswer::Answer { records, .. } => records.into_iter().next().map(|record| record.data),
        other => panic!("{other:?}"),
    };
    let v4 = |namespace| match service(&compiled.snapshot, namespace, "api.x.com").vips[0] {
        IpAddr::V4(v4) => Some(RecordData::A(v4)),
        IpAddr::V6(_) => None,
    };
    assert_eq!((ask("a"), ask("c")), (v4("a"), v4("b")));
}

#[test]
fn s6_of_entries_of_one_age_the_first_by_name_counts_and_only_then_the_first_by_namespace() {
    let spec = |last: u8| {
        format!("hosts: [api.x.com], resolution: STATIC, endpoints: [{{address: 192.0.2.{last}}}], {WEB}")
    };
    let winner = |entries: &[String]| {
        let compiled = compile(entries);
        shown(compiled.snapshot.sight_from("c").service_by_host("api.x.com").unwrap(), 0)
    };
    assert_eq!(winner(&[entry("a/q@1", &spec(1)), entry("b/p@1", &spec(2))]), "192.0.2.2:80");
    assert_eq!(winner(&[entry("b/p@1", &spec(2)), entry("a/p@1", &spec(1))]), "192.0.2.1:80");
    assert_eq!(
        winner(&[entry("a/p@1", &spec(1)), entry("b/z", &spec(2))]),
        "192.0.2.2:80",
        "without an age first"
    );
}

#[test]
fn s55_an_entry_is_outside_the_mesh_unless_it_says_so_and_only_pods_are_spoken_to_in_mutual_tls() {
    let of = |location: &str, at: &str| {
        let spec = format!(
            "hosts: [api.x.com], {location} resolution: STATIC, endpoints: [{{address: {at}}}], {WEB}"
        );
        let compiled = compile(&[entry("shop/ext", &spec), pod("shop/pod-1", "", "10.0.0.1")]);
        let service = service(&compiled.snapshot, "shop", "api.x.com");
        (service.external, service.ports[0].endpoints[0].workload.is_some())
    };
    assert_eq!(of("", "192.0.2.1"), (true, false));
    assert_eq!(of("location: MESH_EXTERNAL,", "192.0.2.1"), (true, false));
    assert_eq!(of("location: MESH_INTERNAL,", "192.0.2.1"), (false, false));
    // A pod's agent takes mutual TLS, whatever an entry calls the pod.
    assert_eq!(of("", "10.0.0.1"), (true, true));
    assert_eq!(of("location: MESH_INTERNAL,", "10.0.0.1"), (false, true));
}

#[test]
fn s57_an_entry_that_is_not_exported_to_a_namespace_is_not_seen_there() {
    let spec = |to: &str, last: u8| {
        format!(
            "hosts: [api.x.com], {to} resolution: STATIC, endpoints: [{{address: 192.0.2.{last}}}], {WEB}"
        )
    };
    let own_only = entry("a/old@1", &spec("exportTo: ['.'],", 1));
    let compiled = compile(std::slice::from_ref(&own_only));
    let ask = |compiled: &Compiled, client| {
        let sight = compiled.snapshot.sight_from(client);
        let is_answered =
            !matches!(answer(&compiled.snapshot, &sight, "api.x.com", QType::A), DnsAnswer::Forward);
        let by_host = sight.service_by_host("api.x.com").map(|service| shown(service, 0));
        assert_eq!(is_answered, by_host.is_some(), "{client}");
        by_host
    };
    assert_eq!(ask(&compiled, "a").as_deref(), Some("192.0.2.1:80"));
    assert_eq!(ask(&compiled, "c"), None);

    let compiled = compile(&[own_only, entry("b/young@2", &spec("", 2))]);
    assert_eq!(ask(&compiled, "a").as_deref(), Some("192.0.2.1:80"));
    assert_eq!(ask(&compiled, "c").as_deref(), Some("192.0.2.2:80"), "the older one is none of its");

    let config = "---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: '{defaultServiceExportTo: [\".\"]}'}}\n";
    let compiled = compile(&[
        config.to_owned(),
        entry("a/old@1", &spec("", 1)),
        entry("b/all@2", &spec("exportTo: ['*'],", 2)),
    ]);
    assert_eq!(ask(&compiled, "a").as_deref(), Some("192.0.2.1:80"));
    assert_eq!(ask(&compiled, "c").as_deref(), Some("192.0.2.2:80"));
}

#[test]
fn a_change_of_one_entry_leaves_the_services_of_others_as_they_are() {
    let spec = |last: u8| {
        format!(
            "hosts: [api{last}.x.com], resolution: STATIC, endpoints: [{{address: 192.0.2.{last}}}], {WEB}"
        )
    };
    let mut index = Index::default();
    put(&mut index, "a.yaml", &entry("a/one", &spec(1)));
    put(&mut index, "b.yaml", &entry("b/two", &spec(2)));
    let mut compiler = Compiler::new(MeshSettings::default());
    let before = compiler.compile(&mut index).snapshot;
    put(&mut index, "b.yaml", &entry("b/two", &spec(2).replace("192.0.2.2", "192.0.2.3")));
    let after = compiler.compile(&mut index).snapshot;
    let of = |snapshot: &Snapshot, namespace, host: &str| {
        Arc::clone(snapshot.service(&Name::new(namespace, host)).unwrap())
    };
    assert!(Arc::ptr_eq(&of(&before, "a", "api1.x.com"), &of(&after, "a", "api1.x.com")));
    assert_eq!(shown(&of(&after, "b", "api2.x.com"), 0), "192.0.2.3:80");
    index.replace("b.yaml".as_ref(), Vec::new());
    assert_eq!(compiler.compile(&mut index).snapshot.services().count(), 1);
}

#[test]
fn s55_an_endpoint_that_is_no_pod_has_the_account_that_its_entry_says() {
    let compiled = compile(&[
        entry(
            "shop/vms",
            &format!(
                "hosts: [vms.x.com], resolution: STATIC, workloadSelector: {{labels: {{app: vm}}}}, {WEB}"
            ),
        ),
        entry(
            "shop/ext",
            &format!(
                "hosts: [ext.x.com], resolution: STATIC, {WEB}, endpoints: [{{address: 192.0.2.1, serviceAccount: one}}, {{address: 192.0.2.2}}, {{address: 10.0.0.1, serviceAccount: pods}}]"
            ),
        ),
        entry(
            "shop/dns",
            &format!(
                "hosts: [dns.x.com], resolution: DNS, {WEB}, endpoints: [{{address: a.x.com, serviceAccount: named}}]"
            ),
        ),
        workload("shop/vm-1", "address: 192.0.2.9, labels: {app: vm}, serviceAccount: vm"),
        pod("shop/pod-1", "app: pod", "10.0.0.1"),
        resource(
            "v1",
            "Service",
            "shop/mixed",
            "",
            "clusterIP: 10.96.0.1, selector: {app: vm}, ports: [{port: 80}]",
        ),
    ]);
    let account = |traits: &Option<Arc<Traits>>| traits.as_ref()?.account.as_deref().map(str::to_owned);
    let of = |host: &str| -> Vec<Option<String>> {
        let service = service(&compiled.snapshot, "shop", host);
        service.ports[0].endpoints.iter().map(|endpoint| account(&endpoint.traits)).collect()
    };
    let said = |name: &str| Some(name.to_owned());
    assert_eq!(of("ext.x.com"), [None, said("one"), None], "who a pod is, the pod says");
    assert_eq!((of("vms.x.com"), of("mixed")), (vec![said("vm")], vec![said("vm")]));
    let Resolution::Dns(dns) = &service(&compiled.snapshot, "shop", "dns.x.com").resolution else { panic!() };
    assert_eq!(account(&dns.names[0].traits), said("named"));
}

#[test]
fn rules_and_destinations_mean_a_declared_host() {
    let compiled = compile(&[
        entry(
            "shop/ext",
            &format!(
                "hosts: [api.x.com], subjectAltNames: [real.x.com], resolution: STATIC, endpoints: [{{address: 192.0.2.1}}], {WEB}"
            ),
        ),
        resource(
            "networking.istio.io/v1",
            "VirtualService",
            "shop/ext",
            "",
            "hosts: [api.x.com], http: [{match: [{headers: {v: {exact: b}}}], directResponse: {status: 204}}, {route: [{destination: {host: api.x.com}}]}]",
        ),
        resource(
            "networking.istio.io/v1",
            "DestinationRule",
            "shop/ext",
            "",
            "host: api.x.com, trafficPolicy: {tls: {mode: SIMPLE}, connectionPool: {tcp: {maxConnections: 7}}}",
        ),
    ]);
    let routes = compiled.snapshot.routes();
    let table = routes.http("api.x.com", 80).and_then(|table| table.get("any", &Default::default())).unwrap();
    assert_eq!(table.rules.len(), 2);
    let key = mesh_core::route::cluster::ClusterKey {
        service: Name::new("shop", "api.x.com"),
        port: 80,
        subset: None,
    };
    let tls = routes.clusters[&key].default.as_ref().unwrap().policy.tls.as_ref().unwrap();
    let names = [mesh_core::route::matching::StringMatch::Exact("real.x.com".into())];
    assert_eq!(tls.subject_alt_names, names, "S47: the entry's, where the rule says none");
    assert!(compiled.problems.is_empty(), "{:?}", compiled.problems);
}
