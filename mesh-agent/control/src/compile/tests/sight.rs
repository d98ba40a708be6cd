//! Who sees what, and where things are: from manifests to workloads and services.

use mesh_core::{
    balance::locality::Place,
    route::{
        cluster::{ClusterKey, Locality},
        defaults::Distribution,
        http::Backend,
        scope::{Audience, OutboundPolicy},
    },
};

use super::*;

fn named(kind: &str, api: &str, namespace: &str, name: &str, meta: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: {api}, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}{meta}}}, spec: {{{spec}}}}}\n"
    )
}

fn pod_in(namespace: &str, name: &str, labels: &str, node: &str) -> String {
    named("Pod", "v1", namespace, name, &format!(", labels: {{{labels}}}"), &format!("nodeName: {node}"))
}

fn service_in(namespace: &str, name: &str, meta: &str, spec: &str) -> String {
    let spec = format!("clusterIP: None, ports: [{{port: 80}}]{spec}");
    named("Service", "v1", namespace, name, meta, &spec)
}

fn sidecar(namespace: &str, name: &str, second: u8, spec: &str) -> String {
    let meta = format!(", creationTimestamp: \"2026-01-01T00:00:{second:02}Z\"");
    named("Sidecar", "networking.istio.io/v1", namespace, name, &meta, spec)
}

fn mesh(config: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: ConfigMap, metadata: {{name: istio, namespace: istio-system}}, data: {{mesh: '{{{config}}}'}}}}\n"
    )
}

fn node(name: &str, region: &str, zone: &str) -> String {
    format!(
        "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {name}, labels: {{topology.kubernetes.io/region: {region}, topology.kubernetes.io/zone: {zone}}}}}}}\n"
    )
}

#[test]
fn s64_a_selected_workload_has_its_own_sidecar_then_the_namespaces_then_the_roots() {
    let text = [
        pod_in("a", "web", "app: web", "n1"),
        pod_in("a", "api", "app: api", "n1"),
        pod_in("b", "other", "app: web", "n1"),
        sidecar("a", "later", 3, "workloadSelector: {labels: {app: web}}, egress: [{hosts: ['./*']}]"),
        sidecar("a", "older", 1, "workloadSelector: {labels: {app: web}}, egress: [{hosts: ['~/*']}]"),
        sidecar("a", "all", 4, "egress: [{hosts: ['*/*']}]"),
        sidecar("a", "unheard", 5, "egress: [{hosts: ['./*']}]"),
        sidecar("istio-system", "root", 9, "outboundTrafficPolicy: {mode: REGISTRY_ONLY}"),
    ]
    .concat();
    let compiled = compile(&text);
    for snapshot in [(*compiled.snapshot).clone(), over_the_link(&compiled.snapshot)] {
        let of = |name| workload(&snapshot, name).sidecar.as_ref().map(ToString::to_string);
        assert_eq!(of("web").as_deref(), Some("a/older"));
        assert_eq!(of("api").as_deref(), Some("a/all"));
        assert_eq!(of("other").as_deref(), Some("istio-system/root"));
        let outbound = |name| snapshot.sight_of(workload(&snapshot, name)).outbound();
        assert_eq!(outbound("other"), OutboundPolicy::RegistryOnly);
        assert_eq!(outbound("web"), OutboundPolicy::AllowAny);
        assert_eq!(snapshot.routes().sidecars.len(), 5);
    }
}

#[test]
fn s45_limits_of_the_servers_side_reach_its_workloads_by_port() {
    let text = [
        pod_in("a", "web", "app: web", "n1"),
        pod_in("b", "free", "app: web", "n1"),
        sidecar(
            "a",
            "limits",
            1,
            "inboundConnectionPool: {tcp: {maxConnections: 5, connectTimeout: 3s}}, ingress: [
               {port: {number: 8080, protocol: HTTP, name: h}, defaultEndpoint: '127.0.0.1:8080', connectionPool: {tcp: {idleTimeout: 7s}, http: {idleTimeout: 9s}}}]",
        ),
    ]
    .concat();
    let compiled = compile(&text);
    for snapshot in [(*compiled.snapshot).clone(), over_the_link(&compiled.snapshot)] {
        let of = |name, port| snapshot.inbound_pool(workload(&snapshot, name), port).cloned();
        let all = of("web", 80).unwrap();
        assert_eq!((all.max_connections, all.connect_timeout), (Some(5), Duration::from_secs(3)));
        let own = of("web", 8080).unwrap();
        assert_eq!(
            (own.max_connections, own.idle_timeout, own.http_idle_timeout),
            (None, Duration::from_secs(7), Some(Duration::from_secs(9))),
            "replaced as a whole"
        );
        assert_eq!(of("free", 80), None);
        // It sees everything, as one without a Sidecar does.
        assert!(snapshot.routes().sidecars.values().all(|scope| scope.sees(
            "b",
            "x.b.svc.cluster.local",
            80
        )));
    }
}

