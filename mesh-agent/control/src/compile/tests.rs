//! Tests of compilation: from manifests to the snapshot.

mod credentials;
mod policies;
mod sight;

use std::{path::Path, time::Duration};

use mesh_core::{
    mode::Mode,
    snapshot::{Endpoint, Name},
};
use mesh_wire::wds::{assembler, assembler::Assembler, encoder::Encoder};
use proptest::prelude::*;

use super::*;
use crate::source::document::{Known, Rules, parse};

/// An index of these files, which must be good.
fn index_of(files: &[(&str, &str)]) -> Index {
    let mut index = Index::default();
    for (file, text) in files {
        put(&mut index, file, text);
    }
    index
}

/// Puts a file, which must be good, into the place of the one before.
pub(super) fn put(index: &mut Index, file: &str, text: &str) {
    let parsed = parse(file.as_ref(), text, &Rules::default(), &Known::new());
    assert!(!parsed.has_errors(), "{text}\n{:#?}", parsed.problems);
    index.replace(Path::new(file), parsed.resources);
}

/// What an agent gets over the controller link.
pub(super) fn over_the_link(snapshot: &Arc<Snapshot>) -> Snapshot {
    let mut assembler = Assembler::default();
    for ((kind, name), edit) in Encoder::new().update(snapshot) {
        let body = edit.unwrap().body;
        assembler.set(&name, assembler::decode(kind, &name, &body).unwrap());
    }
    Snapshot::new(snapshot.version(), assembler.parts())
}

fn compile(text: &str) -> Compiled {
    Compiler::new(MeshSettings::default()).compile(&mut index_of(&[("a.yaml", text)]))
}

fn workload<'a>(snapshot: &'a Snapshot, name: &str) -> &'a Arc<Workload> {
    snapshot.workloads().find(|w| &*w.name.name == name).unwrap()
}

fn service<'a>(snapshot: &'a Snapshot, namespace: &str, name: &str) -> &'a Arc<Service> {
    snapshot.service(&Name::new(namespace, name)).unwrap()
}

fn shown(endpoints: &[Endpoint]) -> Vec<String> {
    let host = |e: &Endpoint| e.hostname.as_ref().map(|h| format!(" {h}")).unwrap_or_default();
    endpoints
        .iter()
        .map(|e| {
            format!(
                "{}{}{}",
                std::net::SocketAddr::new(e.addr, e.port),
                if e.ready { "" } else { " unready" },
                host(e)
            )
        })
        .collect()
}

fn pod(name: &str, addr: &str, labels: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{{labels}}}}}\nspec: {{{spec}}}\nstatus: {{podIP: {addr}}}\n"
    )
}

#[test]
fn the_pod_wins_over_its_namespace_and_the_host_network_over_both() {
    let ns = |labels: &str| {
        format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: default, labels: {{{labels}}}}}\n")
    };
    let ambient = "istio.io/dataplane-mode: ambient";
    let enabled = "nodemesh.dev/mesh: enabled";
    let table = [
        ("", "", false),
        (ambient, "", true),
        (enabled, "", true),
        ("", ambient, true),
        ("", enabled, true),
        (ambient, "istio.io/dataplane-mode: none", false),
        (enabled, "nodemesh.dev/mesh: disabled", false),
        ("nodemesh.dev/mesh: disabled", enabled, true),
        (ambient, "istio.io/dataplane-mode: Kmesh", true),
        ("istio.io/dataplane-mode: ambient, nodemesh.dev/mesh: disabled", "", false),
    ];
    for (namespace, own, meshed) in table {
        let text = format!("{}{}", ns(namespace), pod("a", "10.0.0.1", own, ""));
        assert_eq!(workload(&compile(&text).snapshot, "a").meshed, meshed, "{namespace} | {own}");
    }
    let text = format!("{}{}", ns(ambient), pod("a", "192.0.2.1", "app: a", "hostNetwork: true"));
    let compiled = compile(&text);
    let host = workload(&compiled.snapshot, "a");
    assert!(!host.meshed && host.addrs.is_empty());
    assert_eq!(host.skipped.as_deref(), Some("it runs on the host network"));
    let sidecar = pod("s", "10.0.0.2", "app: s", "containers: [{name: app}, {name: istio-proxy}]");
    let compiled_with = compile(&format!("{}{sidecar}", ns(ambient)));
    let with = workload(&compiled_with.snapshot, "s");
    assert!(!with.meshed && with.skipped.as_deref().is_some_and(|why| why.contains("sidecar")));
    assert!(
        compiled.snapshot.workload_at("192.0.2.1".parse().unwrap()).is_none(),
        "the address is the node's"
    );
}

#[test]
fn pods_of_nodes_that_have_no_agent_are_not_in_the_mesh_until_their_node_may_have_one() {
    let node = |name: &str, os: &str| {
        format!(
            "---\n{{apiVersion: v1, kind: Node, metadata: {{name: {name}, labels: {{kubernetes.io/os: {os}}}}}}}\n"
        )
    };
    let of = |name: &str, node: &str| {
        pod(name, "", "istio.io/dataplane-mode: ambient", &format!("nodeName: {node}"))
    };
    let pods = [of("a", "linux-1"), of("b", "windows-1"), of("c", "unheard-of")].concat();
    let mut index = index_of(&[("pods.yaml", &pods), ("l.yaml", &node("linux-1", "linux"))]);
    put(&mut index, "w.yaml", &node("windows-1", "windows"));
    let agent_nodes = [("kubernetes.io/os", "linux")].into_iter().collect();
    let mut compiler = Compiler::new(MeshSettings { agent_nodes, ..MeshSettings::default() });
    let first = compiler.compile(&mut index).snapshot;
    for (name, tunnel) in [("a", Tunnel::Hbone), ("b", Tunnel::None), ("c", Tunnel::Hbone)] {
        let of = workload(&first, name);
        assert_eq!((of.tunnel, of.meshed), (tunnel, tunnel == Tunnel::Hbone), "{name}");
    }
    let why = "its node windows-1 has no agent, which is for nodes with kubernetes.io/os=linux";
    assert_eq!(workload(&first, "b").skipped.as_deref(), Some(why));
    assert_eq!(workload(&first, "a").skipped, None);

    put(&mut index, "w.yaml", &node("windows-1", "linux"));
    let second = compiler.compile(&mut index).snapshot;
    let of = workload(&second, "b");
    assert_eq!((of.tunnel, of.meshed, of.skipped.as_deref()), (Tunnel::Hbone, true, None));
}

#[test]
fn endpoints_are_the_selected_pods_with_their_own_named_ports() {
    let port =
        |number| format!("containers: [{{name: c, ports: [{{containerPort: {number}, name: http}}]}}]");
    let text = [
        pod("a", "10.0.0.1", "app: web, tier: x", &port(8080)),
        pod("b", "10.0.0.2", "app: web, tier: x", &port(9090)),
        pod("c", "10.0.0.3", "app: web, tier: z", &port(8080)),
        pod("d", "10.0.0.4", "tier: x", &port(8080)),
        pod("e", "10.0.0.5", "app: web, tier: x", ""),
        pod("f", "10.0.0.6", "app: web, tier: x", &port(8080)).replace("podIP", "phase: Pending, podIP"),
        pod("g", "10.0.0.7", "app: web, tier: x", &port(8080)).replace("podIP", "phase: Failed, podIP"),
        pod("h", "192.0.2.9", "app: web, tier: x", &format!("hostNetwork: true, {}", port(7070))),
        "---\napiVersion: v1\nkind: Pod\nmetadata: {name: far, namespace: other, labels: {app: web, tier: x}}\nspec: {}\nstatus: {podIP: 10.0.9.9}\n".into(),
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {clusterIP: 10.96.0.1, selector: {app: web, tier: x}, ports: [{name: http, port: 80, targetPort: http}, {name: raw, port: 81}, {name: odd, port: 82, targetPort: nope}]}\n".into(),
    ]
    .concat();
    let compiled = compile(&text);
    let web = service(&compiled.snapshot, "default", "web");
    assert_eq!(
        shown(&web.ports[0].endpoints),
        ["10.0.0.1:8080", "10.0.0.2:9090", "10.0.0.6:8080 unready", "192.0.2.9:7070"]
    );
    assert_eq!(web.ports[1].endpoints.len(), 5);
    assert_eq!(web.ports[0].endpoints[0].workload, Some(workload(&compiled.snapshot, "a").id));
    let problems: Vec<String> = compiled.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "a.yaml, document 10, Service default/web, spec.ports[2].targetPort: is \"nope\", which no Tcp port of the selected pods is called"
        ]
    );
}