#[test]
fn a_sidecar_that_comes_and_goes_changes_its_workloads() {
    let mut index = index_of(&[("a.yaml", &pod_in("a", "web", "app: web", "n1"))]);
    let mut compiler = Compiler::new(MeshSettings::default());
    let of = |compiled: &Compiled| {
        workload(&compiled.snapshot, "web").sidecar.as_ref().map(|sidecar| sidecar.name.to_string())
    };
    assert_eq!(of(&compiler.compile(&mut index)), None);
    put(&mut index, "root.yaml", &sidecar("istio-system", "root", 1, "egress: [{hosts: ['./*']}]"));
    assert_eq!(of(&compiler.compile(&mut index)).as_deref(), Some("root"));
    put(&mut index, "own.yaml", &sidecar("a", "own", 1, "egress: [{hosts: ['./*']}]"));
    assert_eq!(of(&compiler.compile(&mut index)).as_deref(), Some("own"));
    put(&mut index, "own.yaml", "");
    put(&mut index, "root.yaml", "");
    assert_eq!(of(&compiler.compile(&mut index)), None);
}

#[test]
fn s68_an_egress_proxy_is_a_port_of_a_service_or_leads_nowhere() {
    let two_ports = named(
        "Service",
        "v1",
        "out",
        "two",
        "",
        "clusterIP: None, ports: [{name: a, port: 80}, {name: b, port: 81}]",
    );
    let world = [pod_in("a", "web", "app: web", "n1"), service_in("out", "one", "", ""), two_ports].concat();
    let through = |proxy: &str| {
        sidecar(
            "a",
            "own",
            1,
            &format!("outboundTrafficPolicy: {{mode: ALLOW_ANY, egressProxy: {{{proxy}}}}}"),
        )
    };
    let one = "one.out.svc.cluster.local";
    let two = "two.out.svc.cluster.local";
    for (proxy, expected) in [
        (format!("host: {one}"), Ok(("one", 80, None))),
        (format!("host: {one}, port: {{number: 80}}, subset: v1"), Ok(("one", 80, Some("v1")))),
        (format!("host: {two}, port: {{number: 81}}"), Ok(("two", 81, None))),
        (format!("host: {two}"), Err("none is named")),
        (format!("host: {one}, port: {{number: 99}}"), Err("has no TCP port 99")),
        ("host: one".to_owned(), Err("no service has the host one.a.svc.cluster.local")),
    ] {
        let compiled = compile(&(world.clone() + &through(&proxy)));
        for snapshot in [(*compiled.snapshot).clone(), over_the_link(&compiled.snapshot)] {
            let sight = snapshot.sight_of(workload(&snapshot, "web"));
            let found = sight.egress_proxy().unwrap();
            assert_eq!(&*found.origin.field, "spec.outboundTrafficPolicy.egressProxy");
            match (&found.backend, expected) {
                (Backend::Cluster(key), Ok((name, port, subset))) => {
                    assert_eq!((&*key.service.name, key.port, key.subset.as_deref()), (name, port, subset));
                }
                (Backend::Broken { status: 503, reason }, Err(words)) => {
                    assert!(reason.contains(words), "{reason}")
                }
                (found, _) => panic!("{proxy}: {found:?}"),
            }
        }
    }
}

#[test]
fn a_service_that_comes_and_goes_is_or_is_not_the_egress_proxy_of_a_sidecar() {
    let own = "outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: one.out.svc.cluster.local}}";
    let text = pod_in("a", "web", "app: web", "n1") + &sidecar("a", "own", 1, own);
    let mut index = index_of(&[("a.yaml", &text)]);
    let mut compiler = Compiler::new(MeshSettings::default());
    let is_there = |compiled: &Compiled| {
        let sight = compiled.snapshot.sight_of(workload(&compiled.snapshot, "web"));
        matches!(sight.egress_proxy().unwrap().backend, Backend::Cluster(_))
    };
    assert!(!is_there(&compiler.compile(&mut index)));
    put(&mut index, "b.yaml", &service_in("out", "one", "", ""));
    assert!(is_there(&compiler.compile(&mut index)));
    put(&mut index, "b.yaml", "");
    assert!(!is_there(&compiler.compile(&mut index)));
}