#[test]
fn slices_replace_the_selector_and_give_host_names_and_readiness() {
    let text = [
        pod("db-0", "10.0.0.1", "app: db", ""),
        "
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: sql, port: 5432}, {name: dns, port: 53, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-4, labels: {kubernetes.io/service-name: db}}
addressType: IPv4
endpoints:
- {addresses: [10.0.0.1], hostname: db-0, targetRef: {kind: Pod, name: db-0}}
- {addresses: [10.0.0.2], conditions: {ready: false}}
- {addresses: [10.0.0.3], conditions: {ready: true}}
ports: [{name: sql, port: 15432}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: db-6, labels: {kubernetes.io/service-name: db}}
addressType: IPv6
endpoints: [{addresses: ['fd00::1']}]
ports: [{name: sql, port: 15432}, {name: dns, protocol: UDP}]
"
        .into(),
    ]
    .concat();
    let compiled = compile(&text);
    let db = service(&compiled.snapshot, "default", "db");
    assert_eq!(
        shown(&db.ports[0].endpoints),
        ["10.0.0.1:15432 db-0", "10.0.0.2:15432 unready", "10.0.0.3:15432", "[fd00::1]:15432"]
    );
    assert_eq!(shown(&db.ports[1].endpoints), ["[fd00::1]:53"]);
    assert_eq!(db.ports[0].endpoints[0].workload, Some(workload(&compiled.snapshot, "db-0").id));
    assert_eq!(db.ports[0].endpoints[2].workload, None);
}

#[test]
fn a_headless_service_has_host_names_and_may_be_without_ports() {
    let text = [
        pod("db-0", "10.0.0.1", "app: db", "hostname: db-0, subdomain: db"),
        pod("db-1", "10.0.0.2", "app: db", "hostname: db-1, subdomain: else"),
        "---\n{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {clusterIP: None, selector: {app: db}}}\n".into(),
    ]
    .concat();
    let compiled = compile(&text);
    let db = service(&compiled.snapshot, "default", "db");
    assert!(db.headless && db.vips.is_empty());
    assert_eq!(shown(&db.ports[0].endpoints), ["10.0.0.1:0 db-0", "10.0.0.2:0"]);
}

#[test]
fn services_keep_their_addresses_affinity_and_alias() {
    let text = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, 'fd96::1']
  externalIPs: [192.0.2.1, 10.96.0.1]
  sessionAffinity: ClientIP
  publishNotReadyAddresses: true
  ports: [{port: 80, appProtocol: http}]
status: {loadBalancer: {ingress: [{ip: 192.0.2.2}, {ip: 192.0.2.3, ipMode: Proxy}, {hostname: lb.example.com}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: out}, spec: {type: ExternalName, externalName: API.example.com.}}
";
    let compiled = compile(text);
    let web = service(&compiled.snapshot, "default", "web");
    let texts = |addrs: &[IpAddr]| addrs.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(texts(&web.vips), ["10.96.0.1", "fd96::1"]);
    assert_eq!(texts(&web.external_ips), ["192.0.2.1", "192.0.2.2"]);
    assert_eq!(web.affinity.map(|a| a.as_secs()), Some(10_800));
    assert!(web.publish_not_ready);
    assert_eq!(web.ports[0].app_protocol.as_deref(), Some("http"));
    assert_eq!(
        service(&compiled.snapshot, "default", "out").external_name.as_deref(),
        Some("api.example.com")
    );
}

#[test]
fn one_address_claimed_twice_is_an_error_that_names_both_and_the_older_keeps_it() {
    let svc = |name: &str, created: &str, port: u16| {
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {name}{created}}}, spec: {{clusterIP: 10.96.0.1, ports: [{{port: {port}}}]}}}}\n"
        )
    };
    let of = |files: &[(&str, &str)]| Compiler::new(MeshSettings::default()).compile(&mut index_of(files));
    let compiled =
        of(&[("b.yaml", &svc("a", "", 80)), ("a.yaml", &svc("b", "", 80)), ("c.yaml", &svc("c", "", 81))]);
    let owner = |compiled: &Compiled, port| {
        let found = compiled.snapshot.service_at("10.96.0.1".parse().unwrap(), port, Protocol::Tcp);
        found.map(|(service, _)| service.name.name.to_string())
    };
    assert_eq!(owner(&compiled, 80).as_deref(), Some("b"), "first by file");
    assert_eq!(owner(&compiled, 81).as_deref(), Some("c"), "another port is no conflict");
    let problems: Vec<String> = compiled.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "b.yaml, document 1, Service default/a, spec.clusterIP: is 10.96.0.1, which service default/b (a.yaml, document 1) has on the same port; that one keeps it"
        ]
    );

    let young = svc("b", ", creationTimestamp: '2026-01-02T00:00:00Z'", 80);
    let old = svc("a", ", creationTimestamp: '2026-01-01T00:00:00Z'", 80);
    assert_eq!(
        owner(&of(&[("a.yaml", &young), ("b.yaml", &old)]), 80).as_deref(),
        Some("a"),
        "the older one"
    );
}

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\n{{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {{namespace: {namespace}, name: {name}}}, spec: {spec}}}\n"
    )
}