#[test]
fn b6_services_are_exported_as_they_say_else_as_the_mesh_says() {
    let export = |to: &str| format!(", annotations: {{networking.istio.io/exportTo: '{to}'}}");
    let services = [
        service_in("a", "silent", "", ""),
        service_in("a", "all", &export("*"), ""),
        service_in("a", "own", &export("."), ""),
        service_in("a", "some", &export("b, c"), ""),
        service_in("a", "none", &export("~"), ""),
    ]
    .concat();
    let only = |names: &[&str]| Audience::Only(names.iter().map(|name| (*name).into()).collect());
    let mut index = index_of(&[("a.yaml", &services)]);
    let mut compiler = Compiler::new(MeshSettings::default());
    let first = compiler.compile(&mut index).snapshot;
    for snapshot in [(*first).clone(), over_the_link(&first)] {
        let of = |name| service(&snapshot, "a", name).audience.clone();
        assert_eq!([of("silent"), of("all")], [Audience::Everyone, Audience::Everyone]);
        assert_eq!([of("own"), of("some"), of("none")], [only(&["a"]), only(&["b", "c"]), only(&[])]);
    }
    put(&mut index, "mesh.yaml", &mesh("defaultServiceExportTo: [\".\"]"));
    let second = compiler.compile(&mut index).snapshot;
    assert_eq!(service(&second, "a", "silent").audience, only(&["a"]));
    assert_eq!(service(&second, "a", "all").audience, Audience::Everyone);
}

#[test]
fn pods_are_where_their_nodes_are_and_follow_them() {
    let pods = [
        pod_in("a", "web", "", "n1"),
        pod_in("a", "far", "istio-locality: r9.z9", "n1"),
        pod_in("b", "lost", "", "n2"),
    ]
    .concat();
    let mut index = index_of(&[("a.yaml", &pods), ("n1.yaml", &node("n1", "r1", "z1"))]);
    let mut compiler = Compiler::new(MeshSettings::default());
    let of = |snapshot: &Snapshot, name: &str| {
        let Place { region, zone, node, .. } = workload(snapshot, name).place.clone();
        format!("{region}/{zone}@{node}")
    };
    let first = compiler.compile(&mut index).snapshot;
    for snapshot in [(*first).clone(), over_the_link(&first)] {
        assert_eq!(["web", "far", "lost"].map(|name| of(&snapshot, name)), ["r1/z1@n1", "r9/z9@n1", "/@n2"]);
    }
    put(&mut index, "n1.yaml", &node("n1", "r1", "z2"));
    let second = compiler.compile(&mut index).snapshot;
    assert_eq!(of(&second, "web"), "r1/z2@n1");
    assert!(
        Arc::ptr_eq(workload(&first, "lost"), workload(&second, "lost")),
        "another node's stay as they are"
    );
}

#[test]
fn b9_s48_a_services_preference_is_its_own_until_a_rule_says_another() {
    let rule = |name: &str, spec: &str| {
        let spec = format!("host: {name}, trafficPolicy: {{loadBalancer: {{{spec}}}}}");
        named("DestinationRule", "networking.istio.io/v1", "a", name, "", &spec)
    };
    let text = [
        service_in("a", "zone", "", ", trafficDistribution: PreferClose"),
        service_in("a", "node", "", ", trafficDistribution: PreferSameNode"),
        service_in(
            "a",
            "noted",
            ", annotations: {networking.istio.io/traffic-distribution: PreferSameZone}",
            "",
        ),
        service_in("a", "any", "", ""),
        rule("zone", "simple: RANDOM"),
        rule("node", "localityLbSetting: {enabled: false}"),
        rule("noted", "zoneAwareLbSetting: {minClusterSize: 3}"),
        mesh("localityLbSetting: {distribute: [{from: a, to: {b: 100}}]}"),
    ]
    .concat();
    let compiled = compile(&text);
    for snapshot in [(*compiled.snapshot).clone(), over_the_link(&compiled.snapshot)] {
        let of = |name| service(&snapshot, "a", name).distribution;
        let (zone, node) = (Some(Distribution::SameZone), Some(Distribution::SameNode));
        assert_eq!(["zone", "node", "noted", "any"].map(of), [zone, node, zone, None]);
        let ruled = |name: &str| {
            let key = ClusterKey { service: Name::new("a", name.to_owned()), port: 80, subset: None };
            let cluster = snapshot.routes().clusters[&key].default.clone().unwrap();
            cluster.policy.balancing.locality.clone()
        };
        assert_eq!(ruled("zone"), Distribution::SameZone.locality());
        assert_eq!(ruled("node"), Locality::Anywhere);
        let aware = Locality::ZoneAware { regions: Vec::new(), labels: Vec::new(), min_size: 3 };
        assert_eq!(ruled("noted"), aware, "a rule comes before the service");
    }
}