#[test]
fn modes_come_from_the_narrowest_policy_that_says_something() {
    use Mode::{Disable, Permissive, Strict};
    let mesh = |mode: &str| policy("istio-system", "mesh", &format!("{{mtls: {{mode: {mode}}}}}"));
    let wide = |mode: &str| policy("default", "wide", &format!("{{mtls: {{mode: {mode}}}}}"));
    let own =
        |rest: &str| policy("default", "own", &format!("{{selector: {{matchLabels: {{app: web}}}}{rest}}}"));
    let ports = |list: &str| format!(", mtls: {{mode: STRICT}}, portLevelMtls: {list}");
    type Row = (Vec<String>, Mode, &'static [(u16, Mode)]);
    let table: Vec<Row> = vec![
        (vec![], Permissive, &[]),
        (vec![mesh("STRICT")], Strict, &[]),
        (vec![mesh("UNSET")], Permissive, &[]),
        (vec![mesh("STRICT"), wide("DISABLE")], Disable, &[]),
        (vec![mesh("STRICT"), wide("UNSET")], Strict, &[]),
        (vec![mesh("STRICT"), wide("DISABLE"), own(", mtls: {mode: PERMISSIVE}")], Permissive, &[]),
        (vec![wide("DISABLE"), own("")], Disable, &[]),
        (
            vec![own(&ports("{80: {mode: DISABLE}, 81: {mode: UNSET}, 82: {}}"))],
            Strict,
            // A port that is UNSET has the workload's mode, as every other one.
            &[(80, Disable)],
        ),
        // Port levels need a selector; a selector in the root namespace has no effect; another namespace neither.
        (
            vec![policy("default", "x", "{mtls: {mode: STRICT}, portLevelMtls: {80: {mode: DISABLE}}}")],
            Strict,
            &[],
        ),
        (
            vec![policy("istio-system", "x", "{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}}")],
            Permissive,
            &[],
        ),
        (vec![policy("other", "x", "{mtls: {mode: STRICT}}")], Permissive, &[]),
        (
            vec![policy("default", "x", "{selector: {matchLabels: {app: db}}, mtls: {mode: STRICT}}")],
            Permissive,
            &[],
        ),
        // Empty selectors select all.
        (vec![policy("default", "x", "{selector: {}, mtls: {mode: STRICT}}")], Strict, &[]),
        (vec![policy("default", "x", "{selector: {matchLabels: {}}, mtls: {mode: STRICT}}")], Strict, &[]),
    ];
    for (policies, default, ports) in table {
        let text = format!("{}{}", pod("web", "10.0.0.1", "app: web", ""), policies.concat());
        let compiled = compile(&text);
        let modes = &workload(&compiled.snapshot, "web").modes;
        assert_eq!(
            (modes.default, modes.ports.clone()),
            (default, ports.iter().copied().collect()),
            "{text}"
        );
        let hash = mesh_core::policy::policy_hash(modes, &Mesh::default(), &[]);
        assert_eq!(workload(&compiled.snapshot, "web").policy_hash, hash);
    }
}

#[test]
fn of_equal_policies_the_oldest_counts_then_the_name_and_the_other_is_reported() {
    let dated = |name: &str, date: &str, mode: &str| {
        policy(
            "default",
            &format!("{name}, creationTimestamp: '{date}T00:00:00Z'"),
            &format!("{{mtls: {{mode: {mode}}}}}"),
        )
    };
    let text = [
        pod("web", "10.0.0.1", "app: web", ""),
        dated("a", "2026-02-02", "DISABLE"),
        dated("c", "2026-01-01", "STRICT"),
        dated("b", "2026-02-02", "DISABLE"),
    ]
    .concat();
    let compiled = compile(&text);
    assert_eq!(workload(&compiled.snapshot, "web").modes.default, Mode::Strict);
    assert_eq!(compiled.problems.len(), 2, "{:#?}", compiled.problems);
    assert!(compiled.problems[0].to_string().contains("has no effect: default/c covers the same workloads"));

    let own = |name: &str, mode: &str| {
        policy(
            "default",
            name,
            &format!("{{selector: {{matchLabels: {{app: web}}}}, mtls: {{mode: {mode}}}}}"),
        )
    };
    let text = [pod("web", "10.0.0.1", "app: web", ""), own("b", "DISABLE"), own("a", "STRICT")].concat();
    assert_eq!(workload(&compile(&text).snapshot, "web").modes.default, Mode::Strict);
}

const WORLD: &str = "
{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}}
---
{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: db}, spec: {clusterIP: 10.96.0.2, selector: {app: db}, ports: [{port: 80}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web-1, labels: {app: web}}, spec: {}, status: {podIP: 10.0.0.1}}
---
{apiVersion: v1, kind: Pod, metadata: {name: db-1, labels: {app: db}}, spec: {}, status: {podIP: 10.0.0.2}}
---
{apiVersion: v1, kind: Pod, metadata: {name: far-1, namespace: far, labels: {app: db}}, spec: {}, status: {podIP: 10.0.0.3}}
---
{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: m, namespace: istio-system}, spec: {mtls: {mode: STRICT}}}
";

#[test]
fn a_change_reuses_everything_it_does_not_touch() {
    let mut index = index_of(&[("a.yaml", WORLD)]);
    let mut compiler = Compiler::new(MeshSettings::default());
    let first = compiler.compile(&mut index).snapshot;
    assert_eq!(first.version(), 1);
    assert!(
        Arc::ptr_eq(&first, &compiler.compile(&mut index).snapshot),
        "nothing changed, nothing is published"
    );

    put(&mut index, "a.yaml", &WORLD.replace("10.0.0.1}", "10.0.0.9}"));
    let second = compiler.compile(&mut index).snapshot;
    assert_eq!(second.version(), 2);
    let same = |name| Arc::ptr_eq(service(&first, "default", name), service(&second, "default", name));
    assert!(same("db") && !same("web"));
    let same = |name| Arc::ptr_eq(workload(&first, name), workload(&second, name));
    assert!(same("db-1") && same("far-1") && !same("web-1"));
    assert_eq!(workload(&first, "web-1").policy_hash, workload(&second, "web-1").policy_hash);
    assert_eq!(service(&second, "default", "web").ports[0].endpoints[0].addr.to_string(), "10.0.0.9");

    put(&mut index, "a.yaml", &WORLD.replace("STRICT", "DISABLE"));
    let third = compiler.compile(&mut index).snapshot;
    assert_eq!(
        workload(&third, "far-1").modes.default,
        Mode::Disable,
        "the mesh's policy reaches every namespace"
    );
    assert!(Arc::ptr_eq(service(&first, "default", "db"), service(&third, "default", "db")));
}

/// Of each kind one that changes what becomes of pods or services of [`WORLD`].
const SAYINGS: [&str; 15] = [
    "{apiVersion: v1, kind: Namespace, metadata: {name: far, labels: {istio.io/dataplane-mode: ambient}}}",
    "{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/region: r1}}}",
    "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: own}, spec: {mtls: {mode: PERMISSIVE}}}",
    "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: a, namespace: istio-system}, spec: {mtls: {mode: DISABLE}}}",
    "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: own}, spec: {}}",
    "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: all, namespace: istio-system}, spec: {}}",
    "{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {name: own}, spec: {egress: [{hosts: ['./*']}]}}",
    "{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {name: all, namespace: istio-system}, spec: {egress: [{hosts: ['./*']}]}}",
    "{apiVersion: networking.istio.io/v1, kind: Sidecar, metadata: {name: own}, spec: {outboundTrafficPolicy: {mode: ALLOW_ANY, egressProxy: {host: web}}}}",
    "{apiVersion: v1, kind: ConfigMap, metadata: {name: istio, namespace: istio-system}, data: {mesh: 'trustDomain: other.example'}}",
    "{apiVersion: v1, kind: Service, metadata: {name: new}, spec: {clusterIP: 10.96.9.9, selector: {app: web}, ports: [{port: 80}]}}",
    "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: web-x, labels: {kubernetes.io/service-name: web}}, addressType: IPv4, ports: [{port: 80}], endpoints: [{addresses: [10.0.9.9]}]}",
    "{apiVersion: networking.istio.io/v1, kind: ServiceEntry, metadata: {name: new}, spec: {hosts: [new.example], ports: [{number: 80, name: http}], resolution: STATIC, workloadSelector: {labels: {app: web}}}}",
    "{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm}, spec: {address: 10.0.8.8, labels: {app: web}}}",
    "{apiVersion: v1, kind: Pod, metadata: {name: web-9, labels: {app: web}}, spec: {nodeName: n1}, status: {podIP: 10.0.0.99}}",
];

#[test]
fn whatever_a_pod_depends_on_reaches_it_when_it_comes_and_when_it_goes() {
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: on-n1, labels: {app: web}}, spec: {nodeName: n1}, status: {podIP: 10.0.0.77}}";
    let files = [("a.yaml", WORLD), ("b.yaml", pod)];
    let at_once = |more: &[(&str, &str)]| {
        let files: Vec<_> = files.iter().chain(more).copied().collect();
        Compiler::new(MeshSettings::default()).compile(&mut index_of(&files)).snapshot
    };
    let plain = at_once(&[]);
    let mut index = index_of(&files);
    let mut compiler = Compiler::new(MeshSettings::default());
    compiler.compile(&mut index);
    for saying in SAYINGS {
        let wanted = at_once(&[("c.yaml", saying)]);
        assert!(!wanted.same_world(&plain), "has no effect, so this shows nothing: {saying}");
        put(&mut index, "c.yaml", saying);
        assert!(compiler.compile(&mut index).snapshot.same_world(&wanted), "came: {saying}");
        index.replace(Path::new("c.yaml"), Vec::new());
        assert!(compiler.compile(&mut index).snapshot.same_world(&plain), "went: {saying}");
    }
}

#[test]
fn a_namespace_that_goes_takes_its_parts_with_it() {
    let mut index = index_of(&[("a.yaml", WORLD)]);
    let mut compiler = Compiler::new(MeshSettings::default());
    compiler.compile(&mut index);
    index.replace(Path::new("a.yaml"), Vec::new());
    let empty = compiler.compile(&mut index).snapshot;
    assert_eq!((empty.workloads().count(), empty.services().count()), (0, 0));
    assert!(compiler.namespaces.is_empty());
}

#[test]
fn the_first_compilation_is_published_even_if_empty() {
    let snapshot = Compiler::new(MeshSettings::default()).compile(&mut Index::default()).snapshot;
    assert_eq!(snapshot.version(), 1);
}

proptest! {
    #[test]
    fn the_world_does_not_depend_on_the_order_of_files_nor_on_the_way_there(
        order in Just((0..7_usize).collect::<Vec<_>>()).prop_shuffle(),
        detours in prop::collection::vec(0..7_usize, 0..4),
    ) {
        // Two files claim one name, and two services one address, so that order could matter.
        let mut documents: Vec<&str> = WORLD.split("---").collect();
        documents.truncate(5);
        documents.push("{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.7, ports: [{port: 80}]}}");
        documents.push("{apiVersion: v1, kind: Service, metadata: {name: zzz}, spec: {clusterIP: 10.96.0.2, ports: [{port: 80}]}}");
        let files: Vec<String> = (0..7).map(|i| format!("{i}.yaml")).collect();
        let straight: Vec<(&str, &str)> = files.iter().map(String::as_str).zip(documents.iter().copied()).collect();
        let wanted = Compiler::new(MeshSettings::default()).compile(&mut index_of(&straight));

        let mut index = Index::default();
        let mut compiler = Compiler::new(MeshSettings::default());
        for at in &order {
            put(&mut index, straight[*at].0, straight[*at].1);
            compiler.compile(&mut index);
        }
        for at in &detours {
            index.replace(Path::new(straight[*at].0), Vec::new());
            compiler.compile(&mut index);
            put(&mut index, straight[*at].0, straight[*at].1);
        }
        let got = compiler.compile(&mut index);
        prop_assert!(got.snapshot.same_world(&wanted.snapshot));
        prop_assert_eq!(got.problems, wanted.problems);
    }
}

/// Time this thread has run: what others do on the machine does not count.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Prints what a mesh of 10 000 services costs; run with `--release -- --nocapture` for figures that mean something.
#[test]
fn ten_thousand_services_compile_and_one_changed_pod_reuses_the_rest() {
    const SERVICES: usize = 10_000;
    let name = |i: usize| format!("app-{i}");
    let text_of = |i: usize| {
        let (app, high, low) = (name(i), i / 256, i % 256);
        format!(
            "---\n{{apiVersion: v1, kind: Service, metadata: {{name: {app}}}, spec: {{clusterIP: 10.96.{high}.{low}, \
             selector: {{app: {app}}}, ports: [{{name: http, port: 80, targetPort: 8080}}, \
             {{name: tls, port: 443, targetPort: 8443}}]}}}}\n\
             ---\n{{apiVersion: v1, kind: Pod, metadata: {{name: {app}-0, labels: {{app: {app}, tier: x}}}}, \
             spec: {{nodeName: n1}}, status: {{podIP: 10.200.{high}.{low}}}}}\n"
        )
    };
    let whole = cpu_time();
    let text: String = (0..SERVICES).map(text_of).collect();
    let started = cpu_time();
    let parsed = parse("a.yaml".as_ref(), &text, &Rules::default(), &Known::new());
    assert!(!parsed.has_errors(), "{:?}", parsed.problems.first());
    println!("parse {} documents, {} bytes: {:?}", parsed.resources.len(), text.len(), cpu_time() - started);

    let mut index = Index::default();
    let started = cpu_time();
    index.replace(Path::new("a.yaml"), parsed.resources);
    println!("index: {:?}", cpu_time() - started);
    let mut compiler = Compiler::new(MeshSettings::default());
    let started = cpu_time();
    let first = compiler.compile(&mut index).snapshot;
    println!("compile: {:?}", cpu_time() - started);
    assert_eq!((first.services().count(), first.workloads().count()), (SERVICES, SERVICES));

    put(
        &mut index,
        "b.yaml",
        "{apiVersion: v1, kind: Pod, metadata: {name: more, labels: {app: app-7}}, spec: {}, status: {podIP: 10.9.9.9}}",
    );
    let started = cpu_time();
    let second = compiler.compile(&mut index).snapshot;
    println!("compile after one change: {:?}", cpu_time() - started);
    // A bound that holds without optimisation on a slow machine, and that anything quadratic breaks.
    assert!(cpu_time() - whole < Duration::from_secs(20));
    let reused =
        first.services().filter(|s| second.service(&s.name).is_some_and(|now| Arc::ptr_eq(s, now))).count();
    assert_eq!(reused, SERVICES - 1);

    let started = cpu_time();
    let tables = mesh_core::slots::tables(&second, &Default::default(), &Default::default());
    println!("tables: {:?} ({} frontends)", cpu_time() - started, tables.services.len());
    let started = cpu_time();
    let again = mesh_core::slots::tables(&second, &Default::default(), &tables);
    println!("tables again: {:?}", cpu_time() - started);
    assert!(again.backends.iter().all(|(id, slots)| Arc::ptr_eq(slots, &tables.backends[id])));
}

#[test]
fn a_meshed_pod_has_a_tunnel_unless_it_opts_out_of_it() {
    let text = "
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: tunnelled}
spec: {nodeName: n1, containers: [{name: app}]}
---
apiVersion: v1
kind: Pod
metadata: {name: plain, annotations: {nodemesh.dev/tunnel: none}}
spec: {nodeName: n1, containers: [{name: app}]}
";
    let snapshot = compile(text).snapshot;
    assert_eq!(workload(&snapshot, "tunnelled").tunnel, Tunnel::Hbone);
    assert!(workload(&snapshot, "plain").meshed);
    assert_eq!(workload(&snapshot, "plain").tunnel, Tunnel::None);
}

#[test]
fn a_pod_with_a_wrong_annotation_is_still_behind_its_service_and_closed_where_that_was_meant() {
    let text = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web, nodemesh.dev/mesh: enabled}, annotations: {nodemesh.dev/fail-closed: both, nodemesh.dev/tunnel: 'off'}}
spec: {nodeName: n1, containers: [{name: app}]}
status: {podIP: 10.0.0.1}
";
    let snapshot = compile(text).snapshot;
    let pod = workload(&snapshot, "web-1");
    assert!(pod.meshed && pod.settings.outbound_fail_closed);
    assert_eq!(pod.tunnel, Tunnel::Hbone);
    let web = snapshot.service(&Name::new("default", "web")).unwrap();
    assert_eq!(web.ports[0].endpoints.iter().map(|e| e.workload).collect::<Vec<_>>(), [Some(pod.id)]);
}
